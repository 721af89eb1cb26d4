"""benchmarks/methods: its grid, the choice of learning rates, tables from rows made by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fedprompt
from benchmarks.harness import DOCS, Origin
from benchmarks.methods import bounds, details, domains, figures, grid, runner, summary, tables
from benchmarks.methods.grid import Cell
from benchmarks.methods.results import FOLDER, Configuration, Run, Store, rest_of
from benchmarks.methods.runner import MissingRunError
from fedprompt.client.recipe import LocalRecipe
from fedprompt.config import compose, conf_root
from fedprompt.core.errors import ConfigError, RoundError
from fedprompt.core.types import ServerState
from fedprompt.data.prefix.tables import FeatureTable
from fedprompt.models.backbone import load_backbone

NOTHING = Configuration.of({}, complete=False)


def fake(cell: Cell, accuracy: float | None = None, **more: object) -> Run:
    """A row with known figures."""
    origin = Origin("2026-11-26", "0" * 40, False, "3.11", "torch=2", "Linux", "", 2, 2)
    run = Run(
        setting=cell.setting,
        method=cell.method,
        seed=cell.seed,
        scale=cell.scale or 1.0,
        rounds=2,
        accuracy=accuracy,
        best_round=2,
        best_accuracy=accuracy,
        validation_accuracy=accuracy,
        balanced_accuracy=accuracy,
        alone_accuracy=None,
        alone_validation_accuracy=None,
        own=0.5,
        own_deviation=0.1,
        own_worst_tenth=0.25,
        own_jain=0.9,
        prompts=5,
        bytes_up=1_000_000,
        bytes_down=2_000_000,
        seconds=70.0,
        cpu_seconds=60.0,
        train_seconds=50.0,
        aggregate_seconds=1.0,
        evaluate_seconds=9.0,
        accuracy_curve=(None, accuracy),
        validation_curve=(None, accuracy),
        loss_curve=(1.0, 0.5),
        prompts_curve=(5, 6),
        state_sha256="f" * 64,
        overrides=(),
        options="",
        origin=origin,
    )
    return dataclasses.replace(run, **more)


def keep(store: Store, cell: Cell, accuracy: float | None = None, **more: object) -> Run:
    """Add such a row."""
    run = fake(cell, accuracy, **more)
    store.add(cell, run, NOTHING)
    return run


def try_scales(store: Store, setting: str, method: str, *values: float | None) -> None:
    """Rows as of the runs that choose a rate, with these validation accuracies."""
    for scale, value in zip(grid.scales_of(setting, method), values, strict=True):
        keep(store, Cell(setting, method, grid.RATE_SEED, scale), value)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture(scope="module")
def committed() -> Store:
    return Store(FOLDER)


def test_every_cell_has_a_name_of_its_own_and_composes(store: Store) -> None:
    cells = grid.final_cells()
    rates = grid.rate_cells(cells)
    names = [cell.name for cell in [*cells, *rates]]
    assert len(set(names)) == len(names)
    # One seed, scale and partition is enough: they change numbers alone.
    alike = {(cell.setting.split("/")[0], cell.method): cell for cell in cells}
    for cell in alike.values():
        if cell.preset in grid.CLIENT_RATES_OF:
            like, setting = grid.CLIENT_RATES_OF[cell.preset], grid.rate_setting(cell.setting)
            try_scales(store, setting, like, 0.5, 0.5, 0.5)
        changes = runner.overrides_of(cell, 20, 3.0, store)
        config = compose(runner.experiment_of(cell.setting), changes)
        assert config.method == cell.preset
        expected = {**dict.fromkeys(grid.CLOSED_FORM, 1), **dict.fromkeys(grid.POOLED, 5)}
        assert config.rounds == expected.get(cell.preset, 20)
        assert config.clients.pooled == (cell.preset in grid.POOLED)
        assert config.runtime.name == "serial"


def test_the_grid_is_what_is_reported() -> None:
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


def test_rates_are_scaled(store: Store) -> None:
    cell = Cell("domains_shared/dirichlet_0.5", "scaffold_pt", 2, 3.0)
    config = compose(runner.experiment_of(cell.setting), runner.overrides_of(cell, 20, 3.0, store))
    assert config.prompts.lr == pytest.approx(0.9)
    assert config.head.lr == pytest.approx(0.3)
    tuned = Cell("domains_shared/imbalance", "lora_fedavg", 2, 0.3)
    config = compose(
        runner.experiment_of(tuned.setting), runner.overrides_of(tuned, 20, 0.3, store)
    )
    assert config.tuning.options.lr == pytest.approx(3e-4)


def test_clients_of_fedopt_have_the_rates_that_were_chosen_for_fedavg(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = Cell("domains_frozen/imbalance", "fedopt_pt", 2, 3.0)
    with pytest.raises(MissingRunError):
        runner.overrides_of(cell, 20, 3.0, store)
    assert runner.run_all([cell], 1, 20, store) == 1
    assert "no learning rate" in capsys.readouterr().out
    try_scales(store, cell.setting, "fedavg_pt", 0.6, 0.5, 0.4)
    changes = runner.overrides_of(cell, 20, 3.0, store)
    config = compose(runner.experiment_of(cell.setting), changes)
    assert config.aggregator.options.lr == pytest.approx(0.03)
    assert config.prompts.lr == pytest.approx(0.03 * 0.01)


def test_the_rate_is_chosen_by_validation_on_a_seed_that_is_not_reported(store: Store) -> None:
    assert grid.RATE_SEED not in {cell.seed for cell in grid.final_cells()}
    cell = Cell("digits/dirichlet_0.1", "pfpt", 3)
    with pytest.raises(MissingRunError):
        runner.choose(cell, store)
    try_scales(store, "digits/dirichlet_0.5", "pfpt", 0.7, 0.8, 0.8)
    assert runner.choose(cell, store) == 1.0  # the smaller of equals
    with pytest.raises(MissingRunError):  # imbalance has rates of its own
        runner.choose(Cell("digits/imbalance", "pfpt", 3), store)
    assert runner.choose(Cell("domains_shared/imbalance", "fedncm", 0), store) == 1.0
    assert runner.choose(Cell("digits/dirichlet_0.5", "pfpt", 0, 3.0), store) == 3.0
    # A near relation's.
    setting = "domains_shared/dirichlet_0.5"
    try_scales(store, setting, "full_fedavg", 0.5, 0.4, 0.6)
    cell = Cell(setting, "full_fedprox", 0)
    assert runner.choose(cell, store) == 3.0
    assert {each.method for each in grid.rate_cells([cell])} == {"full_fedavg"}


def test_runs_of_other_options_or_rounds_do_not_count(store: Store) -> None:
    cell = Cell("digits/imbalance", "pfpt: no memory", 0)
    overrides = runner.overrides_of(cell, 20, 1.0, store)
    assert "aggregator.memory=0" in overrides
    rest = rest_of(runner.config_of(cell.setting, overrides), overrides)

    def is_there(
        options: dict[str, object], rounds: int = 20, complete: bool = True, **more: object
    ) -> bool:
        configuration = Configuration.of(options, complete)
        known = {"overrides": tuple(overrides), "options": configuration.digest}
        store.add(cell, fake(cell, 0.5, **{**known, **more}), configuration)
        return runner.is_there(cell, rounds, Store(store.folder))

    assert is_there(rest)
    assert not is_there(rest, rounds=21)
    without = {key: value for key, value in rest.items() if key != "prompts.whiten"}
    assert len(without) == len(rest) - 1
    assert is_there(without)  # an option that came later is as it was
    assert not is_there(rest, overrides=tuple(overrides[:-1]))
    assert not is_there({**rest, "eval_every": 1})
    assert not is_there({**rest, "aggregator.patience": 9})
    assert not is_there({key: value for key, value in rest.items() if key != "eval_every"})
    # The first runs kept a part of it.
    assert is_there({"eval_every": 5}, complete=False)
    assert not is_there({"eval_every": 1}, complete=False)
    store.add(cell, fake(cell, 0.5, overrides=tuple(overrides)), NOTHING)
    assert runner.is_there(cell, 20, Store(store.folder))


def test_under_imbalance_a_scale_is_of_the_prompts_rate_alone(store: Store) -> None:
    """A shared head has its own best rate there, which `head_only` finds."""

    def rates(setting: str, method: str) -> list[str]:
        changes = runner.overrides_of(Cell(setting, method, 0), 20, 0.1, store)
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
    store: Store,
) -> None:
    setting = "digits/imbalance"
    rates = grid.rate_cells([Cell(setting, "pfpt", 0)])

    def around_best(tried: dict[float, float | None]) -> list[float]:
        for scale, value in tried.items():
            keep(store, Cell(setting, "pfpt", grid.RATE_SEED, scale), value)
        return [cell.scale for cell in runner.neighbours(rates, store)]

    assert around_best({}) == []
    assert around_best({0.3: 0.8, 1.0: 0.7, 3.0: None}) == [0.1, 0.3, 1.0]
    assert runner.choose(Cell(setting, "pfpt", 0), store) == 0.3
    assert around_best({0.1: 0.9}) == [0.03, 0.1, 0.3]
    assert around_best({0.03: 0.85}) == [0.03, 0.1, 0.3]
    assert around_best({0.03: 0.95, 0.01: 0.96, 0.003: 0.97}) == [0.003, 0.01]  # the range ends
    assert around_best({3.0: 0.98, 10.0: 0.99, 30.0: 1.0}) == [10.0, 30.0]
    wide = grid.rate_cells([Cell("domains_frozen/imbalance", "pfpt", 0)])
    assert [cell.scale for cell in wide] == [0.03, 0.3, 3.0]


def test_the_head_s_rates_are_those_that_the_committed_runs_choose(committed: Store) -> None:
    for setting, scales in grid.HEAD_SCALES.items():
        for optimizer, scale in scales.items():
            cell = Cell(setting, grid.HEAD_METHODS[optimizer], 0)
            assert runner.choose(cell, committed) == scale


def test_only_what_is_missing_is_run(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell("digits/dirichlet_0.5", "fedcof", 0)
    try_scales(store, cell.setting, "fedcof", 0.5, 0.6, 0.5)
    keep(store, cell, 0.5, overrides=tuple(runner.overrides_of(cell, 20, 1.0, store)))
    assert runner.run_all([cell], 1, 20, store) == 0
    assert "1 runs, 1 there, 0 to do" in capsys.readouterr().out
    # With another rate than is chosen now.
    keep(store, cell, 0.5, overrides=tuple(runner.overrides_of(cell, 20, 0.3, store)))
    assert not runner.is_there(cell, 20, store)
    missing = Cell("digits/dirichlet_0.5", "pfpt", 0)
    assert runner.run_all([missing], 1, 20, store) == 1
    assert "no learning rate" in capsys.readouterr().out


def test_one_run_is_one_row(store: Store) -> None:
    cell = Cell("digits/dirichlet_0.5", "fedcof", 0)
    changes = runner.overrides_of(cell, 20, 1.0, store)
    run = runner.run_cell(cell, changes, 1.0, store.pools(cell.setting))
    assert runner.line(cell, run).startswith(f"{cell.name}: accuracy 0.")
    assert (run.rounds, len(run.accuracy_curve)) == (1, 1)
    assert run.accuracy is not None and run.accuracy > 0.8
    assert run.overrides == tuple(changes)
    assert (run.bytes_up, run.bytes_down) == (20 * 4 * (10 * 128 + 10), 0)
    store.add(cell, run, runner.configuration_of(cell.setting, changes))
    again = Store(store.folder)
    assert again.find(cell) == run
    tree = runner.config_of(cell.setting, changes)
    assert again.configuration(run).read() == rest_of(tree, changes)
    assert again.configuration(run).complete


def test_a_run_that_diverges_is_a_row_without_figures(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RoundError("round 3: every client was left out")

    monkeypatch.setattr(runner, "run_once", fails)
    cell = Cell("digits/dirichlet_0.5", "fedavg_pt", grid.RATE_SEED, 3.0)
    changes = runner.overrides_of(cell, 20, 3.0, store)
    run = runner.run_cell(cell, changes, 3.0, store.pools(cell.setting))
    store.add(cell, run, runner.configuration_of(cell.setting, changes))
    found = Store(store.folder).find(cell)
    assert found == run
    assert (run.accuracy, run.error) == (None, "round 3: every client was left out")
    assert runner.tried_scales(cell.setting, cell.method, store) == {3.0: 0.0}
    unmeasured = dataclasses.replace(run, accuracy=0.5, error="")
    store.add(cell, unmeasured, runner.configuration_of(cell.setting, changes))
    with pytest.raises(ConfigError, match=r"chosen by validation accuracy.*set data\.validation"):
        runner.tried_scales(cell.setting, cell.method, store)
    with pytest.raises(RoundError):  # of a run that is reported
        runner.run_cell(dataclasses.replace(cell, scale=None), changes, 3.0, store.pools("x/y"))


def test_tables_by_hand(store: Store, tmp_path: Path) -> None:
    setting = "domains_shared/dirichlet_0.5"
    values = {
        "pfpt": [0.6, 0.7, 0.65, 0.75, 0.7],
        "fedavg_pt": [0.5, 0.55, 0.6],
        "local_only": [None, None, None],
    }
    for method, found in values.items():
        for seed, value in enumerate(found):
            keep(store, Cell(setting, method, seed), value, own=0.5 if value else 0.4)
    pools = {f"round_{n:03d}": np.random.default_rng(n).normal(size=(6, 8)) for n in range(1, 4)}
    store.pools(setting).parent.mkdir()
    np.savez(store.pools(setting), **pools)
    results = summary.read_results(store)
    listed = summary.summarise(results)
    rows = {row.method: row for row in listed}
    assert rows["pfpt"].means["accuracy"].mean == pytest.approx(0.68)
    # Differences of the three common seeds: 0.1, 0.15, 0.05; sd 0.05, t(2) = 4.303.
    gain = rows["pfpt"].gain
    assert gain is not None
    assert (gain.mean, gain.seeds) == (pytest.approx(0.1), 3)
    assert gain.half_width == pytest.approx(4.3027 * 0.05 / math.sqrt(3), rel=1e-4)
    assert gain.p == pytest.approx(0.0742, abs=1e-3)
    assert "accuracy" not in rows["local_only"].means
    assert rows["local_only"].means["own"].mean == pytest.approx(0.4)
    over_alone = rows["pfpt"].over_local_only
    assert over_alone is not None and over_alone.mean == pytest.approx(0.1)
    assert rows["pfpt"].over_centralised is None
    page = tables.markdown(listed, tables.rate_lines(store))
    assert "| pfpt | 5 | 68.0 ± 7.1 | +10.0 ± 12.4 (p 0.074) |" in page
    assert (
        "| local_only | 3 | - | - | - | - | 40.0 ± 0.0 | 25.0 ± 0.0 | 10.0 ± 0.0 | 0.900 |" in page
    )
    shown = tables.overview(listed, grid.MAIN).splitlines()
    assert shown[0] == "| method | domains_shared<br>dirichlet_0.5 |"
    assert shown[2:] == [
        "| `pfpt` | 68.0 ± 7.1 (5)<br>+10.0 ± 12.4 (p 0.074) |",
        "| `fedavg_pt` | 55.0 ± 12.4 (3) |",
    ]
    assert tables.overview(listed, ("local_only",)).endswith("| `local_only` | 40.0 ± 0.0 (3) * |")
    frozen = [dataclasses.replace(row, setting="domains_frozen/imbalance") for row in listed]
    last = tables.overview(frozen, grid.MAIN, {"no prompts": {"test": 0.5}}).splitlines()[-1]
    assert last == "| the frozen head, no prompts (nothing trained) | 50.0 |"
    gains = figures.accuracy_figure(listed)
    (axis,) = gains.axes
    (bar,) = axis.containers  # PFPT's; FedAvg-PT is what it is compared with
    assert bar.lines[0].get_xdata() == pytest.approx([10.0])
    (axis,) = (pool := figures.pool_figure(results)).axes
    assert axis.lines[0].get_ydata().tolist() == [5, 6]
    path = figures.path_figure(store.pools(setting), setting)
    assert path is not None
    dots, ends = path.axes[0].collections
    assert (len(dots.get_offsets()), len(ends.get_offsets())) == (18, 2)
    for number, figure in enumerate((gains, pool, path)):
        figure.savefig(tmp_path / f"{number}.png")


def test_the_smaller_tables_by_hand(store: Store) -> None:
    curves = ((5, 20, 20, 25), (5, 10, 25, 25))  # mean 5, 15, 22.5, 25
    for setting in details.FROZEN:
        for seed, (value, curve) in enumerate(zip((0.6, 0.5), curves, strict=True)):
            keep(store, Cell(setting, "pfpt", seed), value, prompts_curve=curve)
        for seed, value in enumerate((0.25, 0.5, 0.4)):
            keep(store, Cell(setting, "fedavg_pt", seed), value)
    results = summary.read_results(store)
    spread = details.spread(results, ("fedavg_pt",)).splitlines()[2]
    assert spread == "| `fedavg_pt` | 25.0 to 50.0 | 25.0 to 50.0 | 25.0 to 50.0 |"
    ends, settled = details.pools(results).splitlines()[2:]
    assert ends.endswith("| 25 to 25 | 25 to 25 | 25 to 25 |")
    assert settled.endswith("| 4 | 4 | 4 |")  # in the third round it is 2.5 off
    try_scales(store, "domains_frozen/imbalance", "pfpt", 0.5, 0.625, None)
    line = details.by_rate(store).splitlines()[4]
    shown = "| - | - | 50.0 | - | **62.5** | - | diverged | - | - |"
    assert line == f"| `pfpt` | 99 % imbalance {shown}"


def test_what_knowing_the_domains_gives_stands_beside_pfpt(store: Store) -> None:
    for setting in details.FROZEN:
        for seed, value in enumerate((0.5, 0.6, 0.7, 0.9)):  # the last is no seed of bounds.py
            keep(store, Cell(setting, "pfpt", seed), value, scale=0.3)

    def told(*values: float) -> dict[str, object]:
        return {"test": {"mean": values[0], "half_width_95": values[1]}}

    known = {"rates x 0.3": told(0.7, 0.01), "rates x 3": told(0.8, 0.02)}
    found = {"true groups": dict.fromkeys(grid.PARTITIONS, known)}
    lines = details.known_groups(summary.read_results(store), found, "domains_frozen")
    assert [line.split(" | ")[1] for line in lines.splitlines()[2:]] == [
        *("70.0 ± 1.0", "60.0", "80.0 ± 2.0")
    ]
    heads = {
        "rates x 1": {"validation": {"mean": 0.6}, **told(0.5, 0.01)},
        "rates x 3": {"validation": {"mean": 0.4}, **told(0.9, 0.01)},  # worse on validation
    }
    parts = dict.fromkeys(grid.PARTITIONS, heads)
    shown = details.head_bounds({"head only": parts, "head only, domain tokens": parts})
    assert shown.splitlines()[2].endswith("| 50.0 ± 1.0 | 50.0 ± 1.0 | 50.0 ± 1.0 |")


def test_pages_are_made_of_the_committed_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page, listed = tmp_path / "benchmark.md", tmp_path / "benchmark-tables.md"
    page.write_text((DOCS / "benchmark.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(tables, "draw", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["tables", f"--page={page}", f"--tables={listed}"])
    tables.main()
    for made in (page, listed):
        committed = (DOCS / made.name).read_text(encoding="utf-8")
        assert made.read_text(encoding="utf-8") == committed, "python -m benchmarks.methods.tables"


def test_what_is_there_and_what_is_missing_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["runner", "--list", "--only", "domains_plain/", "fedcof"])
    runner.main()
    rates = [f"rate-{scale:g}" for scale in (0.3, 1.0, 3.0)]
    listed = [line.rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert listed[:3] == rates and {"seed-0", "seed-1", "seed-2"} <= {*listed[3:]}
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--rounds=3"])  # closed forms have one anyway
    runner.main()
    assert set(capsys.readouterr().out.split()[::2]) == {"there"}
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"--output={tmp_path}"])
    runner.main()
    assert set(capsys.readouterr().out.split()[::2]) == {"missing"}


def test_what_was_asked_of_the_domains_is_a_table() -> None:
    scores = {"faces": {"faces": 0.5, "no prompts": 0.25}}
    found = {"pfpt": {"imbalance": {"accuracy": scores}}}
    assert tables.known_domains(found).splitlines() == [
        "| | images of | under those of faces | no prompts |",
        "|---|---|---|---|",
        "| `pfpt`, imbalance | faces | 50.0 | 25.0 |",
    ]
    found["pfpt: whitened queries"] = found["pfpt"]  # has a place in the other tables alone
    assert len(tables.known_domains(found).splitlines()) == 3
    found = {"pfpt": {"imbalance": {"together": {"1": 0.25, "16": 0.5}}}}
    assert tables.selecting_together(found).splitlines() == [
        "| images that select together | 1 | 16 |",
        "|---|---|---|",
        "| `pfpt`, imbalance | 25.0 | 50.0 |",
    ]
    found = {"style": {"digits": 0.5, "faces": 1.0}}
    assert tables.recognised(found).splitlines() == [
        "| query | digits | faces |",
        "|---|---|---|",
        "| style | 50.0 | 100.0 |",
    ]


def test_pooled_data_stand_beside_every_partition(store: Store) -> None:
    one, other = grid.OTHER_SETTINGS
    cells = {(cell.setting, cell.method) for cell in grid.final_cells()}
    assert (one, "centralised") in cells
    assert (other, "centralised") not in cells
    for setting, method, value in ((one, "centralised", 0.8), (other, "full_fedavg", 0.7)):
        keep(store, Cell(setting, method, 0), value)
    rows = {(r.setting, r.method): r for r in summary.summarise(summary.read_results(store))}
    assert rows[other, "centralised"].means["accuracy"].mean == 0.8
    gap = rows[other, "full_fedavg"].over_centralised
    assert gap is not None and gap.mean == pytest.approx(-0.1)


def test_an_ablation_is_compared_with_what_it_changes() -> None:
    setting = grid.ABLATION_SETTINGS[0]
    method = "pfpt: no pruning"
    assert method in grid.ABLATIONS
    runs = {"pfpt": (0.6, 0.7), "fedavg_pt": (0.1, 0.1), method: (0.55, 0.67)}
    results = {
        setting: {
            name: {
                seed: fake(Cell(setting, name, seed), value) for seed, value in enumerate(values)
            }
            for name, values in runs.items()
        }
    }
    changed = summary.summarise(results, tables.changed_from)
    (line,) = tables.overview(changed, (method,)).splitlines()[2:]
    assert line.startswith(f"| `{method}` | 61.0 ± 76.2 (2)<br>-4.0 ± 12.7")
    (row,) = tables.over_others(results, "pfpt", ("fedavg_pt", "fedcof"))
    assert row.startswith("| `pfpt` over `fedavg_pt` | +55.0 ± 63.5")
    gains = {row.method: row.gain for row in summary.summarise(results)}
    assert (gain := gains[method]) is not None and gain.mean == pytest.approx(0.51)
    (row,) = tables.over_others(results, "pfpt", ("fedavg_pt",), "own")
    assert row == "| `pfpt` over `fedavg_pt`, clients' own | +0.0 ± 0.0 |"


def test_goals_are_judged_by_the_smallest_lead() -> None:

    def lines(setting: str, accuracies: dict[str, tuple[float, ...]]) -> list[str]:
        runs = {
            method: {
                seed: fake(Cell(setting, method, seed), value) for seed, value in enumerate(values)
            }
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


def test_the_choice_of_rates_shows_what_was_tried(store: Store) -> None:
    try_scales(store, "digits/imbalance", "pfpt", 0.5, 0.625, None)
    (line,) = tables.rate_lines(store)[2:]
    assert line == (
        "| digits/imbalance | pfpt | - | - | - | - | 50.0 | **62.5** | diverged | - | - |"
    )
    assert tables.changed_from("pfpt: no pruning") == "pfpt"
    assert tables.changed_from("fedavg_pt_plus") == "pfpt"  # its row mean in place of the matching


def test_true_groups_are_averaged_row_by_row_with_a_memory() -> None:
    rule = bounds.RowMean()
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
    assert kept.tolist() == [bounds.MEMORY] * 3


def test_each_image_goes_through_under_the_tokens_of_its_domain() -> None:
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
    own = [bounds.tokens_of(backbone, name) for name in ("no prompts", "task 0", "task 2")]
    assert own[0] is None
    assert own[1] is not None and own[1].ndim == 2
    found = bounds.features_of(SimpleNamespace(backbone=backbone), table, own)
    for row, group in enumerate(table.groups):
        alone = backbone.encode(tokens[row : row + 1], own[group])[0]
        np.testing.assert_allclose(found[row], alone.numpy(), rtol=1e-4, atol=1e-5)
    assert np.abs(found[1] - backbone.encode(tokens[1:2])[0].numpy()).max() > 0.01


def test_what_a_run_knows_of_the_domains(
    tiny: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    store: Store,
) -> None:
    """Where there is one selection for all, every column is the run's own accuracy."""
    small = [f"data.{split}=80" for split in ("train", "validation", "test", "public")]
    changes = tiny("head=frozen", "method=fedavg_pt_plus", "partition.alpha=100", *small)
    config = compose("domains", changes)
    done = fedprompt.run("domains", changes).summary["accuracy"]
    cell = Cell("domains_frozen/imbalance", "fedavg_pt_plus", 0)
    keep(store, cell, done)
    monkeypatch.setattr(domains, "choose", lambda cell, folder: 1.0)
    monkeypatch.setattr(domains, "configure", lambda cell, scale: config)
    asked, select = [], domains.select_for_split

    def watched(state: ServerState, recipe: LocalRecipe, split: FeatureTable) -> object:
        asked.append(recipe.prompts.eval_batch)
        return select(state, recipe, split)

    monkeypatch.setattr(domains, "select_for_split", watched)
    found = domains.ask("imbalance", "fedavg_pt_plus", store)
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
    keep(store, cell, done + 0.1)
    with pytest.raises(AssertionError, match="not the run of"):
        domains.ask("imbalance", "fedavg_pt_plus", store)


