"""The two small networks of PFPT's generative model.

Weng et al., "Probabilistic Federated Prompt-Tuning with Non-IID and Imbalanced Data", NeurIPS
2024, arXiv 2502.19752, Section 3: alpha(phi; gamma), the variance of local prompts around the
summarizing prompt phi (Eq. 4-8), and g(phi; w), the logit of the probability that a client uses
phi. Both are perceptrons with one hidden layer.

| paper           | code              | shape            |
|-----------------|-------------------|------------------|
| alpha(.; gamma) | `variance_net`    | d -> hidden -> d |
| g(.; w)         | `inclusion_net`   | d -> hidden -> 1 |
| alpha(phi)      | `alpha`           | (n, d)           |
| g(phi)          | `inclusion_logit` | (n,)             |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

NAMES = ("variance_net", "inclusion_net")


class PromptNets(nn.Module):
    """alpha(.; gamma) and g(.; w); fresh weights come from `generator` and nothing else.

    Weights and biases are uniform within 1 / sqrt(fan-in), as in a new `torch.nn.Linear`.

    Args:
        d: dimension of a prompt.
        hidden: width of both hidden layers.
        generator: source of the weights, on the CPU.
        dtype: of the weights.
    """

    def __init__(
        self,
        d: int,
        hidden: int,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.variance_net = _perceptron((d, hidden, d), generator, dtype)
        self.inclusion_net = _perceptron((d, hidden, 1), generator, dtype)

    def alpha(self, prompts: Tensor) -> Tensor:
        """(n, d) in (0, 1): a variance in the paper, a standard deviation in the released code."""
        return torch.sigmoid(cast(Tensor, self.variance_net(prompts)))

    def inclusion_logit(self, prompts: Tensor) -> Tensor:
        """(n,) g(phi), the log odds that a client uses each of the (n, d) prompts."""
        return cast(Tensor, self.inclusion_net(prompts)).squeeze(-1)

    def to_state(self, prefix: str = "") -> dict[str, Tensor]:
        """Copies of the weights, called `variance_net.0.weight` and so on after the prefix."""
        return {prefix + name: value.detach().clone() for name, value in self.state_dict().items()}

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        prefix: str = "",
        dtype: torch.dtype = torch.float32,
    ) -> PromptNets:
        """Rebuild from what `to_state` returned; other entries of `state` are left alone.

        Args:
            state: by name, see `state_shapes`.
            prefix: of the names.
            dtype: of the weights.
        """
        hidden, d = state[f"{prefix}variance_net.0.weight"].shape
        nets = cls(d, hidden, torch.Generator(), dtype)
        nets.load_state_dict({name: state[prefix + name] for name in nets.state_dict()})
        return nets


def state_shapes(d: int, hidden: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """What `PromptNets.to_state` holds, for `check_state`.

    Args:
        d: dimension of a prompt.
        hidden: width of both hidden layers.
        prefix: of the names.

    >>> state_shapes(8, 4)["inclusion_net.0.weight"]
    (4, 8)
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, out in zip(NAMES, (d, 1), strict=True):
        shapes[f"{prefix}{name}.0.weight"] = (hidden, d)
        shapes[f"{prefix}{name}.0.bias"] = (hidden,)
        shapes[f"{prefix}{name}.2.weight"] = (out, hidden)
        shapes[f"{prefix}{name}.2.bias"] = (out,)
    return shapes


def _perceptron(
    widths: tuple[int, int, int], generator: torch.Generator, dtype: torch.dtype
) -> nn.Sequential:
    """Linear, ReLU, linear."""
    d, hidden, out = widths
    return nn.Sequential(
        _linear(d, hidden, generator, dtype), nn.ReLU(), _linear(hidden, out, generator, dtype)
    )


def _linear(fan_in: int, out: int, generator: torch.Generator, dtype: torch.dtype) -> nn.Linear:
    """`nn.Linear` without its own draw, which would come from the global generator."""
    empty = nn.utils.skip_init(nn.Linear, fan_in, out, dtype=dtype)  # type: ignore[no-untyped-call]
    layer = cast(nn.Linear, empty)
    bound = 1 / math.sqrt(fan_in)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
