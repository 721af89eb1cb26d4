"""Procedural images: fixed by seeds, within bounds, and free of what the probes are measured on."""

from __future__ import annotations

import numpy as np
import pytest

from fedprompt.core.errors import InputError
from fedprompt.data.drawing.composition import (
    HUES,
    UNDEFINED,
    Composition,
    Grounds,
    Masks,
    compose,
    contact_sheet,
    draw_masks,
    hsv_to_rgb,
)
from fedprompt.data.drawing.glyphs import forbidden_character, glyph_characters, glyph_image
from fedprompt.data.drawing.patterns import HELD_OUT_PATTERNS, PATTERNS, fields, interpolation
from fedprompt.data.drawing.shapes import ShapeCounts, draw_class

FEW = ShapeCounts(fractals=2, characters=2, glyphs=2, figures=2, patterns=2, layouts=2)


@pytest.fixture(scope="module")
def masks() -> Masks:
    return draw_masks(FEW, images=120, seed=0)


@pytest.fixture(scope="module")
def grounds() -> Grounds:
    return Grounds(each=8)


def test_masks_are_fixed_by_the_seed(masks: Masks) -> None:
    again, other = draw_masks(FEW, 120, seed=0), draw_masks(FEW, 120, seed=1)
    np.testing.assert_array_equal(masks.body, again.body)
    np.testing.assert_array_equal(masks.details, again.details)
    assert not np.array_equal(masks.body, other.body)
    assert np.bincount(masks.labels).tolist() == [10] * 12
    assert masks.names[0] == "fractals/0" and masks.names[-1] == "layouts/1"


@pytest.mark.parametrize("family", ["fractals", "characters", "glyphs", "figures", "patterns"])
def test_a_class_shows_ink_and_ground_and_differs_from_another(family: str) -> None:
    first, second = (draw_class(family, index, 12, seed=0)[0] for index in (0, 1))
    assert first.shape == (12, 32, 32) and first.dtype == np.uint8
    ink = (first > 127).mean(axis=(1, 2))
    assert (ink > 0.01).all() and (ink < 0.95).all()
    assert np.abs(first.mean(axis=0) - second.mean(axis=0)).max() > 30


def test_layouts_have_details_inside_the_body() -> None:
    body, details = draw_class("layouts", 0, 20, seed=0)
    assert (details.max(axis=(1, 2)) > 100).all()
    assert (details > 0).mean() < (body > 0).mean()


def test_no_digit_and_no_letter_a_to_j_is_among_the_glyphs() -> None:
    characters = set(glyph_characters())
    assert not characters & set("0123456789ABCDEFGHIJabcdefghij")
    assert not characters & set("ΑΒΕΗΙАВСЕНІЈаеісјОоΟο"), "look-alikes in other alphabets"
    assert all(forbidden_character(c) for c in "0²½①٣ⅧÀéＡ𝐁Н")
    assert not any(forbidden_character(c) for c in characters)
    assert len(characters) >= ShapeCounts().glyphs


def test_no_pre_training_glyph_has_the_picture_of_a_forbidden_one() -> None:
    shown = {
        glyph_image(c, "DejaVuSans").tobytes() for c in glyph_characters()[: ShapeCounts().glyphs]
    }
    for character in "0123456789ABCDEFGHIJabcdefghij":
        assert glyph_image(character, "DejaVuSans").tobytes() not in shown, character


@pytest.mark.parametrize("kind", [*PATTERNS, *HELD_OUT_PATTERNS])
def test_patterns_stay_in_range_and_vary(kind: str) -> None:
    drawn = fields(kind, 6, np.random.default_rng(0), 32)
    assert drawn.shape == (6, 32, 32) and drawn.min() >= 0 and drawn.max() <= 1
    if kind != "flat":
        assert (drawn.std(axis=(1, 2)) > 0.03).all()
        assert not np.array_equal(drawn[0], drawn[1])


def test_composition_is_fixed_by_the_generator(masks: Masks, grounds: Grounds) -> None:
    def drawn(seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        return compose(masks.body, masks.details, masks.whole, grounds, generator).images

    np.testing.assert_array_equal(drawn(0), drawn(0))
    assert not np.array_equal(drawn(0), drawn(1))
    assert drawn(0).shape == (120, 32, 32, 3) and drawn(0).dtype == np.uint8


def test_attributes_describe_what_was_drawn(masks: Masks, grounds: Grounds) -> None:
    only = Composition(
        clean=0, flat=1, grey=0, difference=0, textured=0, blurred=0, noisy=0, shift=0
    )
    empty = np.zeros_like(masks.body)
    shapes = np.zeros(len(masks), bool)
    drawn = compose(empty, empty, shapes, grounds, np.random.default_rng(0), only)
    assert set(drawn.pattern.tolist()) == {0}
    told = drawn.background != UNDEFINED
    assert told.mean() > 0.5
    corner = drawn.images[told, 0, 0].astype(float) / 255
    expected = drawn.background[told]
    # Hue of the flat ground by its definition, compared with the bin on the colour circle.
    high, low = corner.max(axis=1), corner.min(axis=1)
    r, g, b = corner.T
    sector = np.select(
        [high == r, high == g],
        [(g - b) / (high - low), 2 + (b - r) / (high - low)],
        4 + (r - g) / (high - low),
    )
    distance = np.abs((sector / 6 * HUES - expected + HUES / 2) % HUES - HUES / 2)
    assert distance.max() < 0.5


def test_clean_images_are_bright_on_a_dark_flat_ground(masks: Masks, grounds: Grounds) -> None:
    figures = np.array([name.startswith("glyphs") for name in masks.names])[masks.labels]
    drawn = compose(
        masks.body[figures],
        masks.details[figures],
        masks.whole[figures],
        grounds,
        np.random.default_rng(0),
        Composition(clean=1.0),
    )
    assert (drawn.images[:, 0, 0] < 60).all()
    assert (drawn.images.max(axis=(1, 2, 3)) > 150).all()
    assert (drawn.images[..., 0] == drawn.images[..., 2]).all(), "grey"
    assert (drawn.foreground == UNDEFINED).all()


def test_interpolation_keeps_constants() -> None:
    np.testing.assert_allclose(interpolation(5, 32).sum(axis=1), 1, rtol=1e-6)


def test_primary_colours() -> None:
    hue = np.array([0.0, 1 / 3, 2 / 3, 1.0])
    expected = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    np.testing.assert_allclose(hsv_to_rgb(hue, np.ones(4), np.ones(4)), expected, atol=1e-6)
    np.testing.assert_allclose(hsv_to_rgb(hue, np.zeros(4), np.full(4, 0.5)), 0.5)


def test_a_contact_sheet_holds_every_image() -> None:
    sheet = contact_sheet(np.full((5, 4, 4, 3), 7, np.uint8), columns=3)
    assert sheet.size == (3 * 5 + 1, 2 * 5 + 1)
    assert (np.asarray(sheet) == 7).all(axis=2).sum() == 5 * 16


def test_wrong_values_are_refused() -> None:
    with pytest.raises(InputError, match=r"Composition\.grey: expected a value from 0 to 1"):
        Composition(grey=1.5)
    with pytest.raises(InputError, match=r"ShapeCounts\.patterns: expected at most 22, got 30"):
        ShapeCounts(patterns=30)
    with pytest.raises(InputError, match="at least two classes"):
        ShapeCounts(0, 0, 0, 0, 0, 0)
