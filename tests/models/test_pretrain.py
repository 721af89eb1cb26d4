"""Pre-training: same bits from the same seed, honest cards, and embedded weights that keep their
promise.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from fedprompt.cli.pretrain import pretrain_command
from fedprompt.core.errors import ConfigError
from fedprompt.data.drawing.shapes import ShapeCounts
from fedprompt.data.task import datasets
from fedprompt.models.backbone import load_backbone
from fedprompt.models.nano import network as nano
from fedprompt.models.nano.pretrain import pretrain
from fedprompt.models.nano.probe import features_of, linear_probe
from fedprompt.models.nano.recipe import (
    PLAIN,
    PROMPTABLE,
    TASKS,
    TOKENS_PER_TASK,
    PretrainConfig,
)
from simulated_gpu import simulated_gpu

TINY = {
    "images": 48,
    "presentations": 96,
    "batch_size": 16,
    "statistics": 32,
    "shapes": ShapeCounts(2, 2, 2, 2, 2, 2),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(dataclasses.replace(PLAIN, **TINY), tmp_path_factory.mktemp("plain"))


def test_same_seed_same_bits_and_the_global_generator_has_no_part(
    plain: Path, tmp_path: Path
) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    seen: dict[str, tuple[int, int]] = {}
    again = pretrain(
        dataclasses.replace(PLAIN, **TINY),
        tmp_path / "again",
        lambda stage, done, total, metrics: seen.update({stage: (done, total)}),
    )
    assert torch.equal(before, torch.get_rng_state())
    other = pretrain(dataclasses.replace(PLAIN, seed=1, **TINY), tmp_path / "other")
    assert plain.read_bytes() == again.read_bytes()
    assert plain.read_bytes() != other.read_bytes()
    # Progress reaches the end of every stage.
    assert seen == {"draw": (48, 48), "train": (6, 6), "query": (32, 32)}


def test_a_gpu_trains_the_same_weights(plain: Path, tmp_path: Path) -> None:
    """A simulated one: no tensor is on the wrong device."""
    with simulated_gpu() as gpu:
        there = pretrain(dataclasses.replace(PLAIN, device="cuda", **TINY), tmp_path / "plain")
        asked = pretrain(dataclasses.replace(PROMPTABLE, device="cuda", **TINY), tmp_path / "asked")
    assert gpu.operations > 1000
    ours, theirs = load_file(there), load_file(plain)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert load_file(asked)["task_tokens"].isfinite().all()


def test_the_file_holds_half_precision_weights_and_query_statistics(plain: Path) -> None:
    tensors = load_file(plain)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert all(value.isfinite().all() for value in tensors.values())
    backbone = load_backbone(str(plain))
    for kind in ("style", "cls"):
        assert backbone.extras[f"query.{kind}.mean"].shape == (nano.EMBED_DIM,)
        assert (backbone.extras[f"query.{kind}.std"] > 0).all()
    assert "task_tokens" not in backbone.extras


def test_the_promptable_stage_continues_from_plain_weights_and_learns_tokens(
    plain: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(PROMPTABLE, **TINY)
    path = pretrain(config, tmp_path / "a", init=plain)
    again = pretrain(config, tmp_path / "b", init=plain)
    assert path.name == "nano_promptable.safetensors"
    assert path.read_bytes() == again.read_bytes()
    backbone = load_backbone(str(path))
    tokens = backbone.extras["task_tokens"]
    assert tokens.shape == (len(TASKS), TOKENS_PER_TASK, nano.EMBED_DIM)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    bare, asked = features_of(backbone, images), features_of(backbone, images, tokens[1])
    assert not np.allclose(bare, asked)
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["init"]["sha256"] == hashlib.sha256(plain.read_bytes()).hexdigest()


def test_the_card_describes_the_run(plain: Path) -> None:
    card = json.loads(plain.with_suffix(".json").read_text())
    assert card["sha256"] == hashlib.sha256(plain.read_bytes()).hexdigest()
    assert card["recipe"]["presentations"] == card["presentations"] == 96
    assert card["images"] == 48 and card["classes"] == 12
    assert card["parameters"] == sum(value.numel() for value in nano.build().parameters())
    assert card["history"][-1]["step"] == 6


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("images", 0, "pretrain.images: expected at least 1, got 0"),
        ("presentations", 5, "expected at least one batch"),
        ("learning_rate", 0.0, "pretrain.learning_rate: expected more than 0"),
        ("warmup", 1.0, "pretrain.warmup: expected 0 <= value < 1"),
        ("curriculum", (0.5, 0.1), "expected two increasing shares"),
        ("device", "tpu", "expected auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_wrong_values_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainConfig(**{field: value})  # type: ignore[arg-type]


def test_the_command_offers_its_options() -> None:
    result = CliRunner().invoke(pretrain_command, ["--help"])
    assert result.exit_code == 0
    for option in ("--output", "--seed", "--images", "--promptable", "--init", "--device"):
        assert option in result.output


@pytest.mark.parametrize("name", nano.EMBEDDED)
def test_embedded_cards_belong_to_the_embedded_weights(name: str) -> None:
    card, path = nano.read_card(name), nano.weights_path(name)
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert card["name"] == name and card["commit"] and card["seed"] == card["recipe"]["seed"]
    assert card["linear_probe"]["accuracy"]["no prompts"]["digits"] > 0.9
    total = sum(nano.weights_path(each).stat().st_size for each in nano.EMBEDDED)
    assert total <= 6e6, "the weights ship with the package"


def test_embedded_weights_classify_real_digits() -> None:
    digits = datasets.create("digits")
    accuracy = linear_probe(load_backbone("nano"), digits.train, digits.validation, digits.test)
    assert accuracy >= 0.97
    card = nano.read_card("nano")
    assert abs(accuracy - card["linear_probe"]["accuracy"]["no prompts"]["digits"]) < 0.01


def test_task_tokens_change_what_the_promptable_network_expresses() -> None:
    """Patterns are told far better under the pattern tokens than under the shape tokens (card)."""
    accuracy = nano.read_card("nano_promptable")["linear_probe"]["accuracy"]
    pattern, shape = accuracy["background pattern tokens"], accuracy["shape tokens"]
    assert pattern["domains/patterns"] > shape["domains/patterns"] + 0.1
    assert shape["domains/letters"] > pattern["domains/letters"] + 0.1
