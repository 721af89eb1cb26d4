"""What DINOv2's features know of `emoji` and `mixed`: linear probes on the CLS feature.

    python -m benchmarks.real.probe [--weights weights/dinov2_s14.safetensors] [--size 98]

For `emoji`, a logistic regression on the training concepts of some styles, tested on the test
concepts of one: fitted on all five (one head), on the style's own, and on the other four; over
several draws of the concepts. For `mixed`, one regression for each domain among its own classes.
Its strength is chosen on the validation split of the styles that it is fitted on; the test split is
looked at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.harness import RESULTS, Json, header, one_thread, write_json
from fedprompt.data.task import Split, Task, datasets
from fedprompt.models.backbone import Backbone, load_backbone
from fedprompt.models.nano.probe import features_of
from fedprompt.models.options import ModelOptions

STRENGTHS = (0.001, 0.01, 0.1, 1.0)


class Features:
    """CLS features of a task's splits."""

    def __init__(self, task: Task, values: Mapping[str, NDArray[np.float64]]) -> None:
        self.splits = splits_of(task)
        self.values = values

    def fitted(self, groups: set[int]) -> Pipeline:
        """A regression on the training images of some domains."""
        best, best_accuracy = None, -1.0
        for strength in STRENGTHS:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
            model.fit(*self.of("train", groups))
            accuracy = model.score(*self.of("validation", groups))
            if accuracy > best_accuracy:
                best, best_accuracy = model, accuracy
        return best

    def of(self, split: str, groups: set[int]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Features and labels of some domains in a split."""
        rows = np.isin(self.splits[split].groups, sorted(groups))
        return self.values[split][rows], self.splits[split].labels[rows]

    def accuracy(self, model: Pipeline, groups: set[int]) -> float:
        """On test images of some domains."""
        return round(float(model.score(*self.of("test", groups))), 4)


def splits_of(task: Task) -> dict[str, Split]:
    """The three that clients and server see."""
    return {"train": task.train, "validation": task.validation, "test": task.test}


def computed(backbone: Backbone, task: Task) -> dict[str, NDArray[np.float64]]:
    """Features (N, d) of each split."""
    return {name: features_of(backbone, split.images) for name, split in splits_of(task).items()}


def probe_style(features: Features, number: int, one: Pipeline, styles: int) -> dict[str, float]:
    """Accuracy on a style of a head that is fitted on all, on its own, on the others."""
    others = set(range(styles)) - {number}
    return {
        "one head": features.accuracy(one, {number}),
        "own": features.accuracy(features.fitted({number}), {number}),
        "other four": features.accuracy(features.fitted(others), {number}),
    }


def probe_emoji(backbone: Backbone, size: int, seeds: range) -> Json:
    """For each draw of the concepts, whose images are the same and computed once."""
    known: dict[str, NDArray[np.float64]] = {}
    found: list[dict[str, float]] = []
    for seed in seeds:
        task = datasets.create("emoji", size=size, seed=seed)
        names = {name: split.images.names for name, split in splits_of(task).items()}  # type: ignore[union-attr]
        if not known:
            for name, rows in computed(backbone, task).items():
                known |= dict(zip(names[name], rows, strict=True))
        values = {name: np.stack([known[each] for each in own]) for name, own in names.items()}
        features, styles = Features(task, values), task.group_names
        one = features.fitted(set(range(len(styles))))
        row = {"all styles, one head": features.accuracy(one, set(range(len(styles))))}
        for number, style in enumerate(styles):
            for head, value in probe_style(features, number, one, len(styles)).items():
                row[f"{style}, {head}"] = value
        found.append(row)
    mean = {key: round(float(np.mean([row[key] for row in found])), 3) for key in found[0]}
    return {"images": len(known), "seeds": list(seeds), "mean": mean, "each": found}


def probe_mixed(backbone: Backbone, size: int) -> Json:
    """Accuracy of a head of each domain, among the classes of the domain."""
    task = datasets.create("mixed", size=size)
    features = Features(task, computed(backbone, task))
    return {
        "images": sum(map(len, features.splits.values())),
        "accuracy": {
            name: features.accuracy(features.fitted({number}), {number})
            for number, name in enumerate(task.group_names)
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--weights", type=Path, default=Path("weights/dinov2_s14.safetensors"))
    parser.add_argument("--size", type=int, default=98)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "real" / "probe.json")
    chosen = parser.parse_args(arguments)
    one_thread()
    backbone = load_backbone(
        ModelOptions(
            "vit_small_patch14_dinov2", pretrained=str(chosen.weights), image_size=chosen.size
        )
    )
    document = header("real.probe", size=chosen.size, backbone_sha256=backbone.checksum())
    document["emoji"] = probe_emoji(backbone, chosen.size, range(chosen.seeds))
    document["mixed"] = probe_mixed(backbone, chosen.size)
    write_json(chosen.output, document)


if __name__ == "__main__":
    main()
