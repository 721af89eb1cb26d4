"""`ray`: a driver actor runs the rounds, client actors train. Thin: no mathematics here.

    process that was called ── Ray ──> DriverActor: rounds, aggregation, evaluation, files
                                         └── ClientActor x N: one frozen backbone each, no client's
                                         state

Setup, recipe and each round's broadcast go into the object store once; the features do not, as the
client actors of a machine map the same cache files. A client actor that dies is
restarted and its job is done again; because a job holds everything and its seed, the repeated work
gives the same bits.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from fedprompt.client.recipe import LocalRecipe
from fedprompt.errors import ConfigError, FedpromptError, WorkerError
from fedprompt.runtime.base import Drive, RuntimeOptions, limited_threads, pack_jobs, runtimes
from fedprompt.types import Broadcast, ClientJob, ClientUpdate

if TYPE_CHECKING:  # imports Lightning and timm
    from fedprompt.client.train import ClientWorker, WorkerSetup
    from fedprompt.server.evaluate import Piece, Tally

logger = logging.getLogger(__name__)

RESTARTS = 3
"""How often an actor is started again, and how often a job is done again."""

_NOTHING = Broadcast(torch.empty(0, 0), torch.empty(0, 0), {})


class DriverActor:
    """Runs a driver generator inside the cluster."""

    def run(self, drive: Drive, options: RuntimeOptions, *args: Any) -> Iterator[Any]:
        """Yield what `drive(runtime, *args)` yields."""
        runtime = RayRuntime(options)
        try:
            with limited_threads(options.threads):
                yield from drive(runtime, *args)
        finally:
            runtime.close()


class ClientActor:
    """Wraps a `ClientWorker`: one frozen backbone, the data by reference, no client's state."""

    def __init__(self, threads: int) -> None:
        from fedprompt.client import train  # noqa: F401 - takes seconds; begun before data are ready

        # For the life of the process: the limits end with it.
        self._limits = limited_threads(threads)
        self._limits.__enter__()
        self._worker: ClientWorker | None = None

    def load(self, setup: list[Any]) -> None:
        """Build the worker; see `_load`."""
        self._load(setup)

    def _load(self, setup: list[Any]) -> ClientWorker:
        """The worker, built unless there is one.

        Args:
            setup: the reference of a `WorkerSetup`, in a list so that Ray does not fetch it for
                every call. Every job brings it: an actor that was restarted has no worker.
        """
        if self._worker is None:
            self._worker = import_ray().get(setup[0]).build()
        return self._worker

    def train(
        self, setup: list[Any], recipe: LocalRecipe, jobs: list[ClientJob], broadcast: Broadcast
    ) -> list[ClientUpdate]:
        """The local work of a pack of clients."""
        whole = [dataclasses.replace(job, broadcast=broadcast) for job in jobs]
        return self._load(setup).train(recipe, whole)

    def measure(
        self, setup: list[Any], recipe: LocalRecipe, model: Broadcast, piece: Piece
    ) -> Tally:
        """One piece of a split."""
        from fedprompt.server.evaluate import measure_piece

        return measure_piece(self._load(setup), recipe, model, piece)


