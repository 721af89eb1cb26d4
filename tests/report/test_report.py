"""Reports read run directories alone: numbers by hand, pictures that show something, safe text."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import importlib.util
import io
import math
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.patches import Rectangle
from rich.console import Console

from fedprompt.core.errors import ConfigError
from fedprompt.core.types import RoundReport
from fedprompt.report import page as report
from fedprompt.report import style
from fedprompt.report.figures import (
    OVERLAP,
    accuracy_figure,
    aggregation_figure,
    clients_figure,
    make_figures,
    seconds_figure,
    seconds_stack,
)
from fedprompt.report.style import png_bytes
from fedprompt.report.table import render_summary
from fedprompt.runs.directory import Partition, RunDirectory
from fedprompt.runs.summary import comparison_table, read_runs

DIGEST = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def pictures_are_not_drawn() -> None:
    """In the place of conftest's: here they are."""


def write_run(
    run: RunDirectory,
    method: str,
    accuracies: list[float],
    prompts: int = 10,
    wall: float = math.nan,
) -> RunDirectory:
    """A finished run; validation accuracy is test accuracy, 1 MB up and 2 MB down a round."""
    RunDirectory.create(run.path)
    run.write_config(f"seed: 0\nmethod: {method}\n")
    run.write_manifest({"date": "2024-12-10", "packages": {"fedprompt": "0.1.0"}})
    for round_index, accuracy in enumerate(accuracies):
        seconds = {"train": 2.0, "aggregate": 0.5, "evaluate": 0.25}
        run.append_round(
            RoundReport(
                *(round_index, accuracy, 1.0, accuracy, 1.0, prompts, 1_000_000, 2_000_000),
                *(seconds, wall),
            )
        )
    run.write_summary({"state_sha256": DIGEST})
    run.write_status({"state": "finished", "round": len(accuracies) - 1})
    return run


def write_experiment(path: Path, method: str = "pfpt") -> Path:
    run = write_run(RunDirectory(path), method, [0.1, 0.8, 0.9, math.nan])
    write_run(run.comparison("mean"), "mean", [0.1, 0.7, 0.6])
    write_run(run.comparison("head"), "head", [0.1, 0.5, 0.5], prompts=0)
    counts = np.random.default_rng(0).integers(0, 30, (20, 10))
    indices = [np.arange(total) for total in counts.sum(axis=1)]
    run.write_partition(indices, counts, [str(digit) for digit in range(10)])
    return path


def assert_is_picture(data: bytes) -> None:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(io.BytesIO(data), format="png")
    assert min(pixels.shape[:2]) >= 300
    assert pixels[..., :3].std() > 0.02


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures, for tests that look at other things."""
    monkeypatch.setattr(style, "DPI", 40)


class Page(html.parser.HTMLParser):
    """Checks that elements nest, and collects what matters."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_comparison_table_by_hand(tmp_path: Path) -> None:
    first, second, third = comparison_table([write_experiment(tmp_path / "run")])
    assert [row["name"] for row in (first, second, third)] == ["pfpt", "head", "mean"]
    assert first == {
        "name": "pfpt",
        "state": "finished",
        "rounds": 3,
        "accuracy": 0.9,  # round 2: round 3 was not evaluated
        "best_round": 2,
        "best_accuracy": 0.9,
        "balanced_accuracy": None,
        "domain_accuracy": None,
        "alone_accuracy": None,
        "personalised": None,
        "prompts": 10,
        "mb_up": 4.0,
        "mb_down": 8.0,
        "seconds": 11.0,
        "virtual_hours": None,
        "epsilon": None,
        "state_sha256": DIGEST,
    }
    assert (second["best_round"], second["prompts"]) == (1, 0)  # the earliest of equals
    assert (third["accuracy"], third["best_round"], third["best_accuracy"]) == (0.6, 1, 0.7)


def test_run_without_a_finished_round(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "fresh")
    (row,) = comparison_table([run.path])
    assert (row["name"], row["state"], row["accuracy"]) == ("fresh", "running", None)
    assert make_figures(run.path) == []
    assert "fresh" in Page(report.make_html(run.path).read_text()).text
    Console(file=io.StringIO()).print(render_summary(comparison_table([run.path])))


