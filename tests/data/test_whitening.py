"""Queries whitened by public images: one image says its domain."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

import fedprompt
from fedprompt.client.worker import ClientBatches
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.core.seeding import torch_generator
from fedprompt.data.prefix.tables import FeatureTable
from fedprompt.data.prefix.whitening import Whitening, add_whitened, whitenings
from fedprompt.models.selection import PromptOptions
from fedprompt.runs.driver import settings_of
from fedprompt.runs.federation import initial_state, prepare
from fedprompt.server.evaluate import select_for_split

SMALL = [f"data.{split}=80" for split in ("train", "validation", "test", "public")]
WIDTH = 6
KINDS = {"whitened style": "style"}


def table_of(seed: int, count: int = 200, spread: float = 1.0) -> FeatureTable:
    """Two domains that differ by 1 in the last coordinate, where one domain's images differ by 0.2,
    while they differ by up to 5 in the others.
    """
    draws = np.random.default_rng(seed)
    groups = np.arange(count) % 2
    style = draws.normal(size=(count, WIDTH)) * np.linspace(5, 1, WIDTH) * spread
    style[:, -1] = 0.2 * spread * style[:, -1] + groups
    return FeatureTable(
        tokens=np.zeros((count, 2, WIDTH), np.float32),
        style=style.astype(np.float32),
        cls=np.zeros((count, WIDTH), np.float32),
        features=np.zeros((count, WIDTH), np.float32),
        labels=np.zeros(count, np.int64),
        groups=groups,
    )


def recognised(queries: np.ndarray, table: FeatureTable) -> float:
    """Share of images that are nearest to the mean of their own domain."""
    means = np.stack([queries[table.groups == group].mean(axis=0) for group in range(2)])
    distances = ((queries[:, None] - means) ** 2).sum(axis=2)
    return float((distances.argmin(axis=1) == table.groups).mean())


def test_one_image_says_its_domain_by_whitened_queries() -> None:
    public, held = table_of(0), table_of(1)
    (found,) = add_whitened([held], whitenings(public, KINDS))
    assert recognised(held.queries("style"), held) < 0.75
    assert recognised(found.queries("whitened style"), held) > 0.95
    np.testing.assert_allclose(
        np.linalg.norm(found.queries("whitened style"), axis=1), 1, rtol=1e-5
    )
    np.testing.assert_array_equal(found.queries("style"), held.style)


def test_distances_are_those_of_mahalanobis_with_a_shrunk_covariance_within_domains() -> None:
    """Chen et al. 2010, Eq. 23, without its terms in 2 / WIDTH, as scikit-learn has it."""
    public = table_of(0, count=30)
    style = public.style.astype(float)
    within = [style[public.groups == g] - style[public.groups == g].mean(axis=0) for g in range(2)]
    sample = np.concatenate(within).T @ np.concatenate(within) / 30
    trace, square = np.trace(sample), np.trace(sample @ sample)
    share = min(1, (square + trace**2) / ((30 + 1) * (square - trace**2 / WIDTH)))
    shrunk = (1 - share) * sample + share * trace / WIDTH * np.eye(WIDTH)
    np.testing.assert_allclose(
        pdist(style @ Whitening.of(public, "style").matrix),
        pdist(style, "mahalanobis", VI=np.linalg.inv(shrunk)),
        rtol=1e-8,
    )


def test_a_whitened_query_is_centred_turned_and_scaled() -> None:
    public, held = table_of(0), table_of(1)
    found = Whitening.of(public, "style")
    expected = found.matrix.T @ (held.style[3] - public.style.astype(float).mean(axis=0))
    np.testing.assert_allclose(
        found(held)[3], expected / np.linalg.norm(expected), rtol=1e-5, atol=1e-7
    )


def test_few_public_images_are_enough_for_a_map() -> None:
    """Fewer than a query has coordinates: shrinkage keeps the covariance regular."""
    found = Whitening.of(table_of(0, count=4), "style")(table_of(1))
    assert np.isfinite(found).all()


def test_domains_and_labels_of_clients_play_no_part() -> None:
    held = table_of(1)
    other = dataclasses.replace(held, groups=np.zeros_like(held.groups), labels=held.labels + 1)
    found = add_whitened([held, other], whitenings(table_of(0), KINDS))
    np.testing.assert_array_equal(*(each.queries("whitened style") for each in found))


def test_public_images_that_are_all_alike_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"prompts\.whiten: expected public images that differ"):
        Whitening.of(table_of(0), "cls")


def test_whitened_queries_travel_with_a_table() -> None:
    (table,) = add_whitened([table_of(1)], whitenings(table_of(0), KINDS))
    for copy in (pickle.loads(pickle.dumps(table)), table.loaded()):
        np.testing.assert_array_equal(
            copy.queries("whitened style"), table.queries("whitened style")
        )


@pytest.fixture
def changes(tiny: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def of(*more: str) -> list[str]:
        return tiny("head=frozen", "method=pfpt", "prompts.whiten=true", *SMALL, *more)

    return of


def test_training_and_evaluation_select_by_whitened_queries(
    changes: Callable[..., list[str]],
) -> None:
    config = compose("domains", changes("prompts.choose_by=batch", "prompts.pool=20"))
    federation = prepare(config)
    recipe = settings_of(config, federation).recipe
    table, test = federation.data.table, federation.setup.splits[0]
    batches = ClientBatches(federation.data, 0, 1000, recipe.prompts, torch_generator(0, "any"))
    ((_, seen, _, _),) = batches
    own = torch.from_numpy(table.queries("whitened style")[federation.data.parts[0]])
    torch.testing.assert_close(seen.sum(dim=0), own.sum(dim=0))
    # Each image alone: it selects the prompts whose keys are nearest to its own whitened query.
    prompts = dataclasses.replace(recipe.prompts, eval_batch=1)
    alone = dataclasses.replace(recipe, prompts=prompts)
    state = initial_state(config, federation)
    order, rows = select_for_split(state, alone, test)
    image = torch.from_numpy(test.queries("whitened style")[order[0]])
    nearest = (state.keys - image).norm(dim=1).argsort()[: prompts.count]
    assert rows[0].tolist() == sorted(nearest.tolist())


def test_a_table_of_the_cache_travels_as_its_path_and_its_whitened_queries(
    changes: Callable[..., list[str]],
) -> None:
    table = prepare(compose("domains", changes())).data.table
    assert table.entry is not None
    copy = pickle.loads(pickle.dumps(table))
    assert isinstance(copy.tokens, np.memmap)
    np.testing.assert_array_equal(copy.queries("whitened style"), table.queries("whitened style"))


def test_whole_runs_select_by_whitened_queries_where_there_are_keys(
    changes: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Under Ray: `test_ray_gives_the_bits_of_serial`."""
    compared = ("fedavg_pt", "fedavg_pt_plus")

    def run(folder: str, *more: str) -> dict[str, str]:
        path = tmp_path / folder
        own = fedprompt.run(
            "domains", changes(f"compare=[{','.join(compared)}]", f"run_dir={path}", *more)
        )
        found = {"pfpt": own.summary["state_sha256"]}
        for method in compared:
            (summary,) = path.rglob(f"{method}/summary.json")
            found[method] = json.loads(summary.read_text())["state_sha256"]
        return found

    whitened, plain = run("whitened"), run("plain", "prompts.whiten=false")
    same = {method for method in whitened if whitened[method] == plain[method]}
    assert same == {"fedavg_pt"}


