"""What a run reports: metrics.jsonl (every optimiser step), log.txt (every epoch), progress on screen.

Losses wait in a buffer on the device and are read every few steps, so that logging never makes the device wait.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastmae.data.loader import LoadingStats
from fastmae.errors import UserError
from fastmae.files import JsonLines, fsync_file, write_text

METRICS = "metrics.jsonl"
LOG = "log.txt"
QUIET_SECONDS = 15.0
NO_SPEED = "– images/s"
KNOWN_LOSSES = 200  # of a resumed run, for finding spikes


class StepResult(Protocol):
    """What a step came to: scalars on the device."""

    @property
    def loss(self) -> torch.Tensor: ...

    @property
    def grad_norm(self) -> torch.Tensor: ...

    @property
    def skipped(self) -> torch.Tensor: ...


class Sink(Protocol):
    """Another place for the lines of metrics.jsonl."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class StepLog:
    """Collects steps and writes them out, and says what is unusual about them.

    ``loading`` is for the batches of this rank; with ``epoch_sums`` a resumed run goes on with the epoch's averages.
    A step that was skipped has ``skipped`` in its line and does not count for them.

    Args:
        run: the run folder.
        device: of the numbers that are added.
        log_freq: steps between reads of the numbers.
        rank, ranks: this process among those that log together.
        mean_over_ranks: of a tensor; the only communication, once a read.
        num_workers: decoding threads a rank.
        spike_score: the score of a loss that is a spike, None for another.
        sinks: take the lines as well.
        say: shows a line to people.
    """

    def __init__(
        self,
        run: Path,
        *,
        device: torch.device,
        log_freq: int,
        rank: int,
        ranks: int,
        mean_over_ranks: Callable[[torch.Tensor], torch.Tensor],
        num_workers: int,
        spike_score: Callable[[float], float | None],
        sinks: Sequence[Sink],
        say: Callable[[str], None],
    ) -> None:
        self.loading = LoadingStats()
        self._num_workers = num_workers
        self._run, self._device, self._log_freq = run, device, log_freq
        self._rank, self._ranks, self._mean_over_ranks, self._writes = rank, ranks, mean_over_ranks, rank == 0
        self._metrics, self._log = JsonLines(run / METRICS), JsonLines(run / LOG)
        self._waiting = torch.zeros(3, log_freq, device=device)  # loss, gradient norm, and whether it was skipped
        self._rows: list[dict[str, Any]] = []
        self._spike_score, self._sinks, self._say = spike_score, sinks, say
        self._images, self._seconds_at_peak, self._since = 0, 0.0, time.perf_counter()
        self.epoch_sums = {"loss": 0.0, "lr": 0.0, "steps": 0}
        self.latest: dict[str, Any] = {}
        self.skipped_in_a_row = 0
        """Of the steps that were read, the last ones that were skipped; the same on all ranks."""
        self.skipped = 0

    def resume(self, step: int, epoch: int, epoch_sums: dict[str, Any] | None) -> None:
        """Forgets what was logged after the step that the run goes on from, and takes up the epoch's averages."""
        if epoch_sums is not None:
            self.epoch_sums = dict(epoch_sums)
        if self._writes:
            rows = _keep_lines(self._run / METRICS, lambda row: row["step"] <= step)
            _keep_lines(self._run / LOG, lambda row: row["epoch"] < epoch)
            self.skipped = sum(row.get("skipped", False) for row in rows)
            for row in rows[-KNOWN_LOSSES:]:
                if row["loss"] is not None:
                    self._spike_score(row["loss"])

    def add(
        self,
        result: StepResult,
        *,
        step: int,
        epoch: int,
        lr: float,
        images: int,
        seconds_at_peak: float | None = None,
        measured: Mapping[str, float] | None = None,
    ) -> None:
        """Notes a step. Waits for the device when a read is due.

        Args:
            step: counted from 1.
            images: over all ranks.
            seconds_at_peak: what it would take if all devices computed at their peak (MFU 1), if it is known.
            measured: other numbers of the weights after it, for its line.
        """
        for kind, value in enumerate((result.loss, result.grad_norm, result.skipped)):
            self._waiting[kind, len(self._rows)] = value
        self._rows.append({"step": step, "epoch": epoch, "loss": None, "lr": lr, **(measured or {})})
        self._images += images
        self._seconds_at_peak += seconds_at_peak or 0.0
        if step % self._log_freq == 0:
            self.flush(is_log_step=True)
        elif len(self._rows) == self._log_freq:
            self.flush()

    def flush(self, *, is_log_step: bool = False) -> None:
        """Reads the waiting numbers and writes their lines. All ranks call it at the same steps."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        worst = [self.loading.wait, peak_memory(self._device)] if is_log_step else []
        steps, worst = self._read(len(rows), worst)
        elapsed = time.perf_counter() - self._since  # now that the device has done what was asked of it
        before = self.skipped
        for row, (loss, grad_norm, skipped) in zip(rows, steps, strict=True):
            self._count(row, loss, grad_norm, bool(skipped))
        if self.skipped > before:
            last = max(row["step"] for row in rows if "skipped" in row)
            self._say(
                f"skipped         {self.skipped - before} of the last {len(rows)} steps, the latest is step {last}: a "
                "loss or gradient was not finite, and no weight was changed"
            )
        if is_log_step:
            speed = self._images / elapsed
            mfu = {"mfu": round(self._seconds_at_peak / elapsed, 4)} if self._seconds_at_peak else {}
            rows[-1] |= {
                "images_per_second": round(speed, 1),
                **mfu,
                **self.loading.summary(elapsed, self._num_workers),
                "data_wait": round(worst[0] / elapsed, 4),
                "peak_memory": round(worst[1]),
            }
            self._images, self._seconds_at_peak = 0, 0.0
            self.loading, self._since = LoadingStats(), time.perf_counter()
        self.latest |= rows[-1]
        if self._writes:
            self._metrics.add(rows)
            for row in rows:
                for sink in self._sinks:
                    sink.write(row)

    def _read(self, count: int, mine: list[float]) -> tuple[list[list[float]], list[float]]:
        """(loss, gradient norm, skipped) of ``count`` steps, means over ranks; the largest over ranks of ``mine``."""
        table = torch.zeros(self._ranks, len(mine), device=self._device)
        table[self._rank] = torch.tensor(mine, device=self._device)
        # Where only this rank's row is not zero, the mean holds every rank's: one exchange for all.
        both = self._mean_over_ranks(torch.cat([self._waiting[:, :count].T.flatten(), table.flatten()])).cpu()
        table = both[3 * count :].view(self._ranks, len(mine)) * self._ranks
        return both[: 3 * count].view(count, 3).tolist(), table.amax(dim=0).tolist()

    def _count(self, row: dict[str, Any], loss: float, grad_norm: float, skipped: bool) -> None:
        """Completes a line and adds it to the sums."""
        for key, value in (("loss", loss), ("grad_norm", grad_norm)):
            row[key] = value if math.isfinite(value) else None  # JSON has no NaN
        if skipped:
            row["skipped"] = True
            self.skipped += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self.epoch_sums["loss"] += loss
        self.epoch_sums["lr"] += row["lr"]
        self.epoch_sums["steps"] += 1
        spike = self._spike_score(loss)
        if spike is not None:
            row["spike"] = round(spike, 1)
            above = f"{spike:.0f} robust standard deviations above those before"
            self._say(f"loss spike      {loss:.4f} at step {row['step']}, {above}")

    def sync(self) -> None:
        """Flushes, and makes what was written survive a power cut: a checkpoint must not be newer than its log."""
        self.flush()
        for name in (METRICS, LOG) if self._writes else ():
            if (self._run / name).exists():
                fsync_file(self._run / name)

    def end_epoch(self, epoch: int, results: dict[str, Any] | None = None) -> None:
        """Writes the published line of an epoch: its mean loss and learning rate, null if every step was skipped; and
        the ``results`` of a test after it.
        """
        self.flush()
        sums, self.epoch_sums = self.epoch_sums, {"loss": 0.0, "lr": 0.0, "steps": 0}
        means = {key: sums[key] / sums["steps"] if sums["steps"] else None for key in ("lr", "loss")}
        line = {"train_lr": means["lr"], "train_loss": means["loss"], **(results or {}), "epoch": epoch}
        if self._writes:
            self._log.add([line])

    def close(self) -> None:
        """Ends the sinks, too.

        Raises:
            UserError: lines could not be written to the end.
        """
        for sink in self._sinks:
            sink.close()
        for file in (self._metrics, self._log):
            file.add([])
            if len(file):
                raise UserError(
                    f"{file.path} lacks the last {len(file)} lines, for which there was no room; free space"
                )


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the GPU, or resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Screen:
    """A progress bar on a terminal, a line now and then elsewhere, nothing on other ranks."""

    def __init__(self, *, total_steps: int, epochs: int, images_a_step: int, start_step: int, shows: bool) -> None:
        self.console = Console(quiet=not shows, soft_wrap=True, highlight=False)
        self._epochs, self._total, self._images_a_step = epochs, total_steps, images_a_step
        self._said = time.perf_counter()
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  lr {task.fields[lr]}  {task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shows and self.console.is_terminal),
        )
        self._task = self._bar.add_task(
            "train",
            total=total_steps,
            completed=start_step,
            epoch=0,
            epochs=epochs,
            loss="–",
            lr="–",
            speed=NO_SPEED,
        )

    def __enter__(self) -> Screen:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self.console.print(line, markup=False)

    def update(self, step: int, epoch: int, latest: dict[str, Any]) -> None:
        """Shows the step, and the newest numbers that were read."""
        shown: dict[str, Any] = {"epoch": epoch + 1}
        if latest:
            loss = "not finite" if latest["loss"] is None else f"{latest['loss']:.4f}"
            shown |= {"loss": loss, "lr": f"{latest['lr']:.2e}", "speed": _speed(latest)}
        self._bar.update(self._task, completed=step, **shown)
        due = time.perf_counter() - self._said > QUIET_SECONDS
        if not self.console.is_terminal and latest and (due or step == self._total):
            self._said = time.perf_counter()
            left = ""
            if "images_per_second" in latest and step < self._total:
                seconds = (self._total - step) * self._images_a_step / max(latest["images_per_second"], 1e-9)
                left = f"  {timedelta(seconds=round(seconds))} left"
            self.console.print(
                f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._total}  loss {shown['loss']}  "
                f"lr {shown['lr']}  {shown['speed']}{left}"
            )


def _speed(latest: dict[str, Any]) -> str:
    """How fast the run is and what limits it; the MFU where the device's peak is known."""
    if "images_per_second" not in latest:
        return NO_SPEED
    parts = [f"{latest['images_per_second']:,.0f} images/s"]
    if "mfu" in latest:
        parts.append(f"MFU {latest['mfu']:.1%}")
    parts += [f"data wait {latest['data_wait']:.0%}", f"memory {latest['peak_memory'] / 2**30:.1f} GiB"]
    return "  ".join(parts)


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drops the lines of a JSON-lines file that fail ``keep``, and a last one that was cut off by a kill."""
    if not path.exists():
        return []
    lines, rows = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            if keep(row):
                lines.append(line + "\n")
                rows.append(row)
        except (ValueError, KeyError):
            continue
    write_text(path, "".join(lines))
    return rows
