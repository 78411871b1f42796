"""When a run must end: on signals, after the step is finished and saved; before saving weights that are not numbers."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

import torch

from fastmae.errors import UserError

# sysexits' EX_TEMPFAIL: nothing is wrong, run the same command again (with --resume auto).
EXIT_INTERRUPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """While entered, remembers the first SIGTERM, SIGINT or SIGUSR1; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def require_finite(parameters: Iterable[torch.Tensor], step: int) -> None:
    """Looks at all weights before they are saved; waits for the device once.

    Raises:
        UserError: one of them is infinite or not a number, so that saving them would poison the newest checkpoint.
    """
    if not torch.stack([parameter.isfinite().all() for parameter in parameters]).all():
        raise UserError(
            f"the weights after step {step} are not finite and were not saved: lower --blr (or use --precision fp32), "
            "then continue with --resume auto"
        )
