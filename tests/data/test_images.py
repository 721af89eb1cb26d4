"""Images that are read on access: exact pixels, every mode, fingerprints that see a change."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from layouts import noise, png
from PIL import Image
from torchvision import transforms

from fedprompt.core.errors import InputError
from fedprompt.data.reading.images import ArrayImages, ImageFiles, JoinedImages, decode
from fedprompt.data.task import fingerprint


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    for number, image in enumerate(noise(5, 16, 16, 0)):
        png(tmp_path / f"{number}.png", image)
    return ImageFiles(tmp_path, [f"{number}.png" for number in range(5)], 16)


@pytest.mark.parametrize("shape", [(300, 400), (400, 301), (256, 512), (97, 60), (257, 257)])
@pytest.mark.parametrize("size", [256, 33])
def test_resizing_is_torchvisions(tmp_path: Path, shape: tuple[int, int], size: int) -> None:
    png(tmp_path / "a.png", noise(1, *shape, seed=1)[0])
    reference = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(reference(image))
    np.testing.assert_array_equal(decode(tmp_path / "a.png", size), expected)


def test_a_square_of_the_size_keeps_its_pixels(tmp_path: Path) -> None:
    image = noise(1, 32, 32, 2)[0]
    png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(decode(tmp_path / "a.png", 32), image)


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    colour = np.full((8, 8, 3), (200, 100, 50), np.uint8)
    grey = np.full((8, 8), 77, np.uint8)
    image = Image.fromarray(colour)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    see_through = Image.fromarray(np.dstack([colour, np.zeros((8, 8), np.uint8)]))
    deep = Image.fromarray(np.full((8, 8), 0x4D12, np.uint16))
    cases = {
        "grey.png": (Image.fromarray(grey), (77, 77, 77)),
        "bits.png": (Image.fromarray(grey).point(lambda _: 255).convert("1"), (255, 255, 255)),
        "palette.png": (palette, (200, 100, 50)),
        "alpha.png": (see_through, (200, 100, 50)),
        "grey_alpha.png": (Image.merge("LA", [Image.fromarray(grey)] * 2), (77, 77, 77)),
        "deep.png": (deep, (0x4D, 0x4D, 0x4D)),
        "cmyk.tif": (Image.new("CMYK", (8, 8), (0, 255, 0, 0)), (255, 0, 255)),
    }
    for name, (picture, expected) in cases.items():
        picture.save(tmp_path / name)
        with Image.open(tmp_path / name) as read:  # the file really holds that mode
            assert read.mode == picture.mode
        got = decode(tmp_path / name, 8)
        assert got.shape == (8, 8, 3) and got.dtype == np.uint8
        np.testing.assert_array_equal(got, np.broadcast_to(expected, (8, 8, 3)), err_msg=name)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_makes_no_warning(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((8, 8), np.uint8)).convert("P")
    image.putpalette([10, 20, 30] * 256)
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    assert decode(tmp_path / "a.png", 8)[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("kind", ["text", "empty", "half", "float", "slim"])
def test_a_file_that_does_not_decode_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.png"
    png(path, noise(1, 64, 64, 3)[0])
    if kind == "float":
        path = tmp_path / "bad.tif"
        Image.fromarray(np.zeros((8, 8), np.float32)).save(path)
    elif kind == "slim":  # would be 40 million pixels wide
        png(path, noise(1, 1, 20_000, 3)[0])
    else:
        content = path.read_bytes()
        path.write_bytes(
            {"text": b"hello", "empty": b"", "half": content[: len(content) // 2]}[kind]
        )
    with pytest.raises(
        InputError, match=r"^[^\n]*bad\.(png|tif): the image does not decode"
    ) as error:
        decode(path, 2048)
    assert "data.on_bad_image=skip" in str(error.value)


def test_files_are_read_when_they_are_asked_for(files: ImageFiles) -> None:
    expected = noise(5, 16, 16, 0)
    assert files.shape == (5, 16, 16, 3)
    np.testing.assert_array_equal(files[1:3], expected[1:3])
    np.testing.assert_array_equal(files[np.array([4, 0, 4])], expected[[4, 0, 4]])
    assert files[5:].shape == (0, 16, 16, 3)
    cut = files.take(np.array([3, 1]))
    np.testing.assert_array_equal(cut[:], expected[[3, 1]])
    (files.root / "0.png").write_bytes(b"broken")
    np.testing.assert_array_equal(files[1:], expected[1:])
    with pytest.raises(InputError, match=r"0\.png: the image does not decode"):
        files[:1]
    assert files.undecodable().tolist() == [0]


def test_the_fingerprint_sees_what_may_change_pixels_and_reads_none(files: ImageFiles) -> None:
    def again(size: int = 16) -> ImageFiles:
        return ImageFiles(files.root, list(files.names), size)

    first = fingerprint(files)
    assert again().fingerprint() == first
    assert again(17).fingerprint() != first
    assert files.take(np.array([1, 0, 2, 3, 4])).fingerprint() != first
    status = (files.root / "2.png").stat()
    os.utime(files.root / "2.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert again().fingerprint() != first
    os.utime(files.root / "2.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert again().fingerprint() == first
    (files.root / "2.png").write_bytes(b"not an image at all")
    assert again().fingerprint() != first


def test_equal_names_lengths_and_times_elsewhere_are_other_images(tmp_path: Path) -> None:
    both = []
    for seed, folder in enumerate(("train", "test")):
        path = tmp_path / folder / "0.ppm"  # not compressed, so that lengths are equal
        png(path, noise(1, 16, 16, seed)[0])
        os.utime(path, (0, 0))
        both.append(ImageFiles(path.parent, ["0.ppm"], 16))
    np.testing.assert_array_equal(both[0].status, both[1].status)
    assert both[0].fingerprint() != both[1].fingerprint()


def test_a_listed_file_that_is_not_there_is_counted(tmp_path: Path, files: ImageFiles) -> None:
    names = [*files.names, "gone.png", "gone/too.png", "nul\0.png"]
    with pytest.raises(
        InputError, match=r"3 of 8 listed images do not exist, the first is gone.png"
    ):
        ImageFiles(tmp_path, names, 16).all_there()


def test_arrays_grey_planar_and_resized() -> None:
    grey = noise(3, 28, 28, 4, channels=1)
    images = ArrayImages(grey, "word")
    assert images.shape == (3, 28, 28, 3)
    np.testing.assert_array_equal(images[:], np.repeat(grey[..., None], 3, axis=3))
    assert images[:].flags.c_contiguous and images[:].flags.writeable
    planes = noise(3, 32, 32, 5).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(
        ArrayImages(planes.transpose(0, 2, 3, 1), "word")[1:], noise(3, 32, 32, 5)[1:]
    )
    large = ArrayImages(grey, "word", 64).take(np.array([2, 0]))
    assert large.shape == (2, 64, 64, 3) and large[2:].shape == (0, 64, 64, 3)
    expected = transforms.Resize(64)(Image.fromarray(grey[2]))
    np.testing.assert_array_equal(large[:1][0, :, :, 1], np.asarray(expected))
    words = [
        ArrayImages(grey, "word"),
        ArrayImages(grey, "other"),
        ArrayImages(grey, "word", 64),
        ArrayImages(grey, "word").take(np.array([0, 1])),
        ArrayImages(grey, "word").take(np.array([1, 0])),
    ]
    assert len({each.fingerprint() for each in words}) == len(words)


def test_joined_sources_are_one(files: ImageFiles) -> None:
    array = noise(4, 16, 16, 6)
    joined = JoinedImages([files, ArrayImages(array, "word")])
    everything = np.concatenate([noise(5, 16, 16, 0), array])
    assert joined.shape == (9, 16, 16, 3)
    np.testing.assert_array_equal(joined[3:7], everything[3:7])
    order = np.array([8, 0, 5, 4, 8])
    np.testing.assert_array_equal(joined[order], everything[order])
    cut = joined.take(order)
    np.testing.assert_array_equal(cut[np.array([1, 2])], everything[[0, 5]])
    assert cut[5:].shape == (0, 16, 16, 3)
    assert cut.fingerprint() != joined.fingerprint()
    with pytest.raises(InputError, match="expected one size"):
        JoinedImages([files, ArrayImages(array, "word", 17)])


# Transparency on a colour, WebP, SVG


def test_transparent_pixels_on_a_colour(tmp_path: Path) -> None:
    """Half transparent red on white: (255, 127 or 128, 127 or 128)."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[:4, :, 3] = 255
    pixels[4:6, :, 3] = 128
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True, exact=True)
    for name in ("a.png", "a.webp"):
        image = decode(tmp_path / name, 8, background="white").astype(int)
        assert (image[:4] == (255, 0, 0)).all()
        assert (abs(image[4:6] - (255, 127, 127)) <= 1).all()
        assert (image[6:] == 255).all()
        dropped = decode(tmp_path / name, 8)
        assert (dropped == (255, 0, 0)).all(), "transparency is dropped, as before"
    palette = Image.fromarray(pixels).convert("P")
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    assert (decode(tmp_path / "p.png", 8, background="white")[:4] == 255).all()


def test_the_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    frames[1].save(tmp_path / "still.webp", lossless=True)
    (tmp_path / "short.webp").write_bytes(b"RIFF")
    images = ImageFiles(tmp_path, ["still.webp", "moving.webp", "short.webp"], 8)
    assert images.animated().tolist() == [1]
    assert (images[np.array([1])] == (255, 0, 0)).all()


def test_the_fingerprint_knows_background_and_renderer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.svg").write_text('<svg viewBox="0 0 1 1"/>')
    png(tmp_path / "b.png", noise(1, 8, 8, 0)[0])
    plain = ImageFiles(tmp_path, ["b.png"], 8).fingerprint()
    assert ImageFiles(tmp_path, ["b.png"], 8, "white").fingerprint() != plain
    before = ImageFiles(tmp_path, ["a.svg"], 8).fingerprint()
    monkeypatch.setattr("fedprompt.data.reading.svg.renderer", lambda: "another version")
    assert ImageFiles(tmp_path, ["a.svg"], 8).fingerprint() != before
    assert ImageFiles(tmp_path, ["b.png"], 8).fingerprint() == plain
