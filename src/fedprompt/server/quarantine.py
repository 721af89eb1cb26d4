"""What a client may send: one description of an update, and the check against it.

An update that is not as described is left out of the round, with the first reason that was found.
Its client keeps the state of its last good update.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.checks import is_integer
from fedprompt.core.types import (
    SETS,
    ClientJob,
    ClientState,
    ClientUpdate,
    Parts,
    ServerState,
)
from fedprompt.data.prefix.spread import factor_size
from fedprompt.objectives import Objective, Teacher

logger = logging.getLogger(__name__)

TYPES = {
    **dict.fromkeys(SETS, Tensor),
    "shared": Parts,
    "state": ClientState,
    "metrics": Mapping,
}
"""The fields of an update that are no numbers."""
MEASURED = ("steps", "seconds", "pack")
"""Metrics of every client."""
OF_TRAINING = ("loss", "accuracy")
"""Metrics of a client that trained."""


@dataclasses.dataclass(frozen=True)
class Like:
    """What is expected of a tensor; all its values are to be finite."""

    shape: tuple[int | None, ...]
    """None: the number of prompts that the client returns."""
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        """What is like a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the server expects of one client's update."""

    client_id: int
    round_index: int
    rows: int
    """Prompts that were broadcast; each origin is one of them."""
    tensors: Mapping[str, Like]
    """By path in `ClientUpdate.tensors`: these and no others."""
    metrics: tuple[str, ...]
    """Names of the metrics, all of them finite; there may be more, finite ones."""
    spread: int = 0
    """q, if the client is to tell how its queries spread; else 0."""
    longest: float = 1.0
    """Most that the squared length of a query can be."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An update that is left out."""

    client: int
    reason: str


def expected_of(
    job: ClientJob, objective: Objective, recipe: LocalRecipe, state: ServerState
) -> Expected:
    """The description of the update that answers a job.

    Args:
        job: what the client was sent.
        objective: says what clients send and keep.
        recipe: says what is personal.
        state: the server's, from which the job was made.
    """
    prompts, keys = job.broadcast.prompts, state.keys
    personal = state.fixed.kept.pick(recipe.personal)
    kept = dataclasses.replace(personal, objective=objective.keeps(Teacher.before(job)))
    alike = {
        **{f"shared/{path}": x for path, x in objective.reply(state.shared).tensors().items()},
        **{f"state/{path}": x for path, x in kept.tensors().items()},
    }
    tensors = {
        "prompts": Like((None, prompts.shape[1]), prompts.dtype),
        "keys": Like((None, keys.shape[1]), keys.dtype),
        "origins": Like((None,), torch.int64),
        "use_counts": Like((None,), torch.int64),
        **{path: Like.of(tensor) for path, tensor in alike.items()},
    }
    metrics = (*MEASURED, *(OF_TRAINING if objective.trains else ()))
    return Expected(
        job.client_id,
        job.round_index,
        len(prompts),
        tensors,
        metrics,
        spread=keys.shape[1] if job.tells_spread else 0,
        longest=2.0 if recipe.prompts.query == "both" else 1.0,  # each kind has unit norm
    )


def quarantine(
    updates: Sequence[ClientUpdate], expected: Sequence[Expected]
) -> tuple[list[ClientUpdate], list[Refusal]]:
    """Part the updates into usable ones and refused ones.

    Args:
        updates: what came back.
        expected: one description for each client of the cohort.
    """
    waiting = {each.client_id: each for each in expected}
    cohort = sorted(waiting)
    good: list[ClientUpdate] = []
    refused: list[Refusal] = []
    for update in updates:
        description = waiting.pop(update.client_id, None)
        if description is not None:
            reason = fault(update, description)
        elif update.client_id in cohort:
            reason = "expected one update of each client, got another one"
        else:
            reason = f"expected a client of the cohort {cohort}, got client {update.client_id}"
        if reason is None:
            good.append(update)
        else:
            logger.warning("update of client %s is left out: %s", update.client_id, reason)
            refused.append(Refusal(update.client_id, reason))
    return good, refused


def fault(update: ClientUpdate, expected: Expected) -> str | None:
    """Why an update must not be used, or None if it is as expected."""
    unreadable = fault_of_types(update)
    if unreadable is not None:
        return unreadable
    if update.round_index != expected.round_index:
        return f"expected an update of round {expected.round_index}, got {update.round_index}"
    if not is_integer(update.num_examples) or update.num_examples < 1:
        return f"expected num_examples >= 1, got {update.num_examples}"
    tensors = expected.tensors
    if expected.spread:
        size = factor_size(update.num_examples, expected.spread)
        tensors = {**tensors, "spread": Like((size,), torch.float32)}
    return (
        _fault_of_tensors(update.tensors(), tensors, len(update.prompts))
        or _fault_of_spread(update, expected.longest)
        or _fault_of_rows(update, expected.rows)
        or _fault_of_metrics(update.metrics, expected.metrics)
    )


def fault_of_types(update: ClientUpdate) -> str | None:
    """Why an update cannot even be read, or None."""
    for field, kind in TYPES.items():
        value = getattr(update, field)
        if not isinstance(value, kind):
            return f"{field}: expected a {kind.__name__}, got {type(value).__name__}"
    spread: object = update.spread
    if not isinstance(spread, Tensor | None):
        return f"spread: expected a Tensor or None, got {type(spread).__name__}"
    return None


def _fault_of_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Like], rows: int
) -> str | None:
    """Names, shapes, dtypes and finite values."""
    if tensors.keys() != expected.keys():
        missing = sorted(expected.keys() - tensors.keys())
        return f"expected tensors {missing} and got {sorted(tensors.keys() - expected.keys())}"
    for path, like in expected.items():
        tensor = tensors[path]
        shape = tuple(rows if size is None else size for size in like.shape)
        if tuple(tensor.shape) != shape or tensor.dtype != like.dtype:
            got = f"{tuple(tensor.shape)} {tensor.dtype}"
            return f"{path}: expected {shape} {like.dtype}, got {got}"
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            return f"{path}: {bad} of {tensor.numel()} values are not finite"
    return None


def _fault_of_spread(update: ClientUpdate, longest: float) -> str | None:
    """No more scatter than queries of that length can have."""
    if update.spread is None:
        return None
    scatter = float(update.spread.double().square().sum())
    most = 1.001 * longest * update.num_examples  # rounding in float32
    if scatter > most:
        return f"spread: expected a scatter of at most {most:.4g}, got {scatter:.4g}"
    return None


def _fault_of_rows(update: ClientUpdate, rows: int) -> str | None:
    """Where the prompts come from, and how often each was used."""
    origins = update.origins
    if not len(origins):
        return None
    if int(origins.min()) < 0 or int(origins.max()) >= rows:
        return (
            f"origins: expected rows 0..{rows - 1}, got {int(origins.min())}..{int(origins.max())}"
        )
    if len(torch.unique(origins)) < len(origins):
        return f"origins: expected each row once, got {origins.tolist()}"
    if int(update.use_counts.min()) < 1:
        return f"use_counts: expected numbers >= 1, got {int(update.use_counts.min())}"
    return None


def _fault_of_metrics(metrics: Mapping[str, float], expected: Sequence[str]) -> str | None:
    """All that is expected is there, and all that is there is finite."""
    missing = [name for name in expected if name not in metrics]
    if missing:
        return f"expected the metrics {', '.join(expected)}, got no {', '.join(missing)}"
    for name, value in metrics.items():
        if not math.isfinite(value):
            return f"{name}: expected a finite number, got {value}"
    return None
