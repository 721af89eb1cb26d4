"""`serial`: everything in this process, client after client, without Ray.

For debugging and for small machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.types import ClientJob, ClientUpdate
from fedprompt.runtime.base import Drive, RuntimeOptions, limited_threads, pack_jobs, runtimes

if TYPE_CHECKING:  # imports Lightning and timm
    from fedprompt.client.worker import ClientWorker, WorkerSetup
    from fedprompt.server.evaluate import Piece, Tally


@runtimes.register("serial", RuntimeOptions)
class SerialRuntime:
    """One worker in this process."""

    def __init__(self, options: RuntimeOptions) -> None:
        self.options = options
        self._worker: ClientWorker | None = None

    def launch(self, drive: Drive, *args: Any, verbose: bool = False) -> Iterator[Any]:
        """Run the driver in this process."""
        with limited_threads(self.options.threads):
            yield from drive(self, *args)

    def warm_up(self) -> None:
        """Nothing to start."""

    def open(self, setup: WorkerSetup) -> Sequence[str]:
        """Build the worker."""
        self._worker = setup.build()
        return ()

    def map(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
        """One pack of jobs after the other."""
        worker = self._opened()
        for pack in pack_jobs(jobs, self.options.pack_size(len(jobs), recipe)):
            yield from worker.train(recipe, pack)

    def measure(self, recipe: LocalRecipe, pieces: Sequence[Piece]) -> Callable[[], list[Tally]]:
        """One piece after the other, at once."""
        from fedprompt.server.evaluate import measure_piece

        tallies = [measure_piece(self._opened(), recipe, piece) for piece in pieces]
        return lambda: tallies

    def publish(self, run: str, method: str, figures: Mapping[str, float]) -> None:
        """Nobody watches.

        Args:
            run: name of the run's directory.
            method: as tables name it.
            figures: by name.
        """

    def abandon(self) -> None:
        """Nothing is under way: jobs are done when their updates are taken."""

    def close(self) -> None:
        """Forget the worker."""
        self._worker = None

    def _opened(self) -> ClientWorker:
        if self._worker is None:
            raise RuntimeError("SerialRuntime was used before open")
        return self._worker
