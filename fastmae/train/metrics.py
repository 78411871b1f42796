"""What a run reports: metrics.jsonl (a line per optimiser step), log.txt (a line per epoch), and progress on screen.

Losses are collected in a buffer on the device and read every few steps, so that logging rarely makes the device wait.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastmae.checkpoint.manifest import SUPERSEDED
from fastmae.data.loader import LoadingStats
from fastmae.data.stock import count_of
from fastmae.errors import UserError
from fastmae.files import JsonLines, fsync_file, json_lines, write_whole
from fastmae.messages import logger
from fastmae.screen import open_console, printable

METRICS = "metrics.jsonl"
LOG = "log.txt"
QUIET_SECONDS = 15.0
EARLY_STEPS = (1, 2, 5, 10)
"""Steps of a process after which the first numbers are read and shown."""
RECENT_LOSSES = 200  # of a resumed run, with which spikes are detected


class StepResult(Protocol):
    """The result of a step: scalars on the device."""

    @property
    def loss(self) -> torch.Tensor: ...

    @property
    def grad_norm(self) -> torch.Tensor: ...

    @property
    def skipped(self) -> torch.Tensor: ...

    @property
    def told(self) -> Mapping[str, torch.Tensor]: ...


class Sink(Protocol):
    """Something else that takes the lines of metrics.jsonl."""

    def write(self, row: dict[str, Any]) -> None: ...

    def picture(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


class StepLog:
    """Collects the results of steps, writes them out, and reports unusual ones.

    ``loading`` collects the batches of this rank. ``epoch_sums`` holds the sums from which the averages of an epoch are
    computed; a resumed run continues them. A step that was skipped has ``skipped`` in its line and is not part of them.

    Args:
        run: the run folder.
        device: the device of the numbers that are added.
        log_freq: the number of steps between two reads.
        rank, ranks: this process among those that log together.
        mean_over_ranks: returns the mean of a tensor; it is the only communication, once per read.
        num_workers: the number of decoding threads per rank.
        spike_score: returns the score of a loss that is a spike, and None for any other.
        sinks: take the lines as well.
        tell: is called with the lines of steps once their numbers are read, on the rank that writes them.
        say: shows a line to people.
        early_steps: steps of this process after which numbers are read as well, so that a run soon shows them.
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
        early_steps: Sequence[int] = EARLY_STEPS,
        tell: Callable[[Sequence[dict[str, Any]]], None] | None = None,
    ) -> None:
        self.loading = LoadingStats()
        self._num_workers = num_workers
        self._run, self._device, self._log_freq = run, device, log_freq
        self._rank, self._ranks, self._mean_over_ranks, self._writes = rank, ranks, mean_over_ranks, rank == 0
        self._metrics, self._log = JsonLines(run / METRICS), JsonLines(run / LOG)
        # Loss, gradient norm, whether it was skipped, the share of masked patches that are no targets, what is told.
        self._waiting, self._told = torch.zeros(4, log_freq, device=device), list[str]()
        self._excluded: list[torch.Tensor] = []
        self._excludes = False
        self._rows: list[dict[str, Any]] = []
        self._steps_added, self._early_steps = 0, early_steps
        self._spike_score, self._sinks, self._say, self._tell = spike_score, sinks, say, tell
        self._images, self._seconds_at_peak, self._since = 0, 0.0, time.perf_counter()
        self.epoch_sums = {"loss": 0.0, "lr": 0.0, "steps": 0}
        self.latest: dict[str, Any] = {}
        self.skipped_in_a_row = 0
        """How many of the newest steps that were read were skipped, without a gap. It is the same on all ranks."""
        self.skipped = 0

    def resume(self, step: int, epoch: int, epoch_sums: dict[str, Any] | None) -> None:
        """Continues the averages of the epoch. Sets aside what was logged after the step from which the run goes on, as
        those steps come again.
        """
        if epoch_sums is not None:
            self.epoch_sums = dict(epoch_sums)
        if self._writes:
            rows = _take_up(self._run / METRICS, lambda row: row["step"] <= step, f"after step {step}", self._say)
            _take_up(self._run / LOG, lambda row: row["epoch"] < epoch, f"after epoch {epoch - 1}", self._say)
            self.skipped = sum(row.get("skipped") is True for row in rows)
            for row in rows[-RECENT_LOSSES:]:
                if isinstance(row.get("loss"), float):
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
        """Adds a step. Waits for the device when a read is due.

        Args:
            result: the scalars of the step.
            step: the number of the step, counted from 1.
            epoch: the epoch of the step, counted from 0.
            lr: the learning rate.
            images: the number of images over all ranks.
            seconds_at_peak: how long the step would take at the peak rate of all devices (MFU 1), if it is known.
            measured: accuracies of the weights after the step, for its line.
        """
        for kind, value in enumerate((result.loss, result.grad_norm, result.skipped, *self._take_excluded())):
            self._waiting[kind, len(self._rows)] = value
        for name, value in result.told.items():
            if name not in self._told:
                self._told.append(name)
                self._waiting = torch.cat([self._waiting, torch.zeros_like(self._waiting[:1])])
            self._waiting[4 + self._told.index(name), len(self._rows)] = value
        told = dict.fromkeys(result.told)
        self._rows.append({"step": step, "epoch": epoch, "loss": None, "lr": lr, **told, **(measured or {})})
        self._images += images
        self._seconds_at_peak += seconds_at_peak or 0.0
        self._steps_added += 1
        if step % self._log_freq == 0:
            self.flush(is_log_step=True)
        elif len(self._rows) == self._log_freq or self._steps_added in self._early_steps:
            self.flush()

    def exclude(self, share: torch.Tensor) -> None:
        """Notes of a micro-batch of the coming step which share of its masked patches are no targets; nobody waits."""
        self._excluded.append(share)
        self._excludes = True

    def _take_excluded(self) -> list[torch.Tensor]:
        shares, self._excluded = self._excluded, []
        return [torch.stack(shares).mean()] if shares else []

    def flush(self, *, is_log_step: bool = False) -> None:
        """Reads the collected numbers and writes their lines. All ranks call it at the same steps."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        worst = [self.loading.wait, peak_memory(self._device)] if is_log_step else []
        steps, worst = self._read(len(rows), worst)
        elapsed = time.perf_counter() - self._since  # now that the device has done what was asked of it
        before = self.skipped
        for row, (loss, grad_norm, skipped, excluded, *told) in zip(rows, steps, strict=True):
            row |= {name: _finite(value) for name, value in zip(self._told, told, strict=True) if name in row}
            self._count(row, loss, grad_norm, bool(skipped), excluded)
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
        if self._tell is not None:
            self._tell(rows)

    def _read(self, count: int, mine: list[float]) -> tuple[list[list[float]], list[float]]:
        """Returns (loss, gradient norm, skipped, excluded, what is told …) of ``count`` steps as means over ranks, and
        the maxima of ``mine``.
        """
        kinds = len(self._waiting)
        table = torch.zeros(self._ranks, len(mine), device=self._device)
        table[self._rank] = torch.tensor(mine, device=self._device)
        # Where only this rank's row is not zero, the mean holds every rank's: one exchange for all.
        both = self._mean_over_ranks(torch.cat([self._waiting[:, :count].T.flatten(), table.flatten()])).cpu()
        table = both[kinds * count :].view(self._ranks, len(mine)) * self._ranks
        return both[: kinds * count].view(count, kinds).tolist(), table.amax(dim=0).tolist()

    def _count(self, row: dict[str, Any], loss: float, grad_norm: float, skipped: bool, excluded: float) -> None:
        """Completes the line of a step and adds its numbers to the sums."""
        for key, value in (("loss", loss), ("grad_norm", grad_norm)):
            row[key] = _finite(value)
        if self._excludes:
            row["excluded"] = round(excluded, 6)
        if skipped:
            row["skipped"] = True
            self.skipped += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self.epoch_sums["loss"] += loss
        self.epoch_sums["lr"] += row["lr"]
        self.epoch_sums["steps"] += 1
        if self._excludes:
            self.epoch_sums["excluded"] = self.epoch_sums.get("excluded", 0.0) + excluded
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

    def picture(self, step: int, path: Path) -> None:
        """Hands a picture, made after a step counted from 1, to the sinks."""
        for sink in self._sinks:
            sink.picture(step, path)

    def leave_out(self, seconds: float) -> None:
        """Takes a pause, in which something was measured, out of the time from which rates are computed."""
        self._since += seconds

    def end_epoch(self, epoch: int, results: dict[str, Any] | None = None) -> None:
        """Writes the line of an epoch into log.txt: mean loss and learning rate, null if every step was skipped, and
        the ``results`` of a test after it.
        """
        self.flush()
        sums, self.epoch_sums = self.epoch_sums, {"loss": 0.0, "lr": 0.0, "steps": 0}
        means = {key: sums[key] / sums["steps"] if sums["steps"] else None for key in ("lr", "loss")}
        line = {"train_lr": means["lr"], "train_loss": means["loss"], **(results or {}), "epoch": epoch}
        if "excluded" in sums:
            line["excluded"] = round(sums["excluded"] / max(1, sums["steps"]), 6)
        if self._writes:
            self._log.add([line])

    def close(self) -> None:
        """Closes the sinks and writes the lines that could not be written before.

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


