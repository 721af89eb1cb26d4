"""Keep libraries from speaking where this program says what there is to say."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def quiet_libraries(names: Sequence[str]) -> Iterator[None]:
    """While entered, loggers speak of errors alone and warnings are not shown.

    Args:
        names: of the loggers; those below have levels of their own.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
