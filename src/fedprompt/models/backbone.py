"""A frozen Vision Transformer, cut in two at the place where prompts enter.

`embed` computes everything below the prompts, which is a constant of the image; `encode` computes
the blocks above. This file alone touches timm's private parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedprompt.errors import ConfigError, InputError, suggest
from fedprompt.models import nano
from fedprompt.models.options import ModelOptions
from fedprompt.models.prompted_vit import QUERIES


class Backbone(nn.Module):
    """A ViT without its classification head; its parameters never require gradients.

    Args:
        vit: timm's network.
        image_size: side of the square input in pixels.
        mean: channel means that normalise images in [0, 1].
        std: channel standard deviations.
        extras: tensors that travel with the weights: `query.<kind>.mean` and `query.<kind>.std`,
            both (d,), the statistics of a query over public images, and optionally `task_tokens`
            (tasks, tokens, d).
    """

    channel_mean: Tensor
    channel_std: Tensor

    def __init__(
        self,
        vit: VisionTransformer,
        image_size: int,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        extras: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.vit = vit
        self.image_size = image_size
        self.extras = dict(extras or {})
        self.register_buffer("channel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("channel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @property
    def embed_dim(self) -> int:
        """Width d of tokens, prompts and features."""
        return int(self.vit.embed_dim)

    @property
    def depth(self) -> int:
        """Number of attention blocks."""
        return len(self.vit.blocks)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize and normalise.

        Args:
            images: (B, H, W, 3) uint8.

        Returns:
            (B, 3, S, S) float32 with S the input size of the network.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise InputError(
                f"images: expected (B, H, W, 3) uint8, "
                f"got {tuple(images.shape)} {images.dtype}; convert them to RGB"
            )
        pixels = images.permute(0, 3, 1, 2).to(self.channel_mean.dtype) / 255
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            pixels = F.interpolate(
                pixels, size=(self.image_size, self.image_size), mode="bilinear", antialias=True
            )
        normalised: Tensor = (pixels - self.channel_mean) / self.channel_std
        return normalised

    def embed(self, pixels: Tensor) -> Tensor:
        """All that is below the prompts: (B, 3, S, S) -> tokens (B, T, d), CLS first."""
        vit = self.vit
        tokens: Tensor = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
        return tokens

    def encode(self, tokens: Tensor, prompts: Tensor | None = None) -> Tensor:
        """The blocks above the prompts.

        Args:
            tokens: (B, T, d) from `embed`.
            prompts: (n, d) for the whole batch, (B, n, d) one set per image, or None. They stand
                after CLS and get no position embedding.

        Returns:
            (B, d): the CLS token after the final norm.
        """
        if prompts is not None and prompts.shape[-2] > 0:
            if prompts.ndim == 2:
                prompts = prompts.unsqueeze(0).expand(tokens.shape[0], -1, -1)
            tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)
        for block in self.vit.blocks:
            tokens = block(tokens)
        features: Tensor = self.vit.norm(tokens)[:, 0]
        return features

    def queries(self, tokens: Tensor, kind: str) -> Tensor:
        """What an image is asked by when prompts are selected for it; a constant of the image.

        `style` is the standard deviation over the patch tokens right after the embedding: low-level
        statistics that tell the domain and hardly the class. `cls` is the CLS feature of the
        network without prompts. Both are standardised by the statistics of public (pre-training)
        images and scaled to unit norm.

        Args:
            tokens: (B, T, d) from `embed`.
            kind: `style` or `cls`.

        Returns:
            (B, d), each row of norm 1.
        """
        query = self.raw_queries(tokens, kind)
        if f"query.{kind}.mean" in self.extras:
            mean, std = self.extras[f"query.{kind}.mean"], self.extras[f"query.{kind}.std"]
            query = (query - mean.to(query)) / std.to(query).clamp_min(1e-6)
        return F.normalize(query, dim=-1)

    def raw_queries(self, tokens: Tensor, kind: str) -> Tensor:
        """`queries` before standardisation: (B, T, d) -> (B, d)."""
        if kind == "style":
            patches = tokens[:, 1:]
            if self.vit.pos_embed is not None:
                # The position embedding is the same for every image and would only add a constant
                # pattern.
                patches = patches - self.vit.pos_embed[:, -patches.shape[1] :]
            return patches.std(dim=1)
        if kind == "cls":
            return self.encode(tokens)
        raise ConfigError(
            f"prompts.query: expected one of {', '.join(QUERIES)}, "
            f"got '{kind}'{suggest(kind, QUERIES)}"
        )

    def checksum(self) -> str:
        """SHA-256 over the weights and the statistics, to show that nothing changes them."""
        digest = hashlib.sha256()
        for name, tensor in sorted({**self.vit.state_dict(), **self.extras}.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_backbone(model: str | ModelOptions) -> Backbone:
    """A frozen backbone.

    Args:
        model: the options, or a name: `nano`, `nano_promptable`, or the path of a file that
            `fedprompt pretrain` wrote.

    Raises:
        ConfigError: unknown name, or weights that cannot be read.
    """
    name = model if isinstance(model, str) else model.backbone
    if name in nano.EMBEDDED:
        path = nano.weights_path(name)
    elif name.endswith(".safetensors"):
        path = Path(name)
    else:
        raise ConfigError(
            f"model.backbone: expected one of {', '.join(nano.EMBEDDED)} or a "
            f".safetensors file made by 'fedprompt pretrain', "
            f"got '{name}'{suggest(name, nano.EMBEDDED)}"
        )
    vit, extras = nano.load(path)
    return Backbone(vit, nano.IMAGE_SIZE, extras=extras)
