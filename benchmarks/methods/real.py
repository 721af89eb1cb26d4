"""What the methods benchmark runs on real images: `emoji` and `mixed` with DINOv2 ViT-S/14.

    make real && python -m benchmarks.methods.runner --real

The protocol is that of the drawn tasks but for what stands here. Prompts enter before block 10 of
12, where a step costs a tenth of one at the input (docs/depth.md). With `emoji_frozen` the head is
fitted once on the images of one vendor, whom no client has; the clients have the other four.
"""

from __future__ import annotations

ROUNDS = 10
EVAL_EVERY = 5
PARTITIONS: dict[str, dict[str, object]] = {
    # Clients of one style each, with the same classes: feature shift and nothing else.
    "natural": {"name": "iid"},
    "dirichlet_0.5": {"name": "dirichlet", "alpha": 0.5},
    "dirichlet_0.1": {"name": "dirichlet", "alpha": 0.1},
    # Ten clients of a style share its 21 classes: three of them dominate each client.
    "imbalance": {"name": "imbalance", "dominated": 3},
}
_COMMON: dict[str, object] = {
    "model": "dinov2_s14_local",
    "clients": {"count": 40, "per_round": 10, "epochs": 2, "batch_size": 16},
    # Queries that name a single image's style, for all methods that select by key (docs/pfpt.md).
    "prompts": {"count": 5, "depth": 10, "whiten": "clients", "query": "both"},
    "eval_every": EVAL_EVERY,
}
TASKS: dict[str, dict[str, object]] = {
    "emoji_frozen": {**_COMMON, "data": {"name": "emoji", "public": "noto"}, "head": "frozen"},
    "emoji_shared": {**_COMMON, "data": "emoji", "head": "released"},
    "mixed_frozen": {**_COMMON, "data": {"name": "mixed", "public": 0.1}, "head": "frozen"},
    "mixed_shared": {**_COMMON, "data": "mixed", "head": "released"},
}
SETTINGS = tuple(f"{task}/{partition}" for task in TASKS for partition in PARTITIONS)
RATE_PARTITION = "dirichlet_0.5"
"""Where the learning rates of a task are chosen, for all its partitions."""
METHODS = ("pfpt", "fedavg_pt", "fedavg_pt_plus", "head_only", "fedcof")
OTHERS = ("fedprox_pt", "scaffold_pt", "fedopt_pt", "gmm_pt", "pfedpg")
"""Run in one setting, with fewer seeds."""
OTHERS_IN = "emoji_frozen/dirichlet_0.5"
