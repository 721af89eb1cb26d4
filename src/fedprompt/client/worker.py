"""One client's work in one round: build its module, fit it, collect the update.

A `ClientWorker` is what an actor (or the serial runtime) holds: one frozen backbone and the data of
all clients, and no client's state, so that any worker can do any job and the result depends on the
job alone.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from fedprompt.attacks import Attack
from fedprompt.client.loop import fit, make_fabric
from fedprompt.client.module import Batch, ClientModule
from fedprompt.client.packed import PackedBatches, PackedClients
from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.devices import send
from fedprompt.core.errors import ClientError
from fedprompt.core.seeding import torch_generator
from fedprompt.core.types import SHARED, ClientJob, ClientState, ClientUpdate, Parts, Tensors
from fedprompt.data.prefix.spread import triangular_factor
from fedprompt.data.prefix.tables import FeatureTable
from fedprompt.models.backbone import Backbone, load_backbone
from fedprompt.models.options import ModelOptions
from fedprompt.models.selection import PromptOptions
from fedprompt.objectives import LocalResult

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ClientData:
    """The training data of all clients; goes to every worker once."""

    table: FeatureTable
    parts: tuple[NDArray[np.int64], ...]
    """Rows of the table that each client owns."""
    class_mask: NDArray[np.bool_]
    """(groups, classes)"""

    def rows(self, client_id: int, pooled: bool) -> NDArray[np.int64]:
        """Rows of the table that a client trains on: its own, or with `pooled` those of all."""
        return np.sort(np.concatenate(self.parts)) if pooled else self.parts[client_id]


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """What a worker is built from."""

    model: ModelOptions
    """Which backbone, for `load_backbone`."""
    data: ClientData
    splits: tuple[FeatureTable, ...]
    """Splits on which the global model is measured: test and, if there is one, validation."""
    device: str
    threads: int
    precision: str = "32-true"
    """How the blocks are computed; see `Backbone.autocast`."""
    cut: int = 0
    """The block before which prompts enter; that of all tables."""

    def build(self) -> ClientWorker:
        """A worker in this process."""
        return ClientWorker(self)

    def loaded(self) -> WorkerSetup:
        """The same with the features in memory, for workers that cannot open the cache's files."""
        data = dataclasses.replace(self.data, table=self.data.table.loaded())
        splits = tuple(table.loaded() for table in self.splits)
        return dataclasses.replace(self, data=data, splits=splits)


class ClientBatches(IterableDataset[Batch]):
    """Batches of one client's data; every epoch is a new permutation from the job's generator.

    Args:
        data: all clients' data.
        client_id: whose.
        batch_size: images of a batch.
        prompts: by which queries prompts are chosen.
        generator: draws the permutations.
        tokens: whether tokens or the CLS features are needed; by default as there are prompts.
        pooled: take the data of all clients.
        device: where the batches lie; the client's data go there once.
        attack: what the client does instead of honest work, if anything.
    """

    def __init__(
        self,
        data: ClientData,
        client_id: int,
        batch_size: int,
        prompts: PromptOptions,
        generator: torch.Generator,
        tokens: bool | None = None,
        pooled: bool = False,
        device: torch.device | str = "cpu",
        attack: Attack | None = None,
    ) -> None:
        table = data.table
        tokens = prompts.count > 0 if tokens is None else tokens
        # Fancy indexing copies a client's few rows into fresh, writable, aligned memory.
        index = data.rows(client_id, pooled)
        inputs = table.tokens_at(index) if tokens else torch.from_numpy(table.features[index])
        queries = torch.from_numpy(table.queries(prompts.query_kind, index))
        self.own_queries = queries
        """(k, q) of each image, on the CPU."""
        if prompts.selection == "keyed" and prompts.choose_by == "client":
            queries = queries.mean(dim=0).expand(len(index), -1)
        labels = torch.from_numpy(labels_of(data, index, attack))
        groups = torch.from_numpy(table.groups[index])
        self.on_host: Batch = (inputs, queries, labels, groups)
        """All the client's data in the memory of the CPU, whatever the device."""
        self.inputs, self.queries, self.labels, self.groups = (
            each.to(device) for each in self.on_host
        )
        self.batch_size = batch_size
        self.generator = generator

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # Drawn on the CPU, so that the order is the same on every device.
        order = torch.randperm(len(self.labels), generator=self.generator)
        for rows in torch.split(send(order, self.labels.device), self.batch_size):
            yield self.inputs[rows], self.queries[rows], self.labels[rows], self.groups[rows]


