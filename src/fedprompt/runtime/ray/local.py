"""Ray itself: imported, started, stopped, and its errors read."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedprompt.core.errors import ConfigError, FedpromptError, WorkerError
from fedprompt.runtime.ray import private

ANSWER_SECONDS = 4.0
"""How long a cluster has to say that it is there."""
LOG_BYTES = 5_000_000
"""Of each log file of a local Ray; there is one file of each kind for every process."""


def node_id() -> str:
    """Ray's id of the node of this process."""
    return str(import_ray().get_runtime_context().get_node_id())


def import_ray() -> Any:
    """Ray, imported when it is needed: `runtime=serial` works on machines without it.

    Raises:
        ConfigError: Ray is not installed.
    """
    # Read by Ray when it is imported.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.util
    except ImportError as error:
        raise ConfigError(
            f"runtime=ray needs Ray, which cannot be imported ({error}); "
            "install ray or use runtime=serial"
        ) from error
    return ray


def start_ray(num_cpus: int, verbose: bool, num_gpus: int | None = None, join: bool = True) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start a quiet local Ray on loopback.

    A local Ray keeps its files in a temporary folder of its own, which `stop_ray` removes. It
    listens on the loopback alone, and asks for a token that only the owner of the folder can read.

    Args:
        num_cpus: CPUs of a local Ray.
        verbose: let Ray speak.
        num_gpus: GPUs of a local Ray; None means those that it finds.
        join: whether RAY_ADDRESS counts.

    Raises:
        WorkerError: the cluster cannot be reached or refuses the token, or no local Ray starts.
    """
    address = cluster_address() if join else None
    if address:
        check_answers(address)
    local: dict[str, Any] = {}
    own: dict[str, Any] = {}
    # Read by the processes that Ray starts.
    os.environ.setdefault("RAY_ROTATION_MAX_BYTES", str(LOG_BYTES))
    os.environ.setdefault("RAY_ROTATION_BACKUP_COUNT", "1")
    import_ray()
    if not address:
        remove_stale_folders()
        local = {
            "address": "local",
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "include_dashboard": False,
        }
        folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=short_folder()))
        _own.callback(shutil.rmtree, folder, ignore_errors=True)
        _own.enter_context(private.closed_to_others(folder))
        # Ray lets everyone write in its folder: nobody else gets as far as that.
        inner = folder / "r"
        inner.mkdir()
        own = private.local_options(str(inner), num_cpus + 1)
    with kept_signal_handlers():
        try:
            level = logging.INFO if verbose else logging.ERROR
            private.start({"log_to_driver": verbose, "logging_level": level, **local}, own)
        except Exception as error:  # Ray's node raises a bare one when it does not come up in time
            if address:
                raise WorkerError(
                    f"the Ray cluster at RAY_ADDRESS={address} cannot be used: {last_line(error)}"
                ) from error
            stop_ray()
            raise WorkerError(
                f"Ray did not start on this machine: {last_line(error)}; try again when it is less "
                "busy, or use runtime=serial"
            ) from error
    if not address:  # Ray itself starts one for each CPU, and the driver needs one, too
        replace_spare_workers({node_id(): 1})


def cluster_address() -> str | None:
    """The cluster that RAY_ADDRESS names; None where a run starts a Ray of its own."""
    address = os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def check_answers(address: str) -> None:
    """Ask whether a Ray is there, as Ray itself tries for most of a minute.

    Args:
        address: host and port, with or without `ray://`; of anything else Ray knows more.

    Raises:
        WorkerError: nothing answers within `ANSWER_SECONDS`.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():
        return
    deadline = time.monotonic() + ANSWER_SECONDS
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        cause = "" if private.speaks(f"{host}:{port}", deadline - time.monotonic()) else "no answer"
    except (OSError, OverflowError) as error:
        cause = str(getattr(error, "strerror", None) or error)
    if cause:
        raise WorkerError(
            f"RAY_ADDRESS={address}: expected a running Ray cluster, got '{cause}'; start it, "
            "correct the variable, or unset RAY_ADDRESS to compute on this machine"
        )


def replace_spare_workers(counts: Mapping[str, int]) -> None:
    """Have nodes start new spare workers in place of used ones; see `private`.

    Args:
        counts: how many, by the id of the node.
    """
    for node in import_ray().nodes():
        count = counts.get(node["NodeID"], 0)
        if count and node["Alive"]:
            private.prestart(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}", count)


FOLDER = "fedprompt-ray-"
_own = contextlib.ExitStack()
"""What the end of the local Ray of this process undoes: its folder, its settings."""


def stop_ray() -> None:
    """Leave the cluster, or end the local Ray and remove its files."""
    import_ray().shutdown()
    _own.close()


def short_folder() -> str:
    """Where Ray's folder may be: the paths of its sockets may not exceed about 100 characters."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= 10 or not Path("/tmp").is_dir() else "/tmp"


def remove_stale_folders() -> None:
    """Remove what the local Rays of killed processes left, an hour after they were last in use."""
    for folder in Path(short_folder()).glob(f"{FOLDER}*-*"):
        with contextlib.suppress(OSError, ValueError):
            owner = int(folder.name.removeprefix(FOLDER).split("-")[0])
            old = time.time() - folder.stat().st_mtime > 3600
            if old and not Path(f"/proc/{owner}").exists() and Path("/proc").is_dir():
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """Put back the caller's handlers: Ray installs one for SIGTERM that aborts the process."""
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for each, handler in handlers.items():
                signal.signal(each, handler)


def unwrapped(error: Any) -> BaseException:
    """The error that the remote function raised, without Ray's wrapping, if it is one of ours."""
    cause = error.cause
    while isinstance(cause, type(error)):
        cause = cause.cause
    return cause if isinstance(cause, FedpromptError) else error


def last_line(error: BaseException) -> str:
    """What a remote traceback ends with."""
    return ([line for line in str(error).splitlines() if line.strip()] or ["no message"])[
        -1
    ].strip()
