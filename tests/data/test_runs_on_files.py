"""Whole runs on data sets that are read from files: two rounds, in this process."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import cifar10_binary, class_folders, four

import fedprompt
from fedprompt.core.errors import InputError
from fedprompt.runs.events import Note

Overrides = Callable[..., list[str]]


@pytest.fixture
def run(tiny: Overrides, tmp_path: Path) -> Callable[..., fedprompt.RunResult]:
    def two_rounds(name: str, *more: str, **options: Any) -> fedprompt.RunResult:
        overrides = tiny(f"data={name}", f"data.root={tmp_path / 'files'}", "partition=iid", *more)
        return fedprompt.run("digits", overrides, **options)

    return two_rounds


def test_imagefolder(run: Callable[..., fedprompt.RunResult], tmp_path: Path) -> None:
    class_folders(tmp_path / "files", ["."], ("ant", "bee"), 20, 40)
    result = run("imagefolder", "data.size=32")
    assert [report["round"] for report in result.reports] == [1, 2]
    assert 0 <= result.summary["accuracy"] <= 1


def test_cifar10(run: Callable[..., fedprompt.RunResult], tmp_path: Path) -> None:
    cifar10_binary(tmp_path / "files" / "cifar-10-batches-bin", per_batch=20)
    assert len(run("cifar10").reports) == 2


def test_fourdataset(run: Callable[..., fedprompt.RunResult], tmp_path: Path) -> None:
    four(tmp_path / "files")
    result = run("fourdataset", "data.size=32", "data.validation=0.25", "data.max_train=20")
    assert len(result.reports) == 2


def test_a_bad_image_ends_the_run_before_it_writes_anything(
    run: Callable[..., fedprompt.RunResult], tmp_path: Path
) -> None:
    class_folders(tmp_path / "files", ["."], ("ant", "bee"), 20, 32)
    (tmp_path / "files" / "ant" / "0007.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"0007\.png: the image does not decode"):
        run("imagefolder", "data.size=32")
    assert not (tmp_path / "run").exists()
    events: list[Any] = []
    skipping = ("imagefolder", "data.size=32", "data.on_bad_image=skip")
    assert len(run(*skipping, on_event=events.append).reports) == 2
    (note,) = [event.text for event in events if isinstance(event, Note)]
    assert re.search(r"imagefolder: 1 of \d+ \w+ images do not decode .*0007\.png", note)
