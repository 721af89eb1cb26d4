"""Attack x defence x method on `domains`: what a fifth of the clients can do, and what holds it.

    python -m benchmarks.attacks [--seeds 3] [--rounds 6] [--page-only]

The head is trained and averaged, as it is what an attack reaches best. Everything else is the
experiment `domains`. One row a run in benchmarks/results/attacks.csv; a row that is there is not
run again. Then the tables of docs/aggregation.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.harness import DOCS, RESULTS, Table, mean_and_half, one_thread, put_between
from benchmarks.methods.text import percent, table
from fedprompt.config import compose
from fedprompt.experiment import execute, plan_run
from fedprompt.runs.directory import RunDirectory

METHODS = {"pfpt": "PFPT", "fedavg_pt": "FedAvg-PT"}
SHARE = 0.2
ATTACKS: dict[str, tuple[str, ...]] = {
    "none": (),
    "label_flip": (),
    "scale": ("attack.factor=-100",),
    "sign_flip": ("attack.factor=10",),
    "gaussian": ("attack.std=1",),
    "free_rider": (),
    "backdoor": ("attack.source=0", "attack.target=1"),
}
DEFENCES = ("none", "clip", "krum", "median", "trimmed_mean", "geometric_median")
FOR_SETS = DEFENCES[:3]
"""Those that need no row to be the same prompt at every client, so that they go with PFPT."""
OUTPUT = RESULTS / "attacks.csv"


@dataclasses.dataclass(frozen=True)
class Row:
    """One run."""

    method: str
    attack: str
    defence: str
    seed: int
    rounds: int
    accuracy: float
    """Of the last round, on the test split."""
    success: float | None
    """Of a backdoor: the share of its source class that is taken for the target; None: no round
    was evaluated to the end."""


def run(method: str, attack: str, defence: str, seed: int, rounds: int) -> Row:
    """Do one run in a folder that is thrown away.

    Args:
        method: a preset.
        attack: of `ATTACKS`.
        defence: of `DEFENCES`.
        seed: of the run.
        rounds: of the run.
    """
    changes = [
        *(f"method={method}", f"defence={defence}", f"seed={seed}", f"rounds={rounds}"),
        *("head=released", "compare=[]", "runtime=serial", f"eval_every={rounds}"),
        *("eval_clients=never", "eval_alone=never", f"attack={attack}", *ATTACKS[attack]),
    ]
    if attack != "none":
        changes.append(f"attack.share={SHARE}")
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        config = compose("domains", [*changes, f"run_dir={run_dir}"])
        execute(plan_run(config, overwrite=False))
        directory = RunDirectory.open(run_dir)
        accuracy = float(directory.read_summary()["accuracy"])
        saved = directory.read_predictions()
        mine = saved["label"] == 0
        success = float((saved["prediction"][mine] == 1).mean())
    return Row(method, attack, defence, seed, rounds, accuracy, success)


def cells(seeds: int) -> list[tuple[str, str, str, int]]:
    """All runs, seed by seed; a defence without attack first, as its price."""
    return [
        (method, attack, defence, seed)
        for seed in range(seeds)
        for attack, defence, method in itertools.product(ATTACKS, DEFENCES, METHODS)
        if method != "pfpt" or defence in FOR_SETS
    ]


def text_of(rows: Sequence[Row]) -> str:
    """A table for each method: attacks by defences."""
    found: Mapping[tuple[str, str, str], list[Row]] = {
        key: list(group)
        for key, group in itertools.groupby(sorted(rows, key=_cell), key=lambda row: _cell(row)[:3])
    }
    parts = []
    for method, name in METHODS.items():
        lines = []
        for attack in ATTACKS:
            line = [f"`{attack}`"]
            for defence in DEFENCES:
                own = found.get((method, attack, defence), [])
                line.append(_shown([row.accuracy for row in own]))
                if method == "pfpt" and defence not in FOR_SETS:
                    line[-1] = "refused"
                if attack == "backdoor" and own:
                    line[-1] += f" ({_shown([row.success or 0.0 for row in own])})"
            lines.append(line)
        parts.append("\n".join(table((name, *(f"`{each}`" for each in DEFENCES)), lines)))
    return "\n\n".join(parts)


def _cell(row: Row) -> tuple[str, str, str, int]:
    return row.method, row.attack, row.defence, row.seed


def _shown(values: Sequence[float]) -> str:
    return percent(*mean_and_half(values)) if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--page", type=Path, default=DOCS / "aggregation.md")
    parser.add_argument("--page-only", action="store_true")
    arguments = parser.parse_args()
    store = Table(arguments.output, Row, ("method", "attack", "defence", "seed"))
    if not arguments.page_only:
        one_thread()
        there = {_cell(row) for row in store.read()}
        todo = [cell for cell in cells(arguments.seeds) if cell not in there]
        for number, cell in enumerate(todo, 1):
            row = run(*cell, arguments.rounds)
            store.add(row)
            print(f"[{number}/{len(todo)}] {row}", flush=True)
    put_between(arguments.page, "attacks", text_of(store.read()))


if __name__ == "__main__":
    main()
