"""Vision Transformers of timm as backbones: drawn, given, fetched and refused weights; transforms.

Networks are timm's and torchvision's own with random weights; no test needs a network.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms as reference
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionViT

import fedprompt
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.models import Backbone, from_torchvision, load_backbone, timm_vit
from fedprompt.models.options import ModelOptions
from fedprompt.models.transform import IMAGENET_MEAN, IMAGENET_STD, Transform

TINY = "vit_tiny_patch16_224"
SMALLEST = "test_vit"  # timm's own for tests: 6 blocks of width 64
DISTILLED = "deit_tiny_distilled_patch16_224"
REGISTERS = "vit_small_patch14_reg4_dinov2"
NETWORKS = {
    # name: input size, width, tokens before the prompts
    TINY: (32, 192, 1),
    DISTILLED: (32, 192, 2),  # CLS and the distillation token
    REGISTERS: (28, 384, 5),  # CLS and four registers
    SMALLEST: (48, 64, 1),
    "test_vit2": (32, 64, 1),  # a register instead of CLS, and the mean of the patches
    "test_vit3": (32, 96, 1),  # a register instead of CLS, and attention over it and the patches
}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def drawn(name: str, **options: Any) -> Backbone:
    size = NETWORKS[name][0]
    return load_backbone(ModelOptions(name, False, **{"image_size": size, **options}))


@pytest.fixture(scope="module")
def networks() -> dict[str, Backbone]:
    """One backbone of each kind; not to be changed."""
    return {name: drawn(name) for name in NETWORKS}


@pytest.fixture(params=NETWORKS)
def network(networks: dict[str, Backbone], request: pytest.FixtureRequest) -> Backbone:
    return networks[request.param]


def some_pixels(size: int, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def some_prompts(backbone: Backbone, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, backbone.embed_dim, generator=generator)


def plain_timm(name: str, weights: dict[str, Tensor], **settings: Any) -> Any:
    """timm's network with given weights; it does not draw its own."""
    with torch.device("meta"):
        model = timm.create_model(name, **settings)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter drawn anew: networks begin with zero biases and classifiers, which would hide
    a confusion.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            scale = "norm" in name or ".ln" in name
            parameter.copy_(noise + (scale and name.endswith("weight")))
    return model.eval()


def torchvision_vit(size: int = 32, **settings: Any) -> TorchvisionViT:
    """As large as `SMALLEST`, with a classifier of five."""
    sizes = {"num_layers": 6, "num_heads": 2, "hidden_dim": 64, "mlp_dim": 192, "num_classes": 5}
    model = TorchvisionViT(image_size=size, patch_size=16, **{**sizes, **settings})
    randomise(model)
    return model


@pytest.fixture(scope="module")
def torchvision_small() -> TorchvisionViT:
    return torchvision_vit()


def refused(match: str, **options: Any) -> str:
    """The one line of options that are refused."""
    with pytest.raises(ConfigError, match=match) as caught:
        load_backbone(ModelOptions(**options))
    line = str(caught.value)
    assert "\n" not in line
    return line


# ---------------------------------------------------------------- networks by name


@pytest.mark.parametrize("name", [TINY, DISTILLED])
def test_drawn_weights_are_the_same_twice_and_disturb_no_generator(
    networks: dict[str, Backbone], name: str
) -> None:
    torch.manual_seed(1234)
    before = torch.get_rng_state()
    again = drawn(name)
    assert torch.equal(torch.get_rng_state(), before)
    first = networks[name].vit.state_dict()
    assert all(torch.equal(value, first[key]) for key, value in again.vit.state_dict().items())
    assert again.checksum() == networks[name].checksum()


