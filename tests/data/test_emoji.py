"""`data=emoji`: five styles of the same concepts, divided by concept; on small made-up packages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedprompt
import package_trees
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.partition.base import create as partitioner
from fedprompt.data.partition.base import split_task
from fedprompt.data.reading.images import ImageFiles, decode
from fedprompt.data.sets.emoji import GOOGLE, STYLES, read_concepts
from fedprompt.data.task import Split, Task, datasets

REAL = Path(__file__).parents[2] / "data" / "emoji"
COUNTS = {
    "drink": 20,
    "tool": 20,
    "music": 19,  # too few
    "person-role": 30,
    "family": 30,
    "time": 30,
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("emoji")
    package_trees.emoji(root, COUNTS)
    return root


def create(root: Path, **options: Any) -> Task:
    return datasets.create("emoji", root=str(root), **{"size": 8, **options})


def concepts_of(split: Split, style: int) -> list[str]:
    """Code points of a split's concepts in one style, from the names of its files."""
    assert isinstance(split.images, ImageFiles)
    names = split.images.names[split.groups == style]
    return sorted(Path(name).stem.upper().removesuffix("-FE0F").lstrip("0") for name in names)


def test_classes_and_counts(packages: Path) -> None:
    """Two classes of 20 concepts: 6 tested, 2 for validation, 12 trained, each in five styles."""
    task = create(packages)
    assert task.class_names == ("drink", "tool") and task.group_names == STYLES
    assert task.class_mask.all() and task.public is None
    for split, each in ((task.test, 6), (task.validation, 2), (task.train, 12)):
        counts = np.zeros((5, 2), int)
        np.add.at(counts, (split.groups, split.labels), 1)
        assert (counts == each).all()


def test_splits_are_by_concept_and_the_same_in_all_styles(packages: Path) -> None:
    task = create(packages)
    own = {
        name: [concepts_of(getattr(task, name), style) for style in range(5)]
        for name in ("train", "validation", "test")
    }
    for lists in own.values():
        assert all(each == lists[0] for each in lists)
    assert len(set(package_trees.flat([own[name][0] for name in own]))) == 40
    other = create(packages, seed=1)
    assert concepts_of(other.test, 0) != own["test"][0]


def test_pixels_are_those_of_the_files(packages: Path) -> None:
    """Whatever the packages make of a code: FE0F, leading zeros, capitals."""
    codes = [entry["unified"] for entry in entries(packages) if entry["subcategory"] == "tool"]
    concepts = {each.name: each for each in read_concepts(packages)}
    for code in codes[:2]:  # one with FE0F, one without
        expected = package_trees.styles_of(code)
        assert concepts[code].files == expected
    drawn = decode(packages / expected["line"], 8)
    colour = 0x200000 + next(i for i, e in enumerate(entries(packages)) if e["unified"] == code)
    assert (drawn == (colour >> 16, colour >> 8 & 255, colour & 255)).all()


def entries(packages: Path) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = json.loads(
        (packages / GOOGLE.folder / "emoji.json").read_text()
    )
    return content


def test_a_concept_that_one_style_lacks_is_left_out(tmp_path: Path) -> None:
    package_trees.emoji(tmp_path, {"drink": 21, "tool": 20})
    (tmp_path / package_trees.styles_of("0A01-FE0F")["fluent3d"]).unlink()
    task = create(tmp_path)
    assert "A01" not in package_trees.flat(
        [concepts_of(getattr(task, name), 0) for name in ("train", "validation", "test")]
    )
    (tmp_path / package_trees.styles_of("0A02")["noto"]).unlink()
    assert create(tmp_path).class_names == ("tool",)


def test_a_public_style(packages: Path) -> None:
    task = create(packages, public="line")
    plain = create(packages)
    assert task.group_names == ("noto", "twemoji", "openmoji", "fluent3d")
    assert task.public is not None and isinstance(task.public.images, ImageFiles)
    assert concepts_of(task.public, 0) == concepts_of(plain.train, 0)
    assert all("/black/" in name for name in task.public.images.names)
    assert not any(
        "/black/" in name
        for name in np.concatenate(
            [split.images.names for split in (task.train, task.validation, task.test)]  # type: ignore[union-attr]
        )
    )
    assert (len(task.train), len(task.test)) == (4 * 24, 4 * 12)


