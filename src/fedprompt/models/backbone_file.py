"""The weights of a backbone in one file, from which the very same backbone can be loaded again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fedprompt.core.files import atomic_write
from fedprompt.models.backbone import Backbone
from fedprompt.models.nano import network as nano
from fedprompt.models.options import ModelOptions


def save_backbone(backbone: Backbone, options: ModelOptions, path: Path) -> ModelOptions:
    """Write all weights of a backbone, in float32.

    Args:
        backbone: made by `load_backbone`.
        options: that it was made with.
        path: a safetensors file.

    Returns:
        Options with which `load_backbone` makes the same function of an image of this file: nothing
        is fetched, and the images are prepared in the same way.
    """
    from safetensors.torch import save

    tensors = dict(backbone.vit.state_dict())
    if is_nano(options):
        tensors = {f"vit.{name}": value for name, value in tensors.items()} | backbone.extras
    # safetensors refuses tensors that share storage, so every tensor gets its own.
    flat = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    atomic_write(path, save(flat))
    return loaded_from(path, _settled(backbone, options))


def is_nano(options: ModelOptions) -> bool:
    """Whether the backbone is one of `models.nano`."""
    return options.backbone in nano.EMBEDDED or options.backbone.endswith(".safetensors")


def loaded_from(path: Path, options: ModelOptions) -> ModelOptions:
    """The options with this file of weights.

    Args:
        path: from `save_backbone`.
        options: of the backbone.
    """
    field = "backbone" if is_nano(options) else "pretrained"
    return dataclasses.replace(options, **{field: str(path)})  # type: ignore[arg-type]


def _settled(backbone: Backbone, options: ModelOptions) -> ModelOptions:
    """The options with the transform that the backbone has, whatever a file or timm says of it."""
    transform = backbone.transform
    return dataclasses.replace(
        options,
        image_size=transform.image_size,
        resize=transform.resize,
        mean=list(transform.mean),
        std=list(transform.std),
        interpolation=transform.interpolation,
    )
