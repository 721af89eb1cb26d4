"""The data set `digits`: real images, fixed by the seed, divided without overlap."""

from __future__ import annotations

import numpy as np
import pytest

from fedprompt.core.errors import ConfigError
from fedprompt.data.sets.digits import enlarge, source_digits
from fedprompt.data.stratified import stratified_parts
from fedprompt.data.task import datasets


def test_all_images_are_used_once_and_every_split_holds_every_class() -> None:
    task = datasets.create("digits")
    splits = [task.train, task.validation, task.test]
    assert sum(len(split) for split in splits) == 1797
    assert task.group_names == ("digits",) and task.num_classes == 10
    assert task.class_mask.shape == (1, 10) and task.class_mask.all()
    for split in splits:
        assert split.images.shape[1:] == (32, 32, 3) and split.images.dtype == np.uint8
        assert set(split.labels.tolist()) == set(range(10))
    together = np.sort(np.concatenate([split.labels for split in splits]))
    np.testing.assert_array_equal(together, np.sort(source_digits()[1]))


def test_the_splits_are_stratified_and_disjoint() -> None:
    labels = source_digits()[1]
    parts = stratified_parts(labels, (0.2, 0.15), np.random.default_rng(0))
    joined = np.sort(np.concatenate(parts))
    np.testing.assert_array_equal(joined, np.arange(1797))
    share = np.bincount(labels[parts[0]]) / np.bincount(labels)
    np.testing.assert_allclose(share, 0.2, atol=0.01)


def test_fewer_training_images_leave_the_other_splits_as_they_are() -> None:
    whole, few = datasets.create("digits"), datasets.create("digits", train=0.1)
    assert len(few.train) == pytest.approx(180, abs=5)  # a tenth of 1797, rounded in each class
    assert set(few.train.labels.tolist()) == set(range(10))
    for one, other in ((few.test, whole.test), (few.validation, whole.validation)):
        np.testing.assert_array_equal(one.images, other.images)
    kept = {image.tobytes() for image in whole.train.images}
    assert all(image.tobytes() in kept for image in few.train.images)
    assert len(datasets.create("digits", train=0.65).train) == len(whole.train)


def test_the_seed_decides_the_division_and_nothing_else_does() -> None:
    first, again, other = (datasets.create("digits", seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.test.images, again.test.images)
    assert not np.array_equal(first.test.labels, other.test.labels)


def test_enlarging_keeps_constants_and_orientation() -> None:
    constant = np.full((1, 8, 8), 200, np.uint8)
    np.testing.assert_array_equal(enlarge(constant), np.full((1, 32, 32), 200))
    left = np.zeros((1, 8, 8), np.uint8)
    left[:, :, :4] = 255
    large = enlarge(left)[0]
    assert large[:, :14].min() > 240 and large[:, 18:].max() < 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": 1.5}, "data.test: expected a finite number > 0 and < 1, got 1.5"),
        ({"validation": 0.5, "test": 0.5}, "expected at most 0.9"),
        ({"train": 0.7}, "expected at most 1, got 0.7 \\+ 0.15 \\+ 0.2"),
        ({"train": 0}, "data.train: expected a finite number > 0"),
        ({"vaildation": 0.1}, "did you mean 'validation'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        datasets.create("digits", **options)
