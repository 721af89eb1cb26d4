"""Bytes that a round sends up and down."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.types import ClientJob, ClientUpdate


def count_bytes(
    recipe: LocalRecipe, jobs: Sequence[ClientJob], updates: Sequence[ClientUpdate]
) -> tuple[int, int]:
    """Bytes up and down of a round.

    Args:
        recipe: says what travels with the prompts.
        jobs: what was sent to the clients.
        updates: what they sent back, refused ones included.
    """
    selects = recipe.prompts.selection != "all"
    up = sum(upload_bytes(update, selects) for update in updates)
    return up, sum(download_bytes(job) for job in jobs)


def upload_bytes(update: ClientUpdate, selects: bool = True) -> int:
    """Bytes of the tensors that a client sends; its own state would not travel in reality.

    Args:
        update: what the client returned.
        selects: whether it chose among the prompts. If it did not, it returns all of them in their
            order, and need not say which they are and how often it used each.
    """
    sets = [update.prompts, update.keys]
    if update.spread is not None:
        sets.append(update.spread)
    if selects:
        sets += [update.origins, update.use_counts]
    return _bytes(sets + list(update.shared.tensors().values()))


def download_bytes(job: ClientJob) -> int:
    """Bytes of the tensors that one client receives."""
    broadcast = job.broadcast
    return _bytes([broadcast.prompts, broadcast.keys, *broadcast.shared.tensors().values()])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
