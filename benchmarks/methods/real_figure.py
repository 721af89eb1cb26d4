"""The picture of docs/real.md: accuracy of each method, task by task, with its interval."""

from __future__ import annotations

from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import mean_and_half
from benchmarks.methods import real
from benchmarks.methods.real_results import NAMES, accuracies, runs_of
from benchmarks.methods.results import Store
from fedprompt.report.style import COLOURS, INK, MUTED, style_axes

TITLES = {
    "emoji_frozen": "emoji, head\nfitted on Noto",
    "emoji_shared": "emoji, head\naveraged",
    "mixed_frozen": "mixed, head\nfitted on a tenth",
    "mixed_shared": "mixed, head\naveraged",
}
SETTINGS = {
    "natural": "natural",
    "dirichlet_0.5": "Dirichlet\n0.5",
    "dirichlet_0.1": "Dirichlet\n0.1",
    "imbalance": "99 %\nimbalance",
}


def draw(store: Store, path: Path) -> None:
    """Dots for batches of 16, rings for each image alone.

    Args:
        store: the results; tasks without any are left out.
        path: of the PNG.
    """
    tasks = [task for task in real.TASKS if partitions_of(store, task)]
    width = 1.6 + sum(1.25 * len(partitions_of(store, task)) for task in tasks)
    figure = Figure(figsize=(max(width, 7.0), 4.2), dpi=140, facecolor="white")
    shares = [len(partitions_of(store, task)) for task in tasks]
    columns = figure.subplots(1, len(tasks), squeeze=False, width_ratios=shares)[0]
    for axes, task in zip(columns, tasks, strict=True):
        panel(axes, store, task)
    columns[0].set_ylabel("test accuracy (%)", color=INK)
    names: dict[str, Artist] = {}
    for axes in columns:
        names |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(names.values(), names.keys(), loc="lower center", ncols=len(names), frameon=False)
    figure.text(
        0.01,
        0.955,
        "dots: 16 images of a style select together; rings: each image alone; bars: 95 %",
        color=MUTED,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.07, 1, 0.95))
    figure.savefig(path)


def partitions_of(store: Store, task: str) -> list[str]:
    """Those of a task in which PFPT has been run."""
    return [each for each in real.PARTITIONS if runs_of(store, f"{task}/{each}", "pfpt")]


def panel(axes: Axes, store: Store, task: str) -> None:
    """One task.

    Args:
        axes: empty.
        store: the results.
        task: of `real.TASKS`.
    """
    partitions = partitions_of(store, task)
    for index, method in enumerate(real.METHODS):
        for place, partition in enumerate(partitions):
            runs = runs_of(store, f"{task}/{partition}", method)
            if not runs:
                continue
            x = place + 0.14 * (index - (len(real.METHODS) - 1) / 2)
            for alone, shift in ((False, -0.025), (True, 0.025)):
                mean, half = mean_and_half([*accuracies(runs, alone).values()])
                axes.errorbar(
                    x + shift,
                    100 * mean,
                    100 * half if half == half else None,
                    fmt="o",
                    color=COLOURS[index % len(COLOURS)],
                    markersize=5,
                    markerfacecolor="white" if alone else None,
                    elinewidth=1,
                    label=None if alone or place else NAMES[method],
                )
    axes.set_title(TITLES[task], loc="left", fontsize=11, color=INK)
    style_axes(axes)
    axes.set_xticks(range(len(partitions)), [SETTINGS[each] for each in partitions])
    axes.set_xlim(-0.6, len(partitions) - 0.4)
