"""What is in flight in an asynchronous run: finished updates that have yet to arrive.

A client's work is a function of the model that it was given. So it is done when the client is
selected, and the update waits in the server's state until its virtual time has come, together with
the model that it began with. A checkpoint holds both, so that a resume goes on with the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedprompt.core.types import ClientState, ClientUpdate, Parts, ServerState, Tensors, by_field
from fedprompt.server.schedules import Schedule

FLIGHT, BASE = "flight", "base"


@dataclasses.dataclass(frozen=True)
class Flight:
    """A client's update on its way."""

    arrival: float
    """Virtual seconds since the run began."""
    version: int
    """Merges that were done before the client received its model."""
    update: ClientUpdate

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors."""
        update = self.update
        metrics = {f"metrics/{name}": _number(x) for name, x in update.metrics.items()}
        return {
            "arrival": _number(self.arrival),
            "facts": torch.tensor([self.version, update.num_examples]),
            **metrics,
            **update.tensors(),
        }

    @classmethod
    def from_tensors(cls, client: int, flat: Tensors) -> Flight:
        """Inverse of `tensors`.

        Args:
            client: whose it is.
            flat: the tensors.
        """
        fields = by_field(flat)
        single = {name: own[""] for name, own in fields.items() if "" in own}
        version, num_examples = single["facts"].tolist()
        update = ClientUpdate(
            client,
            version + 1,
            num_examples,
            prompts=single["prompts"],
            keys=single["keys"],
            origins=single["origins"],
            use_counts=single["use_counts"],
            shared=Parts.from_tensors(fields.get("shared", {})),
            state=ClientState.from_tensors(fields.get("state", {})),
            metrics={name: float(x) for name, x in fields.get("metrics", {}).items()},
            spread=single.get("spread"),
        )
        return cls(float(single["arrival"]), version, update)


def in_flight(memory: Tensors) -> dict[int, Flight]:
    """What is on its way, by client, ascending.

    Args:
        memory: `ServerState.system`.
    """
    flights = by_field(by_field(memory).get(FLIGHT, {}))
    return {k: Flight.from_tensors(k, flights[str(k)]) for k in sorted(map(int, flights))}


def remembered(flights: Mapping[int, Flight], memory: Tensors, state: ServerState) -> Tensors:
    """What the state keeps of flights that go on: they, and the models that they began with.

    Args:
        flights: by client.
        memory: `ServerState.system` before the merge.
        state: before the merge.
    """
    versions = {flight.version for flight in flights.values()}
    kept: dict[str, Tensor] = {}
    for client, flight in flights.items():
        kept.update({f"{FLIGHT}/{client}/{path}": x for path, x in flight.tensors().items()})
    for version in sorted(versions):
        model = model_of(version, memory, state)
        kept.update({f"{BASE}/{version}/{path}": x for path, x in model.items()})
    return kept


def model_of(version: int, memory: Tensors, state: ServerState) -> Tensors:
    """The server's model after so many merges: prompts, keys and shared tensors by path.

    Args:
        version: that of the state, or of a flight.
        memory: `ServerState.system`.
        state: the server's.
    """
    if version == state.round_index:
        shared = {f"shared/{path}": x for path, x in state.shared.trained().tensors().items()}
        return {"prompts": state.prompts, "keys": state.keys, **shared}
    return by_field(by_field(memory)[BASE])[str(version)]


def arrived(
    flight: Flight, schedule: Schedule, step: float, weight: float, state: ServerState
) -> ClientUpdate:
    """The update as it is merged into the present model.

    Args:
        flight: that has arrived.
        schedule: says how it counts.
        step: `system.step`.
        weight: s(tau).
        state: before the merge; its `system` has the model that the client began with.
    """
    update = flight.update
    base = model_of(flight.version, state.system, state)
    now = model_of(state.round_index, state.system, state)

    def moved(path: str, sent: Tensor, rows: Tensor | None = None) -> Tensor:
        if path not in now:
            return sent
        before, present = base[path], now[path]
        if rows is not None:
            before, present = before[rows], present[rows]
        return schedule.moved(sent, before, present, step, weight)

    shared = {path: moved(f"shared/{path}", x) for path, x in update.shared.tensors().items()}
    return dataclasses.replace(
        update,
        round_index=state.round_index + 1,
        prompts=moved("prompts", update.prompts, update.origins),
        keys=moved("keys", update.keys, update.origins),
        shared=Parts.from_tensors(shared),
    )


def earliest(flights: Mapping[int, Flight], count: int) -> list[int]:
    """The clients that arrive first; of equal times the lower number.

    Args:
        flights: by client.
        count: how many at most.
    """
    order: Sequence[tuple[float, int]] = sorted(
        (f.arrival, client) for client, f in flights.items()
    )
    return [client for _, client in order[:count]]


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
