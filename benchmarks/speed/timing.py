"""What the cases of the speed benchmark share: an experiment laid open, and fair timing.

The machine may be shared. The two sides of a ratio are therefore run in turn, several times, and
the least and the median of each side are kept. `cpu` is the time that the process was on a core,
which other programs disturb least; it tells nothing about actors in other processes.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer

from fedprompt.client.recipe import LocalRecipe
from fedprompt.client.worker import ClientBatches, ClientWorker
from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.seeding import torch_generator
from fedprompt.core.types import ClientJob, ServerState
from fedprompt.data.prefix.tables import compute_table
from fedprompt.models.backbone import Backbone
from fedprompt.models.nano import network as nano
from fedprompt.runs import driver
from fedprompt.runs.federation import Federation, initial_state, prepare
from fedprompt.server.round import RoundSettings, make_jobs


@dataclasses.dataclass(frozen=True)
class Laid:
    """An experiment laid open: what one round of it needs."""

    config: ExperimentConfig
    federation: Federation
    settings: RoundSettings
    state: ServerState
    jobs: list[ClientJob]
    worker: ClientWorker

    @property
    def recipe(self) -> LocalRecipe:
        """How clients train."""
        return self.settings.recipe

    @property
    def images(self) -> int:
        """Training images of the round over all epochs."""
        sizes = [len(self.worker.data.parts[job.client_id]) for job in self.jobs]
        return sum(sizes) * self.recipe.training.epochs


def lay_open(overrides: Sequence[str], backbone: Backbone | None = None) -> Laid:
    """The first round of the quickstart with overrides, in this process.

    Args:
        overrides: as on the command line.
        backbone: used in the place of the config's.
    """
    config = compose("digits", ["compare=[]", "runtime=serial", *overrides])
    federation = prepare(config)
    if backbone is not None:
        tables = [
            compute_table(backbone, split, torch.device("cpu"))
            for split in (federation.task.train, federation.task.test, federation.task.validation)
        ]
        data = dataclasses.replace(federation.data, table=tables[0])
        setup = dataclasses.replace(federation.setup, data=data, splits=tuple(tables[1:]))
        federation = dataclasses.replace(federation, backbone=backbone, setup=setup)
    worker = federation.setup.build()
    if backbone is not None:
        worker.backbone = backbone
    settings = driver.settings_of(config, federation)
    state = initial_state(config, federation)
    jobs = make_jobs(state, settings)
    return Laid(config, federation, settings, state, jobs, worker)


def nano_of_depth(depth: int) -> Backbone:
    """A nano ViT with random weights and another number of blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = VisionTransformer(
            img_size=nano.IMAGE_SIZE,
            patch_size=8,
            embed_dim=nano.EMBED_DIM,
            depth=depth,
            num_heads=nano.NUM_HEADS,
            num_classes=0,
            embed_layer=nano.ConvStem,
        )
    return Backbone(vit, nano.IMAGE_SIZE)


def client_batches(laid: Laid, job: ClientJob) -> ClientBatches:
    """The batches that the worker gives to a client."""
    return ClientBatches(
        laid.worker.data,
        job.client_id,
        laid.recipe.training.batch_size,
        laid.recipe.prompts,
        torch_generator(job.seed, "batches"),
    )


Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Seconds of one run."""

    wall: float
    cpu: float


def timed(work: Callable[[], Result]) -> tuple[Sample, Result]:
    """How long a piece of work took, and what it returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu), result


def in_turn(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[Sample]]:
    """Run the sides one after the other, several times."""
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            samples[name].append(timed(work)[0])
    return samples


def summary(samples: Sequence[Sample]) -> dict[str, float]:
    """Least and median seconds."""
    walls, cpus = [each.wall for each in samples], [each.cpu for each in samples]
    return {
        "wall_least": round(min(walls), 4),
        "wall_median": round(statistics.median(walls), 4),
        "cpu_least": round(min(cpus), 4),
        "cpu_median": round(statistics.median(cpus), 4),
    }


def ratio(slow: Sequence[Sample], fast: Sequence[Sample]) -> dict[str, float]:
    """How many times longer the first takes."""
    one, other = summary(slow), summary(fast)
    return {key: round(one[key] / max(other[key], 1e-9), 3) for key in one}


def load() -> float:
    """Load average of the last minute: 0 on a machine that does nothing else."""
    return round(os.getloadavg()[0], 2)
