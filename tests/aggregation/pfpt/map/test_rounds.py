"""`map` over rounds, with and without keys: pools, memory, convergence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planting import PFPT, Array, agreement, keyed_clients
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedprompt import aggregation


@pytest.mark.parametrize("seed", range(3))
def test_same_prompts_with_different_keys_are_kept_apart(seed: int) -> None:
    sets, keys, origins, start = keyed_clients(seed)
    keyed = PFPT.aggregate(
        sets, origins=origins, previous=start, keys=keys, previous_keys=torch.zeros(5, 24).double()
    )
    assert len(keyed.prompts) == 10
    truth = [rows.numpy() + 5 * (t % 2) for t, rows in enumerate(origins)]
    assert agreement(truth, keyed) == 1.0
    ignored = aggregation.create("pfpt", key_weight=0).aggregate(
        sets, origins=origins, previous=start, keys=keys, previous_keys=torch.zeros(5, 24).double()
    )
    assert len(ignored.prompts) == len(PFPT.aggregate(sets, origins=origins).prompts) == 5


def test_one_domain_returns_about_as_many_prompts_as_were_broadcast() -> None:
    rng = np.random.default_rng(3)
    sets, _, origins, start = keyed_clients()
    centre = rng.normal(size=24)
    keys = [torch.tensor(centre + 0.3 * rng.normal(size=24)).repeat(5, 1) for _ in sets]
    result = PFPT.aggregate(
        sets, origins=origins, previous=start, keys=keys, previous_keys=torch.zeros(5, 24).double()
    )
    assert len(result.prompts) == 5
    assert all(torch.equal(a, o) for a, o in zip(result.assignment, origins, strict=True))


def federation(domains: int, rounds: int, clients: int = 40, per_round: int = 10) -> list[int]:
    """Pool sizes when clients pick the five nearest keys and move to their domain's optimum."""
    rng = np.random.default_rng(domains)
    start = rng.normal(size=(5, 24))
    optimum = [start + 0.5 * rng.normal(size=(5, 24)) for _ in range(domains)]
    centre = rng.normal(size=(domains, 16))
    query = centre[np.arange(clients) % domains] + 0.3 * rng.normal(size=(clients, 16))
    prompts, keys, state = torch.tensor(start), torch.zeros(5, 16, dtype=torch.float64), None
    pool = []
    for _ in range(rounds):
        sets, addresses, origins = [], [], []
        for client in rng.permutation(clients)[:per_round]:
            rows = np.argsort(((keys.numpy() - query[client]) ** 2).sum(axis=1), kind="stable")[:5]
            mine, goal = prompts.numpy()[rows], optimum[client % domains]
            _, pick = linear_sum_assignment(((mine[:, None] - goal[None]) ** 2).sum(axis=2))
            tuned = mine + 0.5 * (goal[pick] - mine) + 0.1 * rng.normal(size=mine.shape)
            sets.append(torch.tensor(tuned))
            addresses.append(torch.tensor(query[client]).repeat(5, 1))
            origins.append(torch.tensor(rows))
        result = PFPT.aggregate(sets, None, origins, prompts, addresses, state, previous_keys=keys)
        assert result.keys is not None
        prompts, keys, state = result.prompts, result.keys, result.state
        pool.append(len(prompts))
    return pool


@pytest.mark.parametrize("domains", [1, 4])
def test_pool_neither_collapses_nor_explodes_with_keys(domains: int) -> None:
    pool = federation(domains, 60)
    true = 5 * domains
    assert min(pool[5:]) >= 0.5 * true
    assert max(pool) <= 2 * true


def test_pool_neither_collapses_nor_explodes_without_keys() -> None:
    # 20 true prompts; each of 8 sampled clients out of 50 uses its own fixed 6 of them.
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20, 32))
    own = [rng.permutation(20)[:6] for _ in range(50)]
    previous, state, pool = None, None, []
    for _ in range(60):
        cohort = rng.permutation(50)[:8]
        sets = [torch.tensor(true[own[t]] + 0.3 * rng.normal(size=(6, 32))) for t in cohort]
        result = PFPT.aggregate(sets, previous=previous, state=state)
        previous, state = result.prompts, result.state
        pool.append(len(previous))
    assert min(pool[2:]) >= 10
    assert max(pool) <= 40
    error = torch.cdist(torch.tensor(true), previous).min(dim=1).values / math.sqrt(32)
    assert float(error.max()) < 0.3


def tuning_rounds(pool: int, rounds: int) -> tuple[list[Tensor], Array]:
    """The server's prompts after each round, and ten true ones that all clients move towards.

    Each of 20 clients (5 a round) picks for each of its six true prompts the nearest row of the
    pool, goes half way and adds a little noise.
    """
    rng = np.random.default_rng(0)
    true = rng.normal(size=(10, 32))
    own = [rng.permutation(10)[:6] for _ in range(20)]
    previous, state, history = torch.tensor(rng.normal(size=(pool, 32))), None, []
    for _ in range(rounds):
        sets, origins = [], []
        for client in rng.permutation(20)[:5]:
            cost = ((true[own[client]][:, None] - previous.numpy()[None]) ** 2).sum(axis=2)
            wanted, rows = linear_sum_assignment(cost)
            start = previous.numpy()[rows]
            goal = true[own[client]][wanted]
            tuned = start + 0.5 * (goal - start) + 0.05 * rng.normal(size=start.shape)
            sets.append(torch.tensor(tuned))
            origins.append(torch.tensor(rows))
        result = PFPT.aggregate(sets, origins=origins, previous=previous, state=state)
        previous, state = result.prompts, result.state
        history.append(previous)
    return history, true


def test_prompts_converge_over_rounds() -> None:
    history, true = tuning_rounds(pool=12, rounds=40)

    def step(late: int) -> float:
        """Mean distance from a round's prompts to the nearest of the round before."""
        return float(torch.cdist(history[late], history[late - 1]).min(dim=1).values.mean())

    assert step(39) < 0.2 * step(1)
    error = torch.cdist(torch.tensor(true), history[-1]).min(dim=1).values / math.sqrt(32)
    assert float(error.max()) < 0.05


def test_the_pool_shrinks_to_what_is_needed_over_rounds() -> None:
    history, _ = tuning_rounds(pool=40, rounds=40)
    sizes = [len(prompts) for prompts in history]
    assert sizes[0] >= 40
    assert 10 <= sizes[-1] <= 14
    assert sizes[-1] == min(sizes)
