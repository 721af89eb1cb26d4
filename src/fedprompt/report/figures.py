"""The pictures of a run: accuracy, prompts, clients, seconds, aggregation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedprompt.core.files import atomic_write
from fedprompt.core.words import counted
from fedprompt.report.live import percent
from fedprompt.report.style import (
    COLOURS,
    DPI,
    FATE_COLOURS,
    INK,
    MOST_DASHED,
    MUTED,
    PHASE_COLOURS,
    back_to_front,
    canvas,
    finish_rounds,
    in_percent,
    index_ticks,
    plot_line,
    png_bytes,
    shorten,
    style_axes,
    style_rounds,
)
from fedprompt.runs.directory import Partition, RunDirectory
from fedprompt.runs.summary import MATCH_FIGURES, PHASES, Run, read_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def make_figures(run_dir: Path) -> list[Path]:
    """Draw the figures of a run, with its comparison runs, into `RUN_DIR/figures/`.

    Returns:
        The files written; a figure without data is left out.

    Raises:
        ConfigError: the folder is no run directory.
    """
    runs = read_runs([run_dir])
    return list(write_figures(runs, runs[0].directory).values())


def write_figures(runs: Sequence[Run], directory: RunDirectory) -> dict[str, Path]:
    """Draw the pictures into the run's folder of figures; their paths by name."""
    paths: dict[str, Path] = {}
    for name, figure in draw_all(runs).items():
        directory.figures_folder.mkdir(parents=True, exist_ok=True)
        paths[name] = directory.figures_folder / f"{name}.png"
        atomic_write(paths[name], png_bytes(figure))
    return paths


def draw_all(runs: Sequence[Run]) -> dict[str, Figure]:
    """All figures that have data, by name; the heat map is of the first run with a partition."""
    drawn: dict[str, Figure] = {}
    if any(run.series("accuracy")[0] for run in runs):
        drawn["accuracy"] = accuracy_figure(runs)
    if any(run.over_hours("accuracy")[0] for run in runs):
        drawn["virtual"] = virtual_figure(runs)
    if any(run.series("num_prompts")[0] for run in runs):
        drawn["prompts"] = prompts_figure(runs)
    if any(run.diagnostics()[0] for run in runs):
        drawn["aggregation"] = aggregation_figure(runs)
    partition = next(filter(None, (run.directory.read_partition() for run in runs)), None)
    if partition is not None and partition.class_counts.size:
        drawn["clients"] = clients_figure(partition)
    if any(sum(run.seconds(phase)) for run in runs for phase in PHASES):
        drawn["seconds"] = seconds_figure(runs)
    return drawn


def accuracy_figure(runs: Sequence[Run]) -> Figure:
    """Test accuracy over rounds (solid) and validation accuracy (dashed), one colour a run."""
    measured = any(run.series("validation_accuracy")[1] for run in runs)
    with_validation = measured and len(runs) <= MOST_DASHED
    splits = "solid: test split, dashed: validation split" if with_validation else "test split"
    figure, axes = canvas("Accuracy of the global model", splits)
    labels = []
    for index, run in back_to_front(runs):
        colour = COLOURS[index % len(COLOURS)]
        if with_validation:
            rounds, values = run.series("validation_accuracy")
            axes.plot(rounds, in_percent(values), "--", color=colour, linewidth=1.0, alpha=0.55)
        rounds, values = run.series("accuracy")
        if rounds:
            plot_line(axes, rounds, in_percent(values), index)
            labels.append((100 * values[-1], f"{run.name}  {percent(values[-1])}", colour))
    axes.set_ylabel("accuracy (%)")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), 100 if high > 90 else high)
    finish_rounds(axes, runs, labels)
    return figure


def virtual_figure(runs: Sequence[Run]) -> Figure:
    """Test accuracy over the hours that the rounds take on the clients' devices, a colour a run."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = canvas("Accuracy over virtual time", "test split, hours on the clients' devices")
    labels, ends = [], []
    for index, run in back_to_front(runs):
        hours, values = run.over_hours("accuracy")
        if hours:
            plot_line(axes, hours, in_percent(values), index)
            text = f"{run.name}  {percent(values[-1])}"
            labels.append((100 * values[-1], text, COLOURS[index % len(COLOURS)]))
            ends.append(hours[-1])
    axes.set_ylabel("accuracy (%)")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), 100 if high > 90 else high)
    finish_rounds(axes, runs, labels)
    axes.set_xlabel("virtual hours", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8))
    axes.set_xlim(0, max([*ends, 1e-9]))
    return figure


def prompts_figure(runs: Sequence[Run]) -> Figure:
    """Number of summarizing prompts that the server holds after each round, one colour a run."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = canvas("Summarizing prompts on the server", "number held after each round")
    labels = []
    for index, run in back_to_front(runs):
        colour = COLOURS[index % len(COLOURS)]
        rounds, values = run.series("num_prompts")
        if rounds:
            plot_line(axes, rounds, values, index)
            labels.append((values[-1], f"{run.name}  {values[-1]:.0f}", colour))
    axes.set_ylabel("prompts")
    top = max(axes.get_ylim()[1], 1.0)
    axes.set_ylim(-0.03 * top, 1.05 * top)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    finish_rounds(axes, runs, labels)
    return figure


