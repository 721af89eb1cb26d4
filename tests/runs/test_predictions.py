"""What a run keeps of its predictions is what its accuracies were counted from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fedprompt
from fedprompt.config import compose
from fedprompt.core.errors import CheckpointError
from fedprompt.data.task import datasets
from fedprompt.runs.directory import RunDirectory


def test_predictions_give_the_accuracies_of_the_round(tiny: Callable[..., list[str]]) -> None:
    small = ["data.train=80", "data.validation=40", "data.test=40", "data.public=80"]
    more = ["data=domains", *small, "eval_every=2", "compare=[local_only]", "rounds=3"]
    more = ["model=nano_promptable", "model.backbone=nano_promptable", *more]
    overrides = [each for each in tiny(*more) if "random.safetensors" not in each]
    result = fedprompt.run("digits", overrides)
    directory = RunDirectory(result.run_dir)
    saved = directory.read_predictions()
    assert int(saved["round"]) == 3
    config = compose("digits", overrides)
    task = datasets.create("domains", **dataclasses.asdict(config.data.options))
    assert saved["id"].tolist() == list(range(len(task.test)))
    assert np.array_equal(saved["label"], task.test.labels)
    assert np.array_equal(saved["domain"], task.test.groups)
    right = saved["prediction"] == saved["label"]
    record = result.reports[-1]
    assert right.mean() == pytest.approx(record["accuracy"])
    for domain, accuracy in enumerate(record["domain_accuracy"]):
        assert right[saved["domain"] == domain].mean() == pytest.approx(accuracy)
    for label, accuracy in enumerate(record["class_accuracy"]):
        if accuracy is not None:
            assert right[saved["label"] == label].mean() == pytest.approx(accuracy)
    # No class of another domain is possible.
    assert task.class_mask[saved["domain"], saved["prediction"]].all()
    # Clients that share no model have none whose predictions could be kept.
    assert directory.comparison("local_only").read_predictions() == {}


def test_damaged_predictions_are_named(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path / "run")
    (directory.path / "predictions.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(CheckpointError, match=r"predictions.npz: expected a NumPy archive"):
        directory.read_predictions()
    directory.clear()
    assert not (directory.path / "predictions.npz").exists()
