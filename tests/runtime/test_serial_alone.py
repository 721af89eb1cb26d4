"""The serial runtime needs neither Ray nor OmegaConf, which machines with a GPU may lack."""

from __future__ import annotations

import subprocess
import sys

ALONE = """
import sys
for name in ("ray", "omegaconf", "flwr"):
    sys.modules[name] = None  # importing it raises ImportError

import numpy as np
import torch
from fedprompt.aggregation import create
from fedprompt.client.recipe import LocalRecipe, TrainingOptions
from fedprompt.client.worker import ClientData, WorkerSetup
from fedprompt.core.types import Parts, ServerState
from fedprompt.data.prefix.tables import compute_table
from fedprompt.data.task import Split
from fedprompt.models.backbone import load_backbone
from fedprompt.models.head import HeadOptions
from fedprompt.models.options import ModelOptions
from fedprompt.models.selection import PromptOptions
from fedprompt.runtime.base import RuntimeOptions
from fedprompt.runtime.serial import SerialRuntime
from fedprompt.server.evaluate import evaluate, global_subjects
from fedprompt.server.round import RoundSettings, make_jobs, run_rounds

images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), np.uint8)
split = Split(images, np.arange(16) % 2, np.zeros(16, np.int64))
backbone = load_backbone("nano")
table = compute_table(backbone, split, torch.device("cpu"))
parts = (np.arange(8), np.arange(8, 16))
setup = WorkerSetup(
    ModelOptions("nano"), ClientData(table, parts, np.ones((1, 2), bool)), (table,), "cpu", 1
)
recipe = LocalRecipe(
    TrainingOptions(count=2, per_round=2, epochs=2),
    PromptOptions(count=2),
    HeadOptions("linear"),
    "plain",
    {},
    num_classes=2,
)
prompts, keys = torch.zeros(2, backbone.embed_dim), torch.randn(2, table.style.shape[1])
head = {"0.weight": torch.zeros(2, backbone.feature_dim), "0.bias": torch.zeros(2)}
state = ServerState(0, prompts, keys, Parts(head=head))

runtime = SerialRuntime(RuntimeOptions("serial", device="cpu"))
runtime.open(setup)
jobs = make_jobs(state, RoundSettings(0, 1, 1, recipe))
updates = list(runtime.map(recipe, jobs))
assert all(update.prompts.abs().sum() > 0 for update in updates)
wait = evaluate(runtime, recipe, setup.splits, global_subjects(state.broadcast(), setup.splits))
print(len(updates), wait()[0].accuracy)
"""


def test_a_client_is_trained_and_measured_without_ray_and_omegaconf() -> None:
    """A head of zeros calls everything the first class: half of the images are."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "0.5"]
