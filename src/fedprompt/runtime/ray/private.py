"""Every part of Ray that is used and not documented; each may be missing from a later Ray.

| part | what for | without it |
|---|---|---|
| options of `ray.init` that start with `_` | own folder, loopback, spare workers | Ray's defaults |
| flags of its processes: `ENVIRONMENT` | spare workers on a cluster | none are kept |
| `ray._private`, `ray.core.generated` | spare workers in place of used ones | none come |
| `ray._private.ray_constants`, the token's cache | loopback, a token of its own | Ray's defaults |
| resource `node:__internal_head__` | the driver on the head node | the head's address |

*Spare workers* are worker processes that have imported everything before a run asks for them:
Lightning and timm take seconds in each process. Ray starts as many workers as a node has CPUs when
the node starts, and can have them import modules; it does not replace those that a run used up.
`prestart` asks it to, as Ray's own tools do. Where there are none, a run starts some seconds later
and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
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

HEAD = "node:__internal_head__"
KEPT_SECONDS = 600
"""How long workers beyond the number of CPUs are kept."""
ANSWER_SECONDS = 5.0
UNKNOWN = "Unknown keyword argument(s): "
"""What `ray.init` says of options that it does not have, before it starts anything."""


def local_options(folder: str, at_once: int) -> dict[str, Any]:
    """Options of a Ray that this process starts.

    Args:
        folder: for its files and sockets.
        at_once: how many workers may be starting.
    """
    return {
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": folder,
        "_system_config": {
            "preload_python_modules": [PRELOADED],
            "enable_worker_prestart": True,
            "worker_maximum_startup_concurrency": at_once,
        },
    }


@contextlib.contextmanager
def closed_to_others(folder: Path) -> Iterator[None]:
    """While entered, a Ray that this process starts listens on the loopback and asks for a token.

    Ray would otherwise put the machine's own address in the place of 127.0.0.1 and listen on all
    interfaces, with a token in the home folder that every user of the machine can read.

    Args:
        folder: for the token; only its owner may enter it.
    """
    token = folder / "token"
    with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    own = {
        # As on systems on which Ray forms no clusters; read by each of its processes.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_AUTH_TOKEN": None,  # would count instead of the file
    }
    before = {name: os.environ.get(name) for name in own}
    _set_environment(own)
    constants: Any = importlib.import_module("ray._private.ray_constants")
    several = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    constants.ENABLE_RAY_CLUSTER = False
    _forget_token()
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = several
        _set_environment(before)
        _forget_token()


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _forget_token() -> None:
    """Have Ray look for the mode and the token again; it keeps them for the life of a process."""
    with contextlib.suppress(ImportError, AttributeError):
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
        raylet.Config.initialize("")


def start(options: dict[str, Any], private: dict[str, Any]) -> None:
    """Start Ray, without those of the private options that it does not have.

    Args:
        options: documented ones.
        private: see `local_options`.
    """
    ray: Any = importlib.import_module("ray")
    try:
        ray.init(**options, **private)
    except (RuntimeError, TypeError, ValueError) as error:
        known = {name: value for name, value in private.items() if name not in refused(error)}
        if known == private:
            raise
        logger.info("Ray starts without %s", sorted(set(private) - set(known)))
        ray.shutdown()
        start(options, known)


def refused(error: Exception) -> list[str]:
    """The options that an error of `ray.init` is about; flags of processes if it does not say.

    >>> refused(RuntimeError("Unknown keyword argument(s): _temp_dir, _node_ip_address"))
    ['_temp_dir', '_node_ip_address']
    """
    text = str(error)
    return text.removeprefix(UNKNOWN).split(", ") if UNKNOWN in text else ["_system_config"]


def spare_workers_are_kept() -> bool:
    """Whether the Ray that this process belongs to keeps spare workers."""
    return os.environ.get(SWITCH) == "1"


def prestart(address: str, count: int) -> bool:
    """Ask one node for new spare workers in place of used ones.

    Args:
        address: host and port of its node manager.
        count: how many.

    Returns:
        Whether it could be asked; if not, it costs the next run only time.
    """
    try:
        _ask(address, count)
    except Exception as error:
        logger.info("no spare workers on %s: %s", address, error)
        return False
    return True


def _ask(address: str, count: int) -> None:
    """The workers get the runtime environment of this process."""
    ray: Any = importlib.import_module("ray")
    # What Ray generates from its protocol's files has no types.
    utils: Any = importlib.import_module("ray._private.grpc_utils")
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
    channel: Any = utils.init_grpc_channel(address)
    with contextlib.closing(channel):
        services.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ANSWER_SECONDS)


def speaks(address: str, seconds: float) -> bool:
    """Whether a server with Ray's protocol listens at an address; True if it cannot be asked.

    Args:
        address: host and port.
        seconds: how long to wait for it.
    """
    try:
        grpc: Any = importlib.import_module("grpc")
        utils: Any = importlib.import_module("ray._private.grpc_utils")
        channel: Any = utils.init_grpc_channel(address)
    except Exception as error:  # a later Ray; its own start says what is wrong
        logger.info("%s cannot be asked: %s", address, error)
        return True
    with contextlib.closing(channel):
        try:
            grpc.channel_ready_future(channel).result(timeout=max(0.0, seconds))
        except grpc.FutureTimeoutError:
            return False
    return True


def head_resource(known: Iterable[str]) -> str:
    """The resource that the head node has and no other.

    Args:
        known: names of the cluster's resources.
    """
    if HEAD in known:
        return HEAD
    ray: Any = importlib.import_module("ray")
    address = str(ray.get_runtime_context().gcs_address)  # the control service is on the head
    return f"node:{address.rpartition(':')[0]}"
