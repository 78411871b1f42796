"""A function in a process of its own, asked through a pipe: its heap, threads and libraries are nobody else's.

What it does is none of this file's business.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from fastmae.errors import UserError
from fastmae.torch_compat import compile_errors

Ask = Callable[[Any], Any]
"""Takes a request and gives the answer; both travel pickled."""

# Seconds. OpenMP's threads look for more work before they sleep, and meanwhile take the cores from the next in turn.
SETTLE = 0.02
# Seconds that a process has to tidy up, torch.compile's helpers for instance, when it is asked no more.
GRACE = 5.0
# Forked from a process that has imported everything and done nothing: as if spawned, but for seconds of imports each.
_CONTEXT = multiprocessing.get_context("forkserver")


class GoneError(Exception):
    """A process that answers no more. The message says why, in one line."""


@contextmanager
def in_own_process(begin: Callable[..., tuple[Any, Ask]], *given: object) -> Generator[tuple[Any, Ask]]:
    """What ``begin(*given)`` gives in a new process: something to begin with, and a function that is called there.

    What is written to stderr there is kept from the screen: libraries' notices, once for each process. The process ends
    with the block, whatever happens, and takes no time between two requests.

    Raises:
        GoneError: it refused with one of ``refusals()``, or died; the function raises this as well.
    """
    _CONTEXT.set_forkserver_preload([__name__, begin.__module__])
    ours, theirs = _CONTEXT.Pipe()
    with ours, tempfile.NamedTemporaryFile("r", prefix="fastmae-bench-", errors="replace") as said:
        process = _CONTEXT.Process(target=_live, args=(theirs, said.name, begin, given), daemon=True)
        process.start()
        theirs.close()

        def received() -> Any:
            try:
                answer, why = ours.recv()
            except (EOFError, ConnectionError):
                process.join()
                raise GoneError(_end_of(process, said.read())) from None
            if why:
                raise GoneError(why)
            time.sleep(SETTLE)
            return answer

        def ask(request: object) -> Any:
            with suppress(ConnectionError):  # then there is nothing to receive either, which says more
                ours.send(request)
            return received()

        try:
            yield received(), ask
            ours.close()
            process.join(GRACE)
        finally:
            process.terminate()
            process.join()


def _live(pipe: Connection, said: str, begin: Callable[..., tuple[Any, Ask]], given: tuple[object, ...]) -> None:
    """The life of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    with open(said, "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        first, answer = begin(*given)
        pipe.send((first, ""))
        for request in _requests(pipe):
            pipe.send((answer(request), ""))
    except refusals() as error:
        pipe.send((None, reason(error)))
    except RuntimeError as error:  # of a CPU without memory torch says so in words alone
        if "can't allocate memory" not in str(error):
            raise
        pipe.send((None, reason(error)))


def _requests(pipe: Connection) -> Generator[Any]:
    """Until the one who asks is gone."""
    with suppress(EOFError, ConnectionError):
        while True:
            yield pipe.recv()


def refusals() -> tuple[type[Exception], ...]:
    """The exceptions that say that something cannot run here. Any other is a mistake, whose traceback is shown."""
    return (GoneError, UserError, ImportError, torch.OutOfMemoryError, MemoryError, *compile_errors())


def reason(error: Exception) -> str:
    """The first line of an exception that says anything."""
    return next(line for line in [*str(error).splitlines(), type(error).__name__] if line.strip())


def _end_of(process: BaseProcess, said: str) -> str:
    """Why it ended, in one line; shows the traceback of a mistake."""
    code = process.exitcode or 0
    if code < 0:
        why = f"its process was killed by {signal.Signals(-code).name}"
        return f"{why}, as the system does where memory runs out" if code == -signal.SIGKILL else why
    _, found, traceback = said.partition("Traceback (most recent call last):")
    print(found + traceback, end="", file=sys.stderr)
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
    return f"its process ended with exit status {code}: {last.strip()}"
