"""`ray`: a driver actor runs the rounds, client actors train. Thin: no mathematics here.

    process that was called ── Ray ──> DriverActor: rounds, aggregation, evaluation, files
                                         └── ClientActor x N: one frozen backbone each, no client's
                                         state

Setup, recipe and each round's broadcast go into the object store once; the features do not, as the
client actors of a machine map the same cache files. A node that has no such files receives the
features once. A job whose actor dies is done again by whoever is free; because a job holds
everything and its seed, the repeated work gives the same bits.

Called inside a Ray actor, such as the trial of a sweep, the calling process is the driver, and the
client actors stay in its placement group.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedprompt.client.recipe import LocalRecipe
from fedprompt.errors import ClientError, ConfigError, FedpromptError, InputError, WorkerError
from fedprompt.runtime import spare_workers
from fedprompt.runtime.base import Drive, RuntimeOptions, limited_threads, pack_jobs, runtimes
from fedprompt.runtime.placement import Node, gpu_share, plan_actors
from fedprompt.types import Broadcast, ClientJob, ClientUpdate

if TYPE_CHECKING:  # imports Lightning and timm
    from fedprompt.client.train import ClientWorker, WorkerSetup
    from fedprompt.server.evaluate import Piece, Tally

logger = logging.getLogger(__name__)

RESTARTS = 3
"""How often an actor is started again, and how often a job is done again."""
PATIENCE = 120.0
"""Seconds to wait for a client actor when none is left; starting one takes a few."""
START_PATIENCE = 600.0
"""Seconds that all client actors have to come up: a large backbone may have to be read."""
LOG_BYTES = 5_000_000
"""Of each log file of a local Ray; there is one file of each kind for every process."""

_NOTHING = Broadcast(torch.empty(0, 0), torch.empty(0, 0), {})


class FeaturesMissing(FedpromptError):
    """A client actor cannot open the cache's files: it is on a machine without them."""


class DriverActor:
    """Runs a driver generator inside the cluster."""

    def run(self, drive: Drive, options: RuntimeOptions, *args: Any) -> Iterator[Any]:
        """Yield what `drive(runtime, *args)` yields.

        Raises:
            ConfigError, InputError: as `drive` does. Where there are several nodes the message
                names this one, for it is here that a data set or weights are missing.
        """
        try:
            yield from drive_here(drive, options, *args)
        except (ConfigError, InputError) as error:
            if len(available_nodes()) == 1:
                raise
            raise type(error)(f"on node {node_name()}: {error}") from error


def drive_here(drive: Drive, options: RuntimeOptions, *args: Any) -> Iterator[Any]:
    """Yield what `drive(runtime, *args)` yields, with this process as the driver."""
    runtime = RayRuntime(options)
    try:
        with limited_threads(options.threads):
            yield from drive(runtime, *args)
    finally:
        runtime.close()


class ClientActor:
    """Wraps a `ClientWorker`: one frozen backbone, the data by reference, no client's state."""

    def __init__(self, threads: int) -> None:
        from fedprompt.client import preloaded  # noqa: F401 - takes seconds; begun before the data

        # For the life of the process: the limits end with it.
        self._limits = limited_threads(threads)
        self._limits.__enter__()
        self._worker: ClientWorker | None = None

    def load(self, setup: list[Any]) -> tuple[str, str, str]:
        """Build the worker; see `_load`.

        Returns:
            The node that this actor is on, as messages name it and by Ray's id, and the device it
            computes on.
        """
        return node_name(), node_id(), self._load(setup).device.type

    def _load(self, setup: list[Any]) -> ClientWorker:
        """The worker, built unless there is one.

        Args:
            setup: references of the `WorkerSetup`, in a list so that Ray does not fetch them for
                every call: the pickle of one whose features are files, then, if some node lacks
                those, one that holds the features. Every job brings it: an actor that was restarted
                has no worker.

        Raises:
            FeaturesMissing: the files cannot be opened here and nothing else was given.
            WorkerError: the worker cannot be built on this node.
        """
        if self._worker is not None:
            return self._worker
        given: WorkerSetup | None = None
        for reference in setup:
            content = import_ray().get(reference)
            if not isinstance(content, bytes):
                given = content
                break
            with contextlib.suppress(OSError, InputError):
                given = pickle.loads(content)
                break
        if given is None:
            raise FeaturesMissing(f"node {node_name()} has no files of the prefix cache")
        if given.device == "cuda" and not torch.cuda.is_available():
            given = dataclasses.replace(given, device="cpu")
        try:
            self._worker = given.build()
        except (FedpromptError, OSError) as error:
            raise WorkerError(f"node {node_name()}: {error}") from error
        return self._worker

    def train(
        self, setup: list[Any], recipe: LocalRecipe, jobs: list[ClientJob], broadcast: Broadcast
    ) -> list[ClientUpdate]:
        """The local work of a pack of clients."""
        worker = self._load(setup)
        whole = [dataclasses.replace(job, broadcast=broadcast) for job in jobs]
        try:
            return worker.train(recipe, whole)
        except ClientError as error:
            where = (error.client_id, error.round_index, error.stage, error.cause, node_name())
            raise ClientError(*where) from error

    def measure(
        self, setup: list[Any], recipe: LocalRecipe, model: Broadcast, piece: Piece
    ) -> Tally:
        """One piece of a split."""
        from fedprompt.server.evaluate import measure_piece

        return measure_piece(self._load(setup), recipe, model, piece)


