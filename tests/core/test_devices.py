"""Sending: the same tensor on the CPU, pinned and not waited for on a GPU."""

from __future__ import annotations

import torch

from fedprompt.core.devices import send
from simulated_gpu import GPU, simulated_gpu


def test_on_the_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(3)
    assert send(tensor, torch.device("cpu")) is tensor


def test_to_a_gpu_nothing_waits() -> None:
    with simulated_gpu() as gpu, gpu.no_stalls():
        sent = send(torch.arange(3), GPU)
        assert sent.device == GPU
        assert send(sent, GPU) is sent
    assert torch.equal(sent.host, torch.arange(3))
