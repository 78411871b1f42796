"""How the command line shows the messages that fastmae sends to ``logging.getLogger("fastmae")``.

A program in Python configures the logger as any other: warnings are shown by default, and what a run says about itself
has the level INFO.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager

logger = logging.getLogger("fastmae")


class _StderrHandler(logging.Handler):
    """Writes each message at once, to what is ``sys.stderr`` at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"fastmae: {record.getMessage()}", file=sys.stderr, flush=True)


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
