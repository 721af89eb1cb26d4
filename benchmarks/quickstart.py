"""The quickstart over several seeds, and its state hash under every runtime.

    python -m benchmarks.quickstart [--seeds 3] [--experiment quickstart] [--skip-hashes]
                                    [--page-only]

For each seed the whole quickstart is run as a user runs it (`fedprompt run quickstart seed=S`, a
fresh process, Ray start included) and its wall-clock time taken. A seed changes the partition, the
cohorts, the initial weights and the batches; the split of the digits stays. Reported per method:
test accuracy of the last round, mean and 95 % interval (Student's t over seeds), and the paired
difference to FedAvg-PT+. Then the first three rounds of seed 0 are run under `serial` and under Ray
with 1, 2 and 4 actors; all must end in the same state, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness import (
    DOCS,
    RESULTS,
    Json,
    header,
    mean_and_half,
    put_between,
    read_json,
    write_json,
)
from benchmarks.methods.text import percent, table
from fedprompt.runs.directory import RunDirectory

BASELINES = ("fedavg_pt_plus", "fedavg_pt")  # the first that the experiment compares with
ON_THE_PAGE = ("quickstart", "digits")
RUNTIMES = {
    "serial": ["runtime=serial"],
    "ray, 1 actor": ["runtime=ray", "runtime.actors=1"],
    "ray, 2 actors": ["runtime=ray", "runtime.actors=2"],
    "ray, 4 actors": ["runtime=ray", "runtime.actors=4"],
}


def fedprompt_run(experiment: str, folder: Path, overrides: Sequence[str]) -> tuple[float, Json]:
    """Run an experiment in a process of its own: wall-clock seconds and its summary."""
    command = [sys.executable, "-m", "fedprompt", "run", experiment, f"run_dir={folder}"]
    started = time.perf_counter()
    subprocess.run([*command, *overrides], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started, RunDirectory.open(folder).read_summary()


def interval(values: Sequence[float]) -> Json:
    """Mean and half-width of the 95 % interval."""
    mean, half = mean_and_half(values)
    return {
        "mean": round(mean, 4),
        "half_width_95": round(half, 4),
        "values": [round(value, 4) for value in values],
    }


def measure_seeds(experiment: str, folder: Path, seeds: int) -> Json:
    accuracy: dict[str, list[float]] = {}
    prompts: dict[str, list[int]] = {}
    seconds, hashes = [], []
    for seed in range(seeds):
        elapsed, summary = fedprompt_run(experiment, folder / f"seed{seed}", [f"seed={seed}"])
        seconds.append(round(elapsed, 1))
        hashes.append(summary["state_sha256"])
        for name, row in {
            summary["method"]: summary,
            **{row["name"]: row for row in summary["comparison"]},
        }.items():
            accuracy.setdefault(name, []).append(row["accuracy"])
            prompts.setdefault(name, []).append(row["prompts"])
        print(
            f"seed {seed}: {elapsed:.0f} s, { ({k: v[-1] for k, v in accuracy.items()}) }",
            flush=True,
        )
    baseline = next(name for name in BASELINES if name in accuracy)
    base = np.array(accuracy[baseline])
    return {
        "seconds_whole_command": seconds,
        "state_sha256": hashes,
        "methods": {
            name: {
                "test_accuracy": interval(values),
                f"difference_to_{baseline}": interval((np.array(values) - base).tolist()),
                "prompts_kept": prompts[name],
            }
            for name, values in accuracy.items()
        },
    }


def measure_hashes(experiment: str, folder: Path) -> Json:
    rows = {}
    for number, (name, overrides) in enumerate(RUNTIMES.items()):
        more = ["rounds=3", "compare=[]", *overrides]
        elapsed, summary = fedprompt_run(experiment, folder / f"runtime{number}", more)
        rows[name] = {"seconds": round(elapsed, 1), "state_sha256": summary["state_sha256"]}
        print(name, rows[name], flush=True)
    if len({row["state_sha256"] for row in rows.values()}) != 1:
        raise SystemExit(f"the runtimes disagree: {rows}")
    return rows


def text_of(result: Json, experiment: str) -> str:
    """What docs/quickstart.md says of an experiment: how long it took, and the table.

    Args:
        result: document of this benchmark.
        experiment: that it measured.
    """
    found = result[experiment]
    seconds = found["seconds_whole_command"]
    baseline = next(name for name in BASELINES if name in found["methods"])
    lines = []
    for name, figures in found["methods"].items():
        value, gap = figures["test_accuracy"], figures[f"difference_to_{baseline}"]
        lines.append(
            [
                f"`{name}`",
                percent(value["mean"], value["half_width_95"]),
                "" if name == baseline else percent(gap["mean"], gap["half_width_95"]),
                ", ".join(map(str, figures["prompts_kept"])),
            ]
        )
    heads = ("method", "test accuracy (%)", f"points over `{baseline}` (paired)", "prompts kept")
    command = f"python -m benchmarks.quickstart --experiment {experiment}"
    return "\n".join(
        [
            f"Mean and 95 % interval over {len(seconds)} seeds (`{command}`,",
            f"[JSON](../benchmarks/results/{experiment}.json)). With the start of Ray a seed took",
            f"{min(seconds):.0f} to {max(seconds):.0f} seconds on two CPU cores with other work.",
            "",
            *table(heads, lines),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--experiment", default="quickstart", help="any experiment that compares")
    parser.add_argument("--skip-hashes", action="store_true")
    parser.add_argument("--page-only", action="store_true", help="only write the page anew")
    arguments = parser.parse_args()
    experiment = arguments.experiment
    path = RESULTS / f"{experiment}.json"
    if not arguments.page_only:
        result = header("quickstart")
        with tempfile.TemporaryDirectory() as folder:
            result[experiment] = measure_seeds(experiment, Path(folder), arguments.seeds)
            if not arguments.skip_hashes:
                result["same_bits"] = measure_hashes(experiment, Path(folder))
        write_json(path, result)
    if experiment in ON_THE_PAGE:
        text = text_of(read_json(path), experiment)
        put_between(DOCS / "quickstart.md", experiment, text)


if __name__ == "__main__":
    main()
