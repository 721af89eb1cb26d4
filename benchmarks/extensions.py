"""What does every option of `pfpt` that the paper does not have change?

    python -m benchmarks.extensions [--options patience,memory] [--seeds 5]
                                    [--output benchmarks/results/extensions.json]

Each value of an option runs in the same worlds with the same seeds as the default: the same true
prompts, clients, cohorts and noise. What counts is the paired difference, value less default: its
mean over seeds with the 95 % interval of Student's t; both means are given besides. Intervals are
one by one: of a hundred that exclude zero, some do by chance. With few seeds a mean can hide that
one seed came apart and the others did not; its interval is wide then.

The worlds are those of `keyed.py`, the base with 3 groups of 4 prompts each and 10 of 40 clients in
16 rounds. Each option is measured where it can matter:

| world        | what is special                        | options, and why                        |
|--------------|----------------------------------------|-----------------------------------------|
| `rare`       | 10 of 100 clients in 40 rounds; one    | `patience`: a rare prompt is unused for |
|              | prompt of each group only 1 client in  | some 3 rounds on end, at times for over |
|              | 10 has; training is slow               | 10, and is still true                   |
| `unequal`    | log sample counts spread by 0.7; noise | `use_weights`: the noisy drag averages; |
|              | falls with 1 / sqrt(count)             | `patience`, `max_prompts`: the noisy    |
|              |                                        | open needless prompts                   |
| `same_noise` | the same counts, all equally noisy     | `use_weights`: weights can only lose    |
| `noisy`      | noise 0.7, true prompts stand still    | `memory`, `average_memory`, `shrink`:   |
|              |                                        | averaging over rounds can win           |
| `moving`     | true prompts move by 0.6 a round       | the same: what is old misleads          |
| `hard`       | noise 2: the matching is uncertain     | `origin_odds` can help; `max_prompts`   |
|              |                                        | can know the number                     |
| `one_key`    | all keys alike, prompts tell groups    | `origin_odds`: origins mislead, for all |
|              | apart                                  | groups start from the same prompts      |
| `wide`       | keys spread within a group by 0.7 of   | `key_weight`: keys may mislead, prompts |
|              | what groups' do                        | tell groups apart as well               |
| `keys_tell`  | groups have almost equal prompts       | `key_weight`: only keys tell them apart |

`restarts` is measured in single calls, on problems of `planted.py` with noise 1.5 and 2: there the
first starts of the search disagree, which is when it goes on from others.

Measures: `ari`, `pool` and `start_error` as in `keyed.py`, second half of the rounds;
`pool_error`: root mean square distance from each true prompt to the nearest prompt of the pool, in
units of the spread, same rounds, which shows what was forgotten; `milliseconds` per call of the
aggregator, all rounds. For single calls, `pool` is the number of prompts over the true number.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks import keyed, planted
from benchmarks.harness import RESULTS, Json, header, interval, one_thread, write_json
from benchmarks.keyed import World
from benchmarks.planted import Case
from fedprompt import aggregation
from fedprompt.aggregation.pfpt import PfptOptions

BASE = World(groups=3, prompts=4, dimension=32, key_dimension=32, rounds=16)
TRUE_NUMBER = BASE.groups * BASE.prompts


def _changed(**changes: float) -> World:
    return dataclasses.replace(BASE, **changes)  # type: ignore[arg-type]


WORLDS: dict[str, World | Case] = {
    "rare": _changed(clients=100, rounds=40, rare=1, rare_share=0.1, progress=0.5),
    "unequal": _changed(prompt_noise=0.4, count_spread=0.7),
    "same_noise": _changed(prompt_noise=0.4, count_spread=0.7, count_power=0.0),
    "noisy": _changed(prompt_noise=0.7),
    "moving": _changed(prompt_drift=0.6),
    "hard": _changed(prompt_noise=2.0),
    "one_key": _changed(own_keys=False, prompt_noise=0.5),
    "wide": _changed(prompt_noise=0.5, key_noise=0.7),
    "keys_tell": _changed(own_prompts=0.1, key_noise=0.6),
    "call_1.5": Case(noise=1.5),
    "call_2": Case(noise=2.0),
}


@dataclasses.dataclass(frozen=True)
class Effect:
    """Values of an option that are compared with its default, in some of `WORLDS`."""

    values: tuple[float, ...]
    worlds: tuple[str, ...]


EFFECTS: dict[str, Effect] = {
    "patience": Effect((1, 3, 1000), ("rare", "unequal")),
    "max_prompts": Effect((TRUE_NUMBER, TRUE_NUMBER // 2), ("unequal", "hard")),
    "origin_odds": Effect((1.0, 7.0, 1000.0), ("hard", "one_key")),
    "use_weights": Effect((True,), ("unequal", "same_noise")),
    "memory": Effect((0.0, 3.0), ("noisy", "moving")),
    "average_memory": Effect((False,), ("noisy", "moving")),
    "shrink": Effect((True,), ("noisy", "moving")),
    "key_weight": Effect((0.0, 1.0, 64.0), ("keys_tell", "wide")),
    "restarts": Effect((0,), ("call_1.5", "call_2")),
}


def run(world: World | Case, seed: int, options: Json) -> dict[str, float]:
    """All measures of one run of `pfpt`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # many labels: scikit-learn takes them for a regression's
        return (
            _call(world, seed, options)
            if isinstance(world, Case)
            else _rounds(world, seed, options)
        )


