"""What a page shows of some lines of runs: its figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fedprompt.report.charts import (
    MOST_BANDS,
    Chart,
    Series,
    dots,
    matrix,
    share_text,
    stacked,
    xy,
)
from fedprompt.report.figures import OVERLAP, seconds_stack
from fedprompt.report.lines import Curve, Line, Values, series_of
from fedprompt.runs.summary import FATES, MATCH_FIGURES, MEGABYTE, Run, domain_accuracy

COLOURS = 7
"""Of lines; the eighth has the first one's again."""
MOST_CLASSES = 200
"""In a figure."""


def charts_of(lines: Sequence[Line]) -> list[Chart]:
    """The figures that have data, in the order of the page."""
    makers = (
        *(accuracy, domains, classes, confusions, clients),
        *(loss, traffic, hours, prompts, partition, seconds, fates, matches),
    )
    return [chart for make in makers for chart in make(lines) if chart is not None]


def accuracy(lines: Sequence[Line]) -> Iterator[Chart | None]:
    """Test accuracy over rounds, and on the validation split if there is room."""
    shown = [_series(line, i, series_of("accuracy"), share=True) for i, line in enumerate(lines)]
    checked = [
        _series(line, i, series_of("validation_accuracy"), share=True, kind="dashed")
        for i, line in enumerate(lines)
        if len(lines) <= 4
    ]
    some = any(len(each.y) for each in checked)
    yield xy(
        "Accuracy of the global model",
        ("round", "accuracy (%)"),
        [*shown, *checked],
        text=share_text,
        reading=_reading("Solid: test split, dashed: validation split." * some, lines),
    )


def loss(lines: Sequence[Line]) -> Iterator[Chart | None]:
    """Loss on the test split and in training."""
    tested = [_series(line, i, series_of("loss")) for i, line in enumerate(lines)]
    trained = [
        _series(line, i, series_of("train_loss"), kind="dashed") for i, line in enumerate(lines)
    ]
    yield xy(
        "Loss",
        ("round", "cross-entropy"),
        [*tested, *trained],
        reading="Solid: test split, dashed: mean over the clients' own images in training.",
    )


def traffic(lines: Sequence[Line]) -> Iterator[Chart | None]:
    """Accuracy against what was sent until then."""

    def read(run: Run) -> Values:
        sent, found = 0.0, {}
        for record in run.records:
            sent += (record.get("bytes_up") or 0) + (record.get("bytes_down") or 0)
            if record.get("accuracy") is not None:
                found[record["round"]] = (sent / MEGABYTE, float(record["accuracy"]))
        return found

    yield xy(
        "Accuracy against megabytes sent",
        ("MB sent so far, up and down, all clients", "accuracy (%)"),
        [_series(line, i, read, share=True) for i, line in enumerate(lines)],
        text=share_text,
        whole=False,
    )


def hours(lines: Sequence[Line]) -> Iterator[Chart | None]:
    """Accuracy over the hours that the clients' devices take, where a run has virtual time."""

    def read(run: Run) -> Values:
        return {
            record["round"]: (float(record["virtual_hours"]), float(record["accuracy"]))
            for record in run.records
            if record.get("virtual_hours") is not None and record.get("accuracy") is not None
        }

    yield xy(
        "Accuracy over virtual time",
        ("hours on the clients' devices", "accuracy (%)"),
        [_series(line, i, read, share=True) for i, line in enumerate(lines)],
        text=share_text,
        whole=False,
    )


def prompts(lines: Sequence[Line]) -> Iterator[Chart | None]:
    """Prompts that the server holds."""
    yield xy(
        "Summarizing prompts on the server",
        ("round", "prompts"),
        [_series(line, i, series_of("num_prompts")) for i, line in enumerate(lines)],
        bottom=0.0,
    )


def domains(lines: Sequence[Line]) -> Iterator[Chart | None]:
    """Accuracy of each domain in the last evaluated round."""
    named = [[domain_accuracy(run) or {} for run in line.runs] for line in lines]
    names = list(dict.fromkeys(name for each in named for found in each for name in found))
    series = [
        (line.name, [_mean([run.get(name) for run in found]) for name in names])
        for line, found in zip(lines, named, strict=True)
    ]
    yield dots(
        "Accuracy of each domain (%)", names, series, reading=_last("Last evaluated round", lines)
    )


