"""Patterns: scalar fields in [0, 1] (stripes, checks, dots, clouds, ...) that colours are laid
into.

Every function is vectorised over images, so that thousands of fields cost a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Field = Any
"""(count, size, size) before clipping; NumPy types what its operators give too loosely for more."""

PATTERNS = (
    "flat", "stripes", "checks", "dots", "rings", "plaid",
    "bricks", "waves", "clouds", "grain", "cells", "gradient",
)  # fmt: skip
"""What pre-training draws behind (and sometimes in place of) an object."""

HELD_OUT_PATTERNS = ("zigzag", "scales", "rays", "lattice")
"""Drawn by the task `domains` only: pre-training never shows them."""


def fields(
    kind: str,
    count: int,
    generator: np.random.Generator,
    size: int = 32,
    frequency: tuple[float, float] = (2.0, 6.0),
) -> Floats:
    """Draw fields of one kind with random direction, phase, frequency and sharpness.

    Args:
        kind: one of `PATTERNS` or `HELD_OUT_PATTERNS`.
        count: how many.
        generator: source of all randomness.
        size: side in pixels.
        frequency: range of repetitions per image side.

    Returns:
        (count, size, size) in [0, 1].
    """
    plane = _Plane(count, generator, size, frequency)
    return np.asarray(np.clip(_DRAW[kind](plane), 0.0, 1.0), dtype=np.float32)


class _Plane:
    """A rotated, shifted and scaled coordinate system per image; `u` and `v` count repetitions."""

    def __init__(
        self,
        count: int,
        generator: np.random.Generator,
        size: int,
        frequency: tuple[float, float],
    ) -> None:
        self.count, self.generator, self.size = count, generator, size
        axis = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
        self.x, self.y = axis[None, None, :], axis[None, :, None]
        self.frequency = self.uniform(*frequency)
        angle = self.uniform(0.0, 2 * np.pi)
        cos, sin = np.cos(angle), np.sin(angle)
        self.u = (self.x * cos + self.y * sin) * self.frequency + self.uniform(0, 1)
        self.v = (self.y * cos - self.x * sin) * self.frequency + self.uniform(0, 1)

    def uniform(self, low: float, high: float) -> Floats:
        """One number per image: (count, 1, 1)."""
        return self.generator.uniform(low, high, (self.count, 1, 1)).astype(np.float32)

    def wave(self, phase: Floats) -> Floats:
        """A sine wave of random sharpness, from soft to nearly rectangular."""
        result: Floats = np.clip(
            0.5 + self.uniform(0.5, 2.5) * np.sin(2 * np.pi * phase), 0, 1
        ).astype(np.float32)
        return result

    def noise(self, cells: int) -> Floats:
        """Smooth value noise: a random (cells, cells) grid, interpolated linearly."""
        matrix = interpolation(cells, self.size)
        grid = self.generator.random((self.count, cells, cells), dtype=np.float32)
        return np.asarray(matrix @ grid @ matrix.T, dtype=np.float32)


def interpolation(source: int, target: int) -> Floats:
    """(target, source) matrix of linear interpolation with pixel centres aligned; rows sum to
    one.
    """
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, source - 1)
    matrix = np.zeros((target, source), np.float32)
    np.add.at(matrix, (np.arange(target), low), 1 - (position - low))
    np.add.at(matrix, (np.arange(target), high), position - low)
    return matrix


def _flat(p: _Plane) -> Field:
    return np.zeros((p.count, p.size, p.size), np.float32)


def _stripes(p: _Plane) -> Field:
    return p.wave(p.u)


def _checks(p: _Plane) -> Field:
    product = np.sin(np.pi * p.u) * np.sin(np.pi * p.v)
    return 0.5 + p.uniform(1, 5) * product


def _dots(p: _Plane) -> Field:
    distance = np.hypot(p.u % 1 - 0.5, p.v % 1 - 0.5)
    return 0.5 + (p.uniform(0.2, 0.38) - distance) * (p.size / p.frequency)


def _rings(p: _Plane) -> Field:
    radius = np.hypot(p.x - p.uniform(-0.5, 0.5), p.y - p.uniform(-0.5, 0.5))
    return p.wave(radius * p.frequency * 1.3)


def _plaid(p: _Plane) -> Field:
    return 0.5 * (p.wave(p.u) + p.wave(p.v * p.uniform(0.7, 1.4)))


def _bricks(p: _Plane) -> Field:
    v = p.v * 1.2
    u = p.u * 0.6 + 0.5 * (np.floor(v) % 2)
    edge = np.minimum(np.abs(u % 1 - 0.5) / 0.6, np.abs(v % 1 - 0.5) / 1.2)
    return 0.5 + (p.uniform(0.06, 0.12) - edge) * (p.size / p.frequency)


def _waves(p: _Plane) -> Field:
    return p.wave(p.u + p.uniform(0.2, 0.5) * np.sin(2 * np.pi * p.v * p.uniform(0.3, 0.7)))


def _clouds(p: _Plane) -> Field:
    coarse, middle, fine = p.noise(3), p.noise(6), p.noise(12)
    return 0.5 + 1.6 * (0.5 * coarse + 0.3 * middle + 0.2 * fine - 0.5)


def _grain(p: _Plane) -> Field:
    contrast = p.uniform(0.3, 1.0)
    noise = p.generator.random((p.count, p.size, p.size), dtype=np.float32)
    return 0.5 + contrast * (noise - 0.5)


def _cells(p: _Plane) -> Field:
    points = p.generator.uniform(-0.6, 0.6, (p.count, 12, 2, 1, 1)).astype(np.float32)
    distance = (p.x - points[:, :, 0]) ** 2 + (p.y - points[:, :, 1]) ** 2
    nearest = np.sqrt(np.partition(distance, 1, axis=1)[:, :2])
    return (nearest[:, 1] - nearest[:, 0]) * p.uniform(3, 8)


def _gradient(p: _Plane) -> Field:
    return 0.5 + (p.u - p.u.mean(axis=(1, 2), keepdims=True)) / p.frequency


def _zigzag(p: _Plane) -> Field:
    return p.wave(p.u + p.uniform(0.5, 1.0) * np.abs(p.v % 1 - 0.5) * 2)


def _scales(p: _Plane) -> Field:
    v = p.v * 1.3
    u = p.u + 0.5 * (np.floor(v) % 2)
    return p.wave(np.hypot(u % 1 - 0.5, v % 1) * p.uniform(0.8, 1.1))


def _rays(p: _Plane) -> Field:
    angle = np.arctan2(p.y - p.uniform(-0.3, 0.3), p.x - p.uniform(-0.3, 0.3))
    return p.wave(np.rint(p.frequency * 1.5) * angle / (2 * np.pi) + p.uniform(0, 1))


def _lattice(p: _Plane) -> Field:
    third = 2 * np.pi / 3
    total = sum(
        np.sin(2 * np.pi * (p.u * np.cos(k * third) + p.v * np.sin(k * third))) for k in range(3)
    )
    return 0.4 + p.uniform(0.3, 0.8) * np.asarray(total)


_DRAW: dict[str, Callable[[_Plane], Field]] = {
    "flat": _flat, "stripes": _stripes, "checks": _checks, "dots": _dots, "rings": _rings,
    "plaid": _plaid, "bricks": _bricks, "waves": _waves, "clouds": _clouds, "grain": _grain,
    "cells": _cells, "gradient": _gradient,
    "zigzag": _zigzag, "scales": _scales, "rays": _rays, "lattice": _lattice,
}  # fmt: skip
