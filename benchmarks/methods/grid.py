"""What the methods benchmark runs: settings, methods, seeds, learning rates, ablations.

A *setting* is a data set, a backbone, a head and a partition. All methods of a seed share the
partition, the cohorts and the initial weights, because those depend on the seed alone. Learning
rates are a method's own times one of `SCALES`, chosen on the validation split with a seed that
is not reported (`choose` in runner.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from benchmarks.harness import Json
from benchmarks.methods import real

ROUNDS = 20
EVAL_EVERY = 5
RATE_SEED = 100
"""Seed of the runs that choose learning rates. They have all rounds: shorter ones favour high
rates."""
PACK = 10
"""Clients that train in one pass: a whole cohort, which a single worker does fastest."""
SCALES = (0.3, 1.0, 3.0)
"""Factors on prompts.lr, head.lr and tuning.lr as preset and defaults give them; for FedOpt on the
server's rate instead, while its clients have the rates of `CLIENT_RATES_OF`; for FedCOF, which
trains nothing, on objective.shrinkage."""
_WIDE = (0.03, 0.3, 3.0)
SCALES_OF = {
    "domains_frozen/dirichlet_0.5": (0.03, 0.3, 1.0, 3.0, 10.0),
    **dict.fromkeys(
        ("domains_frozen/dirichlet_0.1", "domains_frozen/imbalance", "domains_shared/imbalance"),
        _WIDE,
    ),
}
"""Where prompts decide, methods get a wider grid: accuracy can have a second, higher peak there at
low or at high rates, to which no method would come step by step."""
ALL_SCALES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""After `SCALES` or `SCALES_OF` the neighbours of the best are tried, until it has both: the best
lies between two that are worse, or at an end of this range."""
HEAD_SCALES = {"domains_shared/imbalance": {"adam": 0.3, "sgd": 0.3}}
"""Where the head's rate is the one that is best for the head alone (validation; `HEAD_METHODS` has
the runs), and a scale is of the other rates: prompts need far lower ones there than the head."""
HEAD_METHODS = {"adam": "head_only", "sgd": "head_only + scaffold"}
OWN_HEAD_SCALE = ("head_only", "local_only")
"""Whose head has the scale of all rates everywhere: there is nothing else to tune, or it is not
averaged, so that what is best for an averaged head says nothing."""

PARTITIONS: dict[str, dict[str, object]] = {
    "dirichlet_0.5": {"name": "dirichlet", "alpha": 0.5},
    "dirichlet_0.1": {"name": "dirichlet", "alpha": 0.1},
    "imbalance": {"name": "imbalance"},
}
_DOMAINS: dict[str, object] = {
    "data": "domains",
    "model": "nano_promptable",
    "clients": {"count": 40, "per_round": 10, "epochs": 2, "batch_size": 16},
    # Plain queries, the default when this was run; the changed methods try whitened ones.
    "prompts": {"count": 5, "whiten": False},
}
TASKS: dict[str, Json] = {
    "digits": {
        "data": "digits",
        "model": "nano",
        "head": "released",
        "clients": {"count": 20, "per_round": 10, "epochs": 2, "batch_size": 16},
        "prompts": {"count": 5},
    },
    "domains_shared": {**_DOMAINS, "head": "released"},
    "domains_frozen": {**_DOMAINS, "head": "frozen"},
    # The ordinarily pre-trained backbone, on which prompts do little.
    "domains_plain": {**_DOMAINS, "head": "released", "model": "nano"},
}
SETTINGS = tuple(f"{task}/{partition}" for task in TASKS for partition in PARTITIONS)
"""Of the drawn tasks; those of the real ones are `real.SETTINGS`."""