def classes(lines: Sequence[Line]) -> Iterator[Chart | None]:
    """Accuracy of each class in the last evaluated round, by the first line."""
    last = [[_last_of(run, "class_accuracy") for run in line.runs] for line in lines]
    count = max((len(each) for found in last for each in found), default=0)
    if not 0 < count <= MOST_CLASSES:
        return
    series = [
        (
            line.name,
            [_mean([run[c] if c < len(run) else None for run in found]) for c in range(count)],
        )
        for line, found in zip(lines, last, strict=True)
    ]
    names = _class_names(lines[0].runs[0], count)
    first = series[0][1]
    order = sorted(range(count), key=lambda c: (-first[c] if math.isfinite(first[c]) else 2.0, c))
    yield dots(
        "Accuracy of each class (%)",
        [names[c] for c in order],
        [(name, [values[c] for c in order]) for name, values in series],
        reading=_last(f"{count} classes, last evaluated round, sorted by {lines[0].name}", lines),
    )


def confusions(lines: Sequence[Line]) -> Iterator[Chart | None]:
    """What the classes of the first line are taken for."""
    run = lines[0].runs[0]
    saved = run.directory.read_predictions()
    names = list(run.directory.read_task().get("class_names") or ())
    if not {"label", "prediction", "round"} <= saved.keys() or not 0 < len(names) <= MOST_CLASSES:
        return
    if max(saved["label"].max(initial=-1), saved["prediction"].max(initial=-1)) >= len(names):
        return
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (saved["label"], saved["prediction"]), 1)
    present = counts.sum(axis=1) > 0
    shares = counts[present] / counts[present].sum(axis=1, keepdims=True)
    whole = counts[present]

    def tip(row: int, column: int) -> str:
        return f"{whole[row, column]:.0f}" if whole[row, column] else ""

    rows = [name for name, there in zip(names, present, strict=True) if there]
    name = lines[0].name
    seed = f", seed {lines[0].seeds[0]}" if len(lines[0].runs) > 1 else ""
    yield matrix(
        f"Confusion matrix: {name}{seed}",
        ("class of the image", "class that the model gives it"),
        (rows, names),
        shares,
        tip,
        gamma=0.6,
        reading=f"Test images after round {int(saved['round'])}; the darker, the larger the share "
        "of the row. All that is off the diagonal is wrong.",
    )


def clients(lines: Sequence[Line]) -> Iterator[Chart | None]:
    """Accuracy of the clients' own models, the worst first."""
    series, worst, count = [], [], 0
    for place, line in enumerate(lines):
        measured = [
            ((record.get("personalised") or {}).get("test") or {})
            for record in line.runs[0].records
        ]
        known = [each for each in measured if each.get("by_client")]
        if not known:
            continue
        values = sorted(float(each) for each in known[-1]["by_client"].values())
        ranks = [float(i + 1) for i in range(len(values))]
        series.append(Series(line.name, ranks, values, kind="dots", colour=place % COLOURS))
        worst.append(f"{line.name} {share_text(known[-1]['worst_tenth'])}")
        count = max(count, len(values))
    if not series:
        return
    tenth = math.ceil(count / 10)
    many = " (of the first seed)" * any(len(line.runs) > 1 for line in lines)
    yield xy(
        "Accuracy of each client's own model",
        ("clients, the worst first", "accuracy on its share (%)"),
        series,
        text=share_text,
        reading=f"Each client's own share of the test split{many}. Mean of the worst tenth: "
        + ", ".join(worst)
        + ".",
        shade=(0.5, tenth + 0.5, "worst tenth"),
    )


def partition(lines: Sequence[Line]) -> Iterator[Chart | None]:
    """Samples of each class at each client."""
    held = next(
        filter(None, (run.directory.read_partition() for line in lines for run in line.runs)), None
    )
    if held is None or not held.class_counts.size or max(held.class_counts.shape) > 1000:
        return
    counts = held.class_counts.T
    people, kinds = held.class_counts.shape

    def tip(row: int, column: int) -> str:
        return str(counts[row, column]) if counts[row, column] else ""

    yield matrix(
        "Who holds what",
        ("class", "client"),
        (list(held.class_names), [str(i) for i in range(people)]),
        counts.astype(np.float64),
        tip,
        gamma=0.5,
        reading=f"{people} clients, {kinds} classes, {int(counts.sum()):,} training images; "
        "images of each class at each client.",
    )


