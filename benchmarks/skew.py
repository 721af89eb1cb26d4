"""How accuracy falls with skew: the picture and the table, from six finished sweeps.

fedprompt sweep skew_alpha --dir DIR/domains-skew_alpha     # also skew_share, skew_prompts; and
fedprompt sweep skew_alpha sweep.experiment=mixed --dir DIR/mixed-skew_alpha    # the same three
python -m benchmarks.skew --sweeps DIR   # into benchmarks/results/skew.json
python -m benchmarks.skew                   # page and picture from that file
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import (
    DOCS,
    IMAGES,
    RESULTS,
    Json,
    header,
    put_between,
    read_json,
    write_json,
)
from benchmarks.methods.text import percent, table
from fedprompt.core.intervals import share_interval
from fedprompt.report.style import COLOURS, INK, style_axes
from fedprompt.runs.directory import RunDirectory

TASKS = {"domains": "domains (drawn)", "mixed": "mixed (real)"}
AXES = {
    "skew_alpha": ("partition.alpha", "Dirichlet α"),
    "skew_share": ("partition.dominant_share", "dominant share"),
    "skew_prompts": ("prompts.count", "prompts of a client"),
}
METHODS = {"pfpt": "PFPT", "fedavg_pt": "FedAvg-PT", "head_only": "head only"}
OUTPUT = RESULTS / "skew.json"


def read_sweep(folder: Path) -> Json:
    """What the figures need of a finished sweep.

    Args:
        folder: of the sweep.

    Raises:
        SystemExit: it is not finished.
    """
    found = read_json(folder / "table.json")
    if not found or any(cell["missing"] for cell in found["cells"]):
        raise SystemExit(
            f"{folder}: expected a finished sweep, got one with trials missing; "
            f"go on with fedprompt sweep --resume {folder}"
        )
    key = AXES[folder.name.split("-", 1)[1]][0]
    cells = [
        {
            "method": cell["values"]["method"],
            "value": cell["values"][key],
            "seeds": cell["seeds"],
            "accuracy": cell["accuracy"],
            "prompts": cell["prompts"]["mean"],
        }
        for cell in found["cells"]
    ]
    runs = [
        RunDirectory.open(folder / path) for cell in found["cells"] for path in cell["run_dirs"]
    ]
    seconds = sum(run.read_summary()["seconds"] for run in runs)
    return {"key": key, "cells": cells, "hours_of_rounds": round(seconds / 3600, 2)}


def curves(sweep: Json) -> dict[str, list[Json]]:
    """The cells of each method, by rising value."""
    return {
        method: sorted(
            (cell for cell in sweep["cells"] if cell["method"] == method),
            key=lambda cell: float(cell["value"]),
        )
        for method in METHODS
    }


def panel(axes: Axes, sweep: Json, axis: str) -> None:
    """The lines of one sweep; the bars are 95 % intervals on the logit scale.

    Args:
        axes: empty.
        sweep: as `read_sweep` made it.
        axis: key of `AXES`.
    """
    for index, (method, cells) in enumerate(curves(sweep).items()):
        if not cells:
            continue
        means = [cell["accuracy"]["mean"] for cell in cells]
        ends = [
            share_interval(each["accuracy"]["mean"], each["accuracy"]["half_width"])
            for each in cells
        ]
        below = [
            0.0 if end is None else mean - end[0] for mean, end in zip(means, ends, strict=True)
        ]
        above = [
            0.0 if end is None else end[1] - mean for mean, end in zip(means, ends, strict=True)
        ]
        # A little apart, so that no bar hides another.
        shift = 1 + 0.03 * (index - 1) if axis != "skew_share" else 1.0
        axes.errorbar(
            [float(cell["value"]) * shift for cell in cells],
            [100 * mean for mean in means],
            [[100 * each for each in below], [100 * each for each in above]],
            color=COLOURS[index],
            marker="o",
            markersize=4,
            linewidth=1.5,
            elinewidth=1,
            label=METHODS[method],
        )
    style_axes(axes)
    axes.set_xlabel(AXES[axis][1], color=INK)
    if axis != "skew_share":
        values = sorted({float(cell["value"]) for cell in sweep["cells"]})
        axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()


def draw(sweeps: Mapping[str, Json], path: Path) -> None:
    """A row for each task, a column for each kind of skew.

    Args:
        sweeps: by `TASK-SWEEP`.
        path: of the PNG.
    """
    figure = Figure(figsize=(11, 6.4), dpi=140, facecolor="white")
    grid = figure.subplots(len(TASKS), len(AXES), squeeze=False, sharey="row")
    for row, (task, title) in zip(grid, TASKS.items(), strict=True):
        for axes, axis in zip(row, AXES, strict=True):
            panel(axes, sweeps[f"{task}-{axis}"], axis)
        row[0].set_title(title, loc="left", fontsize=11, color=INK)
        row[0].set_ylabel("test accuracy (%)", color=INK)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path)


def text_of(sweeps: Mapping[str, Json]) -> str:
    """A table for each kind of skew."""
    parts = []
    for axis, (_, words) in AXES.items():
        values = sorted({float(cell["value"]) for cell in sweeps[f"domains-{axis}"]["cells"]})
        lines = []
        for task in TASKS:
            for method, cells in curves(sweeps[f"{task}-{axis}"]).items():
                means = [
                    percent(cell["accuracy"]["mean"], cell["accuracy"]["half_width"] or math.nan)
                    for cell in cells
                ]
                if means:
                    lines.append([f"`{task}`", METHODS[method], *means])
        parts.append("\n".join(table((words, "", *(f"{value:g}" for value in values)), lines)))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweeps", type=Path, help="folder of the six sweeps, to read them anew")
    parser.add_argument("--page", type=Path, default=DOCS / "benchmark.md")
    parser.add_argument("--picture", type=Path, default=IMAGES / "skew.png")
    arguments = parser.parse_args()
    if arguments.sweeps is not None:
        found = {
            f"{task}-{axis}": read_sweep(arguments.sweeps / f"{task}-{axis}")
            for task in TASKS
            for axis in AXES
        }
        write_json(OUTPUT, {**header("skew"), "sweeps": found})
    sweeps = read_json(OUTPUT)["sweeps"]
    put_between(arguments.page, "skew", text_of(sweeps))
    draw(sweeps, arguments.picture)


if __name__ == "__main__":
    main()