def test_sizes_are_the_network_s(network: Backbone, request: pytest.FixtureRequest) -> None:
    size, width, prefix = NETWORKS[request.node.callspec.params["network"]]
    assert (network.image_size, network.embed_dim, network.num_prefix_tokens) == (
        size,
        width,
        prefix,
    )
    patch = network.vit.patch_embed.patch_size[0]
    tokens = network.embed(some_pixels(size))
    assert tokens.shape == (3, prefix + (size // patch) ** 2, width)
    assert network.encode(tokens).shape == (3, network.feature_dim)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_zero_prompts_equal_plain_timm(networks: dict[str, Backbone], name: str) -> None:
    backbone = networks[name]
    plain = plain_timm(name, backbone.vit.state_dict(), num_classes=0, img_size=backbone.image_size)
    pixels = some_pixels(backbone.image_size)
    with torch.no_grad():
        expected = plain(pixels)
    # Not bit by bit: the last block is computed for the tokens that are read.
    torch.testing.assert_close(backbone(pixels), expected, atol=1e-6, rtol=1e-6)
    without = backbone(pixels, torch.empty(0, backbone.embed_dim))
    assert torch.equal(without, backbone(pixels))


@pytest.mark.parametrize("name", [TINY, DISTILLED])
def test_logits_are_those_of_plain_timm(name: str) -> None:
    backbone = drawn(name, features="logits")
    plain = plain_timm(name, randomise(backbone.vit).state_dict(), img_size=32)
    pixels = some_pixels(32)
    with torch.no_grad():
        expected = plain(pixels)
    assert backbone.feature_dim == 1000
    assert expected.std() > 0.1
    torch.testing.assert_close(backbone(pixels), expected, **TOLERANCE)


@pytest.mark.parametrize("name", NETWORKS)
def test_prompts_stand_after_the_prefix(networks: dict[str, Backbone], name: str) -> None:
    network = copy.deepcopy(networks[name])
    randomise(network.vit)  # some networks begin with blocks that do next to nothing
    vit, prefix = network.vit, network.num_prefix_tokens
    tokens, prompts = network.embed(some_pixels(network.image_size)), some_prompts(network)
    by_hand = torch.cat([tokens[:, :prefix], prompts.expand(3, -1, -1), tokens[:, prefix:]], dim=1)
    final = vit.norm(vit.blocks(by_hand))
    if vit.global_pool != "token":  # prompts are no patches: they are left out of the pool
        final = torch.cat([final[:, :prefix], final[:, prefix + len(prompts) :]], dim=1)
    if vit.global_pool == "avg":
        expected = vit.fc_norm(final[:, prefix:].mean(dim=1))
    elif vit.global_pool == "map":
        expected = vit.attn_pool(final)
    elif name == DISTILLED:
        expected = (final[:, 0] + final[:, 1]) / 2
    else:
        expected = final[:, 0]
    torch.testing.assert_close(network.encode(tokens, prompts), expected, **TOLERANCE)
    assert not torch.allclose(expected, network.encode(tokens), atol=1e-3)
    per_image = torch.stack([prompts, 2 * prompts, -prompts])
    one_by_one = [network.encode(tokens[[i]], per_image[i]) for i in range(3)]
    torch.testing.assert_close(
        network.encode(tokens, per_image), torch.cat(one_by_one), **TOLERANCE
    )


def test_queries_are_the_deviation_of_the_patches_and_cls(network: Backbone) -> None:
    pixels = some_pixels(network.image_size)
    patches = network.vit.patch_embed(pixels).reshape(3, -1, network.embed_dim)
    tokens = network.embed(pixels)
    torch.testing.assert_close(
        network.raw_queries(tokens, "style"), patches.std(dim=1), **TOLERANCE
    )
    vit = network.vit
    cls = vit.norm(vit.blocks(tokens))[:, 0] if vit.has_class_token else network(pixels)
    torch.testing.assert_close(network.queries(tokens, "cls"), F.normalize(cls), **TOLERANCE)


def test_the_checksum_tells_functions_apart_and_not_names() -> None:
    plain = drawn(SMALLEST).checksum()
    assert drawn(SMALLEST).checksum() == plain
    tagged = load_backbone(ModelOptions(f"{SMALLEST}.r160_in1k", False, image_size=48))
    assert tagged.checksum() == plain  # a tag names weights
    for other in ({"features": "logits"}, {"resize": 60}, {"std": [0.5, 0.5, 0.4]}):
        assert drawn(SMALLEST, **other).checksum() != plain


# ---------------------------------------------------------------- weights from a file


def renamed(weights: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): value for name, value in weights.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("features", ["pre_logits", "logits"])
def test_a_file_in_timm_s_layout(tmp_path: Path, suffix: str, features: str) -> None:
    plain: Any = randomise(timm.create_model(SMALLEST, img_size=48, num_classes=7))
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(plain.state_dict(), path)
    backbone = load_backbone(ModelOptions(SMALLEST, str(path), features, image_size=48))
    pixels = some_pixels(48)
    with torch.no_grad():
        expected = plain(pixels)
        if features == "pre_logits":
            expected = plain.forward_head(plain.forward_features(pixels), pre_logits=True)
    assert backbone.feature_dim == (7 if features == "logits" else 64)
    torch.testing.assert_close(backbone(pixels), expected, **TOLERANCE)
    assert backbone.transform.mean == (0.5, 0.5, 0.5)  # timm's for this network


@pytest.mark.parametrize("outer", ["state_dict", "model"])
def test_a_file_with_a_checkpoint_around_the_weights(tmp_path: Path, outer: str) -> None:
    weights = randomise(timm.create_model(SMALLEST, img_size=48, num_classes=0)).state_dict()
    parallel = {f"module.{name}": value for name, value in weights.items()}
    torch.save({outer: parallel, "epoch": 3}, tmp_path / "checkpoint.pt")
    backbone = load_backbone(ModelOptions(SMALLEST, str(tmp_path / "checkpoint.pt"), image_size=48))
    assert all(torch.equal(value, weights[key]) for key, value in backbone.vit.state_dict().items())


def test_a_file_in_half_precision(tmp_path: Path) -> None:
    weights = randomise(timm.create_model(SMALLEST, img_size=48, num_classes=0)).state_dict()
    halves = {name: value.half() for name, value in weights.items()}
    save_file(halves, tmp_path / "half.safetensors")
    path = str(tmp_path / "half.safetensors")
    backbone = load_backbone(ModelOptions(SMALLEST, path, image_size=48))
    for key, value in backbone.vit.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, halves[key].float())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("features", ["pre_logits", "logits"])
def test_a_file_in_torchvision_s_layout(
    tmp_path: Path, torchvision_small: TorchvisionViT, suffix: str, features: str
) -> None:
    path = tmp_path / f"weights{suffix}"
    weights = torchvision_small.state_dict()
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    pixels = some_pixels(32)
    expected = torchvision_forward(torchvision_small, pixels, features)
    assert expected.std() > 0.1
    options = ModelOptions(SMALLEST, str(path), features, image_size=32)
    loaded = load_backbone(options)
    for backbone in (loaded, from_torchvision(weights, num_heads=2, features=features)):
        assert backbone.feature_dim == (5 if features == "logits" else 64)
        torch.testing.assert_close(backbone(pixels), expected, **TOLERANCE)
    # torchvision trained with ImageNet's statistics, timm its network of this name with 0.5.
    assert (loaded.transform.mean, loaded.transform.std) == (IMAGENET_MEAN, IMAGENET_STD)
    own = load_backbone(ModelOptions(SMALLEST, str(path), image_size=32, mean=[0.1, 0.2, 0.3]))
    assert own.transform.mean == (0.1, 0.2, 0.3)


def torchvision_forward(model: TorchvisionViT, pixels: Tensor, features: str) -> Tensor:
    """What torchvision's own forward says, or feeds its classifier."""
    seen = []
    handle = model.heads.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits: Tensor = model(pixels)
    handle.remove()
    return logits if features == "logits" else seen[0]


@pytest.mark.parametrize("features", ["pre_logits", "logits"])
def test_torchvision_s_representation_layer(tmp_path: Path, features: str) -> None:
    model = torchvision_vit(representation_size=24)
    pixels = some_pixels(32)
    expected = torchvision_forward(model, pixels, features)
    assert expected.shape[1] == (5 if features == "logits" else 24)
    converted = from_torchvision(model.state_dict(), num_heads=2, features=features)
    torch.testing.assert_close(converted(pixels), expected, **TOLERANCE)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    options = ModelOptions(SMALLEST, str(tmp_path / "weights.pth"), features, image_size=32)
    torch.testing.assert_close(load_backbone(options)(pixels), expected, **TOLERANCE)


def test_torchvision_weights_inside_another_model_and_under_old_names() -> None:
    # Three heads of 64, which from_torchvision assumes.
    model = torchvision_vit(num_layers=2, num_heads=3, hidden_dim=192)
    expected = torchvision_forward(model, some_pixels(32), "pre_logits")
    weights: dict[str, Tensor] = dict(model.state_dict())
    larger = {f"net.{name}": value for name, value in weights.items()}
    larger["prompts"] = torch.zeros(4, 192)
    old = renamed(renamed(weights, ".mlp.0.", ".mlp.linear_1."), ".mlp.3.", ".mlp.linear_2.")
    assert old.keys() != weights.keys()
    for each in (larger, old):
        torch.testing.assert_close(from_torchvision(each)(some_pixels(32)), expected, **TOLERANCE)


def test_from_torchvision_reads_the_sizes_and_is_told_the_heads() -> None:
    sizes = {"num_layers": 2, "num_heads": 6, "hidden_dim": 48, "mlp_dim": 80}
    model = torchvision_vit(64, **sizes)
    backbone = from_torchvision(model.state_dict(), num_heads=6)
    assert (backbone.embed_dim, backbone.depth, backbone.image_size) == (48, 2, 64)
    # 256 / 224 of 64 is 73.1
    assert backbone.transform == Transform(64, 73, IMAGENET_MEAN, IMAGENET_STD)
    pixels = some_pixels(64)
    expected = torchvision_forward(model, pixels, "pre_logits")
    torch.testing.assert_close(backbone(pixels), expected, **TOLERANCE)
    other = from_torchvision(model.state_dict(), num_heads=3)
    assert not torch.allclose(other(pixels), expected, atol=1e-3)
    assert other.checksum() != backbone.checksum()
    with pytest.raises(InputError, match="no tensor shows it: pass num_heads"):
        from_torchvision(model.state_dict())  # 48 / 64 is no number of heads


@pytest.mark.parametrize("change", ["none", "absent", "shape", "foreign"])
def test_from_torchvision_refuses_other_tensors(change: str) -> None:
    weights = dict(torchvision_vit(num_layers=2).state_dict())
    matches = {
        "none": "expected the weights of torchvision's VisionTransformer.*got nothing",
        "absent": "do not fit together",
        "shape": "do not fit together",
        "foreign": "expected the weights of torchvision's VisionTransformer.*got cls_token",
    }
    if change == "none":
        weights = {}
    elif change == "absent":
        del weights["encoder.layers.encoder_layer_1.ln_1.weight"]
    elif change == "shape":
        weights["encoder.ln.bias"] = torch.zeros(63)
    else:
        weights = dict(timm.create_model(SMALLEST).state_dict())
    with pytest.raises(InputError, match=matches[change]) as caught:
        from_torchvision(weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [40, 8, 0])
def test_from_torchvision_refuses_a_size_that_patches_do_not_fill(size: int) -> None:
    weights = torchvision_vit(num_layers=1).state_dict()
    with pytest.raises((InputError, ConfigError), match="multiple"):
        from_torchvision(weights, image_size=size)


def test_from_torchvision_refuses_logits_without_a_classifier() -> None:
    weights = torchvision_vit(num_layers=2).state_dict()
    bare = {name: value for name, value in weights.items() if not name.startswith("heads.")}
    assert from_torchvision(bare).feature_dim == 64
    with pytest.raises(ConfigError, match=r"weights with a classifier.*features=pre_logits"):
        from_torchvision(bare, features="logits")
    with pytest.raises(ConfigError, match="did you mean 'logits'"):
        from_torchvision(weights, features="logit")


def interpolated(embedding: Tensor, prefix: int, old: int, new: int) -> Tensor:
    """A position embedding (1, prefix + old^2, d) for new^2 patches: bicubic, antialiased."""
    grid = embedding[:, prefix:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    return torch.cat([embedding[:, :prefix], grid.flatten(2).transpose(1, 2)], dim=1)


@pytest.mark.parametrize(("old", "new"), [(2, 3), (3, 2)])
def test_position_embedding_for_another_image_size(tmp_path: Path, old: int, new: int) -> None:
    weights = torchvision_vit(16 * old).state_dict()
    expected = interpolated(weights["encoder.pos_embedding"], 1, old, new)
    torch.save(weights, tmp_path / "weights.pth")
    options = ModelOptions(SMALLEST, str(tmp_path / "weights.pth"), image_size=16 * new)
    converted = from_torchvision(weights, num_heads=2, image_size=16 * new)
    for backbone in (load_backbone(options), converted):
        assert backbone.image_size == 16 * new
        torch.testing.assert_close(backbone.vit.pos_embed, expected, **TOLERANCE)
        pixels = some_pixels(16 * new)
        by_hand = backbone.vit.patch_embed(pixels).reshape(3, new * new, 64) + expected[:, 1:]
        torch.testing.assert_close(backbone.embed(pixels)[:, 1:], by_hand, **TOLERANCE)


def test_position_embedding_without_place_for_registers(tmp_path: Path) -> None:
    weights = timm.create_model(REGISTERS, img_size=42, num_classes=0).state_dict()
    assert weights["pos_embed"].shape == (1, 9, 384)  # 3 x 3 patches alone
    save_file(weights, tmp_path / "weights.safetensors")
    path = str(tmp_path / "weights.safetensors")
    backbone = load_backbone(ModelOptions(REGISTERS, path, image_size=28))
    expected = interpolated(weights["pos_embed"], 0, 3, 2)
    torch.testing.assert_close(backbone.vit.pos_embed.data, expected, **TOLERANCE)
    assert torch.equal(backbone.vit.reg_token.data, weights["reg_token"])


# ---------------------------------------------------------------- transforms


def random_image(height: int, width: int, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (height, width, 3), dtype=np.uint8)


def transformed(transform: Transform, image: np.ndarray) -> Tensor:
    mean, std = torch.tensor(transform.mean), torch.tensor(transform.std)
    return transform(torch.from_numpy(image)[None], mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1))[0]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(200, 300), (500, 310)], ids=["enlarged", "reduced"])
