"""Vision Transformers of timm by name, with fetched, drawn or given weights."""

from __future__ import annotations

import contextlib
import logging
import math
import pickle
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from fedprompt.core.errors import ConfigError, suggest
from fedprompt.core.files import Json
from fedprompt.models import torchvision_weights
from fedprompt.models.nano import network as nano
from fedprompt.models.options import ModelOptions
from fedprompt.models.transform import IMAGENET_MEAN, IMAGENET_STD, Transform

MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit")
"""timm's modules with models that this package can cut in two."""

FETCHED = "dinov2_s14.safetensors"
"""A file that a command of this program makes."""

_LAYER = "fc_norm.pre_logits."
_HEADS = ("head.", "head_dist.", _LAYER, "pre_logits.")


def build(options: ModelOptions) -> tuple[VisionTransformer, Transform]:
    """The network that the options name, and how its images are prepared.

    Raises:
        ConfigError: no such Vision Transformer, or its weights cannot be found.
    """
    outline = _outline(options.backbone)
    transform = published_transform(outline.pretrained_cfg).with_options(options)
    patch = outline.patch_embed.patch_size[0]
    if transform.image_size % patch:
        raise ConfigError(
            f"model.image_size: expected a multiple of the patch of {options.backbone} ({patch}), "
            f"got {transform.image_size}; "
            f"try {max(1, round(transform.image_size / patch)) * patch}"
        )
    tensors: dict[str, Tensor] | None = None
    if isinstance(options.pretrained, str):
        tensors = read_weights(Path(options.pretrained))
        if torchvision_weights.prefix_of(tensors) is not None:
            tensors = torchvision_weights.rename(tensors)
            if options.mean is None and options.std is None:
                # torchvision's weights were trained on these, whatever timm's of the same name.
                transform = transform.with_options(
                    ModelOptions(mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD))
                )
    elif options.pretrained and (cached := _cached_weights(outline.pretrained_cfg)):
        tensors = read_weights(cached)
    classes = _classes(options, outline, tensors)
    settings: Json = {"img_size": transform.image_size, "num_classes": classes}
    if options.pretrained is True and tensors is None:
        return _fetch(options.backbone, outline, settings), transform
    # Every worker draws for itself, and all must draw the same weights.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = _create(options.backbone, **settings)
    if tensors is not None:
        _load(vit, tensors, options)
    return vit, transform


def published_transform(config: Json) -> Transform:
    """The evaluation transform of timm's data config: the centre `crop_pct` of the resized image.

    >>> config = {"input_size": (3, 224, 224), "crop_pct": 0.875, "mean": (0.5,) * 3,
    ...           "std": (0.5,) * 3, "interpolation": "bicubic"}
    >>> published_transform(config).resize
    256
    """
    size = int(config["input_size"][-1])
    resize = math.floor(size / (config.get("crop_pct") or 1.0))
    mean = config.get("mean") or IMAGENET_MEAN
    std = config.get("std") or IMAGENET_STD
    cubic = config.get("interpolation") == "bicubic"
    return Transform(size, resize, tuple(mean), tuple(std), "bicubic" if cubic else "bilinear")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file read with `weights_only`.

    Raises:
        ConfigError: no such file, or no weights in it.
    """
    if not path.is_file():
        hint = "; 'make real' or 'fedprompt fetch dinov2_s14' writes it to weights/"
        raise ConfigError(
            f"model.pretrained: expected a file of weights, got no file at {path}"
            f"{hint if path.name == FETCHED else ''}"
        )
    try:
        content: Any
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged or foreign file makes the readers raise is open
        unpickling = isinstance(error, pickle.UnpicklingError)
        if unpickling and _is_torch_file(path):
            raise ConfigError(
                f"model.pretrained: {path} holds more than tensors and could run code when it is "
                "read; expected a state_dict; save model.state_dict() alone, as safetensors at best"
            ) from error
        cause = "it is none" if unpickling else " ".join(f"{error!r}".split())[:150]
        raise ConfigError(
            f"model.pretrained: {path} cannot be read as "
            f"{'safetensors' if path.suffix == '.safetensors' else 'a torch file'} ({cause}); "
            "copy or download it again"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise ConfigError(f"model.pretrained: expected a state_dict of tensors in {path}")
    for name, tensor in content.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ConfigError(
                f"model.pretrained: expected finite weights, got NaN or infinity in '{name}' of "
                f"{path}; copy or download the file again"
            )
    tensors: dict[str, Tensor] = clean_state_dict(content)
    return tensors


def _is_torch_file(path: Path) -> bool:
    """Whether a file starts like a pickle or a zip archive, and not like a text."""
    with path.open("rb") as file:
        return file.read(2).startswith((b"\x80", b"PK"))


def _create(name: str, **settings: Any) -> VisionTransformer:
    """A network that `_outline` has found to be a plain Vision Transformer."""
    vit: Any = timm.create_model(name, **settings)
    assert isinstance(vit, VisionTransformer)
    return vit


def _outline(name: str) -> Any:
    """The network without memory for its weights, to look at: a `VisionTransformer`."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = [*nano.EMBEDDED, *timm.list_models(module=list(MODULES))]
        raise ConfigError(
            f"model.backbone: expected {', '.join(nano.EMBEDDED)}, a .safetensors file made by "
            f"'fedprompt pretrain', or a Vision Transformer of timm, "
            f"got '{name}'{suggest(name, known)}"
        )
    if tag and name not in (known := timm.list_pretrained(f"{architecture}.*")):
        raise ConfigError(
            f"model.backbone: timm has no weights '{tag}' for {architecture}; "
            f"expected one of {', '.join(known) or architecture}{suggest(name, known)}"
        )
    with torch.device("meta"):
        outline: Any = timm.create_model(name, pretrained=False)
    if not isinstance(outline, VisionTransformer) or not outline.global_pool:
        near = suggest(name, timm.list_models(module=list(MODULES)))
        raise ConfigError(
            f"model.backbone: '{name}' is no plain Vision Transformer (timm builds a "
            f"{type(outline).__name__}), and prompts could not be inserted; expected a model of "
            f"timm's {', '.join(MODULES)}{near}"
        )
    return outline


