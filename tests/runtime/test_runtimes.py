"""One contract, two executions, the same bits; also after kills, restarts and signals."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import fedprompt
from fedprompt.cli.main import main
from fedprompt.client.recipe import LocalRecipe
from fedprompt.config import compose
from fedprompt.core.errors import CheckpointError, ClientError, ConfigError, WorkerError
from fedprompt.core.types import Broadcast, ClientJob, ClientUpdate, RoundReport
from fedprompt.report.page import make_html
from fedprompt.runs import driver
from fedprompt.runs.checkpoint import load_latest
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.events import Plan, RoundFinished
from fedprompt.runs.federation import initial_state, prepare
from fedprompt.runtime import RuntimeOptions
from fedprompt.runtime.ray import pool as ray_runtime
from fedprompt.runtime.serial import SerialRuntime
from fedprompt.server.evaluate import Piece, Tally
from small_data import FEW_DIGITS

Overrides = Callable[..., list[str]]


@pytest.fixture(scope="module")
def straight(random_backbone: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """State hash of the tiny experiment, run serially without interruption."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    result = fedprompt.run("digits", experiment_of(random_backbone, folder))
    return str(result.summary["state_sha256"])


def experiment_of(backbone: str, folder: Path, *more: str) -> list[str]:
    return [
        "rounds=3",
        "eval_every=3",
        "compare=[]",
        "clients.count=6",
        "clients.per_round=4",
        "clients.epochs=1",
        "prompts.count=2",
        "prompts.pool=null",
        "prompts.selection=keyed",
        FEW_DIGITS,
        "runtime=serial",
        f"model.backbone={backbone}",
        f"run_dir={folder}",
        *more,
    ]


def test_ray_gives_the_bits_of_serial(local_ray: None, tmp_path: Path) -> None:
    """With all that may travel: control variates, generated prompts, layers inside the backbone, a
    client's own state, the spread of clients' queries, prompts before an inner block, rounded
    features of the cache; and clients in packs (whole ones and a rest). The first three of five
    clients to report by the virtual clock are merged.
    """
    compared = ["scaffold_pt", "pfedpg", "lora_fedavg", "local_only"]
    hashes, figures = {}, {}
    for runtime in ("serial", "ray"):
        overrides = [
            *("rounds=2", "clients.count=6", "clients.per_round=3", "clients.epochs=1"),
            *("clients.batch_size=64", "prompts.count=2", "prompts.depth=1"),
            *("prompts.whiten=clients", "prompts.query=both", "prompts.choice=soft"),
            *("data.train=80", "data.validation=40", "data.test=40", "data.public=80"),
            *(f"cache.folder={tmp_path / 'cache'}", "cache.dtype=bfloat16", "runtime.pack=2"),
            *("system.speed=uniform:1:9", "system.bandwidth=lognormal:5:1"),
            *("system.over_select=1.5", f"runtime={runtime}", "runtime.actors=2"),
            f"compare={compared}",
            f"run_dir={tmp_path / runtime}",
        ]
        result = fedprompt.run("domains", overrides)
        rows = [result.summary, *result.summary["comparison"]]
        hashes[runtime] = [row["state_sha256"] for row in rows]
        evaluated = ("accuracy", "loss", "validation_accuracy", "personalised")
        evaluated = (*evaluated, "virtual_seconds", "virtual_hours", "missed")
        figures[runtime] = [[each[key] for key in evaluated] for each in result.reports]
        assert [each["round"] for each in result.reports] == [1, 2]
        assert [len(each["missed"]) for each in result.reports] == [2, 2]
        saved = RunDirectory(result.run_dir).read_predictions()
        right = (saved["prediction"] == saved["label"]).mean()
        assert right == pytest.approx(result.summary["accuracy"])
    first, second = (tmp_path / each / "predictions.npz" for each in ("serial", "ray"))
    assert first.read_bytes() == second.read_bytes()
    assert hashes["ray"] == hashes["serial"]
    assert figures["ray"] == figures["serial"]
    assert len(set(hashes["serial"])) == 5


