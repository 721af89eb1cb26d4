"""The contract of an aggregator: prompt sets in, one prompt set out.

An aggregator is pure. Its outputs share no memory with its inputs, its inputs are unchanged, it
draws no random number but from the given generator, and its result depends neither on the order
of the clients nor on the order of the rows within a client. `Cohort` is how that last promise is
kept: it sorts clients and rows by content before any arithmetic, and maps the assignment back
afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.core.errors import InputError
from fedprompt.core.registry import Registry

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
DEFAULT_SEED = 0
"""Of what an aggregator draws when it is given no generator."""


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """What an aggregator returns. Written by the aggregator, read by the server's round."""

    prompts: Tensor
    """(n', d), the dtype of the inputs."""
    keys: Tensor | None
    """(n', q) address of each prompt in query space; None if there were no keys at all, neither of
    clients nor of the previous prompts.
    """
    assignment: list[Tensor]
    """Per client (n_t,) int64: the row of `prompts` that each local prompt belongs to."""
    state: dict[str, Tensor]
    """The aggregator's memory, to be handed to its next call; flat, to be saved and hashed."""
    diagnostics: dict[str, float]
    """Figures about the work done; `num_prompts` is always among them."""


class Aggregator(Protocol):
    """Merges the clients' prompt sets.

    Two attributes may say more: `keeps_rows = True`, that row i is the same prompt in every round
    (control variates need it), and `adds_prompts = False`, that there are never more prompts than
    were broadcast, so that without a pool there is nothing to select from.
    """

    def aggregate(
        self,
        prompt_sets: Sequence[Tensor],
        weights: Tensor | None = None,
        origins: Sequence[Tensor] | None = None,
        previous: Tensor | None = None,
        keys: Sequence[Tensor] | None = None,
        state: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        previous_keys: Tensor | None = None,
    ) -> Aggregation:
        """Merge m prompt sets into one.

        Args:
            prompt_sets: one (n_t, d) float32 or float64 tensor per client; n_t may be 0.
            weights: (m,) positive sample counts; equal if None.
            origins: per client (n_t,) int64, the row of `previous` that each prompt started from.
            previous: (n, d) prompts that were broadcast.
            keys: per client (n_t, q), each prompt's address in query space.
            state: the `Aggregation.state` of the previous round.
            generator: source of every random draw.
            previous_keys: (n, q) keys that were broadcast with `previous`.

        Raises:
            InputError: an input is malformed; the message names the client.
        """
        ...


