"""Nodes of the cluster: what they have, and which one this process is on."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from fedprompt.core.errors import ConfigError
from fedprompt.runtime.base import RuntimeOptions
from fedprompt.runtime.placement import Node, gpu_share
from fedprompt.runtime.ray.local import import_ray, node_id
from fedprompt.runtime.ray.private import head_resource


def available_nodes() -> list[Node]:
    """What there is for client actors: the bundles of this process's group, or the live nodes."""
    ray = import_ray()
    group = ray.util.get_current_placement_group()
    if group is not None:
        resources = group.bundle_specs
    else:
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(each.get("CPU", 0.0), each.get("GPU", 0.0)) for each in resources]


def gpu_of_driver(options: RuntimeOptions) -> float:
    """GPU that the driver reserves for its evaluations: as much as a client actor, at most one."""
    if options.torch_device != "cuda":
        return 0.0
    count = options.actors or options.num_actors
    return min(1.0, gpu_share(options, available_nodes(), count))


def driver_resources(place: str | None) -> dict[str, float]:
    """What the driver asks for so that Ray puts it where `runtime.driver_node` says.

    Raises:
        ConfigError: no node is called so.
    """
    if place is None:
        return {}
    known = import_ray().cluster_resources()
    for name in (head_resource(known) if place == "head" else f"node:{place}", place):
        if name in known:
            return {name: 0.001}
    names = [name.removeprefix("node:") for name in known if name.startswith("node:")]
    addresses = sorted(name for name in names if not name.startswith("__"))
    standard = ("CPU", "GPU", "memory", "object_store_memory")
    custom = sorted(name for name in known if name not in standard and ":" not in name)
    raise ConfigError(
        f"runtime.driver_node: expected head, the address of a node ({', '.join(addresses)}) or a "
        f"custom resource ({', '.join(custom) or 'the cluster has none'}), got '{place}'"
    )


def node_name() -> str:
    """The node of this process as messages name it: address and the beginning of Ray's id."""
    return f"{import_ray().util.get_node_ip_address()}/{node_id()[:8]}"


def notes_on_places(
    options: RuntimeOptions, device: str, places: Sequence[tuple[str, str, str]], sent: bool
) -> list[str]:
    """What the user should read about where the client actors are.

    Args:
        options: what the user set.
        device: on which they should compute.
        places: of each actor the node by name and by id, and the device.
        sent: whether features had to be sent.
    """
    nodes = collections.Counter(name for name, _, _ in places)
    notes = []
    if len(nodes) > 1:
        shares = ", ".join(f"{node}: {count}" for node, count in sorted(nodes.items()))
        notes.append(f"{len(places)} client actors on {len(nodes)} nodes ({shares})")
    if sent:
        notes.append(
            "some nodes do not have the files of the prefix cache and received the features; "
            "a cache.folder that all nodes share spares that"
        )
    fallen = sorted({name for name, _, found in places if found != device})
    if fallen:
        notes.append(f"no CUDA device on {', '.join(fallen)}: its actors compute on the CPU")
    elif options.gpus_per_actor and device == "cpu":
        notes.append(
            f"runtime.gpus_per_actor={options.gpus_per_actor:g}, but no CUDA device was "
            "found: driver and client actors compute on the CPU"
        )
    return notes
