"""What every aggregator promises. Runs on all registered ones, so a new one is tested as it is."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedprompt import aggregation
from fedprompt.aggregation import Aggregation, Aggregator
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.core.registry import Registry

DOCS = Path(__file__).parents[2] / "docs" / "aggregation.md"


@dataclasses.dataclass
class Inputs:
    """Arguments of `aggregate`."""

    prompt_sets: list[Tensor]
    weights: Tensor
    origins: list[Tensor]
    previous: Tensor
    keys: list[Tensor]
    previous_keys: Tensor
    seed: int = 0

    def run(self, aggregator: Aggregator, **changes: object) -> Aggregation:
        arguments = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        seed = arguments.pop("seed")
        arguments["generator"] = torch.Generator().manual_seed(seed)
        return aggregator.aggregate(**{**arguments, **changes})

    def tensors(self) -> list[Tensor]:
        lists = [*self.prompt_sets, *self.origins, *self.keys]
        return [*lists, self.weights, self.previous, self.previous_keys]

    def permuted(self, clients: Sequence[int], rows: Sequence[Tensor]) -> Inputs:
        """Client i of the result is client `clients[i]` with its rows in order `rows[i]`."""

        def pick(values: list[Tensor]) -> list[Tensor]:
            return [values[client][order] for client, order in zip(clients, rows, strict=True)]

        return Inputs(
            pick(self.prompt_sets),
            self.weights[list(clients)],
            pick(self.origins),
            self.previous,
            pick(self.keys),
            self.previous_keys,
        )


def make_inputs(
    sizes: Sequence[int] = (6, 4, 5), d: int = 8, q: int = 3, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Clients that tuned a random subset of six broadcast prompts; each row has a user."""
    generator = torch.Generator().manual_seed(3)
    previous = torch.randn(6, d, generator=generator, dtype=dtype)
    previous_keys = torch.randn(6, q, generator=generator, dtype=dtype)
    sets, origins, keys = [], [], []
    for size in sizes:
        rows = torch.randperm(6, generator=generator)[:size]
        sets.append(previous[rows] + 0.1 * torch.randn(size, d, generator=generator, dtype=dtype))
        keys.append(
            previous_keys[rows] + 0.1 * torch.randn(size, q, generator=generator, dtype=dtype)
        )
        origins.append(rows)
    weights = torch.arange(1, len(sizes) + 1, dtype=torch.float32)
    return Inputs(sets, weights, origins, previous, keys, previous_keys)


def check_result(result: Aggregation, inputs: Inputs) -> None:
    number = len(result.prompts)
    assert result.prompts.shape == (number, inputs.previous.shape[1])
    assert result.prompts.dtype == inputs.prompt_sets[0].dtype
    assert result.prompts.isfinite().all()
    assert result.keys is not None
    assert result.keys.shape == (number, inputs.previous_keys.shape[1])
    assert result.keys.isfinite().all()
    assert [len(rows) for rows in result.assignment] == [len(p) for p in inputs.prompt_sets]
    for rows in result.assignment:
        assert rows.dtype == torch.int64
        assert len(rows) == 0 or (int(rows.min()) >= 0 and int(rows.max()) < number)
    assert result.diagnostics["num_prompts"] == number
    assert all(type(v) is float and math.isfinite(v) for v in result.diagnostics.values())
    assert all(isinstance(value, Tensor) for value in result.state.values())


def same(left: Aggregation, right: Aggregation) -> bool:
    """Equal bits of prompts, keys and state."""
    assert left.keys is not None
    assert right.keys is not None
    return (
        torch.equal(left.prompts, right.prompts)
        and torch.equal(left.keys, right.keys)
        and left.state.keys() == right.state.keys()
        and all(torch.equal(value, right.state[name]) for name, value in left.state.items())
    )


