"""Whole runs with prompts before an inner block (`prompts.depth`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import fedprompt
from fedprompt.client.module import ClientModule
from fedprompt.client.worker import ClientBatches
from fedprompt.config import compose, conf_root
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.core.seeding import torch_generator
from fedprompt.experiment import replay_client
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.driver import settings_of
from fedprompt.runs.federation import initial_state, prepare
from fedprompt.server.evaluate import Model, predict
from fedprompt.server.round import make_jobs

Overrides = Callable[..., list[str]]
FEW_DOMAINS = ["data=domains", *(f"data.{each}=80" for each in ("train", "validation", "test"))]


def test_client_and_evaluation_compute_what_a_hook_in_plain_timm_does(tiny: Overrides) -> None:
    """From the pixels on: the training step's logits, and those by which the model is measured."""
    config = compose("digits", tiny("prompts.depth=2", "head=linear"))
    federation = prepare(config)
    settings, worker = settings_of(config, federation), federation.setup.build()
    job = make_jobs(initial_state(config, federation), settings)[0]
    own = federation.data.rows(job.client_id, False)
    batches = ClientBatches(
        federation.data, job.client_id, 64, config.prompts, torch_generator(0, "order")
    )
    module = ClientModule(settings.recipe, worker.backbone, job, federation.data.class_mask)
    rows, _ = module.choose(batches.queries)
    in_training = module.model(batches.inputs, rows, batches.groups).detach()
    predictions = predict(
        Model(job.broadcast),
        settings.recipe,
        worker.backbone,
        federation.data.table,
        own,
        rows.expand(len(own), -1),
        federation.data.class_mask,
        worker.device,
    )
    measured = torch.cat([logits for logits, _ in predictions])
    assert torch.equal(measured, in_training)

    def insert(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens = inputs[0]
        prompts = job.broadcast.prompts[rows].expand(len(tokens), -1, -1)
        return (torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1),)

    vit = worker.backbone.vit
    handle = vit.blocks[2].register_forward_pre_hook(insert)
    images = torch.from_numpy(np.asarray(federation.task.train.images[own]))
    features = vit(worker.backbone.preprocess(images))
    handle.remove()
    expected = module.head(features).detach()  # digits are one domain, with all classes
    torch.testing.assert_close(measured, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "method", ["pfpt", "pfedpg", "lora_fedavg", "adapter_fedavg", "full_fedavg"]
)
def test_every_kind_of_method_runs_and_the_depth_counts(
    tiny: Overrides, tmp_path: Path, method: str
) -> None:
    states = []
    for depth in (0, 4):
        more = [f"method={method}", "rounds=1", f"prompts.depth={depth}"]
        count = [] if method in ("pfpt", "pfedpg") else ["prompts.count=0"]
        result = fedprompt.run("digits", tiny(*more, *count, f"run_dir={tmp_path / str(depth)}"))
        states.append(result.state)
    tuned = [state.shared.adaptation for state in states]
    if tuned[0]:
        blocks = [
            {key for key in each if "blocks" in key or key[:5] in ("lora.", "adapt")}
            for each in tuned
        ]
        assert len(blocks[0]) == 5 * len(blocks[1])
        assert all(".4." in key for key in blocks[1])
    else:
        assert states[0].prompts.shape == states[1].prompts.shape
        assert not torch.equal(states[0].prompts, states[1].prompts)


def test_one_frozen_head_serves_for_all_depths(tiny: Overrides, tmp_path: Path) -> None:
    """It is the pre-trained model's own classifier, fitted with task tokens at the input."""
    heads, prompts = [], []
    for depth in (0, 3):
        overrides = tiny(
            *(*FEW_DOMAINS, "data.public=80", "head=frozen", "partition.alpha=100", "rounds=1"),
            *("model=nano_promptable", "prompts.whiten=true", f"prompts.depth={depth}"),
            *(f"cache.folder={tmp_path / 'cache'}", f"run_dir={tmp_path / str(depth)}"),
        )
        overrides = [each for each in overrides if not each.startswith("model.backbone")]
        result = fedprompt.run("digits", overrides)
        heads.append(result.state.fixed.tensors())
        prompts.append(result.state.prompts)
    assert heads[0].keys() == heads[1].keys() == {"head.0.weight", "head.0.bias"}
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])
    assert not torch.equal(*prompts)
    cache = tmp_path / "cache"
    assert len(list((cache / "heads").iterdir())) == 1
    # Training, validation and test images for either depth, public images once.
    assert len(list(cache.glob("*/header.json"))) == 7


