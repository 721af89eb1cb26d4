"""The page about runs, made from their run directories alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fedprompt.core.errors import ConfigError
from fedprompt.core.files import Json, atomic_write
from fedprompt.report.contents import charts_of
from fedprompt.report.facts import command_of, facts_of, said_of
from fedprompt.report.figures import write_figures
from fedprompt.report.html import Page, Table, render
from fedprompt.report.lines import Line, Mean, difference, lines_of
from fedprompt.report.live import number, percent
from fedprompt.report.table import short_number, summary_cells
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.summary import Run, read_runs, wall_seconds

HEADS = (
    *("method", "seeds", "test accuracy (%)", "each image alone (%)"),
    *("at best validation (%, round)", "prompts kept", "MB up", "MB down", "seconds"),
    *("state SHA-256", "clients' own models (worst tenth)"),
)
MOST_DETAILS = 24
"""Runs whose rounds and configurations are on the page."""


def make_html(run_dir: Path) -> Path:
    """Write `RUN_DIR/report.html`, one page that needs no other file and no network.

    Raises:
        ConfigError: the folder is no run directory.
    """
    return make_report([run_dir])


def make_report(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Write one page about one or several runs and their comparison runs.

    The figures of a single run are written to its `figures/` as well.

    Args:
        run_dirs: run directories; the first one leads.
        output: the page. A single run has its `report.html` by default; several have none.

    Returns:
        The page.

    Raises:
        ConfigError: a folder is no run directory, or the page cannot be written.
    """
    runs = read_runs(run_dirs)
    if output is None and len(run_dirs) > 1:
        raise ConfigError(
            f"report: a page about {len(run_dirs)} runs is none of theirs; give it a folder with "
            "--output DIR"
        )
    page = output or runs[0].directory.report_path
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        if output is None:
            write_figures(runs, runs[0].directory)
        atomic_write(page, render(page_of(runs, run_dirs)))
    except OSError as error:
        raise ConfigError(
            f"report {page}: expected a file that can be written, got '{error.strerror or error}'; "
            "choose another output"
        ) from error
    return page


def page_of(runs: Sequence[Run], run_dirs: Sequence[Path]) -> Page:
    """What the page says.

    Args:
        runs: those of `run_dirs`, each followed by its comparisons.
        run_dirs: the runs that the page is about.
    """
    mains = [run for run in runs if run.directory.path in [RunDirectory(p).path for p in run_dirs]]
    lines = lines_of(runs)
    names = [run.directory.path.resolve().name for run in mains]
    facts = [mains[0].status.get("state")] if len(mains) == 1 else [f"{len(mains)} runs"]
    facts += [mains[0].directory.read_manifest().get("date")]
    tables = [("Methods", summary_table(lines), seeds_note(lines))]
    apart = differences_table(lines)
    if apart is not None:
        tables.append(("What differs", apart, ""))
    return Page(
        title=", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more",
        subtitle="  ·  ".join(str(fact) for fact in facts if fact),
        warnings=[line for run in mains for line in warnings_of(run, len(mains) > 1)],
        cards=cards_of(lines[0]),
        facts=facts_of(mains, lines),
        commands=commands_of(mains),
        tables=tables,
        figures=charts_of(lines),
        details=[each for run in runs[:MOST_DETAILS] for each in details_of(run)],
    )


def warnings_of(run: Run, named: bool) -> list[str]:
    """A line if the run did not come to its end, and one if it refused updates.

    Args:
        run: of the page.
        named: whether to say which run it is.
    """
    who = f"The run {run.directory.path.resolve().name}" if named else "The run"
    lines = []
    if run.status.get("state") in ("failed", "stopped", "interrupted"):
        lines.append(f"{who} {run.status['state']}: {run.status.get('message') or 'no message'}")
    refused = sum(len(record.get("quarantined") or ()) for record in run.records)
    if refused:
        lines.append(f"{who} refused updates: {refused}; rounds.jsonl names each and why")
    return lines


def commands_of(mains: Sequence[Run]) -> list[tuple[str, str]]:
    """What repeats each run, and what its command line was."""
    found = []
    for run in mains:
        name = f" {run.directory.path.resolve().name}" if len(mains) > 1 else ""
        said = said_of(run.directory) if len(mains) == 1 else ""
        found += [(f"Repeat{name} exactly", command_of(run.directory))]
        found += [(f"As{name} was called", said)]
    return [(what, command) for what, command in found if command]


