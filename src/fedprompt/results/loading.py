"""`fedprompt.load`: a run directory, or what was exported of one, as a model. Needs neither the
run's data nor Ray.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fedprompt.client.recipe import has_global_model
from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.errors import CheckpointError, ConfigError
from fedprompt.core.files import Json
from fedprompt.core.types import ServerState
from fedprompt.models.backbone import load_backbone
from fedprompt.results.exported import is_export, load_export, prompted_model
from fedprompt.results.model import PromptedModel
from fedprompt.runs.checkpoint import load_latest
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.plugins import check_kept
from fedprompt.runs.task_card import whitenings_from
from fedprompt.server.evaluate import Model
from fedprompt.server.round import RoundSettings, broadcast_of, make_job


def load(
    run_dir: str | os.PathLike[str],
    *,
    client: int | None = None,
    method: str | None = None,
    device: str | torch.device = "cpu",
) -> PromptedModel:
    """The model of a run, as its last finished round left it.

    Args:
        run_dir: directory of a run, finished or not; that of a comparison is one, too. Or a folder
            that `fedprompt export` wrote.
        client: the model of this client, with what it keeps for itself; None for the global model.
        method: a method that the run is compared with; None for the run's own.
        device: where to compute.

    Raises:
        ConfigError: no run, no such method or client, no finished round, or no global model.
        CheckpointError: the backbone's weights are not those of the run, or a file is damaged.
    """
    if is_export(run_dir):
        return load_export(Path(run_dir), client, method, device)
    directory = directory_of(run_dir, method)
    if directory.last_round() is None:
        raise ConfigError(
            f"{directory.path}: expected a run with a finished round, got one that has none; "
            f"continue it with 'fedprompt run --resume {directory.path}'"
        )
    check_kept(directory)
    config = compose(directory.path / "config.yaml", ["runtime=serial"])
    state = load_latest(directory.state_folder).state
    card = task_of(directory)
    backbone = load_backbone(config.model, config.cut)
    directory.check_backbone(backbone.checksum())
    model = model_of(config, state, len(card["class_names"]), client)
    whitening = whitenings_from(directory.read_whitening())
    return prompted_model(config, backbone.to(device), card, model, whitening)


def model_of(
    config: ExperimentConfig, state: ServerState, num_classes: int, client: int | None
) -> Model:
    """The tensors of the global model, or of one client's.

    Args:
        config: of the run.
        state: the server's.
        num_classes: over all domains.
        client: whose; None for the global model.

    Raises:
        ConfigError: there is no such client, or no global model.
    """
    recipe, count = config.recipe(num_classes), config.clients.count
    settings = RoundSettings(
        config.seed, config.rounds, config.eval_every, recipe, config.build_generator()
    )
    if client is None:
        if not has_global_model(config.prompts, config.head):
            raise ConfigError(
                f"client: expected a number from 0 to {count - 1}, as every client of this run has "
                "a model of its own, got none; pass the client whose model you want"
            )
        return Model(state.broadcast(), keys=state.keys)
    if not 0 <= client < count:
        raise ConfigError(f"client: expected a number from 0 to {count - 1}, got {client}")
    job = make_job(state, settings, client, broadcast_of(state, settings))
    return Model(job.broadcast, job.state.kept.trained(), state.keys)


def task_of(directory: RunDirectory) -> Json:
    """Content of `task.json`; of a run that has none, what is known of its classes.

    Raises:
        CheckpointError: nothing is known of them.
    """
    card = directory.read_task()
    if card:
        return card
    partition = directory.read_partition()
    if partition is None:
        raise CheckpointError(
            f"{directory.path}: expected task.json or partition.json, which name the classes, got "
            "neither; copy the whole run directory"
        )
    names = list(partition.class_names)
    return {"name": None, "class_names": names, "domains": {}, "side": None, "background": None}


def config_of(run_dir: str | os.PathLike[str], method: str | None) -> Path:
    """`config.yaml` of a run, of a method that it is compared with, or of an exported folder.

    Raises:
        ConfigError: there is no such thing.
    """
    folder = Path(run_dir) if is_export(run_dir) else directory_of(run_dir, method).path
    return folder / "config.yaml"


def directory_of(run_dir: str | os.PathLike[str], method: str | None) -> RunDirectory:
    """The directory of a run, or of a method that it is compared with.

    Raises:
        ConfigError: no run, or no such method.
    """
    directory = RunDirectory.open(run_dir)
    if method is None:
        return directory
    known = [run.path.name for run in directory.comparisons()]
    if method not in known:
        raise ConfigError(
            f"method: expected one of {', '.join(known) or 'no comparison'} of {directory.path}, "
            f"got '{method}'"
        )
    return directory.comparison(method)
