"""A soft choice of prompts (`prompts.choice=soft`): what to mix, and by how much.

A key stands for the prompts that it selects. In the metric of the clients' queries, an image that
belongs with a key has a query of unit variance around it. By Bayes with equal priors, n images
together belong with key i with probability

    r_i = softmax_i( -n d^2(mean query, key_i) / 2 )

and the prediction for each is sum_i r_i p(y | image, prompts that key i selects). Keys that select
the same prompts are one set. An image stands in a piece once for each of its sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.data.prefix.tables import CHUNK
from fedprompt.models.selection import likeliest_rows, scores_of

Rows = NDArray[np.int64]
LEAST_SHARE = 1e-2
"""Sets that are less probable are left out, but never all: each costs a forward pass."""


def mix(
    batches: Iterable[tuple[Rows, Tensor]], keys: Tensor, discriminants: Tensor, count: int
) -> tuple[Rows, Tensor, Tensor]:
    """Every set of prompts that some images may need, and how probable it is.

    Args:
        batches: images (B,) that select together, with their queries (B, q).
        keys: (n, q) of the prompts.
        discriminants: (n, q + 1) of the keys.
        count: k prompts of an image.

    Returns:
        Images (e,), each as often as it has sets; their rows of the prompts (e, k); shares (e,).
    """
    sets, set_of = sets_of(keys, discriminants, count)
    order, rows, shares = [], [], []
    for batch, queries in batches:
        found = responsibilities(queries, discriminants, set_of, len(sets))
        likely = torch.nonzero(found).flatten()
        order.append(np.repeat(batch, len(likely)))
        rows.append(sets[likely].repeat(len(batch), 1))
        shares.append(found[likely].repeat(len(batch)))
    return np.concatenate(order), torch.cat(rows), torch.cat(shares)


def sets_of(keys: Tensor, discriminants: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The different sets of prompts (s, k) that the keys select, and that of each key (n,).

    Args:
        keys: (n, q) of the prompts.
        discriminants: (n, q + 1) of the keys.
        count: k prompts of an image.
    """
    chosen = torch.stack([likeliest_rows(key, discriminants, count) for key in keys])
    sets, set_of = torch.unique(chosen, dim=0, return_inverse=True)
    return sets, set_of


def responsibilities(queries: Tensor, discriminants: Tensor, set_of: Tensor, number: int) -> Tensor:
    """How probable each set is for some images of one domain, 0 for those below `LEAST_SHARE`.

    Args:
        queries: (B, q) of the images.
        discriminants: (n, q + 1) of the keys.
        set_of: (n,) the set that each key selects.
        number: s of sets.

    Returns:
        (s,) in sum 1.
    """
    scores = len(queries) * scores_of(queries.mean(dim=0), discriminants).double()
    return shares_of(scores, set_of, number)


def shares_of(scores: Tensor, set_of: Tensor, number: int) -> Tensor:
    """How probable each set is, 0 for those below `LEAST_SHARE`.

    Args:
        scores: (..., n) float64, log probability of each key up to a common term.
        set_of: (n,) the set that each key selects.
        number: s of sets.

    Returns:
        (..., s) float32, in sum 1.
    """
    shares = scores.new_zeros(*scores.shape[:-1], number)
    shares = shares.index_add(-1, set_of, scores.softmax(dim=-1))
    # Of very many that are alike, the likeliest stay.
    least = shares.amax(dim=-1, keepdim=True).clamp_max(LEAST_SHARE)
    shares = torch.where(shares < least, 0.0, shares)
    return (shares / shares.sum(dim=-1, keepdim=True)).float()


def firsts(index: Rows) -> NDArray[np.bool_]:
    """(e,) whether an entry is another image than the one before.

    >>> firsts(np.array([4, 4, 7])).tolist()
    [True, False, True]
    """
    return np.concatenate([np.ones(min(len(index), 1), dtype=bool), index[1:] != index[:-1]])


def chunks(order: Rows) -> Iterator[slice]:
    """At most `CHUNK` entries at a time, and all entries of an image in the same slice."""
    stops = np.append(np.flatnonzero(firsts(order))[1:], len(order))
    start = 0
    while start < len(order):
        stop = int(stops[np.searchsorted(stops, start + CHUNK, side="right") - 1])
        yield slice(start, stop)
        start = stop


def mixed(logits: Tensor, shares: Tensor, places: Tensor) -> Tensor:
    """Log of the mean probabilities of each image: (e, classes) -> (B, classes).

    Args:
        logits: (e, classes) by each set of prompts.
        shares: (e,) how much each counts.
        places: (e,) whether an entry begins another image.

    >>> logits = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
    >>> mixed(logits, torch.tensor([0.5, 0.5]), torch.tensor([True, False])).exp()
    tensor([[0.7500, 0.2500]])
    """
    image = places.cumsum(0) - 1
    weighted = logits.softmax(dim=1) * shares[:, None]
    summed = weighted.new_zeros(int(places.sum()), logits.shape[1]).index_add(0, image, weighted)
    return summed.log()
