"""The embedded nano Vision Transformer: small enough to ship with the package and to train on a
laptop.

It is timm's `VisionTransformer` with a convolutional stem in place of the patch embedding (early
convolutions make small ViTs train better: Xiao et al., "Early Convolutions Help Transformers See
Better", NeurIPS 2021). An image of 32 x 32 pixels becomes 16 tokens of 8 x 8 pixels and a CLS
token. `fedprompt pretrain` makes the weights.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedprompt.core.errors import ConfigError
from fedprompt.core.files import Json

IMAGE_SIZE = 32
EMBED_DIM = 128
DEPTH = 5
NUM_HEADS = 4
EMBEDDED = ("nano", "nano_promptable")


class ConvStem(nn.Module):
    """Three strided convolutions, each followed by a group norm: (B, 3, 32, 32) -> (B, 16,
    embed_dim).

    Takes the arguments that timm passes to an `embed_layer`; there is no batch norm, so that
    training and frozen use compute the same function.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = IMAGE_SIZE,
        patch_size: int = 8,
        in_chans: int = 3,
        embed_dim: int = EMBED_DIM,
        bias: bool = True,
        **_: object,
    ) -> None:
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid_size = (height // 8, width // 8)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, 32, 3, stride=2, padding=1),
            nn.GroupNorm(4, 32),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GroupNorm(4, 64),
            nn.GELU(),
            nn.Conv2d(64, embed_dim, 3, stride=2, padding=1, bias=bias),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H * W / 64, embed_dim)."""
        tokens: Tensor = self.stem(images).flatten(2).transpose(1, 2)
        return tokens


def build() -> VisionTransformer:
    """A nano ViT with random weights and no classification head."""
    return VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=8,
        embed_dim=EMBED_DIM,
        depth=DEPTH,
        num_heads=NUM_HEADS,
        mlp_ratio=4.0,
        num_classes=0,
        embed_layer=ConvStem,
    )


def weights_path(name: str) -> Path:
    """Where the embedded weights called `name` lie inside the installed package."""
    return Path(str(resources.files("fedprompt.models.nano") / "weights" / f"{name}.safetensors"))


def read_card(name: str) -> Json:
    """The JSON card that says how the embedded weights were made and what they reach."""
    card: Json = json.loads(weights_path(name).with_suffix(".json").read_text())
    return card


def load(path: Path) -> tuple[VisionTransformer, dict[str, Tensor]]:
    """Read weights that `fedprompt pretrain` wrote.

    Args:
        path: a safetensors file with `vit.*` (the network), `query.*` (statistics of queries over
            the pre-training images) and, for a promptable version, `task_tokens` (tasks, tokens,
            embed_dim). Stored in half precision, returned in float32.

    Returns:
        The network, and the remaining tensors by name.

    Raises:
        ConfigError: the file does not exist or does not hold a nano ViT.
    """
    if not path.is_file():
        raise ConfigError(
            f"no backbone weights at {path}: expected a safetensors file; "
            "run 'fedprompt pretrain' to make one"
        )
    tensors: dict[str, Tensor] = {}
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"the weights at {path} cannot be read ({error}); run 'fedprompt pretrain'"
        ) from error
    with file:
        for key in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118
            tensors[key] = file.get_tensor(key).float()  # type: ignore[no-untyped-call]
    vit = build()
    own = {key[len("vit.") :]: value for key, value in tensors.items() if key.startswith("vit.")}
    try:
        vit.load_state_dict(own)
    except RuntimeError as error:
        raise ConfigError(
            f"the weights at {path} do not fit the nano ViT "
            f"({str(error).splitlines()[0]}); run 'fedprompt pretrain'"
        ) from error
    return vit, {key: value for key, value in tensors.items() if not key.startswith("vit.")}
