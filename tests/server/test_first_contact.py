"""`prompts.whiten=clients`: first contact, running sums, late clients, resume, refusals."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fedprompt
from fedprompt.client.worker import ClientWorker
from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.errors import ConfigError
from fedprompt.core.types import ClientJob, ClientUpdate, ServerState
from fedprompt.data.prefix.spread import discriminants
from fedprompt.models.selection import PromptOptions
from fedprompt.runs.checkpoint import load_latest
from fedprompt.runs.driver import evaluator, settings_of
from fedprompt.runs.events import Event, RoundFinished
from fedprompt.runs.federation import Federation, initial_state, prepare
from fedprompt.runtime.serial import SerialRuntime
from fedprompt.server.evaluate import evaluate, global_subjects
from fedprompt.server.mixing import responsibilities
from fedprompt.server.quarantine import expected_of, fault
from fedprompt.server.round import RoundSettings, make_jobs, run_rounds
from fedprompt.server.spread import (
    added,
    begin,
    current_metric,
    is_unknown,
    keys_of_others,
    with_discriminants,
)
from fedprompt.server.traffic import download_bytes, upload_bytes

Overrides = Callable[..., list[str]]
CLIENTS = ("prompts.whiten=clients", "prompts.query=both", "method=pfpt", "head=frozen")
SMALL = [f"data.{split}=80" for split in ("train", "validation", "test", "public")]


@dataclasses.dataclass(frozen=True)
class Bench:
    """An experiment laid open."""

    config: ExperimentConfig
    federation: Federation
    settings: RoundSettings
    worker: ClientWorker
    state: ServerState


@pytest.fixture(scope="module")
def kept() -> dict[str, Federation]:
    return {}


@pytest.fixture
def bench(tiny: Overrides, kept: dict[str, Federation]) -> Bench:
    config = compose("domains", tiny(*CLIENTS, *SMALL, "clients.count=6", "clients.per_round=3"))
    federation = kept.setdefault("one", prepare(config))
    state = initial_state(config, federation)
    settings = settings_of(config, federation)
    return Bench(config, federation, settings, ClientWorker(federation.setup), state)


def play(bench: Bench, rounds: int) -> list[ServerState]:
    runtime = SerialRuntime(bench.config.runtime)
    runtime.open(bench.federation.setup)
    settings = dataclasses.replace(bench.settings, rounds=rounds)
    states = run_rounds(
        bench.state,
        settings,
        runtime,
        bench.config.build_aggregator(),
        evaluator(runtime, bench.federation, settings),
    )
    return [state for state, _ in states]


def queries_of(bench: Bench, client: int) -> np.ndarray:
    table, part = bench.federation.data.table, bench.federation.data.parts[client]
    return np.concatenate([table.style[part], table.cls[part]], axis=1).astype(np.float64)


def test_the_sums_are_those_of_the_clients_seen_each_counted_once(bench: Bench) -> None:
    """Three of six clients a round; four rounds hold repeated clients and late ones."""
    seen: set[int] = set()
    state = bench.state
    cohorts = []
    for after in play(bench, 4):
        jobs = make_jobs(state, bench.settings)
        cohort = {job.client_id for job in jobs}
        assert {job.client_id for job in jobs if job.tells_spread} == cohort - seen
        seen |= cohort
        cohorts.append(cohort)
        centred = [queries_of(bench, client) for client in sorted(seen)]
        centred = [each - each.mean(axis=0) for each in centred]
        scatter = sum(each.T @ each for each in centred)
        assert after.spread["seen"].tolist() == sorted(seen)
        assert int(after.spread["freedom"]) == sum(len(each) - 1 for each in centred)
        rows, columns = np.triu_indices(len(scatter))
        np.testing.assert_allclose(
            after.spread["scatter"].numpy(), scatter[rows, columns], atol=1e-5
        )
        assert after.spread["met"].tolist() == sorted(seen)
        means = np.stack([queries_of(bench, client).mean(axis=0) for client in sorted(seen)])
        np.testing.assert_allclose(after.spread["keys"].numpy(), means, atol=1e-6)
        assert "known_keys" not in after.aggregator or not len(after.aggregator["known_keys"])
        state = after
    assert any(first & later for first in cohorts for later in cohorts if first is not later)
    assert len(cohorts[0]) < len(seen)


def test_what_is_broadcast_are_discriminants_of_the_keys(bench: Bench) -> None:
    """w q + b differs between two keys as -d^2 / 2 does, by the inverse covariance itself."""
    (state,) = play(bench, 1)
    metric = current_metric(state.spread)
    assert metric is not None
    inverse = metric @ metric.T
    sent = state.broadcast().keys.double()
    query = torch.from_numpy(queries_of(bench, 0)[0])
    apart = state.keys.double() - query
    expected = -0.5 * torch.einsum("nq,qr,nr->n", apart, inverse, apart)
    scores = sent[:, :-1] @ query + sent[:, -1]
    torch.testing.assert_close(scores - scores[0], expected - expected[0], rtol=1e-4, atol=1e-3)


def test_bytes_up_are_counted_once_and_one_more_number_a_key_goes_down(bench: Bench) -> None:
    first, *_ = make_jobs(bench.state, bench.settings)
    again = dataclasses.replace(first, tells_spread=False)
    update, less = (bench.worker.train(bench.settings.recipe, [job])[0] for job in (first, again))
    images, width = update.num_examples, bench.state.keys.shape[1]
    assert images - 1 < width
    numbers = (images - 1) * width - (images - 1) * (images - 2) // 2
    assert upload_bytes(update) - upload_bytes(less) == 4 * numbers
    plain = dataclasses.replace(first.broadcast, keys=bench.state.keys)
    more = download_bytes(first) - download_bytes(dataclasses.replace(first, broadcast=plain))
    assert more == 4 * len(bench.state.keys)


def test_an_update_that_was_refused_leaves_its_client_unknown() -> None:
    spread = begin(torch.eye(2))
    assert is_unknown(spread, 3)
    update = ClientUpdate(3, 1, 4, *[torch.empty(0)] * 4, spread=torch.tensor([1.0, 0.5, 2.0]))
    assert added(spread, []) is spread
    after = added(spread, [update])
    assert not is_unknown(after, 3)
    # R = [[1, .5], [0, 2]], so R^T R = [[1, .5], [.5, 4.25]].
    assert after["scatter"].tolist() == [1.0, 0.5, 4.25]
    assert (int(after["freedom"]), after["seen"].tolist()) == (3, [3])
    assert not is_unknown({}, 3)


def test_keys_of_other_clients_are_those_met_before_less_the_cohort() -> None:
    """Clients 7, 2 and 4 in turn; 4 used no prompt, and so sent no key."""
    spread = begin(torch.eye(2))
    for client, keys in ((7, torch.full((3, 2), 7.0)), (2, torch.full((1, 2), 2.0)), (4, None)):
        empty = torch.empty(0, 2)
        update = ClientUpdate(
            client, 1, 4, empty, empty if keys is None else keys, empty, empty, spread=torch.ones(3)
        )
        spread = added(spread, [update])
    assert spread["seen"].tolist() == [2, 4, 7]
    assert spread["met"].tolist() == [2, 7]
    found = keys_of_others(spread, [2, 4])
    assert found is not None
    assert found.tolist() == [[7.0, 7.0]]
    assert keys_of_others({}, [2]) is None


def test_before_anything_is_known_keys_are_compared_as_they_are() -> None:
    keys = torch.eye(2)
    assert current_metric(begin(keys)) is None
    assert current_metric({}) is None
    # For a key k: w = k - c and b = -w c - |k - c|^2 / 2 with c = (.5, .5): 0 - .25.
    expected = torch.tensor([[0.5, -0.5, -0.25], [-0.5, 0.5, -0.25]])
    assert torch.equal(begin(keys)["discriminants"], expected)
    state = ServerState(1, torch.zeros(2, 1), keys)
    assert with_discriminants(state, None) is state


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda good: good[:-1], r"spread: expected \(\d+,\) torch.float32, got \(\d+,\)"),
        (lambda good: good.double(), "torch.float64"),
        (lambda good: good * torch.nan, "spread: .* values are not finite"),
        (lambda good: good * 100, "spread: expected a scatter of at most"),
        (lambda good: None, r"expected tensors \['spread'\]"),
        (lambda good: good.tolist(), "spread: expected a Tensor or None, got list"),
    ],
)
def test_a_spread_that_cannot_be_is_refused(
    bench: Bench, wrong: Callable[[Tensor], object], reason: str
) -> None:
    job = make_jobs(bench.state, bench.settings)[0]
    recipe = bench.settings.recipe
    update = bench.worker.train(recipe, [job])[0]
    expected = expected_of(job, recipe.build_objective(), recipe, bench.state)
    assert fault(update, expected) is None
    assert update.spread is not None
    found = fault(dataclasses.replace(update, spread=wrong(update.spread)), expected)  # type: ignore[arg-type]
    assert found is not None
    assert re.search(reason, found)


def test_a_spread_that_was_not_asked_for_is_refused(bench: Bench) -> None:
    job = make_jobs(bench.state, bench.settings)[0]
    recipe = bench.settings.recipe
    update = bench.worker.train(recipe, [job])[0]
    quiet = dataclasses.replace(job, tells_spread=False)
    expected = expected_of(quiet, recipe.build_objective(), recipe, bench.state)
    assert "got ['spread']" in str(fault(update, expected))


def test_a_resumed_run_has_the_bits_of_a_whole_one(tiny: Overrides, tmp_path: Path) -> None:
    changes = (*CLIENTS, *SMALL, "clients.count=6", "clients.per_round=3", "rounds=3")
    whole = fedprompt.run("domains", tiny(*changes, f"run_dir={tmp_path / 'whole'}"))
    half = tmp_path / "half"

    def stop(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedprompt.run("domains", tiny(*changes, f"run_dir={half}"), on_event=stop)
    saved = load_latest(half / "state").state
    assert 0 < len(saved.spread["seen"]) < 6  # more clients are met after it
    resumed = fedprompt.resume(half)
    assert resumed.summary["state_sha256"] == whole.summary["state_sha256"]
    state = load_latest(half / "state").state
    assert set(state.spread) == set(begin(state.keys))


def test_one_domain_runs_as_well_and_selection_without_keys_ignores_it(
    tiny: Overrides, tmp_path: Path
) -> None:
    for method in ("pfpt", "pfpt_plus"):
        changes = ("prompts.whiten=clients", f"method={method}", f"run_dir={tmp_path / method}")
        keyed = ("prompts.selection=keyed",) if method == "pfpt" else ()
        result = fedprompt.run("digits", tiny(*changes, *keyed))
        state = load_latest(tmp_path / method / "state").state
        assert bool(state.spread) == (method == "pfpt")  # the other one has no keys
        assert np.isfinite(result.reports[-1]["accuracy"])


def test_a_soft_choice_is_the_mean_of_predictions_weighted_by_bayes(bench: Bench) -> None:
    """Against predictions by each key's own prompts, one image at a time."""
    state = play(bench, 2)[-1]
    options = dataclasses.replace(bench.settings.recipe.prompts, eval_batch=1, choice="soft")
    recipe = dataclasses.replace(bench.settings.recipe, prompts=options)
    runtime = SerialRuntime(bench.config.runtime)
    runtime.open(bench.federation.setup)
    splits = bench.federation.setup.splits
    subjects = global_subjects(state.broadcast(), splits, state.keys)
    test, _ = evaluate(runtime, recipe, splits, subjects)()
    metric = current_metric(state.spread)
    assert metric is not None
    table, placed = splits[0], state.keys.double() @ metric
    model = bench.worker.backbone
    right, loss = 0, 0.0
    frozen = state.fixed.kept.head
    for image in range(len(table)):
        query = torch.from_numpy(np.concatenate([table.style[image], table.cls[image]])).double()
        share = (-0.5 * (placed - query @ metric).square().sum(dim=1)).softmax(dim=0)
        mean = torch.zeros(bench.federation.task.num_classes)
        for key, weight in zip(placed, share, strict=True):
            near = (placed - key).square().sum(dim=1)
            rows = torch.sort(near, stable=True).indices[: options.count].sort().values
            tokens = table.tokens_at(np.array([image]))
            with torch.no_grad():
                feature = model.encode(tokens, state.prompts[rows])
            logits = feature @ frozen["0.weight"].T + frozen["0.bias"]
            known = torch.from_numpy(bench.federation.task.class_mask[table.groups[image]])
            mean += weight * logits[0].masked_fill(~known, -torch.inf).softmax(dim=0)
        right += int(mean.argmax() == table.labels[image])
        loss -= float(mean[table.labels[image]].log())
    # Sets of less than a hundredth are left out.
    assert test.accuracy == pytest.approx(right / len(table), abs=1 / len(table))
    assert test.loss == pytest.approx(loss / len(table), rel=0.02)


def test_of_very_many_sets_that_are_alike_a_soft_choice_leaves_some() -> None:
    """150 keys as far from the query as each other: each has one in 150, which is less than 1 %."""
    found = responsibilities(
        torch.zeros(1, 150), discriminants(torch.eye(150), None), torch.arange(150), 150
    )
    torch.testing.assert_close(found, torch.full((150,), 1 / 150))


def test_a_soft_choice_needs_the_spread() -> None:
    with pytest.raises(
        ConfigError, match=r"prompts\.choice=soft: expected prompts\.whiten=clients"
    ):
        PromptOptions(choice="soft")
    PromptOptions(choice="soft", whiten="clients")
    PromptOptions(choice="soft", selection="all")  # which ignores both


def test_a_job_that_asks_travels(bench: Bench) -> None:
    import pickle

    job = make_jobs(bench.state, bench.settings)[0]
    assert isinstance(job, ClientJob)
    copy = pickle.loads(pickle.dumps(job))
    assert copy.tells_spread
    update = bench.worker.train(bench.settings.recipe, [copy])[0]
    again = pickle.loads(pickle.dumps(update))
    assert torch.equal(again.spread, update.spread)
