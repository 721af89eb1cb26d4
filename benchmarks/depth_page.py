"""The tables and the picture of docs/depth.md, from the committed JSON.

python -m benchmarks.depth_page
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from benchmarks.depth import DEPTHS, METHODS, NETWORKS, RESULT, SEEDS
from benchmarks.harness import (
    DOCS,
    IMAGES,
    Json,
    half_up,
    mean_and_half,
    paired,
    put_between,
    read_json,
)
from benchmarks.methods.text import difference, percent, table
from fedprompt.report.style import COLOURS, INK, MUTED, style_axes

TITLES = {
    "nano": "`nano`, 32 pixels",
    "dinov2_s14": "DINOv2 ViT-S/14, 98 pixels",
    "vit_b16": "ViT-B/16, 224 pixels",
}
NAMES = {"pfpt": "PFPT", "fedavg_pt": "FedAvg-PT"}
TASKS = {"domains": "`domains`, `nano_promptable`", "emoji": "`emoji`, DINOv2 ViT-S/14"}


def tables(cases: Json) -> dict[str, str]:
    """By the name of their marks.

    Args:
        cases: of depth.json.
    """
    found = {"cost of a step": list(steps(cases))}
    found["accuracy by depth"] = list(accuracies(cases))
    return {name: "\n".join(lines) for name, lines in found.items()}


def steps(cases: Json) -> Iterator[str]:
    """Time and memory of a step, network by network."""
    rows = []
    for network, (_, _, depths, _) in NETWORKS.items():
        whole = cases[f"step/{network}/0"]
        for depth in depths:
            case = cases[f"step/{network}/{depth}"]
            share = case["milliseconds"] / whole["milliseconds"]
            rows.append(
                [
                    f"{TITLES[network]}, {case['tokens']} tokens" if not depth else "",
                    str(depth),
                    f"{case['milliseconds']:,.0f}"
                    if share > 1 / 9 or not depth
                    else f"{case['milliseconds']:,.1f}",
                    f"{100 * share:.0f} %",
                    f"{100 * case['gflop'] / whole['gflop']:.0f} %",
                    f"{case['arithmetic_mb']:,.1f}",
                    f"{case['peak_mb']:,.0f}",
                    f"{case['glibc_mb']:,.0f}",
                ]
            )
    yield from table(
        [
            *("network", "depth", "ms", "of depth 0", "by arithmetic"),
            *("kept for backward (MB)", "peak (MB)", "with glibc (MB)"),
        ],
        rows,
    )


def runs(cases: Json, task: str, method: str, depth: int) -> dict[int, float]:
    """The test accuracies by seed, as far as they are there."""
    names = {seed: f"run/{task}/{method}/{depth}/{seed}" for seed in SEEDS[task]}
    return {seed: cases[name]["accuracy"] for seed, name in names.items() if name in cases}


def accuracies(cases: Json) -> Iterator[str]:
    """Accuracy of a federation, paired differences, and what an image takes in the cache."""
    rows = []
    for task in DEPTHS:
        done = [d for d in DEPTHS[task] if all(runs(cases, task, method, d) for method in METHODS)]
        for depth in done:
            cells = [str(depth), str(len(runs(cases, task, METHODS[0], depth)))]
            for method in METHODS:
                own = runs(cases, task, method, depth)
                gain = paired(own, runs(cases, task, method, done[0]))
                cells.append(percent(*mean_and_half(list(own.values()))))
                cells.append("" if depth == done[0] else without_p(difference(gain)))
            about = cases[f"cache/{task}/{depth}"]
            bare = percent(about["accuracy_without_prompts"])
            size = half_up(about["bytes_of_an_image"] / 1000, ".1")
            rows.append([TASKS[task] if depth == done[0] else "", *cells, bare, size])
    against = "against the first row"
    methods = [cell for method in METHODS for cell in (NAMES[method], against)]
    ends = ("without prompts", "kB of an image in the cache")
    yield from table(["task", "depth", "seeds", *methods, *ends], rows)


def without_p(text: str) -> str:
    """A difference as `benchmarks.methods.text` writes it, without its p-value.

    >>> without_p("+1.2 ± 0.3 (p 0.002)")
    '+1.2 ± 0.3'
    """
    return text.partition(" (p")[0]


def draw(cases: Json, path: Path) -> None:
    """Memory, time and accuracy against the depth of the prompts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 3.6), dpi=140, facecolor="white", layout="constrained")
    memory, time, accuracy = figure.subplots(1, 3)
    for axes, title in (
        (memory, "Peak memory of a step, ViT-B/16 (MB)"),
        (time, "Time of a step, share of depth 0"),
        (accuracy, "Test accuracy (%) on domains"),
    ):
        style_axes(axes)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        axes.set_xlabel("depth of the prompts", color=INK)
    depths = NETWORKS["vit_b16"][2]
    found = [cases[f"step/vit_b16/{depth}"] for depth in depths]
    memory.plot(depths, [each["peak_mb"] for each in found], "o-", color=COLOURS[0], label="peak")
    kept = [each["arithmetic_mb"] for each in found]
    memory.plot(depths, kept, "s--", color=COLOURS[1], label="kept for backward, by arithmetic")
    for number, (network, (_, _, all_depths, _)) in enumerate(NETWORKS.items()):
        blocks = {"nano": 5}.get(network, 12)
        own = [cases[f"step/{network}/{depth}"]["milliseconds"] for depth in all_depths]
        name = TITLES[network].replace("`", "")
        places = [depth / blocks for depth in all_depths]
        time.plot(places, [each / own[0] for each in own], "o-", color=COLOURS[number], label=name)
    time.set_xlabel("depth of the prompts, share of the blocks", color=INK)
    for number, method in enumerate(METHODS):
        found = [runs(cases, "domains", method, depth) for depth in DEPTHS["domains"]]
        lines = [mean_and_half(list(each.values())) for each in found]
        means = [100 * mean for mean, _ in lines]
        halves = [0.0 if math.isnan(half) else 100 * half for _, half in lines]
        accuracy.errorbar(
            DEPTHS["domains"],
            means,
            halves,
            fmt="o-",
            capsize=3,
            color=COLOURS[number],
            label=NAMES[method],
        )
    bare = 100 * cases["cache/domains/0"]["accuracy_without_prompts"]
    accuracy.axhline(bare, color=MUTED, linestyle=":", label="frozen head without prompts")
    accuracy.set_xticks(DEPTHS["domains"])
    for axes in (memory, time):
        axes.set_ylim(bottom=0)
    for axes in (memory, time, accuracy):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    """Read the JSON, fill the page, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, default=DOCS / "depth.md")
    parser.add_argument("--picture", type=Path, default=IMAGES / "depth.png")
    given = parser.parse_args()
    cases = read_json(given.results)["cases"]
    for name, text in tables(cases).items():
        put_between(given.page, name, text)
    draw(cases, given.picture)


if __name__ == "__main__":
    main()