def _classes(options: ModelOptions, outline: Any, tensors: Mapping[str, Tensor] | None) -> int:
    """Width of the backbone's own classifier; 0 if it is not read."""
    if options.features == "pre_logits":
        return 0
    weight = None if tensors is None else tensors.get("head.weight")
    if tensors is None:
        classes = outline.num_classes
    else:
        classes = 0 if weight is None or not weight.ndim else len(weight)
    if not classes:
        raise ConfigError(
            f"model.features=logits: expected a backbone with a classifier of its own, "
            f"but the weights of {options.backbone} have none; use model.features=pre_logits"
        )
    return int(classes)


def _load(vit: VisionTransformer, tensors: Mapping[str, Tensor], options: ModelOptions) -> None:
    classifier = options.features == "logits"
    try:
        torchvision_weights.add_representation_layer(vit, tensors, classifier)
        _check_patch(vit, tensors)
        fitting = checkpoint_filter_fn(dict(tensors), vit)
        # timm's filter drops the representation layer.
        fitting |= {name: value for name, value in tensors.items() if name.startswith(_LAYER)}
        if not classifier:
            kept = vit.state_dict()
            fitting = {
                name: value
                for name, value in fitting.items()
                if name in kept or not name.startswith(_HEADS)
            }
        vit.load_state_dict(fitting)
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.pretrained: the weights in {options.pretrained} do not fit {options.backbone} "
            f"({' '.join(str(error).split())[:200]}); expected a file of this model in timm's "
            "or torchvision's layout"
        ) from error


def _check_patch(vit: VisionTransformer, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that timm's filter would quietly resample.

    Raises:
        ValueError: the weights embed patches of another size.
    """
    for name, value in tensors.items():
        if name.endswith("patch_embed.proj.weight") and value.ndim == 4:
            patch = tuple(value.shape[2:])
            # A hybrid's projection is 1x1, whatever its patch_size says.
            expected = tuple(vit.get_parameter("patch_embed.proj.weight").shape[2:])
            if patch != expected:
                raise ValueError(
                    f"a patch of {patch[0]}x{patch[1]} instead of {expected[0]}x{expected[1]}"
                )


def _weight_source(config: Json) -> tuple[str, str]:
    """Repository and file of the hub."""
    name = config.get("hf_hub_filename") or "model.safetensors"
    return str(config.get("hf_hub_id") or ""), str(name)


def _cached_weights(config: Json) -> Path | None:
    """The file of weights that an earlier run fetched; reading it needs no network."""
    repository, name = _weight_source(config)
    found = huggingface_hub.try_to_load_from_cache(repository, name) if repository else None
    return Path(found) if isinstance(found, str) else None


def _fetch(name: str, outline: Any, settings: Json) -> VisionTransformer:
    """Let timm fetch the weights.

    Raises:
        ConfigError: they cannot be fetched; the message says which file to put where.
    """
    repository, file = _weight_source(outline.pretrained_cfg)
    if not repository and not outline.pretrained_cfg.get("url"):
        raise ConfigError(
            f"model.pretrained: timm publishes no weights for {name}; expected a model of "
            f"timm.list_models(pretrained=True), or model.pretrained=FILE or false"
        )
    try:
        _check_network()
        with _quiet():
            vit = _create(name, pretrained=True, **settings)
    except Exception as error:  # the hub's clients have no common family of errors
        cause = " ".join((str(error) or type(error).__name__).split())[:120]
        source = (
            f"'{file}' of the hub's repository '{repository}'"
            if repository
            else (f"'{Path(str(outline.pretrained_cfg['url'])).name}'")
        )
        raise ConfigError(
            f"model.pretrained: the weights of {name} cannot be fetched ({cause}); get {source} on "
            f"a machine with a network, put it anywhere on this one and set "
            f"model.pretrained=PATH/{Path(file).name}"
        ) from error
    return vit


def _check_network() -> None:
    """Raise at once where the hub's client would try again and again for a minute.

    Raises:
        OSError: the hub cannot be reached.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    hub = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    if hub.hostname and not urllib.request.getproxies():
        port = hub.port or (443 if hub.scheme == "https" else 80)
        socket.create_connection((hub.hostname, port), timeout=5).close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the hub's log lines."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
