"""`full`: all blocks and norms of the Vision Transformer are trained, by their names.

The full-model tuning that the PFPT paper compares with (Fig. 1). What lies below the prompts stays
frozen here, because it is what the prefix cache holds: patch embedding and position embedding, in
ViT-B/32 2.4 of 87 million parameters, and with `prompts.depth` the blocks below.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedprompt.core.checks import check_number
from fedprompt.models.adaptation.base import Tuning, tunings


@dataclasses.dataclass(frozen=True)
class FullOptions:
    """Options of full tuning."""

    lr: float = 1e-4
    """The clients' learning rate for the backbone."""

    def __post_init__(self) -> None:
        check_number("tuning.lr", self.lr, 0)


class _Encoder(nn.Module):
    """`Backbone.encode` as a `forward`, which is what `functional_call` can call."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens: Tensor, prompts: Tensor | None) -> Tensor:
        """(B, T, d) -> (B, feature_dim)."""
        features: Tensor = self.backbone.encode(tokens, prompts)  # type: ignore[operator]
        return features


@tunings.register("full", FullOptions)
class Full(Tuning):
    """Everything above the place of the prompts is trained."""

    def initial(self, backbone: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """Copies of the pre-trained parameters."""
        return {name: value.detach().cpu().clone() for name, value in trainable(backbone)}

    def encode(
        self,
        backbone: nn.Module,
        tensors: Mapping[str, Tensor],
        tokens: Tensor,
        prompts: Tensor | None = None,
    ) -> Tensor:
        """The forward pass with these parameters in place of the frozen ones.

        Args:
            backbone: a frozen `Backbone`; unchanged afterwards.
            tensors: named as in `initial`.
            tokens: (B, T, d) from `Backbone.advance`.
            prompts: as for `Backbone.encode`.
        """
        own = {f"backbone.{name}": value for name, value in tensors.items()}
        features: Tensor = functional_call(_Encoder(backbone), own, (tokens, prompts))
        return features


def trainable(backbone: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a forward pass from the cached tokens uses."""
    below = set(backbone.lower_parameters())  # type: ignore[operator]
    for name, value in backbone.named_parameters():
        if value not in below:
            yield name, value
