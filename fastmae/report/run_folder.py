"""Reads a run folder for people who compare runs: settings, logs, accuracies, events and pictures.

A run may be alive, killed, or of an earlier version, and its files may be damaged: what is usable is read, and the rest
is counted in ``RunRecord.problems``. Nothing is written, and torch is not needed.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar

from fastmae.errors import UserError
from fastmae.files import open_file, read_json, read_rows

EVENTS = "events.jsonl"
LOCK = "run.lock"
ROLLBACKS = ("rollbacks.json", "detours.json")
"""The file, and what version 0.1 called it."""
LARGEST = 1e300
"""What is beyond it is damage, and does not fit every type."""
MOST = 2**53
"""So many steps or epochs no run has."""
_PICTURE = re.compile(r"epoch-([0-9]{4,})\.png")
_OFFICIAL = re.compile(r"checkpoint-(0|[1-9][0-9]*)\.pth")

Status = Literal["complete", "running", "stopped", "unfinished"]
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """Something that happened to a run."""

    kind: str
    """``started``, ``resumed``, ``stopped``, ``rolled back``, ``skipped``, ``spike`` or ``complete``."""
    step: int | None
    """After how many steps; None where the run does not say."""
    text: str
    """The rest of the sentence, for people."""
    time: str = ""
    """In UTC; empty where the run does not say."""


@dataclass(frozen=True)
class RunRecord:
    """What a run folder tells."""

    folder: Path
    settings: dict[str, Any]
    """config.json; empty if it cannot be read."""
    rows: tuple[Row, ...]
    """metrics.jsonl: one per step, by rising ``step`` (from 1)."""
    epochs: tuple[Row, ...]
    """log.txt: one per epoch, by rising ``epoch`` (from 0)."""
    probes: dict[str, Any]
    """probe.json: ``before``, ``after``, and ``epochs`` by the number of epochs that were done, as text."""
    starts: tuple[Row, ...]
    """environment.jsonl: one per start, with ``command``, ``ranks``, ``versions``, ``hardware`` and ``backends``."""
    events: tuple[Event, ...]
    """What happened, by step."""
    reconstructions: dict[int, Path]
    """The pictures by epoch, counted from 0."""
    official: dict[int, Path]
    """The official files by epoch, counted from 0."""
    status: Status
    """``complete``: all epochs are done; ``running``: a process holds the folder; ``stopped``: by a signal, and saved;
    ``unfinished``: it was killed, or ended by an error."""
    problems: tuple[str, ...]
    """What could not be read, one line each."""

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    @cached_property
    def steps_per_epoch(self) -> int | None:
        """The number of steps of an epoch; None while the log does not tell it."""
        for row, after in pairwise(self.rows):
            epoch = row.get("epoch")
            if is_count(epoch) and after.get("epoch") == epoch + 1 and after["step"] == row["step"] + 1:
                return max(1, row["step"] // (epoch + 1))
        if self.rows and self.epochs and self.rows[-1].get("epoch") == self.epochs[-1]["epoch"]:
            return max(1, self.rows[-1]["step"] // (self.epochs[-1]["epoch"] + 1))
        return None

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Returns (step, value) of a number of metrics.jsonl, where it is there and finite."""
        return [(row["step"], float(row[key])) for row in self.rows if is_number(row.get(key))]

    def newest(self, key: str) -> float | None:
        """Returns the newest value of a number of metrics.jsonl, or of log.txt; None if neither has it."""
        for rows in (self.rows, self.epochs):
            for row in reversed(rows):
                if is_number(row.get(key)):
                    return float(row[key])
        return None


