"""The frozen dataclasses that travel between server and clients; each says who writes it and who
reads it.

Two kinds of tensors travel. The *prompt set* with its keys is unordered, its size varies, and the
aggregator merges it. *Shared tensors* have fixed shapes and are merged by weighted mean; `Parts`
says of each what it is: query projection, head, adaptation of the backbone, or the objective's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fedprompt.core.travelling import Travelling

Tensors = Mapping[str, Tensor]

Part = Literal["prompts", "query_projection", "head", "adaptation", "objective"]
PARTS: tuple[Part, ...] = get_args(Part)
"""The fields of `Parts`, in the order of their tensors."""
SINGLE: tuple[Part, ...] = ("prompts", "query_projection")
"""Parts that are one tensor."""
NAMED: tuple[Part, ...] = ("head", "adaptation", "objective")
"""Parts that are named tensors."""
TRAINED: tuple[Part, ...] = ("prompts", "query_projection", "head", "adaptation")
"""Parts that a model is made of and clients train."""
SHARED: tuple[Part, ...] = ("query_projection", "head", "adaptation")
"""Trained parts that are averaged; prompts are merged by an aggregator."""


@dataclasses.dataclass(frozen=True)
class Parts(Travelling):
    """Tensors by what they are; a part that is absent is None or empty.

    Everything that is trained, averaged or kept beside the prompts' keys travels as this. A part
    says what may be done with its tensors, so that a name inside a part means nothing to anyone
    but the part's owner.
    """

    prompts: Tensor | None = None
    """(n, d)"""
    query_projection: Tensor | None = None
    """(d, q), of `prompts.selection=l2p`."""
    head: Tensors = dataclasses.field(default_factory=dict)
    """The classifier's parameters, as its module names them."""
    adaptation: Tensors = dataclasses.field(default_factory=dict)
    """What is tuned inside the backbone, as the tuning names it."""
    objective: Tensors = dataclasses.field(default_factory=dict)
    """The objective's own, as it names them: never trained, and in no model."""

    def labelled(self) -> Iterator[tuple[Part, str, Tensor]]:
        """Part, path and tensor of each; the paths are those of `tensors`."""
        for part in PARTS:
            value = getattr(self, part)
            if isinstance(value, Tensor):
                yield part, part, value
            elif value is not None:
                for name, tensor in value.items():
                    yield part, f"{part}.{name}", tensor

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by path: `PART`, or `PART.NAME`.

        >>> list(Parts(torch.zeros(1), head={"0.bias": torch.zeros(1)}).tensors())
        ['prompts', 'head.0.bias']
        """
        return {path: tensor for _, path, tensor in self.labelled()}

    @classmethod
    def from_tensors(cls, flat: Tensors) -> Parts:
        """Inverse of `tensors`: up to its first dot a path is the name of the part.

        Raises:
            ValueError: there is no such part.
        """
        single: dict[str, Tensor] = {}
        named: dict[str, dict[str, Tensor]] = {part: {} for part in NAMED}
        for path, tensor in flat.items():
            part, dot, name = path.partition(".")
            if part in SINGLE and not dot:
                single[part] = tensor
            elif part in NAMED and dot:
                named[part][name] = tensor
            else:
                raise ValueError(f"expected a path of {', '.join(PARTS)}, got '{path}'")
        return cls(
            single.get("prompts"),
            single.get("query_projection"),
            named["head"],
            named["adaptation"],
            named["objective"],
        )

    def pick(self, parts: Collection[Part]) -> Parts:
        """Some parts alone."""
        return Parts.from_tensors({p: value for part, p, value in self.labelled() if part in parts})

    def only(self, paths: Collection[str]) -> Parts:
        """The tensors with some paths alone."""
        return Parts.from_tensors({p: value for p, value in self.tensors().items() if p in paths})

    def trained(self) -> Parts:
        """All but the objective's own."""
        return self.pick(TRAINED)

    def updated(self, other: Parts) -> Parts:
        """These tensors, with those of another one in their places or beside them."""
        return Parts.from_tensors({**self.tensors(), **other.tensors()})

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Parts:
        """The same paths with changed tensors."""
        return Parts.from_tensors({path: change(value) for path, value in self.tensors().items()})

    def cloned(self) -> Parts:
        """The same values in fresh memory."""
        return self.mapped(fresh)


def by_field(flat: Tensors) -> dict[str, dict[str, Tensor]]:
    """Tensors by what stands before the first slash of their paths, then by what comes after it.

    >>> list(by_field({"a/b/c": torch.zeros(1), "d": torch.zeros(1)}).values())[0].keys()
    dict_keys(['b/c'])
    """
    fields: dict[str, dict[str, Tensor]] = {}
    for path, value in flat.items():
        field, _, rest = path.partition("/")
        fields.setdefault(field, {})[rest] = value
    return fields


def fresh(tensor: Tensor) -> Tensor:
    """A copy without history that no one else holds."""
    return tensor.detach().clone()


