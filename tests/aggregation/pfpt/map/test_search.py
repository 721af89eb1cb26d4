"""How long the search goes on where the matching is in doubt."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedprompt import aggregation
from fedprompt.aggregation.pfpt.map import search


def in_doubt() -> list[torch.Tensor]:
    """Ten true prompts at ten clients with so much noise that the matching is in doubt."""
    draws = np.random.default_rng(0)
    true = draws.standard_normal((10, 64))
    return [
        torch.from_numpy(true[draws.permutation(10)] + 2 * draws.standard_normal((10, 64)))
        for _ in range(10)
    ]


def test_annealings_that_raise_nothing_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[search.Search] = []

    def nothing(start: search.Search, *_: object) -> search.Search:
        made.append(start)
        return start

    monkeypatch.setattr(search, "annealed", nothing)
    monkeypatch.setattr(search, "regrouped", nothing)
    aggregation.create("pfpt", restarts=8).aggregate(in_doubt())
    assert len(made) == search.STALE_ANNEALINGS + 1  # the last one is the regrouping


def test_an_annealing_that_raises_the_objective_gives_more_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[float] = []

    def better(start: search.Search, *_: object) -> search.Search:
        made.append(start.objective)
        raised = start.objective + 1.0 if len(made) < 4 else start.objective
        return search.Search(start.columns, start.model, (*start.history, raised), start.sweeps)

    monkeypatch.setattr(search, "annealed", better)
    monkeypatch.setattr(search, "regrouped", lambda best, *_: best)
    aggregation.create("pfpt", restarts=8).aggregate(in_doubt())
    assert len(made) == 3 + search.STALE_ANNEALINGS


def test_regroupings_that_raise_nothing_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    ascend = search.ascend

    def counted(columns: search.Columns, *rest: object) -> search.Search:
        tried.append(len(columns.live()))
        return ascend(columns, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(search, "ascend", counted)
    monkeypatch.setattr(search, "rises", lambda before, after: False)
    aggregation.create("pfpt", restarts=8).aggregate(in_doubt())
    assert len(tried) == search.STALE_REGROUPINGS
