"""The mean, with numbers small enough for pencil and paper."""

from __future__ import annotations

import pytest
import torch

from fedprompt import aggregation
from fedprompt.core.errors import InputError

MEAN = aggregation.create("mean")


def test_rows_are_averaged_over_the_clients_that_used_them() -> None:
    # Row 0: client 0 alone. Row 1: (1 * [2, 2] + 3 * [6, 10]) / 4 = [5, 8]. Row 2: no client.
    result = MEAN.aggregate(
        [torch.tensor([[2.0, 2.0], [1.0, 1.0]]), torch.tensor([[6.0, 10.0]])],
        weights=torch.tensor([1.0, 3.0]),
        origins=[torch.tensor([1, 0]), torch.tensor([1])],
        previous=torch.tensor([[0.0, 0.0], [0.0, 0.0], [7.0, 8.0]]),
        keys=[torch.tensor([[4.0], [1.0]]), torch.tensor([[8.0]])],
        previous_keys=torch.tensor([[0.0], [0.0], [9.0]]),
    )
    assert result.prompts.tolist() == [[1.0, 1.0], [5.0, 8.0], [7.0, 8.0]]
    assert result.keys is not None
    assert result.keys.tolist() == [[1.0], [7.0], [9.0]]
    assert [rows.tolist() for rows in result.assignment] == [[1, 0], [1]]
    assert result.diagnostics == {"num_prompts": 3.0, "updated": 2.0}


def test_without_origins_rows_match_by_position() -> None:
    sets = [torch.tensor([[2.0], [10.0]]), torch.tensor([[4.0], [0.0]])]
    assert MEAN.aggregate(sets).prompts.tolist() == [[3.0], [5.0]]
    with pytest.raises(InputError, match="client 1: prompts: expected 2 rows, got 1; without"):
        MEAN.aggregate([sets[0], sets[1][:1]])


def test_an_unused_row_needs_its_previous_value() -> None:
    sets, origins = [torch.tensor([[2.0]])], [torch.tensor([1])]
    with pytest.raises(InputError, match=r"previous: .* because no client used row 0"):
        MEAN.aggregate(sets, origins=origins)
    with pytest.raises(InputError, match=r"previous_keys: .* because no client used row 0"):
        MEAN.aggregate(sets, origins=origins, previous=torch.zeros(2, 1), keys=sets)


def test_float32_inputs_are_averaged_in_float64() -> None:
    sets = [torch.tensor([[1e8]]), torch.tensor([[1.0]]), torch.tensor([[-1e8]])]
    torch.testing.assert_close(MEAN.aggregate(sets).prompts, torch.tensor([[1 / 3]]))
