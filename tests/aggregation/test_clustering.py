from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from fedprompt import aggregation
from fedprompt.aggregation import Aggregation
from fedprompt.core.errors import ConfigError, InputError

NAMES = ["gmm", "kmeans"]
BOUND = {
    "gmm": lambda number: {"max_components": number},
    "kmeans": lambda number: {"clusters": number},
}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def groups(clients: int = 6, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    """Noisy copies of four distant prompts in shuffled order; the copies' labels; the prompts."""
    generator = torch.Generator().manual_seed(seed)
    true = 10 * torch.eye(4, 5, dtype=torch.float64)
    sets, labels = [], []
    for _ in range(clients):
        order = torch.randperm(4, generator=generator)
        noise = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        sets.append(true[order] + 0.1 * noise)
        labels.append(order)
    return sets, torch.cat(labels), true


def agreement(result: Aggregation, labels: Tensor) -> float:
    return float(adjusted_rand_score(labels.numpy(), torch.cat(result.assignment).numpy()))


def test_distant_groups_are_found(name: str) -> None:
    sets, labels, true = groups()
    result = aggregation.create(name).aggregate(sets)
    assert agreement(result, labels) == 1.0
    assert result.prompts.shape == (4, 5)
    # Rows are in the order of their content, which for these is the reverse of the identity's.
    torch.testing.assert_close(result.prompts, true.flip(0), atol=2.0, rtol=0.0)


def test_kmeans_returns_the_means_of_the_members() -> None:
    sets, _, _ = groups()
    result = aggregation.create("kmeans").aggregate(sets)
    stacked, rows = torch.cat(sets), torch.cat(result.assignment)
    means = torch.stack([stacked[rows == row].mean(dim=0) for row in range(4)])
    torch.testing.assert_close(result.prompts, means)


def test_gmm_centroids_are_shrunk_by_the_prior_mean() -> None:
    """Six well separated members and `mean_precision` copies of the overall mean."""
    sets, _, _ = groups()
    aggregator = aggregation.create("gmm", mean_precision=2.0, max_components=4)
    result = aggregator.aggregate(sets)
    stacked, rows = torch.cat(sets), torch.cat(result.assignment)
    for row in range(4):
        members = stacked[rows == row]
        expected = (members.sum(dim=0) + 2 * stacked.mean(dim=0)) / (len(members) + 2)
        torch.testing.assert_close(result.prompts[row], expected)


def test_two_prompts_of_one_client_may_share_a_cluster(name: str) -> None:
    """What the docstring admits: the matching rule is not respected."""
    near = torch.tensor([[0.0, 0.0], [0.1, 0.0], [9.0, 9.0]])
    result = aggregation.create(name, **BOUND[name](2)).aggregate([near, near + 0.01])
    assert all(rows[0] == rows[1] != rows[2] for rows in result.assignment)


def test_keys_are_means_of_member_keys_in_the_order_of_the_rows(name: str) -> None:
    sets, labels, _ = groups()
    keys = [torch.stack([order.double(), -order.double()], dim=1) for order in labels.split(4)]
    result = aggregation.create(name).aggregate(sets, keys=keys)
    assert result.keys is not None
    torch.testing.assert_close(result.keys[torch.cat(result.assignment)], torch.cat(keys))


@pytest.mark.parametrize(
    ("option", "expected"), [(3, 3), (0, 4)], ids=["option", "largest set or broadcast"]
)
def test_number_of_clusters_of_kmeans(option: int, expected: int) -> None:
    sets, _, true = groups()
    aggregator = aggregation.create("kmeans", clusters=option)
    assert len(aggregator.aggregate(sets).prompts) == expected
    assert len(aggregator.aggregate(sets, previous=true).prompts) == expected
    assert len(aggregator.aggregate(sets, previous=true[:2]).prompts) == (option or 2)


def test_number_of_components_of_gmm_is_bounded() -> None:
    sets, _, true = groups(clients=12)
    noisy = [each + 30 * torch.randn_like(each) for each in sets]
    for options, previous, bound in [
        ({}, None, 8),
        ({}, true[:3], 3),
        ({"max_components": 2}, None, 2),
    ]:
        result = aggregation.create("gmm", **options).aggregate(noisy, previous=previous)
        assert 1 <= len(result.prompts) <= bound
        assert result.diagnostics["num_prompts"] + result.diagnostics["dropped"] == bound


def test_components_without_prompts_are_dropped() -> None:
    sets, labels, _ = groups()
    result = aggregation.create("gmm", max_components=10).aggregate(sets)
    assert result.diagnostics["dropped"] == 10 - len(result.prompts)
    used = torch.cat(result.assignment).unique()
    assert torch.equal(used, torch.arange(len(result.prompts)))
    assert agreement(result, labels) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_more_prompts_than_clusters_means_nothing_to_merge(
    name: str, dtype: torch.dtype
) -> None:
    rows = torch.tensor([[1.0, 2.0], [0.0, 5.0]], dtype=dtype)
    result = aggregation.create(name).aggregate(
        [rows, rows[:1]], previous=torch.zeros(9, 2).to(dtype)
    )
    assert result.prompts.tolist() == [[0.0, 5.0], [1.0, 2.0]]
    assert [rows.tolist() for rows in result.assignment] == [[1, 0], [1]]


def test_one_prompt_and_identical_prompts(name: str) -> None:
    one = torch.full((1, 3), 0.7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sets in ([one], [one, one, torch.empty(0, 3)], [one.repeat(4, 1)] * 5):
            result = aggregation.create(name).aggregate(sets)
            assert torch.equal(result.prompts, one)
            zeros = torch.full_like(one, 0.0)
            result = aggregation.create(name).aggregate([0 * each for each in sets])
            assert torch.equal(result.prompts, zeros)


def test_repeated_prompts_raise_no_warning(name: str) -> None:
    """Five different prompts, several times each."""
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for bound in (5, 3):
            aggregator = aggregation.create(name, **BOUND[name](bound))
            result = aggregator.aggregate([rows, rows, rows, rows[[0, 0, 1]]])
            assert len(result.prompts) <= bound


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        *((torch.float32, exponent) for exponent in (-40, -30, -3, 3, 30, 37)),
        *((torch.float64, exponent) for exponent in (-300, -30, 30, 300)),
    ],
)
def test_any_scale_gives_the_same_clusters(name: str, dtype: torch.dtype, exponent: int) -> None:
    sets, labels, _ = groups()
    sets = [each.to(dtype) for each in sets]
    scale = 10.0**exponent
    scaled = [(each.double() * scale).to(dtype) for each in sets]
    result = aggregation.create(name).aggregate(scaled)
    assert result.prompts.isfinite().all()
    assert agreement(result, labels) == 1.0
    expected = aggregation.create(name).aggregate(sets).prompts
    relative = (result.prompts.double() / scale).to(dtype)
    torch.testing.assert_close(relative, expected, atol=1e-3, rtol=1e-3)


