"""Runtimes: `serial` in this process, `ray` in parallel actors."""

from fedprompt.runtime.base import Runtime, RuntimeOptions, runtimes

__all__ = ["Runtime", "RuntimeOptions", "runtimes"]