@dataclasses.dataclass(eq=False)
class _Tasks:
    """Some tasks that were begun together."""

    submit: Callable[[Any, Any], Any]
    tasks: Sequence[Any]
    waiting: collections.deque[int]
    """Positions of those that no actor has."""
    results: collections.deque[tuple[int, Any]] = dataclasses.field(
        default_factory=collections.deque
    )
    """What is done and not yet fetched."""
    error: tuple[BaseException, BaseException] | None = None
    """The first error, and where it came from."""
    deaths: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)


@runtimes.register("ray", RuntimeOptions)
class RayRuntime:
    """Client actors on a local Ray, or on the cluster that RAY_ADDRESS names."""

    def __init__(self, options: RuntimeOptions) -> None:
        self.options = options
        self._actors: list[Any] = []
        self._held: dict[Any, int] = {}
        """How many tasks each living actor has."""
        self._begun: list[_Tasks] = []
        self._work: dict[Any, tuple[Any, _Tasks, int]] = {}
        """Actor, tasks and position of each call that was made, by the reference of its result."""
        self._healing: dict[Any, Any] = {}
        """Actors that died, by the reference of the call that succeeds when they are back."""
        self._nodes: collections.Counter[str] = collections.Counter()
        """How many processes of this run started on each node, by Ray's id of the node."""
        self._setup: list[Any] = []
        self._source: WorkerSetup | None = None
        self._recipe: tuple[LocalRecipe, Any] | None = None

    def launch(self, drive: Drive, *args: Any, verbose: bool = False) -> Iterator[Any]:
        """Start Ray if needed, run the driver in an actor and yield its events as they come."""
        ray = import_ray()
        own = not ray.is_initialized()
        if not own and ray.get_runtime_context().get_actor_id() is not None:
            yield from drive_here(drive, self.options, *args)
            return
        if own:
            start_ray(self.options.num_cpus, verbose)
        driver: Any = None
        try:
            actor = ray.remote(
                num_cpus=0,
                num_gpus=gpu_of_driver(self.options),
                resources=driver_resources(self.options.driver_node),
            )(DriverActor)
            driver = actor.remote()
            events = driver.run.options(num_returns="streaming").remote(drive, self.options, *args)
            for event in events:
                yield ray.get(event)
        except ray.exceptions.RayTaskError as error:
            raise unwrapped(error) from error
        except ray.exceptions.RayActorError as error:
            raise WorkerError("the driver process died (killed, or out of memory?)") from error
        finally:
            if driver is not None:
                ray.kill(driver)
            if own:
                stop_ray()

    def warm_up(self) -> None:
        """Start the client actors, without waiting for them."""
        ray = import_ray()
        plan = plan_actors(self.options, available_nodes())
        grouped = ray.util.get_current_placement_group() is not None
        actor = ray.remote(
            num_cpus=plan.cpus,
            num_gpus=plan.gpus,
            max_restarts=RESTARTS,
            max_task_retries=0,  # a job goes to whoever is free: see `map`
            # None stays in the group; the word DEFAULT would leave it.
            scheduling_strategy=None if grouped else "SPREAD",
        )(ClientActor)
        self._actors = [actor.remote(self.options.threads) for _ in range(plan.count)]

    def open(self, setup: WorkerSetup) -> Sequence[str]:
        """Give the client actors backbone and data, and wait until they have them."""
        ray = import_ray()
        if setup.data.table.entry is None:
            self._setup = [ray.put(setup)]
        else:
            self._source = setup
            self._setup = [ray.put(pickle.dumps(setup))]
        try:
            loads = [self._probe(actor) for actor in self._actors]
            ready, _ = ray.wait(loads, num_returns=len(loads), timeout=START_PATIENCE)
            if len(ready) < len(loads):
                raise WorkerError(
                    f"{len(ready)} of {len(loads)} client actors came up in {START_PATIENCE:g} "
                    "seconds; does something else hold the cluster's CPUs or GPUs?"
                )
            places = []
            for actor, load in zip(self._actors, loads, strict=True):
                try:
                    places.append(ray.get(load))
                except ray.exceptions.RayTaskError as error:
                    if not isinstance(unwrapped(error), FeaturesMissing):
                        raise
                    self._send_features()
                    places.append(ray.get(self._probe(actor)))
        except ray.exceptions.RayTaskError as error:
            cause = unwrapped(error)
            if isinstance(cause, FedpromptError):
                raise cause from error
            raise WorkerError(f"the client actors did not start: {last_line(error)}") from error
        except ray.exceptions.RayError as error:
            raise WorkerError(f"the client actors did not start: {last_line(error)}") from error
        self._held = dict.fromkeys(self._actors, 0)
        self._nodes.update(node for _, node, _ in places)
        return self._notes(setup, places)

    def _notes(self, setup: WorkerSetup, places: Sequence[tuple[str, str, str]]) -> list[str]:
        """What the user should read about where the actors are."""
        nodes = collections.Counter(name for name, _, _ in places)
        notes = []
        if len(nodes) > 1:
            shares = ", ".join(f"{node}: {count}" for node, count in sorted(nodes.items()))
            notes.append(f"{len(places)} client actors on {len(nodes)} nodes ({shares})")
        if len(self._setup) > 1:
            notes.append(
                "some nodes do not have the files of the prefix cache and received the features; "
                "a cache.folder that all nodes share spares that"
            )
        fallen = sorted({name for name, _, device in places if device != setup.device})
        if fallen:
            notes.append(f"no CUDA device on {', '.join(fallen)}: its actors compute on the CPU")
        elif self.options.gpus_per_actor and setup.device == "cpu":
            notes.append(
                f"runtime.gpus_per_actor={self.options.gpus_per_actor:g}, but no CUDA device was "
                "found: driver and client actors compute on the CPU"
            )
        return notes

    def _send_features(self) -> None:
        """Put the features into the object store, which brings them once to each node that asks."""
        if len(self._setup) == 1 and self._source is not None:
            self._setup.append(import_ray().put(self._source.loaded()))

    def _probe(self, actor: Any) -> Any:
        """A call that succeeds when the actor runs, however often it is restarted for that."""
        return actor.load.options(max_task_retries=-1).remote(self._setup)

    def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        """Each free actor gets the next pack of jobs; what a dead actor had goes to another."""
        ray = import_ray()
        recipe_ref = self._recipe_ref(recipe)
        # The jobs of a round share one broadcast: stored once, it does not travel with the jobs.
        broadcasts = {id(job.broadcast): job.broadcast for job in jobs}
        refs = {key: ray.put(value) for key, value in broadcasts.items()}

        def submit(actor: Any, pack: list[ClientJob]) -> Any:
            light = [dataclasses.replace(job, broadcast=_NOTHING) for job in pack]
            return actor.train.remote(self._setup, recipe_ref, light, refs[id(pack[0].broadcast)])

        packs = pack_jobs(jobs, self.options.pack_size(len(jobs), recipe))
        begun = self._begin(submit, packs)
        return (update for _, updates in self._results(begun) for update in updates)

    def measure(
        self, recipe: LocalRecipe, model: Broadcast, pieces: Sequence[Piece]
    ) -> Callable[[], list[Tally]]:
        """Each free actor gets the next piece; what a dead actor had goes to another."""
        recipe_ref, model_ref = self._recipe_ref(recipe), import_ray().put(model)

        def submit(actor: Any, piece: Piece) -> Any:
            return actor.measure.remote(self._setup, recipe_ref, model_ref, piece)

        begun = self._begin(submit, pieces)
        return lambda: [
            tally for _, tally in sorted(self._results(begun), key=lambda done: done[0])
        ]

    def _recipe_ref(self, recipe: LocalRecipe) -> Any:
        """The recipe in the object store; it is the same in all rounds of a method."""
        if self._recipe is None or self._recipe[0] is not recipe:
            self._recipe = (recipe, import_ray().put(recipe))
        return self._recipe[1]

    def _begin(self, submit: Callable[[Any, Any], Any], tasks: Sequence[Any]) -> _Tasks:
        """Have tasks done by whoever is free, after those that were begun before.

        Args:
            submit: gives an actor a task and returns the reference of the result.
            tasks: what any actor can do.
        """
        begun = _Tasks(submit, tasks, collections.deque(range(len(tasks))))
        self._begun.append(begun)
        self._assign()
        return begun

    def _results(self, begun: _Tasks) -> Iterator[tuple[int, Any]]:
        """Position and result of each task, as they finish; other tasks go on meanwhile."""
        try:
            for _ in begun.tasks:
                while not begun.results:
                    if begun.error is not None:
                        raise begun.error[0] from begun.error[1]
                    self._advance()
                yield begun.results.popleft()
        finally:
            self._begun.remove(begun)

    def _assign(self) -> None:
        """Give the actors what waits, in the order in which it was begun."""
        queue = [
            (begun, position)
            for begun in self._begun
            if begun.error is None
            for position in begun.waiting
        ]
        for number, (begun, position) in enumerate(queue):
            actor = min(self._held, key=self._held.__getitem__, default=None)
            # While more tasks wait than there are actors, each may have a second one, so that it
            # need not wait for the driver between the two.
            most = 2 if len(queue) - number > len(self._held) else 1
            if actor is None or self._held[actor] >= most:
                break
            begun.waiting.remove(position)
            self._held[actor] += 1
            self._work[begun.submit(actor, begun.tasks[position])] = actor, begun, position

    def _advance(self) -> None:
        """Wait for something to happen, and give out what that makes room for.

        A task whose actor died is done again by another. An error waits for whoever asks for the
        results.
        """
        ray = import_ray()
        self._assign()
        for ref in self._finished(list(self._work)):
            actor, begun, position = self._work.pop(ref)
            if actor in self._held:
                self._held[actor] -= 1
            try:
                begun.results.append((position, ray.get(ref)))
            except ray.exceptions.RayTaskError as error:
                cause = unwrapped(error)
                if isinstance(cause, FeaturesMissing):
                    self._send_features()  # it was restarted on a node without the files
                    begun.waiting.appendleft(position)
                else:
                    begun.error = begun.error or (cause, error)
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                begun.deaths[position] += 1
                logger.info("an actor died at task %d; another does it again", position)
                if begun.deaths[position] > RESTARTS:
                    begun.error = begun.error or (self._too_many_deaths(), error)
                begun.waiting.appendleft(position)
                if self._held.pop(actor, None) is not None:  # the first of its tasks to tell
                    self._healing[self._probe(actor)] = actor
        self._assign()

    def _finished(self, work: list[Any]) -> list[Any]:
        """Wait for something to happen; returns the calls that are done, and notes who is back.

        Raises:
            WorkerError: no actor is left, and none comes back.
        """
        ray = import_ray()
        if not work and not self._healing:
            raise self._too_many_deaths()
        timeout = None if work else PATIENCE
        done, _ = ray.wait([*work, *self._healing], num_returns=1, timeout=timeout)
        if not done:
            raise WorkerError(
                f"no client actor is left, and none could be started for {PATIENCE:g} seconds; "
                "continue when the cluster has room for one"
            )
        for ref in [ref for ref in done if ref in self._healing]:
            actor = self._healing.pop(ref)
            try:
                ray.get(ref)
            except ray.exceptions.RayActorError:
                self._actors.remove(actor)  # dead for good
            except ray.exceptions.RayTaskError as error:
                cause = unwrapped(error)
                if not isinstance(cause, FeaturesMissing):
                    raise cause from error
                self._send_features()
                self._held[actor] = 0
            else:
                self._held[actor] = 0
        return [ref for ref in done if ref in work]

    def _too_many_deaths(self) -> WorkerError:
        return WorkerError(
            f"a client actor died more than {RESTARTS} times (out of memory?); "
            "use fewer with runtime.actors, or runtime=serial to see the cause"
        )

    def close(self) -> None:
        """End the client actors."""
        for actor in self._actors:
            import_ray().kill(actor)
        self._actors = []
        self._held.clear()
        self._healing.clear()
        self._work.clear()
        self._begun.clear()
        if self._nodes and spare_workers.are_kept():
            self._nodes[node_id()] += 1  # the driver
            spare_workers.replace(self._nodes)
        self._nodes.clear()


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
    for name in ("node:__internal_head__" if place == "head" else f"node:{place}", place):
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
    # Read by the processes that Ray starts.
    os.environ.setdefault("RAY_ROTATION_MAX_BYTES", str(LOG_BYTES))
    os.environ.setdefault("RAY_ROTATION_BACKUP_COUNT", "1")
    ray = import_ray()
    if not address:
        remove_stale_folders()
        local = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=short_folder()),
            "_system_config": spare_workers.system_config(num_cpus + 1),
        }
        _folders.append(Path(local["_temp_dir"]))
    with kept_signal_handlers():
        try:
            ray.init(
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
                **local,
            )
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
        spare_workers.replace({node_id(): 1})


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
