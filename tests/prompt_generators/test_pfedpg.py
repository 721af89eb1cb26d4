"""pFedPG's generator against autograd and on a toy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedprompt.core.errors import ConfigError
from fedprompt.prompt_generators import PromptGenerator, generators
from fedprompt.prompt_generators.pfedpg import NAMES, generate


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
    """One prompt: the softmax is over one row, so P_t = P + N(P) W_v W_o / sqrt(2) whatever the
    descriptor; the layer norm of (1, 2) is (-1, 1).
    """
    base = torch.tensor([[1.0, 2.0]])
    eye = torch.eye(2)
    state = dict.fromkeys(("query", "key", "value"), eye) | {
        "base": base,
        "descriptors": torch.tensor([[5.0, -1.0]]),
        "output": 10 * eye,
    }
    expected = torch.tensor([[1 - 10 / 2**0.5, 2 + 10 / 2**0.5]])
    torch.testing.assert_close(make().prompts_for(0, state), expected, atol=1e-3, rtol=0)


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


def test_prompts_and_step_against_the_formula_and_finite_differences(
    state: dict[str, Tensor],
) -> None:
    """Three prompts, so that the attention is not trivial; N(P) is a constant of the step."""
    arrays = {name: value.double().numpy() for name, value in state.items()}
    base = arrays["base"]
    centred = base - base.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)

    def prompts(values: Mapping[str, NDArray[np.float64]], client: int) -> NDArray[np.float64]:
        scores = normed @ values["key"] @ (values["descriptors"][client] @ values["query"]) / 2
        attention = np.exp(scores) / np.exp(scores).sum()
        answer = attention @ normed @ values["value"] @ values["output"]
        return np.asarray(values["base"] + answer / 2)

    doubles = {name: value.double() for name, value in state.items()}
    for client in range(5):
        given = make().prompts_for(client, doubles)
        np.testing.assert_allclose(given.numpy(), prompts(arrays, client), atol=1e-12)
    change = np.random.default_rng(0).normal(size=base.shape)
    returned = {3: torch.from_numpy(prompts(arrays, 3) + change)}
    following, _ = make(lr=1.0).learn(doubles, returned, {3: 2.0})
    for name in NAMES:
        slope = np.zeros_like(arrays[name])
        for index in np.ndindex(slope.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = arrays[name].copy()
                moved[index] += step
                ends.append((prompts({**arrays, name: moved}, 3) * change).sum())
            slope[index] = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose((following[name] - doubles[name]).numpy(), slope, atol=1e-7)


def test_clients_that_want_different_prompts_get_them() -> None:
    """Prompts of the size that is used: each client pulls to a target of its own, and the generator
    learns to give it; one set for both could come no nearer than their middle.
    """
    draws = torch.Generator().manual_seed(7)
    generator = make()
    state = generator.begin(0.02 * torch.randn(5, 128, generator=draws), 2, draws)
    centre, side = 0.05 * torch.randn(2, 128, generator=draws)
    targets = {0: state["base"] + centre + side, 1: state["base"] + centre - side}
    for _ in range(100):
        returned = {
            client: generator.prompts_for(client, state).lerp(target, 0.3)
            for client, target in targets.items()
        }
        state, figures = generator.learn(state, returned, {0: 1.0, 1: 1.0})
    for client, target in targets.items():
        left = (generator.prompts_for(client, state) - target).norm() / (5**0.5 * side.norm())
        assert left < 0.2
    assert figures["spread_of_clients"] > 0.02


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
