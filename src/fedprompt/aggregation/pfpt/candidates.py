"""What the variants `paper` and `released` share: candidates, their networks, and the result.

Every local prompt is a candidate summarizing prompt, which explains itself at no cost, and a new
summarizing prompt has no price; so little merges. Both are here to be compared with `map`, which
does set a price. Weights, origins and the broadcast prompts play no part, so no row of the
broadcast goes on. The only memory is the two networks, which continue where the last round left
them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedprompt.aggregation.arrays import Array, Indices, member_means
from fedprompt.aggregation.base import Aggregation
from fedprompt.aggregation.cohort import Cohort, previous_of
from fedprompt.aggregation.inputs import AggregationInput, check_state
from fedprompt.aggregation.pfpt.nets import PromptNets, state_shapes
from fedprompt.aggregation.pfpt.options import LiteralOptions
from fedprompt.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Fit:
    """Where an optimisation ended. Written by the two `*_matching`, read by `summarize`."""

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


def hungarian(scores: Tensor) -> Tensor:
    """(k,) distinct columns with the greatest total score; (k, N) scores with k <= N."""
    if not bool(torch.isfinite(scores).all()):
        raise not_finite("scores")
    _, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    return torch.from_numpy(np.asarray(columns, dtype=np.int64))


def not_finite(what: str) -> InputError:
    """That the arithmetic has left the finite numbers at `what`."""
    return InputError(
        f"prompt_sets: expected prompts for which {what} stay finite, got NaN or Inf; the variant "
        "'released' works in float32 and the prompts' own units, so bring prompts near unit scale "
        "or use the variant 'map'"
    )


def networks(
    options: LiteralOptions, given: AggregationInput, generator: torch.Generator, dtype: torch.dtype
) -> PromptNets:
    """Those of the state, or fresh ones.

    Args:
        options: have the hidden layer's width.
        given: its prompts (n_t, d) have the dimension, its state the networks.
        generator: draws fresh weights.
        dtype: of the weights.

    Raises:
        InputError: the state has other shapes.
    """
    state, d = given.state, given.prompt_sets[0].shape[1]
    if not state:
        return PromptNets(d, options.net_hidden, generator, dtype)
    check_state(state, state_shapes(d, options.net_hidden))
    return PromptNets.from_state(state, dtype=dtype)


def summarize(
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


def nothing_returned(cohort: Cohort, nets: PromptNets) -> Aggregation:
    """Every client returned an empty set: nothing changes."""
    previous = previous_of(cohort)
    names = (
        *("born", "merged", "pruned", "matched_distance"),
        *("objective_before", "objective_after", "sweeps", "inclusion_entropy"),
    )
    figures = {"kept": float(len(previous)), **dict.fromkeys(names, 0.0)}
    nothing = np.empty(0, dtype=np.int64)
    return _result(cohort, previous, cohort.previous_keys, nothing, nets, figures)


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
        raise not_finite("prompts and networks")
    if not all(math.isfinite(value) for value in figures.values()):
        raise not_finite("objective and distances")
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


def as_array(tensor: Tensor) -> Array:
    """A float64 copy in numpy."""
    return np.array(tensor.detach().to(torch.float64).numpy(), dtype=np.float64)
