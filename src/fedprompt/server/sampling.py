"""Which clients take part in a round: a function of run seed and round alone."""

from __future__ import annotations

from fedprompt.core.seeding import numpy_generator


def sample_cohort(run_seed: int, round_index: int, num_clients: int, per_round: int) -> list[int]:
    """`per_round` distinct client ids, ascending.

    Args:
        run_seed: `seed` of the experiment.
        round_index: 1 for the first round.
        num_clients: clients that can be sampled.
        per_round: clients of a round.

    >>> sample_cohort(0, 1, 20, 3) == sample_cohort(0, 1, 20, 3)
    True
    >>> sample_cohort(0, 1, 5, 5)
    [0, 1, 2, 3, 4]
    """
    generator = numpy_generator(run_seed, "cohort", round_index)
    return sorted(generator.choice(num_clients, size=per_round, replace=False).tolist())
