"""How many operations a client's work takes: counted by torch on the real modules, for any method.

An addition or a multiplication of a matrix product counts as one. Attention is counted in its plain
form, so that the number does not depend on the kernels of a machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fedprompt.client.module import Batch, ClientModule
from fedprompt.client.recipe import LocalRecipe
from fedprompt.client.worker import ClientBatches, ClientData
from fedprompt.core.seeding import torch_generator
from fedprompt.core.types import ClientJob
from fedprompt.models.backbone import Backbone


def prefix_operations(backbone: Backbone) -> float:
    """Operations for one image of what is computed once: its tokens, queries and CLS feature.

    Args:
        backbone: the frozen network.
    """
    side = backbone.image_size
    pixels = torch.zeros(1, 3, side, side, device=next(backbone.parameters()).device)
    with torch.no_grad(), _counting() as counter:
        backbone.constants(backbone.embed(pixels))
    return float(counter.get_total_flops())


@dataclasses.dataclass
class StepCost:
    """Operations of a training step, for each image; counted once for each number of prompts.

    Args:
        recipe: how clients train.
        backbone: the frozen network.
        data: of all clients; one image of a client is enough.
    """

    recipe: LocalRecipe
    backbone: Backbone
    data: ClientData

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, ...], float] = {}

    def __call__(self, job: ClientJob) -> float:
        """Of a client's step in the round of its job."""
        start = job.broadcast.start(job.state)
        prompts = job.broadcast.prompts if start.prompts is None else start.prompts
        shape = (len(prompts), len(job.broadcast.keys))
        if shape not in self._known:
            self._known[shape] = self._count(job)
        return self._known[shape]

    def _count(self, job: ClientJob) -> float:
        device = next(self.backbone.parameters()).device
        module = ClientModule(self.recipe, self.backbone, job, self.data.class_mask).to(device)
        with _counting() as counter, torch.enable_grad():
            loss: Tensor = module.training_step(self._image(job, device), 0)
            loss.backward()  # type: ignore[no-untyped-call]
        return float(counter.get_total_flops())

    def _image(self, job: ClientJob, device: torch.device) -> Batch:
        first = self.data.rows(job.client_id, self.recipe.training.pooled)[:1]
        data = dataclasses.replace(self.data, parts=(first,))
        batches = ClientBatches(
            data,
            0,
            1,
            self.recipe.prompts,
            torch_generator(0, "one image"),
            tokens=self.recipe.needs_tokens,
            device=device,
        )
        return next(iter(batches))


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Count operations, with attention in its plain form."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter
