"""A wheel and a source distribution carry all they need; the versions are those that are tested."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.utils import canonicalize_name
from packaging.version import Version

import fedprompt

ROOT = Path(__file__).parents[1]


def project_files() -> list[Path]:
    """What a clone of the working tree would hold, relative to its root."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        files = [Path(name) for name in listed.split("\0") if name]
    else:
        patterns = ("*.*", "LICENSE", "docs/*.py", "src/fedprompt/**/*", "conf/**/*")
        patterns += ("examples/**/*",)
        files = [path.relative_to(ROOT) for each in patterns for path in ROOT.glob(each)]
    return [path for path in files if (ROOT / path).is_file() and "__pycache__" not in path.parts]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("project")
    for path in project_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    left_behind = [ROOT / "build", ROOT / "dist"]
    before = [path.exists() for path in left_behind]
    folder = tmp_path_factory.mktemp("dist")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), str(copy)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert [path.exists() for path in left_behind] == before
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that holds the wheel and sees our dependencies."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # These come after the environment's own packages, and a .pth file inside them (that of an
    # editable fedprompt, say) has no effect.
    paths = sysconfig.get_paths()
    outer = dict.fromkeys(
        [paths["purelib"], paths["platlib"], str(Path(torch.__file__).parents[1])]
    )
    # `serial` is for machines without Ray: this one has none.
    lines = [*outer, "import sys; sys.modules['ray'] = None"]
    (packages / "dependencies.pth").write_text("".join(f"{line}\n" for line in lines))
    return folder / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(python), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1"},
        timeout=250,
    )