@pytest.fixture(params=aggregation.names())
def aggregator(request: pytest.FixtureRequest) -> Aggregator:
    return aggregation.create(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_is_well_formed_over_three_rounds(
    aggregator: Aggregator, dtype: torch.dtype
) -> None:
    inputs = make_inputs(dtype=dtype)
    state = None
    for _ in range(3):
        result = inputs.run(aggregator, state=state)
        check_result(result, inputs)
        state = result.state
        rows = [result.assignment[t] for t in range(3)]
        assert result.keys is not None
        inputs = dataclasses.replace(
            inputs, previous=result.prompts, previous_keys=result.keys, origins=rows
        )


def test_inputs_are_unchanged_and_outputs_share_no_memory(aggregator: Aggregator) -> None:
    inputs = make_inputs()
    first = inputs.run(aggregator)
    state = first.state
    copies = [tensor.clone() for tensor in [*inputs.tensors(), *state.values()]]
    result = inputs.run(aggregator, state=state)
    given = [*inputs.tensors(), *state.values()]
    for tensor, copy in zip(given, copies, strict=True):
        assert torch.equal(tensor, copy)
    assert result.keys is not None
    returned = [result.prompts, result.keys, *result.assignment, *result.state.values()]
    storages = [tensor.untyped_storage().data_ptr() for tensor in returned if tensor.numel()]
    assert len(set(storages)) == len(storages)
    assert not set(storages) & {tensor.untyped_storage().data_ptr() for tensor in given}


def test_order_of_clients_and_rows_is_irrelevant(aggregator: Aggregator) -> None:
    inputs = make_inputs()
    clients = [2, 0, 1]
    rows = [torch.arange(len(inputs.prompt_sets[client])).flip(0) for client in clients]
    result = inputs.run(aggregator)
    permuted = inputs.permuted(clients, rows).run(aggregator)
    assert same(result, permuted)
    for place, (client, order) in enumerate(zip(clients, rows, strict=True)):
        assert torch.equal(permuted.assignment[place], result.assignment[client][order])


def test_same_generator_same_bits_and_no_global_randomness(aggregator: Aggregator) -> None:
    inputs = make_inputs()
    torch.manual_seed(1)
    first = inputs.run(aggregator)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(first, inputs.run(aggregator))


def test_one_client(aggregator: Aggregator) -> None:
    inputs = make_inputs(sizes=(6,))
    result = inputs.run(aggregator)
    check_result(result, inputs)
    order = result.assignment[0]
    torch.testing.assert_close(result.prompts[order], inputs.prompt_sets[0])


def test_what_says_that_it_adds_no_prompts_adds_none(aggregator: Aggregator) -> None:
    if aggregator.adds_prompts and not aggregator.keeps_rows:
        pytest.skip("may add prompts")
    inputs = make_inputs(sizes=(6, 6, 6, 6))
    generator = torch.Generator().manual_seed(0)
    # Eight clusters, where six prompts were broadcast.
    centres, noise = torch.randn(8, 8, generator=generator), 0.01
    apart = [
        centres[torch.arange(6 * client, 6 * client + 6) % 8]
        + noise * torch.randn(6, 8, generator=generator)
        for client in range(4)
    ]
    found = inputs.run(aggregation.create("gmm", max_components=12), prompt_sets=apart)
    assert len(found.prompts) > 6
    assert len(inputs.run(aggregator, prompt_sets=apart).prompts) <= 6


def test_empty_set_in_one_client(aggregator: Aggregator) -> None:
    inputs = make_inputs(sizes=(6, 0, 3))
    check_result(inputs.run(aggregator), inputs)


def test_only_empty_sets_keep_what_was_broadcast(aggregator: Aggregator) -> None:
    inputs = make_inputs(sizes=(0, 0))
    result = inputs.run(aggregator)
    check_result(result, inputs)
    assert torch.equal(result.prompts, inputs.previous)
    assert result.keys is not None
    assert torch.equal(result.keys, inputs.previous_keys)


def test_identical_prompts_stay_finite(aggregator: Aggregator) -> None:
    inputs = make_inputs(sizes=(6, 6, 6))
    for values in ([inputs.previous, *inputs.prompt_sets], [inputs.previous_keys, *inputs.keys]):
        for tensor in values:
            tensor.fill_(0.25)
    result = inputs.run(aggregator)
    check_result(result, inputs)
    torch.testing.assert_close(result.prompts, torch.full_like(result.prompts, 0.25))


def test_plain_call_with_nothing_but_prompts(aggregator: Aggregator) -> None:
    inputs = make_inputs(sizes=(6, 6, 6))
    result = aggregator.aggregate(inputs.prompt_sets)
    assert result.keys is None
    assert result.prompts.isfinite().all()


def test_no_clients_is_refused(aggregator: Aggregator) -> None:
    with pytest.raises(InputError, match="no clients: expected at least one prompt set"):
        aggregator.aggregate([])


@pytest.mark.parametrize(("value", "name"), [(math.nan, "NaN"), (math.inf, "Inf")])
@pytest.mark.parametrize("what", ["prompts", "keys"])
def test_not_finite_is_refused_by_name(
    aggregator: Aggregator, value: float, name: str, what: str
) -> None:
    inputs = make_inputs()
    (inputs.prompt_sets if what == "prompts" else inputs.keys)[1][2, 1] = value
    with pytest.raises(InputError, match=f"client 1: {what}: expected finite values, got {name}"):
        inputs.run(aggregator)


def test_malformed_inputs_are_refused(aggregator: Aggregator) -> None:
    def broken(what: str, client: int, value: Tensor) -> Inputs:
        inputs = make_inputs()
        getattr(inputs, what)[client] = value
        return inputs

    good = make_inputs()
    cases = [
        (
            broken("prompt_sets", 2, torch.zeros(5, 7)),
            "client 2: prompts have dimension 7, expected 8",
        ),
        (broken("prompt_sets", 1, torch.zeros(4)), r"client 1: prompts: expected 2 dimensions"),
        (broken("prompt_sets", 1, torch.zeros(4, 8).int()), "client 1: prompts: expected dtype"),
        (broken("prompt_sets", 1, torch.zeros(4, 8).double()), "client 1: prompts have dtype"),
        (broken("keys", 1, torch.zeros(4, 2)), "client 1: keys have dimension 2, expected 3"),
        (broken("keys", 1, torch.zeros(3, 3)), "client 1: keys have 3 rows, expected 4"),
        (
            broken("origins", 2, torch.tensor([0, 1, 2, 3, 6])),
            "client 2: origins: .* below 6, got 6",
        ),
        (broken("origins", 2, torch.tensor([0, 1, 2, 3, -1])), "client 2: origins: .* got -1"),
        (broken("origins", 2, torch.tensor([0, 1])), "client 2: origins: expected 5 entries"),
        (broken("origins", 2, torch.zeros(5)), "client 2: origins: expected an int64 tensor"),
        (dataclasses.replace(good, weights=torch.ones(2)), r"weights: expected shape \(3,\)"),
        (dataclasses.replace(good, weights=["a", "b", "c"]), "weights: expected 3 real numbers"),
        (dataclasses.replace(good, weights=[None, 1.0, 1.0]), "weights: expected 3 real numbers"),
        (dataclasses.replace(good, weights=torch.ones(3) * 1j), "weights: expected 3 real num"),
        (dataclasses.replace(good, weights=torch.tensor([1.0, 0, 1])), "client 1: weight: .* 0.0"),
        (dataclasses.replace(good, previous=torch.zeros(6, 9)), "previous: .* 8 .* got 9"),
        (dataclasses.replace(good, previous_keys=torch.zeros(4, 3)), "previous_keys: expected 6"),
        (dataclasses.replace(good, origins=good.origins[:2]), r"origins: expected one entry per"),
    ]
    for inputs, message in cases:
        with pytest.raises(InputError, match=message):
            inputs.run(aggregator)


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        aggregation.create("meann")
    with pytest.raises(ConfigError, match=r"unknown option 'patiance'.*did you mean 'patience'"):
        aggregation.create("pfpt", patiance=2)


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> Aggregator:
    """The aggregator that docs/aggregation.md builds as an example.

    It has a registry of its own: a reader may have added the very file to this checkout.
    """
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    [code] = [block for block in blocks if "@aggregators.register" in block]
    [name] = re.findall(r'@aggregators.register\("(\w+)"', code)
    own: Registry[Aggregator] = Registry("aggregator", "fedprompt.aggregation")
    module = types.ModuleType("documented_aggregator")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look it up
    with monkeypatch.context() as patch:
        patch.setattr(aggregation, "aggregators", own)
        exec(compile(code, str(DOCS), "exec"), module.__dict__)
    return own.create(name)


def test_the_example_of_the_documentation_keeps_the_contract(documented: Aggregator) -> None:
    for dtype in (torch.float32, torch.float64):
        test_result_is_well_formed_over_three_rounds(documented, dtype)
    for check in (
        test_inputs_are_unchanged_and_outputs_share_no_memory,
        test_order_of_clients_and_rows_is_irrelevant,
        test_same_generator_same_bits_and_no_global_randomness,
        test_one_client,
        test_what_says_that_it_adds_no_prompts_adds_none,
        test_empty_set_in_one_client,
        test_only_empty_sets_keep_what_was_broadcast,
        test_identical_prompts_stay_finite,
        test_plain_call_with_nothing_but_prompts,
        test_no_clients_is_refused,
        test_malformed_inputs_are_refused,
    ):
        check(documented)