def test_a_run_is_resumed_and_a_client_done_again(tiny: Overrides, tmp_path: Path) -> None:
    overrides = tiny("prompts.depth=2", "compare=[fedavg_pt]")
    straight = fedprompt.run("digits", [*overrides, f"run_dir={tmp_path / 'straight'}"])

    class Stop(Exception):
        pass

    def stop(event: object) -> None:
        if type(event).__name__ == "RoundFinished":
            raise Stop

    with pytest.raises(Stop):
        fedprompt.run("digits", overrides, on_event=stop)
    resumed = fedprompt.resume(tmp_path / "run")
    assert resumed.summary["state_sha256"] == straight.summary["state_sha256"]
    for method in (None, "fedavg_pt"):
        update = replay_client(tmp_path / "run", 0, method)
        assert update.prompts.shape == (2, 128)
    directory = RunDirectory.open(tmp_path / "run")
    config = compose(directory.path / "config.yaml")
    assert config.cut == 2
    # A run of a program without this key had its prompts at the input.
    tree: dict[str, Any] = yaml.safe_load((directory.path / "config.yaml").read_text())
    del tree["prompts"]["depth"]
    del tree["sources"]["command"]["prompts"]["depth"]
    assert compose(tree).cut == 0


# ---------------------------------------------------------------- what is refused


def test_a_depth_beyond_the_network_is_refused_before_anything_is_computed(
    tiny: Overrides, tmp_path: Path
) -> None:
    message = r"prompts.depth: expected the number of a block, 0 to 4 .* 5 blocks, got 5"
    folder = tmp_path / "cache"
    with pytest.raises(ConfigError, match=message) as caught:
        fedprompt.run("digits", tiny("prompts.depth=5", f"cache.folder={folder}"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists() and not folder.exists()


@pytest.mark.parametrize("depth", ["-1", "1.5", "x"])
def test_a_depth_that_is_no_number_of_a_block(tiny: Overrides, depth: str) -> None:
    with pytest.raises(ConfigError, match=r"prompts.depth: expected an integer"):
        compose("digits", tiny(f"prompts.depth={depth}"))


def test_methods_without_prompts_ignore_the_depth(tiny: Overrides, tmp_path: Path) -> None:
    hashes = []
    for depth in (0, 99):
        more = ["method=head_only", "prompts.count=0", f"prompts.depth={depth}"]
        result = fedprompt.run("digits", tiny(*more, f"run_dir={tmp_path / str(depth)}"))
        hashes.append(result.summary["state_sha256"])
    assert hashes[0] == hashes[1]


def preset(name: str, depth: int) -> dict[str, dict[str, Any]]:
    """A method's file with a depth of its own."""
    lines = yaml.safe_load((conf_root() / "method" / f"{name}.yaml").read_text())
    return {
        f"method/{name}": {**lines, "prompts": {**(lines.get("prompts") or {}), "depth": depth}}
    }


def test_compared_methods_share_one_depth() -> None:
    composed = compose("digits", ["prompts.depth=2", "compare=[fedavg_pt, head_only]"])
    assert composed.cut == composed.with_method("fedavg_pt").cut == 2
    message = r"prompts.depth: expected the same .* got 0 for pfpt, 3 for fedavg_pt; compare them"
    with pytest.raises(ConfigError, match=message) as caught:
        compose("digits", ["compare=[fedavg_pt]"], files=preset("fedavg_pt", 3))
    assert "\n" not in str(caught.value)
    # Who needs no tokens may stand beside any depth, also at the head of the comparison.
    beside = compose("digits", ["compare=[head_only]", "prompts.depth=1"])
    assert beside.cut == 1
    leading = ["method=head_only", "prompts.count=0", "compare=[fedavg_pt]"]
    files = preset("fedavg_pt", 3)
    files["method/fedavg_pt"]["prompts"]["count"] = 2
    assert compose("digits", leading, files=files).cut == 3


def test_a_table_of_another_depth_is_refused_by_a_worker(tiny: Overrides) -> None:
    setup = prepare(compose("digits", tiny("prompts.depth=2"))).setup
    with pytest.raises(InputError, match=r"before block 1, .* got those before block 2"):
        dataclasses.replace(setup, cut=1).build()
