"""Zip archives, read in place: the table at their end says where each file lies, and an image is one read.

Files that are stored are read as they are, those that are deflated are unpacked in memory, never more of them than the
table says. Nothing is extracted, and no name in an archive is ever opened as a path.
"""

from __future__ import annotations

import functools
import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastmae.data.images import (
    LARGE_FILE,
    LOOKED_AT,
    MAX_FILE_BYTES,
    WORTH_KEEPING,
    Listing,
    Tally,
    refuse_no_image,
)
from fastmae.data.index import (
    NO_NAMES,
    Index,
    Names,
    cache_file,
    is_settled,
    names_of,
    pack_names,
    read_index,
    write_index,
)
from fastmae.data.openfile import OpenFile
from fastmae.data.stock import Stock
from fastmae.data.suffixes import IMAGE_SUFFIXES, suffix_of

STORED, DEFLATED = 0, 8
# Names of hidden files and of those in hidden folders, and what macOS adds.
_HIDDEN = re.compile(r"^__MACOSX/|(?:^|/)\.(?!\.?(?:/|$))")
# DEFLATE cannot shrink data by more than this factor, so a larger claim is a lie.
MAX_RATIO = 1032
_END, _END64, _LOCATOR = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_LONGEST_COMMENT = 65_557
# What was kept by other rules is read again.
RULE = "zip 1"
_NUMBERS = ("header", "packed", "size", "check")


