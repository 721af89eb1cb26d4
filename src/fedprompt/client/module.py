"""The LightningModule of one client in one round: prompts and head on a frozen backbone.

A step has three parts, so that several clients can share one pass through the backbone: `choose`
(which prompts), `encode` (the backbone), and `step_loss` (the client's own head and loss). The
first two and the head are those of `models.prompted`, by which a model is measured as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.devices import send
from fedprompt.core.seeding import torch_generator
from fedprompt.core.types import ClientJob, Parts, fresh
from fedprompt.models.backbone import Backbone
from fedprompt.models.prompted import PromptedNetwork

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
        class_counts: (classes,) the client's images of each class, for objectives that ask for
            them.
    """

    logit_shift: Tensor | None
    use_counts: Tensor
    sums: Tensor

    def __init__(
        self,
        recipe: LocalRecipe,
        backbone: Backbone,
        job: ClientJob,
        class_mask: NDArray[np.bool_],
        class_counts: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.job = job
        self.objective = recipe.build_objective()
        self.model = PromptedNetwork(
            recipe,
            backbone,
            job.broadcast.start(job.state),
            job.broadcast.keys,
            class_mask,
            torch_generator(job.seed, "head"),
        )
        counts = np.zeros(class_mask.shape[1], int) if class_counts is None else class_counts
        self.register_buffer("logit_shift", self.objective.logit_shift(torch.from_numpy(counts)))
        self.register_buffer("use_counts", torch.zeros(len(self.prompts), dtype=torch.int64))
        self.start = self.trainable().mapped(fresh)
        self._start_here: Parts | None = None
        self._constants: dict[str, Tensor] | None = None
        # Sums over the last epoch, kept as tensors so that a step needs no synchronisation.
        self.register_buffer("sums", torch.zeros(3))

    @property
    def backbone(self) -> Backbone:
        """The frozen network."""
        return self.model.backbone

    @property
    def prompts(self) -> nn.Parameter:
        """(n, d)"""
        return self.model.prompts

    @property
    def keys(self) -> Tensor:
        """(n, q)"""
        return self.model.keys

    @property
    def head(self) -> nn.Module:
        """(B, feature_dim) -> (B, classes)"""
        return self.model.head

    def trainable(self) -> Parts:
        """The parameters that receive gradients."""
        return self.model.trainable()

    def choose(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prompts' rows (k,) for a batch with queries (B, q), and the similarity term."""
        return self.model.choose(queries)

    def encode(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """(B, T, d) tokens -> (B, feature_dim); cached CLS features are returned as they are."""
        return self.model.encode(inputs, rows)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One batch of one client: choose, encode, loss."""
        inputs, queries, labels, groups = batch
        rows, similarity = self.choose(queries)
        return self.step_loss(self.encode(inputs, rows), rows, similarity, labels, groups)

    def step_loss(
        self,
        features: Tensor,
        rows: Tensor,
        similarity: Tensor | None,
        labels: Tensor,
        groups: Tensor,
    ) -> Tensor:
        """Cross-entropy over the classes of each image's domain, similarity and objective terms.

        Args:
            features: (B, feature_dim) from `encode`.
            rows: (k,) and
            similarity: from `choose`.
            labels: (B,)
            groups: (B,)
        """
        logits = self.model.classify(features, groups)
        self.use_counts[rows] += 1
        shifted = logits if self.logit_shift is None else logits + self.logit_shift
        loss = F.cross_entropy(shifted, labels)
        self._record(loss.detach(), logits.detach(), labels)
        if similarity is not None:
            loss = loss + self.recipe.prompts.similarity_weight * similarity
        current = self.trainable()
        if self.objective.penalises:
            penalty = self.objective.penalty(current, self._started_from())
            loss = loss if penalty is None else loss + penalty
        constants = self._correction()
        if constants:
            tensors = current.tensors()
            for path, constant in constants.items():
                # The gradient of this term is the constant.
                loss = loss + (constant * tensors[path]).sum()
        return loss

    def on_train_epoch_start(self) -> None:
        """The metrics that a client reports are those of its last epoch."""
        self.sums.zero_()

    def configure_callbacks(self) -> list[pl.Callback]:
        """Those that the recipe names."""
        return self.recipe.build_callbacks()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam as released (beta 0.9 / 0.98, eps 1e-6) or plain SGD, a rate each for prompts, head
        and what is tuned in the backbone.
        """
        by_rate: dict[float, list[Tensor]] = {}
        for part, _, parameter in self.trainable().labelled():
            by_rate.setdefault(self.recipe.rate(part), []).append(parameter)
        groups = [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
        if self.recipe.optimizer == "sgd":
            return torch.optim.SGD(groups)
        return torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-6)

    def metrics(self) -> dict[str, float]:
        """Mean cross-entropy and accuracy over the last epoch; nothing if there was no training."""
        loss, correct, count = self.sums.tolist()
        return {"loss": loss / count, "accuracy": correct / count} if count else {}

    def _record(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        correct = (logits.argmax(dim=1) == labels).sum()
        self.sums += torch.stack([loss * len(labels), correct, torch.full_like(loss, len(labels))])

    def _started_from(self) -> Parts:
        """The trainable tensors as training began; brought to the device once."""
        if self._start_here is None:
            self._start_here = self.start.mapped(lambda value: send(value, self.device))
        return self._start_here

    def _correction(self) -> Mapping[str, Tensor]:
        """The objective's constants, computed once."""
        if self._constants is None:
            received, own = self.job.broadcast.shared.objective, self.job.state.kept.objective
            constants = self.objective.correction(received, own)
            self._constants = {path: send(value, self.device) for path, value in constants.items()}
        return self._constants
