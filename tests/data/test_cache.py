"""The prefix cache: the bits of no cache, computed once, never half, never stale, bounded."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fedprompt
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError, InputError
from fedprompt.data.prefix import cache
from fedprompt.data.prefix import entries as cache_files
from fedprompt.data.prefix.cache import (
    CacheOptions,
    FeatureTable,
    PrefixCache,
    cache_entries,
    cache_folder,
    cache_size,
    compute_table,
)
from fedprompt.data.prefix.tables import ARRAYS, CHUNK
from fedprompt.data.sets import domains
from fedprompt.data.task import Split, datasets

Overrides = Callable[..., list[str]]
CPU = torch.device("cpu")
COUNT = CHUNK + 44
"""Images of a split: two chunks."""


class Toy:
    """An encoder of three tokens of width 4; writes a line per chunk into a log."""

    cut = 0

    def __init__(self, log: Path, weight: float = 0.5, seconds: float = 0.0) -> None:
        self.log = log
        self.weight = torch.tensor(weight)  # no plain setting: `checksum` stands for it
        self.seconds = torch.tensor(seconds)
        self.scale = 1.0

    def preprocess(self, images: Tensor) -> Tensor:
        return images.permute(0, 3, 1, 2) / 255

    def embed(self, pixels: Tensor) -> Tensor:
        with self.log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(float(self.seconds))
        return pixels.flatten(1)[:, :12].reshape(-1, 3, 4) * self.weight * self.scale

    def constants(self, tokens: Tensor) -> dict[str, Tensor]:
        return {
            "tokens": tokens,
            "style": tokens.std(dim=1),
            "cls": tokens.cos().sum(dim=1),
            "features": tokens.sin().sum(dim=1),
        }

    def checksum(self) -> str:
        return str(float(self.weight))


def make_split(seed: int = 0) -> Split:
    generator = np.random.default_rng(seed)
    return Split(
        images=generator.integers(0, 256, (COUNT, 4, 4, 3), np.uint8),
        labels=generator.integers(0, 3, COUNT),
        groups=generator.integers(0, 2, COUNT),
    )


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "log")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def chunks_computed(toy: Toy) -> int:
    return len(toy.log.read_text().split()) if toy.log.exists() else 0


def open_cache(toy: Toy, folder: Path, **options: Any) -> PrefixCache:
    return PrefixCache(toy, CPU, CacheOptions(folder=str(folder), **options))


def assert_same(first: FeatureTable, second: FeatureTable) -> None:
    assert first.dtype == second.dtype
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), strict=True)


def test_the_cache_says_how_many_images_are_done(toy: Toy, tmp_path: Path) -> None:
    cache, split = open_cache(toy, tmp_path / "cache"), make_split()
    assert list(cache.steps(split)) == [0, CHUNK, COUNT]
    assert list(cache.steps(split)) == []  # it is there


def names(folder: Path) -> list[str]:
    """Everything in the cache but the folder of locks."""
    return sorted(path.name for path in folder.iterdir() if path.name != "locks")


# ---------------------------------------------------------------- hits and misses


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_cached_table_has_the_bits_of_a_computed_one(toy: Toy, folder: Path, dtype: str) -> None:
    split = make_split()
    expected = compute_table(toy, split, CPU, dtype)
    first = open_cache(toy, folder, dtype=dtype).table(split)
    assert chunks_computed(toy) == 4, "two chunks without a cache, two with"
    again = open_cache(toy, folder, dtype=dtype).table(split)
    assert chunks_computed(toy) == 4
    for table in (first, again):
        assert_same(table, expected)
        assert isinstance(table.tokens, np.memmap) and not table.tokens.flags.writeable
    assert open_cache(toy, folder, dtype=dtype).notes == []


def test_the_activations_before_another_block_are_another_entry(
    random_backbone: str, folder: Path
) -> None:
    """With the same queries and features, and a table knows which block its tokens enter."""
    from fedprompt.models.backbone import load_backbone

    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8)
    split = Split(images, np.arange(9), np.zeros(9, np.int64))
    tables = {}
    for cut in (0, 2, 4):
        backbone = load_backbone(random_backbone, cut)
        for _ in range(2):
            options = CacheOptions(folder=str(folder))
            tables[cut] = PrefixCache(backbone, CPU, options).table(split)
        by_hand = tables[0].tokens_at(np.arange(9))
        for block in backbone.vit.blocks[:cut]:
            by_hand = block(by_hand)
        np.testing.assert_allclose(tables[cut].tokens, by_hand.numpy(), atol=1e-6)
        for each in ("style", "cls", "features", "labels"):
            np.testing.assert_array_equal(getattr(tables[cut], each), getattr(tables[0], each))
        for same in (tables[cut], tables[cut].loaded(), pickle.loads(pickle.dumps(tables[cut]))):
            assert same.cut == cut
            same.with_queries({}).check_cut(cut)
        assert pickle.loads(pickle.dumps(tables[cut].loaded())).cut == cut
    assert len(names(folder)) == 3
    with pytest.raises(InputError, match=r"before block 4, .* got those before block 2") as caught:
        tables[2].check_cut(4)
    assert "\n" not in str(caught.value)


def test_a_backbone_is_known_again_and_equal_to_the_last_bit(
    random_backbone: str, folder: Path
) -> None:
    from fedprompt.models.backbone import load_backbone

    split = datasets.create("digits").validation
    expected = compute_table(load_backbone(random_backbone), split, CPU)
    options = CacheOptions(folder=str(folder))
    for _ in range(2):
        table = PrefixCache(load_backbone(random_backbone), CPU, options).table(split)
        assert_same(table, expected)
    assert len(cache_entries(folder)) == 1


def other_images(split: Split) -> Split:
    images = np.array(split.images)
    images[-1, -1, -1, -1] ^= 1
    return dataclasses.replace(split, images=images)


def other_labels(split: Split) -> Split:
    return dataclasses.replace(split, labels=(split.labels + 1) % 3)


def exchanged(split: Split) -> Split:
    return dataclasses.replace(split, labels=split.groups, groups=split.labels)


@pytest.mark.parametrize("change", [other_images, other_labels, exchanged])
def test_other_content_is_another_entry(
    toy: Toy, folder: Path, change: Callable[[Split], Split]
) -> None:
    split = make_split()
    open_cache(toy, folder).table(split)
    changed = change(split)
    assert_same(open_cache(toy, folder).table(changed), compute_table(toy, changed, CPU))
    assert len(cache_entries(folder)) == 2


def test_other_weights_settings_query_type_and_threads_are_other_entries(
    toy: Toy, folder: Path
) -> None:
    keys = set()

    def add(prefix: PrefixCache) -> None:
        keys.add(prefix.key(prefix.recipe(make_split())))

    add(open_cache(toy, folder))
    add(open_cache(toy, folder))
    assert len(keys) == 1
    add(open_cache(Toy(toy.log, weight=0.25), folder))
    add(open_cache(toy, folder, dtype="float16"))
    toy.scale = 2.0  # any plain attribute counts
    add(open_cache(toy, folder))
    torch.set_num_threads(2)  # the fixture `one_thread` puts it back
    add(open_cache(toy, folder))
    assert len(keys) == 5


def test_buffers_outside_the_state_dict_count(random_backbone: str) -> None:
    from fedprompt.models.backbone import load_backbone

    first, second = load_backbone(random_backbone), load_backbone(random_backbone)
    assert cache.encoder_identity(first) == cache.encoder_identity(second)
    second.channel_mean += 0.1
    assert first.checksum() == second.checksum()
    assert cache.encoder_identity(first) != cache.encoder_identity(second)


def test_without_a_cache_nothing_is_written(toy: Toy, folder: Path) -> None:
    table = open_cache(toy, folder, enabled=False, dtype="float16").table(make_split())
    assert not folder.exists() and table.tokens.dtype == np.float16
    assert not isinstance(table.tokens, np.memmap)


def test_an_empty_split_is_refused(toy: Toy, folder: Path) -> None:
    nothing = np.zeros(0, np.int64)
    empty = Split(np.zeros((0, 4, 4, 3), np.uint8), nothing, nothing)
    with pytest.raises(InputError, match="at least one image"):
        open_cache(toy, folder).table(empty)
    assert names(folder) == []


# ---------------------------------------------------------------- types


def test_short_types_halve_the_tokens_and_leave_the_rest(toy: Toy, folder: Path) -> None:
    split = make_split()
    exact = open_cache(toy, folder).table(split)
    rows = np.array([299, 0, 257])
    for dtype in ("float16", "bfloat16"):
        table = open_cache(toy, folder, dtype=dtype).table(split)
        assert table.tokens.nbytes * 2 == exact.tokens.nbytes
        read = table.tokens_at(rows)
        assert read.dtype == torch.float32
        assert torch.equal(read, exact.tokens_at(rows).to(getattr(torch, dtype)).float())
        assert not torch.equal(read, exact.tokens_at(rows))
        for name in ("style", "cls", "features"):
            np.testing.assert_array_equal(getattr(table, name), getattr(exact, name))


def test_tokens_beyond_float16_are_refused(toy: Toy, folder: Path) -> None:
    toy.scale = 1e6
    with pytest.raises(ConfigError, match=r"images 0 to 255 is too large.*dtype=bfloat16"):
        open_cache(toy, folder, dtype="float16").table(make_split())
    assert names(folder) == []
    assert np.isfinite(open_cache(toy, folder, dtype="bfloat16").table(make_split()).tokens).all()


# ---------------------------------------------------------------- between processes


def test_a_table_travels_as_a_path_and_maps_the_same_file(toy: Toy, folder: Path) -> None:
    table = open_cache(toy, folder).table(make_split())
    data = pickle.dumps(table, protocol=5)
    assert len(data) < 500
    copy = pickle.loads(data)
    assert_same(copy, table)
    assert isinstance(copy.tokens, np.memmap)
    assert copy.tokens.filename == table.tokens.filename
    assert Path(copy.tokens.filename).parent == cache_entries(folder)[0].path


def test_a_changed_or_loaded_table_travels_by_value(toy: Toy, folder: Path) -> None:
    table = open_cache(toy, folder).table(make_split())
    changed = dataclasses.replace(table, labels=table.labels + 1)
    copies = [pickle.loads(pickle.dumps(each, protocol=5)) for each in (changed, table.loaded())]
    shutil.rmtree(folder)
    assert_same(copies[0], changed)
    assert_same(copies[1], table)
    assert not isinstance(copies[1].tokens, np.memmap)


def test_an_entry_that_vanished_is_named(toy: Toy, folder: Path) -> None:
    data = pickle.dumps(open_cache(toy, folder).table(make_split()))
    path = cache_entries(folder)[0].path
    shutil.rmtree(path)
    with pytest.raises(InputError, match=f"cache entry {path}: expected .* but it is gone"):
        pickle.loads(data)


def compute_in_child(log: Path, folder: Path, seconds: float) -> None:
    """For a child process."""
    open_cache(Toy(log, seconds=seconds), folder).table(make_split())


def child(toy: Toy, folder: Path, seconds: float) -> Any:
    # All children are forks of one process, which imports this file once; the tests' own process
    # may have threads, and is not to be forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=compute_in_child, args=(toy.log, folder, seconds))
    process.start()
    return process


def test_of_processes_that_start_at_once_one_computes(toy: Toy, folder: Path) -> None:
    children = [child(toy, folder, 1.0) for _ in range(2)]
    for process in children:
        process.join(200)
        assert process.exitcode == 0
    assert len(toy.log.read_text().split()) == 2, "the chunks of one process"
    assert len(names(folder)) == 1


def test_a_killed_writer_leaves_no_entry_and_blocks_nobody(toy: Toy, folder: Path) -> None:
    process = child(toy, folder, 30.0)
    deadline = time.monotonic() + 200
    while not chunks_computed(toy) and time.monotonic() < deadline:
        time.sleep(0.05)
    toy.log.unlink()
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert cache_entries(folder) == []
    table = open_cache(toy, folder).table(make_split())
    assert_same(table, compute_table(toy, make_split(), CPU))
    assert names(folder) == [cache_entries(folder)[0].path.name]


def test_what_a_killed_writer_left_is_removed_by_any_later_one(toy: Toy, folder: Path) -> None:
    abandoned = folder / f".new-{'0' * 64}"
    abandoned.mkdir(parents=True)
    (abandoned / "tokens.npy").write_bytes(b"half")
    open_cache(toy, folder).table(make_split())
    assert not abandoned.exists()


def test_an_encoder_that_fails_leaves_nothing(toy: Toy, folder: Path) -> None:
    def embed(pixels: Tensor) -> Tensor:
        if len(pixels) < CHUNK:
            raise RuntimeError("second chunk")
        return Toy.embed(toy, pixels)

    broken = Toy(toy.log)
    broken.embed = embed  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="second chunk"):
        open_cache(broken, folder).table(make_split())
    assert names(folder) == []


# ---------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    os.truncate(path / "tokens.npy", 1000)


def flip_a_bit(path: Path) -> None:
    with (path / "tokens.npy").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))


def lose_a_file(path: Path) -> None:
    (path / "style.npy").unlink()


def lose_the_header(path: Path) -> None:
    (path / "header.json").unlink()


def spoil_the_header(path: Path) -> None:
    (path / "header.json").write_bytes(b"\x00not json")


def edit_the_header(path: Path) -> None:
    header = json.loads((path / "header.json").read_text())
    header["dtype"] = "bfloat16"
    (path / "header.json").write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "tokens.npy has 1000 bytes instead of"),
        (flip_a_bit, "tokens.npy does not match its checksum"),
        (lose_a_file, "style.npy is not readable"),
        (lose_the_header, "header.json is missing"),
        (spoil_the_header, "header.json is not readable"),
        (edit_the_header, "header.json does not match its checksum"),
    ],
)
def test_a_damaged_entry_is_computed_again_and_said(
    toy: Toy, folder: Path, damage: Callable[[Path], None], reason: str
) -> None:
    before = open_cache(toy, folder).table(make_split())
    expected = before.loaded().tokens.copy()
    path = cache_entries(folder)[0].path
    del before
    damage(path)
    prefix = open_cache(toy, folder)
    table = prefix.table(make_split())
    np.testing.assert_array_equal(table.tokens, expected)
    assert len(prefix.notes) == 1
    assert f"cache entry {path} was damaged ({reason}" in prefix.notes[0]
    assert names(folder) == [path.name]
    again = open_cache(toy, folder)
    again.table(make_split())
    assert again.notes == []


def test_verify_finds_what_left_no_trace(toy: Toy, folder: Path) -> None:
    """Rot of the medium changes neither size nor time."""
    open_cache(toy, folder).table(make_split())
    path = cache_entries(folder)[0].path
    before = (path / "tokens.npy").stat()
    flip_a_bit(path)
    os.utime(path / "tokens.npy", ns=(before.st_mtime_ns, before.st_mtime_ns))
    prefix = open_cache(toy, folder, verify=True)
    prefix.table(make_split())
    assert "tokens.npy does not match its checksum" in prefix.notes[0]


def test_a_copied_cache_is_accepted(toy: Toy, folder: Path, tmp_path: Path) -> None:
    """Other times of writing, the same bytes."""
    open_cache(toy, folder).table(make_split())
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    prefix = open_cache(toy, copy)
    prefix.table(make_split())
    assert chunks_computed(toy) == 2 and prefix.notes == []


def test_nothing_is_unpickled(toy: Toy, folder: Path) -> None:
    open_cache(toy, folder).table(make_split())
    path = cache_entries(folder)[0].path
    np.save(path / "labels.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    size = (path / "labels.npy").stat().st_size
    header = json.loads((path / "header.json").read_text())
    del header["sha256"]
    header["arrays"]["labels"].update(
        bytes=size, sha256=cache_files._digest_of_file(path / "labels.npy")
    )
    signed = {**header, "sha256": cache_files._digest_of(header)}
    (path / "header.json").write_text(json.dumps(signed))
    with pytest.raises(InputError, match=r"labels.npy is not readable"):
        cache_files.open_entry(path)


# ---------------------------------------------------------------- the disk


def test_a_full_disk_is_one_line_and_leaves_no_half_entry(
    toy: Toy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = open_cache(toy, folder, dtype="float16").table(make_split())
    write, calls = cache_files._ArrayWriter._write, []

    def failing(self: Any, data: memoryview) -> None:
        calls.append(len(data))
        if len(calls) > 7:  # in the middle of the first chunk
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(cache_files._ArrayWriter, "_write", failing)
    with pytest.raises(ConfigError, match="has no room for the features of 300 images") as caught:
        open_cache(toy, folder).table(make_split())
    assert "\n" not in str(caught.value) and "cache.enabled=false" in str(caught.value)
    assert names(folder) == [Path(kept.tokens.filename).parent.name]  # type: ignore[attr-defined]


def test_a_disk_that_would_be_full_is_found_before_the_work(
    toy: Toy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"no room for the features of 300 images .*1e-06 GB are"):
        open_cache(toy, folder).table(make_split())
    assert chunks_computed(toy) == 1 and names(folder) == []


def test_a_folder_that_cannot_be_written_is_said_and_done_without(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    prefix = open_cache(toy, tmp_path / "file" / "cache")
    assert_same(prefix.table(make_split()), compute_table(toy, make_split(), CPU))
    prefix.table(make_split(1))
    assert len(prefix.notes) == 1 and "cannot be written" in prefix.notes[0]


def fill(toy: Toy, folder: Path, **options: Any) -> dict[int, str]:
    """Three entries, none in use, entry 0 used last; the name of each."""
    found = {}
    for seed in range(3):
        table = open_cache(toy, folder, **options).table(make_split(seed))
        found[seed] = Path(table.tokens.filename).parent.name  # type: ignore[attr-defined]
        del table
        os.utime(folder / found[seed], (1000 + seed, 1000 + seed))
    open_cache(toy, folder, **options).table(make_split(0))
    return found


def test_the_entry_not_used_for_longest_makes_room(toy: Toy, folder: Path) -> None:
    found = fill(toy, folder)
    one = cache_entries(folder)[0].size
    assert cache_size(folder) == 3 * one
    limit = 3.5 * one / 1e9
    open_cache(toy, folder, limit_gb=limit).table(make_split(3))
    assert found[1] not in names(folder)
    assert found[0] in names(folder) and found[2] in names(folder)
    assert cache_size(folder) <= 3.5 * one


def test_an_entry_in_use_is_not_deleted(toy: Toy, folder: Path) -> None:
    found = fill(toy, folder)
    limit = 1.5 * cache_entries(folder)[0].size / 1e9
    used = open_cache(toy, folder).table(make_split(1))
    os.utime(folder / found[1], (1, 1))
    prefix = open_cache(toy, folder, limit_gb=limit)
    prefix.table(make_split(3))
    assert found[1] in names(folder) and len(names(folder)) == 2
    assert "everything in it is in use" in prefix.notes[0]
    del used
    open_cache(toy, folder, limit_gb=limit).table(make_split(4))
    assert len(names(folder)) == 1


def test_nothing_but_entries_is_counted_or_deleted(toy: Toy, folder: Path) -> None:
    own = ("data", "docs", "0123", "deadbeef" * 7, ".old-thesis", ".new-idea")
    for name in own:
        (folder / name).mkdir(parents=True)
        (folder / name / "thesis.txt").write_text("years of work" * 10_000)
    assert cache_entries(folder) == [] and cache_size(folder) == 0
    open_cache(toy, folder).table(make_split())
    one = cache_entries(folder)[0].size / 1e9
    for seed in range(3):
        open_cache(toy, folder, limit_gb=1.5 * one).table(make_split(seed))
    assert len(cache_entries(folder)) == 1
    assert all((folder / name / "thesis.txt").is_file() for name in own)


def test_what_cannot_be_had_costs_no_entry(
    toy: Toy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fill(toy, folder)
    used = open_cache(toy, folder).table(make_split(1))
    free = cache_entries(folder)[0].size // 2  # with two entries gone, 2.5 would fit
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    three = [make_split(seed) for seed in (3, 4, 5)]
    large = Split(
        *(
            np.concatenate([getattr(split, name) for split in three])
            for name in ("images", "labels", "groups")
        )
    )
    with pytest.raises(ConfigError, match="no room for the features of 900 images"):
        open_cache(toy, folder).table(large)
    assert names(folder) == sorted(found.values())
    del used


def test_an_entry_is_held_until_its_writer_has_opened_it(
    toy: Toy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may make room just when an entry has got its name."""
    removed = []

    def open_later(path: Path, verify: bool = False) -> FeatureTable:
        if path.is_dir():
            removed.append(cache_files.remove_entry(path))
        return cache_files.open_entry(path, verify)

    monkeypatch.setattr(cache, "open_entry", open_later)
    table = open_cache(toy, folder).table(make_split())
    assert removed == [False] and len(names(folder)) == 1
    assert_same(table, compute_table(toy, make_split(), CPU))