@dataclass(frozen=True)
class ZipSource:
    """Image files inside a zip archive."""

    path: str
    stamp: tuple[int, int]
    """(size, modification time in ns) of the archive when it was opened."""
    names: Names
    header: np.ndarray
    """int64 [length]: the byte at which the header of each file begins."""
    packed: np.ndarray
    """int64 [length]: the bytes of each in the archive."""
    size: np.ndarray
    """int64 [length]: the bytes of each image."""
    check: np.ndarray
    """int64 [length]: the CRC-32 of each, and its method in the bits above."""
    labels: np.ndarray | None
    """int64 [length], numbers of ``classes``, or None."""
    classes: tuple[str, ...]
    part: str
    """The folder of a part inside the archive."""
    stock: Stock
    kind: str = "folder"
    shards = None
    _open: Callable[[], OpenFile] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_open", functools.cache(lambda: OpenFile(self.path)))

    @property
    def location(self) -> str:
        """Where the images lie, as a phrase for people."""
        text = f"in {Path(self.path).name}" + (f" in {len(self.classes):,} class folders" if self.classes else "")
        return f"{text} of {self.part}" if self.part else text

    def __len__(self) -> int:
        return len(self.size)

    def name(self, index: int) -> str:
        return f"{self.path}:{self.names[index]}"

    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file.

        Raises:
            OSError: the archive was changed since it was opened or is damaged there, or the file is too large.
        """
        archive, size, packed = self._open(), int(self.size[index]), int(self.packed[index])
        if archive.stamp != self.stamp or not archive.is_unchanged():
            raise OSError(f"{self.path} has changed since it was opened; start again")
        if size > MAX_FILE_BYTES:
            raise OSError(f"{size} bytes, over the limit of {MAX_FILE_BYTES}")
        start = int(self.header[index])
        header = archive.read(_LOCAL.size, start)
        if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
            raise OSError("no file of the archive begins where its table says")
        *_, name_bytes, extra_bytes = _LOCAL.unpack(header)
        start += _LOCAL.size + name_bytes + extra_bytes
        method, crc = divmod(int(self.check[index]), 1 << 32)
        if size > LARGE_FILE:
            looked_at = archive.read(min(packed, LOOKED_AT), start)
            refuse_no_image(looked_at if method == STORED else _inflated(looked_at, LOOKED_AT, False), size)
        data = archive.read(packed, start)
        if len(data) < packed:
            raise OSError(f"{self.path} has become shorter since it was opened")
        if method == DEFLATED:
            data = _inflated(data, size, True)
        if len(data) != size or zlib.crc32(data) != crc:
            raise OSError("damaged in the archive, as its checksum is another one")
        return data


def _inflated(data: bytes, size: int, whole: bool) -> bytes:
    """Unpacks at most ``size`` bytes.

    Raises:
        OSError: the data are damaged, or, if they are to be ``whole``, hold more.
    """
    unpack = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        unpacked = unpack.decompress(data, size + 1 if whole else size)
    except zlib.error as error:
        raise OSError(f"damaged in the archive ({error})") from error
    if whole and len(unpacked) > size:
        raise OSError("unpacks to more than the archive says")
    return unpacked


@dataclass(frozen=True)
class Table:
    """The files of an archive, by their numbers."""

    names: Names
    header: np.ndarray
    packed: np.ndarray
    size: np.ndarray
    check: np.ndarray

    others: dict[str, Tally]
    """Files that are no images, by suffix, and "hidden" ones."""
    problems: dict[str, Tally]
    """Images that cannot be used, by the reason."""


def open_table(archive: OpenFile) -> Table:
    """Returns the table of an archive. A long one is kept in the cache folder, until the archive changes.

    Raises:
        ValueError: as ``read_table``.
    """
    path = os.path.realpath(archive.path)
    fingerprint = [RULE, path, list(archive.stamp), sorted(IMAGE_SUFFIXES)]
    index_path = cache_file(f"zip {path}")
    index = read_index(index_path)
    kept = None if index is None or index.fingerprint != fingerprint else _kept(index.columns, archive.size)
    if kept is not None:
        return kept
    table = read_table(archive)
    if len(table.names) >= WORTH_KEEPING and is_settled([archive.stamp[1]]):
        tallies = [{kind: [tally.count, *tally.names] for kind, tally in part.items()}
                   for part in (table.others, table.problems)]  # fmt: skip
        columns = {
            "names": table.names.column, **{name: getattr(table, name) for name in _NUMBERS},
            "tallies": np.frombuffer(json.dumps(tallies).encode(errors="surrogatepass"), np.uint8),
        }  # fmt: skip
        write_index(index_path, Index(fingerprint, columns))
    return table


def _kept(columns: dict[str, np.ndarray], end: int) -> Table | None:
    """Returns the table in an index; None if it is damaged, or names what cannot be in an archive of ``end`` bytes."""
    try:
        names, (header, packed, size, check) = names_of(columns["names"]), (columns[name] for name in _NUMBERS)
        others, problems = (
            {str(kind): Tally(int(count), [str(name) for name in some]) for kind, (count, *some) in part.items()}
            for part in json.loads(columns["tallies"].tobytes().decode(errors="surrogatepass"))
        )
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    if not len(names) == len(header) == len(packed) == len(size) == len(check):
        return None
    if min(map(np.min, (header, packed, size)), default=-1) < 0 or not np.isin(check >> 32, (STORED, DEFLATED)).all():
        return None
    if (header + _LOCAL.size > end - packed).any() or (size > MAX_RATIO * packed + 64).any():
        return None
    return Table(names, header, packed, size, check, others, problems)


def read_table(archive: OpenFile) -> Table:
    """Reads the table of an archive.

    Raises:
        ValueError: it is no zip archive, or is damaged, cut, or in several files.
    """
    count, start, size = _where(archive)
    if count > size // _ENTRY.size or size > archive.size:
        raise ValueError(f"a zip archive that claims {count:,} files in a table of {size:,} bytes")
    table = archive.read(size, start)
    if len(table) < size:
        raise ValueError("a zip archive that is cut")
    files, others, problems = dict[str, tuple[int, int, int, int]](), dict[str, Tally](), dict[str, Tally]()
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > size:
            raise ValueError("a zip archive whose table is cut")
        (magic, _, _, flags, method, _, _, crc, packed, unpacked, name_bytes, extra_bytes, comment_bytes, _, _,
         attributes, header) = _ENTRY.unpack_from(table, position)  # fmt: skip
        if magic != b"PK\1\2":
            raise ValueError(f"a zip archive whose table is damaged at byte {start + position}")
        position += _ENTRY.size
        raw = table[position : position + name_bytes]
        extra = table[position + name_bytes : position + name_bytes + extra_bytes]
        position += name_bytes + extra_bytes + comment_bytes
        name = raw.decode(errors="surrogateescape") if flags & 0x800 or raw.isascii() else raw.decode("cp437")
        name = name.split("\0")[0].replace("\\", "/")
        if name.endswith("/"):
            continue
        packed, unpacked, header = _sizes64(extra, packed, unpacked, header)
        suffix = suffix_of(name.rpartition("/")[2])
        if _HIDDEN.search(name):
            others.setdefault("hidden", Tally()).add(name)
        elif suffix not in IMAGE_SUFFIXES:
            others.setdefault(suffix, Tally()).add(name)
        elif problem := _problem(flags, method, attributes, packed, unpacked, header, archive.size):
            problems.setdefault(problem, Tally()).add(name)
        else:
            if name in files:
                problems.setdefault("replaced by a later file of the same name", Tally()).add(name)
            files[name] = (header, packed, unpacked, method << 32 | crc)
    header, packed_size, size_unpacked, check = np.array([*files.values()], np.int64).reshape(-1, 4).T.copy()
    return Table(names_of(pack_names(files)), header, packed_size, size_unpacked, check, others, problems)


def _problem(flags: int, method: int, attributes: int, packed: int, size: int, header: int, end: int) -> str:
    """Returns why an image cannot be read; "" if it can."""
    if flags & 1:
        return "encrypted, which fastmae does not read; unpack them with their password"
    if method not in (STORED, DEFLATED):
        return "packed by another method than deflate; pack the archive anew"
    if attributes >> 16 & 0o170000 == 0o120000:
        return "links, and no images"
    if header + _LOCAL.size + packed > end or size > MAX_RATIO * packed + 64 or (method == STORED and size != packed):
        return "of sizes that cannot be true; pack the archive anew"
    return ""


def _sizes64(extra: bytes, packed: int, size: int, header: int) -> tuple[int, int, int]:
    """Returns the sizes and the place of a file, which lie in an extra field where they take more than 32 bits."""
    position = 0
    while position + 4 <= len(extra):
        key, length = struct.unpack_from("<2H", extra, position)
        if key == 1:
            wide, at = [size, packed, header], position + 4
            for number, value in enumerate(wide):
                if value == 0xFFFFFFFF and at + 8 <= min(len(extra), position + 4 + length):
                    wide[number] = min(struct.unpack_from("<Q", extra, at)[0], 1 << 62)
                    at += 8
            return wide[1], wide[0], wide[2]
        position += 4 + length
    return packed, size, header


def _where(archive: OpenFile) -> tuple[int, int, int]:
    """Returns how many files a zip archive says it has, and where its table begins and how long it is."""
    tail_start = max(0, archive.size - _LONGEST_COMMENT)
    tail = archive.read(_LONGEST_COMMENT, tail_start)
    end = tail.rfind(_END)
    if end < 0 or end + 22 > len(tail):
        raise ValueError("no zip archive, or one that is cut")
    disk, _, _, count, size, start = struct.unpack_from("<4H2I", tail, end + 4)
    locator = end - 20
    is_wide = 0xFFFF in (disk, count) or 0xFFFFFFFF in (size, start)
    if is_wide and locator >= 0 and tail[locator : locator + 4] == _LOCATOR:
        where = struct.unpack_from("<Q", tail, locator + 8)[0]
        record = archive.read(56, min(where, archive.size))
        if len(record) < 56 or record[:4] != _END64:
            raise ValueError("a zip archive whose end is damaged")
        disk, count, size, start = (*struct.unpack_from("<I", record, 16), *struct.unpack_from("<3Q", record, 32))
    if disk not in (0, 0xFFFF):
        raise ValueError("a zip archive in several files; join them")
    table_end = tail_start + end
    if start + size > table_end:
        raise ValueError("a zip archive that is cut")
    return count, start, size


def list_zip(path: Path, table: Table) -> tuple[Listing, str]:
    """Returns the images of an archive as if it were a folder, and the folder in it that all of them lie in.

    A folder around folders with images is passed over, as archives often have one. A name with `..` in it, or an
    absolute one, is a name as any other, as nothing is written or opened by it.
    """
    inside: dict[str, list[str]] = {}
    for name in table.names:
        folder, _, base = name.rpartition("/")
        inside.setdefault(folder, []).append(base)
    around = ""
    while True:
        tops = {folder[len(around) :].partition("/")[0] for folder in inside}
        inner = f"{around}{next(iter(tops), '')}/"
        if len(tops) != 1 or any(not f"{folder}/"[len(inner) :] for folder in inside):
            break
        around = inner
    packed = {folder[len(around) :]: names_of(pack_names(sorted(names))) for folder, names in inside.items()}
    for folder in [*packed]:
        while folder:
            folder = folder.rpartition("/")[0]
            packed.setdefault(folder, NO_NAMES)
    images = dict(sorted(({"": NO_NAMES} | packed).items()))
    return Listing(f"{path}/{around}".rstrip("/"), images, others=table.others), around
