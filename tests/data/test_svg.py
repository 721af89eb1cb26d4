"""SVG drawings: pixels by pencil, and what could run, fetch or grow is refused unread."""

from __future__ import annotations

import base64
import io
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.reading import svg
from fedprompt.data.reading.images import ImageFiles, decode

OPEN = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
HEAD = f'{OPEN} viewBox="0 0 8 8">'


def drawing(inside: str, head: str = HEAD) -> str:
    return f"{head}{inside}</svg>"


def saved(folder: Path, text: str, name: str = "a.svg") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def embedded(kind: str, content: bytes) -> str:
    data = base64.b64encode(content).decode()
    return f'<image width="8" height="8" xlink:href="data:image/{kind};base64,{data}"/>'


def picture(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def test_pixels_by_pencil(tmp_path: Path) -> None:
    """The left half is red, the rest is not painted and therefore white."""
    path = saved(tmp_path, drawing('<rect width="4" height="8" fill="#ff0000"/>'))
    expected = np.full((16, 16, 3), 255, np.uint8)
    expected[:, :8, 1:] = 0
    np.testing.assert_array_equal(decode(path, 16), expected)


@pytest.mark.parametrize(
    ("size", "sides"), [("4 8", (16, 32)), ("8 4", (32, 16)), ("8 8", (16, 16))]
)
def test_the_shorter_side_has_the_size(tmp_path: Path, size: str, sides: tuple[int, int]) -> None:
    path = saved(tmp_path, drawing("", f'{OPEN} viewBox="0 0 {size}">'))
    assert svg.render(path, 16).size == sides
    assert decode(path, 16).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("attributes", "sides"),
    [
        ('width="10" height="20"', (10, 20)),
        ('width="10px" height="20px" viewBox="0 0 1 1"', (10, 20)),
        ('width="100%" height="100%" viewBox="0 0 3 1"', (3, 1)),
        ('width="1in" height="20px" viewBox="0,0,3,1"', (3, 1)),
    ],
)
def test_sides(attributes: str, sides: tuple[float, float]) -> None:
    pytest.importorskip("defusedxml")
    assert svg.check(drawing("", f"{OPEN} {attributes}>")) == sides


def test_what_drawings_use_is_kept() -> None:
    inside = (
        '<defs><linearGradient id="g"><stop offset="0"/></linearGradient>'
        '<clipPath id="c"><rect width="4" height="4"/></clipPath></defs>'
        "<style>.a{fill:url(#g)}</style>"
        '<g id="one" clip-path="url(#c)" style="fill:url(\'#g\')"><path d="M0 0h4v4z"/></g>'
        '<use href="#one"/>' + embedded("png", picture(4, 4))
    )
    doctype = (
        '<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" '
        '"http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">'
    )
    assert svg.check(doctype + drawing(inside)) == (8, 8)


BOMB = (
    '<!DOCTYPE svg [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">'
    '<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>'
)
COPIES = "".join(
    f'<g id="g{level}">' + f'<use href="#g{level + 1}"/>' * 10 + "</g>" for level in range(8)
)
CHAINS = "".join(
    f'<mask id="g{level}">' + f'<rect mask="url(#g{level + 1})"/>' * 10 + "</mask>"
    for level in range(6)
)
IMAGE = embedded("png", picture(4000, 4000))


def towers(count: int) -> str:
    """Groups of 30 levels, each with the next one in it."""
    return "".join(
        f'<g id="t{i}">{"<g>" * 29}<use href="#t{i + 1}"/>{"</g>" * 29}</g>' for i in range(count)
    )


