"""The drawn task `domains`: four domains, 37 classes, splits without a common source."""

from __future__ import annotations

import numpy as np
import pytest

from fedprompt.core.errors import ConfigError
from fedprompt.data.sets.digits import source_digits
from fedprompt.data.sets.domains import EXPRESSIONS, GROUPS, DomainsOptions, domains, split_sources
from fedprompt.data.task import Split, Task, datasets

SMALL = {"train": 160, "validation": 40, "test": 80, "public": 80}


@pytest.fixture(scope="module")
def task() -> Task:
    return datasets.create("domains", **SMALL)


def splits_of(task: Task) -> dict[str, Split]:
    assert task.public is not None
    return {
        "public": task.public,
        "train": task.train,
        "validation": task.validation,
        "test": task.test,
    }


def test_sizes_classes_and_groups(task: Task) -> None:
    assert task.num_classes == 37 and task.group_names == GROUPS
    assert task.class_mask.sum(axis=1).tolist() == [10, 10, 10, len(EXPRESSIONS)]
    assert (task.class_mask.sum(axis=0) == 1).all(), "every class belongs to one domain"
    for name, split in splits_of(task).items():
        assert len(split) == SMALL[name]
        assert split.images.shape == (SMALL[name], 32, 32, 3)
        assert np.bincount(split.groups).tolist() == [SMALL[name] // 4] * 4
        for group in range(4):
            counts = np.bincount(split.labels[split.groups == group], minlength=37)
            own = counts[task.class_mask[group]]
            assert own.max() - own.min() <= 1 and counts.sum() == own.sum()


def test_the_same_options_give_the_same_bytes_and_another_seed_does_not(task: Task) -> None:
    again = domains(DomainsOptions(**SMALL))
    other = domains(DomainsOptions(seed=1, **SMALL))
    for name, split in splits_of(task).items():
        np.testing.assert_array_equal(split.images, splits_of(again)[name].images)
        np.testing.assert_array_equal(split.labels, splits_of(again)[name].labels)
        assert not np.array_equal(split.images, splits_of(other)[name].images)


def test_splits_share_no_source_digit_and_no_image(task: Task) -> None:
    sources = split_sources(seed=0)
    joined = np.concatenate(list(sources.values()))
    assert len(joined) == len(np.unique(joined)) == len(source_digits()[1])
    for index in sources.values():
        assert set(source_digits()[1][index].tolist()) == set(range(10))
    pictures = [image.tobytes() for split in splits_of(task).values() for image in split.images]
    assert len(set(pictures)) == len(pictures)


def test_one_split_does_not_depend_on_the_size_of_another(task: Task) -> None:
    other = domains(DomainsOptions(**{**SMALL, "train": 80}))
    np.testing.assert_array_equal(task.test.images, other.test.images)


def test_difficulty_and_resolution() -> None:
    clean = domains(DomainsOptions(difficulty=0.0, resolution=64, **SMALL))
    assert clean.test.images.shape == (SMALL["test"], 64, 64, 3)
    hard = domains(DomainsOptions(difficulty=1.0, **SMALL))
    easy = domains(DomainsOptions(difficulty=0.0, **SMALL))

    def roughness(split: Split) -> float:
        letters = split.images[split.groups == 1].astype(float)
        return float(np.abs(np.diff(letters[:, 0], axis=1)).mean())

    assert roughness(hard.test) > 2 * roughness(easy.test), "noise grows with difficulty"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": 10}, "data.test: expected at least 40 images"),
        ({"difficulty": 2.0}, "data.difficulty: expected 0 to 1, got 2.0"),
        ({"resolution": 8}, "data.resolution: expected 16 to 512"),
    ],
)
def test_wrong_options_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        datasets.create("domains", **options)
