"""How many client actors fit where: arithmetic on the resources of nodes, without Ray."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fedprompt.core.errors import ConfigError
from fedprompt.core.words import counted
from fedprompt.runtime.base import MAX_ACTORS_PER_CPU, RuntimeOptions

GRAIN = 10_000
"""Ray counts resources in ten-thousandths."""
MANY = 10**9


@dataclasses.dataclass(frozen=True)
class Node:
    """What one machine, or one bundle of a placement group, offers."""

    cpus: float
    gpus: float = 0.0


@dataclasses.dataclass(frozen=True)
class ActorPlan:
    """How many client actors there are, and what each reserves."""

    count: int
    cpus: float
    gpus: float


def plan_actors(options: RuntimeOptions, nodes: Sequence[Node]) -> ActorPlan:
    """Share the nodes among the client actors.

    An actor is on one node, so that a share has to fit node by node: two nodes of 1 CPU hold no
    actor of 2 threads. Actors that outnumber the cores reserve less than their threads.

    >>> plan_actors(RuntimeOptions(cpus=None, threads=1), [Node(2), Node(2)])
    ActorPlan(count=4, cpus=1.0, gpus=0.0)

    Raises:
        ConfigError: they do not fit; the message has the numbers.
    """
    total = sum(node.cpus for node in nodes)
    if options.cpus is not None:
        total = min(total, options.cpus)
    widest = max((node.cpus for node in nodes), default=0.0)
    if options.threads > widest >= 1:
        raise ConfigError(
            f"runtime.threads: {options.threads} threads per worker do not fit in the "
            f"{counted(widest, 'CPU')} of the largest node; expected runtime.threads <= {widest:g}"
        )
    count = options.actors
    if count is None:
        wanted = options.gpus_per_actor or 0.0
        free = slots(nodes, options.threads, wanted) - (_drivers(options) if wanted else 0)
        count = max(1, min(int(total // options.threads), free))
    largest = max(1, math.floor(MAX_ACTORS_PER_CPU * total))
    if count > largest:
        raise ConfigError(
            f"runtime.actors: {counted(count, 'actor')} do not fit in the "
            f"{counted(total, 'CPU')} that Ray has; expected at most {largest} actors"
        )
    gpus = gpu_share(options, nodes, count)
    cpus = float(options.threads)
    if slots(nodes, cpus, gpus) < count:
        cpus = largest_share(nodes, count, gpus)
    return ActorPlan(count, cpus, gpus)


def slots(nodes: Sequence[Node], cpus: float, gpus: float = 0.0) -> int:
    """Actors of so many CPUs and GPUs that the nodes hold.

    Args:
        nodes: what each machine or bundle offers.
        cpus: that an actor reserves.
        gpus: that an actor reserves; a fraction is a part of one GPU.

    An actor's fraction of a GPU lies on one GPU:

    >>> slots([Node(8, gpus=2)], 1, 0.4), slots([Node(3, gpus=2)], 1, 0.4)
    (4, 3)
    """
    return sum(min(_times(node.cpus, cpus), _gpu_slots(node, gpus)) for node in nodes)


def _gpu_slots(node: Node, share: float) -> int:
    if not share:
        return MANY
    if share >= 1:
        return int(node.gpus // share)
    whole = int(node.gpus)
    # A bundle may hold a part of a GPU.
    return whole * _times(1.0, share) + _times(node.gpus - whole, share)


def largest_share(nodes: Sequence[Node], count: int, gpus: float = 0.0) -> float:
    """The largest number of CPUs of which the nodes hold `count` actors; 0 if there is nothing.

    Args:
        nodes: what each machine or bundle offers.
        count: actors to place.
        gpus: that each reserves.

    >>> largest_share([Node(2), Node(1)], 4), largest_share([Node(2)], 2)
    (0.6666, 1.0)
    """
    shares = {
        math.floor(GRAIN * node.cpus / parts) / GRAIN
        for node in nodes
        for parts in range(1, count + 1)
    }
    fitting = [share for share in shares if share and slots(nodes, share, gpus) >= count]
    share = max(fitting, default=0.0)
    return float(int(share)) if share >= 1 else share


def gpu_share(options: RuntimeOptions, nodes: Sequence[Node], count: int) -> float:
    """GPU that each client actor reserves.

    Args:
        options: how many GPUs the user wants for an actor.
        nodes: what each machine or bundle offers.
        count: client actors.

    Raises:
        ConfigError: the GPUs do not hold so many actors of `runtime.gpus_per_actor`.
    """
    share = options.gpus_per_actor
    total = sum(node.gpus for node in nodes)
    if share is None:
        if options.torch_device != "cuda" or not total:
            return 0.0
        # One share more: the driver evaluates on a GPU, too.
        per_gpu = math.ceil((count + 1) / int(total))
        return math.floor(GRAIN / per_gpu) / GRAIN
    fitting = sum(_gpu_slots(node, share) for node in nodes)
    if share:
        fitting -= _drivers(options)
    if fitting < count:
        raise ConfigError(
            f"runtime.gpus_per_actor: {count} actors of {share:g} GPU do not fit in the {total:g} "
            f"GPUs that Ray has, which hold {max(0, fitting)}; lower runtime.actors or "
            "runtime.gpus_per_actor, or set runtime.gpus_per_actor=0 for the CPU"
        )
    return share


def _drivers(options: RuntimeOptions) -> int:
    """Drivers that hold a share of a GPU: the one there is, if it computes on one."""
    return 1 if options.torch_device == "cuda" else 0


def _times(capacity: float, share: float) -> int:
    """How often a share fits, in Ray's grain, which is exact where floats are not."""
    return round(capacity * GRAIN) // max(1, round(share * GRAIN))
