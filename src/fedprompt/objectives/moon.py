"""`moon`: model-contrastive learning, against the drift of local features.

Li, He and Song, "Model-Contrastive Federated Learning" (MOON), CVPR 2021, arXiv 2103.16257, Eq. 3
and 5. For an image with features z of the model that is trained, z_glob of the server's model that
the client began with, and z_prev of the client's own model as it was after its last round:

    l_con = -log( exp(sim(z, z_glob) / T) / (exp(sim(z, z_glob) / T) + exp(sim(z, z_prev) / T)) )
    loss  = cross-entropy + mu mean of l_con

sim is the cosine, T the temperature. Features are what the head classifies; the paper has two more
layers between. The previous model is the client's memory: its prompts with their keys, projection
and adaptation. It never leaves the client. In its first round a client has none, and its loss is
cross-entropy (as in the authors' program, whose sum of negatives is empty then).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from fedprompt.core.checks import check_number
from fedprompt.core.types import Parts, Tensors
from fedprompt.objectives.base import (
    Finished,
    LocalResult,
    LossContext,
    Objective,
    Teacher,
    objectives,
)

KEYS = "keys"
"""The name of the keys in a client's memory, which are no part of `Parts`."""


@dataclasses.dataclass(frozen=True)
class MoonOptions:
    """Options of MOON."""

    mu: float = 1.0
    """Weight of the contrast; 0 is FedAvg."""
    temperature: float = 0.5
    """T, by which cosines are divided."""

    def __post_init__(self) -> None:
        check_number("objective.mu", self.mu, 0)
        check_number("objective.temperature", self.temperature, 0, above=True)


@objectives.register("moon", MoonOptions)
class Moon(Objective):
    """Pulls features to those of the server's model, away from the client's last ones."""

    compares_features = True
    options: MoonOptions

    def teachers(self, start: Teacher, own: Tensors) -> Mapping[str, Teacher]:
        """The server's model and the client's previous one, from its second round on.

        Args:
            start: the model that training begins with.
            own: the previous model; empty before the client's first round.
        """
        if self.options.mu == 0 or not own:
            return {}
        tensors = {path: value for path, value in own.items() if path != KEYS}
        keys = own.get(KEYS, start.keys[:0])
        return {"global": start, "previous": Teacher(Parts.from_tensors(tensors), keys)}

    def loss(
        self, logits: Tensor, labels: Tensor, features: Tensor, context: LossContext
    ) -> Tensor:
        """Cross-entropy and the contrast, Eq. 5.

        Args:
            logits: (B, C)
            labels: (B,)
            features: (B, feature_dim)
            context: has what both teachers make of the batch.
        """
        plain = super().loss(logits, labels, features, context)
        if not context.teachers:
            return plain
        near, far = (
            F.cosine_similarity(features, context.teachers[name].features, dim=1)
            for name in ("global", "previous")
        )
        # -log(a / (a + b)) of exponentials: softplus of their difference, which cannot overflow.
        contrast = F.softplus((far - near) / self.options.temperature).mean()
        return plain + self.options.mu * contrast

    def finish(self, result: LocalResult) -> Finished:
        """The trained model, kept for the client's next round."""
        return Finished(kept=self._memory(result.end, result.keys))

    def keeps(self, start: Teacher) -> Tensors:
        """A model like the one that training begins with."""
        return self._memory(start.parts, start.keys)

    def _memory(self, model: Parts, keys: Tensor) -> Tensors:
        """What features depend on, in a model with keys."""
        if self.options.mu == 0:
            return {}
        tensors = model.pick(("prompts", "query_projection", "adaptation")).tensors()
        return {path: value for path, value in {**tensors, KEYS: keys}.items() if value.numel()}