def cards_of(line: Line) -> list[tuple[str, str]]:
    """The figures of the leading line."""
    found = line.figures()
    row = found["row"]
    over = f", mean of {len(line.runs)} seeds" if len(line.runs) > 1 else ""
    best = "" if row["best_round"] is None or over else f", round {row['best_round']}"
    prompts = found["prompts"]
    cards = [
        (percent(_middle(found["accuracy"])), f"test accuracy, last round{over}"),
        (percent(_middle(found["alone_accuracy"])), "the same, each image alone"),
        (percent(_middle(found["best_accuracy"])), f"test accuracy at best validation{best}"),
        ("-" if prompts is None else f"{prompts.mean:.4g}", "summarizing prompts kept"),
        (
            f"{short_number(found['mb_up'].mean)} MB",
            f"sent up, {short_number(found['mb_down'].mean)} MB down",
        ),
        (f"{found['seconds'].mean:.1f} s", "in rounds"),
    ]
    return [card for card in cards if card[0] != "-"]


def summary_table(lines: Sequence[Line]) -> Table:
    """A row for each line; columns in which no line says anything are left out."""
    rows = [_summary_row(line) for line in lines]
    said = [place for place in range(len(HEADS)) if any(row[place] != "-" for row in rows)]
    return Table(
        [HEADS[place] for place in said],
        [[row[place] for place in said] for row in rows],
        lead=True,
    )


def _summary_row(line: Line) -> list[str]:
    found = line.figures()
    row: Json = found["row"]
    seeds = ", ".join(str(seed) for seed in line.seeds if seed is not None) or "-"
    if len(line.runs) == 1:
        own = row["personalised"] or {}
        clients = f"{percent(own['mean'])} ({percent(own['worst_tenth'])})" if own else "-"
        return [line.name, seeds, *summary_cells(row)[1:], clients]
    shares = [_share_cell(found[key]) for key in ("accuracy", "alone_accuracy", "best_accuracy")]
    prompts = found["prompts"]
    return [
        line.name,
        seeds,
        *shares,
        "-" if prompts is None else f"{prompts.mean:.1f}",
        *(short_number(found[key].mean) for key in ("mb_up", "mb_down")),
        f"{found['seconds'].mean:.1f}",
        *("-", "-"),
    ]


def _share_cell(value: Mean | None) -> str:
    if value is None:
        return "-"
    if value.low is None or value.high is None:
        return f"{100 * value.mean:.1f}"
    # Broken before the bracket, if at all.
    return (
        f"{100 * value.mean:.1f} [{100 * value.low:.1f},\N{NO-BREAK SPACE}{100 * value.high:.1f}]"
    )


def _middle(value: Mean | None) -> float | None:
    return None if value is None else value.mean


def seeds_note(lines: Sequence[Line]) -> str:
    """What brackets mean, if there are some."""
    if all(len(line.runs) == 1 for line in lines):
        return ""
    return (
        "Runs that differ in the seed alone are one row: means, and for shares the 95 % interval "
        "of the mean (Student's t on the logit scale)."
    )


def differences_table(lines: Sequence[Line]) -> Table | None:
    """The keys of the configs in which lines differ; None if there are none."""
    apart = difference([line.config for line in lines])
    if not apart:
        return None
    rows = [
        [key, *("-" if value is None else str(value) for value in values)]
        for key, values in apart.items()
    ]
    return Table(["key", *(line.name for line in lines)], rows, words=True)


def details_of(run: Run) -> list[tuple[str, Table | None, str]]:
    """The rounds of a run, and its configuration."""
    columns: tuple[tuple[str, Callable[[Json], object]], ...] = (
        ("round", lambda record: record["round"]),
        ("test accuracy", lambda record: percent(record.get("accuracy"))),
        ("validation", lambda record: percent(record.get("validation_accuracy"))),
        ("loss", lambda record: number(record.get("loss"))),
        ("train loss", lambda record: number(record.get("train_loss"))),
        ("prompts", lambda record: record.get("num_prompts", "-")),
        ("clients", lambda record: len(record.get("clients") or ())),
        ("seconds", lambda record: short_number(wall_seconds(record))),
    )
    rows = [[str(read(record)) for _, read in columns] for record in run.records]
    rounds = Table([head for head, _ in columns], rows)
    config = run.directory.read_config() or "no config.yaml"
    return [(f"{run.name}: rounds", rounds, ""), (f"{run.name}: configuration", None, config)]
