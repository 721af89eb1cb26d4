"""The naive procedure, written plainly for comparison: what a first implementation does.

Each epoch decodes and resizes the client's images; each step runs the whole network twice, once
without prompts for the query and once with them; clients train in turn. Nothing is cached. The
arithmetic is that of the `l2p` selection, so that the results can be compared with those of
fedprompt. The matching that follows in such a program is `released_loop.py`.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.seeding import torch_generator
from fedprompt.core.types import ClientJob
from fedprompt.models.backbone import Backbone
from fedprompt.models.head import build_head
from fedprompt.models.voting import majority_vote


class EncodedDigits(Dataset[tuple[Tensor, int]]):
    """PNG files in memory; decoded, resized to the network's input and normalised at each access.

    Args:
        images: (N, h, w) uint8.
        labels: (N,)
        size: side of the network's input.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], size: int) -> None:
        self.files = []
        for image in images:
            file = io.BytesIO()
            Image.fromarray(image).save(file, format="PNG")
            self.files.append(file.getvalue())
        self.labels = labels
        self.size = size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.open(io.BytesIO(self.files[index]), formats=["PNG"])
        large = image.resize((self.size, self.size), Image.Resampling.BICUBIC).convert("RGB")
        pixels = torch.from_numpy(np.array(large)).permute(2, 0, 1).float() / 255
        return (pixels - 0.5) / 0.5, int(self.labels[index])


class NaiveModel(nn.Module):
    """Prompts, query projection and head on a frozen network, from pixels to logits."""

    def __init__(self, recipe: LocalRecipe, backbone: Backbone, job: ClientJob) -> None:
        super().__init__()
        self.recipe, self.job = recipe, job
        self.backbone = backbone
        shared = job.broadcast.shared
        self.prompts = nn.Parameter(job.broadcast.prompts.clone())
        assert shared.query_projection is not None
        self.projection = nn.Parameter(shared.query_projection.clone())
        generator = torch_generator(job.seed, "head")
        self.head = build_head(recipe.head, backbone.feature_dim, recipe.num_classes, generator)
        self.head.load_state_dict(dict(shared.head))
        self.used = torch.zeros(len(self.prompts), dtype=torch.int64)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) -> (B, classes) logits and the similarity term."""
        with torch.no_grad():
            query = self.backbone.queries(self.backbone.embed(pixels), "cls")
        similarity = (
            F.normalize(query @ self.projection.T, dim=-1) @ F.normalize(self.prompts, dim=-1).T
        )
        rows = majority_vote(similarity.detach(), self.recipe.prompts.count)
        self.used[rows] += 1
        features = self.backbone(pixels, self.prompts[rows])
        return self.head(features), similarity[:, rows].sum() / len(pixels)


class WholeBackbone(Backbone):
    """Every block for every token, as timm computes it."""

    def reads_prefix_only(self, block: nn.Module) -> bool:
        """Never."""
        return False


def whole(backbone: Backbone) -> Backbone:
    """The same network, computed as a whole."""
    other = copy.copy(backbone)
    other.__class__ = WholeBackbone
    return other


def train_client(
    recipe: LocalRecipe,
    backbone: Backbone,
    data: EncodedDigits,
    rows: NDArray[np.int64],
    job: ClientJob,
) -> NaiveModel:
    """One client's local work."""
    model = NaiveModel(recipe, backbone, job)
    optimizer = torch.optim.Adam(
        [
            {"params": [model.prompts, model.projection], "lr": recipe.prompts.lr},
            {"params": model.head.parameters(), "lr": recipe.head.lr},
        ],
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    generator = torch_generator(job.seed, "batches")
    for _ in range(recipe.training.epochs):
        order = rows[torch.randperm(len(rows), generator=generator).numpy()].tolist()
        loader = DataLoader(data, recipe.training.batch_size, sampler=order, generator=generator)
        state = generator.get_state()
        for pixels, labels in loader:
            logits, similarity = model(pixels)
            loss = F.cross_entropy(logits, labels) + recipe.prompts.similarity_weight * similarity
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        generator.set_state(state)  # the loader draws a seed that it does not need
    return model


def train_cohort(
    recipe: LocalRecipe,
    backbone: Backbone,
    data: EncodedDigits,
    parts: Sequence[NDArray[np.int64]],
    jobs: Sequence[ClientJob],
) -> list[NaiveModel]:
    """The clients of a round, one after the other."""
    backbone = whole(backbone)
    return [train_client(recipe, backbone, data, parts[job.client_id], job) for job in jobs]
