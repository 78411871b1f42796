"""What a run reports: metrics.jsonl (every optimiser step), log.txt (every epoch), TensorBoard, progress on screen.

Losses wait in a buffer on the device and are read every few steps, so that logging never makes the device wait.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastmae.data.loader import LoadingStats
from fastmae.errors import UserError
from fastmae.files import fsync_file, write_text

METRICS = "metrics.jsonl"
LOG = "log.txt"
QUIET_SECONDS = 15.0
NO_SPEED = "– images/s"


class StepLog:
    """Collects steps and writes them out.

    ``loading`` is for the batches of this rank; with ``epoch_sums`` a resumed run goes on with the epoch's averages.
    """

    def __init__(
        self,
        run: Path,
        *,
        device: torch.device,
        log_freq: int,
        mean_over_ranks: Callable[[torch.Tensor], torch.Tensor],
        writes: bool,
        log_dir: str | None,
        num_workers: int,
    ) -> None:
        self.loading = LoadingStats()
        self._num_workers = num_workers
        self._run, self._device, self._log_freq = run, device, log_freq
        self._mean_over_ranks, self._writes = mean_over_ranks, writes
        self._losses = torch.zeros(log_freq, device=device)
        self._rows: list[dict[str, Any]] = []
        self._tensorboard = _summary_writer(log_dir) if writes and log_dir else None
        self._images, self._since = 0, time.perf_counter()
        self.epoch_sums = {"loss": 0.0, "lr": 0.0, "steps": 0}
        self.latest: dict[str, Any] = {}

    def resume(self, step: int, epoch: int, epoch_sums: dict[str, Any] | None) -> None:
        """Forgets what was logged after the step that the run goes on from, and takes up the epoch's averages."""
        if epoch_sums is not None:
            self.epoch_sums = dict(epoch_sums)
        if self._writes:
            _keep_lines(self._run / METRICS, lambda row: row["step"] <= step)
            _keep_lines(self._run / LOG, lambda row: row["epoch"] < epoch)

    def add(self, *, step: int, epoch: int, loss: torch.Tensor, lr: float, images: int) -> None:
        """Notes a step; ``step`` counts from 1, ``images`` over all ranks. No synchronisation."""
        self._losses[len(self._rows)] = loss
        self._rows.append({"step": step, "epoch": epoch, "loss": math.nan, "lr": lr})
        self._images += images
        if step % self._log_freq == 0:
            self.flush(is_log_step=True)
        elif len(self._rows) == self._log_freq:
            self.flush()

    def flush(self, *, is_log_step: bool = False) -> None:
        """Reads the waiting losses and writes their lines.

        Raises:
            UserError: a loss is not finite; its line is written first.
        """
        rows, self._rows = self._rows, []
        if not rows:
            return
        losses = self._mean_over_ranks(self._losses[: len(rows)]).tolist()
        for row, loss in zip(rows, losses, strict=True):
            row["loss"] = loss
            self.epoch_sums["loss"] += loss
            self.epoch_sums["lr"] += row["lr"]
            self.epoch_sums["steps"] += 1
        if is_log_step:
            elapsed = time.perf_counter() - self._since
            rows[-1] |= {
                "images_per_second": round(self._images / elapsed, 1),
                **self.loading.summary(elapsed, self._num_workers),
                "peak_memory": peak_memory(self._device),
            }
            self._images, self.loading, self._since = 0, LoadingStats(), time.perf_counter()
        self.latest |= rows[-1]
        if self._writes:
            _append(self._run / METRICS, rows)
        if self._tensorboard is not None:
            for row in rows:
                self._tensorboard.add_scalar("train_loss", row["loss"], row["step"])
                self._tensorboard.add_scalar("lr", row["lr"], row["step"])
        bad = next((row["step"] for row, loss in zip(rows, losses, strict=True) if not math.isfinite(loss)), None)
        if bad is not None:
            raise UserError(
                f"the loss at step {bad} is not finite; nothing was saved after it: lower --blr (or use --precision "
                "fp32), then continue with --resume auto"
            )

    def sync(self) -> None:
        """Flushes, and makes what was written survive a power cut: a checkpoint must not be newer than its log."""
        self.flush()
        for name in (METRICS, LOG) if self._writes else ():
            if (self._run / name).exists():
                fsync_file(self._run / name)

    def end_epoch(self, epoch: int) -> None:
        """Writes the published line of an epoch: its mean loss and learning rate."""
        self.flush()
        sums, self.epoch_sums = self.epoch_sums, {"loss": 0.0, "lr": 0.0, "steps": 0}
        line = {"train_lr": sums["lr"] / sums["steps"], "train_loss": sums["loss"] / sums["steps"], "epoch": epoch}
        if self._writes:
            _append(self._run / LOG, [line])

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on the GPU, or resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Screen:
    """A progress bar on a terminal, a line now and then elsewhere, nothing on other ranks."""

    def __init__(self, *, total_steps: int, epochs: int, start_step: int, shows: bool) -> None:
        self.console = Console(quiet=not shows, soft_wrap=True, highlight=False)
        self._epochs, self._total = epochs, total_steps
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
            speed="– images/s",
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
            shown |= {"loss": f"{latest['loss']:.4f}", "lr": f"{latest['lr']:.2e}"}
            shown["speed"] = NO_SPEED
            if "images_per_second" in latest:
                speed, wait = latest["images_per_second"], latest["data_wait"]
                shown["speed"] = f"{speed:,.0f} images/s  data wait {wait:.0%}"
        self._bar.update(self._task, completed=step, **shown)
        due = time.perf_counter() - self._said > QUIET_SECONDS
        if not self.console.is_terminal and latest and (due or step == self._total):
            self._said = time.perf_counter()
            self.console.print(
                f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._total}  loss {shown['loss']}  "
                f"lr {shown['lr']}  {shown['speed']}"
            )


def _summary_writer(log_dir: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--log_dir {log_dir}: TensorBoard is not installed; pip install 'fastmae[track]'") from error
    return SummaryWriter(log_dir)


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); free space, then continue with --resume auto") from error


def _keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the lines of a JSON-lines file that fail ``keep``, and a last one that was cut off by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if keep(json.loads(line)):
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    write_text(path, "".join(kept))