def test_a_file_in_the_place_of_an_entry_is_replaced(toy: Toy, folder: Path) -> None:
    prefix = open_cache(toy, folder)
    path = folder / prefix.key(prefix.recipe(make_split()))
    folder.mkdir()
    path.write_text("no folder")
    assert_same(prefix.table(make_split()), compute_table(toy, make_split(), CPU))
    assert path.is_dir() and "it is no folder" in prefix.notes[0]


def test_a_table_larger_than_the_limit_is_refused(toy: Toy, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"take 3.36e-05 GB, more than the limit of 1e-05 GB"):
        open_cache(toy, folder, limit_gb=1e-5).table(make_split())
    assert names(folder) == []


# ---------------------------------------------------------------- options


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPROMPT_CACHE", "/from/environment")
    assert cache_folder() == Path("/from/environment")
    assert cache_folder("/from/option") == Path("/from/option")
    assert cache_folder("~/mine") == Path.home() / "mine"
    monkeypatch.delenv("FEDPROMPT_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/fedprompt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fedprompt"


def test_no_cache_is_an_empty_one(tmp_path: Path) -> None:
    assert cache_entries(tmp_path / "none") == [] and cache_size(tmp_path / "none") == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cache.dtype=float8", "cache.dtype: expected one of float32, float16, bfloat16"),
        ("cache.limit_gb=0", "cache.limit_gb: expected a number above 0, got 0.0"),
        ("cache.limit_gb=.nan", "cache.limit_gb: expected a number above 0, got nan"),
        ("cache.folder=' '", "cache.folder: expected a folder or null"),
        ("cache.limit=3", "did you mean 'cache.limit_gb'"),
    ],
)
def test_wrong_options_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("digits", [override])