@pytest.mark.usefixtures("coarse")
@pytest.mark.parametrize("accuracies", [[0.5], [0.0, 0.0], [1.0, 1.0, 1.0], [math.nan, math.nan]])
def test_figures_of_degenerate_runs(tmp_path: Path, accuracies: list[float]) -> None:
    run = write_run(RunDirectory(tmp_path / "run"), "pfpt", accuracies, prompts=0)
    paths = make_figures(run.path)
    expected = ["prompts", "seconds"] if math.isnan(accuracies[0]) else None
    assert [path.stem for path in paths] == (expected or ["accuracy", "prompts", "seconds"])


def test_figures_are_pictures(tmp_path: Path) -> None:
    paths = make_figures(write_experiment(tmp_path))
    names = [path.relative_to(tmp_path).as_posix() for path in paths]
    assert names == [
        f"figures/{name}.png" for name in ("accuracy", "prompts", "clients", "seconds")
    ]
    for path in paths:
        assert_is_picture(path.read_bytes())


def test_accuracy_figure_shows_the_numbers_and_names(tmp_path: Path) -> None:
    figure = accuracy_figure(read_runs([write_experiment(tmp_path)]))
    (axes,) = figure.axes
    solid = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert np.asarray(solid[-1].get_ydata()) == pytest.approx([10, 80, 90])
    assert len(axes.lines) == 6
    labels = {text.get_text() for text in axes.texts}
    assert {"pfpt  90.0 %", "mean  60.0 %", "head  50.0 %"} <= labels
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("round", "accuracy (%)")


FIGURES = ("kept", "born", "merged", "pruned", "matched_distance", "inclusion_entropy")


def write_diagnosed(run: RunDirectory, *rounds: tuple[float, ...]) -> RunDirectory:
    """A run whose aggregator tells `FIGURES`, one tuple a round; the empty tuple tells nothing."""
    RunDirectory.create(run.path)
    for index, values in enumerate(rounds, start=1):
        figures = dict(zip(FIGURES, values, strict=True)) if values else {"num_prompts": 5.0}
        report_of = RoundReport(index, 0.5, 1.0, 0.5, 1.0, 5, 1, 1, {}, diagnostics=figures)
        run.append_round(report_of)
    return run


def test_aggregation_figure_stacks_kept_and_born_and_hangs_the_pruned(tmp_path: Path) -> None:
    run = write_diagnosed(
        RunDirectory(tmp_path / "run"),
        (0, 5, 2, 0, 1.1, 0.3),
        (),  # told nothing in round 2: left out
        (4, 2, 0, 1, math.nan, 0.2),
    )
    write_diagnosed(run.comparison("mean"), ())
    runs = read_runs([run.path])
    assert [each.diagnostics()[0] for each in runs] == [[1, 3], []]
    figure = aggregation_figure(runs)
    counts, distance, entropy = figure.axes
    bars = [
        [(bar.get_y(), bar.get_height()) for bar in group.patches]  # type: ignore[attr-defined]
        for group in counts.containers
    ]
    assert bars == [[(0, 0), (0, 4)], [(0, 5), (4, 2)], [(0, 0), (-1, 1)]]
    points = next(line for line in counts.lines if line.get_label() == "merged")
    assert np.asarray(points.get_xydata()).tolist() == [[1, 2]]
    [line] = distance.lines
    assert np.asarray(line.get_xydata()) == pytest.approx(
        np.array([[1, 1.1], [3, math.nan]]), nan_ok=True
    )
    assert np.asarray(entropy.lines[0].get_ydata()).tolist() == [0.3, 0.2]
    assert counts.get_title(loc="left") == "run"
    assert_is_picture(png_bytes(figure))


@pytest.mark.usefixtures("coarse")
def test_aggregation_figure_is_on_the_page_only_if_something_was_told(tmp_path: Path) -> None:
    told = write_diagnosed(RunDirectory(tmp_path / "told"), (4, 1, 0, 0, 1.0, 0.1))
    page = Page(report.make_html(told.path).read_text(encoding="utf-8"))
    assert (told.figures_folder / "aggregation.png").is_file()
    assert "figcaption" in page.seen
    assert "A matched distance near 1 is what the noise explains" in page.text
    silent = write_diagnosed(RunDirectory(tmp_path / "silent"), (), ())
    page = Page(report.make_html(silent.path).read_text(encoding="utf-8"))
    assert not (silent.figures_folder / "aggregation.png").exists()
    assert "A matched distance" not in page.text


