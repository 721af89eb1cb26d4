"""Loggers get the numbers of `rounds.jsonl`, once each, and cannot end a run."""

from __future__ import annotations

import csv
import json
import struct
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import fedprompt
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.experiment import RunResult
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.events import Note, RoundFinished
from fedprompt.tracking.feed import Feed
from fedprompt.tracking.loggers import LoggedRun, Tracker
from fedprompt.tracking.loggers.mlflow import MLflowOptions, MLflowTracker

METHODS = ("pfpt", "fedavg_pt")
Curves = dict[tuple[str, int], float]
"""The value of each figure at each step."""


class Stop(Exception):
    """Ends a run from outside."""


@pytest.fixture(scope="module")
def logged(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A compared run with three loggers, ended in the first method and resumed."""
    path = tmp_path_factory.mktemp("logged") / "run"

    def stop(event: Any) -> None:
        if isinstance(event, RoundFinished) and event.report.round == 2:
            raise Stop

    given = [*settings, "loggers=[csv, tensorboard, mlflow]", f"run_dir={path}"]
    pytest.importorskip("mlflow", reason="the extra 'loggers' is not installed")
    pytest.importorskip("sqlalchemy", reason="the extra 'loggers' is not installed")
    with pytest.raises(Stop, match=r"^$"):
        fedprompt.run("digits", given, on_event=stop)
    fedprompt.resume(path)
    return RunDirectory(path)


def expected(directory: RunDirectory) -> Curves:
    """Every number of `rounds.jsonl` by dotted name and round, but those of each client."""
    curves: Curves = {}
    for line in (directory.path / "rounds.jsonl").read_text().splitlines():
        record = json.loads(line)
        stack: list[tuple[str, Any]] = list(record.items())
        while stack:
            name, value = stack.pop()
            if name.endswith(".by_client"):
                continue
            if isinstance(value, dict):
                stack += [(f"{name}.{key}", item) for key, item in value.items()]
            elif isinstance(value, (int, float)):
                curves[name, record["round"]] = value
    return curves


def of_method(run: RunDirectory, method: str) -> RunDirectory:
    return run if method == METHODS[0] else run.comparison(method)


def test_the_expectation_is_not_empty(logged: RunDirectory) -> None:
    curves = expected(logged)
    assert {step for _, step in curves} == {1, 2, 3}
    assert ("accuracy", 1) not in curves  # not evaluated
    assert {("accuracy", 2), ("seconds.train", 3), ("diagnostics.noise", 1)} <= curves.keys()
    assert ("personalised.test.mean", 3) in curves


@pytest.mark.parametrize("method", METHODS)
def test_the_table_has_each_round_once(logged: RunDirectory, method: str) -> None:
    directory = of_method(logged, method)
    with (directory.path / "loggers/csv/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    found = {
        (name, int(row["step"])): float(text)
        for row in rows
        for name, text in row.items()
        if text and name != "step"
    }
    assert found == expected(directory)


@pytest.mark.parametrize("method", METHODS)
def test_the_event_file_has_each_value_in_double_precision(
    logged: RunDirectory, method: str
) -> None:
    from tensorboardX.proto.event_pb2 import Event

    directory = of_method(logged, method)
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for path in (directory.path / "loggers/tensorboard").glob("events.*"):
        for content in records_of(path.read_bytes()):
            event = Event.FromString(content)
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    found[value.tag, event.step] += value.tensor.double_val
    assert found == {key: [value] for key, value in expected(directory).items()}


def records_of(content: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file: length, its checksum, content, its checksum."""
    start = 0
    while start < len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        yield content[start + 12 : start + 12 + length]
        start += 12 + length + 4


def test_mlflow_has_a_run_for_each_method(logged: RunDirectory) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{logged.path / 'loggers/mlflow.db'}")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == set(METHODS)
    for method, run in runs.items():
        directory = of_method(logged, method)
        assert run.info.status == "FINISHED"
        assert run.data.tags["fedprompt.run"] == "run"
        assert run.data.params["clients/batch_size"] == "64"
        assert run.data.params["method"] == method
        found = {
            (name, metric.step): metric.value
            for name in run.data.metrics
            for metric in client.get_metric_history(run.info.run_id, name)
        }
        lengths = [
            len(client.get_metric_history(run.info.run_id, name)) for name in ("round", "loss")
        ]
        assert lengths == [3, 2]  # and none twice
        assert found == expected(directory)


def test_loggers_change_no_bit(logged: RunDirectory, plain: RunResult) -> None:
    for name in ("state_sha256", "accuracy"):
        assert plain.summary[name] == logged.read_summary()[name]
    assert not (plain.run_dir / "loggers").exists()


def test_a_logger_that_is_added_when_a_run_goes_on_gets_the_rounds_before(
    settings: list[str], tmp_path: Path
) -> None:
    def stop(event: Any) -> None:
        if isinstance(event, RoundFinished) and event.report.round == 2:
            raise Stop

    given = [*settings, "compare=[]", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(Stop, match=r"^$"):
        fedprompt.run("digits", given, on_event=stop)
    fedprompt.resume(tmp_path / "run", ["loggers=[csv]"])
    text = (tmp_path / "run/loggers/csv/metrics.csv").read_text()
    assert len(text.splitlines()) == 1 + 3
    RunDirectory(tmp_path / "run").clear()
    assert not (tmp_path / "run/loggers").exists()


# What goes wrong


class Book:
    """Stands for one of Lightning's loggers."""

    def __init__(self, failing: set[int]) -> None:
        self.failing = failing
        self.steps: list[int] = []
        self.config: object = None
        self.status = ""

    def log_hyperparams(self, params: object) -> None:
        self.config = params

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        warnings.warn("a library speaks", stacklevel=1)
        if step in self.failing:
            self.failing.discard(step)
            raise OSError("the server\n does not answer")
        self.steps.append(step)

    def save(self) -> None:
        pass

    def finalize(self, status: str) -> None:
        self.status = status


class BookTracker(Tracker):
    """Opens `Book`s."""

    def __init__(self, *failing: int, error: Exception | None = None) -> None:
        self.book = Book(set(failing))
        self.error = error
        self.identities: list[str | None] = []

    def open(self, run: LoggedRun) -> Any:
        if self.error is not None:
            raise self.error
        self.identities.append(run.identity)
        return self.book

    def identity(self, logger: Any) -> str:
        return "the book"


@pytest.fixture
def feed(tmp_path: Path) -> Callable[..., Feed]:
    def make(*trackers: Tracker) -> Feed:
        run = LoggedRun("experiment", "pfpt", "run", tmp_path / "loggers", tmp_path / "loggers")
        named = [(f"book{number}", tracker) for number, tracker in enumerate(trackers)]
        return Feed(named, run, {"seed": 0}, ())

    return make


def records(*rounds: int) -> list[dict[str, Any]]:
    return [{"round": each, "loss": each / 2} for each in rounds]


def test_a_logger_that_fails_says_so_once_and_gets_the_rest_at_the_end(
    feed: Callable[..., Feed],
) -> None:
    failing, good = BookTracker(2), BookTracker()
    both = feed(failing, good)
    assert both.start([]) == []
    notes = [note for record in records(1, 2, 3, 4) for note in both.add(record)]
    (note,) = notes
    assert note == (
        "logger book0 failed and is left out from here on; the run goes on "
        "(OSError: the server does not answer)"
    )
    assert failing.book.steps == [1]
    assert both.end("finished") == ["logger book0: it has all rounds after all"]
    assert failing.book.steps == good.book.steps == [1, 2, 3, 4]
    assert failing.book.config == good.book.config == {"seed": 0}
    assert failing.book.status == good.book.status == "success"


def test_a_run_that_goes_on_gives_no_round_twice(feed: Callable[..., Feed]) -> None:
    first, second = BookTracker(), BookTracker()
    killed = feed(first)
    killed.start([])
    for record in records(1, 2):
        killed.add(record)
    # Round 3 was on disk, and not yet given, when the process was killed.
    again = feed(second)
    again.start(records(1, 2, 3))
    again.add(records(4)[0])
    again.end("failed")
    assert (first.identities, second.identities) == ([None], ["the book"])
    assert (first.book.steps, second.book.steps) == ([1, 2], [3, 4])
    assert second.book.config is None  # it has the first one
    assert second.book.status == "failed"


def test_a_package_that_is_missing_is_one_line(feed: Callable[..., Feed]) -> None:
    tracker = BookTracker(error=ModuleNotFoundError("No module named 'wandb'. HINT: try it"))
    missing = feed(tracker)
    (note,) = missing.start([])
    assert note == (
        "logger book0 is off: its package cannot be imported (No module named 'wandb'); "
        "pip install 'fedprompt[loggers]'"
    )
    assert missing.add(records(1)[0]) == missing.end("finished") == []


def test_a_server_that_is_not_there(feed: Callable[..., Feed]) -> None:
    pytest.importorskip("mlflow", reason="the extra 'loggers' is not installed")
    nowhere = feed(MLflowTracker(MLflowOptions(tracking_uri="http://127.0.0.1:9")))
    (note,) = nowhere.start([])
    assert note.startswith("logger book0 failed and is left out from here on; the run goes on (")
    assert "\n" not in note
    assert len(note) < 400
    assert nowhere.add(records(1)[0]) == []


def test_what_is_missing_is_said_once_for_all_methods(
    settings: list[str], tmp_path: Path, forgotten_plugins: None
) -> None:
    plugin = tmp_path / "absent.py"
    plugin.write_text(
        "import dataclasses\n"
        "from fedprompt.tracking.loggers import Tracker, loggers\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Options:\n    pass\n"
        "@loggers.register('absent', Options)\n"
        "class Absent(Tracker):\n"
        "    def __init__(self, options):\n        pass\n"
        "    def open(self, run):\n        import nothing_of_this_name\n"
    )
    notes: list[Note] = []

    def listen(event: Any) -> None:
        if isinstance(event, Note):
            notes.append(event)

    given = [f"plugins=[{plugin}]", "loggers=[absent]", "rounds=1", f"run_dir={tmp_path / 'run'}"]
    fedprompt.run("digits", [*settings, *given], on_event=listen)
    (note,) = [note for note in notes if "logger" in note.text]
    assert "nothing_of_this_name" in note.text
    assert note.method is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("loggers=[tensorbord]", "unknown logger 'tensorbord': expected one of csv, mlflow"),
        ("loggers=[csv, {name: csv}]", "loggers: expected each logger once, got csv, csv"),
        ("loggers={csv: 1}", "loggers: expected a list of names"),
        ("loggers=[{folder: x}]", "loggers: expected a section with a name"),
        ("loggers=[{name: mlflow, uri: x}]", "unknown config key 'mlflow.uri'"),
        ("loggers=[{name: wandb, mode: off}]", "wandb.mode: expected"),
        ("loggers.csv=1", "loggers: expected a list of names"),
        ("callbacks=[early]", "unknown callback of the run 'early'"),
        ("callbacks=[{name: early_stopping, patience: 0}]", "early_stopping.patience: expected"),
        ("callbacks=[{name: early_stopping, mode: up}]", "early_stopping.mode: expected"),
        ("callbacks=[{name: early_stopping, min_delta: -1}]", "early_stopping.min_delta: expected"),
    ],
)
def test_bad_input_is_one_line(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("digits", [given])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_name_is_a_list_of_one_and_the_config_comes_back(tmp_path: Path) -> None:
    config = compose(
        "digits",
        ["loggers=csv", "callbacks=[{name: early_stopping, patience: 2}, early_stopping]"],
    )
    assert [choice.name for choice in config.loggers] == ["csv"]
    assert [choice.options.patience for choice in config.callbacks] == [2, 5]
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    again = compose(tmp_path / "config.yaml")
    assert (again.loggers, again.callbacks) == (config.loggers, config.callbacks)
    assert again.with_method("fedavg_pt").callbacks == config.callbacks


def test_wandb_keeps_each_value_offline(settings: list[str], tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra 'loggers' is not installed")
    from wandb.proto import wandb_internal_pb2

    run_dir = tmp_path / "run"
    given = [*settings, "compare=[]", "rounds=2", "loggers=[wandb]", f"run_dir={run_dir}"]
    fedprompt.run("digits", given)
    (path,) = run_dir.glob("loggers/wandb/offline-run-*/run-*.wandb")
    found: Curves = {}
    names = []
    for content in blocks_of(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)
        names += [record.run.display_name] if record.HasField("run") else []
        row = {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        step = row.get("trainer/global_step")
        found |= {
            (name, step): value
            for name, value in row.items()
            if name[0] != "_" and name != "trainer/global_step"
        }
    assert names == ["pfpt"]
    assert found == expected(RunDirectory(run_dir))


def blocks_of(content: bytes) -> Iterator[bytes]:
    """The records of W&B's file: LevelDB's log format after a header of 7 bytes."""
    whole, size = 32768, len(content)
    start, parts = 7, b""
    while start + 7 <= size:
        rest = whole - start % whole
        if rest < 7:  # padding
            start += rest
            continue
        length, kind = struct.unpack_from("<HB", content, start + 4)
        parts += content[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""
