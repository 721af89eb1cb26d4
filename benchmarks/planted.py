"""Planted correspondences: do aggregators find which prompts belong together, and how fast?

    python -m benchmarks.planted [--sweeps noise_full,clients] [--methods map,kmeans]
    python -m benchmarks.planted --speed
    python -m benchmarks.planted --sweeps none --figure docs/images/planted.png

The problem. There are n true prompts ~ N(0, I_d). Each of m clients gets all or some of them, each
with noise N(0, noise^2 I_d), so that `noise` is the ratio of noise to spread in every coordinate,
and returns its set in shuffled order; everything is multiplied by `scale`. An aggregator is given
the prompt sets alone (no origins, previous prompts or keys).

Labels. A local prompt's label is its row of `Problem.true_prompts`. Rows 0 to n-1 are the shared
true prompts. An *outlier* is a prompt that one client alone has: it is drawn from the same base,
with noise, and has a row of its own. A *duplicate*: a client returns one true prompt twice, with
independent noise. A client has at most one copy of a summarizing prompt, so by the model the second
copy must become something of its own and has a row of its own, equal to its prompt's. A prompt is
duplicated by one client at most; second copies of several clients would have each other for
company. Which of the two copies counts as the second is settled in favour of each answer.

Metrics, of every answer:

* `ari`: adjusted Rand index of the assignment against the labels;
* `count_error`: prompts found less labels that occur; `exact_count`: share of seeds where it is 0;
* `centroid_ratio`: root mean square, over local prompts, of the distance between the centroid that
  a prompt was assigned to and its true prompt, divided by the same for the means of the true groups
  (1 is the best that averaging a true group can do; below it are shrinking, as `gmm` does, in
  much noise, and putting both copies of a duplicate into one average);
* `copies_apart`: share of duplicates whose two copies were assigned to different centroids;
* `seconds` of the call, one thread, after a warm-up on a small problem;
* `peak_mib` (some sweeps): see `peak_memory`.

The methods are `map`, `paper` and `released` (the variants of `pfpt`; the committed results have
`neural`, too: `map` with the paper's networks, which was removed because nothing differed), `gmm`,
`kmeans` (as many clusters as the largest set has prompts, which is the true number if all clients
have all), `mean` (row by position, where all sets have one size), and
two references that know more than any method may. `oracle`: a client's prompts are matched one to
one with the true prompts (and the client's own outliers and second copies). `genie`:
they are matched one to one with what the other clients'
prompts tell of the true ones, given the others' true assignment, both variances and which prompts
the client alone has. A method must find all that as well, so the ARI of `genie` bounds, up to
chance, what is possible without knowing the true prompts; what is missing to `oracle` is not in
the data.

A seed fixes a problem; the same seed gives related problems in all cases of a sweep. Results are
merged into an existing JSON, so that the benchmark can be run in pieces: every figure refers to
the run that it is from.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import multiprocessing
import re
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.harness import (
    RESULTS,
    Json,
    header,
    mean_and_half,
    one_thread,
    read_json,
    write_json,
)
from benchmarks.planted_figure import draw
from benchmarks.released_loop import released_per_candidate
from fedprompt import aggregation
from fedprompt.aggregation.pfpt.nets import PromptNets
from fedprompt.aggregation.pfpt.released import released_matching
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.core.seeding import numpy_generator, torch_generator

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

# The problem.


@dataclasses.dataclass(frozen=True)
class Case:
    """What is planted; the defaults are the base case, from which each sweep varies one thing."""

    clients: int = 10
    prompts: int = 20
    """n, true prompts that clients share."""
    dimension: int = 64
    noise: float = 0.5
    """Standard deviation of the noise over that of the true prompts, per coordinate."""
    probability: float = 1.0
    """That a client has a given true prompt, independently."""
    smallest: float = 1.0
    """Share of the true prompts that the smallest client has; sizes are evenly spaced up to all."""
    outliers: int = 0
    """Per client."""
    duplicates: int = 0
    """In all; at most one of each prompt."""
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.probability < 1 and self.smallest < 1:
            raise ValueError("a case has either random subsets or unequal sizes, not both")
        if self.duplicates > self.prompts:
            raise ValueError(f"{self.duplicates} duplicates of {self.prompts} prompts")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case with drawn numbers. N local prompts in all."""

    prompt_sets: list[Tensor]
    """Per client (n_t, d) float32."""
    true_prompts: Array
    """(T, d) shared prompts, then outliers and second copies of duplicates."""
    labels: list[Indices]
    """Per client (n_t,) rows of `true_prompts`."""
    twins: Indices
    """(D, 2) both copies of each duplicate, as positions among the N local prompts."""
    num_shared: int
    noise: float = 0.0
    """Standard deviation of the noise, and the next that of the true prompts, as returned."""
    spread: float = 1.0

    @property
    def points(self) -> Array:
        """(N, d) the local prompts of all clients."""
        return np.concatenate([each.double().numpy() for each in self.prompt_sets])

    @property
    def flat_labels(self) -> Indices:
        """(N,)"""
        return np.concatenate(self.labels)


