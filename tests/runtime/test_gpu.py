"""What `runtime.device=cuda` decides, without a GPU."""

from __future__ import annotations

import dataclasses
import pickle
import types
from typing import Any

import pytest
import torch

from fedprompt.client.loop import make_fabric
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.runtime import RuntimeOptions
from fedprompt.runtime.placement import Node
from fedprompt.runtime.ray import actors, nodes, pool
from simulated_gpu import GPU, simulated_gpu


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray and torch say of a machine with eight cores and a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for module in (nodes, pool):
        monkeypatch.setattr(module, "available_nodes", lambda: [Node(8, gpus=1)])


@pytest.mark.parametrize("name", ["ray", "serial"])
def test_without_a_gpu_cuda_is_refused_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"^runtime.device=cuda: no CUDA device was found; use"):
        RuntimeOptions(name, device="cuda")


def test_a_cluster_knows_its_gpus_itself_and_serial_is_on_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert RuntimeOptions("ray", device="cuda").torch_device == "cuda"
    with pytest.raises(ConfigError, match="no CUDA device was found"):
        RuntimeOptions("serial", device="cuda")


def test_auto_is_settled_by_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    options = RuntimeOptions("serial")
    assert (options.settled().device, options.settled().pack) == ("cpu", 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert (options.settled().device, options.settled().pack) == ("cuda", "auto")
    assert dataclasses.replace(options, gpus_per_actor=0).settled().device == "cpu"


@pytest.mark.parametrize(
    ("actors", "jobs", "size"),
    [(1, 10, 10), (4, 10, 3), (3, 2, 1)],  # the jobs dealt to the actors, rounded up
)
def test_a_gpu_packs_all_clients_of_an_actor(
    actors: int, jobs: int, size: int, one_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # more actors than this machine has cores for
    options = RuntimeOptions(device="cuda", actors=actors)
    recipe = compose("digits").recipe(10)
    assert options.pack_size(jobs, recipe) == size
    assert options.pack_size(jobs, dataclasses.replace(recipe, tuning="lora")) == 1
    # Serial has one worker, however many cores there are.
    assert RuntimeOptions("serial", cpus=1, threads=1).pack_size(jobs, recipe) == jobs
    several = dataclasses.replace(options, name="serial", actors=None)
    assert several.pack_size(jobs, recipe) == jobs


class RecordingRay:
    """Notes what actors reserve."""

    reserved: list[dict[str, Any]]

    def __init__(self) -> None:
        type(self).reserved = []
        self.util = types.SimpleNamespace(get_current_placement_group=lambda: None)

    def remote(self, **resources: Any) -> Any:
        self.reserved.append(resources)
        return lambda actor: types.SimpleNamespace(remote=lambda *_: object())


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"actors": 3}, 0.25),  # three client actors and the driver
        ({"actors": 1}, 0.5),
        ({"actors": 2, "gpus_per_actor": 0.3}, 0.3),
        ({"actors": 2, "gpus_per_actor": 0}, 0.0),
        ({"actors": 2, "device": "cpu"}, 0.0),
    ],
)
def test_what_ray_is_asked_for(
    options: dict[str, Any], share: float, one_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client actors and driver reserve the same share of the GPU."""
    monkeypatch.setattr(pool, "import_ray", RecordingRay)
    runtime = pool.RayRuntime(RuntimeOptions(**options))
    runtime.warm_up()
    assert [each["num_gpus"] for each in RecordingRay.reserved] == [share]
    assert len(runtime._actors) == options["actors"]
    assert nodes.gpu_of_driver(runtime.options) == share


@dataclasses.dataclass(frozen=True)
class Setup:
    """In place of a `WorkerSetup`: its worker is its device."""

    device: str

    def build(self) -> Any:
        return types.SimpleNamespace(device=torch.device(self.device))


@pytest.mark.parametrize("there", [True, False])
def test_an_actor_without_a_gpu_computes_on_the_cpu(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr(actors, "import_ray", lambda: types.SimpleNamespace(get=lambda each: each))
    worker = actors.ClientActor(1)._load([pickle.dumps(Setup("cuda"))])
    assert worker.device.type == ("cuda" if there else "cpu")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_fabric_of_a_gpu(precision: str) -> None:
    with simulated_gpu():
        fabric = make_fabric("cuda", precision)
        assert fabric.device == GPU
        matrix = torch.ones(2, 2, device=fabric.device)
        with fabric.autocast():
            product = matrix @ matrix
    assert product.dtype == (torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
