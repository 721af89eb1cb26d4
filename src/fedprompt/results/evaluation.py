"""A run's model on other data: new images, new domains, clients that it has never met."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedprompt.core.errors import ConfigError
from fedprompt.core.files import Json
from fedprompt.data.task import Task
from fedprompt.results.model import PromptedModel

SPLITS = ("test", "validation", "train", "all")


@dataclasses.dataclass(frozen=True)
class Figures:
    """Shares of images that are classified rightly."""

    images: int
    together: float
    """Images of one domain choose their prompts together, `prompts.eval_batch` at a time."""
    alone: float
    """Each image chooses for itself."""


@dataclasses.dataclass(frozen=True)
class OtherData:
    """What a model does on some data."""

    name: str
    split: str
    overall: Figures
    domains: dict[str, Figures]
    known: dict[str, bool]
    """Whether the model was trained on each domain; of others all its classes are possible."""
    balanced: float
    """Mean over classes of the share of their images that is right; chosen together."""

    def json(self) -> Json:
        """As a document."""
        return dataclasses.asdict(self)


def evaluate_on(model: PromptedModel, task: Task, split: str = "test") -> OtherData:
    """Classify the images of a split.

    Domains are known by their names, and so are classes: each class of the data must be one of the
    model's.

    Args:
        model: of a run.
        task: its images and labels.
        split: of `SPLITS`.

    Raises:
        ConfigError: a class that the model does not have, or a split without images.
    """
    parts = [getattr(task, name) for name in (SPLITS[:3] if split == "all" else (split,))]
    groups = np.concatenate([part.groups for part in parts])
    if not len(groups):
        raise ConfigError(f"{task.name}: expected images in the split '{split}', got none")
    given = np.concatenate([part.labels for part in parts])
    labels = _labels(model, task, given)[given]
    rights = {together: np.zeros(len(groups), dtype=bool) for together in (True, False)}
    known, domains = {}, {}
    for number in np.unique(groups):
        name, own = task.group_names[number], np.flatnonzero(groups == number)
        known[name] = name in model.domains
        pixels = np.concatenate(
            [part.images[np.flatnonzero(part.groups == number)] for part in parts]
        )
        table = model.table(pixels, name if known[name] else None)
        for together, right in rights.items():
            batch = model.recipe.prompts.eval_batch if together else 1
            right[own] = model.predict_table(table, batch).labels == labels[own]
        domains[name] = _figures(rights, own)
    classes = [rights[True][labels == label].mean() for label in np.unique(labels)]
    everything = _figures(rights, np.arange(len(groups)))
    return OtherData(task.name, split, everything, domains, known, float(np.mean(classes)))


def _labels(model: PromptedModel, task: Task, given: NDArray[np.int64]) -> NDArray[np.int64]:
    """(classes of the task,) their numbers in the model; -1 where no image has the class.

    Args:
        model: of a run.
        task: names the classes.
        given: (N,) labels of the images.
    """
    numbers = {name: number for number, name in enumerate(model.class_names)}
    occurring = {task.class_names[label] for label in np.unique(given)}
    unknown = sorted(occurring - numbers.keys())
    if unknown:
        raise ConfigError(
            f"{task.name}: expected classes of the run ({', '.join(model.class_names[:5])}"
            f"{', ...' if len(model.class_names) > 5 else ''}), got {', '.join(unknown[:5])}"
            f"{', ...' if len(unknown) > 5 else ''}; name them alike"
        )
    return np.array([numbers.get(name, -1) for name in task.class_names])


def _figures(rights: Mapping[bool, NDArray[np.bool_]], own: NDArray[np.int64]) -> Figures:
    return Figures(len(own), float(rights[True][own].mean()), float(rights[False][own].mean()))
