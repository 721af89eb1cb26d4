"""What choosing prompts in the clients' metric is worth to PFPT.

    make real && python -m benchmarks.real.selection [--only domains] [--seeds 5]
                                                     [--output benchmarks/results/...json]

| task      | what                                                                                |
|-----------|-------------------------------------------------------------------------------------|
| `domains` | four drawn domains, frozen head, as `fedprompt run domains`, in four partitions     |
| `digits`  | one domain, as `fedprompt run digits`: does it do harm there?                   |
| `emoji`   | four vendors, head fitted on the fifth, Dirichlet 0.5, as `emoji_frozen`            |

`plain` compares queries as they are, `clients` in the metric of the spread within clients. `both`
adds the CLS token to the query, and `soft` weighs predictions by the probability of each key
(evaluation alone). The same partitions and initial weights for all cases of a seed. Learning rates
are the presets', on `emoji` those of the methods benchmark.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import (
    RESULTS,
    Json,
    header,
    interval,
    one_thread,
    read_json,
    run_once,
    write_json,
)
from benchmarks.methods import real, runner
from benchmarks.methods.grid import Cell
from benchmarks.methods.results import FOLDER, Store

OUTPUT = RESULTS / "real_selection.json"
PLAIN, CLIENTS = "prompts.whiten=false", "prompts.whiten=clients"
STYLE, BOTH = "prompts.query=style", "prompts.query=both"
CASES: dict[str, tuple[str, ...]] = {
    "plain": (PLAIN, STYLE),
    "clients": (CLIENTS, STYLE),
    "clients, both": (CLIENTS, BOTH),
    "clients, both, soft": (CLIENTS, BOTH, "prompts.choice=soft"),
}
DRAWN = ("plain", "clients")
ROWS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "domains, natural": ("domains", ("partition=iid",), DRAWN),
    "domains, Dirichlet 0.5": ("domains", (), DRAWN),
    "domains, Dirichlet 0.1": ("domains", ("partition.alpha=0.1",), DRAWN),
    "domains, imbalance": ("domains", ("partition=imbalance",), DRAWN),
    "digits, Dirichlet 0.5": ("digits", (), DRAWN),
    "emoji, Dirichlet 0.5": ("emoji_frozen/dirichlet_0.5", (), tuple(CASES)),
}
"""Experiment or setting, its changes, and the cases that are measured there."""


def command_of(row: str, case: str, seed: int) -> tuple[str | Json, list[str]]:
    """Experiment and overrides of one run.

    Args:
        row: of `ROWS`.
        case: of `CASES`.
        seed: of the run.
    """
    name, changes, _ = ROWS[row]
    if "/" in name:
        cell, store = Cell(name, "pfpt", seed), Store(FOLDER)
        scale = runner.choose(cell, store)
        rates = runner.overrides_of(cell, real.ROUNDS, scale, store)
        return runner.experiment_of(name), [*rates, "eval_clients=never", *CASES[case]]
    run = [f"seed={seed}", "compare=[]", "eval_every=10", "eval_clients=never"]
    return name, [*run, "runtime={name: serial, pack: 10}", *changes, *CASES[case]]


def measure(row: str, seeds: int) -> Json:
    """Every case of a row, and how far it is above the first.

    Args:
        row: of `ROWS`.
        seeds: runs of each case.
    """
    found: dict[str, list[Json]] = {}
    for case in ROWS[row][2]:
        for seed in range(seeds):
            summary = run_once(*command_of(row, case, seed)).result.summary
            figures = {name: summary[name] for name in ("accuracy", "alone_accuracy", "prompts")}
            found.setdefault(case, []).append(figures)
        print(row, case, summarised(found[case], found["plain"]), flush=True)
    return {case: summarised(runs, found["plain"]) for case, runs in found.items()}


def summarised(runs: Sequence[Json], plain: Sequence[Json]) -> Json:
    """Means and intervals over seeds, and paired differences from the plain case."""
    figures: Json = {name: interval([float(each[name]) for each in runs]) for name in runs[0]}
    for name in ("accuracy", "alone_accuracy"):
        pairs = zip(runs, plain, strict=True)
        figures[f"{name} over plain"] = interval([one[name] - other[name] for one, other in pairs])
    return {**figures, "seeds": [dict(each) for each in runs]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="rows whose name contains TEXT")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    one_thread()
    for row in (each for each in ROWS if arguments.only in each):
        found = measure(row, arguments.seeds)
        rows = {**read_json(arguments.output).get("rows", {}), row: found}
        write_json(arguments.output, {**header("real_selection"), "rows": rows})


if __name__ == "__main__":
    main()
