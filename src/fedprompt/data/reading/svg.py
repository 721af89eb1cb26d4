"""SVG drawings as pixels: looked at first, then rendered, on white and without any font.

A drawing is a program that someone else wrote. What could run, fetch, read another file or grow
without end is refused before the renderer sees it (`check`). Nothing is fetched and nothing is run,
whatever a drawing asks for.

Needs the packages `resvg_py` (renders) and `defusedxml` (reads XML): the extra `svg`.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import importlib.metadata
import importlib.util
import io
import re
from functools import lru_cache
from pathlib import Path
from xml.etree.ElementTree import ParseError

from PIL import Image

from fedprompt.core.errors import ConfigError

SUFFIX = ".svg"
PACKAGES = ("resvg_py", "defusedxml")
MAX_BYTES = 4 << 20
MAX_DEPTH = 200
MAX_ELEMENTS = 50_000
"""Of a drawing whose references are written out."""
MAX_RATIO = 16.0
"""Between the sides."""
MAX_EMBEDDED_PIXELS = 1 << 24

FORBIDDEN = {
    "script": "a script",
    "foreignobject": "foreign content (foreignObject)",
    "iframe": "foreign content (iframe)",
    "handler": "a script",
    "text": "text, which would need fonts; turn it into paths",
}
"""Elements that are refused, in lower case, and what is said of them."""
GRADIENTS = ("lineargradient", "radialgradient")

_URL = re.compile(r"url\(\s*['\"]?\s*([^'\")]*)", re.IGNORECASE)
_SIDE = re.compile(r"\s*\+?(\d*\.?\d+(?:[eE][+-]?\d+)?)\s*(px|pt|pc|mm|cm|in|em|ex)?\s*$")
_EMBEDDED = re.compile(r"data:image/(?:png|jpe?g|gif|webp);base64,", re.IGNORECASE)


class UnsafeDrawing(ValueError):
    """What a drawing holds that is refused."""


def is_svg(name: str) -> bool:
    """Whether a file of this name is an SVG drawing."""
    return name.lower().endswith(SUFFIX)


@lru_cache(maxsize=1)
def renderer() -> str:
    """Name and version of the renderer; another one may give other pixels.

    Raises:
        ConfigError: a package of the extra is not installed.
    """
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"reading SVG images needs {' and '.join(absent)}, not installed here; "
            "pip install 'fedprompt[svg]'"
        )
    return f"resvg_py {importlib.metadata.version('resvg_py')}"


def render(path: Path, size: int) -> Image.Image:
    """A drawing on white; its shorter side has `size` pixels.

    Raises:
        ConfigError: a package of the extra is not installed.
        ValueError: the file is no SVG drawing, or is refused; the message does not name the file.
    """
    renderer()
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UnsafeDrawing(f"more than {MAX_BYTES >> 20} MB")
    text = content.decode("utf-8-sig")
    sides = check(text)
    import resvg_py

    width, height = (size, None) if sides[0] <= sides[1] else (None, size)
    try:
        pixels = resvg_py.svg_to_bytes(
            svg_string=text,
            background="#ffffff",
            skip_system_fonts=True,
            width=width,
            height=height,
        )
    except BaseException as error:  # a panic of Rust is no Exception
        if type(error).__name__ != "PanicException" and not isinstance(error, ValueError):
            raise
        raise ValueError(f"the renderer refuses it: {str(error)[:100]}") from error
    with Image.open(io.BytesIO(bytes(pixels))) as image:
        drawn: Image.Image = image.convert("RGB")
    return drawn


def check(text: str) -> tuple[float, float]:
    """Refuse a drawing that could run, fetch or read something, or grow without end.

    Args:
        text: the XML.

    Returns:
        Width and height in proportion.

    Raises:
        ValueError: it is no SVG, or unsafe; says why.
    """
    from defusedxml.common import DefusedXmlException
    from defusedxml.ElementTree import DefusedXMLParser

    scan = _Scan()
    parser = DefusedXMLParser(target=scan, forbid_entities=True, forbid_external=True)
    try:
        parser.feed(text)
        parser.close()
    except DefusedXmlException as error:
        raise UnsafeDrawing("an entity declaration or an external document type") from error
    except ParseError as error:
        raise ValueError(f"no XML: {error}") from error
    return scan.finish()


@dataclasses.dataclass
class _Part:
    """An element with a name (`id`), or the whole drawing."""

    elements: int = 0
    kind: str = ""
    references: list[str] = dataclasses.field(default_factory=list)


class _Scan:
    """What the XML parser calls for each element; methods are named as it expects."""

    def __init__(self) -> None:
        self.whole = _Part()
        self.parts: dict[str, _Part] = {}
        self.open: list[tuple[str, _Part | None]] = []
        self.css: list[str] = []
        self.sides: tuple[float, float] | None = None

    def pi(self, target: str, data: str | None = None) -> None:
        """A processing instruction, as of a style sheet."""
        raise UnsafeDrawing(f"an instruction to other programs (<?{target}?>)")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """An element begins."""
        kind = _local(tag)
        if not self.open:
            if kind != "svg":
                raise ValueError(f"no SVG: the outermost element is {kind}")
            self.sides = _sides(attributes)
        if kind in FORBIDDEN:
            raise UnsafeDrawing(FORBIDDEN[kind])
        if len(self.open) >= MAX_DEPTH:
            raise UnsafeDrawing(f"more than {MAX_DEPTH} levels of elements")
        name = attributes.get("id")
        own = _Part(kind=kind) if name and name not in self.parts else None
        if name and own:
            self.parts[name] = own
        self.open.append((kind, own))
        references = _references(kind, attributes)
        for part in (self.whole, *(part for _, part in self.open if part)):
            part.elements += 1
            part.references += references

    def data(self, text: str) -> None:
        """Text inside an element."""
        if self.open and self.open[-1][0] == "style":
            self.css.append(text)

    def end(self, tag: str) -> None:
        """An element ends."""
        self.open.pop()

    def close(self) -> None:
        """The drawing ends."""

    def finish(self) -> tuple[float, float]:
        """What only the whole drawing can tell: style sheets, and its size written out."""
        for target in _in_css("".join(self.css)):
            part = self.parts.get(target)
            if part and part.kind not in GRADIENTS:
                raise UnsafeDrawing(f"a style sheet that refers to a {part.kind}")
        if self._written_out(self.whole, {}, ()) > MAX_ELEMENTS:
            raise UnsafeDrawing(f"more than {MAX_ELEMENTS} elements, references written out")
        if self.sides is None:
            raise ValueError("no SVG: nothing in it")
        return self.sides

    def _written_out(self, part: _Part, known: dict[int, int], above: tuple[int, ...]) -> int:
        """Elements of a part with all that it refers to."""
        if id(part) in above:
            raise UnsafeDrawing("an element that refers to itself")
        if len(above) > MAX_DEPTH:
            raise UnsafeDrawing(f"more than {MAX_DEPTH} levels of references")
        if id(part) not in known:
            within = (*above, id(part))
            known[id(part)] = part.elements + sum(
                self._written_out(self.parts[name], known, within)
                for name in part.references
                if name in self.parts
            )
        return known[id(part)]


def _local(name: str) -> str:
    """A name without its namespace, in lower case."""
    return name.rpartition("}")[2].rpartition(":")[2].lower()


def _references(kind: str, attributes: dict[str, str]) -> list[str]:
    """Names of the elements of the same drawing that an element refers to; each as often as it may
    be drawn.

    Raises:
        UnsafeDrawing: it refers to something else, or has an event's code.
    """
    found: list[str] = []
    for name, value in attributes.items():
        attribute = _local(name)
        if attribute.startswith("on"):
            raise UnsafeDrawing(f"code for an event ({attribute})")
        if attribute in ("href", "src"):
            found += _target(value.strip(), kind)
        elif "url(" in value.lower() or attribute == "style":
            # A marker stands at every point of a line.
            markers = "marker" in attribute or "marker" in value
            points = len(attributes.get("d", "") + attributes.get("points", "")) // 2
            found += _in_css(value) * (1 + points if markers else 1)
    return found


def _in_css(text: str) -> list[str]:
    """Names that `url(#name)` refers to in CSS.

    Raises:
        UnsafeDrawing: it asks for something outside the drawing, or hides what it asks for.
    """
    if "@import" in text.lower() or "\\" in text:
        raise UnsafeDrawing("a style that imports another or has escapes")
    return [name for each in _URL.findall(text) for name in _target(each.strip(), "")]


def _target(reference: str, kind: str) -> list[str]:
    """The name of an element of the same drawing; none for embedded pixels.

    Raises:
        UnsafeDrawing: the reference leads elsewhere.
    """
    if reference.startswith("#"):
        return [reference[1:]]
    embedded = _EMBEDDED.match(reference)
    if embedded and kind == "image":
        _check_embedded(reference[embedded.end() :])
        return []
    raise UnsafeDrawing(f"a reference to something outside of it ('{reference[:40]}')")


def _check_embedded(content: str) -> None:
    try:
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            pixels = image.width * image.height
    except (OSError, binascii.Error, Image.DecompressionBombError) as error:
        raise UnsafeDrawing("an embedded image that does not decode") from error
    if pixels > MAX_EMBEDDED_PIXELS:
        raise UnsafeDrawing(f"an embedded image of {pixels} pixels")


def _sides(attributes: dict[str, str]) -> tuple[float, float]:
    """Width and height in proportion, from the attributes of the outermost element.

    Raises:
        ValueError: they are not there, not positive or too unequal.
    """
    given = [_SIDE.match(attributes.get(name, "")) for name in ("width", "height")]
    view = re.split(r"[\s,]+", attributes.get("viewBox", "").strip())
    if given[0] and given[1] and given[0][2] == given[1][2]:
        sides = float(given[0][1]), float(given[1][1])
    else:
        try:
            sides = float(view[2]), float(view[3])
        except (IndexError, ValueError) as error:
            raise ValueError("expected a width and a height in one unit, or a viewBox") from error
    if not (min(sides) > 0 and max(sides) / min(sides) <= MAX_RATIO):
        raise ValueError(f"its sides {sides[0]:g} x {sides[1]:g} are too unequal")
    return sides
