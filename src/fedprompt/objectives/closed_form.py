"""`closed_form`: a linear head from class means and covariances, in one round, without training.

Clients send sums of the frozen CLS features; the server solves for the head. C classes, features
x in R^d, N_c samples of class c with mean mu_c, N_kc and mu_kc those of client k:

- `ncm`: W_c = mu_c / ||mu_c||, cosine to the class mean. Legate et al., "Guiding the Last Layer in
  Federated Learning with Pre-Trained Models" (FedNCM), NeurIPS 2023, Section 3.2.
- `cof`: ridge regression with class covariances that are estimated from the spread of the clients'
  means, so that only means are sent; a class that a single client holds gets the average of the
  other classes'. Goswami et al., "Covariances for Free: Exploiting Mean Distributions for
  Training-free Federated Learning" (FedCOF), NeurIPS 2025:

      Sigma_c = 1 / (K_c - 1) sum_k N_kc (mu_kc - mu_c)(mu_kc - mu_c)^T + shrinkage s I
      G       = sum_c (N_c - 1) Sigma_c + N mu mu^T         (mu: mean of all samples)
      W       = (G + ridge I)^-1 [N_1 mu_1 ... N_C mu_C],   rows scaled to norm 1

  with s the mean variance of a feature within a class. The spread between classes is left out of G,
  as the authors advise; `between=true` puts it in.
- `ridge`: the same with the exact G = sum x x^T, which clients send as well, and with rows as they
  are. Fani et al., "Accelerating Heterogeneous Federated Learning with Closed-form Classifiers"
  (Fed3R), ICML 2024.

Sums add up over rounds and every client contributes once, so that with few clients a round the
head grows into that of all clients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.core.checks import check_choice, check_number
from fedprompt.core.errors import ConfigError, RoundError
from fedprompt.core.types import ClientUpdate, Parts, Tensors
from fedprompt.objectives.base import Finished, LocalResult, Objective, Teacher, objectives

RULES = ("ncm", "cof", "ridge")
WEIGHT = "0.weight"
"""The one tensor of a linear head without bias."""


@dataclasses.dataclass(frozen=True)
class ClosedFormOptions:
    """Options of closed-form heads."""

    rule: str = "cof"
    """`ncm`, `cof` or `ridge`."""
    ridge: float = 1.0
    """Added to the diagonal of G (`cof`, `ridge`)."""
    shrinkage: float = 0.1
    """Added to the diagonal of each class covariance, in units of its mean variance over classes
    (`cof`)."""
    between: bool = False
    """Whether G holds the spread between classes as well (`cof`)."""

    def __post_init__(self) -> None:
        check_choice("objective.rule", self.rule, RULES)
        for field in ("ridge", "shrinkage"):
            check_number(f"objective.{field}", getattr(self, field), 0)
        weakest = {"ridge": self.ridge, "cof": max(self.ridge, self.shrinkage)}.get(self.rule, 1.0)
        if weakest == 0:
            names = "objective.ridge" + (" or .shrinkage" if self.rule == "cof" else "")
            raise ConfigError(
                f"{names}: expected a number > 0, got 0: without it the statistics of few clients "
                "do not determine a head"
            )


@objectives.register("closed_form", ClosedFormOptions)
class ClosedForm(Objective):
    """Clients send class sums; the server computes the head."""

    trains = False
    averages = False
    options: ClosedFormOptions

    def outgoing(self, shared: Parts) -> Parts:
        """Nothing: the clients need no head."""
        return Parts()

    def reply(self, shared: Parts) -> Parts:
        """Class sums (C, d) and counts (C,); with `ridge` the second moment (d, d) as well."""
        weight = shared.head[WEIGHT]
        sums = {"sum": weight, "count": weight[:, 0]}
        if self.options.rule == "ridge":
            sums["second"] = weight.new_zeros(weight.shape[1], weight.shape[1])
        return Parts(objective=sums)

    def keeps(self, start: Teacher) -> Tensors:
        """That the client's sums were sent."""
        return {"sent": torch.ones(1)}

    def finish(self, result: LocalResult) -> Finished:
        """The client's sums the first time, and zeros when it is sampled again."""
        features = result.features.double()
        first = "sent" not in result.own
        one_hot = F.one_hot(result.labels, result.num_classes).double() * float(first)
        sums = {"sum": one_hot.T @ features, "count": one_hot.sum(dim=0)}
        if self.options.rule == "ridge":
            sums["second"] = features.T @ features * float(first)
        return Finished(
            sent={name: value.float() for name, value in sums.items()},
            kept={"sent": torch.ones(1)},
        )

    def combine(
        self,
        before: Parts,
        mean: Parts,
        updates: Sequence[ClientUpdate],
        num_clients: int,
        memory: Tensors,
    ) -> tuple[Parts, Tensors]:
        """Add the clients' sums to those of earlier rounds and solve for the head.

        Args:
            before: the shared tensors before the round.
            mean: those that the clients returned, averaged with `weights`.
            updates: the round's good updates.
            num_clients: clients of the whole federation.
            memory: what this method returned the last time; empty at first.
        """
        weight = before.head[WEIGHT]
        total = dict(memory) or _nothing(weight, self.options.rule)
        for update in updates:
            _add(total, update.shared.objective, self.options.rule)
        return Parts(head={WEIGHT: solve(total, self.options).to(weight.dtype)}), total


