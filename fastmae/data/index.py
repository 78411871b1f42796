"""Index files: where each sample lies, found once and kept as columns of numbers, with a fingerprint of the data.

Nothing in such a file is trusted. A file that is damaged, cut or foreign counts as missing. The code that uses the
columns compares the fingerprint with the data of today and checks that every entry points at something that exists. If
a file cannot be written, that is no error: the index is then made again next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.data.openfile import OpenFile

FORMAT = "fastmae index 1"
MAX_HEADER = 1 << 20
MAX_BYTES = 1 << 32
# A change within one tick of a file system's clock (up to 2 s on FAT) leaves no trace in a modification time.
CLOCK_TICK = 2.0


@dataclass(frozen=True)
class Index:
    """The content of an index file: a fingerprint that JSON can hold, and columns int64 or uint8 [n] of any lengths."""

    fingerprint: Any
    columns: dict[str, np.ndarray]


def cache_file(identity: str) -> Path:
    """Returns the index file for data of this identity: in fastmae/ of ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    digest = hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fastmae" / f"{digest}.index"


def is_settled(modified_ns: Iterable[int]) -> bool:
    """Tells whether the newest of these modification times is so old that any later change would show."""
    return max(modified_ns, default=0) < (time.time() - CLOCK_TICK) * 1e9


def read_index(path: Path) -> Index | None:
    """Reads an index; None if there is no file, or if anything in it is not as it was written."""
    try:
        opened = OpenFile(path)
        size = opened.size
        if size > MAX_BYTES:
            return None
        with open(os.dup(opened.descriptor), "rb") as file:
            header = json.loads(file.readline(MAX_HEADER))
            if header["format"] != FORMAT:
                return None
            shapes = [(str(name), np.dtype({"i": np.int64, "u": np.uint8}[kind]), int(n))
                      for name, kind, n in header["columns"]]  # fmt: skip
            remaining = size - file.tell()
            if any(n < 0 for _, _, n in shapes) or sum(dtype.itemsize * n for _, dtype, n in shapes) != remaining:
                return None
            body = file.read(remaining)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, MemoryError):
        return None
    if len(body) != remaining or zlib.crc32(body) != header.get("crc32"):
        return None
    columns, start = {}, 0
    for name, dtype, n in shapes:
        columns[name] = np.frombuffer(body, dtype, n, start)
        start += dtype.itemsize * n
    return Index(header.get("fingerprint"), columns)


def write_index(path: Path, index: Index) -> bool:
    """Writes an index whole or not at all, even if several processes do so at once. Returns whether that succeeded."""
    arrays = {name: np.ascontiguousarray(array) for name, array in index.columns.items()}
    body = b"".join(array.tobytes() for array in arrays.values())
    header = {
        "format": FORMAT,
        "fingerprint": index.fingerprint,
        "columns": [(name, array.dtype.kind, len(array)) for name, array in arrays.items()],
        "crc32": zlib.crc32(body),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError:
        return False
    try:
        with open(descriptor, "wb") as file:
            file.write(json.dumps(header).encode() + b"\n" + body)
        os.chmod(partial, 0o644)  # so that other users of the same data can read it
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        return False
    return True


def pack_names(names: Sequence[str]) -> np.ndarray:
    """Packs file names, which hold no zero byte, into one column uint8 in which each ends with a zero."""
    return np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in names), np.uint8)


def unpack_names(column: np.ndarray) -> list[str]:
    """Returns the names in a column; the inverse of ``pack_names``."""
    return os.fsdecode(column.tobytes()).split("\0")[:-1]


@dataclass(frozen=True)
class Names:
    """File names that stay packed in one column, because few of them are ever needed."""

    column: np.ndarray
    ends: np.ndarray
    """int64 [length]: where in ``column`` each name's zero is."""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = 0 if index == 0 else int(self.ends[index - 1]) + 1
        return os.fsdecode(self.column[start : self.ends[index]].tobytes())


def names_of(column: np.ndarray) -> Names:
    """Returns ``Names`` over a column of ``pack_names``."""
    return Names(column, np.flatnonzero(column == 0))
