"""GMM-PT, a baseline of the PFPT paper (Section 4): Bayesian Gaussian mixture over all prompts.

The mixture has a truncated Dirichlet process as prior (Blei and Jordan, "Variational Inference
for Dirichlet Process Mixtures", Bayesian Analysis 2006), as scikit-learn implements it, so the
number of components is bounded and not given. The rule that a client has at most one copy of each
summarizing prompt is not used (see `clustering`).

The prior of a component's variance decides whether anything is found at all. With V_0 the scale and
nu_0 = d the degrees of freedom of the Wishart prior, a component's variance is expected to be
V_0 / nu_0. scikit-learn's own V_0 is the variance of all points, so it expects components whose
variance is a d-th of the cloud's; in many dimensions the pool was seen to collapse to one prompt.
Here V_0 = `prior_variance` * d in units of the prompts' variance. With 10 clients, d = 128 and
drift as large as the prompts' spread, 0.3 finds all of 5 prompts (scikit-learn's value: 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fedprompt.aggregation.arrays import Array
from fedprompt.aggregation.base import Aggregation, Aggregator, aggregators
from fedprompt.aggregation.clustering import Fit, aggregate_clusters, largest_set
from fedprompt.aggregation.cohort import Cohort
from fedprompt.aggregation.inputs import AggregationInput
from fedprompt.core.checks import check_choice, check_integer, check_number

HEADROOM = 2
"""Components per prompt of the largest set, if nothing was broadcast: clients may differ in what
they use, so that there are more prompts than one of them has.
"""


@dataclasses.dataclass(frozen=True)
class GmmOptions:
    """Options of `gmm`."""

    max_components: int = 0
    """Bound on the number of components; 0 for the most prompts that were ever broadcast, or, if
    nothing was, twice as many as the largest set has."""
    covariance: str = "spherical"
    """`spherical` or `diag`; a full one would have more entries than there are prompts."""
    concentration: float = 0.0
    """Concentration of the Dirichlet process; less makes fewer components; 0 for 1 / bound."""
    mean_precision: float = 1.0
    """How many prompts the prior mean counts for, towards which centroids are shrunk."""
    prior_variance: float = 0.3
    """Expected variance of a component, in units of the variance of all prompts."""
    restarts: int = 5
    """Starts (k-means), of which the best end is kept."""
    max_iterations: int = 100
    """Bound on the iterations of one start."""

    def __post_init__(self) -> None:
        for name, least in (("max_components", 0), ("restarts", 1), ("max_iterations", 1)):
            check_integer(f"aggregator.{name}", getattr(self, name), least)
        check_choice("aggregator.covariance", self.covariance, ("spherical", "diag"))
        check_number("aggregator.concentration", self.concentration, 0)
        for name in ("mean_precision", "prior_variance"):
            check_number(f"aggregator.{name}", getattr(self, name), 0, above=True)


@aggregators.register("gmm", GmmOptions)
class Gmm(Aggregator):
    """Centroids of a Bayesian Gaussian mixture.

    Does not respect the rule "one prompt per client and cluster". Components that are no prompt's
    most probable one are dropped. Sample counts and origins are not used. State: `bound`, int64,
    so that a pool which shrank once can grow again.
    """

    def __init__(self, options: GmmOptions) -> None:
        self.options = options
        # A bound of its own may be above what was broadcast.
        self.adds_prompts = options.max_components > 0

    def merge(self, given: AggregationInput) -> Aggregation:
        """Fit the mixture to all local prompts; the components' means are the new prompts."""
        cohort = Cohort.of(given)
        bound = self._bound(cohort, given.state)
        result = aggregate_clusters(cohort, bound, self._fit, given.draw_seed())
        result.state["bound"] = torch.tensor(bound)
        return result

    def _bound(self, cohort: Cohort, state: Mapping[str, Tensor]) -> int:
        number = self.options.max_components
        if number == 0 and cohort.previous is not None:
            number = max(len(cohort.previous), int(state.get("bound", 0)))
        elif number == 0:
            number = HEADROOM * largest_set(cohort)
        return max(number, 1)

    def _fit(self, points: Array, bound: int, seed: int) -> Fit:
        # Imported here: half a second that the other aggregators need not wait for.
        from sklearn.mixture import BayesianGaussianMixture

        width = points.shape[1]
        scale = self.options.prior_variance * width  # points have variance 1
        model = BayesianGaussianMixture(
            n_components=bound,
            covariance_type=self.options.covariance,
            weight_concentration_prior=self.options.concentration or None,
            mean_precision_prior=self.options.mean_precision,
            covariance_prior=scale if self.options.covariance == "spherical" else [scale] * width,
            degrees_of_freedom_prior=width,
            n_init=self.options.restarts,
            max_iter=self.options.max_iterations,
            random_state=seed,
        ).fit(points)
        figures = {"iterations": float(model.n_iter_), "converged": float(model.converged_)}
        return Fit(model.predict(points).astype("int64"), model.means_, figures)