def _finite(value: float) -> float | None:
    """Returns a number as JSON can have it, which knows no NaN."""
    return value if math.isfinite(value) else None


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory in bytes: what was allocated on a GPU, or the resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _UnseenWarnings(logging.Handler):
    """Keeps the warnings that stderr did not take; it stands behind the handler that shows them."""

    def __init__(self, keep: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._keep = keep

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(sys.stderr, "shown", True):
            self._keep(record.getMessage())


class Screen:
    """Shows progress on the main rank: a bar on a terminal, otherwise a line now and then.

    A screen that is lost is none of the run's business: ``screen.Stream`` is silent from then on. Lines and warnings
    that it did not take are kept in the file ``unseen``, if one is given.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        epochs: int,
        images_per_step: int,
        start_step: int,
        shows: bool,
        unseen: Path | None = None,
        unit: str = "images",
    ) -> None:
        self._unit = unit  # what samples are called
        self._unseen, self._warnings = unseen, _UnseenWarnings(self._keep)
        self.console = open_console(quiet=not shows, soft_wrap=True)
        self._epochs, self._total, self._images_per_step = epochs, total_steps, images_per_step
        self._start_step = start_step
        self._started = self._first_done = self._printed = time.perf_counter()
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  lr {task.fields[lr]}  {task.fields[speed]}", markup=False),
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
            speed="",
        )

    def __enter__(self) -> Screen:
        self._started = time.perf_counter()
        logger.addHandler(self._warnings)
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
        logger.removeHandler(self._warnings)

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one, and logs it."""
        self.console.print(printable(line))
        if not getattr(self.console.file, "shown", True):
            self._keep(line)
        if not self.console.quiet:
            logger.info("%s", line)

    def _keep(self, line: str) -> None:
        if self._unseen is not None:
            with contextlib.suppress(OSError), open(self._unseen, "a", encoding="utf-8") as file:
                file.write(f"{printable(line)}\n")

    def update(self, step: int, epoch: int, latest: dict[str, Any]) -> None:
        """Shows the step, counted from 1, and the newest numbers that were read.

        Away from a terminal it prints a line after steps 1, 2, 5 and 10, then every 15 seconds, and at the end.
        """
        done, now = step - self._start_step, time.perf_counter()
        if done == 1:
            self._first_done = now
        shown: dict[str, Any] = {"epoch": epoch + 1}
        if latest:
            loss = "not finite" if latest["loss"] is None else f"{latest['loss']:.4f}"
            shown |= {"loss": loss, "lr": f"{latest['lr']:.2e}", "speed": self._speed(done, now, latest)}
        self._bar.update(self._task, completed=step, **shown)
        due = done in EARLY_STEPS or step == self._total or now - self._printed > QUIET_SECONDS
        if latest and due and not self.console.is_terminal:
            self._printed = now
            rate = self._rate(done, now, latest)
            left = ""
            if rate is not None and step < self._total:
                seconds = (self._total - step) * self._images_per_step / max(rate, 1e-9)
                left = f"  {timedelta(seconds=round(seconds))} left"
            self.console.print(
                f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._total}  loss {shown['loss']}  "
                f"lr {shown['lr']}  {shown['speed']}{left}"
            )

    def _rate(self, done: int, now: float, latest: dict[str, Any]) -> float | None:
        """Returns images/s: those of the log, or before its first measurement those since the first step."""
        if "images_per_second" in latest:
            return latest["images_per_second"]
        return (done - 1) * self._images_per_step / max(now - self._first_done, 1e-9) if done > 1 else None

    def _speed(self, done: int, now: float, latest: dict[str, Any]) -> str:
        """Returns how fast the run is and what limits it, with the MFU where the peak rate of the device is known."""
        rate = self._rate(done, now, latest)
        if rate is None:
            return f"first step in {now - self._started:.1f} s"
        parts = [f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s"]
        if "mfu" in latest:
            parts.append(f"MFU {latest['mfu']:.1%}")
        if "data_wait" in latest:
            parts += [f"data wait {latest['data_wait']:.0%}", f"memory {latest['peak_memory'] / 2**30:.1f} GiB"]
        return "  ".join(parts)


def _take_up(
    path: Path, keep: Callable[[dict[str, Any]], bool], after: str, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Returns the rows of a log with which a run goes on, those that pass ``keep``, and leaves them alone in the file.

    The other lines, and those that are damaged, are moved to the end of ``superseded-NAME`` beside it, with a line that
    counts them.
    """
    rows, kept, later, damaged = [], [], [], []
    for line, row in json_lines(path):
        try:
            is_kept = row is not None and keep(row)
        except (KeyError, TypeError):
            row = None
        if row is None:
            damaged.append(line)
        elif is_kept:
            kept.append(line)
            rows.append(row)
        else:
            later.append(line)
    if later or damaged:
        aside = path.with_name(SUPERSEDED + path.name)
        with open(aside, "ab") as file:
            file.writelines(line.rstrip(b"\n") + b"\n" for line in (*later, *damaged))
            file.flush()
            os.fsync(file.fileno())
        write_whole(path, lambda file: file.writelines(line.rstrip(b"\n") + b"\n" for line in kept))
        counts = [f"{count_of(len(later), 'lines')} {after}"] if later else []
        counts += [count_of(len(damaged), "damaged lines")] if damaged else []
        say(f"set aside       {' and '.join(counts)} of {path.name}, in {aside.name}")
    return rows
