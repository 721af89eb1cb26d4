"""Start-up, speed and recovery of the Ray runtime, on this machine.

    python benchmarks/cluster.py            start-up, speed, recovery
    python benchmarks/cluster.py sweeps     ten sweeps in a row, and what they leave behind

The figures go to benchmarks/results/cluster.json.

Everything runs one small experiment. `equal` says that all runs ended in the same state; figures of
runs that did unequal work would mean nothing. The load of the machine stands beside them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fedprompt
from fedprompt.runs.events import PhaseStarted, Prepared, RoundFinished
from fedprompt.runs.manifest import manifest
from fedprompt.runtime.ray import private

RESULTS = Path(__file__).parent / "results" / "cluster.json"
ROUNDS = 6
SETTLE_SECONDS = 10.0
"""In which spare workers import what they need."""
REPEATS = 2
SETTING = [
    *("compare=[]", f"rounds={ROUNDS}", f"eval_every={ROUNDS}", "clients.epochs=1"),
    *("clients.per_round=10", "runtime.threads=1"),
]
SMALL_SWEEP = """
experiment: quickstart
set: {rounds: 1, compare: [], clients.per_round: 2, clients.epochs: 1, runtime.actors: 1}
space:
  partition.alpha: {grid: [0.5, 5.0]}