def make_problem(case: Case, seed: int) -> Problem:
    """Draw true prompts, who has them, noise and order."""
    generator = numpy_generator(seed, "benchmark/planted")
    true = [generator.standard_normal((case.prompts, case.dimension))]
    owned = _choose_prompts(case, generator)
    second_of = _choose_duplicates(case, owned, generator)
    number, start, starts = case.prompts, 0, []
    sets, labels, twins = [], [], []
    for client, shared in enumerate(owned):
        copied = second_of[client]
        own = np.arange(number, number + len(copied) + case.outliers)
        number += len(own)
        outliers = generator.standard_normal((case.outliers, case.dimension))
        true.append(np.concatenate([true[0][copied], outliers]))
        rows = np.concatenate([shared, own])
        values = np.concatenate([true[0][shared], true[-1]])
        values = values + case.noise * generator.standard_normal(values.shape)
        order = generator.permutation(len(rows))
        sets.append(torch.from_numpy(case.scale * values[order]).float())
        labels.append(rows[order])
        for copy, prompt in zip(own, copied, strict=False):
            place = [start + int(np.flatnonzero(labels[-1] == row)[0]) for row in (prompt, copy)]
            twins.append(place)
        starts.append(start)
        start += len(rows)
    pairs = np.array(twins, dtype=np.int64).reshape(-1, 2)
    return Problem(
        sets,
        case.scale * np.concatenate(true),
        labels,
        pairs,
        case.prompts,
        case.scale * case.noise,
        case.scale,
    )


def _choose_prompts(case: Case, generator: np.random.Generator) -> list[Indices]:
    """Per client, the shared prompts that it has."""
    uniform = generator.random((case.clients, case.prompts))
    if case.smallest == 1:
        return [np.flatnonzero(row < case.probability) for row in uniform]
    shares = np.linspace(case.smallest, 1, case.clients)
    sizes = np.maximum(np.round(shares * case.prompts).astype(int), 1)
    return [np.argsort(row)[:size] for row, size in zip(uniform, sizes, strict=True)]


def _choose_duplicates(
    case: Case, owned: list[Indices], generator: np.random.Generator
) -> list[Indices]:
    """Per client, the shared prompts that it returns twice."""
    result: list[list[int]] = [[] for _ in owned]
    if case.duplicates:
        occurring = np.unique(np.concatenate(owned))
        for prompt in generator.permutation(occurring)[: case.duplicates]:
            holders = [client for client, rows in enumerate(owned) if prompt in rows]
            result[int(generator.choice(holders))].append(int(prompt))
    return [np.array(rows, dtype=np.int64) for rows in result]


