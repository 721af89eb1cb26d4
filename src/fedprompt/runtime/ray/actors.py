"""`ClientActor`: a client worker in a process of Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.errors import ClientError, FedpromptError, InputError, WorkerError
from fedprompt.core.plugins import Plugin, install
from fedprompt.core.types import Broadcast, ClientJob, ClientUpdate
from fedprompt.runtime.base import limited_threads
from fedprompt.runtime.ray.local import import_ray, node_id
from fedprompt.runtime.ray.nodes import node_name

if TYPE_CHECKING:  # imports Lightning and timm
    from fedprompt.client.worker import ClientWorker, WorkerSetup
    from fedprompt.server.evaluate import Piece, Tally


class FeaturesMissing(FedpromptError):
    """A client actor cannot open the cache's files: it is on a machine without them."""


class ClientActor:
    """Wraps a `ClientWorker`: one frozen backbone, the data by reference, no client's state."""

    def __init__(self, threads: int, plugins: Sequence[Plugin] = ()) -> None:
        from fedprompt.client import preloaded  # noqa: F401 - takes seconds; done before the data come

        # For the life of the process: the limits end with it.
        self._limits = limited_threads(threads)
        self._limits.__enter__()
        self._plugins = plugins
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
        try:
            install(self._plugins)  # before the setup, which may be made of their classes
        except FedpromptError as error:
            raise WorkerError(f"node {node_name()}: {error}") from error
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
        """The local work of a pack of clients.

        Args:
            setup: as for `_load`.
            recipe: how clients train.
            jobs: of the clients, each without its broadcast.
            broadcast: of them all.
        """
        worker = self._load(setup)
        whole = [dataclasses.replace(job, broadcast=broadcast) for job in jobs]
        try:
            return worker.train(recipe, whole)
        except ClientError as error:
            where = (error.client_id, error.round_index, error.stage, error.cause, node_name())
            raise ClientError(*where) from error

    def measure(
        self, setup: list[Any], recipe: LocalRecipe, piece: Piece, broadcast: Broadcast
    ) -> Tally:
        """One piece of a split.

        Args:
            setup: as for `_load`.
            recipe: how the model is built.
            piece: without its broadcast.
            broadcast: of the piece.
        """
        from fedprompt.server.evaluate import measure_piece

        whole = dataclasses.replace(piece, broadcast=broadcast)
        return measure_piece(self._load(setup), recipe, whole)
