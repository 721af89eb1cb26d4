"""K-means over the local prompts of all clients: the simplest clustering baseline.

The number of clusters must be known or guessed, and the rule that a client has at most one copy
of each summarizing prompt is not used (see `clustering`).
"""

from __future__ import annotations

import dataclasses

from fedprompt.aggregation.arrays import Array
from fedprompt.aggregation.base import Aggregation, Aggregator, aggregators
from fedprompt.aggregation.clustering import Fit, aggregate_clusters, largest_set
from fedprompt.aggregation.cohort import Cohort
from fedprompt.aggregation.inputs import AggregationInput
from fedprompt.core.checks import check_integer


@dataclasses.dataclass(frozen=True)
class KMeansOptions:
    """Options of `kmeans`."""

    clusters: int = 0
    """Number of clusters; 0 for as many as prompts were broadcast, or as the largest set has."""
    restarts: int = 10
    """Starts (k-means++), of which the best end is kept."""
    max_iterations: int = 300
    """Bound on the iterations of one start."""

    def __post_init__(self) -> None:
        for name, least in (("clusters", 0), ("restarts", 1), ("max_iterations", 1)):
            check_integer(f"aggregator.{name}", getattr(self, name), least)


@aggregators.register("kmeans", KMeansOptions)
class KMeans(Aggregator):
    """Centroids of k-means. Does not respect the rule "one prompt per client and cluster".

    Sample counts and origins are not used. Stateless.
    """

    def __init__(self, options: KMeansOptions) -> None:
        self.options = options
        # A number of its own may be above what was broadcast.
        self.adds_prompts = options.clusters > 0

    def merge(self, given: AggregationInput) -> Aggregation:
        """Cluster all local prompts; the means of the clusters are the new prompts."""
        cohort = Cohort.of(given)
        number = self.options.clusters
        if number == 0:
            number = largest_set(cohort) if cohort.previous is None else len(cohort.previous)
        return aggregate_clusters(cohort, max(number, 1), self._fit, given.draw_seed())

    def _fit(self, points: Array, number: int, seed: int) -> Fit:
        # Imported here: half a second that the other aggregators need not wait for.
        from sklearn.cluster import KMeans as SklearnKMeans

        model = SklearnKMeans(
            n_clusters=number,
            n_init=self.options.restarts,
            max_iter=self.options.max_iterations,
            random_state=seed,
        ).fit(points)
        figures = {
            "iterations": float(model.n_iter_),
            "scatter": float(model.inertia_) / points.size,
        }
        return Fit(model.labels_.astype("int64"), model.cluster_centers_, figures)
