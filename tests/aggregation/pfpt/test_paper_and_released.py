"""The literal forms of PFPT against the released code's numbers, slow loops, scipy and pencil."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from fedprompt.aggregation import Aggregation, AggregationInput
from fedprompt.aggregation.pfpt.candidates import Fit
from fedprompt.aggregation.pfpt.nets import PromptNets, state_shapes
from fedprompt.aggregation.pfpt.options import LiteralOptions
from fedprompt.aggregation.pfpt.paper import Model, aggregate_paper, paper_matching
from fedprompt.aggregation.pfpt.released import (
    aggregate_released,
    released_matching,
    released_objective,
    released_scores,
)
from fedprompt.core.errors import ConfigError, InputError

ROOT = Path(__file__).parents[3]
REFERENCE = Path(os.environ.get("FEDPROMPT_REFERENCE_DIR", ROOT.parent / "shared" / "reference"))
SLOW = ROOT / "benchmarks" / "released_loop.py"
FAST = LiteralOptions(loops=3, net_hidden=8)

Array = NDArray[np.float64]
Variant = Callable[..., Aggregation]
both = pytest.mark.parametrize("variant", [aggregate_released, aggregate_paper])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(variant: Variant, prompt_sets: list[Tensor], **changes: Any) -> Aggregation:
    """With the options and random numbers of the tests; the rest goes to the input."""
    options = changes.pop("options", FAST)
    return variant(AggregationInput(prompt_sets, **{"generator": generator(), **changes}), options)


def random_case(
    sizes: tuple[int, ...], d: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor], PromptNets]:
    """Prompts around shared centres, a first assignment and fresh networks."""
    source = generator(seed)
    centres = torch.randn(max(sizes), d, generator=source, dtype=dtype)
    prompt_sets = [
        centres[:size] + 0.1 * torch.randn(size, d, generator=source, dtype=dtype) for size in sizes
    ]
    initial = [torch.randperm(sum(sizes), generator=source)[:size] for size in sizes]
    return prompt_sets, initial, PromptNets(d, 6, source, dtype)


def zero_nets(d: int, dtype: torch.dtype = torch.float64) -> PromptNets:
    """alpha = 1/2 and g = 0 for every prompt."""
    nets = PromptNets(d, 2, generator(), dtype)
    with torch.no_grad():
        for parameter in nets.parameters():
            parameter.zero_()
    return nets


# The released code's numbers.


def reference_files() -> list[Path]:
    pattern = "released_aggregation_*.safetensors"
    return sorted(REFERENCE.glob(pattern)) if REFERENCE.is_dir() else []


@pytest.mark.skipif(not reference_files(), reason="no reference vectors (FEDPROMPT_REFERENCE_DIR)")
@pytest.mark.parametrize("path", reference_files(), ids=lambda path: path.stem)
def test_equal_to_the_released_code(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        loops = int(file.metadata()["outer_loop"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = {"init.cov_net.": "variance_net.", "init.bernoulli_net.": "inclusion_net."}
    weights = {
        name.replace(theirs, ours): value
        for name, value in tensors.items()
        for theirs, ours in names.items()
        if name.startswith(theirs)
    }
    fit = released_matching(
        list(tensors["local_prompts"]),
        list(tensors["initial_assignment"]),
        PromptNets.from_state(weights),
        loops,
    )
    assert torch.equal(torch.stack(fit.assignment), tensors["final_assignment"])
    kept = fit.candidates[torch.cat(fit.assignment).unique()]
    torch.testing.assert_close(kept, tensors["global_prompts"], rtol=1e-5, atol=1e-5)


def released_per_candidate() -> Callable[..., Fit]:
    spec = importlib.util.spec_from_file_location("released_loop", SLOW)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Fit] = module.released_per_candidate
    return function


@pytest.mark.parametrize(
    ("sizes", "d", "seed"), [((4, 4, 4), 8, 0), ((3, 0, 5, 1), 16, 1), ((6,), 3, 2)]
)
def test_vectorised_equals_the_loop_over_candidates(
    sizes: tuple[int, ...], d: int, seed: int
) -> None:
    prompt_sets, initial, nets = random_case(sizes, d, seed)
    given = [tensor.clone() for tensor in [*prompt_sets, *initial, *nets.to_state().values()]]
    fast = released_matching(prompt_sets, initial, nets, loops=6)
    slow = released_per_candidate()(prompt_sets, initial, nets, loops=6)
    for mine, theirs in zip(fast.assignment, slow.assignment, strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(fast.candidates, slow.candidates, rtol=1e-5, atol=1e-5)
    for name, value in fast.nets.to_state().items():
        torch.testing.assert_close(value, slow.nets.to_state()[name], rtol=1e-5, atol=1e-5)
    after = [*prompt_sets, *initial, *nets.to_state().values()]
    assert all(torch.equal(left, right) for left, right in zip(given, after, strict=True))


# Scores and objectives, one pair at a time.


def test_released_scores_are_the_described_sum() -> None:
    prompt_sets, initial, nets = random_case((3, 4), 5, 3, torch.float64)
    candidates = torch.cat(prompt_sets) + 0.3
    local, mine = prompt_sets[1], initial[1]
    deviation = nets.alpha(candidates).detach().numpy()
    chance = torch.sigmoid(nets.inclusion_logit(candidates)).detach().numpy()
    expected = np.zeros((4, 7))
    for k in range(4):
        for i in range(7):
            gaussian = stats.norm.logpdf(local[k], candidates[i], deviation[i]).sum()
            bernoulli = stats.bernoulli.logpmf(int(i in mine.tolist()), chance[i])
            expected[k, i] = gaussian + 4 * bernoulli
    scores = released_scores(local, mine, candidates, nets)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-9)

    total = 0.0  # pairs in use, and the used half of the Bernoulli term alone
    for prompts, rows in zip(prompt_sets, initial, strict=True):
        for prompt, i in zip(prompts, rows.tolist(), strict=True):
            total += stats.norm.logpdf(prompt, candidates[i], deviation[i]).sum()
            total += len(prompts) * stats.bernoulli.logpmf(1, chance[i])
    value = released_objective(prompt_sets, initial, candidates, nets)
    assert value == pytest.approx(total, rel=1e-9)


def test_paper_scores_and_objective_are_the_equations() -> None:
    prompt_sets, initial, nets = random_case((3, 4, 0), 5, 4, torch.float64)
    points = torch.cat(prompt_sets)
    model = Model.of(points + 0.3, nets, variance_floor=0.01)
    phi, alpha, g = (t.detach().numpy() for t in (model.candidates, model.variance, model.logit))
    np.testing.assert_allclose(alpha, 0.01 + 0.99 * nets.alpha(points + 0.3).detach().numpy())

    def log_normal(prompt: Tensor, i: int) -> float:
        return float(stats.multivariate_normal.logpdf(prompt, phi[i], np.diag(alpha[i])))

    def log_bernoulli(used: int, i: int) -> float:
        return float(stats.bernoulli.logpmf(used, 1 / (1 + math.exp(-g[i]))))

    table = [
        [log_normal(p, i) + log_bernoulli(1, i) - log_bernoulli(0, i) for i in range(7)]
        for p in points
    ]  # Eq. 27
    np.testing.assert_allclose(model.scores(points).detach().numpy(), table, rtol=1e-9)

    total = 0.0
    for prompts, rows in zip(prompt_sets, initial, strict=True):
        total += sum(log_normal(p, i) for p, i in zip(prompts, rows.tolist(), strict=True))  # Eq. 9
        total += sum(log_bernoulli(int(i in rows.tolist()), i) for i in range(7))  # Eq. 10
    value = model.objective(points, torch.cat(initial), num_clients=3)
    assert value.item() == pytest.approx(total, rel=1e-9)


def test_a_better_score_is_a_better_objective() -> None:
    # Both terms are linear in z: moving a prompt from one candidate to another changes the
    # objective by the difference of the two scores of Eq. 27.
    prompt_sets, initial, nets = random_case((3, 3), 4, 5, torch.float64)
    points = torch.cat(prompt_sets)
    model = Model.of(points, nets, 1e-6)
    free = next(i for i in range(6) if i not in initial[0].tolist())
    moved = torch.cat(initial)
    before, old = model.objective(points, moved, 2).item(), int(moved[1])
    moved[1] = free
    gain = model.objective(points, moved, 2).item() - before
    scores = model.scores(points)
    assert gain == pytest.approx((scores[1, free] - scores[1, old]).item(), rel=1e-9)


# Pencil.


def test_paper_with_two_prompts_by_hand() -> None:
    """alpha = 1/2, g = 0, prompts 0 and 1 of two clients: to merge costs 1 / (2 alpha) = 1."""
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    model = Model.of(points, zero_nets(1), 1e-12)
    own = -0.5 * math.log(math.pi)  # log N(x | x, 1/2)
    expected = torch.tensor([[own, own - 1], [own - 1, own]], dtype=torch.float64)
    torch.testing.assert_close(model.scores(points), expected)
    # Each candidate: used once, unused once; or one used twice and the other unused twice.
    bernoulli = 4 * math.log(0.5)
    apart = model.objective(points, torch.tensor([0, 1]), 2)
    merged = model.objective(points, torch.tensor([0, 0]), 2)
    assert apart.item() == pytest.approx(2 * own + bernoulli)
    assert merged.item() == pytest.approx(2 * own - 1 + bernoulli)


def test_released_scores_by_hand() -> None:
    """The same two prompts with standard deviation 1/2; client of one prompt uses the other."""
    points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    scores = released_scores(points[:1], torch.tensor([1]), points, zero_nets(1))
    own = -0.5 * math.log(2 * math.pi) + math.log(2) + math.log(0.5)
    torch.testing.assert_close(scores, torch.tensor([[own, own - 2]], dtype=torch.float64))


@pytest.mark.parametrize("form", ["released", "paper"])
def test_first_steps_by_hand(form: str) -> None:
    """A single prompt: all that can be learned is that it is used and has no spread.

    With zero weights only the last biases have a gradient, and Adam's first steps are `lr` each.
    """
    prompts, nets = torch.tensor([[3.0, -1.0]], dtype=torch.float64), zero_nets(2)
    if form == "released":
        fit = released_matching([prompts], [torch.tensor([0])], nets, loops=1, lr=0.01)
        moved = 0.01
    else:
        fit = paper_matching([prompts], nets, LiteralOptions(loops=1, net_lr=0.001, net_hidden=2))
        moved = 0.01
    state = fit.nets.to_state()
    assert torch.equal(fit.candidates, prompts)
    assert state["inclusion_net.2.bias"].item() == pytest.approx(moved, rel=1e-2)
    assert state["variance_net.2.bias"].tolist() == pytest.approx([-moved] * 2, rel=1e-2)
    assert not state["variance_net.0.weight"].any()
    assert fit.objective_after > fit.objective_before


# What the variants do.


@pytest.mark.parametrize("seed", range(4))
def test_paper_objective_never_ends_lower(seed: int) -> None:
    prompt_sets, _, nets = random_case((4, 3, 5), 6, seed, torch.float64)
    for lr in (1e-3, 1.0):  # far too large a rate: the start is the best
        fit = paper_matching(prompt_sets, nets, LiteralOptions(loops=4, net_lr=lr))
        assert fit.objective_after >= fit.objective_before
        flat, points = torch.cat(fit.assignment), torch.cat(prompt_sets)
        model = Model.of(fit.candidates, fit.nets, LiteralOptions().variance_floor)
        assert model.objective(points, flat, 3).item() == pytest.approx(fit.objective_after)
        assert all(len(rows.unique()) == len(rows) for rows in fit.assignment)


@pytest.mark.filterwarnings("ignore:The number of unique classes")
def test_without_a_price_little_merges() -> None:
    """Ten planted prompts, five clients, far apart."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(10, 64))
    picks = [rng.permutation(10) for _ in range(5)]
    sets = [torch.tensor(true[p] + 0.05 * rng.normal(size=(10, 64))).float() for p in picks]

    def outcome(variant: Variant) -> tuple[int, float]:
        result = run(variant, sets, options=LiteralOptions())
        found = torch.cat(result.assignment).numpy()
        return len(result.prompts), float(adjusted_rand_score(np.concatenate(picks), found))

    assert outcome(aggregate_paper) == (50, 0.0)
    number, agreement = outcome(aggregate_released)
    assert number >= 35
    assert agreement < 0.3


