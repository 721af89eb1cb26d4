"""What an attack is: what a share of the clients does instead of honest work.

An attacker may change the labels that it trains on, and the update that it sends. It does both in
every round in which it takes part. Who attacks is a function of the run's seed alone, so that all
methods of a seed meet the same attackers. The server is not told; reports are (`attacks: true`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.core.checks import check_number
from fedprompt.core.errors import ConfigError
from fedprompt.core.registry import Registry
from fedprompt.core.seeding import numpy_generator
from fedprompt.core.types import Broadcast, ClientUpdate, Parts


@dataclasses.dataclass(frozen=True)
class AttackOptions:
    """What all attacks have."""

    share: float = 0.2
    """Share of all clients that attack, rounded to whole clients."""

    def __post_init__(self) -> None:
        check_number("attack.share", self.share, 0, above=True, below=1)


class Attack:
    """Honest work; an attack overrides what it does otherwise."""

    acts: bool = True
    """False: no client attacks."""

    def __init__(self, options: object) -> None:
        self.options = options

    def labels(
        self, labels: NDArray[np.int64], groups: NDArray[np.int64], class_mask: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """(N,) the labels that an attacker trains on, in fresh memory if they differ.

        Args:
            labels: (N,) the true ones.
            groups: (N,) domain of each image.
            class_mask: (groups, C) which classes exist in which domain; a label must exist there.
        """
        return labels

    def tamper(
        self, update: ClientUpdate, before: Broadcast, generator: torch.Generator
    ) -> ClientUpdate:
        """What an attacker sends, in place of what its training gave.

        Args:
            update: of its training.
            before: what it received.
            generator: source of every random draw.
        """
        return update


def attackers_of(seed: int, clients: int, share: float) -> frozenset[int]:
    """The clients that attack.

    Args:
        seed: of the run.
        clients: of the federation.
        share: of them that attack.

    Raises:
        ConfigError: the share is none of the clients, or all.

    >>> sorted(attackers_of(0, 10, 0.2)) == sorted(attackers_of(0, 10, 0.2))
    True
    >>> len(attackers_of(0, 10, 0.2))
    2
    """
    number = round(share * clients)
    if not 0 < number < clients:
        raise ConfigError(
            f"attack.share: expected a share of at least one and not all of {clients} clients, got "
            f"{share:g}, which is {number}; set attack=none for an honest federation"
        )
    chosen = numpy_generator(seed, "attackers").choice(clients, size=number, replace=False)
    return frozenset(chosen.tolist())


def changed(
    update: ClientUpdate, before: Broadcast, change: Callable[[Tensor], Tensor]
) -> ClientUpdate:
    """An update with another change of every trained tensor.

    Args:
        update: of honest training.
        before: what the client received.
        change: makes a float64 change of that of the training; an objective's own tensor counts as
            a change as it is.
    """
    received = before.shared.trained().tensors()

    def moved(start: Tensor, end: Tensor) -> Tensor:
        return (start.double() + change(end.double() - start.double())).to(end.dtype)

    shared = {
        path: moved(received.get(path, torch.zeros_like(tensor)), tensor)
        for path, tensor in update.shared.tensors().items()
    }
    return dataclasses.replace(
        update,
        prompts=moved(before.prompts[update.origins], update.prompts),
        shared=Parts.from_tensors(shared),
    )


attacks: Registry[Attack] = Registry("attack", "fedprompt.attacks")
