"""One compared run without loggers and callbacks, which those with some are measured against."""

from __future__ import annotations

import pytest

import fedprompt
from fedprompt.experiment import RunResult


@pytest.fixture(scope="session")
def settings(random_backbone: str) -> list[str]:
    """Overrides that make `quickstart` tiny, without a run directory."""
    return [
        *("rounds=3", "compare=[fedavg_pt]", "clients.count=6", "clients.per_round=2"),
        *("clients.epochs=1", "clients.batch_size=64", "prompts.count=2", "prompts.pool=null"),
        *("eval_every=2", "data={name: digits, train: 0.05, validation: 0.05, test: 0.05}"),
        *("runtime=serial", f"model.backbone={random_backbone}"),
    ]


@pytest.fixture(scope="session")
def plain(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return fedprompt.run("digits", [*settings, f"run_dir={folder}"])
