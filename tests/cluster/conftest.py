"""A cluster's tests: a tiny experiment, and its state hash from one process."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

import fedprompt

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.cluster)


def experiment_of(backbone: str, folder: Path, *more: str) -> list[str]:
    return [
        "rounds=3",
        "eval_every=3",
        "compare=[]",
        "clients.count=6",
        "clients.per_round=4",
        "clients.epochs=1",
        "prompts.count=2",
        "prompts.pool=null",
        f"model.backbone={backbone}",
        f"run_dir={folder}",
        *more,
    ]


@pytest.fixture(scope="session")
def straight(random_backbone: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """State hash of the tiny experiment in one process."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    overrides = experiment_of(random_backbone, folder, "runtime=serial")
    return str(fedprompt.run("digits", overrides).summary["state_sha256"])


def session_members(session: int) -> list[int]:
    """Live processes of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(folder.name)) == session:
                state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
                if state != "Z":
                    found.append(int(folder.name))
    return found


def assert_all_gone(session: int, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while session_members(session) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert session_members(session) == []
