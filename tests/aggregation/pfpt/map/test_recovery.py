"""`map` recovers planted correspondences, whatever the scale and the order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planting import PFPT, agreement, planted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("number", "clients", "d", "noise", "spread", "part"),
    [
        (10, 5, 64, 0.05, 1.0, 1.0),
        (20, 10, 64, 0.5, 1.0, 0.6),
        (20, 10, 64, 0.5, 1.0, 1.0),
        (10, 10, 768, 0.01, 0.04, 1.0),
        (20, 10, 768, 0.04, 0.04, 1.0),
    ],
)
def test_planted_correspondences_are_recovered(
    number: int, clients: int, d: int, noise: float, spread: float, part: float, seed: int
) -> None:
    true, sets, picks = planted(number, clients, d, noise, spread, part, seed)
    result = PFPT.aggregate(sets)
    assert len(result.prompts) == number
    assert agreement(picks, result) >= 0.99
    distance = torch.cdist(torch.tensor(true), result.prompts)
    error = distance.min(dim=1).values / math.sqrt(d)
    assert float(error.max()) < noise  # an average of several copies is better than one


def test_one_client_alone_keeps_its_prompts() -> None:
    sets = planted(7, 1, 16, 0.1, 1.0, 1.0, 0)[1]
    result = PFPT.aggregate(sets)
    assert torch.equal(result.prompts[result.assignment[0]], sets[0])


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (1e3, 0.0), (1.0, 5.0), (7.0, -3.0)])
def test_assignment_ignores_scale_and_shift(scale: float, shift: float, keyed: bool) -> None:
    _, sets, _ = planted(12, 6, 16, 0.6, 1.0, 0.6, 4)
    rng = np.random.default_rng(0)
    keys = [torch.tensor(rng.normal(size=(len(p), 5))) for p in sets] if keyed else None
    plain = PFPT.aggregate(sets, keys=keys)
    moved = PFPT.aggregate([scale * p + shift for p in sets], keys=keys)
    for left, right in zip(plain.assignment, moved.assignment, strict=True):
        assert torch.equal(left, right)
    torch.testing.assert_close(moved.prompts, scale * plain.prompts + shift)
    if keys is not None:
        scaled = PFPT.aggregate(sets, keys=[100 * key for key in keys])
        assert torch.equal(torch.cat(scaled.assignment), torch.cat(plain.assignment))


def test_permuted_clients_and_rows_give_the_same_bits() -> None:
    _, sets, _ = planted(12, 6, 16, 0.6, 1.0, 0.6, 5)
    rng = np.random.default_rng(1)
    clients = rng.permutation(6)
    rows = [torch.tensor(rng.permutation(len(sets[t]))) for t in clients]
    plain = PFPT.aggregate(sets)
    moved = PFPT.aggregate([sets[t][order] for t, order in zip(clients, rows, strict=True)])
    assert torch.equal(plain.prompts, moved.prompts)
    for place, (t, order) in enumerate(zip(clients, rows, strict=True)):
        assert torch.equal(moved.assignment[place], plain.assignment[t][order])


@pytest.mark.parametrize(("d", "clients"), [(16, 10), (128, 3), (768, 10), (768, 50)])
def test_one_true_prompt_is_seen(d: int, clients: int) -> None:
    rng = np.random.default_rng(d)
    true = rng.normal(size=d)
    sets = [torch.tensor(true + 0.1 * rng.normal(size=(1, d))) for _ in range(clients)]
    assert len(PFPT.aggregate(sets).prompts) == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_row_whose_users_part_is_split(seed: int) -> None:
    # Five broadcast rows, which two kinds of clients tune towards different targets.
    rng = np.random.default_rng(seed)
    start = rng.normal(size=(5, 64))
    apart = 0.6 * rng.normal(size=(2, 5, 64))
    sets, origins, labels = [], [], []
    for client in range(6):
        rows = rng.permutation(5)
        goal = start[rows] + apart[client % 2][rows]
        sets.append(torch.tensor(goal + 0.3 * rng.normal(size=(5, 64))))
        origins.append(torch.tensor(rows))
        labels.append(rows + 5 * (client % 2))
    result = PFPT.aggregate(sets, origins=origins, previous=torch.tensor(start))
    assert agreement(labels, result) == 1.0
