"""Rules that see the whole updates of a round before anything is merged."""

from fedprompt.defences.base import Defence, Defended, Updates, defences

__all__ = ["Defence", "Defended", "Updates", "defences"]
