"""Which frozen backbone an experiment stands on: plain options, imported without timm."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from fedprompt.core.checks import check_choice, check_integer
from fedprompt.core.errors import ConfigError

FEATURES = ("pre_logits", "logits")
INTERPOLATIONS = ("bilinear", "bicubic")
PRECISIONS = ("32-true", "bf16-mixed")
"""Of the blocks, by Lightning's names. Mixed: weights, prompts, heads and optimizers in float32,
the matrix products of the blocks in bfloat16.
"""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The `model` section."""

    backbone: str = "nano"
    """`nano` or `nano_promptable` (embedded), a file made by `fedprompt pretrain`, or the name of a
    Vision Transformer of timm."""
    pretrained: bool | str = True
    """`true` fetches timm's weights, `false` draws them (seed 0), a path reads them: a file in
    timm's or torchvision's layout."""
    features: str = "pre_logits"
    """What the head reads: `pre_logits`, or the `logits` of the backbone's own classifier."""
    image_size: int | None = None
    """Side of the square that the network sees, a multiple of its patch; null: the model's own."""
    resize: int | None = None
    """The shorter side before the centre crop to `image_size`; null: the model's own."""
    interpolation: str | None = None
    """`bilinear` or `bicubic`, both with antialiasing; null: the model's own."""
    mean: list[float] | None = None
    """Channel means of images in [0, 1]; null: the model's own."""
    std: list[float] | None = None
    """Channel standard deviations; null: the model's own."""

    def __post_init__(self) -> None:
        if not self.backbone:
            raise ConfigError("model.backbone: expected a name or a file, got nothing")
        if self.pretrained == "":
            raise ConfigError("model.pretrained: expected true, false or a file, got nothing")
        for field, names in (("features", FEATURES), ("interpolation", INTERPOLATIONS)):
            value = getattr(self, field)
            if value is not None:
                check_choice(f"model.{field}", value, names)
        for field in ("image_size", "resize"):
            value = getattr(self, field)
            if value is not None:
                check_integer(f"model.{field}", value, 1)
        for field in ("mean", "std"):
            values = getattr(self, field)
            finite = values is None or (len(values) == 3 and all(map(math.isfinite, values)))
            if not finite or (field == "std" and values is not None and min(values) <= 0):
                kind = "positive numbers" if field == "std" else "numbers"
                raise ConfigError(f"model.{field}: expected 3 finite {kind}, got {list(values)}")

    def with_absolute_paths(self) -> ModelOptions:
        """The same with files named from the root, for another working directory."""
        paths: dict[str, str] = {}
        if self.backbone.endswith(".safetensors"):
            paths["backbone"] = str(Path(self.backbone).resolve())
        if isinstance(self.pretrained, str):
            paths["pretrained"] = str(Path(self.pretrained).expanduser().resolve())
        return dataclasses.replace(self, **paths)  # type: ignore[arg-type]