def test_an_asynchronous_run_has_the_same_bits_on_ray(
    local_ray: None, random_backbone: str, tmp_path: Path, tiny: Callable[..., list[str]]
) -> None:
    """Three clients at work, merged by two: one is always in flight when a round is saved."""
    more = ("method=fedavg_pt", "rounds=3", "eval_every=3", "prompts.depth=4")
    more = (*more, "system.bandwidth=uniform:1:20", "system.schedule=fedbuff", "system.buffer=2")
    seen = []
    for runtime in ("serial", "ray"):
        options = (f"runtime={runtime}", f"run_dir={tmp_path / runtime}")
        result = fedprompt.run("digits", tiny(*more, *options))
        stale = [
            (each["client"], each["staleness"]) for r in result.reports for each in r["clients"]
        ]
        seen.append((result.summary["state_sha256"], stale))
    assert seen[0] == seen[1]
    assert max(staleness for _, staleness in seen[0][1]) > 0


def test_a_callback_stops_a_run_at_the_same_state_on_ray(
    local_ray: None, random_backbone: str, tmp_path: Path
) -> None:
    """While a round is looked at, clients of the next one train: they are of no use any more, and
    do not disturb the method that comes next.
    """
    hashes = {}
    for runtime in ("serial", "ray"):
        given = experiment_of(
            *(random_backbone, tmp_path / runtime, "rounds=4", "eval_every=1"),
            *("compare=[fedavg_pt]", f"runtime={runtime}", "runtime.actors=2"),
            *("callbacks=[{name: early_stopping, patience: 1, min_delta: 1}]", "loggers=[csv]"),
        )
        result = fedprompt.run("digits", given)
        results = [result, *result.comparisons.values()]
        hashes[runtime] = [each.summary["state_sha256"] for each in results]
        for each in results:
            assert [report["round"] for report in each.reports] == [1, 2]
            table = (each.run_dir / "loggers/csv/metrics.csv").read_text()
            assert len(table.splitlines()) == 1 + 2
    assert hashes["ray"] == hashes["serial"]
    assert len(set(hashes["ray"])) == 2


class Watched(SerialRuntime):
    """Notes what is started and what is waited for."""

    def __init__(self, options: RuntimeOptions, failing: int | None = None) -> None:
        super().__init__(options)
        self.log: list[str] = []
        self.failing = failing

    def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        number = jobs[0].round_index
        self.log.append(f"train {number}")

        def wait() -> Iterator[ClientUpdate]:
            self.log.append(f"trained {number}")
            if number == self.failing:
                raise ClientError(jobs[0].client_id, number, "fit", "out of order")
            yield from super(Watched, self).map(recipe, jobs)

        return wait()

    def measure(self, recipe: LocalRecipe, pieces: Sequence[Piece]) -> Callable[[], list[Tally]]:
        self.log.append("measure")
        tallies = super().measure(recipe, pieces)

        def wait() -> list[Tally]:
            self.log.append("measured")
            return tallies()

        return wait


def watched(
    backbone: str, folder: Path, failing: int | None = None
) -> tuple[Iterator[object], Watched, RunDirectory]:
    """A run of three rounds, each evaluated, in this process."""
    config = compose("digits", experiment_of(backbone, folder, "eval_every=1"))
    runtime = Watched(config.runtime, failing)
    return (
        driver.drive(runtime, Plan(config, str(folder)), make_html),
        runtime,
        RunDirectory(folder),
    )


def test_clients_begin_while_the_round_before_is_measured(
    random_backbone: str, tmp_path: Path
) -> None:
    """The last round has no next one; a round is on disk before its event comes."""
    events, runtime, directory = watched(random_backbone, tmp_path / "run")
    for event in events:
        if isinstance(event, RoundFinished):
            assert directory.last_round() == event.report.round
            assert directory.read_rounds()[-1]["round"] == event.report.round
    assert " ".join(runtime.log) == (
        "train 1 trained 1 measure "
        "train 2 measured trained 2 measure "
        "train 3 measured trained 3 measure measured"
    )


def test_a_failing_round_leaves_the_one_before_on_disk(
    random_backbone: str, tmp_path: Path
) -> None:
    """Although its clients had started before that one was measured."""
    events, _, directory = watched(random_backbone, tmp_path / "run", failing=2)
    with pytest.raises(ClientError, match="round 2"):
        list(events)
    assert directory.last_round() == 1
    assert [report["round"] for report in directory.read_rounds()] == [1]


class InstantRay:
    """Stands for Ray: each call is done as soon as somebody waits, the oldest first."""

    exceptions = pytest.importorskip("ray").exceptions

    @staticmethod
    def wait(
        refs: list[Any], num_returns: int, timeout: float | None
    ) -> tuple[list[Any], list[Any]]:
        return refs[:1], refs[1:]

    @staticmethod
    def get(ref: Any) -> Any:
        return ref


