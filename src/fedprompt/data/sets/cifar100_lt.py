"""CIFAR-100-LT: CIFAR-100 whose classes shrink exponentially.

Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, and Cao et al.
(LDAM), NeurIPS 2019: class c of C keeps int(n_max IF^(-c / (C - 1))) of its n_max training images,
where the imbalance factor IF is the largest class over the smallest. The test split stays balanced.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fedprompt.core.checks import check_number
from fedprompt.core.seeding import numpy_generator
from fedprompt.data.reading.files import data_folder
from fedprompt.data.reading.images import Indices
from fedprompt.data.reading.published import ValidationOptions, build_task
from fedprompt.data.sets.cifar import FINE, read_cifar
from fedprompt.data.task import Task, datasets


@dataclasses.dataclass(frozen=True)
class Cifar100LtOptions(ValidationOptions):
    """Options of `cifar100_lt`; its files are those of `cifar100`, in that folder."""

    imbalance_factor: float = 100
    """Images of the largest class over those of the smallest; published with 10, 50 and 100."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("data.imbalance_factor", self.imbalance_factor, 1)


@datasets.register("cifar100_lt", Cifar100LtOptions)
def cifar100_lt(options: Cifar100LtOptions) -> Task:
    """A hundred classes of 500 down to 500 / IF images; the seed draws which of them.

    The validation split is cut out of what remains, so that training and validation images together
    are as many as published.
    """
    published = read_cifar("cifar100_lt", data_folder(options.root, "cifar100"), FINE)
    labels = published.train.labels
    sizes = long_tail_sizes(int(np.bincount(labels).max()), 100, options.imbalance_factor)
    generator = numpy_generator(options.seed, "data/cifar100_lt/tail")
    kept = np.concatenate(
        [
            generator.permutation(np.flatnonzero(labels == label))[:size]
            for label, size in enumerate(sizes)
        ]
    )
    train = published.train.take(np.sort(kept).astype(np.int64))
    tailed = dataclasses.replace(published, train=train)
    return build_task("cifar100_lt", tailed, options, options.validation)


def long_tail_sizes(largest: int, num_classes: int, imbalance_factor: float) -> Indices:
    """Images of each class, the largest first; at least one.

    Args:
        largest: images of the first class.
        num_classes: how many sizes come back.
        imbalance_factor: the largest size by the smallest.

    >>> sizes = long_tail_sizes(500, 100, 100)
    >>> int(sizes[0]), int(sizes[-1]), int(sizes.sum())
    (500, 5, 10847)
    """
    decay = [imbalance_factor ** (-label / max(num_classes - 1, 1)) for label in range(num_classes)]
    # The tiny addition keeps an exact quotient such as 500 / 100 from falling below itself.
    return np.array([max(1, int(largest * each + 1e-9)) for each in decay], np.int64)
