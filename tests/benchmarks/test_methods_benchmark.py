"""benchmarks/methods: its grid, the choice of learning rates, tables from files written by hand."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import fedprompt
from fedprompt.client.recipe import LocalRecipe
from fedprompt.config import compose, conf_root
from fedprompt.core.types import ServerState
from fedprompt.data.prefix.tables import FeatureTable
from fedprompt.models.backbone import load_backbone

FOLDER = Path(__file__).parents[2] / "benchmarks" / "methods"
NAMES = ("grid", "runner", "summary", "figures", "tables", "bounds", "domains")


@pytest.fixture
def modules() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


def test_every_cell_has_a_file_of_its_own_and_composes(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    grid, run = modules["grid"], modules["runner"]
    cells = grid.final_cells()
    rates = grid.rate_cells(cells)
    files = [cell.file for cell in [*cells, *rates]]
    assert len(set(files)) == len(files)
    assert len({cell.file for cell in cells if cell.method in grid.MAIN}) == len(
        [cell for cell in cells if cell.method in grid.MAIN]
    )
    # One seed, scale and partition is enough: they change numbers alone.
    alike = {(cell.setting.split("/")[0], cell.method): cell for cell in cells}
    for cell in alike.values():
        if cell.preset in grid.CLIENT_RATES_OF:
            like, setting = grid.CLIENT_RATES_OF[cell.preset], grid.rate_setting(cell.setting)
            try_scales(modules, tmp_path, setting, like, 0.5, 0.5, 0.5)
        changes = run.overrides_of(cell, 20, 3.0, tmp_path)
        config = compose(run.experiment_of(cell.setting), changes)
        assert config.method == cell.preset
        expected = {**dict.fromkeys(grid.CLOSED_FORM, 1), **dict.fromkeys(grid.POOLED, 5)}
        assert config.rounds == expected.get(cell.preset, 20)
        assert config.clients.pooled == (cell.preset in grid.POOLED)
        assert config.runtime.name == "serial"


def test_the_grid_is_what_is_reported(modules: dict[str, ModuleType]) -> None:
    grid = modules["grid"]
    cells = grid.final_cells()
    least = {
        **dict.fromkeys(("pfpt", "fedavg_pt", "fedavg_pt_plus", "head_only"), 5),
        **dict.fromkeys(
            ("fedprox_pt", "scaffold_pt", "fedopt_pt", "gmm_pt", "pfedpg", "fedcof"), 3
        ),
    }
    assert set(grid.MAIN) == set(least)
    tasks = ("digits", "domains_shared", "domains_frozen")
    for task, partition, (method, number) in itertools.product(
        tasks, ("dirichlet_0.5", "dirichlet_0.1", "imbalance"), least.items()
    ):
        setting = f"{task}/{partition}"
        seeds = sorted(c.seed for c in cells if (c.setting, c.method) == (setting, method))
        if (task, method) == ("domains_frozen", "head_only"):  # nothing is left to train
            assert seeds == []
        else:
            assert seeds == list(range(len(seeds))) and len(seeds) >= number, (setting, method)
    listed = {path.stem for path in (conf_root() / "method").glob("*.yaml")}
    assert {c.preset for c in cells if c.setting.startswith("domains")} == listed


def test_rates_are_scaled(modules: dict[str, ModuleType]) -> None:
    grid, run = modules["grid"], modules["runner"]
    cell = grid.Cell("domains_shared/dirichlet_0.5", "scaffold_pt", 2, 3.0)
    config = compose(run.experiment_of(cell.setting), run.overrides_of(cell, 20, 3.0))
    assert config.prompts.lr == pytest.approx(0.9)
    assert config.head.lr == pytest.approx(0.3)
    tuned = grid.Cell("domains_shared/imbalance", "lora_fedavg", 2, 0.3)
    config = compose(run.experiment_of(tuned.setting), run.overrides_of(tuned, 20, 0.3))
    assert config.tuning.options.lr == pytest.approx(3e-4)


def try_scales(
    modules: dict[str, ModuleType], folder: Path, setting: str, method: str, *values: float | None
) -> None:
    """Files as of the runs that choose a rate, with these validation accuracies."""
    grid = modules["grid"]
    for scale, value in zip(grid.scales_of(setting, method), values, strict=True):
        path = folder / grid.Cell(setting, method, grid.RATE_SEED, scale).file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"validation_accuracy": value}))


def test_clients_of_fedopt_have_the_rates_that_were_chosen_for_fedavg(
    modules: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, run = modules["grid"], modules["runner"]
    cell = grid.Cell("domains_frozen/imbalance", "fedopt_pt", 2, 3.0)
    with pytest.raises(FileNotFoundError):
        run.overrides_of(cell, 20, 3.0, tmp_path)
    assert run.run_all([cell], 1, 20, tmp_path) == 1
    assert "no learning rate" in capsys.readouterr().out
    try_scales(modules, tmp_path, cell.setting, "fedavg_pt", 0.6, 0.5, 0.4)
    changes = run.overrides_of(cell, 20, 3.0, tmp_path)
    config = compose(run.experiment_of(cell.setting), changes)
    assert config.aggregator.options.lr == pytest.approx(0.03)
    assert config.prompts.lr == pytest.approx(0.03 * 0.01)


def test_the_rate_is_chosen_by_validation_on_a_seed_that_is_not_reported(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    grid, run = modules["grid"], modules["runner"]
    assert grid.RATE_SEED not in {cell.seed for cell in grid.final_cells()}
    cell = grid.Cell("digits/dirichlet_0.1", "pfpt", 3)
    with pytest.raises(FileNotFoundError):
        run.choose(cell, tmp_path)
    try_scales(modules, tmp_path, "digits/dirichlet_0.5", "pfpt", 0.7, 0.8, 0.8)
    assert run.choose(cell, tmp_path) == 1.0  # the smaller of equals
    with pytest.raises(FileNotFoundError):  # imbalance has rates of its own
        run.choose(grid.Cell("digits/imbalance", "pfpt", 3), tmp_path)
    assert run.choose(grid.Cell("domains_shared/imbalance", "fedncm", 0), tmp_path) == 1.0
    assert run.choose(grid.Cell("digits/dirichlet_0.5", "pfpt", 0, 3.0), tmp_path) == 3.0
    # A near relation's.
    setting = "domains_shared/dirichlet_0.5"
    try_scales(modules, tmp_path, setting, "full_fedavg", 0.5, 0.4, 0.6)
    cell = grid.Cell(setting, "full_fedprox", 0)
    assert run.choose(cell, tmp_path) == 3.0
    assert {each.method for each in grid.rate_cells([cell])} == {"full_fedavg"}


def test_runs_of_other_options_or_rounds_do_not_count(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    grid, run = modules["grid"], modules["runner"]
    cell = grid.Cell("digits/imbalance", "pfpt: no memory", 0)
    path = tmp_path / cell.file
    path.parent.mkdir(parents=True)
    overrides = run.overrides_of(cell, 20, 1.0)
    assert "aggregator.memory=0" in overrides
    done = {"overrides": overrides, "scale": 1.0, "experiment": run.experiment_of(cell.setting)}
    done["config"] = run.config_of(cell.setting, overrides)
    path.write_text(json.dumps(done))
    assert run.is_there(cell, 20, tmp_path)
    assert not run.is_there(cell, 21, tmp_path)
    other = {**done["experiment"], "eval_every": 1}
    earlier = {**done["config"], "prompts": dict(done["config"]["prompts"])}
    del earlier["prompts"]["whiten"]  # an option that came later is as it was
    path.write_text(json.dumps({**done, "config": earlier}))
    assert run.is_there(cell, 20, tmp_path)
    default = {**done["config"], "aggregator": {**done["config"]["aggregator"], "memory": 9.0}}
    for wrong in ({"overrides": overrides[:-1]}, {"experiment": other}, {"config": default}):
        path.write_text(json.dumps({**done, **wrong}))
        assert not run.is_there(cell, 20, tmp_path)


def test_under_imbalance_a_scale_is_of_the_prompts_rate_alone(
    modules: dict[str, ModuleType],
) -> None:
    """A shared head has its own best rate there, which `head_only` finds."""
    grid, run = modules["grid"], modules["runner"]

    def rates(setting: str, method: str) -> list[str]:
        changes = run.overrides_of(grid.Cell(setting, method, 0), 20, 0.1)
        return [each for each in changes if ".lr=" in each]

    tied = ["prompts.lr=0.001", "head.lr=0.0003"]
    assert rates("domains_shared/dirichlet_0.5", "pfpt") == tied
    assert rates("domains_shared/imbalance", "head_only") == tied
    assert rates("domains_shared/imbalance", "local_only") == tied  # nothing is averaged
    assert rates("domains_shared/imbalance", "pfpt") == ["prompts.lr=0.001", "head.lr=0.0009"]
    factor = grid.HEAD_SCALES["domains_shared/imbalance"]["sgd"]
    own = ["prompts.lr=0.03", f"head.lr={0.1 * factor:g}"]
    assert rates("domains_shared/imbalance", "scaffold_pt") == own


def test_the_neighbours_of_the_best_rate_are_tried_and_a_diverged_one_is_not_chosen(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    grid, run = modules["grid"], modules["runner"]
    setting = "digits/imbalance"
    rates = grid.rate_cells([grid.Cell(setting, "pfpt", 0)])

    def around_best(tried: dict[float, float | None]) -> list[float]:
        for scale, value in tried.items():
            path = tmp_path / grid.Cell(setting, "pfpt", grid.RATE_SEED, scale).file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"validation_accuracy": value}))
        return [cell.scale for cell in run.neighbours(rates, tmp_path)]

    assert around_best({}) == []
    assert around_best({0.3: 0.8, 1.0: 0.7, 3.0: None}) == [0.1, 0.3, 1.0]
    assert run.choose(grid.Cell(setting, "pfpt", 0), tmp_path) == 0.3
    assert around_best({0.1: 0.9}) == [0.03, 0.1, 0.3]
    assert around_best({0.03: 0.85}) == [0.03, 0.1, 0.3]
    assert around_best({0.03: 0.95, 0.01: 0.96, 0.003: 0.97}) == [0.003, 0.01]  # the range ends
    assert around_best({3.0: 0.98, 10.0: 0.99, 30.0: 1.0}) == [10.0, 30.0]
    wide = grid.rate_cells([grid.Cell("domains_frozen/imbalance", "pfpt", 0)])
    assert [cell.scale for cell in wide] == [0.03, 0.3, 3.0]


def test_the_head_s_rates_are_those_that_the_committed_runs_choose(
    modules: dict[str, ModuleType],
) -> None:
    grid, run = modules["grid"], modules["runner"]
    for setting, scales in grid.HEAD_SCALES.items():
        for optimizer, scale in scales.items():
            cell = grid.Cell(setting, grid.HEAD_METHODS[optimizer], 0)
            assert run.choose(cell, run.OUTPUT) == scale


def test_only_what_is_missing_is_run(
    modules: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, run = modules["grid"], modules["runner"]
    cell = grid.Cell("digits/dirichlet_0.5", "fedcof", 0)
    try_scales(modules, tmp_path, cell.setting, "fedcof", 0.5, 0.6, 0.5)
    path = tmp_path / cell.file
    done = {"overrides": run.overrides_of(cell, 20, 1.0), "scale": 1.0}
    path.write_text(json.dumps(done))
    assert run.run_all([cell], 1, 20, tmp_path) == 0
    assert "1 runs, 1 there, 0 to do" in capsys.readouterr().out
    # With another rate than is chosen now.
    path.write_text(json.dumps({**done, "overrides": run.overrides_of(cell, 20, 0.3)}))
    assert not run.is_there(cell, 20, tmp_path)
    missing = grid.Cell("digits/dirichlet_0.5", "pfpt", 0)
    assert run.run_all([missing], 1, 20, tmp_path) == 1
    assert "no learning rate" in capsys.readouterr().out


def test_one_run_writes_its_file(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    grid, run = modules["grid"], modules["runner"]
    cell = grid.Cell("digits/dirichlet_0.5", "fedcof", 0)
    line = run.run_cell(cell, run.overrides_of(cell, 20, 1.0), 1.0, tmp_path)
    content = json.loads((tmp_path / cell.file).read_text())
    assert line.startswith(cell.file)
    assert content["rounds"] == 1
    assert content["accuracy"] > 0.8
    assert content["config"] == run.config_of(cell.setting, content["overrides"])
    assert content["bytes_up"] == 20 * 4 * (10 * 128 + 10)
    assert content["bytes_down"] == 0
    assert len(content["curves"]["accuracy"]) == 1


def fake(accuracy: float | None, **more: object) -> dict[str, object]:
    return {
        "accuracy": accuracy,
        "best_accuracy": accuracy,
        "balanced_accuracy": accuracy,
        "personalised": {"mean": 0.5, "worst_tenth": 0.25, "deviation": 0.1, "jain": 0.9},
        "prompts": 5,
        "bytes_up": 1e6,
        "bytes_down": 2e6,
        "cpu_seconds": 60.0,
        "scale": 1.0,
        "curves": {"num_prompts": [5, 6]},
        **more,
    }


def test_tables_by_hand(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    grid, summary, tables = modules["grid"], modules["summary"], modules["tables"]
    setting = "domains_shared/dirichlet_0.5"
    values = {
        "pfpt": [0.6, 0.7, 0.65, 0.75, 0.7],
        "fedavg_pt": [0.5, 0.55, 0.6],
        "local_only": [None, None, None],
    }
    for method, found in values.items():
        for seed, value in enumerate(found):
            path = tmp_path / grid.Cell(setting, method, seed).file
            path.parent.mkdir(parents=True, exist_ok=True)
            own = {
                "mean": 0.5 if value else 0.4,
                "worst_tenth": 0.25,
                "deviation": 0.1,
                "jain": 0.9,
            }
            path.write_text(json.dumps(fake(value, personalised=own)))
    pools = {f"round_{n:03d}": np.random.default_rng(n).normal(size=(6, 8)) for n in range(1, 4)}
    np.savez((tmp_path / grid.Cell(setting, "pfpt", 0).file).with_suffix(".npz"), **pools)
    results = summary.read_results(tmp_path)
    rows = {row["method"]: row for row in summary.summarise(results)}
    assert rows["pfpt"]["accuracy"] == pytest.approx(0.68)
    # Differences of the three common seeds: 0.1, 0.15, 0.05; sd 0.05, t(2) = 4.303.
    gain = rows["pfpt"]["accuracy_difference"]
    assert (gain["mean"], gain["seeds"]) == (pytest.approx(0.1), 3)
    assert gain["half_width"] == pytest.approx(4.3027 * 0.05 / math.sqrt(3), rel=1e-4)
    assert gain["p"] == pytest.approx(0.0742, abs=1e-3)
    assert "accuracy" not in rows["local_only"]
    assert rows["local_only"]["personalised"] == pytest.approx(0.4)
    page = tables.markdown(list(rows.values()), tables.rate_lines(tmp_path))
    assert "| pfpt | 5 | 68.0 ± 7.1 | +10.0 ± 12.4 (p 0.074) |" in page
    assert (
        "| local_only | 3 | - | - | - | - | 40.0 ± 0.0 | 25.0 ± 0.0 | 10.0 ± 0.0 | 0.900 |" in page
    )
    shown = tables.overview(list(rows.values()), grid.MAIN).splitlines()
    assert shown[0] == "| method | domains_shared<br>dirichlet_0.5 |"
    assert shown[2:] == [
        "| `pfpt` | 68.0 ± 7.1 (5)<br>+10.0 ± 12.4 (p 0.074) |",
        "| `fedavg_pt` | 55.0 ± 12.4 (3) |",
    ]
    frozen = [{**row, "setting": "domains_frozen/imbalance"} for row in rows.values()]
    last = tables.overview(frozen, grid.MAIN, {"no prompts": {"test": 0.5}}).splitlines()[-1]
    assert last == "| the frozen head, no prompts (nothing trained) | 50.0 |"
    page_file = tmp_path / "page.md"
    begin, end = "<!-- x: made by benchmarks/methods/tables.py -->", "<!-- end of x -->"
    page_file.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    tables.put_between(page_file, "x", "new")
    assert page_file.read_text() == f"before\n{begin}\nnew\n{end}\nafter\n"
    page_file.write_text("no marks")
    with pytest.raises(SystemExit, match="put them back"):
        tables.put_between(page_file, "x", "new")
    assert rows["pfpt"]["over_local_only_difference"]["mean"] == pytest.approx(0.1)
    assert "over_centralised_difference" not in rows["pfpt"]
    shown = tables.overview(list(rows.values()), ("local_only",)).splitlines()
    assert shown[2] == "| `local_only` | 40.0 ± 0.0 (3) * |"
    gains = modules["figures"].accuracy_figure(list(rows.values()))
    (axis,) = gains.axes
    (bar,) = axis.containers  # PFPT's; FedAvg-PT is what it is compared with
    assert bar.lines[0].get_xdata() == pytest.approx([10.0])
    (axis,) = (pool := modules["figures"].pool_figure(results)).axes
    assert axis.lines[0].get_ydata().tolist() == [5, 6]
    path = modules["figures"].path_figure(tmp_path, setting)
    dots, ends = path.axes[0].collections
    assert (len(dots.get_offsets()), len(ends.get_offsets())) == (18, 2)
    for number, figure in enumerate((gains, pool, path)):
        figure.savefig(tmp_path / f"{number}.png")


def test_pages_are_made_of_the_committed_results(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    docs = FOLDER.parents[1] / "docs"
    page, tables = tmp_path / "benchmark.md", tmp_path / "benchmark-tables.md"
    page.write_text((docs / "benchmark.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(modules["tables"], "draw", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["tables.py", f"--page={page}", f"--tables={tables}"])
    modules["tables"].main()
    for made in (page, tables):
        committed = (docs / made.name).read_text(encoding="utf-8")
        assert made.read_text(encoding="utf-8") == committed, "run benchmarks/methods/tables.py"


def test_what_is_there_and_what_is_missing_is_listed(
    modules: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["runner.py", "--list", "--only", "domains_plain/", "fedcof"])
    modules["runner"].main()
    rates = [f"rate-{scale:g}.json" for scale in (0.3, 1.0, 3.0)]
    listed = [line.rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert listed[:3] == rates and {"seed-0.json", "seed-1.json", "seed-2.json"} <= {*listed[3:]}
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rounds=3"])  # closed forms have one anyway
    modules["runner"].main()
    assert set(capsys.readouterr().out.split()[::2]) == {"there"}
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--output=nowhere"])
    modules["runner"].main()
    assert set(capsys.readouterr().out.split()[::2]) == {"missing"}


def test_what_was_asked_of_the_domains_is_a_table(modules: dict[str, ModuleType]) -> None:
    scores = {"faces": {"faces": 0.5, "no prompts": 0.25}}
    found = {"pfpt": {"imbalance": {"accuracy": scores}}}
    assert modules["tables"].known_domains(found).splitlines() == [
        "| | images of | under those of faces | no prompts |",
        "|---|---|---|---|",
        "| `pfpt`, imbalance | faces | 50.0 | 25.0 |",
    ]
    found["pfpt: whitened queries"] = found["pfpt"]  # has a place in the other tables alone
    assert len(modules["tables"].known_domains(found).splitlines()) == 3
    found = {"pfpt": {"imbalance": {"together": {"1": 0.25, "16": 0.5}}}}
    assert modules["tables"].selecting_together(found).splitlines() == [
        "| images that select together | 1 | 16 |",
        "|---|---|---|",
        "| `pfpt`, imbalance | 25.0 | 50.0 |",
    ]
    found = {"style": {"digits": 0.5, "faces": 1.0}}
    assert modules["tables"].recognised(found).splitlines() == [
        "| query | digits | faces |",
        "|---|---|---|",
        "| style | 50.0 | 100.0 |",
    ]


def test_pooled_data_stand_beside_every_partition(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    grid, summary = modules["grid"], modules["summary"]
    one, other = grid.OTHER_SETTINGS
    cells = {(cell.setting, cell.method) for cell in grid.final_cells()}
    assert (one, "centralised") in cells
    assert (other, "centralised") not in cells
    for setting, method, value in ((one, "centralised", 0.8), (other, "full_fedavg", 0.7)):
        path = tmp_path / grid.Cell(setting, method, 0).file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(fake(value)))
    rows = {
        (r["setting"], r["method"]): r for r in summary.summarise(summary.read_results(tmp_path))
    }
    assert rows[other, "centralised"]["accuracy"] == 0.8
    gap = rows[other, "full_fedavg"]["over_centralised_difference"]["mean"]
    assert gap == pytest.approx(-0.1)


def test_an_ablation_is_compared_with_what_it_changes(modules: dict[str, ModuleType]) -> None:
    grid, summary, tables = modules["grid"], modules["summary"], modules["tables"]
    setting = grid.ABLATION_SETTINGS[0]
    method = "pfpt: no pruning"
    assert method in grid.ABLATIONS
    runs = {"pfpt": (0.6, 0.7), "fedavg_pt": (0.1, 0.1), method: (0.55, 0.67)}
    results = {
        setting: {
            name: {seed: fake(value) for seed, value in enumerate(values)}
            for name, values in runs.items()
        }
    }
    changed = summary.summarise(results, tables.changed_from)
    (line,) = tables.overview(changed, (method,)).splitlines()[2:]
    assert line.startswith(f"| `{method}` | 61.0 ± 76.2 (2)<br>-4.0 ± 12.7")
    (row,) = tables.over_others(results, "pfpt", ("fedavg_pt", "fedcof"))
    assert row.startswith("| `pfpt` over `fedavg_pt` | +55.0 ± 63.5")
    by_name = {row["method"]: row for row in summary.summarise(results)}
    assert by_name[method]["accuracy_difference"]["mean"] == pytest.approx(0.51)
    (row,) = tables.over_others(results, "pfpt", ("fedavg_pt",), "personalised")
    assert row == "| `pfpt` over `fedavg_pt`, clients' own | +0.0 ± 0.0 |"


def test_goals_are_judged_by_the_smallest_lead(modules: dict[str, ModuleType]) -> None:
    tables = modules["tables"]

    def lines(setting: str, accuracies: dict[str, tuple[float, ...]]) -> list[str]:
        runs = {
            method: {seed: fake(value) for seed, value in enumerate(values)}
            for method, values in accuracies.items()
        }
        table: str = tables.goals({setting: runs})
        return table.splitlines()[2:]

    def judged(setting: str = "domains_shared/imbalance", **accuracies: tuple[float, ...]) -> str:
        (line,) = lines(setting, accuracies)
        assert line.startswith("| `pfpt` | ")
        return line.removeprefix("| `pfpt` ")

    own, near, far = (0.6, 0.61, 0.62), (0.55, 0.56, 0.565), (0.1, 0.1, 0.1)
    plus = (0.9, 0.9, 0.9)  # has keys
    line = judged(pfpt=own, head_only=near, fedavg_pt=far, fedavg_pt_plus=plus)
    assert line.startswith("| domains_shared/imbalance | +4 | +5.2 ± 0.7")
    assert line.endswith("| `head_only` | 2 of 2: `fedavg_pt`, `head_only` | yes |")
    # Far enough on average, but not clear of zero.
    line = judged(pfpt=own, head_only=(0.5, 0.6, 0.5), fedavg_pt=far)
    assert line.endswith("| `head_only` | 1 of 2: `fedavg_pt` | no |")
    # Clear of zero, but not far enough.
    line = judged(pfpt=own, head_only=(0.59, 0.6, 0.605))
    assert line.endswith("| 1 of 1: `head_only` | no |")
    # Worse, but not clearly; and clearly.
    noise = judged("digits/imbalance", pfpt=(0.5, 0.6, 0.5), head_only=(0.55, 0.55, 0.56))
    assert noise.startswith("| digits/imbalance | not worse | -2.0 ±")
    assert noise.endswith("| 0 of 1: none | yes |")
    assert judged("digits/imbalance", pfpt=near, head_only=own).endswith("| no |")
    # With logit adjustment, which its rival may have as well.
    loss = " + logit adjustment"
    found = lines(
        "domains_frozen/imbalance",
        {"pfpt": near, f"pfpt{loss}": own, "fedavg_pt": far, f"fedavg_pt{loss}": near},
    )
    assert [line.split(" | ")[0] for line in found] == ["| `pfpt`", f"| `pfpt{loss}`"]
    assert [line.endswith("| yes |") for line in found] == [True, False]
    assert f"| `fedavg_pt{loss}` | 2 of 2: `fedavg_pt`, `fedavg_pt{loss}` |" in found[1]


def test_the_choice_of_rates_shows_what_was_tried(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    tables = modules["tables"]
    try_scales(modules, tmp_path, "digits/imbalance", "pfpt", 0.5, 0.625, None)
    (line,) = tables.rate_lines(tmp_path)[2:]
    assert line == (
        "| digits/imbalance | pfpt | - | - | - | - | 50.0 | **62.5** | diverged | - | - |"
    )
    assert tables.changed_from("pfpt: no pruning") == "pfpt"
    assert tables.changed_from("fedavg_pt_plus") == "pfpt"  # its row mean in place of the matching


def test_true_groups_are_averaged_row_by_row_with_a_memory(modules: dict[str, ModuleType]) -> None:
    rule = modules["bounds"].RowMean()
    previous, keys = torch.tensor([[1.0], [2.0], [3.0]]), torch.eye(3)
    sets = [torch.tensor([[3.0], [4.0]]), torch.tensor([[5.0]])]
    origins = [torch.tensor([0, 1]), torch.tensor([0])]
    args = {"prompt_sets": sets, "origins": origins, "previous_keys": keys}
    first = rule.aggregate(previous=previous, state={}, **args)
    assert first.prompts.flatten().tolist() == [4.0, 4.0, 3.0]  # the third was not returned
    assert first.state["strength"].tolist() == [2.0, 1.0, 0.0]
    second = rule.aggregate(previous=first.prompts, state=first.state, **args)
    assert second.prompts.flatten().tolist() == [4.0, 4.0, 3.0]
    assert torch.equal(second.keys, keys)
    full = {"strength": torch.full((3,), 100.0)}
    kept = rule.aggregate(previous=previous, state=full, **args).state["strength"]
    assert kept.tolist() == [modules["bounds"].MEMORY] * 3


def test_each_image_goes_through_under_the_tokens_of_its_domain(
    modules: dict[str, ModuleType],
) -> None:
    backbone = load_backbone("nano_promptable")
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randn(6, 17, 128, generator=draws)
    table = FeatureTable(
        tokens=tokens.numpy(),
        style=np.zeros((6, 1), np.float32),
        cls=np.zeros((6, 1), np.float32),
        features=np.zeros((6, 128), np.float32),
        labels=np.zeros(6, np.int64),
        groups=np.array([0, 1, 0, 2, 1, 1]),
    )
    own = [
        modules["bounds"].tokens_of(backbone, name) for name in ("no prompts", "task 0", "task 2")
    ]
    assert own[0] is None
    assert own[1] is not None and own[1].ndim == 2
    found = modules["bounds"].features_of(SimpleNamespace(backbone=backbone), table, own)
    for row, group in enumerate(table.groups):
        alone = backbone.encode(tokens[row : row + 1], own[group])[0]
        np.testing.assert_allclose(found[row], alone.numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(found[1] - backbone.encode(tokens[1:2])[0].numpy()).max() > 0.01


def test_what_a_run_knows_of_the_domains(
    modules: dict[str, ModuleType],
    tiny: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Where there is one selection for all, every column is the run's own accuracy."""
    domains, grid = modules["domains"], modules["grid"]
    small = [f"data.{split}=80" for split in ("train", "validation", "test", "public")]
    changes = tiny("head=frozen", "method=fedavg_pt_plus", "partition.alpha=100", *small)
    config = compose("domains", changes)
    done = fedprompt.run("domains", changes).summary["accuracy"]
    path = tmp_path / grid.Cell("domains_frozen/imbalance", "fedavg_pt_plus", 0).file
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"accuracy": done}))
    monkeypatch.setattr(domains, "RESULTS", tmp_path)
    monkeypatch.setattr(domains, "choose", lambda cell, folder: 1.0)
    monkeypatch.setattr(domains, "configure", lambda cell, scale: config)
    asked, select = [], domains.select_for_split

    def watched(state: ServerState, recipe: LocalRecipe, split: FeatureTable) -> object:
        asked.append(recipe.prompts.eval_batch)
        return select(state, recipe, split)

    monkeypatch.setattr(domains, "select_for_split", watched)
    found = domains.ask("imbalance", "fedavg_pt_plus")
    assert asked == list(domains.TOGETHER)
    table = [list(row.values()) for row in found["accuracy"].values()]
    assert (len(table), {len(row) for row in table}) == (4, {5})
    assert all(len(set(row[:4])) == 1 for row in table)
    # As many images of each domain.
    assert np.mean([row[0] for row in table]) == pytest.approx(done)
    assert set(found["overlap"].values()) == {1.0} and len(found["overlap"]) == 6
    assert found["clients"]["same domain"] == found["clients"]["different domains"] == 1.0
    assert found["clients"]["main domain's share"] == 1.0  # a client has one domain
    assert list(found["together"]) == [str(count) for count in domains.TOGETHER]
    assert list(found["together"].values()) == pytest.approx([done] * len(domains.TOGETHER))
    path.write_text(json.dumps({"accuracy": done + 0.1}))
    with pytest.raises(AssertionError, match="not the run of"):
        domains.ask("imbalance", "fedavg_pt_plus")