@runtimes.register("ray", RuntimeOptions)
class RayRuntime:
    """Client actors on a local Ray, or on the cluster that RAY_ADDRESS names."""

    def __init__(self, options: RuntimeOptions) -> None:
        self.options = options
        self._actors: list[Any] = []
        self._setup: list[Any] = []
        self._recipe: tuple[LocalRecipe, Any] | None = None

    def launch(self, drive: Drive, *args: Any, verbose: bool = False) -> Iterator[Any]:
        """Start Ray if needed, run the driver in an actor and yield its events as they come."""
        ray = import_ray()
        own = not ray.is_initialized()
        if own:
            start_ray(self.options.num_cpus, verbose)
        driver: Any = None
        try:
            actor = ray.remote(num_cpus=0, num_gpus=gpu_share(self.options))(DriverActor)
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
                ray.shutdown()

    def warm_up(self) -> None:
        """Start the client actors, without waiting for them."""
        ray = import_ray()
        count, share = self.options.num_actors, cpu_share(self.options)
        available = ray.cluster_resources().get("CPU", 0)
        if count * share > available:
            raise ConfigError(
                f"runtime.actors: {count} actors of {share:g} CPUs do not fit in the {available:g} "
                f"CPUs that Ray has; expected at most {int(available / share)} actors"
            )
        actor = ray.remote(
            num_cpus=share,
            num_gpus=gpu_share(self.options),
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )(ClientActor)
        self._actors = [actor.remote(self.options.threads) for _ in range(count)]

    def open(self, setup: WorkerSetup) -> None:
        """Give the client actors backbone and data, and wait until they have them."""
        ray = import_ray()
        if sum(node["Alive"] for node in ray.nodes()) > 1:
            # Other machines cannot open the files of this one's cache; the object store brings
            # the features to each of them once.
            setup = setup.loaded()
        self._setup = [ray.put(setup)]
        try:
            ray.get([actor.load.remote(self._setup) for actor in self._actors])
        except ray.exceptions.RayError as error:
            raise WorkerError(f"the client actors did not start: {last_line(error)}") from error

    def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        """Give each idle actor the next pack of jobs."""
        ray = import_ray()
        recipe_ref = self._recipe_ref(recipe)
        # The jobs of a round share one broadcast: stored once, it does not travel with the jobs.
        broadcasts = {id(job.broadcast): job.broadcast for job in jobs}
        refs = {key: ray.put(value) for key, value in broadcasts.items()}

        def submit(actor: Any, pack: list[ClientJob]) -> Any:
            light = [dataclasses.replace(job, broadcast=_NOTHING) for job in pack]
            return actor.train.remote(self._setup, recipe_ref, light, refs[id(pack[0].broadcast)])

        packs = pack_jobs(jobs, self.options.pack_size(len(jobs), recipe))
        with own_errors():
            for updates in ray.util.ActorPool(self._actors).map_unordered(submit, packs):
                yield from updates

    def measure(
        self, recipe: LocalRecipe, model: Broadcast, pieces: Sequence[Piece]
    ) -> list[Tally]:
        """Give each idle actor the next piece."""
        ray = import_ray()
        recipe_ref, model_ref = self._recipe_ref(recipe), ray.put(model)

        def submit(actor: Any, piece: Piece) -> Any:
            return actor.measure.remote(self._setup, recipe_ref, model_ref, piece)

        with own_errors():
            return list(ray.util.ActorPool(self._actors).map(submit, list(pieces)))

    def _recipe_ref(self, recipe: LocalRecipe) -> Any:
        """The recipe in the object store; it is the same in all rounds of a method."""
        if self._recipe is None or self._recipe[0] is not recipe:
            self._recipe = (recipe, import_ray().put(recipe))
        return self._recipe[1]

    def close(self) -> None:
        """End the client actors."""
        for actor in self._actors:
            import_ray().kill(actor)
        self._actors = []


@contextmanager
def own_errors() -> Iterator[None]:
    """Turn Ray's errors about the client actors into fedprompt's."""
    ray = import_ray()
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise unwrapped(error) from error
    except ray.exceptions.RayActorError as error:
        raise WorkerError(
            f"a client actor died more than {RESTARTS} times (out of memory?); "
            "use fewer with runtime.actors, or runtime=serial to see the cause"
        ) from error


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


def start_ray(num_cpus: int, verbose: bool) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start a quiet local Ray on loopback."""
    local: dict[str, Any] = {
        "num_cpus": num_cpus,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
    }
    ray = import_ray()
    with kept_signal_handlers():
        ray.init(
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
            **({} if os.environ.get("RAY_ADDRESS") else local),
        )


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


def cpu_share(options: RuntimeOptions) -> float:
    """CPUs that a client actor reserves: its threads, or less if actors outnumber the cores."""
    share = min(options.threads, options.num_cpus / options.num_actors)
    return float(int(share)) if share >= 1 else share


def gpu_share(options: RuntimeOptions) -> float:
    """GPU that an actor reserves: the driver and the client actors share the devices evenly."""
    if options.torch_device != "cuda":
        return 0.0
    share = torch.cuda.device_count() / (options.num_actors + 1)
    return float(int(share)) if share >= 1 else share


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
