"""Virtual time by pencil: who reports when, who is merged, and what becomes of the others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedprompt
from fedprompt.cli.bench import step_flops
from fedprompt.client.cost import prefix_operations
from fedprompt.client.recipe import LocalRecipe
from fedprompt.client.worker import ClientWorker
from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.errors import CheckpointError, ConfigError, RoundError
from fedprompt.core.types import Broadcast, ClientJob, ClientUpdate, RoundReport, ServerState
from fedprompt.runs.devices import devices_of
from fedprompt.runs.driver import notes_on, settings_of
from fedprompt.runs.events import RoundFinished
from fedprompt.runs.federation import Federation, initial_state, prepare
from fedprompt.server.figures import Evaluation
from fedprompt.server.round import make_jobs, run_rounds
from fedprompt.server.virtual import Missed, SystemOptions, VirtualSystem, Work, draw

Overrides = Callable[..., list[str]]

MBIT = 8.0
"""8 Mbit/s are 10^6 bytes a second."""


def system(dropped: Sequence[int] = (), **options: Any) -> VirtualSystem:
    """Four clients with 10 to 40 images, at 10^9 operations and 10^6 bytes a second.

    A step takes 0.1 s for an image, two epochs of them 0.2 s, and the prefix 0.05 s. Without the
    prefix client k thus computes for 2, 4, 6 and 8 s.
    """

    class Chosen(VirtualSystem):
        def drops_out(self, round_index: int, client: int) -> bool:
            return client in dropped

    return Chosen(
        SystemOptions(speed=1.0, bandwidth=MBIT, **options),
        seed=0,
        work=Work((10, 20, 30, 40), epochs=2, step=lambda job: 1e8, prefix=5e7),
        speed=(1.0,) * 4,
        bandwidth=(MBIT,) * 4,
    )


def begun(made: VirtualSystem, met: Sequence[int] = (0, 1, 2, 3)) -> dict[int, float]:
    """When the four begin to upload, having received 10^6 bytes each."""
    jobs = [ClientJob(k, 1, 0, Broadcast(torch.zeros(1, 2), torch.zeros(1, 0))) for k in range(4)]
    return made.before_upload(jobs, dict.fromkeys(range(4), 10**6), met)


def test_a_client_downloads_computes_and_uploads() -> None:
    """1 s to receive; 2, 4, 6, 8 s to compute; the prefix of 10 images takes 0.5 s once."""
    made = system()
    assert begun(made) == pytest.approx({0: 3, 1: 5, 2: 7, 3: 9})
    assert begun(made, met=[1, 3]) == pytest.approx({0: 3.5, 1: 5, 2: 8.5, 3: 9})
    timing = made.settle(1, begun(made), dict.fromkeys(range(4), 500_000), wanted=4)
    assert timing.seconds == pytest.approx(9.5)  # half a second for the last one's upload
    assert timing.merged == {0, 1, 2, 3}
    assert timing.missed == ()


def test_a_deadline_leaves_the_late_behind() -> None:
    made = system(deadline=7.25)
    start = begun(made)
    assert made.worth_training(1, start) == [0, 1, 2]  # client 3 begins to upload at 9 s
    timing = made.settle(1, start, dict.fromkeys([0, 1, 2], 500_000), wanted=4)
    assert timing.seconds == 7.25
    assert timing.merged == {0, 1}
    assert [(each.client, each.why) for each in timing.missed] == [(2, "late"), (3, "late")]
    assert [each.seconds for each in timing.missed] == pytest.approx([7.5, 9])


def test_a_round_that_needs_no_deadline_ends_before_it() -> None:
    made = system(deadline=100.0)
    timing = made.settle(1, begun(made), dict.fromkeys(range(4), 0), wanted=4)
    assert timing.seconds == pytest.approx(9)


def test_the_first_to_report_are_merged() -> None:
    """Wanted are two of four; the round ends with the second."""
    made = system(over_select=2.0)
    assert made.cohort_size(2, population=10) == 4
    assert made.cohort_size(2, population=3) == 3
    timing = made.settle(1, begun(made), dict.fromkeys(range(4), 10**6), wanted=2)
    assert timing.seconds == pytest.approx(6)
    assert timing.merged == {0, 1}
    assert timing.missed == (Missed(2, "surplus", 8.0), Missed(3, "surplus", 10.0))


def test_eleven_tenths_of_ten_are_eleven() -> None:
    """1.1 * 10 is 11.000000000000002 in floating point."""
    assert system(over_select=1.1).cohort_size(10, population=100) == 11
    assert system(over_select=1.11).cohort_size(10, population=100) == 12


def test_one_that_dropped_out_is_waited_for_until_it_would_have_uploaded() -> None:
    made = system(dropped=[3])
    start = begun(made)
    assert made.worth_training(1, start) == [0, 1, 2]
    timing = made.settle(1, start, dict.fromkeys([0, 1, 2], 500_000), wanted=4)
    assert timing.seconds == pytest.approx(9)
    assert timing.missed == (Missed(3, "dropped", pytest.approx(9)),)


def test_nobody_in_time_is_one_line() -> None:
    made = system(deadline=2.0)
    timing = made.settle(5, begun(made), {}, wanted=4)
    assert timing.merged == frozenset()
    with pytest.raises(
        RoundError,
        match=r"^round 5: expected at least one of 4 clients to report within system.deadline=2 "
        r"virtual seconds, got none \(the fastest needs 3 or more\); raise the deadline, or set "
        r"system.empty=skip$",
    ):
        made.check_not_empty(timing, 5)
    system(deadline=2.0, empty="skip").check_not_empty(timing, 5)
    gone = system(dropped=range(4))
    with pytest.raises(RoundError, match=r"all dropped out.*lower system.dropout"):
        gone.check_not_empty(gone.settle(1, begun(gone), {}, 4), 1)


def test_devices_depend_on_seed_and_client_alone() -> None:
    few, many = (draw("system.speed", "lognormal:10:0.5", count, seed=3) for count in (5, 4000))
    assert few is not None and many is not None
    assert many[:5] == few
    assert draw("system.speed", "lognormal:10:0.5", 5, seed=4) != few
    assert draw("system.bandwidth", "lognormal:10:0.5", 5, seed=3) != few
    # log(speed / 10) is normal with a deviation of 0.5: means of 4000 are off by 0.008 at one
    # standard error, the deviation by 0.0056.
    logs = np.log(np.array(many) / 10)
    assert abs(logs.mean()) < 0.03
    assert abs(logs.std() - 0.5) < 0.025
    uniform = np.array(draw("system.speed", "uniform:2:4", 4000, seed=0))
    assert uniform.min() >= 2 and uniform.max() <= 4
    assert abs(uniform.mean() - 3) < 0.04  # standard error 0.0091


def test_as_many_drop_out_as_is_said() -> None:
    made = VirtualSystem(SystemOptions(dropout=0.3), 1, system().work, None, None)
    gone = [made.drops_out(1, client) for client in range(4000)]
    assert abs(np.mean(gone) - 0.3) < 0.03  # standard error 0.0072
    assert gone != [made.drops_out(2, client) for client in range(4000)]
    assert gone[:9] == [made.drops_out(1, client) for client in range(9)]


@pytest.mark.parametrize(
    ("text", "numbers"), [("1.5\n2\n40\n", (1.5, 2, 40)), ("[3, 0.5, 1]", (3, 0.5, 1))]
)
def test_a_file_has_a_number_for_each_client(
    text: str, numbers: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "speeds.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    options = SystemOptions(speed="speeds.txt")
    assert options.speed == str(tmp_path / "speeds.txt")  # holds from any folder
    assert draw("system.speed", options.speed, 3, seed=0) == numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2", r"speeds: expected a number for each of 3 clients, got 2"),
        ("1 -2 3", r"speeds: expected a finite number > 0 for client 1, got -2"),
        ("[1, 2, null]", r"speeds: expected a finite number > 0 for client 2, got None"),
        ("fast slow", r"speeds: expected a JSON list of numbers or one number on each line"),
        ('{"a": 1}', r"speeds: expected a JSON list of numbers or one number on each line"),
    ],
)
def test_a_file_of_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "speeds").write_text(text)
    with pytest.raises(ConfigError, match=message):
        draw("system.speed", str(tmp_path / "speeds"), 3, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 0.0}, r"^system.speed: expected a finite number > 0, got 0.0$"),
        ({"bandwidth": -1.0}, r"^system.bandwidth: expected a finite number > 0, got -1.0$"),
        ({"speed": "uniform:5:2"}, r"high of uniform:LOW:HIGH: expected a finite number >= 5"),
        ({"speed": "uniform:0:2"}, r"low of uniform:LOW:HIGH: expected a finite number > 0"),
        ({"speed": "lognormal:5"}, r"expected lognormal:MEDIAN:SIGMA with two numbers, got 'logn"),
        ({"speed": "lognormal:5:-1"}, r"sigma of lognormal:MEDIAN:SIGMA: expected a finite number"),
        ({"speed": "fast"}, r"^system.speed: expected a number > 0, lognormal:.*got 'fast'$"),
        ({"dropout": 1.0}, r"^system.dropout: expected a finite number >= 0 and < 1, got 1.0$"),
        ({"speed": 1.0, "deadline": 0.0}, r"^system.deadline: expected a finite number > 0"),
        ({"deadline": 5.0}, r"^system.deadline: expected system.speed or system.bandwidth as well"),
        ({"speed": 1.0, "over_select": 0.5}, r"^system.over_select: expected a finite number >= 1"),
        ({"dropout": 0.1, "over_select": 2.0}, r"^system.over_select: expected system.speed or"),
        ({"empty": "repeat"}, r"^system.empty: expected one of stop, skip, got 'repeat'$"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SystemOptions(**options)


def test_operations_are_those_of_the_matrix_products(tiny: Overrides) -> None:
    """By torch's counter, and by `bench`'s formula for the blocks; beside them only the head and
    its gradients, 2 or 4 operations for each of its weights.
    """
    config = compose("digits", tiny("system.speed=1", "head=linear"))
    federation = federation_of(config)
    made = devices_of(config, federation)
    assert made is not None
    state, job = initial_state(config, federation), job_of(config, federation)
    backbone = federation.backbone
    count = len(state.prompts)
    length = federation.data.table.tokens.shape[1] + count
    head = sum(each.numel() for each in state.shared.head.values() if each.ndim == 2)
    blocks = step_flops(backbone, 1, length)
    assert made.work.step(job) == pytest.approx(blocks + 3 * 2 * head, rel=0.02)
    other = devices_of(config.with_method("head_only"), federation)
    assert other is not None
    # Forward and to the weights, not to the features.
    assert other.work.step(job_of(config.with_method("head_only"), federation)) == 2 * 2 * head
    # Half a step has no backward pass; the patches are embedded in addition.
    patches = next(each for each in backbone.modules() if isinstance(each, nn.Conv2d))
    embedding = 2 * patches.weight.numel() * (federation.data.table.tokens.shape[1] - 1)
    forward = step_flops(backbone, 1, federation.data.table.tokens.shape[1])
    assert prefix_operations(backbone) < forward + embedding
    assert prefix_operations(backbone) > forward / 2.2 + embedding


# ---------------------------------------------------------------- rounds

FEDERATIONS: dict[object, Federation] = {}


def federation_of(config: ExperimentConfig) -> Federation:
    """Prepared once for all tests: data and partition do not depend on the method."""
    key = (config.data, config.clients.count, config.model, config.cut)
    if key not in FEDERATIONS:
        FEDERATIONS[key] = prepare(config)
    return FEDERATIONS[key]


def job_of(config: ExperimentConfig, federation: Federation) -> ClientJob:
    state, settings = initial_state(config, federation), settings_of(config, federation)
    return make_jobs(state, settings)[0]


class Direct:
    """Trains in this process and notes whom."""

    def __init__(self, worker: ClientWorker) -> None:
        self.worker = worker
        self.trained: list[list[int]] = []

    def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        self.trained.append([job.client_id for job in jobs])
        for job in jobs:
            yield self.worker.train(recipe, [job])[0]


def unmeasured(state: ServerState) -> Callable[[], tuple[Evaluation, Evaluation]]:
    return lambda: (Evaluation(), Evaluation())


def play(*overrides: str) -> tuple[list[ServerState], list[RoundReport], Direct]:
    config = compose("digits", list(overrides))
    federation = federation_of(config)
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


QUICK = ("clients.batch_size=64", "prompts.depth=4")
"""The last block alone is trained through."""
SLOW = ("system.speed=0.5", "system.bandwidth=uniform:1:20")


def test_the_late_are_not_merged_and_keep_their_state(tiny: Overrides) -> None:
    """Control variates at the clients show whose state was advanced."""
    method = ("method=scaffold_pt", "rounds=1", "clients.per_round=6", *QUICK)
    _, (open_end,), _ = play(*tiny(*method, *SLOW))
    assert len(open_end.clients) == 6 and open_end.missed == ()
    deadline = 0.8 * open_end.virtual_seconds
    (state,), (report,), _ = play(*tiny(*method, *SLOW, f"system.deadline={deadline}"))
    late = {each["client"] for each in report.missed}
    merged = {each["client"] for each in report.clients}
    assert late and merged and late | merged == set(range(6)) and not late & merged
    assert {each["why"] for each in report.missed} == {"late"}
    assert report.virtual_seconds == deadline
    assert report.virtual_hours == pytest.approx(deadline / 3600)
    assert set(state.clients) == merged
    assert report.bytes_down == open_end.bytes_down  # all received
    assert report.bytes_up == open_end.bytes_up * len(merged) // 6


def test_a_round_that_nobody_meets_stops_or_is_skipped(tiny: Overrides) -> None:
    hopeless = tiny(*QUICK, *SLOW, "system.deadline=0.001")
    with pytest.raises(RoundError, match="round 1: expected at least one of 3 clients"):
        play(*hopeless)
    states, reports, runtime = play(*hopeless, "system.empty=skip")
    assert runtime.trained == [[], []]  # nothing is trained to be thrown away
    assert torch.equal(states[0].prompts, states[1].prompts)
    assert [state.round_index for state in states] == [1, 2]
    assert [report.virtual_seconds for report in reports] == [0.001, 0.001]
    assert reports[1].virtual_hours == pytest.approx(0.002 / 3600)
    assert reports[0].bytes_up == 0 and reports[0].bytes_down > 0
    assert math.isnan(reports[0].train_loss)
    assert list(notes_on(reports[0], 1)) == [
        "round 1: nobody reported in time; the model stays as it is"
    ]


def test_without_a_word_about_devices_nothing_changes(tiny: Overrides) -> None:
    """Devices without a limit leave the model's bits; the clock alone is added."""
    plain, reports, _ = play(*tiny(*QUICK))
    timed, others, _ = play(*tiny(*QUICK, *SLOW))
    assert plain[-1].system == {}
    assert dataclasses.replace(timed[-1], system={}).sha256() == plain[-1].sha256()
    assert [math.isnan(each.virtual_seconds) for each in (*reports, *others)] == [True] * 2 + [
        False
    ] * 2


