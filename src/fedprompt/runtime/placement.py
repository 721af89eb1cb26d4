"""How many client actors fit where: arithmetic on the resources of nodes, without Ray."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fedprompt.errors import ConfigError
from fedprompt.runtime.base import MAX_ACTORS_PER_CPU, RuntimeOptions

GRAIN = 10_000
"""Ray counts resources in ten-thousandths."""


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
            f"{widest:g} CPUs of the largest node; expected runtime.threads <= {widest:g}"
        )
    count = options.actors
    if count is None:
        count = max(1, min(int(total // options.threads), slots(nodes, options.threads)))
        if options.gpus_per_actor:
            count = max(1, min(count, gpu_slots(nodes, options.gpus_per_actor)))
    largest = max(1, math.floor(MAX_ACTORS_PER_CPU * total))
    if count > largest:
        raise ConfigError(
            f"runtime.actors: {count} actors do not fit in the {total:g} CPUs that Ray has; "
            f"expected at most {largest} actors"
        )
    share = options.threads
    if slots(nodes, share) < count:
        return ActorPlan(
            count, largest_share([node.cpus for node in nodes], count), gpus(options, nodes, count)
        )
    return ActorPlan(count, float(share), gpus(options, nodes, count))


def slots(nodes: Sequence[Node], cpus: float) -> int:
    """Actors of `cpus` CPUs that the nodes hold."""
    return sum(_times(node.cpus, cpus) for node in nodes)


def gpu_slots(nodes: Sequence[Node], share: float) -> int:
    """Actors of `share` GPUs that the nodes hold; an actor's fraction lies on one GPU.

    >>> gpu_slots([Node(8, gpus=2)], 0.4)
    4
    >>> gpu_slots([Node(8, gpus=3)], 2)
    1
    """
    if share >= 1:
        return sum(int(node.gpus // share) for node in nodes)
    return sum(int(node.gpus) * _times(1.0, share) for node in nodes)


def largest_share(capacities: Sequence[float], count: int) -> float:
    """The largest equal share of which the capacities hold `count`; 0 if there is nothing.

    >>> largest_share([2.0, 1.0], 4), largest_share([2.0], 2)
    (0.6666, 1.0)
    """
    shares = {
        math.floor(GRAIN * capacity / parts) / GRAIN
        for capacity in capacities
        for parts in range(1, count + 1)
    }
    fitting = [
        share for share in shares if share and sum(_times(c, share) for c in capacities) >= count
    ]
    share = max(fitting, default=0.0)
    return float(int(share)) if share >= 1 else share


def gpus(options: RuntimeOptions, nodes: Sequence[Node], count: int) -> float:
    """GPU that each client actor reserves.

    Raises:
        ConfigError: the GPUs do not hold so many actors of `runtime.gpus_per_actor`.
    """
    total = sum(node.gpus for node in nodes)
    share = options.gpus_per_actor
    if share is None:
        if options.torch_device != "cuda":
            return 0.0
        # One share more: the driver evaluates on a GPU, too.
        whole_gpus = [1.0] * int(total)
        return min(1.0, largest_share(whole_gpus, count + 1))
    fitting = gpu_slots(nodes, share) if share else count
    if fitting < count:
        raise ConfigError(
            f"runtime.gpus_per_actor: {count} actors of {share:g} GPU do not fit in the {total:g} "
            f"GPUs that Ray has, which hold {fitting}; lower runtime.actors or "
            "runtime.gpus_per_actor, or set runtime.gpus_per_actor=0 for the CPU"
        )
    return share


def _times(capacity: float, share: float) -> int:
    """How often a share fits, in Ray's grain, which is exact where floats are not."""
    return round(capacity * GRAIN) // max(1, round(share * GRAIN))
