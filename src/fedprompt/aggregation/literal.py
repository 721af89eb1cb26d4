"""PFPT taken at its word: the released program and the paper's equations, for comparison.

Weng et al., "Probabilistic Federated Prompt-Tuning with Non-IID and Imbalanced Data", NeurIPS
2024, arXiv 2502.19752, Section 3. In both forms every local prompt is a candidate summarizing
prompt, which explains itself at no cost, and a new summarizing prompt has no price; so little
merges. They are here to be compared with the variant `map`, which does set a price.

| paper    | code                   | shape  | meaning                                             |
|----------|------------------------|--------|-----------------------------------------------------|
| phi_i    | `candidates`           | (N, d) | candidate summarizing prompts, one per local prompt |
| omega_tk | `local`                | (k, d) | prompts of client t                                 |
| z_tk^i   | `assignment`           | (n_t,) | candidate of each prompt, distinct in a client      |
| alpha    | `nets.alpha`           | (N, d) | variance (paper) or standard deviation (released)   |
| g        | `nets.inclusion_logit` | (N,)   | log odds that a client uses a candidate             |
| m        | `num_clients`          |        | clients of the round, those with an empty set too   |

Weights, origins and the broadcast prompts play no part in either form, so no row of the broadcast
goes on. The only memory is the two networks, which continue where the last round left them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from fedprompt.aggregation.arrays import Array, Indices, member_means
from fedprompt.aggregation.base import Aggregation
from fedprompt.aggregation.cohort import Cohort, previous_of
from fedprompt.aggregation.inputs import DEFAULT_SEED, AggregationInput, check_state
from fedprompt.aggregation.nets import PromptNets, state_shapes
from fedprompt.aggregation.scales import standard_units
from fedprompt.core.checks import check_integer, check_number
from fedprompt.core.errors import InputError

LOG_2PI = math.log(2 * math.pi)
STEPS_PER_LOOP = 10
"""Gradient steps of `paper` between two matchings; the released code takes one per client."""


@dataclasses.dataclass(frozen=True)
class LiteralOptions:
    """Options of the variants `paper` and `released`."""

    loops: int = 50
    """Alternations of matching and gradient steps."""
    net_lr: float = 1e-3
    """Learning rate of Adam."""
    net_hidden: int = 128
    """Width of the hidden layer of both networks."""
    variance_floor: float = 1e-6
    """Least variance of `paper` in units of the prompts' total variance; `released` has none."""

    def __post_init__(self) -> None:
        for name in ("loops", "net_hidden"):
            check_integer(f"aggregator.{name}", getattr(self, name), 1)
        check_number("aggregator.net_lr", self.net_lr, 0, above=True)
        check_number("aggregator.variance_floor", self.variance_floor, 0, above=True, below=1)


@dataclasses.dataclass(frozen=True)
class Fit:
    """Where an optimisation ended. Written by the two `*_matching`, read by `aggregate_*`."""

    candidates: Tensor
    """(N, d), those without users included."""
    assignment: list[Tensor]
    """Per client (n_t,) int64, rows of `candidates`."""
    nets: PromptNets
    objective_before: float
    objective_after: float


