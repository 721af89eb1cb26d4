"""pFedPG's generator against autograd and on a toy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedprompt.errors import ConfigError
from fedprompt.generators import PromptGenerator, generators
from fedprompt.generators.pfedpg import NAMES, generate


def make(**options: object) -> PromptGenerator:
    generator = generators.create("pfedpg", **options)
    assert generator is not None
    return generator


@pytest.fixture
def state() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    begun = make().begin(torch.randn(3, 4, generator=draws), 5, draws)
    return {**begun, "output": torch.randn(4, 4, generator=draws)}


def test_one_client_s_prompts_by_hand() -> None:
    """One prompt: the softmax is over one row, so P_t = P + (P W_v) W_o whatever the descriptor."""
    base = torch.tensor([[1.0, 2.0]])
    eye = torch.eye(2)
    state = dict.fromkeys(("query", "key", "value"), eye) | {
        "base": base,
        "descriptors": torch.tensor([[5.0, -1.0]]),
        "output": 10 * eye,
    }
    assert make().prompts_for(0, state).tolist() == [[11.0, 22.0]]


def test_step_is_the_vector_jacobian_product(state: dict[str, Tensor]) -> None:
    """Against autograd of sum_t w_t <P_t, Delta_t>, whose gradient is that product."""
    draws = torch.Generator().manual_seed(1)
    clients, weights = (4, 1), {1: 3.0, 4: 1.0}
    returned = {
        client: make().prompts_for(client, state) + torch.randn(3, 4, generator=draws)
        for client in clients
    }
    following, _ = make(lr=0.5).learn(state, returned, weights)
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    total = torch.zeros(())
    for client in clients:
        given = generate(leaves, torch.tensor([client]))[0]
        change = (returned[client] - given).detach()
        total = total + weights[client] / 4 * (given * change).sum()
    total.backward()
    for name in NAMES:
        gradient = leaves[name].grad
        assert gradient is not None
        torch.testing.assert_close(following[name], state[name] + 0.5 * gradient)
    # Other clients' descriptors are not touched.
    assert torch.equal(following["descriptors"][[0, 2, 3]], state["descriptors"][[0, 2, 3]])
    assert not torch.equal(following["descriptors"][1], state["descriptors"][1])


def test_clients_that_want_different_prompts_get_them(state: dict[str, Tensor]) -> None:
    """Each client pulls to a target of its own; the generator learns to give it."""
    generator = make(lr=0.05)
    targets = {0: torch.full((3, 4), 1.0), 1: torch.full((3, 4), -1.0)}

    def distance(state: dict[str, Tensor]) -> float:
        return sum(float((generator.prompts_for(c, state) - t).norm()) for c, t in targets.items())

    before = distance(state)
    for _ in range(300):
        returned = {
            client: generator.prompts_for(client, state).lerp(target, 0.5)
            for client, target in targets.items()
        }
        state, figures = generator.learn(state, returned, {0: 1.0, 1: 1.0})
    assert distance(state) < 0.2 * before
    assert figures["spread_of_clients"] > 0.5


def test_pure_and_in_fresh_memory(state: dict[str, Tensor]) -> None:
    before = {name: value.clone() for name, value in state.items()}
    returned = {0: torch.zeros(3, 4)}
    following, _ = make().learn(state, returned, {0: 1.0})
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    old = {value.untyped_storage().data_ptr() for value in [*state.values(), *returned.values()]}
    fresh = [*following.values(), make().prompts_for(0, state), make().consensus(state)]
    assert not old & {value.untyped_storage().data_ptr() for value in fresh}
    assert not any(value.requires_grad for value in fresh)
    mean = torch.stack([make().prompts_for(client, state) for client in range(5)]).mean(dim=0)
    torch.testing.assert_close(make().consensus(state), mean)


def test_wrong_options() -> None:
    with pytest.raises(ConfigError, match=r"generator.lr: expected a finite number >= 0, got -1"):
        make(lr=-1.0)
