"""Local objectives: what a client minimises beside cross-entropy, and its server half."""

from fedprompt.objectives.base import Finished, LocalResult, Objective, objectives

__all__ = ["Finished", "LocalResult", "Objective", "objectives"]
