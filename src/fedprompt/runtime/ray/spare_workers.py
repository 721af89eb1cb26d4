"""Worker processes of Ray that have imported everything before somebody asks for them.

Importing Lightning and timm takes seconds in each process. Ray starts as many workers as a node has
CPUs when the node starts, and can have them import modules; it does not replace those that a run
used up. `replace` asks it to, with a call of its node managers that Ray's own tools use, too, but
that is not documented: where it fails, the next run starts some seconds later and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

SWITCH = "RAY_enable_worker_prestart"
PRELOADED = "fedprompt.client.preloaded"
"""What spare workers import."""
ENVIRONMENT = {
    "RAY_preload_python_modules": PRELOADED,
    SWITCH: "1",
    # Ray would start no more at a time than the machine has cores.
    "RAY_worker_maximum_startup_concurrency": "16",
}
"""What the processes of a Ray that keeps spare workers find in their environment."""

KEPT_SECONDS = 600
"""How long workers beyond the number of CPUs are kept."""
ANSWER_SECONDS = 5.0


def system_config(at_once: int) -> dict[str, Any]:
    """The same for a Ray that this process starts.

    Args:
        at_once: how many workers may be starting.
    """
    return {
        "preload_python_modules": [PRELOADED],
        "enable_worker_prestart": True,
        "worker_maximum_startup_concurrency": at_once,
    }


def are_kept() -> bool:
    """Whether the Ray that this process belongs to keeps spare workers."""
    return os.environ.get(SWITCH) == "1"


def replace(counts: Mapping[str, int]) -> None:
    """Start new spare workers in the place of used ones.

    Args:
        counts: how many, by the id of the node.
    """
    ray: Any = importlib.import_module("ray")
    for node in ray.nodes():
        count = counts.get(node["NodeID"], 0)
        if count and node["Alive"]:
            try:
                _start(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}", count)
            except Exception as error:  # whatever it is, it costs the next run only time
                logger.info("no spare workers on %s: %s", node["NodeManagerAddress"], error)


def _start(address: str, count: int) -> None:
    """Ask one node manager; the workers get the runtime environment of this process."""
    from ray._private.grpc_utils import init_grpc_channel

    ray: Any = importlib.import_module("ray")
    # What Ray generates from its protocol's files has no types.
    node_manager: Any = importlib.import_module("ray.core.generated.node_manager_pb2")
    services: Any = importlib.import_module("ray.core.generated.node_manager_pb2_grpc")
    common: Any = importlib.import_module("ray.core.generated.common_pb2")
    environments: Any = importlib.import_module("ray.core.generated.runtime_environment_pb2")
    environment = ray.get_runtime_context().get_runtime_env_string()
    request = node_manager.PrestartWorkersRequest(
        language=common.Language.PYTHON,
        num_workers=count,
        keep_alive_duration_secs=KEPT_SECONDS,
        runtime_env_info=environments.RuntimeEnvInfo(serialized_runtime_env=environment),
    )
    channel: Any = init_grpc_channel(address)
    with contextlib.closing(channel):
        services.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ANSWER_SECONDS)
