"""Reading what runner.py wrote, and its statistics: means, intervals, paired differences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grid
import numpy as np
from scipy import stats

from fedprompt.core.intervals import t_interval

BASELINE = "fedavg_pt"
MEASURES = ("accuracy", "best_accuracy", "balanced_accuracy")
OVER_CLIENTS = {
    "personalised": "mean",
    "deviation": "deviation",
    "worst_tenth": "worst_tenth",
    "jain": "jain",
}
"""Measures over the clients' own test accuracies, by their name in the run's file."""
Results = dict[str, dict[str, dict[int, dict[str, Any]]]]
"""setting -> method -> seed -> content of the run's file"""


def read_results(folder: Path) -> Results:
    """All reported runs that are there; those of pooled data stand in every partition's setting."""
    results: Results = {}
    for cell in grid.final_cells():
        path = folder / cell.file
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            results.setdefault(cell.setting, {}).setdefault(cell.method, {})[cell.seed] = content
    for setting, methods in results.items():
        there = results.get(f"{setting.split('/')[0]}/{grid.POOLED_IN}", {})
        methods.update({name: there[name] for name in grid.POOLED if name in there})
    return results


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval; the latter is NaN for a single value.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> mean, round(half, 3)
    (2.0, 2.484)
    """
    mean, half = t_interval(values)
    return mean, math.nan if half is None else half


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


def named(difference: tuple[float, float, float, int]) -> dict[str, float]:
    """What `paired` returns, by name."""
    return dict(zip(("mean", "half_width", "p", "seeds"), difference, strict=True))


def figures_of(runs: Mapping[int, dict[str, Any]], name: str) -> dict[int, float]:
    """One number of each seed; seeds whose run has none are left out."""
    if name in OVER_CLIENTS:
        key = OVER_CLIENTS[name]
        own = {seed: (run["personalised"] or {}).get(key) for seed, run in runs.items()}
    else:
        own = {seed: run[name] for seed, run in runs.items()}
    return {seed: float(value) for seed, value in own.items() if value is not None}


def lead(
    methods: Mapping[str, Mapping[int, dict[str, Any]]],
    method: str,
    other: str,
    measure: str = "accuracy",
) -> dict[str, float] | None:
    """Paired difference of two methods of one setting in some measure, by name."""
    found = [figures_of(methods.get(name, {}), measure) for name in (method, other)]
    difference = paired(*found)
    return None if difference is None else named(difference)


def summarise(
    results: Results, baseline_of: Callable[[str], str] = lambda method: BASELINE
) -> list[dict[str, Any]]:
    """One row for each setting and method.

    Args:
        results: from `read_results`.
        baseline_of: the method with which a method is compared, by name.
    """
    rows = []
    for setting, methods in results.items():
        for method, runs in methods.items():
            row: dict[str, Any] = {"setting": setting, "method": method, "seeds": len(runs)}
            for name in (*MEASURES, *OVER_CLIENTS):
                values = figures_of(runs, name)
                if values:
                    row[name], row[f"{name}_half_width"] = interval(list(values.values()))
                baseline = baseline_of(method)
                base = figures_of(methods.get(baseline, {}), name)
                difference = paired(values, base) if method != baseline else None
                if difference is not None:
                    row[f"{name}_difference"] = named(difference)
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
                    row[f"over_{bound}_difference"] = named(gap)
            row["scale"] = ", ".join(f"{s:g}" for s in sorted({r["scale"] for r in runs.values()}))
            rows.append(row)
    return rows
