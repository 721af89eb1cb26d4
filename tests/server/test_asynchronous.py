"""Asynchronous schedules by pencil, against synchronous rounds, and over a resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_virtual import Direct, unmeasured

import fedprompt
from fedprompt.client.worker import ClientWorker
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.core.types import ClientState, ClientUpdate, Parts, RoundReport, ServerState
from fedprompt.runs.driver import notes_on, settings_of
from fedprompt.runs.events import RoundFinished
from fedprompt.runs.federation import Federation, initial_state, prepare
from fedprompt.server.flight import Flight, arrived, in_flight, remembered
from fedprompt.server.round import run_rounds
from fedprompt.server.schedules import FedAsync, FedBuff, Staleness
from fedprompt.server.virtual import SystemOptions

Overrides = Callable[..., list[str]]

QUICK = ("clients.batch_size=64", "prompts.depth=4")
SLOW = ("system.speed=0.5", "system.bandwidth=uniform:1:20")
BUFFERED = (*SLOW, "system.schedule=fedbuff")
MIXED = (*SLOW, "system.schedule=fedasync")
FEDERATIONS: dict[int, Federation] = {}


def play(*overrides: str) -> tuple[list[ServerState], list[RoundReport], Direct]:
    config = compose("digits", list(overrides))
    key = config.clients.count
    if key not in FEDERATIONS:
        FEDERATIONS[key] = prepare(config)
    federation = FEDERATIONS[key]
    runtime = Direct(ClientWorker(federation.setup))
    rounds = run_rounds(
        initial_state(config, federation),
        settings_of(config, federation),
        runtime,
        config.build_aggregator(),
        unmeasured,
    )
    states, reports = zip(*rounds, strict=True)
    return list(states), list(reports), runtime


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("constant", [1, 1, 1, 1]),
        ("polynomial:0.5", [1, 2**-0.5, 3**-0.5, 0.5]),
        ("polynomial:1", [1, 1 / 2, 1 / 3, 1 / 4]),
        ("hinge:2:1", [1, 1, 1 / 3, 1 / 5]),
    ],
)
def test_what_stale_updates_count(text: str, weights: list[float]) -> None:
    made = Staleness.of("system.staleness", text)
    assert [made.weight(tau) for tau in range(4)] == pytest.approx(weights)


def flying(version: int) -> Flight:
    """Client 4 used row 1 alone, and made 5 of its prompt and 7 of its head."""
    update = ClientUpdate(
        4,
        version + 1,
        num_examples=30,
        prompts=torch.tensor([[5.0]]),
        keys=torch.tensor([[0.5]]),
        origins=torch.tensor([1]),
        use_counts=torch.tensor([2]),
        shared=Parts(head={"0.bias": torch.tensor([7.0])}),
        state=ClientState(Parts(prompts=torch.tensor([[9.0]]))),
        metrics={"loss": 0.25},
        spread=torch.ones(3),
    )
    return Flight(12.5, version, update)


def model(round_index: int, prompts: list[float], head: float) -> ServerState:
    rows = torch.tensor(prompts)[:, None]
    shared = Parts(head={"0.bias": torch.tensor([head])})
    return ServerState(round_index, rows, torch.zeros(len(rows), 1), shared)


def test_a_stale_update_is_moved_to_the_model_of_now() -> None:
    """The client began with prompts (1, 2) and head 3; the server now has (10, 20) and 30.

    FedBuff at 0.5: 20 + 0.5 (5 - 2) = 21.5 and 30 + 0.5 (7 - 3) = 32. FedAsync at 0.5: half way
    from 20 to 5 and from 30 to 7.
    """
    before, now = model(2, [1.0, 2.0], 3.0), model(5, [10.0, 20.0], 30.0)
    now = dataclasses.replace(now, system=remembered({4: flying(2)}, {}, before))
    flight = in_flight(now.system)[4]
    buffered = arrived(flight, FedBuff(), 1.0, 0.5, now)
    assert (buffered.prompts.item(), buffered.shared.head["0.bias"].item()) == (21.5, 32.0)
    assert buffered.keys.item() == 0.25  # both models have 0 there
    mixed = arrived(flight, FedAsync(), 1.0, 0.5, now)
    assert (mixed.prompts.item(), mixed.shared.head["0.bias"].item()) == (12.5, 18.5)
    assert mixed.round_index == buffered.round_index == 6
    assert mixed.num_examples == 30


def test_what_is_in_flight_comes_back_from_a_checkpoint_whole() -> None:
    before = model(2, [1.0, 2.0], 3.0)
    kept = remembered({4: flying(2)}, {}, before)
    flat = dataclasses.replace(before, system=kept).tensors()
    (client, back), *others = in_flight(ServerState.from_tensors(3, flat).system).items()
    there = flying(2)
    assert not others and client == 4
    assert (back.arrival, back.version, back.update.metrics) == (12.5, 2, {"loss": 0.25})
    assert back.update.round_index == 3
    first, second = there.update.tensors(), back.update.tensors()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[path], second[path]) for path in first)
    # The model that it began with is kept as long as it flies.
    later = model(3, [0.0, 0.0], 0.0)
    assert remembered({}, kept, later) == {}
    again = remembered({4: back}, kept, later)
    assert again["base/2/prompts"].tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize(
    "method",
    [
        ("method=fedavg_pt",),
        ("method=head_only", "prompts.count=0"),
        ("method=fedavg_pt_plus", "prompts.pool=5"),
    ],
    ids=lambda method: method[0],
)
def test_a_buffer_of_all_that_are_at_work_is_a_synchronous_round(
    method: tuple[str, ...], tiny: Overrides
) -> None:
    """To the last bit, the clock included: nobody is stale, and nothing stays in flight."""
    more = tiny(*method, "clients.per_round=3", *QUICK)
    plain, reports, _ = play(*more, *SLOW)
    buffered, others, _ = play(*more, *BUFFERED, "system.buffer=3")
    assert [s.sha256() for s in buffered] == [s.sha256() for s in plain]
    assert [r.virtual_hours for r in others] == [r.virtual_hours for r in reports]
    assert [r.bytes_up for r in others] == [r.bytes_up for r in reports]
    assert {each["staleness"] for r in others for each in r.clients} == {0}


def test_one_client_in_flight_is_training_one_after_the_other(tiny: Overrides) -> None:
    """FedAsync with alpha = 1 and nobody else at work: to the last bit."""
    more = tiny("method=fedavg_pt", "clients.per_round=1", *QUICK)
    plain, _, _ = play(*more, *SLOW)
    mixed, reports, _ = play(*more, *MIXED, "system.step=1", "system.staleness=constant")
    assert [s.sha256() for s in mixed] == [s.sha256() for s in plain]
    assert [len(r.clients) for r in reports] == [1, 1]


def test_who_arrives_when_and_how_stale(tiny: Overrides, tmp_path: Path) -> None:
    """All three clients are at work, and only the network takes time: t, 2.5 t and 4.2 t.

    Client 0 comes at t and 2t, client 1 at 2.5t (two merges old), client 0 at 3t (sent off at 2t,
    one merge old) and 4t, client 2 at 4.2t (five merges old). A place is filled at once, by the
    only client that is idle.
    """
    speeds = tmp_path / "mbits"
    speeds.write_text("21 8.4 5")
    more = ("method=fedavg_pt", "clients.count=3", "clients.per_round=3", "rounds=6")
    states, reports, runtime = play(
        *tiny(*more, *QUICK, f"system.bandwidth={speeds}", "system.schedule=fedasync")
    )
    seen = [(each["client"], each["staleness"]) for r in reports for each in r.clients]
    t = reports[0].virtual_seconds
    times = [r.virtual_hours * 3600 / t for r in reports]
    assert seen == [(0, 0), (0, 0), (1, 2), (0, 1), (0, 0), (2, 5)]
    assert times == pytest.approx([1, 2, 2.5, 3, 4, 4.2])
    assert runtime.trained == [[0, 1, 2], [0], [0], [1], [0], [0]]
    assert set(in_flight(states[-1].system)) == {0, 1}
    each_down = reports[0].bytes_down // 3
    assert [r.bytes_down for r in reports] == [each_down * n for n in (3, 1, 1, 1, 1, 1)]
    assert [note for r in reports for note in notes_on(r, 3)] == []


class Stop(BaseException):
    """Ends a run from outside."""


def test_a_resumed_run_has_the_same_bits(tiny: Overrides, tmp_path: Path) -> None:
    more = ("method=fedavg_pt", "rounds=4", "eval_every=4", *QUICK, *BUFFERED, "system.buffer=2")
    straight = fedprompt.run("digits", tiny(*more))
    stale = [each["staleness"] for r in straight.reports for each in r["clients"]]
    assert max(stale) > 0

    def stop(event: object) -> None:
        if isinstance(event, RoundFinished) and event.report.round == 2:
            raise Stop

    folder = tmp_path / "stopped"
    with pytest.raises(Stop):
        fedprompt.run("digits", tiny(*more, f"run_dir={folder}"), on_event=stop)
    resumed = fedprompt.resume(folder)
    assert resumed.summary["state_sha256"] == straight.summary["state_sha256"]
    assert [[each["staleness"] for each in r["clients"]] for r in resumed.reports] == [
        [each["staleness"] for each in r["clients"]] for r in straight.reports
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "later"}, r"^system.schedule: expected one of rounds, fedasync, fedbuff"),
        ({"schedule": "fedasync"}, r"expected system.speed or system.bandwidth, without which all"),
        ({"speed": 1.0, "schedule": "fedbuff"}, r"expected system.buffer, .*got null; set"),
        ({"speed": 1.0, "buffer": 3}, r"^system.buffer: expected nothing with system.schedule=ro"),
        ({"speed": 1.0, "schedule": "fedasync", "buffer": 3}, r"merges each update alone, got 3"),
        ({"speed": 1.0, "schedule": "fedasync", "deadline": 3.0}, r"^system.deadline: expected no"),
        ({"speed": 1.0, "schedule": "fedasync", "dropout": 0.1}, r"^system.dropout: expected noth"),
        ({"speed": 1.0, "schedule": "fedasync", "over_select": 2.0}, r"^system.over_select: expec"),
        ({"speed": 1.0, "schedule": "fedasync", "step": 1.5}, r"^system.step: expected at most 1"),
        ({"speed": 1.0, "schedule": "fedasync", "step": 0.0}, r"^system.step: expected a finite"),
        ({"staleness": "hinge:1"}, r"^system.staleness: expected constant, polynomial:A or hinge"),
        ({"staleness": "hinge:1:-2"}, r"^system.staleness: B of hinge: expected a finite number"),
        ({"staleness": "linear"}, r"^system.staleness: expected constant.*got 'linear'$"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SystemOptions(**options)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("method=pfpt",), r"needs prompts of which row i is the same .*use aggregator=mean"),
        (("method=scaffold_pt",), r"objective without a server half, got objective=scaffold"),
        (("method=pfedpg",), r"expected prompts that the server holds, got generator="),
        (("system.buffer=4",), r"^system.buffer: expected at most clients.per_round \(3\)"),
    ],
)
def test_methods_that_cannot_be_stale_are_refused(
    more: tuple[str, ...], message: str, tiny: Overrides
) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("digits", tiny("method=fedavg_pt", *BUFFERED, "system.buffer=2", *more))