# Answers and their metrics.


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a method says."""

    assignment: Indices
    """(N,) rows of `centroids`."""
    centroids: Array
    """(R, d)"""


def settle_twins(problem: Problem, assignment: Indices) -> Indices:
    """(N,) labels, with the two copies of each duplicate swapped if that suits the assignment.

    The copy that stands with more of the prompt's copies at other clients counts as the first.
    """
    labels = problem.flat_labels
    settled = labels.copy()
    for first, second in problem.twins:
        others = labels == labels[first]
        others[first] = False
        company = [int((assignment[others] == assignment[row]).sum()) for row in (first, second)]
        if company[1] > company[0]:
            settled[first], settled[second] = labels[second], labels[first]
    return settled


def group_means(points: Array, labels: Indices) -> Array:
    """(N, d) for each point the mean of the points with its label."""
    _, members = np.unique(labels, return_inverse=True)
    total = np.zeros((int(members.max()) + 1, points.shape[1]))
    np.add.at(total, members, points)
    means: Array = (total / np.bincount(members)[:, None])[members]
    return means


def score(problem: Problem, answer: Answer) -> dict[str, float]:
    """All metrics but time and memory; see the head of this file."""
    labels = settle_twins(problem, answer.assignment)
    true = problem.true_prompts[labels]
    error = _root_mean_square(answer.centroids[answer.assignment] - true)
    best = _root_mean_square(group_means(problem.points, labels) - true)
    # Without noise nothing but rounding (float32) is left of either.
    tiny = 1e-6 * _root_mean_square(true)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # many labels: takes them for a regression's values
        agreement = float(adjusted_rand_score(labels, answer.assignment))
    metrics = {
        "ari": agreement,
        "count_error": float(len(answer.centroids) - len(np.unique(labels))),
        "centroid_ratio": max(error, tiny) / max(best, tiny),
    }
    if len(problem.twins):
        pairs = answer.assignment[problem.twins]
        metrics["copies_apart"] = float((pairs[:, 0] != pairs[:, 1]).mean())
    return metrics


def _root_mean_square(rows: Array) -> float:
    """Of the lengths of rows."""
    return math.sqrt(float((rows**2).sum(axis=1).mean()))


# Methods.


class NotApplicableError(Exception):
    """A method cannot be asked this question; the message says why."""


def ask_oracle(problem: Problem, seed: int) -> Answer:
    """Match every client's prompts with the true ones; centroids are the means of the matched."""
    assignment = []
    for prompts, labels in zip(problem.prompt_sets, problem.labels, strict=True):
        own = labels[labels >= problem.num_shared]
        rows = np.concatenate([np.arange(problem.num_shared), np.sort(own)])
        true = problem.true_prompts[rows]
        points = prompts.double().numpy()
        squares = (points**2).sum(axis=1)[:, None] + (true**2).sum(axis=1) - 2 * points @ true.T
        _, picked = linear_sum_assignment(squares)
        assignment.append(rows[picked])
    return answer_of(problem, np.concatenate(assignment))


def ask_genie(problem: Problem, seed: int) -> Answer:
    """Match every client's prompts with what the others' prompts, in their true groups, tell.

    Candidates are the true prompts that another client has, and those that this client alone has,
    of which nothing is known. A match scores log N(x | mu, noise^2 + s) with posterior mean mu and
    variance s, given the c prompts of others: mu = c / (c + r) times their mean and s = noise^2 /
    (c + r), with r the ratio of the noise's to the true prompts' variance. All clients have a
    prompt with one probability, so inclusion favours no candidate.
    """
    points, labels = problem.points, problem.flat_labels
    owner = np.repeat(np.arange(len(problem.labels)), [len(each) for each in problem.labels])
    total = np.zeros_like(problem.true_prompts)
    np.add.at(total, labels, points)
    count = np.bincount(labels, minlength=len(total))
    variance = max(problem.noise, 1e-6 * problem.spread) ** 2  # of 0 there is no density
    assignment = np.empty_like(labels)
    for client in range(len(problem.labels)):
        mine = np.flatnonzero(owner == client)
        own = labels[mine]
        others, sums = count.copy(), total.copy()
        others[own] -= 1  # a client has a label once
        sums[own] -= points[mine]
        candidates = np.union1d(np.flatnonzero(others), own)
        mass = others[candidates] + variance / problem.spread**2
        means = np.where(others[candidates, None] > 0, sums[candidates], 0.0) / mass[:, None]
        width = variance * (1 + 1 / mass)
        squares = (points[mine] ** 2).sum(axis=1)[:, None] + (means**2).sum(axis=1)
        squares -= 2 * points[mine] @ means.T
        _, picked = linear_sum_assignment(squares / width + points.shape[1] * np.log(width))
        assignment[mine] = candidates[picked]
    return answer_of(problem, assignment)


