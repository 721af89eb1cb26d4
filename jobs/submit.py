"""Give an experiment to a Ray cluster as a job, and follow it.

    python jobs/submit.py run quickstart -- rounds=5     make submit ARGS=rounds=5
    python jobs/submit.py status [JOB]                   make job-status
    python jobs/submit.py stop [JOB]                     make job-stop

The address is --address, or RAY_JOBS_ADDRESS (http://HOST:8265), or the cluster of
`jobs/cluster.py`; the token is RAY_AUTH_TOKEN, or the file of RAY_AUTH_TOKEN_PATH. The exit code is
the job's own: 0 only if the experiment was done.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import logging
import os
import secrets
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from cluster import ROOT, fail, read_state

STOPPED = 143
"""Exit code of a job that someone stopped: what the shell says of SIGTERM."""


class JobError(Exception):
    """One line for the user."""


def entrypoint(python: str, command: str, name: str, arguments: list[str]) -> str:
    """The command line of the job, quoted for the shell that Ray gives it to.

    >>> entrypoint("python", "run", "my run.yaml", ["compare=[a, b]"])
    "python -u -m fedprompt run 'my run.yaml' 'compare=[a, b]'"
    """
    # -u: each round's line comes when the round is done.
    return shlex.join([python, "-u", "-m", "fedprompt", command, name, *arguments])


def with_storage(command: str, name: str, arguments: list[str], storage: Path) -> list[str]:
    """The arguments with a folder for the results, unless they name one.

    A job's current folder is a temporary copy of the code; results must not be there.
    """
    now = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    folder = storage / f"{'sweep-' if command == 'sweep' else ''}{Path(name).stem}-{now}"
    if command == "sweep":
        given = any(each in ("--dir", "--resume") for each in arguments)
        return arguments if given else [*arguments, "--dir", str(folder)]
    given = any(each.startswith("run_dir=") or each == "--resume" for each in arguments)
    return arguments if given else [*arguments, f"run_dir={folder}"]


def stage(folder: Path, name: str) -> Path:
    """Copy what a job needs, laid out as the installed package is.

    Returns:
        The folder to ship.
    """
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    package = folder / "fedprompt"
    shutil.copytree(ROOT / "src" / "fedprompt", package, ignore=ignored)
    shutil.copytree(ROOT / "conf", package / "conf", ignore=ignored)
    if Path(name).is_file():  # an experiment of the user's own travels along
        shutil.copy(name, folder / Path(name).name)
        experiment = read_yaml(Path(name)).get("experiment")
        if isinstance(experiment, str) and Path(experiment).is_file():  # that of a sweep
            shutil.copy(experiment, folder / Path(experiment).name)
    return folder


def stage_plugins(folder: Path, name: str, arguments: list[str]) -> list[str]:
    """Copy the plug-in files of an experiment or a sweep, and the YAML files beside them.

    Args:
        folder: what is shipped; the job's current folder.
        name: an experiment's or a sweep's name or file.
        arguments: of its command line; plug-ins that they name count instead of the file's.

    Returns:
        The arguments for the job, which name the copies.

    Raises:
        JobError: a file is missing, or two have the same name.
    """
    if "--resume" in arguments:  # what is continued has copies of its own
        return arguments
    given = [each for each in arguments if each.startswith("plugins=")]
    if given:
        base, specs = Path(), yaml.safe_load(given[-1].removeprefix("plugins="))
    else:
        base, specs = named_plugins(Path(name))
    if not isinstance(specs, list) or not specs:
        return arguments
    shipped: list[str] = []
    for spec in map(str, specs):
        path = base / Path(spec).expanduser()
        if not spec.endswith(".py"):  # a module: it has to be installed there
            shipped.append(spec)
            continue
        if not path.is_file() or f"plugins/{path.name}" in shipped:
            what = "two have the same name" if path.is_file() else f"no file {path.resolve()}"
            raise JobError(f"plug-in '{spec}': {what}")
        shipped.append(f"plugins/{path.name}")
        for file in (path, *path.parent.glob("conf/*/*.yaml")):
            copy = folder / "plugins" / file.relative_to(path.parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():  # of two YAML files of a name the first counts
                shutil.copy(file, copy)
    kept = [each for each in arguments if each not in given]
    return [*kept, f"plugins={json.dumps(shipped)}"]


def named_plugins(file: Path) -> tuple[Path, Any]:
    """The plug-ins that a file of an experiment or a sweep names, and the folder they start from.

    A sweep may name them under `set` or in its experiment, which may be a file of its own.
    """
    tree = read_yaml(file)
    for section in (tree, tree.get("set"), tree.get("experiment")):
        if isinstance(section, dict) and section.get("plugins"):
            return file.parent, section["plugins"]
    experiment = tree.get("experiment")
    if isinstance(experiment, str):
        return named_plugins(Path(experiment))
    return file.parent, None


def read_yaml(file: Path) -> dict[str, Any]:
    """What a YAML file says; nothing if it is none, which the job will complain about."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return tree if isinstance(tree, dict) else {}