@runtime_checkable
class SharedRule(Protocol):
    """An aggregator that has a rule of its own for the shared tensors, too."""

    def merge_shared(
        self,
        mean: Mapping[str, Tensor],
        previous: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The next shared tensors, and what is added to the aggregator's state.

        Args:
            mean: the shared tensors that clients returned, averaged by sample counts.
            previous: those that were broadcast.
            state: the aggregator's state before the round.
        """
        ...


aggregators: Registry[Aggregator] = Registry("aggregator", "fedprompt.aggregation")


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Checked inputs as flat float64 arrays in canonical order. N = n_1 + ... + n_m local prompts.

    Clients are ordered by size (largest first), then by content; rows within a client by content.
    Content is compared number by number, so that a common shift or a positive scale of all
    prompts keeps the order.
    """

    prompts: Array
    """(N, d)"""
    keys: Array | None
    """(N, q)"""
    origins: Indices | None
    """(N,)"""
    owner: Indices
    """(N,) canonical index of the client that each row came from, ascending."""
    weights: Array
    """(m,) in canonical client order."""
    previous: Array | None
    """(n, d)"""
    previous_keys: Array | None
    """(n, q)"""
    dtype: torch.dtype
    key_dtype: torch.dtype
    places: tuple[tuple[int, Indices], ...]
    """Per canonical client: the caller's index of the client and of each of its rows."""

    @property
    def num_clients(self) -> int:
        """m, clients with an empty set included."""
        return len(self.places)

    def spans(self) -> list[slice]:
        """The rows of each client."""
        ends = np.cumsum([len(rows) for _, rows in self.places])
        return [
            slice(int(end) - len(p[1]), int(end)) for end, p in zip(ends, self.places, strict=True)
        ]

    def restore(self, assignment: Indices) -> list[Tensor]:
        """Split an (N,) assignment into one tensor per client, in the caller's order."""
        result = [torch.empty(0, dtype=torch.int64)] * self.num_clients
        for (client, rows), span in zip(self.places, self.spans(), strict=True):
            mine = np.empty(len(rows), dtype=np.int64)
            mine[rows] = assignment[span]
            result[client] = torch.from_numpy(mine)
        return result


def check_inputs(
    prompt_sets: Sequence[Tensor],
    weights: Tensor | None = None,
    origins: Sequence[Tensor] | None = None,
    previous: Tensor | None = None,
    keys: Sequence[Tensor] | None = None,
    previous_keys: Tensor | None = None,
) -> Cohort:
    """Check everything that `Aggregator.aggregate` is given and bring it into canonical order.

    Raises:
        InputError: names the client, what was expected, what was received and what to do.
    """
    if len(prompt_sets) == 0:
        raise InputError(
            "no clients: expected at least one prompt set, got an empty sequence; "
            "skip aggregation in a round without updates"
        )
    d, dtype = _check_family("prompts", prompt_sets, None)
    _check_one("previous", previous, d)
    count = len(prompt_sets)
    q, key_dtype = 0, dtype
    if keys is not None:
        _check_length("keys", len(keys), count)
        q, key_dtype = _check_family("keys", keys, prompt_sets)
    if previous_keys is not None:
        key_dtype = key_dtype if keys is not None else previous_keys.dtype
        _check_one("previous_keys", previous_keys, q if keys is not None else None)
        _check_pair(previous, previous_keys)
    if origins is not None:
        _check_length("origins", len(origins), count)
        for client, (rows, prompts) in enumerate(zip(origins, prompt_sets, strict=True)):
            _check_origins(client, rows, len(prompts), None if previous is None else len(previous))
    return _canonical(
        [_array(prompts) for prompts in prompt_sets],
        None if keys is None else [_array(rows) for rows in keys],
        None if origins is None else [_indices(rows) for rows in origins],
        _check_weights(weights, count),
        None if previous is None else _array(previous),
        None if previous_keys is None else _array(previous_keys),
        (dtype, key_dtype),
    )


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


def member_means(values: Array, labels: Indices, number: int) -> Array:
    """(number, d) mean of the values that share a label; zero without any.

    >>> member_means(np.array([[1.0], [3.0], [7.0]]), np.array([0, 0, 2]), 3)
    array([[2.],
           [0.],
           [7.]])
    """
    counts = np.maximum(np.bincount(labels, minlength=number), 1)
    result = np.zeros((number, values.shape[1]))
    # Divided first, so that the sum of very large values stays finite.
    np.add.at(result, labels, values / counts[labels, None])
    return result


def previous_of(cohort: Cohort) -> Array:
    """The broadcast prompts (n, d), which stay as they are when every client returned an empty set.

    Raises:
        InputError: there are none.
    """
    if cohort.previous is None:
        raise InputError(
            "prompt_sets: expected at least one prompt from some client, got only empty sets; "
            "pass previous, so that there is something to keep"
        )
    return cohort.previous


def lexicographic(rows: Array) -> Indices:
    """Indices that sort rows number by number, first column first.

    >>> lexicographic(np.array([[2.0, 0.0], [1.0, 9.0], [1.0, 3.0]]))
    array([2, 1, 0])
    """
    order = np.argsort(rows[:, 0], kind="stable")
    first = rows[order, 0]
    if (first[1:] != first[:-1]).all():  # as good as always, and much faster
        return order
    values = rows.tolist()
    return np.array(sorted(range(len(values)), key=values.__getitem__), dtype=np.int64)


def _canonical(
    prompts: list[Array],
    keys: list[Array] | None,
    origins: list[Indices] | None,
    weights: Array,
    previous: Array | None,
    previous_keys: Array | None,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Cohort:
    """Sort rows within clients, then clients, and concatenate."""
    content = []
    for client, rows in enumerate(prompts):
        columns = [rows]
        if keys is not None:
            columns.append(keys[client])
        if origins is not None:
            columns.append(origins[client][:, None].astype(np.float64))
        content.append(np.concatenate(columns, axis=1) if len(columns) > 1 else rows)
    row_order = [lexicographic(rows) for rows in content]
    client_order = _client_order(content, row_order, weights)
    places = tuple((client, row_order[client]) for client in client_order)
    sizes = [len(rows) for _, rows in places]
    return Cohort(
        prompts=np.concatenate([prompts[client][rows] for client, rows in places]),
        keys=None if keys is None else np.concatenate([keys[c][rows] for c, rows in places]),
        origins=None if origins is None else np.concatenate([origins[c][r] for c, r in places]),
        owner=np.repeat(np.arange(len(places), dtype=np.int64), sizes),
        weights=weights[client_order],
        previous=previous,
        previous_keys=previous_keys,
        dtype=dtypes[0],
        key_dtype=dtypes[1],
        places=places,
    )


def _client_order(content: list[Array], row_order: list[Indices], weights: Array) -> list[int]:
    """Clients by size, then by the content of their sorted rows, then by weight."""
    heads = [
        (-len(rows), float(rows[order[0], 0]) if len(rows) else 0.0)
        for rows, order in zip(content, row_order, strict=True)
    ]
    if len(set(heads)) == len(heads):
        return sorted(range(len(heads)), key=heads.__getitem__)
    whole = [
        (-len(rows), rows[order].tolist(), weight)
        for rows, order, weight in zip(content, row_order, weights.tolist(), strict=True)
    ]
    return sorted(range(len(whole)), key=whole.__getitem__)


def _array(tensor: Tensor) -> Array:
    """A float64 copy in numpy."""
    return np.array(tensor.detach().cpu().to(torch.float64).numpy(), dtype=np.float64)


def _indices(tensor: Tensor) -> Indices:
    """An int64 copy in numpy."""
    return np.array(tensor.detach().cpu().numpy(), dtype=np.int64)


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


def _check_family(
    what: str, tensors: Sequence[Tensor], partners: Sequence[Tensor] | None
) -> tuple[int, torch.dtype]:
    """One matrix per client, all of one width and dtype; `partners` fix the number of rows."""
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
    return width, dtype


def _check_one(what: str, value: Tensor | None, width: int | None) -> None:
    if value is None:
        return
    tensor = _check_matrix(what, value)
    if width is not None and tensor.shape[1] != width:
        raise InputError(
            f"{what}: expected dimension {width} as in client 0, got {tensor.shape[1]}; "
            "pass what was broadcast to these clients"
        )


def _check_pair(previous: Tensor | None, previous_keys: Tensor) -> None:
    expected = 0 if previous is None else len(previous)
    if len(previous_keys) != expected:
        raise InputError(
            f"previous_keys: expected {expected} rows, one per row of previous, got "
            f"{len(previous_keys)}; pass both as they were broadcast"
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


def _check_weights(weights: Tensor | None, count: int) -> Array:
    """(m,) positive finite numbers, equal if not given."""
    if weights is None:
        return np.ones(count)
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
    return _array(values)
