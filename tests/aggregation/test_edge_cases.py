"""Unusual inputs and invariances: every aggregator, and every variant of `pfpt`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import test_contract as contract
import torch
from torch import Tensor

from fedprompt import aggregation
from fedprompt.aggregation import Aggregation, Aggregator
from fedprompt.aggregation.pfpt.map.blocks import Block
from fedprompt.aggregation.pfpt.map.columns import Columns
from fedprompt.aggregation.pfpt.map.inclusion import Inclusion
from fedprompt.aggregation.pfpt.map.matching import match_client
from fedprompt.aggregation.pfpt.map.model import BetaBernoulliModel
from fedprompt.core.errors import InputError

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"variant": "paper", "loops": 2},
    "released": {"variant": "released", "loops": 2},
}
METHODS: dict[str, Aggregator] = {
    "map": aggregation.create("pfpt"),
    **{name: aggregation.create("pfpt", **options) for name, options in VARIANTS.items()},
    **{name: aggregation.create(name) for name in ("gmm", "kmeans", "mean")},
}
LITERAL = ("paper", "released")
INJECTIVE = ("map", *LITERAL)
"""Give prompts of one client to different summarizing prompts."""
DTYPES = (torch.float32, torch.float64)

every_method = pytest.mark.parametrize("name", METHODS)


def planted(dtype: torch.dtype = torch.float64, clients: int = 3) -> list[Tensor]:
    """Noisy copies of four prompts in eight dimensions; equal positions belong together."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(4, 8))
    noise = 0.1 * rng.normal(size=(clients, 4, 8))
    return [torch.tensor(true + each, dtype=dtype) for each in noise]


def check(result: Aggregation, sets: list[Tensor], name: str) -> None:
    """Everything finite and of the right size and dtype."""
    number = len(result.prompts)
    assert result.prompts.shape[1] == sets[0].shape[1]
    assert result.prompts.dtype == sets[0].dtype
    for tensor in (result.prompts, *result.state.values()):
        assert bool(tensor.isfinite().all())
    assert result.diagnostics["num_prompts"] == number
    assert all(math.isfinite(value) for value in result.diagnostics.values())
    for rows, prompts in zip(result.assignment, sets, strict=True):
        assert rows.shape == (len(prompts),)
        assert set(rows.tolist()) <= set(range(number))
        if name in INJECTIVE:
            assert len(rows.unique()) == len(rows)


def partition(result: Aggregation) -> list[int]:
    """For each local prompt the first one that it is together with; blind to row numbers."""
    flat = torch.cat(result.assignment).tolist()
    return [flat.index(row) for row in flat]


# The contract, for the variants that the registry does not list.

