"""What setup.cfg cannot say: README.md as a package index shows it.

Relative links and pictures lead nowhere there. `FEDPROMPT_REPOSITORY=https://HOST/OWNER/NAME` at
build time makes them absolute and adds the project's addresses; without it they stay as words.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("links", HERE / "docs" / "links.py")
links = importlib.util.module_from_spec(spec)
spec.loader.exec_module(links)
repository = os.environ.get(links.VARIABLE, "").rstrip("/")
addresses = {
    "Source": repository,
    "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
    "Documentation": f"{repository}/tree/HEAD/docs",
}
setup(
    long_description=links.outward((HERE / "README.md").read_text("utf-8"), ".", repository),
    long_description_content_type="text/markdown",
    project_urls=addresses if repository else {},
)