class ClientWorker:
    """Trains any client of a federation, and has what it takes to measure the global model; holds
    no client's state.

    Args:
        setup: backbone, data and device.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        self.fabric = make_fabric(setup.device, setup.precision)
        self.device = self.fabric.device
        for table in (setup.data.table, *setup.splits):
            table.check_cut(setup.cut)
        self.backbone: Backbone = load_backbone(setup.model, setup.cut).to(self.device)
        self.backbone.autocast = self.fabric.autocast
        self.data = setup.data
        self.splits = setup.splits
        self.largest_pack = sys.maxsize
        """Clients of a pack that fit in memory, as far as is known."""

    def train(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> list[ClientUpdate]:
        """Do the local work of some clients in one pack, or in smaller ones if memory runs out.

        Args:
            recipe: how clients train.
            jobs: which clients, from which prompts, with which seeds.

        Returns:
            The updates in the order of the jobs: detached CPU copies that share no memory with
            them.

        Raises:
            ClientError: the work raised; the error names client, round, stage and cause.
        """
        updates: list[ClientUpdate] = []
        while len(updates) < len(jobs):
            pack = jobs[len(updates) : len(updates) + self.largest_pack]
            try:
                updates += self._train_pack(recipe, pack)
            except torch.OutOfMemoryError:
                self.largest_pack = len(pack) // 2
                logger.warning(
                    "%d packed clients do not fit in the memory of %s: going on with %d",
                    *(len(pack), self.device, self.largest_pack),
                )
            if self.device.type == "cuda" and self.largest_pack < len(pack):
                torch.cuda.empty_cache()  # after the `except`, whose traceback holds tensors
        return updates

    def _train_pack(self, recipe: LocalRecipe, jobs: Sequence[ClientJob]) -> list[ClientUpdate]:
        """One pack.

        Raises:
            OutOfMemoryError: several clients do not fit.
            ClientError: see `train`.
        """
        started = time.perf_counter()
        stage = "build"
        try:
            clients = [self._module(recipe, job) for job in jobs]
            batches = [self._batches(recipe, job) for job in jobs]
            stage = "fit"
            if clients[0].objective.trains:
                epochs = recipe.training.epochs
                if len(jobs) == 1:
                    fit(clients[0], batches[0], epochs, self.fabric)
                else:
                    fit(PackedClients(clients), PackedBatches(batches), epochs, self.fabric)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # nothing in the fit has waited for the GPU
            stage = "collect"
            seconds = (time.perf_counter() - started) / len(jobs)
            return [
                collect(client, own, job, seconds, len(jobs))
                for client, own, job in zip(clients, batches, jobs, strict=True)
            ]
        except Exception as error:
            if len(jobs) > 1:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                for job in jobs:  # alone, the client that is at fault gives its own error
                    self._train_pack(recipe, [job])
                stage += f" of {len(jobs)} packed clients"
            first = str(error).splitlines()[0] if str(error) else "no message"
            cause = f"{type(error).__name__}: {first}"
            raise ClientError(jobs[0].client_id, jobs[0].round_index, stage, cause) from error

    def _module(self, recipe: LocalRecipe, job: ClientJob) -> ClientModule:
        data = self.data
        rows = data.rows(job.client_id, recipe.training.pooled)
        labels = labels_of(data, rows, recipe.attack_of(job.client_id))
        counts = np.bincount(labels, minlength=recipe.num_classes)
        module = ClientModule(recipe, self.backbone, job, data.class_mask, counts)
        return module.to(self.device)

    def _batches(self, recipe: LocalRecipe, job: ClientJob) -> ClientBatches:
        return ClientBatches(
            self.data,
            job.client_id,
            recipe.training.batch_size,
            recipe.prompts,
            torch_generator(job.seed, "batches"),
            tokens=recipe.needs_tokens,
            pooled=recipe.training.pooled,
            device=self.device,
            attack=recipe.attack_of(job.client_id),
        )


def labels_of(
    data: ClientData, rows: NDArray[np.int64], attack: Attack | None
) -> NDArray[np.int64]:
    """(k,) the labels that a client trains on.

    Args:
        data: all clients' data.
        rows: (k,) of the table.
        attack: what the client does instead of honest work, if anything.
    """
    labels, groups = data.table.labels[rows], data.table.groups[rows]
    return labels if attack is None else attack.labels(labels, groups, data.class_mask)


def collect(
    module: ClientModule, batches: ClientBatches, job: ClientJob, seconds: float, pack: int
) -> ClientUpdate:
    """The update of a fitted module.

    A client returns the prompts that it used, each with the client's mean query as its address if
    keys travel at all. What is personal goes into the client's own state. With privacy, what it
    sends is clipped and noisy.

    Args:
        module: the client's.
        batches: its data.
        job: what it was sent.
        seconds: its share of the time.
        pack: clients that were fitted with it, itself among them.
    """
    recipe, objective = module.recipe, module.objective
    inputs, queries, labels, _ = batches.on_host
    counts = module.use_counts.cpu()
    tuned = module.trainable().mapped(_copy)
    steps = len(batches) * recipe.training.epochs if objective.trains else 0
    finished = objective.finish(
        LocalResult(
            start=module.start,
            end=tuned,
            received=job.broadcast.received(),
            own=job.state.kept.objective,
            steps=steps,
            rates={path: recipe.rate(part) for part, path, _ in tuned.labelled()},
            features=inputs,
            labels=labels,
            num_classes=recipe.num_classes,
            keys=job.broadcast.keys,
            encode=lambda: encoded(module, batches),
        )
    )
    returned = tuned.updated(finished.instead.trained()).mapped(_copy)
    sent = returned.pick(set(SHARED) - recipe.personal) if objective.trains else Parts()
    rows = torch.nonzero(counts).flatten()
    if "prompts" in recipe.personal:
        rows = rows[:0]
    prompts = _copy(module.prompts) if returned.prompts is None else returned.prompts
    key = queries.mean(dim=0)[: module.keys.shape[1]]
    update = ClientUpdate(
        client_id=job.client_id,
        round_index=job.round_index,
        num_examples=len(labels),
        prompts=prompts[rows].clone(),
        keys=key.expand(len(rows), -1).clone(),
        origins=rows.clone(),
        use_counts=counts[rows].clone(),
        shared=dataclasses.replace(sent, objective=_copies(finished.sent)),
        state=ClientState(
            dataclasses.replace(tuned.pick(recipe.personal), objective=_copies(finished.kept))
        ),
        metrics={
            **module.metrics(),
            "steps": float(steps),
            "seconds": seconds,
            "pack": float(pack),
        },
        spread=triangular_factor(batches.own_queries) if job.tells_spread else None,
    )
    if recipe.privacy is not None:
        draws = torch_generator(job.seed, "privacy")
        update = recipe.privacy.release(update, job.broadcast, draws)
    attack = recipe.attack_of(job.client_id)
    if attack is None:
        return update
    return attack.tamper(update, job.broadcast, torch_generator(job.seed, "attack"))


def encoded(module: ClientModule, batches: ClientBatches) -> Tensor:
    """(N, feature_dim) what a client's model makes of its images, in the order of its data.

    Args:
        module: the client's, trained.
        batches: its data.
    """
    pieces = zip(
        torch.split(batches.inputs, batches.batch_size),
        torch.split(batches.queries, batches.batch_size),
        strict=True,
    )
    with torch.no_grad():
        features = [module.encode(inputs, module.choose(own)[0]) for inputs, own in pieces]
    return _copy(torch.cat(features))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


def _copies(tensors: Tensors) -> dict[str, Tensor]:
    return {name: _copy(tensor) for name, tensor in tensors.items()}
