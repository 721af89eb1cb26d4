"""`lora`: a low-rank change of the query, key and value projections of every block above the
prompts.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, Eq. 3. With x the input
of the projection W_qkv (3d, d):

    W_qkv x + (scale / r) B A x,    A (r, d), B (3d, r), B = 0 at first

A and B are averaged apart, as FedAvg of LoRA does; the mean of products is not the product of
means.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedprompt.core.checks import check_integer, check_number
from fedprompt.models.adaptation.base import Tuning, changed_outputs, tunings


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """Options of LoRA."""

    rank: int = 4
    """r"""
    scale: float = 8.0
    """Called alpha in the paper."""
    lr: float = 1e-3
    """The clients' learning rate for A and B."""

    def __post_init__(self) -> None:
        check_number("tuning.lr", self.lr, 0)
        check_integer("tuning.rank", self.rank, 1)
        check_number("tuning.scale", self.scale, 0, above=True)


@tunings.register("lora", LoraOptions)
class Lora(Tuning):
    """Low-rank changes, named `lora.BLOCK.a` and `lora.BLOCK.b`."""

    options: LoraOptions

    def initial(self, backbone: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """A drawn as a linear layer's weight, B zero."""
        tensors: dict[str, Tensor] = {}
        for name, layer in _projections(backbone):
            outputs, inputs = layer.weight.shape  # type: ignore[misc]
            bound = 1 / math.sqrt(inputs)
            a = torch.empty(self.options.rank, inputs).uniform_(-bound, bound, generator=generator)
            tensors[f"{name}.a"] = a
            tensors[f"{name}.b"] = torch.zeros(outputs, self.options.rank)
        return tensors

    def encode(
        self,
        backbone: nn.Module,
        tensors: Mapping[str, Tensor],
        tokens: Tensor,
        prompts: Tensor | None = None,
    ) -> Tensor:
        """The forward pass with low-rank changes.

        Args:
            backbone: a frozen `Backbone`; unchanged afterwards.
            tensors: named as in `initial`.
            tokens: (B, T, d) from `Backbone.advance`.
            prompts: as for `Backbone.encode`.
        """
        factor = self.options.scale / self.options.rank
        changes = {
            layer: functools.partial(_change, tensors[f"{name}.a"], tensors[f"{name}.b"], factor)
            for name, layer in _projections(backbone)
        }
        with changed_outputs(changes):
            return super().encode(backbone, tensors, tokens, prompts)


def _projections(backbone: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of each block's query, key and value projection."""
    return [
        (f"lora.{index}", block.attn.qkv)
        for index, block in backbone.upper_blocks  # type: ignore[union-attr]
    ]


def _change(a: Tensor, b: Tensor, factor: float, inputs: Tensor, output: Tensor) -> Tensor:
    """(B, T, 3d) -> (B, T, 3d)"""
    return output + factor * F.linear(F.linear(inputs, a), b)
