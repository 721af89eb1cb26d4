"""SVG drawings as pixels: looked at first, then rendered, on white and without any font.

A drawing is a program that someone else wrote. What could run, fetch, read another file or grow
without end is refused before the renderer sees it (`check`). Nothing is fetched and nothing is run,
whatever a drawing asks for.

Needs the packages `resvg_py` (renders) and `defusedxml` (reads XML): the extra `svg`.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import importlib.metadata
import importlib.util
import re
from functools import lru_cache
from pathlib import Path
from xml.etree.ElementTree import ParseError

from PIL import Image

from fedprompt.core.errors import ConfigError
from fedprompt.data.reading import raster

SUFFIX = ".svg"
PACKAGES = ("resvg_py", "defusedxml")
MAX_BYTES = 4 << 20
MAX_DEPTH = 64
MAX_ELEMENTS = 20_000
"""Of a drawing. Both hold for one whose references are written out: the renderer recurses."""
BYTES_EACH, PIXELS_EACH, FILTER_COST = 200, 1000, 100
"""So many bytes of attributes or embedded pixels count as an element, and a filter as so many
elements: that is about what they cost.
"""
MAX_MATCHES = 10_000_000
"""Rules of style sheets times elements."""
MAX_RATIO = 16.0
"""Between the sides."""
MAX_EMBEDDED_PIXELS = 1 << 24

FORBIDDEN = {
    "script": "a script",
    "foreignobject": "foreign content (foreignObject)",
    "iframe": "foreign content (iframe)",
    "handler": "a script",
    "text": "text, which would need fonts; turn it into paths",
    "pattern": "a pattern, whose tile may be of any size",
    "feturbulence": "a filter that may take any time (feTurbulence)",
    "feconvolvematrix": "a filter that may take any time (feConvolveMatrix)",
    "femorphology": "a filter that may take any time (feMorphology)",
}
"""Elements that are refused, in lower case, and what is said of them."""
GRADIENTS = ("lineargradient", "radialgradient")
WITH_POINTS = ("path", "line", "polyline", "polygon")

_URL = re.compile(r"url\(\s*['\"]?\s*([^'\")]*)", re.IGNORECASE)
_SIDE = re.compile(r"\s*\+?(\d*\.?\d+(?:[eE][+-]?\d+)?)\s*(px|pt|pc|mm|cm|in|em|ex)?\s*$")
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=\s]")
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
    raster.file_size(path)  # refuses what is no plain file
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UnsafeDrawing(f"more than {MAX_BYTES >> 20} MB")
    text = content.decode("utf-8-sig")
    sides = check(text)
    import resvg_py

    # The longer side only gets a limit, for the case that the renderer understands other sides.
    limit = int(2 * MAX_RATIO * size)
    width, height = (size, limit) if sides[0] <= sides[1] else (limit, size)
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
    with raster.opened(bytes(pixels)) as image:
        drawn: Image.Image = image.convert("RGB")
    if min(drawn.size) != size:
        raise ValueError("its width, height and viewBox contradict each other")
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
    """An element with a name (`id`) without those in it that have one, or the whole drawing."""

    kind: str = ""
    depth: int = 0
    """Levels of elements above it."""
    elements: int = 0
    levels: int = 0
    references: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    inner: list[_Part] = dataclasses.field(default_factory=list)


class _Scan:
    """What the XML parser calls for each element; methods are named as it expects."""

    def __init__(self) -> None:
        self.whole = _Part()
        self.parts: dict[str, list[_Part]] = {}
        """By name; which of several the renderer takes is its own affair."""
        self.open: list[tuple[str, _Part]] = []
        self.css: list[str] = []
        self.elements = 0
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
        part = self.open[-1][1] if self.open else self.whole
        # The renderer takes xml:id and xlink:id for names, too.
        names = {value for name, value in attributes.items() if _local(name) == "id"}
        if names:
            own = _Part(kind, depth=len(self.open))
            part.inner.append(own)
            part = own
            for name in names:
                self.parts.setdefault(name, []).append(own)
        self.open.append((kind, part))
        references, cost = _references(kind, attributes)
        part.elements += cost
        part.levels = max(part.levels, len(self.open) - part.depth)
        part.references += references
        self.elements += cost + len(references)
        if self.elements > MAX_ELEMENTS:
            raise UnsafeDrawing(f"more than {MAX_ELEMENTS} elements, or what costs as much")

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
        css = "".join(self.css)
        if "filter" in css:
            raise UnsafeDrawing("a style sheet with filters")
        for target in _in_css(css):
            for part in self.parts.get(target, ()):
                if part.kind not in GRADIENTS:
                    raise UnsafeDrawing(f"a style sheet that refers to a {part.kind}")
        if (css.count("{") + css.count(",")) * self.elements > MAX_MATCHES:
            raise UnsafeDrawing("too long a style sheet for so many elements")
        elements, levels = self._written_out(self.whole, {}, ())
        if elements > MAX_ELEMENTS:
            raise UnsafeDrawing(f"more than {MAX_ELEMENTS} elements, references written out")
        if levels > MAX_DEPTH:
            raise UnsafeDrawing(f"more than {MAX_DEPTH} levels, references written out")
        if self.sides is None:
            raise ValueError("no SVG: nothing in it")
        return self.sides

    def _written_out(
        self, part: _Part, known: dict[int, tuple[int, int]], above: tuple[int, ...]
    ) -> tuple[int, int]:
        """Elements and levels of a part with all that it refers to."""
        if id(part) in above:
            raise UnsafeDrawing("an element that refers to itself")
        if len(above) > MAX_DEPTH:
            raise UnsafeDrawing(f"more than {MAX_DEPTH} levels of references")
        if id(part) not in known:
            within = (*above, id(part))
            elements, levels = part.elements, part.levels
            for inner in part.inner:
                more, deep = self._written_out(inner, known, within)
                elements += more
                levels = max(levels, inner.depth - part.depth + deep)
            for name, count in part.references.items():
                for target in self.parts.get(name, ()):
                    more, deep = self._written_out(target, known, within)
                    elements += count * more
                    levels = max(levels, part.levels + deep)
            known[id(part)] = elements, levels
        return known[id(part)]


def _local(name: str) -> str:
    """A name without its namespace, in lower case."""
    return name.rpartition("}")[2].rpartition(":")[2].lower()


def _references(kind: str, attributes: dict[str, str]) -> tuple[collections.Counter[str], int]:
    """What an element refers to in the same drawing, and what it costs itself.

    Returns:
        Names, each as often as it may be drawn; and as how many elements it counts.

    Raises:
        UnsafeDrawing: it refers to something else, or has an event's code.
    """
    found: collections.Counter[str] = collections.Counter()
    cost = 1 + sum(map(len, attributes.values())) // BYTES_EACH
    if kind.startswith("fe"):
        cost += FILTER_COST
    for name, value in attributes.items():
        attribute = _local(name)
        if attribute.startswith("on"):
            raise UnsafeDrawing(f"code for an event ({attribute})")
        if attribute == "filter" or (attribute == "style" and "filter" in value):
            cost += FILTER_COST
        if attribute in ("href", "src"):
            names, pixels = _target(value.strip(), kind)
            found.update(names)
            cost += pixels // PIXELS_EACH
        elif "url(" in value.lower() or attribute == "style":
            # A marker stands at every point of a line.
            markers = "marker" in attribute or "marker" in value
            points = len(attributes.get("d", "") + attributes.get("points", "")) // 2
            names = _in_css(value)
            if names and markers and kind not in WITH_POINTS:
                raise UnsafeDrawing(f"a marker for all lines of a {kind}")
            for each in names:
                found[each] += 1 + points if markers else 1
    return found, cost


def _in_css(text: str) -> list[str]:
    """Names that `url(#name)` refers to in CSS.

    Raises:
        UnsafeDrawing: it asks for something outside the drawing, or hides what it asks for.
    """
    if "@import" in text.lower() or "\\" in text:
        raise UnsafeDrawing("a style that imports another or has escapes")
    return [name for each in _URL.findall(text) for name in _target(each.strip(), "")[0]]


def _target(reference: str, kind: str) -> tuple[list[str], int]:
    """The name of an element of the same drawing, or how many pixels are embedded.

    Raises:
        UnsafeDrawing: the reference leads elsewhere.
    """
    # An image's `#a` is the name of a file.
    if reference.startswith("#") and kind != "image":
        return [reference[1:]], 0
    embedded = _EMBEDDED.match(reference)
    if embedded and kind == "image":
        return [], _embedded_pixels(reference[embedded.end() :])
    raise UnsafeDrawing(f"a reference to something outside of it ('{reference[:40]}')")


def _embedded_pixels(content: str) -> int:
    # The renderer also reads %41 for A, so that it would see another image.
    if _NOT_BASE64.search(content):
        raise UnsafeDrawing("an embedded image that is not plain base64")
    try:
        with raster.opened(base64.b64decode(content)) as image:
            pixels = int(image.width) * int(image.height)
    except raster.TooManyPixels as error:
        raise UnsafeDrawing(f"an embedded image of {error}") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise UnsafeDrawing("an embedded image that does not decode") from error
    if pixels > MAX_EMBEDDED_PIXELS:
        raise UnsafeDrawing(f"an embedded image of {pixels} pixels")
    return pixels


def _sides(attributes: dict[str, str]) -> tuple[float, float]:
    """Width and height in proportion, from the attributes of the outermost element.

    Raises:
        ValueError: they are not there, not positive or too unequal.
    """
    # At most as long as a number is: the expression takes the square of the length.
    given = [_SIDE.match(attributes.get(name, "")[:99]) for name in ("width", "height")]
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
