"""PFPT as the authors' released program has it: float32, in the prompts' own units.

It differs from the equations (`paper`) in five ways: alpha is a standard deviation; log Bernoulli
counts once per local prompt of the client; only candidates in use are trained for inclusion; the
first assignment is random; the new assignment follows from the scores before the gradient step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from fedprompt.aggregation.base import Aggregation
from fedprompt.aggregation.cohort import Cohort
from fedprompt.aggregation.inputs import DEFAULT_SEED, AggregationInput
from fedprompt.aggregation.pfpt.candidates import (
    Fit,
    as_array,
    gradients,
    hungarian,
    networks,
    nothing_returned,
    summarize,
)
from fedprompt.aggregation.pfpt.nets import PromptNets
from fedprompt.aggregation.pfpt.options import LiteralOptions


@gradients()
def released_matching(
    prompt_sets: Sequence[Tensor],
    initial: Sequence[Tensor],
    nets: PromptNets,
    loops: int,
    lr: float = 1e-3,
) -> Fit:
    """What the released code does with the clients in the given order, in the given units.

    Args:
        prompt_sets: per client (n_t, d); clients without prompts are passed over.
        initial: per client (n_t,) int64, distinct rows of the N candidates, which are the local
            prompts of all clients one after another.
        nets: left unchanged.
        loops: passes over the clients, one Adam step for each client in each pass.
        lr: learning rate of Adam.

    Raises:
        InputError: the prompts are so large that the arithmetic leaves the finite numbers.
    """
    nets = copy.deepcopy(nets)
    assignment = [rows.clone() for rows in initial]
    candidates = torch.cat(list(prompt_sets)).detach().clone().requires_grad_()
    before = released_objective(prompt_sets, assignment, candidates, nets)
    optimizer = torch.optim.Adam([candidates, *nets.parameters()], lr=lr)
    for _ in range(loops):
        for client, local in enumerate(prompt_sets):
            if len(local) == 0:
                continue
            scores = released_scores(local, assignment[client], candidates, nets)
            loss = -_released_share(local, assignment[client], candidates, nets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            assignment[client] = hungarian(scores)
    after = released_objective(prompt_sets, assignment, candidates, nets)
    return Fit(candidates.detach(), assignment, nets, before, after)


@torch.no_grad()
def released_scores(local: Tensor, mine: Tensor, candidates: Tensor, nets: PromptNets) -> Tensor:
    """(k, N) worth of giving each local prompt to each candidate.

    Args:
        local: (k, d)
        mine: (k,) candidates that the client uses at present.
        candidates: (N, d)
        nets: their alpha is taken as standard deviation.
    """
    deviations = nets.alpha(candidates)
    gaussian = _log_normal(local[:, None, :], candidates, deviations).sum(dim=-1)  # Eq. 9
    used = torch.zeros(len(candidates), dtype=candidates.dtype)
    used[mine] = 1
    inclusion = _log_bernoulli(used, nets.inclusion_logit(candidates))  # Eq. 10, misread
    return gaussian + len(local) * inclusion


def _released_share(local: Tensor, mine: Tensor, candidates: Tensor, nets: PromptNets) -> Tensor:
    """One client's share of the objective; scalar with gradients."""
    used = candidates[mine]
    gaussian = _log_normal(local, used, nets.alpha(used))
    logit = nets.inclusion_logit(used)
    inclusion = _log_bernoulli(torch.ones_like(logit), logit)
    return gaussian.sum() + len(local) * inclusion.sum()


@torch.no_grad()
def released_objective(
    prompt_sets: Sequence[Tensor],
    assignment: Sequence[Tensor],
    candidates: Tensor,
    nets: PromptNets,
) -> float:
    """What the released code's steps raise: the sum of all clients' shares.

    Args:
        prompt_sets: per client (n_t, d).
        assignment: per client (n_t,) int64, rows of the candidates.
        candidates: (N, d)
        nets: their alpha is taken as standard deviation.
    """
    return sum(
        float(_released_share(local, mine, candidates, nets))
        for local, mine in zip(prompt_sets, assignment, strict=True)
    )


def _log_normal(points: Tensor, means: Tensor, deviations: Tensor) -> Tensor:
    """Log density of each coordinate."""
    density = Normal(means, deviations, validate_args=False)
    return cast(Tensor, density.log_prob(points))  # type: ignore[no-untyped-call]


def _log_bernoulli(used: Tensor, logit: Tensor) -> Tensor:
    """Through the probability, as in the released code: rounding keeps it off 0 and 1."""
    chance = Bernoulli(probs=torch.sigmoid(logit), validate_args=False)
    return cast(Tensor, chance.log_prob(used))  # type: ignore[no-untyped-call]


@gradients()
def aggregate_released(given: AggregationInput, options: LiteralOptions) -> Aggregation:
    """The released code's aggregation: float32, in the prompts' own units.

    Clients and rows are taken in canonical order; the first assignment of each client is drawn
    without replacement. A key is the mean of the keys of the local prompts assigned to its prompt.

    Args:
        given: its state holds the networks of the round before, fresh ones are made if it is
            empty; its generator draws fresh networks and the first assignment.
        options: `variance_floor` is not used.

    Raises:
        InputError: nothing was returned and nothing broadcast, the state has other shapes, or
            the prompts are too large for float32 arithmetic.
    """
    generator = given.generator or torch.Generator().manual_seed(DEFAULT_SEED)
    nets, cohort = networks(options, given, generator, torch.float32), Cohort.of(given)
    if len(cohort.prompts) == 0:
        return nothing_returned(cohort, nets)
    prompts = torch.from_numpy(cohort.prompts).to(torch.float32)
    number = len(prompts)
    prompt_sets = [prompts[span] for span in cohort.spans()]
    initial = [torch.randperm(number, generator=generator)[: len(p)] for p in prompt_sets]
    fit = released_matching(prompt_sets, initial, nets, options.loops, options.net_lr)
    deviations = fit.nets.alpha(fit.candidates).detach()
    return summarize(cohort, fit, as_array(fit.candidates), prompts, deviations, options.loops)
