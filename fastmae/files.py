"""Files that are either there whole or not there at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Makes a file's bytes survive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file beside its place, syncs it and renames it into place: a reader sees the old file or the new one.

    Raises:
        OSError: nothing was changed but for a file ``.NAME.partial``, which is removed if that is possible.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """``write_whole`` for UTF-8 text."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_whole(path, write)
