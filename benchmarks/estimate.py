"""The seconds and the cache of `fedprompt estimate` against real runs.

    python -m benchmarks.estimate [--rounds 2]

For each case the estimate is made first, in this process and with `runtime=serial`, and then the
experiment is run. Bytes must be equal where the estimate says that they cannot be others, or the
benchmark fails. Seconds are those that this process had a core: both sides leave out what other
programs took of the machine. Wall-clock seconds and load averages are recorded beside them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.harness import DOCS, RESULTS, Json, header, one_thread, put_between, write_json
from fedprompt.cli.estimate import MethodEstimate, make_estimate
from fedprompt.config import compose
from fedprompt.data.prefix.cache import cache_entries
from fedprompt.experiment import run
from fedprompt.runs.events import PhaseStarted, RoundFinished

TARGET = RESULTS / "estimate.json"
GOAL = 0.25
"""How far an estimate may be off."""
SMALL = ["data.train=160", "data.validation=40", "data.test=40", "data.public=40"]
LARGE = [*SMALL, "model.backbone=vit_small_patch32_224", "model.pretrained=false"]
CASES: dict[str, tuple[str, list[str]]] = {
    "digits, PFPT": ("digits", []),
    "digits, head alone": ("digits", ["method=head_only"]),
    "digits, LoRA": ("digits", ["method=lora_fedavg"]),
    "digits, control variates": ("digits", ["method=scaffold_pt"]),
    "domains, PFPT": ("domains", []),
    "domains, prompts before block 4": ("domains", ["prompts.depth=4"]),
    "domains on ViT-S/32, FedAvg-PT": (
        "domains",
        [*LARGE, "head=linear", "method=fedavg_pt", "clients.count=8", "clients.per_round=3"],
    ),
}


def measure(name: str, rounds: int) -> Json:
    """One case: estimated and real seconds of a round, cache and bytes.

    Args:
        name: of the case.
        rounds: to run.

    Raises:
        SystemExit: bytes differ that cannot.
    """
    experiment, changes = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*changes, "compare=[]", "runtime=serial", f"rounds={rounds}"]
        overrides += [f"cache.folder={folder}/cache"]
        made = make_estimate(compose(experiment, overrides), clock=time.process_time)
        (expected,) = made.methods
        moments: list[tuple[float, float]] = []

        def note(event: object) -> None:
            if isinstance(event, (PhaseStarted, RoundFinished)):
                moments.append((time.process_time(), time.perf_counter()))

        started = time.process_time()
        result = run(experiment, [*overrides, f"run_dir={folder}/run"], on_event=note)
        cache = sum(entry.size for entry in cache_entries(Path(folder) / "cache"))
    check_bytes(name, expected, result.reports)
    (first, wall), (last, wall_end) = moments[0], moments[-1]
    return {
        "seconds_of_a_round": compared(expected.round_seconds, (last - first) / rounds),
        "wall_seconds_of_a_round": round((wall_end - wall) / rounds, 3),
        "prepared_seconds": compared(made.cache_seconds, first - started),
        "cache_bytes": compared(made.cache_bytes, cache),
        "bytes_up": compared(expected.traffic.run_up.start, total(result.reports, "bytes_up")),
        "bytes_down": compared(
            expected.traffic.run_down.start, total(result.reports, "bytes_down")
        ),
        "bytes_are_exact": expected.traffic.run_up.exact and expected.traffic.run_down.exact,
        "load": [round(each, 1) for each in os.getloadavg()],
    }


def total(reports: list[Json], key: str) -> int:
    """Over all rounds."""
    return sum(report[key] for report in reports)


def check_bytes(name: str, expected: MethodEstimate, reports: list[Json]) -> None:
    """Refuse bytes that differ, or lie beyond their bounds.

    Raises:
        SystemExit: names the case.
    """
    for key, sent in (
        ("bytes_up", expected.traffic.run_up),
        ("bytes_down", expected.traffic.run_down),
    ):
        real = total(reports, key)
        if real < sent.low or (sent.high is not None and real > sent.high):
            raise SystemExit(f"{name}: {key}: expected {sent}, got {real}")


def compared(estimated: float, real: float) -> Json:
    """Both, and how far the estimate is off as a share of what was real."""
    digits = 4 if isinstance(estimated, float) else 0
    return {
        "estimated": round(estimated, digits) if digits else estimated,
        "real": round(real, digits) if digits else real,
        "off": round(estimated / real - 1, 3) if real else 0.0,
    }


def table(result: Json) -> str:
    """The table of docs/sizing.md."""
    lines = [
        "| case | a round, estimated | a round, real | off | cache, off | bytes |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["cases"].items():
        seconds, cache = row["seconds_of_a_round"], row["cache_bytes"]
        sent = "exact" if row["bytes_are_exact"] else "within bounds"
        lines.append(
            f"| {name} | {seconds['estimated']:.2f} s | {seconds['real']:.2f} s | "
            f"{seconds['off']:+.1%} | {cache['off']:+.1%} | {sent} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure all cases and write the results and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    one_thread()
    result = header("estimate", rounds=rounds, goal=GOAL)
    result["cases"] = {}
    for name in CASES:
        result["cases"][name] = row = measure(name, rounds)
        print(name, row["seconds_of_a_round"], row["cache_bytes"]["off"], flush=True)
        off = [abs(row["seconds_of_a_round"]["off"]) for row in result["cases"].values()]
        result["seconds_off"] = {"median": round(statistics.median(off), 3), "most": max(off)}
        result["within_goal"] = max(off) <= GOAL
        write_json(TARGET, result)  # what is done is kept, should the rest be stopped
        put_between(DOCS / "sizing.md", "estimates", table(result))


if __name__ == "__main__":
    main()
