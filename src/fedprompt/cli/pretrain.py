"""`fedprompt pretrain`: train the embedded backbone again."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:  # take seconds to import
    from rich.progress import TaskID

    from fedprompt.models.nano.recipe import Progress

# ---------------------------------------------------------------- command


@click.command("pretrain")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("weights"),
    show_default=True,
    help="Folder for the weights and their card.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of masks, colours and weights."
)
@click.option("--images", type=click.IntRange(min=1), help="Masks to draw.  [default: 60000]")
@click.option(
    "--presentations",
    type=click.IntRange(min=1),
    help="Images to train on, coloured anew each time.  [default: 500000, promptable 160000]",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="CPU threads of torch.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to train; bits differ between them.",
)
@click.option(
    "--promptable/--plain",
    default=False,
    show_default=True,
    help="Continue with task tokens, or train plain weights from scratch.",
)
@click.option(
    "--init",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Weights to continue from.  [default with --promptable: OUTPUT/nano.safetensors, "
    "else the embedded ones]",
)
@click.option(
    "--probe/--no-probe",
    "probes",
    default=True,
    show_default=True,
    help="Add linear-probe accuracies to the card (about a minute or two).",
)
def pretrain_command(
    output: Path,
    seed: int,
    images: int | None,
    presentations: int | None,
    threads: int,
    device: str,
    promptable: bool,
    init: Path | None,
    probes: bool,
) -> None:
    """Train a nano ViT on procedurally drawn images; no network, no data files."""
    from fedprompt.models.nano import network as nano
    from fedprompt.models.nano.pretrain import pretrain
    from fedprompt.models.nano.probe import add_probes
    from fedprompt.models.nano.recipe import PLAIN, PROMPTABLE

    base = PROMPTABLE if promptable else PLAIN
    config = dataclasses.replace(
        base,
        seed=seed,
        threads=threads,
        device=device,
        images=images or base.images,
        presentations=presentations or base.presentations,
    )
    if promptable and init is None:
        init = output / "nano.safetensors"
        if not init.is_file():
            init = nano.weights_path("nano")
    with _progress_bar() as report:
        path = pretrain(config, output, report, init)
        card = (
            add_probes(path, report)
            if probes
            else json.loads(path.with_suffix(".json").read_text())
        )
    click.echo(f"{path}  {card['presentations']} presentations in {card['seconds']:.0f} s")
    for variant, scores in card.get("linear_probe", {}).get("accuracy", {}).items():
        line = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        click.echo(f"linear probe, {variant}: {line}")


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description:6}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
    )
    last: dict[str, int] = {}

    def log(stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        part = 20 * done // total
        if part > last.get(stage, 0):
            last[stage] = part
            click.echo(f"{stage} {done}/{total} {dict(metrics) if metrics else ''}")

    if not sys.stdout.isatty():
        yield log
        return
    with rich_progress.Progress(*columns) as bar:
        rows: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
            if stage not in rows:
                rows[stage] = bar.add_task(stage, total=total, note="")
            note = (
                f"loss {metrics['loss']:.3f} accuracy {metrics['accuracy']:.3f}" if metrics else ""
            )
            bar.update(rows[stage], completed=done, total=total, note=note)

        yield report
