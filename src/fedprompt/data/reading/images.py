"""Images that are read when they are needed: files that are decoded, arrays that are mapped.

Each class is an `Images` of `data.task` and can be cut (`take`). Pixels are those of Pillow: RGB,
the shorter side resized to `size` (bilinear, antialiased) and the middle cut out, which is
torchvision's `Resize(size)` and `CenterCrop(size)`; an image that is a square of that size stays as
it is. Grey, palette, CMYK and 16-bit grey images become RGB; transparency is dropped, or gets
a colour behind it where a data set asks for one; an orientation in EXIF data is left alone, as
torchvision does. Of an animation, the first frame is read. SVG drawings are rendered on white
(`reading.svg`). Which formats are opened, and up to which size, says `reading.raster`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.core.machine import available_cpus
from fedprompt.data.reading import raster, svg
from fedprompt.data.task import Images

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]
Items = Sequence[Any] | NDArray[np.object_]
CHUNK = 256
"""Encoded images that are held at a time."""
VERSION = f"fedprompt images 1, Pillow {PIL.__version__}"
"""Part of every fingerprint: another decoder may give other pixels."""


class LazyImages(Images, Protocol):
    """Images that can be cut without being read."""

    def take(self, index: Indices) -> LazyImages:
        """The images at these positions, in this order."""
        ...


def decode(
    source: str | os.PathLike[str] | bytes,
    size: int,
    background: str | None = None,
    name: str | None = None,
) -> Pixels:
    """One file as RGB: (size, size, 3) uint8.

    Args:
        source: the file, or its content.
        size: side in pixels.
        background: colour behind transparent pixels; None drops the transparency.
        name: what messages call it; by default the path.

    Raises:
        InputError: the file is no image that can be decoded; it is named.
        ConfigError: reading it needs a package that is not installed.
    """
    try:
        if not isinstance(source, bytes) and svg.is_svg(os.fspath(source)):
            return np.asarray(square(svg.render(Path(source), size), size))
        with raster.opened(source) as image:
            return np.asarray(square(to_rgb(image, background), size))
    except ConfigError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them raise
        message = " ".join(str(error).split()) or type(error).__name__
        where = name or ("an image" if isinstance(source, bytes) else os.fspath(source))
        raise InputError(
            f"{where}: the image does not decode ({message}); replace the file, or leave such "
            "images out with data.on_bad_image=skip"
        ) from error


def to_rgb(image: Image.Image, background: str | None = None) -> Image.Image:
    """Any mode as RGB; the upper eight bits of 16-bit grey; transparent pixels on a colour."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("grey values outside 0..65535")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if background is not None and "A" in image.getbands():
        behind = Image.new("RGBA", image.size, background)
        front = image if image.mode == "RGBA" else image.convert("RGBA")
        return Image.alpha_composite(behind, front).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # a copy may be 200 MB


