"""The recipe of the embedded weights: every number that decides how they come out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from fedprompt.core.errors import ConfigError
from fedprompt.data.drawing.composition import Composition
from fedprompt.data.drawing.shapes import ShapeCounts

TASKS = ("shape", "foreground hue", "background hue", "background pattern")
TOKENS_PER_TASK = 3
Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""Receives the stage (`draw`, `train`, `query`, `probe`), how much of it is done, how much there
is, and metrics.
"""


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """The recipe. The defaults made `nano.safetensors`, `PROMPTABLE` made
    `nano_promptable.safetensors`.

    Args:
        seed: of masks, weights, colours and order; same seed and threads, same bits (CPU).
        images: masks that are drawn; each is coloured anew whenever it is presented.
        presentations: images that pass through the network in training.
        batch_size: images per step.
        learning_rate: peak of a linear warm-up and cosine decay (AdamW).
        weight_decay: of matrices and convolutions; not of biases, norms, CLS, positions and tokens.
        warmup: share of the steps.
        curriculum: shares of the steps until which all images are clean and from which on
            `composition.clean` of them are, linear in between; without clean images first, a
            network of this size learns nothing for very long. The promptable stage starts at the
            end of it.
        label_smoothing: of the cross-entropy.
        promptable: whether to train with task tokens.
        token_learning_rate: peak rate of the task tokens.
        bare_share: share of images without tokens in the promptable stage; their shape is asked.
        statistics: images for the statistics that standardise queries.
        threads: of torch.
        device: `cpu`, `cuda` or `auto`.
        shapes: how many classes of each family.
        composition: probabilities of colours, grounds and blur.
    """

    seed: int = 0
    images: int = 60_000
    presentations: int = 500_000
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: float = 0.04
    curriculum: tuple[float, float] = (0.06, 0.35)
    label_smoothing: float = 0.1
    promptable: bool = False
    token_learning_rate: float = 5e-3
    bare_share: float = 0.1
    statistics: int = 4096
    threads: int = 1
    device: str = "cpu"
    shapes: ShapeCounts = dataclasses.field(default_factory=ShapeCounts)
    composition: Composition = dataclasses.field(default_factory=Composition)

    def __post_init__(self) -> None:
        for name in ("images", "presentations", "batch_size", "threads", "statistics"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"pretrain.{name}: expected at least 1, got {getattr(self, name)}"
                )
        if self.presentations < self.batch_size:
            raise ConfigError(
                f"pretrain.presentations: expected at least one batch ({self.batch_size}), "
                f"got {self.presentations}"
            )
        for name in ("learning_rate", "token_learning_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(
                    f"pretrain.{name}: expected more than 0, got {getattr(self, name)}"
                )
        for name in ("warmup", "label_smoothing", "bare_share", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"pretrain.{name}: expected 0 <= value < 1, got {getattr(self, name)}"
                )
        if not 0 <= self.curriculum[0] < self.curriculum[1] <= 1:
            raise ConfigError(
                "pretrain.curriculum: expected two increasing shares of the steps, "
                f"got {self.curriculum}"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"pretrain.device: expected auto, cpu or cuda, got '{self.device}'")

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.presentations // self.batch_size

    @property
    def name(self) -> str:
        """Name of the weights that this recipe makes."""
        return "nano_promptable" if self.promptable else "nano"


PLAIN = PretrainConfig()
PROMPTABLE = PretrainConfig(promptable=True, presentations=160_000, learning_rate=5e-4)