@pytest.mark.parametrize("actors", [1, 2, 3])
def test_tasks_are_given_out_in_their_order_and_the_last_to_the_idle(
    monkeypatch: pytest.MonkeyPatch, actors: int
) -> None:
    """Pieces of an evaluation come before the jobs that were started after them."""
    monkeypatch.setattr(ray_runtime, "import_ray", InstantRay)
    runtime = ray_runtime.RayRuntime(RuntimeOptions())
    runtime._held = dict.fromkeys(map(str, range(actors)), 0)
    log: list[str] = []
    most: list[int] = []

    def submit(actor: str, task: str) -> tuple[str, str]:
        log.append(task)
        most.append(runtime._held[actor])
        return actor, task

    pieces, jobs = [f"piece {i}" for i in range(4)], [f"job {i}" for i in range(10)]
    evaluation, training = runtime._start(submit, pieces), runtime._start(submit, jobs)
    assert [task for _, (_, task) in runtime._results(evaluation)] == pieces
    assert len(log) <= len(pieces) + 2 * actors
    assert [task for _, (_, task) in runtime._results(training)] == jobs
    assert log == [*pieces, *jobs]
    assert max(most) == 2
    assert most[-actors:] == [1] * actors
    assert runtime._groups == []
    assert set(runtime._held.values()) == {0}


