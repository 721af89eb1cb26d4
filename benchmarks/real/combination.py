"""FedCOF's closed-form head with PFPT's prompts on top: does the one add to the other?

    make real && python -m benchmarks.real.combination [--ways "fixed head" ...] [--seeds 5]
                                                       [--output benchmarks/results/...json]

`emoji` without Noto, so that four vendors federate, Dirichlet 0.5, as `emoji_frozen` in
benchmarks/methods/real.py. Every run begins with the head of all clients' class sums (`head.start`,
the rule of FedCOF):

* `trained on`: prompts and head go on by gradient;
* `fixed head`: the prompts alone;
* `fixed head, logit adjusted`: the same under the loss of Menon et al. (2021).

Each is measured as it ends, and with a head that is `solved again`: FedCOF's, of the features that
the images have with the prompts of the last round. The rate of the prompts is chosen on the
validation split of a seed that is not reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import (
    RESULTS,
    Json,
    header,
    interval,
    one_thread,
    read_json,
    run_once,
    write_json,
)
from benchmarks.methods import real
from fedprompt.config import compose
from fedprompt.core.types import Parts, ServerState
from fedprompt.data.prefix.tables import FeatureTable
from fedprompt.models.prompted import PromptedNetwork
from fedprompt.objectives.closed_form import ClosedFormOptions, solve
from fedprompt.runs.federation import Federation, prepare
from fedprompt.server.evaluate import select_for_split
from fedprompt.server.mixing import chunks

OUTPUT = RESULTS / "real_combination.json"
HEAD = "head={name: linear, bias: false, start: cof}"
WAYS: dict[str, tuple[str, ...]] = {
    "trained on": (),
    "fixed head": ("head.lr=0",),
    "fixed head, logit adjusted": ("head.lr=0", "objective=logit_adjusted"),
}
RATES = (0.001, 0.003, 0.01, 0.03)
"""Of the prompts; a head that is trained on has three tenths of it, as the presets have."""
RATE_SEED = 100


def experiment_of() -> Json:
    """The experiment of all ways."""
    return {
        **real.TASKS["emoji_frozen"],
        "head": "linear",
        "partition": real.PARTITIONS["dirichlet_0.5"],
        "rounds": real.ROUNDS,
        "eval_every": real.ROUNDS,
        "eval_clients": "never",
        "runtime": "serial",
    }


def changes_of(way: str, rate: float, seed: int) -> list[str]:
    """The command line of one run.

    Args:
        way: of `WAYS`.
        rate: of the prompts.
        seed: of the run.
    """
    rates = [f"prompts.lr={rate}", f"head.lr={0.3 * rate}"]
    return ["method=pfpt", "compare=[]", f"seed={seed}", HEAD, *rates, *WAYS[way]]


def features_of(
    federation: Federation, changes: Sequence[str], state: ServerState, table: FeatureTable
) -> Tensor:
    """The features (N, d) of a split with the prompts that 16 images of a style select together.

    Args:
        federation: has the backbone.
        changes: of the run, which say how prompts are selected.
        state: whose prompts.
        table: the split.
    """
    recipe = compose(experiment_of(), changes).recipe(federation.task.num_classes)
    order, rows = select_for_split(state, recipe, table)
    mask, nobody = federation.task.class_mask, torch.Generator()
    prompts = Parts(prompts=state.prompts)
    network = PromptedNetwork(recipe, federation.backbone, prompts, state.keys, mask, nobody).eval()
    features = torch.empty(len(table), federation.backbone.feature_dim)
    with torch.no_grad():
        for part in chunks(order):
            features[order[part]] = network.encode(table.tokens_at(order[part]), rows[part])
    return features


def closed_form_head(
    features: Tensor, labels: NDArray[np.int64], parts: Sequence[NDArray[np.int64]], classes: int
) -> Tensor:
    """FedCOF's head (C, d), as `objective=closed_form` solves it.

    Args:
        features: (N, d) of all clients' images.
        labels: (N,)
        parts: each client's rows.
        classes: C.
    """
    one_hot = F.one_hot(torch.from_numpy(labels.copy()), classes).double()
    sums = torch.stack([one_hot[rows].T @ features[rows].double() for rows in parts])
    counts = torch.stack([one_hot[rows].sum(dim=0) for rows in parts])
    total = {"sum": sums.sum(dim=0), "count": counts.sum(dim=0), "sums": sums, "counts": counts}
    return solve(total, ClosedFormOptions(rule="cof")).float()


def accuracy(features: Tensor, head: Tensor, table: FeatureTable) -> float:
    """Of a linear head (C, d) on the features (N, d) of a split."""
    return float(((features @ head.T).argmax(dim=1).numpy() == table.labels).mean())


def run(federation: Federation, way: str, rate: float, seed: int) -> Json:
    """One run, and its head solved again.

    Args:
        federation: that of the seed.
        way: of `WAYS`.
        rate: of the prompts.
        seed: of the run.
    """
    changes = changes_of(way, rate, seed)
    result = run_once(experiment_of(), changes).result
    last = result.reports[-1]
    test, validation = federation.setup.splits
    train, classes = federation.data.table, federation.task.num_classes
    ours = [features_of(federation, changes, result.state, t) for t in (train, test, validation)]
    plain = [torch.from_numpy(np.array(t.features)) for t in (train, test, validation)]
    found: Json = {
        "test": last["accuracy"],
        "alone": last["alone_accuracy"],
        "validation": last["validation_accuracy"],
    }
    ended = accuracy(ours[1], result.state.shared.head["0.weight"], test)
    assert abs(ended - found["test"]) < 1e-6, "the features are not those of the run"
    for name, (known, *splits) in (("solved again", ours), ("fedcof", plain)):
        head = closed_form_head(known, train.labels, federation.data.parts, classes)
        found[name] = {
            split: accuracy(features, head, table)
            for split, features, table in zip(
                ("test", "validation"), splits, (test, validation), strict=True
            )
        }
    return found


def try_out(way: str, seeds: int) -> Json:
    """A way with the rate that is best on validation.

    Args:
        way: of `WAYS`.
        seeds: how many are reported.
    """

    def of(seed: int) -> Federation:
        return prepare(compose(experiment_of(), changes_of(way, RATES[0], seed)))

    chosen = {rate: run(of(RATE_SEED), way, rate, RATE_SEED) for rate in RATES}
    rate = max(RATES, key=lambda each: chosen[each]["validation"])
    runs = [run(of(seed), way, rate, seed) for seed in range(seeds)]
    fedcof = [each["fedcof"]["test"] for each in runs]
    ended, alone = ([each[name] for each in runs] for name in ("test", "alone"))
    again = [each["solved again"]["test"] for each in runs]
    return {
        "rate": rate,
        "validation": {str(each): found["validation"] for each, found in chosen.items()},
        "test": interval(ended),
        "alone": interval(alone),
        "solved again": interval(again),
        "fedcof": interval(fedcof),
        "over fedcof": interval(np.subtract(ended, fedcof).tolist()),
        "alone over fedcof": interval(np.subtract(alone, fedcof).tolist()),
        "solved again over fedcof": interval(np.subtract(again, fedcof).tolist()),
        "seeds": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    one_thread()
    for way in arguments.ways:
        found = try_out(way, arguments.seeds)
        cases = {**read_json(arguments.output).get("cases", {}), way: found}
        write_json(arguments.output, {**header("real_combination"), "cases": cases})
        print(way, {name: value for name, value in found.items() if name != "seeds"}, flush=True)


if __name__ == "__main__":
    main()
