"""The encoder out of an ONNX graph: a made-up graph of two blocks, and files that are none."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.models.dinov2_onnx import read_encoder

WIDTH, PATCH, GRID, BLOCKS = 12, 2, 3, 2
LINEAR = {
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    "attention.attention.query": "q",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def network() -> timm.models.VisionTransformer:
    """timm's, with random values everywhere; what the graph must give back."""
    vit = timm.models.VisionTransformer(
        img_size=PATCH * GRID,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=BLOCKS,
        num_heads=2,
        num_classes=0,
        init_values=1.0,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return vit


def exported(state: dict[str, Tensor]) -> onnx.ModelProto:
    """The state as PyTorch would export Hugging Face's module: constants under its names, weights
    of linear layers transposed and nameless, the products and sums that say whose they are.
    """
    constants: dict[str, Tensor] = {
        "backbone.embeddings.cls_token": state["cls_token"],
        "onnx::Concat_1": state["pos_embed"][:, :1],
        "onnx::Reshape_2": state["pos_embed"][:, 1:],
        "decoder.final.weight": torch.ones(3),
    }
    nodes = [
        helper.make_node("Reshape", ["onnx::Reshape_2", "shape"], ["grid"]),
        helper.make_node("Concat", ["onnx::Concat_1", "grid"], ["position"], axis=1),
    ]
    for kind in ("weight", "bias"):
        name = "backbone.embeddings.patch_embeddings.projection"
        constants[f"{name}.{kind}"] = state[f"patch_embed.proj.{kind}"]
        constants[f"backbone.layernorm.{kind}"] = state[f"norm.{kind}"]
    for block in range(BLOCKS):
        own = {
            name.removeprefix(f"blocks.{block}."): value
            for name, value in state.items()
            if name.startswith(f"blocks.{block}.")
        }
        for kind in ("weight", "bias"):
            parts = own.pop(f"attn.qkv.{kind}").chunk(3)
            own |= {f"{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        prefix = f"backbone.encoder.layer.{block}."
        for name in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                constants[f"{prefix}{name}.{kind}"] = own[f"{name}.{kind}"]
        for number in (1, 2):
            constants[f"{prefix}layer_scale{number}.lambda1"] = own[f"ls{number}.gamma"]
        for count, (theirs, ours) in enumerate(LINEAR.items()):
            weight, bias = f"onnx::MatMul_{100 * block + count}", f"{prefix}{theirs}.bias"
            constants[weight], constants[bias] = own[f"{ours}.weight"].T, own[f"{ours}.bias"]
            product = f"{weight}_product"
            nodes.append(helper.make_node("MatMul", ["x", weight], [product]))
            order = [bias, product] if count % 2 else [product, bias]  # both occur
            nodes.append(helper.make_node("Add", order, [f"{weight}_sum"]))
    initialisers = [
        numpy_helper.from_array(np.ascontiguousarray(value.numpy()), name)
        for name, value in constants.items()
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "encoder", [given], [], initialisers)
    return helper.make_model(graph)


def test_every_tensor_comes_back(tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in network().state_dict().items()}
    onnx.save(exported(state), str(tmp_path / "a.onnx"))
    found = read_encoder(tmp_path / "a.onnx")
    assert found.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        assert found[name].is_contiguous()
    network().load_state_dict(found, strict=True)


def without_position(model: onnx.ModelProto) -> None:
    del model.graph.node[0]


def without_a_bias(model: onnx.ModelProto) -> None:
    names = [each.name for each in model.graph.initializer]
    del model.graph.initializer[
        names.index("backbone.encoder.layer.1.attention.attention.key.bias")
    ]


@pytest.mark.parametrize("spoil", [without_position, without_a_bias])
def test_another_graph_is_refused(tmp_path: Path, spoil: object) -> None:
    model = exported(network().state_dict())
    spoil(model)  # type: ignore[operator]
    onnx.save(model, str(tmp_path / "a.onnx"))
    with pytest.raises(InputError, match=r"\A[^\n]*a\.onnx: expected the ONNX graph of a DINOv2"):
        read_encoder(tmp_path / "a.onnx")


def test_no_other_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors may lie in a file that the graph names."""
    monkeypatch.chdir(tmp_path)
    model = exported(network().state_dict())
    onnx.save(
        model,
        "a.onnx",
        save_as_external_data=True,
        location="other",
        size_threshold=0,
    )
    assert (tmp_path / "other").is_file()
    with pytest.raises(InputError, match=r"got another file \(tensors that lie in other files\)"):
        read_encoder(tmp_path / "a.onnx")


@pytest.mark.parametrize("content", [b"hello", b"", None])
def test_files_that_are_none(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"\A[^\n]*a\.onnx: expected the ONNX graph[^\n]*\Z"):
        read_encoder(tmp_path / "a.onnx")


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedprompt\[real\]'"):
        read_encoder(tmp_path / "a.onnx")