UNSAFE = {
    "script": (drawing("<script>alert(1)</script>"), "a script"),
    "script of another name space": (drawing('<x:SCRIPT xmlns:x="x"/>'), "a script"),
    "event": (drawing('<rect onload="alert(1)"/>'), r"code for an event \(onload\)"),
    "event in capitals": (drawing('<rect ONCLICK="x"/>'), "code for an event"),
    "foreign": (drawing("<foreignObject><p/></foreignObject>"), "foreign content"),
    "text": (drawing("<text>x</text>"), "turn it into paths"),
    "entities": (BOMB + drawing("<desc>&c;</desc>"), "an entity declaration"),
    "entity of a file": (
        '<!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/hostname">]>' + drawing("&a;"),
        "an entity declaration",
    ),
    "style sheet": (
        '<?xml-stylesheet href="http://127.0.0.1:9/a.css"?>' + drawing(""),
        r"\(<\?xml-stylesheet\?>\)",
    ),
    "http": (drawing('<image href="http://127.0.0.1:9/a.png"/>'), "outside of it"),
    "file": (drawing('<image xlink:href="/etc/hostname"/>'), "outside of it"),
    "relative": (drawing('<use href="other.svg#a"/>'), "outside of it"),
    "javascript": (drawing('<a href="javascript:alert(1)"/>'), "outside of it"),
    "url": (drawing('<rect fill="url(http://127.0.0.1:9/a#b)"/>'), "outside of it"),
    "url in a style": (drawing('<rect style="fill: URL( //a/b )"/>'), "outside of it"),
    "url in a sheet": (drawing("<style>a{fill:url('x.svg#b')}</style>"), "outside of it"),
    "import": (drawing("<style>@import 'a.css';</style>"), "imports another"),
    "escapes": (drawing("<style>a{fill:u\\72l(x)}</style>"), "has escapes"),
    "embedded svg": (drawing(embedded("svg+xml", b"<svg/>")), "outside of it"),
    "embedded nonsense": (drawing(embedded("png", b"hello")), "does not decode"),
    "embedded and large": (drawing(embedded("png", picture(9000, 9000))), "81000000 pixels"),
    "use of itself": (drawing('<g id="a"><use href="#a"/></g>'), "refers to itself"),
    "use in a circle": (
        drawing('<g id="a"><use href="#b"/></g><g id="b"><use href="#a"/></g>'),
        "refers to itself",
    ),
    "copies of copies": (drawing(COPIES + '<g id="g8"/>'), "more than 20000 elements"),
    "copies by xlink:id": (
        drawing(COPIES.replace(" id=", " xlink:id=") + '<g xlink:id="g8"/>'),
        "more than 20000 elements",
    ),
    "copies by xml:id": (drawing(COPIES.replace(" id=", " xml:id=")), "more than 20000 elements"),
    "copies under a name that is taken": (
        drawing("".join(f'<g id="g{level}"/>' for level in range(8)) + COPIES),
        "more than 20000 elements",
    ),
    "masks of masks": (drawing(CHAINS), "more than 20000 elements"),
    "patterns": (drawing('<pattern width="9999" height="9999"/>'), "a pattern"),
    "copies of an image": (
        drawing(f'<g id="i">{IMAGE}</g>' + '<use href="#i"/>' * 9),
        "more than 20000 elements",
    ),
    "copies of a long line": (
        drawing(f'<path id="p" d="M0 0{"h1" * 50000}"/>' + '<use href="#p"/>' * 900),
        "more than 20000 elements",
    ),
    "many elements": (drawing("<g/>" * 20000), "more than 20000 elements"),
    "filters": (drawing("<filter>" + "<feFlood/>" * 200 + "</filter>"), "more than 20000 elements"),
    "filters by name": (drawing('<g filter="blur(9px)"/>' * 200), "more than 20000 elements"),
    "filters of a style": (drawing('<g style="filter:blur(9px)"/>' * 200), "20000 elements"),
    "filters of a sheet": (drawing("<style>a{filter:blur(9px)}</style>"), "with filters"),
    "a filter of many octaves": (drawing('<feTurbulence numOctaves="9999999"/>'), "feTurbulence"),
    "a filter of many products": (drawing('<feConvolveMatrix order="999"/>'), "feConvolveMatrix"),
    "many rules": (
        drawing("<style>" + "g,a{x:y}" * 500 + "</style>" + "<g/>" * 19000),
        "too long a style sheet",
    ),
    "markers of a group": (
        drawing('<marker id="m"/><g marker-mid="url(#m)"><path d="M0 0h1h1"/></g>'),
        "a marker for all lines of a g",
    ),
    "an image's name of a file": (drawing('<image href="#a.png"/>'), "outside of it"),
    "embedded with escapes": (
        drawing(embedded("png", picture(4, 4)).replace("Jggg", "%4aggg").replace("iVBO", "%69VBO")),
        "not plain base64",
    ),
    "deep by copies": (drawing(towers(3)), "more than 64 levels, references"),
    "markers": (
        drawing(
            f'<marker id="m">{"<rect/>" * 100}</marker>'
            f'<path d="M0 0{"h1" * 2000}" marker-mid="url(#m)"/>'
        ),
        "more than 20000 elements",
    ),
    "sheet to a pattern": (
        drawing('<style>a{mask:url(#p)}</style><mask id="p"/>'),
        "refers to a mask",
    ),
    "deep": (drawing("<g>" * 300 + "</g>" * 300), "more than 64 levels"),
    "long": (drawing("<desc>" + "x" * (5 << 20) + "</desc>"), "more than 4 MB"),
}
WRONG = {
    "no XML": ("hello", "no XML"),
    "half": (HEAD, "no XML"),
    "html": ("<html/>", "no SVG"),
    "no size": (drawing("", f"{OPEN}>"), "or a viewBox"),
    "flat": (drawing("", f'{OPEN} viewBox="0 0 1000 1">'), "too unequal"),
    "nothing": (drawing("", f'{OPEN} viewBox="0 0 0 0">'), "too unequal"),
}