def answer_of(problem: Problem, labels: Indices) -> Answer:
    """Centroids are the means of the local prompts with a label."""
    used, members = np.unique(labels, return_inverse=True)
    first = [int(np.flatnonzero(members == row)[0]) for row in range(len(used))]
    return Answer(members, group_means(problem.points, labels)[first])


def ask_aggregator(name: str, **options: object) -> Callable[[Problem, int], Answer]:
    """A method that calls the aggregator `name`."""

    def ask(problem: Problem, seed: int) -> Answer:
        sizes = {len(prompts) for prompts in problem.prompt_sets}
        if name == "mean" and len(sizes) > 1:
            raise NotApplicableError("sets of different sizes have no common positions")
        try:
            aggregator = aggregation.create(name, **options)
        except ConfigError as error:
            raise NotApplicableError(str(error)) from error
        generator = torch_generator(seed, "benchmark/planted/method")
        result = aggregator.aggregate(problem.prompt_sets, generator=generator)
        return Answer(torch.cat(result.assignment).numpy(), result.prompts.double().numpy())

    return ask


METHODS: dict[str, Callable[[Problem, int], Answer]] = {
    "map": ask_aggregator("pfpt"),
    "paper": ask_aggregator("pfpt", variant="paper"),
    "released": ask_aggregator("pfpt", variant="released"),
    "gmm": ask_aggregator("gmm"),
    "kmeans": ask_aggregator("kmeans"),
    "mean": ask_aggregator("mean"),
    "oracle": ask_oracle,
    "genie": ask_genie,
}
SLOW = ("paper", "released")
SLOW_SEEDS = 3
SEEDS = 5
NOISE_SEEDS = 20
LIMITS = {"paper": 1e8, "released": 1e8, "gmm": 1e8}
"""The most work per loop (see `work_of`) that a method is asked for."""


def work_of(method: str, problem: Problem) -> float:
    """N * candidates * d: local prompts against candidates, which `gmm` has two of for every
    prompt of the largest set and the two others one for every local prompt.
    """
    number = len(problem.flat_labels)
    candidates = 2 * max(len(rows) for rows in problem.labels) if method == "gmm" else number
    return float(number * candidates * problem.true_prompts.shape[1])


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Cases that differ in one setting."""

    varies: str
    values: tuple[float, ...]
    base: Case = Case()
    seeds: int = SEEDS
    memory: bool = False
    """Whether peak memory is taken."""

    def cases(self) -> list[Case]:
        """One per value."""
        return [
            dataclasses.replace(self.base, **{self.varies: value})  # type: ignore[arg-type]
            for value in self.values
        ]


NOISES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
SUBSETS = Case(probability=0.6)
SWEEPS = {
    "noise_full": Sweep("noise", NOISES, seeds=NOISE_SEEDS),
    "noise_subsets": Sweep("noise", NOISES, SUBSETS, seeds=NOISE_SEEDS),
    "dimension": Sweep("dimension", (16, 32, 64, 128, 256, 512, 768), memory=True),
    "clients": Sweep("clients", (2, 5, 10, 20, 50, 100, 200, 500, 1000), memory=True),
    "prompts": Sweep("prompts", (1, 2, 5, 10, 20, 50, 100)),
    "probability": Sweep("probability", (0.2, 0.4, 0.6, 0.8, 1.0)),
    "unequal": Sweep("smallest", (0.05, 0.25, 0.5, 0.75, 1.0)),
    "outliers": Sweep("outliers", (0, 1, 2, 5, 10, 20)),
    "duplicates": Sweep("duplicates", (0, 1, 2, 5, 10, 20)),
    "scale": Sweep("scale", (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)),
}


WARM_UP = Case(clients=3, prompts=4, dimension=4)


def ask_once(method: str, problem: Problem, seed: int) -> dict[str, float]:
    """Metrics and seconds of one call."""
    started = time.perf_counter()
    answer = METHODS[method](problem, seed)
    seconds = time.perf_counter() - started
    return {**score(problem, answer), "seconds": seconds}


def measure(method: str, sweep: Sweep, case: Case, seeds: int) -> Json:
    """Every metric of a method in one case over seeds, or why there is none.

    An aggregator that refuses the prompts of one seed has no figures for the case.
    """
    work = work_of(method, make_problem(case, 0))
    if work > LIMITS.get(method, math.inf):
        return {"skipped": f"too large: N * candidates * d = {work:.2g} > {LIMITS[method]:.2g}"}
    try:
        runs = [ask_once(method, make_problem(case, seed), seed) for seed in range(seeds)]
    except NotApplicableError as error:
        return {"skipped": str(error)}
    except InputError as error:
        return {"skipped": f"refused: {error}"}
    result: Json = {"seeds": seeds}
    for name in runs[0]:
        result[name] = interval([run[name] for run in runs])
    result["exact_count"] = sum(run["count_error"] == 0 for run in runs) / seeds
    if sweep.memory:
        result["peak_mib"] = peak_memory(method, make_problem(case, 0))
    return result


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and half width of the 95 % interval (Student's t), null for a single value."""
    mean, half = mean_and_half(values)
    return {"mean": _rounded(mean), "ci95": _rounded(half) if math.isfinite(half) else None}


