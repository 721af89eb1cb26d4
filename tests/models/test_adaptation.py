"""Tuning inside the backbone: untouched at first, effective when trained, without a trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedprompt.core.errors import ConfigError
from fedprompt.models import Backbone, load_backbone
from fedprompt.models.adaptation import Tuning, tunings

NAMES = ["adapter", "full", "lora"]


@pytest.fixture(scope="module")
def backbone(random_backbone: str) -> Backbone:
    return load_backbone(random_backbone)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(3, 17, 128, generator=torch.Generator().manual_seed(0))


def begin(tuning: Tuning, backbone: Backbone) -> dict[str, torch.Tensor]:
    return tuning.initial(backbone, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*NAMES, "none"])
def test_starts_as_the_pre_trained_network(
    backbone: Backbone, tokens: torch.Tensor, name: str
) -> None:
    tuning = tunings.create(name)
    prompts = torch.randn(2, 128, generator=torch.Generator().manual_seed(2))
    tensors = begin(tuning, backbone)
    for given in (None, prompts):
        expected = backbone.encode(tokens, given)
        found = tuning.encode(backbone, tensors, tokens, given)
        # Not bit by bit: where layers are listened to, the last block is computed as a whole.
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_counts_and_the_backbone_is_left_alone(
    backbone: Backbone, tokens: torch.Tensor, name: str
) -> None:
    tuning = tunings.create(name)
    before = backbone.checksum()
    draws = torch.Generator().manual_seed(3)
    leaves = {
        key: (value + 0.1 * torch.randn(value.shape, generator=draws)).requires_grad_()
        for key, value in begin(tuning, backbone).items()
    }
    features = tuning.encode(backbone, leaves, tokens)
    assert not torch.allclose(features, backbone.encode(tokens))
    features.square().sum().backward()
    for key, value in leaves.items():
        assert value.grad is not None, key
        assert value.grad.any(), key
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert backbone.checksum() == before
    assert not any(module._forward_hooks for module in backbone.modules())


def test_a_failing_pass_leaves_no_hook(backbone: Backbone) -> None:
    tuning = tunings.create("lora")
    with pytest.raises(RuntimeError, match="shape"):
        tuning.encode(backbone, begin(tuning, backbone), torch.zeros(1, 17, 5))
    assert not any(module._forward_hooks for module in backbone.modules())


def test_lora_is_a_changed_weight(backbone: Backbone, tokens: torch.Tensor) -> None:
    """W + scale / r B A in the projections of a copy."""
    tuning = tunings.create("lora", rank=2, scale=6.0)
    draws = torch.Generator().manual_seed(4)
    tensors = {
        key: torch.randn(value.shape, generator=draws) * 0.1
        for key, value in begin(tuning, backbone).items()
    }
    import copy

    other = copy.deepcopy(backbone)
    for index, block in enumerate(other.vit.blocks):
        block.attn.qkv.weight += 3.0 * tensors[f"lora.{index}.b"] @ tensors[f"lora.{index}.a"]
    expected = other.encode(tokens)
    torch.testing.assert_close(
        tuning.encode(backbone, tensors, tokens), expected, atol=1e-5, rtol=0
    )


def test_adapter_by_its_formula(backbone: Backbone, tokens: torch.Tensor) -> None:
    """The first block with an adapter after its MLP, written out."""
    tuning = tunings.create("adapter", width=3, after="mlp")
    tensors = begin(tuning, backbone)
    assert sorted({key.split(".down")[0].split(".up")[0] for key in tensors}) == [
        f"adapter.{block}.mlp" for block in range(5)
    ]
    up = torch.randn(128, 3, generator=torch.Generator().manual_seed(5))
    tensors["adapter.0.mlp.up.weight"] = up
    block = backbone.vit.blocks[0]
    x = tokens + block.attn(block.norm1(tokens))
    h = block.mlp(block.norm2(x))
    down = tensors["adapter.0.mlp.down.weight"]
    x = x + h + F.gelu(h @ down.T) @ up.T
    for later in backbone.vit.blocks[1:]:
        x = later(x)
    expected = backbone._read_out(backbone.vit.norm(x))
    actual = tuning.encode(backbone, tensors, tokens)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_full_leaves_out_what_is_cached(backbone: Backbone) -> None:
    names = begin(tunings.create("full"), backbone)
    assert not any("patch_embed" in name or "pos_embed" in name for name in names)
    assert {"vit.blocks.0.attn.qkv.weight", "vit.norm.weight"} <= set(names)
    whole = sum(value.numel() for value in backbone.parameters())
    tuned = sum(value.numel() for value in names.values())
    embedding = sum(
        value.numel()
        for name, value in backbone.named_parameters()
        if "patch_embed" in name or name in ("vit.pos_embed", "vit.cls_token")
    )
    assert tuned == whole - embedding


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adapter", {"width": 0}, "tuning.width: expected an integer >= 1, got 0"),
        ("adapter", {"after": "mpl"}, "did you mean 'mlp'"),
        ("lora", {"rank": 0}, "tuning.rank"),
        ("lora", {"scale": 0.0}, "tuning.scale"),
        ("full", {"lr": -1.0}, "tuning.lr"),
    ],
)
def test_wrong_options(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tunings.create(name, **options)
