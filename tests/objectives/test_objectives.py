"""Objectives by themselves: SCAFFOLD on paper, closed-form heads against scikit-learn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from sklearn.covariance import empirical_covariance
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

from fedprompt.core.errors import ConfigError, RoundError
from fedprompt.core.types import ClientUpdate, Parts
from fedprompt.objectives import LocalResult, Objective, Teacher, objectives

NOTHING = torch.empty(0)


def local(start: float, end: float, control: float, own: dict[str, Tensor]) -> LocalResult:
    """One number `w`, 4 steps of rate 0.5."""
    return LocalResult(
        start=Parts(head={"w": torch.tensor([start])}),
        end=Parts(head={"w": torch.tensor([end])}),
        received=Parts(objective={"head.w": torch.tensor([control])}),
        own=own,
        steps=4,
        rates={"head.w": 0.5},
        features=NOTHING,
        labels=NOTHING,
        num_classes=1,
    )


def update(
    client: int, sent: Mapping[str, Tensor], number: int = 1, w: Tensor | None = None
) -> ClientUpdate:
    empty, rows = torch.empty(0, 1), torch.empty(0, dtype=torch.int64)
    head = {} if w is None else {"w": w}
    return ClientUpdate(
        client, 1, number, empty, empty, rows, rows, Parts(head=head, objective=sent)
    )


def nothing_trained(features: Tensor, labels: Tensor, own: Mapping[str, Tensor]) -> LocalResult:
    """The work of a client of an objective that does not train."""
    return LocalResult(Parts(), Parts(), Parts(), own, 0, {}, features, labels, CLASSES)


def zero_head() -> Parts:
    return Parts(head={"0.weight": torch.zeros(CLASSES, WIDTH)})


# SCAFFOLD


def test_scaffold_by_hand() -> None:
    """From 3 to 1 in 4 steps of 0.5: a mean gradient of (3 - 1) / 2 = 1."""
    scaffold = objectives.create("scaffold")
    done = scaffold.finish(local(3.0, 1.0, control=0.25, own={"head.w": torch.ones(1) * 2}))
    # c_i+ = 2 - 0.25 + 1
    assert done.kept["head.w"].tolist() == [2.75]
    assert done.sent["head.w"].tolist() == [0.75]
    correction = scaffold.correction({"head.w": torch.tensor([0.25])}, done.kept)
    assert correction["head.w"].tolist() == [0.25 - 2.75]


@pytest.mark.parametrize(("variant", "share"), [("scaffold", 1 / 8), ("sampled", 1 / 2)])
def test_scaffold_s_server_variate(variant: str, share: float) -> None:
    """Two of eight clients, whose variates changed by 1 and 3."""
    scaffold = objectives.create("scaffold", variant=variant)
    before = Parts(head={"w": torch.zeros(1)}, objective={"head.w": torch.tensor([0.5])})
    updates = [update(n, {"head.w": torch.tensor([c])}) for n, c in enumerate((1.0, 3.0))]
    mean = Parts(head={"w": torch.ones(1)})
    shared, memory = scaffold.combine(before, mean, updates, 8, {})
    assert shared.head["w"].tolist() == [1.0]
    assert shared.objective["head.w"].tolist() == [0.5 + 4 * share]
    assert memory == {}


def test_scaffold_removes_the_drift_of_unequal_clients() -> None:
    """Two clients with losses (w - a)^2 a_i: FedAvg of several steps ends off the optimum of the
    mean loss, SCAFFOLD at it.

    Losses 1/2 s (w - t)^2 with (s, t) = (1, 0) and (3, 1): the optimum is (0 + 3) / 4 = 0.75.
    """

    def train(name: str) -> float:
        objective = objectives.create(name)
        shared = Parts(head={"w": torch.zeros(1)})
        shared = dataclasses.replace(shared, objective=objective.begin(shared))
        own: list[Mapping[str, Tensor]] = [{}, {}]
        for _ in range(400):
            updates = []
            for client, (s, t) in enumerate(((1.0, 0.0), (3.0, 1.0))):
                y = shared.head["w"].clone()
                constants = objective.correction(shared.objective, own[client])
                constant = constants.get("head.w", torch.zeros(1))
                for _ in range(10):
                    y = y - 0.05 * (s * (y - t) + constant)
                end, rates = Parts(head={"w": y}), {"head.w": 0.05}
                result = LocalResult(
                    shared.trained(), end, shared, own[client], 10, rates, NOTHING, NOTHING, 1
                )
                done = objective.finish(result)
                own[client] = done.kept
                updates.append(update(client, done.sent, w=y))
            mean = (updates[0].shared.head["w"] + updates[1].shared.head["w"]) / 2
            shared, _ = objective.combine(shared, Parts(head={"w": mean}), updates, 2, {})
        return float(shared.head["w"])

    assert train("scaffold") == pytest.approx(0.75, abs=1e-4)
    assert abs(train("plain") - 0.75) > 0.05


def test_a_rate_of_zero_teaches_scaffold_nothing() -> None:
    result = local(3.0, 3.0, control=0.25, own={})
    frozen = dataclasses.replace(result, rates={"head.w": 0.0})
    done = objectives.create("scaffold").finish(frozen)
    assert done.sent["head.w"].tolist() == done.kept["head.w"].tolist() == [0.0]


# Closed-form heads

WIDTH, CLASSES = 5, 3


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % CLASSES
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    return centres[labels] + torch.randn(240, WIDTH, generator=generator), labels


def head_of(objective: Objective, features: Tensor, labels: Tensor, clients: int) -> Tensor:
    """The head that one round over `clients` equal clients gives."""
    head = zero_head()
    assert objective.outgoing(head) == Parts()
    updates = []
    for client in range(clients):
        rows = torch.arange(len(labels)) % clients == client
        result = nothing_trained(features[rows], labels[rows], {})
        done = objective.finish(result)
        reply = objective.reply(head).objective
        assert {n: v.shape for n, v in done.sent.items()} == {n: v.shape for n, v in reply.items()}
        assert done.kept == objective.keeps(Teacher(head, NOTHING))
        again = objective.finish(dataclasses.replace(result, own=done.kept))
        assert not any(value.any() for value in again.sent.values())  # counted once
        updates.append(update(client, done.sent, int(rows.sum())))
    shared, memory = objective.combine(head, Parts(), updates, clients, {})
    # The same clients over two rounds.
    half, kept_sums = objective.combine(head, Parts(), updates[: clients // 2], clients, {})
    later, _ = objective.combine(half, Parts(), updates[clients // 2 :], clients, kept_sums)
    torch.testing.assert_close(later.head["0.weight"], shared.head["0.weight"])
    assert memory["count"].sum() == len(labels)
    return shared.head["0.weight"]


def test_ncm_is_the_nearest_class_mean_by_cosine(data: tuple[Tensor, Tensor]) -> None:
    features, labels = data
    weight = head_of(objectives.create("closed_form", rule="ncm"), features, labels, 8)
    means = np.stack([features[labels == c].numpy().mean(axis=0) for c in range(CLASSES)])
    expected = cosine_similarity(features.numpy(), means).argmax(axis=1)
    assert ((features @ weight.T).argmax(dim=1).numpy() == expected).all()
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(CLASSES))


def test_ridge_is_scikit_learn_s(data: tuple[Tensor, Tensor]) -> None:
    features, labels = data
    weight = head_of(objectives.create("closed_form", rule="ridge", ridge=2.0), features, labels, 8)
    one_hot = torch.nn.functional.one_hot(labels).numpy()
    from sklearn.linear_model import Ridge

    expected = Ridge(alpha=2.0, fit_intercept=False, solver="cholesky").fit(features, one_hot)
    np.testing.assert_allclose(weight.numpy(), expected.coef_, atol=1e-5)
    # Against the classifier with targets -1 and 1, which differs by a constant of each class.
    classifier = RidgeClassifier(alpha=2.0, fit_intercept=False).fit(features, labels)
    shift = np.linalg.solve(
        features.T.numpy() @ features.numpy() + 2 * np.eye(WIDTH), features.numpy().sum(axis=0)
    )
    np.testing.assert_allclose(classifier.coef_, 2 * expected.coef_ - shift, atol=1e-5)


def test_cof_s_covariances_are_those_of_the_samples_when_clients_are_many() -> None:
    """E[Sigma_c] is the class covariance: with 4,000 clients of 4 samples each class has about as
    many means as the estimate needs.
    """
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    labels = torch.arange(16_000).div(4, rounding_mode="floor") % CLASSES
    features = torch.randn(16_000, WIDTH, generator=generator) @ mixing + labels[:, None].float()
    from fedprompt.objectives import closed_form as module

    options = module.ClosedFormOptions(rule="cof", ridge=0.5, shrinkage=0.0)
    total = module._nothing(torch.zeros(CLASSES, WIDTH), "cof")
    for rows in torch.arange(16_000).split(4):
        one_hot = torch.nn.functional.one_hot(labels[rows], CLASSES).float()
        sent = {"sum": one_hot.T @ features[rows], "count": one_hot.sum(dim=0)}
        module._add(total, sent, "cof")
    means = total["sum"] / total["count"][:, None]
    scatter = module._scatter(total, means, options).numpy()
    expected = np.zeros((WIDTH, WIDTH))
    for c in range(CLASSES):
        own = features[labels == c].double().numpy()
        expected += (len(own) - 1) * empirical_covariance(own)
    mean = features.double().numpy().mean(axis=0)
    expected += 16_000 * np.outer(mean, mean)
    assert np.abs(scatter - expected).max() < 0.06 * np.abs(expected).max()
    # The head is then that of a ridge regression with this G.
    weight = module.solve(total, options).numpy()
    direct = np.linalg.solve(scatter + 0.5 * np.eye(WIDTH), total["sum"].numpy().T).T
    np.testing.assert_allclose(weight, direct / np.linalg.norm(direct, axis=1, keepdims=True))


@pytest.mark.parametrize("between", [False, True])
def test_cof_is_its_definition(data: tuple[Tensor, Tensor], between: bool) -> None:
    """The formulas of the header, client by client; class 2 is held by one client alone."""
    features, labels = data
    clients = torch.arange(len(labels)) % 4
    clients[labels == 2] = 1
    options = {"rule": "cof", "ridge": 0.7, "shrinkage": 0.2, "between": between}
    objective = objectives.create("closed_form", **options)
    updates = []
    for client in range(4):
        own = clients == client
        done = objective.finish(nothing_trained(features[own], labels[own], {}))
        updates.append(update(client, done.sent))
    shared, _ = objective.combine(zero_head(), Parts(), updates, 4, {})

    x, y, k = features.double().numpy(), labels.numpy(), clients.numpy()
    covariances = {}
    for c in (0, 1):
        mean = x[y == c].mean(axis=0)
        spread = np.zeros((WIDTH, WIDTH))
        for client in range(4):
            own = x[(y == c) & (k == client)]
            away = own.mean(axis=0) - mean
            spread += len(own) * np.outer(away, away)
        covariances[c] = spread / (4 - 1)
    covariances[2] = (covariances[0] + covariances[1]) / 2  # no spread of one client's mean
    unit = np.mean([np.diag(covariance).mean() for covariance in covariances.values()])
    scatter = np.zeros((WIDTH, WIDTH))
    for c, covariance in covariances.items():
        number = (y == c).sum()
        scatter += (number - 1) * (covariance + 0.2 * unit * np.eye(WIDTH))
        if between:
            scatter += number * np.outer(x[y == c].mean(axis=0), x[y == c].mean(axis=0))
    if not between:
        scatter += len(x) * np.outer(x.mean(axis=0), x.mean(axis=0))
    sums = np.stack([x[y == c].sum(axis=0) for c in range(CLASSES)])
    weight = np.linalg.solve(scatter + 0.7 * np.eye(WIDTH), sums.T).T
    weight /= np.linalg.norm(weight, axis=1, keepdims=True)
    np.testing.assert_allclose(shared.head["0.weight"].numpy(), weight, rtol=1e-4, atol=1e-6)


def test_cof_needs_a_class_that_two_clients_hold(data: tuple[Tensor, Tensor]) -> None:
    features, labels = data
    objective = objectives.create("closed_form")
    head = zero_head()

    def combined(*parts: Tensor) -> Tensor:
        sent = [
            objective.finish(nothing_trained(features[part], labels[part], {})).sent
            for part in parts
        ]
        updates = [update(client, each) for client, each in enumerate(sent)]
        return objective.combine(head, Parts(), updates, len(updates), {})[0].head["0.weight"]

    low, one = labels < 2, torch.arange(len(labels)) == int(torch.nonzero(labels == 0)[0])
    with pytest.raises(RoundError, match="a class that two clients hold, got 1 client without"):
        combined(labels >= 0)
    with pytest.raises(RoundError, match=r"got 2 clients without .* use objective\.rule=ncm"):
        combined(low, ~low)
    assert combined(low, ~low | one).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scaffold", {"variant": "scafold"}, "did you mean 'scaffold'"),
        ("closed_form", {"rule": "cofe"}, "did you mean 'cof'"),
        ("closed_form", {"ridge": -1.0}, "objective.ridge: expected a finite number >= 0, got -1"),
        ("closed_form", {"shrinkage": math.nan}, "objective.shrinkage"),
        ("closed_form", {"rule": "ridge", "ridge": 0.0}, "objective.ridge: expected a number > 0"),
        (
            "closed_form",
            {"ridge": 0.0, "shrinkage": 0.0},
            "objective.ridge or .shrinkage: expected",
        ),
    ],
)
def test_wrong_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        objectives.create(name, **options)