@pytest.mark.parametrize("case", [*UNSAFE, *WRONG])
def test_one_line_and_nothing_rendered(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = {**UNSAFE, **WRONG}[case]
    path = saved(tmp_path, text)

    def never(*_: object, **__: object) -> bytes:
        raise AssertionError("called")

    monkeypatch.setattr("resvg_py.svg_to_bytes", never)
    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(subprocess, "Popen", never)
    with pytest.raises(
        InputError, match=rf"^[^\n]*a\.svg: the image does not decode \([^\n]*({message})[^\n]*\Z"
    ):
        decode(path, 16)


def test_a_width_that_takes_long_to_read() -> None:
    """The square of its length, if all of it were looked at."""
    assert svg.check(drawing("", f'{OPEN} width="{"1" * 100_000}x" viewBox="0 0 3 1">')) == (3, 1)


def test_sides_that_the_renderer_understands_otherwise(tmp_path: Path) -> None:
    """A million pixels high for it, which does not know what a document type adds."""
    kind = '<!DOCTYPE svg [<!ATTLIST svg width CDATA "1" height CDATA "1">]>'
    path = saved(tmp_path, kind + drawing("", f'{OPEN} viewBox="0 0 1 1000000">'))
    with pytest.raises(InputError, match="contradict each other"):
        decode(path, 16)


@pytest.mark.parametrize("attribute", ['opacity=".5"', 'mask="url(#m)"'])
def test_as_deep_as_it_may_be(tmp_path: Path, attribute: str) -> None:
    """In a thread, whose stack is smaller."""
    inside = f"<g {attribute}>" * 60 + '<rect width="8" height="8"/>' + "</g>" * 60
    mask = '<mask id="m"><rect width="8" height="8" fill="white"/></mask>'
    saved(tmp_path, drawing(mask + inside))
    assert ImageFiles(tmp_path, ["a.svg"], 16)[:].shape == (1, 16, 16, 3)


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_bytes(drawing("<desc>ä</desc>").encode("utf-16"))
    with pytest.raises(InputError, match="does not decode"):
        decode(tmp_path / "a.svg", 16)


def test_a_panic_of_the_renderer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        """As Rust's is."""

    def panics(**_: object) -> bytes:
        raise PanicException("unreachable")

    monkeypatch.setattr("resvg_py.svg_to_bytes", panics)
    with pytest.raises(InputError, match="the renderer refuses it: unreachable"):
        decode(saved(tmp_path, drawing("")), 16)


def test_without_the_extra_one_line_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    svg.renderer.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"^[^\n]*pip install 'fedprompt\[svg\]'\Z"):
            ImageFiles(tmp_path, ["a.png", "b.SVG"], 16)
        ImageFiles(tmp_path, ["a.png"], 16)
    finally:
        svg.renderer.cache_clear()
