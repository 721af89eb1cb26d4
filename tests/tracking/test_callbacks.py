"""Callbacks see the rounds, may stop them, and change nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import fedprompt
from fedprompt.core.errors import CallbackError, ConfigError
from fedprompt.experiment import RunResult
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.events import Event, Note, PhaseStarted, RoundFinished
from fedprompt.tracking.callbacks import FinishedRound, RunView
from fedprompt.tracking.callbacks.early_stopping import EarlyStopping, EarlyStoppingOptions

PLUGIN = """
import dataclasses
from fedprompt.tracking.callbacks import Callback, run_callbacks

@dataclasses.dataclass(frozen=True)
class Options:
    stop_after: int = 0
    raise_after: int = 0
    stop_at_start: bool = False

@run_callbacks.register("probe", Options)
class Probe(Callback):
    def __init__(self, options):
        self.options, self.lines = options, []

    def on_run_start(self, run):
        self.lines.append(["start", run.method, [each["round"] for each in run.records]])
        return "at once" if self.options.stop_at_start else None

    def on_round(self, run, finished):
        number = finished.record["round"]
        self.lines.append(["round", number, finished.state.round_index, len(run.records)])
        # All of it is a copy.
        finished.state.prompts.fill_(float("nan"))
        finished.record.clear()
        run.records.clear()
        run.config.clear()
        if number == self.options.raise_after:
            raise KeyError("a name")
        return "enough" if number == self.options.stop_after else None

    def on_run_end(self, run, state):
        self.lines.append(["end", state])
        with (run.run_dir / "probe.jsonl").open("a") as file:
            for line in self.lines:
                print(__import__("json").dumps(line), file=file)
