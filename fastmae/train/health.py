"""When a run must end or go back: signals, hangs, steps that were skipped over and over, weights that are not finite.

Knows nothing of the loop. What a rank decides here from agreed numbers, all ranks decide alike.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import math
import os
import signal
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from fastmae.errors import UserError
from fastmae.files import write_text
from fastmae.model.sharding import local_part

# sysexits' EX_TEMPFAIL: nothing is wrong, run the same command again (with --resume auto).
EXIT_INTERRUPTED = 75
EXIT_HUNG = 1
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
HANG_GRACE = 5.0
DETOURS = "detours.json"
SPIKE_WINDOW = 200
SPIKE_LEAST = 50
SPIKE_THRESHOLD = 8.0
NORMAL_MAD = 0.6745


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


class Watchdog:
    """While entered, ends the process when ``beat`` is not called for ``timeout`` seconds, and says where it hangs.

    The stacks of all threads go to stderr and into ``report``. A thread looks at the time of the last beat, so that a
    step pays for one assignment (arming faulthandler, which starts a thread, takes about 0.2 ms on a CPU). It arms
    faulthandler as well: should the interpreter itself be stuck, or the disk of ``report``, that ends the process.

    Args:
        timeout: None or 0 for no watchdog.
        report: a file that is written when it is needed.
        who: this process, for people.
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
        """Something was finished."""
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
    """Finds losses far above the last ones, by their median and median absolute deviation, which spikes barely move."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def score(self, loss: float) -> float | None:
        """The robust z-score of a loss that is a spike, otherwise None; the loss counts for those after it."""
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


# --- going back -------------------------------------------------------------------------------------------------------


def read_detours(run: Path, step: int, manifest: Path | None) -> list[int]:
    """Steps, up to ``step``, after which the run went on with other data because losses were not finite.

    They are in the run folder, where a restart finds them even before the next checkpoint is saved; and in every
    checkpoint, whose ``manifest`` counts for a run that was begun from one of another folder.

    Raises:
        UserError: the file is there but not readable.
    """
    path, key = run / DETOURS, None
    if not path.exists():
        if manifest is None or not manifest.exists():
            return []
        path, key = manifest, "detours"
    try:
        known = json.loads(path.read_text())
        after = known if key is None else known.get(key, [])  # a manifest may be from before there were any
        if not isinstance(after, list):
            raise TypeError("no list of steps")
        return [int(known_step) for known_step in after if known_step <= step]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error!r}); restore it, or start in another --output_dir") from error


def write_detours(run: Path, detours: list[int]) -> None:
    """Keeps them in the run folder."""
    write_text(run / DETOURS, json.dumps(detours))


def data_seed(seed: int, detour: int) -> int:
    """The seed of order, crops, flips and masks after so many detours: the run's own before the first."""
    if detour == 0:
        return seed
    digest = hashlib.sha256(f"seed {seed} detour {detour}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def first_not_finite(
    model: nn.Module, losses: Callable[[], Iterable[torch.Tensor]], any_rank: Callable[[bool], bool]
) -> str | None:
    """Where a loss or gradient first stops being finite: computes a step again without the optimiser.

    All ranks take part, as their modules may communicate. Gradients are left cleared.

    Args:
        model: whose modules and parameters are looked at.
        losses: computes the loss of each micro-batch of this rank; is called up to twice.
        any_rank: whether any rank says yes.

    Returns:
        The place, for people; None if the forward pass is finite here and another rank has the fault.
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, torch.Tensor) and not output.isfinite().all():
                found.append(f"the output of {name}")

        return hook

    # A module is done before the one that holds it, so the first is the innermost. Compiled code calls no hooks.
    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    with torch.compiler.set_stance("force_eager"):
        with torch.no_grad():
            for loss in losses():
                if not found and not loss.isfinite():
                    found.append("the loss")
        for handle in hooks:
            handle.remove()
        if any_rank(bool(found)):
            return found[0] if found else None
        for loss in losses():
            loss.backward()
    gradients = {name: local_part(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    model.zero_grad(set_to_none=True)
    if any_rank(bool(bad)):
        return f"the gradient of {bad[-1]}" if bad else None
    return "nothing that could be found: computed again, all is finite"


def report_not_finite(first: int, last: int, place: str | None, samples: list[str]) -> str:
    """What is known of the steps that were skipped, for people, in one line."""
    line = f"the loss or its gradient is not finite at step {first}"
    if last > first:
        line += f" nor at the {last - first} after it"
    if place is None:
        return f"{line}, from another rank's batch"
    return f"{line}, first {place}, in the batch with {', '.join(samples)}"


def restart_hazard() -> str | None:
    """What would keep torchrun's --max-restarts from working here; None if nothing is known to.

    Its store outlives the ranks, so those that it starts anew may read the addresses of those before them
    (pytorch#135712).
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return "torchrun --max-restarts may fail: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before it"
    return None


def require_finite(finiteness_check: torch.Tensor, step: int) -> None:
    """Looks at a number that is finite only if all weights are, before they are saved; waits for the device once.

    Raises:
        UserError: it is not, so that saving them would poison the newest checkpoint.
    """
    if not finiteness_check.isfinite():
        raise UserError(
            f"the weights after step {step} are not finite and were not saved: lower --blr (or use --precision fp32), "
            "then continue with --resume auto"
        )
