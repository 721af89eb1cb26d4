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
from numpy.typing import NDArray
from torch import Tensor, nn

from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.devices import send
from fedprompt.core.seeding import torch_generator
from fedprompt.core.types import ClientJob, Parts, Tensors, fresh
from fedprompt.models.backbone import Backbone
from fedprompt.models.prompted import PromptedNetwork
from fedprompt.objectives import LossContext, Seen, Teacher

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
        self._sent: tuple[Tensors, Tensors] | None = None
        self.teachers = nn.ModuleDict(
            {
                name: _frozen(recipe, backbone, teacher, class_mask, job)
                for name, teacher in self._teachers().items()
            }
        )
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
        inputs, queries, _, _ = batch
        rows, similarity = self.choose(queries)
        return self.step_loss(self.encode(inputs, rows), rows, similarity, batch)

    def step_loss(
        self, features: Tensor, rows: Tensor, similarity: Tensor | None, batch: Batch
    ) -> Tensor:
        """The objective's loss over the classes of each image's domain, and its other terms.

        Args:
            features: (B, feature_dim) from `encode`.
            rows: (k,) and
            similarity: from `choose`.
            batch: of which they were made.
        """
        _, _, labels, groups = batch
        logits = self.model.classify(features, groups)
        self.use_counts[rows] += 1
        loss = self.objective.loss(logits, labels, features, self._context(batch))
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
        """Mean loss and accuracy over the last epoch; nothing if there was no training."""
        loss, correct, count = self.sums.tolist()
        return {"loss": loss / count, "accuracy": correct / count} if count else {}

    def _record(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        correct = (logits.argmax(dim=1) == labels).sum()
        self.sums += torch.stack([loss * len(labels), correct, torch.full_like(loss, len(labels))])

    def _teachers(self) -> Mapping[str, Teacher]:
        """The models that the objective compares with."""
        return self.objective.teachers(Teacher.before(self.job), self.job.state.kept.objective)

    def _context(self, batch: Batch) -> LossContext:
        """What the loss of a batch may use."""
        inputs, queries, _, groups = batch
        received, own = self._own_tensors()
        seen = {}
        with torch.no_grad():
            for name, teacher in self.teachers.items():
                assert isinstance(teacher, PromptedNetwork)
                features = teacher.encode(inputs, teacher.choose(queries)[0])
                seen[name] = Seen(features, teacher.classify(features, groups))
        return LossContext(self.logit_shift, groups, seen, received, own)

    def _own_tensors(self) -> tuple[Tensors, Tensors]:
        """What the objective received and kept; brought to the device once, if its loss asks."""
        if not self.objective.has_own_loss:
            return {}, {}
        if self._sent is None:
            received, own = self.job.broadcast.shared.objective, self.job.state.kept.objective
            self._sent = self._on_device(received), self._on_device(own)
        return self._sent

    def _on_device(self, tensors: Tensors) -> dict[str, Tensor]:
        return {name: send(value, self.device) for name, value in tensors.items()}

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
            self._constants = self._on_device(constants)
        return self._constants


class _Teaching(PromptedNetwork):
    """A model that is only looked at: its head drops nothing out, whatever mode it is put into."""

    def train(self, mode: bool = True) -> _Teaching:
        """Stay as it is."""
        super().train(False)
        return self


def _frozen(
    recipe: LocalRecipe,
    backbone: Backbone,
    teacher: Teacher,
    class_mask: NDArray[np.bool_],
    job: ClientJob,
) -> PromptedNetwork:
    """A teacher as a network without gradients."""
    draws = torch_generator(job.seed, "head")  # of a head that the teacher may lack
    network = _Teaching(recipe, backbone, teacher.parts, teacher.keys, class_mask, draws)
    network.requires_grad_(False)
    return network.eval()
