"""Local objectives: what a client minimises, and its server half."""

from fedprompt.objectives.base import (
    Finished,
    LocalResult,
    LossContext,
    Objective,
    Seen,
    Teacher,
    objectives,
)

__all__ = ["Finished", "LocalResult", "LossContext", "Objective", "Seen", "Teacher", "objectives"]