def is_number(value: Any) -> bool:
    """Tells whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def is_count(value: Any) -> TypeGuard[int]:
    """Tells whether a value of JSON can be a number of steps or epochs."""
    return type(value) is int and 0 <= value < MOST


def is_run(folder: Path) -> bool:
    """Tells whether a folder is a run's, of ``pretrain`` or ``finetune``. Folders of transformers have a config.json,
    too."""
    has_config, has_start, *has_log = (
        (folder / name).is_file() for name in ("config.json", "environment.jsonl", "metrics.jsonl", "log.txt")
    )
    return any(has_log) or (has_config and has_start)


def read_run(folder: str | Path) -> RunRecord:
    """Reads a run folder, whatever its state.

    Raises:
        UserError: the folder is not there, or holds no run.
    """
    folder = Path(folder).expanduser()
    if not is_run(folder):
        what = "is no run folder" if folder.is_dir() else "is not there"
        raise UserError(f"{folder}: {what}; name a folder that fastmae pretrain or finetune wrote (--output_dir)")
    problems: list[str] = []
    settings: Any = _tried(problems, folder / "config.json", read_json, {})
    if not isinstance(settings, dict):
        problems.append("config.json: no object")
        settings = {}
    rows = _numbered(problems, folder / "metrics.jsonl", "step")
    epochs = _numbered(problems, folder / "log.txt", "epoch")
    starts = tuple(_rows(problems, folder / "environment.jsonl"))
    probes, problem = read_probes(folder)
    problems += [f"probe.json: {problem}"] if problem else []
    events = _events(folder, problems, rows, starts)
    return RunRecord(
        folder=folder,
        settings=settings,
        rows=rows,
        epochs=epochs,
        probes=probes,
        starts=starts,
        events=events,
        reconstructions=_by_epoch(folder / "reconstructions", _PICTURE),
        official=_by_epoch(folder, _OFFICIAL),
        status=_status(folder, settings, epochs, events),
        problems=tuple(problems),
    )


# --- files ------------------------------------------------------------------------------------------------------------


def _tried(problems: list[str], path: Path, read: Callable[[Path], T], otherwise: T) -> T:
    """Returns what ``read`` does; what it raises becomes a problem, but a file may be missing."""
    try:
        return read(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        problems.append(f"{path.name}: cannot be read ({reason})")
    return otherwise


def _rows(problems: list[str], path: Path) -> list[Row]:
    nothing: tuple[list[Row], int] = ([], 0)
    rows, damaged = _tried(problems, path, read_rows, nothing)
    if damaged:
        problems.append(f"{path.name}: {damaged} damaged line{'s' if damaged > 1 else ''}")
    return rows


def _numbered(problems: list[str], path: Path, key: str) -> tuple[Row, ...]:
    """Returns the rows of a log by their number; of two with one number the later, which a repeated step wrote."""
    rows = _rows(problems, path)
    by_number = {row[key]: row for row in rows if is_count(row.get(key))}
    strange = sum(not is_count(row.get(key)) for row in rows)
    if strange:
        problems.append(f"{path.name}: {strange} line{'s' if strange > 1 else ''} without {key}")
    return tuple(by_number[number] for number in sorted(by_number))


def _by_epoch(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    found = {int(match[1]): folder / match[0] for match in map(pattern.fullmatch, names) if match}
    return dict(sorted(found.items()))


def read_probes(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Returns what is usable of ``probe.json``, and what is wrong with it, if anything."""
    try:
        found = read_json(folder / "probe.json")
    except FileNotFoundError:
        return {}, None
    except (OSError, ValueError) as error:
        return {}, str(error)
    if not isinstance(found, dict):
        return {}, "no object"
    usable = {when: found[when] for when in ("before", "after") if _is_probe(found.get(when))}
    epochs = found.get("epochs", {})
    if isinstance(epochs, dict):
        kept = {number: one for number, one in epochs.items() if re.fullmatch(r"[0-9]{1,9}", number) and _is_probe(one)}
        usable |= {"epochs": kept} if kept else {}
    lost = sorted(found.keys() - usable.keys())
    more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
    return usable, f"no accuracies under {', '.join(lost[:4])}{more}" if lost else None


def _is_probe(entry: Any) -> bool:
    return isinstance(entry, dict) and all(is_number(entry.get(key)) for key in ("knn", "linear"))


# --- what happened ----------------------------------------------------------------------------------------------------


def _events(folder: Path, problems: list[str], rows: Iterable[Row], starts: Iterable[Row]) -> tuple[Event, ...]:
    events = [
        Event(str(row.get("event")), row["step"], str(row.get("text", "")), str(row.get("time", "")))
        for row in _rows(problems, folder / EVENTS)
        if is_count(row.get("step"))
    ]
    if not events:  # a run from before there was such a file
        events = [Event("started" if n == 0 else "resumed", None if n else 0, "") for n, _ in enumerate(starts)]
        steps: Any
        for steps in (_tried(problems, folder / name, read_json, None) for name in ROLLBACKS):
            found = [step for step in steps if is_count(step)] if isinstance(steps, list) else []
            events += [Event("rolled back", step, "and went on with other data") for step in found]
    first: int | None = None
    last = 0
    for row in (*rows, {"step": -1}):
        if row.get("skipped") is True:
            first, last = first or row["step"], row["step"]
        elif first is not None:
            which = f"step {first}" if first == last else f"steps {first} to {last}"
            events.append(Event("skipped", last, f"{which}: a loss or gradient was not finite"))
            first = None
        if is_number(row.get("spike")):
            above = f"{row['spike']:.0f} robust standard deviations above those before"
            events.append(Event("spike", row["step"], f"the loss was {above}"))
    return tuple(sorted(events, key=lambda event: -1 if event.step is None else event.step))


def _status(folder: Path, settings: dict[str, Any], epochs: tuple[Row, ...], events: tuple[Event, ...]) -> Status:
    if is_held(folder):
        return "running"
    total = settings.get("epochs")
    if epochs and type(total) is int and epochs[-1]["epoch"] + 1 >= total:
        return "complete"
    told = sorted((event for event in events if event.time), key=lambda event: event.time)
    return "stopped" if told and told[-1].kind == "stopped" else "unfinished"  # of one second the last counts


def is_held(folder: Path) -> bool:
    """Tells whether a process holds a run folder. The file of the lock is empty when nobody does."""
    try:
        with open_file(folder / LOCK) as file:
            if not file.read(1):
                return False
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # a run that begins now waits for some seconds
            except BlockingIOError:
                return True
            return False  # it was killed
    except OSError:
        return False
