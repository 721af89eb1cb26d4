"""DINOv2's encoder out of an ONNX graph that PyTorch exported, as the state dict of timm's model.

PyTorch keeps the names of most tensors of Hugging Face's `Dinov2Model`. The weights of linear
layers lose theirs: they are stored transposed, as `onnx::MatMul_*`, and the product is the input
of an Add whose other input is the bias, which has kept its name. The position embedding comes in
two constants, that of the CLS token and those of the patches.

Needs the package `onnx`, which reads the file and runs nothing of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedprompt.core.errors import ConfigError, InputError

_WHOLE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
"""Names below `encoder.layer.N.`, and timm's below `blocks.N.`."""
_QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))


def read_encoder(path: Path, prefix: str = "backbone.") -> dict[str, Tensor]:
    """The encoder's tensors under timm's names, float32.

    Args:
        path: the ONNX file.
        prefix: of the encoder's tensors in the graph; what stands beside it is left out.

    Raises:
        ConfigError: the package `onnx` is not installed.
        InputError: the file is no such graph.
    """
    try:
        import onnx
    except ImportError as error:
        raise ConfigError(
            "reading an ONNX file needs the package onnx, which is not installed; "
            "pip install 'fedprompt[real]'"
        ) from error
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
        if any(each.data_location == onnx.TensorProto.EXTERNAL for each in graph.initializer):
            raise ValueError("tensors that lie in other files")
        constants = {
            each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy())
            for each in graph.initializer
        }
        named = dict(_named(graph, constants, prefix))
        return _as_timm(named)
    except (OSError, ValueError, LookupError) as error:
        message = " ".join(str(error).split())[:150]
        raise _foreign(path, message) from error
    except Exception as error:  # protobuf's errors have no public family
        raise _foreign(path, type(error).__name__) from error


def _foreign(path: Path, cause: str) -> InputError:
    return InputError(
        f"{path}: expected the ONNX graph of a DINOv2 encoder as PyTorch exports it, got another "
        f"file ({cause}); get it again"
    )


def _named(graph: Any, constants: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The encoder's tensors under the names that the exported module had."""
    for name, tensor in constants.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), tensor
    # The product of an anonymous weight, and that weight.
    products = {
        node.output[0]: constants[node.input[1]]
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in constants
    }
    for node in graph.node:
        bias = next((each for each in node.input if each.startswith(prefix)), "")
        product = next((each for each in node.input if each in products), "")
        if node.op_type == "Add" and bias and product:
            name = bias.removeprefix(prefix).removesuffix("bias")
            yield f"{name}weight", products[product].T.contiguous()
    yield "position", _position(graph, constants)


def _position(graph: Any, constants: dict[str, Tensor]) -> Tensor:
    """The (1, 1 + patches, d) embedding: a constant (1, 1, d) that is concatenated with what a
    Resize makes of a constant (1, patches, d).
    """
    cls_parts = [
        constants[name]
        for node in graph.node
        if node.op_type == "Concat"
        for name in node.input
        if name in constants and constants[name].ndim == 3 and len(constants[name][0]) == 1
    ]
    patch_parts = [
        constants[node.input[0]]
        for node in graph.node
        if node.op_type == "Reshape" and node.input[0] in constants
        if constants[node.input[0]].ndim == 3
    ]
    if len(cls_parts) != 1 or len(patch_parts) != 1:
        raise ValueError(
            f"{len(cls_parts)} and {len(patch_parts)} constants that look like position embeddings"
        )
    return torch.cat([cls_parts[0], patch_parts[0]], dim=1)


def _as_timm(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names; query, key and value are stacked."""
    blocks = {
        int(found[1]) for name in named if (found := re.match(r"encoder\.layer\.(\d+)\.", name))
    }
    result = {"pos_embed": named["position"]}
    for name, tensor in named.items():
        for old, new in _WHOLE.items():
            if name == old or name.startswith(f"{old}."):
                result[new + name.removeprefix(old)] = tensor
    for block in sorted(blocks):
        source, target = f"encoder.layer.{block}.", f"blocks.{block}."
        for kind in ("weight", "bias"):
            parts = [named[f"{source}{name}.{kind}"] for name in _QKV]
            result[f"{target}attn.qkv.{kind}"] = torch.cat(parts)
        for old, new in _BLOCK.items():
            for ending in ("", ".weight", ".bias"):
                if f"{source}{old}{ending}" in named:
                    result[f"{target}{new}{ending}"] = named[f"{source}{old}{ending}"]
    return {name: tensor.float().contiguous() for name, tensor in result.items()}
