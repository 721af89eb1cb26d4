"""The simulated GPU itself: its rules are those of PyTorch's fake tensors, its values the CPU's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from simulated_gpu import GPU, HiddenStall, OnGpu, SimulatedGpu, Stall, simulated_gpu

RULES = {
    # Refused.
    "vector and vector": "device + torch.ones(3)",
    "in place": "device.mul_(torch.ones(3))",
    "into the CPU's": "torch.ones(3).add_(device)",
    "where": "torch.where(device > 0, device, torch.ones(3))",
    "product": "matrix @ torch.ones(3)",
    "linear": "torch.nn.functional.linear(matrix, torch.ones(2, 3))",
    "stack": "torch.stack([device, torch.ones(3)])",
    "labels": "torch.nn.functional.cross_entropy(matrix, torch.zeros(3, dtype=torch.int64))",
    "mask": "device.masked_fill(torch.zeros(3, dtype=torch.bool), 0)",
    "scalar in a product": "torch.dot(device[:1], torch.ones(1))",
    "gather": "device.gather(0, torch.zeros(3, dtype=torch.int64))",
    # Waited for.
    "item": "device.sum().item()",
    "truth": "bool(device.sum() > 0)",
    "equal": "torch.equal(device, device)",
    "nonzero": "device.nonzero()",
    "a mask as index": "device[device > 0]",
    "masked select": "device.masked_select(device > 0)",
    "unique": "rows.unique()",
    "count": "rows.bincount()",
    # Neither.
    "scalar": "device * torch.tensor(2.0)",
    "same device": "device + device",
    "rows": "matrix[rows]",
    "rows in place": "matrix.index_add_(0, rows, matrix.clone())",
    "new": "device + torch.zeros(3, device='cuda')",
    "new like": "device + torch.zeros_like(device)",
    "new from": "device + device.new_ones(3)",
    "normalised": "torch.nn.functional.normalize(matrix)",
    "attention": "torch.nn.functional.scaled_dot_product_attention(*[matrix[None]] * 3)",
}
"""Expressions with `device` (3,), `matrix` (3, 3) and `rows` (3,) int64 on the GPU."""

FAKE = """
import sys
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode)
for line in sys.stdin.read().splitlines():
    with FakeTensorMode():
        device, matrix = torch.ones(3, device="cuda"), torch.ones(3, 3, device="cuda")
        rows = torch.arange(3, device="cuda")
        try:
            eval(line)
            print("passes")
        except (DataDependentOutputException, DynamicOutputShapeException):
            print("waits")
        except RuntimeError:
            print("refused")
"""


def verdict(code: str) -> str:
    """What the simulated GPU does."""
    with simulated_gpu() as gpu:
        names = {
            "torch": torch,
            "device": torch.ones(3, device="cuda"),
            "matrix": torch.ones(3, 3, device="cuda"),
            "rows": torch.arange(3, device="cuda"),
        }
        assert not gpu.stalls
        try:
            with gpu.no_stalls():
                eval(code, names)
        except HiddenStall:
            return "waits"
        except RuntimeError:
            return "refused"
        return "passes"


def test_the_rules_are_those_of_fake_tensors() -> None:
    """In a process of its own: fake tensors leave a device guard behind that breaks autograd."""
    lines = "\n".join(RULES.values())
    done = subprocess.run(
        [sys.executable, "-c", FAKE], input=lines, capture_output=True, text=True, check=True
    )
    theirs = dict(zip(RULES, done.stdout.splitlines(), strict=True))
    assert {name: verdict(code) for name, code in RULES.items()} == theirs
    assert set(theirs.values()) == {"refused", "waits", "passes"}


STRICTER = {
    "an index on the device": ("torch.ones(3)[rows]", "refused"),
    "an index on the host": ("matrix[torch.tensor([0])]", "waits"),
    "to the host": ("device.cpu()", "waits"),
    "to the device": ("torch.ones(3).to('cuda')", "waits"),
    "numbers": ("torch.tensor([1.0], device='cuda')", "waits"),
    "a generator": ("torch.rand(2, device='cuda', generator=torch.Generator())", "refused"),
}
"""What fake tensors let pass: CUDA raises, or copies and waits."""


@pytest.mark.parametrize(("code", "expected"), STRICTER.values(), ids=STRICTER)
def test_rules_that_fake_tensors_do_not_have(code: str, expected: str) -> None:
    assert verdict(code) == expected


def trained(device: str, foreach: bool) -> list[torch.Tensor]:
    """A small network after two steps, with in-place changes of views."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    inputs = torch.randn(5, 4, generator=generator)
    layer.to(device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, foreach=foreach)
    x = inputs.to(device)
    for _ in range(2):
        optimizer.zero_grad()
        view = x[1:3]
        view += 1
        x[torch.arange(2, device=device)] -= 0.5
        layer(x).square().sum().backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
    return [*(parameter.detach().cpu() for parameter in layer.parameters()), x.cpu()]


