"""Who takes part in a round: a function of seed and round, fair to all clients."""

from __future__ import annotations

import numpy as np

from fedprompt.server.sampling import sample_cohort

CLIENTS, COHORT, ROUNDS = 20, 5, 400


def test_a_cohort_is_distinct_clients_in_order() -> None:
    for round_index in range(1, 50):
        cohort = sample_cohort(3, round_index, CLIENTS, COHORT)
        assert cohort == sorted(set(cohort))
        assert len(cohort) == COHORT
        assert cohort[0] >= 0 and cohort[-1] < CLIENTS


def test_seed_and_round_decide_and_nothing_else() -> None:
    np.random.seed(1)
    cohorts = {key: sample_cohort(*key, CLIENTS, COHORT) for key in ((0, 1), (0, 2), (1, 1))}
    np.random.seed(2)
    assert all(sample_cohort(*key, CLIENTS, COHORT) == cohort for key, cohort in cohorts.items())
    assert len({tuple(cohort) for cohort in cohorts.values()}) == 3


def test_all_clients_come_equally_often() -> None:
    """Each in a quarter of the rounds: 100 of 400, with a standard deviation of 8.7."""
    seen = np.zeros(CLIENTS)
    for round_index in range(ROUNDS):
        seen[sample_cohort(0, round_index, CLIENTS, COHORT)] += 1
    assert seen.sum() == ROUNDS * COHORT
    assert seen.min() > 60 and seen.max() < 140
