"""Whitened queries: by them a single image says its domain, not only the mean of many.

By plain queries an image is often nearer to the keys of another domain, because queries of one
domain's images differ far more in some directions than in others, and not in those in which two
domains differ. A whitened query is

    w(q) = L^T (q - c) / |L^T (q - c)|,   L L^T = S^-1

| here   | symbol | shape  | meaning                                                              |
|--------|--------|--------|----------------------------------------------------------------------|
| centre | c      | (q,)   | mean query of the public images                                      |
| matrix | L      | (q, q) | Cholesky factor of the inverse of S                                  |
|        | S      | (q, q) | covariance of the public images' queries within their domains        |

Before the division |L^T (q - p)| is the Mahalanobis distance of linear discriminant analysis. The
division leaves the angle, so that every key has at most length 1, as by plain queries. S is shrunk
as the number of images demands (oracle approximating shrinkage: Chen, Wiesel, Eldar and Hero,
Shrinkage algorithms for MMSE covariance estimation, IEEE Transactions on Signal Processing, 2010).

The public images' domains are known to the server. No client's data and no domain of a client's or
test image enter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import OAS

from fedprompt.core.errors import ConfigError
from fedprompt.data.prefix.tables import FeatureTable


def whitenings(public: FeatureTable, kinds: Mapping[str, str]) -> dict[str, Whitening]:
    """The maps of some kinds of queries.

    Args:
        public: labelled images that no client holds, with their domains.
        kinds: name of the whitened queries -> the kind that they are made of.

    Raises:
        ConfigError: the public images of each domain do not differ in their queries.
    """
    return {name: Whitening.of(public, kind) for name, kind in kinds.items()}


def add_whitened(
    tables: Iterable[FeatureTable], maps: Mapping[str, Whitening]
) -> list[FeatureTable]:
    """The tables with whitened queries beside their own.

    Args:
        tables: training data and splits.
        maps: name of the whitened queries -> their map.
    """
    return [
        table.with_queries({name: found(table) for name, found in maps.items()}) for table in tables
    ]


@dataclasses.dataclass(frozen=True)
class Whitening:
    """The map from queries of one kind to whitened ones."""

    kind: str
    """`style`, `cls` or `both`."""
    centre: NDArray[np.float64]
    """(q,)"""
    matrix: NDArray[np.float64]
    """(q, q), lower triangular."""

    @classmethod
    def of(cls, public: FeatureTable, kind: str) -> Whitening:
        """The map of some images.

        Args:
            public: labelled images that no client holds, with their domains.
            kind: `style`, `cls` or `both`.

        Raises:
            ConfigError: the public images of each domain do not differ in their queries.
        """
        queries = public.queries(kind).astype(np.float64)
        domains = [queries[public.groups == group] for group in np.unique(public.groups)]
        within = np.concatenate([each - each.mean(axis=0) for each in domains])
        if not within.any():
            raise ConfigError(
                f"prompts.whiten: expected public images that differ in their {kind} queries "
                f"within a domain, got {len(public)} that do not; set prompts.whiten=false"
            )
        # scikit-learn would invert with SciPy, whose threads a worker's limit may not reach.
        shrunk = OAS(assume_centered=True, store_precision=False).fit(within).covariance_
        return cls(kind, queries.mean(axis=0), np.linalg.cholesky(np.linalg.inv(shrunk)))

    def __call__(self, table: FeatureTable) -> NDArray[np.float32]:
        """(N, q) whitened queries of norm 1 of a table's images."""
        whitened = (table.queries(self.kind).astype(np.float64) - self.centre) @ self.matrix
        lengths = np.linalg.norm(whitened, axis=1, keepdims=True)
        unit: NDArray[np.float32] = (whitened / np.maximum(lengths, 1e-12)).astype(np.float32)
        return unit
