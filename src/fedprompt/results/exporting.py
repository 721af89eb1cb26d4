"""`fedprompt export`: the model of a run as a folder that needs nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.errors import ConfigError, FedpromptError
from fedprompt.core.files import Json, atomic_write
from fedprompt.core.seeding import numpy_generator
from fedprompt.data.task import datasets
from fedprompt.results.card import Exported, model_card
from fedprompt.results.exported import CARD, GRAPH, is_export, load_export, write_model
from fedprompt.results.graph import check_packages, write_onnx
from fedprompt.results.images import Pixels, read
from fedprompt.results.loading import directory_of, load, task_of
from fedprompt.results.model import PromptedModel
from fedprompt.runs.checkpoint import load_latest
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.summary import read_runs

CHECKED = 10
"""Images that the graph, and the exported folder, are compared with the model on."""


def export(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    client: int | None = None,
    method: str | None = None,
    onnx: bool = True,
) -> Exported:
    """Write the model of a run, with a model card, into a folder of its own.

    The folder appears as a whole or not at all. `fedprompt.load(out)` is the run's model, bit by
    bit: that is checked before the folder appears.

    Args:
        run_dir: directory of a run with a finished round, or of a comparison.
        out: a folder that does not exist, or is empty.
        client: the model of this client; None for the global model.
        method: a method that the run is compared with; None for the run's own.
        onnx: whether to write the graph, too; needs the extra `export`.

    Raises:
        ConfigError: `out` cannot take the model, a package is missing, there is no such model, or
            it has no graph.
        CheckpointError: a file of the run is damaged.
    """
    target = Path(out).resolve()
    _check_target(target)
    if onnx:
        check_packages()
    if is_export(run_dir):
        raise ConfigError(f"{run_dir}: expected a run directory, got an exported folder; copy it")
    directory = directory_of(run_dir, method)
    model = load(directory.path, client=client)
    config = compose(directory.path / "config.yaml")
    [run, *_] = read_runs([directory.path])
    finished = load_latest(directory.state_folder).state.round_index
    records = tuple(record for record in run.records if record["round"] <= finished)
    run = dataclasses.replace(run, records=records)
    images, source = _some_images(config, model, from_data=onnx)
    try:
        with _appearing(target) as folder:
            _copy_header(directory, folder, model)
            record = {"method": run.name, "client": client, "round": finished}
            write_model(folder, model, config.model, record)
            difference = write_onnx(model, folder / GRAPH, images) if onnx else None
            _check_same(model, load_export(folder, None, None, "cpu"), images)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            made = Exported(target, client, finished, size, difference, source)
            atomic_write(folder / CARD, model_card(made, config, model, run))
    except OSError as error:
        raise ConfigError(
            f"{target}: expected a folder that can be written, got "
            f"'{error.strerror or error}'; choose another one"
        ) from error
    return made


def _check_target(target: Path) -> None:
    """Refuse a place that is taken.

    Raises:
        ConfigError: says by what.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: expected a new or an empty folder, got a file")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(
            f"{target}: expected a new or an empty folder, got one with files; choose another one"
        )
    if target == Path.cwd():
        raise ConfigError(f"{target}: expected another folder than the current one; name a new one")


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` if nothing fails, and is removed otherwise."""
    ancestor = next(each for each in target.parents if each.is_dir())
    folder = ancestor / f".{target.name}.{os.getpid()}.tmp"
    folder.mkdir()
    try:
        yield folder
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)  # takes the place of an empty folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _copy_header(directory: RunDirectory, folder: Path, model: PromptedModel) -> None:
    """Config, manifest, plug-ins and task of the run."""
    for name in ("config.yaml", "manifest.json"):
        shutil.copyfile(directory.path / name, folder / name)
    if directory.plugins_folder.is_dir():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(directory.plugins_folder, folder / "plugins", ignore=ignored)
    task: Json = {**task_of(directory), "side": model.side}
    atomic_write(folder / "task.json", json.dumps(task, indent=2) + "\n")


def _some_images(
    config: ExperimentConfig, model: PromptedModel, from_data: bool
) -> tuple[Pixels, str]:
    """Images to check on, and what they are: of the test split if the data are there."""
    generator = numpy_generator(0, "export")
    if from_data:
        with contextlib.suppress(FedpromptError, OSError):
            task = datasets.create(config.data.name, **dataclasses.asdict(config.data.options))
            rows = generator.choice(len(task.test), min(CHECKED, len(task.test)), replace=False)
            if len(rows) > 1:
                pixels, _ = read(task.test.images[np.sort(rows)], model.side, model.background)
                return pixels, f"{len(rows)} images of the test split"
    shape = (CHECKED, model.side, model.side, 3)
    pixels = generator.integers(0, 256, shape, dtype=np.uint8)
    return pixels, f"{CHECKED} images of random pixels, as the data are not there"


def _check_same(model: PromptedModel, again: PromptedModel, images: Pixels) -> None:
    """Refuse a folder whose model is not the run's.

    Raises:
        ConfigError: their logits differ.
    """
    given = torch.from_numpy(images)
    if not torch.equal(model(given), again(given)):
        raise ConfigError(
            "export: expected the exported model to give the bits of the run's model, got others; "
            "nothing was written. Please report this"
        )
