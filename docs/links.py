"""Links that lead out of a place where documents are read: the site, or the page of a package.

What lies beside a document in a checkout does not lie beside it there. Such links lead to the
repository where its address is known (`FEDPROMPT_REPOSITORY=https://HOST/OWNER/NAME`, or
`repo_url` of mkdocs.yml), and else stay as their words.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable

LINK = re.compile(r"(?<!`)(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
FENCED = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[ \t]*$)", re.MULTILINE | re.DOTALL)
VARIABLE = "FEDPROMPT_REPOSITORY"


def outward(
    text: str, folder: str, repository: str, stays: Callable[[str], bool] = lambda path: False
) -> str:
    """A Markdown document whose links work elsewhere.

    Args:
        text: the document.
        folder: where it lies, from the root of the checkout.
        repository: address of the code; empty if none is known.
        stays: whether a link to this path of the checkout is left as it is.

    >>> outward("[a](../x.py) ![p](i.png) [b](#c)", "docs", "https://host/me/it")
    '[a](https://host/me/it/blob/HEAD/x.py) ![p](https://host/me/it/raw/HEAD/docs/i.png) [b](#c)'
    >>> outward("[a](../x.py) ![p](i.png) [b](#c)", "docs", "")
    'a  [b](#c)'
    """

    def one(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        path, hash_sign, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(folder, path))
        if not path or re.match(r"[a-z]+:", target) or stays(place):
            return match[0]
        if not repository:
            return "" if picture else words
        kind = "raw" if picture else "blob"
        return (
            f"{picture}[{words}]({repository.rstrip('/')}/{kind}/HEAD/{place}{hash_sign}{anchor})"
        )

    parts = FENCED.split(text)
    return "".join(part if odd % 2 else LINK.sub(one, part) for odd, part in enumerate(parts))