def test_an_image_is_recognised_by_the_mean_query_of_its_domain() -> None:
    def table(queries: list[float], groups: list[int]) -> SimpleNamespace:
        return SimpleNamespace(
            queries=lambda kind: np.array(queries)[:, None], groups=np.array(groups)
        )

    train, test = table([0.0, 2.0, 9.0, 11.0], [0, 0, 1, 1]), table([4.0, 6.0, 7.0], [0, 0, 1])
    assert domains.recognised(train, test, "style") == [0.5, 1.0]


def test_what_changes_the_local_loss_chooses_rates_of_its_own(store: Store) -> None:
    setting, method = "domains_frozen/imbalance", "pfpt + logit adjustment"
    cell = Cell(setting, method, 0)
    assert cell in grid.final_cells()
    scores = {"pfpt": {0.03: 0.6, 0.3: 0.5, 3.0: 0.4}, method: {0.03: 0.5, 0.3: 0.6, 3.0: 0.4}}
    for name, found in scores.items():
        for scale, value in found.items():
            keep(store, Cell(setting, name, grid.RATE_SEED, scale), value)
    assert runner.choose(Cell(setting, "pfpt", 0), store) == 0.03
    assert runner.choose(cell, store) == 0.3
    assert runner.choose(Cell(setting, "pfpt: no pruning", 0), store) == 0.03
    wanted = {(each.method, each.scale) for each in grid.rate_cells([cell])}
    assert wanted == {(method, scale) for scale in scores[method]}
    assert "objective=logit_adjusted" in runner.overrides_of(cell, 20, 0.3, store)
