"""What a client may send: an update as it should be, and each way in which it can be wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

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
from fedprompt.server.quarantine import (
    Expected,
    expected_of,
    fault,
    in_order,
    is_readable,
    quarantine,
    sound_metrics,
)
from fedprompt.server.traffic import upload_bytes

NAN = torch.tensor([math.nan, 0.0])
HUGE = 10**10_000
"""More digits than Python puts into a text."""


class Keeping(Objective):
    """Broadcasts, sends and keeps one tensor of its own."""

    def keeps(self, start: Teacher) -> Tensors:
        return {"memory": torch.zeros(1)}


@pytest.fixture(scope="module")
def expected() -> Expected:
    """Of client 3 in round 2: three prompts of 4 with keys of 2, personal prompts and head."""
    config = compose("digits", ["method=local_only", "head.mode=personal", "compare=[]"])
    recipe = config.recipe(10)
    assert recipe.personal == {"prompts", "head"}
    fixed = Parts(prompts=torch.zeros(3, 4), head={"0.bias": torch.zeros(2)})
    shared = Parts(adaptation={"a": torch.zeros(2)}, objective={"head.x": torch.zeros(2)})
    state = ServerState(1, torch.zeros(3, 4), torch.zeros(3, 2), shared, fixed=ClientState(fixed))
    job = ClientJob(3, 2, 0, state.broadcast())
    return expected_of(job, Keeping(None), recipe, state, sizes=[1, 2, 3, 8])


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
        # numbers
        ({"client_id": 4}, "expected client 3, got 4"),
        ({"client_id": "3"}, "expected client 3, got '3'"),
        ({"client_id": 3.0}, "expected client 3, got 3.0"),
        ({"client_id": True}, "expected client 3, got True"),
        ({"client_id": None}, "expected client 3, got None"),
        ({"client_id": [3]}, "expected client 3, got a list"),
        ({"client_id": HUGE}, "expected client 3, got an integer of 33220 bits"),
        ({"round_index": "2"}, "expected an update of round 2, got '2'"),
        ({"round_index": math.nan}, "expected an update of round 2, got nan"),
        ({"round_index": HUGE}, "expected an update of round 2, got an integer of 33220 bits"),
        ({"num_examples": "8"}, "expected num_examples >= 1, got '8'"),
        ({"num_examples": math.nan}, "expected num_examples >= 1, got nan"),
        ({"num_examples": math.inf}, "expected num_examples >= 1, got inf"),
        ({"num_examples": -8}, "expected num_examples >= 1, got -8"),
        ({"num_examples": True}, "expected num_examples >= 1, got True"),
        ({"num_examples": None}, "expected num_examples >= 1, got None"),
        ({"num_examples": torch.tensor(8)}, "expected num_examples >= 1, got a Tensor"),
        ({"num_examples": 9}, "expected num_examples <= 8, got 9"),
        ({"num_examples": 10**30}, "expected num_examples <= 8, got an integer of 100 bits"),
        ({"num_examples": HUGE}, "expected num_examples <= 8, got an integer of 33220 bits"),
        # types and layouts
        ({"prompts": None}, "prompts: expected a Tensor, got NoneType"),
        ({"prompts": np.zeros((2, 4), np.float32)}, "prompts: expected a Tensor, got ndarray"),
        ({"prompts": torch.tensor(0.0)}, "prompts: expected a row for each prompt, got a tensor w"),
        ({"use_counts": torch.tensor(1)}, "use_counts: expected a row for each prompt"),
        ({"prompts": torch.zeros(2, 4).to_sparse()}, "prompts: expected a dense tensor of the CPU"),
        ({"prompts": torch.zeros(2, 4, device="meta")}, "expected a dense tensor of the CPU"),
        ({"prompts": torch.zeros(2, 4, requires_grad=True)}, "expected a tensor without gradient"),
        ({"prompts": nn.Parameter(torch.zeros(2, 4))}, "expected a plain Tensor, got Parameter"),
        ({"prompts": torch.zeros(2, 4, dtype=torch.complex64)}, "got (2, 4) torch.complex64"),
        (
            {"prompts": torch.quantize_per_tensor(torch.zeros(2, 4), 1.0, 0, torch.qint8)},
            "prompts: expected a dense tensor of the CPU",
        ),
        ({"prompts": torch.zeros(2, 4, 1)}, "prompts: expected (2, 4) torch.float32, got (2, 4, 1"),
        ({"keys": [0.0]}, "keys: expected a Tensor, got list"),
        ({"origins": [2, 0]}, "origins: expected a Tensor, got list"),
        ({"spread": "wide"}, "spread: expected a Tensor or None, got str"),
        ({"spread": torch.zeros(3)}, "expected tensors [] and got ['spread']"),
        ({"shared": None}, "shared: expected a Parts, got NoneType"),
        ({"shared": Parts(prompts=[0.0])}, "shared/prompts: expected a Tensor or None, got list"),
        ({"shared": Parts(head=[1])}, "shared/head: expected a Mapping, got list"),
        ({"shared": Parts(head={1: torch.zeros(1)})}, "shared/head: expected names, got 1"),
        (
            {"shared": Parts(adaptation={"a": np.zeros(2)})},
            "shared/adaptation.a: expected a Tensor, got ndarray",
        ),
        (
            {"shared": dataclasses.replace(SENT, adaptation={"a": torch.zeros(2).to_sparse()})},
            "shared/adaptation.a: expected a dense tensor",
        ),
        (
            {"shared": dataclasses.replace(SENT, adaptation={"a": torch.zeros(())})},
            "shared/adaptation.a: expected (2,) torch.float32, got ()",
        ),
        ({"state": [1, 2]}, "state: expected a ClientState, got list"),
        ({"state": ClientState(kept={})}, "state: expected a Parts, got dict"),
        ({"state": ClientState(start=3)}, "state/start: expected a Parts, got int"),
        (
            {"state": kept(memory={"memory": torch.zeros(1), "more": torch.zeros(1 << 20)})},
            "expected tensors [] and got ['state/objective.more']",
        ),
        # rows
        (
            {
                "prompts": torch.zeros(5000, 4),
                "keys": torch.zeros(5000, 2),
                "origins": torch.arange(5000),
                "use_counts": torch.ones(5000, dtype=torch.int64),
            },
            "prompts: expected at most 3 rows, got 5000",
        ),
        ({"use_counts": torch.tensor([-5, 1])}, "use_counts: expected numbers >= 1, got -5"),
        ({"use_counts": torch.tensor([1, 1 << 40])}, "use_counts: expected numbers below 2^31"),
        ({"use_counts": torch.ones(2)}, "use_counts: expected (2,) torch.int64"),
        ({"keys": torch.full((2, 2), 1e20)}, "keys: expected a length of at most 1, got 1.414e+20"),
        # metrics
        ({"metrics": [1.0]}, "metrics: expected a Mapping, got list"),
        ({"metrics": measured(loss="low")}, "loss: expected a finite number, got 'low'"),
        ({"metrics": measured(loss=None)}, "loss: expected a finite number, got None"),
        ({"metrics": measured(loss=10**400)}, "loss: expected a finite number, got an integer of"),
        ({"metrics": measured(loss=True)}, "loss: expected a finite number, got True"),
        ({"metrics": measured(loss=torch.tensor(1.0))}, "loss: expected a finite number, got a Te"),
        ({"metrics": measured(accuracy=2.0)}, "accuracy: expected a number from 0 to 1, got 2"),
        ({"metrics": measured(seconds=-1.0)}, "seconds: expected a number from 0 to"),
        ({"metrics": measured(pack=0.0)}, "pack: expected a number from 1 to"),
        ({"metrics": measured(client=5)}, "metrics: expected a name of their own, got 'client'"),
        ({"metrics": {**measured(), 7: 1.0}}, "metrics: expected a name of their own, got 7"),
        ({"metrics": {**measured(), "m" * 9999: 1.0}}, "metrics: expected a name of their own"),
        (
            {"metrics": measured(**{f"m{n}": 0.0 for n in range(100)})},
            "expected at most 64 metrics, got 105",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_anything_else_is_refused(
    expected: Expected, changes: dict[str, object], reason: str
) -> None:
    bad = good_update(**changes)
    found = fault(bad, expected)
    assert found is not None
    assert re.search(re.escape(reason), found), found
    assert len(found) < 300
    assert "\n" not in found
    # And what a round does with it raises nothing either.
    good, refused = quarantine(in_order([bad]), [expected])
    assert good == []
    assert refused
    if is_readable(bad):
        assert upload_bytes(bad) >= 0
        json.dumps(sound_metrics(bad.metrics), allow_nan=False)


def test_one_update_of_each_client_of_the_cohort(expected: Expected) -> None:
    other = dataclasses.replace(expected, client_id=5)
    updates = [good_update(), good_update(), good_update(client_id=4), good_update(client_id=5)]
    last = dataclasses.replace(expected, client_id=7)
    good, refused = quarantine(in_order(reversed(updates)), [expected, other, last])
    assert [update.client_id for update in good] == [5]
    assert [(each.client, each.reason) for each in refused] == [
        (3, "expected one update of each client, got 2"),
        (3, "expected one update of each client, got 2"),
        (4, "expected a client of the cohort [3, 5, 7], got client 4"),
        (7, "expected an update of the client, got none"),
    ]


@pytest.mark.parametrize(
    "thing",
    [None, 3, "update", b"", {}, [good_update()], object(), ClientUpdate, math.nan, HUGE],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_update_at_all_is_refused(expected: Expected, thing: object) -> None:
    good, refused = quarantine(in_order([thing, good_update()]), [expected])  # type: ignore[list-item]
    assert [update.client_id for update in good] == ([3] if thing != 3 else [])
    assert all(isinstance(each.client, int) or len(each.client) < 90 for each in refused)


class Trap(Mapping[str, float]):
    """Raises whatever is asked of it."""

    def __getitem__(self, name: str) -> float:
        raise RuntimeError("trap")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("trap")

    def __len__(self) -> int:
        raise RuntimeError("trap")


def test_a_check_that_itself_fails_is_the_updates_fault(expected: Expected) -> None:
    assert fault(good_update(metrics=Trap()), expected) == "cannot be checked: RuntimeError"


def test_a_client_that_does_not_train_has_no_loss() -> None:
    """As it has none to report, none is asked for."""
    config = compose("digits", ["method=fedcof", "compare=[]"])
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