@both
def test_diagnostics_and_prompts_belong_together(variant: Variant) -> None:
    prompt_sets, _, _ = random_case((4, 3, 5), 6, 0)
    result = run(variant, prompt_sets, previous=torch.zeros(2, 6))
    figures = result.diagnostics
    assert set(figures) == {
        *("num_prompts", "kept", "born", "merged", "pruned", "matched_distance", "sweeps"),
        *("objective_before", "objective_after", "inclusion_entropy"),
    }
    number = len(result.prompts)
    assert figures["born"] == figures["num_prompts"] == number
    assert (figures["kept"], figures["pruned"], figures["sweeps"]) == (0, 2, FAST.loops)
    assert figures["merged"] == 12 - number
    assert 0 < figures["inclusion_entropy"] <= math.log(2)
    assert torch.equal(torch.cat(result.assignment).unique(), torch.arange(number))
    assert all(len(rows.unique()) == len(rows) for rows in result.assignment)


def test_matched_distance_and_entropy_from_the_result_alone() -> None:
    prompt_sets, _, _ = random_case((6, 6, 6), 6, 0)
    result = run(aggregate_released, prompt_sets)
    figures, flat = result.diagnostics, torch.cat(result.assignment)
    assert figures["merged"] > 0
    nets = PromptNets.from_state(result.state)
    deviation = nets.alpha(result.prompts).detach().numpy()
    users = np.bincount(flat.numpy())
    units = [
        (prompt - result.prompts[row]).numpy() / deviation[row]
        for prompt, row in zip(torch.cat(prompt_sets), flat.tolist(), strict=True)
        if users[row] > 1
    ]
    expected = math.sqrt(float(np.mean(np.square(units))))
    assert figures["matched_distance"] == pytest.approx(expected, rel=1e-5)
    chance = torch.sigmoid(nets.inclusion_logit(result.prompts)).detach().numpy()
    entropy = np.mean([stats.bernoulli(p).entropy() for p in chance])
    assert figures["inclusion_entropy"] == pytest.approx(float(entropy), rel=1e-4)


