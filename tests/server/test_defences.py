"""Defences: each rule on paper, and what a round makes of attackers with and without them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from fedprompt import aggregation
from fedprompt.config import ExperimentConfig, compose
from fedprompt.core.errors import ConfigError, RoundError
from fedprompt.core.plugins import load_plugins
from fedprompt.core.types import Broadcast, ClientJob, ClientUpdate, Parts
from fedprompt.defences import Defence, Defended, Updates, defences
from fedprompt.experiment import execute, plan_run
from fedprompt.server.merge import merge_shared
from fedprompt.server.round import defend

Overrides = Callable[..., list[str]]
DIM = 2


def update(client: int, head: float, rows: dict[int, float], key: float = 0.0) -> ClientUpdate:
    """A client whose head has one number, and of whose prompts each row is one number repeated."""
    values = torch.tensor([[value] * DIM for value in rows.values()]).reshape(-1, DIM)
    return ClientUpdate(
        client_id=client,
        round_index=1,
        num_examples=client + 1,
        prompts=values,
        keys=torch.full((len(rows), 1), key),
        origins=torch.tensor(list(rows), dtype=torch.int64),
        use_counts=torch.ones(len(rows), dtype=torch.int64),
        shared=Parts(head={"w": torch.tensor([head])}, objective={"own": torch.tensor([head])}),
    )


def given(updates: list[ClientUpdate], head: float = 0.0) -> Updates:
    """All clients received a head and three prompts of zeros."""
    before = Broadcast(
        torch.zeros(3, DIM), torch.zeros(3, 1), Parts(head={"w": torch.tensor([head])})
    )
    return Updates(updates, before, {each.client_id: before.prompts for each in updates})


def test_changes_are_laid_out_by_broadcast_row() -> None:
    laid = given([update(0, 3.0, {2: 5.0, 0: 1.0}), update(1, 1.0, {})], head=1.0)
    # Head less what was broadcast, the objective's own as it was sent, then the rows 0, 1, 2.
    expected = [[2.0, 3.0, 1, 1, 0, 0, 5, 5], [0.0, 1.0, 0, 0, 0, 0, 0, 0]]
    assert laid.changes().tolist() == expected


def test_clipping_on_paper() -> None:
    """Norms 0, 2 and 10: the median is 2, and the last is scaled by 0.2."""
    updates = [
        update(0, 1.0, {}),
        update(1, 1.0, {1: 2.0**0.5}),
        update(2, 1.0, {0: 50.0**0.5}),
    ]
    updates = [dataclasses.replace(each, shared=Parts(head=each.shared.head)) for each in updates]
    made = defences.create("clip").defend(given(updates, head=1.0))
    torch.testing.assert_close(made.updates[2].prompts, torch.full((1, DIM), 2.0**0.5))
    assert made.updates[:2] == updates[:2]
    assert made.actions == {2: "clipped to 0.2 of its length"}
    assert updates[2].prompts[0, 0] == pytest.approx(50.0**0.5)
    bound = defences.create("clip", bound=1.0).defend(given(updates, head=1.0))
    assert set(bound.actions) == {1, 2}
    assert bound.updates[1].prompts.norm() == pytest.approx(1.0)


@pytest.mark.parametrize(("name", "centre"), [("median", 2.0), ("trimmed_mean", (1 + 2 + 4) / 3)])
def test_robust_means_on_paper(name: str, centre: float) -> None:
    """The attacker is client 4; row 1 was used by the first three, row 2 by the attacker alone."""
    heads = [1.0, 2.0, 0.0, 4.0, 1e9]
    rows: list[dict[int, float]] = [{1: 1.0}, {1: 5.0}, {1: 7.0}, {}, {2: -9.0}]
    updates = [
        update(n, *each, key=heads[n]) for n, each in enumerate(zip(heads, rows, strict=True))
    ]
    made = defences.create(name).defend(given(updates))
    weights = [5.0, 4.0, 3.0, 2.0, 1e6]
    mean = merge_shared(made.updates, weights)
    assert mean.head["w"].item() == pytest.approx(centre)
    assert mean.objective["own"].item() == pytest.approx(centre)
    middle = {"median": (5.0, 1.0), "trimmed_mean": (5.0, 1.0)}[name]
    for each in made.updates[:3]:
        assert each.prompts.tolist() == [[middle[0]] * DIM]
        assert each.keys.tolist() == [[middle[1]]]
    assert made.updates[3].prompts.shape == (0, DIM)
    assert made.updates[4].prompts.tolist() == [[-9.0] * DIM]
    assert made.actions == {}


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    """Against a general minimiser."""
    points = np.random.default_rng(0).normal(size=(7, 3))
    points[0] *= 1e3
    found = defences.create("geometric_median").centre(points)  # type: ignore[attr-defined]

    def total(point: np.ndarray) -> float:
        return float(np.linalg.norm(points - point, axis=1).sum())

    best = minimize(total, points.mean(axis=0), method="Nelder-Mead", options={"maxiter": 5000})
    assert total(found) == pytest.approx(best.fun, rel=1e-6)


def test_krum_against_a_loop() -> None:
    """Seven clients, f = 2: the score is the sum of the squared distances to 7 - 2 - 2 others."""
    heads = [0.0, 1.0, 95.0, 3.0, 3.5, 2.2, 90.0]
    updates = [update(n, head, {}) for n, head in enumerate(heads)]
    # The head and the objective's tensor are alike: each squared distance counts twice.
    scores = [sum(sorted(2 * (mine - other) ** 2 for other in heads)[1:4]) for mine in heads]
    order = sorted(range(7), key=scores.__getitem__)
    many = defences.create("krum", share=0.25).defend(given(updates))
    assert [each.client_id for each in many.updates] == sorted(order[:5]) == [0, 1, 3, 4, 5]
    assert many.actions == {2: "left out", 6: "left out"}
    one = defences.create("krum", share=0.25, keep=1).defend(given(updates))
    assert [each.client_id for each in one.updates] == order[:1]


@pytest.mark.parametrize("name", [name for name in defences.names() if name != "none"])
def test_a_defence_keeps_shapes_and_its_inputs(name: str) -> None:
    """Of every registered rule: what it returns can be merged, and what it got is as it was."""
    generator = torch.Generator().manual_seed(0)
    updates = []
    for client in range(7):
        rows = torch.randperm(3, generator=generator)[: client % 4]
        drawn = {int(row): float(torch.randn((), generator=generator)) for row in rows}
        updates.append(update(client, float(client), drawn))
    copies = [{path: x.clone() for path, x in each.tensors().items()} for each in updates]
    made = defences.create(name).defend(given(updates))
    assert made.updates
    known = {each.client_id: each for each in updates}
    for each in made.updates:
        before = known[each.client_id]
        assert torch.equal(each.origins, before.origins)
        assert each.num_examples == before.num_examples
        for path, tensor in each.tensors().items():
            like = before.tensors()[path]
            assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
            assert torch.isfinite(tensor).all()
    ids = [each.client_id for each in made.updates]
    assert ids == sorted(set(ids))
    for each, copy in zip(updates, copies, strict=True):
        assert all(torch.equal(copy[path], x) for path, x in each.tensors().items())
    alone = defences.create(name).defend(given(updates[:1]))
    assert [each.client_id for each in alone.updates] == [0]


@pytest.mark.usefixtures("forgotten_plugins")
def test_the_documented_rule(tmp_path: Path) -> None:
    """The program of docs/aggregation.md, as a plug-in."""
    text = (Path(__file__).parents[2] / "docs" / "aggregation.md").read_text()
    [program] = [
        block
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if block.startswith('"""Leaves out the longest')
    ]
    file = tmp_path / "longest_out.py"
    file.write_text(program)
    load_plugins([str(file)])
    updates = [update(n, head, {}) for n, head in enumerate((1.0, -7.0, 2.0))]
    made = defences.create("longest_out").defend(given(updates))
    assert [each.client_id for each in made.updates] == [0, 2]
    assert made.actions == {1: "left out"}