def actor_process(name: str, session: int = 0) -> int:
    """Process id of an actor of one session (0: this process's), by the title Ray gives it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for process in session_members(session or os.getsid(0)):
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{process}/cmdline").read_bytes()
                if title.startswith(b"ray::" + name.encode()):
                    return process
        time.sleep(0.05)
    raise AssertionError(f"no {name} is running")


class Stop(BaseException):
    """Ends a run from outside."""


def stop_after(rounds: int) -> Callable[[object], None]:
    """An `on_event` that ends the run after some rounds of all methods."""
    seen: list[object] = []

    def stop(event: object) -> None:
        seen.append(event)
        if sum(isinstance(each, RoundFinished) for each in seen) == rounds:
            raise Stop

    return stop


def test_resume_equals_straight(straight: str, random_backbone: str, tmp_path: Path) -> None:
    """After the first round; after the second, and after crashes in between: test_cli.py."""
    with pytest.raises(Stop):
        fedprompt.run(
            "digits",
            experiment_of(random_backbone, tmp_path / "run"),
            on_event=stop_after(1),
        )
    assert load_latest(tmp_path / "run" / "state").state.round_index == 1
    result = fedprompt.resume(tmp_path / "run")
    assert result.summary["state_sha256"] == straight
    assert [report["round"] for report in result.reports] == [1, 2, 3]


def test_resume_goes_on_with_unfinished_comparisons(random_backbone: str, tmp_path: Path) -> None:
    """The second one was cut before its header, and starts again."""
    more = ["rounds=1", "compare=[head_only, fedavg_pt]"]
    whole = fedprompt.run("digits", experiment_of(random_backbone, tmp_path / "whole", *more))
    with pytest.raises(Stop):
        fedprompt.run(
            "digits",
            experiment_of(random_backbone, tmp_path / "cut", *more),
            on_event=stop_after(2),
        )
    unfinished = RunDirectory(tmp_path / "cut").comparison("fedavg_pt")
    if not unfinished.path.exists():
        RunDirectory.create(unfinished.path)
    assert not unfinished.has_header()
    assert not (tmp_path / "cut" / "summary.json").exists()
    resumed = fedprompt.resume(tmp_path / "cut")
    assert unfinished.has_header()

    def hashes(summary: dict) -> list[str]:
        return [summary["state_sha256"], *(row["state_sha256"] for row in summary["comparison"])]

    assert hashes(resumed.summary) == hashes(whole.summary)
    assert len(set(hashes(whole.summary))) == 3
    # A finished run without its report gets one.
    report = tmp_path / "cut" / "report.html"
    report.unlink()
    fedprompt.resume(tmp_path / "cut")
    assert report.stat().st_size > 1000


def test_a_run_that_was_cut_before_its_header_says_so(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"stopped before it began.*--overwrite"):
        fedprompt.resume(tmp_path / "run")


def test_resume_refuses_another_backbone_or_partition(random_backbone: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = tmp_path / "mine.safetensors"
    tensors = load_file(random_backbone)
    save_file(tensors, weights)
    run_dir = tmp_path / "run"
    with pytest.raises(Stop):
        fedprompt.run("digits", experiment_of(str(weights), run_dir), on_event=stop_after(1))
    name = "vit.blocks.0.attn.qkv.weight"
    save_file({**tensors, name: tensors[name] * 1.5}, weights)
    with pytest.raises(CheckpointError, match="expected a backbone of sha256"):
        fedprompt.resume(run_dir)
    save_file(tensors, weights)
    directory = RunDirectory(run_dir)
    parts = directory.read_indices()
    counts = np.zeros((len(parts), 10), dtype=np.int64)
    directory.write_partition(parts[::-1], counts, [str(digit) for digit in range(10)])
    with pytest.raises(CheckpointError, match="data or partition differ"):
        fedprompt.resume(run_dir)
    directory.write_partition(parts, counts, [str(digit) for digit in range(10)])
    assert fedprompt.resume(run_dir).state.round_index == 3


def test_a_full_disk_is_one_line_and_a_failed_status(
    random_backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "rounds.jsonl")

    monkeypatch.setattr(RunDirectory, "append_round", full)
    run_dir = tmp_path / "run"
    result = call("run", "digits", *experiment_of(random_backbone, run_dir))
    assert result.exit_code == 1
    assert result.stderr == (
        "error: No space left on device (rounds.jsonl); "
        f"continue with: fedprompt run --resume {run_dir}\n"
    )
    status = RunDirectory(run_dir).read_status()
    assert status["state"] == "failed"
    assert "No space left" in status["message"]


def test_every_method_starts_from_the_same_head(random_backbone: str, tmp_path: Path) -> None:
    config = compose("digits", experiment_of(random_backbone, tmp_path / "run"))
    federation = prepare(config)
    states = [
        initial_state(each, federation)
        for each in (config, config.with_method("fedavg_pt"), config.with_method("head_only"))
    ]
    head = states[0].shared.head["0.weight"]
    assert all(head.equal(state.shared.head["0.weight"]) for state in states)
    assert states[0].prompts.equal(states[1].prompts)


def test_errors_come_out_of_ray_as_they_are() -> None:
    """Out of a client actor, and then of the driver actor."""
    from ray import cloudpickle
    from ray.exceptions import RayTaskError

    from fedprompt.runtime.ray.local import unwrapped

    error: Exception = ClientError(7, 3, "fit", "RuntimeError: burst")
    for actor in ("ClientActor", "DriverActor"):
        error = cloudpickle.loads(cloudpickle.dumps(RayTaskError(actor, "a traceback", error)))
    assert isinstance(error, RayTaskError)
    cause = unwrapped(error.as_instanceof_cause())
    assert isinstance(cause, ClientError)
    assert (cause.client_id, cause.round_index, cause.stage) == (7, 3, "fit")
    foreign = RayTaskError("DriverActor", "a traceback", KeyError("x"))
    assert unwrapped(foreign) is foreign


def test_a_failing_client_says_on_which_node_it_was(tmp_path: Path) -> None:
    """From the actor to `status.json`."""
    from fedprompt.experiment import mark_failed
    from fedprompt.runtime.ray.actors import ClientActor
    from fedprompt.runtime.ray.nodes import node_name

    class Failing:
        def train(self, recipe: object, jobs: object) -> None:
            raise ClientError(7, 3, "fit", "RuntimeError: burst")

    actor = ClientActor(threads=1)
    actor._worker = Failing()  # type: ignore[assignment]
    job = ClientJob(7, 3, 0, Broadcast(torch.empty(0, 0), torch.empty(0, 0)))
    with pytest.raises(ClientError, match="client 7 failed in round 3") as caught:
        actor.train([], None, [job], job.broadcast)  # type: ignore[arg-type]
    assert caught.value.node == node_name()
    directory = RunDirectory.create(tmp_path / "run")
    mark_failed(directory, pickle.loads(pickle.dumps(caught.value)))
    status = directory.read_status()
    found = [status[key] for key in ("state", "client", "failed_round", "stage", "cause", "node")]
    assert found == ["failed", 7, 3, "fit", "RuntimeError: burst", node_name()]


def test_a_wrong_request_writes_nothing_under_ray(
    local_ray: None, random_backbone: str, tmp_path: Path
) -> None:
    overrides = experiment_of(
        random_backbone, tmp_path / "run", "runtime=ray", "clients.count=5000"
    )
    with pytest.raises(ConfigError, match="5000 clients"):
        fedprompt.run("digits", overrides)
    assert list(tmp_path.iterdir()) == []


def call(*arguments: str) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(main, arguments, prog_name="fedprompt")


def cli(arguments: Sequence[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    # Its own process group, so that what it leaves behind can be found.
    return subprocess.Popen(
        [sys.executable, "-m", "fedprompt", "run", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


def wait_for_rounds(folder: Path, rounds: int, process: subprocess.Popen[str]) -> None:
    """Wait for a checkpoint: a round's line in `rounds.jsonl` comes before it."""
    deadline = time.monotonic() + 250
    while time.monotonic() < deadline:
        if (RunDirectory(folder).last_round() or 0) >= rounds:
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"no {rounds} rounds; {process.communicate()}")


