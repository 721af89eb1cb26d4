"""Weights of torchvision's `VisionTransformer` in timm's: the same function, other names.

Both are the ViT of Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), with
layer norms of epsilon 1e-6 and exact GELU. torchvision packs query, key and value as
`in_proj_weight` (3d, d), which is timm's `qkv` row by row.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedprompt.core.errors import InputError

NAMES = {
    "class_token": "cls_token",
    "conv_proj.": "patch_embed.proj.",
    "encoder.pos_embedding": "pos_embed",
    "encoder.ln.": "norm.",
    "heads.head.": "head.",
    "heads.pre_logits.": "fc_norm.pre_logits.",
    "encoder.layers.encoder_layer_": "blocks.",
    ".ln_": ".norm",
    ".self_attention.in_proj_": ".attn.qkv.",
    ".self_attention.out_proj.": ".attn.proj.",
    ".mlp.linear_1.": ".mlp.fc1.",  # before torchvision 0.12
    ".mlp.linear_2.": ".mlp.fc2.",
    ".mlp.0.": ".mlp.fc1.",
    ".mlp.3.": ".mlp.fc2.",
}
"""Parts of torchvision's names and what timm says instead."""

_MARK = "conv_proj.weight"


def prefix_of(state_dict: Mapping[str, Tensor]) -> str | None:
    """What stands before torchvision's names in a file (`""` as a rule, `"vit."` and the like in
    the file of a larger model); None for another layout.

    >>> prefix_of(dict.fromkeys(["net.conv_proj.weight", "net.class_token"]))
    'net.'
    >>> prefix_of({"patch_embed.proj.weight": None}) is None
    True
    """
    found = [name.removesuffix(_MARK) for name in state_dict if name.endswith(_MARK)]
    return found[0] if len(found) == 1 and f"{found[0]}class_token" in state_dict else None


def rename(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A torchvision `state_dict` under timm's names.

    Raises:
        InputError: it is none.
    """
    prefix = prefix_of(state_dict)
    if prefix is None:
        raise InputError(
            "state_dict: expected the weights of torchvision's VisionTransformer (conv_proj, "
            f"class_token, encoder.layers...), got {', '.join(list(state_dict)[:3]) or 'nothing'}"
        )
    renamed = {}
    for name, value in state_dict.items():
        if name.startswith(prefix):
            own = name.removeprefix(prefix)
            for theirs, ours in NAMES.items():
                own = own.replace(theirs, ours)
            renamed[own] = value
    return renamed


def build(
    state_dict: Mapping[str, Tensor], num_heads: int | None = None, image_size: int | None = None
) -> VisionTransformer:
    """A timm network with torchvision's weights; every size is read off the tensors.

    Args:
        state_dict: of torchvision's `VisionTransformer`, or of a model that holds one.
        num_heads: attention heads, which no tensor shows; by default 16 for a width of 1280
            (ViT-H/14) and width / 64 otherwise.
        image_size: input size; None means the one of the position embedding. For another one the
            position embedding is interpolated.

    Raises:
        InputError: other weights, or sizes that do not fit together.
    """
    tensors = rename(state_dict)
    try:
        width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
        depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
        side = math.isqrt(tensors["pos_embed"].shape[1] - 1)
        classes = len(tensors.get("head.weight", ()))
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"state_dict: no complete torchvision VisionTransformer ({error})"
        ) from error
    if num_heads is None:
        num_heads = 16 if width == 1280 else width // 64
    if num_heads < 1 or width % num_heads:
        raise InputError(
            f"num_heads: expected a divisor of the width {width}, got {num_heads}; "
            "no tensor shows it: pass num_heads"
        )
    if image_size is not None and (image_size < 1 or image_size % patch):
        raise InputError(
            f"image_size: expected a multiple of the patch ({patch}), got {image_size}; "
            f"try {max(1, round(image_size / patch)) * patch}"
        )
    vit = VisionTransformer(
        img_size=side * patch,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=hidden / width,
        num_classes=classes,
        weight_init="skip",
    )
    try:
        add_representation_layer(vit, tensors)
        vit.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            "state_dict: the tensors do not fit together as a torchvision VisionTransformer "
            f"({' '.join(str(error).split())[:200]})"
        ) from error
    if image_size is not None and image_size != side * patch:
        vit.set_input_size((image_size, image_size))
    return vit


def add_representation_layer(
    vit: VisionTransformer, tensors: Mapping[str, Tensor], classifier: bool = True
) -> None:
    """Give `vit` the tanh layer (`representation_size`) that renamed weights may have before the
    classifier; timm has no place for it but after the pooling.

    Args:
        vit: timm's network; changed in place.
        tensors: renamed weights.
        classifier: whether the network ends with its classifier.
    """
    weight = tensors.get("fc_norm.pre_logits.weight")
    if weight is None:
        return
    rep, width = weight.shape
    vit.fc_norm = nn.Sequential(OrderedDict(pre_logits=nn.Linear(width, rep), act=nn.Tanh()))
    if classifier and "head.weight" in tensors:
        vit.head = nn.Linear(rep, len(tensors["head.weight"]))
