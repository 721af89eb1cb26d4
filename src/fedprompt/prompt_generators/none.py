"""`none`: all clients get the server's prompts, which an aggregator merges."""

from __future__ import annotations

import dataclasses

from fedprompt.prompt_generators.base import generators


@dataclasses.dataclass(frozen=True)
class NoGeneratorOptions:
    """No options."""


@generators.register("none", NoGeneratorOptions)
def no_generator(options: NoGeneratorOptions) -> None:
    """None: there is no generator."""
