"""The global model on a pooled split: the server's prompts and head, a class mask per domain."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from fedprompt.client.module import load_head, own_prompts, tuned_tensors
from fedprompt.client.recipe import LocalRecipe
from fedprompt.data.tables import CHUNK, FeatureTable
from fedprompt.models.backbone import Backbone
from fedprompt.models.head import build_head
from fedprompt.models.prompted_vit import select_rows
from fedprompt.server.personalised import ClientFigures
from fedprompt.types import Broadcast, ServerState, Tensors


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures of one split; NaN where the method has no global model."""

    accuracy: float
    loss: float
    """Mean cross-entropy."""
    balanced_accuracy: float = math.nan
    """Mean of the classes' accuracies."""
    class_accuracy: tuple[float, ...] = ()
    """Per class; NaN for a class without images in the split."""
    clients: ClientFigures | None = None
    """Every client's own model on its own share of the split, where that was asked for."""


@dataclasses.dataclass(frozen=True)
class Model:
    """What an image is classified with: the server's tensors, or those of one client."""

    broadcast: Broadcast
    own: Tensors = dataclasses.field(default_factory=dict)
    """The client's own state; empty for the global model."""


def has_global_model(recipe: LocalRecipe) -> bool:
    """Whether prompts and head are shared or fixed, so that there is one model for all."""
    return recipe.prompts.mode != "personal" and recipe.head.mode != "personal"


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
    if not has_global_model(recipe):
        return Evaluation(math.nan, math.nan)
    accuracy = MulticlassAccuracy(recipe.num_classes, average="micro").to(device)
    by_class = MulticlassAccuracy(recipe.num_classes, average="none").to(device)
    mean_loss = MeanMetric().to(device)
    order, rows = select_for_split(state, recipe, table)
    model = Model(state.broadcast())
    for logits, labels in predict(model, recipe, backbone, table, order, rows, class_mask, device):
        accuracy.update(logits, labels)
        by_class.update(logits, labels)
        mean_loss.update(F.cross_entropy(logits, labels), weight=len(labels))
    present = np.bincount(table.labels, minlength=recipe.num_classes) > 0
    per_class = np.where(present, by_class.compute().cpu().numpy().astype(float), np.nan)
    return Evaluation(
        float(accuracy.compute()),
        float(mean_loss.compute()),
        float(np.nanmean(per_class)),
        tuple(per_class.tolist()),
    )


@torch.no_grad()
def predict(
    model: Model,
    recipe: LocalRecipe,
    backbone: Backbone,
    table: FeatureTable,
    order: NDArray[np.int64],
    rows: Tensor,
    class_mask: NDArray[np.bool_],
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (B, classes) and labels (B,) of some images, `CHUNK` at a time.

    Args:
        model: with what to classify.
        recipe: head and tuning.
        backbone: the frozen network on `device`.
        table: the split.
        order: (k,) which images, in this order.
        rows: (k, p) each image's rows of the prompts.
        class_mask: (groups, classes); other classes of an image's domain get minus infinity.
        device: where to compute.
    """
    head = build_head(recipe.head, backbone.feature_dim, recipe.num_classes, torch.Generator())
    load_head(head, model.broadcast, model.own)
    head.to(device).eval()
    tuning = recipe.build_tuning()
    tuned = {
        name: value.to(device) for name, value in tuned_tensors(model.broadcast.shared).items()
    }
    prompts = own_prompts(recipe, model.broadcast, model.own).to(device)
    mask = torch.from_numpy(class_mask).to(device)
    for start in range(0, len(order), CHUNK):
        index = order[start : start + CHUNK]
        if recipe.needs_tokens:
            chosen = prompts[rows[start : start + CHUNK].to(device)]
            features = tuning.encode(backbone, tuned, table.tokens_at(index).to(device), chosen)
        else:
            features = torch.from_numpy(table.features[index]).to(device)
        groups = torch.from_numpy(table.groups[index]).to(device)
        logits = head(features).masked_fill(~mask[groups], -torch.inf)
        yield logits, torch.from_numpy(table.labels[index]).to(device)


def select_for_split(
    state: ServerState, recipe: LocalRecipe, table: FeatureTable
) -> tuple[NDArray[np.int64], Tensor]:
    """The prompts of every image of a split.

    Returns:
        The images' order, domain by domain (N,), and for each image in that order its rows of the
        pool (N, k).
    """
    everything = np.arange(len(table), dtype=np.int64)
    return select_for(Model(state.broadcast()), recipe, table, everything)


def select_for(
    model: Model, recipe: LocalRecipe, table: FeatureTable, images: NDArray[np.int64]
) -> tuple[NDArray[np.int64], Tensor]:
    """The prompts of some images: as `select_for_split`, of a model and the images' indices."""
    prompts, keys = own_prompts(recipe, model.broadcast, model.own), model.broadcast.keys
    projection = model.broadcast.shared.get("query_projection")
    order = images[np.argsort(table.groups[images], kind="stable")]
    chosen = []
    for group in np.unique(table.groups[images]):
        members = order[table.groups[order] == group]
        for start in range(0, len(members), recipe.prompts.eval_batch):
            batch = members[start : start + recipe.prompts.eval_batch]
            queries = torch.from_numpy(table.queries[batch])
            rows, _ = select_rows(recipe.prompts, queries, prompts, keys, projection)
            chosen.append(rows.expand(len(batch), -1))
    return order, torch.cat(chosen)
