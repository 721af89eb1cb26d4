"""From host to device without a wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # who only partitions or reports need not wait for torch
    import torch
    from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device.

    A GPU reads it from pinned memory, so that the host need not wait for what the GPU still has to
    do before. Meant for small tensors within a training step: pinning copies them once more.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
