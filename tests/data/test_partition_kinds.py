"""All partitioners: nothing lost, nothing repeated, and what each of them promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.partition import base as partition
from fedprompt.data.partition.classes import deal_shards, shard_counts
from fedprompt.data.partition.dirichlet import draw_pieces, hand_out
from fedprompt.data.partition.long_tail import tail_sizes

Labels = NDArray[np.int64]
FEASIBLE: dict[str, dict[str, Any]] = {
    "iid": {},
    "dirichlet": {"min_samples": 0},
    "dirichlet_per_client": {},
    "imbalance": {"min_samples": 0},
    "shards": {},
    "quantity": {},
    "long_tail": {"imbalance_factor": 3.0, "then": "quantity"},
    "natural": {},
}
"""Options under which a partitioner can divide 300 samples of 5 classes among up to 12 clients."""


def divide(
    name: str, labels: Labels, num_clients: int, seed: int, **options: Any
) -> list[NDArray[np.int64]]:
    """The partition; `natural` goes by a column of 12 values."""
    partitioner: Any = partition.create(name, **{**FEASIBLE[name], **options})
    columns = {"groups": np.arange(len(labels)) % 12} if name == "natural" else {}
    parts: list[NDArray[np.int64]] = partitioner(labels, num_clients, seed, **columns)
    return parts


def counts_of(parts: list[NDArray[np.int64]], labels: Labels) -> NDArray[np.int64]:
    return partition.class_counts(parts, labels, int(labels.max()) + 1)


def test_every_partitioner_is_tested_here() -> None:
    assert sorted([*FEASIBLE, "file"]) == partition.partitioners.names()


@given(
    name=st.sampled_from(sorted(FEASIBLE)),
    num_clients=st.integers(5, 12),
    seed=st.integers(0, 2**63 - 1),
    data=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_every_sample_goes_to_exactly_one_client(
    name: str, num_clients: int, seed: int, data: int
) -> None:
    labels = np.random.default_rng(data).integers(0, 5, size=300)
    parts = divide(name, labels, num_clients, seed)
    assert len(parts) == num_clients
    assert all(part.dtype == np.int64 for part in parts)
    samples = np.concatenate(parts)
    assert len(np.unique(samples)) == len(samples)
    if name == "long_tail":
        kept = np.bincount(labels[samples], minlength=5)
        assert np.array_equal(kept, tail_sizes(np.bincount(labels), 3.0))
    else:
        assert np.array_equal(np.sort(samples), np.arange(300))
    if name not in ("dirichlet", "imbalance"):  # which were asked for no minimum
        assert min(map(len, parts)) >= 1
    again = divide(name, labels, num_clients, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("name", sorted({*FEASIBLE} - {"natural"}))
def test_another_seed_gives_another_partition(name: str) -> None:
    labels = np.arange(300) % 5
    drawn = {tuple(np.concatenate(divide(name, labels, 10, seed)).tolist()) for seed in range(5)}
    assert len(drawn) == 5


@pytest.mark.parametrize("name", sorted(FEASIBLE))
def test_labels_are_not_changed_and_may_be_a_list(name: str) -> None:
    labels = np.arange(300) % 5
    labels.setflags(write=False)
    parts = divide(name, labels, 10, 0)
    again = divide(name, labels.tolist(), 10, 0)  # type: ignore[arg-type]
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


# The corners: one client, one class, an empty class, extreme alpha


@pytest.mark.parametrize("name", sorted(FEASIBLE))
@pytest.mark.parametrize(
    ("labels", "num_clients"),
    [
        (np.arange(60) % 5, 1),
        (np.zeros(60, np.int64), 6),
        (np.zeros(60, np.int64), 1),
        (np.arange(60) % 3 * 2, 6),  # classes 1 and 3 have no samples
        (np.array([0]), 1),
    ],
    ids=["one client", "one class", "one of both", "empty class", "one sample"],
)
def test_corners_are_divided_or_refused_in_one_line(
    name: str, labels: Labels, num_clients: int
) -> None:
    try:
        parts = divide(name, labels, num_clients, 0)
    except ConfigError as error:
        # One client cannot have two classes or dominate five: those who say so must be right.
        assert name in ("shards", "imbalance"), error
        assert "\n" not in str(error)
        classes = len(np.unique(labels))
        assert classes == 1 or num_clients == 1
        return
    expected = np.arange(len(labels))
    samples = np.sort(np.concatenate(parts))
    assert len(parts) == num_clients
    assert np.isin(samples, expected).all() if name == "long_tail" else len(samples) == len(labels)
    assert len(np.unique(samples)) == len(samples)


@pytest.mark.parametrize("name", ["shards", "imbalance"])
def test_one_class_works_where_the_options_fit(name: str) -> None:
    options = {"classes_per_client": 1} if name == "shards" else {}
    parts = divide(name, np.zeros(60, np.int64), 6, 0, **options)
    assert [len(part) for part in parts] == [10] * 6


def test_shards_know_no_empty_class() -> None:
    parts = divide("shards", np.arange(60) % 3 * 2, 6, 0, classes_per_client=1)
    assert [len(part) for part in parts] == [10] * 6


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_per_client", "quantity"])
@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 1e-3, 1e6, 1e300])
def test_extreme_alpha(name: str, alpha: float) -> None:
    labels = np.arange(1000) % 10
    parts = divide(name, labels, 20, 7, alpha=alpha)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    counts = counts_of(parts, labels)
    if alpha >= 1e6:  # equal shares; cutting loses less than 1 sample of each class
        assert abs(counts.sum(axis=1) - 50).max() <= (25 if name == "dirichlet_per_client" else 10)
        assert counts.max() <= 16
    elif alpha < 1e-3 and name == "dirichlet":  # a class is one client's
        assert ((counts > 0).sum(axis=0) == 1).all()
    elif alpha < 1e-3 and name == "quantity":
        assert sorted(counts.sum(axis=1))[-2:] == [1, 1000 - 19]


def test_all_clients_can_own_a_class_when_alpha_is_tiny() -> None:
    """The replacement of NumPy's NaN does not prefer a client."""
    owners = [next(draw_pieces(np.array([7]), 4, 1e-6, seed)).argmax() for seed in range(400)]
    frequencies = np.bincount(owners, minlength=4)
    assert frequencies.min() > 60  # 100 expected, standard deviation 8.7


