"""One client's work in one round: build its module, fit it, collect the update. The only place that
drives Lightning.

A `ClientWorker` is what an actor (or the serial runtime) holds: one frozen backbone and the data of
all clients, and no client's state, so that any worker can do any job and the result depends on the
job alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fedprompt.client.module import Batch, ClientModule
from fedprompt.client.recipe import LocalRecipe
from fedprompt.data.tables import FeatureTable
from fedprompt.errors import ClientError
from fedprompt.models.backbone import Backbone, load_backbone
from fedprompt.models.options import ModelOptions
from fedprompt.models.prompted_vit import PromptOptions
from fedprompt.objectives import LocalResult
from fedprompt.seeding import torch_generator
from fedprompt.types import ClientJob, ClientUpdate


@dataclasses.dataclass(frozen=True)
class ClientData:
    """The training data of all clients; goes to every worker once."""

    table: FeatureTable
    parts: tuple[NDArray[np.int64], ...]
    """Rows of the table that each client owns."""
    class_mask: NDArray[np.bool_]
    """(groups, classes)"""


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """What a worker is built from."""

    model: ModelOptions
    """Which backbone, for `load_backbone`."""
    data: ClientData
    device: str
    threads: int
    verbose: bool = False
    """Let Lightning speak."""

    def build(self) -> ClientWorker:
        """A worker in this process."""
        return ClientWorker(self)

    def loaded(self) -> WorkerSetup:
        """The same with the features in memory, for workers that cannot open the cache's files."""
        table = self.data.table.loaded()
        return dataclasses.replace(self, data=dataclasses.replace(self.data, table=table))


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
    ) -> None:
        table = data.table
        tokens = prompts.count > 0 if tokens is None else tokens
        # Fancy indexing copies a client's few rows into fresh, writable, aligned memory.
        index = np.sort(np.concatenate(data.parts)) if pooled else data.parts[client_id]
        self.inputs = table.tokens_at(index) if tokens else torch.from_numpy(table.features[index])
        self.queries = torch.from_numpy(table.queries[index])
        if prompts.selection == "keyed" and prompts.choose_by == "client":
            self.queries = self.queries.mean(dim=0).expand(len(index), -1)
        self.labels = torch.from_numpy(table.labels[index])
        self.groups = torch.from_numpy(table.groups[index])
        self.batch_size = batch_size
        self.generator = generator

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.labels), generator=self.generator)
        for rows in torch.split(order, self.batch_size):
            yield self.inputs[rows], self.queries[rows], self.labels[rows], self.groups[rows]


class ClientWorker:
    """Trains any client of a federation; holds no client's state.

    Args:
        setup: backbone, data and device.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        self.device = torch.device(setup.device)
        self.backbone: Backbone = load_backbone(setup.model).to(self.device)
        self.data = setup.data
        self.verbose = setup.verbose

    def train(self, recipe: LocalRecipe, job: ClientJob) -> ClientUpdate:
        """Do one client's local work.

        Args:
            recipe: how clients train.
            job: which client, from which prompts, with which seed.

        Returns:
            The update: detached CPU copies that share no memory with the job.

        Raises:
            ClientError: the work raised; the error names client, round, stage and cause.
        """
        started = time.perf_counter()
        stage = "build"
        try:
            module = ClientModule(recipe, self.backbone, job, self.data.class_mask)
            batches = ClientBatches(
                self.data,
                job.client_id,
                recipe.training.batch_size,
                recipe.prompts,
                generator=torch_generator(job.seed, "batches"),
                tokens=recipe.needs_tokens,
                pooled=recipe.training.pooled,
            )
            stage = "fit"
            if module.objective.trains:
                with contextlib.nullcontext() if self.verbose else quiet_lightning():
                    fit(module, batches, recipe.training.epochs, self.device, job.seed)
            stage = "collect"
            return collect(module, batches, job, time.perf_counter() - started)
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else "no message"
            cause = f"{type(error).__name__}: {first}"
            raise ClientError(job.client_id, job.round_index, stage, cause) from error


def fit(
    module: pl.LightningModule,
    batches: IterableDataset[Batch],
    epochs: int,
    device: torch.device,
    seed: int,
) -> None:
    """Train a module with a Lightning Trainer that has no logger, checkpoint or bar."""
    loader = DataLoader(
        batches,
        batch_size=None,  # the data set yields whole batches
        # Given only so that the loader does not draw its base seed from the global generator.
        generator=torch_generator(seed, "loader"),
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cuda" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        # No cluster is to be detected from the environment: one client trains in one process.
        plugins=[LightningEnvironment()],
        barebones=True,
    )
    trainer.fit(module, loader)
    module.to(device)


def collect(
    module: ClientModule, batches: ClientBatches, job: ClientJob, seconds: float
) -> ClientUpdate:
    """The update of a fitted module.

    A client returns the prompts that it used, each with the client's mean query as its address if
    keys travel at all. What is personal goes into the client's own state.
    """
    recipe, objective = module.recipe, module.objective
    counts = module.use_counts.cpu()
    rows = torch.nonzero(counts).flatten()
    tuned = {name: _copy(parameter) for name, parameter in module.trainable()}
    personal = {name: tensor for name, tensor in tuned.items() if is_personal(recipe, name)}
    if "prompts" in personal:
        rows = rows[:0]
    width = module.keys.shape[1]
    key = batches.queries.mean(dim=0)[:width]
    steps = len(batches) * recipe.training.epochs if objective.trains else 0
    result = LocalResult(
        start=module.start,
        end=tuned,
        received=job.broadcast.shared,
        own=job.state,
        steps=steps,
        rates={name: recipe.rate(name) for name in tuned},
        features=batches.inputs,
        labels=batches.labels,
        num_classes=recipe.num_classes,
    )
    sent, kept = objective.finish(result)
    trained = {
        name: tensor
        for name, tensor in tuned.items()
        if objective.trains and name != "prompts" and name not in personal
    }
    return ClientUpdate(
        client_id=job.client_id,
        num_examples=len(batches.labels),
        prompts=_copy(module.prompts)[rows].clone(),
        keys=key.expand(len(rows), -1).clone(),
        origins=rows.clone(),
        use_counts=counts[rows].clone(),
        shared={**trained, **{name: _copy(tensor) for name, tensor in sent.items()}},
        state={**personal, **{name: _copy(tensor) for name, tensor in kept.items()}},
        metrics={**module.metrics(), "steps": float(steps), "seconds": seconds},
    )


def is_personal(recipe: LocalRecipe, name: str) -> bool:
    """Whether a trainable tensor stays with its client."""
    if name == "prompts":
        return recipe.prompts.mode == "personal"
    return name.startswith("head.") and recipe.head.mode == "personal"


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's banners, tips and warnings."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            warnings.filterwarnings("ignore", module="lightning_fabric")
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            yield
    finally:
        logger.setLevel(level)