def test_the_paper_s_transform_is_torchvision_s(interpolation: str, shape: tuple[int, int]) -> None:
    # In the middle of the range, so that cubic weights cannot leave it and nothing is clamped.
    image = random_image(*shape, 80, 176)
    mode = reference.InterpolationMode(interpolation)
    theirs = reference.Compose(
        [
            reference.Resize(256, mode),
            reference.CenterCrop(224),
            reference.ToTensor(),
            reference.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )(Image.fromarray(image))
    ours = transformed(Transform(224, 256, IMAGENET_MEAN, IMAGENET_STD, interpolation), image)
    assert ours.shape == (3, 224, 224)
    # Pillow rounds to whole grey levels after each of two passes: by half a level each, and the
    # second pass multiplies the first one's error by the sum of its weights' sizes, which is 1 for
    # linear and at most 1.25 (at the middle of two pixels: 9/16 + 9/16 + 1/16 + 1/16) for cubic
    # ones. When an image is reduced the weights are sampled more densely and normalised, which is
    # bounded by the same figure up to 2 %.
    gain = 1.0 if interpolation == "bilinear" else 1.25
    tolerance = (0.5 * gain * 1.02 + 0.5) / 255 / min(IMAGENET_STD)
    assert (ours - theirs).abs().max() <= tolerance
    # Their errors are even about zero.
    assert (ours - theirs).mean().abs() < tolerance / 20


def test_the_crop_is_the_centre_and_the_statistics_are_per_channel() -> None:
    image = random_image(256, 256)
    ours = transformed(Transform(224, 256, IMAGENET_MEAN, IMAGENET_STD), image)
    crop = image[16:240, 16:240].astype(np.float64) / 255
    expected = ((crop - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_cubic_weights_leave_no_pixel_outside_the_range() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, 8:] = 255  # an edge, at which cubic weights overshoot
    ours = transformed(Transform(48, None, (0, 0, 0), (1, 1, 1), "bicubic"), image)
    assert (ours.min(), ours.max()) == (0, 1)


def test_transforms_are_the_model_s_own_and_options_replace_them() -> None:
    # timm: 224 / 0.9 is 248.9, cut down to 248, cubic, pixels in [-1, 1]; 248 * 32 / 224 is 35.4
    halves = (0.5, 0.5, 0.5)
    config = timm.get_pretrained_cfg(TINY).to_dict()
    assert timm_vit.published_transform(config) == Transform(224, 248, halves, halves, "bicubic")
    assert drawn(TINY).transform == Transform(32, 35, halves, halves, "bicubic")
    backbone = drawn(
        SMALLEST,
        resize=60,
        interpolation="bilinear",
        mean=list(IMAGENET_MEAN),
        std=list(IMAGENET_STD),
    )
    assert backbone.transform == Transform(48, 60, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
    image = random_image(60, 60)
    crop = image[6:54, 6:54].astype(np.float64) / 255
    expected = ((crop - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)
    pixels = backbone.preprocess(torch.from_numpy(image)[None])
    np.testing.assert_allclose(pixels[0].numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"resize": 31, "image_size": 32}, r"model\.resize: expected at least .*\(32\).*got 31"),
        ({"features": "logit"}, "model.features: .*got 'logit'; did you mean 'logits'"),
        ({"interpolation": "nearest"}, "model.interpolation: expected one of bilinear, bicubic"),
        ({"image_size": 0}, "model.image_size: expected an integer >= 1, got 0"),
        ({"resize": -1}, "model.resize: expected an integer >= 1, got -1"),
        ({"mean": [0.5, 0.5]}, "model.mean: expected 3 finite numbers"),
        ({"mean": [0.5, 0.5, float("nan")]}, "model.mean: expected 3 finite numbers"),
        ({"std": [0.5, 0.5, 0.0]}, "model.std: expected 3 finite positive numbers"),
        ({"pretrained": ""}, "model.pretrained: expected true, false or a file"),
        ({"backbone": ""}, "model.backbone: expected a name or a file"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], match: str) -> None:
    refused(match, **{"backbone": TINY, "pretrained": False, **options})


# ---------------------------------------------------------------- networks that are refused


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("vit_tiny_patch16_22", f"got 'vit_tiny_patch16_22'; did you mean '{TINY}'"),
        ("vit_tiny", "or a Vision Transformer of timm, got 'vit_tiny'"),
        (f"{TINY}.augreg", f"no weights 'augreg' for {TINY}.*did you mean '{TINY}.augreg_in21k'"),
        ("resnet18", "'resnet18' is no plain Vision Transformer.*ResNet.*prompts could not"),
        ("swin_tiny_patch4_window7_224", "no plain Vision Transformer.*SwinTransformer"),
        ("eva02_tiny_patch14_224", "no plain Vision Transformer.*Eva.*did you mean 'vit_tiny"),
    ],
)
def test_other_networks_are_refused(name: str, match: str) -> None:
    refused(match, backbone=name, pretrained=False)


