"""benchmarks/real/combination.py: its features and heads are those of runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import fedprompt
from benchmarks.real import combination
from fedprompt.config import compose
from fedprompt.core.errors import RoundError
from fedprompt.runs.federation import prepare


def test_features_and_heads_are_those_of_runs(
    tiny: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` itself asserts that the run's head on its features has the run's accuracy."""
    keyed = tiny("prompts.pool=3", "prompts.selection=keyed", "clients.per_round=6")
    overrides = [each for each in keyed if not each.startswith("run_dir")]
    monkeypatch.setattr(combination, "experiment_of", lambda: compose("digits", overrides).tree())
    changes = combination.changes_of("fixed head", 0.01, 0)
    federation = prepare(compose(combination.experiment_of(), changes))
    found = combination.run(federation, "fixed head", 0.01, 0)
    fedcof = fedprompt.run(
        "digits", [*tiny("clients.per_round=6", "prompts.count=0"), "method=fedcof"]
    )
    assert found["fedcof"]["test"] == pytest.approx(fedcof.summary["accuracy"])
    assert 0 < found["solved again"]["test"] < 1


def test_a_head_of_one_class_a_client_is_refused() -> None:
    features = torch.randn(4, 3)
    parts = [np.array([0, 1]), np.array([2, 3])]
    with pytest.raises(RoundError, match="class that two clients hold"):
        combination.closed_form_head(features, np.array([0, 0, 1, 1]), parts, 2)
