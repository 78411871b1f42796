"""Files that are either there whole or not there at all, and files that grow by whole lines."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO


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


class JsonLines:
    """A file that rows are appended to, a line of JSON each.

    A disk that is full loses none: rows that cannot be written are kept, and written with the next ones that can.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: list[str] = []
        self._is_told = False

    def __len__(self) -> int:
        """Rows that are kept, as they could not be written yet."""
        return len(self._kept)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends rows, and those that were kept before them. The first failure of several is told on stderr."""
        self._kept += [json.dumps(row) + "\n" for row in rows]
        if not self._kept:
            return
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = os.fstat(file.fileno()).st_size
                data = "".join(self._kept).encode()
                if file.write(data) != len(data):
                    os.ftruncate(file.fileno(), end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._is_told:
                what = f"{self.path} cannot be written ({error}); free space: what is missing is written later"
                print(f"fastmae: {what}", file=sys.stderr, flush=True)
            self._is_told = True
            return
        self._kept, self._is_told = [], False
