"""Do learned prompts matter on the embedded backbones? A centralised measurement on the task
`domains`.

    python -m benchmarks.promptable [--processes 2] [--output benchmarks/results/promptable.json]

The head is frozen, so that whatever is gained is gained by prompts. It is fitted once on the
public split (one logistic regression per domain over that domain's classes) under the *head's
condition* of the domain: on `nano_promptable` the task tokens under which a logistic regression of
public images does best on the validation split, on `nano`, which has none, no prompts. Then
prompts are learned on the training split, from a random start:

* `no prompts`: the frozen head on bare features;
* `shared`: one set of prompts for all domains;
* `per domain`: one set for each domain.

Both learned variants see the same images in the same batches for the same number of steps; only
the number of sets differs. Two references learn no prompts: `head's condition` (what the head was
fitted under) and `refitted head` (no prompts, and a head fitted on bare features of the same public
images). Neither has seen the training split, which the prompts have.

A seed changes the drawn data, the first prompts and the order of batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from benchmarks.harness import RESULTS, Json, header, interval, one_thread, write_json
from fedprompt.core.seeding import torch_generator
from fedprompt.data.task import Split, datasets
from fedprompt.models.backbone import Backbone, load_backbone
from fedprompt.models.nano.probe import features_of
from fedprompt.models.nano.recipe import TASKS

BACKBONES = ("nano_promptable", "nano")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What was measured."""

    seeds: tuple[int, ...] = (0, 1, 2)
    prompts: int = 5
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-2


@dataclasses.dataclass(frozen=True)
class Head:
    """A frozen linear head and the prompts under which each domain's rows were fitted."""

    weight: Tensor
    """(classes, d)"""
    bias: Tensor
    """(classes,)"""
    conditions: tuple[str, ...]
    """Per domain: a task of `TASKS`, or `none`."""


def tokens_of(backbone: Backbone, condition: str) -> Tensor | None:
    """The task tokens (n, d) called `condition`, or None for `none`."""
    if condition == "none":
        return None
    tokens: Tensor = backbone.extras["task_tokens"][TASKS.index(condition)]
    return tokens


def fit_head(
    backbone: Backbone, public: Split, validation: Split, classes: int, candidates: tuple[str, ...]
) -> Head:
    """Fit every domain's rows on public images under the candidate that is best on validation."""
    weight, bias = torch.zeros(classes, backbone.embed_dim), torch.full((classes,), -1e4)
    conditions = []
    for group in np.unique(public.groups):
        fit, check = public.groups == group, validation.groups == group
        best = -1.0
        for condition in candidates:
            prompts = tokens_of(backbone, condition)
            features = features_of(backbone, public.images[fit], prompts)
            mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
            model = LogisticRegression(C=0.1, max_iter=1000)
            model.fit((features - mean) / std, public.labels[fit])
            held_out = features_of(backbone, validation.images[check], prompts)
            accuracy = model.score((held_out - mean) / std, validation.labels[check])
            if accuracy > best:
                best, chosen, own = accuracy, condition, torch.from_numpy(model.classes_)
                scaled = model.coef_ / std
                weight[own] = torch.from_numpy(scaled).float()
                bias[own] = torch.from_numpy(model.intercept_ - scaled @ mean).float()
        conditions.append(chosen)
    return Head(weight, bias, tuple(conditions))


def embed_all(backbone: Backbone, split: Split) -> Tensor:
    """Everything below the prompts, once: (N, T, d)."""
    with torch.no_grad():
        parts = [
            backbone.embed(backbone.preprocess(torch.from_numpy(split.images[start : start + 256])))
            for start in range(0, len(split), 256)
        ]
    return torch.cat(parts)


