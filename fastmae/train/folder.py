"""A run's folder before training begins: what an earlier run left in it, and whether there is room.

What is found is refused, kept, or moved aside with a line that says so. Nothing is deleted, and names that a run does
not give are left alone.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from fastmae.checkpoint.manifest import FOLDER, SAVED, BadCheckpointError, newest_first, superseded
from fastmae.errors import SettingError, UserError
from fastmae.files import json_lines, open_file, write_text
from fastmae.messages import logger
from fastmae.report.run_folder import read_probes
from fastmae.train.schedule import Steps

AUTO, ANEW = "auto", "anew"
"""What --resume takes beside paths."""
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""Variables that are not 0 where torchrun or SLURM repeats a command: then a run goes on instead of beginning anew."""
EARLIER = "earlier"
ROOM = 3
"""So many checkpoints should fit on the disk: two that are kept and one that is being written."""

# The files by which a run is known, those that it appends to, and what else it writes into its folder.
_N = "(?:0|[1-9][0-9]*)"
OFFICIAL = re.compile(rf"checkpoint-({_N})(-ema)?\.(pth|safetensors)")
_RECORDS = re.compile(rf"metrics\.jsonl|log\.txt|(probe|rollbacks|detours|saved)\.json|quarantine(-{_N})?\.jsonl")
_APPENDED = re.compile(rf"(metrics|quarantine(-{_N})?|environment|events)\.jsonl|log\.txt")
_OTHERS = re.compile(
    rf"config\.(json|yaml)|(environment|events)\.jsonl|hang-{_N}\.txt|"
    rf"superseded-(metrics|log|probe|checkpoint-{_N}(-ema)?)(-{_N})?\.(jsonl|txt|json|pth|safetensors)"
)
_FOLDERS = (FOLDER, "reconstructions", "profile")


# --- what an earlier run left -----------------------------------------------------------------------------------------


def look_back(folder: Path, resume: str, steps: Steps, fresh_step: int, *, takes_files: bool) -> str:
    """Decides whether a run may begin or go on in a folder, by what lies there. The main rank calls it.

    Args:
        folder: the run folder.
        resume: as --resume says.
        steps: the schedule of the run.
        fresh_step: the step at which a run begins that resumes nothing.
        takes_files: whether such a run can go on from an official file.

    Returns:
        What is to be resumed: ``resume``; nothing where the run begins anew.

    Raises:
        UserError: a run is there that was not asked for, one of which nothing is left to resume, or something of it
            cannot be used.
    """
    names = _names(folder)
    _require_usable(folder, names)
    try:
        has_checkpoints = bool(newest_first(folder))
    except BadCheckpointError as error:
        raise UserError(f"{folder}: {error}; mend its permissions, then run the command again") from error
    records = [name for name in names if _RECORDS.fullmatch(name) or OFFICIAL.fullmatch(name)]
    if resume == ANEW and any(os.environ.get(name, "0") not in ("", "0") for name in RESTARTS):
        resume = AUTO
    if resume == ANEW:
        _set_aside(folder, [*records, *(name for name in names if _OTHERS.fullmatch(name) or name in _FOLDERS)])
        return ""
    if not continues(resume, folder):
        if has_checkpoints or records:
            found = _listed([FOLDER] * has_checkpoints + records)
            problem = f"holds a run already ({found}); continue it with --resume=auto, begin anew with --resume=anew"
            raise SettingError("output_dir", str(folder), f"{problem}, or name another")
        return resume
    if resume == AUTO and not has_checkpoints:
        _require_beginning(folder, names, steps, fresh_step, takes_files)
        for path in set_aside_official(folder, 0):  # of epochs before the first checkpoint, or that were rolled back
            logger.warning("%s: kept from the run that begins again, under this name", path)
    return resume


def continues(resume: str, folder: Path) -> bool:
    """Returns whether --resume goes on with the run of a folder, from wherever."""
    return resume == AUTO or (bool(resume) and Path(resume).resolve().is_relative_to(folder.resolve()))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SettingError("output_dir", str(folder), f"cannot be read ({error}); name another") from error


def _require_usable(folder: Path, names: list[str]) -> None:
    """Opens what a run reads and writes, so that damage is told now and not after the training.

    Raises:
        UserError: naming what cannot be used.
    """
    for name in names:
        path = folder / name
        try:
            if name in _FOLDERS:
                if not path.is_dir():
                    raise OSError(errno.ENOTDIR, "is not a folder", name)
            elif _RECORDS.fullmatch(name) or _OTHERS.fullmatch(name) or OFFICIAL.fullmatch(name):
                open_file(path).close()
                if _APPENDED.fullmatch(name):
                    open(path, "ab").close()
        except OSError as error:
            problem = f"cannot be used ({error.strerror}); move it away or mend it, then run the command again"
            raise UserError(f"{path}: {problem}") from error


