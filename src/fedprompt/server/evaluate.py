"""The global model on a pooled split: the server's prompts and head, a class mask per domain."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from fedprompt.client.module import load_head
from fedprompt.client.recipe import LocalRecipe
from fedprompt.data.tables import CHUNK, FeatureTable
from fedprompt.models.backbone import Backbone
from fedprompt.models.head import build_head
from fedprompt.models.prompted_vit import select_rows
from fedprompt.types import ServerState


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures of one split."""

    accuracy: float
    loss: float
    """Mean cross-entropy."""


@torch.no_grad()
def evaluate(
    state: ServerState,
    recipe: LocalRecipe,
    backbone: Backbone,
    table: FeatureTable,
    class_mask: NDArray[np.bool_],
    device: torch.device,
) -> Evaluation:
    """Accuracy and loss of the global model.

    Prompts are selected as in training, for `prompts.eval_batch` images of one domain in the order
    of the split; the forward pass then takes `CHUNK` images at a time, each with its own
    prompts.

    Args:
        state: the server's prompts, keys and shared tensors.
        recipe: selection and head.
        backbone: the frozen network on `device`.
        table: the split.
        class_mask: (groups, classes) bool; an image is classified among the classes of its domain.
        device: where to compute.
    """
    head = build_head(recipe.head, backbone.feature_dim, recipe.num_classes, torch.Generator())
    load_head(head, state.broadcast())
    head.to(device).eval()
    prompts = state.prompts.to(device)
    mask = torch.from_numpy(class_mask).to(device)
    accuracy = MulticlassAccuracy(recipe.num_classes, average="micro").to(device)
    mean_loss = MeanMetric().to(device)
    order, rows = select_for_split(state, recipe, table)
    for start in range(0, len(order), CHUNK):
        index = order[start : start + CHUNK]
        if recipe.prompts.count:
            inputs = table.tokens_at(index).to(device)
            features = backbone.encode(inputs, prompts[rows[start : start + CHUNK].to(device)])
        else:
            features = torch.from_numpy(table.features[index]).to(device)
        labels = torch.from_numpy(table.labels[index]).to(device)
        groups = torch.from_numpy(table.groups[index]).to(device)
        logits = head(features).masked_fill(~mask[groups], -torch.inf)
        accuracy.update(logits, labels)
        mean_loss.update(F.cross_entropy(logits, labels), weight=len(index))
    return Evaluation(float(accuracy.compute()), float(mean_loss.compute()))


def select_for_split(
    state: ServerState, recipe: LocalRecipe, table: FeatureTable
) -> tuple[NDArray[np.int64], Tensor]:
    """The prompts of every image of a split.

    Returns:
        The images' order, domain by domain (N,), and for each image in that order its rows of the
        pool (N, k).
    """
    order = np.argsort(table.groups, kind="stable")
    projection = state.shared.get("query_projection")
    chosen = []
    for group in np.unique(table.groups):
        members = order[table.groups[order] == group]
        for start in range(0, len(members), recipe.prompts.eval_batch):
            batch = members[start : start + recipe.prompts.eval_batch]
            queries = torch.from_numpy(table.queries[batch])
            rows, _ = select_rows(recipe.prompts, queries, state.prompts, state.keys, projection)
            chosen.append(rows.expand(len(batch), -1))
    return order, torch.cat(chosen)
