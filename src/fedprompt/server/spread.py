"""What the server knows of the spread of clients' queries, with `prompts.whiten=clients`.

| when                        | what                                                            |
|-----------------------------|-----------------------------------------------------------------|
| first contact with a client | its job asks for the triangular factor of its centred queries   |
| before aggregation          | factors of usable updates are added to sums, client by client   |
| aggregation                 | compares keys in the metric of the sums so far, with the first  |
|                             | keys of all clients that were met before                        |
| after it                    | discriminants of the new keys are made, to be broadcast         |

Nothing is forgotten and nothing is asked twice. An update that is refused leaves its client
unknown, so that it is asked again. Before anything is known the metric is Euclidean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedprompt.core.types import ClientUpdate, ServerState, Tensors
from fedprompt.data.prefix.spread import Array, discriminants, metric_of, scatter_of


def begin(keys: Tensor) -> Tensors:
    """The sums before the first round.

    Args:
        keys: (n, q) of the drawn prompts.

    Returns:
        `scatter`, the upper triangle (q (q + 1) / 2,) float64, row by row; `freedom`, images less
        clients; `seen`, the clients in ascending order; of those whose key is known `met`, in
        ascending order, and `keys` (m, q) float32; `discriminants` (n, q + 1).
    """
    width = keys.shape[1]
    return {
        "scatter": torch.zeros(width * (width + 1) // 2, dtype=torch.float64),
        "freedom": torch.zeros((), dtype=torch.int64),
        "seen": torch.empty(0, dtype=torch.int64),
        "met": torch.empty(0, dtype=torch.int64),
        "keys": torch.empty(0, width),
        "discriminants": discriminants(keys, None),
    }


def is_unknown(spread: Tensors, client_id: int) -> bool:
    """Whether a client is still to be asked."""
    return bool(spread) and client_id not in spread["seen"].tolist()


def added(spread: Tensors, updates: Sequence[ClientUpdate]) -> Tensors:
    """With what this round's usable updates tell.

    Args:
        spread: before the round; empty where clients tell nothing.
        updates: in ascending order of clients, so that the sums have the same bits always.
    """
    sent = [update for update in updates if update.spread is not None]
    if not spread or not sent:
        return spread
    scatter = _full(spread["scatter"])
    for update in sent:
        assert update.spread is not None
        scatter += scatter_of(update.spread, update.num_examples, len(scatter))
    seen = sorted({*spread["seen"].tolist(), *(update.client_id for update in sent)})
    with_keys = [update for update in sent if len(update.keys)]
    met = torch.tensor([*spread["met"].tolist(), *(update.client_id for update in with_keys)])
    keys = torch.cat([spread["keys"], *(update.keys[:1] for update in with_keys)])
    order = met.argsort()
    return {
        **spread,
        "scatter": torch.from_numpy(scatter[np.triu_indices(len(scatter))]),
        "freedom": spread["freedom"] + sum(update.num_examples - 1 for update in sent),
        "seen": torch.tensor(seen, dtype=torch.int64),
        "met": met[order].long(),
        "keys": keys[order],
    }


def keys_of_others(spread: Tensors, clients: Sequence[int]) -> Tensor | None:
    """(M, q) the keys of clients that were met and are not among these; None if keys are not kept.

    Args:
        spread: with this round's sums.
        clients: of this round.
    """
    if not spread:
        return None
    elsewhere = [client not in clients for client in spread["met"].tolist()]
    return spread["keys"][torch.tensor(elsewhere, dtype=torch.bool)]


def current_metric(spread: Tensors) -> Tensor | None:
    """M (q, q) float64 of the sums, see `data.prefix.spread`; None if they say nothing."""
    if not spread:
        return None
    metric = metric_of(_full(spread["scatter"]), int(spread["freedom"]))
    return None if metric is None else torch.from_numpy(metric)


def with_discriminants(state: ServerState, metric: Tensor | None) -> ServerState:
    """The state after a round with what is broadcast in place of its keys.

    Args:
        state: with the round's keys and sums.
        metric: of these sums.
    """
    if not state.spread:
        return state
    made = discriminants(state.keys, None if metric is None else metric.numpy())
    return dataclasses.replace(state, spread={**state.spread, "discriminants": made})


def _full(triangle: Tensor) -> Array:
    """A symmetric matrix of its packed upper triangle, in fresh memory."""
    width = (int(np.sqrt(8 * len(triangle) + 1)) - 1) // 2
    upper = np.zeros((width, width))
    upper[np.triu_indices(width)] = triangle.numpy()
    return np.asarray(upper + np.triu(upper, 1).T)
