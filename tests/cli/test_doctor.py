"""`fedprompt doctor`: what it says is so, problems have a fix, and nothing is left behind."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from safetensors.torch import load_file, save_file

from fedprompt.cli import doctor
from fedprompt.cli.main import main
from fedprompt.config import compose
from fedprompt.models.nano import network as nano
from fedprompt.runtime.base import available_cpus

LIMITS = {name: getattr(doctor, name) for name in dir(doctor) if name.startswith("MIN_")}


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a cache and data folders that are not there yet."""
    path = tmp_path / "desk"
    path.mkdir()
    monkeypatch.chdir(path)
    monkeypatch.setenv("FEDPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FEDPROMPT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "400")  # nothing is folded
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in LIMITS:  # how much this machine has must not matter
        monkeypatch.setattr(doctor, name, 0)
    return path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments], prog_name="fedprompt")


def report(exit_code: int = 0) -> list[dict[str, str]]:
    """The findings of `fedprompt doctor --json`."""
    result = call("--json")
    assert result.exit_code == exit_code, result.output
    tree = json.loads(result.stdout)
    assert tree["quickstart"] is (exit_code == 0)
    for finding in tree["findings"]:
        assert finding.keys() == {"section", "name", "value", "state", "fix"}
        assert finding["state"] in ("ok", "warning", "problem")
        assert bool(finding["fix"]) == (finding["state"] != "ok")
        assert "\n" not in finding["value"] + finding["fix"]
    findings: list[dict[str, str]] = tree["findings"]
    return findings


def only(findings: list[dict[str, str]], state: str) -> dict[str, str]:
    """The one finding with a state that is not ok."""
    (found,) = [each for each in findings if each["state"] != "ok"]
    assert found["state"] == state
    return found


def value_of(findings: list[dict[str, str]], name: str) -> str:
    (found,) = [each["value"] for each in findings if each["name"] == name]
    return found


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def python_path() -> list[str]:
    return [each for each in [os.environ.get("PYTHONPATH")] if each]


def absent(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if packages were not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


# ---------------------------------------------------------------- a machine that is well


def test_json_names_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    findings = report()
    assert value_of(findings, "python") == f"{platform.python_version()} ({sys.executable})"
    for name in ("torch", "torchvision", "timm", "ray", "pytorch-lightning", "numpy"):
        assert value_of(findings, name) == importlib.metadata.version(name)
    cores = available_cpus()
    assert value_of(findings, "cpu cores") == f"{cores} usable of {os.cpu_count()}"
    threads = value_of(findings, "threads")
    assert threads.startswith("1 of torch here; OMP_NUM_THREADS=3")  # conftest sets one
    assert value_of(findings, "cuda") == "card 0, card 1"
    assert "available of" in value_of(findings, "main memory")
    assert value_of(findings, "feature cache") == f"{tmp_path / 'cache'}: 0 entries, 0 bytes"
    assert value_of(findings, "torch, torchvision, timm") == "imported together"
    # 1,087,360 parameters: docs/backbone.md
    assert value_of(findings, "weights of nano").startswith("1,087,360 parameters, sha256 ")
    assert value_of(findings, "cluster").startswith(f"a run starts its own with {cores} CPUs")
    assert value_of(findings, "data sets (FEDPROMPT_DATA)").startswith(f"{tmp_path / 'data'}: ")


def test_the_table_says_the_same_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "data" / "pacs").mkdir(parents=True)
    (tmp_path / "data" / "cifar10").mkdir()
    before = snapshot(tmp_path)
    result = call()
    assert result.exit_code == 0, result.output
    assert snapshot(tmp_path) == before
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[-1] == "The quickstart can run: fedprompt run quickstart"
    assert f"torch {importlib.metadata.version('torch')} ok" in lines
    assert any(line.endswith(f"{tmp_path / 'cache'}: 0 entries, 0 bytes ok") for line in lines)
    assert any(line.endswith(f"{tmp_path / 'data'}: cifar10, pacs ok") for line in lines)
    for finding in report():
        row = " ".join(f"{finding['name']} {finding['value']} ok".split())
        if finding["name"].startswith(("weights", "torch", "cpu", "cluster")):
            assert any(line.endswith(row) for line in lines), row


