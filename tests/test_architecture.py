"""The order of the rooms: a file imports only from rooms below its own, or from its own room."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedprompt

PACKAGE = Path(fedprompt.__file__).parent
ROOMS = [
    *("core", "aggregation", "objectives", "prompt_generators", "attacks", "defences"),
    *("data", "models", "client"),
    *(
        "server",
        "runtime",
        "tracking",
        "config",
        "runs",
        "report",
        "results",
        "experiment",
        "sweep",
        "fetch",
        "cli",
    ),
    "__main__",
]
"""From the ground up."""
ROOMS_OF_DATA = ["task", "stratified", "drawing", "reading", "partition", "prefix", "sets"]
"""The same within `data`."""


def imported_modules(path: Path) -> set[str]:
    """Dotted names below `fedprompt` that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.removeprefix("fedprompt.") for name in names if name.startswith("fedprompt.")}


def room_of(path: Path) -> list[str]:
    return [part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts]


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    own, *inner = room_of(path)
    assert own in ROOMS, f"{own} has no place: add it to ROOMS"
    for module in sorted(imported_modules(path)):
        room, *rest = module.split(".")
        if room in ("__version__", "run"):  # what the package itself offers
            continue
        assert ROOMS.index(room) <= ROOMS.index(own), f"{own} imports {module}"
        if room == own == "data" and inner[0] != "__init__":
            assert ROOMS_OF_DATA.index(rest[0]) <= ROOMS_OF_DATA.index(inner[0]), module


def test_the_check_sees_an_upward_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from fedprompt.server.round import run_round\nfrom fedprompt import cli\n")
    assert imported_modules(bad) == {"server.round.run_round", "cli"}


def test_every_room_says_what_lives_there() -> None:
    folders = {path.parent for path in files()} - {PACKAGE}
    bare = [
        folder.name
        for folder in folders
        if not ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    ]
    assert bare == []


HEAVY = ["ray", "pytorch_lightning", "timm"]
STAY_OUT = [
    ("import fedprompt.aggregation", HEAVY),
    # A wrong call, and a sweep of which a cell is wrong, are refused without waiting for them.
    ("import fedprompt.cli.main, fedprompt.experiment", [*HEAVY, "torchvision"]),
    ("from fedprompt.sweep.space import load_sweep; load_sweep('alpha_prompts').trials()", HEAVY),
    ("import fedprompt.sweep.ray_tune", ["ray", "timm"]),
    ("import fedprompt.runtime.serial", ["ray"]),
    ("import fedprompt.results", ["ray"]),
    (
        "from fedprompt.cli.estimate import make_estimate; from fedprompt.config import compose; "
        "make_estimate(compose('digits', ['compare=[head_only]', 'method=fedcof']))",
        ["ray"],
    ),
]
"""What is done one after the other in one new process, and what that must not import."""


def test_heavy_packages_stay_out() -> None:
    lines = ["import sys"]
    for code, forbidden in STAY_OUT:
        lines += [code, f"print([name for name in {forbidden!r} if name in sys.modules])"]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    found = dict(zip(dict(STAY_OUT), result.stdout.splitlines(), strict=True))
    assert found == {code: "[]" for code, _ in STAY_OUT}


def test_timm_is_used_by_models_alone() -> None:
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "timm"
    }
    assert users == {"models"}


NAMELESS = [
    *("client", "server", "objectives", "prompt_generators", "attacks", "defences", "models"),
    *("runtime", "runs"),
]
"""Rooms through which tensors travel."""
FOREIGN = {
    "models/dinov2_onnx.py": "tensors of a graph",
    "models/timm_vit.py": "files of timm",
    "models/torchvision_weights.py": "files of torchvision",
    "models/nano/network.py": "files of weights",
    "models/nano/pretrain.py": "files of weights",
    "runtime/ray/nodes.py": "names of nodes",
    "runtime/ray/local.py": "names of folders",
    "runtime/ray/private.py": "names of nodes and folders",
    "runs/catalogue.py": "names of folders",
    "runs/directory.py": "names of files",
}
"""Files that may ask how a name begins, as it is no name of a tensor that travels."""


def asks_how_a_name_begins(path: Path) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr in ("startswith", "removeprefix")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )


def test_no_code_asks_how_a_tensor_s_name_begins() -> None:
    """What a tensor is says its field: the one mapping of fields to paths is `core.types`."""
    asking = {
        path.relative_to(PACKAGE).as_posix()
        for path in (*files(), PACKAGE / "core" / "types.py")
        if room_of(path)[0] in NAMELESS or path.name == "types.py"
        if asks_how_a_name_begins(path)
    }
    assert asking <= FOREIGN.keys()
