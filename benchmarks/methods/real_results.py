"""The runs on real images, as tables and the picture read them."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.methods.results import Run, Store

NAMES = {
    "pfpt": "PFPT",
    "fedavg_pt": "FedAvg-PT",
    "fedavg_pt_plus": "FedAvg-PT+",
    "head_only": "head only",
    "fedcof": "FedCOF",
    "fedprox_pt": "FedProx-PT",
    "scaffold_pt": "SCAFFOLD-PT",
    "fedopt_pt": "FedOpt-PT",
    "gmm_pt": "GMM-PT",
    "pfedpg": "pFedPG",
}


def runs_of(store: Store, setting: str, method: str) -> dict[int, Run]:
    """By seed."""
    return {
        seed: run
        for (place, name, seed), run in store.runs.items()
        if (place, name) == (setting, method)
    }


def accuracies(runs: Mapping[int, Run], alone: bool = False) -> dict[int, float]:
    """Test accuracy by seed.

    Args:
        runs: of one method in one setting.
        alone: whether each image selects by itself.
    """
    found = {s: run.alone_accuracy if alone else run.accuracy for s, run in runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}