def connect(address: str | None) -> Any:
    """A client of the job server.

    Raises:
        JobError: nothing is there, or it refuses the token.
    """
    state = read_state()
    if address is None:
        address = os.environ.get("RAY_JOBS_ADDRESS")
    if address is None:
        if state is None:
            raise JobError(
                "no cluster: expected --address, RAY_JOBS_ADDRESS or one started with 'make "
                "cluster'"
            )
        address = state["dashboard"]
    if state is not None and address == state["dashboard"]:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if "RAY_AUTH_TOKEN" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN_PATH", state["token"])
    from ray.job_submission import JobSubmissionClient

    # Else the end of a job's log is followed by a line about a closed WebSocket.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address)
        client.list_jobs()
    except Exception as error:
        raise JobError(explain(error, str(address))) from error
    return client


def explain(error: Exception, address: str) -> str:
    """What went wrong between here and the job server, in one line."""
    text = " ".join(str(error).split())
    refused = type(error).__name__ == "AuthenticationError" or any(
        sign in text for sign in ("401", "403", "Unauthorized", "Forbidden")
    )
    if refused:
        return (
            f"the cluster at {address} refuses the token; give the cluster's own in "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token"
        )
    if isinstance(error, ConnectionError) or "connect" in text.lower():
        return (
            f"no job server answers at {address}; is the cluster running, and is this the "
            "address of its dashboard?"
        )
    return f"the cluster at {address} said: {text[:300]}"


def submit(client: Any, options: argparse.Namespace) -> int:
    """Give the job to the cluster, show its log, and return its exit code."""
    local = read_state()
    python = options.python or (sys.executable if local else "python")
    storage = Path(options.storage).resolve() if local else Path(options.storage)
    arguments = with_storage(options.command, options.name, options.arguments, storage)
    name = Path(options.name).name if Path(options.name).is_file() else options.name
    runtime_env: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fedprompt-job-") as folder:
        if not options.installed:
            runtime_env["working_dir"] = str(stage(Path(folder), options.name))
            arguments = stage_plugins(Path(folder), options.name, arguments)
        line = entrypoint(python, options.command, name, arguments)
        job = client.submit_job(
            entrypoint=line, runtime_env=runtime_env, metadata={"experiment": options.name}
        )
    print(f"job {job}: {line}", flush=True)
    if options.no_wait:
        return 0
    try:
        asyncio.run(follow(client, job))
    except KeyboardInterrupt:
        print(f"\nthe job goes on; end it with: make job-stop JOB={job}", file=sys.stderr)
        return 130
    return result(client, job)


async def follow(client: Any, job: str) -> None:
    """Print the job's log as it grows."""
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def result(client: Any, job: str) -> int:
    """The exit code of a job that ended, with one line if it is not 0."""
    info = client.get_job_info(job)
    state = str(info.status.value if hasattr(info.status, "value") else info.status)
    if state == "SUCCEEDED":
        return 0
    if state == "STOPPED":
        return fail(f"job {job} was stopped", STOPPED)
    code = info.driver_exit_code or 1
    if code > 0 and info.driver_exit_code:
        return fail(f"job {job} FAILED with exit code {code}", code)
    lines = [line for line in str(info.message or "no message").splitlines() if line.strip()]
    return fail(f"job {job} {state}: {lines[-1] if lines else 'no message'}", max(1, code))


def show_status(client: Any, job: str | None) -> int:
    """One line a job, the newest last."""
    jobs = sorted(
        (each for each in client.list_jobs() if each.submission_id), key=lambda j: j.start_time or 0
    )
    chosen = [each for each in jobs if job in (None, each.submission_id)]
    if job and not chosen:
        return fail(f"no job '{job}'; `make job-status` lists them", 2)
    for each in chosen:
        name = (each.metadata or {}).get("experiment", "")
        print(f"{each.submission_id}  {each.status.value:9}  {name}")
    return 0


def stop_job(client: Any, job: str | None) -> int:
    """Stop a job, or the newest that runs."""
    running = [
        each for each in client.list_jobs() if each.submission_id and not each.status.is_terminal()
    ]
    if job is None:
        if not running:
            return fail("no job is running")
        job = max(running, key=lambda each: each.start_time or 0).submission_id
    elif job not in [each.submission_id for each in running]:
        return fail(f"no job '{job}' is running; `make job-status` lists them", 2)
    client.stop_job(job)
    print(f"stopping {job}")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; what follows -- goes to the experiment, wherever the options stand."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", help="of the job server, such as http://HOST:8265")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("run", "sweep"):
        each = commands.add_parser(command, help=f"fedprompt {command} as a job")
        each.add_argument("name", help="name or file")
        each.add_argument("arguments", nargs="*", help="after --: key=value and options")
        each.add_argument("--storage", default="runs", help="where results go on the cluster")
        each.add_argument("--python", help="interpreter on the cluster")
        each.add_argument("--installed", action="store_true", help="ship no code")
        each.add_argument("--no-wait", action="store_true", help="do not follow the job")
    for command in ("status", "stop"):
        commands.add_parser(command).add_argument("job", nargs="?", default=None)
    options = parser.parse_args(arguments[:split])
    if options.command in ("run", "sweep"):
        options.arguments += arguments[split + 1 :]
    return options


def main() -> int:
    """Do what the command line says."""
    options = parse(sys.argv[1:])
    try:
        client = connect(options.address)
        if options.command in ("run", "sweep"):
            return submit(client, options)
        act = show_status if options.command == "status" else stop_job
        return act(client, options.job or None)
    except JobError as error:
        return fail(str(error))


if __name__ == "__main__":
    sys.exit(main())
