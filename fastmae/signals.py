"""Signals that stop a run: remembered from the first moment of the process on, and obeyed by the run when it can.

Importing PyTorch takes seconds. A signal that comes meanwhile must not kill the process, as a scheduler takes only the
exit status of a stopped run for a reason to start it again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# sysexits' EX_TEMPFAIL: nothing is wrong, run the same command again (with --resume auto).
EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_begun: list[StopSignals] = []
"""What ``remembered`` has entered."""


class StopSignals:
    """Remembers, while entered, the first SIGTERM, SIGINT, SIGUSR1 or SIGHUP. A second SIGINT interrupts at once.

    A signal that is ignored stays ignored: ``nohup`` ignores SIGHUP, a shell SIGINT for what it starts in the
    background. Only the main thread of Python may handle signals. In another one nothing is handled, and nothing is
    remembered. A forked child takes signals as if there were no run.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        if _begun and self.received is None:
            self.received = _begun[0].received
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not installed from Python

    def stop(self, reason: str) -> None:
        """Stops the run as a signal does."""
        self.received = self.received or reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop(signal.Signals(number).name)


@contextmanager
def remembered() -> Generator[None]:
    """Remembers signals while entered, for every ``StopSignals`` that is entered meanwhile."""
    if _begun:
        yield
        return
    with StopSignals() as stop:
        _begun.append(stop)
        try:
            yield
        finally:
            _begun.clear()
