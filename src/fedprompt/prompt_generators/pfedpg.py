"""`pfedpg`: client-specific prompts from descriptors and shared base prompts.

Yang, Wang and Wang, "Efficient Model Personalization in Federated Learning via Client-Specific
Prompt Generation" (pFedPG), ICCV 2023, Sections 3.2 and 3.3. The server holds base prompts P
(n, d), a descriptor e_t (d,) of each client and the weights of one cross-attention, in which the
descriptor asks and the base prompts answer:

    a_t = softmax(Q K^T / sqrt(d)) V,    Q = e_t W_q (1, d), K = N(P) W_k, V = N(P) W_v (n, d)
    P_t = P + a_t W_o / sqrt(d)          (added to each base prompt; N is a layer norm)

Client t trains P_t and returns P~_t. The server never sees a gradient; it takes Delta_t = P~_t -
P_t for the direction of descent and moves all parameters phi = (P, e, W) along the vector-Jacobian
product (Shamsian et al., "Personalized Federated Learning using Hypernetworks", ICML 2021, Eq. 4):

    phi <- phi + lr * mean_t (d P_t / d phi)^T Delta_t

N and 1 / sqrt(d) are of this program: prompts are small numbers (0.02), so that without N all
clients would attend alike, and without 1 / sqrt(d) one step of W_o would overshoot. With both, W_o
moves a client's prompts about as far as the base prompts move, hence lr = 0.5. N(P) counts as a
constant in the product: its derivative is 1 / 0.02, and steps of P through it would be unstable.

Published pFedPG keeps each client's head at the client (`head.mode=personal`). A stranger's image
(the pooled test set) gets the mean of all clients' prompts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.core.checks import check_number
from fedprompt.core.types import Tensors
from fedprompt.prompt_generators.base import generators

NAMES = ("base", "descriptors", "query", "key", "value", "output")
"""(n, d), (N, d) and four (d, d)"""


@dataclasses.dataclass(frozen=True)
class PFedPGOptions:
    """Options of pFedPG."""

    lr: float = 0.5
    """Rate of the server's step; the base prompts move by so much of the clients' mean change, and
    the attention moves them about as far again."""
    descriptor_std: float = 1.0
    """Standard deviation of the initial descriptors."""

    def __post_init__(self) -> None:
        for field in ("lr", "descriptor_std"):
            check_number(f"generator.{field}", getattr(self, field), 0)


@generators.register("pfedpg", PFedPGOptions)
class PFedPG:
    """Cross-attention from client descriptors to base prompts."""

    def __init__(self, options: PFedPGOptions) -> None:
        self.options = options

    def begin(
        self, prompts: Tensor, num_clients: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Base prompts as given, drawn descriptors and projections, and a zero output projection,
        so that clients begin as in FedAvg-PT.

        Args:
            prompts: (n, d) the initial prompts.
            num_clients: clients of the whole federation.
            generator: draws descriptors and projections.
        """
        width = prompts.shape[1]

        def draw(rows: int, std: float) -> Tensor:
            return torch.randn(rows, width, generator=generator) * std

        return {
            "base": prompts.clone(),
            "descriptors": draw(num_clients, self.options.descriptor_std),
            "query": draw(width, width**-0.5),
            "key": draw(width, width**-0.5),
            "value": draw(width, width**-0.5),
            "output": torch.zeros(width, width),
        }

    def prompts_for(self, client_id: int, state: Tensors) -> Tensor:
        """P_t: (n, d)."""
        return generate(state, torch.tensor([client_id]))[0]

    def consensus(self, state: Tensors) -> Tensor:
        """The mean of all clients' prompts: (n, d)."""
        return generate(state, torch.arange(len(state["descriptors"]))).mean(dim=0)

    def learn(
        self, state: Tensors, returned: Mapping[int, Tensor], weights: Mapping[int, float]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """One step along the mean vector-Jacobian product, weighted by samples.

        Args:
            state: what the round's prompts were made from.
            returned: per client (n, d), its prompts after local training.
            weights: per client how much it counts.
        """
        clients = sorted(returned)
        parameters = {name: state[name].clone().requires_grad_() for name in NAMES}
        share = torch.tensor([weights[client] for client in clients])
        share = (share / share.sum())[:, None, None]
        with torch.enable_grad():
            given = generate(parameters, torch.tensor(clients))
        changes = torch.stack([returned[client] for client in clients]) - given.detach()
        gradients = torch.autograd.grad(given, list(parameters.values()), share * changes)
        following = {
            name: (value.detach() + self.options.lr * gradient).clone()
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
        }
        spread = given.detach() - given.detach().mean(dim=0)
        return following, {
            "change": float(changes.square().mean().sqrt()),
            "spread_of_clients": float(spread.square().mean().sqrt()),
        }


def generate(state: Tensors, clients: Tensor) -> Tensor:
    """Prompts of some clients, differentiable in the state but for N(P).

    Args:
        state: `base` (n, d), `descriptors` (N, d) and the projections, see `NAMES`.
        clients: (c,) int64.

    Returns:
        (c, n, d)
    """
    base = state["base"]
    width = base.shape[1]
    normed = F.layer_norm(base.detach(), (width,))
    query = state["descriptors"][clients] @ state["query"]
    attention = query @ (normed @ state["key"]).T / math.sqrt(width)
    answer = attention.softmax(dim=1) @ (normed @ state["value"]) @ state["output"]
    return base + answer[:, None, :] / math.sqrt(width)
