"""The clients' devices of a run with virtual time."""

from __future__ import annotations

from fedprompt.client.cost import StepCost, prefix_operations
from fedprompt.client.recipe import LocalRecipe
from fedprompt.config import ExperimentConfig
from fedprompt.core.files import Json
from fedprompt.runs.federation import Federation
from fedprompt.server.virtual import VirtualSystem, Work, draw


def devices_of(config: ExperimentConfig, federation: Federation) -> VirtualSystem | None:
    """Speed and bandwidth of each client, and what its work takes; None without virtual time.

    Args:
        config: of the method.
        federation: data and backbone.

    Raises:
        ConfigError: a file has not one positive number for each client.
    """
    options = config.system
    if not options.enabled:
        return None
    return VirtualSystem(
        options,
        config.seed,
        work_of(config.recipe(federation.task.num_classes), federation),
        speed=draw("system.speed", options.speed, config.clients.count, config.seed),
        bandwidth=draw("system.bandwidth", options.bandwidth, config.clients.count, config.seed),
    )


def work_of(recipe: LocalRecipe, federation: Federation) -> Work:
    """What clients have to compute.

    Args:
        recipe: how they train.
        federation: data and backbone.
    """
    data, training = federation.data, recipe.training
    clients = range(training.population)
    return Work(
        examples=tuple(len(data.rows(client, training.pooled)) for client in clients),
        epochs=training.epochs if recipe.build_objective().trains else 0,
        step=StepCost(recipe, federation.backbone, data),
        prefix=prefix_operations(federation.backbone),
    )


def record_of(config: ExperimentConfig) -> Json:
    """What a run directory keeps of the devices: a number for each client, or null.

    Raises:
        ConfigError: a file has not one positive number for each client.
    """
    options, count, seed = config.system, config.clients.count, config.seed
    return {
        field: draw(f"system.{field}", getattr(options, field), count, seed)
        for field in ("speed", "bandwidth")
    }