def test_the_narrow_table_keeps_every_word() -> None:
    buffer = io.StringIO()
    finding = doctor.Finding("disk", "feature cache", "#" * 100, "problem", "free [some] space")
    Console(file=buffer, width=60).print(doctor.render([finding]))
    text = "".join(buffer.getvalue().split())
    assert text.count("#") == 200  # in the table and below it
    assert "problem:featurecache:" in text
    assert "free[some]space" in text
    assert "Thequickstartcannotrununtiltheproblemsarefixed." in text


def test_the_size_of_the_cache_is_that_of_its_entries(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for key, sizes in (("a", (1000, 200)), ("b", (2300,))):
        entry = folder / (key * 64)
        entry.mkdir(parents=True)
        for number, size in enumerate(sizes):
            (entry / f"{number}.npy").write_bytes(bytes(size))
    (folder / "locks").mkdir()
    (folder / "notes.txt").write_bytes(bytes(5000))  # the user's own
    assert value_of(report(), "feature cache") == f"{folder}: 2 entries, 3.5 kB"


def test_memory_is_the_machine_s_or_the_container_s(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:  5000 kB\n")
    kb = 1024
    assert doctor.memory_bytes(meminfo, tmp_path) == (8000 * kb, 5000 * kb)
    (tmp_path / "memory.current").write_text(f"{500 * kb}\n")
    for limit, expected in (
        ("max\n", (8000 * kb, 5000 * kb)),
        (f"{2000 * kb}\n", (2000 * kb, 1500 * kb)),  # 500 of 2000 are used
        (f"{9000 * kb}\n", (8000 * kb, 5000 * kb)),  # more than the machine has
    ):
        (tmp_path / "memory.max").write_text(limit)
        assert doctor.memory_bytes(meminfo, tmp_path) == expected
    assert doctor.memory_bytes(tmp_path / "none", tmp_path / "none") == (None, None)


# ---------------------------------------------------------------- warnings: it can run


@pytest.mark.parametrize(("missing", "state"), [(0, "ok"), (1, "warning")])
def test_little_memory_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, missing: int, state: str
) -> None:
    limit = LIMITS["MIN_MEMORY"]
    monkeypatch.setattr(doctor, "MIN_MEMORY", limit)
    monkeypatch.setattr(doctor, "memory_bytes", lambda: (4 * 10**9, limit - missing))
    found = next(each for each in report() if each["name"] == "main memory")
    assert found["value"].endswith(" available of 4.0 GB")
    assert found["state"] == state
    assert ("runtime=serial" in found["fix"]) == (state == "warning")


def little_room(monkeypatch: pytest.MonkeyPatch, place: Path, free: int) -> None:
    real = shutil.disk_usage
    usage = types.SimpleNamespace(total=10**12, used=10**12 - free, free=free)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage if Path(path) == place else real(path)
    )


