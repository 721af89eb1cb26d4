"""Checkpoints survive damage: what comes back is bit for bit what was saved, or a clear refusal."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedprompt.core.errors import CheckpointError, InputError
from fedprompt.core.files import atomic_write, json_ready
from fedprompt.core.types import ClientState, Parts, ServerState
from fedprompt.runs import checkpoint
from fedprompt.runs.checkpoint import load_latest, save_state


def make_state(round_index: int, prompts: int = 3) -> ServerState:
    generator = torch.Generator().manual_seed(round_index)
    weight = torch.randn(4, 6, generator=generator)
    return ServerState(
        round_index,
        torch.randn(prompts, 5, generator=generator),
        torch.randn(prompts, 2, generator=generator),
        # A transposed view and a slice of the same storage: safetensors refuses both as they are.
        Parts(head={"weight": weight, "weight_t": weight.t(), "bias": weight[0]}),
        aggregator={
            "age": torch.arange(prompts),
            "scale": torch.tensor(0.5, dtype=torch.float64),
        },
        clients={
            7: ClientState(Parts(head={"a/b": torch.ones(2)})),
            12: ClientState(Parts(objective={"mask": torch.tensor([True, False])})),
        },
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_byte(path: Path, offset: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x01
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("prompts", [3, 1, 0])
def test_round_trip_is_exact(tmp_path: Path, prompts: int) -> None:
    state = make_state(12, prompts)
    path = save_state(tmp_path / "state", state, {"best": 0.5, "nan": float("nan"), "ids": (1, 2)})
    assert path.name == "round_00012.json"
    loaded = load_latest(tmp_path / "state")
    assert loaded.state.sha256() == state.sha256()
    assert loaded.state.prompts.shape == (prompts, 5)
    assert set(loaded.state.clients) == {7, 12}
    assert loaded.extra == {"best": 0.5, "nan": None, "ids": [1, 2]}
    assert loaded.warnings == []
    for name, tensor in loaded.state.tensors().items():
        assert tensor.dtype == state.tensors()[name].dtype
        tensor.zero_()  # loaded tensors are ordinary, writable memory


def test_card_tells_round_checksums_and_format(tmp_path: Path) -> None:
    state = make_state(3)
    card = json.loads(save_state(tmp_path, state).read_text())
    assert card["round"] == 3
    assert card["format"] == checkpoint.FORMAT_VERSION
    assert card["state_sha256"] == state.sha256()
    assert len(card["sha256"]) == 64


def test_last_two_are_kept_and_stray_files_removed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".round_00001.safetensors.4711.tmp").write_bytes(b"half")
    (tmp_path / "round_00001.safetensors").write_bytes(b"tensors without a card")
    for round_index in (2, 3, 4):
        save_state(tmp_path, make_state(round_index))
    assert names(tmp_path) == [
        "notes.txt",
        *("round_00003.json", "round_00003.safetensors"),
        *("round_00004.json", "round_00004.safetensors"),
    ]


def test_rounds_after_the_saved_one_are_forgotten(tmp_path: Path) -> None:
    for round_index in (10, 11):
        save_state(tmp_path, make_state(round_index))
    save_state(tmp_path, dataclasses.replace(make_state(99), round_index=10))
    assert names(tmp_path) == ["round_00010.json", "round_00010.safetensors"]
    assert load_latest(tmp_path).state.round_index == 10


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda folder: flip_byte(folder / "round_00002.safetensors"), "safetensors is damaged"),
        (lambda folder: flip_byte(folder / "round_00002.safetensors", 40), "is damaged"),
        (lambda folder: os.truncate(folder / "round_00002.safetensors", 100), "100 bytes"),
        (lambda folder: os.truncate(folder / "round_00002.safetensors", 0), "0 bytes"),
        (lambda folder: (folder / "round_00002.safetensors").unlink(), "No such file"),
        (lambda folder: os.truncate(folder / "round_00002.json", 30), "json is damaged"),
        (lambda folder: (folder / "round_00002.json").write_text("[]"), "json is damaged"),
        (lambda folder: (folder / "round_00002.json").write_text("{}"), "expected format 2"),
    ],
)
def test_damage_falls_back_to_the_round_before(
    tmp_path: Path, damage: Callable[[Path], object], what: str
) -> None:
    for round_index in (1, 2):
        save_state(tmp_path, make_state(round_index), {"round": round_index})
    damage(tmp_path)
    loaded = load_latest(tmp_path)
    assert loaded.state.sha256() == make_state(1).sha256()
    assert loaded.extra == {"round": 1}
    assert len(loaded.warnings) == 1
    assert what in loaded.warnings[0]
    assert "round_00002" in loaded.warnings[0]
    assert loaded.warnings[0].endswith("fell back to round 1")
    assert "\n" not in loaded.warnings[0]


def test_every_byte_of_the_card_is_guarded(tmp_path: Path) -> None:
    save_state(tmp_path, make_state(1))
    path = save_state(tmp_path, make_state(2), {"learning_rate": 0.25})
    path.write_text(path.read_text().replace("0.25", "0.26"))
    assert load_latest(tmp_path).state.round_index == 1


def test_card_of_another_round_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, make_state(1))
    for suffix in ("json", "safetensors"):
        content = (tmp_path / f"round_00001.{suffix}").read_bytes()
        (tmp_path / f"round_00009.{suffix}").write_bytes(content)
    loaded = load_latest(tmp_path)
    assert loaded.state.round_index == 1
    assert "expected round 9, got 1" in loaded.warnings[0]


def test_checkpoint_without_card_does_not_exist(tmp_path: Path) -> None:
    save_state(tmp_path, make_state(1))
    save_state(tmp_path, make_state(2)).unlink()
    loaded = load_latest(tmp_path)
    assert (loaded.state.round_index, loaded.warnings) == (1, [])


def test_nothing_usable_is_one_line_with_advice(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"got none; start the run again with --overwrite"):
        load_latest(tmp_path / "missing")
    for round_index in (1, 2):
        save_state(tmp_path, make_state(round_index))
        flip_byte(tmp_path / f"round_{round_index:05d}.safetensors")
    with pytest.raises(CheckpointError, match=r"round_00002\S+ is damaged.*round_00001") as caught:
        load_latest(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("failing", ["round_00003.safetensors", "round_00003.json"])
def test_failing_disk_leaves_the_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    for round_index in (1, 2):
        save_state(tmp_path, make_state(round_index))
    replace = Path.replace

    def full_disk(source: Path, target: Path) -> None:
        if target.name == failing:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot save round 3 .*No space left.*make room"):
        save_state(tmp_path, make_state(3))
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    assert load_latest(tmp_path).state.sha256() == make_state(2).sha256()


def test_crash_while_a_round_is_saved_again_never_mixes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, make_state(1))
    save_state(tmp_path, make_state(2))
    other = dataclasses.replace(make_state(77), round_index=2)
    replace = Path.replace

    def crash_at_card(source: Path, target: Path) -> None:
        if target.suffix == ".json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(Path, "replace", crash_at_card)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, other)
    assert load_latest(tmp_path).state.round_index == 1


def test_saved_state_shares_no_memory_with_the_live_one(tmp_path: Path) -> None:
    state = make_state(1)
    before = state.sha256()
    save_state(tmp_path, state)
    load_latest(tmp_path).state.prompts.fill_(9.0)
    assert state.sha256() == before


def test_atomic_write_replaces_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    atomic_write(path, "first, with ünicode")
    assert path.read_text(encoding="utf-8") == "first, with ünicode"
    atomic_write(path, b"\x00second")
    assert path.read_bytes() == b"\x00second"
    assert names(tmp_path) == ["status.json"]


def test_json_ready_knows_arrays_and_refuses_the_rest() -> None:
    value = {"a": np.float32(0.5), "b": np.arange(2), "c": torch.tensor([[1.0, float("inf")]])}
    assert json_ready(value) == {"a": 0.5, "b": [0, 1], "c": [[1.0, None]]}
    assert json_ready({"path": Path("x"), "flag": np.bool_(True)}) == {"path": "x", "flag": True}
    with pytest.raises(InputError, match="got object"):
        json_ready({"a": [object()]})
