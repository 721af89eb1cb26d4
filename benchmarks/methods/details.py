"""The smaller tables of the page: each says what a paragraph would need many numbers for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.harness import Json, mean_and_half
from benchmarks.methods import grid
from benchmarks.methods.results import Store
from benchmarks.methods.runner import tried_scales
from benchmarks.methods.summary import Results, Runs, Summary, figures_of, summarise
from benchmarks.methods.text import percent, points, rate_cells, table

NAMES = {
    "dirichlet_0.5": "Dirichlet 0.5",
    "dirichlet_0.1": "Dirichlet 0.1",
    "imbalance": "99 % imbalance",
}
FROZEN = [f"domains_frozen/{partition}" for partition in grid.PARTITIONS]
ADDED = {
    "pfpt": "PFPT",
    grid.ADJUSTED_PFPT: "PFPT with `objective=logit_adjusted`",
    "fedavg_pt": "FedAvg-PT",
    "fedavg_pt_plus": "FedAvg-PT+: PFPT's selection without its matching",
    "fedcof": "FedCOF: a head in closed form, one round, no prompts",
}
"""What the takeaways compare."""


def takeaways(results: Results, references: Mapping[str, Json]) -> str:
    """Test accuracy with the frozen head of those that the takeaways name.

    Args:
        results: from `read_results`.
        references: what bounds.py found for the frozen head by itself.
    """
    means = {(row.setting, row.method): row.means for row in summarise(results)}
    lines = [
        [name, *(points(means[setting, method]["accuracy"]) for setting in FROZEN)]
        for method, name in ADDED.items()
    ]
    bare = percent(references["no prompts"]["test"])
    lines.append(["the frozen head without prompts", *[bare] * len(FROZEN)])
    return "\n".join(table(["test accuracy (%), frozen head", *NAMES.values()], lines))


def spread(results: Results, methods: Sequence[str] = ("fedavg_pt", "scaffold_pt")) -> str:
    """Lowest and highest test accuracy over seeds, frozen head."""
    lines = []
    for method in methods:
        values = [figures_of(results[setting][method], "accuracy") for setting in FROZEN]
        lines.append([f"`{method}`", *(between(list(each.values())) for each in values)])
    return "\n".join(table(["lowest to highest (%)", *NAMES.values()], lines))


def between(values: Sequence[float]) -> str:
    """Least and most, in percent.

    >>> between([0.5, 0.25, 0.3])
    '25.0 to 50.0'
    """
    return f"{percent(min(values))} to {percent(max(values))}"


def by_rate(store: Store) -> str:
    """Validation accuracy of PFPT by the factor on its rates, frozen head, without and with logit
    adjustment.
    """
    lines = []
    for method in ("pfpt", grid.ADJUSTED_PFPT):
        for setting, name in zip(FROZEN, NAMES.values(), strict=True):
            lines.append([f"`{method}`", name, *rate_cells(tried_scales(setting, method, store))])
    head = ["method", "partition", *(f"x {scale:g}" for scale in grid.ALL_SCALES)]
    return "\n".join(table(head, lines))


def own_images(results: Results) -> str:
    """Mean test accuracy of the clients on their own images: alone, with PFPT, with the best."""
    settings = (*grid.OTHER_SETTINGS, *grid.ABLATION_SETTINGS)
    rows = [row for row in summarise(results) if row.setting in settings]
    # What was run is compared in all of them: presets, as they are.
    plain = [row for row in rows if row.method not in grid.CHANGES]

    def federated(row: Summary) -> bool:
        return row.method not in ("local_only", *grid.POOLED)

    lines = []
    for method in ("local_only", "pfpt"):
        own = {row.setting: row.means["own"] for row in plain if row.method == method}
        lines.append([f"`{method}`", *(points(own[setting]) for setting in settings)])
    best = []
    for setting in settings:
        row = max(
            (row for row in plain if row.setting == setting and federated(row)),
            key=lambda row: row.means["own"].mean,
        )
        best.append(f"{points(row.means['own'])} (`{row.method}`)")
    lines.append(["the best federated method", *best])
    head = ["own test images (%)", *(setting.replace("/", "<br>") for setting in settings)]
    return "\n".join(table(head, lines))


def pools(results: Results) -> str:
    """PFPT's prompts at the end, least to most over seeds, and when the pool had settled."""
    runs = [results[setting]["pfpt"] for setting in FROZEN]

    def row(name: str, figure: Callable[[Runs], str]) -> list[str]:
        return [name, *(figure(each) for each in runs)]

    lines = [
        row("prompts at the end, least to most over five seeds", _least_to_most),
        row("round from which the mean is within two of its end", _settled),
    ]
    return "\n".join(table(["PFPT, frozen head", *NAMES.values()], lines))


def _least_to_most(runs: Runs) -> str:
    ends = [run.prompts_curve[-1] for run in runs.values()]
    return f"{min(ends)} to {max(ends)}"


def _settled(runs: Runs) -> str:
    mean = np.mean([run.prompts_curve for run in runs.values()], axis=0)
    off = np.flatnonzero(np.abs(mean - mean[-1]) > 2)
    return str(int(off[-1]) + 2 if len(off) else 1)


def known_groups(results: Results, bounds: Json, task: str) -> str:
    """What a federation reaches that knows the domains, beside PFPT with the same three seeds.

    Args:
        results: from `read_results`.
        bounds: what bounds.py found.
        task: `domains_frozen` or `domains_shared`.
    """
    frozen = task == "domains_frozen"
    told = bounds["true groups" if frozen else "true groups, shared head"]
    scales = {
        partition: {run.scale for run in results[f"{task}/{partition}"]["pfpt"].values()}
        for partition in NAMES
    }
    as_pfpt = []
    for name in NAMES:
        found = told[name].get(f"rates x {min(scales[name]):g}")
        # Where PFPT's rates were chosen anew since, what was asked for stands; the page says so.
        as_pfpt.append(found if found is not None else next(iter(told[name].values())))
    own = []
    for partition in NAMES:
        values = figures_of(results[f"{task}/{partition}"]["pfpt"], "accuracy")
        own.append(percent(mean_and_half([values[seed] for seed in range(3)])[0]))
    lines = [
        ["prompts of the true groups, rates as PFPT", *map(_bound, as_pfpt)],
        ["PFPT, which has to find them (the same three seeds)", *own],
    ]
    if frozen:
        higher = [told[name].get("rates x 3") for name in NAMES]
        lines.append(
            ["prompts of the true groups, 3 times the preset's rates", *map(_bound, higher)]
        )
    return "\n".join(table([f"test accuracy (%), {_head(task)}", *NAMES.values()], lines))


def _head(task: str) -> str:
    return {"domains_frozen": "frozen head", "domains_shared": "shared head"}[task]


def _bound(found: Json | None) -> str:
    """Test accuracy of one entry of bounds.py."""
    return "-" if found is None else percent(found["test"]["mean"], found["test"]["half_width_95"])


def head_bounds(bounds: Json) -> str:
    """A head alone, on bare features and on those under each domain's task tokens, with the scale
    that is best on validation.
    """
    under_tokens = "the same on features under the task tokens of each image's domain"
    kinds = {"head only (5 seeds)": "head only", under_tokens: "head only, domain tokens"}
    lines = []
    for name, part in kinds.items():
        best = [
            max(bounds[part][partition].values(), key=lambda found: found["validation"]["mean"])
            for partition in NAMES
        ]
        lines.append([name, *map(_bound, best)])
    return "\n".join(table(["test accuracy (%), shared head", *NAMES.values()], lines))
