"""Figures, tables and a page about finished runs, made from their run directories alone."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedprompt.checkpoint import atomic_write
from fedprompt.display import number, percent
from fedprompt.errors import ConfigError
from fedprompt.records import Partition, RunDirectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

logger = logging.getLogger(__name__)

DPI = 140
MEGABYTE = 1e6
MOST_DASHED = 4  # runs in one plot before their validation lines are left out
INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e7eb"
# Okabe and Ito, "Color Universal Design" (2008), without yellow, too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
PHASE_COLOURS = {"train": "#0072B2", "aggregate": "#D55E00", "evaluate": "#8CC5E3"}
PERSONALISED = ("mean", "deviation", "worst_tenth", "jain")
PHASES = tuple(PHASE_COLOURS)
FATE_COLOURS = {"kept": "#0072B2", "born": "#009E73", "pruned": "#D55E00", "merged": "#000000"}
"""What became of summarizing prompts in a round, as the matching aggregators report it."""
MATCH_FIGURES = {
    "matched_distance": "matched distance (noise)",
    "inclusion_entropy": "inclusion entropy (nats)",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a report needs of one run directory."""

    directory: RunDirectory
    name: str
    records: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    status: Mapping[str, Any]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Rounds and values of the records that have a number under `key`."""
        pairs = [(r["round"], float(r[key])) for r in self.records if r.get(key) is not None]
        return [index for index, _ in pairs], [value for _, value in pairs]

    def personalised(self, split: str) -> list[tuple[int, dict[str, float]]]:
        """Rounds in which the clients' own models were measured, and the figures over clients."""
        told = [(r["round"], (r.get("personalised") or {}).get(split)) for r in self.records]
        return [
            (index, {name: figures[name] for name in PERSONALISED})
            for index, figures in told
            if figures and figures.get("mean") is not None
        ]

    def seconds(self, phase: str) -> list[float]:
        """Seconds that each round spent in `phase`."""
        return [float(r.get("seconds", {}).get(phase) or 0.0) for r in self.records]

    def diagnostics(self) -> tuple[list[int], dict[str, list[float]]]:
        """Rounds in which the aggregator said how it matched, and each figure; NaN where null."""
        names = (*FATE_COLOURS, *MATCH_FIGURES)
        told = [(r["round"], r.get("diagnostics") or {}) for r in self.records]
        told = [(index, figures) for index, figures in told if set(names) <= set(figures)]
        values = {
            name: [float("nan" if figures[name] is None else figures[name]) for _, figures in told]
            for name in names
        }
        return [index for index, _ in told], values


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """The runs in `run_dirs`, each followed by its comparison runs, under distinct names.

    Raises:
        ConfigError: `run_dirs` is empty or a folder is no run directory.
    """
    if not run_dirs:
        raise ConfigError("report: expected at least one run directory, got none")
    runs: list[Run] = []
    for path in run_dirs:
        main = RunDirectory.open(path)
        prefix = f"{main.path.resolve().name}/" if len(run_dirs) > 1 else ""
        for directory in (main, *main.comparisons()):
            name = _method(directory) if directory is main else directory.path.name
            runs.append(_read_run(directory, _unused(prefix + name, runs)))
    return runs


def comparison_table(run_dirs: Sequence[Path]) -> list[dict[str, Any]]:
    """One row for each run and comparison run.

    Returns:
        Rows with `name`, `state`, `rounds`, `accuracy` (last evaluated round, test split),
        `best_round` (highest validation accuracy, the earliest of equals), `best_accuracy` (test
        split, in that round), `balanced_accuracy` (mean over classes, last evaluated round),
        `personalised` (`mean`, `deviation`, `worst_tenth` and `jain` over the clients' own models
        on their own shares of the test split, the last time they were measured), `prompts`,
        `mb_up`, `mb_down` (10^6 bytes over all rounds), `seconds` (all phases and rounds),
        `state_sha256`. What a run does not tell is None. A method without a global model has its
        best round by the clients' validation accuracy, and `best_accuracy` is theirs on test.

    Raises:
        ConfigError: a folder is no run directory.
    """
    return [_row(run) for run in read_runs(run_dirs)]


