"""The linear probe of `benchmarks.real`, on features whose accuracy is known by construction."""

from __future__ import annotations

import numpy as np

from benchmarks.real.probe import Features, probe_style, splits_of
from fedprompt.data.task import Split, Task


def toy() -> Task:
    """Two classes in two domains, 20 images each; pixels do not matter."""
    labels, groups = np.tile([0, 1], 40), np.repeat([0, 1], 40)
    split = Split(np.zeros((80, 2, 2, 3), np.uint8), labels, groups)
    return Task("toy", ("a", "b"), ("x", "y"), split, split, split)


def test_a_domain_in_which_the_sign_is_turned() -> None:
    """The class is the sign of the number in domain x, its opposite in domain y: a head of the
    domain's own is always right, one of the other domain always wrong, and one for both, which
    cannot see the domain, is right for half.
    """
    task = toy()
    signs = (2.0 * task.train.labels - 1) * (1 - 2 * task.train.groups)
    rows = signs[:, None]
    features = Features(task, dict.fromkeys(splits_of(task), rows))
    one = features.fitted({0, 1})
    found = [probe_style(features, number, one, 2) for number in (0, 1)]
    assert [each["own"] for each in found] == [1.0, 1.0]
    assert [each["other four"] for each in found] == [0.0, 0.0]
    assert features.accuracy(one, {0, 1}) == 0.5