def _rounded(value: float) -> float:
    """To five significant digits."""
    return float(f"{value:.5g}")


# Memory.


def peak_memory(method: str, problem: Problem) -> float:
    """MiB that one call adds at most to the resident memory of a process forked for it.

    On Linux the high-water mark of the child (`VmHWM`, which `ru_maxrss` reports), set back to
    the present size before the call; elsewhere `ru_maxrss` less its value before the call. Memory
    that the allocator had already from the system and can use again is not counted.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_measure_memory, args=(method, problem, send))
    child.start()
    send.close()
    try:
        return float(receive.recv())
    except EOFError:
        raise RuntimeError(f"{method}: the process that measures memory failed") from None
    finally:
        child.join()


def _measure_memory(method: str, problem: Problem, send: Connection) -> None:
    METHODS[method](make_problem(WARM_UP, 0), 0)  # code is loaded page by page
    try:
        ctypes.CDLL(None).malloc_trim(0)  # give free memory back, so that it counts when taken
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    except (OSError, AttributeError):
        pass
    before = _high_water()
    METHODS[method](problem, 0)
    send.send(round(_high_water() - before, 1))


def _high_water() -> float:
    """MiB"""
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) / 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# Speed.

SPEED_CLIENTS = {10: 5, 100: 3, 1000: 1}
"""Clients and how often they are timed."""
RELEASED_LOOPS = 50
HIDDEN = 128
SAMPLE_LOOPS = 2
"""Loops for which the per-candidate form is run; its time for 50 is these times 25."""


def measure_speed() -> Json:
    """`map` with more and more clients, and the released algorithm, all with 768 dimensions."""
    rows = []
    for clients, repeats in SPEED_CLIENTS.items():
        problem = make_problem(Case(clients=clients, dimension=768), 0)
        runs = [ask_once("map", problem, 0) for _ in range(repeats)]
        row = {
            "clients": clients,
            "repeats": repeats,
            "seconds": _rounded(statistics.median(run["seconds"] for run in runs)),
            "peak_mib": peak_memory("map", problem),
            "ari": runs[0]["ari"],
            "count_error": runs[0]["count_error"],
        }
        rows.append(row)
        print("speed", "map", row, flush=True)
    result: Json = {
        "settings": dataclasses.asdict(Case(dimension=768)),
        "map": rows,
        "growth_exponent": growth_exponent(
            [row["clients"] for row in rows], [row["seconds"] for row in rows]
        ),
        "released": measure_released(make_problem(Case(dimension=768), 0)),
    }
    fast = rows[0]["seconds"]
    result["ratios_to_map"] = {
        form: _rounded(result["released"][form]["seconds"] / fast)
        for form in ("vectorised", "per_candidate")
        if "seconds" in result["released"].get(form, {})
    }
    print("speed", json.dumps({k: v for k, v in result.items() if k != "map"}), flush=True)
    return result


def growth_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Slope of log seconds over log size; None for less than two sizes.

    >>> growth_exponent([1, 10, 100], [2.0, 20.0, 200.0])
    1.0
    """
    if len(sizes) < 2:
        return None
    slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
    return round(float(slope), 3)


