"""FedOpt's rules by hand, on one number."""

from __future__ import annotations

import math

import pytest
import torch

from fedprompt import aggregation
from fedprompt.aggregation import SharedRule
from fedprompt.core.errors import ConfigError

ROW = [torch.tensor([0])]


def two_rounds(**options: object) -> list[float]:
    """From 1, and the clients always return 0.5 more than they were given."""
    aggregator = aggregation.create("server_opt", **options)
    value, state, values = torch.ones(1, 1), {}, []
    for _ in range(2):
        result = aggregator.aggregate([value + 0.5], origins=ROW, previous=value, state=state)
        value, state = result.prompts, result.state
        values.append(float(value))
    return values


def test_momentum() -> None:
    # m = 0.5, then 0.5 * 0.5 + 0.5 = 0.75
    assert two_rounds(beta1=0.5, lr=2.0) == [1 + 2 * 0.5, 1 + 2 * 0.5 + 2 * 0.75]


@pytest.mark.parametrize(
    ("rule", "second"),
    [
        ("adagrad", (0.01 + 0.25, 0.01 + 0.5)),
        ("adam", (0.9 * 0.01 + 0.1 * 0.25, 0.9 * (0.9 * 0.01 + 0.1 * 0.25) + 0.1 * 0.25)),
        ("yogi", (0.01 + 0.1 * 0.25, 0.01 + 0.2 * 0.25)),
    ],
)
def test_adaptive_rules(rule: str, second: tuple[float, float]) -> None:
    first = (0.5 * 0.5, 0.5 * 0.25 + 0.5 * 0.5)
    moves = [m / (math.sqrt(v) + 0.1) for m, v in zip(first, second, strict=True)]
    values = two_rounds(rule=rule, lr=1.0, beta1=0.5, beta2=0.9, tau=0.1)
    assert values == pytest.approx([1 + moves[0], 1 + sum(moves)])


def test_shared_tensors_follow_the_same_rule() -> None:
    aggregator = aggregation.create("server_opt", beta1=0.5, lr=2.0)
    assert isinstance(aggregator, SharedRule)
    before, memory = {"head": torch.ones(1)}, {}
    for expected in (2.0, 3.5):
        before, memory = aggregator.merge_shared({"head": before["head"] + 0.5}, before, memory)
        assert before["head"].tolist() == [expected]


def test_an_unused_row_stays_with_its_moments() -> None:
    aggregator = aggregation.create("server_opt", beta1=0.9)
    previous = torch.zeros(2, 1)
    both = [torch.tensor([0, 1])]
    first = aggregator.aggregate([torch.ones(2, 1)], origins=both, previous=previous)
    second = aggregator.aggregate(
        [torch.full((1, 1), 2.0)], origins=ROW, previous=first.prompts, state=first.state
    )
    # Row 0: m = 0.9 * 1 + 1.
    torch.testing.assert_close(second.prompts, torch.tensor([[2.9], [1.0]]))
    assert second.state["prompts.first"][1] == first.state["prompts.first"][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "adams"}, "did you mean 'adam'"),
        ({"lr": 0.0}, "aggregator.lr: expected a finite number > 0, got 0.0"),
        ({"tau": math.inf}, "aggregator.tau"),
        ({"beta1": 1.0}, r"aggregator.beta1: expected a finite number >= 0 and < 1, got 1.0"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        aggregation.create("server_opt", **options)
