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
import dataclasses
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.errors import ConfigError, FedpromptError, InputError, WorkerError
from fedprompt.core.plugins import Parcel, loaded
from fedprompt.core.types import Broadcast, ClientJob, ClientUpdate
from fedprompt.runtime.base import Drive, RuntimeOptions, limited_threads, pack_jobs, runtimes
from fedprompt.runtime.placement import plan_actors
from fedprompt.runtime.ray import private
from fedprompt.runtime.ray.actors import ClientActor, FeaturesMissing
from fedprompt.runtime.ray.local import (
    import_ray,
    last_line,
    node_id,
    replace_spare_workers,
    start_ray,
    stop_ray,
    unwrapped,
)
from fedprompt.runtime.ray.metrics import RoundGauges
from fedprompt.runtime.ray.nodes import (
    available_nodes,
    driver_resources,
    gpu_of_driver,
    node_name,
    notes_on_places,
)

if TYPE_CHECKING:  # imports Lightning and timm
    from fedprompt.client.worker import WorkerSetup
    from fedprompt.server.evaluate import Piece, Tally


logger = logging.getLogger(__name__)

RESTARTS = 3
"""How often an actor is started again, and how often a job is done again."""
PATIENCE = 120.0
"""Seconds to wait for a client actor when none is left; starting one takes a few."""
START_PATIENCE = 600.0
"""Seconds that all client actors have to come up: a large backbone may have to be read."""

_NOTHING = Broadcast(torch.empty(0, 0), torch.empty(0, 0))


def stored_broadcasts(tasks: Sequence[ClientJob | Piece]) -> dict[int, Any]:
    """References of the tasks' broadcasts by their `id`: each is stored once, as most tasks share
    one, and does not travel with the tasks.
    """
    broadcasts = {id(task.broadcast): task.broadcast for task in tasks}
    return {key: import_ray().put(value) for key, value in broadcasts.items()}