@dataclasses.dataclass(frozen=True)
class ClientState(Travelling):
    """What belongs to one client from round to round."""

    kept: Parts = dataclasses.field(default_factory=Parts)
    """Personal prompts and head, and the objective's memory at the client. Written by the client,
    returned with its update; empty before its first round."""
    start: Parts = dataclasses.field(default_factory=Parts)
    """What the client starts from instead of what it receives; see `Objective.remembered`. Written
    by the server."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by path: those of `kept`, and `start.PATH`."""
        starts = {f"start.{path}": value for path, value in self.start.tensors().items()}
        return {**self.kept.tensors(), **starts}

    @classmethod
    def from_tensors(cls, flat: Tensors) -> ClientState:
        """Inverse of `tensors`."""
        kept: dict[str, Tensor] = {}
        start: dict[str, Tensor] = {}
        for path, tensor in flat.items():
            first, _, rest = path.partition(".")
            if first == "start":
                start[rest] = tensor
            else:
                kept[path] = tensor
        return cls(Parts.from_tensors(kept), Parts.from_tensors(start))

    def cloned(self) -> ClientState:
        """The same values in fresh memory."""
        return ClientState(self.kept.cloned(), self.start.cloned())


@dataclasses.dataclass(frozen=True)
class Broadcast(Travelling):
    """What all clients of a round receive. Written by the server, read by clients; sent once."""

    prompts: Tensor
    """(n, d) float32: the summarizing prompts."""
    keys: Tensor
    """(n, q) float32: the address of each prompt in query space. Where clients tell how their
    queries spread, (n, q + 1) discriminants in its place (`data.prefix.spread`)."""
    shared: Parts = dataclasses.field(default_factory=Parts)
    """Everything else that is sent; `shared.prompts` is None."""
    fixed: ClientState = dataclasses.field(default_factory=ClientState)
    """What every client has before its first round: a frozen head, or what personal tensors begin
    with. No round changes it; known to all as the backbone is, and not counted as traffic."""

    def received(self) -> Parts:
        """The shared tensors and the prompts."""
        return dataclasses.replace(self.shared, prompts=self.prompts)

    def model(self, own: Parts) -> Parts:
        """The tensors of a client's model: its own, else those that it has from the beginning, else
        the server's.

        Args:
            own: what the client keeps; empty for the global model.
        """
        return self._with_own(self.received(), own)

    def start(self, state: ClientState) -> Parts:
        """The tensors that a client's training starts from: `model`, but that what it starts from
        takes the place of what it receives.
        """
        received = self.received().updated(self.fixed.start).updated(state.start)
        return self._with_own(received, state.kept)

    def _with_own(self, received: Parts, own: Parts) -> Parts:
        first = self.fixed.kept.trained()
        return received.trained().updated(first).updated(own.trained())


@dataclasses.dataclass(frozen=True)
class ClientJob(Travelling):
    """Everything one client needs for one round. Written by the server, read by one client."""

    client_id: int
    round_index: int
    """1 for the first round."""
    seed: int
    """Seed of every random draw of this job."""
    broadcast: Broadcast
    state: ClientState = dataclasses.field(default_factory=ClientState)
    """The client's own tensors, as its last update left them."""
    tells_spread: bool = False
    """Whether the server does not know yet how the client's queries spread, and asks for it."""


@dataclasses.dataclass(frozen=True)
class ClientUpdate(Travelling):
    """What a client sends back. Written by the client; `server.quarantine` checks all of it before
    use.
    """

    client_id: int
    round_index: int
    """Of the job."""
    num_examples: int
    prompts: Tensor
    """(n_t, d) float32: the tuned prompts that the client used."""
    keys: Tensor
    """(n_t, q) float32: each tuned prompt's address."""
    origins: Tensor
    """(n_t,) int64: the broadcast row that each prompt started from."""
    use_counts: Tensor
    """(n_t,) int64: the training steps in which each prompt was used."""
    shared: Parts = dataclasses.field(default_factory=Parts)
    """Everything else that is sent; `shared.prompts` is None."""
    state: ClientState = dataclasses.field(default_factory=ClientState)
    """What the client keeps. It would not travel in reality."""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """`steps`, `seconds` and `pack` (how many clients were trained together), and of a client that
    trained `loss` and `accuracy`, means over the last local epoch."""
    spread: Tensor | None = None
    """How the client's queries spread, where the job asks for it: a packed triangle, float32
    (`data.prefix.spread.triangular_factor`)."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by path: `prompts`, `keys`, `origins`, `use_counts`, `spread` if there is
        one, `shared/PATH` and `state/PATH`.
        """
        flat = {field: getattr(self, field) for field in SETS}
        if self.spread is not None:
            flat["spread"] = self.spread
        flat.update({f"shared/{path}": value for path, value in self.shared.tensors().items()})
        flat.update({f"state/{path}": value for path, value in self.state.tensors().items()})
        return flat


SETS = ("prompts", "keys", "origins", "use_counts")
"""The fields of an update with a row for each of its prompts."""


