"""A run's model as an ONNX graph: images in, logits out.

Preprocessing, backbone, selection of prompts and head are in the graph. Each image chooses its
prompts by itself, as `PromptedModel.forward` has it: a graph knows nothing of the images beside
one that may be of its domain.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedprompt.core.errors import ConfigError
from fedprompt.models.selection import key_scores
from fedprompt.results.images import Pixels
from fedprompt.results.model import PromptedModel
from fedprompt.server.mixing import sets_of, shares_of

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""Of the extra `export`."""
LARGEST_DIFFERENCE = 1e-3
"""Of a logit, between the model and its graph."""
ONE_FILE = 1_500_000_000
"""Bytes of tensors above which they lie in a file of their own: a graph holds 2 GB at most."""


def check_packages() -> None:
    """Refuse to export where the packages for it are missing.

    Raises:
        ConfigError: names them, and the command that installs them.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--onnx: expected the packages {', '.join(PACKAGES)}, got no {', '.join(missing)}; "
            "pip install 'fedprompt[export]', or leave the graph out with --no-onnx"
        )


class ImageGraph(nn.Module):
    """The model as one function of a batch of images, without a branch that depends on them.

    Args:
        model: of a run.
    """

    def __init__(self, model: PromptedModel) -> None:
        super().__init__()
        self.model = model
        self.options = model.recipe.prompts
        self.mixes = self.options.choice == "soft" and self.options.tells_spread
        if self.mixes:
            self.sets, self.set_of = sets_of(
                model.addresses, model.network.keys, self.options.count
            )

    def forward(self, images: Tensor) -> Tensor:
        """Logits among all classes.

        Args:
            images: (B, S, S, 3) uint8, S = `model.side`.

        Returns:
            (B, classes)
        """
        backbone, network = self.model.backbone, self.model.network
        constants = backbone.constants(backbone.embed(backbone.preprocess(images)))
        if not self.model.recipe.needs_tokens:
            return self._head(constants["features"])
        tokens = constants["tokens"]
        if self.mixes:
            scores = self._key_scores(constants).double()
            shares = shares_of(scores, self.set_of, len(self.sets))
            found = [self._head(network.encode(tokens, rows)).softmax(dim=1) for rows in self.sets]
            return (torch.stack(found, dim=2) * shares[:, None]).sum(dim=2).log()
        return self._head(network.encode(tokens, self._rows(constants)))

    def _head(self, features: Tensor) -> Tensor:
        logits: Tensor = self.model.network.head(features)
        return logits

    def _rows(self, constants: Mapping[str, Tensor]) -> Tensor:
        """(B, k) prompts of each image, or (k,) the same for all."""
        network, count = self.model.network, self.options.count
        if count == 0 or self.options.selection == "all":
            return torch.arange(len(network.prompts) if count else 0, device=network.prompts.device)
        if self.options.selection == "keyed":
            scores = self._key_scores(constants)
        else:
            # Of one image every vote counts once.
            assert network.projection is not None
            queries = F.normalize(constants["cls"] @ network.projection.T, dim=-1)
            addresses = network.prompts[:, : network.projection.shape[0]]
            scores = queries @ F.normalize(addresses, dim=-1).T
        best = scores.topk(min(count, scores.shape[1]), dim=1).indices
        return best.sort(dim=1).values

    def _key_scores(self, constants: Mapping[str, Tensor]) -> Tensor:
        """(B, n) how well each key fits each image."""
        kind = self.options.query
        both = kind == "both"
        queries = torch.cat([constants["style"], constants["cls"]], 1) if both else constants[kind]
        if self.options.selects_by_whitened:
            queries = self._whitened(queries)
        score = functools.partial(key_scores, self.options, keys=self.model.network.keys)
        scores: Tensor = torch.vmap(score)(queries)
        return scores

    def _whitened(self, queries: Tensor) -> Tensor:
        """As `data.prefix.whitening` has it, in double precision: (B, q) -> (B, q)."""
        found = self.model.whitening[self.options.query_kind]
        centre, matrix = (torch.from_numpy(each) for each in (found.centre, found.matrix))
        whitened = (queries.double() - centre) @ matrix
        lengths: Tensor = whitened.norm(dim=1, keepdim=True)
        unit: Tensor = (whitened / lengths.clamp_min(1e-12)).float()
        return unit


def write_onnx(model: PromptedModel, path: Path, images: Pixels) -> float:
    """Write the graph of a model and compare it with the model.

    Args:
        model: on the CPU.
        path: of the graph; very large tensors lie beside it, in `NAME.data`.
        images: (B, S, S, 3) to compare on, B > 1.

    Returns:
        The largest difference of a logit, of all images together and of each alone.

    Raises:
        ConfigError: the model has no graph, or its graph says something else.
    """
    given = torch.from_numpy(images)
    with torch.no_grad():
        expected = model(given).numpy()
    batches = [images, *(images[row : row + 1] for row in range(len(images)))]
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    try:
        with _quiet():
            program = torch.onnx.export(
                ImageGraph(model).eval(),
                (given,),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
            )
            assert program is not None
            _without_traces(program.model)
            program.save(str(path), external_data=size > ONE_FILE)
        found = run_onnx(path, batches)
    except Exception as error:  # whatever an adaptation makes torch, ONNX or the runtime raise
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise ConfigError(
            f"--onnx: expected a model that torch.onnx can export, got {type(error).__name__}: "
            f"{cause}; leave the graph out with --no-onnx"
        ) from error
    together, *alone = found
    difference = max(
        largest_difference(together, expected),
        largest_difference(np.concatenate(alone), expected),
    )
    if not difference <= LARGEST_DIFFERENCE:
        raise ConfigError(
            f"--onnx: expected logits within {LARGEST_DIFFERENCE:g} of the model's on "
            f"{len(images)} images, got a difference of {difference:.3g}; leave the graph out with "
            "--no-onnx"
        )
    return difference


def run_onnx(path: Path, batches: Sequence[Pixels]) -> list[NDArray[np.float32]]:
    """Logits (B, classes) of some batches by ONNX Runtime on the CPU.

    Args:
        path: of the graph.
        batches: each (B, S, S, 3) uint8.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [np.asarray(session.run(["logits"], {"images": images})[0]) for images in batches]


def largest_difference(found: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """Of two arrays of one shape; infinities of one sign do not differ, NaN differs from all.

    >>> largest_difference(np.array([1.0, -np.inf]), np.array([1.5, -np.inf]))
    0.5
    """
    with np.errstate(invalid="ignore"):
        apart = np.where(found == expected, 0.0, np.abs(found - expected))
    return float(np.where(np.isnan(apart), np.inf, apart).max())


def _without_traces(graph: object) -> None:
    """Take out what the exporter notes of this machine: places in source files."""
    for node in graph.graph:  # type: ignore[attr-defined]
        node.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnxscript say of themselves."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(nowhere):  # a graph that fails is printed
                yield
    finally:
        logging.disable(before)
