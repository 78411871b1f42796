"""A watchdog that ends a run that hangs, and a detector of loss spikes.

Nothing here knows the training loop.
"""

from __future__ import annotations

import faulthandler
import math
import os
import statistics
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType

EXIT_HUNG = 1
HANG_GRACE = 5.0
SPIKE_WINDOW = 200
SPIKE_LEAST = 50
SPIKE_THRESHOLD = 8.0
NORMAL_MAD = 0.6745


class Watchdog:
    """Ends the process, while entered, when ``beat`` is not called for ``timeout`` seconds, and shows where it hangs.

    The stacks of all threads go to stderr and into ``report``. A thread checks the time of the last beat, so a step
    costs one assignment (arming faulthandler starts a thread, which takes about 0.2 ms on a CPU). The thread also arms
    faulthandler, which ends the process if the interpreter itself or the disk of ``report`` is stuck.

    Args:
        timeout: seconds; None or 0 for no watchdog.
        report: the file for the stacks, which is written only when it is needed.
        who: what messages call this process.
    """

    def __init__(self, timeout: float | None, report: Path, who: str) -> None:
        self._timeout, self._report, self._who = timeout or 0.0, report, who
        self._last = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fastmae-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.beat()
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
        self._last = time.monotonic()

    def _watch(self) -> None:
        while True:
            faulthandler.dump_traceback_later(self._timeout + 2 * HANG_GRACE, exit=True, file=2)
            if self._over.wait(min(1.0, self._timeout / 4)):
                return
            if time.monotonic() - self._last > self._timeout:
                break
        line = (
            f"fastmae: {self._who} finished no step for {self._timeout:g} s (--hang_timeout) and ends with status "
            f"{EXIT_HUNG}; the stacks of its threads follow, and are in {self._report}\n"
        )
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file=file)
            file.seek(0)
            report = line.encode() + file.read()
        os.write(2, report)  # at once, as other ranks write theirs to the same place
        try:
            self._report.write_bytes(report)
        except OSError as error:
            os.write(2, f"fastmae: {self._report} cannot be written ({error})\n".encode())
        # The launcher ends the other ranks as soon as one is gone; until then they report as well.
        if not self._over.wait(HANG_GRACE):
            os._exit(EXIT_HUNG)


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
