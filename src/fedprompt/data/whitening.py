"""Whitened queries: by them a single image says its domain, not only the mean of many.

Queries of images of one domain differ much more in some directions than in others (brightness and
contrast, for the style query), and far less in those in which two domains differ. Euclidean
distances count all directions alike, so that a single image is often nearer to the keys of another
domain. Here queries are centred at the mean of public images and multiplied by L, with L L^T the
inverse of their covariance within domains, so that distances become Mahalanobis distances as in
linear discriminant analysis; then they get unit norm again. The covariance is shrunk as the number
of public images demands (oracle approximating shrinkage: Chen et al., 2010). No client's data and
no client's domain enter.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import OAS

from fedprompt.data.tables import FeatureTable
from fedprompt.errors import ConfigError
from fedprompt.models.prompted_vit import WHITENED


def whiten(
    tables: Iterable[FeatureTable], public: FeatureTable, kinds: Iterable[str]
) -> list[FeatureTable]:
    """The tables with whitened queries beside their own.

    Args:
        tables: training data and splits.
        public: images that belong to nobody, with their domains.
        kinds: of the whitened queries, as `PromptOptions.query_kind` names them.

    Raises:
        ConfigError: the public images of each domain do not differ in their queries.
    """
    maps = {kind: Whitening(public, kind.removeprefix(WHITENED)) for kind in kinds}
    return [
        table.with_queries({kind: found(table) for kind, found in maps.items()}) for table in tables
    ]


class Whitening:
    """The map from queries of one kind to whitened ones.

    Args:
        public: images that belong to nobody, with their domains.
        kind: `style` or `cls`.
    """

    def __init__(self, public: FeatureTable, kind: str) -> None:
        self.kind = kind
        queries = public.queries(kind).astype(np.float64)
        self.centre: NDArray[np.float64] = queries.mean(axis=0)
        within = np.concatenate(
            [
                queries[public.groups == group] - queries[public.groups == group].mean(axis=0)
                for group in np.unique(public.groups)
            ]
        )
        if not within.any():
            raise ConfigError(
                f"prompts.whiten: expected public images that differ in their {kind} queries "
                f"within a domain, got {len(public)} that do not; set prompts.whiten=false"
            )
        precision = OAS(assume_centered=True).fit(within).precision_
        self.matrix: NDArray[np.float64] = np.linalg.cholesky(precision)
        """(q, q), lower triangular."""

    def __call__(self, table: FeatureTable) -> NDArray[np.float32]:
        """(N, q) whitened queries of norm 1 of a table's images."""
        whitened = (table.queries(self.kind).astype(np.float64) - self.centre) @ self.matrix
        lengths = np.linalg.norm(whitened, axis=1, keepdims=True)
        unit: NDArray[np.float32] = (whitened / np.maximum(lengths, 1e-12)).astype(np.float32)
        return unit
