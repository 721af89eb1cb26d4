"""Where the YAML files of `conf/` lie, and what their names look like."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

FILE_NAME = re.compile(r"\w[\w.+-]*")
"""What can be the name of a file in a group; a path cannot."""
TABLE = "table"
"""A folder of experiments may hold one file of this name, with many experiments in it."""


def conf_root() -> Path:
    """The folder of YAML groups: inside the installed package, or `conf/` of the checkout."""
    packaged = Path(str(resources.files("fedprompt"))) / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "conf"
