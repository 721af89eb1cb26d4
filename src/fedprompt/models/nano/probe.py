"""What frozen features are worth: linear probes on the built-in tasks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.core.files import Json
from fedprompt.data.task import Images, Split, datasets
from fedprompt.models.backbone import Backbone, load_backbone
from fedprompt.models.nano.card import write_card
from fedprompt.models.nano.pretrain import torch_threads, untrained
from fedprompt.models.nano.recipe import TASKS, Progress

# ---------------------------------------------------------------- linear probes


def features_of(
    backbone: Backbone, images: NDArray[np.uint8] | Images, prompts: Tensor | None = None
) -> NDArray[np.float64]:
    """CLS features (N, d) of images (N, H, W, 3), all with the same prompts (n, d) or none.

    Args:
        backbone: the frozen network.
        images: (N, H, W, 3) uint8.
        prompts: (n, d), the same for all images; None for none.
    """
    parts = []
    with torch.no_grad():
        for start in range(0, images.shape[0], 256):
            pixels = backbone.preprocess(torch.from_numpy(images[start : start + 256]))
            parts.append(backbone(pixels, prompts))
    return torch.cat(parts).double().numpy()


def linear_probe(
    backbone: Backbone, train: Split, validation: Split, test: Split, prompts: Tensor | None = None
) -> float:
    """Test accuracy of logistic regression on standardised CLS features.

    The regularisation is chosen on the validation split; the test split is looked at once.

    Args:
        backbone: the frozen network.
        train: fits the regression.
        validation: chooses its strength.
        test: is looked at once.
        prompts: (n, d), the same for all images; None for none.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = [features_of(backbone, split.images, prompts) for split in (train, validation, test)]
    best, best_accuracy = None, -1.0
    for strength in (0.01, 0.1, 1.0):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        model.fit(features[0], train.labels)
        accuracy = model.score(features[1], validation.labels)
        if accuracy > best_accuracy:
            best, best_accuracy = model, accuracy
    return float(best.score(features[2], test.labels))  # type: ignore[union-attr]


def group_of(split: Split, group: int) -> Split:
    """The part of a split that belongs to one group."""
    rows = split.groups == group
    return Split(split.images[rows], split.labels[rows], split.groups[rows])


def probe(backbone: Backbone, progress: Progress | None = None) -> dict[str, dict[str, float]]:
    """Linear probes on `digits` and on every domain of `domains`, without prompts and under each
    task's tokens.
    """
    variants: dict[str, Tensor | None] = {"no prompts": None}
    for index, task in enumerate(TASKS if "task_tokens" in backbone.extras else ()):
        variants[f"{task} tokens"] = backbone.extras["task_tokens"][index]
    digits, domains = datasets.create("digits"), datasets.create("domains")
    sets: dict[str, tuple[Split, Split, Split]] = {
        "digits": (digits.train, digits.validation, digits.test)
    }
    for group, name in enumerate(domains.group_names):
        sets[f"domains/{name}"] = (
            group_of(domains.train, group),
            group_of(domains.validation, group),
            group_of(domains.test, group),
        )
    result: dict[str, dict[str, float]] = {}
    total, done = len(variants) * len(sets), 0
    for variant, prompts in variants.items():
        result[variant] = {}
        for name, splits in sets.items():
            result[variant][name] = round(linear_probe(backbone, *splits, prompts=prompts), 4)
            done += 1
            if progress is not None:
                progress("probe", done, total, {})
    return result


def add_probes(path: Path, progress: Progress | None = None) -> Json:
    """Probe stored weights, and a random network of the same seed, and write the figures into the
    card.
    """
    card: Json = json.loads(path.with_suffix(".json").read_text())
    random = untrained(card["seed"])
    with torch_threads(card["threads"]):
        card["linear_probe"] = {
            "method": "scikit-learn LogisticRegression on standardised CLS features of the stored "
            "half-precision weights; fitted on train, C in (0.01, 0.1, 1) chosen on validation, "
            "accuracy on test; data sets with their default options",
            "accuracy": probe(load_backbone(str(path)), progress),
            "random_weights": probe(random, progress)["no prompts"],
        }
    write_card(path, card)
    return card