# What each promises


def test_dirichlet_is_the_released_description_done_slowly() -> None:
    """Class 1 is empty: its shares are drawn as well, so that class 2 gets those of row 2."""
    labels = np.random.default_rng(3).choice([0, 2, 3], size=200)
    shares = np.random.RandomState(11).dirichlet([0.5] * 6, 4)
    expected: list[list[int]] = [[] for _ in range(6)]
    for label in range(4):
        members = np.flatnonzero(labels == label)
        cuts = (np.cumsum(shares[label])[:-1] * len(members)).astype(int)
        for client, piece in enumerate(np.split(members, cuts)):
            expected[client] += piece.tolist()
    parts = divide("dirichlet", labels, 6, 11)
    assert [part.tolist() for part in parts] == expected


@pytest.mark.parametrize("classes", [range(7), (0, 1, 3, 4, 6)])
@pytest.mark.parametrize(("dominated", "num_clients"), [(1, 10), (2, 12), (3, 10), (7, 9)])
def test_imbalance_is_the_released_description_done_slowly(
    dominated: int, num_clients: int, classes: Sequence[int]
) -> None:
    """3 x 10 / 7 is no integer, so that one client can be listed twice for a class. A class without
    samples dominates clients, too, and its shares are drawn.
    """
    labels = np.random.default_rng(5).choice(classes, size=2000)
    random = np.random.RandomState(4)
    line: list[int] = []
    for _ in range(dominated):
        row = list(range(num_clients))
        random.shuffle(row)
        line += row
    cuts = [round(dominated * num_clients / 7 * c) for c in range(8)]
    expected: list[list[int]] = [[] for _ in range(num_clients)]
    for label in range(7):
        own = line[cuts[label] : cuts[label + 1]]
        members = np.flatnonzero(labels == label)
        others = [client for client in range(num_clients) if client not in own]
        head = int(0.99 * len(members)) if others else len(members)
        for client, piece in zip(own, np.array_split(members[:head], len(own)), strict=True):
            expected[client] += piece.tolist()
        if others:
            shares = np.cumsum(random.dirichlet([1.0] * len(others)))
            random.shuffle(others)
            rest = members[head:]
            bounds = (shares[:-1] * len(rest)).astype(int)
            for client, piece in zip(others, np.split(rest, bounds), strict=True):
                expected[client] += piece.tolist()
    parts = divide("imbalance", labels, num_clients, 4, dominated=dominated, min_samples=0)
    assert [part.tolist() for part in parts] == expected


