"""Several nodes: separate raylets of this machine with resources of their own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fedprompt
from cluster.conftest import experiment_of
from fedprompt.core.errors import ConfigError
from fedprompt.runs.events import Note, RoundFinished

NODES = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and two workers with a CPU each."""
    import ray
    from ray.cluster_utils import Cluster

    from fedprompt.runtime.ray.local import import_ray

    import_ray()
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        for number in range(1, NODES):
            cluster.add_node(num_cpus=1, resources={f"place{number}": 1})
        ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_nodes_without_the_cache_receive_the_features(
    cluster: Any, random_backbone: str, tmp_path: Path
) -> None:
    """The same updates as in one process, though no actor can open the cache's files."""
    from fedprompt.config import compose
    from fedprompt.runs.driver import settings_of
    from fedprompt.runs.federation import initial_state, prepare
    from fedprompt.runtime import RuntimeOptions
    from fedprompt.runtime.ray.pool import RayRuntime
    from fedprompt.runtime.serial import SerialRuntime
    from fedprompt.server.round import make_job

    folder = tmp_path / "cache"
    overrides = experiment_of(random_backbone, tmp_path / "run", f"cache.folder={folder}")
    config = compose("digits", overrides)
    federation = prepare(config)
    assert federation.setup.data.table.entry is not None
    settings = settings_of(config, federation)
    state = initial_state(config, federation)
    jobs = [make_job(state, settings, client, state.broadcast()) for client in range(3)]

    def tuned(runtime: Any) -> tuple[list[str], dict[int, Any]]:
        runtime.warm_up()
        try:
            notes = list(runtime.open(federation.setup))
            updates = {each.client_id: each for each in runtime.map(settings.recipe, jobs)}
        finally:
            runtime.close()
        return notes, updates

    _, expected = tuned(SerialRuntime(RuntimeOptions("serial")))
    notes, _ = tuned(RayRuntime(RuntimeOptions(actors=2)))
    assert not any("received the features" in note for note in notes)
    shutil.rmtree(folder)  # what this process has mapped stays
    notes, found = tuned(RayRuntime(RuntimeOptions(actors=2)))
    assert any("received the features" in note for note in notes)
    assert sorted(found) == sorted(expected) == [0, 1, 2]
    assert all(found[client].prompts.equal(expected[client].prompts) for client in found)


def test_actors_on_every_node_give_the_bits_of_one_process(
    cluster: Any, straight: str, random_backbone: str, tmp_path: Path
) -> None:
    notes: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    overrides = experiment_of(
        random_backbone, tmp_path / "run", f"runtime.actors={NODES}", "runtime.driver_node=place2"
    )
    result = fedprompt.run("digits", overrides, on_event=listen)
    assert result.summary["state_sha256"] == straight
    (where,) = [note for note in notes if "client actors on" in note]
    assert where.startswith(f"{NODES} client actors on {NODES} nodes")
    assert [int(count) for count in re.findall(r": (\d+)", where)] == [1, 1, 1]


def test_an_unknown_place_for_the_driver_is_refused(
    cluster: Any, random_backbone: str, tmp_path: Path
) -> None:
    overrides = experiment_of(random_backbone, tmp_path / "run", "runtime.driver_node=nowhere")
    with pytest.raises(ConfigError, match=r"place1, place2\), got 'nowhere'"):
        fedprompt.run("digits", overrides)
    assert not (tmp_path / "run").exists()


def test_a_data_set_that_the_drivers_node_lacks(
    cluster: Any, random_backbone: str, tmp_path: Path
) -> None:
    """One line with the node and the folder; on the node that has the files the run goes on."""
    folder = tmp_path / "data"
    generator = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee")):
        (folder / "imagefolder" / name).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(0, 100, (32, 32, 3)) + 100 * label
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(folder / "imagefolder" / name / f"{number:02}.png")
    for place, home in (("with", folder), ("without", tmp_path / "nothing")):
        environment = {"FEDPROMPT_DATA": str(home)}
        cluster.add_node(num_cpus=1, resources={place: 1}, env_vars=environment)
    cluster.wait_for_nodes()
    run = experiment_of(
        random_backbone,
        tmp_path / "run",
        *(
            "rounds=1",
            "data=imagefolder",
            "data.size=32",
            "clients.count=2",
            "clients.per_round=null",
        ),
        *("partition=iid", "runtime.actors=2"),
    )
    missing = rf"on node .*: imagefolder: .*{tmp_path}/nothing/imagefolder"
    with pytest.raises(ConfigError, match=missing):
        fedprompt.run("digits", [*run, "runtime.driver_node=without"])
    assert not (tmp_path / "run").exists()
    fedprompt.run("digits", [*run, "runtime.driver_node=with"])


def test_what_ray_has_bounds_the_gpus(cluster: Any, random_backbone: str, tmp_path: Path) -> None:
    """With GPUs that only Ray believes in: refused by number, or reserved and computed without."""
    cluster.add_node(num_cpus=1, num_gpus=1)
    cluster.wait_for_nodes()
    too_many = ["runtime.actors=3", "runtime.gpus_per_actor=0.5"]
    with pytest.raises(ConfigError, match=r"3 actors of 0.5 GPU .* 1 GPUs that Ray has.* hold 2"):
        fedprompt.run("digits", experiment_of(random_backbone, tmp_path / "run", *too_many))
    notes: list[str] = []
    fitting = ["runtime.actors=2", "runtime.gpus_per_actor=0.5", "runtime.device=cpu", "rounds=1"]
    fedprompt.run(
        "digits",
        experiment_of(random_backbone, tmp_path / "run", *fitting),
        on_event=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert [note for note in notes if "no CUDA device was found" in note]


def test_a_node_that_is_killed_in_a_round_changes_nothing(
    cluster: Any, straight: str, random_backbone: str, tmp_path: Path
) -> None:
    """Its actors' jobs go to the others; the driver is told to be on the head."""
    killed: list[Any] = []

    def kill(event: object) -> None:
        if isinstance(event, RoundFinished) and event.report.round == 1:
            killed.append(next(iter(cluster.worker_nodes)))
            cluster.remove_node(killed[0], allow_graceful=False)

    more = [f"runtime.actors={NODES + 1}", "runtime.driver_node=head"]
    result = fedprompt.run(
        "digits", experiment_of(random_backbone, tmp_path / "run", *more), on_event=kill
    )
    assert len(killed) == 1
    assert result.summary["state_sha256"] == straight
    assert [report["round"] for report in result.reports] == [1, 2, 3]
