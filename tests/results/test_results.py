"""`fedprompt.load`, `predict` and `evaluate`: the model of a run is the model that was measured."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from small_runs import SMALL, VARIANTS, task_of
from torch import nn

import fedprompt
from fedprompt.cli.main import main
from fedprompt.core.errors import CheckpointError, ConfigError, InputError
from fedprompt.results.evaluation import evaluate_on
from fedprompt.runs.directory import RunDirectory
from fedprompt.runs.events import Event, RoundFinished

Overrides = Callable[..., list[str]]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "personal"])
def test_a_loaded_model_has_the_accuracy_of_its_run(
    name: str, run_of: Callable[[str], Path]
) -> None:
    run_dir = run_of(name)
    model = fedprompt.load(run_dir)
    assert isinstance(model, nn.Module)
    found = evaluate_on(model, task_of(run_dir))
    summary = RunDirectory.open(run_dir).read_summary()
    assert found.overall.together == pytest.approx(summary["accuracy"], abs=1e-6)
    assert found.overall.alone == pytest.approx(summary["alone_accuracy"], abs=1e-6)
    assert found.balanced == pytest.approx(summary["balanced_accuracy"], abs=1e-6)
    assert sum(each.images for each in found.domains.values()) == found.overall.images == 80
    assert all(found.known.values())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_comparison_is_loaded_by_its_name_or_its_folder(run_of: Callable[[str], Path]) -> None:
    run_dir = run_of("clients' metric")
    images = task_of(run_dir).test.images[:8]
    for method in ("fedavg_pt", "head_only"):
        named = fedprompt.load(run_dir, method=method).predict(images)
        folder = fedprompt.load(run_dir / "compare" / method).predict(images)
        np.testing.assert_array_equal(named.probabilities, folder.probabilities)
        expected = RunDirectory.open(run_dir / "compare" / method).read_summary()["accuracy"]
        found = evaluate_on(fedprompt.load(run_dir, method=method), task_of(run_dir))
        assert found.overall.together == pytest.approx(expected, abs=1e-6)
    assert named.prompts.shape == (8, 0)  # the head alone has none


def test_a_client_has_a_model_of_its_own(run_of: Callable[[str], Path]) -> None:
    run_dir = run_of("personal")
    state = fedprompt.load(run_dir, client=0).model.own
    assert state.head
    images = task_of(run_dir).test.images[:20]
    first, second = (fedprompt.load(run_dir, client=client).predict(images) for client in (0, 1))
    assert not np.allclose(first.probabilities, second.probabilities)
    with pytest.raises(ConfigError, match="client: expected a number from 0 to 5, as every client"):
        fedprompt.load(run_dir)
    generated = run_of("generator")
    one, two = (fedprompt.load(generated, client=client) for client in (0, 1))
    assert not torch.equal(one.network.prompts, two.network.prompts)


def test_an_image_is_the_same_from_a_file_an_array_and_pillow(
    run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = run_of("clients' metric")
    model, pixels = fedprompt.load(run_dir), task_of(run_dir).test.images[:3]
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    whole = model.predict(pixels)
    for given in (
        torch.from_numpy(pixels),
        list(pixels),
        paths,
        [str(path) for path in paths],
        [Image.open(path) for path in paths],
        tmp_path,
        [paths[0], Image.fromarray(pixels[1]), pixels[2]],
    ):
        found = model.predict(given)
        np.testing.assert_array_equal(found.probabilities, whole.probabilities)
        np.testing.assert_array_equal(found.prompts, whole.prompts)
    np.testing.assert_allclose(whole.probabilities.sum(axis=1), 1, rtol=1e-5)
    logits = model(torch.from_numpy(pixels))
    np.testing.assert_allclose(
        logits.softmax(dim=1).numpy(), whole.probabilities, rtol=1e-4, atol=1e-6
    )
    assert whole.classes == [model.class_names[label] for label in whole.labels]
    assert len(model.predict(pixels[0])) == 1
    assert model.predict(tmp_path).names == tuple(map(str, paths))
    big = np.asarray(Image.fromarray(pixels[0]).resize((100, 60)))
    assert len(model.predict(big)) == 1
    assert "37 classes, 4 domains" in repr(model)
    with torch.no_grad():  # the module's parameters are what predicts
        model.network.head[0].weight.zero_()
    np.testing.assert_allclose(model.predict(pixels).probabilities, 1 / 37, rtol=1e-5)


def test_a_known_domain_leaves_its_own_classes(run_of: Callable[[str], Path]) -> None:
    run_dir = run_of("clients' metric")
    model, task = fedprompt.load(run_dir), task_of(run_dir)
    found = model.predict(task.test.images[:5], domain="faces")
    own = task.class_mask[task.group_names.index("faces")]
    assert (found.probabilities[:, ~own] == 0).all()
    free = model.predict(task.test.images[:5])
    assert (free.probabilities > 0).all()


def test_what_cannot_be_used_is_refused(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run_dir = run_of("clients' metric")
    for arguments, match in (
        ({"client": 6}, "client: expected a number from 0 to 5, got 6"),
        ({"method": "gmm_pt"}, "method: expected one of fedavg_pt, head_only of .*, got 'gmm_pt'"),
    ):
        with pytest.raises(ConfigError, match=match):
            fedprompt.load(run_dir, **arguments)  # type: ignore[arg-type]
    model = fedprompt.load(run_dir)
    for images, match in (
        ([], "images: expected at least one, got none"),
        (np.zeros((2, 8, 8, 3)), "uint8"),
        (tmp_path / "nothing.png", "expected a file or a folder, got nothing there"),
        (tmp_path, "expected a folder with images"),
    ):
        with pytest.raises(InputError, match=match):
            model.predict(images)
    with pytest.raises(InputError, match=r"domain: expected one of digits, .*, got 'face'.*faces"):
        model.predict(np.zeros((32, 32, 3), dtype=np.uint8), domain="face")
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["backbone_sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="expected a backbone of sha256 000000000000"):
        fedprompt.load(copy)
    shutil.rmtree(copy / "state")
    with pytest.raises(ConfigError, match="expected a run with a finished round"):
        fedprompt.load(copy)


def test_a_run_of_an_earlier_version_is_loaded_without_its_domains(
    run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = run_of("clients' metric")
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    (copy / "task.json").unlink()
    images = task_of(run_dir).test.images[:4]
    old, new = fedprompt.load(copy), fedprompt.load(run_dir)
    np.testing.assert_array_equal(
        old.predict(images).probabilities, new.predict(images).probabilities
    )
    assert old.domains == {}


def test_the_command_line_predicts_files_and_leaves_out_what_does_not_decode(
    run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir, folder = run_of("clients' metric"), tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(task_of(run_dir).test.images[:4]):
        Image.fromarray(image).save(folder / f"{number}.png")
    expected = fedprompt.load(run_dir).predict(folder)
    output = tmp_path / "found.csv"
    call = ["predict", str(run_dir), str(folder), "--output", str(output)]
    result = CliRunner().invoke(main, call)
    assert result.exit_code == 0
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == expected.classes
    shares = [[float(row[name]) for name in expected.class_names] for row in rows]
    np.testing.assert_allclose(shares, expected.probabilities, rtol=1e-6)
    (folder / "bad.png").write_bytes(b"nonsense")
    output = tmp_path / "found.json"
    result = CliRunner().invoke(main, [*call[:-1], str(output), "--batch", "4"])
    assert result.exit_code == 1
    assert "bad.png: the image does not decode" in result.stderr
    assert "on_bad_image" not in result.stderr
    document = json.loads(output.read_text())
    assert [Path(row["image"]).name for row in document] == [f"{n}.png" for n in range(4)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["predict", "{run}", "{empty}"], "expected a folder with images, got none in it"),
        (["predict", "{empty}", "{empty}"], "expected a run directory"),
        (["predict", "{run}", "x.png", "--output", "x.txt"], "expected FILE.csv or FILE.json"),
        (["evaluate", "{run}", "rounds=3"], "expected data=NAME or data.KEY=VALUE"),
        (["evaluate", "{run}", "--output", "x.csv"], "expected FILE.json"),
        (["evaluate", "{run}", "data=digits"], "digits: expected classes of the run"),
    ],
)
def test_a_wrong_call_is_one_line(
    call: list[str], message: str, run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    places = {"run": run_of("clients' metric"), "empty": tmp_path}
    result = CliRunner().invoke(main, [part.format(**places) for part in call])
    assert result.exit_code != 0
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_other_data_with_a_new_domain_are_measured_by_the_names_of_their_classes(
    run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Images of the test split as files: some of a domain with its name, some of a new one."""
    run_dir = run_of("clients' metric")
    task, lines = task_of(run_dir), ["path,label,group,split"]
    for number, (label, group) in enumerate(zip(task.test.labels, task.test.groups, strict=True)):
        image = Image.fromarray(task.test.images[number : number + 1][0])
        domain = task.group_names[group] if number % 2 else "elsewhere"
        for split in ("train", "val", "test"):
            image.save(tmp_path / f"{split}{number}.png")
            lines.append(f"{split}{number}.png,{task.class_names[label]},{domain},{split}")
    table, output = tmp_path / "images.csv", tmp_path / "figures.json"
    table.write_text("\n".join(lines) + "\n")
    changes = ["data=imagefolder", f"data.csv={table}", "data.size=32"]
    call = ["evaluate", str(run_dir), *changes, "--split", "test", "--output", str(output)]
    result = CliRunner().invoke(main, call)
    assert result.exit_code == 0, result.stderr
    assert "elsewhere (new)" in result.stdout
    found = json.loads(output.read_text())
    assert found["known"] == {name: name != "elsewhere" for name in found["domains"]}
    model, new, right = fedprompt.load(run_dir), np.arange(0, 80, 2), 0
    assert found["domains"]["elsewhere"]["images"] == len(new)
    for number in new:
        expected = task.class_names[task.test.labels[number]]
        right += model.predict(task.test.images[number : number + 1]).classes == [expected]
    assert found["domains"]["elsewhere"]["alone"] == pytest.approx(right / len(new))
    result = CliRunner().invoke(main, ["evaluate", str(run_dir), *changes, "--output", str(output)])
    assert result.exit_code == 0, result.stderr
    assert json.loads(output.read_text())["overall"]["images"] == 3 * 80