def test_a_full_disk_is_a_warning(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_DISK", 5001)
    little_room(monkeypatch, desk, 5000)
    found = only(report(), "warning")
    assert (found["name"], found["value"]) == ("free for runs", "5.0 kB")
    assert found["fix"] == f"free some space below {desk}"


def test_little_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path("/dev/shm")
    if not place.is_dir():
        pytest.skip("no shared memory of this kind")
    monkeypatch.setattr(doctor, "MIN_SHARED_MEMORY", LIMITS["MIN_SHARED_MEMORY"])
    little_room(monkeypatch, place, 64 * 10**6)  # Docker's own
    found = only(report(), "warning")
    assert (found["name"], found["value"]) == ("/dev/shm", "64.0 MB free")
    assert "--shm-size" in found["fix"]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_cache_that_is_a_file_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    monkeypatch.setenv("FEDPROMPT_CACHE", str(file / below))
    found = only(report(), "warning")
    assert found["value"] == f"{file} is no folder"
    assert "FEDPROMPT_CACHE" in found["fix"]
    assert file.read_text() == "mine"


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    # The superuser may write anywhere, so permissions alone would not do.
    locked = tmp_path / "locked"
    locked.mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and real(path, mode))
    monkeypatch.setenv("FEDPROMPT_CACHE", str(locked / below))
    found = only(report(), "warning")
    assert found["value"] == f"{locked} cannot be written"
    assert "cache.enabled=false" in found["fix"]


FORBIDDEN = """
import json, os, sys
from fedprompt.cli import doctor
if os.getuid() == 0:
    os.setuid(65534)
print(json.dumps(doctor.as_tree([*doctor.disk(), *doctor.data_sets()])))
"""


def test_folders_that_must_not_be_read_end_no_report(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    (locked / "cache").mkdir(parents=True)
    locked.chmod(0)
    environment = {
        **os.environ,
        "FEDPROMPT_CACHE": str(locked / "cache"),
        "FEDPROMPT_DATA": str(locked),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", FORBIDDEN],
            cwd="/",
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        locked.chmod(0o700)
    assert done.returncode == 0, done.stderr[-1500:]
    warnings = [each for each in json.loads(done.stdout)["findings"] if each["state"] == "warning"]
    assert "feature cache" in [each["name"] for each in warnings]


def test_without_ray_it_runs_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "ray")
    monkeypatch.setattr(doctor, "_installed", lambda package: package != "ray")
    findings = report()
    found = only(findings, "warning")
    assert (found["name"], found["value"]) == ("ray", "missing")
    assert "runtime=serial" in found["fix"]
    assert not [each for each in findings if each["section"] == "ray"]
    assert call("--ray").exit_code == 0


def test_the_other_backbone_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = nano.weights_path
    monkeypatch.setattr(
        nano, "weights_path", lambda name: tmp_path / name if name == "nano" else real(name)
    )
    assert only(report(), "warning")["name"] == "weights of nano"


# ---------------------------------------------------------------- problems: it cannot run


def test_a_missing_package_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "timm", "fedprompt")
    findings = [each for each in report(exit_code=1) if each["state"] != "ok"]
    states = {each["name"]: (each["value"], each["state"]) for each in findings}
    assert states == {"timm": ("missing", "problem"), "fedprompt": ("not installed", "warning")}
    assert "install timm, or run 'make setup'" in [each["fix"] for each in findings]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms\ndoes not exist"),
        OSError("libcudart.so: undefined symbol"),
        AttributeError("partially initialized module"),
        ImportError(),
    ],
)
def test_a_pair_that_does_not_import_together_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real = importlib.import_module

    def load(name: str, *more: Any) -> Any:
        if name == "torchvision":
            raise error
        return real(name, *more)

    monkeypatch.setattr(importlib, "import_module", load)
    found = only(report(exit_code=1), "problem")
    assert found["name"] == "torch, torchvision, timm"
    cause = " ".join(str(error).split()) or "ImportError"
    assert found["value"] == f"import fails: {cause}"
    assert "install a pair that was built together" in found["fix"]
    assert "'make setup'" in found["fix"]
    result = call()
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[-1] == "The quickstart cannot run until the problems are fixed."
    assert lines[-2] == f"problem: {found['name']}: {found['value']}; {found['fix']}"


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_a_package_that_is_broken_ends_in_a_report(
    tmp_path: Path, desk: Path, package: str
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise OSError('libbroken.so is missing')")
    done = subprocess.run(
        [sys.executable, "-m", "fedprompt", "doctor"],
        cwd=desk,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *python_path()])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr[-1500:]
    assert done.returncode == 1
    line = (
        "problem: torch, torchvision, timm: import fails: libbroken.so is missing; torch and "
        "torchvision do not match; install a pair that was built together"
    )
    assert line in done.stdout


