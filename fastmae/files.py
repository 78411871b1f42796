"""Files that exist either whole or not at all, files that grow by whole lines, and how both are read again."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_JSON = 64 * 2**20
"""Bytes of a JSON file, or of a line of one, beyond which it is none of ours; it is not read into memory."""


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
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say of which file
        raise
    fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text as ``write_whole`` does."""

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_whole(path, write)


# --- reading JSON -----------------------------------------------------------------------------------------------------


def open_file(path: Path) -> io.BufferedReader:
    """Opens a file for reading; what only has a file's name (a folder, a pipe, a device) is refused, not waited for.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, "is a folder, not a file" if stat.S_ISDIR(mode) else "is not a file", str(path))
    return open(descriptor, "rb")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it holds no JSON. The message says why, in a few words.
    """
    with open_file(path) as file:
        data = file.read(LARGEST_JSON + 1)
    return _parse(data)


def json_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Reads a file of JSON lines, whatever happened to it: a kill in the middle of a line, a power cut, an editor.

    Yields:
        Each line as it is, with its end; and the object that it holds, None for a line that is damaged: cut off, no
        JSON, another type than an object, no UTF-8, or longer than ``LARGEST_JSON``. Blank lines are left out, and so
        are the zero bytes that a power cut may put before a line.

    Raises:
        OSError: the file cannot be read. One that is not there has no lines.
    """
    try:
        file = open_file(path)
    except FileNotFoundError:
        return
    with file:
        is_rest = False  # of a line that is too long
        while line := file.readline(LARGEST_JSON + 1):
            text = line.strip(b"\0 \t\r\n")
            row = None
            if text and not is_rest:
                with contextlib.suppress(ValueError):
                    row = _parse(text)
            if text or is_rest:
                yield line, row if isinstance(row, dict) else None
            is_rest = len(line) > LARGEST_JSON and not line.endswith(b"\n")


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Returns the rows of a file of JSON lines, and how many lines are damaged, as ``json_lines`` says.

    Raises:
        OSError: the file cannot be read.
    """
    rows = [row for _, row in json_lines(path)]
    whole = [row for row in rows if row is not None]
    return whole, len(rows) - len(whole)


def _parse(data: bytes) -> Any:
    if len(data) > LARGEST_JSON:
        raise ValueError(f"more than {LARGEST_JSON >> 20} MB")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("no UTF-8 text") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError("empty" if not data.strip() else f"no JSON: {error.msg} in line {error.lineno}") from None


# --- files that grow --------------------------------------------------------------------------------------------------


class JsonLines:
    """A file to which rows are appended, one line of JSON per row.

    A full disk loses no row: rows that cannot be written are kept in memory, and written with later ones. A line that a
    kill cut off is ended first, so that it spoils no row.
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
            with open(self.path, "a+b", buffering=0) as file:
                end = os.fstat(file.fileno()).st_size
                is_torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
                data = b"\n" * is_torn + "".join(self._unwritten).encode()
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
