"""PFPT as the paper has it: Eq. 4-11 and Algorithms 1 and 2, taken at their word.

Weng et al., "Probabilistic Federated Prompt-Tuning with Non-IID and Imbalanced Data", NeurIPS
2024, arXiv 2502.19752, Section 3.

| paper    | code                   | shape  | meaning                                             |
|----------|------------------------|--------|-----------------------------------------------------|
| phi_i    | `candidates`           | (N, d) | candidate summarizing prompts, one per local prompt |
| omega_tk | `points`, `local`      | (N, d) | prompts of all clients, of one client (k, d)        |
| z_tk^i   | `assignment`           | (n_t,) | candidate of each prompt, distinct in a client      |
| alpha    | `nets.alpha`           | (N, d) | variance                                            |
| g        | `nets.inclusion_logit` | (N,)   | log odds that a client uses a candidate             |
| m        | `num_clients`          | scalar | clients of the round, those with an empty set too   |
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.aggregation.arrays import standard_units
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

LOG_2PI = math.log(2 * math.pi)
STEPS_PER_LOOP = 10
"""Gradient steps between two matchings; the released code takes one per client."""


@dataclasses.dataclass(frozen=True)
class Model:
    """Phi and what the networks make of it: the parameters of Eq. 4-8."""

    candidates: Tensor
    """(N, d) phi_i"""
    variance: Tensor
    """(N, d) diagonal of alpha(phi_i)"""
    logit: Tensor
    """(N,) g(phi_i)"""

    @classmethod
    def of(cls, candidates: Tensor, nets: PromptNets, variance_floor: float) -> Model:
        """With the variance confined to (variance_floor, 1).

        Args:
            candidates: (N, d)
            nets: alpha and g.
            variance_floor: in squared units of the candidates.
        """
        variance = variance_floor + (1 - variance_floor) * nets.alpha(candidates)
        return cls(candidates, variance, nets.inclusion_logit(candidates))

    def scores(self, local: Tensor) -> Tensor:
        """(k, N) C_t[k, i] of Eq. 27 for (k, d) local prompts."""
        precision = 1 / self.variance
        weighted = self.candidates * precision
        squares = local**2 @ precision.T - 2 * local @ weighted.T
        squares += (self.candidates * weighted).sum(dim=1)
        width = local.shape[1] * LOG_2PI + self.variance.log().sum(dim=1)
        return -0.5 * (squares + width) + self.logit  # the logit of sigma(g) is g

    def objective(self, points: Tensor, assignment: Tensor, num_clients: int) -> Tensor:
        """Sum over clients of log P(omega_t, z_t), Eq. 9 + Eq. 10; scalar.

        Args:
            points: (N, d) prompts of all clients.
            assignment: (N,) candidate of each.
            num_clients: m.
        """
        variance = self.variance[assignment]
        squares = (points - self.candidates[assignment]) ** 2 / variance
        gaussian = -0.5 * (squares + variance.log() + LOG_2PI).sum()  # Eq. 9
        users = torch.bincount(assignment, minlength=len(self.candidates))  # sum of c_ti over t
        used = users * F.logsigmoid(self.logit)  # Eq. 10, both halves
        unused = (num_clients - users) * F.logsigmoid(-self.logit)
        return gaussian + (used + unused).sum()


@gradients()
def paper_matching(prompt_sets: Sequence[Tensor], nets: PromptNets, options: LiteralOptions) -> Fit:
    """Algorithms 1 and 2: matching client after client, then gradient steps on (Phi, w, gamma).

    A matching never lowers the objective. Adam may, so the best of the `loops + 1` matched
    states is returned. Line 8 of Algorithm 1 (unused candidates go) is left to the caller.

    Args:
        prompt_sets: per client (n_t, d), in units in which the variance lies below 1; n_t may be 0.
        nets: left unchanged.
        options: loops, learning rate and floor.

    Raises:
        InputError: a score is not finite.
    """
    nets = copy.deepcopy(nets)
    points = torch.cat(list(prompt_sets)).detach()
    candidates = points.clone().requires_grad_()
    optimizer = torch.optim.Adam([candidates, *nets.parameters()], lr=options.net_lr)
    best = start = _match(prompt_sets, candidates, nets, options.variance_floor)
    assignment = torch.cat(start.assignment)
    for _ in range(options.loops):
        for _ in range(STEPS_PER_LOOP):
            model = Model.of(candidates, nets, options.variance_floor)
            loss = -model.objective(points, assignment, len(prompt_sets))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        here = _match(prompt_sets, candidates, nets, options.variance_floor)
        assignment = torch.cat(here.assignment)
        if here.objective_after > best.objective_after:
            best = here
    return dataclasses.replace(best, objective_before=start.objective_after)


@torch.no_grad()
def _match(
    prompt_sets: Sequence[Tensor], candidates: Tensor, nets: PromptNets, variance_floor: float
) -> Fit:
    """Algorithm 2: the best assignment of each client for the present Phi, w and gamma."""
    model = Model.of(candidates, nets, variance_floor)
    points = torch.cat(list(prompt_sets))
    scores = torch.split(model.scores(points), [len(local) for local in prompt_sets])
    assignment = [hungarian(block) for block in scores]
    flat = torch.cat(assignment)
    value = float(model.objective(points, flat, len(prompt_sets)))
    return Fit(candidates.clone(), assignment, copy.deepcopy(nets), value, value)


@gradients()
def aggregate_paper(given: AggregationInput, options: LiteralOptions) -> Aggregation:
    """The paper's aggregation: Eq. 4-11 with Algorithms 1 and 2, float64.

    A variance between 0 and 1 means something in some unit only, so the work is done on prompts
    that are centred at their mean and divided by their standard deviation over all coordinates,
    and the result is brought back. The assignment then does not depend on the scale of the
    prompts. A key is the mean of the keys of the local prompts assigned to its prompt.

    Args:
        given: its state holds the networks of the round before, fresh ones are made if it is
            empty; its generator draws them.
        options: all are used.

    Raises:
        InputError: nothing was returned and nothing broadcast, the state has other shapes, or
            the result does not fit the prompts' dtype.
    """
    generator = given.generator or torch.Generator().manual_seed(DEFAULT_SEED)
    nets, cohort = networks(options, given, generator, torch.float64), Cohort.of(given)
    if len(cohort.prompts) == 0:
        return nothing_returned(cohort, nets)
    centre, unit = standard_units(cohort.prompts)
    points = torch.from_numpy((cohort.prompts - centre) / (unit or 1.0))
    fit = paper_matching([points[span] for span in cohort.spans()], nets, options)
    model = Model.of(fit.candidates, fit.nets, options.variance_floor)
    prompts = centre + unit * as_array(fit.candidates)
    deviations = model.variance.detach().sqrt()
    return summarize(cohort, fit, prompts, points, deviations, options.loops)
