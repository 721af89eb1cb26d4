"""How arguments reach an aggregator, and how a cohort is made of them."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
import torch

from fedprompt import aggregation
from fedprompt.aggregation import Aggregation, AggregationInput, Aggregator, Cohort
from fedprompt.core.errors import InputError

ONE, TWO = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 6.0], [3.0, 4.0]])


class Listener(Aggregator):
    """Remembers what it received."""

    def merge(self, given: AggregationInput) -> Aggregation:
        self.given = given
        return Aggregation(given.prompt_sets[0], None, [], {}, {})


def test_every_argument_reaches_merge_under_its_name() -> None:
    arguments = {
        "prompt_sets": [ONE, TWO],
        "weights": torch.tensor([3.0, 4.0]),
        "origins": [torch.tensor([1]), torch.tensor([0, 1])],
        "previous": torch.zeros(2, 2),
        "keys": [torch.ones(1, 3), torch.ones(2, 3)],
        "state": {"memory": torch.ones(1)},
        "generator": torch.Generator(),
        "previous_keys": torch.ones(2, 3),
        "metric": torch.eye(3),
        "others": torch.ones(4, 3),
    }
    listener = Listener()
    listener.aggregate(**arguments)
    for name, value in arguments.items():
        assert getattr(listener.given, name) is value
    listener.aggregate(*arguments.values())  # the order of arguments is public
    assert listener.given.metric is arguments["metric"]
    assert [field.name for field in dataclasses.fields(AggregationInput)] == list(arguments)
    assert list(inspect.signature(Aggregator.aggregate).parameters)[1:] == list(arguments)


def test_a_first_round_has_an_empty_state() -> None:
    listener = Listener()
    listener.aggregate([ONE])
    assert listener.given.state == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        listener.given.weights = torch.ones(1)  # type: ignore[misc]


def test_a_malformed_argument_does_not_reach_merge() -> None:
    listener = Listener()
    with pytest.raises(InputError, match="client 1: prompts have dimension 1, expected 2"):
        listener.aggregate([ONE, torch.zeros(1, 1)])
    assert not hasattr(listener, "given")


def test_a_class_without_merge_cannot_be_built() -> None:
    class Nothing(Aggregator):
        pass

    with pytest.raises(TypeError, match="abstract method"):
        Nothing()  # type: ignore[abstract]


def test_a_cohort_is_sorted_and_restores_the_callers_order() -> None:
    cohort = Cohort.of(AggregationInput([ONE, TWO], weights=torch.tensor([7, 9])))
    # The larger client first, its rows by content: (3, 4) before (5, 6).
    np.testing.assert_array_equal(cohort.prompts, [[3.0, 4.0], [5.0, 6.0], [1.0, 2.0]])
    assert cohort.owner.tolist() == [0, 0, 1]
    assert cohort.weights.tolist() == [9.0, 7.0]
    assert cohort.dtype == cohort.key_dtype == torch.float32
    restored = cohort.restore(np.array([10, 11, 12]))
    assert [rows.tolist() for rows in restored] == [[12], [11, 10]]


def test_a_cohort_is_a_copy() -> None:
    previous = torch.zeros(1, 2, dtype=torch.float64)
    given = AggregationInput([ONE.double()], previous=previous, origins=[torch.tensor([0])])
    cohort = Cohort.of(given)
    for array in (cohort.prompts, cohort.origins, cohort.previous):
        assert array is not None
        array += 1
    assert previous.tolist() == [[0.0, 0.0]]
    assert given.prompt_sets[0].tolist() == [[1.0, 2.0]]
    assert Cohort.of(given).origins.tolist() == [0]


def test_broadcast_keys_need_their_prompts() -> None:
    """Of the call or, for an aggregator that remembers them, of its state."""
    keys = torch.ones(1, 3)
    message = "previous_keys: expected 0 rows, one per row of previous, got 1"
    for name in ("mean", "kmeans", "pfpt"):
        with pytest.raises(InputError, match=message):
            aggregation.create(name).aggregate([ONE], keys=[keys], previous_keys=keys)
    pfpt = aggregation.create("pfpt")
    first = pfpt.aggregate([ONE], keys=[keys])
    again = pfpt.aggregate([ONE], keys=[keys], previous_keys=keys, state=first.state)
    assert len(again.prompts) == 1
    with pytest.raises(InputError, match="previous_keys: expected 1 rows"):
        pfpt.aggregate([ONE], keys=[keys], previous_keys=torch.ones(2, 3), state=first.state)


def test_a_seed_is_one_draw_of_the_generator() -> None:
    source, twin = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    expected = int(torch.randint(2**31, (), generator=twin))
    assert AggregationInput([ONE], generator=source).draw_seed() == expected
    assert torch.equal(source.get_state(), twin.get_state())
    assert AggregationInput([ONE]).draw_seed() == AggregationInput([TWO]).draw_seed()
