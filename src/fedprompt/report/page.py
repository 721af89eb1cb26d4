"""Figures, tables and a page about finished runs, made from their run directories alone."""

from __future__ import annotations

import base64
import html
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fedprompt.core.errors import ConfigError
from fedprompt.core.files import Json, atomic_write
from fedprompt.core.words import counted
from fedprompt.report.figures import draw_all, write_figures
from fedprompt.report.live import number, percent
from fedprompt.report.style import png_bytes
from fedprompt.report.table import short_number, summary_cells
from fedprompt.runs.summary import Run, read_runs, summary_row, wall_seconds

logger = logging.getLogger(__name__)


_STYLE_SHEET = """
:root { --ink: #1f2933; --muted: #66727f; --line: #e4e7eb; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.2rem 0 .8rem; font-size: 1.15rem; }
.muted { color: var(--muted); }
.cards { display: grid; gap: .8rem; margin-top: 1.4rem;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.card, figure, .table, details { background: #fff; border: 1px solid var(--line);
  border-radius: 10px; }
.card { padding: .8rem 1rem; } .card b { display: block; font-size: 1.45rem; }
.card span { color: var(--muted); font-size: .85rem; }
figure { margin: 0 0 1rem; padding: 1rem; } img { display: block; max-width: 100%; margin: 0 auto; }
figcaption { margin-top: .8rem; color: var(--muted); font-size: .85rem; }
.table { overflow-x: auto; } table { width: 100%; border-collapse: collapse; }
th, td { padding: .5rem .9rem; text-align: right; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
th { color: var(--muted); font-size: .8rem; font-weight: 600; }
td { border-top: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tbody.lead tr:first-child td { font-weight: 600; }
details { margin-bottom: .8rem; padding: .7rem 1rem; overflow-x: auto; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: .6rem 0 0; font: 13px/1.45 ui-monospace, monospace; overflow-x: auto; }
.warning { border-left: 4px solid #d55e00; padding: .5rem 1rem; margin-top: 1rem;
  background: #fff; }
"""

