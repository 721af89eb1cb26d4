"""Draw docs/images/performance.png from the case `phases` of the committed JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.harness import IMAGES, RESULTS, read_json

PHASES = (
    *("decode and resize", "embed", "query", "blocks forward", "backward", "head and loss"),
    *("optimizer", "rest"),
)
COLOURS = ("#CC79A7", "#E69F00", "#F0E442", "#0072B2", "#8CC5E3", "#882255", "#009E73", "#BBBBBB")
NAMES = {
    "naive": "naive procedure",
    "trainer": "cached, a new Trainer\nfor each client",
    "fedprompt": "fedprompt",
}


def main() -> None:
    """Read the JSON, draw stacked bars."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "speed.json")
    parser.add_argument("--output", type=Path, default=IMAGES / "performance.png")
    arguments = parser.parse_args()
    case = read_json(arguments.results)["cases"]["phases"]
    sides = case["cpu_milliseconds_per_image"]
    figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
    for row, name in enumerate(reversed(NAMES)):
        left = 0.0
        for phase, colour in zip(PHASES, COLOURS, strict=True):
            value = max(sides[name].get(phase, 0.0), 0.0)
            label = phase if row == len(NAMES) - 1 else None
            axes.barh(row, value, left=left, color=colour, label=label)
            left += value
        axes.text(left, row, f" {sides[name]['whole']:.2f}", va="center")
    axes.set_yticks(range(len(NAMES)), list(reversed(NAMES.values())))
    axes.set_xlabel("CPU milliseconds for each training image")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.28), frameon=False)
    figure.savefig(arguments.output, dpi=150)


if __name__ == "__main__":
    main()
