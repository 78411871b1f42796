"""Tar shards, as webdataset writes them: samples are grouped by key, found by their headers and read in place.

The headers of all shards are read once. They say where each image lies, so that an image is one read at an offset. That
is kept in an index beside the shards, or else in the cache folder, as long as the shards have the same sizes and
modification times.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastmae.data.images import IMAGE_SUFFIXES, MAX_FILE_BYTES
from fastmae.data.index import (
    Index,
    Names,
    cache_file,
    is_settled,
    names_of,
    pack_names,
    read_index,
    unpack_names,
    write_index,
)
from fastmae.data.plan import Shards
from fastmae.data.stock import Stock
from fastmae.errors import SettingError, UserError

BLOCK = 512
# The largest header entry that only describes the next one; a larger one is taken for damage.
MAX_EXTENSION = 1 << 20
MAX_LABEL_BYTES = 32
OPEN_SHARDS = 256
INDEX_THREADS = 8
# The shuffle window of a source of shards: at least so many shards and so many samples.
WINDOW_SHARDS = 64
WINDOW_SAMPLES = 16_384
COMPRESSED_SUFFIXES = {
    ".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tar.xz": "unxz", ".tar.zst": "unzstd",
    ".tar.lz4": "unlz4",
}  # fmt: skip
COMPRESSED_STARTS = {
    b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd",
    b"\x04\x22\x4d\x18": "unlz4",
}  # fmt: skip


@dataclass(frozen=True)
class TarSource:
    """Image files inside tar files."""

    paths: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...]
    """(size, modification time in ns) of each shard when it was indexed."""
    shard: np.ndarray
    """int64 [length], ascending: the tar file in which each sample lies."""
    offset: np.ndarray
    """int64 [length]: the byte of the tar file at which each image begins."""
    size: np.ndarray
    """int64 [length]: the bytes of each image."""
    names: Names
    labels: np.ndarray | None
    """int64 [length], or None."""
    damage: tuple[tuple[str, str], ...]
    """(tar file, what is wrong) of each that ends too early or is damaged inside."""
    kind: str = "folder"
    _open: Callable[[int], _OpenShard] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Bounded, because there may be more shards than files that a process may have open.
        object.__setattr__(self, "_open", functools.lru_cache(OPEN_SHARDS)(self._open_shard))

    @property
    def shards(self) -> Shards:
        """Each tar file that holds samples is a shard."""
        lengths = np.bincount(self.shard, minlength=len(self.paths))
        starts = np.concatenate([[0], np.cumsum(lengths[lengths > 0])])
        return Shards(starts, max(WINDOW_SAMPLES, WINDOW_SHARDS * len(self) // max(1, len(starts) - 1)))

    @property
    def location(self) -> str:
        """Where the images lie, and which shards are damaged, as a phrase for people."""
        text = f"in {len(self.paths)} tar shard{'s' if len(self.paths) > 1 else ''}"
        return "; ".join([text, *map(" ".join, self.damage)])

    @property
    def stock(self) -> Stock:
        return Stock({"images": len(self)})

    def __len__(self) -> int:
        return len(self.offset)

    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file.

        Raises:
            OSError: the shard is gone or was changed since it was indexed, or the file is too large for an image.
        """
        shard, size = self._open(int(self.shard[index])), int(self.size[index])
        if size > MAX_FILE_BYTES:
            raise OSError(f"{size} bytes, over the limit of {MAX_FILE_BYTES}")
        data = os.pread(shard.descriptor, size, int(self.offset[index]))
        if len(data) != size:
            raise OSError(f"{self.paths[self.shard[index]]} has become shorter since it was indexed")
        return data

    def name(self, index: int) -> str:
        return f"{self.paths[self.shard[index]]}:{self.names[index]}"

    def _open_shard(self, number: int) -> _OpenShard:
        shard = _OpenShard(self.paths[number])
        status = os.fstat(shard.descriptor)
        if (status.st_size, status.st_mtime_ns) != self.stamps[number]:
            raise OSError(f"{self.paths[number]} has changed since it was indexed; start again")
        return shard


