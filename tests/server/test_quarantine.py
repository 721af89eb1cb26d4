"""What a client may send: an update as it should be, and each way in which it can be wrong."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fedprompt.config import compose
from fedprompt.core.types import (
    Broadcast,
    ClientJob,
    ClientState,
    ClientUpdate,
    Parts,
    ServerState,
    Tensors,
)
from fedprompt.objectives import Objective, Teacher
from fedprompt.server.quarantine import Expected, expected_of, fault, quarantine

NAN = torch.tensor([math.nan, 0.0])


class Keeping(Objective):
    """Broadcasts, sends and keeps one tensor of its own."""

    def keeps(self, start: Teacher) -> Tensors:
        return {"memory": torch.zeros(1)}


@pytest.fixture(scope="module")
def expected() -> Expected:
    """Of client 3 in round 2: three prompts of 4 with keys of 2, personal prompts and head."""
    config = compose("quickstart", ["method=local_only", "head.mode=personal", "compare=[]"])
    recipe = config.recipe(10)
    assert recipe.personal == {"prompts", "head"}
    fixed = Parts(prompts=torch.zeros(3, 4), head={"0.bias": torch.zeros(2)})
    shared = Parts(adaptation={"a": torch.zeros(2)}, objective={"head.x": torch.zeros(2)})
    state = ServerState(1, torch.zeros(3, 4), torch.zeros(3, 2), shared, fixed=ClientState(fixed))
    job = ClientJob(3, 2, 0, state.broadcast())
    return expected_of(job, Keeping(None), recipe, state)


def good_update(**changes: object) -> ClientUpdate:
    update = ClientUpdate(
        client_id=3,
        round_index=2,
        num_examples=8,
        prompts=torch.zeros(2, 4),
        keys=torch.zeros(2, 2),
        origins=torch.tensor([2, 0]),
        use_counts=torch.tensor([1, 5]),
        shared=Parts(adaptation={"a": torch.zeros(2)}, objective={"head.x": torch.zeros(2)}),
        state=kept(),
        metrics={"loss": 1.0, "accuracy": 0.5, "steps": 6.0, "seconds": 0.1, "pack": 1.0},
    )
    return dataclasses.replace(update, **changes)  # type: ignore[arg-type]


def kept(
    prompts: Tensor | None = None,
    bias: Tensor | None = None,
    memory: Mapping[str, Tensor] | None = None,
    start: Parts | None = None,
) -> ClientState:
    """A client's own state, with something in the place of what is expected."""
    parts = Parts(
        prompts=torch.zeros(3, 4) if prompts is None else prompts,
        head={"0.bias": torch.zeros(2) if bias is None else bias},
        objective={"memory": torch.zeros(1)} if memory is None else memory,
    )
    return ClientState(parts, Parts() if start is None else start)


def measured(**changes: float) -> dict[str, float]:
    return {**good_update().metrics, **changes}


def test_an_update_as_described_is_used(expected: Expected) -> None:
    assert fault(good_update(), expected) is None
    none_used = good_update(
        prompts=torch.zeros(0, 4),
        keys=torch.zeros(0, 2),
        origins=torch.zeros(0, dtype=torch.int64),
        use_counts=torch.zeros(0, dtype=torch.int64),
    )
    assert fault(none_used, expected) is None
    assert fault(good_update(metrics=measured(more=1.0)), expected) is None


