"""What a run leaves, to be used: its model, predictions, figures on other data. Imports `runs`."""

from fedprompt.results.loading import load
from fedprompt.results.model import Predictions, PromptedModel

__all__ = ["Predictions", "PromptedModel", "load"]
