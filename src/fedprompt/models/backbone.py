"""A frozen Vision Transformer, cut in two at the place where prompts enter.

`embed` and `advance` compute everything below the prompts, which is a constant of the image;
`encode` computes the blocks above. Only this package touches timm's private parts.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fedprompt.core.checks import check_choice
from fedprompt.core.errors import ConfigError, suggest
from fedprompt.models import timm_vit, torchvision_weights
from fedprompt.models.last_block import block_for_prefix
from fedprompt.models.nano import network as nano
from fedprompt.models.options import FEATURES, ModelOptions
from fedprompt.models.selection import QUERIES
from fedprompt.models.transform import IMAGENET_MEAN, IMAGENET_STD, Transform


class Backbone(nn.Module):
    """A frozen ViT; its parameters never require gradients.

    Tokens stand in the order: prefix (CLS, then registers or the distillation token, as far as the
    model has them), prompts, patches.

    Args:
        vit: timm's network.
        transform: how images become pixels; a number is the input size of the embedded models,
            whose pixels lie in [-1, 1].
        features: `pre_logits` (what the network's classifier would read) or `logits` (what it
            says).
        extras: tensors that travel with the weights: `query.<kind>.mean` and `query.<kind>.std`,
            both (d,), the statistics of a query over public images, and optionally `task_tokens`
            (tasks, tokens, d).
        architecture: what the weights do not show of the network, for `checksum`; nothing for the
            embedded models.
        cut: the block before which prompts enter, from 0; see `PromptOptions.depth`.

    Raises:
        ConfigError: the network has no such block.
    """

    channel_mean: Tensor
    channel_std: Tensor

    def __init__(
        self,
        vit: VisionTransformer,
        transform: Transform | int,
        features: str = "pre_logits",
        extras: Mapping[str, Tensor] | None = None,
        architecture: str = "",
        cut: int = 0,
    ) -> None:
        super().__init__()
        check_choice("model.features", features, FEATURES)
        self.vit = vit
        self.cut = self._checked(cut)
        """The first block that is computed with prompts."""
        self.transform = Transform(transform) if isinstance(transform, int) else transform
        self.features = features
        self.extras = dict(extras or {})
        self.architecture = architecture
        self.autocast: Callable[[], AbstractContextManager[object]] = nullcontext
        """Within it `encode` computes: Lightning Fabric's, where a run's precision is not full."""
        mean, std = torch.tensor(self.transform.mean), torch.tensor(self.transform.std)
        self.register_buffer("channel_mean", mean.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("channel_std", std.view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()
        # Read off the network: representation layers and poolings decide it.
        tokens = torch.zeros(1, self.num_prefix_tokens + 1, self.embed_dim)
        self.feature_dim = int(self._read_out(tokens).shape[-1])
        """Width of what `encode` returns and the head reads."""

    @property
    def embed_dim(self) -> int:
        """Width d of tokens, prompts and queries."""
        return int(self.vit.embed_dim)

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the prompts: CLS, registers, the distillation token."""
        return int(self.vit.num_prefix_tokens)

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.transform.image_size

    @property
    def depth(self) -> int:
        """Number of attention blocks."""
        return len(self.vit.blocks)

    @property
    def upper_blocks(self) -> list[tuple[int, nn.Module]]:
        """Number and module of each block that is computed with prompts."""
        return list(enumerate(self.vit.blocks))[self.cut :]

    def cut_at(self, cut: int) -> Backbone:
        """The same network, with the same tensors, cut before another block.

        Raises:
            ConfigError: the network has no such block.
        """
        other = copy.copy(self)
        other.cut = self._checked(cut)
        return other

    def _checked(self, cut: int) -> int:
        if not 0 <= cut < self.depth:
            raise ConfigError(
                f"prompts.depth: expected the number of a block, 0 to {self.depth - 1} as the "
                f"backbone has {self.depth} blocks, got {cut}"
            )
        return cut

    def forward(self, pixels: Tensor, prompts: Tensor | None = None) -> Tensor:
        """The whole network: (B, 3, S, S) -> (B, feature_dim)."""
        return self.encode(self.advance(self.embed(pixels)), prompts)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize, crop and normalise: (B, H, W, 3) uint8 -> (B, 3, S, S), S = `image_size`."""
        return self.transform(images, self.channel_mean, self.channel_std)

    def embed(self, pixels: Tensor) -> Tensor:
        """What enters the first block: (B, 3, S, S) -> tokens (B, T, d), the prefix first."""
        vit = self.vit
        tokens: Tensor = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
        return tokens

    def advance(self, tokens: Tensor) -> Tensor:
        """The blocks below the prompts: (B, T, d) from `embed` -> (B, T, d) before block `cut`.

        In full precision: `autocast` is for `encode` alone.
        """
        for block in list(self.vit.blocks)[: self.cut]:
            tokens = block(tokens)
        return tokens

    def lower_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters below the prompts, which the prefix cache stands on."""
        vit = self.vit
        yield from (*vit.patch_embed.parameters(), *vit.norm_pre.parameters())
        yield from vit.blocks[: self.cut].parameters()
        for name in ("pos_embed", "cls_token", "reg_token", "dist_token"):
            value = getattr(vit, name, None)
            if isinstance(value, nn.Parameter):
                yield value

    def encode(self, tokens: Tensor, prompts: Tensor | None = None) -> Tensor:
        """The blocks above the prompts, and the read-out.

        Args:
            tokens: (B, T, d) from `advance`, which a feature table keeps.
            prompts: (n, d) for the whole batch, (B, n, d) one set per image, or None. They stand
                after the prefix and get no position embedding. Where the network pools over
                patches, prompts are left out of the pool. Rows of more than d numbers are deep
                prompts (Jia et al., "Visual Prompt Tuning", ECCV 2022, Eq. 5), d numbers for each
                block from `cut` on: the i-th d numbers enter block `cut` + i instead of what the
                block below it made of the prompts.

        Returns:
            (B, feature_dim): the features, or the logits of the network's own classifier, in the
            type of the tokens.
        """
        with self.autocast():
            encoded = self._read_out(self._blocks(tokens, prompts))
        return encoded.to(tokens.dtype)

    def _blocks(self, tokens: Tensor, prompts: Tensor | None = None) -> Tensor:
        """(B, T, d) before block `cut` -> (B, T, d) after the final norm, without the prompts'
        outputs.

        (B, prefix, d) where nothing reads the patches' outputs either.
        """
        prefix, count = self.num_prefix_tokens, 0
        parts: list[Tensor] = []
        if prompts is not None and prompts.shape[-2] > 0:
            if prompts.ndim == 2:
                prompts = prompts.unsqueeze(0).expand(tokens.shape[0], -1, -1)
            count = prompts.shape[1]
            first, *parts = torch.split(prompts, self.embed_dim, dim=-1)
            tokens = torch.cat([tokens[:, :prefix], first, tokens[:, prefix:]], dim=1)
        for index, block in self.upper_blocks:
            if 0 < index - self.cut <= len(parts):
                own, patches = tokens[:, :prefix], tokens[:, prefix + count :]
                tokens = torch.cat([own, parts[index - self.cut - 1], patches], dim=1)
            if index == self.depth - 1 and self.reads_prefix_only(block):
                tokens = block_for_prefix(block, tokens, prefix)
            else:
                tokens = block(tokens)
        tokens = self.vit.norm(tokens)
        if count and self.vit.global_pool != "token":
            tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix + count :]], dim=1)
        return tokens

    def reads_prefix_only(self, block: nn.Module) -> bool:
        """Whether the last block needs to be computed for the prefix alone: the pool reads nothing
        else, the block is timm's plain one, and no one listens to what its layers give.
        """
        return (
            self.vit.global_pool == "token"
            and self.num_prefix_tokens > 0
            and type(block) is Block
            and type(block.attn) is Attention
            and getattr(block.attn, "gate", None) is None
            and not block.training
            and not any(module._forward_hooks for module in block.modules())
        )

    def _read_out(self, tokens: Tensor) -> Tensor:
        """(B, T, d) -> (B, feature_dim): timm's pooling and what follows it."""
        read: Tensor = self.vit.forward_head(tokens, pre_logits=self.features == "pre_logits")
        return read

    def queries(self, tokens: Tensor, kind: str) -> Tensor:
        """What stands for an image when prompts are selected for it; a constant of the image.

        `style` is the standard deviation over the patch tokens right after the embedding: low-level
        statistics that show the domain and hardly the class. `cls` is the CLS token after the final
        norm of the network without prompts (L2P's query), or the pooled feature of a network
        without CLS. Both are standardised by the statistics of public (pre-training) images and
        scaled to unit norm.

        Args:
            tokens: (B, T, d) from `embed`.
            kind: `style` or `cls`.

        Returns:
            (B, d), each row of norm 1.
        """
        return self._standardised(self.raw_queries(tokens, kind), kind)

    def raw_queries(self, tokens: Tensor, kind: str) -> Tensor:
        """`queries` before standardisation: (B, T, d) -> (B, d)."""
        if kind == "style":
            return self._style(tokens)
        if kind == "cls":
            return self._cls(self._blocks(self.advance(tokens)))
        raise ConfigError(
            f"prompts.query: expected one of {', '.join(QUERIES)}, "
            f"got '{kind}'{suggest(kind, QUERIES)}"
        )

    def constants(self, tokens: Tensor) -> dict[str, Tensor]:
        """What is the same for an image in all rounds, in one pass of the network without prompts.

        Args:
            tokens: (B, T, d) from `embed`.

        Returns:
            `tokens`, (B, T, d), for `encode`; `style` and `cls`, both (B, d), as `queries` has
            them; `features`, (B, feature_dim), as `encode` has them.
        """
        advanced = self.advance(tokens)
        final = self._blocks(advanced)
        return {
            "tokens": advanced,
            "style": self._standardised(self._style(tokens), "style"),
            "cls": self._standardised(self._cls(final), "cls"),
            "features": self._read_out(final),
        }

    def _style(self, tokens: Tensor) -> Tensor:
        """(B, T, d) of `embed` -> (B, d)."""
        vit = self.vit
        patches = tokens[:, self.num_prefix_tokens :]
        if vit.pos_embed is not None and isinstance(vit.norm_pre, nn.Identity):
            # The position embedding is the same for every image and would only add a constant
            # pattern. (A norm after it mixes the two.)
            patches = patches - vit.pos_embed[:, -patches.shape[1] :]
        return patches.std(dim=1)

    def _cls(self, final: Tensor) -> Tensor:
        """What `_blocks` gives -> (B, d)."""
        if self.vit.has_class_token:
            return final[:, 0]
        pooled: Tensor = self.vit.forward_head(final, pre_logits=True)
        return pooled

    def _standardised(self, query: Tensor, kind: str) -> Tensor:
        """Raw queries -> unit ones, by public statistics where the weights bring them."""
        if f"query.{kind}.mean" in self.extras:
            mean, std = self.extras[f"query.{kind}.mean"], self.extras[f"query.{kind}.std"]
            query = (query - mean.to(query)) / std.to(query).clamp_min(1e-6)
        return F.normalize(query, dim=-1)

    def checksum(self) -> str:
        """SHA-256 over all that makes the function of an image: weights, statistics, and what
        differs from the embedded models in architecture, features and transform.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted({**self.vit.state_dict(), **self.extras}.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        settings = (self.architecture, self.features, self.transform)
        if settings != ("", "pre_logits", Transform(self.image_size)):
            digest.update(repr(settings).encode())
        return digest.hexdigest()


def load_backbone(model: str | ModelOptions, cut: int = 0) -> Backbone:
    """A frozen backbone.

    Args:
        model: the options, or the name alone: `nano`, `nano_promptable`, the path of a file that
            `fedprompt pretrain` wrote, or a Vision Transformer of timm.
        cut: the block before which prompts enter.

    Raises:
        ConfigError: unknown name, options that do not fit it, weights that cannot be read, or no
            such block.
    """
    options = ModelOptions(model) if isinstance(model, str) else model
    if options.backbone in nano.EMBEDDED:
        return _load_nano(nano.weights_path(options.backbone), options, cut)
    if options.backbone.endswith(".safetensors"):
        return _load_nano(Path(options.backbone), options, cut)
    vit, transform = timm_vit.build(options)
    # The tag names weights, not a function; those are hashed themselves.
    architecture = options.backbone.partition(".")[0]
    return Backbone(vit, transform, options.features, architecture=architecture, cut=cut)


def _load_nano(path: Path, options: ModelOptions, cut: int) -> Backbone:
    for field, expected in (
        ("pretrained", (True,)),
        ("features", ("pre_logits",)),
        ("image_size", (None, nano.IMAGE_SIZE)),
    ):
        value = getattr(options, field)
        if value not in expected:
            raise ConfigError(
                f"model.{field}: expected {str(expected[-1]).lower()} for the nano backbone "
                f"{options.backbone}, which has nothing else, got {str(value).lower()}; "
                "leave it out or name a Vision Transformer of timm"
            )
    vit, extras = nano.load(path)
    transform = Transform(nano.IMAGE_SIZE).with_options(options)
    return Backbone(vit, transform, extras=extras, cut=cut)


def from_torchvision(
    state_dict: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    features: str = "pre_logits",
    image_size: int | None = None,
    transform: Transform | None = None,
) -> Backbone:
    """torchvision's `VisionTransformer` weights in a timm network, as a frozen backbone.

    Width, depth, patch, image size and classes are read off the tensors.

    Args:
        state_dict: of a torchvision `VisionTransformer`, or of a model that holds one.
        num_heads: attention heads; by default 16 for a width of 1280 and width / 64 otherwise.
        features: `pre_logits`, or `logits` for what its `heads` say, which the paper's head reads.
        image_size: input size; by default that of the weights. For another one the position
            embedding is interpolated.
        transform: how images are prepared; by default the paper's: the shorter side to 256 of 224,
            centre crop, ImageNet statistics.

    Raises:
        InputError: the tensors are no such model.
        ConfigError: `features=logits` without a classifier.
    """
    vit = torchvision_weights.build(state_dict, num_heads, image_size)
    if features == "logits" and not vit.num_classes:
        raise ConfigError(
            "features=logits: expected weights with a classifier (heads.head), got none; "
            "use features=pre_logits"
        )
    if features == "pre_logits":
        vit.head = nn.Identity()
    if transform is None:
        size = vit.patch_embed.img_size[0]
        transform = Transform(size, round(size * 256 / 224), IMAGENET_MEAN, IMAGENET_STD)
    attention: Any = vit.blocks[0].attn
    architecture = f"torchvision, {attention.num_heads} heads"
    return Backbone(vit, transform, features, architecture=architecture)
