"""Ray itself: imported, started, stopped, and its errors read."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedprompt.core.errors import ConfigError, FedpromptError, WorkerError
from fedprompt.runtime.ray import private

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


def start_ray(num_cpus: int, verbose: bool, num_gpus: int | None = None) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start a quiet local Ray on loopback.

    A local Ray keeps its files in a temporary folder of its own, which `stop_ray` removes.

    Args:
        num_cpus: CPUs of a local Ray.
        verbose: let Ray speak.
        num_gpus: GPUs of a local Ray; None means those that it finds.

    Raises:
        WorkerError: the cluster cannot be reached or refuses the token, or no local Ray starts.
    """
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {}
    own: dict[str, Any] = {}
    # Read by the processes that Ray starts.
    os.environ.setdefault("RAY_ROTATION_MAX_BYTES", str(LOG_BYTES))
    os.environ.setdefault("RAY_ROTATION_BACKUP_COUNT", "1")
    import_ray()
    if not address:
        remove_stale_folders()
        local = {"num_cpus": num_cpus, "num_gpus": num_gpus, "include_dashboard": False}
        folder = tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=short_folder())
        _folders.append(Path(folder))
        own = private.local_options(folder, num_cpus + 1)
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
_folders: list[Path] = []
"""Temporary folders of the local Ray of this process."""


def stop_ray() -> None:
    """Leave the cluster, or end the local Ray and remove its files."""
    import_ray().shutdown()
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)


def short_folder() -> str:
    """Where Ray's folder may be: the paths of its sockets may not exceed about 100 characters."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= 30 or not Path("/tmp").is_dir() else "/tmp"


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