def _rounds(world: World, seed: int, options: Json) -> dict[str, float]:
    curves = keyed.run(world, seed, aggregation.create("pfpt", **options))
    all_figures = keyed.figures(curves)
    half = len(curves.ari) // 2
    return {
        "ari": all_figures["ari"],
        "pool": all_figures["pool"],
        "pool_error": float(np.mean(curves.pool_error[half:])),
        "start_error": all_figures["start_error"],
        "milliseconds": all_figures["milliseconds"],
    }


def _call(case: Case, seed: int, options: Json) -> dict[str, float]:
    problem = planted.make_problem(case, seed)
    ask = planted.ask_aggregator("pfpt", **options)
    started = time.perf_counter()
    answer = ask(problem, seed)
    seconds = time.perf_counter() - started
    true = problem.true_prompts / problem.spread
    return {
        "ari": planted.score(problem, answer)["ari"],
        "pool": len(answer.centroids) / len(np.unique(problem.flat_labels)),
        "pool_error": keyed.pool_error(true, answer.centroids / problem.spread),
        "milliseconds": 1000 * seconds,
    }


def compare(default: list[dict[str, float]], changed: list[dict[str, float]]) -> Json:
    """Per measure, both means and the interval of the paired difference; lists are over seeds."""
    result = {}
    for name in default[0]:
        before = [scores[name] for scores in default]
        after = [scores[name] for scores in changed]
        result[name] = {
            "default": interval(before)["mean"],
            "value": interval(after)["mean"],
            "difference": interval([b - a for a, b in zip(before, after, strict=True)]),
        }
    return result


def measure_world(name: str, options: list[str], seeds: int) -> list[Json]:
    """A row per value of those options that are measured in a world.

    Seed by seed all values run one after the other, so that a busy machine slows all alike.
    """
    tried = [
        (option, value)
        for option in options
        if name in EFFECTS[option].worlds
        for value in EFFECTS[option].values
    ]
    if not tried:
        return []
    settings: list[Json] = [{}, *({option: value} for option, value in tried)]
    scores: list[list[dict[str, float]]] = [[] for _ in settings]
    for seed in range(seeds):
        for setting, found in zip(settings, scores, strict=True):
            found.append(run(WORLDS[name], seed, setting))
    rows = []
    for (option, value), found in zip(tried, scores[1:], strict=True):
        default = getattr(PfptOptions(), option)
        row = {"option": option, "value": value, "default": default, "world": name}
        rows.append({**row, "measures": compare(scores[0], found)})
    return rows


def measure_all(options: list[str], seeds: int) -> list[Json]:
    """All rows, printed world by world, in the order of the options."""
    run(dataclasses.replace(BASE, rounds=2), 0, {})  # imports and first calls are not timed
    rows = []
    for name in WORLDS:
        found = measure_world(name, options, seeds)
        rows += found
        for row in found:
            print(line(row), flush=True)
    return sorted(rows, key=lambda row: options.index(row["option"]))


def line(row: Json) -> str:
    """A row of the table: for each measure, default -> value (difference +- half width)."""
    parts = [f"{row['world']:10} {row['option']:14} {row['default']!s:>5} -> {row['value']!s:5}"]
    for name, figures in row["measures"].items():
        places = 0 if name == "milliseconds" else 3
        difference, half = figures["difference"]["mean"], figures["difference"]["ci95"]
        width = "" if half is None else f" +- {half:.{places}f}"
        parts.append(
            f"{name} {figures['default']:.{places}f} -> {figures['value']:.{places}f}"
            f" ({difference:+.{places}f}{width})"
        )
    return "  ".join(parts)


def describe_worlds() -> dict[str, object]:
    """What differs from the defaults of `keyed.World` or `planted.Case`."""
    result: dict[str, object] = {}
    for name, world in WORLDS.items():
        if isinstance(world, Case):
            result[name] = {"planted": dataclasses.asdict(world)}
        else:
            result[name] = {"keyed": keyed.changes(world)}
    return result


def _options(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in EFFECTS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(EFFECTS)}, got {unknown[0]!r}"
        )
    return names


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--options", type=_options, default=list(EFFECTS), help=",".join(EFFECTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "extensions.json")
    arguments = parser.parse_args()
    one_thread()
    started = time.perf_counter()
    with threadpool_limits(1):
        rows = measure_all(arguments.options, arguments.seeds)
    document = header(
        "extensions",
        seconds=round(time.perf_counter() - started, 1),
        seeds=list(range(arguments.seeds)),
        default_world=dataclasses.asdict(World()),
        worlds=describe_worlds(),
        effects=rows,
    )
    write_json(arguments.output, document)
    print()
    print("\n".join(line(row) for row in rows))


if __name__ == "__main__":
    main()