@both
def test_keys_are_means_over_members(variant: Variant) -> None:
    prompt_sets, _, _ = random_case((3, 3), 4, 1)
    keys = [torch.randn(3, 2, generator=generator(t), dtype=torch.float64) for t in range(2)]
    result = run(variant, prompt_sets, keys=keys, options=LiteralOptions(loops=1, net_hidden=4))
    assert result.keys is not None
    assert result.keys.dtype == torch.float64
    flat, stacked = torch.cat(result.assignment), torch.cat(keys)
    for row, key in enumerate(result.keys):
        torch.testing.assert_close(key, stacked[flat == row].mean(dim=0))
    assert run(variant, prompt_sets, previous_keys=None).keys is None


# State, randomness, gradients.


@both
def test_networks_continue_in_the_next_round(variant: Variant) -> None:
    prompt_sets, _, _ = random_case((4, 3), 6, 2)
    first = run(variant, prompt_sets)
    assert {name: tuple(v.shape) for name, v in first.state.items()} == state_shapes(6, 8)
    second = run(variant, prompt_sets, state=first.state, generator=generator(9))
    for name, value in second.state.items():
        assert not torch.equal(value, first.state[name])
        assert float((value - first.state[name]).abs().max()) < 0.05  # at most 30 steps of 1e-3
    # The same networks, given as state, do the same as when drawn.
    source, dtype = generator(), first.state["variance_net.2.bias"].dtype
    drawn = PromptNets(6, 8, source, dtype).to_state()
    again = run(variant, prompt_sets, state=drawn, generator=source)
    assert torch.equal(again.prompts, first.prompts)
    with pytest.raises(InputError, match=r"state 'variance_net.0.weight': expected shape \(9, 6\)"):
        run(variant, prompt_sets, state=first.state, options=LiteralOptions(net_hidden=9))
    with pytest.raises(InputError, match=r"state 'variance_net.0.weight': .* got nothing"):
        run(variant, prompt_sets, state={"strength": torch.zeros(1)})