@pytest.mark.parametrize("damage", ["missing", "torn", "not finite", "foreign"])
def test_bad_weights_are_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    needed = compose("quickstart").model.backbone
    real, bad = nano.weights_path, tmp_path / "needed.safetensors"
    if damage == "torn":
        bad.write_bytes(real(needed).read_bytes()[:-100])
    elif damage == "not finite":
        weights = load_file(real(needed))
        weights["vit.norm.bias"][0] = float("nan")
        save_file(weights, bad)
    elif damage == "foreign":
        save_file({"vit.cls_token": torch.zeros(3)}, bad)
    monkeypatch.setattr(nano, "weights_path", lambda name: bad if name == needed else real(name))
    found = only(report(exit_code=1), "problem")
    assert found["name"] == f"weights of {needed}"
    assert str(bad) in found["value"]
    assert "install fedprompt again" in found["fix"]


def test_a_folder_without_room_for_runs_is_a_problem(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != desk and real(path, mode))
    found = only(report(exit_code=1), "problem")
    assert (found["name"], found["value"]) == ("run folder", f"{desk} cannot be written")
    assert "run_dir=PATH" in found["fix"]


# ---------------------------------------------------------------- Ray


def test_the_address_of_a_cluster_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    assert value_of(report(), "cluster") == "RAY_ADDRESS=10.1.2.3:6379: runs join that cluster"


class FakeRay:
    """Remembers what it was asked for."""

    __spec__ = importlib.util.find_spec("ray")  # as of a module that is installed

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[str] = []
        self.settings: dict[str, Any] = {}

    def is_initialized(self) -> bool:
        return False

    def get_runtime_context(self) -> Any:
        return types.SimpleNamespace(get_node_id=lambda: "here")

    def nodes(self) -> list[Any]:
        return []

    def init(self, **settings: Any) -> None:
        self.calls.append("init")
        self.settings = settings
        if self.error:
            raise self.error

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 3.0, "GPU": 1.0, "memory": 2.5e9, "object_store_memory": 1.5e9}

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def put_in_place(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is imported of the real one's insides has been imported before."""
    importlib.import_module("ray._private.ray_constants")
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr("fedprompt.runtime.ray.local.import_ray", lambda: fake)


def test_ray_is_started_asked_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay()
    put_in_place(fake, monkeypatch)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    found = {each.name: (each.value, each.state) for each in doctor.ray_cluster()}
    assert found == {
        "CPU": ("3", "ok"),
        "GPU": ("1", "ok"),
        "memory": ("2.5 GB", "ok"),
        "object store memory": ("1.5 GB", "ok"),
    }
    assert fake.calls == ["init", "shutdown"]
    # Its own, even where RAY_ADDRESS names another.
    assert fake.settings["address"] == "local"
    assert fake.settings["num_cpus"] == available_cpus()


def test_a_cluster_that_does_not_start_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(RuntimeError("no ports\nleft"))
    put_in_place(fake, monkeypatch)
    (found,) = doctor.ray_cluster()
    assert (found.value, found.state) == ("does not start: no ports left", "warning")
    assert "runtime=serial" in found.fix
    assert fake.calls[-1] == "shutdown"


def test_the_real_ray_sees_this_machine_s_cores() -> None:
    import ray

    assert not ray.is_initialized()
    result = call("--json", "--ray")
    assert result.exit_code == 0, result.output
    findings = [each for each in json.loads(result.stdout)["findings"] if each["section"] == "ray"]
    assert value_of(findings, "CPU") == str(available_cpus())
    assert {each["state"] for each in findings} == {"ok"}
    assert not ray.is_initialized()
