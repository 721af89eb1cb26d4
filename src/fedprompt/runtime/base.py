"""Where clients' work is done: one contract, several executions, the same bits."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from threadpoolctl import threadpool_limits

from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.checks import check_choice, check_integer
from fedprompt.core.errors import ConfigError
from fedprompt.core.machine import available_cpus
from fedprompt.core.registry import Registry
from fedprompt.core.types import ClientJob, ClientUpdate
from fedprompt.core.words import counted
from fedprompt.models.options import PRECISIONS

if TYPE_CHECKING:  # imports Lightning and timm
    from fedprompt.client.worker import WorkerSetup
    from fedprompt.server.evaluate import Piece, Tally

DEVICES = ("auto", "cpu", "cuda")
MAX_ACTORS_PER_CPU = 8
"""Each actor is a process of some 500 MB; far more than there are cores would bring a machine down.
"""


@dataclasses.dataclass(frozen=True)
class RuntimeOptions:
    """The `runtime` section. Only `threads`, `device`, `pack` and `precision` can change a result's
    bits."""

    name: str = "ray"
    """`ray`: clients train in parallel actors; `serial`: in one process, with the same bits."""
    actors: int | None = None
    """Client actors of the Ray runtime; null means cpus / threads."""
    threads: int = 1
    """Torch threads of each worker. Sums are split by thread, so this changes bits."""
    cpus: int | None = None
    """Cores to use; null means all that this process may use."""
    device: str = "auto"
    """`auto` takes CUDA when present."""
    pack: int | str = "auto"
    """Clients that a worker trains together in one forward and backward pass. `auto` is 1 on the
    CPU, where packing gains nothing, and as many as there are for the worker on a GPU, halved when
    its memory is full. Products of other sizes are rounded otherwise, so this changes bits."""
    precision: str = "32-true"
    """Of the blocks: `bf16-mixed` computes their matrix products in bfloat16, and keeps weights,
    prompts, heads and optimizers in float32. Faster on GPUs and on CPUs that know the type, for
    networks that are not tiny."""
    gpus_per_actor: float | None = None
    """GPUs that each client actor of the Ray runtime reserves, fractions of one or whole ones;
    null shares them evenly with the driver when the device is CUDA, 0 keeps to the CPU.
    """
    driver_node: str | None = None
    """Where the driver of the Ray runtime runs: `head`, the address of a node, or the name of a
    custom resource that the node has; null means near the caller.
    """

    def __post_init__(self) -> None:
        runtimes.entry(self.name)
        for field in ("actors", "threads", "cpus"):
            value = getattr(self, field)
            if value is not None:
                check_integer(f"runtime.{field}", value, 1)
        check_choice("runtime.device", self.device, DEVICES)
        check_choice("runtime.precision", self.precision, PRECISIONS)
        if isinstance(self.pack, str) and self.pack != "auto":
            raise ConfigError(
                f"runtime.pack: expected 'auto' or an integer >= 1, got '{self.pack}'"
            )
        if isinstance(self.pack, int) and self.pack < 1:
            raise ConfigError(f"runtime.pack: expected 'auto' or an integer >= 1, got {self.pack}")
        share = self.gpus_per_actor
        if share is not None and not (0 <= share <= 1 or share == int(share) > 0):
            raise ConfigError(
                f"runtime.gpus_per_actor: expected 0, a fraction of one GPU or whole GPUs, got "
                f"{share:g}"
            )
        on_cluster = os.environ.get("RAY_ADDRESS", "") not in ("", "local")
        on_cluster = on_cluster and self.name != "serial"
        if self.device == "cuda" and not torch.cuda.is_available() and not on_cluster:
            raise ConfigError(
                "runtime.device=cuda: no CUDA device was found; use runtime.device=auto or cpu"
            )
        # On an existing cluster Ray knows the resources, not this process.
        if not on_cluster:
            if self.num_cpus > available_cpus():
                raise ConfigError(
                    f"runtime.cpus: {self.num_cpus} CPUs were requested, but this machine has "
                    f"{available_cpus()}; set runtime.cpus={available_cpus()} or leave it out"
                )
            if self.actors is not None and self.actors > MAX_ACTORS_PER_CPU * self.num_cpus:
                raise ConfigError(
                    f"runtime.actors: {self.actors} actors were requested, but "
                    f"{counted(self.num_cpus, 'CPU')} can hold at most "
                    f"{MAX_ACTORS_PER_CPU * self.num_cpus}; leave it out to get one for each CPU"
                )
            if self.threads > self.num_cpus:
                raise ConfigError(
                    f"runtime.threads: {counted(self.threads, 'thread')} per worker do not fit in "
                    f"{counted(self.num_cpus, 'CPU')}; expected runtime.threads <= {self.num_cpus}"
                )

    @property
    def num_cpus(self) -> int:
        """Cores to use."""
        return available_cpus() if self.cpus is None else self.cpus

    @property
    def num_actors(self) -> int:
        """Client actors; more than the cores is allowed, they then share them."""
        return max(1, self.num_cpus // self.threads) if self.actors is None else self.actors

    @property
    def torch_device(self) -> str:
        """The device that `device` stands for on this machine."""
        if self.gpus_per_actor == 0:
            return "cpu"
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    def settled(self) -> RuntimeOptions:
        """With `device`, and on the CPU `pack`, as they are on this machine: a run continues with
        them wherever it is continued.
        """
        pack = 1 if self.pack == "auto" and self.torch_device == "cpu" else self.pack
        return dataclasses.replace(self, device=self.torch_device, pack=pack)

    def pack_size(self, jobs: int, recipe: LocalRecipe) -> int:
        """Clients of a pack when there are so many jobs."""
        if not recipe.packable:
            return 1
        if isinstance(self.pack, int):
            return self.pack
        workers = 1 if self.name == "serial" else self.num_actors
        return 1 if self.torch_device == "cpu" else -(-jobs // workers)


def pack_jobs(jobs: Sequence[ClientJob], size: int) -> list[list[ClientJob]]:
    """The jobs in packs of at most `size`, in their order; those of a pack share a broadcast.

    Which clients are packed depends on jobs and size alone, because it changes bits.
    """
    packs = []
    for _, alike in itertools.groupby(jobs, key=lambda job: id(job.broadcast)):
        members = list(alike)
        packs += [members[start : start + size] for start in range(0, len(members), size)]
    return packs


Drive = Callable[..., Iterator[Any]]
"""A generator function that gets a runtime as its first argument and yields events."""


class Runtime(Protocol):
    """Does the work of clients, in any order and anywhere."""

    options: RuntimeOptions

    def launch(self, drive: Drive, *args: Any, verbose: bool = False) -> Iterator[Any]:
        """Run `drive(runtime, *args)` where this runtime has its driver; yield its events."""
        ...

    def warm_up(self) -> None:
        """Start the workers before the data are ready: their imports take seconds.

        Raises:
            ConfigError: the machine or cluster cannot hold them.
        """
        ...

    def open(self, setup: WorkerSetup) -> Sequence[str]:
        """Finish starting the workers: each gets the backbone and the data of all clients, once.

        Returns:
            What the user should read about them.
        """
        ...

    def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        """Start the jobs; the iterator waits for their updates and yields them as they arrive."""
        ...

    def measure(self, recipe: LocalRecipe, pieces: Sequence[Piece]) -> Callable[[], list[Tally]]:
        """Start to measure models on pieces of the setup's splits.

        Jobs that are started later come after the pieces, on the workers that are free.

        Args:
            recipe: how the models are built.
            pieces: each with its model.

        Returns:
            A function that waits for the tallies, which are in the order of the pieces.
        """
        ...

    def publish(self, run: str, method: str, figures: Mapping[str, float]) -> None:
        """Show the figures of a round where whoever watches the machines looks, if anywhere.

        Args:
            run: name of the run's directory.
            method: as tables name it.
            figures: by name.
        """
        ...

    def abandon(self) -> None:
        """Forget the jobs and pieces that were started and whose results no one will take."""
        ...

    def close(self) -> None:
        """Stop the workers."""
        ...


runtimes: Registry[Runtime] = Registry("runtime", "fedprompt.runtime")


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Hold torch and BLAS to a number of threads, so that bits do not depend on the process."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)