@both
def test_nothing_random_but_the_generator(variant: Variant) -> None:
    prompt_sets, _, _ = random_case((4, 3), 6, 2)
    before = torch.get_rng_state()
    default = run(variant, prompt_sets, generator=None)
    assert torch.equal(torch.get_rng_state(), before)
    again = run(variant, prompt_sets, generator=None)
    other = run(variant, prompt_sets, generator=generator(5))
    assert torch.equal(default.prompts, again.prompts)
    assert not torch.equal(
        default.state["variance_net.0.weight"], other.state["variance_net.0.weight"]
    )


@both
def test_no_graph_leaves_and_callers_may_switch_gradients_off(variant: Variant) -> None:
    prompt_sets, _, _ = random_case((4, 3), 6, 2)
    prompt_sets[0].requires_grad_()
    plain = run(variant, prompt_sets)
    assert not any(t.requires_grad for t in [plain.prompts, *plain.state.values()])
    for switch in (torch.no_grad, torch.inference_mode):
        with switch():
            other = run(variant, prompt_sets)
        assert torch.equal(plain.prompts, other.prompts)
    assert prompt_sets[0].grad is None


def test_networks_travel_in_a_flat_state() -> None:
    nets = PromptNets(5, 3, generator(), torch.float64)
    state = {**nets.to_state("nets."), "other": torch.zeros(1)}
    copied = PromptNets.from_state(state, "nets.", torch.float64)
    state["nets.variance_net.0.weight"].zero_()
    prompts = torch.randn(4, 5, generator=generator(), dtype=torch.float64)
    assert torch.equal(copied.alpha(prompts), nets.alpha(prompts))
    assert torch.equal(copied.inclusion_logit(prompts), nets.inclusion_logit(prompts))
    assert copied.inclusion_logit(prompts).shape == (4,)