@dataclasses.dataclass(frozen=True)
class ServerState:
    """Everything the server carries from round to round. Written by `server.round`, read by all."""

    round_index: int
    """Number of finished rounds."""
    prompts: Tensor
    keys: Tensor
    shared: Parts = dataclasses.field(default_factory=Parts)
    aggregator: Tensors = dataclasses.field(default_factory=dict)
    """The aggregator's own memory."""
    generator: Tensors = dataclasses.field(default_factory=dict)
    """The prompt generator's own memory."""
    objective: Tensors = dataclasses.field(default_factory=dict)
    """The objective's own memory at the server."""
    spread: Tensors = dataclasses.field(default_factory=dict)
    """How clients' queries spread, and what is broadcast in place of the keys: `server.spread`."""
    system: Tensors = dataclasses.field(default_factory=dict)
    """The virtual clock, empty where there is none: `server.virtual`."""
    clients: Mapping[int, ClientState] = dataclasses.field(default_factory=dict)
    """What belongs to the clients that returned some."""
    fixed: ClientState = dataclasses.field(default_factory=ClientState)
    """What a client has before its first round; no round changes it."""

    def broadcast(self) -> Broadcast:
        """What the clients of the next round receive."""
        keys = self.spread.get("discriminants", self.keys)
        return Broadcast(self.prompts, keys, self.shared, self.fixed)

    def received(self) -> Parts:
        """The shared tensors and the prompts."""
        return self.broadcast().received()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by path, `FIELD` or `FIELD/PATH`: `prompts`, `keys`, `shared/PATH`,
        `aggregator/NAME`, `generator/NAME`, `objective/NAME`, `spread/NAME`, `system/NAME`,
        `clients/ID/PATH`, `fixed/PATH`.
        """
        fields: dict[str, Tensors] = {
            "shared": self.shared.tensors(),
            **{field: getattr(self, field) for field in MEMORIES},
            **{f"clients/{client}": state.tensors() for client, state in self.clients.items()},
            "fixed": self.fixed.tensors(),
        }
        flat = {"prompts": self.prompts, "keys": self.keys}
        for field, tensors in fields.items():
            flat.update({f"{field}/{path}": value for path, value in tensors.items()})
        return flat

    @classmethod
    def from_tensors(cls, round_index: int, flat: Tensors) -> ServerState:
        """Inverse of `tensors`: up to its first slash a path is the name of the field.

        Raises:
            KeyError: no prompts or keys.
            ValueError: a path that `tensors` does not give.
        """
        fields: dict[str, dict[str, Tensor]] = {}
        clients: dict[int, dict[str, Tensor]] = {}
        for path, value in flat.items():
            field, _, rest = path.partition("/")
            if field == "clients":
                client_id, _, rest = rest.partition("/")
                clients.setdefault(int(client_id), {})[rest] = value
            elif field in ("prompts", "keys", "shared", "fixed", *MEMORIES):
                fields.setdefault(field, {})[rest] = value
            else:
                raise ValueError(f"unknown tensor '{path}'")
        return cls(
            round_index,
            flat["prompts"],
            flat["keys"],
            Parts.from_tensors(fields.get("shared", {})),
            **{field: fields.get(field, {}) for field in MEMORIES},
            clients={client: ClientState.from_tensors(own) for client, own in clients.items()},
            fixed=ClientState.from_tensors(fields.get("fixed", {})),
        )

    def sha256(self) -> str:
        """Digest of the round and of all tensors' names, types, shapes and bytes."""
        digest = hashlib.sha256(str(self.round_index).encode())
        for name, tensor in sorted(self.tensors().items()):
            array = tensor.detach().cpu().contiguous()
            digest.update(f"{name}|{array.dtype}|{tuple(array.shape)}|".encode())
            digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


MEMORIES = ("aggregator", "generator", "objective", "spread", "system")
"""The fields of a server state that are named tensors, which their owner alone understands."""


@dataclasses.dataclass(frozen=True)
class RoundReport:
    """What is reported of a round: one line of `rounds.jsonl`. Written by `server.round`."""

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
    alone_accuracy: float = math.nan
    """Global model on the test split, with prompts that each image selects by itself; NaN where
    not measured. The same as `accuracy` where images select nothing."""
    alone_validation_accuracy: float = math.nan
    class_accuracy: tuple[float, ...] = ()
    domain_accuracy: tuple[float, ...] = ()
    """Of each domain's test images; NaN for a domain without."""
    personalised: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Every client's own model on its own share of a split, `test` and `validation`: mean,
    deviation, worst tenth, Jain's index and each client's accuracy. Empty if not measured."""
    virtual_seconds: float = math.nan
    """That the round takes on the clients' devices (`server.virtual`); NaN without virtual time."""
    virtual_hours: float = math.nan
    """Of virtual time since the run began."""
    epsilon: float = math.nan
    """Of client-level differential privacy, that the rounds so far used up; NaN without."""
    missed: tuple[Mapping[str, Any], ...] = ()
    """`client`, `why` (`dropped`, `late` or `surplus`) and `seconds` of each client of the cohort
    that was not merged."""
    clients: tuple[Mapping[str, Any], ...] = ()
    quarantined: tuple[Mapping[str, Any], ...] = ()
    """`client` and `reason` of each refused update."""
    diagnostics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the aggregator says of its work."""