def test_the_largest_numbers_stay_finite(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        top = torch.finfo(dtype).max
        sets = [torch.tensor([[top, -top], [-top, top], [top, top]], dtype=dtype)] * 3
        result = aggregation.create(name, **BOUND[name](2)).aggregate(sets)
        assert result.prompts.isfinite().all()


def test_a_far_origin_changes_nothing(name: str) -> None:
    sets, labels, _ = groups()
    result = aggregation.create(name).aggregate([each + 1e7 for each in sets])
    assert agreement(result, labels) == 1.0


def test_order_is_irrelevant_to_the_last_bit_where_clusters_overlap(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    sets = [torch.randn(size, 6, generator=generator) for size in (7, 7, 3, 0, 5)]
    first = aggregation.create(name).aggregate(sets)
    clients = [3, 1, 4, 0, 2]
    orders = [torch.randperm(len(sets[client]), generator=generator) for client in clients]
    permuted = [sets[client][order] for client, order in zip(clients, orders, strict=True)]
    second = aggregation.create(name).aggregate(permuted)
    assert torch.equal(first.prompts, second.prompts)
    assert first.diagnostics == second.diagnostics
    for place, (client, order) in enumerate(zip(clients, orders, strict=True)):
        assert torch.equal(second.assignment[place], first.assignment[client][order])


def test_only_the_generator_is_a_source_of_randomness(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    sets = [torch.randn(9, 6, generator=generator) for _ in range(4)]
    aggregator = aggregation.create(name)
    state = torch.get_rng_state()
    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]
    runs = [
        aggregator.aggregate(sets, generator=torch.Generator().manual_seed(seed)).prompts
        for seed in (0, 0)
    ]
    assert torch.equal(*runs)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], before)  # type: ignore[index]
    used = torch.Generator().manual_seed(0)
    aggregator.aggregate(sets, generator=used)
    assert not torch.equal(used.get_state(), torch.Generator().manual_seed(0).get_state())


