"""What an asynchronous schedule is: how far an update that has arrived moves the server's model.

A schedule moves the update to the server's present model. What it makes of it is then merged as the
updates of a synchronous round are, by the same aggregator and with the same weights.
"""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import Tensor

from fedprompt.core.checks import check_number
from fedprompt.core.errors import ConfigError

FUNCTIONS = {"constant": (), "polynomial": ("a",), "hinge": ("a", "b")}
"""Staleness functions and their parameters."""


@dataclasses.dataclass(frozen=True)
class Staleness:
    """s(tau) of Xie et al., Section 5.2: at most 1, and 1 without staleness.

    | name             | s(tau)                                             |
    |------------------|----------------------------------------------------|
    | `constant`       | 1                                                  |
    | `polynomial:A`   | (1 + tau)^-A                                       |
    | `hinge:A:B`      | 1 if tau <= B, else 1 / (A (tau - B) + 1)          |
    """

    name: str
    a: float = 0.0
    b: float = 0.0

    @classmethod
    def of(cls, key: str, text: str) -> Staleness:
        """Read it from an option.

        Args:
            key: of the option, for messages.
            text: its value.

        Raises:
            ConfigError: it is written otherwise.
        """
        name, *given = text.split(":")
        try:
            numbers = list(map(float, given))
        except ValueError:
            numbers = [-1.0] * 3  # of no function
        if name not in FUNCTIONS or len(numbers) != len(FUNCTIONS[name]):
            raise ConfigError(
                f"{key}: expected constant, polynomial:A or hinge:A:B with numbers, got '{text}'"
            )
        for parameter, number in zip(FUNCTIONS[name], numbers, strict=True):
            check_number(f"{key}: {parameter.upper()} of {name}", number, 0)
        return cls(name, *numbers)

    def weight(self, tau: int) -> float:
        """s(tau).

        Args:
            tau: merges since the client received its model, from 0.

        >>> Staleness("polynomial", 0.5).weight(3), Staleness("hinge", 2.0, 1.0).weight(3)
        (0.5, 0.2)
        """
        if self.name == "polynomial":
            return float((1 + tau) ** -self.a)
        if self.name == "hinge" and tau > self.b:
            return 1 / (self.a * (tau - self.b) + 1)
        return 1.0


class Schedule(abc.ABC):
    """How one update that has arrived counts."""

    default_step: float
    """Of `system.step`, where it is null."""
    takes_buffer: bool
    """Whether `system.buffer` says how many updates are merged together; one, if not."""

    @abc.abstractmethod
    def moved(self, sent: Tensor, base: Tensor, now: Tensor, step: float, weight: float) -> Tensor:
        """What takes the place of a tensor that a client sent.

        Args:
            sent: by the client.
            base: what the client received, of the same shape.
            now: the server's, of the same shape.
            step: `system.step`.
            weight: s(tau).
        """


def towards(origin: Tensor, target: Tensor, start: Tensor, factor: float) -> Tensor:
    """origin + factor (target - start), computed in float64.

    Args:
        origin: where the step begins.
        target: its end, if it were whole and began at `start`.
        start: where it was computed.
        factor: the part of it that is taken.
    """
    wide = torch.float64
    return (origin.to(wide) + factor * (target.to(wide) - start.to(wide))).to(target.dtype)
