"""How the command line shows the messages that fastmae sends to ``logging.getLogger("fastmae")``.

A program in Python configures the logger as any other: warnings are shown by default, and what a run says about itself
has the level INFO.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

from fastmae.screen import complain

logger = logging.getLogger("fastmae")


class _StderrHandler(logging.Handler):
    """Writes each message at once, to what is ``sys.stderr`` at that moment, if that takes it."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


@contextmanager
def messages_on_stderr() -> Generator[None]:
    """Shows warnings as lines ``fastmae: …`` on stderr, and nowhere else, while entered."""
    if any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        yield
        return
    handler, propagate = _StderrHandler(logging.WARNING), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
