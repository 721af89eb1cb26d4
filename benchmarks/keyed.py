"""Does `pfpt` find planted (group, prompt) pairs when prompts carry keys, round after round?

    python -m benchmarks.keyed [--parts keys,prompts,drift,partial,long] [--seeds 5]
                               [--output benchmarks/results/keyed.json]

A *world* has groups (visual domains); each has a key and a set of true prompts of its own, and
each client belongs to one group. The key of a client is its group's key and a deviation that stays
the same in all rounds, as the mean query of fixed data does; the deviations lie in a few directions
(`key_rank`), as those of real style queries. A round is as in a real run, but for local training:

1. a cohort is drawn; each client selects as many broadcast rows as its group has prompts, those
   with the nearest keys (without keys: those nearest to its group's prompts);
2. each selected row moves `progress` of the way to one of the group's true prompts (the pairing of
   least squared distance), and noise is added; the client returns it with its own key. A client
   that lacks some of its group's prompts (`rare`) returns one row for each prompt it has;
3. the aggregator gets sets, keys, origins, the broadcast prompts and keys, and its state of the
   round before; what it returns is broadcast next.

Noise and offsets are in units of the spread (root mean square per coordinate) between groups.

| part      | world                                                                              |
|-----------|------------------------------------------------------------------------------------|
| `keys`    | groups have almost the same prompts: only keys tell them apart; `key_noise` varies |
| `prompts` | groups have one key: only prompts tell them apart; `prompt_noise` varies           |
| `drift`   | groups' keys move by `key_drift` a round; `key_noise` varies                       |
| `partial` | 100 rounds with 10 of 40 clients: agreement and pool over rounds                   |
| `long`    | 200 rounds with 10 of 100 clients, prompts move every round; without and with keys |

What is measured, over the rounds of the second half unless said otherwise:

* `ari`: adjusted Rand index of the assignment of a round's local prompts against (group, prompt);
* `pool`: rows over true number of (group, prompt) pairs; `pool_low`, `pool_high`: extremes after
  `BURN_IN` rounds; `in_bounds`: share of those rounds with a ratio from 1/2 to 2;
* `start_error`: root mean square distance from the rows that clients select to the true prompts
  they are paired with, in units of the spread. That is what selection by key hands to clients;
* `milliseconds`: per call of the aggregator, all rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.harness import RESULTS, Json, header, interval, one_thread, write_json
from fedprompt import aggregation
from fedprompt.aggregation import Aggregation, Aggregator

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

BURN_IN = 20
"""Rounds that the pool may take to grow from one set of prompts to one for each group."""


@dataclasses.dataclass(frozen=True)
class World:
    """One planted federation."""

    groups: int = 4
    prompts: int = 5
    """True prompts of each group."""
    clients: int = 40
    per_round: int = 10
    rounds: int = 20
    dimension: int = 64
    key_dimension: int = 64
    key_rank: int = 6
    """Directions that clients' keys deviate in."""
    key_noise: float = 0.3
    prompt_noise: float = 0.3
    own_prompts: float = 1.0
    """Share of the prompts' spread that is a group's own; 0 gives all groups equal prompts."""
    own_keys: bool = True
    """Whether groups have keys of their own; otherwise one for all."""
    key_drift: float = 0.0
    """Step of the groups' keys in a round."""
    prompt_drift: float = 0.0
    """Step of the true prompts in a round."""
    keyed: bool = True
    """Whether the aggregator and the clients see keys."""
    progress: float = 0.8
    """Share of the way to a true prompt that local training goes."""
    rare: int = 0
    """How many prompts of each group only some of its clients have, the same in all rounds."""
    rare_share: float = 0.1
    """Share of a group's clients that have a given rare prompt; at least one has it."""
    count_spread: float = 0.0
    """Standard deviation of the log of a client's sample count; the median count is 1."""
    count_power: float = 0.5
    """The noise of a client's prompts is divided by its sample count to this power."""

    def __post_init__(self) -> None:
        if self.rare >= self.prompts:
            raise ValueError(f"all {self.prompts} prompts are rare: a client could have none")


PARTS: dict[str, list[World]] = {
    "keys": [World(own_prompts=0.1, key_noise=noise) for noise in (0.1, 0.3, 0.5, 0.7)],
    "prompts": [World(own_keys=False, prompt_noise=noise) for noise in (0.1, 0.3, 0.5, 0.7)],
    "drift": [
        World(rounds=40, key_drift=drift, key_noise=noise)
        for drift in (0.02, 0.1)
        for noise in (0.1, 0.3, 0.5)
    ],
    "partial": [World(rounds=100, key_noise=noise) for noise in (0.3, 0.5)],
    "long": [
        World(rounds=200, clients=100, prompt_drift=0.05, keyed=keyed) for keyed in (False, True)
    ],
}


