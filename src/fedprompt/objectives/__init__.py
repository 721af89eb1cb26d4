"""Local objectives: what a client minimises beside cross-entropy."""

from fedprompt.objectives.base import Objective, objectives

__all__ = ["Objective", "objectives"]
