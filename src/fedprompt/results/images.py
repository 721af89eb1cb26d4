"""Images that a user has, as the square pixels that a run's data were."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fedprompt.core.errors import InputError
from fedprompt.data.reading.files import image_names
from fedprompt.data.reading.images import decode, square, to_rgb

Pixels: TypeAlias = NDArray[np.uint8]
One: TypeAlias = "str | os.PathLike[str] | Image.Image | Pixels"
Given: TypeAlias = "One | torch.Tensor | Sequence[One]"


def read(images: Given, side: int, background: str | None) -> tuple[Pixels, tuple[str, ...]]:
    """Whatever was given as (N, side, side, 3) pixels, and a name for each.

    Args:
        images: (N, H, W, 3) or (H, W, 3) uint8 as an array or a tensor; a path, a folder (all its
            images, its folders' included), an image of Pillow, or a sequence of these.
        side: in pixels.
        background: colour behind transparent pixels; None drops the transparency.

    Raises:
        InputError: there is no image, one does not decode, or it is something else.
    """
    if isinstance(images, torch.Tensor):
        images = images.cpu().numpy()
    each = list(_each(images))
    if not each:
        raise InputError("images: expected at least one, got none")
    pixels = np.stack([_square(one, side, background) for one in each])
    return pixels, tuple(
        os.fspath(one) if isinstance(one, str | os.PathLike) else str(number)
        for number, one in enumerate(each)
    )


def files_of(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as they are, and of folders all images in them, by name.

    Raises:
        InputError: a path does not exist, or a folder has no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            names = image_names(path)
            if not names:
                raise InputError(f"{path}: expected a folder with images, got none in it")
            found += [path / name for name in names]
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"{path}: expected a file or a folder, got nothing there")
    return found


def readable(
    files: Sequence[Path], side: int, background: str | None
) -> tuple[list[tuple[Path, Pixels]], list[str]]:
    """The files that decode, with their pixels, and what is wrong with the others.

    Args:
        files: of images.
        side: in pixels.
        background: colour behind transparent pixels.
    """
    good, faults = [], []
    for file in files:
        try:
            good.append((file, decode(file, side, background)))
        except InputError as error:
            # What it says of data.on_bad_image is about training.
            faults.append(str(error).partition("; replace the file")[0] + "; left out")
    return good, faults


def _each(images: Given) -> Iterable[One]:
    """One image after the other."""
    if isinstance(images, str | os.PathLike):
        return files_of([images])
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, np.ndarray):
        return [images] if images.ndim == 3 else list(images)
    return (part for image in images for part in _each(image))


def _square(image: One, side: int, background: str | None) -> Pixels:
    if isinstance(image, str | os.PathLike):
        return decode(image, side, background)
    if isinstance(image, Image.Image):
        return np.asarray(square(to_rgb(image, background), side))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise InputError(
            f"images: expected (N, H, W, 3) uint8, got one of shape {image.shape} and type "
            f"{image.dtype}; convert it to RGB"
        )
    if image.shape[:2] == (side, side):
        return image
    return np.asarray(square(Image.fromarray(image), side))
