"""Removal, bound, memory and options of `map`."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from planting import PFPT, keyed_clients, planted

from fedprompt import aggregation
from fedprompt.core.errors import ConfigError, InputError


def unused_rounds(patience: int) -> int:
    """After how many rounds an unused row disappears."""
    aggregator = aggregation.create("pfpt", patience=patience)
    rng = np.random.default_rng(0)
    previous, state = torch.tensor(10 * rng.normal(size=(3, 8))), None
    lonely = previous[1].clone()
    for round_index in range(1, 20):
        sets = [previous[[0, -1]] + 0.1 * torch.tensor(rng.normal(size=(2, 8))) for _ in range(3)]
        origins = [torch.tensor([0, len(previous) - 1])] * 3
        result = aggregator.aggregate(sets, origins=origins, previous=previous, state=state)
        previous, state = result.prompts, result.state
        if len(previous) == 2:
            assert result.diagnostics["pruned"] == 1.0
            return round_index
        assert torch.equal(previous[1], lonely)
        assert state["idle"].tolist() == [0, round_index, 0]
    raise AssertionError("the unused row was never removed")


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_patience_counts_rounds_without_use(patience: int) -> None:
    assert unused_rounds(patience) == patience


def test_a_round_without_prompts_changes_nothing() -> None:
    sets, keys, origins, start = keyed_clients()
    first = PFPT.aggregate(sets, origins=origins, previous=start, keys=keys)
    with torch.inference_mode():
        empty = PFPT.aggregate(
            [torch.empty(0, 32).double()] * 2, previous=first.prompts, state=first.state
        )
    assert torch.equal(empty.prompts, first.prompts)
    assert empty.state.keys() == first.state.keys()
    for name, tensor in first.state.items():
        assert torch.equal(empty.state[name], tensor)
        assert empty.state[name].data_ptr() != tensor.data_ptr() or tensor.numel() == 0


def test_keys_of_every_group_are_remembered() -> None:
    rng = np.random.default_rng(0)
    keys = [
        torch.tensor((10.0 if t < 9 else -10.0) + rng.normal(size=(1, 4))).repeat(2, 1)
        for t in range(12)
    ]
    sets = [torch.tensor(rng.normal(size=(2, 8))) for _ in keys]
    known = PFPT.aggregate(sets, keys=keys).state["known_keys"]
    # Before anything is seen a key is worth three: the discount rate is 1/3.
    assert [int((known[:, 0] > 0).sum()), int((known[:, 0] < 0).sum())] == [3, 3]


@pytest.mark.parametrize("shift", [3.0, 100.0])
def test_shifting_all_keys_changes_no_assignment(shift: float) -> None:
    sets, keys, origins, start = keyed_clients()
    plain = PFPT.aggregate(sets, origins=origins, previous=start, keys=keys)
    moved = PFPT.aggregate(
        sets, origins=origins, previous=start, keys=[key + shift for key in keys]
    )
    assert all(map(torch.equal, plain.assignment, moved.assignment))
    assert moved.diagnostics["key_noise"] == pytest.approx(plain.diagnostics["key_noise"])


@pytest.mark.parametrize("bound", [6, 8])
def test_max_prompts_bounds_the_pool(bound: int) -> None:
    _, sets, _ = planted(12, 8, 16, 0.1, 1.0, 0.5, 0)
    assert len(PFPT.aggregate(sets).prompts) == 12
    aggregator = aggregation.create("pfpt", max_prompts=bound)
    first = aggregator.aggregate(sets)
    again = aggregator.aggregate(sets, previous=first.prompts, state=first.state)
    for result in (first, again):
        assert len(result.prompts) <= bound
        for rows in result.assignment:
            assert len(set(rows.tolist())) == 6
    with pytest.raises(InputError, match=r"aggregator.max_prompts: expected at least 6, .* got 5"):
        aggregation.create("pfpt", max_prompts=5).aggregate(sets)


def test_the_state_stands_in_for_previous() -> None:
    sets, keys, origins, start = keyed_clients()
    first = PFPT.aggregate(sets, origins=origins, previous=start, keys=keys)
    assert first.keys is not None
    explicit = PFPT.aggregate(
        sets, previous=first.prompts, keys=keys, state=first.state, previous_keys=first.keys
    )
    implicit = PFPT.aggregate(sets, keys=keys, state=first.state)
    assert torch.equal(explicit.prompts, implicit.prompts)
    assert explicit.diagnostics["kept"] == len(first.prompts)
    with pytest.raises(InputError, match=r"state 'strength': expected shape \(5,\), got \(10,\)"):
        PFPT.aggregate(sets, previous=start, state=first.state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "aggregator.patience: expected an integer >= 1, got 0"),
        ({"patience": 1.5}, "aggregator.patience: expected an integer >= 1, got 1.5"),
        ({"max_prompts": -1}, "aggregator.max_prompts: expected an integer >= 0, got -1"),
        ({"key_weight": -1}, "aggregator.key_weight: expected a finite number >= 0, got -1"),
        ({"gamma": 0}, "aggregator.gamma: expected a finite number > 0, got 0"),
        (
            {"origin_odds": math.nan},
            "aggregator.origin_odds: expected a finite number > 0, got nan",
        ),
        (
            {"variant": "mapp"},
            "aggregator.variant: expected one of map, paper, released, got 'mapp'; did you mean",
        ),
        ({"loops": 0}, "aggregator.loops: expected an integer >= 1, got 0"),
        ({"memory": "x"}, "aggregator.memory: expected a finite number >= 0, got 'x'"),
        ({"shrink": 1}, "aggregator.shrink: expected true or false, got 1"),
        (
            {"parameterisation": "neural"},
            "aggregator.parameterisation: expected empirical with variant=map, got neural; the "
            "paper's networks are in aggregator.variant=paper",
        ),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        aggregation.create("pfpt", **options)
    aggregation.create("pfpt", variant="paper", parameterisation="neural")


def test_the_weight_of_keys_depends_on_neither_dimension() -> None:
    sets, keys, origins, start = keyed_clients()
    centre = torch.cat(keys).mean(dim=0)

    def pools(prompt_copies: int, key_copies: int) -> list[int]:
        """Pool sizes while the domains' keys move apart; coordinates are repeated."""
        sizes = []
        for step in np.linspace(0.0, 1.0, 11):
            apart = [
                key + (step - 1) * (torch.stack(keys[t % 2 :: 2]).mean(dim=(0, 1)) - centre)
                for t, key in enumerate(keys)
            ]
            result = aggregation.create("pfpt", key_weight=0.5).aggregate(
                [prompts.repeat(1, prompt_copies) for prompts in sets],
                origins=origins,
                previous=start.repeat(1, prompt_copies),
                keys=[(key - centre).repeat(1, key_copies) for key in apart],
            )
            sizes.append(len(result.prompts))
        return sizes

    plain = pools(1, 1)
    assert plain[0] == 5
    assert plain[-1] == 10
    assert pools(1, 8) == plain
    assert pools(8, 1) == plain