def learn(
    backbone: Backbone,
    head: Head,
    tokens: Tensor,
    split: Split,
    mask: Tensor,
    sets: int,
    settings: Settings,
    seed: int,
) -> tuple[Tensor, int]:
    """Learn `sets` prompt sets (1 or one per domain): (sets, n, d) and the number of images
    used.
    """
    generator = torch_generator(seed, "benchmark/promptable")
    prompts = 0.1 * torch.randn(sets, settings.prompts, backbone.embed_dim, generator=generator)
    prompts.requires_grad_(True)
    labels, groups = torch.from_numpy(split.labels), torch.from_numpy(split.groups)
    optimizer = torch.optim.Adam([prompts], settings.learning_rate)
    per_epoch = len(labels) // settings.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * per_epoch)
    # The order has its own generator, so that it does not depend on the number of sets.
    order_generator = torch_generator(seed, "benchmark/promptable/order")
    used = 0
    for _ in range(settings.epochs):
        order = torch.randperm(len(labels), generator=order_generator)
        for step in range(per_epoch):
            rows = order[step * settings.batch_size : (step + 1) * settings.batch_size]
            chosen = prompts[groups[rows] if sets > 1 else torch.zeros_like(rows)]
            logits = backbone.encode(tokens[rows], chosen) @ head.weight.T + head.bias
            loss = F.cross_entropy(logits.masked_fill(~mask[groups[rows]], -1e4), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            used += len(rows)
    return prompts.detach(), used


def evaluate(
    backbone: Backbone,
    head: Head,
    tokens: Tensor,
    split: Split,
    mask: Tensor,
    prompts: list[Tensor | None],
    names: tuple[str, ...],
) -> dict[str, float]:
    """Test accuracy under one prompt set per domain, with the class mask: overall and per
    domain.
    """
    correct = np.zeros(len(split), bool)
    for group, own in enumerate(prompts):
        rows = np.flatnonzero(split.groups == group)
        with torch.no_grad():
            logits = backbone.encode(tokens[rows], own) @ head.weight.T + head.bias
        guess = logits.masked_fill(~mask[group], -1e9).argmax(dim=1).numpy()
        correct[rows] = guess == split.labels[rows]
    scores = {name: float(correct[split.groups == i].mean()) for i, name in enumerate(names)}
    return {"all": float(correct.mean()), **scores}


def measure(name: str, seed: int, settings: Settings) -> Json:
    """All variants for one backbone and one seed."""
    one_thread()
    started = time.perf_counter()
    backbone, task = load_backbone(name), datasets.create("domains", seed=seed)
    assert task.public is not None
    mask, groups = torch.from_numpy(task.class_mask), len(task.group_names)
    fit_args = (backbone, task.public, task.validation, task.num_classes)
    head = fit_head(*fit_args, TASKS if "task_tokens" in backbone.extras else ("none",))
    bare_head = fit_head(*fit_args, ("none",))
    train, test = embed_all(backbone, task.train), embed_all(backbone, task.test)
    shared, shared_used = learn(backbone, head, train, task.train, mask, 1, settings, seed)
    own, own_used = learn(backbone, head, train, task.train, mask, groups, settings, seed)
    if shared_used != own_used:
        raise RuntimeError(f"unequal work: {shared_used} and {own_used} images")
    variants: dict[str, tuple[Head, list[Tensor | None]]] = {
        "no prompts": (head, [None] * groups),
        "shared": (head, [shared[0]] * groups),
        "per domain": (head, list(own)),
        "head's condition": (head, [tokens_of(backbone, c) for c in head.conditions]),
        "refitted head": (bare_head, [None] * groups),
    }
    accuracy = {
        variant: evaluate(backbone, used, test, task.test, mask, prompts, task.group_names)
        for variant, (used, prompts) in variants.items()
    }
    return {
        "backbone": name,
        "seed": seed,
        "conditions": dict(zip(task.group_names, head.conditions, strict=True)),
        "images_used": own_used,
        "accuracy": accuracy,
        "seconds": round(time.perf_counter() - started, 1),
    }


def summarise(runs: list[Json]) -> Json:
    """Mean and half width of the 95 % t-interval over seeds, per variant, overall and per
    domain.
    """
    summary: Json = {}
    for variant, scores in runs[0]["accuracy"].items():
        summary[variant] = {}
        for name in scores:
            values = [run["accuracy"][variant][name] for run in runs]
            summary[variant][name] = interval(values)
    for domain in runs[0]["accuracy"]["shared"]:
        gains = [
            run["accuracy"]["per domain"][domain] - run["accuracy"]["shared"][domain]
            for run in runs
        ]
        summary.setdefault("per domain minus shared", {})[domain] = interval(gains)
    return summary


def main() -> None:
    """Measure, print one line per variant, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "promptable.json")
    arguments = parser.parse_args()
    settings = Settings()
    started = time.perf_counter()
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(measure, name, seed, settings)
            for seed in settings.seeds
            for name in BACKBONES
        ]
        runs = [job.result() for job in jobs]
    summary = {name: summarise([r for r in runs if r["backbone"] == name]) for name in BACKBONES}
    document = header(
        "promptable",
        seconds=round(time.perf_counter() - started, 1),
        settings=dataclasses.asdict(settings),
        summary=summary,
        runs=runs,
    )
    write_json(arguments.output, document)
    for name, variants in summary.items():
        for variant, scores in variants.items():
            line = "  ".join(f"{k} {v['mean']:+.3f}±{v['ci95']:.3f}" for k, v in scores.items())
            print(f"{name:16} {variant:24} {line}")


if __name__ == "__main__":
    main()
