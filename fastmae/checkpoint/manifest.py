"""A checkpoint's manifest and the names around it: what it says, how it is verified, which checkpoint is the newest.

``checkpoints/step-NNNNNNNN/`` holds one ``….safetensors`` per rank (its part of the weights and of AdamW's moments)
and ``manifest.json`` (the position of the run, its configuration, and the size and SHA-256 of every file). Nothing in
it can run code, and nothing in it is used before it is verified. This file knows nothing of tensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "checkpoints"
TENSORS = "*.safetensors"
MANIFEST = "manifest.json"
SUPERSEDED = "superseded-"


class BadCheckpointError(Exception):
    """A checkpoint that is not what its manifest says; the message says what is wrong with it."""


@dataclass(frozen=True)
class NewestCheckpoint:
    """The newest intact checkpoint of a run folder, and the newer ones that were refused, with reasons."""

    path: Path | None
    manifest: dict[str, Any]
    refused: tuple[str, ...]


def find_checkpoint(run: Path) -> NewestCheckpoint:
    """Finds the newest checkpoint that verifies. This reads every byte of each checkpoint that it tries."""
    refused: list[str] = []
    for path in newest_first(run):
        try:
            return NewestCheckpoint(path, read_manifest(path), tuple(refused))
        except BadCheckpointError as error:
            refused.append(f"{path}: {error}")
    return NewestCheckpoint(None, {}, tuple(refused))


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint and compares its files with it, byte for byte.

    Raises:
        BadCheckpointError: a file is missing, truncated, changed or foreign.
    """
    name = MANIFEST
    try:
        text = (path / MANIFEST).read_text()
        manifest = json.loads(text)
        if text != manifest_text({key: value for key, value in manifest.items() if key != "sha256"}):
            raise BadCheckpointError(f"{MANIFEST} differs from its SHA-256")
        if not {"step", "settings", "epoch_sums"} <= manifest.keys():
            raise BadCheckpointError(f"{MANIFEST} lacks the position or the settings of the run")
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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpointError(f"{name} is missing or broken ({error})") from error
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
    moved = []
    for path in newest_first(run):
        if path.name > step_name(step):
            aside = path.with_name(f"{SUPERSEDED}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def step_name(step: int) -> str:
    """The name of the folder of a checkpoint after ``step`` steps; names sort like steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The number of steps that the name of a checkpoint's folder says."""
    return int(path.name.removeprefix("step-"))


def newest_first(run: Path) -> list[Path]:
    """The folders of the checkpoints of a run, intact or not."""
    return sorted((run / FOLDER).glob("step-*"), reverse=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
