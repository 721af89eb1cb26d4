"""Experiments as files: YAML groups in `conf/`, an experiment's differences, `key=value` overrides.

`files` reads them, `overrides` the command line, `layers` says which source wins and composes the
whole, `typed` and `groups` check it against the options' dataclasses, `experiment` is the result.
"""

from fedprompt.config.compose import compose
from fedprompt.config.experiment import (
    ExperimentConfig,
    automatic_selection,
    automatic_whitening,
    build,
)
from fedprompt.config.files import list_experiments
from fedprompt.config.groups import GROUPS, LISTS, REGISTRIES, SECTIONS, Choice, load_group
from fedprompt.config.layers import Sources
from fedprompt.config.methods import MethodCard, list_methods
from fedprompt.config.typed import Tree
from fedprompt.core.conf import FILE_NAME, conf_root

__all__ = [
    "FILE_NAME",
    "GROUPS",
    "LISTS",
    "REGISTRIES",
    "SECTIONS",
    "Choice",
    "ExperimentConfig",
    "MethodCard",
    "Sources",
    "Tree",
    "automatic_selection",
    "automatic_whitening",
    "build",
    "compose",
    "conf_root",
    "list_experiments",
    "list_methods",
    "load_group",
]