class _OpenShard:
    """An open file, which is closed when no thread uses it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def open_shards(paths: Sequence[Path]) -> TarSource:
    """Opens tar files as one source, in the order given.

    Samples are grouped as webdataset does: a group is consecutive members whose names agree up to the first dot of the
    file name. The first member of a group with the suffix of an image file is the image; groups without an image are
    passed over. Labels are the integers in `.cls` members, if every sample has one. Of a shard that is cut or damaged,
    the part before the damage is used, and ``damage`` names the shard.

    Raises:
        UserError: a file is compressed, or is not a tar file at all.
        OSError: a file cannot be read.
    """
    for path in paths:
        refuse_compressed(path)
    stamps = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, paths)]
    fingerprint = [[path.name, *stamp] for path, stamp in zip(paths, stamps, strict=True)]
    index_paths = _index_paths(paths)
    for index_path in index_paths:
        index = read_index(index_path)
        if index is not None and index.fingerprint == fingerprint and _is_sound(index.columns, stamps):
            return _source(paths, stamps, index.columns)
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        indexed = list(pool.map(index_shard, paths))
    columns = _columns(indexed)
    if is_settled(modified for _, modified in stamps):
        any(write_index(index_path, Index(fingerprint, columns)) for index_path in index_paths)  # the first that works
    return _source(paths, stamps, columns)


def refuse_compressed(path: Path) -> None:
    """Refuses a compressed tar file by its name, because nothing can be read in place in it.

    Raises:
        UserError: the name is that of a compressed tar file.
    """
    for suffix, tool in COMPRESSED_SUFFIXES.items():
        if path.name.lower().endswith(suffix):
            raise UserError(f"{path}: a compressed tar cannot be read in place; run `{tool} {path}` first")


def _index_paths(paths: Sequence[Path]) -> list[Path]:
    """Returns where the index of these shards may be: beside them (if they share a folder), and in the cache folder."""
    real = [os.path.realpath(path) for path in paths]
    folders = {os.path.dirname(path) for path in real}
    # The name of an index beside the shards depends on their names alone, so that it can be moved with them.
    names = cache_file("\0".join(["shards", *map(os.path.basename, real)])).name
    beside = [Path(folder) / f".fastmae-{names}" for folder in folders if len(folders) == 1]
    return [*beside, cache_file("\0".join(["shards", *real]))]


def _is_sound(columns: dict[str, np.ndarray], stamps: Sequence[tuple[int, int]]) -> bool:
    """Tells whether every sample of an index lies inside its shard and every column has its length."""
    if columns.keys() != {"shard", "offset", "size", "label", "has_label", "names", "damaged", "damage"}:
        return False
    shard, offset, size = (columns[name] for name in ("shard", "offset", "size"))
    n = len(shard)
    if any(len(columns[name]) != n for name in ("offset", "size", "label", "has_label")):
        return False
    damaged = columns["damaged"]
    if np.count_nonzero(columns["names"] == 0) != n or np.count_nonzero(columns["damage"] == 0) != len(damaged):
        return False
    if len(damaged) and not 0 <= damaged.min() <= damaged.max() < len(stamps):
        return False
    if n == 0:
        return True
    if shard.min() < 0 or shard.max() >= len(stamps) or np.any(np.diff(shard) < 0):
        return False
    ends = np.array([end for end, _ in stamps], np.int64)[shard]
    return bool(np.all((offset >= 0) & (size >= 0) & (size <= ends) & (offset <= ends - size)))


def _source(paths: Sequence[Path], stamps: list[tuple[int, int]], columns: dict[str, np.ndarray]) -> TarSource:
    labelled = len(columns["label"]) > 0 and bool(columns["has_label"].all())
    return TarSource(
        paths=tuple(map(str, paths)),
        stamps=tuple(stamps),
        shard=columns["shard"],
        offset=columns["offset"],
        size=columns["size"],
        names=names_of(columns["names"]),
        labels=columns["label"].copy() if labelled else None,
        damage=tuple(
            (str(paths[number]), reason)
            for number, reason in zip(columns["damaged"].tolist(), unpack_names(columns["damage"]), strict=True)
        ),
    )


# --- indexing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    name: str
    offset: int
    size: int
    label: int | None


def _columns(indexed: list[tuple[list[_Sample], str | None]]) -> dict[str, np.ndarray]:
    labelled = any(sample.label is not None for inside, _ in indexed for sample in inside)
    damaged, damages = [], []
    for number, (inside, damage) in enumerate(indexed):
        if damage is not None:
            if labelled and inside and inside[-1].label is None:
                inside.pop()  # the label of the last sample lay behind the damage
            damaged.append(number)
            damages.append(f"{damage}, so only its first {len(inside)} images are used; replace it to have all")
    samples = [sample for inside, _ in indexed for sample in inside]
    return {
        "shard": np.repeat(np.arange(len(indexed)), [len(inside) for inside, _ in indexed]).astype(np.int64),
        "offset": np.array([sample.offset for sample in samples], np.int64),
        "size": np.array([sample.size for sample in samples], np.int64),
        "label": np.array([sample.label or 0 for sample in samples], np.int64),
        "has_label": np.array([sample.label is not None for sample in samples], np.uint8),
        "names": pack_names([sample.name for sample in samples]),
        "damaged": np.array(damaged, np.int64),
        "damage": pack_names(damages),
    }


def index_shard(path: Path) -> tuple[list[_Sample], str | None]:
    """Reads the headers of a shard. Returns its samples, and what is wrong with it, if anything is.

    Raises:
        UserError: the file is compressed, or its first header is not one of a tar file.
    """
    shard = _OpenShard(str(path))
    size = os.fstat(shard.descriptor).st_size
    start = os.pread(shard.descriptor, BLOCK, 0)
    for magic, tool in COMPRESSED_STARTS.items():
        if start.startswith(magic):
            raise UserError(f"{path}: a compressed tar cannot be read in place; unpack it with `{tool}` first")
    reader = functools.partial(os.pread, shard.descriptor)
    damage: list[_DamageError] = []

    def intact() -> Iterator[_Member]:
        try:
            yield from _members(reader, size)
        except _DamageError as error:
            damage.append(error)

    groups = itertools.groupby(intact(), key=lambda member: _key(member.name))
    samples = [sample for _, group in groups if (sample := _sample(list(group), reader)) is not None]
    if not damage:
        return samples, None
    if damage[0].position == 0 and size:
        raise UserError(f"{path}: not a tar file ({damage[0]}); check or replace it")
    return samples, str(damage[0])


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int


class _DamageError(Exception):
    """Damage of a tar file: the message says what is wrong, ``position`` from which byte on."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position