@pytest.mark.parametrize(
    ("name", "size", "nearest"), [(TINY, 40, 32), (TINY, 8, 16), (REGISTERS, 224 + 8, 238)]
)
def test_a_size_that_patches_do_not_fill_is_refused(name: str, size: int, nearest: int) -> None:
    # 40 / 16 is 2.5, which rounds to the even 2; 8 is less than a patch; 232 / 14 is 16.6
    match = rf"model.image_size: expected a multiple .* got {size}; try {nearest}$"
    refused(match, backbone=name, pretrained=False, image_size=size)


def test_logits_of_a_network_without_a_classifier_are_refused(tmp_path: Path) -> None:
    match = "features=logits: expected a backbone with a classifier.*use model.features=pre_logits"
    options = {"backbone": REGISTERS, "features": "logits", "image_size": 28}
    refused(match, pretrained=False, **options)
    save_file(
        timm.create_model(SMALLEST, img_size=48, num_classes=0).state_dict(),
        tmp_path / "bare.safetensors",
    )
    path = str(tmp_path / "bare.safetensors")
    refused(match, backbone=SMALLEST, pretrained=path, features="logits", image_size=48)


# ---------------------------------------------------------------- files that are refused


def refused_file(path: Path, match: str, name: str = SMALLEST, **options: Any) -> str:
    line = refused(match, backbone=name, pretrained=str(path), **{"image_size": 48, **options})
    assert str(path) in line
    return line


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A file's content for `SMALLEST` at 48 pixels; not to be changed."""
    model = timm.create_model(SMALLEST, img_size=48, num_classes=3)
    return dict(randomise(model).state_dict())


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused_file(tmp_path / "absent.pth", "expected a file of weights, got no file at")
    refused_file(tmp_path, "expected a file of weights, got no file at")  # a folder
    refused_file(tmp_path / "dinov2_s14.safetensors", "fedprompt fetch dinov2_s14' writes it")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "text",
    [
        "<!DOCTYPE html><title>404</title>",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "Not Found",
        "hello",
        "",
    ],
    ids=["html", "lfs", "answer", "word", "empty"],
)
def test_a_text_as_weights_is_called_unreadable(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_text(text)
    kind = "safetensors" if suffix == ".safetensors" else "a torch file"
    line = refused_file(path, f"cannot be read as {kind}.*copy or download it again")
    assert "run code" not in line


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_a_truncated_file_is_refused(
    tmp_path: Path, weights: dict[str, Tensor], suffix: str, share: float
) -> None:
    path = tmp_path / f"torn{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused_file(path, "cannot be read as .*copy or download it again")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_does_not_run(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "shown")))
    assert (tmp_path / "shown").is_dir()  # the trap works
    torch.save({**weights, "extra": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    torch.save(timm.create_model(SMALLEST), tmp_path / "model.pth")  # a whole model
    for name in ("trap", "raw", "model"):
        line = refused_file(tmp_path / f"{name}.pth", "more than tensors and could run code")
        assert "save model.state_dict() alone" in line
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, weights: dict[str, Tensor], suffix: str, value: float
) -> None:
    name = "blocks.3.mlp.fc1.bias"
    bad = weights[name].clone()
    bad[-1] = value
    path = tmp_path / f"bad{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)({**weights, name: bad}, path)
    refused_file(path, f"expected finite weights, got NaN or infinity in '{re.escape(name)}'")


def test_weights_of_another_model_are_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    files = {
        "resnet": timm.create_model("test_resnet", num_classes=0).state_dict(),
        "wider": timm.create_model("test_vit3", img_size=48, num_classes=0).state_dict(),
        "torchvision": torchvision_vit(num_layers=7).state_dict(),
        "lacking": {k: v for k, v in weights.items() if k != "blocks.5.attn.qkv.bias"},
        "more": {**weights, "blocks.6.attn.qkv.bias": torch.zeros(192)},
        "nothing": {},
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(dict(content), path)
        refused_file(path, f"the weights in .* do not fit {SMALLEST} .*timm's or torchvision's")


def test_weights_for_another_patch_are_refused(tmp_path: Path) -> None:
    # timm would resample the patch embedding, and the network would quietly be a poor one.
    with torch.device("meta"):
        assert timm.create_model(SMALLEST).patch_embed.patch_size == (16, 16)
    model = timm.create_model(SMALLEST, patch_size=8, img_size=24, num_classes=0)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    refused_file(tmp_path / "weights.safetensors", "a patch of 8x8 instead of 16x16")


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(3)],
        {"epoch": 3},
        {0: torch.zeros(3)},
        {"pos_embed": torch.zeros(5)},
        {"fc_norm.pre_logits.weight": torch.zeros(5)},
    ],
    ids=["list", "number", "integer name", "flat positions", "flat layer"],
)
def test_odd_contents_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "odd.pth")
    refused_file(tmp_path / "odd.pth", "expected a state_dict of tensors in|do not fit")