def seconds(lines: Sequence[Line]) -> Iterator[Chart | None]:
    """Where the time goes: of all lines together, and round by round of the first."""
    shown = [line for line in lines if line.runs[0].records]
    if not shown:
        return
    stacks = [seconds_stack(line.runs[0]) for line in shown]
    parts = [
        (name, [float(stack[name].sum()) for stack in stacks])
        for name in stacks[0]
        if any(stack[name].any() for stack in stacks)
    ]
    first = " The first seed of each." * any(len(line.runs) > 1 for line in lines)
    yield stacked(
        "Where the time goes (seconds, all rounds)",
        [line.name for line in shown],
        parts,
        text=lambda value: f"{value:.1f} s",
        reading="Time that passed." + first,
    )
    rounds = [float(record["round"]) for record in shown[0].runs[0].records]
    yield xy(
        f"Seconds of each round: {shown[0].name}",
        ("round", "seconds"),
        list(_stack(rounds, [(name, stacks[0][name].tolist()) for name, _ in parts])),
        text=lambda value: f"{value:.3g} s",
        bottom=0.0,
        reading=f"“{OVERLAP}” counts once." if any(name == OVERLAP for name, _ in parts) else "",
    )


def fates(lines: Sequence[Line]) -> Iterator[Chart | None]:
    """What became of the prompts, of the first line whose aggregator says so."""
    line = next((line for line in lines if line.runs[0].diagnostics()[0]), None)
    if line is None:
        return
    rounds, values = line.runs[0].diagnostics()
    places = [float(index) for index in rounds]
    known = {name: np.nan_to_num(values[name]).tolist() for name in FATES}
    gone = [-value for value in known["pruned"]]
    bars = list(_stack(places, [("kept", known["kept"]), ("born", known["born"])]))
    zero = [0.0] * len(places)
    pruned = Series("pruned", places, zero, gone, zero, kind="bars", colour=2, group=2)
    merges = [value or math.nan for value in known["merged"]]
    merged = Series("merged", places, merges, kind="rings", colour=3, group=3)
    yield xy(
        f"What the aggregation did: {line.name}",
        ("round", "prompts"),
        [*bars, pruned, merged],
        reading="Kept and born prompts are what the server holds next, pruned ones (below zero) "
        "are gone, merges happened on the way.",
    )


def matches(lines: Sequence[Line]) -> Iterator[Chart | None]:
    """How sure the matching was."""
    readings = (
        "A matched distance near 1 is what the noise explains.",
        "Near 0, nearly all clients or nearly none use a prompt.",
    )
    for (key, label), reading in zip(MATCH_FIGURES.items(), readings, strict=True):

        def read(run: Run, key: str = key) -> Values:
            rounds, values = run.diagnostics()
            return {i: (i, v) for i, v in zip(rounds, values[key], strict=True) if math.isfinite(v)}

        series = [_series(line, i, read) for i, line in enumerate(lines)]
        title, _, unit = label.capitalize().partition(" (")
        yield xy(title, ("round", unit.rstrip(")")), series, bottom=0.0, reading=reading)


def _series(
    line: Line,
    place: int,
    read: Callable[[Run], Values],
    share: bool = False,
    kind: str = "line",
) -> Series:
    """A line of the page as a series.

    Args:
        line: of runs.
        place: its number, which decides the colour.
        read: of a run, place and value by round.
        share: whether the values are shares.
        kind: of the series.
    """
    curve: Curve = line.curve(read, share)
    with_ends = kind == "line" and len(curve.low) == len(curve.y)
    low, high = (curve.low, curve.high) if with_ends else ([], [])
    return Series(line.name, curve.x, curve.y, low, high, kind, place % COLOURS, place)


def _stack(
    places: Sequence[float], parts: Sequence[tuple[str, Sequence[float]]]
) -> Iterator[Series]:
    """Bars on top of each other."""
    base = [0.0] * len(places)
    for colour, (name, heights) in enumerate(parts):
        top = [low + height for low, height in zip(base, heights, strict=True)]
        yield Series(name, places, top, base, top, kind="bars", colour=colour, group=colour)
        base = top


def _mean(values: Sequence[float | None]) -> float:
    """Mean of values that all are known, else NaN."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else math.nan


def _last_of(run: Run, key: str) -> list[float | None]:
    return next((list(r[key]) for r in reversed(run.records) if r.get(key)), [])


def _class_names(run: Run, count: int) -> list[str]:
    held = run.directory.read_partition()
    names = list(held.class_names) if held is not None else []
    return names if len(names) == count else [str(index) for index in range(count)]


def _last(text: str, lines: Sequence[Line]) -> str:
    return text + ("; means over the seeds." if any(len(line.runs) > 1 for line in lines) else ".")


def _reading(text: str, lines: Sequence[Line]) -> str:
    seeds = {len(line.runs) for line in lines if len(line.runs) > 1}
    if not seeds:
        return text
    shown = " or ".join(map(str, sorted(seeds)))
    where = "" if len(lines) <= MOST_BANDS else "; intervals are shown under the pointer"
    return f"{text} Mean and 95 % interval over {shown} seeds{where}.".strip()