def measure_released(problem: Problem) -> Json:
    """The released algorithm as a variant, and with the authors' Python loop over candidates.

    The second is run for a few loops only, after which both forms must agree on the assignment.
    """
    result: Json = {}
    try:
        run = ask_once("released", problem, 0)
        result["vectorised"] = {"loops": RELEASED_LOOPS, **{k: _rounded(v) for k, v in run.items()}}
    except NotApplicableError as error:
        result["vectorised"] = {"skipped": str(error)}
    warm_up = _released_start(make_problem(WARM_UP, 0))
    start = _released_start(problem)
    seconds, ends = [], []
    for form in (released_matching, released_per_candidate):
        form(*warm_up, 1)
        started = time.perf_counter()
        ends.append(form(*start, SAMPLE_LOOPS).assignment)
        seconds.append(time.perf_counter() - started)
    if not all(torch.equal(one, other) for one, other in zip(*ends, strict=True)):
        raise RuntimeError("the two forms of the released algorithm disagree")
    result["per_candidate"] = {
        "loops": RELEASED_LOOPS,
        "loops_timed": SAMPLE_LOOPS,
        "seconds": _rounded(seconds[1] * RELEASED_LOOPS / SAMPLE_LOOPS),
        "seconds_of_timed_loops": {
            "vectorised": _rounded(seconds[0]),
            "per_candidate": _rounded(seconds[1]),
        },
        "note": f"{SAMPLE_LOOPS} loops timed, with equal assignments, and multiplied to "
        f"{RELEASED_LOOPS}",
    }
    return result


def _released_start(problem: Problem) -> tuple[list[Tensor], list[Tensor], PromptNets]:
    """Prompt sets, first assignment and networks, as the variant `released` makes them."""
    cohort = aggregation.Cohort.of(aggregation.AggregationInput(problem.prompt_sets))
    prompts = torch.from_numpy(cohort.prompts).float()
    sets = [prompts[span] for span in cohort.spans()]
    generator = torch_generator(0, "benchmark/planted/released")
    fresh = PromptNets(prompts.shape[1], HIDDEN, generator, torch.float32)
    first = [torch.randperm(len(prompts), generator=generator)[: len(each)] for each in sets]
    return sets, first, fresh


# The file of results.


def run_sweep(sweep: Sweep, methods: Sequence[str], seeds: int | None, run: str, name: str) -> Json:
    """All cases of a sweep under all methods; `run` is noted with each figure."""
    cases = []
    for value, case in zip(sweep.values, sweep.cases(), strict=True):
        figures = {}
        for method in methods:
            number = seeds or (min(SLOW_SEEDS, sweep.seeds) if method in SLOW else sweep.seeds)
            figures[method] = {**measure(method, sweep, case, number), "run": run}
            print(
                f"{name} {sweep.varies}={value:g} {method:8} {_line(figures[method])}", flush=True
            )
        cases.append(
            {
                "value": value,
                "settings": dataclasses.asdict(case),
                "occurring": describe_problem(make_problem(case, 0)),
                "methods": figures,
            }
        )
    return {"varies": sweep.varies, "cases": cases}


def describe_problem(problem: Problem) -> dict[str, int]:
    """Sizes in the problem of seed 0: local prompts, and distinct labels of each kind."""
    labels = np.unique(problem.flat_labels)
    shared = int((labels < problem.num_shared).sum())
    return {
        "local_prompts": len(problem.flat_labels),
        "shared": shared,
        "second_copies": len(problem.twins),
        "outliers": len(labels) - shared - len(problem.twins),
        "smallest_set": min(len(each) for each in problem.labels),
        "largest_set": max(len(each) for each in problem.labels),
    }


