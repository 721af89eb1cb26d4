"""Tables and figures of the methods benchmark, from the files that runner.py wrote.

    python benchmarks/methods/tables.py [--results benchmarks/results/methods]
                                        [--tables docs/benchmark-tables.md] [--images docs/images]
                                        [--page docs/benchmark.md]
                                        [--bounds benchmarks/results/methods_bounds.json]

Mean and 95 % interval (Student's t over seeds); difference to FedAvg-PT over the seeds that both
have, with interval and two-sided p-value of the paired t test; chosen learning rates; prompts kept;
bytes; CPU seconds. Whatever is there is shown, with its number of seeds. The overview of the main
methods is written into the page as well, between two marks.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grid
import matplotlib as mpl
import numpy as np
from grid import Cell, is_defined
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

ROOT = Path(__file__).parents[2]
BASELINE = "fedavg_pt"
BEGIN, END = "<!-- overview: made by benchmarks/methods/tables.py -->", "<!-- end of overview -->"
SHOWN_SCALES = sorted({*grid.SCALES, *grid.BEYOND.values()})
Results = dict[str, dict[str, dict[int, dict[str, Any]]]]
"""setting -> method -> seed -> content of the run's file"""


def read_results(folder: Path) -> Results:
    """All reported runs that are there."""
    results: Results = {}
    for cell in grid.final_cells():
        path = folder / cell.file
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            results.setdefault(cell.setting, {}).setdefault(cell.method, {})[cell.seed] = content
    return results


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval; the latter is NaN for a single value.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * spread


def paired(
    own: Mapping[int, float], other: Mapping[int, float]
) -> tuple[float, float, float, int] | None:
    """Mean difference over common seeds, half-width of its 95 % interval, p-value, seeds.

    >>> mean, half, p, seeds = paired({0: 2.0, 1: 3.0, 2: 4.5}, {0: 1.0, 1: 1.5, 2: 2.0, 3: 9.0})
    >>> round(mean, 3), round(half, 3), round(p, 3), seeds
    (1.667, 1.897, 0.063, 3)
    """
    seeds = sorted(set(own) & set(other))
    if not seeds:
        return None
    differences = [own[seed] - other[seed] for seed in seeds]
    mean, half = interval(differences)
    p = math.nan
    if len(seeds) > 1:
        constant = float(np.std(differences)) == 0
        p = math.nan if constant else float(stats.ttest_1samp(differences, 0.0).pvalue)
    return mean, half, p, len(seeds)


def figures_of(runs: Mapping[int, dict[str, Any]], name: str) -> dict[int, float]:
    """One number of each seed; seeds whose run has none are left out."""
    over_clients = {"personalised": "mean", "worst_tenth": "worst_tenth"}
    if name in over_clients:
        key = over_clients[name]
        own = {seed: (run["personalised"] or {}).get(key) for seed, run in runs.items()}
    else:
        own = {seed: run[name] for seed, run in runs.items()}
    return {seed: float(value) for seed, value in own.items() if value is not None}


def summarise(results: Results) -> list[dict[str, Any]]:
    """One row for each setting and method."""
    rows = []
    for setting, methods in results.items():
        for method, runs in methods.items():
            row: dict[str, Any] = {"setting": setting, "method": method, "seeds": len(runs)}
            for name in (
                "accuracy",
                "best_accuracy",
                "balanced_accuracy",
                "personalised",
                "worst_tenth",
            ):
                values = figures_of(runs, name)
                if values:
                    row[name], row[f"{name}_half_width"] = interval(list(values.values()))
                base = figures_of(methods.get(BASELINE, {}), name)
                difference = paired(values, base) if method != BASELINE else None
                if difference is not None:
                    row[f"{name}_difference"] = dict(
                        zip(("mean", "half_width", "p", "seeds"), difference, strict=True)
                    )
            for name in ("prompts", "bytes_up", "bytes_down"):
                row[name] = float(np.mean([run[name] for run in runs.values()]))
            # Of one thread: what else the machine did does not count. Early files have none.
            known = [run["cpu_seconds"] for run in runs.values() if "cpu_seconds" in run]
            row["cpu_seconds"] = float(np.mean(known)) if known else math.nan
            # Over common seeds: what is lost to having the data apart, and what a
            # client gains over being alone.
            for bound, name in (("centralised", "accuracy"), ("local_only", "personalised")):
                gap = paired(figures_of(runs, name), figures_of(methods.get(bound, {}), name))
                if gap is not None and method != bound:
                    row[f"over_{bound}"] = gap[0]
            row["scale"] = ", ".join(f"{s:g}" for s in sorted({r["scale"] for r in runs.values()}))
            rows.append(row)
    return rows


def points(mean: float | None, half: float | None) -> str:
    """Percent with interval.

    >>> points(0.5, 0.0123), points(0.5, math.nan), points(None, None)
    ('50.0 ± 1.2', '50.0', '-')
    """
    if mean is None:
        return "-"
    known = half is not None and math.isfinite(half)
    return f"{100 * mean:.1f} ± {100 * (half or 0.0):.1f}" if known else f"{100 * mean:.1f}"