def test_fresh_weights_are_spread_as_in_torch() -> None:
    ours = PromptNets(100, 50, generator()).to_state()["variance_net.0.weight"]
    theirs = torch.nn.Linear(100, 50).weight.detach()
    assert float(ours.abs().max()) <= 0.1
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.05)


# Edges.


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "sizes", [(1,), (5,), (1, 1), (0, 3, 0), (4, 0, 1)], ids=lambda sizes: "-".join(map(str, sizes))
)
def test_small_and_empty_sets(variant: Variant, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    prompt_sets, _, _ = random_case(sizes, 3, 0, dtype)
    result = run(variant, prompt_sets)
    assert result.prompts.dtype == dtype
    assert result.prompts.isfinite().all()
    assert [len(rows) for rows in result.assignment] == list(sizes)
    if sizes == (1,):
        torch.testing.assert_close(result.prompts, prompt_sets[0], rtol=0, atol=0.01)


@both
def test_only_empty_sets(variant: Variant) -> None:
    empty = [torch.zeros(0, 3)] * 2
    previous, keys = torch.arange(6.0).reshape(2, 3), torch.ones(2, 1)
    result = run(variant, empty, previous=previous, previous_keys=keys)
    assert torch.equal(result.prompts, previous)
    assert result.keys is not None
    assert torch.equal(result.keys, keys)
    assert result.diagnostics["kept"] == result.diagnostics["num_prompts"] == 2
    assert run(variant, empty, previous=previous, state=result.state).state.keys() == (
        result.state.keys()
    )
    with pytest.raises(InputError, match="expected at least one prompt from some client"):
        run(variant, empty)


def test_identical_prompts() -> None:
    sets = [torch.full((3, 4), 0.25)] * 3
    paper = run(aggregate_paper, sets)
    assert torch.equal(paper.prompts, torch.full_like(paper.prompts, 0.25))
    released = run(aggregate_released, sets)
    assert released.prompts.isfinite().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paper_is_free_of_scale(scale: float, dtype: torch.dtype) -> None:
    prompt_sets, _, _ = random_case((4, 3), 6, 2, dtype)
    plain = run(aggregate_paper, prompt_sets)
    scaled = run(aggregate_paper, [scale * prompts for prompts in prompt_sets])
    for left, right in zip(plain.assignment, scaled.assignment, strict=True):
        assert torch.equal(left, right)
    torch.testing.assert_close(scaled.prompts / scale, plain.prompts, rtol=1e-4, atol=1e-4)


def test_released_is_finite_or_refuses() -> None:
    prompt_sets, _, _ = random_case((4, 3), 6, 2, torch.float64)
    for scale in (1e-300, 1e-30, 1e-3, 1.0):
        result = run(aggregate_released, [scale * prompts for prompts in prompt_sets])
        assert result.prompts.isfinite().all()
    for scale in (1e10, 1e30, 1e300):
        with pytest.raises(InputError, match="variant 'released' works in float32"):
            run(aggregate_released, [scale * prompts for prompts in prompt_sets])


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("loops", [0, 1.5, True, "2"], "an integer >= 1"),
        ("net_hidden", [0, -1, None], "an integer >= 1"),
        ("net_lr", [0, -1e-3, math.nan, math.inf, "x", True], "a finite number > 0"),
        ("variance_floor", [0, 1, -1, math.nan, "x"], "a finite number > 0 and < 1"),
    ],
)
def test_options_are_checked(name: str, values: list[Any], expected: str) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=rf"aggregator\.{name}: expected {expected}, got"):
            LiteralOptions(**{name: value})
