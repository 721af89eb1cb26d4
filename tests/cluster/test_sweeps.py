"""Sweeps by Ray Tune: trials in their placement groups, resume after SIGKILL, nothing left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

import fedprompt
from cluster.conftest import ROOT, assert_all_gone, experiment_of, session_members
from fedprompt.runs.directory import RunDirectory


def sweep_file(backbone: str, folder: Path, **more: object) -> Path:
    shared = dict(each.split("=", 1) for each in experiment_of(backbone, folder))
    del shared["run_dir"], shared["prompts.count"]
    tree: dict = {
        "experiment": "digits",
        "set": {
            **{key: yaml.safe_load(value) for key, value in shared.items()},
            "rounds": 2,
            "eval_every": 1,
            "runtime.actors": 1,
        },
        "space": {"prompts.count": {"grid": [1, 2]}},
        "seeds": 2,
        **more,
    }
    for key in tree["space"]:
        tree["set"].pop(key, None)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "fedprompt", "sweep", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=env,
    )


def temporary() -> set[str]:
    return {path.name for path in Path(tempfile.gettempdir()).glob("fedprompt-[rt]*")}


def finish(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, out + errors
    assert_all_gone(process.pid)
    return out


@pytest.mark.usefixtures("forgotten_plugins")
def test_a_killed_sweep_ends_with_the_same_table(random_backbone: str, tmp_path: Path) -> None:
    """Its trials use a plug-in, whose file is gone when the sweep is continued."""
    before = temporary()
    file = sweep_file(random_backbone, tmp_path)
    tree = yaml.safe_load(file.read_text())
    tree["set"].update({"plugins": ["trimmed_mean.py"], "aggregator": "trimmed_mean"})
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    plugin = Path(shutil.copy(ROOT / "examples/trimmed_mean.py", tmp_path))
    out = finish(start([str(file), "--dir", "whole"], tmp_path))
    assert "4/4" in out
    assert temporary() <= before
    whole = tmp_path / "whole"
    assert {path.name for path in (whole / "figures").iterdir()} == {"lines.png"}

    process = start([str(file), "--dir", "cut"], tmp_path)
    cut = tmp_path / "cut"
    deadline = time.monotonic() + 200
    while not list(cut.glob("trials/*/summary.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=30)
    for member in session_members(process.pid):  # Ray notices only after a while
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    assert not (cut / "table.json").exists()
    done = {path: path.stat().st_mtime_ns for path in cut.glob("trials/*/summary.json")}
    assert 1 <= len(done) < 4

    plugin.unlink()
    out = finish(start(["--resume", "cut"], tmp_path))
    assert f"{4 - len(done)} of 4 trials to do" in out
    for name in ("table.json", "table.csv"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert all(path.stat().st_mtime_ns == then for path, then in done.items())

    # A trial has the bits of the same experiment run alone.
    trial = next((whole / "trials").iterdir())
    again = fedprompt.run(trial / "config.yaml", ["runtime=serial", f"run_dir={tmp_path / 'one'}"])
    assert again.summary["state_sha256"] == RunDirectory(trial).read_summary()["state_sha256"]


def test_the_rule_stops_weak_trials(random_backbone: str, tmp_path: Path) -> None:
    """A rate of nothing stays at chance. The third at the first rung is below the median of two."""
    file = sweep_file(
        random_backbone,
        tmp_path,
        space={"clients.lr": {"grid": [0.01, 1e-9, 1e-8, 1e-7]}},
        seeds=1,
        stop={"grace": 1, "reduction": 2},
    )
    shared = ["prompts.count=2", "rounds=4"]
    out = finish(start([str(file), *shared, "--dir", "sweep"], tmp_path))
    states = {
        path.name.split(",")[0]: RunDirectory(path).is_finished()
        for path in (tmp_path / "sweep" / "trials").iterdir()
    }
    assert states["000-lr=0.01"]
    assert not all(states.values())
    assert "stopped" in out
    again = finish(start(["--resume", "sweep"], tmp_path))
    assert "0 of 4 trials to do" in again


def test_a_failing_trial_fails_the_sweep_and_not_the_others(
    random_backbone: str, tmp_path: Path
) -> None:
    # 1,168 training images: 5,000 clients cannot have one each, which is known when they are read.
    file = sweep_file(random_backbone, tmp_path, space={"clients.count": [6, 5000]}, seeds=1)
    process = start([str(file), "prompts.count=2", "--dir", "sweep"], tmp_path)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 1, out + errors
    lines = [line for line in errors.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "1 of 2 trials failed, the first: clients.count=5000 seed=0:" in lines[0]
    assert "5000 clients" in lines[0]
    assert "fedprompt sweep --resume" in lines[0]
    assert_all_gone(process.pid)
    rows = (tmp_path / "sweep" / "table.csv").read_text().splitlines()
    assert rows[1].startswith("6,1,0,0,0.")
    assert rows[2].startswith("5000,0,0,1,,")


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_a_stopped_sweep_leaves_nothing_running(
    random_backbone: str, tmp_path: Path, number: signal.Signals
) -> None:
    before = temporary()
    process = start([str(sweep_file(random_backbone, tmp_path)), "--dir", "sweep"], tmp_path)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("sweep/trials/*/rounds.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "fedprompt sweep --resume sweep" in errors
    assert_all_gone(process.pid)
    assert temporary() <= before
