"""What a defence is: a rule at the server that sees the whole updates of a round.

It stands between the check of the updates and everything that merges them, and maps updates to
updates: it leaves some out, changes their tensors, or does nothing. The weighted mean, the
objective's server half and the aggregator go on with what it returns. It sees all that travels:
prompts, keys, projection, head, adaptation and the objective's own tensors. What a client keeps for
itself is no server's business, and passes unchanged.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.core.registry import Registry
from fedprompt.core.types import Broadcast, ClientUpdate, Parts

Array: TypeAlias = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Updates:
    """A round's usable updates, and what they answer. Written by the round, read by a defence."""

    updates: Sequence[ClientUpdate]
    """In ascending order of clients; each has been checked."""
    before: Broadcast
    """What the clients received. A generator gives each client prompts of its own: see `prompts`.
    """
    prompts: Mapping[int, Tensor]
    """(n, d) the prompts that each client received."""

    def __len__(self) -> int:
        return len(self.updates)

    def shared_changes(self) -> Array:
        """(m, S) what each client did to the shared tensors, all of them in one row.

        A trained tensor counts by its difference to what was broadcast, an objective's own tensor
        as it was sent.
        """
        received = self.before.shared.trained().tensors()
        return np.stack(
            [
                _row(
                    tensor.double() - received[path].double()
                    if path in received
                    else tensor.double()
                    for path, tensor in update.shared.tensors().items()
                )
                for update in self.updates
            ]
        )

    def prompt_changes(self) -> Array:
        """(m, n d) what each client did to the prompts, by broadcast row; 0 where it used none."""
        return np.stack([_row([self.prompt_change(update)]) for update in self.updates])

    def prompt_change(self, update: ClientUpdate) -> Tensor:
        """(n, d) float64 what a client did to the prompts; 0 in rows that it did not use."""
        received = self.prompts[update.client_id].double()
        change = torch.zeros_like(received)
        change[update.origins] = update.prompts.double() - received[update.origins]
        return change

    def changes(self) -> Array:
        """(m, S + n d) both."""
        return np.concatenate([self.shared_changes(), self.prompt_changes()], axis=1)

    def scaled(self, update: ClientUpdate, factor: float) -> ClientUpdate:
        """An update whose every change is `factor` times what it was.

        Args:
            update: one of `updates`.
            factor: 1 leaves it as it is.
        """
        received = self.before.shared.trained().tensors()
        shared = {
            path: (
                _towards(received[path], tensor, factor)
                if path in received
                else (tensor.double() * factor).to(tensor.dtype)
            )
            for path, tensor in update.shared.tensors().items()
        }
        start = self.prompts[update.client_id][update.origins]
        return dataclasses.replace(
            update,
            prompts=_towards(start, update.prompts, factor),
            shared=Parts.from_tensors(shared),
        )


@dataclasses.dataclass(frozen=True)
class Defended:
    """What a defence makes of a round's updates."""

    updates: Sequence[ClientUpdate]
    """Those that are merged, at least one, in ascending order of clients; each of one client of the
    round, with the same names and shapes. The given ones stay unchanged."""
    actions: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """What was done to a client's update, in a few words, by client: `left out`."""


class Defence(abc.ABC):
    """Sees whole updates; a plug-in derives from it and has one method, `defend`."""

    acts: bool = True
    """False: it does nothing, and the round does not ask it."""
    any_prompts: bool = True
    """False: it needs prompts of which a row means the same at every client, as the aggregators
    `mean` and `server_opt` keep them."""

    def __init__(self, options: object) -> None:
        self.options = options

    @abc.abstractmethod
    def defend(self, given: Updates) -> Defended:
        """Decide what of the updates is merged.

        Args:
            given: a round's usable updates.
        """

    def fault_of_cohort(self, size: int) -> str | None:
        """Why the rule has no meaning for cohorts of a size, or None; asked when an experiment is
        composed.

        Args:
            size: clients of a round.
        """
        return None


class RobustMean(Defence):
    """A rule that puts one robust centre in the place of what clients returned.

    Every update gets the centre's tensors, so that each mean that is taken of them later is the
    centre, whatever the clients' weights. There is one centre for all shared tensors together, and
    one for each row of the prompts and of their keys, among the clients that used the row. A row
    that a single client used is that client's.
    """

    any_prompts = False

    @abc.abstractmethod
    def centre(self, values: Array) -> Array:
        """(D,) the centre of m clients' values.

        Args:
            values: (m, D), m >= 1.
        """

    def defend(self, given: Updates) -> Defended:
        """Replace the tensors of all updates.

        Args:
            given: a round's usable updates.
        """
        shared = given.updates[0].shared.tensors()
        flat = self.centre(
            np.stack([_row(each.shared.tensors().values()) for each in given.updates])
        )
        centred = Parts.from_tensors(dict(_cut(flat, shared)))
        prompts = self._rows([(each.origins, each.prompts) for each in given.updates])
        keys = self._rows([(each.origins, each.keys) for each in given.updates])
        return Defended(
            [
                dataclasses.replace(
                    update,
                    shared=centred.cloned(),
                    prompts=_stacked(prompts, update.origins, update.prompts),
                    keys=_stacked(keys, update.origins, update.keys),
                )
                for update in given.updates
            ]
        )

    def _rows(self, sets: Sequence[tuple[Tensor, Tensor]]) -> dict[int, Array]:
        """The centre of each row, from the rows' numbers and values of each client."""
        users: dict[int, list[Array]] = {}
        for origins, values in sets:
            for row, value in zip(origins.tolist(), values.double().numpy(), strict=True):
                users.setdefault(row, []).append(value)
        return {row: self.centre(np.stack(values)) for row, values in users.items()}


def _row(tensors: Iterable[Tensor]) -> Array:
    """Tensors one after the other, float64."""
    rows = [tensor.double().reshape(-1).numpy() for tensor in tensors]
    return np.concatenate(rows) if rows else np.zeros(0)


def _cut(row: Array, like: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Inverse of `_row`."""
    start = 0
    for path, tensor in like.items():
        piece = torch.from_numpy(row[start : start + tensor.numel()].copy())
        yield path, piece.reshape(tensor.shape).to(tensor.dtype)
        start += tensor.numel()


def _stacked(rows: Mapping[int, Array], origins: Tensor, like: Tensor) -> Tensor:
    """The rows that a client used, in its order."""
    if not len(origins):
        return like.clone()
    return torch.from_numpy(np.stack([rows[row] for row in origins.tolist()])).to(like.dtype)


def _towards(start: Tensor, end: Tensor, factor: float) -> Tensor:
    """start + factor (end - start), in the type of `end`."""
    moved = start.double() + factor * (end.double() - start.double())
    return moved.to(end.dtype)


defences: Registry[Defence] = Registry("defence", "fedprompt.defences")
