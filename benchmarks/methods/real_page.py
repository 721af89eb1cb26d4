"""The tables of docs/real.md, from the runs on real images.

    python -m benchmarks.methods.real_page [--results benchmarks/results/methods]
                                           [--page docs/real.md] [--picture docs/images/real.png]
                                           [--readme README.md]

For each task a line for each method and partition: test accuracy with prompts that 16 images of a
style select together, and with those that each image selects by itself; mean and 95 % interval over
seeds, and PFPT's paired difference to it. Whatever has been run is shown.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from benchmarks.harness import (
    DOCS,
    IMAGES,
    RESULTS,
    ROOT,
    Json,
    mean_and_half,
    paired,
    put_between,
    read_json,
)
from benchmarks.methods import real, real_figure
from benchmarks.methods.real_results import NAMES, accuracies, runs_of
from benchmarks.methods.results import FOLDER, Store
from benchmarks.methods.text import difference, percent, table

WORDS = {
    "natural": "styles differ",
    "dirichlet_0.5": "classes skewed, too",
    "dirichlet_0.1": "more skewed",
    "imbalance": "99 % of three classes",
}
"""The partitions for README, mildest first."""
COMBINED = ("test", "alone", "solved again", "fedcof", "over fedcof", "alone over fedcof")
"""Figures of real_combination.json."""
HEADS = (
    *("setting", "method", "seeds", "batches of 16", "each image alone"),
    *("PFPT over it", "alone", "prompts kept", "MB up", "CPU s"),
)


def line(store: Store, setting: str, method: str) -> list[str] | None:
    """A row under `HEADS`; None if nothing has been run."""
    runs = runs_of(store, setting, method)
    if not runs:
        return None
    cells = [setting.split("/")[1], NAMES[method], str(len(runs))]
    cells += [percent(*mean_and_half([*accuracies(runs, a).values()])) for a in (False, True)]
    lead = runs_of(store, setting, "pfpt")
    for alone in (False, True):
        found = paired(accuracies(lead, alone), accuracies(runs, alone))
        cells.append("" if method == "pfpt" else difference(found))
    count = len(runs)
    cells.append(f"{sum(run.prompts or 0 for run in runs.values()) / count:.0f}")
    cells.append(f"{sum(run.bytes_up or 0 for run in runs.values()) / count / 1e6:.2f}")
    cells.append(f"{sum(run.cpu_seconds or 0 for run in runs.values()) / count:.0f}")
    return cells


def task_table(store: Store, task: str) -> str:
    """All methods in all partitions of a task."""
    lines = [
        found
        for partition in real.PARTITIONS
        for method in (*real.METHODS, *real.OTHERS)
        if (found := line(store, f"{task}/{partition}", method)) is not None
    ]
    return "\n".join(table(HEADS, lines)) if lines else "Nothing has been run yet."


def headline(store: Store) -> str:
    """README's table: `emoji` with a head fitted on one vendor, as far as it has been run."""
    task = "emoji_frozen"
    shown = [each for each in real.PARTITIONS if len(runs_of(store, f"{task}/{each}", "pfpt")) > 1]
    lines = []
    for method in real.METHODS:
        runs = [runs_of(store, f"{task}/{partition}", method) for partition in shown]
        if not all(runs):
            continue
        cells = [
            " / ".join(
                percent(*mean_and_half([*accuracies(own, alone).values()]))
                for alone in (False, True)
            )
            for own in runs
        ]
        lines.append([NAMES[method], *cells])
    heads = ("test accuracy (%), 16 together / alone", *(WORDS[each] for each in shown))
    return "\n".join(table(heads, lines))


def bounds_table(cases: Json) -> str:
    """What central training reaches, task by task.

    Args:
        cases: of real_bounds.json.
    """
    lines = []
    for name, case in cases.items():
        task, way = name.split("/")
        values = [each["by_domain"] for each in case["seeds"]]
        domains = [sum(each) / len(each) for each in zip(*values, strict=True)]
        shown = ", ".join(
            f"{domain} {percent(mean)}"
            for domain, mean in zip(case["domains"], domains, strict=True)
        )
        accuracy = percent(case["test"]["mean"], case["test"]["ci95"])
        lines.append([f"`{task}`", way, accuracy, shown])
    heads = ("task", "prompts", "test accuracy (%)", "by domain")
    return "\n".join(table(heads, lines)) if lines else "Nothing has been run yet."


def combination_table(cases: Json) -> str:
    """FedCOF's head with PFPT's prompts on top.

    Args:
        cases: of real_combination.json.
    """
    lines = []
    for way, case in cases.items():
        known = [case.get(name, {}) for name in COMBINED]  # the first way was run without `alone`
        shown = [percent(each.get("mean"), each.get("ci95", math.nan)) for each in known]
        lines.append([way, f"{case['rate']:g}", str(len(case["seeds"])), *shown])
    heads = (
        *("after the start", "rate", "seeds", "batches of 16", "each image alone"),
        *("solved again", "FedCOF", "batches - FedCOF", "alone - FedCOF"),
    )
    return "\n".join(table(heads, lines)) if lines else "Nothing has been run yet."


def selection_table(rows: Json) -> str:
    """What choosing prompts in the clients' metric is worth.

    Args:
        rows: of real_selection.json.
    """
    names = ("accuracy", "alone_accuracy", "accuracy over plain", "alone_accuracy over plain")
    lines = []
    for row, cases in rows.items():
        for case, found in cases.items():
            shown = [percent(found[name]["mean"], found[name]["ci95"]) for name in names]
            if case == "plain":
                shown[2:] = ["", ""]
            prompts = f"{found['prompts']['mean']:.0f}"
            lines.append([row, case, str(len(found["seeds"])), *shown, prompts])
    heads = (
        *("where", "selection", "seeds", "batches of 16", "each image alone"),
        *("batches over plain", "alone over plain", "prompts kept"),
    )
    return "\n".join(table(heads, lines)) if lines else "Nothing has been run yet."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--page", type=Path, default=DOCS / "real.md")
    parser.add_argument("--picture", type=Path, default=IMAGES / "real.png")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args()
    store = Store(arguments.results)
    for task in real.TASKS:
        put_between(arguments.page, task, task_table(store, task))
    cases = read_json(RESULTS / "real_bounds.json").get("cases", {})
    put_between(arguments.page, "bounds", bounds_table(cases))
    cases = read_json(RESULTS / "real_combination.json").get("cases", {})
    put_between(arguments.page, "combination", combination_table(cases))
    rows = read_json(RESULTS / "real_selection.json").get("rows", {})
    put_between(arguments.page, "selection", selection_table(rows))
    real_figure.draw(store, arguments.picture)
    put_between(arguments.readme, "real images", headline(store))


if __name__ == "__main__":
    main()
