"""The run directory keeps what it is given and removes nothing that is not its own."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fedprompt.core.errors import CheckpointError, ConfigError, InputError
from fedprompt.core.types import RoundReport
from fedprompt.runs import manifest as manifest_module
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.manifest import manifest


def make_report(round_index: int, accuracy: float = 0.5) -> RoundReport:
    return RoundReport(
        round=round_index,
        accuracy=accuracy,
        loss=1.25,
        validation_accuracy=accuracy,
        train_loss=0.75,
        num_prompts=10,
        bytes_up=1000,
        bytes_down=2000,
        seconds={"train": 1.0, "aggregate": 0.25, "evaluate": 0.5},
        clients=({"client": 3, "loss": np.float32(0.5), "num_examples": np.int64(7)},),
        quarantined=({"client": 4, "reason": "not finite"},),
        diagnostics={"merged": math.inf},
    )


def finish(run: RunDirectory) -> RunDirectory:
    run.write_config("seed: 0\n")
    run.write_manifest({"python": "3"})
    run.append_round(make_report(1))
    run.write_summary({"accuracy": 0.5})
    run.write_status({"state": "finished", "round": 1})
    return run


def files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def test_new_run_is_running_and_can_be_opened(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "deep" / "run")
    status = RunDirectory.open(run.path).read_status()
    assert (status["state"], status["round"]) == ("running", 0)
    assert status["updated"].endswith("+00:00")
    assert not run.is_finished()


def test_finished_run_is_refused_unless_overwritten(tmp_path: Path) -> None:
    run = finish(RunDirectory.create(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"got a finished run; .*--overwrite") as caught:
        RunDirectory.create(run.path)
    assert "\n" not in str(caught.value)
    assert run.read_summary() == {"accuracy": 0.5}
    again = RunDirectory.create(run.path, overwrite=True)
    assert again.read_rounds() == []
    assert files(run.path) == ["status.json"]
    assert not again.is_finished()


def test_unfinished_run_points_at_resume(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"got an unfinished run; .*--resume \S+run'"):
        RunDirectory.create(run.path)
    assert RunDirectory.create(run.path, overwrite=True).path == run.path


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "manifest.json", "status.json"])
def test_folder_that_is_no_run_is_never_touched(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).write_text('{"name": "something else"}')
    with pytest.raises(ConfigError, match="folder with other files; choose another run_dir"):
        RunDirectory.create(tmp_path, overwrite)
    assert files(tmp_path) == [name]


def test_overwrite_removes_only_what_belongs_to_a_run(tmp_path: Path) -> None:
    run = finish(RunDirectory.create(tmp_path / "run"))
    finish(RunDirectory.create(run.comparison("mean").path))
    mine = ["notes.txt", "state/mine.bin", "figures/mine.txt", "compare/mine/a.txt", "extra/b.txt"]
    ours = [
        *("state/round_00001.json", "state/round_00001.safetensors", "figures/accuracy.png"),
        *("state/.round_00001.json.12.tmp", "report.html", "partition.json", "partition.npz"),
    ]
    for name in mine + ours:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("x")
    RunDirectory.create(run.path, overwrite=True)
    assert files(run.path) == sorted([*mine, "status.json"])
    assert not (run.path / "compare" / "mean").exists()


def test_empty_folder_is_welcome_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunDirectory.create(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="expected a folder, got a file"):
        RunDirectory.create(tmp_path / "file", overwrite=True)
    with pytest.raises(ConfigError, match="expected a folder that can be written"):
        RunDirectory.create(tmp_path / "file" / "below")


def test_check_new_judges_without_writing(tmp_path: Path) -> None:
    RunDirectory.check_new(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    run = finish(RunDirectory.create(tmp_path / "run"))
    before = files(run.path)
    with pytest.raises(ConfigError, match="got a finished run"):
        RunDirectory.check_new(run.path)
    RunDirectory.check_new(run.path, overwrite=True)
    assert files(run.path) == before


def test_checkpoint_counts_once_its_card_is_there(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    assert run.last_round() is None
    run.state_folder.mkdir()
    (run.state_folder / "round_00001.safetensors").write_bytes(b"")
    assert run.last_round() is None
    (run.state_folder / "round_00001.json").write_text("{}")
    assert run.last_round() is not None


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, got in (("missing", "nothing there"), ("file", "a file"), (".", "another folder")):
        with pytest.raises(ConfigError, match=f"expected a run directory .* got {got}"):
            RunDirectory.open(tmp_path / name)


def test_rounds_come_back_with_null_for_nan(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    run.append_round(make_report(0, accuracy=math.nan))
    run.append_round(make_report(1))
    first, second = run.read_rounds()
    assert first["accuracy"] is None
    assert first["diagnostics"] == {"merged": None}
    assert (second["round"], second["accuracy"], second["bytes_down"]) == (1, 0.5, 2000)
    assert second["clients"] == [{"client": 3, "loss": 0.5, "num_examples": 7}]
    text = (tmp_path / "rounds.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


@pytest.mark.parametrize(
    "torn",
    [b'{"round": 3, "accur', b"{", b"\x00\x00\x00\x00", b'{"a": 1}', b'{"x": "' + b"a" * 200_000],
)
def test_torn_last_line_is_left_out_and_mended(tmp_path: Path, torn: bytes) -> None:
    run = RunDirectory.create(tmp_path)
    for round_index in (1, 2):
        run.append_round(make_report(round_index))
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    assert [record["round"] for record in run.read_rounds()] == [1, 2]
    run.append_round(make_report(3))
    assert [record["round"] for record in run.read_rounds()] == [1, 2, 3]
    assert len(path.read_bytes().splitlines()) == 3


def test_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    run.append_round(make_report(1))
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    run.append_round(make_report(2))
    assert [record["round"] for record in run.read_rounds()] == [1, 2]


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    run.append_round(make_report(1))
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(b"garbage\n" + path.read_bytes())
    with pytest.raises(CheckpointError, match=r"in line 1, got b'garbage'; delete the line"):
        run.read_rounds()


def test_truncate_drops_later_rounds_and_keeps_the_rest_as_it_was(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    for round_index in range(5):
        run.append_round(make_report(round_index))
    path = tmp_path / "rounds.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)[:3]
    path.write_bytes(path.read_bytes() + b'{"torn')
    run.truncate_rounds(after=2)
    assert path.read_bytes() == b"".join(kept)
    run.append_round(make_report(3))
    assert [record["round"] for record in run.read_rounds()] == [0, 1, 2, 3]


def test_truncate_without_records(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    run.truncate_rounds(after=0)
    assert run.read_rounds() == []


def test_status_refuses_an_unknown_state(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    with pytest.raises(
        InputError, match="running, finished, failed, stopped, interrupted, got 'done'"
    ):
        run.write_status({"state": "done"})
    run.write_status({"state": "failed", "client": 3, "stage": "fit", "message": "boom"})
    assert run.read_status()["client"] == 3


def test_damaged_status_is_empty_and_damaged_summary_is_an_error(tmp_path: Path) -> None:
    run = finish(RunDirectory.create(tmp_path))
    (tmp_path / "status.json").write_text("{")
    assert run.read_status() == {}
    assert run.is_run()  # config, manifest and rounds still say so
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        run.read_summary()


def test_config_manifest_and_missing_files(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    assert (run.read_config(), run.read_summary(), run.read_manifest()) == ("", {}, {})
    assert run.read_partition() is None
    assert run.read_indices() == []
    run.write_config("seed: 3\n")
    assert (tmp_path / "config.yaml").read_text() == "seed: 3\n"


def test_partition_round_trip(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    indices = [np.array([4, 1, 2]), np.array([], dtype=np.int64), np.array([0, 3])]
    counts = np.array([[2, 1], [0, 0], [1, 1]])
    run.write_partition(indices, counts, ["cat", "dog"])
    partition = run.read_partition()
    assert partition is not None
    assert partition.class_names == ("cat", "dog")
    np.testing.assert_array_equal(partition.class_counts, counts)
    for read, written in zip(run.read_indices(), indices, strict=True):
        assert read.dtype == np.int64
        np.testing.assert_array_equal(read, written)
    content = json.loads((tmp_path / "partition.json").read_text())
    assert content["clients"][0] == {"client": 0, "num_examples": 3, "class_counts": [2, 1]}
    with pytest.raises(InputError, match=r"expected class counts of shape \(3, 3\)"):
        run.write_partition(indices, counts, ["cat", "dog", "cow"])


def test_comparison_runs_are_run_directories(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    for name in ("mean", "head-only"):
        RunDirectory.create(run.comparison(name).path)
    (tmp_path / "compare" / "other").mkdir()
    assert [each.path.name for each in run.comparisons()] == ["head-only", "mean"]
    for name in ("", "..", "a/b", "-x", ".hidden"):
        with pytest.raises(ConfigError, match="expected a name of letters"):
            run.comparison(name)


def test_manifest_names_versions_and_machine() -> None:
    values = manifest()
    assert values["python"] == platform.python_version()
    assert values["packages"]["torch"].split("+")[0].count(".") >= 1
    assert {"fedprompt", "ray", "timm", "pytorch-lightning"} <= set(values["packages"])
    assert values["usable_cpus"] >= 1
    # Last bits, and so digests, depend on the kind of processor.
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    assert values["cpu"].startswith(names[0]) if names else values["cpu"]
    json.dumps(values, allow_nan=False)


def test_commit_only_of_a_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
        result = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        git("init", "-q")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git")
    tracked, untracked = tmp_path / "tracked.py", tmp_path / "untracked.py"
    tracked.write_text("a = 1\n")
    untracked.write_text("")
    git("add", tracked.name)
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert manifest_module._git_commit(tracked) == {"commit": commit, "dirty": False}
    assert manifest_module._git_commit(untracked) is None
    tracked.write_text("a = 2\n")
    assert manifest_module._git_commit(tracked) == {"commit": commit, "dirty": True}
