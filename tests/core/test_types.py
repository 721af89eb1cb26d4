"""What travels between server and clients arrives as it was sent."""

from __future__ import annotations

import pickle

import torch

from fedprompt.core.types import Broadcast, ClientJob


def test_tensors_arrive_with_their_bits_and_in_memory_of_their_own() -> None:
    """Whatever their shape, order and type; those that NumPy does not know travel torch's way."""
    shared = {
        "scalar": torch.tensor(2.5),
        "turned": torch.randn(3, 2).t(),
        "half": torch.randn(2).to(torch.bfloat16),
        "leaf": torch.randn(2, requires_grad=True),
        "whole": torch.arange(3),
    }
    broadcast = Broadcast(torch.randn(2, 4), torch.empty(2, 0), shared)
    sent = ClientJob(1, 2, 3, broadcast, {"own": torch.ones(2)})
    received = pickle.loads(pickle.dumps(sent))
    assert (received.client_id, received.round_index, received.seed) == (1, 2, 3)
    assert torch.equal(received.state["own"], sent.state["own"])
    assert torch.equal(received.broadcast.prompts, broadcast.prompts)
    assert received.broadcast.keys.shape == (2, 0)
    for name, tensor in shared.items():
        other = received.broadcast.shared[name]
        assert torch.equal(other, tensor)
        assert other.dtype == tensor.dtype
        assert other.requires_grad == tensor.requires_grad
    received.broadcast.prompts.zero_()
    assert broadcast.prompts.any()
