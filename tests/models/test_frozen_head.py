"""A head that is fitted once on public images and that no round changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import fedprompt
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.data.prefix.cache import FeatureTable, compute_table
from fedprompt.data.task import Split
from fedprompt.models.backbone import Backbone, load_backbone
from fedprompt.models.frozen_head import KEPT, STRENGTH, FrozenHead, fit_frozen_head, kept_head

CPU = torch.device("cpu")
SMALL = [f"data.{split}=80" for split in ("train", "validation", "test", "public")]


@pytest.fixture(scope="module")
def backbone(random_backbone: str) -> Backbone:
    return load_backbone(random_backbone)


def table_of(backbone: Backbone, groups: list[int], labels: list[int]) -> FeatureTable:
    """Images whose brightness tells the label."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 30, (len(labels), 32, 32, 3))
    images = (noise + 60 * np.array(labels)[:, None, None, None] % 226).astype(np.uint8)
    split = Split(images, np.array(labels), np.array(groups))
    return compute_table(backbone, split, CPU)


def logits_of(table: FeatureTable, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    features = torch.from_numpy(table.features)
    return (features @ tensors["0.weight"].T + tensors["0.bias"]).double().numpy()


@pytest.mark.parametrize("classes", [2, 3])
def test_each_domain_is_scikit_learns_logistic_regression(backbone: Backbone, classes: int) -> None:
    labels = [c for c in range(classes) for _ in range(12)]
    groups = [0] * len(labels) + [1] * len(labels)
    table = table_of(backbone, groups, labels + [label + classes for label in labels])
    head = fit_frozen_head(backbone, table, 2 * classes + 1, CPU)
    assert head.conditions == ("no prompts", "no prompts")
    for group in range(2):
        rows = table.groups == group
        own = slice(group * classes, (group + 1) * classes)
        logits = logits_of(table, head.tensors)[rows]
        ours = np.exp(logits[:, own] - logits[:, own].max(axis=1, keepdims=True))
        model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000))
        model.fit(table.features[rows].astype(float), table.labels[rows])
        theirs = model.predict_proba(table.features[rows].astype(float))
        np.testing.assert_allclose(ours / ours.sum(axis=1, keepdims=True), theirs, atol=1e-4)
    # A class that no public image shows is never predicted.
    assert not (logits_of(table, head.tensors).argmax(axis=1) == 2 * classes).any()


def test_class_means_are_scikit_learns_nearest_centroid(backbone: Backbone) -> None:
    labels = [c for c in range(3) for _ in range(12)]
    table = table_of(backbone, [0] * 36, labels)
    head = fit_frozen_head(backbone, table, 3, CPU, fit="class_means")
    model = make_pipeline(StandardScaler(), NearestCentroid())
    predicted = model.fit(table.features, table.labels).predict(table.features)
    assert (logits_of(table, head.tensors).argmax(axis=1) == predicted).all()