def clients_figure(partition: Partition) -> Figure:
    """Heat map of the samples of each class (rows) at each client (columns), with totals above."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.figure import Figure

    counts = partition.class_counts
    clients, classes = counts.shape
    width = float(np.clip(2.4 + 0.42 * clients, 7.0, 14.0))
    height = float(np.clip(2.4 + 0.3 * classes, 4.2, 11.0))
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(
        2,
        2,
        height_ratios=(0.9, height - 1.9),
        width_ratios=(width, 0.16),
        hspace=0.02,
        wspace=0.02,
    )
    totals, axes = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    shades = LinearSegmentedColormap.from_list(
        "counts", ["#f7f9fb", "#cfe3f1", "#7fb8dc", "#2f7fb8", "#0b4a7d", "#062a4d"]
    )
    # Dirichlet counts span two orders of magnitude: the square root keeps the small ones visible.
    norm = PowerNorm(0.5, vmin=0, vmax=max(int(counts.max()), 1))
    image = axes.pcolormesh(
        counts.T,
        cmap=shades,
        norm=norm,
        edgecolors="white",
        linewidth=0.8 if clients <= 40 else 0.2,
    )
    axes.invert_yaxis()
    if clients <= 30 and classes <= 40:
        _write_counts(axes, counts, float(norm.vmax or 1))
    index_ticks(axes, "x", [str(client) for client in range(clients)], limit=30)
    index_ticks(axes, "y", [shorten(name, 18) for name in partition.class_names], limit=45)
    axes.set_xlabel("client", color=INK)
    axes.set_ylabel("class", color=INK)
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[1, 1]))
    bar.set_label("training samples", color=INK)
    bar.outline.set_visible(False)  # type: ignore[operator]
    _draw_totals(totals, counts)
    for drawn in (axes, totals, bar.ax):
        drawn.tick_params(colors=MUTED, length=0, labelsize=8)
        for spine in drawn.spines.values():
            spine.set_visible(False)
    size = (
        f"{counted(clients, 'client')}, {classes} classes, {int(counts.sum()):,} training samples"
    )
    totals.set_title(
        f"Who holds what: {size}", loc="left", fontsize=12, fontweight="bold", color=INK, pad=12
    )
    return figure


OVERLAP = "evaluate, while the next round trains"
LEAST_OVERLAP = 0.05
"""Share of the round; less is none."""


def seconds_stack(run: Run) -> dict[str, NDArray[np.float64]]:
    """A round's wall-clock seconds in parts, one value a round and part.

    A round counts from the report of the one before. The clients have then trained for a while
    already, which is the last part of the round before. Where nothing overlaps, as with
    `runtime=serial`, the phases still exceed the time by the milliseconds that making jobs takes.
    """
    wall = np.array(run.wall_seconds())
    train, aggregate, evaluate = (np.array(run.seconds(phase)) for phase in PHASES)
    before = np.maximum(train + aggregate + evaluate - wall, 0.0)
    overlap = np.minimum(np.append(before[1:], 0.0), evaluate)
    overlap[overlap < LEAST_OVERLAP * wall] = 0.0
    return {
        "train": np.maximum(wall - aggregate - evaluate, 0.0),
        "aggregate": aggregate,
        "evaluate": evaluate - overlap,
        OVERLAP: overlap,
    }


def seconds_figure(runs: Sequence[Run]) -> Figure:
    """Wall-clock seconds of each round by phase, stacked; one panel a run on a common scale."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = [run for run in runs if run.records][:8]
    columns = min(len(shown), 4)
    rows = math.ceil(len(shown) / columns)
    size = (max(7.2, 2.9 * columns), 0.9 + 2.9 * rows)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes, run in zip(panels, shown, strict=False):
        rounds = [record["round"] for record in run.records]
        _draw_stack(axes, rounds, seconds_stack(run))
        total = sum(run.wall_seconds())
        axes.set_title(
            f"{shorten(run.name, 30)}  ·  {total:.0f} s", fontsize=9.5, loc="left", color=INK
        )
        axes.set_xlabel("round", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        style_axes(axes)
        axes.grid(axis="x", visible=False)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel("seconds per round", color=INK)
    legend: dict[str, Any] = {}
    for axes in panels:
        handles, names = axes.get_legend_handles_labels()
        legend.update(zip(names, handles, strict=True))
    figure.suptitle(
        "Where the time goes", x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK
    )
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower right",
        ncols=len(legend),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
    return figure


def _draw_stack(
    axes: Axes, rounds: Sequence[int], parts: Mapping[str, NDArray[np.float64]]
) -> None:
    """A bar a round; where two phases overlap, one is hatched with the colour of the other.

    Args:
        axes: to draw on.
        rounds: their numbers.
        parts: heights by name, from below; an overlap that is nowhere is left out.
    """
    base = np.zeros(len(rounds))
    width = 0.8 if len(rounds) <= 40 else 1.0
    for name, height in parts.items():
        overlaps = name == OVERLAP
        if overlaps and not height.any():
            continue
        axes.bar(
            *(rounds, height, width, base),
            color=PHASE_COLOURS["evaluate" if overlaps else name],
            label=name,
            linewidth=0,
            hatch="////" if overlaps else None,
            edgecolor=PHASE_COLOURS["train"] if overlaps else None,
        )
        base += height


def aggregation_figure(runs: Sequence[Run]) -> Figure:
    """What the aggregator did in each round: one row of panels a run whose diagnostics have it.

    Left: stacked bars of the prompts that stay (kept, born), below zero those pruned, and points
    for the merges. Middle and right: `MATCH_FIGURES`.
    """
    from matplotlib.figure import Figure

    shown = [run for run in runs if run.diagnostics()[0]][:MOST_DASHED]
    size = (11.5, 1.0 + 2.7 * len(shown))
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(
        len(shown), 1 + len(MATCH_FIGURES), squeeze=False, width_ratios=(1.5, 1, 1)
    )
    for (counts, *others), run in zip(panels, shown, strict=True):
        rounds, values = run.diagnostics()
        _draw_fates(counts, rounds, values)
        counts.set_title(shorten(run.name, 30), fontsize=9.5, loc="left", color=INK)
        for axes, (name, label) in zip(others, MATCH_FIGURES.items(), strict=True):
            plot_line(axes, rounds, values[name], 0)
            axes.set_title(label, fontsize=9.5, loc="left", color=INK)
            # Entropy on the whole scale: a change far below log 2 is none.
            top = max(np.nan_to_num(values[name]).max(), math.log(2))
            axes.set_ylim(-0.03 * top, 1.1 * top)
        for axes in (counts, *others):
            style_rounds(axes, rounds)
    handles, names = panels[0, 0].get_legend_handles_labels()
    in_order = [handles[names.index(name)] for name in FATE_COLOURS]
    figure.suptitle(
        "What the aggregation did", x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK
    )
    figure.legend(
        in_order,
        list(FATE_COLOURS),
        loc="outside upper right",
        ncols=len(FATE_COLOURS),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
    return figure


def _draw_fates(axes: Axes, rounds: Sequence[int], values: Mapping[str, list[float]]) -> None:
    """Bars of what became of the prompts; merges are points, for they are no prompts that exist."""
    from matplotlib.ticker import MaxNLocator

    width = 0.8 if len(rounds) <= 40 else 1.0
    counts = {name: np.nan_to_num(values[name]) for name in FATE_COLOURS}
    bases = {"kept": 0.0 * counts["kept"], "born": counts["kept"], "pruned": -counts["pruned"]}
    for name, base in bases.items():
        colour = FATE_COLOURS[name]
        axes.bar(rounds, counts[name], width, bottom=base, color=colour, label=name, linewidth=0)
    some = counts["merged"] > 0
    axes.plot(
        *(np.array(rounds)[some], counts["merged"][some], "o"),
        color=FATE_COLOURS["merged"],
        markersize=4.5 if len(rounds) <= 40 else 2.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        label="merged",
        zorder=4,
    )
    axes.axhline(0, color=MUTED, linewidth=0.8)
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.03 * (high - low), high + 0.05 * (high - low))
    axes.set_ylabel("prompts", color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _write_counts(axes: Axes, counts: NDArray[np.int64], largest: float) -> None:
    for client, row in enumerate(counts):
        for label, count in enumerate(row):
            if count:
                dark = math.sqrt(count / largest) > 0.55
                axes.text(
                    client + 0.5,
                    label + 0.5,
                    str(count),
                    ha="center",
                    va="center",
                    fontsize=7 if count < 1000 else 5.5,
                    color="white" if dark else INK,
                )


def _draw_totals(axes: Axes, counts: NDArray[np.int64]) -> None:
    totals = counts.sum(axis=1)
    clients = len(totals)
    axes.bar(np.arange(clients) + 0.5, totals, 0.86, color=MUTED, linewidth=0)
    axes.set_xlim(0, clients)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_ylabel("total", color=MUTED, fontsize=8, rotation=0, ha="right", va="center")
    if clients <= 30:
        for client, total in enumerate(totals):
            axes.annotate(
                str(total),
                (client + 0.5, float(total)),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=MUTED,
            )
    axes.set_ylim(0, 1.25 * max(int(totals.max()), 1))
