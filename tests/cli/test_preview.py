"""`fedprompt partition`: figures by pencil, the picture, the file, one line for bad calls."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fedprompt.cli import preview
from fedprompt.cli.main import main
from fedprompt.config import compose
from fedprompt.data.partition import base as partition
from fedprompt.data.partition.file import read_partition
from fedprompt.data.task import Split, Task, datasets


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["partition", *arguments], prog_name="fedprompt")


def make(parts: list[list[int]], labels: list[int], groups: list[int]) -> preview.Preview:
    """A partition of images that do not matter."""
    count = len(labels)
    split = Split(
        np.zeros((count, 2, 2, 3), np.uint8),
        np.array(labels, np.int64),
        np.array(groups, np.int64),
    )
    names = tuple(f"domain {group}" for group in range(max(groups) + 1))
    classes = tuple(f"class {label}" for label in range(max(labels) + 1))
    task = Task("toy", classes, names, split, split, split)
    return preview.Preview(compose("digits"), task, [np.array(part, np.int64) for part in parts])


def test_divergence_by_pencil() -> None:
    """Clients (1, 0) and (0, 1) against (1/2, 1/2): M = (3/4, 1/4), and
    JS = (log2(4/3) + (log2(2/3) + log2(2)) / 2) / 2.
    """
    expected = (math.log2(4 / 3) + (math.log2(2 / 3) + math.log2(2)) / 2) / 2
    assert preview.divergences(np.array([[4, 0], [0, 4]])) == pytest.approx([expected] * 2)
    assert preview.divergences(np.array([[1, 3], [2, 6]])) == pytest.approx([0, 0], abs=1e-12)


def test_effective_classes_by_pencil() -> None:
    counts = np.array([[5, 0, 0], [2, 2, 2], [2, 1, 1]])
    expected = [1, 3, 2 * math.sqrt(2)]  # entropy of (1/2, 1/4, 1/4) is 1.5 log 2
    assert preview.effective_classes(counts) == pytest.approx(expected)


def test_figures_of_each_domain_and_of_all() -> None:
    made = make([[0, 1, 2], [3], [4, 5, 6, 7]], [0, 0, 1, 1, 2, 2, 2, 3], [0, 0, 0, 0, 1, 1, 1, 1])
    rows = preview.measure_all(made)
    assert list(rows) == ["domain 0", "domain 1", "all"]
    assert rows["domain 0"]["clients"] == 2
    assert rows["domain 0"]["sizes"] == (1, 2, 3)
    assert rows["domain 0"]["classes"] == (1, 1.5, 2)
    assert rows["domain 1"]["divergence"] == pytest.approx((0, 0), abs=1e-12)  # one client
    assert rows["all"]["sizes"] == (1, 3, 4)
    assert rows["all"]["samples"] == 8
    assert rows["all"]["divergence"][1] > 0.3


def test_clients_without_samples_count_for_the_sizes_alone() -> None:
    row = preview.measure(np.array([[2, 2], [0, 0]]))
    assert (row["clients"], row["sizes"], row["classes"]) == (2, (0, 2, 4), (2, 2, 2))
    assert row["effective"] == pytest.approx(2)


def test_one_domain_has_one_row_and_says_what_is_left_out() -> None:
    made = make([[0], [2]], [0, 0, 1], [0, 0, 0])
    assert list(preview.measure_all(made)) == ["all"]
    assert made.title.endswith("seed 0; 1 of 3 samples are left out")


def test_the_partition_is_that_of_a_run() -> None:
    config = compose("digits", ["seed=4"])
    made = preview.make_preview(config)
    task = datasets.create("digits")
    parts = partition.split_task(partition.create("dirichlet"), task, 20, 4)
    assert all(np.array_equal(a, b) for a, b in zip(made.parts, parts, strict=True))


def test_the_command_prints_a_table_and_draws(desk: Path) -> None:
    result = call("digits", "partition=shards", "partition.classes_per_client=3")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == (
        "digits: 1,168 training samples of 10 classes, "
        "partition shards (classes_per_client=3), seed 0"
    )
    (row,) = [line.split() for line in lines if "3/3/3" in line]
    assert row[:3] == ["all", "20", "1,168"]
    assert 2.9 < float(row[-1]) <= 3
    assert lines[-1] == "picture: partition-digits.png"
    assert sorted(path.name for path in desk.iterdir()) == ["partition-digits.png"]
    with Image.open("partition-digits.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 20


def test_the_saved_partition_is_previewed_and_not_replaced(desk: Path) -> None:
    result = call("digits", "--save", "mine.npz", "--picture", "a.png", "seed=2")
    assert result.stdout.splitlines()[-2:] == ["picture: a.png", "partition: mine.npz"]
    assert read_partition("mine.npz").recipe["seed"] == 2
    again = call("digits", "partition.file=mine.npz")
    assert again.exit_code == 0
    assert again.stdout.splitlines()[4:6] == result.stdout.splitlines()[4:6]
    before = Path("mine.npz").read_bytes()
    refused = call("digits", "--save", "mine.npz", "--picture", "b.png")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: --save mine.npz: expected a new file")
    assert Path("mine.npz").read_bytes() == before
    assert not Path("b.png").exists()


def test_a_picture_of_many_clients_shows_some(desk: Path) -> None:
    made = make([[client] for client in range(1000)], [0, 1] * 500, [0] * 1000)
    preview.draw_picture(made, Path("many.png"))
    with Image.open("many.png") as picture:
        assert max(picture.size) < 3000


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "got none; try 'fedprompt partition quickstart'"),
        (["one", "two"], "got 'one' and 'two'"),
        (["nothing"], "no experiment 'nothing'"),
        (["digits", "partition.alfa=1"], "did you mean 'partition.alpha'?"),
        (["digits", "clients.count=2000"], "2000 clients with at least 1 sample(s) each need"),
        (
            ["digits", "partition={name: shards, classes_per_client: 11}"],
            "20 clients x 11 classes",
        ),
        (["digits", "partition=natural"], "has 1 for 20 clients; set clients.count=1"),
        (["digits", "partition.file=gone.npz"], "where there is no such file"),
        (["digits", "--picture", "gone/a.png"], "--picture gone/a.png: expected a file that"),
        (["digits", "--save", "gone/a.npz"], "--save gone/a.npz: expected a file that can be"),
        (["digits", "--pictures", "a"], "--pictures"),
    ],
    ids=" ".join,
)
def test_bad_calls_are_one_line(desk: Path, arguments: list[str], part: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert part in line
    assert result.stdout == ""
    assert list(desk.iterdir()) == []