class DriverActor:
    """Runs a driver generator inside the cluster."""

    def run(
        self, drive: Drive, options: RuntimeOptions, args: Parcel[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """Yield what `drive(runtime, *args)` yields.

        Args:
            drive: a generator function; its first argument is the runtime.
            options: of the runtime.
            args: its other arguments, packed for the way.

        Raises:
            ConfigError, InputError: as `drive` does. Where there are several nodes the message
                names this one, for it is here that a data set or weights are missing.
        """
        try:
            yield from drive_here(drive, options, *args.open())
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


@dataclasses.dataclass(eq=False)
class _Tasks:
    """Some tasks that were started together."""

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
        self._groups: list[_Tasks] = []
        self._work: dict[Any, tuple[Any, _Tasks, int]] = {}
        """Actor, tasks and position of each call that was made, by the reference of its result."""
        self._healing: dict[Any, Any] = {}
        """Actors that died, by the reference of the call that succeeds when they are back."""
        self._nodes: collections.Counter[str] = collections.Counter()
        """How many processes of this run started on each node, by Ray's id of the node."""
        self._setup: list[Any] = []
        self._source: WorkerSetup | None = None
        self._gauges = RoundGauges()
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
            events = driver.run.options(num_returns="streaming").remote(
                drive, self.options, Parcel.pack(args)
            )
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
        self._actors = [actor.remote(self.options.threads, loaded()) for _ in range(plan.count)]

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
        return notes_on_places(self.options, setup.device, places, len(self._setup) > 1)

    def _send_features(self) -> None:
        """Put the features into the object store, which brings them once to each node that asks."""
        if len(self._setup) == 1 and self._source is not None:
            self._setup.append(import_ray().put(self._source.loaded()))

    def _probe(self, actor: Any) -> Any:
        """A call that succeeds when the actor runs, however often it is restarted for that."""
        return actor.load.options(max_task_retries=-1).remote(self._setup)

    def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        """Each free actor gets the next pack of jobs; what a dead actor had goes to another."""
        recipe_ref = self._recipe_ref(recipe)
        refs = stored_broadcasts(jobs)

        def submit(actor: Any, pack: list[ClientJob]) -> Any:
            light = [dataclasses.replace(job, broadcast=_NOTHING) for job in pack]
            return actor.train.remote(self._setup, recipe_ref, light, refs[id(pack[0].broadcast)])

        packs = pack_jobs(jobs, self.options.pack_size(len(jobs), recipe))
        group = self._start(submit, packs)
        return (update for _, updates in self._results(group) for update in updates)

    def measure(self, recipe: LocalRecipe, pieces: Sequence[Piece]) -> Callable[[], list[Tally]]:
        """Each free actor gets the next piece; what a dead actor had goes to another."""
        recipe_ref, refs = self._recipe_ref(recipe), stored_broadcasts(pieces)

        def submit(actor: Any, piece: Piece) -> Any:
            light = dataclasses.replace(piece, broadcast=_NOTHING)
            return actor.measure.remote(self._setup, recipe_ref, light, refs[id(piece.broadcast)])

        group = self._start(submit, pieces)
        return lambda: [
            tally for _, tally in sorted(self._results(group), key=lambda done: done[0])
        ]

    def _recipe_ref(self, recipe: LocalRecipe) -> Any:
        """The recipe in the object store; it is the same in all rounds of a method."""
        if self._recipe is None or self._recipe[0] is not recipe:
            self._recipe = (recipe, import_ray().put(recipe))
        return self._recipe[1]

    def _start(self, submit: Callable[[Any, Any], Any], tasks: Sequence[Any]) -> _Tasks:
        """Have tasks done by whoever is free, after those that were started before.

        Args:
            submit: gives an actor a task and returns the reference of the result.
            tasks: what any actor can do.
        """
        group = _Tasks(submit, tasks, collections.deque(range(len(tasks))))
        self._groups.append(group)
        self._assign()
        return group

    def _results(self, group: _Tasks) -> Iterator[tuple[int, Any]]:
        """Position and result of each task, as they finish; other tasks go on meanwhile."""
        try:
            for _ in group.tasks:
                while not group.results:
                    if group.error is not None:
                        raise group.error[0] from group.error[1]
                    self._advance()
                yield group.results.popleft()
        finally:
            if group in self._groups:  # it may have been abandoned
                self._groups.remove(group)

    def _assign(self) -> None:
        """Give the actors what waits, in the order in which it was started."""
        queue = [
            (group, position)
            for group in self._groups
            if group.error is None
            for position in group.waiting
        ]
        for number, (group, position) in enumerate(queue):
            actor = min(self._held, key=self._held.__getitem__, default=None)
            # While more tasks wait than there are actors, each may have a second one, so that it
            # need not wait for the driver between the two.
            most = 2 if len(queue) - number > len(self._held) else 1
            if actor is None or self._held[actor] >= most:
                break
            group.waiting.remove(position)
            self._held[actor] += 1
            self._work[group.submit(actor, group.tasks[position])] = actor, group, position

    def _advance(self) -> None:
        """Wait for something to happen, and give out what that makes room for.

        A task whose actor died is done again by another. An error waits for whoever asks for the
        results.
        """
        ray = import_ray()
        self._assign()
        for ref in self._finished(list(self._work)):
            actor, group, position = self._work.pop(ref)
            if actor in self._held:
                self._held[actor] -= 1
            try:
                group.results.append((position, ray.get(ref)))
            except ray.exceptions.RayTaskError as error:
                cause = unwrapped(error)
                if isinstance(cause, FeaturesMissing):
                    self._send_features()  # it was restarted on a node without the files
                    group.waiting.appendleft(position)
                else:
                    group.error = group.error or (cause, error)
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                group.deaths[position] += 1
                logger.info("an actor died at task %d; another does it again", position)
                if group.deaths[position] > RESTARTS:
                    group.error = group.error or (self._too_many_deaths(), error)
                group.waiting.appendleft(position)
                if self._held.pop(actor, None) is not None:  # the first of its tasks to report it
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

    def publish(self, run: str, method: str, figures: Mapping[str, float]) -> None:
        """Set Ray's metrics; see `metrics`.

        Args:
            run: name of the run's directory.
            method: as tables name it.
            figures: by name.
        """
        self._gauges.set(run, method, figures)

    def abandon(self) -> None:
        """Give out nothing more of what was started; what the actors are at ends unheard."""
        for group in self._groups:
            group.waiting.clear()
        self._groups.clear()

    def close(self) -> None:
        """End the client actors."""
        for actor in self._actors:
            import_ray().kill(actor)
        self._actors = []
        self._held.clear()
        self._healing.clear()
        self._work.clear()
        self._groups.clear()
        if self._nodes and private.spare_workers_are_kept():
            self._nodes[node_id()] += 1  # the driver
            replace_spare_workers(self._nodes)
        self._nodes.clear()