def _set_aside(folder: Path, names: list[str]) -> None:
    """Moves files and folders of an earlier run into ``earlier-N``, of which the number is free."""
    if not names:
        return
    number = 1
    while os.path.lexists(aside := folder / f"{EARLIER}-{number}"):
        number += 1
    aside.mkdir()
    for name in names:
        (folder / name).rename(aside / name)
    logger.warning("%s: what the earlier run left is in %s (%s)", folder, aside, _listed(names))


def _require_beginning(folder: Path, names: list[str], steps: Steps, fresh_step: int, takes_files: bool) -> None:
    """Refuses to begin where a run was, of which a checkpoint was saved or must have been.

    A run that was killed before its first checkpoint begins again, also behind the end of an epoch, and so does one
    that was rolled back to where it began. The first checkpoint may be unfinished until the second is due, which waits
    for it.

    Raises:
        SettingError: saying what was found, and what can be done.
    """
    official = sorted((name for name in names if OFFICIAL.fullmatch(name)), key=_order)
    found = [f"{SAVED} tells of a checkpoint"] if SAVED in names else []
    if "rollbacks.json" not in names and "detours.json" not in names:
        overdue = fresh_step + 2 * steps.between_checkpoints
        if official and (_epoch_of(official[-1]) + 1) * steps.per_epoch > overdue:
            found.append(f"{official[-1]}{f' and {len(official) - 1} more' if official[1:] else ''}")
        first, last = _first_and_last(folder / "metrics.jsonl", "step")
        _, epoch = _first_and_last(folder / "log.txt", "epoch")
        if last > overdue or first > fresh_step + 1:
            found.append(f"steps {first} to {last} in metrics.jsonl")
        elif (epoch + 1) * steps.per_epoch > overdue:
            found.append(f"epoch {epoch} in log.txt")
        if set(read_probes(folder)[0]) - {"before"}:
            found.append("accuracies after training in probe.json")
    if not found:
        return
    training_files = [name for name in official if name.endswith(".pth") and "-ema" not in name]
    from_file = f"--resume={folder / training_files[-1]}, " if takes_files and training_files else ""
    problem = (
        f"{folder} holds a run ({', '.join(found)}), but no checkpoint to go on from; restore {folder / FOLDER}, or "
        f"use {from_file}--resume=anew (which moves that run into a folder) or another --output_dir"
    )
    raise SettingError("resume", AUTO, problem)


def _order(name: str) -> tuple[int, bool]:
    return _epoch_of(name), name.endswith(".pth")


def _epoch_of(name: str) -> int:
    match = OFFICIAL.fullmatch(name)
    assert match is not None
    return int(match[1])


def _first_and_last(path: Path, key: str) -> tuple[int, int]:
    """Returns the smallest and the largest number under a key of JSON lines; (-1, -1) if there is none."""
    numbers = [row[key] for _, row in json_lines(path) if row is not None and isinstance(row.get(key), int)]
    return min(numbers, default=-1), max(numbers, default=-1)


def _listed(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def set_aside_official(folder: Path, epochs: int) -> list[Path]:
    """Renames the official files of epochs after the first ``epochs``, which would be overwritten; returns their new
    paths.
    """
    later = [name for name in _names(folder) if OFFICIAL.fullmatch(name) and _epoch_of(name) >= epochs]
    return [(folder / name).rename(superseded(folder / name)) for name in later]


# --- accuracies -------------------------------------------------------------------------------------------------------


def take_up_probes(folder: Path, *, goes_on: bool) -> None:
    """Brings ``probe.json`` to what is true of a run that is about to go on. The main rank calls it.

    What is damaged, and the accuracies after training where training goes on, are kept in another file.
    """
    usable, problem = read_probes(folder)
    is_stale = goes_on and "after" in usable
    if problem is None and not is_stale:
        return
    path = folder / "probe.json"
    aside = path.rename(superseded(path))
    kept = {key: value for key, value in usable.items() if key != "after" or not goes_on}
    if kept:
        write_text(path, json.dumps(kept, indent=1))
    why = f"cannot be used ({problem})" if problem else "has the accuracies after a training that now goes on"
    logger.warning("%s %s: it is kept as %s", path, why, aside.name)


# --- room -------------------------------------------------------------------------------------------------------------


def require_room(folder: Path, size: int) -> None:
    """Compares the free space of a disk with the ``size`` of a checkpoint in bytes. The main rank calls it.

    Raises:
        SettingError: not even one fits. A line tells if fewer than three do, those that are there among them.
    """
    with suppress(OSError):
        usage = shutil.disk_usage(folder / FOLDER if (folder / FOLDER).is_dir() else folder)
        if usage.total == 0:  # some network file systems do not tell
            return
        sizes = f"{usage.free / 1e9:.2g} GB are free, and a checkpoint takes {size / 1e9:.2g} GB"
        if usage.free < size:
            raise SettingError("output_dir", str(folder), f"has no room: {sizes}; free space, or name another")
        if usage.free < (ROOM - min(ROOM - 1, len(newest_first(folder)))) * size:
            logger.warning("%s: %s; %d should fit: free space, or saving will fail", folder, sizes, ROOM)