def difference(row: Mapping[str, Any], name: str) -> str:
    """Signed points with interval and p-value."""
    found = row.get(f"{name}_difference")
    if found is None:
        return "-"
    text = f"{100 * found['mean']:+.1f}"
    if math.isfinite(found["half_width"]):
        text += f" ± {100 * found['half_width']:.1f}"
    if math.isfinite(found["p"]):
        text += f" (p {found['p']:.3f})" if found["p"] >= 0.001 else " (p < 0.001)"
    return text


def markdown(rows: Sequence[Mapping[str, Any]], rates: Sequence[str]) -> str:
    """All tables as one page."""
    heads = (
        *("method", "seeds", "test accuracy (%)", "difference to FedAvg-PT", "at best validation"),
        *("clients' own (%)", "worst tenth", "over centralised", "own over local only"),
        *("prompts", "MB up", "MB down", "CPU s", "rates x"),
    )
    lines = [
        "# Tables of the methods benchmark",
        "",
        "Made by `benchmarks/methods/tables.py`; do not edit. Mean ± 95 % interval over seeds (t), "
        "paired differences in points.",
    ]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        lines += ["", f"## {setting}", "", "| " + " | ".join(heads) + " |"]
        lines.append("|---" * len(heads) + "|")
        for row in rows:
            if row["setting"] != setting:
                continue
            cells = (
                row["method"],
                str(row["seeds"]),
                points(row.get("accuracy"), row.get("accuracy_half_width")),
                difference(row, "accuracy"),
                points(row.get("best_accuracy"), row.get("best_accuracy_half_width")),
                points(row.get("personalised"), row.get("personalised_half_width")),
                points(row.get("worst_tenth"), None),
                *(
                    f"{100 * row[key]:+.1f}" if key in row else "-"
                    for key in ("over_centralised", "over_local_only")
                ),
                f"{row['prompts']:.0f}",
                f"{row['bytes_up'] / 1e6:.2f}",
                f"{row['bytes_down'] / 1e6:.2f}",
                f"{row['cpu_seconds']:.0f}" if math.isfinite(row["cpu_seconds"]) else "-",
                row["scale"],
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "## Choice of learning rates", "", *rates, ""])


