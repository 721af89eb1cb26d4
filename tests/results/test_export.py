"""`fedprompt export`: the folder is the run's model, bit by bit, and needs nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small_runs import VARIANTS, task_of

import fedprompt
from fedprompt.cli.main import main
from fedprompt.core.errors import CheckpointError, ConfigError
from fedprompt.results import exporting, graph
from fedprompt.results.graph import ImageGraph, largest_difference, run_onnx
from fedprompt.runs.directory import RunDirectory

RunOf = Callable[[str], Path]
PERSONAL = ("personal", "generator")


@pytest.mark.parametrize("name", VARIANTS)
def test_an_exported_model_has_the_bits_of_its_run_and_needs_nothing_else(
    name: str, run_of: RunOf, tmp_path: Path
) -> None:
    client = 1 if name in PERSONAL else None
    copy, out = tmp_path / "copy", tmp_path / "new" / "model"
    shutil.copytree(run_of(name), copy)
    expected, images = fedprompt.load(copy, client=client), task_of(copy).test.images[:40]
    made = fedprompt.export(copy, out, client=client, onnx=False)
    shutil.rmtree(copy)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]  # nothing beside it
    assert (made.folder, made.round, made.difference) == (out, 2, None)
    model = fedprompt.load(out)
    for batch in (1, 16):
        found, kept = model.predict(images, batch=batch), expected.predict(images, batch=batch)
        np.testing.assert_array_equal(found.probabilities, kept.probabilities)
        np.testing.assert_array_equal(found.prompts, kept.prompts)
    domain = next(iter(model.domains))
    np.testing.assert_array_equal(
        model.predict(images, domain=domain).probabilities,
        expected.predict(images, domain=domain).probabilities,
    )
    given = torch.from_numpy(images)
    with torch.no_grad():  # the graph's own arithmetic, before it is a graph
        torch.testing.assert_close(ImageGraph(model)(given), expected(given), rtol=0, atol=1e-5)


def test_a_backbone_of_timm_comes_along_with_its_transform(
    tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    model = (
        "model={backbone: vit_tiny_patch16_224, pretrained: false, image_size: 32, resize: 40, "
        "mean: [0.1, 0.2, 0.3], interpolation: bicubic}"
    )
    fedprompt.run("digits", tiny("rounds=1", "clients.count=2", "clients.per_round=1", model))
    images = task_of(tmp_path / "run").test.images[:4]
    expected = fedprompt.load(tmp_path / "run")
    fedprompt.export(tmp_path / "run", tmp_path / "out", onnx=False)
    kept = fedprompt.load(tmp_path / "out")
    assert kept.backbone.transform == expected.backbone.transform
    np.testing.assert_array_equal(
        kept.predict(images).probabilities, expected.predict(images).probabilities
    )


def test_the_graph_says_what_the_model_says_for_any_number_of_images(
    run_of: RunOf, tmp_path: Path
) -> None:
    """From the command line. Another runtime computes it, so the model is an independent check."""
    run_dir, out = run_of("public images"), tmp_path / "out"
    result = CliRunner().invoke(main, ["export", str(run_dir), str(out)])
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    first, second = result.stdout.splitlines()
    assert "on 10 images of the test split" in first
    assert str(out) in second
    model, images = fedprompt.load(out), task_of(run_dir).test.images[:33]
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    whole, one = run_onnx(out / "model.onnx", [images, images[:1]])
    np.testing.assert_allclose(whole, expected, atol=1e-4)
    np.testing.assert_allclose(one, expected[:1], atol=1e-4)
    assert str(Path(fedprompt.__file__).parent).encode() not in (out / "model.onnx").read_bytes()
    card = (out / "README.md").read_text()
    assert first.split("logit ")[1].split(" on ")[0] in card
    assert "each image chooses its prompts by itself" in card


def test_the_card_says_what_was_run_and_how_good_it_was(run_of: RunOf, tmp_path: Path) -> None:
    run_dir = run_of("clients' metric")
    fedprompt.export(run_dir, tmp_path / "out", onnx=False)
    card, summary = (tmp_path / "out" / "README.md").read_text(), _summary(run_dir)
    rows = dict(
        [cell.strip() for cell in line.strip("|").split("|")][:2]
        for line in card.splitlines()
        if line.startswith("|")
    )
    manifest = RunDirectory.open(run_dir).read_manifest()
    assert rows["seed"] == "0"
    assert rows["partition"] == "dirichlet (alpha=0.5, min_samples=1); 6 clients"
    assert rows["method"] == "pfpt (aggregator pfpt, objective plain)"
    assert rows["rounds"] == "2 of 2, 3 clients each"
    assert rows["backbone"].endswith(manifest["backbone_sha256"][:12])
    assert manifest["packages"]["fedprompt"] in rows["made with"]
    shown = {
        "16 images of one domain choose prompts together": summary["accuracy"],
        "each image chooses by itself": summary["alone_accuracy"],
        "mean over classes": summary["balanced_accuracy"],
        **{f"domain {name}": share for name, share in summary["domain_accuracy"].items()},
    }
    assert {name: rows[name] for name in shown} == {
        name: f"{100 * share:.1f}" for name, share in shown.items()
    }
    for name in fedprompt.load(run_dir).class_names:
        assert f" {name}\n" in card
    fedprompt.export(run_dir, tmp_path / "own", client=3, onnx=False)
    own = (tmp_path / "own" / "README.md").read_text()
    measured = RunDirectory.open(run_dir).read_rounds()[-1]["personalised"]["test"]["by_client"]
    assert f"| its own share | {100 * measured['3']:.1f} | 2 |" in own
    assert "images of one domain" not in own  # the global model's figures are not this model's


def test_a_run_that_was_stopped_is_exported_as_of_its_last_round(
    run_of: RunOf, tmp_path: Path
) -> None:
    """A record without its checkpoint, as a kill between the two leaves it, does not count."""
    copy = tmp_path / "copy"
    shutil.copytree(run_of("clients' metric"), copy)
    for path in (*(copy / "state").glob("round_00002*"), copy / "summary.json"):
        path.unlink()
    RunDirectory(copy).write_status({"state": "stopped", "round": 1})
    made = fedprompt.export(copy, tmp_path / "out", onnx=False)
    assert made.round == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1 of 2, 3 clients each (the run is stopped)" in card
    first = RunDirectory(copy).read_rounds()[0]["accuracy"]
    assert f"| 16 images of one domain choose prompts together | {100 * first:.1f} | 1 |" in card


def test_a_compared_method_is_exported_by_name_and_used_from_the_command_line(
    run_of: RunOf, tmp_path: Path
) -> None:
    run_dir, out = run_of("clients' metric"), tmp_path / "out"
    call = ["export", str(run_dir), str(out), "--method", "head_only", "--no-onnx"]
    result = CliRunner().invoke(main, call)
    assert result.exit_code == 0, result.stderr
    output = tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["evaluate", str(out), "--output", str(output)])
    assert result.exit_code == 0, result.stderr
    expected = _summary(run_dir / "compare" / "head_only")["accuracy"]
    assert json.loads(output.read_text())["overall"]["together"] == pytest.approx(expected)
    with pytest.raises(ConfigError, match="client: expected none, as the exported folder"):
        fedprompt.load(out, client=2)
    with pytest.raises(ConfigError, match="expected a run directory, got an exported folder"):
        fedprompt.export(out, tmp_path / "again", onnx=False)
    damaged = bytearray((out / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (out / "model.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected sha256"):
        fedprompt.load(out)


def test_a_plug_in_comes_along(
    tiny: Callable[..., list[str]], tmp_path: Path, forgotten_plugins: None
) -> None:
    examples = Path(__file__).parents[2] / "examples"
    plugin = f"plugins=['{examples / 'trimmed_mean.py'}']"
    changes = tiny("rounds=1", plugin, "aggregator=trimmed_mean", "method=fedavg_pt")
    fedprompt.run("digits", changes)
    fedprompt.export(tmp_path / "run", tmp_path / "out", onnx=False)
    kept = tmp_path / "out" / "plugins" / "trimmed_mean.py"
    assert kept.read_bytes() == (examples / "trimmed_mean.py").read_bytes()
    kept.write_text("# another rule\n")
    with pytest.raises(CheckpointError, match="plug-in 'trimmed_mean': expected sha256"):
        fedprompt.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--client", "9"], "client: expected a number from 0 to 5, got 9"),
        (["--method", "gmm_pt"], "method: expected one of fedavg_pt, head_only"),
    ],
)
def test_a_model_that_is_not_there_is_one_line_and_leaves_nothing(
    more: list[str], message: str, run_of: RunOf, tmp_path: Path
) -> None:
    call = ["export", str(run_of("clients' metric")), str(tmp_path / "out"), "--no-onnx", *more]
    _refused(call, message)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_is_left_alone(run_of: RunOf, tmp_path: Path) -> None:
    run_dir, out = str(run_of("clients' metric")), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    _refused(["export", run_dir, str(out), "--no-onnx"], "expected a new or an empty folder, got")
    _refused(["export", run_dir, str(out / "mine.txt"), "--no-onnx"], "empty folder, got a file")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    fedprompt.export(run_dir, out, onnx=False)
    assert (out / "README.md").is_file()


def test_what_fails_half_way_leaves_no_folder(
    run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "model_card", broken)
    with pytest.raises(KeyboardInterrupt):
        fedprompt.export(run_of("clients' metric"), tmp_path / "out", onnx=False)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_a_foreign_adaptation_and_another_answer_are_refused(
    run_of: RunOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = str(run_of("clients' metric"))
    call = ["export", run_dir, str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(graph, "PACKAGES", ("onnx", "no_such_package"))
        _refused(call, "got no no_such_package; pip install 'fedprompt[export]'")

    class Branching(ImageGraph):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if images.sum().item() > 5:
                return super().forward(images)
            return super().forward(images) + 1

    with monkeypatch.context() as patch:
        patch.setattr(graph, "ImageGraph", Branching)
        _refused(call, "expected a model that torch.onnx can export, got")

    class Other(torch.nn.Module):
        def __init__(self, model: fedprompt.results.PromptedModel) -> None:
            super().__init__()
            self.classes = len(model.class_names)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean(dim=(1, 2, 3))[:, None].repeat(1, self.classes)

    with monkeypatch.context() as patch:
        patch.setattr(graph, "ImageGraph", Other)
        _refused(call, "expected logits within 0.001 of the model's on 10 images, got a difference")
    assert list(tmp_path.iterdir()) == []


def test_infinities_and_nan_are_compared() -> None:
    inf = np.inf
    assert largest_difference(np.array([1.0, -inf]), np.array([1.25, -inf])) == 0.25
    assert largest_difference(np.array([inf]), np.array([-inf])) == inf
    assert largest_difference(np.array([np.nan]), np.array([0.0])) == inf


def _summary(run_dir: Path) -> dict[str, object]:
    return RunDirectory.open(run_dir).read_summary()


def _refused(call: list[str], message: str) -> None:
    result = CliRunner().invoke(main, call)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
