"""Attractors of random iterated function systems (Kataoka et al., "Pre-training without Natural
Images", ACCV 2020).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedprompt.data.drawing.glyphs import SIZE, Bytes


def fractals(
    index: int, count: int, recipe: np.random.Generator, generator: np.random.Generator
) -> tuple[Bytes, Bytes]:
    """Masks of one fractal.

    Args:
        index: of the class; `recipe` says it all.
        count: how many masks.
        recipe: draws what all masks of the class have in common.
        generator: draws what they differ in.

    Returns:
        Body and details, both (count, 32, 32).
    """
    del index
    while True:
        maps = _contractions(recipe)
        trial = _chaos_game(maps[None], recipe)
        if 0.12 < (trial > 30).mean() < 0.6:
            break
    noisy = maps[None] * generator.uniform(0.88, 1.12, (count, *maps.shape)).astype(np.float32)
    masks = _chaos_game(noisy, generator)
    flip = generator.random(count) < 0.3
    masks[flip] = masks[flip, :, ::-1]
    return masks, np.zeros_like(masks)


def _contractions(generator: np.random.Generator) -> NDArray[np.float32]:
    """(maps, 2, 3): two to four random affine contractions of the plane."""
    number = int(generator.integers(2, 5))
    maps = generator.uniform(-1, 1, (number, 2, 3))
    norm = np.linalg.norm(maps[:, :, :2], ord=2, axis=(1, 2))
    maps[:, :, :2] *= (generator.uniform(0.45, 0.85, number) / norm)[:, None, None]
    return maps.astype(np.float32)


def _chaos_game(
    maps: NDArray[np.float32], generator: np.random.Generator, chains: int = 160, steps: int = 26
) -> Bytes:
    """Attractors of (count, maps, 2, 3) iterated function systems: (count, 32, 32)."""
    count, number = maps.shape[:2]
    area = np.abs(np.linalg.det(maps[..., :2])) + 0.01
    limits = np.cumsum(area / area.sum(axis=1, keepdims=True), axis=1)[:, None, :-1]
    rows = np.arange(count)[:, None]
    points = np.zeros((count, chains, 2), np.float32)
    visited = []
    for step in range(steps):
        draw = generator.random((count, chains, 1), dtype=np.float32)
        chosen = maps[rows, (draw > limits).sum(axis=2) if number > 1 else 0]
        points = np.einsum("ncij,ncj->nci", chosen[..., :2], points) + chosen[..., 2]
        if step >= 8:
            visited.append(points)
    cloud = np.concatenate(visited, axis=1)
    low, high = np.quantile(cloud[:, ::7], (0.01, 0.99), axis=1)
    span = (high - low).max(axis=1, keepdims=True) + 1e-6
    margin = generator.uniform(2, 5, (count, 1, 1))
    unit = (cloud - ((low + high) / 2)[:, None]) / span[:, None]
    pixel = np.rint(unit * (SIZE - 2 * margin) + SIZE / 2 - 0.5).astype(int)
    inside = ((pixel >= 0) & (pixel < SIZE)).all(axis=2)
    flat = (rows * SIZE + pixel[..., 1]) * SIZE + pixel[..., 0]
    hits = np.bincount(flat[inside], minlength=count * SIZE * SIZE).reshape(count, SIZE, SIZE)
    return np.clip(np.log1p(hits) * 90, 0, 255).astype(np.uint8)
