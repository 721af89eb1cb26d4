"""What an aggregator receives, and the checks of it.

A message names the client, what was expected, what was received and what to do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedprompt.core.errors import InputError

DEFAULT_SEED = 0
"""Of what an aggregator draws when it is given no generator."""


@dataclasses.dataclass(frozen=True, eq=False)
class AggregationInput:
    """The prompt sets of m clients and what is known of them. Checked when it is made.

    Written by the server's round or by `Aggregator.aggregate`, read by aggregators, which leave
    every tensor as it is. n_t is the number of prompts of client t, n that of the broadcast ones,
    d the dimension of a prompt and q that of a key. Tensors are float32 or float64.

    Raises:
        InputError: a field is malformed.
    """

    prompt_sets: Sequence[Tensor]
    """Per client (n_t, d); n_t may be 0."""
    weights: Tensor | None = None
    """(m,) positive sample counts; equal if None."""
    origins: Sequence[Tensor] | None = None
    """Per client (n_t,) int64, the row of `previous` that each prompt started from."""
    previous: Tensor | None = None
    """(n, d) prompts that were broadcast."""
    keys: Sequence[Tensor] | None = None
    """Per client (n_t, q), each prompt's address in query space."""
    state: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """The `Aggregation.state` of the previous round; empty in the first."""
    generator: torch.Generator | None = None
    """Source of every random draw; one of a fixed seed if None."""
    previous_keys: Tensor | None = None
    """(n, q) keys that were broadcast with `previous`."""
    metric: Tensor | None = None
    """(q, q) M, if known: keys differ by |(k - k') M|, in which one image's spread is 1 in every
    direction (`data.prefix.spread`). None for the Euclidean distance."""
    others: Tensor | None = None
    """(M, q) the key of every client that was met before and is not among these, if the server
    remembers them."""

    def __post_init__(self) -> None:
        count = len(self.prompt_sets)
        if count == 0:
            raise InputError(
                "no clients: expected at least one prompt set, got an empty sequence; "
                "skip aggregation in a round without updates"
            )
        d = _check_family("prompts", self.prompt_sets, None)
        _check_one("previous", self.previous, d)
        q = None
        if self.keys is not None:
            _check_length("keys", len(self.keys), count)
            q = _check_family("keys", self.keys, self.prompt_sets)
        _check_one("previous_keys", self.previous_keys, q)
        _check_metric(self.metric, q)
        _check_one("others", self.others, q)
        if self.previous is not None:  # an aggregator may know the prompts from its state
            self.check_pair()
        if self.origins is not None:
            _check_length("origins", len(self.origins), count)
            limit = None if self.previous is None else len(self.previous)
            for client, (rows, own) in enumerate(zip(self.origins, self.prompt_sets, strict=True)):
                _check_origins(client, rows, len(own), limit)
        _check_weights(self.weights, count)

    def check_pair(self) -> None:
        """Refuse broadcast keys that are not one for each broadcast prompt."""
        expected = 0 if self.previous is None else len(self.previous)
        if self.previous_keys is not None and len(self.previous_keys) != expected:
            raise InputError(
                f"previous_keys: expected {expected} rows, one per row of previous, got "
                f"{len(self.previous_keys)}; pass both as they were broadcast"
            )

    def draw_seed(self) -> int:
        """A seed for another library's generator: one draw from `generator`, or a fixed one."""
        if self.generator is None:
            return DEFAULT_SEED
        source = self.generator
        return int(torch.randint(2**31, (), generator=source, device=source.device).item())


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an aggregator state that lacks a tensor or has one of another shape.

    Raises:
        InputError: names the tensor.
    """
    for name, shape in shapes.items():
        received = tuple(state[name].shape) if name in state else "nothing"
        if received != shape:
            raise InputError(
                f"state '{name}': expected shape {shape}, got {received}; pass the state that the "
                "previous call of the same aggregator returned, together with its prompts"
            )


def _check_length(what: str, received: int, expected: int) -> None:
    if received != expected:
        raise InputError(
            f"{what}: expected one entry per client ({expected}), got {received}; "
            "pass the same clients in the same order as prompt_sets"
        )


def _check_matrix(where: str, value: object) -> Tensor:
    """A float32 or float64 matrix without NaN or Inf."""
    if not isinstance(value, Tensor):
        raise InputError(
            f"{where}: expected a tensor, got {type(value).__name__}; use torch.as_tensor"
        )
    if value.ndim != 2:
        raise InputError(
            f"{where}: expected 2 dimensions (rows, features), got shape {tuple(value.shape)}; "
            "reshape it"
        )
    if value.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"{where}: expected dtype torch.float32 or torch.float64, got {value.dtype}; "
            "convert with .float()"
        )
    if not bool(torch.isfinite(value).all()):
        bad = "NaN" if bool(torch.isnan(value).any()) else "Inf"
        raise InputError(
            f"{where}: expected finite values, got {bad}; leave this client out of the round or "
            "lower its learning rate"
        )
    return value


def _check_family(what: str, tensors: Sequence[Tensor], partners: Sequence[Tensor] | None) -> int:
    """The common width of one matrix per client; `partners` fix the number of rows.

    Args:
        what: the tensors, in the words of the message.
        tensors: per client (n_t, width), all of one dtype.
        partners: per client a tensor of n_t rows, or None.
    """
    width, dtype = 0, torch.float32
    for client, value in enumerate(tensors):
        tensor = _check_matrix(f"client {client}: {what}", value)
        if client == 0:
            width, dtype = tensor.shape[1], tensor.dtype
        if tensor.shape[1] != width or width == 0:
            raise InputError(
                f"client {client}: {what} have dimension {tensor.shape[1]}, expected "
                f"{width or 'at least 1'} as client 0; use one dimension for all clients"
            )
        if tensor.dtype != dtype:
            raise InputError(
                f"client {client}: {what} have dtype {tensor.dtype}, not {dtype}; convert them"
            )
        if partners is not None and len(tensor) != len(partners[client]):
            raise InputError(
                f"client {client}: {what} have {len(tensor)} rows, expected "
                f"{len(partners[client])}, one per prompt; send a key with every prompt"
            )
    return width


def _check_one(what: str, value: Tensor | None, width: int | None) -> None:
    if value is None:
        return
    tensor = _check_matrix(what, value)
    if width is not None and tensor.shape[1] != width:
        raise InputError(
            f"{what}: expected dimension {width} as in client 0, got {tensor.shape[1]}; "
            "pass what was broadcast to these clients"
        )


def _check_metric(metric: Tensor | None, width: int | None) -> None:
    """A square matrix of the keys' width."""
    _check_one("metric", metric, width)
    if metric is not None and metric.shape[0] != metric.shape[1]:
        raise InputError(
            f"metric: expected a square matrix, got shape {tuple(metric.shape)}; pass the factor "
            "by which keys are multiplied"
        )


