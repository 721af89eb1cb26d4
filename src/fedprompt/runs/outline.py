"""A federation without its features: the real task, partition and network, with one image for all.

Everything has the types and shapes that it has in a run, so that what a run sends, keeps and
computes can be counted before it is started. Nothing is fetched: weights that would be are drawn.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedprompt.client.worker import ClientData, WorkerSetup
from fedprompt.config import ExperimentConfig
from fedprompt.data.prefix.tables import FeatureTable, compute_table
from fedprompt.data.task import Split
from fedprompt.models.backbone import Backbone, load_backbone
from fedprompt.models.nano import network as nano
from fedprompt.models.options import ModelOptions
from fedprompt.models.selection import PromptOptions
from fedprompt.runs.federation import Federation, divide


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a run would stand on."""

    federation: Federation
    """Its tables hold one image in all rows; a frozen head is drawn."""
    cache_bytes: int
    """Of the feature tables that the run keeps on disk, or in memory without a cache."""
    images: int
    """That the frozen prefix is computed for."""


def outline(config: ExperimentConfig) -> Outline:
    """Read and partition the data, and run one image through the network.

    Args:
        config: of the leading method, with the names of its rivals.

    Raises:
        ConfigError: the data cannot be read or partitioned as asked, or there is no such network.
    """
    _, task, parts = divide(config)
    device = torch.device(config.runtime.torch_device)
    model = without_fetching(config.model)
    backbone = load_backbone(model, config.cut).to(device)
    one = compute_table(backbone, first_image(task.train), device, config.cache.dtype)
    variants = [config, *map(config.with_method, config.compare)]
    prompts = [variant.prompts for variant in variants]
    splits = [task.train, task.test, *([task.validation] if len(task.validation) else [])]
    train, *held_out = (repeated(one, split, prompts) for split in splits)
    setup = WorkerSetup(
        model,
        ClientData(train, tuple(parts), task.class_mask),
        tuple(held_out),
        device.type,
        config.runtime.threads,
        config.runtime.precision,
        backbone.cut,
    )
    public = task.public if needs_public(variants) else None
    size = sum(map(len, splits)) * row_bytes(one)
    if public is not None:
        size += len(public) * row_bytes(whole(backbone, public, device, config))
    images = sum(map(len, splits)) + (0 if public is None else len(public))
    return Outline(Federation(task, backbone, setup), size, images)


def without_fetching(model: ModelOptions) -> ModelOptions:
    """The same network with drawn weights where a run would fetch them."""
    embedded = model.backbone in nano.EMBEDDED or model.backbone.endswith(".safetensors")
    given = embedded or isinstance(model.pretrained, str)
    return model if given else dataclasses.replace(model, pretrained=False)


def needs_public(variants: list[ExperimentConfig]) -> bool:
    """Whether a run computes the features of the task's public images."""
    return variants[0].head.mode == "frozen" or any(
        each.prompts.selects_by_whitened for each in variants
    )


def whole(
    backbone: Backbone, public: Split, device: torch.device, config: ExperimentConfig
) -> FeatureTable:
    """The table of one public image; it serves for all cuts.

    Args:
        backbone: the frozen network.
        public: labelled images that no client holds.
        device: where the network is.
        config: says how tokens are kept.
    """
    return compute_table(backbone.cut_at(0), first_image(public), device, config.cache.dtype)


def first_image(split: Split) -> Split:
    """A split of one image."""
    return Split(np.asarray(split.images[:1]), split.labels[:1], split.groups[:1])


def repeated(one: FeatureTable, split: Split, prompts: list[PromptOptions]) -> FeatureTable:
    """The table of a split in which all images are the same one; it takes no memory.

    Args:
        one: table of one image.
        split: says how many there are, and their labels.
        prompts: of all methods; whitened queries are as wide as those that they are made of.
    """

    def rows(array: NDArray[Any]) -> NDArray[Any]:
        return np.broadcast_to(array, (len(split), *array.shape[1:]))

    table = dataclasses.replace(
        one,
        tokens=rows(one.tokens),
        style=rows(one.style),
        cls=rows(one.cls),
        features=rows(one.features),
        labels=split.labels.astype(np.int64),
        groups=split.groups.astype(np.int64),
    )
    whitened = [each for each in prompts if each.selects_by_whitened]
    derived = {each.query_kind: rows(one.queries(each.query)) for each in whitened}
    return table.with_queries(derived)


def row_bytes(table: FeatureTable) -> int:
    """Bytes of one image in a cache entry."""
    arrays = (table.tokens, table.style, table.cls, table.features, table.labels, table.groups)
    return sum(array[0].nbytes for array in arrays)