MAIN = (
    *("pfpt", "fedavg_pt", "fedprox_pt", "scaffold_pt", "fedopt_pt", "gmm_pt", "pfedpg"),
    *("fedavg_pt_plus", "head_only", "fedcof"),
)
FIVE_SEEDS = ("pfpt", "fedavg_pt", "fedavg_pt_plus", "head_only", "fedcof")
PLUS = (
    *("pfpt_plus", "fedprox_pt_plus", "scaffold_pt_plus", "fedopt_pt_plus", "gmm_pt_plus"),
    "pfedpg_plus",
)
"""With selection from a pool; `fedavg_pt_plus` is among the main methods."""
OTHERS = (
    *PLUS,
    *("local_only", "centralised", "centralised_full", "full_fedavg", "full_fedprox", "fedncm"),
    *("adapter_fedavg", "adapter_fedprox", "lora_fedavg", "lora_fedprox", "moon_pt"),
)
ABLATIONS: dict[str, tuple[str, ...]] = {
    # preset: or + what is changed, and the overrides
    # From a pool, so that clients can still select: this rule adds no prompts by itself.
    "pfpt: random matching": ("aggregator=random", "prompts.pool=20"),
    "pfpt: no pruning": ("aggregator.patience=1000",),
    "pfpt: pruning at once": ("aggregator.patience=1",),
    "pfpt: no selection": ("prompts.selection=all",),
    "pfpt: paper": ("aggregator.variant=paper",),
    "pfpt: released": ("aggregator.variant=released",),
}
ADJUSTED_PFPT = "pfpt + logit adjustment"
ADJUSTED: dict[str, tuple[str, ...]] = {
    # A local loss without the clients' class shares, for PFPT and for what it is compared with.
    ADJUSTED_PFPT: ("objective=logit_adjusted",),
    "fedavg_pt + logit adjustment": ("objective=logit_adjusted",),
    "fedavg_pt_plus + logit adjustment": ("objective=logit_adjusted",),
}
ADJUSTED_SETTINGS = tuple(f"domains_frozen/{partition}" for partition in PARTITIONS)
DIAGNOSTICS: dict[str, tuple[str, ...]] = {
    # Which of its parts and options matter; in one setting.
    "pfpt: at most 20 prompts": ("aggregator.max_prompts=20",),
    "pfpt: no memory": ("aggregator.memory=0",),
    "pfpt: no origins": ("aggregator.origin_odds=1",),
    "pfpt: selection of each batch": ("prompts.choose_by=batch",),
    "pfpt: l2p, released sign": ("prompts.selection=l2p", "prompts.similarity_weight=0.01"),
    "pfpt: l2p, L2P's sign": ("prompts.selection=l2p", "prompts.similarity_weight=-0.01"),
    "pfpt: l2p, L2P's weight": ("prompts.selection=l2p", "prompts.similarity_weight=-0.5"),
    "pfpt: one local epoch": ("clients.epochs=1",),
    "pfpt: five local epochs": ("clients.epochs=5",),
    "fedavg_pt_plus: pool of 80": ("prompts.pool=80",),
}
WHITENED_PFPT, WHITENED_PLUS = "pfpt: whitened queries", "fedavg_pt_plus: whitened queries"
ALONE_PFPT = f"{WHITENED_PFPT}, each test image alone"
ALONE_PLUS = f"{WHITENED_PLUS}, each test image alone"
_ALONE = ("prompts.eval_batch=1",)
_WHITENED = ("prompts.whiten=true",)
ALONE: dict[str, tuple[str, ...]] = {
    # A test image selects prompts without 15 others of its domain; by plain queries and by whitened
    # ones.
    "pfpt: each test image alone": _ALONE,
    WHITENED_PFPT: _WHITENED,
    ALONE_PFPT: (*_WHITENED, *_ALONE),
    "fedavg_pt_plus: each test image alone": _ALONE,
    WHITENED_PLUS: _WHITENED,
    ALONE_PLUS: (*_WHITENED, *_ALONE),
}
ONE_DOMAIN: dict[str, tuple[str, ...]] = {
    # Where there is one domain, PFPT has no keys by itself (prompts.selection=auto): with a single
    # class at each client they would tell classes apart.
    "pfpt + keyed selection": ("prompts.selection=keyed",),
    "pfpt + keyed selection and logit adjustment": (
        "prompts.selection=keyed",
        "objective=logit_adjusted",
    ),
}
ONE_DOMAIN_SETTINGS = ("digits/imbalance",)
PROBES: dict[str, tuple[str, ...]] = {
    # What SCAFFOLD's optimiser and its variates each do for the head alone; the latter's best rate
    # is that of SCAFFOLD-PT's head in `HEAD_SCALES`.
    "head_only + sgd": ("clients.optimizer=sgd", "head.lr=0.1"),
    "head_only + scaffold": ("objective=scaffold", "head.lr=0.1"),
}
PROBE_SETTINGS = tuple(f"domains_shared/{partition}" for partition in PARTITIONS)
OWN_RATES = (*PROBES, *ADJUSTED, *ONE_DOMAIN)
"""Of the changed methods, those that choose rates of their own: other ones than the preset's may be
best for them."""
CHANGES = {**ABLATIONS, **DIAGNOSTICS, **PROBES, **ADJUSTED, **ALONE, **ONE_DOMAIN}
NEUTRAL: dict[str, object] = {
    "prompts.whiten": False,
    "prompts.choice": "hard",
    "eval_alone": "last",
    "head.start": "drawn",
    "prompts.depth": 0,
    "data.train": None,
    "clients.callbacks": [],
    "plugins": [],
    "defence.name": "none",
    "attack.name": "none",
    "system.speed": None,
    "system.bandwidth": None,
    "system.dropout": 0.0,
    "system.deadline": None,
    "system.over_select": 1.0,
    "system.empty": "stop",
    "system.schedule": "rounds",
    "system.buffer": None,
    "system.step": None,
    "system.staleness": "polynomial:0.5",
    "privacy.unit": None,
    "privacy.clip": None,
    "privacy.noise_multiplier": None,
    "privacy.epsilon": None,
    "privacy.delta": None,
    "loggers": [],
    "callbacks": [],
}
"""Options that not all runs had, because they came later or are gone, with the value that leaves
the program as it is without them."""
NO_MATCHING = "fedavg_pt_plus"
"""PFPT with a row-wise mean in the place of its matching is this very method."""
WITHOUT_KEYS = tuple(method for method in MAIN if method not in ("pfpt", "fedavg_pt_plus"))
GOALS: dict[str, float | None] = {
    "domains_frozen/dirichlet_0.5": 0.12,
    "domains_frozen/dirichlet_0.1": 0.0,
    "domains_frozen/imbalance": 0.12,
    "domains_shared/dirichlet_0.5": 0.10,
    "domains_shared/dirichlet_0.1": 0.10,
    "domains_shared/imbalance": 0.04,
    "digits/dirichlet_0.5": None,
    "digits/dirichlet_0.1": None,
    "digits/imbalance": None,
}
"""By how much PFPT was to lead each of `WITHOUT_KEYS`, set before the runs; 0: by anything that is
clear of zero; None: it is not to be worse by anything that is clear of zero."""
PARTITIONS_OF_OTHERS = ("dirichlet_0.5", "imbalance")
ABLATION_SETTINGS = tuple(f"domains_frozen/{partition}" for partition in PARTITIONS_OF_OTHERS)
"""Where prompts decide."""
DIAGNOSTIC_SETTINGS = ABLATION_SETTINGS[:1]
OTHER_SETTINGS = tuple(f"domains_shared/{partition}" for partition in PARTITIONS_OF_OTHERS)
POOL = 20
"""Prompts that the server starts with where a baseline selects from a pool."""
BOUNDS_OF_PROMPTS = ("local_only", "centralised")
"""Of `OTHERS`, what is run with the frozen head as well."""
CLOSED_FORM = ("fedcof", "fedncm")
"""One round, no training."""
WITHOUT_RATES = ("fedncm",)
"""Nothing to choose."""
POOLED = ("centralised", "centralised_full")
"""One client with all the data, whatever the partition, so that these run with one alone
(`POOLED_IN`); in as many rounds as give each image as many passes as federated training does."""
POOLED_IN = "dirichlet_0.5"
RATES_OF = {
    **{f"{method}_plus": method for method in ("pfpt", "scaffold_pt", "fedopt_pt", "gmm_pt")},
    **{"pfedpg_plus": "pfedpg", "fedprox_pt_plus": "fedavg_pt_plus", "moon_pt": "fedavg_pt"},
    **{f"{name}_fedprox": f"{name}_fedavg" for name in ("full", "adapter", "lora")},
}
"""Of `OTHERS`, those that have the rates of a near relation and choose none of their own. Not so
`OWN_RATES_IN`."""
OWN_RATES_IN = (("domains_frozen", "pfpt_plus"),)
"""Tasks and methods that choose rates of their own all the same: with PFPT's rates, ten times its
preset's, PFPT that selects as L2P does ended far below no prompts at all."""
CLIENT_RATES_OF = {"fedopt_pt": "fedavg_pt", "fedopt_pt_plus": "fedavg_pt_plus"}
"""FedOpt and FedAvg differ at the server alone: clients have the rates that were chosen for the
latter, which is in an earlier of `groups`."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run."""

    setting: str
    """`TASK/PARTITION`"""
    method: str
    """A preset, or a key of `CHANGES`."""
    seed: int
    scale: float | None = None
    """Factor on the learning rates; None: the chosen one."""

    @property
    def preset(self) -> str:
        """The method's file in conf/method."""
        return self.method.split(":")[0].split(" + ")[0]

    @property
    def tuned_as(self) -> str:
        """The method whose learning rates it has: that of the preset or its relation, but for
        `OWN_RATES` and `OWN_RATES_IN`.
        """
        if self.method in OWN_RATES:
            return self.method
        own = (self.setting.split("/")[0], self.preset) in OWN_RATES_IN
        return self.preset if own else RATES_OF.get(self.preset, self.preset)

    @property
    def name(self) -> str:
        """How `--only` and `--list` call it."""
        plain = self.method.replace(": ", "-").replace(" + ", "-with-").replace(" ", "-")
        plain = plain.translate(str.maketrans("", "", "()',"))
        if self.scale is not None:
            return f"{self.setting}/{plain}/rate-{self.scale:g}"
        return f"{self.setting}/{plain}/seed-{self.seed}"


