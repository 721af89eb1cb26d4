"""Client-level privacy: the mechanism on paper, its epsilon, and what a run sends and says."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.stats import norm

import fedprompt
from fedprompt.client.privacy import GaussianMechanism
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.core.types import Broadcast, ClientState, ClientUpdate, Parts
from fedprompt.runs.events import RoundFinished
from fedprompt.server.privacy import (
    Accountant,
    PrivacyOptions,
    epsilon_of,
    multiplier_for,
)

Overrides = Callable[..., list[str]]
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason="needs the extra privacy"
)
DELTA = 1e-5
PRIVATE = ("privacy.unit=client", "privacy.clip=0.5", "privacy.delta=1e-5", "eval_clients=never")
QUICK = ("clients.batch_size=64", "prompts.depth=4")


def received(rows: int = 3) -> Broadcast:
    head = Parts(head={"w": torch.tensor([10.0])})
    return Broadcast(torch.ones(rows, 2), torch.zeros(rows, 0), head)


def update(rows: dict[int, float], head: float, examples: int = 5) -> ClientUpdate:
    """A client that moved some prompts of ones by a number each, and the head by another."""
    return ClientUpdate(
        client_id=1,
        round_index=1,
        num_examples=examples,
        prompts=torch.tensor([[1.0 + value] * 2 for value in rows.values()]).reshape(-1, 2),
        keys=torch.zeros(len(rows), 0),
        origins=torch.tensor(list(rows), dtype=torch.int64),
        use_counts=torch.full((len(rows),), examples),
        shared=Parts(head={"w": torch.tensor([10.0 + head])}),
        state=ClientState(Parts(objective={"memory": torch.ones(1)})),
        metrics={"loss": 0.1 * examples, "accuracy": 0.5, "steps": 2.0, "seconds": 1.0, "pack": 1},
    )


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_whole_update_is_clipped_as_one_vector() -> None:
    """Changes (0, 0), (1, 1), (-1, -1) of prompts and 2 of the head: the norm is sqrt(8)."""
    half = GaussianMechanism(clip=math.sqrt(2), noise_multiplier=0.0)
    given = update({2: -1.0, 1: 1.0}, head=2.0)
    before = given.prompts.clone()
    made = half.release(given, received(), draws())
    assert torch.allclose(made.prompts, torch.tensor([[1.0, 1.0], [1.5, 1.5], [0.5, 0.5]]))
    assert torch.allclose(made.shared.head["w"], torch.tensor([11.0]))
    assert torch.equal(given.prompts, before)
    short = GaussianMechanism(clip=3.0, noise_multiplier=0.0).release(given, received(), draws())
    assert torch.equal(short.prompts, torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]))
    assert short.shared.head["w"].tolist() == [12.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_counts_as_no_change(bad: float) -> None:
    made = GaussianMechanism(1.0, 0.0).release(update({0: 1.0}, head=bad), received(), draws())
    assert torch.equal(made.prompts, torch.ones(3, 2))
    assert made.shared.head["w"].tolist() == [10.0]


def test_nothing_but_noisy_tensors_says_anything_of_the_images() -> None:
    """Clients who changed nothing send the same, whatever their images and selections are."""
    mechanism = GaussianMechanism(1.0, 2.0)
    one = mechanism.release(update({1: 0.0}, 0.0, examples=3), received(), draws())
    two = mechanism.release(update({2: 0.0, 0: 0.0}, 0.0, examples=9), received(), draws())
    assert all(torch.equal(x, two.tensors()[path]) for path, x in one.tensors().items())
    assert (one.num_examples, one.metrics) == (two.num_examples, two.metrics) == (1, {"pack": 1})
    assert one.origins.tolist() == [0, 1, 2] and one.use_counts.tolist() == [1, 1, 1]


def test_noise_has_the_deviation_that_is_said_and_is_a_function_of_its_seed() -> None:
    before = Broadcast(torch.zeros(200, 100), torch.zeros(200, 0))
    still = dataclasses.replace(update({}, 0.0), prompts=torch.zeros(0, 100), shared=Parts())
    mechanism = GaussianMechanism(clip=2.0, noise_multiplier=3.0)
    noise = mechanism.release(still, before, draws(1)).prompts
    # Of 20,000 draws the deviation's own standard error is 6 / sqrt(40,000) = 0.03.
    assert float(noise.std()) == pytest.approx(6.0, abs=0.15)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.2)
    assert torch.equal(noise, mechanism.release(still, before, draws(1)).prompts)
    assert not torch.equal(noise, mechanism.release(still, before, draws(2)).prompts)


def test_tensors_of_another_kind_are_not_sent_by_mistake() -> None:
    own = dataclasses.replace(
        update({0: 1.0}, 0.0), shared=Parts(objective={"variate": torch.ones(1)})
    )
    with pytest.raises(ValueError, match=r"expected changes of prompts, head\.w alone"):
        GaussianMechanism(1.0, 1.0).release(own, received(), draws())


def delta_of(sigma: float, epsilon: float) -> float:
    """Balle and Wang, "Improving the Gaussian Mechanism", ICML 2018, Theorem 8."""
    half = 1 / (2 * sigma)
    lower = norm.cdf(half - epsilon * sigma)
    return float(lower - math.exp(epsilon) * norm.cdf(-half - epsilon * sigma))


@needs_library
@pytest.mark.parametrize(("multiplier", "times"), [(1.0, 1), (4.0, 16), (2.0, 7)])
def test_epsilon_is_that_of_the_closed_form_and_of_the_library_s_accountants(
    multiplier: float, times: int
) -> None:
    import dp_accounting
    from dp_accounting import pld, rdp

    epsilon = epsilon_of(multiplier, DELTA, times)
    assert delta_of(multiplier / math.sqrt(times), epsilon) == pytest.approx(DELTA, rel=1e-5)
    event = dp_accounting.GaussianDpEvent(multiplier)
    exact = pld.PLDAccountant().compose(event, times).get_epsilon(DELTA)
    bound = rdp.RdpAccountant().compose(event, times).get_epsilon(DELTA)
    assert epsilon == pytest.approx(exact, rel=2e-3)
    assert epsilon <= bound


@needs_library
@pytest.mark.parametrize("epsilon", [0.01, 1.0, 8.0, 1e4])
@pytest.mark.parametrize("times", [1, 40])
def test_a_target_is_met_and_not_passed(epsilon: float, times: int) -> None:
    used = epsilon_of(multiplier_for(epsilon, DELTA, times), DELTA, times)
    assert used <= epsilon and used == pytest.approx(epsilon, rel=1e-4)


@needs_library
def test_a_canary_is_found_without_privacy_and_not_with_it() -> None:
    """A server that knows what a client would send asks of each message whether it is that or
    nothing. No test is more powerful than the projection on the difference (Neyman and Pearson)."""
    canary, nothing, before = update({0: 3.0, 1: -2.0}, 1.0), update({}, 0.0), received()
    trials, epsilon = 400, 1.0

    def advantage(mechanism: GaussianMechanism) -> float:
        clipped = GaussianMechanism(mechanism.clip, 0.0).release(canary, before, draws())
        direction = (clipped.prompts - before.prompts).flatten()
        direction = torch.cat([direction, clipped.shared.head["w"] - 10.0])
        found = []
        for sent, first in ((canary, 0), (nothing, trials)):
            scores = []
            for seed in range(first, first + trials):
                made = mechanism.release(sent, before, draws(seed))
                moved = torch.cat(
                    [(made.prompts - before.prompts).flatten(), made.shared.head["w"] - 10.0]
                )
                scores.append(float(moved @ direction))
            threshold = float(direction @ direction) / 2
            found.append(sum(score > threshold for score in scores) / trials)
        return found[0] - found[1]

    assert advantage(GaussianMechanism(1.0, 0.0)) == 1.0
    private = advantage(GaussianMechanism(1.0, multiplier_for(epsilon, DELTA, 1)))
    # The best that (epsilon, delta) allows is 0.46; one standard error of 400 trials is 0.035.
    assert private < 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 1.0}, "privacy.clip: expected privacy.unit=client as well"),
        ({"unit": "example"}, "privacy.unit: expected one of client, got 'example'"),
        ({"unit": "client", "delta": DELTA}, "privacy.clip: expected a number > 0"),
        ({"unit": "client", "clip": 1.0}, "privacy.delta: expected a number > 0"),
        ({"unit": "client", "clip": 1.0, "delta": DELTA}, "got neither"),
        (
            {"unit": "client", "clip": 1.0, "delta": DELTA, "epsilon": 1.0, "noise_multiplier": 1},
            "got both",
        ),
        ({"unit": "client", "clip": 0.0, "delta": DELTA, "epsilon": 1.0}, "privacy.clip: expected"),
        ({"unit": "client", "clip": 1.0, "delta": 1.0, "epsilon": 1.0}, "privacy.delta: expected"),
        ({"unit": "client", "clip": 1.0, "delta": DELTA, "epsilon": 0.0}, "privacy.epsilon: exp"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        PrivacyOptions(**options)  # type: ignore[arg-type]


def test_without_the_library_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'fedprompt[privacy]'")):
        PrivacyOptions("client", clip=1.0, epsilon=1.0, delta=DELTA)


@needs_library
@pytest.mark.parametrize(
    ("overrides", "leak"),
    [
        (("prompts.selection=keyed", "prompts.whiten=false"), "mean queries (keys), origins and"),
        (("prompts.selection=keyed", "prompts.whiten=clients"), "scatters of queries"),
        (("method=pfedpg_plus",), "origins and use counts"),
        (("method=scaffold_pt",), "own tensors of objective=scaffold, such as control variates"),
        (("method=fedcof",), "the class sums and counts of objective=closed_form"),
        (
            ("head.start=ncm", "head.name=linear", "head.bias=false"),
            "the class sums of head.start=ncm",
        ),
        (("method=local_only",), "the figures of personal models"),
        (("eval_clients=last",), "the figures of each client of eval_clients=last"),
        (("system.speed=1",), "who is late"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(overrides: tuple[str, ...], leak: str) -> None:
    more = [*PRIVATE, "privacy.epsilon=1", "compare=[]", *overrides]
    with pytest.raises(ConfigError, match=re.escape(leak)) as caught:
        compose("digits", more)
    assert str(caught.value).startswith("privacy.unit=client does not cover ")


class Stop(BaseException):
    """Ends a run from outside."""


@needs_library
def test_a_run_says_what_it_used_up_and_has_the_same_bits_anywhere(
    tiny: Overrides, tmp_path: Path
) -> None:
    more = (*PRIVATE, "privacy.epsilon=8", "rounds=3", *QUICK)
    packed = (*more, "runtime.pack=3", f"run_dir={tmp_path / 'packed'}")
    straight = fedprompt.run("digits", tiny(*more))
    assert straight.summary["epsilon"] == pytest.approx(8.0, rel=1e-6)
    assert straight.summary["epsilon"] <= 8.0
    assert "for each client" in (Path(straight.run_dir) / "report.html").read_text()
    times: Counter[int] = Counter()
    config = compose("digits", tiny(*more))
    accountant = config.accountant
    assert isinstance(accountant, Accountant)
    for record in straight.reports:
        assert [set(each) for each in record["clients"]] == [
            {"client", "num_examples", "num_prompts", "pack"}
        ] * 3
        assert {each["num_examples"] for each in record["clients"]} == {1}
        assert record["train_loss"] is None
        times.update(each["client"] for each in record["clients"])
        assert accountant.participations(record["round"]) == max(times.values())
        used = epsilon_of(accountant.noise_multiplier, DELTA, max(times.values()))
        assert record["epsilon"] == pytest.approx(used)

    def stop(event: object) -> None:
        if isinstance(event, RoundFinished):
            raise Stop

    with pytest.raises(Stop):
        fedprompt.run("digits", tiny(*more, f"run_dir={tmp_path / 'half'}"), on_event=stop)
    resumed = fedprompt.resume(tmp_path / "half")
    assert resumed.summary["state_sha256"] == straight.summary["state_sha256"]
    assert [each["epsilon"] for each in resumed.reports] == [
        each["epsilon"] for each in straight.reports
    ]
    elsewhere = (*more, "runtime=ray", "runtime.actors=1", f"run_dir={tmp_path / 'ray'}")
    actors = fedprompt.run("digits", tiny(*elsewhere))
    assert actors.summary["state_sha256"] == straight.summary["state_sha256"]
    together = fedprompt.run("digits", tiny(*packed))
    assert {each["pack"] for each in together.reports[0]["clients"]} == {3.0}
    assert together.summary["epsilon"] == straight.summary["epsilon"]
