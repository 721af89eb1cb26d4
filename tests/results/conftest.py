"""Runs that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import SMALL, VARIANTS

import fedprompt

Overrides = Callable[..., list[str]]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp("runs") / "run" for name in VARIANTS}


@pytest.fixture
def run_of(runs: dict[str, Path], tiny: Overrides) -> Callable[[str], Path]:
    """The folder of a variant's run, which is made once."""

    def make(name: str) -> Path:
        if not runs[name].exists():
            changes = [*SMALL, "clients.count=6", "clients.per_round=3", "rounds=2", "head=linear"]
            changes += ["eval_clients=last", f"run_dir={runs[name]}", *VARIANTS[name]]
            fedprompt.run("domains", tiny(*changes))
        return runs[name]

    return make