_CAPTIONS = {
    "accuracy": "Accuracy of the global model over rounds, by method.",
    "prompts": "Number of summarizing prompts that the server holds, by method.",
    "aggregation": "What the aggregation did with the prompts in each round.",
    "clients": "Training samples of each class that each client holds.",
    "seconds": "Seconds that pass in each round, by what they are spent on.",
}
_HOW_TO_READ = {
    "aggregation": "Kept and born prompts are what the server holds next, pruned ones (below zero) "
    "are gone, merges happened on the way; a matched distance near 1 is what the noise explains, "
    "an inclusion entropy near 0 means that nearly all clients or nearly none use a prompt.",
}


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
        output: the page; `report.html` of the first run by default.

    Returns:
        The page.

    Raises:
        ConfigError: a folder is no run directory, or the page cannot be written.
    """
    runs = read_runs(run_dirs)
    page = output or runs[0].directory.report_path
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        if len(run_dirs) == 1:
            paths = write_figures(runs, runs[0].directory)
            pictures = {name: path.read_bytes() for name, path in paths.items()}
        else:
            pictures = {name: png_bytes(figure) for name, figure in draw_all(runs).items()}
        atomic_write(page, _page(runs, pictures))
    except OSError as error:
        raise ConfigError(
            f"report {page}: expected a file that can be written, got '{error.strerror or error}'; "
            "choose another output"
        ) from error
    return page


def _page(runs: Sequence[Run], pictures: Mapping[str, bytes]) -> str:
    main = runs[0]
    name = main.directory.path.resolve().name
    manifest = main.directory.read_manifest()
    versions = manifest.get("packages")
    version = versions.get("fedprompt") if isinstance(versions, dict) else None
    facts = [main.status.get("state"), manifest.get("date"), version and f"fedprompt {version}"]
    sections = [
        f"<h1>{_escape(name)}</h1>",
        f"<div class=muted>{_escape('  ·  '.join(str(fact) for fact in facts if fact))}</div>",
        _warning_html(main),
        _cards_html(summary_row(main)),
        "<h2>Methods</h2>",
        _summary_html(runs),
        "<h2>Figures</h2>",
        *(_picture_html(key, data) for key, data in pictures.items()),
        "<h2>Details</h2>",
        *map(_details_html, runs),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is loaded and nothing runs, even if a name were to slip through unescaped.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{_escape(name)} · fedprompt</title>\n<style>{_STYLE_SHEET}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(filter(None, sections))}\n</main>\n</body>\n</html>\n"
    )


def _escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def _warning_html(run: Run) -> str:
    """One line when the run did not come to its end, or refused updates."""
    lines = []
    if run.status.get("state") in ("failed", "stopped", "interrupted"):
        lines.append(f"The run {run.status['state']}: {run.status.get('message') or 'no message'}")
    refused = sum(len(record.get("quarantined") or ()) for record in run.records)
    if refused:
        lines.append(
            f"refused: {counted(refused, 'client update')}; rounds.jsonl names each and why"
        )
    return "".join(f'<div class="warning">{_escape(line)}</div>' for line in lines)


def _cards_html(row: Json) -> str:
    best = "" if row["best_round"] is None else f", round {row['best_round']}"
    cards = (
        (percent(row["accuracy"]), "test accuracy, last round"),
        (percent(row["alone_accuracy"]), "the same, each image alone"),
        (percent(row["best_accuracy"]), f"test accuracy at best validation{best}"),
        ("-" if row["prompts"] is None else row["prompts"], "summarizing prompts kept"),
        (f"{short_number(row['mb_up'])} MB", f"sent up, {short_number(row['mb_down'])} MB down"),
        (f"{row['seconds']:.1f} s", "in rounds"),
    )
    inner = "".join(
        f'<div class="card"><b>{_escape(value)}</b><span>{_escape(what)}</span></div>'
        for value, what in cards
    )
    return f'<div class="cards">{inner}</div>'


def _summary_html(runs: Sequence[Run]) -> str:
    heads = (
        *("method", "test accuracy (%)", "each image alone (%)"),
        *("at best validation (%, round)", "prompts kept"),
        *("MB up", "MB down", "seconds", "state SHA-256", "clients' own models (worst tenth)"),
    )
    return _table_html(heads, [_html_cells(summary_row(run)) for run in runs], lead=True)


def _html_cells(row: Json) -> tuple[str, ...]:
    own = row["personalised"] or {}
    clients = f"{percent(own.get('mean'))} ({percent(own.get('worst_tenth'))})" if own else "-"
    return (*summary_cells(row), clients)


def _table_html(heads: Sequence[str], rows: Iterable[Sequence[object]], lead: bool = False) -> str:
    def line(tag: str, cells: Iterable[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{_escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line("td", cells) for cells in rows)
    kind = ' class="lead"' if lead else ""
    return (
        f'<div class="table"><table><thead>{line("th", heads)}</thead>\n'
        f"<tbody{kind}>{body}</tbody></table></div>"
    )


def _picture_html(name: str, data: bytes) -> str:
    encoded = base64.b64encode(data).decode("ascii")
    caption = _escape(_CAPTIONS.get(name, name))
    reading = _HOW_TO_READ.get(name)
    below = f"<figcaption>{_escape(reading)}</figcaption>" if reading else ""
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{encoded}">{below}</figure>'


def _details_html(run: Run) -> str:
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
    rows = [[read(record) for _, read in columns] for record in run.records]
    rounds = _table_html([head for head, _ in columns], rows)
    config = run.directory.read_config()
    shown = f"<pre>{_escape(config)}</pre>" if config else "<p class=muted>no config.yaml</p>"
    name = _escape(run.name)
    return (
        f"<details><summary>{name}: rounds</summary>{rounds}</details>\n"
        f"<details><summary>{name}: configuration</summary>{shown}</details>"
    )
