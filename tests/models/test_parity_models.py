"""Our backbone and our client against models of PFPT's released code (reference vectors).

Every `model_*.safetensors` in `FEDPROMPT_REFERENCE_DIR` is checked; the settings are in its
metadata.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from fedprompt.client.module import ClientModule
from fedprompt.client.recipe import LocalRecipe, TrainingOptions
from fedprompt.core.types import Broadcast, ClientJob, Parts
from fedprompt.models import Backbone, from_torchvision
from fedprompt.models.head import HeadOptions
from fedprompt.models.selection import PromptOptions
from fedprompt.models.transform import Transform

DEFAULT = Path(__file__).parents[3] / "shared" / "reference"
FOLDER = Path(os.environ.get("FEDPROMPT_REFERENCE_DIR", DEFAULT))
FILES = sorted(FOLDER.glob("model_*.safetensors"))
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}

pytestmark = pytest.mark.skipif(
    not FILES, reason=f"no model_*.safetensors in {FOLDER}; set FEDPROMPT_REFERENCE_DIR"
)


class Case:
    """One file: settings, weights, expectations, and the client that they describe."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.settings: dict[str, str] = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.weights = pick(tensors, "model.")
        self.expect = pick(tensors, "expect.")
        self.backbone: Backbone = from_torchvision(
            self.weights,
            num_heads=int(self.settings["heads"]),
            features="logits",
            transform=Transform(int(self.settings["image"])),
        )
        self.pool = self.settings["kind"] == "l2p"
        self.tokens = self.backbone.embed(self.expect["images"])

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        labels = self.expect["labels"]
        queries = self.backbone.queries(self.tokens, "cls")
        return self.tokens, queries, labels, torch.zeros_like(labels)

    def module(self) -> ClientModule:
        """Our client, started with the weights of the file."""
        settings, lr = self.settings, float(self.settings["lr"])
        start = self.weights["pool.prompt"] if self.pool else self.weights["prompt_embeddings"][0]
        head = pick(self.weights, "classification_head.")
        hidden = head["0.weight"].shape[0]
        projection = self.weights["pool.features_proj.weight"] if self.pool else None
        shared = Parts(query_projection=projection, head=head)
        recipe = LocalRecipe(
            training=TrainingOptions(count=1, per_round=1, lr=lr),
            prompts=PromptOptions(
                count=int(settings["top_k"]),
                pool=len(start),
                selection="l2p" if self.pool else "all",
                similarity_weight=float(settings["similarity_weight"]),
            ),
            head=HeadOptions("released", hidden=hidden, dropout=0.0),
            objective="plain",
            objective_options={},
            num_classes=int(settings["classes"]),
        )
        keys = torch.zeros(len(start), self.backbone.embed_dim)
        job = ClientJob(0, 0, 0, Broadcast(start, keys, shared))
        mask = np.ones((1, recipe.num_classes), dtype=bool)
        return ClientModule(recipe, self.backbone, job, mask)


def pick(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_the_backbone_is_the_file_s(case: Case) -> None:
    assert case.backbone.feature_dim == int(case.settings["backbone_logits"])
    assert case.backbone.embed_dim == int(case.settings["dim"])
    assert case.backbone.depth == int(case.settings["layers"])


def test_query_selection_similarity_and_logits(case: Case) -> None:
    model = case.module().model
    tokens, queries, _, groups = case.batch()
    with torch.no_grad():
        rows, similarity = model.choose(queries)
        logits = model(tokens, rows, groups)
    close(logits, case.expect["logits"])
    if not case.pool:
        assert similarity is None
        return
    close(case.backbone.raw_queries(case.tokens, "cls"), case.expect["query"])
    assert rows.tolist() == sorted(case.expect["selected"].tolist())
    assert similarity is not None
    close(similarity.reshape(1), case.expect["reduce_sim"].reshape(1))


def test_training_steps(case: Case) -> None:
    module = case.module()
    optimiser = module.configure_optimizers()
    betas = tuple(map(float, case.settings["betas"].split(",")))
    for group in optimiser.param_groups:
        assert group["betas"] == betas
        assert group["eps"] == float(case.settings["eps"])
        assert group["lr"] == float(case.settings["lr"])
    before = case.backbone.checksum()
    losses = []
    for step in range(int(case.settings["steps"])):
        loss = module.training_step(case.batch(), step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    close(torch.tensor(losses, dtype=torch.float64), case.expect["train_losses"])
    after = case.expect["prompts_after"]
    close(module.prompts.detach(), after.reshape(module.prompts.shape))
    close(module.head[2].weight.detach(), case.expect["head_weight_after"])
    if "usage_counts" in case.expect:
        assert module.use_counts.tolist() == case.expect["usage_counts"].long().tolist()
    assert case.backbone.checksum() == before
