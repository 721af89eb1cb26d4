"""What a client may send: one description of an update, and the check against it.

An update that is not as described is left out of the round, with the first reason that was found.
Whatever it holds, the check ends with a reason and never with an error. Its client keeps the state
of its last good update.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.checks import is_integer, is_number
from fedprompt.core.types import (
    NAMED,
    SETS,
    SINGLE,
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
RANGES = {"accuracy": (0.0, 1.0), "steps": (0.0, 1e12), "seconds": (0.0, 1e12), "pack": (1.0, 1e9)}
"""Least and largest value of a metric."""
RESERVED = ("client", "num_examples", "num_prompts", "attacks", "defence")
"""What the report of a round says of a client itself."""
MOST_METRICS, LONGEST_NAME, LISTED, LARGEST = 64, 80, 20, 1 << 31


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
    images: int | None = None
    """The client's, and the most that it can claim; None if the server does not know."""
    longest_key: float | None = None
    """Most that the squared length of a key can be; None if there is no bound."""
    spread: int = 0
    """q, if the client is to tell how its queries spread; else 0."""
    longest: float = 1.0
    """Most that the squared length of a query can be."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An update that is left out."""

    client: int | str
    """Its number, or what the update has in its place."""
    reason: str


def expected_of(
    job: ClientJob,
    objective: Objective,
    recipe: LocalRecipe,
    state: ServerState,
    sizes: Sequence[int] | None = None,
) -> Expected:
    """The description of the update that answers a job.

    Args:
        job: what the client was sent.
        objective: says what clients send and keep.
        recipe: says what is personal.
        state: the server's, from which the job was made.
        sizes: images of each client, if the server knows.
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
    longest = 2.0 if recipe.prompts.query == "both" else 1.0  # each kind has unit norm
    metrics = (*MEASURED, *(OF_TRAINING if objective.trains else ()))
    if recipe.privacy is not None:
        metrics = ("pack",)
    return Expected(
        job.client_id,
        job.round_index,
        len(prompts),
        tensors,
        metrics,
        spread=keys.shape[1] if job.tells_spread else 0,
        longest=longest,
        images=None if sizes is None else sizes[job.client_id],
        longest_key=None if recipe.prompts.selects_by_whitened else longest,
    )


def in_order(arrived: Iterable[ClientUpdate]) -> list[ClientUpdate]:
    """Updates by client, whatever came back; those that name no client come last."""

    def place(update: object) -> tuple[bool, int, str]:
        client = client_of(update)
        return (False, client, "") if isinstance(client, int) else (True, 0, client)

    return sorted(arrived, key=place)


def client_of(update: object) -> int | str:
    """The client that an update names; what it has in the place of a number as text."""
    client = getattr(update, "client_id", update)
    if is_integer(client) and abs(client) < LARGEST:
        return int(client)
    return shown(client)


def quarantine(
    updates: Sequence[ClientUpdate], expected: Sequence[Expected]
) -> tuple[list[ClientUpdate], list[Refusal]]:
    """Part the updates into usable ones and refused ones.

    Where several came in the name of one client, all of them are refused: which of them is the
    client's own is not known, and must not depend on which came first.

    Args:
        updates: what came back, in order of clients.
        expected: one description for each client of the cohort.
    """
    waiting = {each.client_id: each for each in expected}
    cohort = sorted(waiting)
    number = Counter(client_of(update) for update in updates)
    good: list[ClientUpdate] = []
    refused: list[Refusal] = []
    for update in updates:
        client = client_of(update)
        if not isinstance(client, int) or client not in waiting:
            reason = f"expected a client of the cohort {_listed(cohort)}, got client {client}"
            reason = fault_of_types(update) or reason
        elif number[client] > 1:
            reason = f"expected one update of each client, got {number[client]}"
        else:
            found = fault(update, waiting[client])
            if found is None:
                good.append(update)
                continue
            reason = found
        refused.append(Refusal(client, reason))
    refused += [
        Refusal(client, "expected an update of the client, got none")
        for client in cohort
        if client not in number
    ]
    for each in refused:
        logger.warning("update of client %s is left out: %s", each.client, each.reason)
    return good, refused


def fault(update: ClientUpdate, expected: Expected) -> str | None:
    """Why an update must not be used, or None if it is as expected; it never raises."""
    try:
        return (
            fault_of_types(update)
            or _fault_of_numbers(update, expected)
            or _fault_of_tensors(update, expected)
            or _fault_of_spread(update, expected.longest)
            or _fault_of_rows(update, expected)
            or _fault_of_metrics(update.metrics, expected)
        )
    except Exception as error:  # whatever is made of what a client sent, it is the client's fault
        logger.debug("an update cannot be checked", exc_info=error)
        return f"cannot be checked: {type(error).__name__}"


def is_readable(update: ClientUpdate) -> bool:
    """Whether an update has the types that it should have, so that its bytes can be counted."""
    client = client_of(update)
    return isinstance(client, int) and fault_of_types(update) is None


def sound_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of a client's metrics that a report can hold; a refused update may have others."""
    return {
        name: value
        for name, value in itertools.islice(metrics.items(), MOST_METRICS)
        if _is_name(name) and _is_figure(value)
    }


