"""What a run remembers of its task and its selection: its model can be used without the data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedprompt.core.files import Json
from fedprompt.data.prefix.whitening import Whitening
from fedprompt.data.task import Task


def task_card(task: Task) -> Json:
    """Content of `task.json`.

    Returns:
        `name`; `class_names`; `domains`, of each domain by name the numbers of its classes; `side`,
        pixels of the stored square images; `background`, the colour behind transparent pixels or
        null.
    """
    mask = task.class_mask
    return {
        "name": task.name,
        "class_names": list(task.class_names),
        "domains": {
            name: np.flatnonzero(own).tolist()
            for name, own in zip(task.group_names, mask, strict=True)
        },
        "side": task.train.images.shape[1],
        "background": getattr(task.train.images, "background", None),
    }


def whitening_arrays(maps: Mapping[str, Whitening]) -> dict[str, NDArray[np.float64]]:
    """Maps of queries as arrays `KIND/centre` and `KIND/matrix`."""
    return {
        f"{found.kind}/{field}": getattr(found, field)
        for found in maps.values()
        for field in ("centre", "matrix")
    }


def whitenings_from(arrays: Mapping[str, NDArray[np.float64]]) -> dict[str, Whitening]:
    """The maps that `whitening_arrays` took apart, by the names that queries have."""
    kinds = sorted({name.split("/")[0] for name in arrays})
    return {
        f"whitened {kind}": Whitening(kind, arrays[f"{kind}/centre"], arrays[f"{kind}/matrix"])
        for kind in kinds
    }