def is_defined(setting: str, method: str) -> bool:
    """Whether a method is run in a setting: nothing is left to train without prompts and with a
    frozen head, and pooled data know no partition.
    """
    if method in POOLED:
        return setting.endswith(POOLED_IN)
    return not (method == "head_only" and "_frozen/" in setting)


def groups() -> list[list[Cell]]:
    """The runs whose figures are reported, in groups, the most wanted first."""
    domains, digits = (
        [f"{task}/{partition}" for task in tasks for partition in PARTITIONS]
        for tasks in (("domains_frozen", "domains_shared"), ("digits",))
    )
    rest = [method for method in MAIN if method not in FIVE_SEEDS]
    return [
        _cells(PROBE_SETTINGS, PROBES, 3),
        _cells(domains, FIVE_SEEDS, 5),
        _cells(ABLATION_SETTINGS, ABLATIONS, 3),
        _cells(ADJUSTED_SETTINGS, ADJUSTED, 5),
        _cells(ABLATION_SETTINGS, ALONE, 3),
        _cells(domains, rest, 3),
        _cells(digits, FIVE_SEEDS, 5),
        _cells(digits, rest, 3),
        _cells(ONE_DOMAIN_SETTINGS, ONE_DOMAIN, 3),
        _cells(OTHER_SETTINGS, OTHERS, 3),
        _cells(ABLATION_SETTINGS, (*PLUS, *BOUNDS_OF_PROMPTS), 3),
        _cells(DIAGNOSTIC_SETTINGS, DIAGNOSTICS, 3),
        _cells(["domains_plain/dirichlet_0.5"], FIVE_SEEDS, 3),
    ]