class Planted:
    """The truth of a world and how it moves.

    Args:
        world: what to draw.
        seed: of everything.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.generator = np.random.default_rng(seed)
        draw, w = self.generator.normal, world
        common = draw(size=(1, w.prompts, w.dimension))
        own = draw(size=(w.groups, w.prompts, w.dimension))
        self.prompts: Array = math.sqrt(1 - w.own_prompts**2) * common + w.own_prompts * own
        """(G, P, d), spread 1"""
        self.keys: Array = draw(size=(w.groups if w.own_keys else 1, w.key_dimension))
        self.keys = self.keys[np.arange(w.groups) % len(self.keys)]
        """(G, q), spread 1"""
        self.group: Indices = np.arange(w.clients) % w.groups
        """(clients,)"""
        directions = draw(size=(w.key_rank, w.key_dimension)) / math.sqrt(w.key_rank)
        self.deviations: Array = w.key_noise * draw(size=(w.clients, w.key_rank)) @ directions
        self.has: NDArray[np.bool_] = np.ones((w.clients, w.prompts), dtype=bool)
        """(clients, P) which of its group's prompts a client has"""
        self.counts: Array = np.ones(w.clients)
        """(clients,) sample counts"""
        if w.rare:
            self._choose_owners()
        if w.count_spread:
            self.counts = np.exp(w.count_spread * draw(size=w.clients))

    def _choose_owners(self) -> None:
        for group in range(self.world.groups):
            members = np.flatnonzero(self.group == group)
            number = max(1, round(self.world.rare_share * len(members)))
            for prompt in range(self.world.prompts - self.world.rare, self.world.prompts):
                self.has[members, prompt] = False
                self.has[self.generator.choice(members, number, replace=False), prompt] = True

    def cohort(self) -> Indices:
        """The clients of a round."""
        chosen = self.generator.choice(self.world.clients, self.world.per_round, replace=False)
        return np.asarray(chosen, dtype=np.int64)

    def key(self, client: int) -> Array:
        """(q,) the client's key."""
        key: Array = self.keys[self.group[client]] + self.deviations[client]
        return key

    def noise(self, client: int) -> float:
        """Of the client's prompts."""
        return self.world.prompt_noise / float(self.counts[client] ** self.world.count_power)

    def move(self) -> None:
        """One round of drift; the spread stays 1."""
        self.prompts = self._moved(self.prompts, self.world.prompt_drift)
        self.keys = self._moved(self.keys, self.world.key_drift)

    def _moved(self, values: Array, step: float) -> Array:
        if step == 0:
            return values
        result: Array = math.sqrt(1 - step**2) * values
        result += step * self.generator.normal(size=values.shape)
        return result


@dataclasses.dataclass(frozen=True)
class LocalResult:
    """What a client returns, and the truth about it."""

    prompts: Array
    """(k, d)"""
    origins: Indices
    """(k,) the broadcast row of each."""
    labels: Indices
    """(k,) group * prompts + prompt."""
    start_error: float
    """Mean square distance from selected rows to their true prompts, per coordinate."""


def train_client(
    planted: Planted, client: int, pool: Array, pool_keys: Array | None
) -> LocalResult:
    """Steps 1 and 2 of a round; (n, d) broadcast prompts and (n, q) keys."""
    world, group = planted.world, int(planted.group[client])
    own = np.flatnonzero(planted.has[client])
    true = planted.prompts[group, own]
    rows: Indices = np.arange(len(pool), dtype=np.int64)
    if pool_keys is not None:
        distance = ((pool_keys - planted.key(client)) ** 2).sum(axis=1)
        rows = np.sort(np.argsort(distance, kind="stable")[: world.prompts])
    cost = ((pool[rows][:, None] - true[None]) ** 2).mean(axis=2)
    picked, targets = linear_sum_assignment(cost)
    start = pool[rows[picked]]
    noise = planted.noise(client) * planted.generator.normal(size=true.shape)[: len(start)]
    return LocalResult(
        prompts=start + world.progress * (true[targets] - start) + noise,
        origins=rows[picked],
        labels=group * world.prompts + own[targets],
        start_error=float(cost[picked, targets].mean()),
    )


@dataclasses.dataclass(frozen=True)
class Curves:
    """Per round of one run."""

    ari: list[float]
    pool: list[float]
    start_error: list[float]
    seconds: list[float]
    pool_error: list[float] = dataclasses.field(default_factory=list)
    """Root mean square distance from each true prompt to its nearest row of the new pool."""