def _read_run(directory: RunDirectory, name: str) -> Run:
    return Run(
        directory,
        name,
        tuple(directory.read_rounds()),
        directory.read_summary(),
        directory.read_status(),
    )


def _method(directory: RunDirectory) -> str:
    """The method by name: as the summary says, else the configuration, else the folder."""
    named = directory.read_summary().get("method")
    if isinstance(named, str) and named:
        return named
    match = re.search(r"^method:[ \t]*['\"]?([\w.+-]+)", directory.read_config(), re.MULTILINE)
    return match[1] if match else directory.path.resolve().name


def _unused(name: str, runs: Sequence[Run]) -> str:
    taken = {run.name for run in runs}
    candidates = (name, *(f"{name} ({count})" for count in range(2, len(runs) + 3)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _row(run: Run) -> dict[str, Any]:
    accuracies = dict(zip(*run.series("accuracy"), strict=True))
    validation = dict(zip(*run.series("validation_accuracy"), strict=True))
    balanced = run.series("balanced_accuracy")[1]
    last = accuracies[max(accuracies)] if accuracies else None
    personalised = run.personalised("test")
    if not accuracies and personalised:
        validation = {index: figures["mean"] for index, figures in run.personalised("validation")}
        accuracies = {index: figures["mean"] for index, figures in personalised}
    prompts = run.series("num_prompts")[1]
    best = max(validation, key=lambda index: (validation[index], -index)) if validation else None
    digest = run.summary.get("state_sha256")
    return {
        "name": run.name,
        "state": run.status.get("state"),
        "rounds": max((record["round"] for record in run.records), default=0),
        "accuracy": last,
        "best_round": best,
        "best_accuracy": accuracies.get(best) if best is not None else None,
        "balanced_accuracy": balanced[-1] if balanced else None,
        "personalised": personalised[-1][1] if personalised else None,
        "prompts": int(prompts[-1]) if prompts else None,
        "mb_up": sum(run.series("bytes_up")[1]) / MEGABYTE,
        "mb_down": sum(run.series("bytes_down")[1]) / MEGABYTE,
        "seconds": sum(sum(run.seconds(phase)) for phase in PHASES),
        "state_sha256": digest if isinstance(digest, str) else None,
    }


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    best = percent(row["best_accuracy"])
    if row["best_round"] is not None:
        best += f" ({row['best_round']})"
    return (
        row["name"],
        percent(row["accuracy"]),
        best,
        "-" if row["prompts"] is None else str(row["prompts"]),
        _digits(row["mb_up"]),
        _digits(row["mb_down"]),
        f"{row['seconds']:.1f}",
        (row["state_sha256"] or "-")[:8],
    )


def _digits(value: float) -> str:
    """Two digits after the point below ten, fewer above."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def render_summary(*run_dirs: Path) -> Table:
    """The comparison table for the terminal; it fits 80 columns for names of up to 12 letters.

    Raises:
        ConfigError: a folder is no run directory.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("method", overflow="fold", min_width=6)
    for head in (
        *("test\naccuracy", "at best\nvalidation", "prompts\nkept", "MB\nup", "MB\ndown"),
        *("seconds", "state\nSHA-256"),
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for index, row in enumerate(comparison_table(run_dirs)):
        style = "bold" if index == 0 else ""
        table.add_row(*(Text(cell) for cell in _cells(row)), style=style)
    return table


def make_figures(run_dir: Path) -> list[Path]:
    """Draw the figures of a run, with its comparison runs, into `RUN_DIR/figures/`.

    Returns:
        The files written; a figure without data is left out.

    Raises:
        ConfigError: the folder is no run directory.
    """
    runs = read_runs([run_dir])
    return list(_write_figures(runs, runs[0].directory).values())


def _write_figures(runs: Sequence[Run], directory: RunDirectory) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for name, figure in _figures(runs).items():
        directory.figures_folder.mkdir(parents=True, exist_ok=True)
        paths[name] = directory.figures_folder / f"{name}.png"
        atomic_write(paths[name], _png(figure))
    return paths


def _figures(runs: Sequence[Run]) -> dict[str, Figure]:
    """All figures that have data, by name; the heat map is of the first run with a partition."""
    drawn: dict[str, Figure] = {}
    if any(run.series("accuracy")[0] for run in runs):
        drawn["accuracy"] = accuracy_figure(runs)
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
    with_validation = len(runs) <= MOST_DASHED
    splits = "solid: test split, dashed: validation split" if with_validation else "test split"
    figure, axes = _canvas("Accuracy of the global model", splits)
    labels = []
    for index, run in _back_to_front(runs):
        colour = COLOURS[index % len(COLOURS)]
        if with_validation:
            rounds, values = run.series("validation_accuracy")
            axes.plot(rounds, _percents(values), "--", color=colour, linewidth=1.0, alpha=0.55)
        rounds, values = run.series("accuracy")
        if rounds:
            _plot_line(axes, rounds, _percents(values), index)
            labels.append((100 * values[-1], f"{run.name}  {percent(values[-1])}", colour))
    axes.set_ylabel("accuracy (%)")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), 100 if high > 90 else high)
    _finish_rounds(axes, runs, labels)
    return figure


def prompts_figure(runs: Sequence[Run]) -> Figure:
    """Number of summarizing prompts that the server holds after each round, one colour a run."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _canvas("Summarizing prompts on the server", "number held after each round")
    labels = []
    for index, run in _back_to_front(runs):
        colour = COLOURS[index % len(COLOURS)]
        rounds, values = run.series("num_prompts")
        if rounds:
            _plot_line(axes, rounds, values, index)
            labels.append((values[-1], f"{run.name}  {values[-1]:.0f}", colour))
    axes.set_ylabel("prompts")
    top = max(axes.get_ylim()[1], 1.0)
    axes.set_ylim(-0.03 * top, 1.05 * top)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    _finish_rounds(axes, runs, labels)
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
    _index_ticks(axes, "x", [str(client) for client in range(clients)], limit=30)
    _index_ticks(axes, "y", [_shorten(name, 18) for name in partition.class_names], limit=45)
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
    size = f"{clients} clients, {classes} classes, {int(counts.sum()):,} training samples"
    totals.set_title(
        f"Who holds what: {size}", loc="left", fontsize=12, fontweight="bold", color=INK, pad=12
    )
    return figure


def seconds_figure(runs: Sequence[Run]) -> Figure:
    """Seconds of each phase of each round, stacked; one panel a run on a common scale."""
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
        base = np.zeros(len(rounds))
        width = 0.8 if len(rounds) <= 40 else 1.0
        for phase in PHASES:
            height = np.array(run.seconds(phase))
            colour = PHASE_COLOURS[phase]
            axes.bar(rounds, height, width, bottom=base, color=colour, label=phase, linewidth=0)
            base += height
        axes.set_title(
            f"{_shorten(run.name, 30)}  ·  {base.sum():.0f} s", fontsize=9.5, loc="left", color=INK
        )
        axes.set_xlabel("round", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        _style(axes)
        axes.grid(axis="x", visible=False)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel("seconds per round", color=INK)
    handles, names = panels[0].get_legend_handles_labels()
    figure.suptitle(
        "Where the time goes", x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK
    )
    figure.legend(
        handles,
        names,
        loc="outside upper right",
        ncols=3,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
    return figure


def aggregation_figure(runs: Sequence[Run]) -> Figure:
    """What the aggregator did in each round: one row of panels a run whose diagnostics tell it.

    Left: stacked bars of the prompts that go on (kept, born), below zero those pruned, and points
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
        counts.set_title(_shorten(run.name, 30), fontsize=9.5, loc="left", color=INK)
        for axes, (name, label) in zip(others, MATCH_FIGURES.items(), strict=True):
            _plot_line(axes, rounds, values[name], 0)
            axes.set_title(label, fontsize=9.5, loc="left", color=INK)
            # Entropy on the whole scale: a change far below log 2 is none.
            top = max(np.nan_to_num(values[name]).max(), math.log(2))
            axes.set_ylim(-0.03 * top, 1.1 * top)
        for axes in (counts, *others):
            _style_rounds(axes, rounds)
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


def _style_rounds(axes: Axes, rounds: Sequence[int]) -> None:
    """A panel over rounds, wide enough for bars at both ends."""
    from matplotlib.ticker import MaxNLocator

    _style(axes)
    axes.set_xlim(min(rounds) - 0.6, max(rounds) + 0.6)
    axes.set_xlabel("round", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _canvas(title: str, subtitle: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.4), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=24)
    axes.annotate(
        subtitle,
        (0, 1),
        (0, 9),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=9,
        color=MUTED,
    )
    _style(axes)
    return figure, axes


def _style(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, length=0, labelsize=8.5)
    axes.tick_params(axis="x", length=3)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.label.set_color(INK)


def _back_to_front(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    """The runs with their indices, the first one last so that it is drawn on top."""
    return list(enumerate(runs))[::-1]


def _plot_line(axes: Axes, rounds: Sequence[int], values: Sequence[float], index: int) -> None:
    """The line of run `index`; the first is the thickest, markers tell repeated colours apart."""
    cycle, place = divmod(index, len(COLOURS))
    axes.plot(
        rounds,
        values,
        "-" + "os^D"[cycle % 4],
        color=COLOURS[place],
        linewidth=2.4 if index == 0 else 1.5,
        markersize=4.0 if len(rounds) <= 40 else 0.0,
        markeredgecolor="white",
        markeredgewidth=0.6,
        clip_on=False,
        zorder=3,
    )


def _finish_rounds(
    axes: Axes, runs: Sequence[Run], labels: Sequence[tuple[float, str, str]]
) -> None:
    """The axis of rounds, and each line's name at its end instead of a legend far away."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    rounds = [record["round"] for run in runs for record in run.records]
    axes.set_xlim(min(rounds), max(max(rounds), min(rounds) + 1))
    axes.margins(x=0)
    low, high = axes.get_ylim()
    ordered = sorted(labels)
    heights = spread([(value - low) / (high - low) for value, _, _ in ordered], gap=0.062)
    for (_, text, colour), y in zip(ordered, heights, strict=True):
        axes.annotate(
            _shorten(text, 42),
            (1.0, y),
            (8, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            color=colour,
            fontsize=9,
            fontweight="bold",
            va="center",
        )


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Ascending positions moved apart to a distance of at least `gap`, groups about their means.

    >>> spread([0.5, 0.5, 0.9], gap=0.25)
    [0.375, 0.625, 0.9]
    """
    groups: list[tuple[float, list[float]]] = []  # (lowest position, members)
    for position in positions:
        members = [position]
        start = position
        while groups and groups[-1][0] + len(groups[-1][1]) * gap > start:
            members = groups.pop()[1] + members
            start = sum(members) / len(members) - gap * (len(members) - 1) / 2
        groups.append((start, members))
    return [start + gap * index for start, members in groups for index in range(len(members))]


def _write_counts(axes: Axes, counts: Any, largest: float) -> None:
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


def _draw_totals(axes: Axes, counts: Any) -> None:
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


def _index_ticks(axes: Axes, axis: str, names: Sequence[str], limit: int) -> None:
    """Names in the middle of the cells; at most about `limit` of them."""
    step = math.ceil(len(names) / limit)
    step = next(nice for nice in (1, 2, 5, 10, 20, 50, 100, 200, 500, step) if nice >= step)
    positions = range(0, len(names), step)
    set_ticks = axes.set_xticks if axis == "x" else axes.set_yticks
    set_ticks([index + 0.5 for index in positions], [names[index] for index in positions])


def _percents(values: Iterable[float]) -> list[float]:
    return [100 * value for value in values]


def _shorten(text: str, length: int) -> str:
    # A dollar sign would start a formula.
    text = text.replace("$", r"\$")
    return text if len(text) <= length else text[: length - 1] + "…"


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)  # becomes the figure's canvas
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


_STYLE_SHEET = """
:root { --ink: #1f2933; --muted: #66727f; --line: #e4e7eb; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.2rem 0 .8rem; font-size: 1.15rem; }
.muted { color: var(--muted); }
.cards { display: grid; gap: .8rem; margin-top: 1.4rem;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.card, figure, .table, details { background: #fff; border: 1px solid var(--line);
  border-radius: 10px; }
.card { padding: .8rem 1rem; } .card b { display: block; font-size: 1.45rem; }
.card span { color: var(--muted); font-size: .85rem; }
figure { margin: 0 0 1rem; padding: 1rem; } img { display: block; max-width: 100%; margin: 0 auto; }
figcaption { margin-top: .8rem; color: var(--muted); font-size: .85rem; }
.table { overflow-x: auto; } table { width: 100%; border-collapse: collapse; }
th, td { padding: .5rem .9rem; text-align: right; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-size: .8rem; font-weight: 600; }
td { border-top: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tbody.lead tr:first-child td { font-weight: 600; }
details { margin-bottom: .8rem; padding: .7rem 1rem; overflow-x: auto; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: .6rem 0 0; font: 13px/1.45 ui-monospace, monospace; overflow-x: auto; }
.warning { border-left: 4px solid #d55e00; padding: .5rem 1rem; margin-top: 1rem;
  background: #fff; }
"""

_CAPTIONS = {
    "accuracy": "Accuracy of the global model over rounds, by method.",
    "prompts": "Number of summarizing prompts that the server holds, by method.",
    "aggregation": "What the aggregation did with the prompts in each round.",
    "clients": "Training samples of each class that each client holds.",
    "seconds": "Seconds that each round spends in training, aggregation and evaluation.",
}
_HOW_TO_READ = {
    "aggregation": "Kept and born prompts are what the server holds next, pruned ones (below zero) "
    "are gone, merges happened on the way; a matched distance near 1 is what the noise explains, "
    "an inclusion entropy near 0 means that nearly all clients or nearly none use a prompt.",
}


def make_html(run_dir: Path) -> Path:
    """Write `RUN_DIR/report.html`, one page that needs no other file and no network.

    Raises:
        ConfigError: the folder is no run directory.
    """
    return make_report([run_dir])


def make_report(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write one page about one or several runs and their comparison runs.

    The figures of a single run are written to its `figures/` as well.

    Args:
        run_dirs: run directories; the first one leads.
        output: the page; `report.html` of the first run by default.

    Returns:
        The page.

    Raises:
        ConfigError: a folder is no run directory, or the page cannot be written.
    """
    runs = read_runs(run_dirs)
    page = output or runs[0].directory.report_path
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        if len(run_dirs) == 1:
            paths = _write_figures(runs, runs[0].directory)
            pictures = {name: path.read_bytes() for name, path in paths.items()}
        else:
            pictures = {name: _png(figure) for name, figure in _figures(runs).items()}
        atomic_write(page, _page(runs, pictures))
    except OSError as error:
        raise ConfigError(
            f"report {page}: expected a file that can be written, got '{error.strerror or error}'; "
            "choose another output"
        ) from error
    return page


def _page(runs: Sequence[Run], pictures: Mapping[str, bytes]) -> str:
    main = runs[0]
    name = main.directory.path.resolve().name
    manifest = main.directory.read_manifest()
    versions = manifest.get("packages")
    version = versions.get("fedprompt") if isinstance(versions, dict) else None
    facts = [main.status.get("state"), manifest.get("date"), version and f"fedprompt {version}"]
    sections = [
        f"<h1>{_escape(name)}</h1>",
        f"<div class=muted>{_escape('  ·  '.join(str(fact) for fact in facts if fact))}</div>",
        _warning_html(main),
        _cards_html(_row(main)),
        "<h2>Methods</h2>",
        _summary_html(runs),
        "<h2>Figures</h2>",
        *(_picture_html(key, data) for key, data in pictures.items()),
        "<h2>Details</h2>",
        *map(_details_html, runs),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is loaded and nothing runs, even if a name were to slip through unescaped.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{_escape(name)} · fedprompt</title>\n<style>{_STYLE_SHEET}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(filter(None, sections))}\n</main>\n</body>\n</html>\n"
    )


def _escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def _warning_html(run: Run) -> str:
    """One line when the run did not come to its end, or refused updates."""
    lines = []
    if run.status.get("state") in ("failed", "interrupted"):
        lines.append(f"The run {run.status['state']}: {run.status.get('message') or 'no message'}")
    refused = sum(len(record.get("quarantined") or ()) for record in run.records)
    if refused:
        lines.append(f"{refused} client updates were refused; rounds.jsonl names each and why")
    return "".join(f'<div class="warning">{_escape(line)}</div>' for line in lines)


def _cards_html(row: Mapping[str, Any]) -> str:
    best = "" if row["best_round"] is None else f", round {row['best_round']}"
    cards = (
        (percent(row["accuracy"]), "test accuracy, last round"),
        (percent(row["best_accuracy"]), f"test accuracy at best validation{best}"),
        ("-" if row["prompts"] is None else row["prompts"], "summarizing prompts kept"),
        (f"{_digits(row['mb_up'])} MB", f"sent up, {_digits(row['mb_down'])} MB down"),
        (f"{row['seconds']:.1f} s", "in rounds"),
    )
    inner = "".join(
        f'<div class="card"><b>{_escape(value)}</b><span>{_escape(what)}</span></div>'
        for value, what in cards
    )
    return f'<div class="cards">{inner}</div>'


def _summary_html(runs: Sequence[Run]) -> str:
    heads = (
        *("method", "test accuracy", "at best validation (round)", "prompts kept"),
        *("MB up", "MB down", "seconds", "state SHA-256", "clients' own models (worst tenth)"),
    )
    return _table_html(heads, [_html_cells(_row(run)) for run in runs], lead=True)


def _html_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    own = row["personalised"] or {}
    clients = f"{percent(own.get('mean'))} ({percent(own.get('worst_tenth'))})" if own else "-"
    return (*_cells(row), clients)


def _table_html(heads: Sequence[str], rows: Iterable[Sequence[object]], lead: bool = False) -> str:
    def line(tag: str, cells: Iterable[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line("td", cells) for cells in rows)
    kind = ' class="lead"' if lead else ""
    return (
        f'<div class="table"><table><thead>{line("th", heads)}</thead>\n'
        f"<tbody{kind}>{body}</tbody></table></div>"
    )


def _picture_html(name: str, data: bytes) -> str:
    encoded = base64.b64encode(data).decode("ascii")
    caption = _escape(_CAPTIONS.get(name, name))
    reading = _HOW_TO_READ.get(name)
    below = f"<figcaption>{_escape(reading)}</figcaption>" if reading else ""
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{encoded}">{below}</figure>'


def _details_html(run: Run) -> str:
    columns: tuple[tuple[str, Callable[[Mapping[str, Any]], object]], ...] = (
        ("round", lambda record: record["round"]),
        ("test accuracy", lambda record: percent(record.get("accuracy"))),
        ("validation", lambda record: percent(record.get("validation_accuracy"))),
        ("loss", lambda record: number(record.get("loss"))),
        ("train loss", lambda record: number(record.get("train_loss"))),
        ("prompts", lambda record: record.get("num_prompts", "-")),
        ("clients", lambda record: len(record.get("clients") or ())),
        ("seconds", lambda record: _digits(sum((record.get("seconds") or {}).values()))),
    )
    rows = [[read(record) for _, read in columns] for record in run.records]
    rounds = _table_html([head for head, _ in columns], rows)
    config = run.directory.read_config()
    shown = f"<pre>{_escape(config)}</pre>" if config else "<p class=muted>no config.yaml</p>"
    name = _escape(run.name)
    return (
        f"<details><summary>{name}: rounds</summary>{rounds}</details>\n"
        f"<details><summary>{name}: configuration</summary>{shown}</details>"
    )
