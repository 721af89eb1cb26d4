"""Whole runs on a simulated GPU end in the state of the CPU; a driver without one says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import fedprompt
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.runs.federation import prepare
from simulated_gpu import fused_optimizers, simulated_gpu

Overrides = Callable[..., list[str]]
SMALL = "data={name: domains, train: 80, validation: 40, test: 40, public: 80}"
RUNS = {
    "packed": (),
    "frozen head, whitened queries": (
        *("runtime.pack=1", SMALL, "head=frozen", "prompts.whiten=true"),
    ),
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_run_ends_in_the_state_of_the_cpu(
    changes: tuple[str, ...], tiny: Overrides, tmp_path: Path
) -> None:
    """Prefix, head, rounds and evaluation; `pack=auto` is the whole cohort of three on a GPU."""
    with fused_optimizers():
        pack = changes or ("runtime.pack=3",)
        expected = fedprompt.run("digits", tiny(*changes, pack[0], f"run_dir={tmp_path / 'cpu'}"))
        with simulated_gpu() as gpu:
            found = fedprompt.run("digits", tiny(*changes, "runtime.device=cuda"))
    assert gpu.operations > 1000
    assert found.state.sha256() == expected.state.sha256()
    assert found.reports[-1]["accuracy"] == expected.reports[-1]["accuracy"]
    packs = {client["pack"] for client in found.reports[-1]["clients"]}
    assert packs == ({1} if changes else {3})


def test_a_driver_without_a_gpu_says_so_before_anything_is_written(
    tiny: Overrides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster this process does not know what the driver's node has."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    config = compose("digits", tiny("runtime=ray", "runtime.device=cuda"))
    with pytest.raises(ConfigError, match=r"^runtime.device=cuda: expected .*, got .*; set .*$"):
        prepare(config)
    assert not (tmp_path / "run").exists()
