"""Local objectives: what a client minimises beside cross-entropy, and its server half."""

from fedprompt.objectives.base import LocalResult, Objective, objectives

__all__ = ["LocalResult", "Objective", "objectives"]
