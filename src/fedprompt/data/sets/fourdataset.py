"""The paper's 4-dataset: MNIST-M, Fashion-MNIST, CINIC-10 and MMAFEDB as four domains of one task.

Weng et al., arXiv 2502.19752, section 5: 30,000 training and 2,500 test images of each, 37 classes;
an image is classified among the classes of its own domain (`Task.class_mask`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np

from fedprompt.data.reading.files import data_home
from fedprompt.data.reading.published import (
    ImageOptions,
    Published,
    ValidationOptions,
    build_task,
    draw_splits,
    join,
    without_bad_images,
)
from fedprompt.data.sets.cinic10 import read_cinic10
from fedprompt.data.sets.fashion_mnist import read_fashion_mnist
from fedprompt.data.sets.mmafedb import read_mmafedb
from fedprompt.data.sets.mnist_m import read_mnist_m
from fedprompt.data.task import Task, datasets


@dataclasses.dataclass(frozen=True)
class FourDatasetOptions(ImageOptions, ValidationOptions):
    """Options of `fourdataset`: limits hold for each domain, `validation` for the two domains whose
    publisher has no validation split.

    `root` holds the folders mnist_m, fashion_mnist, cinic10 and mmafedb; null means
    $FEDPROMPT_DATA, or data.
    """

    several_domains: ClassVar[bool] = True

    max_train: int | None = 30_000
    max_validation: int | None = 2_500
    max_test: int | None = 2_500
    balanced: bool = True
    """Draw equally many images of each class of a domain, as far as they reach; false keeps the
    publisher's shares."""


@datasets.register("fourdataset", FourDatasetOptions)
def fourdataset(options: FourDatasetOptions) -> Task:
    """37 classes in four domains, all images resized from their files to one size."""
    home = data_home() if options.root is None else Path(options.root)
    domains = {
        "mnist_m": read_mnist_m(home / "mnist_m", options.size),
        "fashion_mnist": read_fashion_mnist(home / "fashion_mnist", options.size),
        "cinic10": read_cinic10(home / "cinic10", options.size),
        "mmafedb": read_mmafedb(home / "mmafedb", options.size),
    }
    checked = {
        name: without_bad_images(name, published, options) for name, published in domains.items()
    }
    offsets = np.cumsum([0, *(len(each.class_names) for each in checked.values())]).tolist()[:-1]
    drawn = [
        draw_splits(name, published, options, options.validation, options.balanced)
        for name, published in checked.items()
    ]
    train, validation, test = (join(parts, offsets) for parts in zip(*drawn, strict=True))
    composed = Published(
        class_names=tuple(
            f"{name}/{each}"
            for name, published in checked.items()
            for each in published.class_names
        ),
        train=train,
        test=test,
        validation=validation,
        group_names=tuple(checked),
        notes=tuple(note for published in checked.values() for note in published.notes),
    )
    # The limits hold for each domain and have been applied.
    unlimited = dataclasses.replace(options, max_train=None, max_validation=None, max_test=None)
    return build_task("fourdataset", composed, unlimited)
