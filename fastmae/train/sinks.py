"""Copies of the log for other programs: TensorBoard, Weights & Biases. One that fails is stopped; the run goes on."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastmae.errors import SettingError, install_hint

# The names that the official script uses in TensorBoard.
NAMES = {"loss": "train_loss"}

Write = Callable[[dict[str, Any]], None]
Close = Callable[[], None]


class Sink:
    """Takes rows of the log until it fails, which is reported once."""

    def __init__(self, name: str, open_it: Callable[[], tuple[Write, Close]], say: Callable[[str], None]) -> None:
        self._name, self._say, self._works = name, say, True
        self._guard(lambda: self._open(open_it))

    def _open(self, open_it: Callable[[], tuple[Write, Close]]) -> None:
        self._write, self._close = open_it()

    def write(self, row: dict[str, Any]) -> None:
        self._guard(lambda: self._write(row))

    def close(self) -> None:
        self._guard(lambda: self._close())

    def _guard(self, act: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            act()
        except Exception as error:  # whatever it is, training matters more
            self._works = False
            reason = " ".join(str(error).split()) or type(error).__name__
            self._say(f"{self._name:15} failed and is off from here on; the run and metrics.jsonl go on ({reason})")


def check_sinks(log_dir: str | None, wandb: str | None) -> None:
    """Checks that the packages which they need are installed.

    Raises:
        UserError: a package is not installed.
    """
    for flag, value, module, name, extra in (
        ("log_dir", log_dir, "tensorboard", "TensorBoard", "track"),
        ("wandb", wandb, "wandb", "Weights & Biases", "wandb"),
    ):
        if value and importlib.util.find_spec(module) is None:
            raise SettingError(flag, value, f"{name} is not installed; {install_hint(extra)}")


def open_sinks(
    run: Path, *, log_dir: str | None, wandb: str | None, settings: dict[str, Any], say: Callable[[str], None]
) -> list[Sink]:
    """Opens the sinks that were asked for: TensorBoard files in ``log_dir``, a run in the W&B project ``wandb``."""
    sinks = []
    if log_dir:
        sinks.append(Sink("tensorboard", lambda: _tensorboard(log_dir), say))
    if wandb:
        sinks.append(Sink("wandb", lambda: _wandb(wandb, run, settings), say))
    return sinks


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row under the names that the sinks show."""
    return {NAMES.get(key, key): float(value) for key, value in row.items() if value is not None and key != "step"}


def _tensorboard(log_dir: str) -> tuple[Write, Close]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir)

    def write(row: dict[str, Any]) -> None:
        for name, value in _numbers(row).items():
            writer.add_scalar(name, value, row["step"])

    return write, writer.close


def _wandb(project: str, run: Path, settings: dict[str, Any]) -> tuple[Write, Close]:
    import wandb

    # A run folder is one run in W&B, however often it is resumed, and another one where it began anew.
    earlier = len(list(run.glob("earlier-[0-9]*")))
    identity = hashlib.sha256(os.fsencode(run.resolve()) + b"\0%d" % earlier * bool(earlier)).hexdigest()[:16]
    wandb_run = wandb.init(
        project=project,
        name=run.name,
        id=identity,
        resume="allow",
        dir=str(run),
        config=settings,
        settings=wandb.Settings(console="off"),
    )
    wandb_run.define_metric("*", step_metric="step")  # so that steps which are repeated after a rollback are taken
    return lambda row: wandb_run.log({**_numbers(row), "step": row["step"]}), wandb_run.finish
