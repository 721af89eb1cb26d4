"""`fedprompt predict`, `evaluate` and `export`: a run's model on images, on other data, as a
folder.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedprompt.cli import completion
from fedprompt.core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from fedprompt.results.evaluation import OtherData
    from fedprompt.results.model import Predictions, PromptedModel

RUN = click.argument(
    "run", type=click.Path(path_type=Path), metavar="RUN_DIR", shell_complete=completion.runs
)
CLIENT = click.option("--client", type=int, help="The model of this client.  [default: the global]")
METHOD = click.option(
    "--method",
    shell_complete=completion.compared,
    help="A method that the run is compared with.",
)
SHOWN = 50
"""Lines of a table of predictions; a file has all."""


def _output(help_text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option `--output`."""
    kind = click.Path(path_type=Path, dir_okay=False)
    return click.option("--output", type=kind, metavar="FILE", help=help_text)


@click.command()
@RUN
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@CLIENT
@METHOD
@click.option("--batch", default=1, show_default=True, help="Images that choose prompts together.")
@click.option("--domain", help="The domain that all images are of, if it is known.")
@_output("Write all probabilities, too: FILE.csv or FILE.json.")
def predict(
    run: Path,
    images: tuple[Path, ...],
    client: int | None,
    method: str | None,
    batch: int,
    domain: str | None,
    output: Path | None,
) -> None:
    """Say what IMAGES show, files or folders, by the model of a run.

    An image that does not decode is named and left out, and the exit code is then 1.
    """
    write = None if output is None else _writer(output)
    from fedprompt.results.images import files_of, readable
    from fedprompt.results.loading import config_of, load

    config_of(run, method)  # refused before any image is looked at
    files = files_of(images)
    model = load(run, client=client, method=method)
    good, faults = readable(files, model.side, model.background)
    for fault in faults:
        click.echo(f"fedprompt: {fault}", err=True)
    if not good:
        raise InputError(f"images: expected at least one that decodes, got none of {len(files)}")
    found = model.predict([pixels for _, pixels in good], batch=batch, domain=domain)
    found = dataclasses.replace(found, names=tuple(str(file) for file, _ in good))
    _show(predictions_table(found))
    if len(found) > SHOWN:
        more = f"{len(found) - SHOWN} more"
        click.echo(more if output else f"{more}; --output FILE.csv has them all")
    if output is not None and write is not None:
        _save(output, write(found))
    if faults:
        raise SystemExit(1)


@click.command()
@RUN
@click.argument(
    "overrides",
    nargs=-1,
    metavar="[data=NAME] [data.KEY=VALUE]...",
    shell_complete=completion.data_words,
)
@CLIENT
@METHOD
@click.option(
    "--split",
    type=click.Choice(("test", "validation", "train", "all")),
    help="Which images.  [default: test, and all of other data]",
)
@_output("Write the figures, too: FILE.json.")
def evaluate(
    run: Path,
    overrides: tuple[str, ...],
    client: int | None,
    method: str | None,
    split: str | None,
    output: Path | None,
) -> None:
    """Measure the model of a run on its own data or on others.

    `fedprompt evaluate RUN_DIR data=imagefolder data.root=FOLDER` reads another folder. Its classes
    are known by their names, its domains, too; of a new domain all classes are possible.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if key.split(".")[0] != "data":
            raise ConfigError(f"evaluate: expected data=NAME or data.KEY=VALUE, got '{override}'")
    if output is not None and output.suffix != ".json":
        raise ConfigError(f"--output: expected FILE.json, got {output}")
    from fedprompt.config import compose
    from fedprompt.data.task import datasets
    from fedprompt.results.evaluation import evaluate_on
    from fedprompt.results.loading import config_of, load

    model = load(run, client=client, method=method)
    config = compose(config_of(run, method), list(overrides))
    task = datasets.create(config.data.name, **dataclasses.asdict(config.data.options))
    found = evaluate_on(model, task, split or ("all" if overrides else "test"))
    _show(figures_table(found, model))
    if output is not None:
        _save(output, json.dumps(found.json(), indent=2) + "\n")


@click.command()
@RUN
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT")
@CLIENT
@METHOD
@click.option(
    "--onnx/--no-onnx",
    default=True,
    show_default=True,
    help="Write the model as an ONNX graph, too.",
)
def export(run: Path, out: Path, client: int | None, method: str | None, onnx: bool) -> None:
    """Write the model of a run into the folder OUT, which needs nothing else to be used.

    OUT has the weights as safetensors, the config, the task, a model card (README.md) and
    model.onnx. The graph is compared with the model by ONNX Runtime first.
    """
    from fedprompt.results import export as write

    made = write(run, out, client=client, method=method, onnx=onnx)
    if made.difference is not None:
        click.echo(
            f"model.onnx: largest difference of a logit {made.difference:.1e} on {made.checked_on}"
        )
    click.echo(f"exported: {made.folder} ({made.size / 1e6:.1f} MB); its README.md is the card")


def predictions_table(found: Predictions) -> Table:
    """The first predictions: image, class, probability, the next best, prompts."""
    table = Table("image", "class", "probability", "next", "prompts", box=None, pad_edge=False)
    for row in found.rows()[:SHOWN]:
        ranked = sorted(row["probabilities"].items(), key=lambda each: -each[1])
        after = f"{ranked[1][0]} {ranked[1][1]:.3f}" if len(ranked) > 1 else ""
        numbers = " ".join(map(str, row["prompts"]))
        cells = (row["image"], row["class"], f"{row['probability']:.3f}", after, numbers)
        table.add_row(*map(Text, cells))  # names may hold what rich would take for markup
    return table


def figures_table(found: OtherData, model: PromptedModel) -> Table:
    """Accuracies, overall and of each domain."""
    together = model.recipe.prompts.eval_batch
    which = "all images" if found.split == "all" else f"the {found.split} split"
    title = f"{found.name}, {which}: accuracy (%)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("domain", "images", f"{together} together", "each alone"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for name, figures in {**found.domains, "all": found.overall}.items():
        new = "" if found.known.get(name, True) else " (new)"
        shares = (f"{100 * share:.1f}" for share in (figures.together, figures.alone))
        table.add_row(Text(name + new), str(figures.images), *shares)
    return table


def _show(table: Table) -> None:
    """Print a table as wide as it wants to be where nobody looks at a terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = 240
    console.print(table)


def _writer(output: Path) -> Callable[[Predictions], str]:
    """How a file of this name is written.

    Raises:
        ConfigError: neither CSV nor JSON.
    """
    kinds = {".csv": _as_csv, ".json": _as_json}
    if output.suffix not in kinds:
        raise ConfigError(f"--output: expected FILE.csv or FILE.json, got {output}")
    return kinds[output.suffix]


def _as_csv(found: Predictions) -> str:
    """A line for each image, with a column for each class."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "class", "probability", "prompts", *found.class_names])
    for row in found.rows():
        prompts: Sequence[int] = row["prompts"]
        first = [row["image"], row["class"], row["probability"], " ".join(map(str, prompts))]
        rows.writerow([*first, *row["probabilities"].values()])
    return text.getvalue()


def _as_json(found: Predictions) -> str:
    """An object for each image."""
    return json.dumps(found.rows(), indent=2) + "\n"


def _save(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        ConfigError: it cannot be written.
    """
    from fedprompt.core.files import atomic_write

    try:
        atomic_write(path, text)
    except OSError as error:
        raise ConfigError(
            f"--output {path}: expected a file that can be written, got '{error.strerror or error}'"
        ) from error
    click.echo(f"written: {path}")
