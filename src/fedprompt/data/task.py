"""A task: labelled images in fixed splits, the same for every client, method and runtime."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedprompt.core.errors import InputError
from fedprompt.core.registry import Registry


class Images(Protocol):
    """N RGB images of one size that are read, or drawn, when they are needed.

    A NumPy array of shape (N, H, W, 3) and type uint8 will do in its place.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)"""
        ...

    def __getitem__(self, index: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """The chosen images: (k, H, W, 3) uint8."""
        ...

    def fingerprint(self) -> str:
        """Text that is another one whenever a pixel may be another one; found without reading the
        pixels. The prefix cache knows the images by it.
        """
        ...


def fingerprint(images: NDArray[np.uint8] | Images) -> str:
    """What the prefix cache knows images by: their own fingerprint, or the SHA-256 of an array."""
    if not isinstance(images, np.ndarray):
        return images.fingerprint()
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the images of a split stand in the split as it was published, of which validation or
    test images may have been cut out since. Partitions of other programs are of that one.
    """

    positions: NDArray[np.int64]
    """(N,) of each image, from 0."""
    published: NDArray[np.uint8] | Images
    """All images of the published split, in its order."""

    def take(self, index: NDArray[np.int64]) -> Origin:
        """The same of the images at these positions of the split."""
        return Origin(self.positions[index], self.published)

    def paths(self) -> list[str] | None:
        """Absolute paths of the published images; None where they are no files."""
        paths = getattr(self.published, "paths", None)
        return None if paths is None else paths()


@dataclasses.dataclass(frozen=True)
class Split:
    """Images with labels; `groups` names the visual domain that each image belongs to."""

    images: NDArray[np.uint8] | Images
    """(N, H, W, 3) RGB, uint8."""
    labels: NDArray[np.int64]
    """(N,)"""
    groups: NDArray[np.int64]
    """(N,) index into `Task.group_names`."""
    clients: NDArray[np.int64] | None = None
    """(N,) number of the owner of each image, from 0, where the data say who owns what."""
    origin: Origin | None = None
    """None if the split is as it was published."""

    def __len__(self) -> int:
        return len(self.labels)

    def origins(self) -> Origin:
        """Where the images stand in the split as it was published."""
        return self.origin or Origin(np.arange(len(self), dtype=np.int64), self.images)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a registered data set returns.

    `public` holds labelled images that no client holds (for a frozen head); it shares
    no image with the other splits (of `domains`, see `data.sets.domains`). `class_mask[g, c]` says
    whether class c exists in domain g; evaluation of an image of domain g chooses among those
    classes only.
    """

    name: str
    class_names: tuple[str, ...]
    group_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    public: Split | None = None
    notes: tuple[str, ...] = ()
    """What a user should know about the reading, for example how many images were left out."""

    @property
    def num_classes(self) -> int:
        """Number of classes over all domains."""
        return len(self.class_names)

    @property
    def class_mask(self) -> NDArray[np.bool_]:
        """(domains, classes): which classes occur in which domain of the training split."""
        mask = np.zeros((len(self.group_names), self.num_classes), dtype=bool)
        mask[self.train.groups, self.train.labels] = True
        return mask

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test", "public"):
            split = getattr(self, name)
            if split is None:
                continue
            count = len(split.labels)
            shape = split.images.shape
            dtype = getattr(split.images, "dtype", np.dtype(np.uint8))
            if dtype != np.uint8 or (len(shape), shape[0], shape[-1]) != (4, count, 3):
                raise InputError(
                    f"{self.name}, split {name}: expected ({count}, H, W, 3) uint8 images, "
                    f"got {shape} {dtype}"
                )
            if len(split.groups) != count:
                raise InputError(
                    f"{self.name}, split {name}: {count} labels but {len(split.groups)} groups"
                )
            if split.clients is not None and len(split.clients) != count:
                raise InputError(
                    f"{self.name}, split {name}: {count} labels but {len(split.clients)} clients"
                )
            for what, values, names in (
                ("labels", split.labels, self.class_names),
                ("groups", split.groups, self.group_names),
            ):
                if count and not (values.min() >= 0 and values.max() < len(names)):
                    raise InputError(
                        f"{self.name}, split {name}: {what} must lie in 0..{len(names) - 1}, "
                        f"got {values.min()}..{values.max()}"
                    )

        for name in ("validation", "test"):
            self._check_classes(name, getattr(self, name))

    def _check_classes(self, name: str, split: Split) -> None:
        """Every class of a domain that is tested must be trained: it is masked otherwise."""
        unknown = ~self.class_mask[split.groups, split.labels]
        if unknown.any():
            first = int(unknown.argmax())
            raise InputError(
                f"{self.name}, split {name}: class '{self.class_names[split.labels[first]]}' of "
                f"domain '{self.group_names[split.groups[first]]}' does not occur in the training "
                "split; expected every class there"
            )


datasets: Registry[Task] = Registry("data set", "fedprompt.data.sets")