@contextlib.contextmanager
def gradients() -> Iterator[None]:
    """Gradients are recorded even if the caller has switched them off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


# The released program. It differs from the equations in five ways: alpha is a standard deviation;
# log Bernoulli counts once per local prompt of the client; only candidates in use are trained
# for inclusion; the first assignment is random; the new assignment follows from the scores
# before the gradient step.


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
            assignment[client] = _hungarian(scores)
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
    """What the released code's steps raise: the sum of all clients' shares."""
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


# The paper's equations.


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
        """With the variance confined to (variance_floor, 1)."""
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
    assignment = [_hungarian(block) for block in scores]
    flat = torch.cat(assignment)
    value = float(model.objective(points, flat, len(prompt_sets)))
    return Fit(candidates.clone(), assignment, copy.deepcopy(nets), value, value)


# Both.


def _hungarian(scores: Tensor) -> Tensor:
    """(k,) distinct columns with the greatest total score; (k, N) scores with k <= N."""
    if not bool(torch.isfinite(scores).all()):
        raise _not_finite("scores")
    _, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    return torch.from_numpy(np.asarray(columns, dtype=np.int64))


def _not_finite(what: str) -> InputError:
    return InputError(
        f"prompt_sets: expected prompts for which {what} stay finite, got NaN or Inf; the variant "
        "'released' works in float32 and the prompts' own units, so bring prompts near unit scale "
        "or use the variant 'map'"
    )


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
    nets, cohort = _nets(options, given, generator, torch.float32), Cohort.of(given)
    if len(cohort.prompts) == 0:
        return _nothing_returned(cohort, nets)
    prompts = torch.from_numpy(cohort.prompts).to(torch.float32)
    number = len(prompts)
    prompt_sets = [prompts[span] for span in cohort.spans()]
    initial = [torch.randperm(number, generator=generator)[: len(p)] for p in prompt_sets]
    fit = released_matching(prompt_sets, initial, nets, options.loops, options.net_lr)
    deviations = fit.nets.alpha(fit.candidates).detach()
    return _summarize(cohort, fit, _array(fit.candidates), prompts, deviations, options.loops)


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
    nets, cohort = _nets(options, given, generator, torch.float64), Cohort.of(given)
    if len(cohort.prompts) == 0:
        return _nothing_returned(cohort, nets)
    centre, unit = standard_units(cohort.prompts)
    points = torch.from_numpy((cohort.prompts - centre) / (unit or 1.0))
    fit = paper_matching([points[span] for span in cohort.spans()], nets, options)
    model = Model.of(fit.candidates, fit.nets, options.variance_floor)
    prompts = centre + unit * _array(fit.candidates)
    deviations = model.variance.detach().sqrt()
    return _summarize(cohort, fit, prompts, points, deviations, options.loops)


def _nets(
    options: LiteralOptions, given: AggregationInput, generator: torch.Generator, dtype: torch.dtype
) -> PromptNets:
    """From the state, else fresh."""
    state, d = given.state, given.prompt_sets[0].shape[1]
    if not state:
        return PromptNets(d, options.net_hidden, generator, dtype)
    check_state(state, state_shapes(d, options.net_hidden))
    return PromptNets.from_state(state, dtype=dtype)


def _summarize(
    cohort: Cohort, fit: Fit, candidates: Array, local: Tensor, deviations: Tensor, loops: int
) -> Aggregation:
    """Keep the candidates in use, in ascending order (Algorithm 1, line 8).

    Args:
        cohort: the inputs.
        fit: assignment, networks and candidates in the units of the optimisation.
        candidates: (N, d) in the units of the prompts.
        local: (N, d) local prompts in the units of the optimisation.
        deviations: (N, d) standard deviation around each candidate, in the same units.
        loops: how many alternations there were.
    """
    chosen = torch.cat(fit.assignment)
    kept, labels = np.unique(chosen.numpy(), return_inverse=True)
    number, broadcast = len(kept), 0 if cohort.previous is None else len(cohort.previous)
    figures = {
        "kept": 0,
        "born": number,
        "merged": len(chosen) - number,
        "pruned": broadcast,
        "matched_distance": _matched_distance(fit.candidates, deviations, local, chosen),
        "objective_before": fit.objective_before,
        "objective_after": fit.objective_after,
        "sweeps": loops,
        "inclusion_entropy": _inclusion_entropy(fit, kept),
    }
    keys = None if cohort.keys is None else member_means(cohort.keys, labels, number)
    return _result(cohort, candidates[kept], keys, labels, fit.nets, figures)


def _matched_distance(
    candidates: Tensor, deviations: Tensor, local: Tensor, chosen: Tensor
) -> float:
    """Root mean square deviation from a summarizing prompt of two or more members, in noise."""
    matched = torch.bincount(chosen, minlength=len(candidates))[chosen] > 1
    if not bool(matched.any()):
        return 0.0
    rows = chosen[matched]
    residual = (local[matched] - candidates[rows]) / deviations[rows]
    return float(residual.double().square().mean().sqrt())


@torch.no_grad()
def _inclusion_entropy(fit: Fit, kept: Indices) -> float:
    """Mean entropy in nats of the inclusion probabilities of the prompts that are kept."""
    logit = fit.nets.inclusion_logit(fit.candidates[torch.from_numpy(kept)])
    used = torch.sigmoid(logit) * F.logsigmoid(logit)
    unused = torch.sigmoid(-logit) * F.logsigmoid(-logit)
    return float(-(used + unused).mean())


def _nothing_returned(cohort: Cohort, nets: PromptNets) -> Aggregation:
    """Every client returned an empty set: nothing changes."""
    previous = previous_of(cohort)
    names = (
        *("born", "merged", "pruned", "matched_distance"),
        *("objective_before", "objective_after", "sweeps", "inclusion_entropy"),
    )
    figures = {"kept": float(len(previous)), **dict.fromkeys(names, 0.0)}
    nobody = np.empty(0, dtype=np.int64)
    return _result(cohort, previous, cohort.previous_keys, nobody, nets, figures)


def _result(
    cohort: Cohort,
    prompts: Array,
    keys: Array | None,
    assignment: Indices,
    nets: PromptNets,
    figures: Mapping[str, float],
) -> Aggregation:
    """As tensors, each in storage of its own; everything finite."""
    result = torch.tensor(prompts, dtype=cohort.dtype)
    state = nets.to_state()
    if not all(bool(torch.isfinite(value).all()) for value in (result, *state.values())):
        raise _not_finite("prompts and networks")
    if not all(math.isfinite(value) for value in figures.values()):
        raise _not_finite("objective and distances")
    return Aggregation(
        prompts=result,
        keys=None if keys is None else torch.tensor(keys, dtype=cohort.key_dtype),
        assignment=cohort.restore(assignment),
        state=state,
        diagnostics={
            "num_prompts": float(len(prompts)),
            **{name: float(value) for name, value in figures.items()},
        },
    )


def _array(tensor: Tensor) -> Array:
    """A float64 copy in numpy."""
    return np.array(tensor.detach().to(torch.float64).numpy(), dtype=np.float64)
