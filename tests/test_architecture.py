"""The levels of the design: a file imports only from lower levels or its own folder."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedprompt

PACKAGE = Path(fedprompt.__file__).parent
LEVELS = {
    0: ["types", "errors", "checks", "registry", "seeding", "machine"],
    1: ["aggregation", "objectives", "generators", "models", "data"],
    2: ["client", "server"],
    3: ["runtime"],
    4: [
        *("config", "events", "driver", "experiment", "frozen_head", "checkpoint", "records"),
        *("report", "display", "pretrain", "preview", "doctor", "bench", "cli", "__main__"),
        *("sweep", "sweep_figures", "tuning"),
    ],
}
# `server` evaluates and briefs clients, so it may use `client`, which knows nothing of it.
ALLOWED = {("server", "client")}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names}


def imported_parts(path: Path) -> set[str]:
    """First-level names under `fedprompt` that a file imports."""
    parts: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
            if node.module == "fedprompt":
                names = [f"fedprompt.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("fedprompt.")}
    return parts


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in LEVEL_OF, f"{own} has no level: add it to LEVELS"
    for part in imported_parts(path):
        lower = LEVEL_OF[part] < LEVEL_OF[own]
        # The modules of the top level wire each other together.
        same = part == own or LEVEL_OF[own] == LEVEL_OF[part] in (0, 4) or (own, part) in ALLOWED
        assert lower or same, f"{own} (level {LEVEL_OF[own]}) imports {part}"


def test_the_check_sees_an_upward_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from fedprompt.server.round import run_round\nfrom fedprompt import cli\n")
    assert imported_parts(bad) == {"server", "cli"}


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("fedprompt.aggregation", ["ray", "pytorch_lightning", "timm"]),
        ("fedprompt.runtime.serial", ["ray"]),
        # A wrong call is refused without waiting for them.
        (
            "fedprompt.cli, fedprompt.experiment",
            ["ray", "pytorch_lightning", "timm", "torchvision"],
        ),
    ],
)
def test_heavy_packages_stay_out(module: str, forbidden: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_timm_is_used_by_models_alone() -> None:
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "timm"
    }
    assert users == {"models"}