def test_a_classifier_without_rows_is_none(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save({**weights, "head.weight": torch.tensor(1.0)}, tmp_path / "odd.pth")
    match = "features=logits: expected a backbone with a classifier"
    refused(
        match,
        backbone=SMALLEST,
        pretrained=str(tmp_path / "odd.pth"),
        features="logits",
        image_size=48,
    )


# ---------------------------------------------------------------- fetching


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub; whoever asks for a connection is told that there is no network."""

    def unreachable(address: tuple[str, int], *_: Any, **__: Any) -> socket.socket:
        raise OSError(f"no route to {address[0]}")

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    return folder


def no_download(*_: Any, **__: Any) -> Any:
    raise AssertionError("timm was asked to fetch")


WHERE = (
    r"get 'model.safetensors' of the hub's repository "
    rf"'timm/{TINY}.augreg_in21k_ft_in1k' on a machine with a network, "
    r"put it anywhere on this one and set model.pretrained=PATH/model.safetensors$"
)


@pytest.mark.usefixtures("hub")
def test_without_a_network_one_line_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_vit, "_create", no_download)
    refused(rf"cannot be fetched \(no route to hub.invalid\); {WHERE}", backbone=TINY)


@pytest.mark.usefixtures("hub")
def test_offline_by_environment_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_vit, "_create", no_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(rf"cannot be fetched \(HF_HUB_OFFLINE is set\); {WHERE}", backbone=TINY)


@pytest.mark.usefixtures("hub")
def test_a_download_that_fails_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("429\nToo Many Requests")

    monkeypatch.setattr(timm_vit, "_check_network", lambda: None)
    monkeypatch.setattr(timm_vit, "_create", fail)
    refused(rf"cannot be fetched \(429 Too Many Requests\); {WHERE}", backbone=TINY)


@pytest.mark.usefixtures("hub")
def test_a_network_without_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_vit, "_create", no_download)
    assert not timm.list_pretrained("test_vit4*")
    refused("timm publishes no weights for test_vit4.*FILE or false$", backbone="test_vit4")


@pytest.mark.usefixtures("hub")
def test_timm_fetches_what_the_options_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, **settings: Any) -> Any:
        asked.append((name, settings))
        return timm.create_model(name, **{**settings, "pretrained": False})

    monkeypatch.setattr(timm_vit, "_check_network", lambda: None)
    monkeypatch.setattr(timm_vit, "_create", fetch)
    backbone = load_backbone(ModelOptions(SMALLEST, image_size=48, features="logits"))
    assert asked == [(SMALLEST, {"pretrained": True, "img_size": 48, "num_classes": 1000})]
    assert backbone.feature_dim == 1000


def test_fetched_weights_are_used_again_without_a_network(
    hub: Path, weights: dict[str, Tensor]
) -> None:
    # As the hub's client keeps files: refs/main names the snapshot.
    repository = hub / "models--timm--test_vit.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file(weights, snapshot / "model.safetensors")
    backbone = load_backbone(ModelOptions(SMALLEST, image_size=48))
    head = ("head.weight", "head.bias")
    assert backbone.vit.state_dict().keys() == weights.keys() - head
    for key, value in backbone.vit.state_dict().items():
        assert torch.equal(value, weights[key])


# ---------------------------------------------------------------- a whole run


def test_a_run_with_drawn_weights_and_with_the_same_from_a_file(
    tiny: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(pretrained: str, folder: str) -> fedprompt.RunResult:
        return fedprompt.run(
            "digits",
            tiny(
                "model=timm",
                f"model.backbone={SMALLEST}",
                f"model.pretrained={pretrained}",
                "model.image_size=32",
                "prompts.selection=keyed",
                "prompts.query=cls",
                "clients.per_round=2",
                f"run_dir={tmp_path / folder}",
            ),
        )

    first = run("false", "drawn")
    assert first.state.round_index == 2
    assert first.state.prompts.shape[1] == first.state.keys.shape[1] == 64
    assert all(bool(value.isfinite().all()) for value in first.state.tensors().values())
    monkeypatch.chdir(tmp_path)
    drawn_again = load_backbone(ModelOptions(SMALLEST, False, image_size=32))
    save_file(drawn_again.vit.state_dict(), "same.safetensors")
    # The same network, and so the same bits, whatever its weights came from.
    second = run("same.safetensors", "given")
    assert second.summary["state_sha256"] == first.summary["state_sha256"]
