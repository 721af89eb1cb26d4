"""Attacks: what each sends on paper, who attacks, and the same bits everywhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedprompt.attacks import attackers_of, attacks
from fedprompt.client.worker import ClientWorker, labels_of
from fedprompt.config import compose
from fedprompt.core.errors import ConfigError
from fedprompt.core.types import Broadcast, ClientUpdate, Parts
from fedprompt.experiment import execute, plan_run
from fedprompt.runs.driver import settings_of
from fedprompt.runs.federation import Federation, initial_state, prepare
from fedprompt.server.quarantine import expected_of, fault
from fedprompt.server.round import make_jobs

Overrides = Callable[..., list[str]]
FEDERATION: list[Federation] = []
NAMES = [name for name in attacks.names() if name != "none"]


def sent(name: str, **options: object) -> ClientUpdate:
    """What an attacker sends that received 1 and trained 3, and whose objective sends 2."""
    before = Broadcast(torch.ones(2, 1), torch.zeros(2, 1), Parts(head={"w": torch.ones(1)}))
    update = ClientUpdate(
        client_id=0,
        round_index=1,
        num_examples=1,
        prompts=torch.tensor([[3.0]]),
        keys=torch.zeros(1, 1),
        origins=torch.tensor([1]),
        use_counts=torch.tensor([1]),
        shared=Parts(head={"w": torch.tensor([3.0])}, objective={"c": torch.tensor([2.0])}),
    )
    generator = torch.Generator().manual_seed(0)
    return attacks.create(name, **options).tamper(update, before, generator)


@pytest.mark.parametrize(
    ("name", "options", "trained", "own"),
    [
        ("scale", {"factor": 10.0}, 1 + 10 * 2, 20.0),
        ("sign_flip", {"factor": 4.0}, 1 - 4 * 2, -8.0),
        ("free_rider", {}, 1.0, 0.0),
        ("backdoor", {"boost": 5.0}, 1 + 5 * 2, 10.0),
        ("label_flip", {}, 3.0, 2.0),
    ],
)
def test_what_is_sent_on_paper(
    name: str, options: dict[str, object], trained: float, own: float
) -> None:
    update = sent(name, **options)
    assert update.prompts.tolist() == [[trained]]
    assert update.shared.head["w"].tolist() == [trained]
    assert update.shared.objective["c"].tolist() == [own]


def test_noise_is_around_what_was_received() -> None:
    """The shared tensors draw first, in their order, then the prompts."""
    drawn = torch.randn(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = torch.Generator().manual_seed(0)
    one_by_one = [torch.randn(1, generator=draws, dtype=torch.float64).item() for _ in drawn]
    update = sent("gaussian", std=3.0)
    found = [
        update.shared.head["w"].item() - 1,
        update.shared.objective["c"].item(),
        update.prompts.item() - 1,
    ]
    assert sorted(found) == pytest.approx(sorted(3 * each for each in one_by_one), rel=1e-5)


def test_labels_are_flipped_within_a_domain() -> None:
    mask = np.array([[True, True, True, False, False], [False, False, True, True, True]])
    labels, groups = np.array([0, 1, 2, 2, 4]), np.array([0, 0, 0, 1, 1])
    assert attacks.create("label_flip").labels(labels, groups, mask).tolist() == [2, 1, 0, 4, 2]
    # Class 3 does not exist in the first domain.
    door = attacks.create("backdoor", source=2, target=3)
    assert door.labels(labels, groups, mask).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"attack\.source, .*: expected classes from 0 to 4, got"):
        attacks.create("backdoor", source=2, target=9).labels(labels, groups, mask)


def test_an_attack_on_classes_that_are_not_there_is_refused_before_anything_is_written(
    tiny: Overrides, tmp_path: Path
) -> None:
    config = compose("digits", tiny("attack=backdoor", "attack.target=99"))
    with pytest.raises(ConfigError, match="expected classes from 0 to 9, got 0 and 99"):
        execute(plan_run(config, False))
    assert not (tmp_path / "run").exists()


def test_who_attacks_depends_on_the_seed_alone() -> None:
    first = attackers_of(0, 20, 0.2)
    assert len(first) == 4
    assert first == attackers_of(0, 20, 0.2)
    assert first != attackers_of(1, 20, 0.2)
    config = compose("digits", ["compare=[]", "attack=scale", "attack.share=0.5", "seed=3"])
    assert config.recipe(10).attackers == attackers_of(3, 20, 0.5)
    assert compose("digits", ["compare=[]"]).recipe(10).attackers == frozenset()


@pytest.mark.parametrize("name", NAMES)
def test_attackers_alone_or_in_a_pack_pass_the_check_and_others_are_honest(
    tiny: Overrides, name: str
) -> None:
    config = compose("digits", tiny(f"attack={name}", "clients.per_round=6", "attack.share=0.3"))
    if not FEDERATION:
        FEDERATION.append(prepare(config))
    [federation] = FEDERATION  # it does not depend on the attack
    settings, state = settings_of(config, federation), initial_state(config, federation)
    recipe, worker = settings.recipe, ClientWorker(federation.setup)
    jobs = make_jobs(state, settings)
    attackers = [job for job in jobs if job.client_id in recipe.attackers]
    honest = [job for job in jobs if job.client_id not in recipe.attackers]
    assert len(attackers) == 2
    pair = [attackers[0], honest[0]]
    packed = worker.train(recipe, pair)
    again = worker.train(recipe, pair)
    plain = worker.train(dataclasses.replace(recipe, attackers=frozenset()), pair)
    assert tensors(packed[0]) == tensors(again[0])
    for update, job in zip(packed, pair, strict=True):
        expected = expected_of(job, recipe.build_objective(), recipe, state, settings.sizes)
        assert fault(update, expected) is None
    assert tensors(packed[1]) == tensors(plain[1])
    assert tensors(packed[0]) != tensors(plain[0])
    rows = federation.data.rows(attackers[0].client_id, pooled=False)
    flipped = labels_of(federation.data, rows, recipe.attack_of(attackers[0].client_id))
    changes = bool((flipped != federation.data.table.labels[rows]).any())
    assert changes == (name in ("label_flip", "backdoor"))


def tensors(update: ClientUpdate) -> dict[str, list[object]]:
    return {path: value_of(tensor) for path, tensor in update.shared.tensors().items()}


def value_of(tensor: Tensor) -> list[object]:
    return list(tensor.flatten().tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["attack=scale", "attack.share=0.001"],
            r"attack\.share: expected a share of at least one",
        ),
        (["attack=scale", "attack.share=0.99"], r"attack\.share: expected a share of at least one"),
        (
            ["attack=scale", "attack.share=1"],
            r"attack\.share: expected a finite number > 0 and < 1",
        ),
        (["attack=scale", "attack.factor=0"], r"attack\.factor: expected a finite number oth"),
        (["attack=gaussian", "attack.std=0"], r"attack\.std: expected a finite number > 0"),
        (["attack=backdoor", "attack.target=0"], r"attack\.target: expected another class than"),
        (["attack=scales"], "unknown attack 'scales': expected one of .*did you mean 'scale'"),
        (["method=centralised", "attack=scale"], r"attack\.share: .* of 1 clients, got 0\.2"),
    ],
)
def test_attacks_of_nobody_and_wrong_options_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("digits", ["compare=[]", *options])
