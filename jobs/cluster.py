"""A Ray cluster on this machine, for trying out what goes to a real one.

    python jobs/cluster.py start --workers 2     make cluster WORKERS=2
    python jobs/cluster.py status
    python jobs/cluster.py stop                  make cluster-stop

Everything listens on 127.0.0.1 at ports that were free, asks for a token, and keeps its files in a
temporary folder of its own. What was started is written down with its start time, and `stop` ends
that and nothing else; `ray stop` would end every Ray on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HOST = "127.0.0.1"
START_SECONDS = 120.0
PATIENCE = 20.0
"""Seconds that a node has to end by itself; it takes a few."""
SPARE_WORKERS = {
    "RAY_preload_python_modules": "fedprompt.client.preloaded",
    "RAY_enable_worker_prestart": "1",
    "RAY_worker_maximum_startup_concurrency": "16",
}
"""Idle workers have Lightning and timm imported before a run asks for them; these are the settings
of `fedprompt.runtime.ray.private`, which is not imported here because torch comes with it."""

RAY_START = """
import ray._private.ray_constants as constants
import ray._private.services as services

constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = lambda host: host
from ray.scripts.scripts import main

main()
"""
"""`ray start`, but the loopback stays the loopback: Ray would put the machine's own address in the
place of 127.0.0.1, and listen on all of them, so that other machines could join.
"""


def state_folder() -> Path:
    """Where the running cluster is written down."""
    return Path(os.environ.get("FEDPROMPT_CLUSTER", ROOT / ".cluster"))


def read_state() -> dict[str, Any] | None:
    """What `start` wrote; None if there is no cluster."""
    file = state_folder() / "cluster.json"
    return json.loads(file.read_text()) if file.is_file() else None


def write_state(state: dict[str, Any]) -> None:
    """Write it down, for the owner alone."""
    write_private(state_folder() / "cluster.json", json.dumps(state, indent=2) + "\n")


def write_private(file: Path, text: str) -> None:
    """Put a new file in the place of an old one; only its owner can read it, from the start."""
    new = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(text)
    new.replace(file)


def fail(message: str, code: int = 1) -> int:
    """One line on standard error."""
    print(f"error: {message}", file=sys.stderr)
    return code


# ---------------------------------------------------------------- processes


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is not running."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def members(session: int) -> list[int]:
    """Live processes of a session: what `start` started makes one each, with all its children."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(folder.name)
            if os.getsid(pid) == session and start_time(pid) is not None:
                found.append(pid)
    return found


def is_running(process: dict[str, int]) -> bool:
    """Whether the recorded process lives: same id and same start."""
    return start_time(process["pid"]) == process["started"]


