"""What prompts could do on real images if all data lay in one place: bounds for the federations.

    python -m benchmarks.real.bounds [--tasks emoji_frozen ...] [--seeds 3] [--epochs 6]
                                     [--output benchmarks/results/real_bounds.json]

Three ways to train on the images of all clients, with the tasks of benchmarks/methods/real.py:

* `no prompts`: the head alone, on features without prompts; a frozen head is only measured;
* `one set`: five prompts for all images;
* `a set for each domain`: five prompts for each domain, and every image's domain is known.

The last is what perfect keys and perfect matching would give. If it is no better than one set,
no method that keeps sets apart can be better by that. Every epoch is measured on the validation and
the test split; the best one on validation is reported, and nothing is chosen on the test split.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import RESULTS, Json, header, interval, one_thread, read_json, write_json
from benchmarks.methods import real
from fedprompt.config import compose
from fedprompt.data.prefix.tables import FeatureTable
from fedprompt.runs.federation import Federation, prepare

OUTPUT = RESULTS / "real_bounds.json"
WAYS = ("no prompts", "one set", "a set for each domain")
PROMPTS = 5
BATCH = 64
RATE = 0.01
"""Adam's, of prompts; the head has that of `head.lr`."""
HEAD_RATE = 3e-3


@dataclasses.dataclass(frozen=True)
class Images:
    """One split in memory."""

    tokens: Tensor
    features: Tensor
    labels: Tensor
    groups: Tensor

    @classmethod
    def of(cls, table: FeatureTable) -> Images:
        """All of a table."""
        rows = np.arange(len(table), dtype=np.int64)
        features, labels, groups = (
            torch.from_numpy(np.array(each))
            for each in (table.features, table.labels, table.groups)
        )
        return cls(table.tokens_at(rows), features, labels, groups)


class Model(nn.Module):
    """Prompts of a way, and a head on standardised features or the frozen one.

    Args:
        way: of `WAYS`.
        federation: backbone, classes, frozen head.
        train: whose features standardise a head that is trained.
        seed: of the first weights.
    """

    def __init__(self, way: str, federation: Federation, train: Images, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.way, self.federation = way, federation
        sets = {"no prompts": 0, "one set": 1, "a set for each domain": len(self._domains)}[way]
        width = train.features.shape[1]
        self.prompts = nn.Parameter(0.02 * torch.randn(sets, PROMPTS, width))
        self.head = nn.Linear(width, federation.task.num_classes)
        self.mean, self.std = train.features.mean(dim=0), train.features.std(dim=0)
        self.mask = torch.from_numpy(federation.task.class_mask)
        if federation.frozen_head is not None:
            fitted = federation.frozen_head.tensors
            self.head.load_state_dict({"weight": fitted["0.weight"], "bias": fitted["0.bias"]})
            self.head.requires_grad_(False)
            self.mean, self.std = torch.zeros(width), torch.ones(width)

    @property
    def _domains(self) -> tuple[str, ...]:
        return self.federation.task.group_names

    def forward(self, images: Images, rows: Tensor) -> Tensor:
        """Logits (B, classes) of some rows, among the classes of each image's domain."""
        groups = images.groups[rows]
        features = images.features[rows]
        if self.way != "no prompts":
            sets = groups if self.way != "one set" else torch.zeros_like(groups)
            features = self.federation.backbone.encode(images.tokens[rows], self.prompts[sets])
        logits: Tensor = self.head((features - self.mean) / self.std)
        return logits.masked_fill(~self.mask[groups], -torch.inf)


def train(
    model: Model, images: Images, epochs: int, seed: int, measure: Callable[[], Json]
) -> list[Json]:
    """Adam with the clients' settings; what `measure` finds after each epoch.

    Args:
        model: with something to train; otherwise it is measured once.
        images: of all clients.
        epochs: passes over them.
        seed: of the batches.
        measure: called after each epoch.
    """
    groups = [
        {"params": [model.prompts], "lr": RATE},
        {"params": [p for p in model.head.parameters() if p.requires_grad], "lr": HEAD_RATE},
    ]
    if not any(p.numel() for group in groups for p in group["params"]):  # type: ignore[attr-defined]
        return [measure()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-6)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(epochs):
        order = torch.randperm(len(images.labels), generator=generator)
        for rows in torch.split(order, BATCH):
            loss = F.cross_entropy(model(images, rows), images.labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        found.append(measure())
    return found


@torch.no_grad()
def accuracy(model: Model, images: Images) -> tuple[float, list[float]]:
    """Over all images, and over those of each domain."""
    rows = torch.split(torch.arange(len(images.labels)), 256)
    right = torch.cat([model(images, own).argmax(dim=1) == images.labels[own] for own in rows])
    domains = [
        float(right[images.groups == group].float().mean()) for group in torch.unique(images.groups)
    ]
    return float(right.float().mean()), domains


def bound(federation: Federation, way: str, seed: int, epochs: int) -> Json:
    """The epoch that is best on validation.

    Args:
        federation: data and backbone.
        way: of `WAYS`.
        seed: of weights and batches.
        epochs: at most.
    """
    images = Images.of(federation.data.table)
    test, validation = map(Images.of, federation.setup.splits)
    model = Model(way, federation, images, seed)

    def measure() -> Json:
        on_test, by_domain = accuracy(model, test)
        return {
            "validation": round(accuracy(model, validation)[0], 4),
            "test": round(on_test, 4),
            "by_domain": [round(each, 4) for each in by_domain],
        }

    epochs_of = train(model, images, epochs, seed, measure)
    best = max(range(len(epochs_of)), key=lambda epoch: epochs_of[epoch]["validation"])
    return {
        **epochs_of[best],
        "epoch": best + 1,
        "validation_curve": [e["validation"] for e in epochs_of],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", default=list(real.TASKS), choices=list(real.TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    one_thread()
    cases: Json = read_json(arguments.output).get("cases", {})
    for task in arguments.tasks:
        experiment = {**real.TASKS[task], "runtime": "serial", "method": "fedavg_pt"}
        federation = prepare(compose(experiment, []))
        for way in WAYS:
            seeds = [
                bound(federation, way, seed, arguments.epochs) for seed in range(arguments.seeds)
            ]
            cases[f"{task}/{way}"] = {
                "domains": list(federation.task.group_names),
                "test": interval([each["test"] for each in seeds]),
                "seeds": seeds,
            }
            print(task, way, cases[f"{task}/{way}"]["test"], flush=True)
            write_json(arguments.output, {**header("real_bounds"), "cases": cases})


if __name__ == "__main__":
    main()
