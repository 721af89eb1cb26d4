"""Generators: server-side models that give every client prompts of its own."""

from fedprompt.prompt_generators.base import PromptGenerator, generators

__all__ = ["PromptGenerator", "generators"]
