"""A checkpoint's manifest and the names around it: what it says, how it is verified, which checkpoint is the newest.

``checkpoints/step-NNNNNNNN/`` holds one ``….safetensors`` per rank (its part of the weights and of AdamW's moments)
and ``manifest.json`` (the position of the run, its configuration, and the size and SHA-256 of every file). Nothing in
it can run code, and nothing in it is used before it is verified. This file knows nothing of tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmae.files import open_file

FOLDER = "checkpoints"
TENSORS = "*.safetensors"
MANIFEST = "manifest.json"
SUPERSEDED = "superseded-"
SAVED = "saved.json"
"""In the run folder: the newest step that was saved, so that a checkpoint which is gone is missed."""
LOOKS = 10
"""How often a reader looks for the newest checkpoint of a live run, which may delete the one that was found."""
_STEP = re.compile(r"step-(\d{8}|[1-9]\d{8,})", re.ASCII)


class BadCheckpointError(Exception):
    """A checkpoint that is not what its manifest says; the message says what is wrong with it."""


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest intact checkpoint of a run folder, and the newer ones that were refused, with reasons."""

    path: Path | None
    manifest: dict[str, Any]
    refused: tuple[str, ...]


def find_checkpoint(run: Path) -> NewestCheckpoint:
    """Finds the newest checkpoint that verifies. This reads every byte of each checkpoint that it tries.

    A live run deletes old checkpoints. If those that were listed are no longer there, the search begins again.

    Raises:
        BadCheckpointError: the folder of the checkpoints cannot be listed.
    """
    for _ in range(LOOKS):
        refused: list[str] = []
        listed = newest_first(run)
        for path in listed:
            try:
                manifest = read_manifest(path)
                if manifest["step"] != step_of(path):
                    raise BadCheckpointError(f"its {MANIFEST} is that of step {manifest['step']}")
                return NewestCheckpoint(path, manifest, tuple(refused))
            except BadCheckpointError as error:
                refused.append(f"{path}: {error}")
        if newest_first(run) == listed:
            break
    return NewestCheckpoint(None, {}, tuple(refused))


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint and compares its files with it, byte for byte.

    Raises:
        BadCheckpointError: a file is missing, truncated, changed or foreign.
    """
    name = MANIFEST
    try:
        manifest = _parsed(path)
        files = manifest["files"]
        foreign = {file.name for file in path.glob(TENSORS)} - files.keys()
        if foreign:
            raise BadCheckpointError(f"{min(foreign)} is not in {MANIFEST}")
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["size"]:
                raise BadCheckpointError(f"{name} has {size} bytes instead of {expected['size']}")
            if sha256_of(path / name) != expected["sha256"]:
                raise BadCheckpointError(f"{name} differs from its SHA-256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpointError(f"{name} is missing or broken ({error})") from error
    return manifest


def peek(resume: str, run: Path) -> dict[str, Any]:
    """Returns the manifest of the checkpoint that --resume means, whose other files nobody looked at yet.

    It is that of the newest one of a run folder, and empty where there is none.
    """
    if not resume:
        return {}
    path = run if resume == "auto" else Path(resume)
    try:
        folders = [path, *newest_first(path)]
    except BadCheckpointError:
        folders = [path]
    for folder in folders:
        try:
            return _parsed(folder)
        except (BadCheckpointError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return {}


def _parsed(path: Path) -> dict[str, Any]:
    with open_file(path / MANIFEST) as file:
        text = file.read().decode()
    manifest = json.loads(text)
    if text != manifest_text({key: value for key, value in manifest.items() if key != "sha256"}):
        raise BadCheckpointError(f"{MANIFEST} differs from its SHA-256")
    if not {"settings", "epoch_sums"} <= manifest.keys() or not isinstance(manifest["step"], int):
        raise BadCheckpointError(f"{MANIFEST} lacks the position or the settings of the run")
    return manifest


def manifest_text(manifest: dict[str, Any]) -> str:
    """JSON with the SHA-256 of itself as its last entry, so that no bit of it can change unnoticed."""
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1)


def set_aside_newer(run: Path, step: int) -> list[Path]:
    """Renames the checkpoints after ``step``, from which a run is about to go on, and returns their new paths.

    They are damaged, or of an attempt that is given up. Under their old names they would count among the newest ones,
    which are kept.
    """
    return [path.rename(superseded(path)) for path in newest_first(run) if step_of(path) > step]


def superseded(path: Path) -> Path:
    """The free name under which a file or folder of a run is kept beside the one that takes its place."""
    aside, number = path.with_name(f"{SUPERSEDED}{path.name}"), 1
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{SUPERSEDED}{path.stem}-{number}{path.suffix}")
    return aside


def step_name(step: int) -> str:
    """The name of the folder of a checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The number of steps that the name of a checkpoint's folder says."""
    return int(path.name.removeprefix("step-"))


def is_step_name(name: str) -> bool:
    """Whether ``step_name`` gives this name, to the letter: ``step-00000100-copy`` and ``step-100`` it does not."""
    return _STEP.fullmatch(name) is not None


def newest_first(run: Path) -> list[Path]:
    """The folders of the checkpoints of a run, intact or not. Links and files are none of them, whatever their name.

    Raises:
        BadCheckpointError: the folder that they are in cannot be listed.
    """
    try:
        with os.scandir(run / FOLDER) as entries:
            names = [one.name for one in entries if is_step_name(one.name) and one.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadCheckpointError(f"{FOLDER} cannot be listed ({error})") from error
    return sorted((run / FOLDER / name for name in names), key=step_of, reverse=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
