"""What a federation on `domains` could reach if it knew the domains: references for the methods.

    python -m benchmarks.methods.bounds [--seeds 3] [--parts NAME ...]
                                        [--output benchmarks/results/methods_bounds.json]

* `frozen head`: the frozen head under the task tokens for which it was fitted, each domain's own,
  and under no prompts. Nothing is trained; the same for all partitions.
* `head only, domain tokens`: a shared head, trained as in `head_only`, on features that were
  computed under those tokens of each image's domain: what ideal selection of given prompts would
  do for a shared head. Beside it `head only` on bare features, with the same seeds, rates and
  rounds.
* `true groups`, under the frozen and with the shared head: prompts are learned, one set for each
  domain with the domain's mean query as its fixed key; they are averaged row by row, with a memory
  of `MEMORY` clients. Matching has nothing left to find there. `routed` is the share of clients
  whose nearest set is that of their own domain.

The heads with the grid's scales of the learning rates, of which the best on validation is to be
read; `true groups` with the rates that PFPT has in the grid. Parts and rates that are not asked for
stay in the file as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import RESULTS, Json, mean_and_half, one_thread, read_json, write_json
from benchmarks.methods import grid
from benchmarks.methods.grid import Cell
from benchmarks.methods.results import Store
from benchmarks.methods.runner import choose, experiment_of, overrides_of
from fedprompt.aggregation import Aggregation, AggregationInput, Aggregator
from fedprompt.aggregation import create as create_aggregator
from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.errors import InputError
from fedprompt.core.types import ServerState
from fedprompt.data.prefix.tables import CHUNK, FeatureTable
from fedprompt.models.backbone import Backbone
from fedprompt.runs.driver import evaluator, settings_of
from fedprompt.runs.federation import Federation, initial_state, prepare
from fedprompt.runs.manifest import manifest
from fedprompt.runtime.serial import SerialRuntime
from fedprompt.server.round import run_rounds

OUTPUT = RESULTS / "methods_bounds.json"
MEMORY = 10.0


class RowMean(Aggregator):
    """Row-wise mean with a memory; keys are left as they are."""

    keeps_rows = True

    def merge(self, given: AggregationInput) -> Aggregation:
        """See `Aggregator.merge`; origins, broadcast prompts and their keys must be given."""
        previous, origins, keys = given.previous, given.origins, given.previous_keys
        if previous is None or origins is None or keys is None:
            raise InputError("expected origins, previous and previous_keys; pass all of them")
        strength = given.state.get("strength", torch.zeros(len(previous)))
        total, mass = strength[:, None] * previous, strength.clone()
        for prompts, rows in zip(given.prompt_sets, origins, strict=True):
            total[rows] += prompts
            mass[rows] += 1
        used = torch.isin(torch.arange(len(previous)), torch.cat(list(origins)))
        return Aggregation(
            prompts=torch.where(used[:, None], total / mass.clamp_min(1)[:, None], previous),
            keys=keys.clone(),
            assignment=[rows.clone() for rows in origins],
            state={"strength": mass.clamp_max(MEMORY)},
            diagnostics={"num_prompts": float(len(previous))},
        )


def federate(
    config: ExperimentConfig, federation: Federation, state: ServerState, aggregator: Aggregator
) -> tuple[ServerState, dict[str, float]]:
    """All rounds; the last state and its accuracy."""
    runtime = SerialRuntime(config.runtime)
    runtime.open(federation.setup)
    settings = settings_of(config, federation)
    evaluate = evaluator(runtime, federation, settings)
    *_, (state, report) = run_rounds(state, settings, runtime, aggregator, evaluate)
    runtime.close()
    return state, {"test": report.accuracy, "validation": report.validation_accuracy}


def configure(cell: Cell, scale: float, *changes: str) -> ExperimentConfig:
    """A run of the grid, evaluated in the last round alone."""
    return compose(
        experiment_of(cell.setting),
        [*overrides_of(cell, grid.ROUNDS, scale, Store()), f"eval_every={grid.ROUNDS}", *changes],
    )


def head_only(partition: str, seed: int, scale: float, known: bool) -> dict[str, float]:
    """A shared head on bare features, or on those under each domain's tokens."""
    config = configure(Cell(f"domains_shared/{partition}", "head_only", seed), scale)
    federation = prepare(config)
    if known:
        frozen = configure(Cell(f"domains_frozen/{partition}", "fedavg_pt", seed), scale)
        head = prepare(frozen).frozen_head
        assert head is not None
        tokens = [tokens_of(federation.backbone, name) for name in head.conditions]

        def under_tokens(table: FeatureTable) -> FeatureTable:
            return dataclasses.replace(table, features=features_of(federation, table, tokens))

        setup = federation.setup
        data = dataclasses.replace(setup.data, table=under_tokens(setup.data.table))
        splits = tuple(map(under_tokens, setup.splits))
        setup = dataclasses.replace(setup, data=data, splits=splits)
        federation = dataclasses.replace(federation, setup=setup)
    state = initial_state(config, federation)
    return federate(config, federation, state, create_aggregator("mean"))[1]


