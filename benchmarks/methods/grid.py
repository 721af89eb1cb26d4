"""What the methods benchmark runs: settings, methods, seeds, learning rates, ablations.

A *setting* is a data set, a backbone, a head and a partition. All methods of a seed share the
partition, the cohorts and the initial weights, because those depend on the seed alone. Learning
rates are a method's own times one of `SCALES`, chosen on the validation split (`choose` in run.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

ROUNDS = 20
EVAL_EVERY = 2
PACK = 10
"""Clients that train in one pass: a whole cohort, which a single worker does fastest."""
SCALES = (0.3, 1.0, 3.0)
"""Factors on prompts.lr, head.lr and tuning.lr as preset and defaults give them; for FedOpt on the
server's rate instead, which decides there."""

PARTITIONS: dict[str, dict[str, Any]] = {
    "dirichlet_0.5": {"name": "dirichlet", "alpha": 0.5},
    "dirichlet_0.1": {"name": "dirichlet", "alpha": 0.1},
    "imbalance": {"name": "imbalance"},
}
_DOMAINS: dict[str, Any] = {
    "data": "domains",
    "model": "nano_promptable",
    "clients": {"count": 40, "per_round": 10, "epochs": 2, "batch_size": 16},
    "prompts": {"count": 5},
}
TASKS: dict[str, dict[str, Any]] = {
    "digits": {
        "data": "digits",
        "model": "nano",
        "head": "released",
        "clients": {"count": 20, "per_round": 10, "epochs": 5, "batch_size": 16},
        "prompts": {"count": 5},
    },
    "domains_shared": {**_DOMAINS, "head": "released"},
    "domains_frozen": {**_DOMAINS, "head": "frozen"},
    # The ordinarily pre-trained backbone, on which prompts do little.
    "domains_plain": {**_DOMAINS, "head": "released", "model": "nano"},
}

MAIN = (
    *("pfpt", "fedavg_pt", "fedprox_pt", "scaffold_pt", "fedopt_pt", "gmm_pt", "pfedpg"),
    *("fedavg_pt_plus", "head_only", "fedcof"),
)
FIVE_SEEDS = ("pfpt", "fedavg_pt", "fedavg_pt_plus", "head_only")
OTHERS = (
    *("pfpt_plus", "fedprox_pt_plus", "scaffold_pt_plus", "fedopt_pt_plus", "gmm_pt_plus"),
    *("pfedpg_plus", "local_only", "centralised", "centralised_full", "full_fedavg"),
    *("full_fedprox", "fedncm", "adapter_fedavg", "adapter_fedprox", "lora_fedavg"),
)
ABLATIONS: dict[str, tuple[str, ...]] = {
    # name: overrides on top of pfpt
    "pfpt: no matching (row mean)": ("aggregator=mean",),
    "pfpt: random matching": ("aggregator=random",),
    "pfpt: no pruning": ("aggregator.patience=1000",),
    "pfpt: pruning at once": ("aggregator.patience=1",),
    "pfpt: no keys in the matching": ("aggregator.key_weight=0",),
    "pfpt: no memory": ("aggregator.memory=0",),
    "pfpt: no origins": ("aggregator.origin_odds=1",),
    "pfpt: no selection": ("prompts.selection=all",),
    "pfpt: selection of each batch": ("prompts.choose_by=batch",),
    "pfpt: keys from cls": ("prompts.query=cls",),
    "pfpt: L2P's sign": ("prompts.selection=l2p", "prompts.similarity_weight=-0.5"),
    "pfpt: released sign": ("prompts.selection=l2p", "prompts.similarity_weight=0.01"),
    "pfpt: paper": ("aggregator.variant=paper",),
    "pfpt: released": ("aggregator.variant=released",),
    "pfpt: one local epoch": ("clients.epochs=1",),
    "pfpt: five local epochs": ("clients.epochs=5",),
    "pfpt + proximal": ("objective=proximal",),
}
ABLATION_SETTINGS = tuple(
    f"{task}/{partition}"
    for task in ("domains_shared", "domains_frozen")
    for partition in ("dirichlet_0.5", "imbalance")
)
POOL = 20
"""Prompts that the server starts with where a baseline selects from a pool."""
WITHOUT_RATES = ("fedcof", "fedncm")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run."""

    setting: str
    """`TASK/PARTITION`"""
    method: str
    """A preset, or a key of `ABLATIONS`."""
    seed: int
    scale: float | None = None
    """Factor on the learning rates; None: the chosen one."""

    @property
    def preset(self) -> str:
        """The method's file in conf/method."""
        return "pfpt" if self.method in ABLATIONS else self.method

    @property
    def file(self) -> str:
        """Where the result lies, below the results' folder."""
        plain = self.method.replace(": ", "-").replace(" + ", "-with-").replace(" ", "-")
        plain = plain.translate(str.maketrans("", "", "()'"))
        if self.scale is not None:
            return f"{self.setting}/{plain}/rate-{self.scale:g}.json"
        return f"{self.setting}/{plain}/seed-{self.seed}.json"


def is_defined(setting: str, method: str) -> bool:
    """Whether a method can be run in a setting: nothing is left to train without prompts and with a
    frozen head.
    """
    return not (method == "head_only" and setting.startswith("domains_frozen"))


def final_cells() -> list[Cell]:
    """The runs whose figures are reported, the most wanted first."""
    settings = [
        f"{task}/{partition}"
        for task in ("domains_frozen", "domains_shared", "digits")
        for partition in PARTITIONS
    ]
    wanted = [
        Cell(setting, method, seed)
        for seed in range(5)
        for setting in settings
        for method in MAIN
        if seed < (5 if method in FIVE_SEEDS else 3)
    ]
    wanted += [
        Cell(setting, method, seed)
        for seed in range(3)
        for setting in ABLATION_SETTINGS
        for method in (*OTHERS, *ABLATIONS)
    ]
    wanted += [
        Cell("domains_plain/dirichlet_0.5", method, seed)
        for seed in range(3)
        for method in FIVE_SEEDS
    ]
    return [cell for cell in wanted if is_defined(cell.setting, cell.method)]


def rate_setting(setting: str) -> str:
    """Where a setting's learning rates are chosen: the same task at Dirichlet 0.5."""
    return f"{setting.split('/')[0]}/dirichlet_0.5"


def rate_cells(cells: list[Cell]) -> list[Cell]:
    """The runs that choose the learning rates of some final cells: seed 0, every scale."""
    pairs = {
        (rate_setting(cell.setting), cell.preset): None
        for cell in cells
        if cell.preset not in WITHOUT_RATES
    }
    return [Cell(setting, method, 0, scale) for setting, method in pairs for scale in SCALES]