def _check_origins(client: int, rows: object, expected: int, limit: int | None) -> None:
    """(n_t,) integers, each a row of `previous`."""
    where = f"client {client}: origins"
    if (
        not isinstance(rows, Tensor)
        or rows.ndim != 1
        or rows.dtype not in (torch.int64, torch.int32)
    ):
        kind = (
            f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        )
        raise InputError(f"{where}: expected an int64 tensor of shape ({expected},), got {kind}")
    if len(rows) != expected:
        raise InputError(
            f"{where}: expected {expected} entries, one per prompt, got {len(rows)}; "
            "send the broadcast row of every returned prompt"
        )
    if expected and (int(rows.min()) < 0 or (limit is not None and int(rows.max()) >= limit)):
        bad = int(rows.min()) if int(rows.min()) < 0 else int(rows.max())
        top = "the number of broadcast prompts" if limit is None else str(limit)
        raise InputError(
            f"{where}: expected rows from 0 to below {top}, got {bad}; pass the previous prompts "
            "that this client received"
        )


def _check_weights(weights: Tensor | None, count: int) -> None:
    """(m,) positive finite numbers."""
    if weights is None:
        return
    try:
        values = torch.as_tensor(weights)
        if values.is_complex():
            raise TypeError("complex")
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"weights: expected {count} real numbers, one per client, got {weights!r}; "
            "pass each client's sample count"
        ) from None
    if values.ndim != 1 or len(values) != count:
        raise InputError(
            f"weights: expected shape ({count},), one per client, got {tuple(values.shape)}; "
            "pass each client's sample count"
        )
    for client, value in enumerate(values.tolist()):
        if not (math.isfinite(value) and value > 0):
            raise InputError(
                f"client {client}: weight: expected a positive finite number, got {value}; "
                "leave clients without samples out of the round"
            )
