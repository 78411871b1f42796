"""A watchdog that ends a run that hangs, and a detector of loss spikes.

Nothing here knows the training loop.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import statistics
import threading
from collections import deque
from pathlib import Path
from types import TracebackType

EXIT_HUNG = 1
HANG_GRACE = 5.0
LONGEST_STOP = 24 * 3600.0
"""Seconds for which a process may be stopped: faulthandler's timer, unlike the watchdog, counts them."""
SPIKE_WINDOW = 200
SPIKE_LEAST = 50
SPIKE_THRESHOLD = 8.0
NORMAL_MAD = 0.6745


class Watchdog:
    """Ends the process, while entered, when ``beat`` is not called for ``timeout`` seconds, and shows where it hangs.

    The stacks of all threads go to stderr and into ``report``. A thread looks for new beats, so a step costs one
    addition (arming faulthandler starts a thread, which takes about 0.2 ms on a CPU). Only time in which that thread
    was awake counts: a process that was stopped (SIGSTOP, a suspended job, a frozen container) goes on. The thread also
    arms faulthandler, which ends the process if the interpreter itself is stuck, ``LONGEST_STOP`` later.

    Args:
        timeout: seconds; None or 0 for no watchdog.
        report: the file for the stacks, which is written only when it is needed.
        who: what messages call this process.
    """

    def __init__(self, timeout: float | None, report: Path, who: str) -> None:
        self._timeout, self._report, self._who = timeout or 0.0, report, who
        self._beats = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fastmae-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._timeout:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        if self._timeout:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Tells the watchdog that something was finished."""
        self._beats += 1

    def _watch(self) -> None:
        tick, beats, silent = min(1.0, self._timeout / 4), self._beats, 0.0
        while silent <= self._timeout:
            faulthandler.dump_traceback_later(self._timeout + 2 * HANG_GRACE + LONGEST_STOP, exit=True, file=2)
            if self._over.wait(tick):
                return
            silent += tick  # whatever a clock says: if more time has passed, the process was stopped
            if self._beats != beats:
                beats, silent = self._beats, 0.0
        line = (
            f"fastmae: {self._who} finished no step for {self._timeout:g} s (--hang_timeout) and ends with status "
            f"{EXIT_HUNG}; the stacks of its threads follow, and are in {self._report}\n"
        )
        with open(os.memfd_create("stacks"), "r+b") as file:
            faulthandler.dump_traceback(file=file)
            file.seek(0)
            report = line.encode() + file.read()
        # At once, as other ranks write theirs to the same place; in threads, as a disk or a screen may be stuck, too.
        for write in (self._show, self._keep):
            threading.Thread(target=write, args=(report,), daemon=True).start()
        # The launcher ends the other ranks as soon as one is gone; until then they report as well.
        if not self._over.wait(HANG_GRACE):
            os._exit(EXIT_HUNG)

    def _show(self, text: bytes) -> None:
        with contextlib.suppress(OSError):  # stderr is gone
            os.write(2, text)

    def _keep(self, report: bytes) -> None:
        try:
            self._report.write_bytes(report)
        except OSError as error:
            self._show(f"fastmae: {self._report} cannot be written ({error})\n".encode())


class LossSpikes:
    """Detects losses far above the recent ones, by the median and the median absolute deviation, which spikes barely
    change.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def score(self, loss: float) -> float | None:
        """Returns the robust z-score of a loss that is a spike, otherwise None; adds the loss to the recent ones."""
        if not math.isfinite(loss):
            return None
        z = None
        if len(self._recent) >= SPIKE_LEAST:
            middle = statistics.median(self._recent)
            deviation = statistics.median(abs(value - middle) for value in self._recent)
            if NORMAL_MAD * (loss - middle) > SPIKE_THRESHOLD * deviation > 0:
                z = NORMAL_MAD * (loss - middle) / deviation
        self._recent.append(loss)
        return z
