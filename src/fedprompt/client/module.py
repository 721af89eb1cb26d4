"""The LightningModule of one client in one round: prompts and head on a frozen backbone.

A step has three parts, so that several clients can share one pass through the backbone: `choose`
(which prompts), `encode` (the backbone), and
`step_loss` (the client's own head and loss).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.seeding import torch_generator
from fedprompt.core.types import Broadcast, ClientJob, Tensors
from fedprompt.models.backbone import Backbone
from fedprompt.models.head import build_head
from fedprompt.models.selection import select_rows
from fedprompt.objectives.base import START

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

    backbone: Backbone
    keys: Tensor
    class_mask: Tensor
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
        self._constants: dict[str, Tensor] | None = None
        # In __dict__ and not as a submodule: Lightning must neither move, count nor switch the
        # shared backbone.
        self.__dict__["backbone"] = backbone
        self.broadcast = as_started(job.broadcast, job.state)
        self.own = job.state
        self.objective = recipe.build_objective()
        self.tuning = recipe.build_tuning()
        generator = torch_generator(job.seed, "head")
        self.prompts = nn.Parameter(own_prompts(recipe, self.broadcast, job.state).clone())
        self.register_buffer("keys", job.broadcast.keys.clone())
        self.register_buffer("class_mask", torch.from_numpy(class_mask.copy()))
        counts = np.zeros(class_mask.shape[1], int) if class_counts is None else class_counts
        self.register_buffer("logit_shift", self.objective.logit_shift(torch.from_numpy(counts)))
        self.register_buffer("use_counts", torch.zeros(len(self.prompts), dtype=torch.int64))
        self.head = build_head(recipe.head, backbone.feature_dim, recipe.num_classes, generator)
        self.projection = (
            nn.Parameter(self.broadcast.shared["query_projection"].clone())
            if "query_projection" in self.broadcast.shared
            else None
        )
        load_head(self.head, self.broadcast, job.state)
        self.head.requires_grad_(recipe.head.mode != "frozen")
        # Parameters whose names hold dots, which a module's attributes cannot.
        tuned = tuned_tensors(self.broadcast.shared)
        self.tuned_names = list(tuned)
        self.tuned_values = nn.ParameterList(
            nn.Parameter(value.clone()) for value in tuned.values()
        )
        self.start = {name: value.detach().clone() for name, value in self.trainable()}
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
        yield from self.tuned().items()

    def tuned(self) -> dict[str, nn.Parameter]:
        """The tensors tuned inside the backbone, by the name under which they travel."""
        return dict(zip(self.tuned_names, self.tuned_values, strict=True))

    def choose(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prompts' rows (k,) for a batch with queries (B, q), and the similarity term."""
        return select_rows(self.recipe.prompts, queries, self.prompts, self.keys, self.projection)

    def encode(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """(B, T, d) tokens -> (B, feature_dim); cached CLS features are returned as they are."""
        if not self.recipe.needs_tokens:
            return inputs
        prompts = self.prompts[rows] if self.recipe.prompts.count else None
        return self.tuning.encode(self.backbone, self.tuned(), inputs, prompts)

    def forward(self, inputs: Tensor, queries: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """One batch: (B, classes) logits, the similarity term or None, the prompts' rows (k,)."""
        rows, similarity = self.choose(queries)
        logits: Tensor = self.head(self.encode(inputs, rows))
        return logits, similarity, rows

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
        logits: Tensor = self.head(features)
        logits = logits.masked_fill(~self.class_mask[groups], -torch.inf)
        self.use_counts[rows] += 1
        shifted = logits if self.logit_shift is None else logits + self.logit_shift
        loss = F.cross_entropy(shifted, labels)
        self._record(loss.detach(), logits.detach(), labels)
        if similarity is not None:
            loss = loss + self.recipe.prompts.similarity_weight * similarity
        current = dict(self.trainable())
        penalty = self.objective.penalty(current, self._start())
        loss = loss if penalty is None else loss + penalty
        for name, constant in self._correction().items():
            # The gradient of this term is the constant.
            loss = loss + (constant * current[name]).sum()
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
        by_rate: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.trainable():
            by_rate.setdefault(self.recipe.rate(name), []).append(parameter)
        groups = [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
        if self.recipe.optimizer == "sgd":
            return torch.optim.SGD(groups)
        return torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-6)

    def metrics(self) -> dict[str, float]:
        """Mean cross-entropy and accuracy over the last epoch."""
        loss, correct, count = self.sums.tolist()
        if count == 0:  # an objective without training
            return {"loss": math.nan, "accuracy": math.nan}
        return {"loss": loss / count, "accuracy": correct / count}

    def _record(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        correct = (logits.argmax(dim=1) == labels).sum()
        self.sums += torch.stack([loss * len(labels), correct, torch.full_like(loss, len(labels))])

    def _start(self) -> dict[str, Tensor]:
        """The trainable tensors as training began; brought to the device once."""
        if self._on_device is None:
            self._on_device = {name: value.to(self.device) for name, value in self.start.items()}
        return self._on_device

    def _correction(self) -> dict[str, Tensor]:
        """The objective's constants, computed once."""
        if self._constants is None:
            received, own = self.broadcast.shared, self.own
            constants = self.objective.correction(received, own)
            self._constants = {
                name: value.to(self.device)
                for name, value in constants.items()
                if name in self.start
            }
        return self._constants


def as_started(broadcast: Broadcast, own: Tensors) -> Broadcast:
    """The broadcast with the tensors that a client starts from; see `Objective.remembered`."""
    notes = {
        name.removeprefix(START): value
        for name, value in {**broadcast.fixed, **own}.items()
        if name.startswith(START)
    }
    prompts = notes.pop("prompts", broadcast.prompts)
    return dataclasses.replace(broadcast, prompts=prompts, shared={**broadcast.shared, **notes})


def own_prompts(recipe: LocalRecipe, broadcast: Broadcast, own: Tensors) -> Tensor:
    """The prompts that a client begins with: the server's, or its own with `prompts.mode=personal`.

    Args:
        recipe: the mode.
        broadcast: what the server sent.
        own: the client's state; without prompts before its first round.
    """
    if recipe.prompts.mode == "shared":
        return broadcast.prompts
    return own["prompts"] if "prompts" in own else broadcast.fixed["prompts"]


def tuned_tensors(shared: Tensors) -> dict[str, Tensor]:
    """Those of the shared tensors that change the backbone."""
    other = ("head.", "control.")
    return {
        name: value
        for name, value in shared.items()
        if name != "query_projection" and not name.startswith(other)
    }


def load_head(head: nn.Module, broadcast: Broadcast, own: Tensors | None = None) -> None:
    """Copy a head's tensors (`head.*`) into it: the client's own ones, the shared or fixed ones."""
    prefix = "head."
    tensors = {
        name[len(prefix) :]: value
        for name, value in {**broadcast.fixed, **broadcast.shared, **(own or {})}.items()
        if name.startswith(prefix)
    }
    if tensors:  # an objective without training sends none
        head.load_state_dict(tensors)