"""


@pytest.fixture
def probe(tmp_path: Path, forgotten_plugins: None) -> str:
    path = tmp_path / "probe.py"
    path.write_text(PLUGIN)
    return f"plugins=[{path}]"


def lines_of(folder: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (folder / "probe.jsonl").read_text().splitlines()]


def test_a_callback_stops_the_rounds_and_the_run_can_be_resumed(
    plain: RunResult, settings: list[str], tmp_path: Path, probe: str
) -> None:
    events: list[Event] = []
    given = [f"run_dir={tmp_path / 'run'}", probe, "callbacks=[{name: probe, stop_after: 2}]"]
    result = fedprompt.run("digits", [*settings, *given], on_event=events.append)
    run = RunDirectory(result.run_dir)
    assert run.read_status()["state"] == "stopped"
    assert run.read_status()["message"] == "probe: enough; fedavg_pt: probe: enough"
    assert run.comparison("fedavg_pt").read_status()["message"] == "probe: enough"
    assert run.report_path.is_file()
    assert not run.is_finished()
    assert [report["round"] for report in result.reports] == [1, 2]
    assert (result.summary["state"], result.summary["rounds"]) == ("stopped", 2)
    assert result.comparisons["fedavg_pt"].summary["state"] == "stopped"
    assert lines_of(run.path) == [
        *(["start", "pfpt", []], ["round", 1, 1, 1], ["round", 2, 2, 2]),
        ["end", "stopped"],
    ]
    # Events say of which method they are.
    methods = [event.method for event in events if isinstance(event, RoundFinished)]
    assert methods == ["pfpt", "pfpt", "fedavg_pt", "fedavg_pt"]
    assert [event.name for event in events if isinstance(event, PhaseStarted)] == methods[1:3]
    said = [event for event in events if isinstance(event, Note) and "stopped by" in event.text]
    assert [event.method for event in said] == methods[1:3]

    again = fedprompt.resume(run.path)  # the callback stops after round 2, which is over
    assert again.summary["state"] == "finished"
    assert lines_of(run.path)[4:] == [
        *(["start", "pfpt", [1, 2]], ["round", 3, 3, 3], ["end", "finished"]),
    ]
    assert again.summary["state_sha256"] == plain.summary["state_sha256"]
    for one, other in zip(again.comparisons.values(), plain.comparisons.values(), strict=True):
        assert one.summary["state_sha256"] == other.summary["state_sha256"]


def test_a_callback_that_raises_is_named_and_the_rounds_are_kept(
    plain: RunResult, settings: list[str], tmp_path: Path, probe: str
) -> None:
    given = ["compare=[]", f"run_dir={tmp_path / 'run'}", probe]
    with pytest.raises(CallbackError) as caught:
        fedprompt.run("digits", [*settings, *given, "callbacks=[{name: probe, raise_after: 1}]"])
    text = "callback 'probe' of pfpt: on_round after round 1 raised KeyError: 'a name'"
    assert str(caught.value) == text
    run = RunDirectory(tmp_path / "run")
    assert (run.read_status()["state"], run.read_status()["message"]) == ("failed", text)
    assert run.last_round() == 1
    resumed = fedprompt.resume(run.path, ["callbacks=[]"])
    assert resumed.summary["state_sha256"] == plain.summary["state_sha256"]


def test_the_callback_of_the_page_is_a_callback(
    settings: list[str], tmp_path: Path, forgotten_plugins: None
) -> None:
    page = (Path(__file__).parents[2] / "docs/tracking.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "diverged.py").write_text(code)
    given = [
        *("compare=[]", f"run_dir={tmp_path / 'run'}", f"plugins=[{tmp_path / 'diverged.py'}]"),
        "callbacks=[{name: diverged, limit: 0.001}]",
    ]
    result = fedprompt.run("digits", [*settings, *given])
    assert result.summary["rounds"] == 1
    loss = result.reports[0]["train_loss"]
    message = RunDirectory(result.run_dir).read_status()["message"]
    assert message == f"diverged: the clients' loss is {loss}"


def test_a_run_that_is_stopped_before_its_first_round(
    settings: list[str], tmp_path: Path, probe: str
) -> None:
    given = ["compare=[]", f"run_dir={tmp_path / 'run'}", probe]
    with pytest.raises(CallbackError, match=r"stopped before the first round: probe: at once$"):
        fedprompt.run(
            "digits", [*settings, *given, "callbacks=[{name: probe, stop_at_start: true}]"]
        )
    run = RunDirectory(tmp_path / "run")
    assert run.read_status()["state"] == "stopped"
    assert run.has_header()  # it can be resumed


# Early stopping


def view(records: Sequence[dict[str, Any]]) -> RunView:
    return RunView("experiment", "pfpt", 99, {}, Path(), lambda: records)


def rounds_of(values: Sequence[float | None], key: str = "validation_accuracy") -> list[Any]:
    """Records of rounds; None stands for a round without evaluation."""
    return [
        {"round": number, "accuracy": None if value is None else 0.5, key: value}
        for number, value in enumerate(values, start=1)
    ]


def last_round(options: EarlyStoppingOptions, records: Sequence[Any], before: int) -> int | None:
    """The round after which the rounds stop, when a process starts after `before` of them."""
    callback = EarlyStopping(options)
    if callback.on_run_start(view(records[:before])) is not None:
        return before
    for record in records[before:]:
        finished = FinishedRound(record, lambda: pytest.fail("it needs no state"))
        if callback.on_round(view(records), finished) is not None:
            return int(record["round"])
    return None


@pytest.mark.parametrize(
    ("options", "values", "stops"),
    [
        # Best in round 2; 3 and 4 are no better.
        ({"patience": 2}, [0.1, 0.5, 0.4, 0.5, 0.9], 4),
        # Rounds without evaluation do not count.
        ({"patience": 2}, [0.5, None, 0.4, None, 0.4, 0.9], 5),
        # 0.52 is better than 0.5, but not by more than 0.05; 0.6 is.
        ({"patience": 2, "min_delta": 0.05}, [0.5, 0.52, 0.6, 0.61, 0.62, 0.9], 5),
        # Slow gains add up: each is measured against the best, not against the round before.
        ({"patience": 3, "min_delta": 0.05}, [0.50, 0.53, 0.56, 0.57, 0.58, 0.59], 6),
        ({"patience": 1, "mode": "min"}, [0.5, 0.4, 0.4], 3),
        ({"patience": 3}, [0.1, 0.2, 0.3, 0.4], None),
    ],
)
def test_early_stopping_on_paper(
    options: dict[str, Any], values: list[float | None], stops: int | None
) -> None:
    settled = EarlyStoppingOptions(**options)
    records = rounds_of(values)
    assert last_round(settled, records, 0) == stops
    # Wherever the run was killed and resumed.
    for before in range(1, (stops or len(values)) + 1):
        assert last_round(settled, records, before) == stops


def test_less_loss_is_better_unless_one_says_otherwise() -> None:
    records = rounds_of([0.5, 0.4, 0.3], "loss")
    auto = EarlyStoppingOptions(monitor="loss", patience=1)
    assert last_round(auto, records, 0) is None
    assert last_round(dataclasses.replace(auto, mode="max"), records, 0) == 2


def test_a_loss_that_is_no_number_is_no_improvement() -> None:
    records = rounds_of([0.5, 0.4, 0.3], "loss")
    records[1]["loss"] = records[2]["loss"] = None  # as `rounds.jsonl` has NaN
    assert last_round(EarlyStoppingOptions(monitor="loss", patience=2), records, 0) == 3


def test_clients_own_models_stand_for_the_global_one() -> None:
    records = [
        {
            "round": number,
            "accuracy": None,
            "validation_accuracy": None,
            "personalised": {"validation": {"mean": mean}},
        }
        for number, mean in ((1, 0.5), (2, 0.4))
    ]
    assert last_round(EarlyStoppingOptions(patience=1), records, 0) == 2


def test_a_figure_that_is_not_there_is_named_after_the_first_evaluated_round() -> None:
    callback = EarlyStopping(EarlyStoppingOptions(monitor="acuracy"))
    with pytest.raises(ConfigError) as caught:
        callback.on_run_start(view(rounds_of([None, 0.5])))
    assert str(caught.value) == (
        "monitor: 'acuracy' was not measured in round 2; expected accuracy, validation_accuracy "
        "or another number of rounds.jsonl, such as seconds.train; did you mean 'accuracy'?"
    )
