"""Tuning of the backbone itself, beside prompts and head: nothing, everything, adapters, LoRA."""

from fedprompt.models.adaptation.base import Tuning, tunings

__all__ = ["Tuning", "tunings"]
