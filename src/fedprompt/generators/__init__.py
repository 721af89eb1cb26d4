"""Generators: server-side models that give every client prompts of its own."""

from fedprompt.generators.base import PromptGenerator, generators

__all__ = ["PromptGenerator", "generators"]