def test_an_image_is_recognised_by_the_mean_query_of_its_domain(
    modules: dict[str, ModuleType],
) -> None:
    def table(queries: list[float], groups: list[int]) -> SimpleNamespace:
        return SimpleNamespace(
            queries=lambda kind: np.array(queries)[:, None], groups=np.array(groups)
        )

    train, test = table([0.0, 2.0, 9.0, 11.0], [0, 0, 1, 1]), table([4.0, 6.0, 7.0], [0, 0, 1])
    assert modules["domains"].recognised(train, test, "style") == [0.5, 1.0]


def test_what_changes_the_local_loss_chooses_rates_of_its_own(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    grid, runner = modules["grid"], modules["runner"]
    setting, method = "domains_frozen/imbalance", "pfpt + logit adjustment"
    cell = grid.Cell(setting, method, 0)
    assert cell in grid.final_cells()
    scores = {"pfpt": {0.03: 0.6, 0.3: 0.5, 3.0: 0.4}, method: {0.03: 0.5, 0.3: 0.6, 3.0: 0.4}}
    for name, found in scores.items():
        for scale, value in found.items():
            path = tmp_path / grid.Cell(setting, name, grid.RATE_SEED, scale).file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"validation_accuracy": value}))
    assert runner.choose(grid.Cell(setting, "pfpt", 0), tmp_path) == 0.03
    assert runner.choose(cell, tmp_path) == 0.3
    assert runner.choose(grid.Cell(setting, "pfpt: no pruning", 0), tmp_path) == 0.03
    wanted = {(each.method, each.scale) for each in grid.rate_cells([cell])}
    assert wanted == {(method, scale) for scale in scores[method]}
    assert "objective=logit_adjusted" in runner.overrides_of(cell, 20, 0.3)
