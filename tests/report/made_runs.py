"""Run directories that are written by hand, with all that a page can show."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedprompt.core.types import RoundReport
from fedprompt.runs.directory import RunDirectory

CLASSES = tuple(f"class {index} of a domain with a long name" for index in range(14))
DOMAINS = ("photographs", "sketches <b>", "paintings_with_a_name_that_does_not_end_soon")
CONFIG = """seed: {seed}
method: {method}
rounds: 12
run_dir: {path}
note: A note with <b>brackets</b> & a/very/long/path/that/does/not/break/anywhere/at/all/{path}
data: {{name: made}}
partition: {{name: dirichlet, alpha: {alpha}, min_samples: 1}}
clients: {{count: 30, per_round: 10, epochs: 2, batch_size: 16}}
aggregator: {{name: {method}, gamma: 1.0}}
model: {{backbone: nano}}
head: {{name: released, lr: 0.01, mode: shared}}
prompts: {{count: 5, pool: 20, selection: keyed}}
runtime: {{name: serial}}
"""


def write_run(path: Path, method: str, seed: int, alpha: float = 0.5) -> RunDirectory:
    """A finished run of twelve rounds."""
    drawn = np.random.default_rng([seed, len(method)])
    run = RunDirectory.create(path)
    run.write_config(CONFIG.format(seed=seed, method=method, alpha=alpha, path=path))
    packages = {"fedprompt": "1.0", "torch": "2.0"}
    git = {"commit": "0123456789abcdef", "dirty": False}
    run.write_manifest({"date": "2026-01-01", "packages": packages, "git": git, "cpu": "a CPU"})
    run.write_task(
        {
            "class_names": list(CLASSES),
            "domains": {name: list(range(14)) for name in DOMAINS},
        }
    )
    counts = drawn.integers(0, 40, (30, 14))
    run.write_partition([np.arange(total) for total in counts.sum(axis=1)], counts, CLASSES)
    labels = drawn.integers(0, 14, 400)
    guesses = np.where(drawn.random(400) < 0.6, labels, drawn.integers(0, 14, 400))
    run.write_predictions(
        {
            "id": np.arange(400),
            "label": labels,
            "prediction": guesses,
            "domain": labels % 3,
            "round": np.array(12),
        }
    )
    fates = ("kept", "born", "pruned", "merged", "matched_distance", "inclusion_entropy")
    for index in range(1, 13):
        accuracy = 0.8 - 0.6 / index + 0.02 * drawn.random()
        own = {str(client): float(each) for client, each in enumerate(drawn.random(30))}
        figures = {"mean": 0.5, "deviation": 0.1, "worst_tenth": 0.1, "jain": 0.9, "clients": 30}
        run.append_round(
            RoundReport(
                *(index, accuracy, 2 - accuracy, accuracy - 0.01, 1.0, 5 + index, 10**6, 2 * 10**6),
                *({"train": 2.0, "aggregate": 0.5, "evaluate": 0.25}, 2.6),
                class_accuracy=tuple(drawn.random(14).tolist()),
                domain_accuracy=(0.3, 0.6, 0.9),
                personalised={"test": {**figures, "by_client": own}},
                clients=({"client": 1},),
                diagnostics=dict(zip(fates, drawn.random(6).round(2).tolist(), strict=True)),
            )
        )
    run.write_summary({"state_sha256": "ab" * 32, "method": method})
    run.write_status({"state": "finished", "round": 12})
    return run


def write_experiment(folder: Path) -> list[Path]:
    """Two methods with three seeds each, and one of them on another partition."""
    paths = []
    for seed in range(3):
        run = write_run(folder / f"run{seed}", "pfpt", seed)
        write_run(run.comparison("fedavg_pt").path, "fedavg_pt", seed)
        paths.append(run.path)
    return [*paths, write_run(folder / "skewed", "pfpt", 0, alpha=0.1).path]
