"""The page of a sweep."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fedprompt.core.checks import is_number
from fedprompt.core.errors import ConfigError
from fedprompt.core.files import Json, atomic_write
from fedprompt.core.intervals import share_interval
from fedprompt.report.charts import Chart, Series, matrix, share_text, xy
from fedprompt.report.contents import COLOURS, accuracy, charts_of
from fedprompt.report.facts import value_text
from fedprompt.report.html import Page, Table, render
from fedprompt.report.lines import Line, lines_of
from fedprompt.report.live import percent
from fedprompt.report.page import seeds_note, summary_table
from fedprompt.runs.summary import read_runs
from fedprompt.sweep.directory import SweepDirectory
from fedprompt.sweep.figures import hashable, is_logarithmic, measured, ordered
from fedprompt.sweep.space import Sweep, describe, plain_text

MOST_CURVES = 9
"""Cells whose accuracy over rounds is drawn."""


def make_sweep_page(
    directory: SweepDirectory, sweep: Sweep, table: Json, output: Path | None = None
) -> Path:
    """Write `SWEEP_DIR/report.html`, or another page about the sweep.

    Args:
        directory: of the sweep.
        sweep: what was to be done.
        table: what came of it, see `make_table`.
        output: the page.

    Raises:
        ConfigError: it cannot be written.
    """
    path = output or directory.report_path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, render(sweep_page(directory, sweep, table)))
    except OSError as error:
        raise ConfigError(
            f"report {path}: expected a file that can be written, got '{error.strerror or error}'; "
            "choose another output"
        ) from error
    return path


def sweep_page(directory: SweepDirectory, sweep: Sweep, table: Json) -> Page:
    """What the page says.

    Args:
        directory: of the sweep.
        sweep: what was to be done.
        table: what came of it.
    """
    trials = table["trials"]
    states = {state: sum(row["state"] == state for row in trials) for state in _states(trials)}
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    warnings = [f"{counted} of {len(trials)} trials"] if set(states) - {"finished"} else []
    best = best_trial(table)
    tables = [("Cells", _cells_table(table), _cells_note(table))]
    figures = [chart for chart in _figures(directory, table) if chart is not None]
    if not table["keys"]:  # the seeds of one experiment
        finished = _finished(directory, trials)
        lines = lines_of([run for path in finished for run in read_runs([path])])
        tables = [("Methods", summary_table(lines), seeds_note(lines))] if lines else tables
        figures = charts_of(lines) if lines else []
    return Page(
        title=f"Sweep {Path(sweep.name).name}",
        subtitle=f"cells: {len(table['cells'])}, trials: {counted}",
        warnings=warnings,
        cards=_cards(table, best),
        facts=_facts(directory, sweep, best),
        commands=_commands(directory, sweep, best),
        tables=tables,
        figures=figures,
        details=[("Trials", _trials_table(table), "")],
    )


def best_trial(table: Json) -> Json | None:
    """The best finished trial of the best cell, by validation accuracy; by test accuracy where
    there is no validation split. None if nothing is finished.
    """
    done = [row for row in table["trials"] if row["state"] == "finished"]
    for name in ("validation_accuracy", "accuracy"):
        known = [row for row in done if row.get(name) is not None]
        if known:
            cells: dict[str, list[float]] = {}
            for row in known:
                cells.setdefault(repr(row["values"]), []).append(row[name])
            means = {cell: sum(values) / len(values) for cell, values in cells.items()}
            # The earliest of equals, in the order of the table.
            best: Json = max(known, key=lambda row: (means[repr(row["values"])], row[name]))
            return best
    return None


def best_command(directory: SweepDirectory, best: Json) -> str:
    """What repeats a trial.

    Args:
        directory: of the sweep.
        best: a row of the table's trials.
    """
    path = directory.path.resolve() / best["run_dir"] / "config.yaml"
    return f"fedprompt run {shlex.quote(os.fspath(path))} run_dir=runs/best"


def best_text(best: Json) -> str:
    """A trial in a line."""
    where = describe(list(best["values"].items()))
    judged = best.get("validation_accuracy")
    by = "" if judged is None else f"{percent(judged)} on validation, "
    return f"{where} seed={best['seed']}: {by}{percent(best['accuracy'])} on test".strip()


def _states(trials: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(row["state"] for row in trials))


def _cards(table: Json, best: Json | None) -> list[tuple[str, str]]:
    if best is None:
        return []
    (cell,) = [each for each in table["cells"] if each["values"] == best["values"]]
    count = len(cell["seeds"])
    over = f"mean of {count} seeds" if count != 1 else "one seed"
    judged = best.get("validation_accuracy")
    return [
        (percent(cell["accuracy"]["mean"]), f"test accuracy of the best cell, {over}"),
        (percent(judged), f"validation accuracy of its best trial, seed {best['seed']}"),
    ]


def _facts(directory: SweepDirectory, sweep: Sweep, best: Json | None) -> list[tuple[str, str]]:
    named = sweep.experiment
    experiment = named if isinstance(named, str) else str(named.get("name", "given in sweep.yaml"))
    space = "; ".join(
        f"{axis.key} {axis.kind} {', '.join(map(plain_text, axis.values))}" for axis in sweep.space
    )
    stop = sweep.stop
    facts = [
        ("experiment", experiment),
        ("set", " ".join(f"{key}={value_text(value)}" for key, value in sweep.set.items())),
        ("space", space),
        ("seeds", ", ".join(map(str, sweep.seeds))),
        ("draws", f"{sweep.samples}, seed {sweep.sampling_seed}" if sweep.samples > 1 else ""),
        ("stop", "" if stop is None else f"grace {stop.grace}, reduction {stop.reduction} (ASHA)"),
        ("best trial", "" if best is None else best_text(best)),
        ("note", sweep.note or ""),
        ("folder", str(directory.path)),
    ]
    return [(name, value) for name, value in facts if value]


def _commands(directory: SweepDirectory, sweep: Sweep, best: Json | None) -> list[tuple[str, str]]:
    file = shlex.quote(os.fspath(directory.path.resolve() / "sweep.yaml"))
    again = shlex.quote(f"runs/{Path(sweep.name).name}-again")
    found = [("Repeat the sweep", f"fedprompt sweep {file} --dir {again}")]
    if best is not None:
        found.insert(0, ("Repeat the best trial", best_command(directory, best)))
    return found


def _cells_table(table: Json) -> Table:
    heads = [*table["keys"], "seeds", "stopped", "test accuracy (%)", "at best validation (%)"]
    rows = []
    for cell in table["cells"]:
        prompts = cell["prompts"]["mean"]
        rows.append(
            [
                *(plain_text(cell["values"][key]) for key in table["keys"]),
                str(len(cell["seeds"])) + (f" of {_all(cell)}" if cell["missing"] else ""),
                str(cell["stopped"] or "-"),
                *(_interval(cell[name]) for name in ("accuracy", "best_accuracy")),
                "-" if prompts is None else f"{prompts:.1f}",
            ]
        )
    return Table([*heads, "prompts"], rows)


def _all(cell: Json) -> int:
    return len(cell["seeds"]) + int(cell["stopped"]) + int(cell["missing"])


def _cells_note(table: Json) -> str:
    note = "Means over finished seeds, and the 95 % interval (Student's t on the logit scale)."
    if any(cell["stopped"] for cell in table["cells"]):
        note += " Stopped trials are not in the means, which are then of the better ones."
    return note


def _interval(measure: Json) -> str:
    ends = None
    if measure["mean"] is not None:
        ends = share_interval(measure["mean"], measure["half_width"])
    shown = percent(measure["mean"]).removesuffix(" %")
    return shown if ends is None else f"{shown} [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"


def _trials_table(table: Json) -> Table:
    heads = [*table["keys"], "seed", "state", "round", "test (%)", "validation (%)", "folder"]
    rows = [
        [
            *(plain_text(row["values"][key]) for key in table["keys"]),
            *(str(row["seed"]), row["state"], str(row["rounds"] or 0)),
            *(percent(row.get(k)).removesuffix(" %") for k in ("accuracy", "validation_accuracy")),
            row["run_dir"],
        ]
        for row in table["trials"]
    ]
    return Table(heads, rows)


def _figures(directory: SweepDirectory, table: Json) -> Iterator[Chart | None]:
    yield _heat_map(table)
    yield from _lines(table)
    yield from _curves(directory, table)


def _finished(directory: SweepDirectory, rows: Sequence[Json]) -> list[Path]:
    """Run directories of the trials that are finished."""
    return [directory.path / row["run_dir"] for row in rows if row["state"] == "finished"]


def _heat_map(table: Json) -> Chart | None:
    """Mean accuracy over two keys, written into the cells."""
    keys, cells = table["keys"], measured(table)
    if len(keys) != 2 or not cells:
        return None
    rows, columns = (ordered([values[axis] for values in cells]) for axis in (0, 1))
    if len(rows) * len(columns) > 4 * len(cells):  # random draws: hardly any cell is filled
        return None
    rows = rows[::-1]  # as an axis: large values above
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, column), found in cells.items():
        values[rows.index(row), columns.index(column)] = found["mean"]
    said = {(rows.index(r), columns.index(c)): found for (r, c), found in cells.items()}

    def tip(row: int, column: int) -> str:
        found = said.get((row, column))
        return "" if found is None else _interval(found).replace(" [", "\n[")

    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return matrix(
        "Test accuracy at the last round (%)",
        (keys[0], keys[1]),
        ([plain_text(each) for each in rows], [plain_text(each) for each in columns]),
        values,
        tip,
        floor=low - 0.35 * max(high - low, 0.01),
        reading="Mean over the seeds and its 95 % interval.",
    )


def _lines(table: Json) -> Iterator[Chart | None]:
    """Accuracy over each key; a line for each value of the other one where there are two."""
    keys, cells = table["keys"], measured(table)
    for place, key in enumerate(keys):
        if len(keys) == 2 and place == 0:
            continue  # the other way round is on the page as the heat map
        series = []
        values = [hashable(row["values"][key]) for row in table["trials"]]
        places = ordered(values)
        numeric = all(is_number(each) for each in places)
        others = ordered([v[:place] + v[place + 1 :] for v in cells]) if len(keys) <= 2 else [()]
        where = {each: float(each) if numeric else float(i) for i, each in enumerate(places)}
        is_grid = (table.get("kinds") or {}).get(key) == "grid" and len(places) <= 8
        is_drawn = (table.get("kinds") or {}).get(key, "grid") != "grid"
        connected = not is_drawn and len(keys) <= 2 and len(cells) > len(others)
        for colour, other in enumerate(others):
            own = [
                (where[v[place]], found)
                for v, found in cells.items()
                if len(keys) > 2 or v[:place] + v[place + 1 :] == other
            ]
            own.sort(key=lambda each: each[0])
            ends = [
                share_interval(f["mean"], f["half_width"]) or (f["mean"], f["mean"]) for _, f in own
            ]
            series.append(
                Series(
                    f"{keys[0]}={plain_text(other[0])}" if other else "mean of a cell",
                    *([x for x, _ in own], [f["mean"] for _, f in own]),
                    *([low for low, _ in ends], [high for _, high in ends]),
                    kind="line" if connected else "dots",
                    colour=colour % COLOURS,
                    whiskers=True,
                )
            )
        stopped = [
            (where[hashable(row["values"][key])], row["accuracy"])
            for row in table["trials"]
            if row["state"] == "stopped" and row["accuracy"] is not None
        ]
        xs, ys = [x for x, _ in stopped], [y for _, y in stopped]
        series.append(Series("stopped trials", xs, ys, kind="rings", colour=COLOURS - 1))
        yield xy(
            f"Test accuracy over {key}",
            (key, "accuracy (%)"),
            series,
            text=share_text,
            log=numeric and is_logarithmic(table, key, places),
            names=() if numeric else [plain_text(each) for each in places],
            whole=False,
            ticks=[where[each] for each in places] if numeric and is_grid else (),
            reading="Means over finished seeds, and their 95 % intervals, which stay within 0 and "
            "100 %." + " Stopped trials: where they were when they were stopped." * bool(stopped),
        )


def _curves(directory: SweepDirectory, table: Json) -> Iterator[Chart | None]:
    """Accuracy over rounds of each cell, if these are few."""
    if len(table["cells"]) > MOST_CURVES:
        return
    lines = []
    for cell in table["cells"]:
        rows = [row for row in table["trials"] if row["values"] == cell["values"]]
        runs = [read_runs([path])[0] for path in _finished(directory, rows)]
        if runs:
            seeds = tuple(row["seed"] for row in rows if row["state"] == "finished")
            lines.append(Line(describe(list(cell["values"].items())), tuple(runs), {}, seeds))
    if lines:
        yield from accuracy(lines)
