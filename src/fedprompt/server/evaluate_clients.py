"""Every client's own model on its own share of a held-out split.

A client's model is what the server would send it, prompts and shared tensors, and what it keeps for
itself. Its share of the split is `data.mirror`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.types import Broadcast, ServerState
from fedprompt.data.prefix.tables import FeatureTable
from fedprompt.models.backbone import Backbone
from fedprompt.models.selection import nearest_keys
from fedprompt.server.evaluate import Model, predict, select_for
from fedprompt.server.personalised import ClientFigures


def evaluate_clients(
    state: ServerState,
    recipe: LocalRecipe,
    backbone: Backbone,
    table: FeatureTable,
    parts: Sequence[NDArray[np.int64]],
    queries: Sequence[Tensor],
    class_mask: NDArray[np.bool_],
    device: torch.device,
    broadcast_for: Callable[[ServerState, int], Broadcast],
) -> ClientFigures:
    """Accuracy of each client that has images in the split.

    Args:
        state: the server's state.
        recipe: selection, head and tuning.
        backbone: the frozen network on `device`.
        table: the split.
        parts: per client its images of the split.
        queries: per client the mean query (q,) of its training images, by which it chooses prompts
            if `prompts.choose_by=client`.
        class_mask: (groups, classes).
        device: where to compute.
        broadcast_for: what the server would send a client.
    """
    accuracy: dict[int, float] = {}
    for client, images in enumerate(parts):
        if len(images) == 0:
            continue
        model = Model(broadcast_for(state, client), state.clients.get(client, {}))
        order, rows = _choose(model, recipe, table, images, queries[client])
        correct = 0
        for logits, labels in predict(
            model, recipe, backbone, table, order, rows, class_mask, device
        ):
            correct += int((logits.argmax(dim=1) == labels).sum())
        accuracy[client] = correct / len(images)
    return ClientFigures(accuracy)


def _choose(
    model: Model,
    recipe: LocalRecipe,
    table: FeatureTable,
    images: NDArray[np.int64],
    query: Tensor,
) -> tuple[NDArray[np.int64], Tensor]:
    """Order and prompts of a client's images, chosen as the client does in training."""
    options = recipe.prompts
    if options.sends_keys and options.choose_by == "client":
        rows = nearest_keys(query, model.broadcast.keys, options.count)
        return images, rows.expand(len(images), -1)
    return select_for(model, recipe, table, images)
