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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

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
    check = 0
    for array in arrays.values():
        check = zlib.crc32(array.data, check)
    header = {
        "format": FORMAT,
        "fingerprint": index.fingerprint,
        "columns": [(name, array.dtype.kind, len(array)) for name, array in arrays.items()],
        "crc32": check,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError:
        return False
    try:
        with open(descriptor, "wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            for array in arrays.values():
                file.write(array.data)
        os.chmod(partial, 0o644)  # so that other users of the same data can read it
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        return False
    return True


def pack_names(names: Iterable[str]) -> np.ndarray:
    """Packs file names, which hold no zero byte, into one column uint8 in which each ends with a zero."""
    return np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in names), np.uint8)


def unpack_names(column: np.ndarray) -> list[str]:
    """Returns the names in a column; the inverse of ``pack_names``."""
    return os.fsdecode(column.tobytes()).split("\0")[:-1]


@dataclass(frozen=True, eq=False)
class Names(Sequence[str]):
    """Names that stay packed in one column: a million of them take as many bytes as they have, and 8 MB."""

    column: np.ndarray
    """uint8 [bytes]: as ``pack_names`` returns it."""
    ends: np.ndarray
    """int64 [length]: where in ``column`` each name's zero is."""
    prefix: str = ""
    """What each name begins with besides."""

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # an IndexError ends a loop over them
        start = 0 if number == 0 else int(self.ends[number - 1]) + 1
        return self.prefix + os.fsdecode(self.column[start : self.ends[number]].tobytes())

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _UNPACKED):
            for name in unpack_names(self.packed(start, min(start + _UNPACKED, len(self)))):
                yield self.prefix + name

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def take(self, numbers: np.ndarray) -> Names:
        """Returns the names with these numbers, int64 [n]."""
        chunks = [np.zeros(0, np.uint8)]
        for first in range(0, len(numbers), _UNPACKED):
            some = numbers[first : first + _UNPACKED]
            starts = np.where(some == 0, 0, self.ends[some - 1] + 1)
            lengths = self.ends[some] + 1 - starts
            shift = starts - np.concatenate([[0], np.cumsum(lengths[:-1])])
            chunks.append(self.column[np.repeat(shift, lengths) + np.arange(lengths.sum())])
        return names_of(np.concatenate(chunks), self.prefix)

    def without(self, count: int) -> Names:
        """Returns the names without their first characters, which all of them share."""
        if count <= len(self.prefix):
            return Names(self.column, self.ends, self.prefix[count:])
        before, column = b"\0" + os.fsencode(self[0][len(self.prefix) : count]), b"\0" + self.column.tobytes()
        return names_of(np.frombuffer(column.replace(before, b"\0")[1:], np.uint8))

    def packed(self, start: int, end: int) -> np.ndarray:
        """Returns the part of the column with the names from ``start`` to before ``end``, without the prefix."""
        first = 0 if start == 0 else int(self.ends[start - 1]) + 1
        return self.column[first : int(self.ends[end - 1]) + 1 if end > start else first]


_UNPACKED = 65_536
"""How many names are unpacked at a time where all are gone through."""


def names_of(column: np.ndarray, prefix: str = "") -> Names:
    """Returns ``Names`` over a column of ``pack_names``."""
    return Names(column, np.flatnonzero(column == 0), prefix)


def repeats(names: Sequence[str]) -> np.ndarray:
    """Returns the numbers of names that are equal to an earlier one, ascending, int64; 32 bytes a name are enough."""
    hashes = np.fromiter(map(hash, names), np.int64, len(names))
    order = np.argsort(hashes, kind="stable")
    alike = hashes[order[1:]] == hashes[order[:-1]]
    del hashes
    candidates = np.union1d(order[1:][alike], order[:-1][alike])
    seen, again = set[str](), []
    for number in candidates.tolist():
        name = names[number]
        if name in seen:
            again.append(number)
        seen.add(name)
    return np.array(again, np.int64)


NO_NAMES = names_of(np.zeros(0, np.uint8))


def join_names(folders: Iterable[tuple[str, Names]]) -> np.ndarray:
    """Returns the column of the names in folders: of ("a/", names) each name with "a/" before it."""
    chunks = []
    for folder, names in folders:
        before, inside = os.fsencode(folder + names.prefix), names.packed(0, len(names)).tobytes()
        chunks.append(before + inside[:-1].replace(b"\0", b"\0" + before) + b"\0" if inside else b"")
    return np.frombuffer(b"".join(chunks), np.uint8)