def test_the_yaml_file_lists_the_defaults() -> None:
    assert compose("digits").cache == CacheOptions()


# ---------------------------------------------------------------- whole runs


SMALL = ("data.validation=40", "data.test=40", "data.public=80", "head=released")


def test_a_warm_cache_draws_no_image(
    tiny: Overrides, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to know the images, nor their labels."""
    from fedprompt.runs.federation import (
        prepare,  # imports Lightning, which the child processes need not
    )

    config = compose("domains", tiny("data.train=80", *SMALL, f"cache.folder={folder}"))
    first = prepare(config)

    def fail(*arguments: Any) -> None:
        raise AssertionError("an image was drawn")

    monkeypatch.setattr(domains, "draw_split", fail)
    again = prepare(config)
    for one, other in zip(first.setup.splits, again.setup.splits, strict=True):
        assert_same(one, other)
    assert_same(first.data.table, again.data.table)
    with pytest.raises(AssertionError, match="was drawn"):
        prepare(compose("domains", tiny("data.train=84", *SMALL, f"cache.folder={folder}")))


def test_drawn_images_are_known_by_what_they_depend_on() -> None:
    options = domains.DomainsOptions()
    known = domains.DrawnImages("test", options).fingerprint()
    assert domains.DrawnImages("train", options).fingerprint() != known
    for name, value in {"seed": 1, "test": 100, "resolution": 64, "difficulty": 0.4}.items():
        other = dataclasses.replace(options, **{name: value})
        assert domains.DrawnImages("test", other).fingerprint() != known, name
    other = dataclasses.replace(options, train=400)
    assert domains.DrawnImages("test", other).fingerprint() == known


def test_cached_and_uncached_runs_have_the_same_bits(
    tiny: Overrides, folder: Path, tmp_path: Path
) -> None:
    """Under Ray: `test_ray_gives_the_bits_of_serial`."""

    def state(name: str, *overrides: str) -> str:
        result = fedprompt.run(
            "digits",
            tiny(
                "prompts.selection=keyed",  # queries are cached, too
                f"cache.folder={folder}",
                *overrides,
                f"run_dir={tmp_path / name}",
            ),
        )
        return str(result.summary["state_sha256"])

    uncached = state("uncached", "cache.enabled=false")
    assert not folder.exists()
    assert state("cold") == uncached
    assert state("warm") == uncached
    short = state("short", "cache.dtype=bfloat16", "cache.enabled=false")
    assert short != uncached
    assert state("short and cached", "cache.dtype=bfloat16") == short
    assert len(cache_entries(folder)) == 6
