"""How figures stand in a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from benchmarks.harness import Paired
from benchmarks.methods import grid
from benchmarks.methods.runner import best_scale
from benchmarks.methods.summary import Mean


def percent(mean: float | None, half: float = math.nan) -> str:
    """With interval, where one is known.

    >>> percent(0.5, 0.0123), percent(0.5), percent(None)
    ('50.0 ± 1.2', '50.0', '-')
    """
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if math.isfinite(half) else "")


def points(found: Mean | None) -> str:
    """Percent of a mean over seeds."""
    return "-" if found is None else percent(found.mean, found.half_width)


def difference(found: Paired | None) -> str:
    """Signed points with interval and p-value."""
    if found is None:
        return "-"
    text = f"{100 * found.mean:+.1f}"
    if math.isfinite(found.half_width):
        text += f" ± {100 * found.half_width:.1f}"
    if math.isfinite(found.p):
        text += f" (p {found.p:.3f})" if found.p >= 0.001 else " (p < 0.001)"
    return text


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of Markdown.

    >>> table(["a", "b"], [["1", "2"]])
    ['| a | b |', '|---|---|', '| 1 | 2 |']
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|---" * (lines[0].count(" | ") + 1) + "|", *lines[1:]]


def rate_cells(tried: Mapping[float, float]) -> list[str]:
    """Validation accuracy of each scale; the chosen one stands out.

    Args:
        tried: from `runner.tried_scales`.
    """
    return [
        f"**{100 * tried[scale]:.1f}**"
        if tried and scale == best_scale(tried)
        else _tried(tried.get(scale))
        for scale in grid.ALL_SCALES
    ]


def _tried(value: float | None) -> str:
    """A cell of the choice of rates."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if value else "diverged"
