"""Seeds as a function of (run seed, purpose, round, client): no global seeding, no hidden
generator.

Because a draw depends on nothing but these four values, the order in which clients finish, the
number of actors and a resume from disk change no random number.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # who only partitions or reports need not wait for torch
    import torch


def derive_seed(run_seed: int, purpose: str, round_index: int = -1, client_id: int = -1) -> int:
    """A 63-bit seed for one purpose, from the SHA-256 of the four values.

    Args:
        run_seed: `seed` of the experiment.
        purpose: what is drawn, in words; another purpose is another stream.
        round_index: 1 for the first round; -1 where draws belong to no round.
        client_id: -1 where draws belong to no client.

    >>> derive_seed(0, "cohort", 3) == derive_seed(0, "cohort", 3)
    True
    >>> derive_seed(0, "cohort", 3) == derive_seed(0, "cohort", 4)
    False
    """
    text = f"{run_seed}/{purpose}/{round_index}/{client_id}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(
    run_seed: int, purpose: str, round_index: int = -1, client_id: int = -1
) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`.

    Args:
        run_seed: as for `derive_seed`.
        purpose: as for `derive_seed`.
        round_index: as for `derive_seed`.
        client_id: as for `derive_seed`.
    """
    import torch

    generator = torch.Generator()
    generator.manual_seed(derive_seed(run_seed, purpose, round_index, client_id))
    return generator


def numpy_generator(
    run_seed: int, purpose: str, round_index: int = -1, client_id: int = -1
) -> np.random.Generator:
    """A NumPy generator seeded by `derive_seed`.

    Args:
        run_seed: as for `derive_seed`.
        purpose: as for `derive_seed`.
        round_index: as for `derive_seed`.
        client_id: as for `derive_seed`.
    """
    return np.random.default_rng(derive_seed(run_seed, purpose, round_index, client_id))
