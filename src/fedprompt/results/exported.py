"""The folder that `fedprompt export` writes: its files, and the model that is in it.

OUT/
  README.md              the model card
  model.json             whose model it is, how its backbone is made, checksums
  model.safetensors      prompts, keys, head, adaptation, maps of queries
  backbone.safetensors   the frozen network
  model.onnx             the graph, if there is one
  config.yaml, manifest.json, task.json, plugins/   as in the run directory

Nothing else is needed: no run, no data, no cache and no network.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.errors import CheckpointError, ConfigError
from fedprompt.core.files import Json, atomic_write
from fedprompt.core.types import Broadcast, Parts
from fedprompt.data.prefix.whitening import Whitening
from fedprompt.data.reading.packages import sha256_of
from fedprompt.models.backbone import Backbone, load_backbone
from fedprompt.models.backbone_file import loaded_from, save_backbone
from fedprompt.models.options import ModelOptions
from fedprompt.results.model import PromptedModel
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.plugins import check_kept
from fedprompt.runs.task_card import whitening_arrays, whitenings_from
from fedprompt.server.evaluate import Model

FORMAT_VERSION = 1
CARD, RECORD, GRAPH = "README.md", "model.json", "model.onnx"
MODEL, BACKBONE = "model.safetensors", "backbone.safetensors"


def is_export(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder was written by `fedprompt export`."""
    return all((Path(folder) / name).is_file() for name in (RECORD, MODEL))


def load_export(
    folder: Path, client: int | None, method: str | None, device: str | torch.device
) -> PromptedModel:
    """The model of an exported folder.

    Args:
        folder: written by `fedprompt export`.
        client: None, or the one whose model it is.
        method: None, or the one that it is of.
        device: where to compute.

    Raises:
        ConfigError: the folder has the model of another client or method.
        CheckpointError: a file is damaged.
    """
    record = read_record(folder)
    for name, asked in (("client", client), ("method", method)):
        if asked not in (None, record[name]):
            kept = "the global model" if record[name] is None else f"that of {name} {record[name]}"
            raise ConfigError(
                f"{name}: expected none, as the exported folder {folder} has one model, {kept}, "
                f"got {asked}; export the other one from its run"
            )
    directory = RunDirectory(folder)
    check_kept(directory)
    config, task = compose(folder / "config.yaml", ["runtime=serial"]), directory.read_task()
    options = loaded_from(folder / BACKBONE, ModelOptions(**record["backbone"]))
    backbone = load_backbone(options, config.cut).to(device)
    directory.check_backbone(backbone.checksum())
    tensors = _read_tensors(folder / MODEL)
    return prompted_model(
        config, backbone, task, _model_of(tensors["model"]), _whitening_of(tensors["whitening"])
    )


def prompted_model(
    config: ExperimentConfig,
    backbone: Backbone,
    task: Json,
    model: Model,
    whitening: Mapping[str, Whitening],
) -> PromptedModel:
    """The model of a run or of an exported folder.

    Args:
        config: of the run's method.
        backbone: on its device.
        task: content of `task.json`.
        model: the tensors.
        whitening: maps of queries that the run has.
    """
    names = tuple(task["class_names"])
    return PromptedModel(
        backbone,
        config.recipe(len(names)),
        model,
        names,
        task["domains"],
        task["side"] or backbone.transform.shorter_side,
        task["background"],
        whitening if config.prompts.selects_by_whitened else None,
    )


def write_model(
    folder: Path, model: PromptedModel, options: ModelOptions, record: Mapping[str, object]
) -> None:
    """Write the tensors of a model, and `model.json`.

    Args:
        folder: that exists.
        model: of a run.
        options: of its backbone.
        record: what else to note.
    """
    from safetensors.torch import save

    made = save_backbone(model.backbone, options, folder / BACKBONE)
    arrays = whitening_arrays(model.whitening)
    flat = {f"model/{path}": value for path, value in _tensors_of(model.model).items()}
    flat |= {f"whitening/{path}": torch.from_numpy(value) for path, value in arrays.items()}
    kept = {path: value.detach().cpu().clone().contiguous() for path, value in flat.items()}
    atomic_write(folder / MODEL, save(kept))
    names = (MODEL, BACKBONE)
    content = {
        "format": FORMAT_VERSION,
        **record,
        "backbone": dataclasses.asdict(loaded_from(Path(BACKBONE), made)),
        "sha256": {name: sha256_of(folder / name) for name in names},
    }
    atomic_write(folder / RECORD, json.dumps(content, indent=2) + "\n")


def read_record(folder: Path) -> Json:
    """Content of `model.json`, after its checksums.

    Raises:
        CheckpointError: it is damaged, or of another version, or a file is not the one it names.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        version, digests = record["format"], dict(record["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / RECORD}: expected what 'fedprompt export' writes, got something else "
            f"({type(error).__name__}); copy the folder again"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / RECORD}: expected format {FORMAT_VERSION}, got {version}; load it with the "
            "version of fedprompt that wrote it, which manifest.json names"
        )
    for name, expected in digests.items():
        found = sha256_of(folder / name) if (folder / name).is_file() else "no file"
        if found != expected:
            raise CheckpointError(
                f"{folder / name}: expected sha256 {expected[:12]}, got {found[:12]}; copy the "
                "folder again"
            )
    return dict(record)


def _tensors_of(model: Model) -> dict[str, Tensor]:
    """A model's tensors: `keys` as they were broadcast, `addresses`, and its parts by path."""
    parts = {f"parts/{path}": value for path, value in model.parts.tensors().items()}
    return {"keys": model.broadcast.keys, "addresses": model.addresses, **parts}


def _model_of(flat: Mapping[str, Tensor]) -> Model:
    """Inverse of `_tensors_of`."""
    parts = Parts.from_tensors(_below("parts", flat))
    prompts = flat["keys"].new_zeros(0, 0) if parts.prompts is None else parts.prompts
    shared = dataclasses.replace(parts, prompts=None)
    return Model(Broadcast(prompts, flat["keys"], shared), keys=flat["addresses"])


def _whitening_of(flat: Mapping[str, Tensor]) -> dict[str, Whitening]:
    return whitenings_from({path: value.numpy() for path, value in flat.items()})


def _read_tensors(path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of `model` and of `whitening`, by path."""
    from safetensors.torch import load_file

    flat = load_file(path)
    return {field: _below(field, flat) for field in ("model", "whitening")}


def _below(field: str, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose path begins with a field, by the rest of the path."""
    split = [(path.partition("/"), value) for path, value in flat.items()]
    return {rest: value for (first, _, rest), value in split if first == field}
