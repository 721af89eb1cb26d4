"""fedprompt against Flower's simulation engine with the same client work.

    python -m benchmarks.speed.flower --flower-python /path/to/venv/bin/python

Flower pins a version of Ray of its own, so it runs with the Python of another environment that has
`flwr[simulation]` (extra `bench`) beside fedprompt. Both sides start fresh, several times in turn,
with two workers of one thread; 100 clients of equal size, 10 in a round, 2 epochs. Each framework
draws its own cohorts, but every client has 3 batches an epoch: equal work is equal steps, which is
asserted. A side prints the seconds since its start at which each round ended.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks.harness import ROOT, Json, run_once

if TYPE_CHECKING:
    from flwr.client import ClientApp

ROUNDS = 8
COHORT = 10
OVERRIDES = [
    *("method=fedavg_pt", "clients.count=100", f"clients.per_round={COHORT}", "clients.epochs=2"),
    *("clients.batch_size=4", "partition=iid", f"rounds={ROUNDS}", f"eval_every={ROUNDS}"),
]
STEPS = COHORT * 2 * 3
"""Of a round: clients, epochs, batches of 11 or 12 images."""


def fedprompt_side(*more: str) -> Json:
    """Seconds since the start at which each round ended, and the steps of each."""
    overrides = [*OVERRIDES, "compare=[]", "runtime=ray", "runtime.actors=2", *more]
    once = run_once("digits", overrides)
    steps = [sum(client["steps"] for client in report["clients"]) for report in once.result.reports]
    import ray

    return {"ends": list(once.rounds), "steps": steps, "versions": {"ray": ray.__version__}}


def client_app() -> ClientApp:
    """Flower's client, which does fedprompt's work."""
    from flwr.client import ClientApp, NumPyClient
    from flwr.common import Context

    from benchmarks.speed.flower_client import Array, work

    class Client(NumPyClient):  # type: ignore[misc]
        def __init__(self, client_id: int) -> None:
            self.client_id = client_id

        def fit(
            self, parameters: list[Array], config: Mapping[str, int]
        ) -> tuple[list[Array], int, dict[str, float]]:
            tuned, examples, done = work(parameters, self.client_id, int(config["round"]))
            return tuned, examples, {"steps": done}

    def client(context: Context) -> object:
        return Client(int(context.node_config["partition-id"])).to_client()

    return ClientApp(client_fn=client)


def flower_side() -> Json:
    """The same by Flower."""
    started = time.perf_counter()
    import flwr
    import ray
    from flwr.common import Context, FitRes, ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    from benchmarks.speed.flower_client import arrays

    ends, steps = [], []

    class Timed(FedAvg):  # type: ignore[misc]
        def aggregate_fit(
            self,
            server_round: int,
            results: Sequence[tuple[object, FitRes]],
            failures: list[object],
        ) -> object:
            merged = super().aggregate_fit(server_round, results, failures)
            assert not failures, failures
            ends.append(time.perf_counter() - started)
            steps.append(sum(result.metrics["steps"] for _, result in results))
            return merged

    def server(context: Context) -> ServerAppComponents:
        strategy = Timed(
            fraction_fit=COHORT / 100,
            min_fit_clients=COHORT,
            fraction_evaluate=0.0,
            min_available_clients=100,
            initial_parameters=ndarrays_to_parameters(arrays()),
            on_fit_config_fn=lambda server_round: {"round": server_round},
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=ROUNDS))

    run_simulation(
        server_app=ServerApp(server_fn=server),
        client_app=client_app(),
        num_supernodes=100,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "include_dashboard": False},
        },
    )
    versions = {"flwr": flwr.__version__, "ray": ray.__version__}
    return {"ends": ends, "steps": steps, "versions": versions}


SIDES: dict[str, Callable[[], Json]] = {
    "fedprompt": fedprompt_side,
    "packed": lambda: fedprompt_side(f"runtime.pack={COHORT // 2}"),
    "flower": flower_side,
}
"""`packed` lets each of the two workers train its half of the cohort in one pass."""


def measure(python: str, side: str) -> Json:
    """Run a side in a fresh process."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # on both sides; 15 otherwise, which others' programs starve
        "FEDPROMPT_BENCH_OVERRIDES": json.dumps(OVERRIDES),
    }
    started = time.perf_counter()
    done = subprocess.run(
        [python, "-m", "benchmarks.speed.flower", "--side", side],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    whole = time.perf_counter() - started
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"ends"')]
    if not lines:
        raise RuntimeError(f"{side} failed: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    result: Json = json.loads(lines[-1])
    assert result["steps"] == [STEPS] * ROUNDS, result["steps"]
    ends = result["ends"]
    seconds = [later - earlier for earlier, later in itertools.pairwise(ends)]
    result["round"] = statistics.median(seconds)
    result["start"] = ends[0] - result["round"]
    result["whole"] = whole
    return result


def main() -> None:
    """Measure both sides in turn and add them to the JSON; or be one side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--flower-python", default=sys.executable)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side]()))
        return
    from benchmarks.speed.run import OUTPUT, add
    from benchmarks.speed.timing import load

    before = load()
    results: dict[str, list[Json]] = {side: [] for side in SIDES}
    for _ in range(arguments.repeats):
        for side in SIDES:
            python = arguments.flower_python if side == "flower" else sys.executable
            results[side].append(measure(python, side))
    table = {
        name: {
            key: {
                "least": round(min(run[key] for run in runs), 3),
                "median": round(statistics.median(run[key] for run in runs), 3),
            }
            for key in ("round", "start", "whole")
        }
        for name, runs in results.items()
    }
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "load": [before, load()],
        "repeats": arguments.repeats,
        "versions": {name: runs[0]["versions"] for name, runs in results.items()},
        "seconds": table,
        "ratio": {
            side: {
                key: {
                    which: round(table["flower"][key][which] / table[side][key][which], 2)
                    for which in ("least", "median")
                }
                for key in ("round", "start", "whole")
            }
            for side in ("fedprompt", "packed")
        },
    }
    add(OUTPUT, "flower", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