# Whole runs: 20 % of the clients multiply what they trained by -100.

COMMON = (
    *("method=head_only", "prompts.count=0", "clients.count=10", "clients.per_round=10"),
    *("clients.epochs=2", "rounds=2", "head=linear", "head.lr=0.03", "partition=iid"),
    *("eval_every=2", "eval_clients=never", "eval_alone=never", "model.backbone=nano"),
    "data={name: digits, train: 0.3, validation: 0.05, test: 0.3}",
)


def composed(tiny: Overrides, *changes: str) -> ExperimentConfig:
    return compose("digits", tiny(*COMMON, "clients.batch_size=16", *changes))


@pytest.fixture
def accuracy(tiny: Overrides) -> Callable[..., float]:
    def of(*changes: str) -> float:
        result = execute(plan_run(composed(tiny, *changes), True))
        marked = [client for report in result.reports for client in report["clients"]]
        attackers = {each["client"] for each in marked if each.get("attacks")}
        assert len(attackers) == (2 if changes else 0)
        if "defence=krum" in changes:
            out = {each["client"] for each in marked if each.get("defence") == "left out"}
            assert out == attackers
        return float(result.reports[-1]["accuracy"])

    return of


def test_scaled_updates_ruin_the_mean_and_not_the_median_or_krum(
    accuracy: Callable[..., float],
) -> None:
    attack = ("attack=scale", "attack.factor=-100")
    clean = accuracy()
    assert clean > 0.85
    assert accuracy(*attack) < 0.3
    for defence in ("median", "krum"):
        assert accuracy(*attack, f"defence={defence}") > clean - 0.05


