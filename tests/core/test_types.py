"""What travels between server and clients arrives as it was sent."""

from __future__ import annotations

import pickle

import pytest
import torch

from fedprompt.core.types import Broadcast, ClientJob, ClientState, Parts, ServerState


def test_tensors_arrive_with_their_bits_and_in_memory_of_their_own() -> None:
    """Whatever their shape, order and type; those that NumPy does not know travel torch's way."""
    head = {
        "scalar": torch.tensor(2.5),
        "turned": torch.randn(3, 2).t(),
        "half": torch.randn(2).to(torch.bfloat16),
        "leaf": torch.randn(2, requires_grad=True),
        "whole": torch.arange(3),
    }
    broadcast = Broadcast(torch.randn(2, 4), torch.empty(2, 0), Parts(head=head))
    sent = ClientJob(1, 2, 3, broadcast, ClientState(Parts(objective={"own": torch.ones(2)})))
    received = pickle.loads(pickle.dumps(sent))
    assert (received.client_id, received.round_index, received.seed) == (1, 2, 3)
    assert torch.equal(received.state.kept.objective["own"], torch.ones(2))
    assert torch.equal(received.broadcast.prompts, broadcast.prompts)
    assert received.broadcast.keys.shape == (2, 0)
    for name, tensor in head.items():
        other = received.broadcast.shared.head[name]
        assert torch.equal(other, tensor)
        assert other.dtype == tensor.dtype
        assert other.requires_grad == tensor.requires_grad
    received.broadcast.prompts.zero_()
    assert broadcast.prompts.any()


NAMES = ("a", "0.weight", "head.trap", "prompts", "start.prompts", "a/b.c/d", "clients/3/prompts")
"""As awkward as names can be."""


def awkward(seed: int) -> Parts:
    draws = torch.Generator().manual_seed(seed)

    def named() -> dict[str, torch.Tensor]:
        return {name: torch.randn(2, generator=draws) for name in NAMES}

    return Parts(torch.ones(1), torch.zeros(1), named(), named(), named())


def test_every_tensor_has_a_path_of_its_own_and_comes_back_from_it() -> None:
    """Whatever plug-ins call theirs: a path says the field and the part before the name."""
    parts = awkward(0)
    assert len(parts.tensors()) == 2 + 3 * len(NAMES)
    again = Parts.from_tensors(parts.tensors())
    assert all(again.objective[name] is parts.objective[name] for name in NAMES)
    memory = {name: torch.ones(1) for name in NAMES}
    state = ServerState(
        4,
        torch.ones(2, 3),
        torch.ones(2, 0),
        parts,
        aggregator=memory,
        generator=memory,
        objective=memory,
        clients={7: ClientState(awkward(1), awkward(2)), 12: ClientState(awkward(3))},
        fixed=ClientState(awkward(4), awkward(5)),
    )
    flat = state.tensors()
    assert len(flat) == 2 + 3 * len(NAMES) + 6 * len(parts.tensors())
    back = ServerState.from_tensors(4, flat)
    assert back.sha256() == state.sha256()
    assert back.tensors().keys() == flat.keys()
    assert all(back.tensors()[path] is tensor for path, tensor in flat.items())
    assert torch.equal(back.clients[7].start.head["a"], awkward(2).head["a"])


def test_a_change_of_place_changes_the_hash() -> None:
    one, two = torch.ones(1), torch.zeros(0, 0)
    states = [
        ServerState(0, two, two, Parts(head={"x": one})),
        ServerState(0, two, two, Parts(adaptation={"x": one})),
        ServerState(0, two, two, Parts(objective={"head.x": one})),
        ServerState(0, two, two, aggregator={"head.x": one}),
        ServerState(0, two, two, generator={"head.x": one}),
        ServerState(0, two, two, fixed=ClientState(Parts(head={"x": one}))),
        ServerState(0, two, two, fixed=ClientState(start=Parts(head={"x": one}))),
    ]
    assert len({state.sha256() for state in states}) == len(states)


@pytest.mark.parametrize("path", ["momentum.x", "prompts.x", "head", "", "Head.x"])
def test_a_path_of_no_part_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="expected a path of prompts, query_projection, head"):
        Parts.from_tensors({path: torch.ones(1)})


def test_a_model_is_the_client_s_own_tensors_then_the_first_ones_then_the_server_s() -> None:
    def number(value: float) -> dict[str, torch.Tensor]:
        return {"w": torch.tensor(value)}

    sent = Parts(head=number(1), adaptation=number(1), objective=number(1))
    first = ClientState(Parts(head=number(2), objective=number(2)), Parts(adaptation=number(3)))
    broadcast = Broadcast(torch.zeros(1, 1), torch.zeros(1, 0), sent, first)
    own = ClientState(Parts(objective=number(4)), Parts(adaptation=number(5)))

    def values(parts: Parts) -> dict[str, float]:
        return {path: float(value) for path, value in parts.tensors().items() if path != "prompts"}

    assert values(broadcast.model(Parts())) == {"head.w": 2, "adaptation.w": 1}
    assert values(broadcast.model(Parts(head=number(6)))) == {"head.w": 6, "adaptation.w": 1}
    # Training goes on from what was noted, first for all and then for the client.
    assert values(broadcast.start(ClientState())) == {"head.w": 2, "adaptation.w": 3}
    assert values(broadcast.start(own)) == {"head.w": 2, "adaptation.w": 5}
