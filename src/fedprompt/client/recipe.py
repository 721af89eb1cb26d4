"""How clients train: plain options, imported without Lightning or timm."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fedprompt.attacks import Attack, attacks
from fedprompt.client.callbacks import callbacks
from fedprompt.client.privacy import GaussianMechanism
from fedprompt.core.checks import check_choice, check_integer, check_number
from fedprompt.core.errors import ConfigError
from fedprompt.core.types import Part
from fedprompt.models.adaptation import Tuning, tunings
from fedprompt.models.head import HeadOptions
from fedprompt.models.selection import PromptOptions
from fedprompt.objectives import Objective, objectives

if TYPE_CHECKING:  # takes seconds to import
    from pytorch_lightning import Callback

OPTIMIZERS = ("auto", "adam", "sgd")


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """The local schedule: the `clients` section of a config."""

    count: int = 20
    """Clients that the training data are divided among."""
    per_round: int | None = 10
    """Clients sampled in each round; null for all."""
    pooled: bool = False
    """True: one client alone, who holds the data of all (centralised training)."""
    epochs: int = 5
    """Local epochs."""
    batch_size: int = 16
    """Images of a step."""
    optimizer: str = "auto"
    """`adam` as released (beta 0.9 / 0.98, eps 1e-6), or plain `sgd`; `auto` is `sgd` where the
    objective's arithmetic needs it, and `adam` otherwise."""
    lr: float | None = None
    """One learning rate for all; null leaves `prompts.lr`, `head.lr` and `tuning.lr` in force."""
    callbacks: list[str] = dataclasses.field(default_factory=list)
    """Lightning callbacks of each client, by name."""

    def __post_init__(self) -> None:
        for field in ("count", "per_round", "epochs", "batch_size"):
            value = getattr(self, field)
            if value is not None:
                check_integer(f"clients.{field}", value, 1)
        check_choice("clients.optimizer", self.optimizer, OPTIMIZERS)
        for name in self.callbacks:
            callbacks.entry(name)
        if self.per_round is not None and self.per_round > self.count:
            raise ConfigError(
                f"clients.per_round: cannot sample {self.per_round} of {self.count} clients; "
                f"expected clients.per_round <= clients.count; set clients.per_round={self.count}"
            )
        if self.lr is not None:
            check_number("clients.lr", self.lr, 0)

    @property
    def population(self) -> int:
        """Clients that can be sampled."""
        return 1 if self.pooled else self.count

    @property
    def cohort_size(self) -> int:
        """Clients of a round."""
        return min(self.population, self.count if self.per_round is None else self.per_round)


def has_global_model(prompts: PromptOptions, head: HeadOptions) -> bool:
    """Whether prompts and head are shared or fixed, so that there is one model for all clients."""
    return "personal" not in (prompts.mode, head.mode)


@dataclasses.dataclass(frozen=True)
class LocalRecipe:
    """How every client of a run trains; goes to the workers once."""

    training: TrainingOptions
    prompts: PromptOptions
    head: HeadOptions
    objective: str
    objective_options: dict[str, object]
    num_classes: int
    tuning: str = "none"
    tuning_options: dict[str, object] = dataclasses.field(default_factory=dict)
    attack: str = "none"
    attack_options: dict[str, object] = dataclasses.field(default_factory=dict)
    attackers: frozenset[int] = frozenset()
    """The clients that attack; all others are honest."""
    privacy: GaussianMechanism | None = None
    """What clients do to their updates before they send them; None: nothing."""

    def build_objective(self) -> Objective:
        """The objective that the recipe names."""
        return objectives.create(self.objective, **self.objective_options)

    def build_tuning(self) -> Tuning:
        """What the recipe tunes inside the backbone."""
        return tunings.create(self.tuning, **self.tuning_options)

    def attack_of(self, client_id: int) -> Attack | None:
        """What a client does instead of honest work; None if it is honest."""
        if client_id not in self.attackers:
            return None
        return attacks.create(self.attack, **self.attack_options)

    def build_callbacks(self) -> list[Callback]:
        """New callbacks for one client's fit."""
        return [callbacks.create(name) for name in self.training.callbacks]

    @property
    def needs_tokens(self) -> bool:
        """Whether images run through the blocks; otherwise their cached CLS features do."""
        return self.prompts.count > 0 or self.tuning != "none"

    @property
    def packable(self) -> bool:
        """Whether clients share the frozen backbone as it is, so that several can be packed."""
        return self.tuning == "none"

    @property
    def optimizer(self) -> str:
        """`adam` or `sgd`."""
        if self.training.optimizer != "auto":
            return self.training.optimizer
        return "sgd" if self.build_objective().needs_sgd else "adam"

    @property
    def personal(self) -> frozenset[Part]:
        """The parts that stay with their client."""
        modes: dict[Part, str] = {"prompts": self.prompts.mode, "head": self.head.mode}
        return frozenset(part for part, mode in modes.items() if mode == "personal")

    def rate(self, part: Part) -> float:
        """The learning rate of a part's tensors."""
        if self.training.lr is not None:
            return self.training.lr
        if part == "head":
            return self.head.lr
        return self.build_tuning().lr if part == "adaptation" else self.prompts.lr
