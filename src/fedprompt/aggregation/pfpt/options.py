"""The options of `pfpt`, for all three variants."""

from __future__ import annotations

import dataclasses

from fedprompt.core.checks import check_choice, check_flag, check_integer, check_number
from fedprompt.core.errors import ConfigError

VARIANTS = ("map", "paper", "released")
PARAMETERISATIONS = ("empirical", "neural")


@dataclasses.dataclass(frozen=True)
class LiteralOptions:
    """Options of the variants `paper` and `released`."""

    loops: int = 50
    """Alternations of matching and gradient steps."""
    net_lr: float = 1e-3
    """Learning rate of Adam."""
    net_hidden: int = 128
    """Width of the hidden layer of both networks."""
    variance_floor: float = 1e-6
    """Least variance of `paper` in units of the prompts' total variance; `released` has none."""

    def __post_init__(self) -> None:
        for name in ("loops", "net_hidden"):
            check_integer(f"aggregator.{name}", getattr(self, name), 1)
        check_number("aggregator.net_lr", self.net_lr, 0, above=True)
        check_number("aggregator.variance_floor", self.variance_floor, 0, above=True, below=1)


@dataclasses.dataclass(frozen=True)
class PfptOptions:
    """Options of `pfpt`; docs/pfpt.md says how the defaults were found."""

    variant: str = "map"
    """`map`: the well-posed model; `paper`, `released`: for comparison. Only `loops`, `net_lr`,
    `net_hidden` and (`paper`) `variance_floor` concern the latter two."""
    parameterisation: str = "empirical"
    """Of noise and inclusion. `map` has fitted numbers, `empirical`. The paper's networks,
    `neural`, go with `paper` and `released`, which have nothing else."""
    gamma: float = 1.0
    """Mass of the Beta process: log(gamma / m) is the first price of a new summarizing prompt."""
    key_weight: float = 8.0
    """How much keys count relative to prompts, both in noise units; 0 ignores keys."""
    memory: float = 10.0
    """The most clients that a remembered summarizing prompt counts for; 0 forgets everything."""
    average_memory: bool = True
    """Whether the remembered prompt enters the new average; the remembered key always does."""
    origin_odds: float = 100.0
    """Prior odds that a prompt belongs with most of those that started from the same broadcast row
    at clients of the same key group; 1 if origins say nothing."""
    shrink: bool = False
    """Whether the average is shrunk towards the base mean, as the posterior mean is."""
    use_weights: bool = False
    """Whether a client enters the average in proportion to its sample count."""
    patience: int = 10
    """Rounds without use after which a prompt is removed; 1 is the paper's immediate removal."""
    max_prompts: int = 0
    """Upper bound on the number of summarizing prompts, kept by merging the closest; 0 for none."""
    max_sweeps: int = 50
    """Bound on the sweeps over clients; a few suffice."""
    restarts: int = 8
    """Most annealings of the search where the matching is in doubt; two in a row that raise nothing
    end them."""
    variance_floor: float = 1e-6
    """Least variance of `paper` in units of the prompts' total variance."""
    loops: int = 50
    """Alternations of matching and gradient steps of `paper` and `released`."""
    net_lr: float = 1e-3
    """Adam's learning rate for the networks."""
    net_hidden: int = 128
    """Width of the networks' hidden layer."""

    def __post_init__(self) -> None:
        check_choice("aggregator.variant", self.variant, VARIANTS)
        check_choice("aggregator.parameterisation", self.parameterisation, PARAMETERISATIONS)
        if (self.variant, self.parameterisation) == ("map", "neural"):
            raise ConfigError(
                "aggregator.parameterisation: expected empirical with variant=map, got neural; the "
                "paper's networks are in aggregator.variant=paper"
            )
        for name in ("gamma", "origin_odds"):
            check_number(f"aggregator.{name}", getattr(self, name), 0, above=True)
        for name in ("key_weight", "memory"):
            check_number(f"aggregator.{name}", getattr(self, name), 0)
        for name in ("average_memory", "shrink", "use_weights"):
            check_flag(f"aggregator.{name}", getattr(self, name))
        least = {"patience": 1, "max_prompts": 0, "max_sweeps": 1, "restarts": 0}
        for name, bound in least.items():
            check_integer(f"aggregator.{name}", getattr(self, name), bound)
        _ = self.literal  # checks the others

    @property
    def literal(self) -> LiteralOptions:
        """The options of `paper` and `released`."""
        return LiteralOptions(self.loops, self.net_lr, self.net_hidden, self.variance_floor)
