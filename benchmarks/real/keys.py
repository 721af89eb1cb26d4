"""Do keys name the domain of an image? By plain queries, and in the metric of `prompts.whiten`.

    python -m benchmarks.real.keys [--tasks domains,emoji] [--seeds 5]
                                   [--weights weights/dinov2_s14.safetensors]
                                   [--output benchmarks/results/real_keys.json]

`make real` fetches images and weights of `emoji`; without them it is skipped. Tasks that are not
measured stay in the output as they were. No prompt is trained. The training images are partitioned,
every client's key is its mean query, and held-out images are named by the nearest key: alone, and
in batches of 16 of one domain.

| what    | values                                                                              |
|---------|-------------------------------------------------------------------------------------|
| query   | `style`, `cls`, `both`                                                              |
| metric  | `plain` (Euclidean), `clients` (`data.prefix.spread`: pooled scatter within clients) |
| keys    | `known`: the mean of each domain's clients; `found`: the mean of each group that    |
|         | the key model of `pfpt` finds among all clients; `ten rounds`: among those that a   |
|         | server has met in ten rounds with a quarter of the clients                          |
| setting | `iid`: each domain dealt to its clients at random; Dirichlet 0.5 and 0.1, and 99 %  |
|         | imbalance, within domains                                                           |

A group counts for the domain that most of its clients have. The defaults of the metric and of its
groups were chosen on the validation split of `emoji` and `domains`; the tables are of the test
split. `sketch` is the metric of r random directions of the query, which would take fewer bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from benchmarks.harness import (
    RESULTS,
    Json,
    command,
    header,
    interval,
    one_thread,
    read_json,
    write_json,
)
from fedprompt.aggregation.pfpt.map.key_noise import infer_key_noise
from fedprompt.config import compose
from fedprompt.core.errors import FedpromptError
from fedprompt.data.partition.base import partitioners, split_by_group
from fedprompt.data.prefix.spread import factor_size, metric_of
from fedprompt.data.prefix.tables import FeatureTable
from fedprompt.runs.federation import prepare

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

TASKS = {
    "domains": ["method=pfpt"],
    "emoji": ["method=pfpt", "data=emoji", "model=dinov2_s14_local", "head=released"],
}
CLIENTS, PER_ROUND, ROUNDS, BATCH, SHUFFLES = 40, 10, 10, 16, 4
QUERIES = ("style", "cls", "both")
SETTINGS: dict[str, Json] = {
    "iid": {"name": "iid"},
    "dirichlet_0.5": {"name": "dirichlet", "alpha": 0.5},
    "dirichlet_0.1": {"name": "dirichlet", "alpha": 0.1},
    "imbalance": {"name": "imbalance"},
}
SKETCHES = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Clients:
    """Who holds which training images."""

    parts: list[Indices]
    domain: Indices
    """(m,) of each client."""


def clients_of(train: FeatureTable, setting: str, seed: int) -> Clients:
    """A partition; with imbalance a client dominates as many classes as its domain's ask for."""
    options = dict(SETTINGS[setting])
    if setting == "imbalance":
        domains = np.unique(train.groups)
        classes = max(len(np.unique(train.labels[train.groups == each])) for each in domains)
        options["dominated"] = -(-classes * len(domains) // CLIENTS)
    partition = partitioners.create(str(options.pop("name")), **options)
    parts = split_by_group(partition, train.labels, train.groups, CLIENTS, seed)
    return Clients(parts, np.array([train.groups[part[0]] for part in parts]))


@dataclasses.dataclass(frozen=True)
class World:
    """The queries of one kind, as the clients hold them."""

    clients: Clients
    keys: Array
    """(m, q)"""
    scatters: list[Array]
    """Of each client (q, q)."""
    held: Array
    """(N, q) of held-out images."""
    groups: Indices
    """(N,) their domains."""

    @classmethod
    def of(cls, clients: Clients, queries: Array, held: Array, groups: Indices) -> World:
        """Keys and scatters as clients tell them."""
        own = [queries[part] for part in clients.parts]
        centred = [each - each.mean(axis=0) for each in own]
        keys = np.stack([each.mean(axis=0) for each in own])
        return cls(clients, keys, [each.T @ each for each in centred], held, groups)

    def metric(self, which: Sequence[int]) -> Array:
        """Of the clients that were met."""
        freedom = sum(len(self.clients.parts[client]) - 1 for client in which)
        found = metric_of(np.sum([self.scatters[client] for client in which], axis=0), freedom)
        assert found is not None
        return found

    def recognised(self, keys: Array, domains: Indices, metric: Array | None, seed: int) -> Json:
        """Shares of images, and of batches of `BATCH`, whose nearest key is of their domain.

        Args:
            keys: (K, q)
            domains: (K,)
            metric: (q, q); None for the Euclidean one.
            seed: of the batches.
        """
        draws = np.random.default_rng(seed)
        batches = [
            members[start : start + BATCH]
            for _ in range(SHUFFLES)
            for group in np.unique(self.groups)
            for members in [draws.permutation(np.flatnonzero(self.groups == group))]
            for start in range(0, len(members) - BATCH + 1, BATCH)
        ]
        means = np.stack([self.held[batch].mean(axis=0) for batch in batches])
        of_batches = np.array([self.groups[batch[0]] for batch in batches])
        return {
            "single": float((domains[nearest(self.held, keys, metric)] == self.groups).mean()),
            "16": float((domains[nearest(means, keys, metric)] == of_batches).mean()),
        }


def nearest(queries: Array, keys: Array, metric: Array | None) -> Indices:
    """(N,) row of the nearest key."""
    if metric is not None:
        queries, keys = queries @ metric, keys @ metric
    distances = (keys**2).sum(axis=1) - 2 * queries @ keys.T
    return np.asarray(distances.argmin(axis=1))


def centres(keys: Array, labels: Indices, domain: Indices) -> tuple[Array, Indices]:
    """Mean key of each group, and the domain of most of its clients."""
    groups = np.unique(labels)
    means = np.stack([keys[labels == group].mean(axis=0) for group in groups])
    return means, np.array([np.bincount(domain[labels == group]).argmax() for group in groups])


def figures(world: World, whitened: bool, seed: int) -> Json:
    """`known`, `found` and `ten rounds` of one metric."""
    everyone, domain = np.arange(len(world.keys)), world.clients.domain
    metric = world.metric(everyone.tolist()) if whitened else None
    known = world.recognised(*centres(world.keys, domain, domain), metric, seed)
    labels = infer_key_noise(world.keys, everyone, None, metric).labels
    found = world.recognised(*centres(world.keys, labels, domain), metric, seed)
    return {
        "known": known,
        "found": {**found, **agreement(domain, labels)},
        "ten rounds": after_rounds(world, whitened, seed),
    }


def agreement(domain: Indices, labels: Indices) -> Json:
    """How far groups are domains."""
    return {"ari": float(adjusted_rand_score(domain, labels)), "groups": len(np.unique(labels))}


def after_rounds(world: World, whitened: bool, seed: int) -> Json:
    """With what a server knows after some rounds of partial participation."""
    draws, met = np.random.default_rng(seed), set[int]()
    memory: Array | None = None
    for _ in range(ROUNDS):
        cohort = np.sort(draws.choice(len(world.keys), PER_ROUND, replace=False))
        met |= set(cohort.tolist())
        if not whitened:  # else the server has kept the keys of all whom it has met
            result = infer_key_noise(world.keys[cohort], np.arange(PER_ROUND), memory)
            memory = result.memory
    if whitened:
        clients, metric = np.array(sorted(met)), world.metric(sorted(met))
        labels = infer_key_noise(world.keys[clients], np.arange(len(met)), None, metric).labels
    else:
        owner = {key.tobytes(): client for client, key in enumerate(world.keys)}
        clients, metric = np.array([owner[key.tobytes()] for key in result.memory]), None
        labels = result.memory_labels
    domain = world.clients.domain[clients]
    means, names = centres(world.keys[clients], labels, domain)
    return {**world.recognised(means, names, metric, seed), **agreement(domain, labels)}


def sketched(world: World, width: int, seed: int) -> Json:
    """`known`, by so many random directions that all clients know."""
    draws = np.random.default_rng(0)
    directions = draws.normal(size=(world.keys.shape[1], width))
    small = dataclasses.replace(
        world,
        keys=world.keys @ directions,
        scatters=[directions.T @ each @ directions for each in world.scatters],
        held=world.held @ directions,
    )
    domain = world.clients.domain
    metric = small.metric(range(len(world.keys)))
    return small.recognised(*centres(small.keys, domain, domain), metric, seed)


def averaged(results: Sequence[Json]) -> Json:
    """Means and 95 % intervals over seeds, at the leaves of equal documents."""
    first = results[0]
    return {
        name: averaged([each[name] for each in results])
        if isinstance(value, dict)
        else interval([float(each[name]) for each in results])
        for name, value in first.items()
    }


def measure(task: str, seeds: int, weights: str | None = None) -> Json:
    """All settings and queries of one task.

    Args:
        task: of `TASKS`.
        seeds: partitions.
        weights: a file of the real backbone, if not where `make real` puts it.

    Raises:
        FedpromptError: its data or weights are not there.
    """
    changes = [*TASKS[task], "compare=[]", "partition=iid"]
    if weights and task != "domains":
        changes.append(f"model.pretrained={weights}")
    config = compose("domains", changes)
    federation = prepare(config)
    train, (test, _) = federation.data.table, federation.setup.splits
    rows: Json = {}
    for setting in SETTINGS:
        for kind in QUERIES:
            queries, held = (table.queries(kind).astype(float) for table in (train, test))
            by_seed: list[Json] = []
            for seed in range(seeds):
                clients = clients_of(train, setting, seed)
                world = World.of(clients, queries, held, test.groups)
                found = {
                    "plain": figures(world, False, seed),
                    "clients": figures(world, True, seed),
                }
                if kind == "both" and setting == "iid":
                    found["sketch"] = {
                        str(width): sketched(world, width, seed) for width in SKETCHES
                    }
                by_seed.append(found)
            rows[f"{setting}/{kind}"] = averaged(by_seed)
            print_row(task, f"{setting}/{kind}", rows[f"{setting}/{kind}"])
    return {"images": len(test), "rows": rows, "cost": cost(train)}


def cost(train: FeatureTable) -> Json:
    """What the metric of `both` costs: seconds of the server, bytes of a client."""
    clients = clients_of(train, "iid", 0)
    queries = train.queries("both").astype(float)
    world = World.of(clients, queries, queries, train.groups)
    started = time.perf_counter()
    world.metric(range(CLIENTS))
    seconds = time.perf_counter() - started
    width = queries.shape[1]
    numbers = [factor_size(len(part), width) for part in clients.parts]
    return {"q": width, "seconds": seconds, "bytes once": 4 * float(np.mean(numbers))}


def print_row(task: str, name: str, row: Json) -> None:
    """One line for each metric."""
    for metric in ("plain", "clients"):
        cells = [
            f"{keys} {values['single']['mean']:.3f} {values['16']['mean']:.3f}"
            + (
                f" ARI {values['ari']['mean']:.2f} K {values['groups']['mean']:.1f}"
                if "ari" in values
                else ""
            )
            for keys, values in row[metric].items()
        ]
        print(f"{task:8s} {name:20s} {metric:8s} | " + " | ".join(cells), flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--weights")
    parser.add_argument("--output", type=Path, default=RESULTS / "real_keys.json")
    given = parser.parse_args()
    one_thread()
    before: Json = read_json(given.output) if given.output.exists() else {}
    kept = {key: dict(before.get(key, {})) for key in ("tasks", "skipped")}
    document: Json = {**header("real_keys"), **kept}
    for task in given.tasks.split(","):
        try:
            found = measure(task, given.seeds, given.weights)
            about = {"command": command(), "seeds": given.seeds}
            document["tasks"][task] = {**about, **found}
            document["skipped"].pop(task, None)
        except FedpromptError as error:
            document["skipped"][task] = str(error)
            print(f"{task}: skipped, {error}")
    write_json(given.output, document)


if __name__ == "__main__":
    main()