def test_seconds_figure_stacks_the_phases(tmp_path: Path) -> None:
    figure = seconds_figure(read_runs([write_experiment(tmp_path)]))
    assert len(figure.axes) == 3
    tops = [patch.get_extents().y1 for patch in figure.axes[0].patches]
    top = figure.axes[0].transData.inverted().transform((0, max(tops)))[1]
    assert top == pytest.approx(2.75)
    assert figure.axes[0].get_title(loc="left") == "pfpt  ·  11 s"


def test_seconds_figure_shows_no_overlap_where_there_is_none(tmp_path: Path) -> None:
    """In one process the phases exceed a round by the 10 ms that its jobs take to be made."""
    directory = write_run(RunDirectory(tmp_path / "run"), "pfpt", [0.5, 0.6, 0.7], wall=2.74)
    (run,) = read_runs([directory.path])
    assert seconds_stack(run)[OVERLAP].tolist() == [0.0, 0.0, 0.0]
    figure = seconds_figure([run])
    bars = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert sum(bar.get_height() for bar in bars) == pytest.approx(3 * 2.74)
    assert {bar.get_hatch() for bar in bars} == {None}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["train", "aggregate", "evaluate"]


def test_seconds_figure_shows_an_overlap_once(tmp_path: Path) -> None:
    """Evaluation of 0.25 s, of which 0.2 s while the next round trained for 2 s: 2.55 s a round."""
    directory = write_run(RunDirectory(tmp_path / "run"), "pfpt", [0.5, 0.6, 0.7], wall=2.55)
    (run,) = read_runs([directory.path])
    parts = seconds_stack(run)
    assert {name: values.tolist() for name, values in parts.items()} == {
        "train": pytest.approx([1.8, 1.8, 1.8]),
        "aggregate": [0.5, 0.5, 0.5],
        "evaluate": pytest.approx([0.05, 0.05, 0.25]),  # nothing trains after the last
        OVERLAP: pytest.approx([0.2, 0.2, 0.0]),
    }
    axes = seconds_figure([run]).axes[0]
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert max(bar.get_y() + bar.get_height() for bar in bars) == pytest.approx(2.55)
    assert sum(bar.get_height() for bar in bars) == pytest.approx(3 * 2.55)
    assert {bar.get_hatch() for bar in bars} == {None, "////"}
    (row,) = comparison_table([directory.path])
    assert row["seconds"] == pytest.approx(3 * 2.55)


@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (20, 37), (100, 100)])
def test_heat_map_shows_every_client_and_class(clients: int, classes: int) -> None:
    counts = np.zeros((clients, classes), dtype=np.int64)
    counts[:, 0] = 5
    counts[0, classes - 1] = 123
    names = tuple(f"class {index} with a long name" for index in range(classes))
    figure = clients_figure(Partition(names, counts))
    axes = figure.axes[1]
    assert np.asarray(axes.collections[0].get_array()).shape == (classes, clients)
    shown = {text.get_text() for text in axes.texts}
    assert shown == ({"5", "123"} - ({"5"} if classes == 1 else set()) if clients <= 30 else set())
    assert len(axes.get_xticks()) <= 30
    assert_is_picture(png_bytes(figure))