def test_a_result_has_its_comparisons_tables_and_a_short_repr(
    run_of: Callable[[str], Path],
) -> None:
    run_dir = run_of("clients' metric")
    result = fedprompt.resume(run_dir)
    assert list(result.comparisons) == ["fedavg_pt", "head_only"]
    other = result.comparisons["fedavg_pt"]
    assert other.state.sha256() == other.summary["state_sha256"] != result.summary["state_sha256"]
    rounds, clients = result.rounds(), result.clients()
    assert list(rounds["method"]) == ["pfpt"] * 2 + ["fedavg_pt"] * 2 + ["head_only"] * 2
    assert rounds["accuracy"].iloc[1] == result.reports[-1]["accuracy"]
    assert rounds["seconds.train"].iloc[2] == other.reports[0]["seconds"]["train"]
    assert len(clients) == 3 * 2 * 3
    assert clients["num_examples"].sum() == 3 * sum(
        each["num_examples"] for report in result.reports for each in report["clients"]
    )
    text = repr(result)
    assert text.startswith("RunResult(pfpt: accuracy 0.")
    assert "compared with fedavg_pt, head_only" in text
    assert len(text) < 200 + len(str(run_dir))
    images = task_of(run_dir).test.images[:2]
    np.testing.assert_array_equal(
        result.load(method="fedavg_pt").predict(images).probabilities,
        fedprompt.load(run_dir, method="fedavg_pt").predict(images).probabilities,
    )


