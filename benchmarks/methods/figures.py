"""Figures of the methods benchmark; tables.py draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from benchmarks.methods import grid
from benchmarks.methods.summary import BASELINE, Results, Summary


def accuracy_figure(rows: Sequence[Summary]) -> Figure:
    """Difference to FedAvg-PT of the main methods, one panel for each task that has any."""
    compared = [row.setting for row in rows if row.gain is not None]
    tasks = [task for task in grid.TASKS if any(name.startswith(task) for name in compared)]
    figure = Figure(figsize=(4.2 * max(1, len(tasks)), 4.2), layout="constrained")
    axes = figure.subplots(1, max(1, len(tasks)), sharey=True, squeeze=False)[0]
    methods = [method for method in grid.MAIN if method != BASELINE]
    for axis, task in zip(axes, tasks, strict=False):
        for shift, partition in enumerate(grid.PARTITIONS):
            gains = {r.method: r.gain for r in rows if r.setting == f"{task}/{partition}"}
            for place, method in enumerate(methods):
                gain = gains.get(method)
                if gain is None:
                    continue
                half = gain.half_width if math.isfinite(gain.half_width) else 0.0
                axis.errorbar(
                    100 * gain.mean,
                    place + 0.2 * (shift - 1),
                    xerr=100 * half,
                    fmt="o",
                    markersize=4,
                    color=f"C{shift}",
                    # Hollow: one seed, of which no interval is known.
                    markerfacecolor="white" if gain.seeds < 2 else f"C{shift}",
                )
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(task)
        axis.set_xlabel("points over FedAvg-PT")
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    colours = [f"C{shift}" for shift in range(len(grid.PARTITIONS))]
    marks = [Line2D([], [], color=colour, marker="o", linestyle="") for colour in colours]
    figure.legend(
        marks, list(grid.PARTITIONS), frameon=False, fontsize=8, ncols=3, loc="outside lower center"
    )
    return figure


def pool_figure(results: Results) -> Figure:
    """Number of PFPT's prompts over rounds (Fig. 4 of the paper), mean over seeds."""
    tasks = [
        task
        for task in grid.TASKS
        if any(s.startswith(task) and "pfpt" in methods for s, methods in results.items())
    ]
    figure = Figure(figsize=(4.2 * max(1, len(tasks)), 3.2), layout="constrained")
    axes = figure.subplots(1, max(1, len(tasks)), squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=False):
        for partition in grid.PARTITIONS:
            runs = results.get(f"{task}/{partition}", {}).get("pfpt", {})
            if runs:
                curves = np.array([run.prompts_curve for run in runs.values()])
                axis.plot(range(1, curves.shape[1] + 1), curves.mean(axis=0), label=partition)
        axis.set_title(task)
        axis.set_xlabel("round")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("prompts in the pool")
    return figure


def path_figure(pools_file: Path, setting: str) -> Figure | None:
    """t-SNE of PFPT's prompts over rounds with the path of their centroid (Fig. 3 and 5).

    Args:
        pools_file: the prompts of each round; None is returned where it does not exist.
        setting: where they are from.
    """
    if not pools_file.is_file():
        return None
    # Imported here: tables need it for this figure alone.
    from sklearn.manifold import TSNE

    with np.load(pools_file) as file:
        pools = [file[name].astype(np.float64) for name in sorted(file.files)]
    centroids = np.stack([pool.mean(axis=0) for pool in pools])
    everything = np.concatenate([*pools, centroids])
    perplexity = min(30.0, (len(everything) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(everything)
    rounds = np.repeat(np.arange(1, len(pools) + 1), [len(pool) for pool in pools])
    middle = places[len(rounds) :]
    figure = Figure(figsize=(6.6, 4.2), layout="constrained")
    axis, close = figure.subplots(1, 2, width_ratios=(4, 1.3))
    dots = axis.scatter(places[: len(rounds), 0], places[: len(rounds), 1], c=rounds, s=8)
    axis.plot(*middle.T, color="black", linewidth=1)
    ends = middle[[0, -1]]
    axis.scatter(ends[:, 0], ends[:, 1], color="black", marker="x", label="centroid, both ends")
    axis.set_title(f"summarizing prompts, {setting}")
    axis.legend(frameon=False, fontsize=8)
    figure.colorbar(dots, label="round")
    close.plot(*middle.T, color="grey", linewidth=0.6)
    close.scatter(*middle.T, c=range(len(middle)), s=10)
    close.set_box_aspect(1)
    close.set_title("the centroid's\npath, enlarged", fontsize=8)
    for each in (axis, close):
        each.set_xticks([])
        each.set_yticks([])
    return figure
