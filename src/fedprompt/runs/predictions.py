"""What the global model says of every test image, kept with the run: `predictions.npz`.

id          (N,) int64   row of the test split
label       (N,) int64   its class, as `task.json` counts them
prediction  (N,) int64   the class that the model gives it
domain      (N,) int64   its domain, as `task.json` counts them
round       () int64     after which this was measured
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedprompt.core.types import ServerState
from fedprompt.data.prefix.tables import FeatureTable
from fedprompt.runs.directory import RunDirectory
from fedprompt.server.figures import Evaluation
from fedprompt.server.round import Evaluate


def with_predictions(evaluate: Evaluate, directory: RunDirectory, test: FeatureTable) -> Evaluate:
    """The same evaluation, which keeps the predictions of the last round that was evaluated.

    They are written before the round's record and checkpoint, so that a resumed run, which repeats
    the round, writes the same bytes again.

    Args:
        evaluate: starts to measure a state.
        directory: of the run.
        test: the test split.
    """

    def start(state: ServerState) -> Callable[[], tuple[Evaluation, Evaluation]]:
        waiting = evaluate(state)

        def wait() -> tuple[Evaluation, Evaluation]:
            found, validation = waiting()
            if found.predicted is not None:
                directory.write_predictions(
                    {
                        "id": np.arange(len(found.predicted), dtype=np.int64),
                        "label": test.labels,
                        "prediction": found.predicted,
                        "domain": test.groups,
                        "round": np.array(state.round_index, np.int64),
                    }
                )
            return found, validation

        return wait

    return start