def session_members(session: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if folder.name.isdigit() and os.getsid(int(folder.name)) == session:
                state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if state != "Z":
                    found.append(int(folder.name))
    return found


def assert_all_gone(session: int) -> None:
    deadline = time.monotonic() + 30
    while session_members(session) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert session_members(session) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_keeps_its_rounds(
    random_backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Stopped in its third round, after that one's line in `rounds.jsonl`.

    Under Ray, and with a process that ends: `test_a_killed_and_stopped_run_...`.
    """

    def leave(code: int) -> None:
        raise SystemExit(code)

    append_round = RunDirectory.append_round

    def stop_at_the_third(directory: RunDirectory, report: RoundReport) -> None:
        append_round(directory, report)
        if report.round == 3:
            signal.raise_signal(number)

    monkeypatch.setattr(RunDirectory, "append_round", stop_at_the_third)
    monkeypatch.setattr("fedprompt.cli.console.os._exit", leave)
    run_dir = tmp_path / "run"
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        result = call("run", "digits", *experiment_of(random_backbone, run_dir))
    finally:  # on its way out the program does not put them back
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert result.exit_code == 128 + number
    check_stopped(run_dir, result.stderr)
    assert load_latest(run_dir / "state").state.round_index == 2


def check_stopped(run_dir: Path, errors: str) -> None:
    """One line on standard error, and what is on disk agrees with it."""
    (line,) = [line for line in errors.splitlines() if line.strip()]
    assert f"fedprompt run --resume {run_dir}" in line
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["message"]) == ("stopped", "stopped by a signal")
    rounds = load_latest(run_dir / "state").state.round_index
    assert f"stopped; on disk: {rounds} finished round" in line
    assert len((run_dir / "rounds.jsonl").read_text().splitlines()) >= rounds


GATE = """
import time
from pathlib import Path

import pytorch_lightning as pl
from fedprompt.client.callbacks import NoOptions, callbacks


@callbacks.register("gate", NoOptions)
class Gate(pl.Callback):
    def __init__(self, options):
        super().__init__()

    def on_fit_start(self, trainer, module):
        folder = Path({folder!r})
        gate, rounds = folder / "gate", folder / "run" / "rounds.jsonl"
        while gate.exists() and len(rounds.read_bytes().splitlines()) >= int(gate.read_text()):
            time.sleep(0.05)
"""
"""A plug-in with which clients wait from a round on: no run is done before a test can stop it."""


def test_a_killed_and_stopped_run_ends_with_the_same_bits(
    local_ray: None, random_backbone: str, tmp_path: Path, forgotten_plugins: None
) -> None:
    """SIGKILL to a client actor, whose work others do, and then to the driver actor; SIGTERM to the
    program that goes on; the rest without Ray.
    """
    plugin, gate, run_dir = (tmp_path / name for name in ("gate.py", "gate", "run"))
    plugin.write_text(GATE.format(folder=str(tmp_path)), encoding="utf-8")
    gated = [f"plugins=[{plugin}]", "clients.callbacks=[gate]", "rounds=8", "eval_every=8"]
    whole = fedprompt.run("digits", experiment_of(random_backbone, tmp_path / "whole", *gated))
    victims: list[int] = []

    def kill(event: object) -> None:
        name = {1: "ClientActor", 3: "DriverActor"}.get(
            event.report.round if isinstance(event, RoundFinished) else 0
        )
        if name:
            victims.append(actor_process(name))
            os.kill(victims[-1], signal.SIGKILL)

    gate.write_text("3")
    overrides = experiment_of(random_backbone, run_dir, "runtime=ray", "runtime.actors=3", *gated)
    with pytest.raises(WorkerError, match="the driver process died"):
        fedprompt.run("digits", overrides, on_event=kill)
    assert len(victims) == 2
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
    assert not (run_dir / "summary.json").exists()

    done = load_latest(run_dir / "state").state.round_index
    assert 3 <= done < 6  # the gate's round, and what was under way
    gate.write_text(str(done + 2))
    # Two threads in the environment: `runtime.threads` must still hold.
    fewer = ["runtime.actors=1", "runtime.cpus=1"]
    process = cli(["--resume", str(run_dir), *fewer], tmp_path, OMP_NUM_THREADS="2")
    wait_for_rounds(run_dir, done + 1, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert_all_gone(process.pid)
    check_stopped(run_dir, errors)
    assert not (run_dir / "summary.json").exists()

    gate.unlink()
    result = fedprompt.resume(run_dir, ["runtime=serial"])
    assert result.summary["state_sha256"] == whole.summary["state_sha256"]
    assert [report["round"] for report in result.reports] == list(range(1, 9))


QUIET = {"LC_ALL": "C", "PATH": os.defpath}


def family() -> set[int]:
    """This process and all that come of it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            parents[int(folder.name)] = int(fields[1])
    found = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


@pytest.mark.skipif(shutil.which("ss") is None, reason="ss is not installed")
@pytest.mark.usefixtures("local_ray")
def test_all_sockets_of_a_local_ray_are_on_the_loopback() -> None:
    lines = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    ours = [
        line.split()[3].rpartition(":")[0]
        for line in lines.splitlines()
        if any(int(pid) in family() for pid in re.findall(r"pid=(\d+)", line))
    ]
    assert len(ours) >= 5  # the control service, the node, its agent, the workers
    assert set(ours) <= {"127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"}


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can be another user")
@pytest.mark.usefixtures("local_ray")
def test_another_user_does_not_get_to_the_token_nor_to_the_files_of_a_local_ray() -> None:
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
    assert (token.parent / "r" / "session_latest").exists()
    for path in (token, token.parent, token.parent / "r" / "session_latest" / "sockets"):
        result = subprocess.run(
            ["cat", str(path)], capture_output=True, text=True, user=65534, group=65534, env=QUIET
        )
        assert "Permission denied" in result.stderr


def test_ray_puts_no_signal_handler_in_the_place_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from fedprompt.runtime.ray import local

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(each) for each in signals]

    def init(**_: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(local, "check_answers", lambda address: None)
    monkeypatch.setattr(ray, "init", init)
    try:
        local.start_ray(1, verbose=False)
        assert [signal.getsignal(each) for each in signals] == before
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


def test_a_ray_that_does_not_start_is_one_line_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from fedprompt.runtime.ray import local

    def late(**options: object) -> None:
        assert Path(str(options["_temp_dir"])).is_dir()
        raise Exception("The current node timed out during startup.\nMore of it.")

    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(local, "short_folder", lambda: str(tmp_path))
    with pytest.raises(WorkerError, match=r"did not start .*More of it\.; .*runtime=serial"):
        local.start_ray(1, verbose=False)
    assert list(tmp_path.iterdir()) == []


def test_threads_are_limited_and_restored() -> None:
    import torch

    torch.set_num_threads(2)
    seen: list[int] = []

    def look(runtime: SerialRuntime) -> Iterator[int]:
        seen.append(torch.get_num_threads())
        yield 1

    list(SerialRuntime(RuntimeOptions("serial", threads=1)).launch(look))
    assert seen == [1]
    assert torch.get_num_threads() == 2


def test_a_cluster_that_does_not_answer_is_one_line_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that refuses, and one that takes the call and says nothing."""
    from fedprompt.runtime.ray import local

    monkeypatch.setattr(local, "ANSWER_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        for cause in ("Connection refused", "no answer"):
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
            with pytest.raises(
                WorkerError, match=rf"^RAY_ADDRESS=127\.0\.0\.1:{port}: .*'{cause}'.* unset"
            ):
                local.start_ray(1, verbose=False)
            silent.listen()
