"""What the prompts and their selection know of the domains, with the frozen head.

    python benchmarks/methods/domains.py [--methods pfpt fedavg_pt_plus]
                                         [--output benchmarks/results/methods_domains.json]

For each partition the run of the grid with seed 0 is done once more; its last state is asked:

* `accuracy`: test accuracy of the images of each domain (row) under the prompts that are selected
  most often for the images of each domain (column), and under no prompts.
* `overlap`: share of those prompts that two domains have in common.
* `clients`: mean share of selected prompts that two clients have in common, of the same and of
  different domains, and the share of a client's images that are of its main domain.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import grid
import numpy as np
import torch
from bounds import configure, federate
from grid import Cell
from runner import OUTPUT as RESULTS
from runner import choose
from torch import Tensor

from fedprompt.checkpoint import atomic_write, json_ready
from fedprompt.client.recipe import LocalRecipe
from fedprompt.driver import Federation, initial_state, prepare, settings_of
from fedprompt.models.prompted_vit import nearest_keys
from fedprompt.records import manifest
from fedprompt.server.evaluate import Model, predict, select_for
from fedprompt.types import ServerState

OUTPUT = Path(__file__).parents[1] / "results" / "methods_domains.json"


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
        selected = select_for(Model(state.broadcast()), recipe, table, images)[1]
        rows, counts = np.unique(selected.numpy(), axis=0, return_counts=True)
        usual.append(torch.from_numpy(rows[counts.argmax()]))
    return usual


def accuracy_of(
    state: ServerState, recipe: LocalRecipe, federation: Federation, group: int, rows: Tensor
) -> float:
    """Test accuracy of one domain's images, all under the same rows (k,) of the prompts."""
    table = federation.setup.splits[0]
    images = np.flatnonzero(table.groups == group)
    predictions = predict(
        Model(state.broadcast()),
        recipe,
        federation.backbone,
        table,
        images,
        rows.expand(len(images), -1),
        federation.data.class_mask,
        torch.device("cpu"),
    )
    return float(
        torch.cat([logits.argmax(dim=1) == labels for logits, labels in predictions]).float().mean()
    )


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


def ask(partition: str, method: str) -> dict[str, Any]:
    """One run and what its last state knows."""
    cell = Cell(f"domains_frozen/{partition}", method, 0)
    scale = choose(cell, RESULTS)
    config = configure(cell, scale)
    federation = prepare(config)
    start = initial_state(config, federation)
    state, figures = federate(config, federation, start, config.build_aggregator())
    done = json.loads((RESULTS / cell.file).read_text(encoding="utf-8"))
    assert figures["test"] == done["accuracy"], f"not the run of {cell.file}"
    recipe = settings_of(config, federation).recipe
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
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="*", default=["pfpt", "fedavg_pt_plus"])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    content: dict[str, Any] = {"machine": manifest()}
    for method, partition in itertools.product(arguments.methods, grid.PARTITIONS):
        found = ask(partition, method)
        content.setdefault(method, {})[partition] = found
        print(method, partition, json.dumps(found, indent=1), flush=True)
        atomic_write(arguments.output, json.dumps(json_ready(content), indent=1) + "\n")


if __name__ == "__main__":
    main()
