"""Figures of a model on a held-out split: over its images, over its classes, over the clients."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import MulticlassAccuracy


@dataclasses.dataclass(frozen=True)
class ClientFigures:
    """Accuracy of each client's own model on its own share of a held-out split."""

    accuracy: Mapping[int, float]
    """By client; clients without held-out images are left out."""

    def summary(self) -> dict[str, object]:
        """`mean`, `deviation`, `worst_tenth`, `jain`, the number of `clients`, and each one's
        accuracy.
        """
        values = [self.accuracy[client] for client in sorted(self.accuracy)]
        return {
            **describe(values),
            "clients": len(values),
            "by_client": {str(client): self.accuracy[client] for client in sorted(self.accuracy)},
        }


def describe(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (over all clients, not a sample), mean of the worst tenth (at least
    one client), and Jain's index of fairness: (sum x)^2 / (n sum x^2), 1 if all are served alike
    and 1 / n if one alone is (Jain, Chiu and Hawe, DEC-TR-301, 1984).

    >>> describe([1.0, 0.0])
    {'mean': 0.5, 'deviation': 0.5, 'worst_tenth': 0.0, 'jain': 0.5}
    """
    if not values:
        return dict.fromkeys(("mean", "deviation", "worst_tenth", "jain"), math.nan)
    array = np.sort(np.asarray(values, dtype=np.float64))
    squares = float((array**2).sum())
    return {
        "mean": float(array.mean()),
        "deviation": float(array.std()),
        "worst_tenth": float(array[: math.ceil(len(array) / 10)].mean()),
        "jain": float(array.sum() ** 2 / (len(array) * squares)) if squares else math.nan,
    }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures of one split."""

    accuracy: float = math.nan
    """Of the global model; NaN where there is none."""
    loss: float = math.nan
    """Mean cross-entropy."""
    balanced_accuracy: float = math.nan
    """Mean of the classes' accuracies."""
    class_accuracy: tuple[float, ...] = ()
    """Per class; NaN for a class without images in the split."""
    domain_accuracy: tuple[float, ...] = ()
    """Per domain; NaN for a domain without images in the split."""
    alone_accuracy: float = math.nan
    """Of the global model with prompts that each image selects by itself; NaN if not measured."""
    clients: ClientFigures | None = None
    """Every client's own model on its own share of the split, where that was requested."""
    predicted: NDArray[np.int64] | None = dataclasses.field(default=None, compare=False, repr=False)
    """(N,) the global model's class of each image, in the order of the split; None without one."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found of some images."""

    labels: NDArray[np.int64]
    """(B,)"""
    predicted: Tensor
    """(B,) int64 classes."""
    loss: float
    """Mean cross-entropy."""
    groups: NDArray[np.int64]
    """(B,) domains."""
    images: NDArray[np.int64]
    """(B,) rows of the split."""


def over_images(pieces: Sequence[Measured], num_classes: int) -> Evaluation:
    """The figures of one model over the images of some pieces, which are a whole split."""
    accuracy = MulticlassAccuracy(num_classes, average="micro")
    by_class = MulticlassAccuracy(num_classes, average="none")
    loss = MeanMetric()
    present = np.zeros(num_classes, dtype=bool)
    for piece in pieces:
        labels = torch.from_numpy(piece.labels)
        accuracy.update(piece.predicted, labels)
        by_class.update(piece.predicted, labels)
        loss.update(piece.loss, weight=len(labels))
        present[piece.labels] = True
    per_class = np.where(present, by_class.compute().numpy().astype(float), np.nan)
    predicted = np.empty(sum(len(piece.labels) for piece in pieces), np.int64)
    for piece in pieces:
        predicted[piece.images] = piece.predicted.numpy()
    groups = np.concatenate([piece.groups for piece in pieces])
    right = np.concatenate([piece.predicted.numpy() == piece.labels for piece in pieces])
    images = np.bincount(groups)
    with np.errstate(invalid="ignore"):
        by_domain = np.bincount(groups, weights=right) / images
    return Evaluation(
        float(accuracy.compute()),
        float(loss.compute()),
        float(np.nanmean(per_class)),
        tuple(per_class.tolist()),
        tuple(by_domain.tolist()),
        predicted=predicted,
    )


def over_clients(pieces: Mapping[int, Sequence[Measured]]) -> ClientFigures:
    """The accuracy of each client's own model over the images of its pieces."""
    accuracy = {}
    for client, own in pieces.items():
        correct = sum(int((x.predicted.numpy() == x.labels).sum()) for x in own)
        accuracy[client] = correct / sum(len(x.labels) for x in own)
    return ClientFigures(accuracy)