def test_without_public_images_one_line_says_what_to_do(tiny: Callable[..., list[str]]) -> None:
    config = compose("digits", tiny("method=fedavg_pt_plus", "prompts.whiten=true"))
    expected = (
        r"prompts\.whiten=public: .* got data=digits, which has none; set prompts\.whiten=clients"
    )
    with pytest.raises(ConfigError, match=expected):
        prepare(config)


def test_selection_without_keys_ignores_it(tiny: Callable[..., list[str]]) -> None:
    federation = prepare(compose("digits", tiny("method=pfpt_plus", "prompts.whiten=true")))
    assert not federation.data.table.derived


@pytest.mark.parametrize("value", [1, "client", None])
def test_it_is_a_flag_or_a_name(value: object) -> None:
    expected = r"prompts\.whiten: expected true or false, or one of auto, public, clients"
    with pytest.raises(ConfigError, match=expected):
        PromptOptions(whiten=value)  # type: ignore[arg-type]


def test_whitened_queries_travel_to_workers(tiny: Callable[..., list[str]]) -> None:
    """As Ray sends them: what actors select by is what the serial runtime selects by."""
    few = "data={name: domains, train: 80, validation: 40, test: 40, public: 80}"
    config = compose("digits", tiny(few, "prompts.whiten=true", "prompts.pool=3"))
    setup = prepare(config).setup
    sent = pickle.loads(pickle.dumps(setup))
    kind = config.prompts.query_kind
    tables = ((setup.data.table, sent.data.table), *zip(setup.splits, sent.splits, strict=True))
    for ours, theirs in tables:
        assert np.array_equal(ours.queries(kind), theirs.queries(kind))
        assert not np.array_equal(ours.queries(kind), ours.queries(config.prompts.query))
