"""Look at a partition before anything is trained: a table, a picture, and the partition as a file.

Only the data's labels are used; no backbone is loaded.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedprompt.config import ExperimentConfig
from fedprompt.core.errors import ConfigError
from fedprompt.core.files import Json, atomic_write
from fedprompt.data.partition.base import (
    Indices,
    class_counts,
    left_out,
    partitioners,
    split_task,
)
from fedprompt.data.partition.file import FILE_NAME, make_recipe, partition_bytes
from fedprompt.data.task import Task, datasets
from fedprompt.report.figures import clients_figure
from fedprompt.report.style import INK
from fedprompt.runs.directory import Partition

if TYPE_CHECKING:
    from rich.table import Table

MOST_DRAWN = 200
"""Clients in the picture; of more, so many at equal distances are drawn."""
CAPTION = (
    "Of a client: min/median/max. JS: Jensen-Shannon divergence of a client's classes from those "
    "of all clients of the row, in bits. Effective classes: exp(entropy), mean of the clients."
)


@dataclasses.dataclass(frozen=True)
class Preview:
    """A partition of a task's training split."""

    config: ExperimentConfig
    task: Task
    parts: list[Indices]
    notes: tuple[str, ...] = ()
    """What the user should know about the reading and the partition."""

    @property
    def title(self) -> str:
        """One line: the data, the partition with its options, and what is left out."""
        options = dataclasses.asdict(self.config.partition.options)
        listed = ", ".join(f"{key}={value}" for key, value in options.items())
        given, total = sum(map(len, self.parts)), len(self.task.train)
        out = f"; {total - given:,} of {total:,} samples are left out" if given < total else ""
        return (
            f"{self.task.name}: {total:,} training samples of {self.task.num_classes} classes, "
            f"partition {self.config.partition.name}{f' ({listed})' if listed else ''}, "
            f"seed {self.config.seed}{out}"
        )


def make_preview(config: ExperimentConfig) -> Preview:
    """Read the data and partition the training split, as a run of `config` would.

    Raises:
        ConfigError: the data cannot be read or partitioned as asked.
    """
    partition = partitioners.create(
        config.partition.name, **dataclasses.asdict(config.partition.options)
    )
    task = datasets.create(config.data.name, **dataclasses.asdict(config.data.options))
    parts = split_task(partition, task, config.clients.count, config.seed)
    return Preview(config, task, parts, (*task.notes, *left_out(partition, parts)))