def test_imbalance_gives_its_share_to_the_dominant_classes() -> None:
    labels = np.arange(10_000) % 10
    counts = counts_of(divide("imbalance", labels, 20, 0), labels)
    assert (counts.max(axis=1) / counts.sum(axis=1)).mean() > 0.985
    own = counts.argmax(axis=1)
    assert np.bincount(own).tolist() == [2] * 10
    assert counts[np.arange(20), own].tolist() == [495] * 20  # 0.99 x 1000 / 2


def test_each_client_draws_its_mixture() -> None:
    """Sizes are equal, and for small alpha clients have few classes."""
    labels = np.arange(10_001) % 10
    sizes, effective = {}, {}
    for alpha in (0.05, 0.5, 100.0):
        counts = counts_of(divide("dirichlet_per_client", labels, 40, 1, alpha=alpha), labels)
        sizes[alpha] = sorted(counts.sum(axis=1))
        effective[alpha] = (counts > 5).sum(axis=1).mean()
    assert all(size == [250] * 39 + [251] for size in sizes.values())
    assert effective[0.05] < 4 < effective[0.5] < 9 < effective[100.0]


def test_lots_decide_where_a_class_is_asked_for_too_often() -> None:
    """Both clients want class 0 alone, of which there are 10: each is as likely to have more."""
    mixtures = np.array([[1.0, 0.0], [1.0, 0.0]])
    sizes, supply = np.array([10, 10]), np.array([10, 10])
    drawn = [
        hand_out(mixtures, sizes, supply, np.random.default_rng(seed))[0, 0] for seed in range(300)
    ]
    assert abs(np.mean(drawn) - 5) < 0.4  # standard error 0.066
    assert min(drawn) < 4 and max(drawn) > 6