def square(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to `size`, the middle cut out."""
    width, height = image.size
    short = min(width, height)
    if short != size:
        width, height = (size if side == short else int(size * side / short) for side in image.size)
        if width * height > raster.MAX_PIXELS:
            raise ValueError(f"its sides {image.size[0]} x {image.size[1]} are too unequal")
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


class ImageFiles:
    """Files that are decoded on access, several at a time.

    Args:
        root: folder that the names are relative to.
        names: one for each image.
        size: side of the squares that they become.
        background: colour behind transparent pixels; None drops the transparency.

    Raises:
        ConfigError: reading them needs a package that is not installed.
    """

    def __init__(
        self, root: Path, names: Sequence[str], size: int, background: str | None = None
    ) -> None:
        self.root = root
        self.size = size
        self.background = background
        if any(map(svg.is_svg, names)):
            svg.renderer()  # refuses before anything is started
        self.names: NDArray[np.object_] = np.array(names, dtype=object)
        self._status: NDArray[np.int64] | None = None

    @property
    def status(self) -> NDArray[np.int64]:
        """(N, 2): length in bytes and time of change in nanoseconds of each file.

        Asked for only when it is needed: a data set may list four times the images that it draws.

        Raises:
            InputError: a file does not exist; the first is named and all are counted.
        """
        if self._status is None:
            self._status = _status(self.root, self.names.tolist())
        return self._status

    def all_there(self) -> ImageFiles:
        """Itself, after checking that every file exists; for names that come from a list.

        Raises:
            InputError: a file does not exist.
        """
        self._status = self.status
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, size, size, 3)"""
        return (len(self.names), self.size, self.size, 3)

    def __getitem__(self, index: slice | Indices) -> Pixels:
        return _decoded(self._decode, self.names[index], self.size)

    def name_of(self, position: int) -> str:
        """The path of an image, for messages."""
        return str(self.root / self.names[position])

    def _decode(self, name: str) -> Pixels:
        return decode(self.root / name, self.size, self.background)

    def take(self, index: Indices) -> ImageFiles:
        """The images at these positions, in this order."""
        chosen = ImageFiles(self.root, [], self.size, self.background)
        chosen.names = self.names[index]
        chosen._status = None if self._status is None else self._status[index]
        return chosen

    def paths(self) -> list[str]:
        """The files' absolute paths."""
        root = os.path.abspath(self.root)  # noqa: PTH100
        return [os.path.normpath(f"{root}/{name}") for name in self.names]

    def undecodable(self) -> Indices:
        """Positions of the files that do not decode; every file is read."""

        return _undecodable(self._decode, self.names)

    def animated(self) -> Indices:
        """Positions of the WebP files that are animations; a few bytes of each file are read."""
        return np.array(
            [number for number, name in enumerate(self.names) if _is_animated(self.root / name)],
            np.int64,
        )

    def fingerprint(self) -> str:
        """SHA-256 over the size, the folder, and each file's name, length and time of change."""
        # With the folder: another one may hold other images of the same names, lengths and times.
        text = f"{VERSION}, files {self.size} in {self.root.resolve()}\n"
        if self.background is not None:
            text += f"on {self.background}\n"
        if any(map(svg.is_svg, self.names)):
            text += f"{svg.renderer()}\n"
        digest = hashlib.sha256(text.encode(errors="surrogateescape"))
        for name, (length, time) in zip(self.names, self.status.tolist(), strict=True):
            digest.update(f"{name}\0{length}\0{time}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


class EncodedImages:
    """Images whose encoded bytes something else holds; they are decoded on access.

    Args:
        read: positions of some images -> their bytes.
        where: what messages call the collection.
        identity: text that is another one whenever the images may be other ones.
        count: how many there are.
        size: side of the squares that they become.
    """

    def __init__(
        self,
        read: Callable[[Indices], Sequence[bytes]],
        where: str,
        identity: str,
        count: int,
        size: int,
    ) -> None:
        self.read, self.where, self.identity = read, where, identity
        self.size = size
        self.index: Indices = np.arange(count, dtype=np.int64)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, size, size, 3)"""
        return (len(self.index), self.size, self.size, 3)

    def __getitem__(self, index: slice | Indices) -> Pixels:
        chosen = self.index[index]
        each = zip(chosen.tolist(), self.read(chosen) if len(chosen) else (), strict=True)
        return _decoded(self._decode, list(each), self.size)

    def _decode(self, numbered: tuple[int, bytes]) -> Pixels:
        number, content = numbered
        return decode(content, self.size, name=f"{self.where}, row {number}")

    def name_of(self, position: int) -> str:
        """The row of an image, for messages."""
        return f"{self.where}, row {self.index[position]}"

    def take(self, index: Indices) -> EncodedImages:
        """The images at these positions, in this order."""
        chosen = EncodedImages(self.read, self.where, self.identity, 0, self.size)
        chosen.index = self.index[index]
        return chosen

    def undecodable(self) -> Indices:
        """Positions of the images that do not decode; every image is read."""
        bad: list[Indices] = []
        for start in range(0, len(self.index), CHUNK):
            rows = self.index[start : start + CHUNK]
            numbered = list(zip(rows.tolist(), self.read(rows), strict=True))
            bad.append(start + _undecodable(self._decode, numbered))
        return np.concatenate([np.zeros(0, np.int64), *bad])

    def fingerprint(self) -> str:
        """SHA-256 over the identity, the size and the positions."""
        digest = hashlib.sha256(f"{VERSION}, rows {self.identity} {self.size}\n".encode())
        digest.update(np.ascontiguousarray(self.index).data)
        return digest.hexdigest()


class ArrayImages:
    """Images of an array, which may be mapped from a file.

    Args:
        pixels: (N, H, W) grey or (N, H, W, 3) RGB; any strides.
        identity: text that is another one whenever the array may be another one.
        size: side of the squares that the images become; None keeps them.
        index: which of them, in which order; None takes all.
    """

    def __init__(
        self, pixels: Pixels, identity: str, size: int | None = None, index: Indices | None = None
    ) -> None:
        if pixels.ndim == 3:
            pixels = np.broadcast_to(pixels[..., None], (*pixels.shape, 3))
        self.pixels = pixels
        self.identity = identity
        self.size = None if pixels.shape[1:3] == (size, size) else size
        self.index = np.arange(len(pixels)) if index is None else index

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)"""
        height, width = self.pixels.shape[1:3] if self.size is None else (self.size, self.size)
        return (len(self.index), height, width, 3)

    def __getitem__(self, index: slice | Indices) -> Pixels:
        chosen = np.ascontiguousarray(self.pixels[self.index[index]])
        if self.size is None or not len(chosen):
            return chosen.reshape(-1, *self.shape[1:])
        size = self.size
        return np.stack([np.asarray(square(Image.fromarray(image), size)) for image in chosen])

    def take(self, index: Indices) -> ArrayImages:
        """The images at these positions, in this order."""
        return ArrayImages(self.pixels, self.identity, self.size, self.index[index])

    def fingerprint(self) -> str:
        """SHA-256 over the array's identity, the size and the positions."""
        digest = hashlib.sha256(f"{VERSION}, array {self.identity} {self.shape}\n".encode())
        digest.update(np.ascontiguousarray(self.index).data)
        return digest.hexdigest()


class JoinedImages:
    """Several sources of images of one size, one after the other.

    Args:
        parts: the sources.
        index: which images, in which order; None takes all.

    Raises:
        InputError: the sources' images differ in size.
    """

    def __init__(self, parts: Sequence[LazyImages], index: Indices | None = None) -> None:
        sizes = {part.shape[1:] for part in parts}
        if len(sizes) != 1:
            raise InputError(f"joined images: expected one size, got {sorted(sizes)}")
        self.parts = tuple(parts)
        self.ends = np.cumsum([part.shape[0] for part in parts])
        self.index = np.arange(self.ends[-1]) if index is None else index

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)"""
        return (len(self.index), *self.parts[0].shape[1:])

    def __getitem__(self, index: slice | Indices) -> Pixels:
        chosen = self.index[index]
        owner = np.searchsorted(self.ends, chosen, side="right")
        result = np.empty((len(chosen), *self.shape[1:]), np.uint8)
        for number in np.unique(owner):
            part = self.parts[number]
            mine = owner == number
            result[mine] = part[chosen[mine] - (self.ends[number] - part.shape[0])]
        return result

    def take(self, index: Indices) -> JoinedImages:
        """The images at these positions, in this order."""
        return JoinedImages(self.parts, self.index[index])

    def paths(self) -> list[str] | None:
        """The files' absolute paths; None if some images are no files."""
        each = [part.paths() if isinstance(part, ImageFiles) else None for part in self.parts]
        if any(paths is None for paths in each):
            return None
        everything = [path for paths in each for path in paths or ()]
        return [everything[number] for number in self.index]

    def fingerprint(self) -> str:
        """SHA-256 over the sources' fingerprints and the positions."""
        digest = hashlib.sha256("\n".join(part.fingerprint() for part in self.parts).encode())
        digest.update(np.ascontiguousarray(self.index).data)
        return digest.hexdigest()