def test_empty_sets_without_previous_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="got only empty sets; pass previous"):
        aggregation.create(name).aggregate([torch.empty(0, 3), torch.empty(0, 3)])


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("kmeans", "clusters", -1, "aggregator.clusters: expected an integer >= 0, got -1"),
        ("kmeans", "restarts", 0, "aggregator.restarts: expected an integer >= 1, got 0"),
        ("kmeans", "max_iterations", True, "an integer >= 1, got True"),
        ("gmm", "max_components", 1.5, "aggregator.max_components: expected an integer >= 0"),
        (
            "gmm",
            "covariance",
            "full",
            "aggregator.covariance: expected one of spherical, diag, got 'full'",
        ),
        ("gmm", "concentration", -1.0, "aggregator.concentration: expected a finite number >= 0"),
        ("gmm", "mean_precision", 0.0, "aggregator.mean_precision: expected a finite number > 0"),
        ("gmm", "mean_precision", float("nan"), "a finite number > 0, got nan"),
    ],
)
def test_bad_options_are_refused(name: str, option: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        aggregation.create(name, **{option: value})


@pytest.mark.parametrize("covariance", ["spherical", "diag"])
def test_gmm_does_not_collapse_in_many_dimensions(covariance: str) -> None:
    """Five prompts of 128 numbers and drift as large as their spread; scikit-learn's prior scale,
    which is 1 / 128 here, sees one component.
    """
    draws = torch.Generator().manual_seed(0)
    true = torch.randn(5, 128, generator=draws)
    sets = [true + torch.randn(5, 128, generator=draws) for _ in range(10)]
    found = {}
    for prior in (0.3, 1 / 128):
        gmm = aggregation.create("gmm", covariance=covariance, prior_variance=prior)
        found[prior] = gmm.aggregate(sets, previous=true, generator=draws)
    assert len(found[1 / 128].prompts) == 1
    assert len(found[0.3].prompts) == 5
    assert all(torch.equal(rows, found[0.3].assignment[0]) for rows in found[0.3].assignment)


def test_a_mixture_that_shrank_can_grow_again() -> None:
    aggregator = aggregation.create("gmm")
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1, 32, generator=generator)
    alike = [shared + 1e-3 * torch.randn(3, 32, generator=generator) for _ in range(4)]
    start = torch.randn(3, 32, generator=generator)
    shrunk = aggregator.aggregate(alike, previous=start)
    assert int(shrunk.state["bound"]) == 3
    centres = 10 * torch.randn(3, 32, generator=generator)
    apart = [centres + 1e-2 * torch.randn(3, 32, generator=generator) for _ in range(4)]
    previous = shrunk.prompts[:1]
    assert len(aggregator.aggregate(apart, previous=previous).prompts) == 1
    again = aggregator.aggregate(apart, previous=previous, state=shrunk.state)
    assert len(again.prompts) == 3