def test_coarser_classes_and_few_shots(packages: Path) -> None:
    task = create(packages, level="category", shots=3)
    assert task.class_names == ("Food & Drink", "Objects")
    assert np.bincount(task.train.labels).tolist() == [15, 15]
    few, all_of_them = create(packages, shots=3), create(packages)
    assert set(concepts_of(few.train, 0)) < set(concepts_of(all_of_them.train, 0))
    assert concepts_of(few.test, 0) == concepts_of(all_of_them.test, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"styles": ["nato"]}, r"data\.styles: expected one of .*did you mean 'noto'"),
        ({"styles": ["noto", "noto"]}, r"data\.styles: expected different styles"),
        ({"styles": ["noto"], "public": "noto"}, r"at least one beside data\.public"),
        ({"public": "apple"}, r"data\.public: expected one of noto"),
        ({"level": "class"}, r"data\.level: expected one of subcategory, category"),
        ({"min_concepts": 2}, r"data\.min_concepts: expected an integer >= 3"),
        ({"shots": 0}, r"data\.shots: expected an integer >= 1"),
        ({"test": 0.95}, r"shares that leave training concepts"),
        ({"min_concepts": 21}, r"data\.min_concepts: expected a class with at least 21"),
        ({"test": 0.01, "validation": 0.01}, r"leave every split concepts"),
        ({"test": 0.5, "validation": 0.49}, r"leave every split concepts"),
    ],
)
def test_what_cannot_be_done(packages: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"\A[^\n]*{message}[^\n]*\Z"):
        create(packages, **options)


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '[{"unified": "1"}]'])
def test_a_damaged_list(tmp_path: Path, content: str) -> None:
    package_trees.emoji(tmp_path)
    (tmp_path / GOOGLE.folder / "emoji.json").write_text(content)
    with pytest.raises(InputError, match=r"\A[^\n]*emoji\.json: expected a list of emoji[^\n]*\Z"):
        create(tmp_path)


def test_selection_is_keyed_where_clients_have_several_styles() -> None:
    def selection(*overrides: str) -> str:
        overrides = ("prompts.pool=null", "data=emoji", *overrides)
        return compose("digits", overrides).prompts.selection

    assert selection() == "keyed"
    assert selection("data.styles=[noto]") == "all"
    assert selection("data.styles=[noto,line]", "data.public=line") == "all"


# Who owns what


def styles_per_client(task: Task, name: str, clients: int, **options: Any) -> list[set[int]]:
    parts = split_task(partitioner(name, **options), task, clients, seed=0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(task.train)))
    return [set(task.train.groups[part].tolist()) for part in parts]


def test_natural_is_a_style_a_client(packages: Path) -> None:
    task = create(packages)
    assert styles_per_client(task, "natural", 5) == [{style} for style in range(5)]
    with pytest.raises(ConfigError, match="divides no domain"):
        styles_per_client(task, "natural", 10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("iid", {}),
        ("dirichlet", {"alpha": 0.5}),
        ("imbalance", {}),
        ("shards", {"classes_per_client": 1}),
    ],
)
def test_the_others_divide_each_style(packages: Path, name: str, options: dict[str, Any]) -> None:
    """Ten clients: two of each style, and none has images of two styles."""
    owned = styles_per_client(create(packages), name, 10, **options)
    assert owned == [{client // 2} for client in range(10)]


def test_a_run(tiny: Callable[..., list[str]], packages: Path) -> None:
    overrides = tiny("data=emoji", f"data.root={packages}", "data.size=32", "partition=iid")
    result = fedprompt.run("digits", [*overrides, "clients.count=10", "clients.per_round=5"])
    assert len(result.reports) == 2


@pytest.mark.skipif(not REAL.is_dir(), reason="`make real` has not fetched the packages")
def test_the_real_packages() -> None:
    """Counted by an independent script: 21 classes, 648 concepts, 3,240 images."""
    task = datasets.create("emoji", root=str(REAL))
    splits = (task.train, task.validation, task.test)
    assert len(task.class_names) == 21 and sum(map(len, splits)) == 3240
    assert list(map(len, splits)) == [5 * 389, 5 * 64, 5 * 195]
    assert task.test.images[np.array([0])].shape == (1, 98, 98, 3)