def test_the_wheel_holds_the_code_the_configs_and_the_weights(copy: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = copy / "src" / "fedprompt"
    shipped = [path for path in package.rglob("*") if path.suffix in (".py", ".safetensors")]
    shipped += [
        package / "py.typed",
        package / "cli/keys.json",
        *package.glob("models/nano/weights/*.json"),
    ]
    shipped += package.glob("report/templates/*")
    expected = {path.relative_to(copy / "src").as_posix() for path in shipped}
    expected |= {f"fedprompt/{path.relative_to(copy)}" for path in copy.glob("conf/**/*.yaml")}
    assert "fedprompt/conf/default.yaml" in expected
    assert "fedprompt/conf/experiment/quickstart.yaml" in expected
    assert names == expected


def test_the_version_has_one_source(copy: Path, wheel: Path) -> None:
    assert "version = attr: fedprompt.__version__" in (copy / "setup.cfg").read_text()
    assert wheel.name.startswith(f"fedprompt-{fedprompt.__version__}-py3-none-any")


def test_the_wheel_has_the_command_and_the_licence(copy: Path, wheel: Path) -> None:
    information = f"fedprompt-{fedprompt.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        entry_points = archive.read(f"{information}/entry_points.txt").decode()
        licences = [name for name in archive.namelist() if Path(name).name == "LICENSE"]
    assert "fedprompt = fedprompt.cli.main:main" in entry_points
    assert len(licences) == (copy / "LICENSE").is_file()


def test_a_package_index_can_show_the_readme(wheel: Path) -> None:
    """Nothing lies beside it there: no relative link, no relative picture."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"fedprompt-{fedprompt.__version__}.dist-info/METADATA").decode()
    fields, _, description = text.partition("\n\n")
    assert "Author: The fedprompt authors" in fields
    assert "Description-Content-Type: text/markdown" in fields
    assert "# fedprompt" in description and "fedprompt run quickstart" in description
    targets = re.findall(r"\]\(([^)\s]+)\)", description)
    assert targets and all(each.startswith("https://") for each in targets)
    assert "Project-URL" not in fields  # no address of the code is known


def test_where_the_address_of_the_code_is_known_links_lead_there(
    copy: Path, tmp_path: Path
) -> None:
    code = "from setuptools import build_meta as b; b.prepare_metadata_for_build_wheel('%s')"
    result = subprocess.run(
        [sys.executable, "-c", code % tmp_path],
        cwd=copy,
        capture_output=True,
        text=True,
        env={**os.environ, "FEDPROMPT_REPOSITORY": "https://host.example/me/fedprompt/"},
    )
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("*.dist-info/METADATA")
    text = path.read_text()
    assert "Project-URL: Source, https://host.example/me/fedprompt\n" in text
    assert "(https://host.example/me/fedprompt/raw/HEAD/docs/images/terminal.svg)" in text
    assert (
        "(https://host.example/me/fedprompt/blob/HEAD/docs/benchmark.md#what-limits-pfpt)" in text
    )


def test_the_source_distribution_holds_what_its_tests_need(copy: Path, tmp_path: Path) -> None:
    code = "from setuptools import build_meta as b; print(b.build_sdist('%s'))"
    result = subprocess.run(
        [sys.executable, "-c", code % tmp_path], cwd=copy, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = (each for each in tmp_path.iterdir() if each.is_dir())
    held = {each.relative_to(folder) for each in folder.rglob("*") if each.is_file()}
    if (ROOT / ".git").exists() and shutil.which("git"):
        assert set(project_files()) <= held
    # Those that read most of its files, without the package of this checkout.
    tests = ("tests/test_docs.py",)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "--noconftest", "-x", *tests],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(folder / "src")},
        timeout=250,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def lock_program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / ".ci" / "lock.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(name: str) -> dict[str, str]:
    """Versions of a file of constraints, by canonical name."""
    lines = [line.split("#")[0].split(";")[0] for line in (ROOT / name).read_text().splitlines()]
    return {
        canonicalize_name(line.split("==")[0]): line.split("==")[1].strip()
        for line in lines
        if "==" in line
    }


def test_the_lock_holds_all_that_is_installed_for_the_tests() -> None:
    """`make setup` in an empty environment gets these versions; `make lock` writes them down."""
    lock, locked = lock_program(), pins("constraints.lock")
    installed = lock.closure(lock.declared(["dev"]))
    assert len(installed) > 100
    wrong = [
        f"{name} {each.version}"
        for name, each in installed.items()
        if locked.get(name) != Version(each.version).public
    ]
    assert not wrong, f"{', '.join(wrong)}: not what constraints.lock says; run make lock"
    chosen = pins("constraints.txt")
    assert len(chosen) > 25
    assert {name: locked.get(name) for name in chosen} == chosen, "run make lock"


def test_upper_bounds_are_the_versions_that_are_tested() -> None:
    chosen = pins("constraints.txt")
    bounds = {each.name: each.specifier for each in lock_program().declared([])}
    for name in ("ray", "torch", "timm"):
        assert f"<={chosen[name]}" in str(bounds[name]).split(",")
        assert chosen[name] in bounds[name]


def test_the_fresh_environment_uses_the_wheel(python: Path, tmp_path: Path) -> None:
    code = "import fedprompt; print(fedprompt.__file__); print(fedprompt.__version__)"
    result = run(python, tmp_path, "-c", code)
    file, version = result.stdout.splitlines()
    assert python.parents[1] in Path(file).parents
    assert version == fedprompt.__version__


def test_the_wheel_runs_in_an_empty_folder(
    python: Path, copy: Path, medmnist: Path, tmp_path: Path, random_backbone: str
) -> None:
    weights = copy / "src/fedprompt/models/nano/weights/nano.safetensors"
    more = [] if weights.is_file() else [f"model.backbone={random_backbone}"]
    plugins = (copy / "examples").glob("*.py")
    folder = tmp_path / "empty"
    folder.mkdir()
    result = run(
        python,
        folder,
        *("-m", "fedprompt", "run", "digits", "rounds=2", "compare=[]", "clients.epochs=1"),
        *("clients.count=4", "clients.per_round=2", "runtime=serial", *more),
        # With the plug-ins of `examples/`, which are not in the wheel.
        *(f"plugins={json.dumps([str(path) for path in sorted(plugins)])}", "data=medmnist"),
        *(f"data.root={medmnist}", "objective=fedcm", "aggregator=trimmed_mean"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert [path.name for path in folder.iterdir()] == ["runs"]
    (run_dir,) = (folder / "runs").iterdir()
    lines = (run_dir / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert f"state sha256: {summary['state_sha256']}" in result.stdout
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["packages"]["fedprompt"] == fedprompt.__version__
    kept = [record["copy"] for record in manifest["plugins"]]
    assert kept == [f"plugins/{n}.py" for n in ("fedcm", "fedproto", "medmnist", "trimmed_mean")]
    expected = {"config.yaml", "status.json", "state", "figures", "report.html", "plugins"}
    assert expected <= {path.name for path in run_dir.iterdir()}