def divergences(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Jensen-Shannon divergence, in bits, of each client's classes from those of all clients.

    0 for a client whose classes are distributed as everyone's; at most 1.

    Args:
        counts: (clients, classes) samples; each client has some.

    >>> divergences(np.array([[3, 3], [5, 5]])).tolist()
    [0.0, 0.0]
    """
    from scipy.spatial.distance import jensenshannon

    everybody = counts.sum(axis=0, keepdims=True)
    distances = jensenshannon(counts, everybody, base=2, axis=1)
    # The distance is the root of the divergence, and NaN where rounding makes that negative.
    return np.asarray(np.nan_to_num(distances) ** 2, np.float64)


def effective_classes(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """exp(entropy) of each client's classes: k for k equally frequent classes.

    Args:
        counts: (clients, classes) samples; each client has some.

    >>> effective_classes(np.array([[7, 0], [5, 5]])).round(6).tolist()
    [1.0, 2.0]
    """
    from scipy.stats import entropy

    return np.asarray(np.exp(entropy(counts, axis=1)), np.float64)


def measure(counts: NDArray[np.int64]) -> Json:
    """The figures of one row of the table.

    Args:
        counts: (clients, classes) samples; clients without samples count for the sizes alone.

    Returns:
        `clients`, `samples`, `sizes` and `classes` (min, median, max of a client), `divergence`
        (mean, max), `effective` (mean).
    """
    sizes = counts.sum(axis=1)
    filled = counts[sizes > 0]
    divergence = divergences(filled)
    return {
        "clients": len(counts),
        "samples": int(sizes.sum()),
        "sizes": _spread(sizes),
        "classes": _spread((filled > 0).sum(axis=1)),
        "divergence": (float(divergence.mean()), float(divergence.max())),
        "effective": float(effective_classes(filled).mean()),
    }


def _spread(values: NDArray[np.floating] | NDArray[np.integer]) -> tuple[float, float, float]:
    return float(values.min()), float(np.median(values)), float(values.max())


def measure_all(preview: Preview) -> dict[str, Json]:
    """`measure` of each domain, when there are several, and of `all`.

    A domain's row is about its samples and the clients that have some of them.
    """
    train, classes = preview.task.train, preview.task.num_classes
    whole = class_counts(preview.parts, train.labels, classes)
    rows: dict[str, Json] = {}
    if len(preview.task.group_names) > 1:
        for group, name in enumerate(preview.task.group_names):
            own = [part[train.groups[part] == group] for part in preview.parts]
            own = [part for part in own if len(part)]
            if own:
                rows[name] = measure(class_counts(own, train.labels, classes))
    return {**rows, "all": measure(whole)}


def render_table(preview: Preview) -> Table:
    """The figures for the terminal, 80 columns wide."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = measure_all(preview)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        header_style="bold",
        caption=CAPTION,
        caption_justify="left",
    )
    table.add_column("domain" if len(rows) > 1 else "", overflow="fold", min_width=3)
    for head in (
        *("clients", "samples", "samples of\na client", "classes of\na client"),
        *("JS\nmean/max", "effective\nclasses"),
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = (
            name,
            f"{row['clients']:,}",
            f"{row['samples']:,}",
            "/".join(f"{value:g}" for value in row["sizes"]),
            "/".join(f"{value:g}" for value in row["classes"]),
            "/".join(f"{value:.3f}" for value in row["divergence"]),
            f"{row['effective']:.2f}",
        )
        table.add_row(*map(Text, cells), style="bold" if name == "all" and len(rows) > 1 else "")
    return table


def draw_picture(preview: Preview, path: Path) -> None:
    """Write the client x class heat map of the partition as a PNG.

    Raises:
        ConfigError: the file cannot be written.
    """
    task, count = preview.task, len(preview.parts)
    shown = np.linspace(0, count - 1, min(count, MOST_DRAWN)).astype(np.int64)
    parts = [preview.parts[client] for client in shown]
    counts = class_counts(parts, task.train.labels, task.num_classes)
    figure = clients_figure(Partition(task.class_names, counts))
    if count > MOST_DRAWN:
        title = f"Who holds what: {MOST_DRAWN} of {count:,} clients, at equal distances"
        figure.axes[0].set_title(
            title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=12
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    _write(path, buffer.getvalue(), "--picture")


def save_partition(preview: Preview, path: Path) -> Path:
    """Write the partition with its recipe, for `partition.file=PATH`.

    Args:
        preview: what to write.
        path: a new file, or a folder that gets a `partition.npz`.

    Raises:
        ConfigError: the file exists or cannot be written.
    """
    path = path / FILE_NAME if path.is_dir() else path
    if path.exists():
        raise ConfigError(
            f"--save {path}: expected a new file, got one that exists; choose another"
        )
    choice = preview.config.partition
    recipe = make_recipe(
        choice.name,
        dataclasses.asdict(choice.options),
        preview.config.seed,
        preview.parts,
        preview.task.train.labels,
    )
    _write(path, partition_bytes(preview.parts, recipe), "--save")
    return path


def check_writable(path: Path, option: str) -> None:
    """Refuse a file that cannot be written, before anything is.

    Raises:
        ConfigError: names the option.
    """
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        cause = errno.EISDIR if path.is_dir() else errno.EACCES
        cause = cause if path.parent.is_dir() else errno.ENOENT
        raise _cannot_write(path, option, os.strerror(cause))


def _write(path: Path, content: bytes, option: str) -> None:
    try:
        atomic_write(path, content)
    except OSError as error:
        raise _cannot_write(path, option, error.strerror or str(error)) from error


def _cannot_write(path: Path, option: str, cause: str) -> ConfigError:
    return ConfigError(
        f"{option} {path}: expected a file that can be written, got '{cause}'; choose another"
    )
