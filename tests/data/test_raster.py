"""Images are opened in one place: few formats, and limits before a pixel is decoded."""

from __future__ import annotations

import os
import struct
import threading
import zlib
from pathlib import Path

import pytest
from layouts import noise, png
from PIL import EpsImagePlugin, Image, ImageFile

import fedprompt
from fedprompt.core.errors import InputError
from fedprompt.data.reading import raster
from fedprompt.data.reading.images import ImageFiles, decode

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def refused(path: Path, message: str) -> None:
    with pytest.raises(
        InputError, match=rf"^[^\n]*{path.name}: the image does not decode \({message}"
    ):
        decode(path, 8)


def test_a_postscript_file_called_png_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program called `gs` that leaves a mark; Pillow by itself starts it."""
    marker = tmp_path / "ran"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what Pillow remembers of it
    path = tmp_path / "photo.png"
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(Exception), Image.open(path) as image:  # noqa: B017
        image.load()
    assert marker.exists(), "the test would see a program that is started"
    marker.unlink()
    refused(path, "its content is none of BMP, GIF, JPEG, PNG, PPM, TIFF or WEBP")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["ICO", "PCX", "TGA", "SGI", "IM"])
def test_other_formats_are_refused(tmp_path: Path, kind: str) -> None:
    Image.fromarray(noise(1, 32, 32, 0)[0]).save(tmp_path / "other.png", kind)
    refused(tmp_path / "other.png", "its content is none of")


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jpg", "png", "ppm", "pgm", "tif", "webp"])
def test_all_formats_of_the_loaders_open(tmp_path: Path, suffix: str) -> None:
    image = Image.new("L" if suffix == "pgm" else "RGB", (8, 8), 70)
    image.save(tmp_path / f"a.{suffix}")
    assert decode(tmp_path / f"a.{suffix}", 8).shape == (8, 8, 3)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that promises any number of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", content)
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", bomb(8193, 8192), r"67117056 pixels \(8193 x 8192\), more than 67108864"),
        ("b.png", bomb(12_000, 9_000), "108000000 pixels"),  # where Pillow would warn
        ("c.png", bomb(60_000, 60_000), "more than 67108864 pixels"),  # and where it would refuse
        ("d.ppm", b"P6 20000 20000 255\n" + bytes(99), "more than 67108864 pixels"),
        ("e.gif", b"GIF89a" + struct.pack("<HH", 20_000, 20_000) + bytes(99), "more than|damaged"),
        ("f.png", b"", "an empty file"),
    ],
)
def test_a_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    def decodes(*_: object) -> None:
        pytest.fail("pixels are decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decodes)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, f".*({message})")


def test_a_file_that_is_too_long_is_not_opened(tmp_path: Path) -> None:
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(raster.MAX_BYTES + 1)  # a hole: it takes no space
    refused(tmp_path / "long.png", "268435457 bytes, more than 256 MB")


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.svg")
    for name in ("pipe.png", "pipe.svg"):
        refused(tmp_path / name, "no plain file")
    os.mkfifo(tmp_path / "pipe.webp")
    assert not len(ImageFiles(tmp_path, ["pipe.webp"], 8).animated())
    with pytest.raises(InputError, match=r"device\.png: the image does not decode"):
        (tmp_path / "device.png").symlink_to("/dev/zero")
        decode(tmp_path / "device.png", 8)


def test_large_images_are_decoded_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads and a limit of 100 pixels: while one is inside, the other waits at the door."""
    monkeypatch.setattr(raster, "LARGE_PIXELS", 100)
    png(tmp_path / "large.png", noise(1, 16, 16, 0)[0])
    png(tmp_path / "small.png", noise(1, 8, 8, 0)[0])
    entered = threading.Event()

    def second() -> None:
        with raster.opened(tmp_path / "large.png"):
            entered.set()

    with raster.opened(tmp_path / "large.png"):
        thread = threading.Thread(target=second)
        thread.start()
        with raster.opened(tmp_path / "small.png") as small:  # small ones do not wait
            assert small.size == (8, 8)
        assert raster._one_large.locked() and not entered.is_set()
    thread.join()
    assert entered.is_set() and not raster._one_large.locked()


def test_a_bomb_can_be_skipped(tmp_path: Path) -> None:
    png(tmp_path / "good.png", noise(1, 8, 8, 0)[0])
    (tmp_path / "bomb.png").write_bytes(bomb(60_000, 60_000))
    assert ImageFiles(tmp_path, ["good.png", "bomb.png"], 8).undecodable().tolist() == [1]


def test_images_are_opened_in_one_place() -> None:
    package = Path(fedprompt.__file__).parent
    opening = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "Image.open(" in path.read_text(encoding="utf-8")
    }
    assert opening == {"data/reading/raster.py"}


def test_a_picture_out_of_bytes_names_where_it_is_from() -> None:
    with pytest.raises(InputError, match=r"^table, row 3: the image does not decode"):
        decode(b"no image", 8, name="table, row 3")
    with pytest.raises(InputError, match="no plain file"):
        decode(os.devnull, 8)
