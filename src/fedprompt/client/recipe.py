"""How clients train: plain options, imported without Lightning or timm."""

from __future__ import annotations

import dataclasses
import math

from fedprompt.errors import ConfigError
from fedprompt.models.head import HeadOptions
from fedprompt.models.prompted_vit import PromptOptions
from fedprompt.objectives import Objective, objectives


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """The local schedule: the `clients` section of a config."""

    count: int = 20
    per_round: int = 10
    """Clients sampled in each round."""
    epochs: int = 5
    """Local epochs."""
    batch_size: int = 16
    lr: float | None = None
    """One learning rate for prompts and head; null leaves `prompts.lr` and `head.lr` in force."""

    def __post_init__(self) -> None:
        for field in ("count", "per_round", "epochs", "batch_size"):
            value = getattr(self, field)
            if value < 1:
                raise ConfigError(f"clients.{field}: expected an integer >= 1, got {value}")
        if self.per_round > self.count:
            raise ConfigError(
                f"clients.per_round: cannot sample {self.per_round} of {self.count} clients; "
                f"expected clients.per_round <= clients.count; set clients.per_round={self.count}"
            )
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr >= 0):
            raise ConfigError(f"clients.lr: expected a finite number >= 0, got {self.lr}")


@dataclasses.dataclass(frozen=True)
class LocalRecipe:
    """How every client of a run trains; goes to the workers once."""

    training: TrainingOptions
    prompts: PromptOptions
    head: HeadOptions
    objective: str
    objective_options: dict[str, object]
    num_classes: int

    def build_objective(self) -> Objective:
        """The objective that the recipe names."""
        return objectives.create(self.objective, **self.objective_options)