def real_groups() -> list[list[Cell]]:
    """The runs on real images, in groups, the most wanted first."""
    main = [
        _cells([f"{task}/{partition}"], real.METHODS, 5)
        for task in real.TASKS
        for partition in real.PARTITIONS
    ]
    return [*main, _cells([real.OTHERS_IN], real.OTHERS, 3)]


def task_of(setting: str) -> Json:
    """The task of a setting, as part of an experiment."""
    return {**TASKS, **real.TASKS}[setting.split("/")[0]]


def partition_of(setting: str) -> dict[str, object]:
    """The partition of a setting."""
    return {**PARTITIONS, **real.PARTITIONS}[setting.split("/")[1]]


def rounds_of(setting: str, rounds: int) -> int:
    """Rounds of a setting's runs, where those of the drawn tasks have `rounds`."""
    return real.ROUNDS if setting in real.SETTINGS else rounds


def _cells(settings: Iterable[str], methods: Iterable[str], seeds: int) -> list[Cell]:
    """All that is defined, seed by seed."""
    return [
        Cell(setting, method, seed)
        for seed in range(seeds)
        for setting in settings
        for method in methods
        if is_defined(setting, method)
    ]


def final_cells() -> list[Cell]:
    """All of `groups`."""
    return [cell for group in groups() for cell in group]


def rate_setting(setting: str) -> str:
    """Where a setting's learning rates are chosen: there itself, but `digits` with Dirichlet 0.1
    takes those of 0.5, and all of a real task those of `real.RATE_PARTITION`.
    """
    if setting in real.SETTINGS:
        return f"{setting.split('/')[0]}/{real.RATE_PARTITION}"
    return {"digits/dirichlet_0.1": "digits/dirichlet_0.5"}.get(setting, setting)


def scales_of(setting: str, method: str) -> tuple[float, ...]:
    """The scales that a method is tried with in a setting where rates are chosen."""
    heads = ("head_only", *PROBES)
    return SCALES if method in heads else SCALES_OF.get(setting, SCALES)


def head_scale(cell: Cell, scale: float, optimizer: str) -> float:
    """The factor on the head's rate of a run with some scale.

    Args:
        cell: the run.
        scale: of its other rates.
        optimizer: its clients', `adam` or `sgd`.
    """
    if cell.preset in OWN_HEAD_SCALE:
        return scale
    return HEAD_SCALES.get(cell.setting, {}).get(optimizer, scale)


def rate_cells(cells: list[Cell]) -> list[Cell]:
    """The runs that choose the learning rates of some final cells."""
    pairs = {
        (rate_setting(cell.setting), cell.tuned_as): None
        for cell in cells
        if cell.preset not in WITHOUT_RATES
    }
    return [
        Cell(setting, method, RATE_SEED, scale)
        for setting, method in pairs
        for scale in scales_of(setting, method)
    ]
