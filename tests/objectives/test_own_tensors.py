"""An objective may name its tensors as it likes: they are never trained and are in no model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from fedprompt import aggregation
from fedprompt.client.worker import ClientWorker
from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.registry import Entry
from fedprompt.core.types import ClientUpdate, Parts, ServerState, Tensors
from fedprompt.objectives import Finished, LocalResult, Objective, Teacher, objectives
from fedprompt.runs.checkpoint import load_latest, save_state
from fedprompt.runs.driver import settings_of
from fedprompt.runs.federation import Federation, initial_state, prepare
from fedprompt.runtime import RuntimeOptions
from fedprompt.runtime.serial import SerialRuntime
from fedprompt.server.round import make_jobs, run_rounds

NAMES = ("head.trap", "head.0.weight", "momentum.prompts", "backbone.x", "prompts", "start.a/b")


@dataclasses.dataclass(frozen=True)
class Nothing:
    """No options."""


class Awkward(Objective):
    """Counts rounds at the server and participations at the client, under names of other parts."""

    def begin(self, trainable: Parts) -> Tensors:
        return {name: torch.zeros(1) for name in NAMES}

    def keeps(self, start: Teacher) -> Tensors:
        return start.parts.objective

    def finish(self, result: LocalResult) -> Finished:
        sent = {name: value + 1 for name, value in result.received.objective.items()}
        kept = {name: result.own.get(name, torch.zeros(1)) + 1 for name in sent}
        return Finished(sent, kept)

    def combine(
        self,
        before: Parts,
        mean: Parts,
        updates: Sequence[ClientUpdate],
        num_clients: int,
        memory: Tensors,
    ) -> tuple[Parts, Tensors]:
        total = {name: memory.get(name, torch.zeros(1)) + len(updates) for name in NAMES}
        return mean, total


@pytest.fixture
def configs(
    tiny: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ExperimentConfig, ExperimentConfig, Federation]]:
    """An experiment with the objective, and the same one without."""
    monkeypatch.setitem(objectives._entries, "awkward", Entry("awkward", Awkward, Nothing))
    method = ("method=fedavg_pt", "aggregator=server_opt", "clients.per_round=6", "runtime.pack=2")
    plain = compose("digits", tiny(*method))
    choice = dataclasses.replace(plain.objective, name="awkward", options=Nothing())
    yield dataclasses.replace(plain, objective=choice), plain, prepare(plain)


def play(config: ExperimentConfig, federation: Federation, rounds: int) -> ServerState:
    """Rounds in packs of two, without evaluation."""
    runtime = SerialRuntime(RuntimeOptions("serial", pack=2, device="cpu"))
    runtime.open(federation.setup)
    settings = dataclasses.replace(settings_of(config, federation), eval_every=99, rounds=99)
    state = initial_state(config, federation)
    played = run_rounds(state, settings, runtime, config.build_aggregator(), no_evaluation)
    *_, (last, _) = itertools.islice(played, rounds)
    return last


def no_evaluation(state: ServerState) -> NoReturn:
    raise AssertionError("no round of this file is evaluated")


def test_its_tensors_go_through_everything_untouched(
    configs: tuple[ExperimentConfig, ExperimentConfig, Federation], tmp_path: Path
) -> None:
    config, plain, federation = configs
    start = initial_state(config, federation)
    settings = settings_of(config, federation)
    job = make_jobs(start, settings)[0]
    module = ClientWorker(federation.setup)._module(settings.recipe, job)
    trained = {"prompts", "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
    assert set(module.trainable().tensors()) == trained
    groups = module.configure_optimizers().param_groups
    assert sum(len(group["params"]) for group in groups) == len(trained)
    assert set(module.objective.begin(Parts())) == set(NAMES)

    state = play(config, federation, 2)
    assert {name: value.item() for name, value in state.shared.objective.items()} == dict.fromkeys(
        NAMES, 2.0
    )
    assert {name: value.item() for name, value in state.objective.items()} == dict.fromkeys(
        NAMES, 12.0
    )
    assert len(state.clients) == 6
    for own in state.clients.values():
        assert own.kept.trained() == Parts()
        assert {n: v.item() for n, v in own.kept.objective.items()} == dict.fromkeys(NAMES, 2.0)

    # What is trained is what it is without the objective, bit by bit.
    without = play(plain, federation, 2)
    mine, theirs = state.received().trained().tensors(), without.received().trained().tensors()
    assert mine.keys() == theirs.keys() == trained
    assert all(torch.equal(mine[path], value) for path, value in theirs.items())
    assert state.aggregator.keys() == without.aggregator.keys()

    save_state(tmp_path, state)
    loaded = load_latest(tmp_path).state
    assert loaded.sha256() == state.sha256()
    assert set(loaded.shared.objective) == set(NAMES)


def test_a_server_optimiser_takes_its_names_for_no_one_else_s(
    configs: tuple[ExperimentConfig, ExperimentConfig, Federation],
) -> None:
    """`head.0.weight` is the objective's name as well as the head's path."""
    from fedprompt.server.merge import step_shared

    config, _, federation = configs
    state = initial_state(config, federation)
    own = {name: torch.full((1,), 7.0) for name in NAMES}
    shared = dataclasses.replace(state.shared.mapped(lambda value: value + 1), objective=own)
    aggregator = aggregation.create("server_opt", lr=0.5)
    stepped, _ = step_shared(aggregator, Awkward(None), shared, state)

    assert all(value.item() == 7.0 for value in stepped.objective.values())
    for path, value in state.shared.trained().tensors().items():
        torch.testing.assert_close(stepped.tensors()[path], value + 0.5)
