"""The frozen dataclasses that travel between server and clients; each says who writes it and who
reads it.

Two kinds of tensors travel. The *prompt set* is unordered, its size varies, the aggregator merges
it. *Shared tensors* are named and of fixed shape (head, query projection) and are merged by
weighted mean.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

Tensors = Mapping[str, Tensor]


class Travelling:
    """A dataclass that is pickled with its tensors as arrays; torch's own way takes ten times as
    long, which is most of what a task costs beside its work. What arrives shares no memory.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return _arrive, (type(self), {name: _packed(getattr(self, name)) for name in names})


class _Packed(NamedTuple):
    """A tensor on its way."""

    array: NDArray[Any]


def _packed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    plain = isinstance(value, Tensor) and value.device.type == "cpu" and not value.requires_grad
    # NumPy does not know bfloat16.
    return _Packed(value.numpy()) if plain and value.dtype != torch.bfloat16 else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in value.items()}
    # Copied: what comes out of Ray's object store may not be written to.
    return torch.from_numpy(value.array.copy()) if isinstance(value, _Packed) else value


def _arrive(kind: type[Any], fields: dict[str, Any]) -> Any:
    return kind(**{name: _unpacked(value) for name, value in fields.items()})


@dataclasses.dataclass(frozen=True)
class Broadcast(Travelling):
    """What all clients of a round receive. Written by the server, read by clients; sent once."""

    prompts: Tensor
    """(n, d) float32: the summarizing prompts."""
    keys: Tensor
    """(n, q) float32: the address of each prompt in query space."""
    shared: Tensors
    """Named tensors of fixed shape."""
    fixed: Tensors = dataclasses.field(default_factory=dict)
    """Named tensors that do not change: a frozen head, or what personal tensors begin with; known
    to all as the backbone is, and not counted as traffic."""


@dataclasses.dataclass(frozen=True)
class ClientJob(Travelling):
    """Everything one client needs for one round. Written by the server, read by one client."""

    client_id: int
    round_index: int
    seed: int
    """Seed of every random draw of this job."""
    broadcast: Broadcast
    state: Tensors = dataclasses.field(default_factory=dict)
    """The client's own tensors, returned with its last update; empty the first time."""


@dataclasses.dataclass(frozen=True)
class ClientUpdate(Travelling):
    """What a client sends back. Written by the client; the server checks it before use."""

    client_id: int
    num_examples: int
    prompts: Tensor
    """(n_t, d) float32: the tuned prompts that the client used."""
    keys: Tensor
    """(n_t, q) float32: each tuned prompt's address."""
    origins: Tensor
    """(n_t,) int64: the broadcast row that each prompt started from."""
    use_counts: Tensor
    """(n_t,) int64: the training steps in which each prompt was used."""
    shared: Tensors
    state: Tensors
    metrics: Mapping[str, float]
    """`loss`, `accuracy` (means over the last local epoch), `steps`, `seconds`, and `pack`: how
    many clients were trained together."""


@dataclasses.dataclass(frozen=True)
class ServerState:
    """Everything the server carries from round to round. Written by `server.round`, read by all."""

    round_index: int
    """Number of finished rounds."""
    prompts: Tensor
    keys: Tensor
    shared: Tensors
    aggregator: Tensors = dataclasses.field(default_factory=dict)
    """The aggregator's own memory."""
    clients: Mapping[int, Tensors] = dataclasses.field(default_factory=dict)
    """Own tensors of the clients that returned some."""
    fixed: Tensors = dataclasses.field(default_factory=dict)
    """Tensors that no round changes: a frozen head, what personal tensors begin with."""
    objective: Tensors = dataclasses.field(default_factory=dict)
    """The objective's own memory at the server."""

    def broadcast(self) -> Broadcast:
        """What the clients of the next round receive."""
        return Broadcast(self.prompts, self.keys, self.shared, self.fixed)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: `prompts`, `keys`, `shared/X`, `aggregator/X`, `clients/ID/X`,
        `fixed/X`, `objective/X`.
        """
        flat = {"prompts": self.prompts, "keys": self.keys}
        flat.update({f"shared/{name}": value for name, value in self.shared.items()})
        flat.update({f"aggregator/{name}": value for name, value in self.aggregator.items()})
        for client_id, tensors in self.clients.items():
            flat.update({f"clients/{client_id}/{name}": value for name, value in tensors.items()})
        flat.update({f"fixed/{name}": value for name, value in self.fixed.items()})
        flat.update({f"objective/{name}": value for name, value in self.objective.items()})
        return flat

    @classmethod
    def from_tensors(cls, round_index: int, flat: Tensors) -> ServerState:
        """Inverse of `tensors`."""
        kinds = ("shared", "aggregator", "fixed", "objective")
        named: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        clients: dict[int, dict[str, Tensor]] = {}
        for name, value in flat.items():
            kind, _, rest = name.partition("/")
            if kind in named:
                named[kind][rest] = value
            elif kind == "clients":
                client_id, _, key = rest.partition("/")
                clients.setdefault(int(client_id), {})[key] = value
        return cls(round_index, flat["prompts"], flat["keys"], clients=clients, **named)

    def sha256(self) -> str:
        """Digest of the round and of all tensors' names, types, shapes and bytes."""
        digest = hashlib.sha256(str(self.round_index).encode())
        for name, tensor in sorted(self.tensors().items()):
            array = tensor.detach().cpu().contiguous()
            digest.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
            digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class RoundReport:
    """What a finished round tells: one line of `rounds.jsonl`. Written by `server.round`."""

    round: int
    """1 for the first round."""
    accuracy: float
    """Global model on the test split; NaN in rounds without evaluation."""
    loss: float
    validation_accuracy: float
    train_loss: float
    """Mean of the clients' losses over their last local epoch, weighted by samples."""
    num_prompts: int
    bytes_up: int
    bytes_down: int
    seconds: Mapping[str, float]
    """`train`, `aggregate`, `evaluate`, each from its start to its end. `evaluate` goes on while
    the next round trains, so that these do not add up to the time that passed."""
    wall_seconds: float = math.nan
    """Time that passed since the round before was reported; rounds add up to that of the run."""
    balanced_accuracy: float = math.nan
    """Mean of the classes' accuracies on the test split."""
    class_accuracy: tuple[float, ...] = ()
    personalised: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Every client's own model on its own share of a split, `test` and `validation`: mean,
    deviation, worst tenth, Jain's index and each client's accuracy. Empty if not measured."""
    clients: tuple[Mapping[str, Any], ...] = ()
    quarantined: tuple[Mapping[str, Any], ...] = ()
    """`client` and `reason` of each refused update."""
    diagnostics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the aggregator says of its work."""
