"""The one forward pass of client and server: choose prompts, encode with them, classify.

A client trains the parameters of this module, and whoever measures a model only calls it, so that
what is measured is what was trained.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedprompt.core.types import Parts, Tensors, fresh
from fedprompt.models.adaptation import Tuning
from fedprompt.models.backbone import Backbone
from fedprompt.models.head import HeadOptions, build_head
from fedprompt.models.selection import PromptOptions, select_rows


class ModelRecipe(Protocol):
    """What a model is built by."""

    @property
    def prompts(self) -> PromptOptions:
        """How prompts are chosen."""
        ...

    @property
    def head(self) -> HeadOptions:
        """Which head."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes over all domains."""
        ...

    @property
    def needs_tokens(self) -> bool:
        """Whether images run through the blocks; otherwise their cached CLS features do."""
        ...

    def build_tuning(self) -> Tuning:
        """What is tuned inside the backbone."""
        ...


class PromptedNetwork(nn.Module):
    """Prompts, selection, adaptation and head on a frozen backbone.

    Args:
        recipe: how the model is built.
        backbone: the frozen network; it stays outside the module's parameters.
        parts: the tensors to begin with, copied. Without head tensors the head stays as drawn.
        keys: (n, q) the prompts' addresses.
        class_mask: (groups, classes) bool; which classes exist in which domain.
        generator: draws the head's weights, and in training its dropout masks.
    """

    backbone: Backbone
    keys: Tensor
    class_mask: Tensor

    def __init__(
        self,
        recipe: ModelRecipe,
        backbone: Backbone,
        parts: Parts,
        keys: Tensor,
        class_mask: NDArray[np.bool_],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        # In __dict__ and not as a submodule: no one may move, count or switch the shared backbone.
        self.__dict__["backbone"] = backbone
        self.tuning = recipe.build_tuning()
        prompts = keys.new_empty(0, 0) if parts.prompts is None else parts.prompts
        self.prompts = nn.Parameter(fresh(prompts))
        self.projection = (
            None if parts.query_projection is None else nn.Parameter(fresh(parts.query_projection))
        )
        self.head = build_head(recipe.head, backbone.feature_dim, recipe.num_classes, generator)
        if parts.head:  # an objective without training sends none
            self.head.load_state_dict(dict(parts.head))
        self.head.requires_grad_(recipe.head.mode != "frozen")
        # Their names hold dots, which a module's attributes cannot.
        self._adapted_names = list(parts.adaptation)
        self._adapted = nn.ParameterList(
            nn.Parameter(fresh(value)) for value in parts.adaptation.values()
        )
        self.register_buffer("keys", fresh(keys))
        self.register_buffer("class_mask", torch.from_numpy(class_mask.copy()))

    def trainable(self) -> Parts:
        """The parameters that receive gradients."""
        return Parts(
            prompts=self.prompts if self.recipe.prompts.count else None,
            query_projection=self.projection,
            head={name: p for name, p in self.head.named_parameters() if p.requires_grad},
            adaptation=self.adaptation(),
        )

    def adaptation(self) -> Tensors:
        """What is tuned inside the backbone, by name."""
        return dict(zip(self._adapted_names, self._adapted, strict=True))

    def choose(self, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prompts of a batch; see `selection.select_rows`.

        Args:
            queries: (B, q) of the batch.

        Returns:
            Row numbers (k,), and the similarity term of `l2p`.
        """
        return select_rows(self.recipe.prompts, queries, self.prompts, self.keys, self.projection)

    def encode(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """The features of a batch.

        Args:
            inputs: (B, T, d) tokens, or (B, feature_dim) cached features, which are returned.
            rows: (k,) the prompts of the whole batch, or (B, k) those of each image.

        Returns:
            (B, feature_dim)
        """
        if not self.recipe.needs_tokens:
            return inputs
        prompts = self.prompts[rows] if self.recipe.prompts.count else None
        return self.tuning.encode(self.backbone, self.adaptation(), inputs, prompts)

    def classify(self, features: Tensor, groups: Tensor) -> Tensor:
        """Logits among the classes of each image's domain; minus infinity for the other classes.

        Args:
            features: (B, feature_dim) from `encode`.
            groups: (B,) each image's domain.

        Returns:
            (B, classes)
        """
        logits: Tensor = self.head(features)
        return logits.masked_fill(~self.class_mask[groups], -torch.inf)

    def forward(self, inputs: Tensor, rows: Tensor, groups: Tensor) -> Tensor:
        """Encode and classify: (B, classes).

        Args:
            inputs: (B, T, d) tokens, or (B, feature_dim) cached features.
            rows: (k,) the prompts of the whole batch, or (B, k) those of each image.
            groups: (B,) domain of each image.
        """
        return self.classify(self.encode(inputs, rows), groups)
