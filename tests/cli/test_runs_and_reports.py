"""`fedprompt report` and `fedprompt runs`: whose page is written, and which runs are listed."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fedprompt.cli.main import main
from fedprompt.core.types import RoundReport
from fedprompt.runs.directory import RunDirectory


def call(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


def write(path: Path, method: str, data: str, accuracy: float, state: str = "finished") -> Path:
    run = RunDirectory.create(path)
    text = f"method: {method}\ndata: {{name: {data}}}\npartition: {{name: dirichlet, alpha: 0.5}}\n"
    run.write_config(f"{text}seed: 1\nrounds: 3\ncompare: [head_only]\n")
    run.write_manifest({"date": f"2026-01-0{1 + round(10 * accuracy) % 9}T10:00:00+00:00"})
    run.append_round(RoundReport(1, accuracy, 1.0, accuracy, 1.0, 5, 10, 20, {}))
    run.write_status({"state": state})
    return path


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three runs, one of them a trial of a sweep."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs" / "first", "pfpt", "digits", 0.3)
    write(tmp_path / "runs" / "second", "fedavg_pt", "digits", 0.5, "stopped")
    write(tmp_path / "runs" / "sweep" / "trials" / "000", "pfpt", "domains", 0.4)
    (tmp_path / "runs" / "notes").mkdir()
    return tmp_path


def listed(*words: object) -> list[str]:
    result = call("runs", *words)
    assert (result.exit_code, result.stderr) == (0, "")
    return [line.split()[0] for line in result.stdout.splitlines()[1:] if "report:" not in line]


def test_runs_are_listed_filtered_and_sorted(desk: Path) -> None:
    trial = "sweep/trials/000"
    assert listed() == ["second", trial, "first"]  # the latest first
    assert listed("--sort", "accuracy") == ["first", trial, "second"]
    assert listed("--method", "pfpt", "--sort", "path") == ["first", trial]
    assert len(listed("--method", "head_only")) == 3  # all are compared with it
    assert listed("--data", "domains") == [trial]
    assert listed("--status", "stopped") == ["second"]
    assert listed("runs/sweep") == ["trials/000"]
    row = call("runs", "--status", "stopped").stdout.splitlines()[1]
    assert row.split() == [
        *("second", "stopped", "fedavg_pt", "+1", "digits", "dirichlet", "0.5", "1", "1/3"),
        *("50.0", "%", "2026-01-06", "10:00"),
    ]
    nothing = call("runs", "--data", "cifar10").stdout
    assert nothing.startswith("runs: no run of 3 is of that kind; methods: fedavg_pt, head_only")


def test_a_selection_has_a_page_of_its_own(desk: Path) -> None:
    result = call("runs", "--data", "digits", "--report", "--output", "pages")
    assert result.stdout.splitlines()[-1] == "report: pages/report.html"
    page = (desk / "pages" / "report.html").read_text(encoding="utf-8")
    assert "second/fedavg_pt" in page
    assert "000/pfpt" not in page
    assert not list((desk / "runs").rglob("report.html"))


def test_several_runs_never_write_over_the_page_of_one(desk: Path) -> None:
    first, second = desk / "runs" / "first", desk / "runs" / "second"
    own = call("report", first)
    assert own.stdout.splitlines()[-1] == f"report: {first / 'report.html'}"
    before = (first / "report.html").read_bytes()
    several = call("report", first, second)
    path = Path(several.stdout.splitlines()[-1].removeprefix("report: "))
    assert path.parent.parent == Path("runs")
    assert path.parent.name.startswith("report-")
    assert "second/fedavg_pt" in path.read_text(encoding="utf-8")
    assert (first / "report.html").read_bytes() == before
    call("report", first, second, "--output", "both")
    assert (desk / "both" / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "runs/first", "--output", "runs/second"], "got that of a run or a sweep"),
        (["report", "runs/first", "--output", "file"], "--output file: expected a folder"),
        (["report", "runs/notes"], "runs/notes: expected a run directory"),
        (["report"], "Missing argument"),
        (["runs", "nowhere"], "expected a folder with runs, got nowhere"),
        (["runs", "--sort", "size"], "--sort: expected one of date, accuracy"),
        (["runs", "--status", "done"], "--status: expected one of running, finished"),
        (["runs", "--output", "pages"], "--output and --open are for --report"),
        (["runs", "--data", "cifar10", "--report"], "there is no page to write"),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(
    desk: Path, words: list[str], message: str
) -> None:
    (desk / "file").write_text("mine")
    before = sorted(desk.rglob("*"))
    result = call(*words)
    assert result.exit_code == 2
    line = " ".join(result.stderr.split())
    assert message in line
    assert "Traceback" not in line
    assert sorted(desk.rglob("*")) == before


def test_a_damaged_run_is_listed_all_the_same(desk: Path) -> None:
    (desk / "runs" / "first" / "rounds.jsonl").write_text("{}\n{}\n")
    (desk / "runs" / "second" / "config.yaml").write_text("a: [")
    assert len(listed()) == 3
