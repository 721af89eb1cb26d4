"""Classification heads on the CLS feature: `linear`, and `released` (the head of PFPT's released
code).

Weights and dropout masks are drawn from a generator that the caller seeds, never from torch's
global one.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from fedprompt.core.checks import check_choice, check_integer, check_number
from fedprompt.core.devices import send
from fedprompt.core.errors import ConfigError, suggest

HEADS = ("linear", "released")
MODES = ("shared", "personal", "frozen")
FITS = ("logistic", "class_means")
STARTS = ("drawn", "ncm", "cof", "ridge")


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """What stands on the backbone and how it is trained."""

    name: str = "released"
    """`linear`, or `released`: linear, dropout, linear (PFPT's released code)."""
    hidden: int = 512
    """Width between the two linear layers of `released`."""
    dropout: float = 0.5
    """Between the two linear layers of `released`."""
    bias: bool = True
    """Whether the linear layers have biases."""
    lr: float = 3e-3
    """Adam's learning rate for the head."""
    mode: str = "shared"
    """`shared`: the clients train it and the server averages it; `personal`: every client trains
    and keeps its own; `frozen`: fitted once on the task's public images, so that prompts alone are
    federated."""
    fit: str = "logistic"
    """How a frozen head is fitted: logistic regression, or `class_means` in closed form."""
    start: str = "drawn"
    """What a head that is trained begins with: `drawn` weights, or what a rule of
    `objective=closed_form` makes of the class sums that all clients send before the first round.
    That objective itself ignores it."""

    def __post_init__(self) -> None:
        check_choice("head.mode", self.mode, MODES)
        check_choice("head.fit", self.fit, FITS)
        check_choice("head.start", self.start, STARTS)
        solved = self.start != "drawn"
        if solved and (self.name, self.bias, self.mode == "frozen") != ("linear", False, False):
            raise ConfigError(
                f"head.start={self.start}: gives a linear head without biases that is trained on; "
                "expected head.name=linear, head.bias=false and head.mode=shared or personal, got "
                f"'{self.name}', {str(self.bias).lower()} and '{self.mode}'"
            )
        if self.mode == "frozen" and not self.bias:
            raise ConfigError(
                "head.mode=frozen is fitted with biases; expected head.bias=true, got false"
            )
        if self.mode == "frozen" and self.name != "linear":
            raise ConfigError(
                "head.mode=frozen is fitted by logistic regression and so is linear; "
                f"expected head.name=linear, got '{self.name}'; head=frozen sets both"
            )
        if self.name not in HEADS:
            raise ConfigError(
                f"unknown head '{self.name}': expected one of {', '.join(HEADS)}"
                f"{suggest(self.name, HEADS)}"
            )
        check_integer("head.hidden", self.hidden, 1)
        check_number("head.dropout", self.dropout, 0, below=1)
        check_number("head.lr", self.lr, 0)


class SeededDropout(nn.Module):
    """Dropout whose masks come from its own generator and so depend on the job's seed alone."""

    def __init__(self, rate: float, generator: torch.Generator) -> None:
        super().__init__()
        self.rate = rate
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """In training, zero with probability `rate` and scale the rest by 1 / (1 - rate)."""
        if not self.training or self.rate == 0:
            return x
        # Drawn on the CPU, so that the masks are the same on every device.
        keep = send(torch.rand(x.shape, generator=self.generator) >= self.rate, x.device)
        return x * keep.to(x.dtype) / (1 - self.rate)


def build_head(
    options: HeadOptions, embed_dim: int, num_classes: int, generator: torch.Generator
) -> nn.Sequential:
    """A head from (B, embed_dim) features to (B, num_classes) logits.

    Args:
        options: which head.
        embed_dim: width of the features.
        num_classes: number of classes.
        generator: draws the initial weights, and the dropout masks afterwards.
    """
    if options.name == "linear":
        return nn.Sequential(_linear(embed_dim, num_classes, generator, options.bias))
    # The released head has no activation between its layers.
    return nn.Sequential(
        _linear(embed_dim, options.hidden, generator, options.bias),
        SeededDropout(options.dropout, generator),
        _linear(options.hidden, num_classes, generator, options.bias),
    )


def _linear(inputs: int, outputs: int, generator: torch.Generator, bias: bool) -> nn.Linear:
    """`nn.Linear` with torch's default U(-1/sqrt(inputs), 1/sqrt(inputs)), from `generator`."""
    layer: nn.Linear = nn.utils.skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, inputs, outputs, bias=bias
    )
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        if bias:
            layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