@given(
    num_clients=st.integers(1, 15),
    classes=st.integers(1, 12),
    each=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_shards_give_each_client_so_many_classes(
    num_clients: int, classes: int, each: int, seed: int
) -> None:
    sizes = np.random.default_rng(seed).integers(1, 60, size=classes)
    labels = np.repeat(np.arange(classes), sizes)
    most = np.minimum(sizes, num_clients).sum()
    if num_clients * each < classes or num_clients * each > most:
        with pytest.raises(ConfigError, match=r"shards, but \d+ classes|clients with at least"):
            divide("shards", labels, num_clients, seed, classes_per_client=each)
        return
    counts = counts_of(divide("shards", labels, num_clients, seed, classes_per_client=each), labels)
    assert ((counts > 0).sum(axis=1) == each).all()
    for column in counts.T:  # shards of a class differ by one sample at most
        shards = column[column > 0]
        assert shards.max() - shards.min() <= 1


def test_shards_of_balanced_classes_are_those_of_mcmahan() -> None:
    """100 clients x 2 shards of 10 classes with 600 samples: 20 shards of 30 each."""
    labels = np.arange(6000) % 10
    counts = counts_of(divide("shards", labels, 100, 0), labels)
    assert counts.sum(axis=1).tolist() == [60] * 100
    assert set(counts.ravel().tolist()) == {0, 30}
    pairs = {tuple(np.flatnonzero(row)) for row in counts}
    assert len(pairs) > 20  # of 45: not the same classes together again and again


def test_shard_counts_stay_within_their_bounds() -> None:
    """3 clients x 2: in proportion 4.8, 0.6, 0.6; but one client takes a class once."""
    assert shard_counts(np.array([80, 10, 10]), 3, 2).sum() == 6
    assert shard_counts(np.array([80, 10, 10]), 3, 2)[0] == 3
    assert shard_counts(np.array([10, 10, 10]), 3, 2).tolist() == [2, 2, 2]
    dealt = deal_shards(np.array([2, 2, 2]), 3, np.random.default_rng(0))
    assert sorted(dealt.tolist()) == [0, 0, 1, 1, 2, 2]
    assert all(dealt[at] != dealt[at + 1] for at in (0, 2, 4))


def test_quantity_skews_sizes_and_not_classes() -> None:
    labels = np.arange(20_000) % 10
    counts = counts_of(divide("quantity", labels, 20, 0, alpha=0.3, min_samples=100), labels)
    sizes = counts.sum(axis=1)
    assert sizes.min() >= 100
    assert sizes.max() > 5 * np.median(sizes)
    largest = counts[sizes.argmax()]
    assert largest.min() / largest.max() > 0.8


def test_natural_divides_no_value() -> None:
    writers = np.array([7, 3, 3, 9, 7, 7])
    natural: Any = partition.create("natural")
    labels = np.zeros(6, np.int64)
    parts = natural(labels, 3, 0, owners=writers)
    assert [part.tolist() for part in parts] == [[1, 2], [0, 4, 5], [3]]
    parts = natural(labels, 2, 0, owners=writers, groups=np.arange(6))  # owners come first
    assert sorted(len(np.unique(writers[part])) for part in parts) == [1, 2]
    by_domain: Any = partition.create("natural", by="domain")
    assert len(by_domain(labels, 6, 0, owners=writers, groups=np.arange(6))) == 6


def test_long_tail_keeps_the_profile() -> None:
    """500 x 100^(-c / 4), c = 0..4, by pencil."""
    labels = np.arange(2500) % 5
    parts = divide("long_tail", labels, 4, 0, imbalance_factor=100.0, then="iid")
    kept = np.bincount(labels[np.concatenate(parts)])
    assert kept.tolist() == [500, 158, 50, 15, 5]
    assert tail_sizes(np.array([49, 49]), 49.0).tolist() == [49, 1]  # 49 x (1 / 49) < 1 in floats
    assert tail_sizes(np.array([10, 100, 7]), 10.0).tolist() == [10, 31, 7]
    assert tail_sizes(np.array([30]), 10.0).tolist() == [30]


def test_long_tail_is_global_and_then_each_domain_by_itself() -> None:
    labels = np.arange(1000) % 10
    groups = labels // 5
    long_tail: Any = partition.create(
        "long_tail", imbalance_factor=10.0, then="dirichlet", options={"alpha": 1.0}
    )
    parts = long_tail(labels, 6, 0, groups=groups)
    assert [np.unique(groups[part]).tolist() for part in parts] == [[0]] * 3 + [[1]] * 3
    kept = np.bincount(labels[np.concatenate(parts)])
    assert kept.tolist() == tail_sizes(np.full(10, 100), 10.0).tolist()
    natural: Any = partition.create("long_tail", then="natural")
    assert [np.unique(groups[part]) for part in natural(labels, 2, 0, groups=groups)] == [0, 1]


# Bad input


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("quantity", {"alpha": 0}, r"partition\.alpha: expected a finite number > 0, got 0"),
        ("quantity", {"min_samples": -1}, r"partition\.min_samples: expected an integer >= 0"),
        (
            "dirichlet",
            {"alpha": "low"},
            r"partition\.alpha: expected a finite number > 0, got 'low'",
        ),
        ("dirichlet", {"min_samples": 1.5}, r"partition\.min_samples: expected an integer >= 0"),
        ("dirichlet_per_client", {"alpha": float("nan")}, r"expected a finite number > 0, got nan"),
        ("imbalance", {"dominated": 0}, r"partition\.dominated: expected an integer >= 1, got 0"),
        ("imbalance", {"dominant_share": 1.5}, r"dominant_share: expected a share from 0 to 1"),
        ("shards", {"classes_per_client": 0}, r"classes_per_client: expected an integer >= 1"),
        ("natural", {"by": "domian"}, r"got 'domian'; did you mean 'domain'\?"),
        (
            "long_tail",
            {"imbalance_factor": 0.5},
            r"imbalance_factor: expected a finite number >= 1",
        ),
        ("long_tail", {"then": "long_tail"}, r"partition\.then: .* got 'long_tail'"),
        ("long_tail", {"then": "file"}, r"partition\.then: .* got 'file'"),
        ("long_tail", {"then": "irichlet"}, r"unknown partition .* did you mean 'dirichlet'"),
        ("long_tail", {"options": {"alfa": 1}}, r"unknown option 'alfa' for partition 'dirichlet'"),
        (
            "long_tail",
            {"options": {"alpha": -1}},
            r"partition\.alpha: expected a finite number > 0",
        ),
        ("file", {}, r"partition\.file: expected the path of a run directory .* got nothing"),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        partition.create(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "num_clients", "message"),
    [
        ("iid", {}, 61, "61 clients with at least 1 sample.* need 61 samples, .* has 60"),
        ("dirichlet", {"min_samples": 7}, 9, "9 clients with at least 7 .* need 63 samples"),
        ("dirichlet_per_client", {}, 61, "need 61 samples"),
        ("quantity", {"min_samples": 31}, 2, "need 62 samples"),
        ("shards", {"classes_per_client": 4}, 16, "16 clients with at least 4 .* need 64 samples"),
        ("shards", {"classes_per_client": 6}, 4, "24 shards, but 5 classes of 12 to 12 samples"),
        ("shards", {}, 2, "2 clients x 2 classes each are 4 shards, but 5 classes need at least"),
        ("imbalance", {}, 4, "4 clients with 1 dominant.* are 4 in all, but each of 5 classes"),
        ("imbalance", {"dominated": 6}, 9, r"as many dominant classes as there are \(5\), got 6"),
        ("imbalance", {"min_samples": 3}, 20, "at least 3 of 60 samples .* left a client [012];"),
        ("natural", {}, 13, "has 12 for 13 clients; set clients.count=12"),
        ("long_tail", {"imbalance_factor": 100.0}, 40, "need 40 samples"),
        ("iid", {}, 0, "clients.count: expected an integer >= 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(
    name: str, options: dict[str, Any], num_clients: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        divide(name, np.arange(60) % 5, num_clients, 0, **options)


@pytest.mark.parametrize("name", sorted(FEASIBLE))
@pytest.mark.parametrize(
    ("labels", "seed", "message"),
    [
        (np.array([0.5, 1.0]), 0, r"labels: expected a list of class numbers, got shape \(2,\) of"),
        (np.zeros((2, 2), np.int64), 0, r"got shape \(2, 2\)"),
        (np.array([0, -1]), 0, "expected class numbers from 0 to at most 1000000, got -1 to 0"),
        (np.array([0, 10**9]), 0, "got 0 to 1000000000"),
        (np.array([0, 1]), -1, "seed: expected an integer >= 0, got -1"),
        (np.array([], np.int64), 0, "data: expected samples to give to 1 clients, got none"),
    ],
    ids=["float", "matrix", "negative", "huge", "seed", "nothing"],
)
def test_arguments_of_a_wrong_kind(name: str, labels: Labels, seed: int, message: str) -> None:
    with pytest.raises((InputError, ConfigError), match=message):
        partition.create(name)(labels, 1, seed)


def test_natural_says_which_column_is_missing() -> None:
    labels = np.zeros(6, np.int64)
    with pytest.raises(ConfigError, match="expected groups= or owners="):
        partition.create("natural")(labels, 2, 0)
    by_client: Any = partition.create("natural", by="client")
    with pytest.raises(ConfigError, match="expected a client for each sample"):
        by_client(labels, 2, 0, groups=labels)
    with pytest.raises(InputError, match="groups: expected one value for each of 6 labels"):
        by_client(labels, 2, 0, groups=labels[1:])