SENT = good_update().shared


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round_index": 1}, "expected an update of round 2, got 1"),
        ({"num_examples": 0}, "expected num_examples >= 1, got 0"),
        ({"num_examples": 2.5}, "expected num_examples >= 1, got 2.5"),
        ({"prompts": [[0.0] * 4]}, "prompts: expected a Tensor, got list"),
        ({"shared": {}}, "shared: expected a Parts, got dict"),
        ({"state": {}}, "state: expected a ClientState, got dict"),
        ({"metrics": None}, "metrics: expected a Mapping, got NoneType"),
        ({"prompts": torch.zeros(2, 3)}, "prompts: expected (2, 4) torch.float32, got (2, 3)"),
        ({"prompts": torch.zeros(2, 4).double()}, "got (2, 4) torch.float64"),
        ({"prompts": torch.full((2, 4), math.inf)}, "prompts: 8 of 8 values are not finite"),
        ({"keys": torch.zeros(3, 2)}, "keys: expected (2, 2)"),
        ({"origins": torch.tensor([0.0, 1.0])}, "origins: expected (2,) torch.int64"),
        ({"origins": torch.tensor([0, 3])}, "origins: expected rows 0..2, got 0..3"),
        ({"origins": torch.tensor([-1, 0])}, "origins: expected rows 0..2, got -1..0"),
        ({"origins": torch.tensor([1, 1])}, "origins: expected each row once, got [1, 1]"),
        ({"use_counts": torch.tensor([0, 1])}, "use_counts: expected numbers >= 1, got 0"),
        (
            {"shared": Parts()},
            "expected tensors ['shared/adaptation.a', 'shared/objective.head.x']",
        ),
        (
            {"shared": dataclasses.replace(SENT, head={"x": torch.zeros(1)})},
            "expected tensors [] and got ['shared/head.x']",
        ),
        (
            {"shared": dataclasses.replace(SENT, adaptation={"a": NAN})},
            "shared/adaptation.a: 1 of 2 values are not finite",
        ),
        (
            {"shared": dataclasses.replace(SENT, objective={"head.x": NAN})},
            "shared/objective.head.x: 1 of 2 values are not finite",
        ),
        ({"state": ClientState()}, "expected tensors ['state/head.0.bias', 'state/objective.mem"),
        ({"state": kept(bias=NAN)}, "state/head.0.bias: 1 of 2 values are not finite"),
        ({"state": kept(prompts=torch.zeros(2, 4))}, "state/prompts: expected (3, 4)"),
        (
            {"state": kept(memory={"memory": torch.tensor([math.nan])})},
            "state/objective.memory: 1 of 1 values are not finite",
        ),
        (
            {"state": kept(start=Parts(prompts=torch.zeros(3, 4)))},
            "expected tensors [] and got ['state/start.prompts']",
        ),
        ({"metrics": {"loss": 0.0}}, "got no steps, seconds, pack, accuracy"),
        ({"metrics": measured(loss=math.nan)}, "loss: expected a finite number, got nan"),
        ({"metrics": measured(more=math.inf)}, "more: expected a finite number, got inf"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_anything_else_is_refused(
    expected: Expected, changes: dict[str, object], reason: str
) -> None:
    found = fault(good_update(**changes), expected)
    assert found is not None
    assert re.search(re.escape(reason), found), found


def test_one_update_of_each_client_of_the_cohort(expected: Expected) -> None:
    other = dataclasses.replace(expected, client_id=5)
    updates = [good_update(), good_update(), good_update(client_id=4), good_update(client_id=5)]
    good, refused = quarantine(updates, [expected, other])
    assert [update.client_id for update in good] == [3, 5]
    assert [(each.client, each.reason) for each in refused] == [
        (3, "expected one update of each client, got another one"),
        (4, "expected a client of the cohort [3, 5], got client 4"),
    ]


def test_a_client_that_does_not_train_has_no_loss() -> None:
    """As it has none to report, none is asked for."""
    config = compose("quickstart", ["method=fedcof", "compare=[]"])
    recipe = config.recipe(2)
    head = Parts(head={"0.weight": torch.zeros(2, 4)})
    state = ServerState(0, torch.zeros(0, 4), torch.zeros(0, 0), head)
    job = ClientJob(3, 1, 0, Broadcast(state.prompts, state.keys))
    description = expected_of(job, recipe.build_objective(), recipe, state)
    assert description.metrics == ("steps", "seconds", "pack")
    assert set(description.tensors) == {
        *("prompts", "keys", "origins", "use_counts"),
        *("shared/objective.sum", "shared/objective.count", "state/objective.sent"),
    }
