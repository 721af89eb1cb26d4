"""The one place where image files are opened: few formats, and limits that come before decoding.

Pillow looks at the content of a file, not at its name, and hands it to whichever of its plug-ins
knows the content. One of them starts another program (PostScript), and a small file may promise
thousands of millions of pixels. So the formats are listed here, and what a header promises is
checked before a pixel is decoded.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""As Pillow calls them. None of these readers runs a program or opens another file."""
MAX_BYTES = 1 << 28
"""Of a file: 256 MB."""
MAX_PIXELS = 1 << 26
"""Of an image: 8,192 x 8,192."""
LARGE_PIXELS = 1 << 24
"""Images with more are decoded one at a time, whatever the number of threads."""

_one_large = threading.Lock()
# Pillow warns from 89 million pixels on; here that is refused.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class TooManyPixels(ValueError):
    """An image of more than `MAX_PIXELS`."""


@contextlib.contextmanager
def opened(source: str | os.PathLike[str] | bytes) -> Iterator[Image.Image]:
    """An image of which the header has been read and nothing else; decode it inside of `with`.

    Args:
        source: a file, or the content of one.

    Raises:
        TooManyPixels: its header promises more than are allowed.
        ValueError: no file, an empty or too large one, or another format.
        OSError: the file cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(source, bytes):
            size, stream = len(source), stack.enter_context(io.BytesIO(source))
        else:
            size = file_size(source)
            stream = stack.enter_context(Path(source).open("rb"))  # type: ignore[assignment]
        check_size(size)
        try:
            image = stack.enter_context(Image.open(stream, formats=FORMATS))
        except UnidentifiedImageError as error:
            known = ", ".join(FORMATS[:-1])
            raise ValueError(
                f"its content is none of {known} or {FORMATS[-1]}, or its header is damaged"
            ) from error
        except Image.DecompressionBombError as error:
            raise TooManyPixels(f"more than {MAX_PIXELS} pixels") from error
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise TooManyPixels(
                f"{width * height} pixels ({width} x {height}), more than {MAX_PIXELS}"
            )
        if width * height > LARGE_PIXELS:
            stack.enter_context(_one_large)
        yield image


def file_size(path: str | os.PathLike[str]) -> int:
    """Length of a file in bytes.

    Raises:
        ValueError: it is no plain file: opening a pipe would wait for ever.
        OSError: it does not exist.
    """
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no plain file")
    return status.st_size


def check_size(size: int, most: int = MAX_BYTES) -> None:
    """Refuse an empty file, or one of more than `most` bytes.

    Raises:
        ValueError: says how long it is.
    """
    if not size:
        raise ValueError("an empty file")
    if size > most:
        raise ValueError(f"{size} bytes, more than {most >> 20} MB")