def end(process: dict[str, int]) -> None:
    """Ask a session to end, then make it."""
    pid = process["pid"]
    # A process id is not given out again while its session has members.
    if not is_running(process) and start_time(pid) is not None:
        return
    if is_running(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if gone(pid, PATIENCE):
        return
    for member in members(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    gone(pid, PATIENCE)


def gone(session: int, seconds: float) -> bool:
    """Wait for a session to be empty."""
    deadline = time.monotonic() + seconds
    while members(session):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


# ---------------------------------------------------------------- start


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that no one listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def environment(token: Path) -> dict[str, str]:
    """What the processes of the cluster, and those who talk to it, need."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    kept.pop("RAY_AUTH_TOKEN", None)
    return {
        **kept,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # The address of a node is 127.0.0.1, as on systems on which Ray forms no clusters.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # On a busy machine a node needs longer than Ray's 30 seconds.
        "RAY_raylet_start_wait_time_s": f"{START_SECONDS:g}",
        # Logs stay small, whatever runs for however long.
        "RAY_ROTATION_MAX_BYTES": "5000000",
        "RAY_ROTATION_BACKUP_COUNT": "1",
        **SPARE_WORKERS,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def launch(
    arguments: list[str], name: str, state: dict[str, Any], env: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start one `ray start --block` in a session of its own and write it down."""
    log = state_folder() / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", RAY_START, "start", "--block", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=env,
        )
    started = start_time(process.pid)
    state["processes"].append({"name": name, "pid": process.pid, "started": started})
    write_state(state)
    return process


def wait_for(process: subprocess.Popen[bytes], name: str) -> None:
    """Wait until Ray says that it runs.

    Raises:
        RuntimeError: it ended, or takes too long.
    """
    log = state_folder() / f"{name}.log"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if "Ray runtime started" in log.read_text(errors="replace"):
            return
        if process.poll() is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise RuntimeError(f"{name} ended: {lines[-1] if lines else 'no message'}; see {log}")
        time.sleep(0.1)
    raise RuntimeError(f"{name} did not start within {START_SECONDS:g} s; see {log}")


def answers(url: str, token: str) -> bool:
    """Whether the job server is up."""
    request = urllib.request.Request(
        f"{url}/api/version", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def start(workers: int, cpus: int, worker_cpus: int) -> int:
    """Start the head, then the workers."""
    state = read_state()
    if state is not None and any(map(is_running, state["processes"])):
        return fail(f"a cluster is running at {state['dashboard']}; end it with: make cluster-stop")
    started = time.monotonic()
    folder = state_folder()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # also one that was there
    token = folder / "token"
    write_private(token, secrets.token_hex(32))
    # Short, because the paths of Ray's sockets may not exceed about 100 characters.
    temporary = Path(tempfile.mkdtemp(prefix="fedprompt-cluster-", dir="/tmp"))
    env = environment(token)
    port, dashboard, client, listen, grpc, metrics, runtime_env = free_ports(7)
    state = {
        "address": f"{HOST}:{port}",
        "dashboard": f"http://{HOST}:{dashboard}",
        "token": str(token),
        "temporary": str(temporary),
        "processes": [],
    }
    head = [
        "--head",
        f"--node-ip-address={HOST}",
        f"--port={port}",
        f"--dashboard-host={HOST}",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
        # Ray lets everyone write in its folder: nobody else gets through the outer one.
        f"--temp-dir={temporary / 'r'}",
        f"--num-cpus={cpus}",
        *agent_ports(listen, grpc, metrics, runtime_env),
    ]
    try:
        wait_for(launch(head, "head", state, env), "head")
        # One after another: nodes that start at once on one machine take each other's sockets.
        for number in range(1, workers + 1):
            arguments = [
                f"--address={state['address']}",
                f"--node-ip-address={HOST}",
                f"--num-cpus={worker_cpus}",
                *agent_ports(*free_ports(4)),
            ]
            name = f"worker-{number}"
            wait_for(launch(arguments, name, state, env), name)
        while not answers(str(state["dashboard"]), token.read_text()):
            if time.monotonic() - started > START_SECONDS:
                raise RuntimeError(f"no answer from {state['dashboard']}")
            time.sleep(0.2)
    except RuntimeError as error:
        stop(keep_logs=True)
        return fail(str(error))
    except BaseException:
        stop()
        raise
    print(
        f"cluster of 1 head and {workers} worker{'s' if workers != 1 else ''} in "
        f"{time.monotonic() - started:.1f} s: jobs {state['dashboard']}, "
        f"address {state['address']}, token in {token}"
    )
    return 0


def agent_ports(listen: int, grpc: int, metrics: int, runtime_env: int) -> list[str]:
    """The ports that would otherwise be the same for every Ray of a machine."""
    return [
        f"--dashboard-agent-listen-port={listen}",
        f"--dashboard-agent-grpc-port={grpc}",
        f"--metrics-export-port={metrics}",
        f"--runtime-env-agent-port={runtime_env}",
        "--disable-usage-stats",
    ]


# ---------------------------------------------------------------- stop, status


def stop(keep_logs: bool = False) -> int:
    """End what `start` started, workers first, and remove its files."""
    state = read_state()
    if state is None:
        print("no cluster was started here")
        return 0
    for process in reversed(state["processes"]):
        end(process)
    shutil.rmtree(state["temporary"], ignore_errors=True)
    for file in ("cluster.json", "token"):
        (state_folder() / file).unlink(missing_ok=True)
    for log in [] if keep_logs else state_folder().glob("*.log"):
        log.unlink()
    with contextlib.suppress(OSError):
        state_folder().rmdir()
    count = len(state["processes"])
    print(f"ended {count} node{'s' if count != 1 else ''}")
    return 0


def status() -> int:
    """Say which nodes run."""
    state = read_state()
    if state is None:
        return fail("no cluster was started here; start one with: make cluster")
    for process in state["processes"]:
        word = "running" if is_running(process) else "ended"
        print(f"{process['name']:10} pid {process['pid']:<8} {word}")
    print(f"jobs {state['dashboard']}, address {state['address']}")
    return 0 if all(map(is_running, state["processes"])) else 1


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("start", help="start a head and workers")
    starting.add_argument("--workers", type=int, default=0, help="nodes beside the head")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    starting.add_argument("--cpus", type=int, default=cores, help="CPUs of the head")
    starting.add_argument("--worker-cpus", type=int, default=1, help="CPUs of each worker")
    commands.add_parser("stop", help="end it")
    commands.add_parser("status", help="what runs")
    options = parser.parse_args()
    if options.command == "start":
        return start(options.workers, options.cpus, options.worker_cpus)
    return stop() if options.command == "stop" else status()


if __name__ == "__main__":
    sys.exit(main())