def overview(
    rows: Sequence[Mapping[str, Any]],
    methods: Sequence[str],
    references: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """Test accuracy of some methods in all settings, and below it the difference to FedAvg-PT.

    Args:
        rows: from `summarise`.
        methods: in the order of the table.
        references: what bounds.py found for the frozen head by itself: test accuracy by name.
    """
    settings = [f"{task}/{partition}" for task in grid.TASKS for partition in grid.PARTITIONS]
    found = {(row["setting"], row["method"]): row for row in rows}
    shown = [name for name in settings if any(row["setting"] == name for row in rows)]
    lines = ["| method | " + " | ".join(name.replace("/", "<br>") for name in shown) + " |"]
    lines.append("|---" * (1 + len(shown)) + "|")
    for method in methods:
        cells = []
        for setting in shown:
            row = found.get((setting, method))
            if row is None:
                cells.append("-" if is_defined(setting, method) else "not defined")
                continue
            text = points(row.get("accuracy"), row.get("accuracy_half_width"))
            text += f" ({row['seeds']})"
            gain = difference(row, "accuracy")
            cells.append(text if gain == "-" else f"{text}<br>{gain}")
        if any(cell not in ("-", "not defined") for cell in cells):
            lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    for name, scores in (references or {}).items():
        frozen = [
            points(scores["test"], None) if setting.startswith("domains_frozen") else "-"
            for setting in shown
        ]
        lines.append(f"| the frozen head, {name} (nothing trained) | " + " | ".join(frozen) + " |")
    return "\n".join(lines)


def put_between(path: Path, text: str) -> None:
    """Replace what stands between the two marks of a page.

    Raises:
        SystemExit: the page has no marks.
    """
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{path}: expected the marks '{BEGIN}' and '{END}'; put them back")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def rate_lines(folder: Path) -> list[str]:
    """Validation accuracy of every scale that was tried."""
    lines = ["| setting | method | " + " | ".join(f"x {s:g}" for s in SHOWN_SCALES) + " |"]
    lines.append("|---" * (2 + len(SHOWN_SCALES)) + "|")
    cells = grid.rate_cells(grid.final_cells())
    for cell in dict.fromkeys((cell.setting, cell.method) for cell in cells):
        shown = []
        for scale in SHOWN_SCALES:
            path = folder / Cell(*cell, grid.RATE_SEED, scale).file
            value = None
            if path.is_file():
                value = json.loads(path.read_text(encoding="utf-8"))["validation_accuracy"]
            shown.append("-" if value is None else f"{100 * value:.1f}")
        if set(shown) != {"-"}:
            lines.append(f"| {cell[0]} | {cell[1]} | " + " | ".join(shown) + " |")
    return lines


# Figures


def accuracy_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Difference to FedAvg-PT of the main methods, one panel for each task that has any."""
    compared = [row["setting"] for row in rows if "accuracy_difference" in row]
    tasks = [task for task in grid.TASKS if any(name.startswith(task) for name in compared)]
    figure = Figure(figsize=(4.2 * max(1, len(tasks)), 4.2), layout="constrained")
    axes = figure.subplots(1, max(1, len(tasks)), sharey=True, squeeze=False)[0]
    methods = [method for method in grid.MAIN if method != BASELINE]
    for axis, task in zip(axes, tasks, strict=False):
        for shift, partition in enumerate(grid.PARTITIONS):
            found = {r["method"]: r for r in rows if r["setting"] == f"{task}/{partition}"}
            for place, method in enumerate(methods):
                gain = found.get(method, {}).get("accuracy_difference")
                if gain is None:
                    continue
                half = gain["half_width"] if math.isfinite(gain["half_width"]) else 0.0
                axis.errorbar(
                    100 * gain["mean"],
                    place + 0.2 * (shift - 1),
                    xerr=100 * half,
                    fmt="o",
                    markersize=4,
                    color=f"C{shift}",
                    # Hollow: one seed, of which no interval is known.
                    markerfacecolor="white" if gain["seeds"] < 2 else f"C{shift}",
                )
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(task)
        axis.set_xlabel("points over FedAvg-PT")
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    colours = [f"C{shift}" for shift in range(len(grid.PARTITIONS))]
    marks = [Line2D([], [], color=colour, marker="o", linestyle="") for colour in colours]
    axes[0].legend(marks, list(grid.PARTITIONS), frameon=False, fontsize=8)
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
                curves = np.array([run["curves"]["num_prompts"] for run in runs.values()])
                axis.plot(range(1, curves.shape[1] + 1), curves.mean(axis=0), label=partition)
        axis.set_title(task)
        axis.set_xlabel("round")
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("prompts in the pool")
    return figure


def path_figure(folder: Path, setting: str) -> Figure | None:
    """t-SNE of PFPT's prompts over rounds with the path of their centroid (Fig. 3 and 5)."""
    path = (folder / Cell(setting, "pfpt", 0).file).with_suffix(".npz")
    if not path.is_file():
        return None
    # Imported here: tables need it for this figure alone.
    from sklearn.manifold import TSNE

    with np.load(path) as file:
        pools = [file[name].astype(np.float64) for name in sorted(file.files)]
    centroids = np.stack([pool.mean(axis=0) for pool in pools])
    everything = np.concatenate([*pools, centroids])
    perplexity = min(30.0, (len(everything) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(everything)
    rounds = np.repeat(np.arange(1, len(pools) + 1), [len(pool) for pool in pools])
    middle = places[len(rounds) :]
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axis = figure.subplots()
    dots = axis.scatter(places[: len(rounds), 0], places[: len(rounds), 1], c=rounds, s=8)
    axis.plot(*middle.T, color="black", linewidth=1)
    ends = middle[[0, -1]]
    axis.scatter(ends[:, 0], ends[:, 1], color="black", marker="x", label="centroid, both ends")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(f"summarizing prompts, {setting}")
    axis.legend(frameon=False, fontsize=8)
    figure.colorbar(dots, label="round")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "methods")
    parser.add_argument("--tables", type=Path, default=ROOT / "docs" / "benchmark-tables.md")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument(
        "--bounds", type=Path, default=ROOT / "benchmarks" / "results" / "methods_bounds.json"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmark.md")
    arguments = parser.parse_args()
    results = read_results(arguments.results)
    if not results:
        raise SystemExit(f"no results in {arguments.results}: run make bench-methods first")
    rows = summarise(results)
    arguments.tables.parent.mkdir(parents=True, exist_ok=True)
    arguments.tables.write_text(markdown(rows, rate_lines(arguments.results)), encoding="utf-8")
    references = {}
    if arguments.bounds.is_file():
        bounds = json.loads(arguments.bounds.read_text(encoding="utf-8"))
        references = bounds["frozen head"]
    put_between(arguments.page, overview(rows, grid.MAIN, references))
    arguments.images.mkdir(parents=True, exist_ok=True)
    mpl.rcParams["font.size"] = 9
    pictures = {"methods": accuracy_figure(rows), "methods_pool": pool_figure(results)}
    for setting in ("domains_frozen/dirichlet_0.5", "domains_frozen/imbalance"):
        picture = path_figure(arguments.results, setting)
        if picture is not None:
            pictures[f"methods_path_{setting.split('/')[1]}"] = picture
    for name, picture in pictures.items():
        picture.savefig(arguments.images / f"{name}.png", dpi=130)
    print(f"{sum(row['seeds'] for row in rows)} runs in {arguments.tables}")


if __name__ == "__main__":
    main()
