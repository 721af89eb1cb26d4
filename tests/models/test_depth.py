"""Prompts before an inner block: equal to a plain forward pass into which a hook inserts them."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fedprompt.client.loop import make_fabric
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.prefix.cache import compute_table
from fedprompt.data.task import Split
from fedprompt.models import Backbone, load_backbone
from fedprompt.models.adaptation import tunings
from fedprompt.models.frozen_head import fit_frozen_head
from fedprompt.models.options import ModelOptions
from fedprompt.models.selection import PromptOptions

CPU = torch.device("cpu")
IMAGES, PROMPTS = 3, 4
EXACT = {"atol": 1e-10, "rtol": 1e-10}
"""In float64."""
NAMED = {
    "test_vit": 48,  # CLS
    "deit_tiny_distilled_patch16_224": 32,  # CLS and the distillation token
    "vit_small_patch14_reg4_dinov2": 28,  # CLS and four registers
    "test_vit2": 32,  # a register, and the mean of the patches
    "test_vit3": 32,  # a register, and attention over it and the patches
}
BUILT: dict[str, dict[str, Any]] = {
    "norm before the blocks": {"pre_norm": True},
    "no CLS": {"class_token": False, "global_pool": "avg"},
}


def build(name: str) -> Backbone:
    """A network in float64 with all its parameters drawn."""
    if name in NAMED:
        backbone = load_backbone(ModelOptions(name, False, image_size=NAMED[name]))
    else:
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 2}
        backbone = Backbone(VisionTransformer(num_classes=0, **sizes, **BUILT[name]), 16)
    generator = torch.Generator().manual_seed(3)
    for key, value in backbone.vit.named_parameters():
        scale = "norm" in key and key.endswith("weight")
        value.copy_(0.1 * torch.randn(value.shape, generator=generator) + scale)
    return backbone.double()


@pytest.fixture(scope="module", params=[*NAMED, *BUILT])
def whole(request: pytest.FixtureRequest) -> Backbone:
    """A backbone cut at the input; not to be changed."""
    with torch.no_grad():
        return build(request.param)


@pytest.fixture
def pixels(whole: Backbone) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = whole.image_size
    return torch.randn(IMAGES, 3, size, size, generator=generator, dtype=torch.float64)


def drawn_prompts(width: int, sets: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(sets, PROMPTS, width, generator=generator, dtype=torch.float64)
    return drawn if sets > 1 else drawn[0]


@contextlib.contextmanager
def inserted(vit: Any, cut: int, parts: list[Tensor]) -> Iterator[None]:
    """While entered, timm's forward pass has prompts before block `cut`, other ones in their place
    before the next blocks as far as there are parts, and none in what is pooled.
    """
    prefix, count = vit.num_prefix_tokens, parts[0].shape[-2]

    def insert(part: Tensor, left_out: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tokens = inputs[0]
            own = part.expand(len(tokens), -1, -1)
            return (torch.cat([tokens[:, :prefix], own, tokens[:, prefix + left_out :]], dim=1),)

        return hook

    def drop(_: nn.Module, __: object, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, :prefix], tokens[:, prefix + count :]], dim=1)

    handles = [
        vit.blocks[cut + i].register_forward_pre_hook(insert(part, count if i else 0))
        for i, part in enumerate(parts)
    ]
    handles.append(vit.norm.register_forward_hook(drop))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cuts_of(whole: Backbone) -> list[int]:
    return [0, 1, whole.depth // 2, whole.depth - 1]


def test_prompts_before_an_inner_block_equal_a_hook_in_plain_timm(
    whole: Backbone, pixels: Tensor
) -> None:
    prompts, differing = drawn_prompts(whole.embed_dim), drawn_prompts(whole.embed_dim, IMAGES)
    seen = []
    for cut in cuts_of(whole):
        backbone = whole.cut_at(cut)
        for given in (prompts, differing):
            with inserted(whole.vit, cut, [given]):
                expected = whole.vit(pixels)
            tokens = backbone.advance(backbone.embed(pixels))
            torch.testing.assert_close(backbone.encode(tokens, given), expected, **EXACT)
            assert torch.equal(backbone(pixels, given), backbone.encode(tokens, given))
        seen.append(expected)
    # The place matters, or the comparison would be empty.
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.pairwise(seen))


def test_deep_prompts_have_a_part_for_each_block_from_there_on(
    whole: Backbone, pixels: Tensor
) -> None:
    for cut in cuts_of(whole):
        backbone = whole.cut_at(cut)
        blocks = len(backbone.upper_blocks)
        assert blocks == whole.depth - cut
        options = PromptOptions(placement="deep", selection="all", depth=cut)
        rows = drawn_prompts(options.width(whole.embed_dim, blocks))
        with inserted(whole.vit, cut, list(rows.split(whole.embed_dim, dim=1))):
            expected = whole.vit(pixels)
        torch.testing.assert_close(backbone(pixels, rows), expected, **EXACT)


def test_what_does_not_hang_on_prompts_is_the_same_for_every_cut(
    whole: Backbone, pixels: Tensor
) -> None:
    embedded = whole.embed(pixels)
    expected = whole.constants(embedded)
    assert torch.equal(expected["tokens"], embedded)
    for cut in cuts_of(whole)[1:]:
        backbone = whole.cut_at(cut)
        found = backbone.constants(embedded)
        for name in ("style", "cls", "features"):
            assert torch.equal(found[name], expected[name]), name
        assert torch.equal(backbone.queries(embedded, "cls"), expected["cls"])
        torch.testing.assert_close(found["tokens"], whole.vit.blocks[:cut](embedded), **EXACT)
        assert torch.equal(backbone(pixels), whole(pixels))
        assert backbone.checksum() == whole.checksum()
    assert whole.cut == 0


# ---------------------------------------------------------------- gradients, tuning, precision


@pytest.fixture(scope="module")
def nano(random_backbone: str) -> Backbone:
    return load_backbone(random_backbone)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(IMAGES, 17, 128, generator=torch.Generator().manual_seed(0))


def test_gradients_exist_in_the_upper_blocks_alone(nano: Backbone, tokens: Tensor) -> None:
    for cut in range(nano.depth):
        backbone, prompts = nano.cut_at(cut), drawn_prompts(128).float().requires_grad_()
        seen: list[bool] = []
        handles = [
            block.register_forward_hook(lambda *call, seen=seen: seen.append(call[2].requires_grad))
            for block in nano.vit.blocks
        ]
        backbone.encode(backbone.advance(tokens), prompts)[:, 0].sum().backward()
        for handle in handles:
            handle.remove()
        assert seen == [False] * cut + [True] * (nano.depth - cut)
        assert prompts.grad is not None and prompts.grad.any(dim=1).all()
    assert not any(parameter.grad is not None for parameter in nano.parameters())


def test_every_block_below_saves_what_a_block_keeps_for_the_backward_pass(
    nano: Backbone, tokens: Tensor
) -> None:
    weights = {value.untyped_storage().data_ptr() for value in nano.parameters()}
    kept = []
    for cut in range(nano.depth):
        backbone, prompts = nano.cut_at(cut), drawn_prompts(128).float().requires_grad_()
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = backbone.encode(backbone.advance(tokens), prompts)
        kept.append(sum(size for place, size in sizes.items() if place not in weights))
        del features
    saved = [before - after for before, after in itertools.pairwise(kept)]
    assert min(saved) > 0
    assert max(saved) - min(saved) < 0.02 * max(saved), kept


@pytest.mark.parametrize("name", ["adapter", "lora", "full"])
def test_tuning_reaches_the_upper_blocks_alone(nano: Backbone, tokens: Tensor, name: str) -> None:
    tuning, backbone = tunings.create(name), nano.cut_at(3)
    tensors = tuning.initial(backbone, torch.Generator().manual_seed(1))
    numbers = [re.search(r"\.(\d+)\.", key) for key in tensors]
    blocks = {int(number[1]) for number in numbers if number}
    assert blocks == {3, 4}
    prompts = drawn_prompts(128).float()
    expected = backbone.encode(tokens, prompts)
    found = tuning.encode(backbone, tensors, tokens, prompts)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    # Changed tensors give what the whole network would give with the same changes.
    draws = torch.Generator().manual_seed(4)
    changed = {
        key: value + 0.05 * torch.randn(value.shape, generator=draws)
        for key, value in tensors.items()
    }
    unchanged = tuning.initial(nano, torch.Generator().manual_seed(1))
    whole = tuning.encode(nano, {**unchanged, **changed}, tokens)
    torch.testing.assert_close(
        tuning.encode(backbone, changed, backbone.advance(tokens)), whole, atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(whole, nano.encode(tokens), atol=1e-3)


def test_bfloat16_is_for_the_upper_blocks(nano: Backbone, tokens: Tensor) -> None:
    """What is cached is exact, whatever the precision of the run."""
    backbone = copy.copy(nano.cut_at(2))
    exact, prompts = backbone.advance(tokens), drawn_prompts(128).float()
    expected = backbone.encode(exact, prompts)
    backbone.autocast = make_fabric("cpu", "bf16-mixed").autocast
    assert torch.equal(backbone.advance(tokens), exact)
    found = backbone.encode(exact, prompts)
    assert found.dtype == torch.float32
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("cut", [-1, 5, 99])
def test_a_block_that_is_not_there_is_refused(random_backbone: str, cut: int) -> None:
    message = r"prompts.depth: .* 0 to 4 as the backbone has 5 blocks, got " + str(cut)
    with pytest.raises(ConfigError, match=message):
        load_backbone(random_backbone, cut)
    with pytest.raises(ConfigError, match=message):
        load_backbone(random_backbone).cut_at(cut)


def test_a_negative_depth_is_refused_without_a_network() -> None:
    with pytest.raises(ConfigError, match=r"prompts.depth: expected an integer >= 0, got -1"):
        PromptOptions(depth=-1)


def test_a_head_is_fitted_on_the_network_as_it_was_pre_trained(nano: Backbone) -> None:
    labels = torch.arange(40).numpy() % 2
    images = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8).numpy()
    table = compute_table(nano.cut_at(2), Split(images, labels, labels * 0), CPU)
    with pytest.raises(InputError, match=r"before block 0, where .* got those before block 2"):
        fit_frozen_head(nano, table, 2, CPU)
