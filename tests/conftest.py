"""Shared fixtures: a backbone with random weights, and the smallest whole experiment."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from small_data import FEW_DIGITS

# Before anything starts worker processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers are as nice as the tests: by default (15) the tests beside them starve them.
os.environ.setdefault("RAY_worker_niceness", "0")

ONE_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
)
"""A whole PNG file."""
LONGEST = ("test_runtimes.py", "test_methods.py", "test_packed.py", "test_cli.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--plugin FILE`: the tests that run on all registered entries run on a plug-in's, too."""
    parser.addoption("--plugin", action="append", default=[], help="a plug-in to test (repeatable)")


def pytest_configure(config: pytest.Config) -> None:
    from fedprompt.core.plugins import load_plugins

    load_plugins(config.getoption("--plugin"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that the two processes end at about the same time."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    import torch  # here and below: the process that only hands tests out does without

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def pictures_are_not_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in the tests' own process leave out what takes a third of a tiny run: they do not draw
    their figures, and lay them out only in a test that is marked `figures`. test_report.py and the
    runs in other processes do both.
    """
    from fedprompt.report import figures

    monkeypatch.setattr(figures, "png_bytes", lambda figure: ONE_PIXEL)
    if request.node.get_closest_marker("figures") is None:
        for name in (name for name in vars(figures) if name.endswith("_figure")):
            monkeypatch.setattr(figures, name, lambda data: None)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's prefix cache is left alone; the tests of a session share one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPROMPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def forgotten_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test loads as plug-ins is unknown to the next; no installed package offers any."""
    from fedprompt.client.callbacks import callbacks
    from fedprompt.config import LISTS, REGISTRIES
    from fedprompt.core import plugins

    modules = set(sys.modules)
    for group, registry in {**REGISTRIES, **LISTS, "callback": callbacks}.items():
        if group != "runtime":  # would import Ray, and no test adds one
            registry._scan()
            monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for name in ("_plugins", "_copies"):
        monkeypatch.setattr(plugins, name, {})
    monkeypatch.setattr(plugins, "_installed", None)
    monkeypatch.setattr(plugins, "_failures", [])
    monkeypatch.setattr(plugins.importlib.metadata, "entry_points", lambda group: ())
    yield
    for name in set(sys.modules) - modules:
        if name.startswith((plugins.FILE_MODULE, "outside_")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """One Ray for the tests of a file that can share it."""
    from fedprompt.runtime.ray.local import start_ray, stop_ray

    # Ray starts a worker for each CPU, and one for the driver, and imports everything in each:
    # here none that nobody needs. More client actors than CPUs share them.
    start_ray(1, verbose=False)
    yield
    stop_ray()


@pytest.fixture(scope="session")
def random_backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of nano weights that were never trained."""
    import torch
    from safetensors.torch import save_file

    from fedprompt.models.nano import network as nano

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = nano.build()
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file({f"vit.{key}": value.half() for key, value in vit.state_dict().items()}, path)
    return str(path)


@pytest.fixture(scope="session")
def medmnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a file that is laid out as those of MedMNIST, and holds digits."""
    from fedprompt.data.sets.digits import enlarge, source_digits

    grey, labels = source_digits()
    images, folder = enlarge(grey[:300], 28), tmp_path_factory.mktemp("medmnist")
    arrays = {}
    for name, rows in (("train", slice(200)), ("val", slice(200, 240)), ("test", slice(240, 300))):
        arrays[f"{name}_images"] = images[rows]
        arrays[f"{name}_labels"] = labels[:300][rows, None].astype(np.uint8)
    np.savez(folder / "pneumoniamnist.npz", **arrays)
    return folder


@pytest.fixture
def tiny(random_backbone: str, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides that make `digits` tiny; more can be added: `tiny("seed=1")`.

    Those that say something about the data are alone with it.
    """

    def overrides(*more: str) -> list[str]:
        about_data = any(each.startswith(("data=", "data.")) for each in more)
        return [
            "rounds=2",
            "compare=[]",
            "clients.count=6",
            "clients.per_round=3",
            "clients.epochs=1",
            *(["clients.batch_size=64"] if about_data else [FEW_DIGITS, "clients.batch_size=16"]),
            "prompts.count=2",
            "prompts.pool=null",
            "runtime=serial",
            f"model.backbone={random_backbone}",
            f"run_dir={tmp_path / 'run'}",
            *more,
        ]

    return overrides
