"""What the prompts and their selection know of the domains, with the frozen head.

    python -m benchmarks.methods.domains [--methods pfpt fedavg_pt_plus ...]
                                         [--output benchmarks/results/methods_domains.json]

For each partition the run of the grid with seed 0 is done once more, with and without whitened
queries where the grid has both; its last state is asked:

* `accuracy`: test accuracy of the images of each domain (row) under the prompts that are selected
  most often for the images of each domain (column), and under no prompts.
* `overlap`: share of those prompts that two domains have in common.
* `clients`: mean share of selected prompts that two clients have in common, of the same and of
  different domains, and the share of a client's images that are of its main domain.
* `together`: test accuracy by the number of images of a domain that select together.

`recognised` is asked of the queries alone: the share of single test images of each domain whose
query is nearest to the mean query of their own domain's training images, plain and whitened.
Methods that are not asked for stay in the file as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import RESULTS, Json, one_thread, read_json, write_json
from benchmarks.methods import grid
from benchmarks.methods.bounds import configure, federate
from benchmarks.methods.grid import Cell
from benchmarks.methods.results import Store
from benchmarks.methods.runner import choose
from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.types import ServerState
from fedprompt.data.prefix.tables import FeatureTable
from fedprompt.models.selection import nearest_keys
from fedprompt.runs.driver import settings_of
from fedprompt.runs.federation import Federation, initial_state, prepare
from fedprompt.runs.manifest import manifest
from fedprompt.server.evaluate import Model, predict, select_for, select_for_split

OUTPUT = RESULTS / "methods_domains.json"
METHODS = ("pfpt", "fedavg_pt_plus", grid.WHITENED_PFPT, grid.WHITENED_PLUS)
TOGETHER = (1, 2, 4, 8, 16, 64)
"""Images that select together."""


def in_common(first: Tensor, second: Tensor) -> float:
    """Share of the rows (k,) of a selection that are in another one as well.

    >>> in_common(torch.tensor([0, 1]), torch.tensor([1, 5]))
    0.5
    """
    return float(torch.isin(first, second).float().mean())


def usual_selections(
    state: ServerState, recipe: LocalRecipe, federation: Federation
) -> list[Tensor]:
    """For each domain the rows (k,) that are selected for most of its test images."""
    table = federation.setup.splits[0]
    usual = []
    for group in range(len(federation.task.group_names)):
        images = np.flatnonzero(table.groups == group)
        selected = select_for(
            Model(state.broadcast()), recipe, table, images, recipe.prompts.eval_batch
        )[1]
        rows, counts = np.unique(selected.numpy(), axis=0, return_counts=True)
        usual.append(torch.from_numpy(rows[counts.argmax()]))
    return usual


def accuracy_of(
    state: ServerState, recipe: LocalRecipe, federation: Federation, group: int, rows: Tensor
) -> float:
    """Test accuracy of one domain's images, all under the same rows (k,) of the prompts."""
    images = np.flatnonzero(federation.setup.splits[0].groups == group)
    return share_right(state, recipe, federation, images, rows.expand(len(images), -1))


def share_right(
    state: ServerState,
    recipe: LocalRecipe,
    federation: Federation,
    images: NDArray[np.int64],
    rows: Tensor,
) -> float:
    """Test accuracy of some images, each under its own rows (len(images), k) of the prompts."""
    predictions = predict(
        Model(state.broadcast()),
        recipe,
        federation.backbone,
        federation.setup.splits[0],
        images,
        rows,
        federation.data.class_mask,
        torch.device("cpu"),
    )
    return float(
        torch.cat([logits.argmax(dim=1) == labels for logits, labels in predictions]).float().mean()
    )


def together(state: ServerState, recipe: LocalRecipe, federation: Federation) -> dict[str, float]:
    """Test accuracy by how many images of a domain select together."""
    table = federation.setup.splits[0]
    found = {}
    for count in TOGETHER:
        prompts = dataclasses.replace(recipe.prompts, eval_batch=count)
        changed = dataclasses.replace(recipe, prompts=prompts)
        order, rows = select_for_split(state, changed, table)
        found[str(count)] = share_right(state, changed, federation, order, rows)
    return found