def _line(figures: Json) -> str:
    if "skipped" in figures:
        return f"skipped: {figures['skipped']}"
    names = ("ari", "count_error", "centroid_ratio", "copies_apart", "seconds")
    parts = [f"{name} {figures[name]['mean']:.4g}" for name in names if name in figures]
    return "  ".join([*parts, f"exact_count {figures['exact_count']:.2g}"])


def merge(old: Json, new: Json) -> Json:
    """The old results with the new ones put in their place, method by method.

    A case of the old results stays if the sweep still has it with the same settings. Runs that
    nothing refers to any more are dropped.
    """
    sweeps = dict(old.get("sweeps", {}))
    for name, sweep in new["sweeps"].items():
        before = {
            json.dumps(case["settings"], sort_keys=True): case["methods"]
            for case in sweeps.get(name, {}).get("cases", [])
        }
        cases = []
        for case in sweep["cases"]:
            kept = before.get(json.dumps(case["settings"], sort_keys=True), {})
            merged = {**kept, **case["methods"]}
            ordered = {method: merged[method] for method in METHODS if method in merged}
            cases.append({**case, "methods": ordered})
        sweeps[name] = {**sweep, "cases": cases}
    speed = new.get("speed") or old.get("speed")
    used = {
        figures["run"]
        for sweep in sweeps.values()
        for case in sweep["cases"]
        for figures in case["methods"].values()
    }
    if speed:
        used.add(speed["run"])
    runs = {**old.get("runs", {}), **new["runs"]}
    result: Json = {
        "benchmark": "planted",
        "runs": {key: run for key, run in runs.items() if key in used},
        "sweeps": {name: sweeps[name] for name in SWEEPS if name in sweeps},
    }
    if speed:
        result["speed"] = speed
    return result


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Parser of comma-separated names; `none` for none."""

    def parse(text: str) -> list[str]:
        names = [] if text == "none" else text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown '{name}': choose of {', '.join(known)}")
        return names

    return parse


def main() -> None:
    """Measure, print one line per case and method, write JSON and figure after every sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", type=_names(list(SWEEPS)), default=None, help="or 'none'")
    parser.add_argument("--methods", type=_names(list(METHODS)), default=list(METHODS))
    parser.add_argument("--seeds", type=int, help="for all methods; by default 20, 5 and 3")
    parser.add_argument("--speed", action="store_true", help="timing at 768 dimensions, no sweeps")
    parser.add_argument("--output", type=Path, default=RESULTS / "planted.json")
    parser.add_argument("--figure", type=Path, help="for example docs/images/planted.png")
    arguments = parser.parse_args()
    one_thread()
    sweeps = arguments.sweeps
    if sweeps is None:
        sweeps = [] if arguments.speed else list(SWEEPS)
    with threadpool_limits(1):
        measure_all(arguments, sweeps)
    if arguments.figure:
        draw(read_json(arguments.output), arguments.figure)


def measure_all(arguments: argparse.Namespace, sweeps: Sequence[str]) -> None:
    """Sweeps and speed, saved as they come."""
    description = header("planted", threads=1)
    run = str(description["date"])
    for method in arguments.methods:  # imports and first calls are not timed
        measure(method, Sweep("noise", (0.5,)), WARM_UP, 1)
    for name in sweeps:
        started = time.perf_counter()
        swept = run_sweep(SWEEPS[name], arguments.methods, arguments.seeds, run, name)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        new: Json = {"runs": {run: description}, "sweeps": {name: swept}}
        write_json(arguments.output, merge(read_json(arguments.output), new))
    if arguments.speed:
        new = {"runs": {run: description}, "sweeps": {}, "speed": {**measure_speed(), "run": run}}
        write_json(arguments.output, merge(read_json(arguments.output), new))


if __name__ == "__main__":
    main()
