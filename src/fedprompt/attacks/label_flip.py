"""`label_flip`: training on turned labels, the first class for the last and so on.

Fang et al., "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning", USENIX Security
2020, Section 5.1: label l becomes C - 1 - l, here among the C classes of the image's domain.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedprompt.attacks.base import Attack, AttackOptions, attacks


@attacks.register("label_flip", AttackOptions)
class LabelFlip(Attack):
    """Trains honestly, on wrong labels."""

    def labels(
        self, labels: NDArray[np.int64], groups: NDArray[np.int64], class_mask: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        """The classes of each image's domain in reverse.

        Args:
            labels: (N,) the true ones.
            groups: (N,) domain of each image.
            class_mask: (groups, C)

        >>> mask = np.array([[True, True, True, False]])
        >>> LabelFlip(None).labels(np.array([0, 1, 2]), np.zeros(3, int), mask).tolist()
        [2, 1, 0]
        """
        turned = np.tile(np.arange(class_mask.shape[1], dtype=labels.dtype), (len(class_mask), 1))
        for group, known in enumerate(class_mask):
            classes = np.flatnonzero(known)
            turned[group, classes] = classes[::-1]
        return turned[groups, labels]