def recognised(train: FeatureTable, test: FeatureTable, kind: str) -> list[float]:
    """For each domain the share of single test images whose query is nearest to the mean query of
    its own training images.
    """
    groups = np.unique(train.groups)
    means = np.stack([train.queries(kind)[train.groups == group].mean(axis=0) for group in groups])
    distances = ((test.queries(kind)[:, None] - means) ** 2).sum(axis=2)
    right = groups[distances.argmin(axis=1)] == test.groups
    return [float(right[test.groups == group].mean()) for group in groups]


def recognised_by_query() -> dict[str, dict[str, float]]:
    """`recognised` of plain and whitened style queries, by name of the domain."""
    cell = Cell("domains_frozen/dirichlet_0.5", "pfpt", 0)
    config = configure(cell, 1.0, "prompts.whiten=true")
    federation = prepare(config)
    tables = federation.data.table, federation.setup.splits[0]
    names = federation.task.group_names
    return {
        kind: dict(zip(names, recognised(*tables, kind), strict=True))
        for kind in (config.prompts.query, config.prompts.query_kind)
    }


def clients_in_common(
    state: ServerState, recipe: LocalRecipe, federation: Federation
) -> dict[str, float]:
    """How far the selections of two clients agree, by whether their main domains are the same."""
    data, table = federation.data, federation.data.table
    main, share, chosen = [], [], []
    for part in data.parts:
        counts = np.bincount(table.groups[part])
        main.append(int(counts.argmax()))
        share.append(float(counts.max() / counts.sum()))
        query = torch.from_numpy(table.queries(recipe.prompts.query_kind)[part]).mean(dim=0)
        chosen.append(nearest_keys(query, state.keys, recipe.prompts.count))
    agreement: dict[bool, list[float]] = {True: [], False: []}
    for one, other in itertools.combinations(range(len(data.parts)), 2):
        agreement[main[one] == main[other]].append(in_common(chosen[one], chosen[other]))
    return {
        "same domain": float(np.mean(agreement[True])),
        "different domains": float(np.mean(agreement[False])),
        "main domain's share": float(np.mean(share)),
    }


def ask(partition: str, method: str, store: Store) -> Json:
    """One run and what its last state knows.

    Args:
        partition: of `grid.PARTITIONS`.
        method: of the grid.
        store: has that very run, with which this one is compared.
    """
    cell = Cell(f"domains_frozen/{partition}", method, 0)
    scale = choose(cell, store)
    config = configure(cell, scale)
    federation = prepare(config)
    start = initial_state(config, federation)
    state, figures = federate(config, federation, start, config.build_aggregator())
    done = store.find(cell)
    assert done is not None and figures["test"] == done.accuracy, f"not the run of {cell.name}"
    recipe = settings_of(config, federation).recipe
    by_number = together(state, recipe, federation)
    assert by_number[str(recipe.prompts.eval_batch)] == figures["test"]
    names = federation.task.group_names
    usual = usual_selections(state, recipe, federation)
    nothing = torch.empty(0, dtype=torch.int64)
    columns = {**dict(zip(names, usual, strict=True)), "no prompts": nothing}
    return {
        "rates x": scale,
        "test": figures["test"],
        "prompts": len(state.prompts),
        "accuracy": {
            name: {
                column: accuracy_of(state, recipe, federation, group, rows)
                for column, rows in columns.items()
            }
            for group, name in enumerate(names)
        },
        "overlap": {
            f"{one}, {other}": in_common(usual[first], usual[second])
            for (first, one), (second, other) in itertools.combinations(enumerate(names), 2)
        },
        "clients": clients_in_common(state, recipe, federation),
        "together": by_number,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    one_thread()
    content = read_json(arguments.output)
    content |= {"machine": manifest(), "recognised": recognised_by_query()}
    asked = {(cell.setting, cell.method) for cell in grid.final_cells()}
    for method, partition in itertools.product(arguments.methods, grid.PARTITIONS):
        if (f"domains_frozen/{partition}", method) not in asked:
            continue
        found = ask(partition, method, Store())
        content.setdefault(method, {})[partition] = found
        print(method, partition, json.dumps(found, indent=1), flush=True)
        write_json(arguments.output, content)


if __name__ == "__main__":
    main()