class Deaf:
    """A backbone whose CLS feature is the first token, seen through the mean of the prompts."""

    embed_dim = feature_dim = 128
    cut = 0

    def __init__(self, task_tokens: torch.Tensor) -> None:
        self.extras = {"task_tokens": task_tokens}

    def encode(self, tokens: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        return tokens[:, 1] * prompts.mean()


def test_task_tokens_are_chosen_on_public_images(backbone: Backbone) -> None:
    table = table_of(backbone, [0] * 30, [c for c in range(3) for _ in range(10)])
    blind, clear = torch.zeros(1, 128), torch.ones(1, 128)
    for index, tokens in enumerate(([clear, blind], [blind, clear])):
        deaf = Deaf(torch.stack(tokens))
        head = fit_frozen_head(deaf, table, 3, CPU)  # type: ignore[arg-type]
        assert head.conditions == (f"task {index}",)


def test_one_public_class_is_refused(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="at least 2 classes in each domain, got 1"):
        fit_frozen_head(backbone, table_of(backbone, [0] * 4, [1] * 4), 3, CPU)


def test_a_run_trains_prompts_alone(tiny: Callable[..., list[str]]) -> None:
    plain = "prompts.whiten=false"  # nothing else is sent at the first contact
    overrides = tiny("data=domains", "head=frozen", "partition.alpha=100", plain, *SMALL)
    result = fedprompt.run("digits", overrides)
    assert set(result.state.fixed.tensors()) == {"head.0.weight", "head.0.bias"}
    assert not result.state.shared.tensors()
    start = fedprompt.run("digits", [*overrides, "rounds=1"], overwrite=True)
    for path, value in result.state.fixed.tensors().items():
        assert torch.equal(start.state.fixed.tensors()[path], value)
    assert not torch.equal(start.state.prompts, result.state.prompts)
    # Three clients of two prompts (128 wide) with keys (128), origins and use counts: no head.
    assert result.reports[0]["bytes_up"] == 3 * 2 * (128 * 4 + 128 * 4 + 8 + 8)


def test_a_resumed_run_keeps_the_head(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    overrides = tiny("data=domains", "head=frozen", "partition.alpha=100", *SMALL)
    straight = fedprompt.run("digits", overrides)
    rounds = [each for each in overrides if not each.startswith("run_dir")]

    class Stop(Exception):
        pass

    def stop(event: object) -> None:
        if type(event).__name__ == "RoundFinished":
            raise Stop

    with pytest.raises(Stop):
        fedprompt.run("digits", [*rounds, f"run_dir={tmp_path / 'again'}"], on_event=stop)
    resumed = fedprompt.experiment.resume(tmp_path / "again")
    assert resumed.state.sha256() == straight.state.sha256()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head.mode=frozen"], "expected head.name=linear, got 'released'"),
        (["head.mode=frosen"], "did you mean 'frozen'"),
        (["head=frozen", "method=head_only"], "nothing is left to train; use head.mode=shared"),
    ],
)
def test_what_cannot_be_frozen(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("digits", ["compare=[]", *overrides])


def test_data_without_public_images(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a data set with public images"):
        fedprompt.run("digits", tiny("head=frozen"))
    assert not (tmp_path / "run").exists()


def test_a_fitted_head_is_kept_with_the_cache(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same bits, no second fit; another recipe is another head; a damaged file is said."""
    table = table_of(backbone, [0] * 24, [0] * 12 + [1] * 12)
    fits: list[FrozenHead] = []

    def fit() -> FrozenHead:
        fits.append(fit_frozen_head(backbone, table, 3, CPU))
        return fits[-1]

    first, note = kept_head(tmp_path, {"images": "a"}, fit)
    again, _ = kept_head(tmp_path, {"images": "a"}, fit)
    assert len(fits) == 1
    assert note is None
    assert again.sha256() == first.sha256() == fits[0].sha256()
    kept_head(tmp_path, {"images": "b"}, fit)
    assert len(fits) == 2
    for file in (tmp_path / "heads").iterdir():
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    healed, note = kept_head(tmp_path, {"images": "a"}, fit)
    assert len(fits) == 3
    assert healed.sha256() == first.sha256()
    assert note is not None
    assert "checksum" in note
    for number in range(KEPT + 2):
        kept_head(tmp_path, {"images": number}, lambda: first)
    assert len(list((tmp_path / "heads").iterdir())) == KEPT


def test_a_second_run_does_not_fit_again(
    random_backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> str:
        settings = [*SMALL, f"model.backbone={random_backbone}", f"cache.folder={tmp_path}/cache"]
        settings += ["runtime=serial", "rounds=1", "compare=[]", "clients.count=8"]
        settings += ["clients.per_round=1", "prompts.count=1", f"run_dir={tmp_path / name}"]
        return str(fedprompt.run("domains", settings).summary["state_sha256"])

    first = run("first")
    monkeypatch.setattr("fedprompt.runs.federation.fit_frozen_head", None)
    assert run("second") == first
