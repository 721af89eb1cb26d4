"""Planted worlds that several tests of `map` share."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from fedprompt import aggregation
from fedprompt.aggregation.base import Aggregation
from fedprompt.aggregation.pfpt.map.blocks import Block, KeyBlock
from fedprompt.aggregation.pfpt.map.columns import Columns
from fedprompt.aggregation.pfpt.map.inclusion import Inclusion
from fedprompt.aggregation.pfpt.map.model import BetaBernoulliModel

PFPT = aggregation.create("pfpt")
Array = NDArray[np.float64]


def planted(
    number: int, clients: int, d: int, noise: float, spread: float, part: float, seed: int
) -> tuple[Array, list[Tensor], list[Array]]:
    rng = np.random.default_rng(seed)
    true = spread * rng.normal(size=(number, d))
    picks = [rng.permutation(number)[: round(part * number)] for _ in range(clients)]
    sets = [torch.tensor(true[pick] + noise * rng.normal(size=(len(pick), d))) for pick in picks]
    return true, sets, picks


def agreement(picks: list[Array], result: Aggregation) -> float:
    return float(adjusted_rand_score(np.concatenate(picks), torch.cat(result.assignment).numpy()))


BUFFET = Inclusion.indian_buffet(1.3)


def random_columns(
    rng: np.random.Generator,
    sizes: list[int],
    d: int,
    remembered: int,
    inclusion: Inclusion = BUFFET,
) -> tuple[Columns, BetaBernoulliModel, list[slice]]:
    """Clients of the given sizes, placed at random; prompt block of d, key block of 2."""
    total, width = sum(sizes), d + 2
    points = rng.normal(size=(total, width)) * 1.5
    owner = np.repeat(np.arange(len(sizes)), sizes).astype(np.int64)
    strength = rng.uniform(0.3, 3.0, size=remembered)
    means = rng.normal(size=(remembered, width))
    classes = rng.integers(0, 3, size=total)
    home = np.array([0 if remembered else -1, -1, -1])
    prompts = Block(slice(0, d), 0.8, 3.2, 0.7, means[:, :d], strength, total=4.0)
    keys = KeyBlock(slice(d, width), 0.4, rng.normal(size=(3, 2)), means[:, d:])
    model = BetaBernoulliModel(prompts, keys, inclusion, len(sizes), math.log(3.0))
    columns = Columns(points, owner, strength, classes, home)
    ends = np.cumsum(sizes)
    spans = [slice(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)]
    for span in spans:
        targets = rng.permutation(remembered + max(sizes))[: span.stop - span.start]
        columns.place(span, targets.astype(np.int64))
    return columns, model, spans


def keyed_clients(
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Eight clients of two domains that started from the same five prompts."""
    rng = np.random.default_rng(seed)
    start = rng.normal(size=(5, 32))
    centres = rng.normal(size=(2, 24))
    sets, keys, origins = [], [], []
    for client in range(8):
        rows = rng.permutation(5)
        key = centres[client % 2] + 0.1 * rng.normal(size=24)
        sets.append(torch.tensor(start[rows] + 0.1 * rng.normal(size=(5, 32))))
        keys.append(torch.tensor(key).repeat(5, 1))
        origins.append(torch.tensor(rows))
    return sets, keys, origins, torch.tensor(start)
