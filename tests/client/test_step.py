"""A training step computes the blocks above the prompts and nothing else."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from fedprompt.cli import bench
from fedprompt.client.packed import PackedBatches, PackedClients
from fedprompt.config import compose
from fedprompt.models.backbone import load_backbone
from fedprompt.runs.driver import settings_of
from fedprompt.runs.federation import initial_state, prepare
from fedprompt.server.round import make_jobs
from simulated_gpu import simulated_gpu
from small_data import FEW_DIGITS

Overrides = Callable[..., list[str]]

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "bincount", "is_nonzero"}
"""Operations whose result decides a shape or a Python value: on a GPU the host waits for them."""


class Seen(TorchDispatchMode):
    """Counts the operations that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.products = 0
        """Operations of all matrix products."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names[name] += 1
        result = func(*args, **(kwargs or {}))
        if name in ("mm", "addmm"):
            left, right = args[-2], args[-1]
            self.products += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return result


def first_step(tiny: Overrides, *overrides: str) -> tuple[Any, Any, Any]:
    """The module of a pack of one round's clients, its first batch, and the worker."""
    keyed = tiny("clients.batch_size=8", "prompts.selection=keyed", *overrides)
    config = compose("digits", keyed)
    federation = prepare(config)
    settings = settings_of(config, federation)
    worker = federation.setup.build()
    jobs = make_jobs(initial_state(config, federation), settings)
    module = PackedClients([worker._module(settings.recipe, job) for job in jobs]).train()
    batches = PackedBatches([worker._batches(settings.recipe, job) for job in jobs])
    return module, next(iter(batches)), worker


def test_a_step_waits_for_nothing_and_attends_in_one_operation(tiny: Overrides) -> None:
    module, batch, worker = first_step(tiny)
    with Seen() as seen:
        module.training_step(batch, 0).backward()
    assert not WAITS & set(seen.names)
    blocks = worker.backbone.depth
    attention = [name for name in seen.names if name.startswith("_scaled_dot_product_")]
    assert {seen.names[name] for name in attention} == {blocks}
    assert len(attention) == 2, "forward and backward"
    assert "_softmax" not in seen.names, "attention is not spelled out"


def test_a_step_computes_the_blocks_once_forward_and_once_backward(tiny: Overrides) -> None:
    """The products of the linear layers, counted, are those of `step_flops` and of the heads."""
    module, batch, worker = first_step(tiny, "head=linear")
    with Seen() as seen:
        module.training_step(batch, 0).backward()
    images = sum(inputs.shape[0] for _, (inputs, _, _, _) in batch)
    tokens = sum(inputs.shape[0] * (inputs.shape[1] + 2) for _, (inputs, _, _, _) in batch)
    width = worker.backbone.embed_dim
    blocks = 2 * 2 * 12 * width**2 * tokens * (worker.backbone.depth - 1)
    # Of the last one: keys and values of all tokens, the rest of CLS.
    blocks += 2 * 2 * width**2 * (2 * tokens + 10 * images)
    # Forward, weight gradient and input gradient of a linear head.
    heads = sum(3 * 2 * width * 10 * len(labels) for _, (_, _, labels, _) in batch)
    assert seen.products == blocks + heads
    assert not {"convolution", "convolution_backward", "_conv"} & set(seen.names)


def test_nothing_below_the_prompts_is_in_the_graph(tiny: Overrides) -> None:
    module, batch, worker = first_step(tiny)
    module.training_step(batch, 0).backward()
    assert not any(inputs.requires_grad for _, (inputs, _, _, _) in batch)
    assert all(p.grad is None and not p.requires_grad for p in worker.backbone.parameters())
    assert all(client.prompts.grad.any() for client in module.clients)


@pytest.mark.parametrize(("images", "length"), [(1, 3), (4, 20)])
def test_step_flops_by_hand(random_backbone: str, images: int, length: int) -> None:
    """A block of width d: qkv 3 d^2, projection d^2, perceptron 8 d^2, forward and backward."""
    backbone = load_backbone(random_backbone)
    width, blocks, tokens = 128, backbone.depth, images * length
    linear = 2 * (2 * 12 * width**2 * tokens)
    attention = 3 * (2 * 2 * length * width * tokens)
    last = 2 * 2 * width**2 * (2 * tokens + 10 * images) + 3 * (2 * 2 * length * width * images)
    whole = (blocks - 1) * (linear + attention) + last
    assert bench.step_flops(backbone, images, length) == whole


def test_bench_measures_a_share_of_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller products, networks and clients than `fedprompt bench` has."""
    few = [FEW_DIGITS, "clients.epochs=1", "clients.per_round=2"]
    monkeypatch.setattr(bench, "_SIZES", ((512, 512, 512),))
    monkeypatch.setattr(bench, "LARGE", "test_vit")
    monkeypatch.setattr(bench, "compose", lambda name, changes: compose(name, [*changes, *few]))
    peak, rows = bench.run_bench(device="cpu")
    assert peak > 1e8
    shares = [row.share for row in rows if row.share is not None]
    assert len(shares) == 2
    assert all(0 < share < 1.2 for share in shares)
    text = bench.render(peak, rows, 1)
    assert text.row_count == len(rows)


def test_a_step_s_seconds_are_over_when_the_gpu_is_done(tiny: Overrides) -> None:
    config = compose("digits", tiny())
    federation = prepare(config)
    settings = settings_of(config, federation)
    with simulated_gpu() as gpu:
        worker = dataclasses.replace(federation.setup, device="cuda").build()
        with bench.timed_steps() as seconds:
            worker.train(settings.recipe, make_jobs(initial_state(config, federation), settings))
    waits = [stall for stall in gpu.stalls if stall.place == "cli/bench.py:_wait"]
    assert len(waits) == len(seconds) > 0