def run(world: World, seed: int, aggregator: Aggregator) -> Curves:
    """All rounds of one world."""
    planted = Planted(world, seed)
    draw = planted.generator.normal
    pool = torch.tensor(0.1 * draw(size=(world.prompts, world.dimension))).float()
    keys: Tensor | None = None
    if world.keyed:
        keys = torch.tensor(draw(size=(world.prompts, world.key_dimension))).float()
    state: dict[str, Tensor] = {}
    curves = Curves([], [], [], [])
    true_number = world.groups * world.prompts
    for _ in range(world.rounds):
        cohort = planted.cohort()
        before = pool.double().numpy()
        keys_before = None if keys is None else keys.double().numpy()
        results = [train_client(planted, int(c), before, keys_before) for c in cohort]
        started = time.perf_counter()
        merged = aggregate(aggregator, planted, cohort, results, pool, keys, state)
        curves.seconds.append(time.perf_counter() - started)
        truth = np.concatenate([result.labels for result in results])
        found = torch.cat(merged.assignment).numpy()
        curves.ari.append(float(adjusted_rand_score(truth, found)))
        curves.pool.append(len(merged.prompts) / true_number)
        error = np.mean([result.start_error for result in results])
        curves.start_error.append(math.sqrt(float(error)))
        pool, keys, state = merged.prompts, merged.keys, merged.state
        curves.pool_error.append(pool_error(planted.prompts, pool.double().numpy()))
        planted.move()
    return curves


def pool_error(true: Array, pool: Array) -> float:
    """Of (G, P, d) true prompts and (n, d) rows, per coordinate."""
    flat = true.reshape(-1, true.shape[-1])
    squares = ((flat[:, None] - pool[None]) ** 2).mean(axis=2)
    return math.sqrt(float(squares.min(axis=1).mean()))


def aggregate(
    aggregator: Aggregator,
    planted: Planted,
    cohort: Indices,
    results: list[LocalResult],
    pool: Tensor,
    keys: Tensor | None,
    state: dict[str, Tensor],
) -> Aggregation:
    """Step 3 of a round."""
    sent = None
    if keys is not None:
        sent = [
            torch.tensor(planted.key(int(client))).float().expand(len(result.prompts), -1).clone()
            for client, result in zip(cohort, results, strict=True)
        ]
    return aggregator.aggregate(
        [torch.tensor(result.prompts).float() for result in results],
        weights=torch.tensor(planted.counts[cohort]) if planted.world.count_spread else None,
        origins=[torch.tensor(result.origins) for result in results],
        previous=pool,
        keys=sent,
        state=state,
        previous_keys=keys,
    )


def figures(curves: Curves) -> dict[str, float]:
    """One number per measure for one run."""
    half = len(curves.ari) // 2
    settled = np.array(curves.pool[BURN_IN:] or curves.pool[half:])
    return {
        "ari": float(np.mean(curves.ari[half:])),
        "pool": float(np.mean(curves.pool[half:])),
        "pool_low": float(settled.min()),
        "pool_high": float(settled.max()),
        "in_bounds": float(((settled >= 0.5) & (settled <= 2)).mean()),
        "start_error": float(np.mean(curves.start_error[half:])),
        "milliseconds": 1000 * float(np.mean(curves.seconds)),
    }


def measure(world: World, seeds: int, options: Json) -> Json:
    """One world over seeds: intervals of all figures, and mean curves at up to 20 rounds."""
    aggregator = aggregation.create("pfpt", **options)
    runs = [run(world, seed, aggregator) for seed in range(seeds)]
    scores = [figures(curves) for curves in runs]
    step = max(1, world.rounds // 20)
    shown = list(range(step - 1, world.rounds, step))
    return {
        "world": changes(world),
        "summary": {name: interval([score[name] for score in scores]) for name in scores[0]},
        "curves": {
            "round": [number + 1 for number in shown],
            "ari": _mean_at([curves.ari for curves in runs], shown),
            "pool": _mean_at([curves.pool for curves in runs], shown),
        },
    }


def _mean_at(curves: list[list[float]], shown: list[int]) -> list[float]:
    return [round(float(np.mean([curve[number] for curve in curves])), 4) for number in shown]


def changes(world: World) -> dict[str, object]:
    """What differs from the default world."""
    default = dataclasses.asdict(World())
    return {name: v for name, v in dataclasses.asdict(world).items() if v != default[name]}


def measure_all(parts: list[str], seeds: int, options: Json) -> dict[str, list[Json]]:
    """All worlds of the parts, one line for each."""
    results: dict[str, list[Json]] = {}
    for part in parts:
        results[part] = []
        for world in PARTS[part]:
            result = measure(world, seeds, options)
            results[part].append(result)
            line = "  ".join(f"{k} {v['mean']:.3f}" for k, v in result["summary"].items())
            print(f"{part:8} {json.dumps(result['world'])}\n         {line}", flush=True)
    return results


def _parts(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PARTS)}, got {unknown[0]!r}")
    return names


def main() -> None:
    """Measure, print one line per world, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--options", type=json.loads, default={}, help="of pfpt, as JSON")
    parser.add_argument("--output", type=Path, default=RESULTS / "keyed.json")
    arguments = parser.parse_args()
    one_thread()
    started = time.perf_counter()
    with threadpool_limits(1):
        results = measure_all(arguments.parts, arguments.seeds, arguments.options)
    document = header(
        "keyed",
        seconds=round(time.perf_counter() - started, 1),
        seeds=list(range(arguments.seeds)),
        options=arguments.options,
        default_world=dataclasses.asdict(World()),
        parts=results,
    )
    write_json(arguments.output, document)


if __name__ == "__main__":
    main()
