"""The training of one trial: a process that runs the command in the trial's run folder, watched and stopped from here.

A trial that crashes, or is killed for its memory, is a failed trial; the sweep goes on.
"""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmae.config.load import settings_as_words
from fastmae.config.sweep import COMMANDS, PROBES, Sweep
from fastmae.errors import UserError, in_one_line
from fastmae.files import open_file, read_rows
from fastmae.launch import read_launch
from fastmae.report.run_folder import is_held, is_number, read_probes
from fastmae.signals import EXIT_INTERRUPTED, StopSignals

OUTPUT = "output.txt"
"""In the run folder: what the process prints."""
PREFIX = "fastmae: "
LOOK = 0.5
"""Seconds between two looks at what a trial has reached."""
TAIL = 1 << 16
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Outcome:
    """How the training of a trial ended."""

    status: int
    """0: it is done; 75: a signal stopped it, and it goes on later; otherwise it failed."""
    reason: str = ""
    """Why it failed, in a line."""


Train = Callable[[Sweep, Mapping[str, Any], Path, StopSignals, Callable[[], bool]], Outcome]
"""Trains a trial with some settings in a folder, or goes on with it, until it is done, a signal came, or the last
argument says that it is to be stopped."""


def words_of(sweep: Sweep, searched: Mapping[str, Any], folder: Path) -> list[str]:
    """Returns the words behind ``fastmae`` that train a trial, or go on with it."""
    settings = {**sweep.settings, **searched, "output_dir": str(folder), "resume": "auto"}
    return [sweep.command, *settings_as_words(settings, COMMANDS[sweep.command])]


def train_in_a_process(launch: str = "") -> Train:
    """Returns what trains each trial in a process of its own, started by the words of ``launch`` if there are any.

    Raises:
        UserError: this process is one of several ranks, each of which would sweep.
    """
    if read_launch(os.environ).size > 1:
        raise UserError('fastmae sweep: is one process; start its trials with --launch "torchrun …" instead')
    start = [*shlex.split(launch), "-m", "fastmae"] if launch else [sys.executable, "-m", "fastmae"]

    def train(
        sweep: Sweep, searched: Mapping[str, Any], folder: Path, stop: StopSignals, is_enough: Callable[[], bool]
    ) -> Outcome:
        if not _wait_for_the_former(folder, stop):
            return Outcome(EXIT_INTERRUPTED)
        words = [*start, *words_of(sweep, searched, folder)]
        with open(folder / OUTPUT, "ab") as output:
            output.write(f"$ {shlex.join(words)}\n".encode())
            output.flush()
            try:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={name: value for name, value in os.environ.items() if name not in RANK_VARIABLES},
                    preexec_fn=_ends_with_its_parent(),
                )
            except OSError as error:
                return Outcome(2, f"{words[0]}: cannot be started ({error.strerror})")
        told = False
        while process.poll() is None:
            if not told and (stop.received is not None or is_enough()):
                process.send_signal(signal.SIGTERM)
                told = True
            try:
                process.wait(LOOK)
            except subprocess.TimeoutExpired:
                continue
        if process.returncode == -signal.SIGKILL:
            time.sleep(1)  # where all processes of a job are killed, this one must not live to call it a failure
        status = process.returncode
        if stop.received is not None and status != 0:  # torchrun's status is not that of its ranks
            return Outcome(EXIT_INTERRUPTED)
        return Outcome(status, "" if status in (0, EXIT_INTERRUPTED) else _reason(folder / OUTPUT, status))

    return train


def _wait_for_the_former(folder: Path, stop: StopSignals) -> bool:
    """Waits until the process of a killed sweep has left the folder. Returns whether no signal came meanwhile."""
    while is_held(folder):
        if stop.received is not None:
            return False
        time.sleep(LOOK)
    return True


def _ends_with_its_parent() -> Callable[[], None]:
    """Returns what a child calls before it becomes the training: SIGTERM comes to it when its parent dies."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def call() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(EXIT_INTERRUPTED)

    return call


def _reason(path: Path, status: int) -> str:
    """Returns the last line with which fastmae said why a training ended, or the last line at all."""
    with open_file(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    said = next((line.removeprefix(PREFIX) for line in reversed(lines) if line.startswith(PREFIX)), "")
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    last = said or ("" if lines[-1].startswith("$ ") else lines[-1])
    return f"{how}: {in_one_line(last)}" if last else how


def reached(folder: Path, metric: str) -> dict[int, float]:
    """Returns what a trial reached by now, by the number of epochs after which it was measured.

    A loss that is not finite is NaN.
    """
    if metric in PROBES:
        epochs = read_probes(folder)[0].get("epochs", {})
        values = {int(number): accuracies[metric] for number, accuracies in epochs.items()}
    else:
        rows = [row for row in read_rows(folder / "log.txt")[0] if metric in row and type(row.get("epoch")) is int]
        values = {row["epoch"] + 1: row[metric] for row in rows}
    return {epochs: float(value) if is_number(value) else math.nan for epochs, value in sorted(values.items())}
