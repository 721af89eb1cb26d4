"""What the Flower side of `flower.py` shares with its worker processes: fedprompt's client work,
called from Flower's client.
"""

from __future__ import annotations

import functools
import json
import os

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.speed.timing import Laid, lay_open
from fedprompt.core.seeding import derive_seed
from fedprompt.core.types import Broadcast, ClientJob, Parts

Array = NDArray[np.float32]
OVERRIDES = "FEDPROMPT_BENCH_OVERRIDES"


@functools.cache
def laid() -> Laid:
    """The experiment, read once in each process."""
    torch.set_num_threads(1)
    return lay_open(json.loads(os.environ[OVERRIDES]))


def arrays() -> list[Array]:
    """Prompts and shared tensors of the first round."""
    state = laid().state
    return [state.prompts.numpy(), *(tensor.numpy() for tensor in state.shared.tensors().values())]


def work(arrays: list[Array], client_id: int, round_index: int) -> tuple[list[Array], int, float]:
    """One client's local work.

    Args:
        arrays: as `arrays` gives them.
        client_id: whose.
        round_index: from 0.

    Returns:
        Its new arrays, its number of images and of steps.
    """
    state = laid().state
    prompts, *shared = (torch.from_numpy(array.copy()) for array in arrays)
    named = dict(zip(state.shared.tensors(), shared, strict=True))
    job = ClientJob(
        client_id=client_id,
        round_index=round_index,
        seed=derive_seed(0, "client", round_index, client_id),
        broadcast=Broadcast(prompts, state.keys, Parts.from_tensors(named)),
    )
    update = laid().worker.train(laid().recipe, [job])[0]
    sent = update.shared.tensors()
    tuned = [update.prompts.numpy(), *(sent[path].numpy() for path in named)]
    return tuned, update.num_examples, update.metrics["steps"]
