"""Blocks in bfloat16: what changes, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedprompt
from fedprompt.client.loop import make_fabric
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.models.backbone import load_backbone
from small_data import FEW_DIGITS


def run(backbone: str, folder: Path, *more: str) -> fedprompt.RunResult:
    # Few images: many CPUs have no bfloat16 of their own.
    settings = ["rounds=1", "compare=[]", "clients.count=8", "clients.per_round=4", FEW_DIGITS]
    settings += ["clients.epochs=1", "prompts.count=2", "prompts.pool=null", "runtime=serial"]
    return fedprompt.run(
        "digits", [*settings, f"model.backbone={backbone}", f"run_dir={folder}", *more]
    )


def test_the_blocks_compute_in_bfloat16_and_the_rest_does_not(random_backbone: str) -> None:
    """The features come near those of float32, in float32, and so do the prompts' gradients."""
    backbone = load_backbone(random_backbone)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(4, 17, backbone.embed_dim, generator=generator)
    prompts = torch.randn(3, backbone.embed_dim, generator=generator)
    weights = torch.randn(4, backbone.feature_dim, generator=generator)
    seen: list[torch.dtype] = []
    backbone.vit.blocks[0].mlp.fc1.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    encoded, gradients = {}, {}
    for precision in ("32-true", "bf16-mixed"):
        backbone.autocast = make_fabric("cpu", precision).autocast
        own = prompts.clone().requires_grad_()
        features = backbone.encode(tokens, own)
        (features * weights).sum().backward()
        encoded[precision] = features.detach()
        assert own.grad is not None
        gradients[precision] = own.grad
    assert seen == [torch.float32, torch.bfloat16]
    for each in (encoded, gradients):
        exact, mixed = each["32-true"], each["bf16-mixed"]
        assert mixed.dtype == torch.float32
        assert 0 < float((mixed - exact).norm() / exact.norm()) < 0.05


def test_a_run_in_mixed_precision_is_as_reproducible(random_backbone: str, tmp_path: Path) -> None:
    """Other bits than in float32, near them, and the same again."""
    exact = run(random_backbone, tmp_path / "exact")
    mixed = run(random_backbone, tmp_path / "mixed", "runtime.precision=bf16-mixed")
    again = run(random_backbone, tmp_path / "again", "runtime.precision=bf16-mixed")
    assert mixed.state.sha256() == again.state.sha256() != exact.state.sha256()
    before, after = exact.reports[-1]["loss"], mixed.reports[-1]["loss"]
    assert after == pytest.approx(before, rel=0.05)
    assert all(value.dtype == torch.float32 for value in mixed.state.shared.tensors().values())


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"precision: expected one of 32-true, bf16-mixed"):
        compose("digits", ["runtime.precision=bf16"])
