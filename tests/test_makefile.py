"""The make targets: a line of help each, and one clear line where no suitable Python exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SET_UP_FROM = (
    *("Makefile", "setup.cfg", "setup.py", "pyproject.toml"),
    *("constraints.txt", "constraints.lock"),
)
# What the recipes call, beside Python; `make` itself starts /bin/sh.
TOOLS = ("awk", "grep", "rm", "find", "test", "touch")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # Without the flags and variables of a `make test` that runs this suite.
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "VENV", "ARGS", "EXPERIMENT")
    }
    return subprocess.run(
        [str(shutil.which("make")), "-C", str(folder), "--no-print-directory", *arguments],
        capture_output=True,
        text=True,
        env={**kept, **environment},
        timeout=60,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make setup` reads, in a folder where nothing can be spoilt."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SET_UP_FROM:
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with what the Makefile calls, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        path = shutil.which(name)
        if path is not None:
            (folder / name).symlink_to(path)
    return folder


def phony() -> list[str]:
    (line,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    names: list[str] = line.split()
    return names


def test_help_has_a_line_for_every_target() -> None:
    result = make(ROOT, "help")
    assert (result.returncode, result.stderr) == (0, "")
    lines = [re.fullmatch(r"  make (\S+) +(\S.*)", line) for line in result.stdout.splitlines()]
    assert None not in lines, result.stdout
    assert sorted(line[1] for line in lines if line) == sorted(phony())


def test_help_is_what_make_says_alone() -> None:
    assert make(ROOT).stdout == make(ROOT, "help").stdout


def test_the_targets_of_the_design_exist() -> None:
    assert {"setup", "run", "test", "lint", "typecheck", "bench", "clean", "help"} <= set(phony())


@pytest.mark.parametrize("target", ["setup", "run", "test"])
def test_without_a_python_it_says_so(checkout: Path, tools: Path, target: str) -> None:
    result = make(checkout, target, PATH=str(tools))
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith("error: no Python 3.10, 3.11 or 3.12 found")
    assert "PYTHON=" in errors[0]
    assert sorted(path.name for path in checkout.iterdir()) == sorted(SET_UP_FROM)


def test_a_python_of_another_version_is_passed_over(checkout: Path, tools: Path) -> None:
    too_old, suitable = tools / "python3", tools / "python3.11"
    too_old.write_text("#!/bin/sh\nexit 1\n")
    too_old.chmod(0o755)
    assert "no Python 3.10" in make(checkout, "setup", PATH=str(tools)).stderr
    suitable.symlink_to(sys.executable)
    result = make(checkout, "--dry-run", "setup", PATH=str(tools))
    assert result.returncode == 0
    assert "python3.11 -m venv .venv" in result.stdout


def test_a_python_can_be_given(checkout: Path, tools: Path) -> None:
    arguments = ("--dry-run", "setup", "PYTHON=/opt/my/python", "VENV=elsewhere")
    result = make(checkout, *arguments, PATH=str(tools))
    assert result.returncode == 0
    assert "/opt/my/python -m venv elsewhere" in result.stdout
    assert "elsewhere/bin/python -m pip install" in result.stdout


def test_clean_keeps_what_is_not_its_own(checkout: Path, tools: Path) -> None:
    for name in ("src", "tests", "benchmarks"):
        (checkout / name / "__pycache__").mkdir(parents=True)
    for name in (".venv", "build", "runs", "src/fedprompt.egg-info"):
        (checkout / name).mkdir()
    assert make(checkout, "clean", PATH=str(tools)).returncode == 0
    left = sorted(path.name for path in checkout.iterdir())
    assert left == sorted([*SET_UP_FROM, "src", "tests", "benchmarks", "runs"])
    assert not list((checkout / "src").iterdir())