def _key(name: str) -> str | None:
    """Returns a name up to the first dot of its last part; None for hidden files and for files without a dot."""
    folder, slash, base = name.rpartition("/")
    stem, dot, _ = base.partition(".")
    return folder + slash + stem if stem and dot else None


def _sample(group: list[_Member], read: Callable[[int, int], bytes]) -> _Sample | None:
    """Returns the sample that the members of one key make up; None without an image among them."""
    key = _key(group[0].name)
    if key is None:
        return None
    suffixes = [member.name[len(key) :].lower() for member in group]
    image = next((member for member, suffix in zip(group, suffixes, strict=True) if suffix in IMAGE_SUFFIXES), None)
    if image is None:
        return None
    label = None
    if ".cls" in suffixes:
        member = group[suffixes.index(".cls")]
        text = read(member.size, member.offset) if member.size <= MAX_LABEL_BYTES else b""
        if re.fullmatch(rb"\s*-?\d{1,18}\s*", text):
            label = int(text)
    return _Sample(image.name, image.offset, image.size, label)


def _members(read: Callable[[int, int], bytes], end: int) -> Iterator[_Member]:
    """Yields the regular files of a tar file in order; ``read(size, offset)`` returns its bytes.

    It reads the formats that are written today: ustar with its name prefix, GNU's long names and sizes in base 256, and
    PAX headers for path and size.

    Raises:
        _DamageError: where the headers stop making sense or the file ends too early.
    """
    position = 0
    extended: dict[str, str] = {}
    while True:
        block = read(BLOCK, position)
        if len(block) < BLOCK:
            raise _DamageError(position, "ends without a tar's closing block")
        if not any(block):
            return
        name, size, kind = _header(block, position)
        body = position + BLOCK
        if kind in "xgLK":
            if size > MAX_EXTENSION:
                raise _DamageError(position, f"has a header of {size} bytes at byte {position}")
            text = read(size, body)
            if len(text) < size:
                raise _DamageError(end, f"is cut at byte {end}")
            if kind == "L":
                extended["path"] = os.fsdecode(text.split(b"\0")[0])
            elif kind == "x":
                extended |= _pax(text, position)
            position = body + -(-size // BLOCK) * BLOCK
            continue
        if "size" in extended:
            if not extended["size"].isascii() or not extended["size"].isdigit() or len(extended["size"]) > 19:
                raise _DamageError(position, f"has a size that is no number at byte {position}")
            size = int(extended["size"])
        if kind == "S" or any(word.startswith("GNU.sparse") for word in extended):
            raise _DamageError(position, f"has a sparse member at byte {position} (make it without `tar --sparse`)")
        if kind in "123456":  # links, devices and folders have no bytes, whatever their size says
            size = 0
        if body + size > end:
            raise _DamageError(end, f"is cut at byte {end}")
        if kind in "0\0" or kind == "7":
            yield _Member(extended.get("path", name), body, size)
        extended = {}
        position = body + -(-size // BLOCK) * BLOCK


def _header(block: bytes, position: int) -> tuple[str, int, str]:
    """Returns (name, size, kind) of a header, once its checksum is found right."""
    try:
        checksum = int(block[148:156].strip(b" \0"), 8)
        if block[124] & 0x80:  # GNU, for sizes from 8 GiB
            size = int.from_bytes(block[125:136], "big")
        else:
            size = int(block[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        checksum, size = -1, 0
    if checksum != sum(block) - sum(block[148:156]) + 8 * ord(" ") or size < 0:
        raise _DamageError(position, f"has no tar header at byte {position}")
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return os.fsdecode(prefix + b"/" + name if prefix else name), size, chr(block[156])


def _pax(text: bytes, position: int) -> dict[str, str]:
    """Returns the records `LENGTH KEY=VALUE\\n` of a PAX header by key."""
    records = {}
    while text:
        digits, _, _ = text.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        record = text[len(digits) + 1 : length]
        if length > len(text) or not record.endswith(b"\n") or b"=" not in record:
            raise _DamageError(position, f"has a broken PAX header at byte {position}")
        word, _, value = record[:-1].partition(b"=")
        records[os.fsdecode(word)] = os.fsdecode(value.split(b"\0")[0])
        text = text[length:]
    return records


# --- names ------------------------------------------------------------------------------------------------------------


def expand_braces(pattern: str) -> list[str]:
    """Returns the names that `part-{000..146}.tar` or `{a,b}.tar` stands for in a shell, in that order.

    Raises:
        SettingError: the pattern stands for more than a million names.
    """
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words is None:
        low, high = int(first), int(last)
        if abs(high - low) >= 1_000_000:
            raise SettingError("data_path", pattern, "more than a million names; check the numbers")
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if high >= low else -1
        choices = [f"{number:0{width}d}" for number in range(low, high + step, step)]
    else:
        choices = words.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [head + choice + rest for choice in choices for rest in expand_braces(tail)]
