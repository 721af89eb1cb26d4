"""The plug-ins of `examples/`: each does what it says, and all three run together."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from fedprompt.config import REGISTRIES, compose
from fedprompt.core.errors import CheckpointError, ConfigError, InputError
from fedprompt.core.plugins import load_plugins
from fedprompt.core.types import Parts
from fedprompt.experiment import execute, plan_resume, plan_run
from fedprompt.objectives import LocalResult, LossContext
from fedprompt.runs.federation import prepare

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.usefixtures("forgotten_plugins")


def example(name: str) -> ModuleType:
    [plugin] = load_plugins([f"{name}.py"], EXAMPLES)
    return sys.modules[plugin.module]


@pytest.fixture
def small(random_backbone: str, medmnist: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides that make the example's experiment tiny."""

    def overrides(run_dir: str, *more: str) -> list[str]:
        return [
            *("rounds=2", "eval_every=2", "clients.count=4", "clients.per_round=2"),
            *("clients.epochs=1", "prompts.count=2", f"model.backbone={random_backbone}"),
            *(f"data.root={medmnist}", f"run_dir={tmp_path / run_dir}", *more),
        ]

    return overrides


def test_all_three_run_under_ray_as_in_one_process_and_are_kept(
    small: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The actors never see the files: they are gone before Ray starts."""
    lab = shutil.copytree(EXAMPLES, tmp_path / "lab")
    plans = [
        plan_run(compose(lab / "experiment.yaml", small(name, f"runtime={name}", *more)), False)
        for name, more in (("serial", []), ("ray", ["runtime.actors=2", "runtime.cpus=2"]))
    ]
    shutil.rmtree(lab)
    serial, ray = map(execute, plans)
    assert ray.state.sha256() == serial.state.sha256()
    assert {"prompts"} < set(ray.state.shared.objective)
    assert all(delta.count_nonzero() for delta in ray.state.shared.objective.values())

    kept = {path.name for path in (ray.run_dir / "plugins").glob("*.py")}
    assert kept == {"medmnist.py", "fedcm.py", "trimmed_mean.py"}
    assert (ray.run_dir / "plugins/conf/objective/fedcm.yaml").is_file()
    for record in json.loads((ray.run_dir / "manifest.json").read_text())["plugins"]:
        copy = ray.run_dir / record["copy"]
        assert copy.read_bytes() == (EXAMPLES / copy.name).read_bytes()
        shown = subprocess.run(["sha256sum", copy], capture_output=True, text=True, check=True)
        assert shown.stdout.split()[0] == record["sha256"]

    moved = ray.run_dir.rename(tmp_path / "moved")
    again = plan_resume(moved).config
    assert again.plugins[1] == str(moved / "plugins/fedcm.py")
    assert dataclasses.replace(again, plugins=()) == dataclasses.replace(
        plans[1].config, plugins=()
    )
    (moved / "plugins/fedcm.py").write_text("# edited\n")
    with pytest.raises(CheckpointError, match=r"plug-in 'fedcm': expected sha256 .*put the file b"):
        plan_resume(moved)
    (moved / "plugins/fedcm.py").unlink()
    with pytest.raises(CheckpointError, match=r"expected the run's copy .*, found none"):
        plan_resume(moved)


def test_the_yaml_files_say_the_defaults() -> None:
    load_plugins(["medmnist.py", "fedcm.py", "fedproto.py", "trimmed_mean.py"], EXAMPLES)
    files = list(EXAMPLES.glob("conf/*/*.yaml"))
    assert len(files) == 4
    for file in files:
        values = yaml.safe_load(file.read_text())
        options = REGISTRIES[file.parent.name].entry(values.pop("name")).options
        assert dataclasses.asdict(options()) == values


def test_the_trimmed_mean_leaves_the_extremes_out() -> None:
    """Of 5 clients, a share of 0.25 leaves out one at each end in each coordinate."""
    module = example("trimmed_mean")
    merged = module.TrimmedMean(module.TrimmedMeanOptions(trim=0.25)).aggregate(
        [
            torch.tensor([row])
            for row in ([1.0, -9.0], [2.0, 1.0], [3.0, 3.0], [4.0, 5.0], [1e9, 7.0])
        ]
    )
    assert merged.prompts.tolist() == [[3.0, 3.0]]


def test_an_authors_aggregator_is_put_through_the_contract() -> None:
    """The documented command: every test of the contract runs on the plug-in."""
    command = ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "trimmed_mean"]
    plugin = ["--plugin", str(EXAMPLES / "trimmed_mean.py")]
    contract = str(ROOT / "tests/aggregation/test_contract.py")
    result = subprocess.run(
        [sys.executable, *command, contract, *plugin], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(".") >= 15  # one for each test of the contract


def test_fedcm_follows_its_paper() -> None:
    """Steps of Algorithm 2 on f(x) = x^2 / 2, whose gradient is x, against the loop's own terms."""
    module = example("fedcm")
    alpha, rate, delta, steps = 0.25, 0.1, torch.tensor([2.0]), 3
    objective = module.FedCm(module.FedCmOptions(alpha=alpha))
    expected = torch.tensor([1.0])
    for _ in range(steps):
        expected = expected - rate * (alpha * expected + (1 - alpha) * delta)
    moved = torch.tensor([1.0])
    [(path, shift)] = objective.correction({"head.w": delta}, {}).items()
    for _ in range(steps):
        moved = moved - alpha * rate * (moved + shift)
    assert path == "head.w"
    torch.testing.assert_close(moved, expected)

    work = LocalResult(
        start=Parts(head={"w": torch.tensor([1.0])}),
        end=Parts(head={"w": moved}),
        received=Parts(objective={"head.w": delta}),
        own={},
        steps=steps,
        rates={"head.w": alpha * rate},
        features=torch.empty(0),
        labels=torch.empty(0),
        num_classes=1,
    )
    done = objective.finish(work)
    assert done.kept == {}
    torch.testing.assert_close(done.sent["head.w"], (1.0 - expected) / (rate * steps))

    # The server: clients count alike, whatever they have.
    own = [Parts(objective={"head.w": torch.tensor([value])}) for value in (1.0, 4.0)]
    updates = [
        SimpleNamespace(shared=parts, num_examples=n) for parts, n in zip(own, (1, 9), strict=True)
    ]
    mean = Parts(head={"w": moved}, objective={"head.w": torch.tensor([3.7])})
    shared, memory = objective.combine(own[0], mean, updates, 2, {})
    assert shared.tensors() == {"head.w": moved, "objective.head.w": torch.tensor([2.5])}
    assert memory == {}


def test_fedproto_follows_its_paper() -> None:
    """Two classes of features of width 2; the second has no prototype yet."""
    module = example("fedproto")
    proto = module.FedProto(module.FedProtoOptions(weight=3.0))
    received = proto.begin(Parts(head={"0.weight": torch.ones(2, 2)}))
    received = {**received, "prototypes": torch.tensor([[1.0, 0.0], [9.0, 9.0]])}
    received["known"] = torch.tensor([1.0, 0.0])
    logits, labels = torch.zeros(2, 2), torch.tensor([0, 1])
    features = torch.tensor([[3.0, 4.0], [5.0, 5.0]])
    context = LossContext(None, labels, {}, received, {})
    # ((3 - 1)^2 + 4^2) / 2 = 10 for the first image, nothing for the second.
    expected = torch.tensor(2.0).log() + 3 * (10 + 0) / 2
    torch.testing.assert_close(proto.loss(logits, labels, features, context), expected)

    work = LocalResult(
        *(Parts(), Parts(), Parts(), {}, 0, {}, torch.empty(0), torch.tensor([0, 0])),
        num_classes=2,
        encode=lambda: features,
    )
    sent = proto.finish(work).sent
    assert sent["prototypes"].tolist() == [[8.0, 9.0], [0.0, 0.0]]
    update = SimpleNamespace(shared=Parts(objective=sent))
    shared, _ = proto.combine(Parts(objective=received), Parts(), [update, update], 2, {})
    assert shared.objective["prototypes"].tolist() == [[4.0, 4.5], [9.0, 9.0]]
    assert shared.objective["known"].tolist() == [1.0, 0.0]


def test_fedproto_runs_and_its_prototypes_are_the_mean_features(
    tiny: Callable[..., list[str]],
) -> None:
    options = [f"plugins=[{EXAMPLES / 'fedproto.py'}]", "objective=fedproto", "head=linear"]
    more = ["method=fedavg_pt", "clients.per_round=6", "partition=iid", "clients.lr=0", "rounds=1"]
    config = compose("digits", tiny(*options, *more))
    result = execute(plan_run(config, False))
    federation = prepare(config)
    table, backbone = federation.data.table, federation.backbone
    rows = np.sort(np.concatenate(federation.data.parts))
    with torch.no_grad():
        prompts = result.state.prompts.expand(len(rows), -1, -1)
        features = backbone.encode(table.tokens_at(rows), prompts)
    labels = torch.from_numpy(table.labels[rows])
    expected = torch.stack([features[labels == c].mean(dim=0) for c in range(10)])
    actual = result.state.shared.objective["prototypes"]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="objective=fedproto: expected head=linear and"):
        execute(plan_run(compose("digits", tiny(*options[:2], *more)), True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_labels": np.zeros((40, 14), np.uint8)}, r"split val: expected .*\(40, 14\); choose"),
        ({"test_images": np.zeros((60, 28, 28, 28), np.uint8)}, "split test: expected uint8"),
        ({"train_images": None}, "expected a file of MedMNIST with an array 'train_images'"),
    ],
)
def test_other_files_of_medmnist_are_refused(
    change: dict[str, np.ndarray | None], message: str, medmnist: Path, tmp_path: Path
) -> None:
    arrays = {**np.load(medmnist / "pneumoniamnist.npz"), **change}
    np.savez(
        tmp_path / "pneumoniamnist.npz",
        **{name: array for name, array in arrays.items() if array is not None},
    )
    module = example("medmnist")
    with pytest.raises(InputError, match=message):
        module.medmnist(module.MedMnistOptions(root=str(tmp_path)))
