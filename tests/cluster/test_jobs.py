"""Jobs on the cluster of `make cluster`: what a user does, and what can go wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.conftest import ROOT, assert_all_gone, experiment_of, session_members
from fedprompt.config import compose

Environment = dict[str, str]


def script(
    name: str, *arguments: str, env: Environment, seconds: float = 240
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=env,
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """The environment in which the scripts find a head and a worker."""
    folder = tmp_path_factory.mktemp("jobs")
    env = {**os.environ, "FEDPROMPT_CLUSTER": str(folder / "cluster")}
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        env.pop(name, None)
    started = script("cluster.py", "start", "--workers", "1", "--cpus", "1", env=env)
    assert started.returncode == 0, started.stderr
    state = json.loads((folder / "cluster" / "cluster.json").read_text())
    yield env
    again = script("cluster.py", "start", env=env)
    assert again.returncode == 1
    assert "a cluster is running" in again.stderr
    assert script("cluster.py", "stop", env=env).returncode == 0
    for process in state["processes"]:
        assert_all_gone(process["pid"])
    assert not Path(state["temporary"]).exists()
    assert not (folder / "cluster").exists()


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    return line


def test_a_job_is_the_same_experiment(
    cluster: Environment, straight: str, random_backbone: str, tmp_path: Path
) -> None:
    """The code is shipped, the log comes here, and the bits are those of one process."""
    overrides = experiment_of(random_backbone, tmp_path / "a run", "runtime.actors=2")
    result = script("submit.py", "run", "digits", "--", *overrides, env=cluster)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"state sha256: {straight}" in result.stdout
    assert "2 client actors on 2 nodes" in result.stdout
    assert re.search(r"^ +3/3 ", result.stdout, flags=re.MULTILINE)
    listed = script("submit.py", "status", env=cluster)
    assert re.search(r"^raysubmit_\w+ +SUCCEEDED +digits$", listed.stdout, re.MULTILINE)


def test_the_next_job_finds_spare_workers(
    cluster: Environment, random_backbone: str, tmp_path: Path
) -> None:
    """What a job used up is replaced by as many processes, whose imports are done already."""
    state = json.loads((Path(cluster["FEDPROMPT_CLUSTER"]) / "cluster.json").read_text())
    sessions = [process["pid"] for process in state["processes"]]

    def submit(name: str) -> None:
        overrides = experiment_of(random_backbone, tmp_path / name, "rounds=1", "runtime.actors=2")
        result = script("submit.py", "run", "digits", "--", *overrides, env=cluster)
        assert result.returncode == 0, result.stdout + result.stderr

    before = settled_idle_workers(sessions)
    submit("first")
    waiting = settled_idle_workers(sessions)
    assert len(waiting - before) == 3  # the driver's, and two client actors'
    submit("second")
    # Used, not left over: both client actors, at least. The driver may be on another node now.
    assert len(waiting - idle_workers(sessions)) >= 2


def settled_idle_workers(sessions: list[int], seconds: float = 5) -> set[int]:
    """Those of `idle_workers`, once none has come or gone for a while."""
    deadline, since, found = time.monotonic() + 90, time.monotonic(), idle_workers(sessions)
    while time.monotonic() < min(deadline, since + seconds):
        time.sleep(0.2)
        if (now := idle_workers(sessions)) != found:
            since, found = time.monotonic(), now
    return found


def idle_workers(sessions: list[int]) -> set[int]:
    """The worker processes of a cluster that wait for work."""
    members = {pid for session in sessions for pid in session_members(session)}
    return {pid for pid in members if title(pid).startswith("ray::IDLE")}


def title(pid: int) -> str:
    """The command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


def test_plug_ins_travel_with_a_job(
    cluster: Environment, random_backbone: str, medmnist: Path, tmp_path: Path
) -> None:
    """The example's experiment, whose plug-ins the job's processes know from its files alone."""
    overrides = experiment_of(random_backbone, tmp_path / "run", "runtime.actors=2")
    overrides.append(f"data.root={medmnist}")
    lab = shutil.copytree(ROOT / "examples", tmp_path / "lab")
    command = ["submit.py", "run", str(lab / "experiment.yaml"), "--", *overrides]
    result = script(*command, env=cluster)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 client actors on 2 nodes" in result.stdout
    records = json.loads((tmp_path / "run/manifest.json").read_text())["plugins"]
    assert [record["name"] for record in records] == ["medmnist", "fedcm", "trimmed_mean"]
    assert not any(str(lab) in record["path"] for record in records)
    shutil.rmtree(lab)
    resumed = compose(tmp_path / "run/config.yaml")
    assert resumed.aggregator.name == "trimmed_mean"


def test_a_wrong_experiment_fails_the_job(
    cluster: Environment, random_backbone: str, tmp_path: Path
) -> None:
    overrides = experiment_of(random_backbone, tmp_path / "run", "clients.count=5000")
    result = script("submit.py", "run", "digits", "--", *overrides, env=cluster)
    assert result.returncode == 2
    assert "5000 clients" in result.stdout  # the program's own line, in the log
    assert "FAILED with exit code 2" in one_line(result)


def test_a_wrong_token_and_a_wrong_address(cluster: Environment) -> None:
    refused = script("submit.py", "status", env={**cluster, "RAY_AUTH_TOKEN": "0" * 64})
    assert refused.returncode == 1
    assert "refuses the token" in one_line(refused)
    nobody = script("submit.py", "--address", "http://127.0.0.1:9", "status", env=cluster)
    assert nobody.returncode == 1
    assert "no job server answers at http://127.0.0.1:9" in one_line(nobody)


def test_a_stopped_job_says_so_and_can_be_resumed(
    cluster: Environment, random_backbone: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    overrides = experiment_of(random_backbone, run_dir, "rounds=2000", "runtime.actors=1")
    command = [sys.executable, str(ROOT / "jobs" / "submit.py"), "run", "digits"]
    following = subprocess.Popen(
        [*command, "--", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cluster,
    )
    rounds = run_dir / "rounds.jsonl"
    deadline = time.monotonic() + 180
    while not (rounds.is_file() and rounds.stat().st_size) and time.monotonic() < deadline:
        assert following.poll() is None, following.communicate()
        time.sleep(0.2)
    stopped = script("submit.py", "stop", env=cluster)
    assert stopped.returncode == 0
    out, errors = following.communicate(timeout=120)
    assert following.returncode == 143, out + errors
    assert "was stopped" in errors
    assert (run_dir / "state").is_dir()
    nothing = script("submit.py", "stop", env=cluster)
    assert (nothing.returncode, one_line(nothing)) == (1, "error: no job is running")