@pytest.mark.parametrize("foreach", [False, True])
def test_values_views_and_gradients_are_the_cpu_s(foreach: bool) -> None:
    expected = trained("cpu", foreach)
    with simulated_gpu():
        found = trained("cuda", foreach)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is torch.Tensor
        assert torch.equal(one, other)


def test_mixed_precision_casts() -> None:
    with simulated_gpu(), torch.autocast("cuda", dtype=torch.bfloat16):
        product = torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
    assert (product.dtype, product.device) == (torch.bfloat16, GPU)


def test_stalls_have_a_place_and_only_the_allowed_pass() -> None:
    def wait(gpu: SimulatedGpu) -> None:
        torch.ones(2, device="cuda").cpu()

    here = "test_simulated_gpu.py:wait"
    with simulated_gpu() as gpu:
        wait(gpu)
        assert gpu.stalls == [Stall("copy to the host", here)]
        with pytest.raises(HiddenStall, match=f"{here}: copy to the host"), gpu.no_stalls():
            wait(gpu)
        with gpu.no_stalls([here]):
            wait(gpu)


def test_pinned_memory_is_sent_without_a_wait() -> None:
    with simulated_gpu() as gpu:
        torch.ones(2).pin_memory().to(GPU, non_blocking=True)
        torch.empty(0).to(GPU)
        assert not gpu.stalls
        torch.ones(2).pin_memory().to(GPU)
        torch.ones(2).to(GPU, non_blocking=True)
        assert len(gpu.stalls) == 2


def test_gradients_cross_between_the_devices() -> None:
    leaf = torch.ones(2, requires_grad=True)
    with simulated_gpu():
        (leaf.to("cuda") * 3).sum().cpu().backward()
    assert type(leaf.grad) is torch.Tensor
    assert torch.equal(leaf.grad, torch.full((2,), 3.0))


def test_nothing_is_left_behind() -> None:
    """Tensors of a simulation are of no use after it, and torch is as it was."""
    before = (torch.cuda.is_available(), torch.autocast, torch.cuda.synchronize)
    swap = torch.__future__.get_swap_module_params_on_conversion()
    with simulated_gpu():
        lost = torch.ones(2, device="cuda")
        assert isinstance(lost, OnGpu)
        assert torch.cuda.is_available()
    with pytest.raises(RuntimeError, match="outlived the simulation"):
        lost + 1
    assert (torch.cuda.is_available(), torch.autocast, torch.cuda.synchronize) == before
    assert torch.__future__.get_swap_module_params_on_conversion() == swap


def test_a_shape_that_changes_in_place_is_refused() -> None:
    with simulated_gpu():
        tensor = torch.zeros(3, device=GPU)
        with pytest.raises(RuntimeError, match="changes the shape of a simulated tensor in place"):
            tensor.unsqueeze_(0)