def test_a_stopped_run_says_so_has_a_model_and_goes_on(tiny: Overrides, tmp_path: Path) -> None:
    changes = tiny(*SMALL, "clients.count=6", "clients.per_round=3", "rounds=2", "head=linear")
    half, whole = tmp_path / "half", tmp_path / "whole"

    def stop(event: Event) -> None:
        if isinstance(event, RoundFinished):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedprompt.run("domains", [*changes, f"run_dir={half}"], on_event=stop)
    status = RunDirectory.open(half).read_status()
    assert (status["state"], status["message"]) == ("stopped", "stopped by KeyboardInterrupt")
    images = task_of(half).test.images[:4]
    before = fedprompt.load(half).predict(images)
    resumed = fedprompt.resume(half)
    assert not np.array_equal(before.probabilities, resumed.load().predict(images).probabilities)
    assert resumed.summary["state"] == RunDirectory.open(half).read_status()["state"] == "finished"
    expected = fedprompt.run("domains", [*changes, f"run_dir={whole}"])
    assert resumed.summary["state_sha256"] == expected.summary["state_sha256"]


def test_accuracy_by_domain_is_in_rounds_summary_and_terminal(
    run_of: Callable[[str], Path],
) -> None:
    run_dir = run_of("clients' metric")
    result, task = fedprompt.resume(run_dir), task_of(run_dir)
    shares = np.array(result.reports[-1]["domain_accuracy"])
    counts = np.bincount(task.test.groups)
    assert (shares * counts).sum() / counts.sum() == pytest.approx(result.summary["accuracy"])
    measured = evaluate_on(result.load(), task)
    by_name = {name: each.together for name, each in measured.domains.items()}
    assert result.summary["domain_accuracy"] == pytest.approx(by_name)
    printed = CliRunner().invoke(main, ["report", str(run_dir)]).stdout
    line = next(line for line in printed.splitlines() if "by domain" in line)
    assert line.split()[-4:] == list(task.group_names)
    row = printed.splitlines()[printed.splitlines().index(line) + 2].split()
    assert row == ["pfpt", *(f"{100 * share:.1f}" for share in shares)]
