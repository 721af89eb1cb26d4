"""The command line: bad input is one line and exit code 2 with nothing written; runs can go on."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

import fedprompt
from fedprompt.cli.main import main
from fedprompt.client.module import ClientModule
from fedprompt.config import compose
from fedprompt.runs.checkpoint import load_latest
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.events import RoundFinished
from fedprompt.runtime.base import available_cpus
from small_data import FEW_DIGITS


@pytest.fixture(scope="module")
def small(random_backbone: str) -> list[str]:
    """Overrides that make `digits` tiny, without a run directory."""
    return [
        *("rounds=3", "compare=[]", "clients.count=30", "clients.per_round=2", "clients.epochs=1"),
        *("prompts.count=2", "eval_every=3", FEW_DIGITS),
        *("runtime=serial", f"model.backbone={random_backbone}"),
    ]


class Stop(Exception):
    """Ends a run from outside."""


@pytest.fixture(scope="module")
def straight(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three rounds; not to be changed."""
    path = tmp_path_factory.mktemp("straight") / "run"
    fedprompt.run("digits", [*small, f"run_dir={path}"])
    return path


@pytest.fixture(scope="module")
def half(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, ended after two rounds; not to be changed."""
    path = tmp_path_factory.mktemp("half") / "run"

    def stop(event: Any) -> None:
        if isinstance(event, RoundFinished) and event.report.round == 2:
            raise Stop

    with pytest.raises(Stop, match=r"^$"):
        fedprompt.run("digits", [*small, f"run_dir={path}"], on_event=stop)
    return path


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    path = tmp_path / "desk"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="fedprompt")


def check_line(result: Result, exit_code: int = 2) -> str:
    """The one line on standard error, without `error: `."""
    assert isinstance(result.exception, SystemExit), result.exc_info
    lines = result.stderr.splitlines()
    assert result.exit_code == exit_code
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert len(lines[0]) > len("error: x")
    assert "Traceback" not in result.output
    return lines[0].removeprefix("error: ")


def refused(desk: Path, *arguments: str) -> str:
    """The line of a call that is refused; nothing is written and nothing said beside it."""
    before = snapshot(desk)
    result = call(*arguments)
    line = check_line(result)
    # A run shows its title at once; what only data or weights can tell comes after some stages.
    title, *stages = result.stdout.splitlines() or [""]
    assert title in ("", *(f"fedprompt {' '.join(arguments[a:b])}" for a, b in ((1, 2), (0, 3))))
    assert set(stages) <= {"starting", "starting Ray", "reading the data", "loading the backbone"}
    assert snapshot(desk) == before
    return line


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def sha256_of(run_dir: Path) -> str:
    value: str = json.loads((run_dir / "summary.json").read_text())["state_sha256"]
    return value


# Bad input


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["roundz=3"], ["unknown config key 'roundz'", "did you mean 'rounds'?"]),
        (["clients.epoch=3"], ["'clients.epoch'", "did you mean 'clients.epochs'?"]),
        (["aggregator=pftp"], ["unknown aggregator 'pftp'", "mean", "pfpt"]),
        (["data=mnist"], ["unknown data set 'mnist'", "digits", "domains"]),
        (["runtime=dask"], ["unknown runtime 'dask'", "ray, serial"]),
        (["partition.alpha=0"], ["partition.alpha: expected a finite number > 0, got 0.0"]),
        (["partition.alpha=-1"], ["partition.alpha: expected a finite number > 0, got -1.0"]),
        (
            ["clients.per_round=21"],
            ["clients.per_round: cannot sample 21 of 20 clients", "set clients.per_round=20"],
        ),
        (["rounds=-3"], ["rounds: expected an integer >= 1, got -3"]),
        (["rounds=many"], ["rounds: expected an integer, got 'many'"]),
        (
            ["prompts.count=9", "prompts.pool=4"],
            ["9 prompts cannot be selected from a pool of 4", "set prompts.pool=9"],
        ),
        (["clients.count=99999"], ["99999 clients", "lower clients.count to at most"]),
        (["clients.count=99999", "partition=iid"], ["lower clients.count to at most"]),
        (
            ["model.backbone=missing.safetensors"],
            ["missing.safetensors: expected a safetensors file"],
        ),
        (
            ["model.backbone=resnet"],
            ["model.backbone: expected nano, nano_promptable", "got 'resnet'"],
        ),
        (["rounds"], ["expected one experiment name or file", "'digits' and 'rounds'"]),
        (["=3"], ["override '=3': expected key=value"]),
    ],
    ids=str,
)
def test_a_bad_config_is_one_line(desk: Path, overrides: list[str], parts: list[str]) -> None:
    line = refused(desk, "run", "digits", "runtime=serial", *overrides)
    for part in parts:
        assert part in line


def test_more_cpus_than_exist(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cpus = available_cpus()
    line = refused(desk, "run", "digits", "runtime=ray", f"runtime.cpus={cpus + 7}")
    assert line.startswith(f"runtime.cpus: {cpus + 7} CPUs were requested")
    assert f"set runtime.cpus={cpus}" in line


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"- a\n- b\n", "expected 'key: value' lines, got a list"),
        (b"rounds: [1,\nb: }", "expected a YAML file"),
        (bytes(range(256)), "expected a YAML file"),
        (None, "no experiment 'bad.yaml'"),
    ],
    ids=["list", "broken", "binary", "missing"],
)
def test_a_bad_file_is_one_line(desk: Path, content: bytes | None, part: str) -> None:
    if content is not None:
        Path("bad.yaml").write_bytes(content)
    line = refused(desk, "run", "bad.yaml")
    assert "bad.yaml" in line
    assert part in line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run"], ["expected one experiment name or file", "got none", "fedprompt run quickstart"]),
        (["run", "one", "two"], ["got 'one' and 'two'", "fedprompt run --help"]),
        (["run", "nothing"], ["no experiment 'nothing'", "quickstart"]),
        (["run", "--resume", "x", "digits"], ["--resume takes no experiment name"]),
        (["run", "--resume", "x", "--overwrite"], ["--resume", "--overwrite", "give one"]),
        (["run", "--resume", "nowhere"], ["nowhere: expected a run directory", "nothing there"]),
        (["run", "--resume", "."], [".: expected a run directory", "another folder"]),
        (["run", "--rounds=3"], ["--rounds", "fedprompt run --help"]),
        (["run", "--resume"], ["--resume", "requires an argument"]),
        (["report", "."], ["expected a run directory"]),
        (["report"], ["RUN_DIR", "fedprompt report --help"]),
        (["replay", ".", "--client", "0"], ["expected a run directory"]),
        (["replay", "."], ["--client"]),
        (["replay", ".", "--client", "two"], ["'two' is not a valid integer"]),
        (["rnu"], ["unknown command 'rnu'", "replay", "report", "run"]),
        (["--quiet"], ["--quiet", "fedprompt --help"]),
    ],
    ids=" ".join,
)
def test_a_wrong_call_is_one_line(desk: Path, arguments: list[str], parts: list[str]) -> None:
    line = refused(desk, *arguments)
    for part in parts:
        assert part in line


def test_a_long_line_is_not_wrapped(desk: Path) -> None:
    name = "[bold]" + "x" * 150 + " :smile: " + "y" * 50
    line = refused(desk, "run", name)
    assert len(line) > 200
    assert f"no experiment '{name}'" in line


def test_a_path_with_an_equals_sign_is_a_file(desk: Path) -> None:
    folder = desk / "alpha=0.1"
    folder.mkdir()
    (folder / "mine.yaml").write_text("rounds: 77\n")
    result = call("run", "./alpha=0.1/mine.yaml", "--print-config")
    assert yaml.safe_load(result.stdout)["rounds"] == 77


def test_a_folder_that_holds_a_run(desk: Path, straight: Path, half: Path) -> None:
    before = snapshot(straight), snapshot(half)
    line = refused(desk, "run", "digits", f"run_dir={straight}")
    assert "got a finished run" in line
    assert "--overwrite" in line
    line = refused(desk, "run", "digits", f"run_dir={half}")
    assert "got an unfinished run" in line
    assert f"fedprompt run --resume {half}" in line
    assert (snapshot(straight), snapshot(half)) == before


def test_a_folder_that_holds_something_else(desk: Path) -> None:
    (desk / "thesis").mkdir()
    (desk / "thesis" / "chapter.tex").write_text("mine")
    for more in ([], ["--overwrite"]):
        line = refused(desk, "run", "digits", "run_dir=thesis", *more)
        assert "got a folder with other files" in line


def test_resume_changes_the_runtime_alone(desk: Path, half: Path) -> None:
    line = refused(desk, "run", "--resume", str(half), "rounds=9")
    assert line.startswith("--resume: only runtime, runtime.name, runtime.actors, runtime.cpus")
    assert "got 'rounds=9'" in line
    # Threads change bits.
    assert "got 'runtime.threads=2'" in refused(
        desk, "run", "--resume", str(half), "runtime.threads=2"
    )


def test_replay_of_a_client_that_is_none(desk: Path, half: Path) -> None:
    for client in ("30", "-1"):
        line = refused(desk, "replay", str(half), f"--client={client}")
        assert line == f"--client: expected a client from 0 to 29, got {client}"
    line = refused(desk, "replay", str(half), "--client=0", "--method=mean")
    assert "expected a run directory" in line


def test_python_m_fedprompt_is_the_same_program(desk: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fedprompt", "run", "one", "two"],
        capture_output=True,
        text=True,
        cwd=desk,
        timeout=120,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: expected one experiment name or file")
    assert line.endswith("see 'python -m fedprompt run --help'")
    assert result.stdout == ""
    assert snapshot(desk) == {}


# Help


def test_help_version_and_no_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in main.commands)
    assert call("run", "-h").exit_code == 0
    assert call("--version").stdout == f"fedprompt, version {fedprompt.__version__}\n"
    assert "Usage: fedprompt" in call().output


# Printing the config


def test_print_config_composes_again_and_writes_nothing(desk: Path) -> None:
    overrides = ["rounds=3", "aggregator.patience=2", "name=on", "run_dir=007"]
    result = call("run", "digits", *overrides, "--print-config")
    assert (result.exit_code, result.stderr) == (0, "")
    assert snapshot(desk) == {}
    assert compose(yaml.safe_load(result.stdout)) == compose("digits", overrides)


def test_print_config_of_a_run_that_would_be_resumed(desk: Path, half: Path) -> None:
    before = snapshot(half)
    result = call("run", "--resume", str(half), "runtime.actors=3", "--print-config")
    assert result.exit_code == 0
    printed = compose(yaml.safe_load(result.stdout))
    assert printed == compose(half / "config.yaml", ["runtime.actors=3"])
    assert snapshot(half) == before


# Runs


def test_a_run_says_what_came_of_it(desk: Path, small: list[str], straight: Path) -> None:
    """Without a run_dir: a new folder in `runs`. With one that holds a run: only by --overwrite."""
    result = call("run", "digits", *small)
    assert (result.exit_code, result.stderr) == (0, "")
    (made,) = (desk / "runs").iterdir()
    assert made.name.startswith("digits-")
    assert sha256_of(made) == sha256_of(straight)
    assert f"state sha256: {sha256_of(made)}" in result.stdout.splitlines()
    assert "`fedprompt run domains`" in result.stdout  # the note of the experiment
    assert f"report: {made / 'report.html'}" in result.stdout.splitlines()

    (made / "notes.txt").write_text("mine")
    result = call("run", "digits", *small, "rounds=1", f"run_dir={made}", "--overwrite")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [record["round"] for record in RunDirectory(made).read_rounds()] == [1]
    assert load_latest(made / "state").state.round_index == 1
    assert (made / "notes.txt").read_text() == "mine"


def test_resume_ends_as_the_straight_run(tmp_path: Path, half: Path, straight: Path) -> None:
    run_dir = Path(shutil.copytree(half, tmp_path / "run"))
    result = call("run", "--resume", str(run_dir))
    assert (result.exit_code, result.stderr) == (0, "")
    assert sha256_of(run_dir) == sha256_of(straight)
    assert [record["round"] for record in RunDirectory(run_dir).read_rounds()] == [1, 2, 3]
    first, second = (each / "predictions.npz" for each in (run_dir, straight))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("kept", [0, 1])
def test_resume_after_a_crash_between_a_record_and_its_checkpoint(
    tmp_path: Path, half: Path, straight: Path, kept: int
) -> None:
    """The record of round `kept + 1` was written and the program died before its checkpoint."""
    run_dir = Path(shutil.copytree(half, tmp_path / "run"))
    RunDirectory(run_dir).truncate_rounds(kept + 1)
    for path in (run_dir / "state").iterdir():
        if int(path.stem.removeprefix("round_")) > kept:
            path.unlink()
    result = call("run", "--resume", str(run_dir))
    assert (result.exit_code, result.stderr) == (0, "")
    assert sha256_of(run_dir) == sha256_of(straight)
    assert [record["round"] for record in RunDirectory(run_dir).read_rounds()] == [1, 2, 3]


def test_resume_of_a_finished_run_changes_nothing(straight: Path) -> None:
    before = snapshot(straight)
    result = call("run", "--resume", str(straight))
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{straight} is finished: nothing to resume" in result.stdout.splitlines()
    assert sha256_of(straight) in result.stdout
    assert snapshot(straight) == before


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def test_resume_falls_back_from_a_damaged_checkpoint(
    tmp_path: Path, half: Path, straight: Path
) -> None:
    run_dir = Path(shutil.copytree(half, tmp_path / "run"))
    damage(run_dir / "state" / "round_00002.safetensors")
    result = call("run", "--resume", str(run_dir))
    assert (result.exit_code, result.stderr) == (0, "")
    said = " ".join(result.stdout.split())
    assert "round_00002.safetensors is damaged" in said
    assert "fell back to round 1" in said
    assert sha256_of(run_dir) == sha256_of(straight)
    assert [record["round"] for record in RunDirectory(run_dir).read_rounds()] == [1, 2, 3]


def test_resume_when_both_checkpoints_are_damaged(tmp_path: Path, half: Path) -> None:
    run_dir = Path(shutil.copytree(half, tmp_path / "run"))
    damage(run_dir / "state" / "round_00002.safetensors")
    damage(run_dir / "state" / "round_00001.json")
    before = snapshot(run_dir)
    line = check_line(call("run", "--resume", str(run_dir)))
    assert line.startswith("no usable checkpoint in ")
    assert "round_00002.safetensors is damaged" in line
    assert "round_00001.json is damaged" in line
    assert "--overwrite" in line
    assert snapshot(run_dir) == before


def test_report_of_a_run(tmp_path: Path, straight: Path) -> None:
    run_dir = Path(shutil.copytree(straight, tmp_path / "run"))
    (run_dir / "report.html").unlink()
    result = call("report", str(run_dir))
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"report: {run_dir / 'report.html'}" in result.stdout.splitlines()
    assert (run_dir / "report.html").is_file()


def test_replay_of_a_client(half: Path) -> None:
    before = snapshot(half)
    result = call("replay", str(half), "--client", "4")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("client 4: ")
    assert len(result.stdout.splitlines()) == 1
    assert snapshot(half) == before


# A client that raises


def raise_in_training(patch: pytest.MonkeyPatch, head_only: bool = False) -> None:
    """Make every training step raise: of the runs with prompts, or of those without."""
    step = ClientModule.training_step

    def burst(self: ClientModule, batch: Any, batch_index: int) -> torch.Tensor:
        if (self.recipe.prompts.count == 0) == head_only:
            raise RuntimeError("the [red]loss[/red] burst\nwith details below")
        return step(self, batch, batch_index)

    patch.setattr(ClientModule, "training_step", burst)


def test_a_client_that_raises(tmp_path: Path, half: Path, straight: Path) -> None:
    run_dir = Path(shutil.copytree(half, tmp_path / "my run"))
    with pytest.MonkeyPatch.context() as patch:
        raise_in_training(patch)
        line = check_line(call("run", "--resume", str(run_dir)), exit_code=1)
        status = json.loads((run_dir / "status.json").read_text())
        client = status["client"]
        assert line == (
            f"client {client} failed in round 3 while it was in stage 'fit': "
            "RuntimeError: the [red]loss[/red] burst; "
            f"rerun it alone: fedprompt replay '{run_dir}' --client {client}"
        )
        assert (status["state"], status["stage"], status["failed_round"]) == ("failed", "fit", 3)
        assert status["round"] == 2

        arguments = shlex.split(line.partition("rerun it alone: fedprompt ")[2])
        result = call(*arguments)
        assert result.exit_code == 1
        assert "with details below" in result.stderr  # here the traceback is wanted
        assert f"client {client} failed in round 3" in result.stderr.splitlines()[-1]

    assert call(*arguments).exit_code == 0
    result = call("run", "--resume", str(run_dir))
    assert (result.exit_code, result.stderr) == (0, "")
    assert sha256_of(run_dir) == sha256_of(straight)
    assert RunDirectory(run_dir).read_status()["state"] == "finished"


def test_a_client_of_a_comparison_that_raises(desk: Path, small: list[str]) -> None:
    more = ("rounds=1", "compare=[head_only]", f"run_dir={desk / 'run'}")
    with pytest.MonkeyPatch.context() as patch:
        raise_in_training(patch, head_only=True)
        line = check_line(call("run", "digits", *small, *more), exit_code=1)
        assert "failed in round 1 while it was in stage 'fit'" in line
        assert line.endswith(" --method head_only")
        status = RunDirectory(desk / "run").comparison("head_only").read_status()
        assert (status["state"], status["stage"], status["round"]) == ("failed", "fit", 0)

    assert call(*shlex.split(line.partition("rerun it alone: fedprompt ")[2])).exit_code == 0
    before = snapshot(desk / "run" / "state")
    result = call("run", "--resume", str(desk / "run"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert snapshot(desk / "run" / "state") == before
    assert RunDirectory(desk / "run").is_finished()
    assert RunDirectory(desk / "run").comparison("head_only").is_finished()
