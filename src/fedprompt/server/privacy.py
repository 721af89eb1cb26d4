"""Client-level differential privacy: its options, and what of it the rounds have used up.

Two federations are neighbours if they differ in all images of one client, which in one of them
leaves what it received unchanged (Kairouz et al., "Practical and Private (Deep) Learning without
Sampling or Shuffling", ICML 2021, Section 2: zero-out). Who takes part in which round is drawn from
the run's seed alone and counts as public. A client's data are therefore seen by the Gaussian
mechanism (`client.privacy`) once for each round that it takes part in, and no theorem on sampling
is needed. k Gaussian mechanisms with multiplier z are one with z / sqrt(k) (Dong, Roth and Su,
"Gaussian Differential Privacy", 2022, Corollary 3.3). `dp-accounting` says which epsilon that is.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math

import numpy as np

from fedprompt.client.privacy import GaussianMechanism
from fedprompt.core.checks import check_choice, check_number
from fedprompt.core.errors import ConfigError
from fedprompt.server.sampling import sample_cohort

UNITS = ("client",)
LEAST, MOST = 1e-3, 1e6
"""Of epsilon and of the noise multiplier, where float64 is exact enough."""
TOLERANCE = 1e-9


@dataclasses.dataclass(frozen=True)
class PrivacyOptions:
    """The `privacy` section: differential privacy of what clients send. Off without a unit."""

    unit: str | None = None
    """`client`: all images of a client are protected together; null: no privacy."""
    clip: float | None = None
    """Largest L2 norm of a client's whole update; what is longer is scaled down."""
    noise_multiplier: float | None = None
    """Standard deviation of the noise in each value of an update, as a multiple of `clip`."""
    epsilon: float | None = None
    """In place of `noise_multiplier`: what all rounds together may use up; the noise follows."""
    delta: float | None = None
    """Probability with which epsilon may not hold; well below one in the number of clients."""

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if self.unit is None:
            if given:
                raise ConfigError(
                    f"privacy.{given[0]}: expected privacy.unit=client as well, got no unit; set it"
                )
            return
        check_choice("privacy.unit", self.unit, UNITS)
        for name in ("clip", "delta"):
            if name not in given:
                raise ConfigError(
                    f"privacy.{name}: expected a number > 0 with privacy.unit={self.unit}, got "
                    f"null; set privacy.{name}={'1.0' if name == 'clip' else '1e-5'} or so"
                )
        both = (self.noise_multiplier, self.epsilon)
        if both.count(None) != 1:
            what = "neither" if both.count(None) == 2 else "both"
            raise ConfigError(
                "privacy: expected one of privacy.noise_multiplier and privacy.epsilon, got "
                f"{what}; set one of them"
            )
        check_number("privacy.delta", self.delta, 1e-50, below=1)
        check_number("privacy.clip", self.clip, 0, above=True)
        for name in ("noise_multiplier", "epsilon"):
            if name in given:
                check_number(f"privacy.{name}", getattr(self, name), LEAST, below=MOST)
        if importlib.util.find_spec("dp_accounting") is None:
            raise ConfigError(
                "privacy.unit needs the package dp-accounting, not installed here; "
                "pip install 'fedprompt[privacy]'"
            )

    @property
    def enabled(self) -> bool:
        """Whether updates are private."""
        return self.unit is not None


@dataclasses.dataclass(frozen=True)
class Accountant:
    """What a run's rounds use up."""

    options: PrivacyOptions
    """With a unit."""
    seed: int
    """Of the run, by which cohorts are drawn."""
    rounds: int
    """Of the whole run."""
    population: int
    """Clients that can be sampled."""
    cohort_size: int
    """Clients of a round."""

    def participations(self, round_index: int) -> int:
        """Rounds that the client who was there most often took part in, of the first so many."""
        return _participations(self.seed, self.rounds, self.population, self.cohort_size)[
            round_index - 1
        ]

    @property
    def noise_multiplier(self) -> float:
        """z as given, or the least with which all rounds use up no more than `epsilon`."""
        options = self.options
        if options.noise_multiplier is not None:
            return options.noise_multiplier
        assert options.epsilon is not None and options.delta is not None
        return multiplier_for(options.epsilon, options.delta, self.participations(self.rounds))

    @property
    def mechanism(self) -> GaussianMechanism:
        """What each client does to its update."""
        assert self.options.clip is not None
        return GaussianMechanism(self.options.clip, self.noise_multiplier)

    def epsilon(self, round_index: int) -> float:
        """What the first so many rounds used up of the client who was there most often."""
        assert self.options.delta is not None
        times = self.participations(round_index)
        return epsilon_of(self.noise_multiplier, self.options.delta, times)


@functools.lru_cache(maxsize=64)
def _participations(seed: int, rounds: int, population: int, cohort_size: int) -> tuple[int, ...]:
    """For each round, the most times that a client took part until then."""
    times, most = [0] * population, []
    for index in range(1, rounds + 1):
        for client in sample_cohort(seed, index, population, cohort_size):
            times[client] += 1
        most.append(max(times))
    return tuple(most)


@functools.lru_cache(maxsize=4096)
def epsilon_of(noise_multiplier: float, delta: float, times: int) -> float:
    """Epsilon of so many Gaussian mechanisms on one client's data.

    Args:
        noise_multiplier: z of each.
        delta: in (0, 1).
        times: k >= 1.
    """
    from dp_accounting import get_epsilon_gaussian

    sigma = noise_multiplier / math.sqrt(times)
    # Epsilon is about 1 / (2 sigma^2) where noise is small; float64 has no 12 digits behind it.
    tolerance = 1e-12 * max(1.0, 0.5 / sigma**2)
    with np.errstate(divide="ignore"):  # the library takes the logarithm of 0
        return float(get_epsilon_gaussian(sigma, delta, tolerance))


@functools.lru_cache(maxsize=64)
def multiplier_for(epsilon: float, delta: float, times: int) -> float:
    """The least noise multiplier with which so many Gaussian mechanisms use up at most `epsilon`.

    Args:
        epsilon: > 0.
        delta: in (0, 1).
        times: k >= 1.
    """
    from dp_accounting import get_sigma_gaussian

    tolerance = TOLERANCE * max(1.0, 1 / epsilon)
    with np.errstate(divide="ignore"):
        sigma = float(get_sigma_gaussian(epsilon, delta, tolerance))
    # More by as much as the search may have missed, so that nothing beyond epsilon is used up.
    return (sigma + 2 * tolerance) * math.sqrt(times)
