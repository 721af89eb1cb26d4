"""Draw `docs/images/emoji.png` and `docs/images/mixed.png`, contact sheets of the real data sets.

python docs/sheets.py        (after `make real`)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fedprompt.data.task import Split, Task, datasets

IMAGES = Path(__file__).with_name("images")
TILE = 56
LEFT = 84
"""Pixels for the names of the rows."""
TOP = 112
"""For the names of the columns."""
COLOURS = 128


def emoji() -> Image.Image:
    """The same concept of each class, a row for each style."""
    task = datasets.create("emoji", size=TILE)
    split = task.train
    number = len(split) // len(task.group_names)  # the same concepts in the same order
    labels = split.labels[:number]
    columns = [int(np.flatnonzero(labels == label)[3]) for label in range(task.num_classes)]
    rows = [
        split.images[np.array(columns) + style * number] for style in range(len(task.group_names))
    ]
    return sheet(rows, task.group_names, task.class_names)


def mixed() -> Image.Image:
    """An image of each class, a row for each domain."""
    task = datasets.create("mixed", size=TILE)
    rows = [of_each_class(task, task.train, group) for group in range(len(task.group_names))]
    return sheet(rows, task.group_names, ())


def of_each_class(task: Task, split: Split, group: int) -> np.ndarray:
    """One image of each class of a domain: (classes, side, side, 3)."""
    chosen = []
    for position, label in enumerate(np.flatnonzero(task.class_mask[group])):
        own = np.flatnonzero((split.labels == label) & (split.groups == group))
        # Emoji of a class stand style after style, letters font after font: another one each time.
        chosen.append(own[len(own) * (2 * position % 5 * 2 + 1) // 10])
    return split.images[np.array(chosen)]


def sheet(
    rows: Sequence[np.ndarray], row_names: Sequence[str], column_names: Sequence[str]
) -> Image.Image:
    """Tiles in rows, with names at the left and, upright, at the top."""
    font = ImageFont.load_default(13)
    top = TOP if column_names else 4
    step = TILE + 2
    size = (LEFT + step * max(map(len, rows)), top + step * len(rows))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for number, name in enumerate(column_names):
        text = Image.new("RGB", (top, TILE), "white")
        ImageDraw.Draw(text).text((2, TILE // 2), name, "black", font, anchor="lm")
        page.paste(text.rotate(90, expand=True), (LEFT + step * number, 0))
    for number, (name, images) in enumerate(zip(row_names, rows, strict=True)):
        y = top + step * number
        draw.text((4, y + TILE // 2), name, "black", font, anchor="lm")
        for column, image in enumerate(images):
            page.paste(Image.fromarray(image), (LEFT + step * column, y))
    return page.quantize(COLOURS)


if __name__ == "__main__":
    for name, draw_sheet in (("emoji", emoji), ("mixed", mixed)):
        draw_sheet().save(IMAGES / f"{name}.png", optimize=True)
