"""The figure of `planted.py`: small multiples, one line per method, 95 % intervals."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from benchmarks.harness import Json

INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e7eb"
# Okabe and Ito, "Color Universal Design" (2008); marks differ as well.
STYLES: dict[str, tuple[str, str, str]] = {
    "map": ("#0072B2", "o", "-"),
    "paper": ("#009E73", "^", "-"),
    "released": ("#D55E00", "v", "-"),
    "gmm": ("#CC79A7", "s", "-"),
    "kmeans": ("#E69F00", "D", "-"),
    "mean": ("#56B4E9", "X", "-"),
    "oracle": ("#000000", "", "--"),
    "genie": ("#000000", "", ":"),
}
REFERENCES = {
    "oracle": "oracle (knows the true prompts)",
    "genie": "genie (knows the others' matching)",
}
"""They know part of the answer; the second is shown where noise is what varies."""
PANELS: tuple[tuple[str, str, str, str], ...] = (
    ("noise_full", "ari", "noise / spread", "Every client has all prompts"),
    ("noise_subsets", "ari", "noise / spread", "Every client has 60 % of them"),
    ("dimension", "ari", "dimension", "Dimension"),
    ("clients", "ari", "clients", "Clients"),
    ("clients", "seconds", "clients", "Time"),
)


def draw(result: Json, path: Path) -> None:
    """Draw whatever sweeps the results hold."""
    figure = Figure(figsize=(11.5, 6.6), dpi=140, facecolor="white", layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    shown: dict[str, Line2D] = {}
    for panel, (sweep, metric, label, title) in zip(axes, PANELS, strict=False):
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        panel.set_xlabel(label, color=INK)
        panel.set_ylabel({"ari": "adjusted Rand index"}.get(metric, metric), color=INK)
        panel.grid(color=GRID, linewidth=0.8)
        panel.tick_params(which="both", colors=MUTED, labelsize=8, length=0)
        panel.spines[:].set_visible(False)
        panel.set_xscale("log")
        cases = result.get("sweeps", {}).get(sweep, {}).get("cases", [])
        for method, style in STYLES.items():
            if method in REFERENCES and metric == "seconds":
                continue
            if method == "genie" and not sweep.startswith("noise"):
                continue
            line = _line(panel, cases, method, metric, style)
            if line is not None:
                shown.setdefault(method, line)
        if metric == "seconds":
            panel.set_yscale("log")
        else:
            panel.set_ylim(-0.05, 1.05)
        ticks = _ticks([case["value"] for case in cases])
        if ticks:
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.xaxis.set_minor_formatter(NullFormatter())
    axes[-1].set_axis_off()
    order = [method for method in STYLES if method in shown]
    if order:
        axes[-1].legend(
            [shown[method] for method in order],
            [REFERENCES.get(method, method) for method in order],
            loc="upper left",
            frameon=False,
            title="mean over seeds, 95 % interval",
            alignment="left",
        )
    base = "10 clients, 20 prompts, d = 64, noise / spread = 0.5, unless the axis says otherwise"
    figure.suptitle(f"Planted correspondences: {base}", x=0.01, ha="left", fontsize=11, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and the version of matplotlib, equal results give an equal file.
    figure.savefig(path, metadata={"Software": None})


def _line(
    panel: Axes, cases: list[Json], method: str, metric: str, style: tuple[str, str, str]
) -> Line2D | None:
    """One method in one panel; None if nothing was measured."""
    points = [
        (case["value"], case["methods"][method][metric])
        for case in cases
        if metric in case["methods"].get(method, {})
    ]
    if not points:
        return None
    colour, marker, dashes = style
    values = [value for value, _ in points]
    means = [each["mean"] for _, each in points]
    half = [each["ci95"] or 0.0 for _, each in points]
    low = [mean - width for mean, width in zip(means, half, strict=True)]
    if metric == "seconds":  # on a log axis
        low = [max(each, 0.3 * mean) for each, mean in zip(low, means, strict=True)]
    high = [mean + width for mean, width in zip(means, half, strict=True)]
    front = 3 if method == "map" or method in REFERENCES else 2
    panel.fill_between(values, low, high, color=colour, alpha=0.15, linewidth=0, zorder=front)
    line: Line2D = panel.plot(
        values,
        means,
        dashes,
        color=colour,
        marker=marker,
        markersize=4.5,
        linewidth=1.6,
        zorder=front + (1 if method in REFERENCES else 0),
    )[0]
    return line


def _ticks(values: list[float]) -> list[float]:
    """Every second value where there are many."""
    return values if len(values) <= 7 else values[::2]
