"""The released aggregation with a Python loop over candidates: slow, written for comparison only.

`released_per_candidate` does step for step what `released_matching` in
`fedprompt.aggregation.pfpt.released` does, but builds every score from one `torch.distributions`
object per candidate, as the released code is described to do. The vectorised form is timed against
it and tested against it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from fedprompt.aggregation.pfpt.candidates import Fit
from fedprompt.aggregation.pfpt.nets import PromptNets
from fedprompt.aggregation.pfpt.released import released_objective


def released_per_candidate(
    prompt_sets: Sequence[Tensor],
    initial: Sequence[Tensor],
    nets: PromptNets,
    loops: int,
    lr: float = 1e-3,
) -> Fit:
    """Same arguments and result as `released_matching`."""
    nets = copy.deepcopy(nets)
    assignment = [rows.clone() for rows in initial]
    candidates = torch.cat(list(prompt_sets)).detach().clone().requires_grad_()
    before = released_objective(prompt_sets, assignment, candidates, nets)
    optimizer = torch.optim.Adam([*nets.parameters(), candidates], lr=lr)
    for _ in range(loops):
        for client, local in enumerate(prompt_sets):
            if len(local) == 0:
                continue
            gaussian, inclusion = _client_scores(local, assignment[client], candidates, nets)
            pairs = list(enumerate(assignment[client].tolist()))
            gain = torch.stack([gaussian[i][k] + inclusion[i] for k, i in pairs]).sum()
            optimizer.zero_grad()
            (-gain).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            table = torch.stack(gaussian).detach() + torch.stack(inclusion).detach()[:, None]
            _, columns = linear_sum_assignment(table.T.numpy(), maximize=True)
            assignment[client] = torch.as_tensor(columns, dtype=torch.int64)
    after = released_objective(prompt_sets, assignment, candidates, nets)
    return Fit(candidates.detach(), assignment, nets, before, after)


def _client_scores(
    local: Tensor, mine: Tensor, candidates: Tensor, nets: PromptNets
) -> tuple[list[Tensor], list[Tensor]]:
    """Per candidate its (k,) Gaussian scores and its one inclusion score, with gradients."""
    using = set(mine.tolist())
    gaussian, inclusion = [], []
    for index, candidate in enumerate(candidates):
        one = candidate[None]
        density = Normal(candidate, nets.alpha(one)[0])
        gaussian.append(
            torch.stack(
                [
                    density.log_prob(prompt).sum()  # type: ignore[no-untyped-call]
                    for prompt in local
                ]
            )
        )
        chance = Bernoulli(probs=torch.sigmoid(nets.inclusion_logit(one)[0]))
        used = torch.tensor(1.0 if index in using else 0.0)
        inclusion.append(len(local) * chance.log_prob(used))  # type: ignore[no-untyped-call]
    return gaussian, inclusion
