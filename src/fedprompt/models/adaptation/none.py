"""`none`: the backbone stays as it was pre-trained; prompts and head alone are trained."""

from __future__ import annotations

import dataclasses

from fedprompt.models.adaptation.base import Tuning, tunings


@dataclasses.dataclass(frozen=True)
class NoTuningOptions:
    """No options."""


@tunings.register("none", NoTuningOptions)
class NoTuning(Tuning):
    """Nothing is tuned in the backbone."""