def test_a_defence_of_nothing_is_not_asked() -> None:
    updates = [update(0, 1.0, {})]
    used, actions = defend(updates, [], defences.create("none"))
    assert used is updates
    assert actions == {}


class Greedy(Defence):
    """Leaves nothing."""

    def defend(self, given: Updates) -> Defended:
        return Defended([])


def test_a_defence_that_leaves_nothing_is_named() -> None:
    job = ClientJob(0, 4, 0, Broadcast(torch.zeros(3, DIM), torch.zeros(3, 1)))
    with pytest.raises(RoundError, match="round 4: Greedy left none of 1 updates; expected a defe"):
        defend([update(0, 1.0, {})], [job], Greedy(None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["defence=median"],
            "defence=median: needs prompts .* with aggregator=pfpt it is not; use",
        ),
        (["method=gmm_pt", "defence=trimmed_mean"], "with aggregator=gmm it is not"),
        (["method=pfedpg", "defence=geometric_median"], "with generator=pfedpg it is not"),
        (["method=fedcof", "defence=clip"], "defence=clip: compares trained tensors, and with obj"),
        (
            ["defence=krum", "clients.per_round=4"],
            r"defence=krum: expected at least 2 f \+ 3 .* got 4 ",
        ),
        (["defence=clip", "defence.bound=0"], r"defence\.bound: expected a finite number > 0"),
        (["defence=trimmed_mean", "defence.share=0.5"], r"defence\.share: .* < 0.5, got 0.5"),
        (["defence=medan"], "unknown defence 'medan': expected one of .*did you mean 'median'"),
    ],
)
def test_what_is_not_defined_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("digits", ["compare=[]", *options])


@pytest.mark.parametrize("method", ["head_only", "local_only"])
def test_rules_for_rows_go_with_methods_that_send_no_prompts(method: str) -> None:
    compose("digits", ["compare=[]", f"method={method}", "defence=median"])


def test_without_attackers_clipping_by_a_wide_bound_changes_nothing(tiny: Overrides) -> None:
    plain, wide = (
        execute(plan_run(composed(tiny, "rounds=1", *changes), True))
        for changes in ((), ("defence=clip", "defence.bound=1e9"))
    )
    assert plain.state.sha256() == wide.state.sha256()


@pytest.mark.parametrize("rule", ["clip", "krum"])
def test_rules_for_any_prompts_go_with_matching(tiny: Overrides, rule: str) -> None:
    """PFPT with an attacker: a round ends, and what travels stays finite."""
    changes = ("method=pfpt", "prompts.selection=keyed", "clients.per_round=5", f"defence={rule}")
    attack = ("attack=scale", "attack.factor=1e6", "rounds=1")
    result = execute(plan_run(compose("digits", tiny(*changes, *attack)), True))
    [last] = result.reports
    assert [each for each in last["clients"] if "defence" in each]
    assert result.state.prompts.abs().max() < 100


def test_the_median_of_rows_is_what_the_aggregator_averages() -> None:
    """The whole way of a prompt: a mean of identical rows is the row."""
    updates = [update(n, 0.0, {0: float(value)}) for n, value in enumerate((1, 2, 1000))]
    made = defences.create("median").defend(given(updates))
    merged = aggregation.create("mean").aggregate(
        [each.prompts for each in made.updates],
        weights=torch.tensor([1.0, 1.0, 50.0]),
        origins=[each.origins for each in made.updates],
        previous=torch.zeros(3, DIM),
    )
    expected: Tensor = torch.zeros(3, DIM)
    expected[0] = 2.0
    assert torch.equal(merged.prompts, expected)
