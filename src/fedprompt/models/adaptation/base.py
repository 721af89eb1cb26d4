"""What a client may tune inside the backbone: named tensors, applied to one forward pass at a time.

The one backbone of a worker is shared by all clients and never changes. A tuning says which tensors
there are and how a forward pass uses them; the pass leaves no trace in the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from fedprompt.core.registry import Registry

Output = Callable[[Tensor, Tensor], Tensor]
"""(input, output) of a layer -> the output to go on with"""


class TuningOptions(Protocol):
    """What the options of every tuning but `none` have."""

    @property
    def lr(self) -> float:
        """The clients' learning rate for the tuned tensors."""
        ...


class Tuning:
    """No tuning: the backbone is as it was pre-trained.

    The backbone is typed as `nn.Module`, so that options can be read without importing timm.
    """

    def __init__(self, options: TuningOptions) -> None:
        self.options = options

    @property
    def lr(self) -> float:
        """The clients' learning rate for the tuned tensors."""
        return float(self.options.lr)

    def initial(self, backbone: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors to be trained by name, as the first round begins with them.

        They make the backbone compute what it computes without them.
        """
        return {}

    def encode(
        self,
        backbone: nn.Module,
        tensors: Mapping[str, Tensor],
        tokens: Tensor,
        prompts: Tensor | None = None,
    ) -> Tensor:
        """`Backbone.encode` with tuned tensors.

        Args:
            backbone: a frozen `Backbone`; unchanged afterwards.
            tensors: named as in `initial`.
            tokens: (B, T, d) from `Backbone.advance`.
            prompts: as for `Backbone.encode`.

        Returns:
            (B, feature_dim)
        """
        features: Tensor = backbone.encode(tokens, prompts)  # type: ignore[operator]
        return features


@contextmanager
def changed_outputs(changes: Mapping[nn.Module, Output]) -> Iterator[None]:
    """Let layers give other outputs while the context lasts."""

    def hook(change: Output) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _, inputs, output: change(inputs[0], output)

    handles = [layer.register_forward_hook(hook(change)) for layer, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


tunings: Registry[Tuning] = Registry("tuning", "fedprompt.models.adaptation")
