"""The metric of clients' queries: what a client tells, what is made of it, what comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import helmert
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from fedprompt.data.prefix.spread import (
    discriminants,
    factor_size,
    metric_of,
    scatter_of,
    shrunk,
    triangular_factor,
)
from fedprompt.models.selection import likeliest_rows, nearest_keys, scores_of

WIDTH = 6


def clients_of(seed: int, count: int = 8, images: int = 30) -> list[np.ndarray]:
    """Queries (images, WIDTH) of clients of two domains in turn, which differ by 1 in the last
    coordinate, where images of one client differ by 0.2, while they differ by up to 5 in others.
    """
    draws = np.random.default_rng(seed)
    clients = []
    for client in range(count):
        queries = draws.normal(size=(images, WIDTH)) * np.linspace(5, 1, WIDTH)
        queries[:, -1] = 0.2 * queries[:, -1] + client % 2
        clients.append(queries)
    return clients


def pooled(clients: list[np.ndarray]) -> tuple[np.ndarray, int]:
    scatter = sum((each - each.mean(axis=0)).T @ (each - each.mean(axis=0)) for each in clients)
    return np.asarray(scatter), sum(len(each) - 1 for each in clients)


@pytest.mark.parametrize("images", [1, 2, 4, WIDTH, WIDTH + 1, 50])
def test_a_factor_holds_the_scatter_in_as_few_numbers_as_there_are(images: int) -> None:
    queries = np.random.default_rng(images).normal(size=(images, WIDTH))
    factor = triangular_factor(torch.from_numpy(queries))
    assert factor.dtype == torch.float32
    # A scatter of rank r has r WIDTH - r (r - 1) / 2 free numbers.
    rank = min(images - 1, WIDTH)
    assert factor.shape == (rank * WIDTH - rank * (rank - 1) // 2,)
    assert len(factor) == factor_size(images, WIDTH)
    centred = queries - queries.mean(axis=0)
    np.testing.assert_allclose(
        scatter_of(factor, images, WIDTH), centred.T @ centred, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("images", [2, 3, WIDTH, WIDTH + 1, 50])
def test_a_factor_holds_the_scatter_where_leading_numbers_say_nothing(images: int) -> None:
    """Numbers that are the same for all images, or for all but a factor, and images that are."""
    queries = np.random.default_rng(images).normal(size=(images, WIDTH))
    queries[:, :2] = 0.1
    queries[:, 3] = -2 * queries[:, 2]
    queries[-1] = queries[0]
    factor = triangular_factor(torch.from_numpy(queries))
    centred = queries - queries.mean(axis=0)
    np.testing.assert_allclose(
        scatter_of(factor, images, WIDTH), centred.T @ centred, rtol=1e-5, atol=1e-5
    )


def test_shrinkage_is_that_of_scikit_learn_on_independent_samples() -> None:
    """n images of a client hold n - 1 independent contrasts (Helmert's) with the same scatter."""
    clients = clients_of(0, count=3, images=5)
    contrasts = np.concatenate([helmert(len(each)) @ each for each in clients])
    scatter, freedom = pooled(clients)
    assert freedom == len(contrasts) == 12
    expected = OAS(assume_centered=True).fit(contrasts)
    assert 0.05 < expected.shrinkage_ < 0.95
    np.testing.assert_allclose(shrunk(scatter / freedom, freedom), expected.covariance_)


def test_a_selection_is_that_of_linear_discriminant_analysis() -> None:
    """scikit-learn's, with equal priors and the covariance given: one class for each key."""
    scatter, freedom = pooled(clients_of(0))
    metric = metric_of(scatter, freedom)
    draws = np.random.default_rng(1)
    keys, queries = draws.normal(size=(5, WIDTH)) + 3, draws.normal(size=(40, WIDTH)) + 3
    analysis = LinearDiscriminantAnalysis(priors=np.full(5, 0.2))
    covariance = shrunk(scatter / freedom, freedom)
    analysis.coef_ = np.linalg.solve(covariance, keys.T).T
    analysis.intercept_ = -0.5 * (keys * analysis.coef_).sum(axis=1) + np.log(0.2)
    analysis.classes_ = np.arange(5)
    made = discriminants(torch.from_numpy(keys), metric)
    found = [int(likeliest_rows(torch.from_numpy(each), made, 1)[0]) for each in queries]
    assert found == analysis.predict(queries).tolist()
    scores = torch.stack([scores_of(torch.from_numpy(each), made) for each in queries])
    np.testing.assert_allclose(
        scores.softmax(dim=1).numpy(), analysis.predict_proba(queries), atol=1e-8
    )


def test_distances_in_the_metric_are_those_of_mahalanobis() -> None:
    scatter, freedom = pooled(clients_of(0))
    metric = metric_of(scatter, freedom)
    assert metric is not None
    np.testing.assert_allclose(
        metric @ metric.T, np.linalg.inv(shrunk(scatter / freedom, freedom)), rtol=1e-9, atol=1e-9
    )


def test_one_image_says_its_domain_where_plain_keys_fail() -> None:
    clients, held = clients_of(0), clients_of(1)
    keys = torch.tensor(np.stack([np.concatenate(clients[g::2]).mean(axis=0) for g in range(2)]))
    made = discriminants(keys, metric_of(*pooled(clients)))
    queries = torch.from_numpy(np.concatenate(held))
    domain = np.repeat(np.arange(8) % 2, 30)
    plain = [int(nearest_keys(each, keys, 1)[0]) for each in queries]
    found = [int(likeliest_rows(each, made, 1)[0]) for each in queries]
    assert np.mean(plain == domain) < 0.8
    assert np.mean(found == domain) > 0.93


def test_without_a_metric_the_likeliest_keys_are_the_nearest() -> None:
    draws = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(9, 4, generator=draws), torch.randn(20, 4, generator=draws)
    made = discriminants(keys, None)
    assert made.shape == (9, 5)
    for query in queries:
        assert torch.equal(likeliest_rows(query, made, 3), nearest_keys(query, keys, 3))


def test_equal_keys_have_equal_scores_and_the_lower_rows_are_taken() -> None:
    keys = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).expand(7, -1)
    made = discriminants(torch.cat([keys + 1, keys]), np.eye(64))
    assert likeliest_rows(keys[0], made, 5).tolist() == [7, 8, 9, 10, 11]


def test_nothing_is_known_where_no_two_images_of_a_client_differ() -> None:
    assert metric_of(np.zeros((3, 3)), 0) is None
    assert metric_of(np.zeros((3, 3)), 5) is None


def test_few_images_are_enough_for_a_metric() -> None:
    """Fewer than a query has coordinates: shrinkage keeps the covariance regular."""
    metric = metric_of(*pooled(clients_of(0, count=2, images=2)))
    assert metric is not None
    assert np.isfinite(metric).all()


def test_discriminants_of_no_prompts_are_none() -> None:
    assert discriminants(torch.empty(0, 4), None).shape == (0, 5)
