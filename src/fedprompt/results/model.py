"""The model of a run: images in, probabilities out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedprompt.client.recipe import LocalRecipe
from fedprompt.core.checks import check_integer
from fedprompt.core.errors import InputError, suggest
from fedprompt.core.files import Json
from fedprompt.core.types import Broadcast, Parts, fresh
from fedprompt.core.words import counted
from fedprompt.data.prefix.tables import FeatureTable, compute_table
from fedprompt.data.prefix.whitening import Whitening, add_whitened
from fedprompt.data.task import Split
from fedprompt.models.backbone import Backbone
from fedprompt.results.images import Given, Pixels, read
from fedprompt.server.evaluate import Model, Subject, classify_piece, cut, network_of


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model says of N images."""

    names: tuple[str, ...]
    """Of each image: its path, or its number."""
    class_names: tuple[str, ...]
    probabilities: NDArray[np.float32]
    """(N, classes)"""
    prompts: NDArray[np.int64]
    """(N, k) which of the model's prompts each image was given; of a soft choice the likeliest."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) number of the likeliest class."""
        return np.asarray(self.probabilities.argmax(axis=1))

    @property
    def classes(self) -> list[str]:
        """Name of the likeliest class of each image."""
        return [self.class_names[label] for label in self.labels]

    def rows(self) -> list[Json]:
        """For each image `image`, `class`, `probability`, `prompts` and `probabilities`."""
        return [
            {
                "image": name,
                "class": self.class_names[int(own.argmax())],
                "probability": float(own.max()),
                "prompts": chosen.tolist(),
                "probabilities": dict(zip(self.class_names, own.tolist(), strict=True)),
            }
            for name, own, chosen in zip(self.names, self.probabilities, self.prompts, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.names)


class PromptedModel(nn.Module):
    """Frozen backbone, prompts, selection and head of a run, ready to be used.

    Made by `fedprompt.load`. Nothing in it requires a gradient.

    Args:
        backbone: the frozen network.
        recipe: how prompts are chosen, and which head.
        model: the tensors.
        class_names: one name a class.
        domains: of each domain by name, the numbers of its classes.
        side: pixels of the square images that the run's data were.
        background: colour behind transparent pixels; None drops the transparency.
        whitening: maps of the queries that prompts are chosen by, if there are any.
    """

    addresses: Tensor

    def __init__(
        self,
        backbone: Backbone,
        recipe: LocalRecipe,
        model: Model,
        class_names: tuple[str, ...],
        domains: Mapping[str, list[int]],
        side: int,
        background: str | None = None,
        whitening: Mapping[str, Whitening] | None = None,
    ) -> None:
        super().__init__()
        self.recipe, self.model = recipe, model
        self.class_names, self.domains = class_names, dict(domains)
        self.side, self.background = side, background
        self.whitening = dict(whitening or {})
        self.class_mask = np.ones((len(domains) + 1, len(class_names)), dtype=bool)
        """(domains + 1, classes); the last row, of images whose domain is unknown, has all."""
        for row, own in enumerate(domains.values()):
            self.class_mask[row] = False
            self.class_mask[row, own] = True
        self.backbone = backbone
        self.network = network_of(model, recipe, backbone, self.class_mask, self.device)
        self.register_buffer("addresses", fresh(model.addresses).to(self.device))
        self.requires_grad_(False)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.backbone.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images that choose their prompts each for itself.

        Args:
            images: (B, H, W, 3) uint8.

        Returns:
            (B, classes)
        """
        pixels, _ = read(images, self.side, self.background)
        found = [logits for _, logits, _ in self._classified(self.table(pixels, None), 1)]
        return torch.cat(found)

    def predict(self, images: Given, batch: int = 1, domain: str | None = None) -> Predictions:
        """What the images show.

        Args:
            images: (N, H, W, 3) or (H, W, 3) uint8 as an array or a tensor; a path, a folder (all
                images in it), an image of Pillow, or a sequence of these.
            batch: images that choose their prompts together, in the order given, as those of one
                domain may; 1 lets each choose for itself. A run's `accuracy` has
                `prompts.eval_batch` of them, its `alone_accuracy` 1.
            domain: name of the domain that all images are of: only its classes are possible. None
                if it is not known.

        Raises:
            InputError: no image, one that does not decode, or an unknown domain.
        """
        check_integer("batch", batch, 1)
        pixels, names = read(images, self.side, self.background)
        return self.predict_table(self.table(pixels, domain), batch, names)

    def predict_table(
        self, table: FeatureTable, batch: int, names: tuple[str, ...] | None = None
    ) -> Predictions:
        """What the images of a table show.

        Args:
            table: from `table`.
            batch: images of one domain that choose their prompts together.
            names: one for each image; by default its number.
        """
        width = min(self.recipe.prompts.count, len(self.network.prompts))
        probabilities = np.empty((len(table), len(self.class_names)), dtype=np.float32)
        prompts = np.empty((len(table), width), dtype=np.int64)
        for index, logits, rows in self._classified(table, batch):
            probabilities[index] = logits.softmax(dim=1).cpu().numpy()
            prompts[index] = rows.cpu().numpy()
        names = tuple(map(str, range(len(table)))) if names is None else names
        return Predictions(names, self.class_names, probabilities, prompts)

    def table(self, pixels: Pixels, domain: str | None) -> FeatureTable:
        """Constants of some images, as a run keeps those of its splits.

        Args:
            pixels: (N, side, side, 3)
            domain: of all of them.
        """
        if domain is not None and domain not in self.domains:
            raise InputError(
                f"domain: expected one of {', '.join(self.domains)}, got '{domain}'"
                f"{suggest(domain, list(self.domains))}; leave it out if it is another one"
            )
        names = [*self.domains, None]
        count = len(pixels)
        split = Split(pixels, np.zeros(count, dtype=np.int64), np.full(count, names.index(domain)))
        return self.with_queries(compute_table(self.backbone, split, self.device))

    def with_queries(self, table: FeatureTable) -> FeatureTable:
        """A table with the whitened queries that prompts are chosen by, if there are any."""
        return add_whitened([table], self.whitening)[0] if self.whitening else table

    def _classified(
        self, table: FeatureTable, batch: int
    ) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
        """Images (B,) of a table, their logits (B, classes) and rows of the prompts (B, k)."""
        recipe = dataclasses.replace(
            self.recipe, prompts=dataclasses.replace(self.recipe.prompts, eval_batch=batch)
        )
        everything = np.arange(len(table), dtype=np.int64)
        for piece in cut(Subject(self._selecting(), 0, everything), recipe, table):
            logits, _ = classify_piece(piece, self.network, table)
            rows = piece.rows
            if piece.shares is not None:
                best = [
                    max(np.flatnonzero(piece.index == image), key=piece.shares.__getitem__)
                    for image in piece.images
                ]
                rows = rows[torch.tensor(best)]
            yield piece.images, logits, rows

    def _selecting(self) -> Model:
        """The model's tensors as the network has them now, where prompts are chosen: on the CPU."""
        network = self.network
        projection = None if network.projection is None else network.projection.cpu()
        shared = Parts(query_projection=projection)
        return Model(
            Broadcast(network.prompts.cpu(), network.keys.cpu(), shared), keys=self.addresses.cpu()
        )

    def __repr__(self) -> str:
        """One line; the layers are those of `backbone` and `network`."""
        return (
            f"PromptedModel({len(self.class_names)} classes, "
            f"{counted(len(self.domains), 'domain')}, "
            f"{counted(len(self.network.prompts), 'prompt')} of which an image gets "
            f"{self.recipe.prompts.count})"
        )