def _decoded(decode_one: Callable[[Any], Pixels], items: Items, size: int) -> Pixels:
    """Some images, several at a time: (N, size, size, 3)."""
    result = np.empty((len(items), size, size, 3), np.uint8)
    with ThreadPoolExecutor(available_cpus()) as pool:  # Pillow decodes outside the GIL
        for position, image in enumerate(pool.map(decode_one, items)):
            result[position] = image
    return result


def _undecodable(decode_one: Callable[[Any], Pixels], items: Items) -> Indices:
    """Positions of those that do not decode."""

    def fails(item: object) -> bool:
        try:
            decode_one(item)
        except InputError:
            return True
        return False

    with ThreadPoolExecutor(available_cpus()) as pool:
        return np.flatnonzero(list(pool.map(fails, items))).astype(np.int64)


def _is_animated(path: Path) -> bool:
    """Whether a file is an animated WebP: the second flag of the chunk VP8X, which comes first."""
    if path.suffix.lower() != ".webp" or not path.is_file():
        return False
    with path.open("rb") as file:
        header = file.read(21)
    return header[8:16] == b"WEBPVP8X" and len(header) == 21 and bool(header[20] & 2)


def _status(root: Path, names: Sequence[str]) -> NDArray[np.int64]:
    found: list[tuple[int, int]] = []
    absent: list[str] = []
    for name in names:
        try:  # a Path for each of a million files would take three times as long
            status = os.stat(os.path.join(root, name))  # noqa: PTH116, PTH118
        except (OSError, ValueError):  # a list file can name anything
            absent.append(name)
        else:
            found.append((status.st_size, status.st_mtime_ns))
    if absent:
        raise InputError(
            f"{root}: {len(absent)} of {len(names)} listed images do not exist, "
            f"the first is {absent[0]}; get the files again"
        )
    return np.array(found, np.int64).reshape(-1, 2)