seeds: 2
"""
Event = Callable[[Any], None]


def run(*overrides: str, on_event: Event | None = None) -> dict[str, Any]:
    """One run with the moments of its events, in seconds from its start."""
    moments: dict[str, Any] = {"rounds": []}
    started = time.perf_counter()

    def listen(event: Any) -> None:
        now = time.perf_counter() - started
        if isinstance(event, Prepared):
            moments["prepared"] = now
        elif isinstance(event, PhaseStarted):
            moments["actors"] = now
        elif isinstance(event, RoundFinished):
            moments["rounds"].append(now)
        if on_event is not None:
            on_event(event)

    with tempfile.TemporaryDirectory() as folder:
        options = [*SETTING, *overrides, f"run_dir={folder}/run"]
        moments["hash"] = fedprompt.run("quickstart", options, on_event=listen).summary[
            "state_sha256"
        ]
    moments["end"] = time.perf_counter() - started
    return moments


def per_second(moments: dict[str, Any]) -> float:
    """Rounds per second after the first, which warms up."""
    first, *others = moments["rounds"]
    return float(len(others) / (others[-1] - first))


def startup(connect: Callable[[], None], wait: float = 0) -> tuple[dict[str, float], str]:
    """Seconds of each step until the first round is done, with a warm prefix cache.

    Args:
        connect: starts Ray or connects to one.
        wait: seconds between the two, which do not count.
    """
    started = time.perf_counter()
    connect()
    ray_init = time.perf_counter() - started
    time.sleep(wait)
    moments = run("runtime=ray", "runtime.actors=2", "rounds=1", "eval_every=1")
    return {
        "ray_init": ray_init,
        "driver_up_data_read_cache_opened": moments["prepared"],
        "actors_up": moments["actors"] - moments["prepared"],
        "first_round": moments["rounds"][0] - moments["actors"],
        "until_training": ray_init + moments["actors"],
    }, moments["hash"]


def recovery(kill: Callable[[], None], *overrides: str) -> tuple[dict[str, float], str]:
    """Duration of the round in which something is killed, beside the median of the others."""

    def act(event: Any) -> None:
        if isinstance(event, RoundFinished) and event.report.round == 2:
            kill()

    moments = run("runtime=ray", *overrides, on_event=act)
    ends = moments["rounds"]
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    # Rounds are counted from 1, so that the third is between ends[1] and ends[2].
    return {
        "round_with_kill": seconds[1],
        "median_of_others": statistics.median(seconds[:1] + seconds[2:]),
        "longest_later": max(seconds[2:]),
    }, moments["hash"]


def listeners() -> int:
    """Sockets of this machine that listen (TCP, IPv4 and 6)."""
    found = 0
    for table in ("tcp", "tcp6"):
        lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        found += sum(line.split()[3] == "0A" for line in lines)
    return found


def session_processes() -> int:
    """Live processes of this session, this one included."""
    found = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
                found += state != "Z" and os.getsid(int(folder.name)) == os.getsid(0)
    return found


def folders() -> int:
    """Temporary folders of fedprompt and Ray."""
    places = [Path(tempfile.gettempdir()), Path("/tmp")]
    return len({each for place in places for each in place.glob("*ray*")})


def ten_sweeps() -> dict[str, Any]:
    """Run a small sweep ten times from its command line and count what is there afterwards.

    Raises:
        RuntimeError: a sweep failed, or two tables differ.
    """

    def count() -> dict[str, int]:
        return {
            "processes": session_processes(),
            "listening_sockets": listeners(),
            "temporary_folders": folders(),
        }

    before, seconds, tables = count(), [], set()
    for _ in range(10):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            file = Path(folder) / "small.yaml"
            file.write_text(SMALL_SWEEP)
            arguments = ["sweep", str(file), "--dir", f"{folder}/sweep"]
            done = subprocess.run(
                [sys.executable, "-m", "fedprompt", *arguments],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise RuntimeError(done.stderr)
            seconds.append(round(time.perf_counter() - started, 1))
            tables.add((Path(folder) / "sweep" / "table.csv").read_text())
    if len(tables) != 1:
        raise RuntimeError("the sweeps ended in different tables")
    return {"before": before, "after": count(), "seconds": seconds}


def main() -> None:
    """Do what the command line says."""
    if sys.argv[1:] == ["sweeps"]:
        result = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        result["ten_sweeps"] = ten_sweeps()
    else:
        kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        result = measure_runs()
        result.update({key: kept[key] for key in ("ten_sweeps",) if key in kept})
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure_runs() -> dict[str, Any]:
    """Start-up, speed and recovery."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import ray
    from ray.cluster_utils import Cluster

    from fedprompt.runtime.ray.local import import_ray, start_ray, stop_ray

    import_ray()
    os.environ.update(private.ENVIRONMENT)
    load_before = os.getloadavg()
    hashes: set[str] = set()
    speed: dict[str, list[float]] = {}

    def note(name: str, moments: dict[str, Any]) -> None:
        hashes.add(moments["hash"])
        speed.setdefault(name, []).append(per_second(moments))
        print(f"{name}: {speed[name][-1]:.3f} rounds/s", flush=True)

    run("runtime=serial", "rounds=1", "eval_every=1")  # fills the prefix cache
    starts: dict[str, dict[str, float]] = {}
    starts["new_local_ray"], first = startup(lambda: start_ray(2, verbose=False))
    # Runs on this Ray keep spare workers, as those on a cluster of `make cluster` do.
    starts["second_run_on_live_ray"], second = startup(lambda: None, SETTLE_SECONDS)
    starts["third_run_on_live_ray"], third = startup(lambda: None, SETTLE_SECONDS)
    assert first == second == third
    print(json.dumps(starts, indent=1), flush=True)
    for _ in range(REPEATS):
        note("serial", run("runtime=serial"))
        note("ray_1_actor", run("runtime=ray", "runtime.actors=1"))
        note("ray_2_actors", run("runtime=ray", "runtime.actors=2"))
    recoveries: dict[str, dict[str, float]] = {}

    def kill_actor() -> None:
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and os.getsid(int(folder.name)) == os.getsid(0):
                title = (folder / "cmdline").read_bytes()
                if title.startswith(b"ray::ClientActor"):
                    os.kill(int(folder.name), 9)
                    return

    recoveries["actor"], digest = recovery(kill_actor, "runtime.actors=2")
    hashes.add(digest)
    stop_ray()

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
        for _ in range(REPEATS):
            note("ray_2_nodes_1_actor_each", run("runtime=ray", "runtime.actors=2"))

        def kill_node() -> None:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

        recoveries["node"], digest = recovery(
            kill_node, "runtime.actors=2", "runtime.driver_node=head"
        )
        hashes.add(digest)
    finally:
        stop_ray()
        end: Callable[[], None] = cluster.shutdown
        end()
    return {
        **manifest(),
        "setting": SETTING,
        "equal": len(hashes) == 1,
        "startup_seconds": starts,
        "rounds_per_second": {name: max(values) for name, values in speed.items()},
        "rounds_per_second_all": speed,
        "recovery_seconds": recoveries,
        "load_average": {"before": load_before, "after": os.getloadavg()},
    }


if __name__ == "__main__":
    main()
