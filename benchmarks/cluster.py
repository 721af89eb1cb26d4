"""Start-up, speed and recovery of the Ray runtime, on this machine.

    python -m benchmarks.cluster            start-up, speed, recovery
    python -m benchmarks.cluster sweeps     ten sweeps in a row, and what they leave behind

The figures go to benchmarks/results/cluster.json.

Everything runs one small experiment. `equal` says that all runs ended in the same state; figures of
runs that did unequal work would mean nothing. The load of the machine stands beside them.
"""

from __future__ import annotations

import argparse
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

from benchmarks.harness import RESULTS, Json, Once, header, read_json, run_once, write_json
from fedprompt.runs.events import RoundFinished
from fedprompt.runtime.ray import private
from fedprompt.runtime.ray.local import import_ray, start_ray, stop_ray

OUTPUT = RESULTS / "cluster.json"
ROUNDS = 6
SETTLE_SECONDS = 10.0
"""In which spare workers import what they need."""
REPEATS = 2
SETTING = [
    *("compare=[]", f"rounds={ROUNDS}", f"eval_every={ROUNDS}", "clients.epochs=1"),
    *("clients.per_round=10", "runtime.threads=1"),
]
SMALL_SWEEP = """
experiment: digits
set: {rounds: 1, compare: [], clients.per_round: 2, clients.epochs: 1, runtime.actors: 1}
space:
  partition.alpha: {grid: [0.5, 5.0]}
seeds: 2
"""


def run(*overrides: str, on_event: Callable[[object], None] | None = None) -> Once:
    """One run of the small experiment."""

    def listen(event: object, _: Path) -> None:
        if on_event is not None:
            on_event(event)

    return run_once("digits", [*SETTING, *overrides], listen)


def digest_of(once: Once) -> str:
    """Of everything that the server carries at the end."""
    digest: str = once.result.summary["state_sha256"]
    return digest


def per_second(once: Once) -> float:
    """Rounds per second after the first, which warms up."""
    first, *others = once.rounds
    return len(others) / (others[-1] - first)


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
    once = run("runtime=ray", "runtime.actors=2", "rounds=1", "eval_every=1")
    return {
        "ray_init": ray_init,
        "driver_up_data_read_cache_opened": once.prepared,
        "actors_up": once.phase - once.prepared,
        "first_round": once.rounds[0] - once.phase,
        "until_training": ray_init + once.phase,
    }, digest_of(once)


def recovery(kill: Callable[[], None], *overrides: str) -> tuple[dict[str, float], str]:
    """Duration of the round in which something is killed, beside the median of the others."""

    def act(event: object) -> None:
        if isinstance(event, RoundFinished) and event.report.round == 2:
            kill()

    once = run("runtime=ray", *overrides, on_event=act)
    ends = once.rounds
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    # Rounds are counted from 1, so that the third is between ends[1] and ends[2].
    return {
        "round_with_kill": seconds[1],
        "median_of_others": statistics.median(seconds[:1] + seconds[2:]),
        "longest_later": max(seconds[2:]),
    }, digest_of(once)


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


def ten_sweeps() -> Json:
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


class Bench:
    """What the runs of the benchmark have in common: how fast they were and how they ended."""

    def __init__(self) -> None:
        self.digests: set[str] = set()
        self.speed: dict[str, list[float]] = {}
        self.recoveries: dict[str, dict[str, float]] = {}

    def measure(self, name: str, *overrides: str) -> None:
        """One run's speed."""
        once = run(*overrides)
        self.digests.add(digest_of(once))
        self.speed.setdefault(name, []).append(per_second(once))
        print(f"{name}: {self.speed[name][-1]:.3f} rounds/s", flush=True)

    def recover(self, name: str, kill: Callable[[], None], *overrides: str) -> None:
        """What it costs when something is killed."""
        self.recoveries[name], digest = recovery(kill, *overrides)
        self.digests.add(digest)


def measure_starts() -> dict[str, dict[str, float]]:
    """Start-up without Ray, and twice with a Ray that is there."""
    run("runtime=serial", "rounds=1", "eval_every=1")  # fills the prefix cache
    starts: dict[str, dict[str, float]] = {}
    starts["new_local_ray"], first = startup(lambda: start_ray(2, verbose=False))
    # Runs on this Ray keep spare workers, as those on a cluster of `make cluster` do.
    starts["second_run_on_live_ray"], second = startup(lambda: None, SETTLE_SECONDS)
    starts["third_run_on_live_ray"], third = startup(lambda: None, SETTLE_SECONDS)
    assert first == second == third
    print(json.dumps(starts, indent=1), flush=True)
    return starts


def kill_actor() -> None:
    """End one client actor of this session."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and os.getsid(int(folder.name)) == os.getsid(0):
            title = (folder / "cmdline").read_bytes()
            if title.startswith(b"ray::ClientActor"):
                os.kill(int(folder.name), 9)
                return


def measure_two_nodes(bench: Bench) -> None:
    """Speed on two nodes of this machine, and the loss of one."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
        for _ in range(REPEATS):
            bench.measure("ray_2_nodes_1_actor_each", "runtime=ray", "runtime.actors=2")

        def kill_node() -> None:
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

        bench.recover("node", kill_node, "runtime.actors=2", "runtime.driver_node=head")
    finally:
        stop_ray()
        end: Callable[[], None] = cluster.shutdown
        end()


def measure_runs() -> Json:
    """Start-up, speed and recovery."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import_ray()
    os.environ.update(private.ENVIRONMENT)
    load_before = os.getloadavg()
    bench = Bench()
    starts = measure_starts()
    for _ in range(REPEATS):
        bench.measure("serial", "runtime=serial")
        bench.measure("ray_1_actor", "runtime=ray", "runtime.actors=1")
        bench.measure("ray_2_actors", "runtime=ray", "runtime.actors=2")
    bench.recover("actor", kill_actor, "runtime.actors=2")
    stop_ray()
    measure_two_nodes(bench)
    return header(
        "cluster",
        setting=SETTING,
        equal=len(bench.digests) == 1,
        startup_seconds=starts,
        rounds_per_second={name: max(values) for name, values in bench.speed.items()},
        rounds_per_second_all=bench.speed,
        recovery_seconds=bench.recoveries,
        load_average={"before": load_before, "after": os.getloadavg()},
    )


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=("runs", "sweeps"), default="runs")
    arguments = parser.parse_args()
    result = read_json(OUTPUT)
    if arguments.part == "sweeps":
        result["ten_sweeps"] = ten_sweeps()
    else:
        result |= measure_runs()
    write_json(OUTPUT, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