def fault_of_types(update: object) -> str | None:
    """Why an update cannot even be read, or None."""
    if not isinstance(update, ClientUpdate):
        return f"expected a ClientUpdate, got {type(update).__name__}"
    for field, kind in TYPES.items():
        value = getattr(update, field)
        if not isinstance(value, kind):
            return f"{field}: expected a {kind.__name__}, got {type(value).__name__}"
    spread: object = update.spread
    if not isinstance(spread, Tensor | None):
        return f"spread: expected a Tensor or None, got {type(spread).__name__}"
    kept, start = update.state.kept, update.state.start
    return (
        _fault_of_parts("shared", update.shared)
        or _fault_of_parts("state", kept)
        or _fault_of_parts("state/start", start)
        or _fault_of_layouts(update)
    )


def _fault_of_parts(where: str, parts: object) -> str | None:
    """Named tensors, as `Parts` says."""
    if not isinstance(parts, Parts):
        return f"{where}: expected a Parts, got {type(parts).__name__}"
    for part in SINGLE:
        value = getattr(parts, part)
        if not isinstance(value, Tensor | None):
            return f"{where}/{part}: expected a Tensor or None, got {type(value).__name__}"
    for part in NAMED:
        named = getattr(parts, part)
        if not isinstance(named, Mapping):
            return f"{where}/{part}: expected a Mapping, got {type(named).__name__}"
        for name, value in named.items():
            if not isinstance(name, str):
                return f"{where}/{part}: expected names, got {shown(name)}"
            if not isinstance(value, Tensor):
                what = type(value).__name__
                return f"{where}/{part}.{_path(name)}: expected a Tensor, got {what}"
    return None


def _fault_of_layouts(update: ClientUpdate) -> str | None:
    """Plain dense tensors on the CPU, and a row for each prompt in those that have rows."""
    for path, tensor in update.tensors().items():
        if type(tensor) is not Tensor:
            return f"{_path(path)}: expected a plain Tensor, got {type(tensor).__name__}"
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            got = f"{tensor.layout} {tensor.dtype} on {tensor.device}"
            return f"{_path(path)}: expected a dense tensor of the CPU, got {got}"
        if tensor.requires_grad:
            return f"{_path(path)}: expected a tensor without gradient, got one with"
    for field in SETS:
        if getattr(update, field).ndim == 0:
            return f"{field}: expected a row for each prompt, got a tensor without dimensions"
    return None


def _fault_of_numbers(update: ClientUpdate, expected: Expected) -> str | None:
    """Client, round and number of images."""
    if not is_integer(update.client_id) or update.client_id != expected.client_id:
        return f"expected client {expected.client_id}, got {shown(update.client_id)}"
    if not is_integer(update.round_index) or update.round_index != expected.round_index:
        got = shown(update.round_index)
        return f"expected an update of round {expected.round_index}, got {got}"
    number = update.num_examples
    if not is_integer(number) or number < 1:
        return f"expected num_examples >= 1, got {shown(number)}"
    if expected.images is not None and number > expected.images:
        return f"expected num_examples <= {expected.images}, got {shown(number)}"
    return None