def _nothing(weight: Tensor, rule: str) -> dict[str, Tensor]:
    """Sums of no client, in float64: see `solve`."""
    classes, width = weight.shape
    shapes: dict[str, tuple[int, ...]] = {"sum": (classes, width), "count": (classes,)}
    if rule == "cof":
        shapes |= {"sums": (0, classes, width), "counts": (0, classes)}
    if rule == "ridge":
        shapes |= {"second": (width, width)}
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}


def _add(total: dict[str, Tensor], sent: Tensors, rule: str) -> None:
    """Add one client's sums in place of the entries of `total`."""
    sums, count = sent["sum"].double(), sent["count"].double()
    total["sum"] = total["sum"] + sums
    total["count"] = total["count"] + count
    if rule == "cof" and count.any():
        total["sums"] = torch.cat([total["sums"], sums[None]])
        total["counts"] = torch.cat([total["counts"], count[None]])
    if rule == "ridge":
        total["second"] = total["second"] + sent["second"].double()


def solve(total: Tensors, options: ClosedFormOptions) -> Tensor:
    """The head's weight (C, d) from sums over all clients, float64.

    Args:
        total: `sum` (C, d) and `count` (C,) of each class; for `cof` `sums` (K, C, d) and `counts`
            (K, C) of each client; for `ridge` `second` (d, d).
        options: rule and regularisation.

    Raises:
        RoundError: no class is held by two clients, and the rule is `cof`.
    """
    count = total["count"]
    means = total["sum"] / count.clamp_min(1)[:, None]
    if options.rule == "ncm":
        return F.normalize(means, dim=1)
    scatter = total["second"] if options.rule == "ridge" else _scatter(total, means, options)
    identity = torch.eye(means.shape[1], dtype=means.dtype)
    weight = torch.linalg.solve(scatter + options.ridge * identity, total["sum"].T).T
    return weight if options.rule == "ridge" else F.normalize(weight, dim=1)


def _scatter(total: Tensors, means: Tensor, options: ClosedFormOptions) -> Tensor:
    """G of `cof`: (d, d). A matrix for each class is never formed: G is one weighted sum over all
    clients' class means.
    """
    count, counts, width = total["count"], total["counts"], means.shape[1]
    degrees = (counts > 0).sum(dim=0) - 1  # K_c - 1
    known = degrees > 0
    if not known.any():
        raise RoundError(
            f"objective.rule=cof: expected a class that two clients hold, got {len(counts)} "
            f"{'client' if len(counts) == 1 else 'clients'} without a common one: the spread of "
            "their means is all it knows; let more clients take part or use objective.rule=ncm"
        )
    share = torch.where(known, 1 / degrees.clamp_min(1), 0.0)
    away = total["sums"] / counts.clamp_min(1)[:, :, None] - means
    spread = counts * away.square().sum(dim=2) * share  # (K, C); its sum is the trace of Sigma_c
    number = known.sum()
    freedom = (count - 1).clamp_min(0)
    # A class that one client holds shows no spread of means: it gets the average of the others.
    factor = share * (freedom + freedom[~known].sum() / number)
    scaled = (away * (counts * factor).sqrt()[:, :, None]).flatten(0, 1)
    identity = torch.eye(width, dtype=means.dtype)
    unit = spread.sum() / number / width
    within = scaled.T @ scaled + options.shrinkage * unit * freedom.sum() * identity
    if options.between:
        return within + torch.einsum("cd,ce,c->de", means, means, count)
    centre = total["sum"].sum(dim=0) / count.sum().clamp_min(1)
    return within + count.sum() * torch.outer(centre, centre)