def tokens_of(backbone: Backbone, condition: str) -> Tensor | None:
    """The task tokens (n, d) that a frozen head's condition names."""
    if condition == "no prompts":
        return None
    return backbone.extras["task_tokens"][int(condition.removeprefix("task "))]


@torch.no_grad()
def features_of(
    federation: Federation, table: FeatureTable, tokens: Sequence[Tensor | None]
) -> NDArray[np.float32]:
    """CLS features (N, d) of a table, each image under the tokens of its domain."""
    features = np.array(table.features)
    for group, prompts in enumerate(tokens):
        rows = np.flatnonzero(table.groups == group)
        for chunk in np.split(rows, range(CHUNK, len(rows), CHUNK)):
            inputs = table.tokens_at(chunk)
            features[chunk] = federation.backbone.encode(inputs, prompts).numpy()
    return features


def frozen_head() -> dict[str, dict[str, float]]:
    """Accuracy of the frozen head under its own tokens and under none."""
    federation = prepare(configure(Cell("domains_frozen/dirichlet_0.5", "fedavg_pt", 0), 1.0))
    head = federation.frozen_head
    assert head is not None
    own = [tokens_of(federation.backbone, name) for name in head.conditions]
    weight, bias = (head.tensors[f"0.{name}"].numpy() for name in ("weight", "bias"))
    result = {}
    for name, tokens in (("own tokens", own), ("no prompts", [None] * len(own))):
        scores = {}
        for split, table in zip(("test", "validation"), federation.setup.splits, strict=True):
            logits = features_of(federation, table, tokens) @ weight.T + bias
            logits[~federation.data.class_mask[table.groups]] = -np.inf
            scores[split] = float((logits.argmax(axis=1) == table.labels).mean())
        result[name] = scores
    return result


def true_groups(partition: str, seed: int, scale: float, task: str) -> dict[str, float]:
    """Prompts of each true domain, under the frozen head or with the shared one."""
    groups, count = 4, grid.TASKS[task]["prompts"]["count"]
    cell = Cell(f"{task}/{partition}", "fedavg_pt_plus", seed)
    config = configure(cell, scale, f"prompts.pool={groups * count}")
    federation = prepare(config)
    state = initial_state(config, federation)
    table = federation.data.table
    queries = [torch.from_numpy(table.style[table.groups == g]).mean(0) for g in range(groups)]
    keys = torch.stack(queries).repeat_interleave(count, dim=0)
    prompts = state.prompts[:count].repeat(groups, 1)
    state = dataclasses.replace(state, prompts=prompts, keys=keys)
    data = federation.data
    routed = [
        int((keys - torch.from_numpy(table.style[part]).mean(0)).square().sum(1).argmin()) // count
        == np.bincount(table.groups[part]).argmax()
        for part in data.parts
    ]
    _, figures = federate(config, federation, state, RowMean())
    return {**figures, "routed": float(np.mean(routed))}


def described(values: Sequence[float]) -> Json:
    """Mean and half-width of the 95 % interval."""
    mean, half = mean_and_half(values)
    return {"mean": mean, "half_width_95": half, "values": list(values)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    one_thread()
    content = read_json(arguments.output)
    content |= {"machine": manifest(), "frozen head": frozen_head()}
    store = Store()
    for name in arguments.parts:
        work, task = PARTS[name]
        for partition in grid.PARTITIONS:
            scales: tuple[float, ...] = grid.SCALES
            if task is not None:
                scales = (choose(Cell(f"{task}/{partition}", "pfpt", 0), store),)
            found = {}
            for scale in scales:
                runs = [work(partition, seed, scale) for seed in range(arguments.seeds)]
                found[f"rates x {scale:g}"] = {
                    figure: described([run[figure] for run in runs]) for figure in runs[0]
                }
                print(name, partition, scale, runs, flush=True)
            content.setdefault(name, {}).setdefault(partition, {}).update(found)
            write_json(arguments.output, content)


PARTS: dict[str, tuple[Callable[[str, int, float], dict[str, float]], str | None]] = {
    "head only": (functools.partial(head_only, known=False), None),
    "head only, domain tokens": (functools.partial(head_only, known=True), None),
    "true groups": (functools.partial(true_groups, task="domains_frozen"), "domains_frozen"),
    "true groups, shared head": (
        functools.partial(true_groups, task="domains_shared"),
        "domains_shared",
    ),
}
"""What is computed, and the task whose rates it takes; None: all scales are tried."""

if __name__ == "__main__":
    main()
