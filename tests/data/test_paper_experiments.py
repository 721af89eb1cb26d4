"""The paper's experiments (conf/experiment/paper/table.yaml) compose, and run on small files in the
true layouts, on a small backbone instead of ViT-B/32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from layouts import cifar10_binary, cifar100_binary, four, imagenet_lt, tinyimagenet

import fedprompt
from fedprompt.config import compose, conf_root, list_experiments
from fedprompt.runs.summary import comparison_table

Overrides = Callable[..., list[str]]
NAMES = [name[6:] for name in list_experiments() if name.startswith("paper/")]
IDS = [f"n{number:08d}" for number in range(12)]

WRITERS: dict[str, Callable[[Path], object]] = {
    "cifar10": lambda root: cifar10_binary(root, per_batch=60),
    "cifar100": lambda root: cifar100_binary(root, per_class=8),
    "tinyimagenet": lambda root: tinyimagenet(root, IDS, per_class=10),
    "fourdataset": lambda root: four(root, per_class=10),
    "imagenet": lambda root: imagenet_lt(root, root, times=8),
}
SMALL = {
    "fourdataset": ["data.size=32", "data.validation=0.25", "data.max_train=40"],
    "imagenet": ["data.size=32"],
}
RUNS = (
    *("cifar10_imbalance", "cifar100_lt_50", "tinyimagenet_alpha_0.5"),
    *("fourdataset_imbalance", "imagenet_lt"),
)
"""Every data set and every way of dividing it; the others differ in numbers alone."""
METHODS = sorted(path.stem for path in (conf_root() / "method").glob("*.yaml"))


def test_all_settings_of_the_paper_are_there() -> None:
    sets, partitions = set(WRITERS) - {"imagenet"}, ("alpha_0.5", "alpha_0.1", "imbalance")
    expected = {f"{data}_{partition}" for data in sets for partition in partitions}
    expected |= {f"cifar100_lt_{factor}" for factor in (10, 50, 100)} | {"imagenet_lt"}
    assert set(NAMES) == expected
    assert {name.split("_")[0] for name in RUNS} == set(WRITERS)
    # The ways of dividing: Dirichlet, imbalance and the long tail.
    assert {name.rstrip("_.0123456789").partition("_")[2] for name in RUNS} == {
        *("alpha", "imbalance", "lt")
    }


@pytest.mark.parametrize("name", NAMES)
def test_they_compose(name: str) -> None:
    config = compose(f"paper/{name}")
    assert config.name == name
    assert (config.rounds, config.clients.epochs, config.clients.batch_size) == (120, 5, 16)
    assert (config.prompts.count, config.prompts.pool) == (10, 20)
    assert config.model.backbone.startswith("vit_base_patch32")
    rate = 5e-4 if "alpha_0.5" in name or "_lt_" in name else 1e-4
    assert (config.prompts.lr, config.head.lr, config.head.name) == (rate, rate, "released")
    count = 80 if "four" in name else 20 if "_lt" in name else 100
    assert config.clients.count == count
    few = 1 if "_lt" in name or "imbalance" in name else 33
    assert config.partition.options.min_samples == few


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_compose_with_their_own_rates(method: str) -> None:
    """SCAFFOLD's SGD needs larger ones than Adam; closed forms have none."""
    config = compose("paper/cifar100_alpha_0.1", [f"method={method}"])
    assert config.clients.lr is None
    if method not in ("fedcof", "fedncm"):
        rates = (0.3, 0.1) if method.startswith("scaffold") else (1e-4, 1e-4)
        assert (config.prompts.lr, config.head.lr) == rates


def test_all_methods_run_on_small_files_and_logits(tiny: Overrides, tmp_path: Path) -> None:
    """On the logits of the network's own classifier, as the files have it, and timm's smallest."""
    WRITERS["cifar10"](tmp_path / "files")
    compared = compose("paper/cifar10_alpha_0.5").compare
    assert set(compared) >= {"fedavg_pt", "fedprox_pt", "scaffold_pt", "fedopt_pt", "gmm_pt"}
    small = ["model.backbone=test_vit", "model.pretrained=false", "model.image_size=48"]
    few = ["clients.count=6", "clients.per_round=3", "rounds=1", "eval_clients=never"]
    overrides = [f"data.root={tmp_path / 'files'}", "partition.min_samples=1", "prompts.pool=4"]
    others = [method for method in METHODS if method != "pfpt"]
    listed = [f"compare={others}".replace("'", "")]
    result = fedprompt.run("paper/cifar10_alpha_0.5", tiny(*overrides, *few, *small, *listed))
    assert "features: logits" in (result.run_dir / "config.yaml").read_text(encoding="utf-8")
    table = {row["name"]: row for row in comparison_table([result.run_dir])}
    assert sorted(table) == METHODS
    assert table.pop("local_only")["accuracy"] is None  # no global model
    assert all(0 <= row["accuracy"] <= 1 for row in table.values())


@pytest.mark.parametrize("name", RUNS)
def test_they_run_on_small_files(tiny: Overrides, tmp_path: Path, name: str) -> None:
    data = name.split("_")[0]
    WRITERS[data](tmp_path / "files")
    clients = ["clients.count=8", "clients.per_round=2", "rounds=1", "eval_clients=never"]
    # With so few images a partition cannot be as large or as skewed as the paper's.
    dominated = {"cifar10": 2, "cifar100": 13, "tinyimagenet": 2, "fourdataset": 5}.get(data)
    fitted = {
        "dirichlet": "partition.min_samples=1",
        "imbalance": f"partition.dominated={dominated}",
    }
    partition = compose(f"paper/{name}").partition.name
    files = [f"data.root={tmp_path / 'files'}", *SMALL.get(data, [])]
    small = ["model.pretrained=true", "model.features=pre_logits", "model.image_size=null"]
    overrides = tiny(*files, *clients, *small, fitted[partition], "prompts.pool=4")
    result = fedprompt.run(f"paper/{name}", overrides)
    assert result.summary["rounds"] == 1
    assert 0 <= result.summary["accuracy"] <= 1
