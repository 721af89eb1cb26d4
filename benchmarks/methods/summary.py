"""Statistics of what the runner measured: means, intervals, paired differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from benchmarks.harness import Paired, mean_and_half, paired
from benchmarks.methods import grid
from benchmarks.methods.results import Run, Store

BASELINE = "fedavg_pt"
MEASURES = (
    *("accuracy", "best_accuracy", "balanced_accuracy"),
    *("own", "own_worst_tenth", "own_deviation", "own_jain"),
)
Runs = Mapping[int, Run]
"""By seed."""
Results = Mapping[str, Mapping[str, Runs]]
"""setting -> method -> seed -> run"""


def read_results(store: Store) -> dict[str, dict[str, dict[int, Run]]]:
    """All reported runs that are there; those of pooled data stand in every partition's setting."""
    results: dict[str, dict[str, dict[int, Run]]] = {}
    for cell in grid.final_cells():
        run = store.find(cell)
        if run is not None:
            results.setdefault(cell.setting, {}).setdefault(cell.method, {})[cell.seed] = run
    for setting, methods in results.items():
        there = results.get(f"{setting.split('/')[0]}/{grid.POOLED_IN}", {})
        methods.update({name: there[name] for name in grid.POOLED if name in there})
    return results


def figures_of(runs: Runs, name: str) -> dict[int, float]:
    """One number of each seed; seeds whose run has none are left out."""
    values = {seed: getattr(run, name) for seed, run in runs.items()}
    return {seed: float(value) for seed, value in values.items() if value is not None}


def lead(
    methods: Mapping[str, Runs], method: str, other: str, measure: str = "accuracy"
) -> Paired | None:
    """Paired difference of two methods of one setting.

    Args:
        methods: the runs of the setting.
        method: which.
        other: with which it is compared.
        measure: one of `MEASURES`.
    """
    own, base = (figures_of(methods.get(name, {}), measure) for name in (method, other))
    return paired(own, base)


@dataclasses.dataclass(frozen=True)
class Mean:
    """Over seeds."""

    mean: float
    half_width: float
    """Of the 95 % interval; NaN for one seed."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """A method in a setting."""

    setting: str
    method: str
    seeds: int
    means: Mapping[str, Mean]
    """By measure; without those that the method does not have."""
    gain: Paired | None
    """In accuracy, over the method with which it is compared."""
    over_centralised: Paired | None
    """What is lost to having the data apart."""
    over_local_only: Paired | None
    """What a client gains over being alone."""
    prompts: float
    bytes_up: float
    bytes_down: float
    cpu_seconds: float
    """NaN where none was recorded."""
    scales: tuple[float, ...]
    """The factors on the learning rates that were chosen."""


def summarise(
    results: Results, baseline_of: Callable[[str], str] = lambda method: BASELINE
) -> list[Summary]:
    """One for each setting and method.

    Args:
        results: from `read_results`.
        baseline_of: the method with which a method is compared, by name.
    """
    return [
        _summary(setting, method, methods, baseline_of(method))
        for setting, methods in results.items()
        for method in methods
    ]


def _summary(setting: str, method: str, methods: Mapping[str, Runs], baseline: str) -> Summary:
    runs = methods[method]
    means = {}
    for name in MEASURES:
        values = figures_of(runs, name)
        if values:
            means[name] = Mean(*mean_and_half(list(values.values())))

    def over(bound: str, measure: str) -> Paired | None:
        return None if method == bound else lead(methods, method, bound, measure)

    def mean_of(name: str) -> float:
        values = list(figures_of(runs, name).values())
        return float(np.mean(values)) if values else float("nan")

    return Summary(
        setting=setting,
        method=method,
        seeds=len(runs),
        means=means,
        gain=over(baseline, "accuracy"),
        over_centralised=over("centralised", "accuracy"),
        over_local_only=over("local_only", "own"),
        prompts=mean_of("prompts"),
        bytes_up=mean_of("bytes_up"),
        bytes_down=mean_of("bytes_down"),
        cpu_seconds=mean_of("cpu_seconds"),
        scales=tuple(sorted({run.scale for run in runs.values()})),
    )