def _fault_of_tensors(update: ClientUpdate, expected: Expected) -> str | None:
    """Names, shapes, dtypes and finite values."""
    tensors, rows = update.tensors(), len(update.prompts)
    likes = expected.tensors
    if rows > expected.rows:
        return f"prompts: expected at most {expected.rows} rows, got {rows}"
    if expected.spread:
        size = factor_size(update.num_examples, expected.spread)
        likes = {**likes, "spread": Like((size,), torch.float32)}
    if tensors.keys() != likes.keys():
        missing, others = (
            sorted(one.keys() - two.keys()) for one, two in ((likes, tensors), (tensors, likes))
        )
        return f"expected tensors {_listed(missing)} and got {_listed(others)}"
    for path, like in likes.items():
        tensor = tensors[path]
        shape = tuple(rows if size is None else size for size in like.shape)
        if tuple(tensor.shape) != shape or tensor.dtype != like.dtype:
            got = f"{tuple(tensor.shape)} {tensor.dtype}"
            return f"{path}: expected {shape} {like.dtype}, got {got}"
    for path in likes:
        bad = int((~torch.isfinite(tensors[path])).sum())
        if bad:
            return f"{path}: {bad} of {tensors[path].numel()} values are not finite"
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


def _fault_of_rows(update: ClientUpdate, expected: Expected) -> str | None:
    """Where the prompts come from, how often each was used, and how long their keys are."""
    origins, counts = update.origins, update.use_counts
    if not len(origins):
        return None
    rows = expected.rows
    if int(origins.min()) < 0 or int(origins.max()) >= rows:
        return (
            f"origins: expected rows 0..{rows - 1}, got {int(origins.min())}..{int(origins.max())}"
        )
    if len(torch.unique(origins)) < len(origins):
        return f"origins: expected each row once, got {_listed(origins.tolist())}"
    if int(counts.min()) < 1:
        return f"use_counts: expected numbers >= 1, got {int(counts.min())}"
    if int(counts.max()) >= LARGEST:
        return f"use_counts: expected numbers below 2^31, got {int(counts.max())}"
    if expected.longest_key is not None:
        longest = float(update.keys.double().square().sum(dim=1).max())
        if longest > 1.001 * expected.longest_key:  # rounding in float32
            most = math.sqrt(expected.longest_key)
            return f"keys: expected a length of at most {most:.4g}, got {math.sqrt(longest):.4g}"
    return None


def _fault_of_metrics(metrics: Mapping[str, float], expected: Expected) -> str | None:
    """All that is expected is there, and all that is there is a figure under a name of its own."""
    if len(metrics) > MOST_METRICS:
        return f"expected at most {MOST_METRICS} metrics, got {len(metrics)}"
    missing = [name for name in expected.metrics if name not in metrics]
    if missing:
        return f"expected the metrics {', '.join(expected.metrics)}, got no {', '.join(missing)}"
    for name, value in metrics.items():
        if not _is_name(name):
            return f"metrics: expected a name of their own, got {shown(name)}"
        if not _is_figure(value):
            return f"{name}: expected a finite number, got {shown(value)}"
        least, most = RANGES.get(name, (-math.inf, math.inf))
        if not least <= value <= most:
            return f"{name}: expected a number from {least:g} to {most:g}, got {value:g}"
    return None


def _is_name(name: object) -> bool:
    """Whether a metric may be called so: it must not pass for what the server says of a client."""
    return isinstance(name, str) and 0 < len(name) <= LONGEST_NAME and name not in RESERVED


def _is_figure(value: object) -> bool:
    """Whether a value is a finite number that JSON can hold."""
    return isinstance(value, int | float) and is_number(value) and abs(value) < 1e308


def shown(value: object) -> str:
    """A value in a message: short and printable, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 64:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value) if isinstance(value, str | bytes | int | float | None) else ""
    except Exception:  # a subclass of one of them may do anything
        text = ""
    text = text or f"a {type(value).__name__}"
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3]}..."


def _path(name: str) -> str:
    """A name in a message, without the quotes of `shown`."""
    return shown(name)[1:-1]


def _listed(values: Sequence[object]) -> str:
    """The first of some values in a message."""
    more = f", and {len(values) - LISTED} more" if len(values) > LISTED else ""
    return f"[{', '.join(map(shown, values[:LISTED]))}{more}]"
