"""Backbone, heads and prompt selection."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.prefix.cache import compute_table
from fedprompt.data.task import Split
from fedprompt.models.backbone import Backbone, load_backbone
from fedprompt.models.head import HeadOptions, SeededDropout, build_head
from fedprompt.models.selection import PromptOptions, select_rows


@pytest.fixture(scope="module")
def backbone(random_backbone: str) -> Backbone:
    return load_backbone(random_backbone)


def some_images(count: int = 5, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def test_zero_prompts_equal_plain_timm(backbone: Backbone) -> None:
    pixels = backbone.preprocess(some_images())
    plain = backbone.vit(pixels)
    tokens = backbone.embed(pixels)
    # Not bit by bit: the last block is computed for CLS alone.
    torch.testing.assert_close(backbone.encode(tokens), plain, atol=1e-6, rtol=1e-6)
    without = backbone.encode(tokens, torch.empty(0, backbone.embed_dim))
    assert torch.equal(without, backbone.encode(tokens))


def test_zero_prompts_equal_plain_timm_for_an_ordinary_vit() -> None:
    vit = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=0
    )
    wrapped = Backbone(vit, 16)
    pixels = wrapped.preprocess(some_images(size=16))
    encoded = wrapped.encode(wrapped.embed(pixels))
    torch.testing.assert_close(encoded, vit(pixels), atol=1e-6, rtol=1e-6)


def test_prompts_stand_after_cls_without_position(backbone: Backbone) -> None:
    tokens = backbone.embed(backbone.preprocess(some_images()))
    prompts = torch.randn(3, backbone.embed_dim, generator=torch.Generator().manual_seed(1))
    by_hand = torch.cat([tokens[:, :1], prompts.expand(5, -1, -1), tokens[:, 1:]], dim=1)
    expected = backbone.vit.norm(backbone.vit.blocks(by_hand))[:, 0]
    torch.testing.assert_close(backbone.encode(tokens, prompts), expected, atol=1e-6, rtol=1e-6)
    per_image = prompts.expand(5, -1, -1)
    assert torch.equal(backbone.encode(tokens, prompts), backbone.encode(tokens, per_image))
    assert not torch.allclose(backbone.encode(tokens, prompts), backbone.encode(tokens))


def test_cached_equals_uncached(backbone: Backbone) -> None:
    images = some_images(300)  # more than one chunk
    labels = torch.zeros(300, dtype=torch.int64).numpy()
    table = compute_table(backbone, Split(images.numpy(), labels, labels), torch.device("cpu"))
    prompts = torch.randn(4, backbone.embed_dim, generator=torch.Generator().manual_seed(2))
    for rows in (torch.tensor([0, 7, 299]), torch.arange(40)):
        fresh = backbone.embed(backbone.preprocess(images[rows]))
        cached = torch.from_numpy(table.tokens[rows.numpy()])
        torch.testing.assert_close(
            backbone.encode(cached, prompts), backbone.encode(fresh, prompts), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(cached, fresh, atol=1e-6, rtol=1e-6)
        features = torch.from_numpy(table.features[rows.numpy()])
        torch.testing.assert_close(features, backbone.encode(fresh), atol=1e-5, rtol=1e-5)
        for kind in ("style", "cls"):
            queries = torch.from_numpy(table.queries(kind)[rows.numpy()])
            torch.testing.assert_close(queries, backbone.queries(fresh, kind), atol=1e-5, rtol=1e-5)


def test_backbone_is_frozen(backbone: Backbone) -> None:
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone.training


def test_style_query_is_the_standard_deviation_of_the_patches(backbone: Backbone) -> None:
    tokens = backbone.embed(backbone.preprocess(some_images()))
    patches = backbone.vit.patch_embed(backbone.preprocess(some_images()))
    torch.testing.assert_close(
        backbone.raw_queries(tokens, "style"), patches.std(dim=1), atol=1e-5, rtol=1e-5
    )
    norms = backbone.queries(tokens, "cls").norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(5))


def test_queries_are_standardised_by_public_statistics(backbone: Backbone) -> None:
    tokens = backbone.embed(backbone.preprocess(some_images(64)))
    raw = backbone.raw_queries(tokens, "style")
    extras = {"query.style.mean": raw.mean(dim=0), "query.style.std": raw.std(dim=0)}
    wrapped = Backbone(backbone.vit, 32, extras=extras)
    expected = F.normalize((raw - raw.mean(dim=0)) / raw.std(dim=0), dim=1)
    torch.testing.assert_close(wrapped.queries(tokens, "style"), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 8, 8, 3), "uint8"),
        (torch.zeros(2, 8, 8, 1, dtype=torch.uint8), "convert them to RGB"),
    ],
)
def test_wrong_images_are_refused(backbone: Backbone, images: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        backbone.preprocess(images)


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'nano'"):
        load_backbone("nanoo")


def test_foreign_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"vit.cls_token": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="do not fit"):
        load_backbone(str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match="no backbone weights"):
        load_backbone(str(tmp_path / "absent.safetensors"))
    (tmp_path / "torn.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_backbone(str(tmp_path / "torn.safetensors"))


def test_dropout_follows_its_generator_alone() -> None:
    def masks() -> torch.Tensor:
        layer = SeededDropout(0.5, torch.Generator().manual_seed(3))
        torch.rand(7)  # the global generator must not matter
        return layer(torch.ones(400, 10))

    first, second = masks(), masks()
    assert torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 2.0}
    assert abs(first.mean().item() - 1) < 0.1
    layer = SeededDropout(0.5, torch.Generator()).eval()
    assert torch.equal(layer(torch.ones(3)), torch.ones(3))


def test_released_head_has_no_activation() -> None:
    head = build_head(HeadOptions(hidden=8), 4, 3, torch.Generator().manual_seed(0)).eval()
    first, last = head[0], head[2]
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    expected = (x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(head(x), expected)
    assert [tuple(p.shape) for p in head.parameters()] == [(8, 4), (8,), (3, 8), (3,)]


def test_l2p_votes_and_similarity() -> None:
    prompts = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]], requires_grad=True)
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    options = PromptOptions(count=1, pool=3, selection="l2p")
    rows, similarity = select_rows(options, queries, prompts, torch.empty(3, 2), torch.eye(2))
    assert rows.tolist() == [0]  # one vote each: the lowest row wins
    # cos with row 0: 1, 0, 1 / sqrt 2
    assert similarity is not None
    assert similarity.item() == pytest.approx((1 + 2**-0.5) / 3)
    similarity.backward()
    assert prompts.grad is not None
    assert prompts.grad[1:].abs().sum() == 0


def test_all_prompts_are_selected_in_order() -> None:
    options = PromptOptions(count=3, selection="all")
    rows, term = select_rows(options, torch.ones(2, 4), torch.ones(3, 4), torch.ones(3, 4), None)
    assert rows.tolist() == [0, 1, 2]
    assert term is None