class Stop(BaseException):
    """Ends a run from outside."""


def test_a_resumed_run_has_the_same_clock_and_devices(tiny: Overrides, tmp_path: Path) -> None:
    speeds = tmp_path / "speeds.txt"
    speeds.write_text("1 2 3 4 5 6")
    more = (f"system.speed={speeds}", "system.bandwidth=lognormal:5:1")
    more = (*more, "system.dropout=0.2", "system.over_select=1.5", "eval_every=2", *QUICK)
    straight = fedprompt.run("digits", tiny(*more))

    def stop(event: object) -> None:
        if isinstance(event, RoundFinished):
            raise Stop

    folder = tmp_path / "stopped"
    with pytest.raises(Stop):
        fedprompt.run("digits", tiny(*more, f"run_dir={folder}"), on_event=stop)
    speeds.write_text("1 2 3 4 5 7")
    with pytest.raises(CheckpointError, match=r"system.speed of the clients differs from that of"):
        fedprompt.resume(folder)
    speeds.write_text("1 2 3 4 5 6")
    resumed = fedprompt.resume(folder)
    assert resumed.summary["state_sha256"] == straight.summary["state_sha256"]
    hours = straight.summary["virtual_hours"]
    assert resumed.summary["virtual_hours"] == hours == straight.reports[-1]["virtual_hours"]
    assert hours == pytest.approx(sum(e["virtual_seconds"] for e in straight.reports) / 3600)
    assert [each["missed"] for each in resumed.reports] == [
        each["missed"] for each in straight.reports
    ]
    assert straight.rounds()["virtual_hours"].tolist()[-1] == hours