CHECKS: tuple[Callable[[Aggregator], None], ...] = (
    contract.test_inputs_are_unchanged_and_outputs_share_no_memory,
    contract.test_order_of_clients_and_rows_is_irrelevant,
    contract.test_same_generator_same_bits_and_no_global_randomness,
    contract.test_empty_set_in_one_client,
    contract.test_only_empty_sets_keep_what_was_broadcast,
    contract.test_plain_call_with_nothing_but_prompts,
    contract.test_no_clients_is_refused,
    contract.test_malformed_inputs_are_refused,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_give_well_formed_results(name: str, dtype: torch.dtype) -> None:
    contract.test_result_is_well_formed_over_three_rounds(METHODS[name], dtype)


@pytest.mark.parametrize("check", CHECKS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_keep_the_contract(name: str, check: Callable[[Aggregator], None]) -> None:
    check(METHODS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_refuse_what_is_not_finite(name: str) -> None:
    for value, word in ((math.nan, "NaN"), (math.inf, "Inf")):
        for what in ("prompts", "keys"):
            contract.test_not_finite_is_refused_by_name(METHODS[name], value, word, what)


# Unusual sets, with nothing but prompts.


@every_method
def test_an_empty_set_among_others(name: str) -> None:
    sets = [each[:0] if client == 1 else each for client, each in enumerate(planted())]
    origins = [torch.arange(len(each)) for each in sets] if name == "mean" else None
    result = METHODS[name].aggregate(sets, origins=origins)
    check(result, sets, name)
    if name == "map":
        assert partition(result) == [0, 1, 2, 3] * 2


@every_method
def test_empty_sets_alone(name: str) -> None:
    sets = [torch.zeros(0, 8), torch.zeros(0, 8)]
    previous = planted(torch.float32)[0]
    origins = [torch.zeros(0, dtype=torch.int64)] * 2
    result = METHODS[name].aggregate(sets, origins=origins, previous=previous)
    check(result, sets, name)
    assert torch.equal(result.prompts, previous)
    with pytest.raises(InputError, match=r"expected .* pass previous"):
        METHODS[name].aggregate(sets)


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_client_and_one_prompt(name: str, dtype: torch.dtype) -> None:
    sets = planted(dtype)
    for few in (sets[:1], [sets[0][:1]], [each[:1] for each in sets]):
        result = METHODS[name].aggregate(few)
        check(result, few, name)
        if len(few) == 1 and name not in LITERAL:  # whose gradient steps move every prompt
            torch.testing.assert_close(result.prompts[result.assignment[0]], few[0])
        if name == "map":
            assert len(result.prompts) == len(few[0])


@every_method
def test_identical_prompts_within_a_client(name: str) -> None:
    sets = planted()
    sets[0] = sets[0][:1].repeat(4, 1)
    result = METHODS[name].aggregate(sets)
    check(result, sets, name)
    if name == "map":  # the copies stay apart; each other client's prompt 0 joins one of them
        groups = partition(result)
        assert len(result.prompts) == 7
        assert groups[5:8] == groups[9:] == [5, 6, 7]
        assert max(groups[4], groups[8]) < 4


@every_method
def test_identical_clients(name: str) -> None:
    sets = planted(clients=1) * 3
    result = METHODS[name].aggregate(sets)
    check(result, sets, name)
    if name not in LITERAL:
        torch.testing.assert_close(result.prompts[result.assignment[0]], sets[0])
        assert partition(result) == [0, 1, 2, 3] * 3


@every_method
def test_one_prompt_beside_a_hundred(name: str) -> None:
    rng = np.random.default_rng(0)
    many = torch.tensor(rng.normal(size=(100, 8)))
    sets = [many[41:42] + 0.01, many]
    origins = [torch.tensor([41]), torch.arange(100)] if name == "mean" else None
    result = METHODS[name].aggregate(sets, origins=origins)
    check(result, sets, name)
    if name in ("map", "mean"):
        assert len(result.prompts) == 100
        assert result.assignment[0][0] == result.assignment[1][41]


@every_method
@pytest.mark.parametrize("value", [0.0, 0.25, -3e30])
def test_prompts_without_variance(name: str, value: float) -> None:
    sets = [torch.full((2, 8), value), torch.full((2, 8), value)]
    if name == "released" and abs(value) > 1e10:
        with pytest.raises(InputError, match="scores stay finite"):
            METHODS[name].aggregate(sets)
        return
    result = METHODS[name].aggregate(sets)
    check(result, sets, name)
    if name != "released":
        torch.testing.assert_close(result.prompts, torch.full_like(result.prompts, value))


@every_method
def test_what_is_wrong_is_named_with_its_client(name: str) -> None:
    for value, word in ((math.nan, "NaN"), (math.inf, "Inf"), (-math.inf, "Inf")):
        sets = planted()
        sets[2][1, 3] = value
        message = f"client 2: prompts: expected finite values, got {word}"
        with pytest.raises(InputError, match=message):
            METHODS[name].aggregate(sets)
    sets = planted()
    sets[1] = sets[1][:, :5]
    with pytest.raises(InputError, match="client 1: prompts have dimension 5, expected 8"):
        METHODS[name].aggregate(sets)


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_very_small_and_very_large_prompts(name: str, dtype: torch.dtype) -> None:
    plain = METHODS[name].aggregate(planted(dtype))
    for scale in (1e-30, 1e30):
        sets = [(scale * each).to(dtype) for each in planted()]
        if name == "released" and scale > 1:
            with pytest.raises(InputError, match=r"released.*bring prompts near unit scale"):
                METHODS[name].aggregate(sets)
            continue
        result = METHODS[name].aggregate(sets)
        check(result, sets, name)
        if name == "map":
            assert torch.equal(torch.cat(result.assignment), torch.cat(plain.assignment))
        elif name != "released":  # which works in the prompts' own units
            assert partition(result) == partition(plain)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_float64_to_its_limits(scale: float) -> None:
    sets = [scale * each for each in planted()]
    check(METHODS["map"].aggregate(sets), sets, "map")


# Invariance of `map`.

CONTEXTS = ("plain", "previous", "origins", "keys", "state", "all")


def federation(seed: int, context: str) -> dict[str, Any]:
    """Arguments of `aggregate` for clients that tuned subsets of what was broadcast."""
    rng = np.random.default_rng(seed)
    number, clients, d = (int(rng.integers(low, high)) for low, high in ((3, 9), (2, 7), (2, 17)))
    noise = float(rng.choice([0.05, 0.3, 0.7, 1.2]))
    start = rng.normal(size=(number, d))
    tuned = start + 0.5 * rng.normal(size=(number, d))
    centres = rng.normal(size=(2, 6))
    rows = [rng.permutation(number)[: rng.integers(1, number + 1)] for _ in range(clients)]
    sets = [torch.tensor(tuned[each] + noise * rng.normal(size=(len(each), d))) for each in rows]
    keys = [
        torch.tensor(centres[client % 2] + 0.2 * rng.normal(size=6)).repeat(len(each), 1)
        for client, each in enumerate(rows)
    ]
    arguments: dict[str, Any] = {"prompt_sets": sets}
    if context in ("previous", "origins", "all"):
        arguments["previous"] = torch.tensor(start)
    if context in ("origins", "all"):
        arguments["origins"] = [torch.tensor(each) for each in rows]
    if context in ("keys", "all"):
        arguments["keys"] = keys
    if context == "all":
        arguments["previous_keys"] = torch.tensor(rng.normal(size=(number, 6)))
        arguments["weights"] = torch.tensor(rng.uniform(1, 9, size=clients))
    if context == "state":
        first = METHODS["map"].aggregate(sets)
        arguments["state"] = first.state
        arguments["previous"] = first.prompts
        arguments["prompt_sets"] = [each + 0.2 * torch.randn_like(each) for each in sets]
    return arguments


def moved(arguments: dict[str, Any], move: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """All prompts, those broadcast too, after a move."""
    result = {**arguments, "prompt_sets": [move(each) for each in arguments["prompt_sets"]]}
    if "previous" in arguments:
        result["previous"] = move(arguments["previous"])
    return result


def check_invariance(seed: int, context: str) -> None:
    torch.manual_seed(seed)
    arguments = federation(seed, context)
    aggregate = METHODS["map"].aggregate
    plain = aggregate(**arguments)
    rng = np.random.default_rng([seed, 1])
    shift = torch.tensor(10 * rng.normal(size=plain.prompts.shape[1]))
    scale = float(10 ** rng.uniform(-3, 3))
    for move in (lambda x: x + shift, lambda x: scale * x):
        result = aggregate(**moved(arguments, move))
        for one, other in zip(plain.assignment, result.assignment, strict=True):
            assert torch.equal(one, other)
        torch.testing.assert_close(result.prompts, move(plain.prompts))
    clients = rng.permutation(len(plain.assignment)).tolist()
    orders = [torch.tensor(rng.permutation(len(plain.assignment[c]))) for c in clients]
    permuted = dict(arguments)
    for name in {"prompt_sets", "origins", "keys"} & set(arguments):
        values = arguments[name]
        permuted[name] = [values[c][order] for c, order in zip(clients, orders, strict=True)]
    if "weights" in arguments:
        permuted["weights"] = arguments["weights"][clients]
    result = aggregate(**permuted)
    assert torch.equal(result.prompts, plain.prompts)
    for place, (client, order) in enumerate(zip(clients, orders, strict=True)):
        assert torch.equal(result.assignment[place], plain.assignment[client][order])


@pytest.mark.parametrize("context", CONTEXTS)
def test_order_shift_and_scale_change_no_assignment(context: str) -> None:
    for seed in range(3):
        check_invariance(seed, context)


@pytest.mark.parametrize("context", ["origins", "all"])
def test_rounding_does_not_number_new_columns(context: str) -> None:
    """New columns are alike, so the Hungarian algorithm is free to permute a client's new ones."""
    check_invariance(5, context)


# Options by hand.


def near(*centres: float | tuple[float, float]) -> Tensor:
    """One prompt in eight dimensions at each centre, up to a thousandth."""
    prompts = 1e-3 * torch.randn(len(centres), 8, dtype=torch.float64)
    prompts[:, :2] += torch.tensor(centres, dtype=torch.float64)
    return prompts


LEFT, RIGHT, FAR = (0.0, 0.0), (1.0, 0.0), (0.0, 10.0)


@pytest.mark.parametrize(
    ("bound", "groups", "centres"),
    [
        (0, [0, 0, 2, 2, 4, 4], {LEFT, RIGHT, FAR}),
        (3, [0, 0, 2, 2, 4, 4], {LEFT, RIGHT, FAR}),
        (2, [0, 0, 0, 0, 4, 4], {(0.5, 0.0), FAR}),
        (1, [0, 0, 0, 0, 0, 0], {(0.33, 3.33)}),
    ],
)
def test_max_prompts_merges_the_closest(
    bound: int, groups: list[int], centres: set[tuple[float, float]]
) -> None:
    """Six clients with one prompt each, two at each of three places."""
    torch.manual_seed(0)
    sets = [near(centre) for centre in (LEFT, LEFT, RIGHT, RIGHT, FAR, FAR)]
    result = aggregation.create("pfpt", max_prompts=bound).aggregate(sets)
    assert partition(result) == groups
    found = {tuple(round(x, 2) + 0.0 for x in row[:2].tolist()) for row in result.prompts}
    assert found == centres
    assert result.diagnostics["merged"] == 3 - len(centres)


def test_max_prompts_deals_out_the_least_used_where_nothing_can_merge() -> None:
    """Each two of three places share a client; two clients are at the far one, three elsewhere.

    Client 0 is at `LEFT` already, so its far prompt goes to `RIGHT`; client 1's goes to `LEFT`.
    """
    torch.manual_seed(0)
    both = (LEFT, RIGHT)
    sets = [near(LEFT, FAR), near(RIGHT, FAR), near(*both), near(*both)]
    assert len(METHODS["map"].aggregate(sets).prompts) == 3
    result = aggregation.create("pfpt", max_prompts=2).aggregate(sets)
    left, right = result.assignment[2].tolist()
    assert [rows.tolist() for rows in result.assignment[:2]] == [[left, right], [right, left]]
    expected = torch.tensor([[0.0, 2.5], [0.75, 2.5]], dtype=torch.float64)
    torch.testing.assert_close(result.prompts[[left, right], :2], expected, atol=0.01, rtol=0)


@pytest.mark.parametrize(("odds", "row"), [(1.0, 1), (1.76, 1), (1.78, 0), (9.0, 0)])
def test_origin_odds_weigh_against_distance(odds: float, row: int) -> None:
    """One prompt at 0.1 started from row 0 at -1; row 1 at 1 is nearer, in four coordinates.

    Rows count for 5 clients; with noise = base = 1 their posterior means are -5/6 and 5/6 and the
    variance of a match is 1 + 1/6. Log odds for row 1: 4 ((0.1 + 5/6)^2 - (0.1 - 5/6)^2) /
    (2 * 7/6) = 4/7 = log 1.771.
    """
    strength = np.array([5.0, 5.0])
    rows = np.array([[-1.0], [1.0]]).repeat(4, axis=1)
    model = BetaBernoulliModel(
        prompts=Block(slice(0, 4), 1.0, 1.0, 1.0, rows, strength),
        keys=None,
        inclusion=Inclusion.indian_buffet(1.0),
        num_clients=1,
        log_faithful=math.log(odds),
    )
    zero = np.zeros(1, dtype=np.int64)
    columns = Columns(np.full((1, 4), 0.1), zero, strength, classes=zero, home=zero)
    assert match_client(columns, model, slice(0, 1)).tolist() == [row]


@pytest.mark.parametrize(("odds", "origin", "row"), [(1.5, 0, 0), (1.5, 1, 1), (0.5, 0, 1)])
def test_origin_odds_make_an_ambiguous_prompt_stay(odds: float, origin: int, row: int) -> None:
    """A prompt half way between two remembered ones."""
    known = torch.tensor([5.0, 5.0], dtype=torch.float64)
    rate = torch.tensor([1.0, 3.0], dtype=torch.float64)
    state = {
        "strength": known,
        "key_strength": torch.zeros_like(known),
        "idle": torch.zeros(2, dtype=torch.int64),
        "rate": rate,
        "key_rate": rate,
    }
    previous = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).repeat(1, 4)
    result = aggregation.create("pfpt", origin_odds=odds).aggregate(
        [torch.zeros(1, 4, dtype=torch.float64)],
        origins=[torch.tensor([origin])],
        previous=previous,
        state=state,
    )
    assert result.assignment[0].tolist() == [row]
    assert torch.equal(result.prompts[1 - row], previous[1 - row])


# Diagnostics.

FIGURES = (
    *("num_prompts", "kept", "born", "merged", "pruned", "matched_distance"),
    *("inclusion_entropy", "objective_before", "objective_after", "sweeps"),
)


@pytest.mark.parametrize("sizes", [(6, 4, 5), (6,), (0, 0)], ids=str)
@pytest.mark.parametrize("name", INJECTIVE)
def test_diagnostics_are_complete_and_add_up(name: str, sizes: tuple[int, ...]) -> None:
    inputs, state = contract.make_inputs(sizes), None
    for _ in range(3):
        broadcast = len(inputs.previous)
        result = inputs.run(METHODS[name], state=state)
        figures = result.diagnostics
        assert set(FIGURES) <= set(figures)
        assert all(math.isfinite(value) for value in figures.values())
        assert all(figures[each] >= 0 for each in FIGURES if not each.startswith("objective"))
        assert figures["kept"] + figures["pruned"] == broadcast
        assert figures["kept"] + figures["born"] == figures["num_prompts"] == len(result.prompts)
        assert figures["inclusion_entropy"] <= math.log(2) + 1e-12
        if name != "released":  # whose objective may fall
            assert figures["objective_after"] >= figures["objective_before"]
        assert result.keys is not None
        state = result.state
        inputs = dataclasses.replace(
            inputs, previous=result.prompts, previous_keys=result.keys, origins=result.assignment
        )


def test_the_objective_never_falls() -> None:
    for seed in range(3):
        for context in CONTEXTS[1:]:
            figures = METHODS["map"].aggregate(**federation(seed, context)).diagnostics
            assert figures["objective_after"] >= figures["objective_before"]
