"""What a run leaves, to be used: its model, predictions, figures on other data, an exported folder.
Imports `runs`.
"""

from fedprompt.results.exporting import export
from fedprompt.results.loading import load
from fedprompt.results.model import Predictions, PromptedModel

__all__ = ["Predictions", "PromptedModel", "export", "load"]
