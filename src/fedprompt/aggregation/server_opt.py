"""FedOpt-PT: the mean is a direction for an optimiser at the server.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2; the momentum rule is Hsu
et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019. With x the broadcast values, Delta = mean - x and element-wise arithmetic:

    m <- beta1 m + (1 - beta1) Delta                    (momentum: m <- beta1 m + Delta)
    adagrad   v <- v + Delta^2
    adam      v <- beta2 v + (1 - beta2) Delta^2
    yogi      v <- v - (1 - beta2) Delta^2 sign(v - Delta^2)
    x <- x + lr m / (sqrt(v) + tau)                     (momentum: x <- x + lr m)

v starts at tau^2 and there is no bias correction, as in the paper. The rule holds for the prompts
(row by row; rows that no client used stay) and for the shared tensors. With `rule=momentum`,
beta1 = 0 and lr = 1 it is federated averaging.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fedprompt.aggregation.base import Aggregation, Aggregator, aggregators
from fedprompt.aggregation.inputs import AggregationInput
from fedprompt.aggregation.mean import Mean, MeanOptions
from fedprompt.core.checks import check_choice, check_number

RULES = ("momentum", "adagrad", "adam", "yogi")


@dataclasses.dataclass(frozen=True)
class ServerOptOptions:
    """Options of the server's optimiser; the defaults are federated averaging."""

    rule: str = "momentum"
    """`momentum`, `adagrad`, `adam` or `yogi`."""
    lr: float = 1.0
    """The server's learning rate for the prompts and the shared tensors."""
    beta1: float = 0.0
    """Momentum."""
    beta2: float = 0.99
    """Memory of the squared changes (adam, yogi)."""
    tau: float = 1e-3
    """Adaptivity: changes far smaller than it are not enlarged (adagrad, adam, yogi)."""

    def __post_init__(self) -> None:
        check_choice("aggregator.rule", self.rule, RULES)
        for field in ("lr", "tau"):
            check_number(f"aggregator.{field}", getattr(self, field), 0, above=True)
        for field in ("beta1", "beta2"):
            check_number(f"aggregator.{field}", getattr(self, field), 0, below=1)


@aggregators.register("server_opt", ServerOptOptions)
class ServerOpt(Aggregator):
    """Row-wise mean, followed by one step of an optimiser. Its state is the moments."""

    keeps_rows = True

    def __init__(self, options: ServerOptOptions) -> None:
        self.options = options
        self._mean = Mean(MeanOptions())

    def merge(self, given: AggregationInput) -> Aggregation:
        """Average row by row and step from `previous`; without it, the mean is all there is."""
        mean = self._mean.merge(given)
        if given.previous is None:
            return mean
        used = torch.zeros(len(given.previous), 1, dtype=torch.bool)
        for rows in mean.assignment:
            used[rows] = True
        prompts, moments = self.step("prompts", mean.prompts, given.previous, given.state, used)
        return dataclasses.replace(mean, prompts=prompts, state=moments)

    def merge_shared(
        self,
        mean: Mapping[str, Tensor],
        previous: Mapping[str, Tensor],
        state: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Step from the broadcast shared tensors towards their mean; see `SharedRule`.

        Args:
            mean: the shared tensors that clients returned, averaged by sample counts.
            previous: those that were broadcast, of the same shapes.
            state: the moments of the last round.
        """
        shared: dict[str, Tensor] = {}
        memory: dict[str, Tensor] = {}
        for name, value in mean.items():
            used = torch.ones((), dtype=torch.bool)
            moved, moments = self.step(f"shared.{name}", value, previous[name], state, used)
            shared[name] = moved
            memory |= moments
        return shared, memory

    def step(
        self,
        name: str,
        mean: Tensor,
        previous: Tensor,
        state: Mapping[str, Tensor],
        used: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of one tensor, in float64.

        Args:
            name: of the moments in `state`: `NAME.first` and `NAME.second`.
            mean: what the clients returned on average.
            previous: what was broadcast, of the same shape.
            state: moments of the last round; missing ones are those of the first round.
            used: which elements move; the others and their moments stay. It broadcasts.

        Returns:
            The new value and its moments, in fresh memory.
        """
        options = self.options
        start = previous.to(torch.float64)
        change = mean.to(torch.float64) - start
        first = state.get(f"{name}.first", torch.zeros_like(change))
        second = state.get(f"{name}.second", torch.full_like(change, options.tau**2))
        fresh = 1.0 if options.rule == "momentum" else 1 - options.beta1
        new_first = options.beta1 * first + fresh * change
        new_second = _second(options, second, change.square())
        scale = 1.0 if options.rule == "momentum" else 1 / (new_second.sqrt() + options.tau)
        moved = torch.where(used, start + options.lr * (new_first * scale), start)
        return moved.to(mean.dtype), {
            f"{name}.first": torch.where(used, new_first, first),
            f"{name}.second": torch.where(used, new_second, second),
        }


def _second(options: ServerOptOptions, second: Tensor, square: Tensor) -> Tensor:
    """v after a round."""
    if options.rule == "adagrad":
        return second + square
    if options.rule == "adam":
        return options.beta2 * second + (1 - options.beta2) * square
    if options.rule == "yogi":
        return second - (1 - options.beta2) * square * torch.sign(second - square)
    return second
