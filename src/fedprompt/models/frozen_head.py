"""A frozen head: fitted once on public images, so that prompts alone are federated.

This is how CLIP-based federated prompt learning stands: the classifier is part of the pre-trained
model. Every domain's rows of the linear head are fitted on that domain's public images, under the
task tokens of the backbone that serve them best; a federation that learns to put each client into
the right condition again can use the head as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from fedprompt.core.errors import ConfigError
from fedprompt.core.files import Json, atomic_write
from fedprompt.data.prefix.cache import CHUNK, FeatureTable
from fedprompt.models.backbone import Backbone

FOLDS = 5
STRENGTH = 0.1
"""scikit-learn's C, the inverse of the regularisation, on standardised features."""

KEPT = 50
"""Fitted heads in the cache's folder; the oldest go first."""

_ABSENT = -1e4
"""Bias of a class that no public image shows."""


@dataclasses.dataclass(frozen=True)
class FrozenHead:
    """What was fitted."""

    tensors: dict[str, Tensor]
    """`0.weight` (classes, q) and `0.bias` (classes,), as a linear head names them."""
    conditions: tuple[str, ...]
    """Per domain: `task N` for the N-th task tokens of the backbone, or `no prompts`."""

    def sha256(self) -> str:
        """SHA-256 over all of it."""
        digest = hashlib.sha256(json.dumps(self.conditions).encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def kept_head(
    folder: Path, recipe: Json, fit: Callable[[], FrozenHead]
) -> tuple[FrozenHead, str | None]:
    """What an earlier run fitted from the same images with the same network, else a new fit.

    Args:
        folder: of the prefix cache; heads are in its folder `heads`.
        recipe: all that decides the fit, besides this file and its libraries.
        fit: makes one.

    Returns:
        The head, and what the user should read about it: a file that was damaged.
    """
    own = {
        "source": inspect.getsource(sys.modules[__name__]),
        "libraries": {"numpy": np.__version__, "scikit-learn": sklearn.__version__},
    }
    key = hashlib.sha256(json.dumps({**recipe, **own}, sort_keys=True).encode()).hexdigest()
    path = folder / "heads" / f"{key}.safetensors"
    note = None
    try:
        return _read(path), None
    except FileNotFoundError:
        pass
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        note = f"the fitted head {path} was damaged ({error}) and was fitted again"
    head = fit()
    # A full disk or a folder that cannot be written costs the next run the time of a fit.
    with contextlib.suppress(OSError):
        _write(path, head)
    return head, note


def _read(path: Path) -> FrozenHead:
    with path.open("rb"):
        pass  # safetensors raises its own error for a file that is not there
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata() or {}
    head = FrozenHead(tensors, tuple(json.loads(about["conditions"])))
    if head.sha256() != about["sha256"]:
        raise ValueError("its checksum differs")
    return head


def _write(path: Path, head: FrozenHead) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"conditions": json.dumps(head.conditions), "sha256": head.sha256()}
    atomic_write(path, save(head.tensors, about))
    kept = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    for file in kept[:-KEPT]:
        file.unlink(missing_ok=True)


def fit_frozen_head(
    backbone: Backbone,
    public: FeatureTable,
    num_classes: int,
    device: torch.device,
    fit: str = "logistic",
) -> FrozenHead:
    """Fit a linear head on public images, domain by domain.

    Where the backbone has task tokens, the ones of a domain are chosen by cross-validation on its
    public images; clients' images, validation and test play no part. The head is the classifier of
    the network as it was pre-trained, wherever prompts enter: so backbone and table have cut 0.

    Args:
        backbone: the frozen network on `device`.
        public: labelled images that no client holds.
        num_classes: rows of the head.
        device: where to compute features.
        fit: `logistic` regression, or `class_means`: the nearest class mean in closed form.

    Raises:
        ConfigError: a domain has public images of one class only.
        InputError: the table is one of another cut.
    """
    public.check_cut(backbone.cut)
    candidates = _candidates(backbone)
    weight = torch.zeros(num_classes, backbone.feature_dim)
    bias = torch.full((num_classes,), _ABSENT)
    conditions = []
    for group in np.unique(public.groups):
        members = np.flatnonzero(public.groups == group)
        labels = public.labels[members]
        classes, counts = np.unique(labels, return_counts=True)
        if len(classes) < 2:
            raise ConfigError(
                f"head.mode=frozen: expected public images of at least 2 classes in each domain, "
                f"got {len(classes)} in domain {group}; use head.mode=shared"
            )
        features = {
            name: _features(backbone, public, members, prompts, device)
            for name, prompts in candidates.items()
        }
        folds = min(FOLDS, int(counts.min()))
        chosen = next(iter(features))
        if len(features) > 1 and folds > 1:
            chosen = max(features, key=lambda name: _score(features[name], labels, folds))
        rule = _class_means if fit == "class_means" else _logistic
        own_weight, own_bias = rule(features[chosen], labels)
        weight[classes] = torch.from_numpy(own_weight).float()
        bias[classes] = torch.from_numpy(own_bias).float()
        conditions.append(chosen)
    return FrozenHead({"0.weight": weight, "0.bias": bias}, tuple(conditions))


def _candidates(backbone: Backbone) -> dict[str, Tensor | None]:
    tokens = backbone.extras.get("task_tokens")
    if tokens is None:
        return {"no prompts": None}
    return {f"task {index}": prompts for index, prompts in enumerate(tokens)}


@torch.no_grad()
def _features(
    backbone: Backbone,
    table: FeatureTable,
    rows: NDArray[np.int64],
    prompts: Tensor | None,
    device: torch.device,
) -> NDArray[np.float64]:
    """CLS features (k, d) of some rows of a table, all under the same prompts (n, d)."""
    own = None if prompts is None else prompts.to(device)
    parts = [
        backbone.encode(table.tokens_at(chunk).to(device), own).cpu()
        for chunk in np.split(rows, range(CHUNK, len(rows), CHUNK))
    ]
    return torch.cat(parts).double().numpy()


def _model() -> LogisticRegression:
    return LogisticRegression(C=STRENGTH, max_iter=1000)


def _score(features: NDArray[np.float64], labels: NDArray[np.int64], folds: int) -> float:
    """Mean accuracy on held-out public images."""
    order = StratifiedKFold(folds, shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), _model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(cross_val_score(model, features, labels, cv=order).mean())


def _logistic(
    features: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight (c, d) and bias (c,) of the c classes, ascending."""
    scaler, model = _fit(features, labels)
    weight = model.coef_ / scaler.scale_
    bias = model.intercept_ - weight @ scaler.mean_
    if len(model.classes_) == 2:  # scikit-learn gives the second class's row only
        return np.vstack([-weight, weight]) / 2, np.hstack([-bias, bias]) / 2
    return weight, bias


def _class_means(
    features: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """As `_logistic`, for the nearest class mean in standardised features.

    -|x - m|^2 / 2 = x m - |m|^2 / 2 + (what is the same for all classes)
    """
    scaler = StandardScaler().fit(features)
    scaled = scaler.transform(features)
    means = np.stack([scaled[labels == label].mean(axis=0) for label in np.unique(labels)])
    weight = means / scaler.scale_
    return weight, -weight @ scaler.mean_ - (means**2).sum(axis=1) / 2


def _fit(
    features: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[StandardScaler, LogisticRegression]:
    scaler = StandardScaler().fit(features)
    return scaler, _model().fit(scaler.transform(features), labels)
