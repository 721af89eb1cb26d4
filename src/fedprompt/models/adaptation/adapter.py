"""`adapter`: bottleneck adapters after the attention and the MLP of every block above the prompts.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, Fig. 2. With h the
output of a sub-layer, before it is added to the residual stream:

    h <- h + W_up gelu(W_down h + b_down) + b_up,    W_down (r, d), W_up (d, r), W_up = 0 at first
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.core.checks import check_choice, check_integer, check_number
from fedprompt.models.adaptation.base import Tuning, changed_outputs, tunings

PLACES = ("both", "mlp", "attention")
LAYERS = {"both": ("attn", "mlp"), "mlp": ("mlp",), "attention": ("attn",)}


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """Options of adapters."""

    width: int = 8
    """r, width of the bottleneck."""
    after: str = "both"
    """`both`, `mlp` or `attention`."""
    lr: float = 1e-3
    """The clients' learning rate for the adapters."""

    def __post_init__(self) -> None:
        check_number("tuning.lr", self.lr, 0)
        check_integer("tuning.width", self.width, 1)
        check_choice("tuning.after", self.after, PLACES)


@tunings.register("adapter", AdapterOptions)
class Adapter(Tuning):
    """Adapters, named `adapter.BLOCK.LAYER.down.weight` and so on."""

    options: AdapterOptions

    def initial(self, backbone: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """W_down drawn as a linear layer's weight, all else zero."""
        width, inner = int(backbone.embed_dim), self.options.width  # type: ignore[arg-type]
        bound = 1 / math.sqrt(width)
        tensors: dict[str, Tensor] = {}
        for name, _ in self._layers(backbone):
            down = torch.empty(inner, width).uniform_(-bound, bound, generator=generator)
            tensors[f"{name}.down.weight"] = down
            tensors[f"{name}.down.bias"] = torch.zeros(inner)
            tensors[f"{name}.up.weight"] = torch.zeros(width, inner)
            tensors[f"{name}.up.bias"] = torch.zeros(width)
        return tensors

    def encode(
        self,
        backbone: nn.Module,
        tensors: Mapping[str, Tensor],
        tokens: Tensor,
        prompts: Tensor | None = None,
    ) -> Tensor:
        """The forward pass with adapters.

        Args:
            backbone: a frozen `Backbone`; unchanged afterwards.
            tensors: named as in `initial`.
            tokens: (B, T, d) from `Backbone.advance`.
            prompts: as for `Backbone.encode`.
        """
        changes = {
            layer: functools.partial(_adapt, tensors, name)
            for name, layer in self._layers(backbone)
        }
        with changed_outputs(changes):
            return super().encode(backbone, tensors, tokens, prompts)

    def _layers(self, backbone: nn.Module) -> list[tuple[str, nn.Module]]:
        """Name and module of each adapted layer."""
        return [
            (f"adapter.{index}.{layer}", getattr(block, layer))
            for index, block in backbone.upper_blocks  # type: ignore[union-attr]
            for layer in LAYERS[self.options.after]
        ]


def _adapt(tensors: Mapping[str, Tensor], name: str, _: Tensor, output: Tensor) -> Tensor:
    """(B, T, d) -> (B, T, d)"""
    inner = F.linear(output, tensors[f"{name}.down.weight"], tensors[f"{name}.down.bias"])
    change = F.linear(F.gelu(inner), tensors[f"{name}.up.weight"], tensors[f"{name}.up.bias"])
    return output + change
