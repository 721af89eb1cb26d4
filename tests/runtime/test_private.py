"""Private parts of Ray: each may be missing, and none is used elsewhere."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import ray

import fedprompt
from fedprompt.runtime.ray import private

OPTIONS = private.local_options("folder", 3)


class FakeRay:
    """`ray.init` of a version that lacks some options, or whose processes refuse some flags."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lacks: set[str], refuses: str = "") -> None:
        self.started_with: dict[str, Any] | None = None
        self.lacks, self.refuses = lacks, refuses
        monkeypatch.setattr(ray, "init", self.init)
        monkeypatch.setattr(ray, "shutdown", lambda: None)

    def init(self, **options: Any) -> None:
        unknown = [name for name in options if name in self.lacks]
        if unknown:
            raise RuntimeError(f"Unknown keyword argument(s): {', '.join(unknown)}")
        if self.refuses in options.get("_system_config", {}):
            raise ValueError(f"a process ended: unknown flag {self.refuses}")
        self.started_with = options


@pytest.mark.parametrize(
    ("lacks", "refuses", "left"),
    [
        (set(), "", set(OPTIONS)),
        ({"_temp_dir"}, "", {"_node_ip_address", "_system_config"}),
        (set(OPTIONS), "", set()),
        (set(), "enable_worker_prestart", {"_node_ip_address", "_temp_dir"}),
        ({"_node_ip_address"}, "preload_python_modules", {"_temp_dir"}),
    ],
)
def test_ray_starts_without_options_that_it_does_not_have(
    monkeypatch: pytest.MonkeyPatch, lacks: set[str], refuses: str, left: set[str]
) -> None:
    fake = FakeRay(monkeypatch, lacks, refuses)
    private.start({"num_cpus": 1}, OPTIONS)
    assert fake.started_with == {"num_cpus": 1, **{name: OPTIONS[name] for name in left}}


def test_another_error_of_the_start_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        calls.append(options)
        raise RuntimeError("no room")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(RuntimeError, match="no room"):
        private.start({}, {})
    with pytest.raises(RuntimeError, match="no room"):
        private.start({}, OPTIONS)
    assert len(calls) == 3  # the last once more without the flags of processes


@pytest.mark.parametrize(
    "module",
    [
        "ray._private.grpc_utils",
        "ray.core.generated.node_manager_pb2",
        "ray.core.generated.node_manager_pb2_grpc",
        "ray.core.generated.common_pb2",
        "ray.core.generated.runtime_environment_pb2",
    ],
)
def test_no_spare_workers_come_where_their_modules_are_missing(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert private.prestart("127.0.0.1:1", 1) is False


def test_a_ray_without_the_flag_keeps_no_spare_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in private.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert private.spare_workers_are_kept()
    monkeypatch.delenv(private.SWITCH)
    assert not private.spare_workers_are_kept()


def test_the_head_is_known_by_its_address_where_it_has_no_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = types.SimpleNamespace(gcs_address="10.0.0.7:6379")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    assert private.head_resource(["CPU", private.HEAD]) == private.HEAD
    assert private.head_resource(["CPU", "node:10.0.0.7"]) == "node:10.0.0.7"


def test_private_parts_of_ray_stand_in_one_file() -> None:
    names = ("ray._", "ray.core", "internal_head", *(f'"{name}"' for name in OPTIONS))
    files = Path(fedprompt.__file__).parent.rglob("*.py")
    found = {path.name for path in files if any(name in path.read_text() for name in names)}
    assert found == {"private.py"}
