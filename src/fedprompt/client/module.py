"""The LightningModule of one client in one round: prompts and head on a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedprompt.client.recipe import LocalRecipe
from fedprompt.models.backbone import Backbone
from fedprompt.models.head import build_head
from fedprompt.models.prompted_vit import select_rows
from fedprompt.seeding import torch_generator
from fedprompt.types import Broadcast, ClientJob

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""(B, T, d) tokens, or (B, d) features without prompts; (B, q) queries; (B,) labels and groups"""


class ClientModule(pl.LightningModule):
    """Prompts and head of one client on a frozen backbone.

    Args:
        recipe: how to train.
        backbone: the frozen network; it stays outside the module's parameters.
        job: what the server sent.
        class_mask: (groups, classes) bool; which classes exist in which domain. An image's loss and
            prediction consider the classes of its own domain only.
    """

    backbone: Backbone
    keys: Tensor
    class_mask: Tensor
    use_counts: Tensor
    sums: Tensor

    def __init__(
        self, recipe: LocalRecipe, backbone: Backbone, job: ClientJob, class_mask: NDArray[np.bool_]
    ) -> None:
        super().__init__()
        self.recipe = recipe
        # In __dict__ and not as a submodule: Lightning must neither move, count nor switch the
        # shared backbone.
        self.__dict__["backbone"] = backbone
        self.broadcast = job.broadcast
        self.objective = recipe.build_objective()
        generator = torch_generator(job.seed, "head")
        self.prompts = nn.Parameter(job.broadcast.prompts.clone())
        self.register_buffer("keys", job.broadcast.keys.clone())
        self.register_buffer("class_mask", torch.from_numpy(class_mask.copy()))
        self.register_buffer(
            "use_counts", torch.zeros(len(job.broadcast.prompts), dtype=torch.int64)
        )
        self.head = build_head(recipe.head, backbone.feature_dim, recipe.num_classes, generator)
        self.projection = (
            nn.Parameter(job.broadcast.shared["query_projection"].clone())
            if "query_projection" in job.broadcast.shared
            else None
        )
        load_head(self.head, job.broadcast)
        self.head.requires_grad_(recipe.head.mode == "shared")
        self._on_device: dict[str, Tensor] | None = None
        # Sums over the last epoch, kept as tensors so that a step needs no synchronisation.
        self.register_buffer("sums", torch.zeros(3))

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The tensors that receive gradients, by the name under which they travel."""
        if self.recipe.prompts.count:
            yield "prompts", self.prompts
        if self.projection is not None:
            yield "query_projection", self.projection
        for name, parameter in self.head.named_parameters():
            if parameter.requires_grad:
                yield f"head.{name}", parameter

    def forward(self, inputs: Tensor, queries: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """One batch: (B, classes) logits, the similarity term or None, the prompts' rows (k,)."""
        rows, similarity = self.choose(queries)
        # Without prompts the inputs are the cached CLS features: nothing of the backbone has to be
        # computed.
        features = (
            self.backbone.encode(inputs, self.prompts[rows])
            if self.recipe.prompts.count
            else inputs
        )
        logits: Tensor = self.head(features)
        return logits, similarity, rows

    def choose(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prompts' rows (k,) for a batch of queries (B, q), and the similarity term or None."""
        return select_rows(self.recipe.prompts, queries, self.prompts, self.keys, self.projection)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss of one batch."""
        inputs, queries, labels, groups = batch
        logits, similarity, rows = self(inputs, queries)
        return self.loss(logits, similarity, rows, labels, groups)

    def loss(
        self,
        logits: Tensor,
        similarity: Tensor | None,
        rows: Tensor,
        labels: Tensor,
        groups: Tensor,
    ) -> Tensor:
        """Cross-entropy over the classes of each image's domain, similarity and objective terms.

        Args:
            logits: (B, classes).
            similarity: the similarity term of `choose`.
            rows: (k,) the prompts that were used, which are counted.
            labels: (B,)
            groups: (B,)
        """
        logits = logits.masked_fill(~self.class_mask[groups], -torch.inf)
        self.use_counts[rows] += 1
        loss = F.cross_entropy(logits, labels)
        self._record(loss.detach(), logits.detach(), labels)
        if similarity is not None:
            loss = loss + self.recipe.prompts.similarity_weight * similarity
        penalty = self.objective.penalty(dict(self.trainable()), self._start())
        return loss if penalty is None else loss + penalty

    def on_train_epoch_start(self) -> None:
        """The metrics that a client reports are those of its last epoch."""
        self.sums.zero_()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam as released (beta 0.9 / 0.98, eps 1e-6), a rate each for prompts and head."""
        options = self.recipe
        one_rate = options.training.lr
        prompt_rate = options.prompts.lr if one_rate is None else one_rate
        head_rate = options.head.lr if one_rate is None else one_rate
        trainable = dict(self.trainable())
        head = [p for name, p in trainable.items() if name.startswith("head.")]
        prompts = [p for name, p in trainable.items() if not name.startswith("head.")]
        groups = [{"params": prompts, "lr": prompt_rate}, {"params": head, "lr": head_rate}]
        return torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.98), eps=1e-6)

    def metrics(self) -> dict[str, float]:
        """Mean cross-entropy and accuracy over the last epoch."""
        loss, correct, count = self.sums.tolist()
        return {"loss": loss / max(count, 1), "accuracy": correct / max(count, 1)}

    def _record(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        correct = (logits.argmax(dim=1) == labels).sum()
        self.sums += torch.stack([loss * len(labels), correct, torch.full_like(loss, len(labels))])

    def _start(self) -> dict[str, Tensor]:
        """The trainable tensors as they were broadcast; brought to the device once."""
        if self._on_device is None:
            tensors = {"prompts": self.broadcast.prompts, **self.broadcast.shared}
            self._on_device = {name: value.to(self.device) for name, value in tensors.items()}
        return self._on_device


def load_head(head: nn.Module, broadcast: Broadcast) -> None:
    """Copy the tensors of the shared or frozen head (`head.*`) into a head."""
    prefix = "head."
    tensors = {
        name[len(prefix) :]: value
        for name, value in {**broadcast.fixed, **broadcast.shared}.items()
        if name.startswith(prefix)
    }
    head.load_state_dict(tensors)
