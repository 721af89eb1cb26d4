"""What DINOv2's features know of `emoji` and `mixed`: linear probes on the CLS feature.

    python -m benchmarks.real.probe [--weights weights/dinov2_s14.safetensors] [--size 98]

For `emoji`, a logistic regression on the training concepts of some styles, tested on the test
concepts of one: fitted on all five (one head), on the style's own, and on the other four. For
`mixed`, one regression for each domain among its own classes. Its strength is chosen on the
validation split of the styles that it is fitted on; the test split is looked at once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
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
Rows = NDArray[np.bool_]


class Features:
    """CLS features of a task's splits, standardised by nothing yet."""

    def __init__(self, backbone: Backbone, task: Task) -> None:
        self.splits: dict[str, Split] = {
            "train": task.train,
            "validation": task.validation,
            "test": task.test,
        }
        self.values = {
            name: features_of(backbone, split.images) for name, split in self.splits.items()
        }

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


def probe_emoji(features: Features, styles: tuple[str, ...]) -> Json:
    """Accuracy on each style of a head that is fitted on all, on its own, on the others."""
    everything = set(range(len(styles)))
    one = features.fitted(everything)
    return {
        "one head, all styles": features.accuracy(one, everything),
        "styles": {
            style: {
                "one head": features.accuracy(one, {number}),
                "own": features.accuracy(features.fitted({number}), {number}),
                "other four": features.accuracy(features.fitted(everything - {number}), {number}),
            }
            for number, style in enumerate(styles)
        },
    }


def probe_domains(features: Features, names: tuple[str, ...]) -> Json:
    """Accuracy of a head of each domain, among the classes of the domain."""
    return {
        name: features.accuracy(features.fitted({number}), {number})
        for number, name in enumerate(names)
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--weights", type=Path, default=Path("weights/dinov2_s14.safetensors"))
    parser.add_argument("--size", type=int, default=98)
    parser.add_argument("--output", type=Path, default=RESULTS / "real" / "probe.json")
    chosen = parser.parse_args(arguments)
    one_thread()
    backbone = load_backbone(
        ModelOptions(
            "vit_small_patch14_dinov2", pretrained=str(chosen.weights), image_size=chosen.size
        )
    )
    document = header("real.probe", size=chosen.size, backbone_sha256=backbone.checksum())
    for name in ("emoji", "mixed"):
        task = datasets.create(name, size=chosen.size)
        start = time.perf_counter()
        with torch.no_grad():
            features = Features(backbone, task)
        count = sum(map(len, features.splits.values()))
        document[name] = {
            "images": count,
            "images_per_second": round(count / (time.perf_counter() - start), 1),
            "accuracy": (probe_emoji if name == "emoji" else probe_domains)(
                features, task.group_names
            ),
        }
    write_json(chosen.output, document)


if __name__ == "__main__":
    main()
