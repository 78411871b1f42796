"""Files that exist either whole or not at all, and files that grow by whole lines."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO


def fsync_folder(folder: Path) -> None:
    """Writes the names in a folder to the disk, so that they survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Writes the bytes of a file to the disk, so that they survive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file under another name, syncs it and renames it, so that a reader sees the old file or the new one.

    Raises:
        OSError: the file could not be written. The old one is unchanged; ``.NAME.partial`` is removed if possible.
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
    """Writes UTF-8 text as ``write_whole`` does."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_whole(path, write)


class JsonLines:
    """A file to which rows are appended, one line of JSON per row.

    A full disk loses no row: rows that cannot be written are kept in memory, and written with later ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[str] = []
        self._is_reported = False

    def __len__(self) -> int:
        """Returns how many rows could not be written yet."""
        return len(self._unwritten)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Appends rows, after those that could not be written yet. The first of several failures is reported."""
        self._unwritten += [json.dumps(row) + "\n" for row in rows]
        if not self._unwritten:
            return
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = os.fstat(file.fileno()).st_size
                data = "".join(self._unwritten).encode()
                if file.write(data) != len(data):
                    os.ftruncate(file.fileno(), end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._is_reported:
                text = "%s cannot be written (%s); free space: what is missing is written later"
                logging.getLogger("fastmae").warning(text, self.path, error)
            self._is_reported = True
            return
        self._unwritten, self._is_reported = [], False