@pytest.mark.usefixtures("coarse")
def test_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    path = report.make_html(write_experiment(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    for shown in ("90.0 %", "70.0 (1)", "4.00 MB", "11.0 s", "01234567", "method: pfpt"):
        assert shown in page.text
    for title in ("Accuracy of the global model", "Who holds what", "Where the time goes"):
        assert title in page.text
    # The one script is the one that the page allows.
    text = path.read_text(encoding="utf-8")
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src &#39;none&#39;; img-src data:; style-src &#39;unsafe-inline&#39;; "
        f"script-src &#39;sha256-{digest}&#39;" in text
    )
    assert "http" not in text.replace("http-equiv", "")


@pytest.mark.usefixtures("coarse")
def test_page_escapes_names_and_texts(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>$x^$'
    run = write_run(RunDirectory(tmp_path / "<img src=x onerror=alert(1)>"), "pfpt", [0.1, 0.5])
    run.write_partition([np.arange(3)], np.array([[1, 2]]), [evil, "$"])
    run.write_config(f"note: {evil}\n")
    run.write_summary({"method": evil, "state_sha256": f"<b>{DIGEST}"})
    run.write_status({"state": "failed", "message": evil})
    run.write_manifest({"date": evil, "packages": "<i>"})
    page = Page(report.make_html(run.path).read_text(encoding="utf-8"))
    assert page.seen.count("script") == 1  # the page's own
    assert page.seen.count("img") == 1  # the cells of who holds what
    assert page.text.count(evil) >= 4
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "The run failed" in page.text


def test_summary_table_fits_a_terminal_and_keeps_brackets(tmp_path: Path) -> None:
    directory = write_experiment(tmp_path)
    RunDirectory.open(directory).write_summary({"method": "[red]pf", "state_sha256": DIGEST})
    output = io.StringIO()
    Console(file=output, width=80).print(render_summary(comparison_table([directory])))
    lines = output.getvalue().splitlines()
    row = next(line for line in lines if "[red]pf" in line)
    assert row.split() == [
        *("[red]pf", "90.0", "-", "90.0", "(2)", "10", "4.00", "8.00", "11.0", "01234567")
    ]
    assert max(map(len, lines)) <= 80


@pytest.mark.usefixtures("coarse")
def test_summary_table_breaks_no_name_of_twelve_letters(tmp_path: Path) -> None:
    """With the widest figures that runs have."""
    run = write_run(RunDirectory(tmp_path / "run"), "pfpt", [1.0] * 120, wall=12.3)
    run.append_round(
        RoundReport(
            *(120, 1.0, 1.0, 1.1, 1.0, 20, 700_000_000, 700_000_000, {}),
            alone_accuracy=1.0,
        )
    )
    run.write_summary({"method": "twelve_chars", "state_sha256": DIGEST})
    output = io.StringIO()
    Console(file=output, width=80).print(render_summary(comparison_table([run.path])))
    row = next(line for line in output.getvalue().splitlines() if "twelve_chars" in line)
    assert row.split()[:5] == ["twelve_chars", "100.0", "100.0", "100.0", "(120)"]


@pytest.mark.usefixtures("coarse")
def test_several_runs_in_one_page(tmp_path: Path) -> None:
    paths = [write_experiment(tmp_path / name / "run") for name in ("a", "b")]
    names = [run.name for run in read_runs(paths)]
    assert names == [
        *("run/pfpt", "run/head", "run/mean"),
        *("run/pfpt (2)", "run/head (2)", "run/mean (2)"),
    ]
    paths = [write_run(RunDirectory(tmp_path / name), "pfpt", [0.5]).path for name in ("c", "d")]
    with pytest.raises(ConfigError, match=r"a page about 2 runs is none of theirs; .*--output DIR"):
        report.make_report(paths)
    page = report.make_report(paths, tmp_path / "new" / "both.html")
    assert page == tmp_path / "new" / "both.html"
    text = Page(page.read_text(encoding="utf-8")).text
    assert "c/pfpt" in text
    assert "d/pfpt" in text
    assert not (paths[0] / "figures").exists()


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one run directory"):
        comparison_table([])
    with pytest.raises(ConfigError, match="expected a run directory"):
        make_figures(tmp_path)
    directory = write_experiment(tmp_path / "run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="expected a file that can be written"):
        report.make_report([directory], tmp_path / "file" / "page.html")


def test_neither_torch_nor_pyplot_is_imported_for_a_report(tmp_path: Path) -> None:
    directory = write_run(RunDirectory(tmp_path / "run"), "pfpt", [0.1, 0.5]).path
    code = (
        "import pathlib, sys; from fedprompt.report import page as report; "
        f"report.make_html(pathlib.Path({str(directory)!r})); "
        "sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_terminals_picture_is_drawn_from_a_run(tmp_path: Path) -> None:
    """`docs/terminal.py` draws the README's picture; its clock is that of the rounds."""
    path = Path(__file__).parents[2] / "docs" / "terminal.py"
    spec = importlib.util.spec_from_file_location("terminal", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    directory = write_run(RunDirectory(tmp_path / "run"), "pfpt", [0.5, 0.6, 0.7], wall=21.0)
    directory.write_summary({"state_sha256": DIGEST, "method": "pfpt"})
    text = html.unescape(module.draw(directory.path)).replace("\xa0", " ")
    assert "elapsed 1:03" in text
    assert "70.0 %" in text
