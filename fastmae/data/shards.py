"""Tar shards, as webdataset writes them: samples are grouped by key, found by their headers and read in place.

The headers of all shards are read once. They say where each image lies, so that an image is one read at an offset. That
is kept in an index beside the shards, or else in the cache folder, as long as the shards have the same sizes and
modification times.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmae.data.columns import LABEL_COLUMNS
from fastmae.data.index import (
    NO_NAMES,
    Index,
    Names,
    cache_file,
    is_settled,
    names_of,
    pack_names,
    read_index,
    repeats,
    unpack_names,
    write_index,
)
from fastmae.data.packed import PackedSource
from fastmae.data.parts import read_part, shard_part
from fastmae.data.remote import ReadAhead, file_name, is_remote, open_file
from fastmae.data.stock import EXAMPLES, LeftOut, Stock, count_of, joined
from fastmae.data.suffixes import IMAGE_SUFFIXES, suffix_of, why_not
from fastmae.errors import SettingError, UserError

BLOCK = 512
# How members become samples: an index that was made by other rules is made again.
RULES = "members 3"
# The largest header entry that only describes the next one; a larger one is taken for damage.
MAX_EXTENSION = 1 << 20
MAX_LABEL_BYTES = 32
MAX_JSON_BYTES = 1 << 16
# How far behind a tar's end one looks for another tar.
LOOKED_BEHIND = 16 << 20
# A brace pattern stands for no more names.
MAX_NAMES = 1_000_000
INDEX_THREADS = 8
# Bytes that are read for a header, with what follows it: about what a disk reads at a time anyway.
WINDOW = 32 << 10
# Why members are left out. A shard has no more reasons than ``MAX_REASONS``, whatever suffixes there are in it.
HIDDEN = "hidden files, such as macOS adds"
NO_SUFFIX = "no suffix in the name"
SECOND_IMAGE = "a second image of a sample, whose name is the same up to the first dot; --image_key all uses every one"
OTHER_IMAGE = "an image that --image_key does not name"
SECOND_LABEL = "a second label of a sample"
NO_IMAGE = "labels without an image of that name in the same tar"
NO_INTEGER = "labels that are no integers"
PACKED_TAR = "a tar inside that is compressed, or in another tar inside; unpack it (`tar -xf`) and give the tars inside"
NO_TAR = "called .tar, and no tar"
OTHER_SUFFIX = "other suffixes"
NO_FILES = {
    "link": "links; make the tar with `--dereference --hard-dereference` to have the files",
    "sparse": "sparse members; make the tar without `--sparse` to have them",
    "device": "neither files nor folders",
}
MAX_REASONS = 20
MAX_STOCK = 1 << 20
COMPRESSED_SUFFIXES = {
    ".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tar.xz": "unxz", ".tar.zst": "unzstd",
    ".tar.lz4": "unlz4",
}  # fmt: skip
COMPRESSED_STARTS = {
    b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd",
    b"\x04\x22\x4d\x18": "unlz4",
}  # fmt: skip


def open_shards(paths: Sequence[Path | str], image_key: str | None = None) -> PackedSource:
    """Opens tar files as one source, in the order given.

    Samples are grouped as webdataset does: a group is consecutive members whose names agree up to the first dot of the
    file name. The first member of a group with the suffix of an image file is the image. In a group without one, every
    member whose last suffix is that of an image file is an image (`x.min.jpg`). Groups without either are passed over.
    With ``image_key`` it is the members that end with a dot and this, or, of `all`, every image.

    Labels are the integers in `.cls` members, or the `label` (or the like) in `.json` members, anywhere in the same
    shard, if every sample has one. If there is none at all, tars that are named as classes are (`cat.tar`, and
    `n01440764.tar`, whose members have that name as well), be they shards or tars inside a tar. Of a shard that is cut
    or damaged, the part before the damage is used, and ``damage`` names the shard. ``stock`` counts every member.

    Raises:
        UserError: a file is compressed, is not a tar file at all, or no image has ``image_key``.
        OSError: a file cannot be read.
    """
    for path in paths:
        refuse_compressed(path)
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        stamps = list(pool.map(_stamp, paths))
    shards = [[file_name(path), *stamp] for path, stamp in zip(paths, stamps, strict=True)]
    fingerprint = hashlib.sha256(json.dumps([RULES, image_key, sorted(IMAGE_SUFFIXES), shards]).encode()).hexdigest()
    index_paths = _index_paths(paths)
    for index_path in index_paths:
        index = read_index(index_path)
        if index is not None and index.fingerprint == fingerprint and _is_sound(index.columns, stamps):
            return _source(paths, stamps, index.columns)
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        indexed = list(pool.map(functools.partial(index_shard, image_key=image_key), paths))
    others = [item for inside in indexed for item in inside.left_out.values() if item.reason == OTHER_IMAGE]
    if others and not any(inside.samples for inside in indexed):
        there = sorted({f".{name.rpartition('/')[2].partition('.')[2]}" for item in others for name in item.examples})
        raise SettingError("image_key", image_key, f"no image of the tars ends so; there are {', '.join(there)}")
    columns = _columns(indexed, [os.path.splitext(file_name(path))[0] for path in paths])
    if is_settled(modified for _, modified in stamps):
        any(write_index(index_path, Index(fingerprint, columns)) for index_path in index_paths)  # the first that works
    return _source(paths, stamps, columns)


def _stamp(path: Path | str) -> tuple[int, int]:
    """Returns the size of a shard, and what tells it from another version of it: its modification time, or an ETag."""
    if is_remote(path):
        return open_file(path).stamp
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def refuse_compressed(path: Path | str) -> None:
    """Refuses a compressed tar file by its name, because nothing can be read in place in it.

    Raises:
        UserError: the name is that of a compressed tar file.
    """
    for suffix, tool in COMPRESSED_SUFFIXES.items():
        if file_name(path).lower().endswith(suffix):
            raise UserError(f"{path}: a compressed tar cannot be read in place; run `{tool} {path}` first")


def _index_paths(paths: Sequence[Path | str]) -> list[Path]:
    """Returns where the index of these shards may be: beside them (if they share a folder), and in the cache folder."""
    if any(map(is_remote, paths)):
        return [cache_file("\0".join(["shards", *map(str, paths)]))]
    real = [os.path.realpath(path) for path in paths]
    folders = {os.path.dirname(path) for path in real}
    # The name of an index beside the shards depends on their names alone, so that it can be moved with them.
    names = cache_file("\0".join(["shards", *map(os.path.basename, real)])).name
    beside = [Path(folder) / f".fastmae-{names}" for folder in folders if len(folders) == 1]
    return [*beside, cache_file("\0".join(["shards", *real]))]


def _is_sound(columns: dict[str, np.ndarray], stamps: Sequence[tuple[int, int]]) -> bool:
    """Tells whether every sample of an index lies inside its shard and every column has its length."""
    if columns.keys() != {
        "shard",
        "offset",
        "size",
        "label",
        "has_label",
        "classes",
        "names",
        "damaged",
        "damage",
        "stock",
    }:
        return False
    if _unpacked_stock(columns["stock"]) is None:
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
    classes = np.count_nonzero(columns["classes"] == 0)
    if classes and not 0 <= columns["label"].min() <= columns["label"].max() < classes:
        return False
    if shard.min() < 0 or shard.max() >= len(stamps) or np.any(np.diff(shard) < 0):
        return False
    ends = np.array([end for end, _ in stamps], np.int64)[shard]
    return bool(np.all((offset >= 0) & (size >= 0) & (size <= ends) & (offset <= ends - size)))


def _source(paths: Sequence[Path | str], stamps: list[tuple[int, int]], columns: dict[str, np.ndarray]) -> PackedSource:
    labelled = len(columns["label"]) > 0 and bool(columns["has_label"].all())
    stock = _unpacked_stock(columns["stock"])
    assert stock is not None
    return PackedSource(
        paths=tuple(map(str, paths)),
        stamps=tuple(stamps),
        shard=columns["shard"],
        offset=columns["offset"],
        size=columns["size"],
        names=names_of(columns["names"]),
        labels=columns["label"].copy() if labelled else None,
        classes=tuple(unpack_names(columns["classes"])) if labelled else (),
        what="tar shards",
        damage=tuple(
            (str(paths[number]), reason)
            for number, reason in zip(columns["damaged"].tolist(), unpack_names(columns["damage"]), strict=True)
        ),
        stock=stock,
    )


# --- indexing ---------------------------------------------------------------------------------------------------------


class _Samples:
    """The images of a shard with their labels, in columns: a million of them take 25 bytes each and their names."""

    def __init__(self) -> None:
        self._names = bytearray()
        self.offset, self.size = array("q"), array("q")
        self.tar = array("i")
        """Of each, how many characters of its name are those of the tar inside that it lies in; 0 for none."""
        self.label = array("i")
        """Of each, the number of its label in ``values``; -1 without one."""
        self.values: dict[int | str, int] = {}

    def __len__(self) -> int:
        return len(self.offset)

    def add(self, member: _Member, label: int | str | None) -> None:
        self._names += os.fsencode(member.name) + b"\0"
        self.offset.append(member.offset)
        self.size.append(member.size)
        self.tar.append(member.inside)
        self.label.append(-1)
        if label is not None:
            self.set_label(len(self) - 1, label)

    def set_label(self, number: int, label: int | str) -> None:
        self.label[number] = self.values.setdefault(label, len(self.values))

    def pop(self) -> str:
        """Removes the last image, and returns its name."""
        for column in (self.offset, self.size, self.tar, self.label):
            column.pop()
        start = self._names.rfind(b"\0", 0, -1) + 1
        name = os.fsdecode(bytes(self._names[start:-1]))
        del self._names[start:]
        return name

    @property
    def names(self) -> Names:
        return names_of(np.frombuffer(bytes(self._names), np.uint8))

    @property
    def labels(self) -> np.ndarray:
        """int64 [length], numbers of ``values``, or -1."""
        return np.array(self.label, np.int64)


@dataclass
class _Inside:
    """What is in a shard."""

    samples: _Samples = field(default_factory=_Samples)
    damage: str | None = None
    inner_damage: list[str] = field(default_factory=list)
    """What is wrong with tars inside."""
    labels: int = 0
    """Members with the label of a sample."""
    folders: int = 0
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    """By reason."""

    def leave_out(self, name: str, reason: str) -> None:
        """Counts a member that is not used."""
        if reason not in self.left_out and len(self.left_out) >= MAX_REASONS:
            reason = OTHER_SUFFIX
        before = self.left_out.get(reason, LeftOut("members", 0, reason))
        self.left_out[reason] = LeftOut("members", before.count + 1, reason, (*before.examples, name)[:EXAMPLES])


def _columns(indexed: list[_Inside], stems: list[str]) -> dict[str, np.ndarray]:
    labelled = any(inside.samples.values for inside in indexed)
    damaged, damages = [], []
    for number, inside in enumerate(indexed):
        samples = inside.samples
        if inside.damage is not None:
            if labelled and samples and samples.label[-1] < 0:
                inside.leave_out(samples.pop(), "the label lies behind the damage of the tar")
            damaged.append(number)
            damages.append(f"{inside.damage}, so only its first {len(samples)} images are used; replace it to have all")
        for damage in inside.inner_damage:
            damaged.append(number)
            damages.append(damage)
    stock = _stock_of(indexed)
    if not labelled and (note := _label_by_tar(indexed, stems)):
        stock = dataclasses.replace(stock, notes=(*stock.notes, note))
    values = {value for inside in indexed for value in inside.samples.values}
    classes = [] if all(isinstance(value, int) for value in values) else sorted({*map(str, values)})
    numbers = {name: number for number, name in enumerate(classes)}

    def joined_columns(of: Callable[[_Samples], Any], dtype: npt.DTypeLike) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(np.array(of(inside.samples), dtype) for inside in indexed)])

    def labels_of(samples: _Samples) -> np.ndarray:
        each = [numbers[str(value)] if classes else int(value) for value in samples.values]
        return np.array([*each, 0], np.int64)[samples.labels]

    return {
        "shard": np.repeat(np.arange(len(indexed)), [len(inside.samples) for inside in indexed]).astype(np.int64),
        "offset": joined_columns(lambda samples: samples.offset, np.int64),
        "size": joined_columns(lambda samples: samples.size, np.int64),
        "label": joined_columns(labels_of, np.int64),
        "has_label": joined_columns(lambda samples: samples.labels >= 0, np.uint8),
        "classes": pack_names(classes),
        "names": joined_columns(lambda samples: samples.names.column, np.uint8),
        "damaged": np.array(damaged, np.int64),
        "damage": pack_names(damages),
        "stock": _packed_stock(stock),
    }


def _label_by_tar(indexed: list[_Inside], stems: list[str]) -> str:
    """Takes the names of tars as classes, of those inside or else of the shards, and says so, where they name classes.

    They do if they are words, or if the names of their members begin with them.
    """
    tars: dict[str, list[tuple[_Samples, Sequence[int]]]] = {}
    for stem, inside in zip(stems, indexed, strict=True):
        samples = inside.samples
        if not any(samples.tar):
            if samples:
                tars.setdefault(stem, []).append((samples, range(len(samples))))
            continue
        places: dict[str, array[int]] = {}
        for number, (name, length) in enumerate(zip(samples.names, samples.tar, strict=True)):
            inner = name[:length].rpartition("/")[2].removesuffix(".tar") if length else ""
            places.setdefault(inner or stem, array("q")).append(number)
        for tar, numbers in places.items():
            tars.setdefault(tar, []).append((samples, numbers))
    if len(tars) < 2 or any(shard_part(tar) or read_part(tar) for tar in tars):
        return ""
    if not all(re.fullmatch(r"[^\W\d](?:[^\W\d]|[ -])+[^\W\d]", tar) for tar in tars):
        firsts = [(tar, parts[0][0].names[parts[0][1][0]]) for tar, parts in tars.items()]
        if not all(name.rpartition("/")[2].startswith(tar) for tar, name in firsts):
            return ""
    for tar, parts in tars.items():
        for samples, held in parts:
            for number in held:
                samples.set_label(number, tar)
    some = ", ".join([*tars][:EXAMPLES]) + (", …" if len(tars) > EXAMPLES else "")
    return f"the names of {count_of(len(tars), 'tars')} are taken as classes ({some}), as no image in them has a label"


@dataclass
class _Some:
    """How many images there are of a kind, and the names of the first ones."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def see(self, name: str) -> None:
        self.count += 1
        if len(self.names) < EXAMPLES:
            self.names.append(name)


def _stock_of(indexed: list[_Inside]) -> Stock:
    """Returns the sum of the members of all shards. Labels are used if every image has one."""
    count = sum(len(inside.samples) for inside in indexed)
    without, dotted, again = _Some(), _Some(), _Some()
    for inside in indexed:
        names = inside.samples.names
        for name, label in zip(names, inside.samples.label, strict=True):
            if label < 0:
                without.see(name)
            if _stem(name) != _key(name):
                dotted.see(name)
        for number in repeats(names).tolist():
            again.see(names[number])
    labels, used = sum(inside.labels for inside in indexed), count + sum(inside.folders for inside in indexed)
    left_out = [item for inside in indexed for item in inside.left_out.values()]
    if labels and without.count:
        reason = f"labels, as {without.count:,} of {count:,} images have none; give each its .cls to use them"
        left_out.append(LeftOut("members", labels, reason, tuple(f"without: {name}" for name in without.names)))
    else:
        used += labels
    notes = [
        _note(dotted, "with more than one dot in their names, each taken as a sample"),
        _note(again, "with the name of an earlier one, both used"),
    ]
    there = {"files": len(indexed), "images": count, "members": used}
    return Stock(there, joined([Stock(left_out=tuple(left_out))]).left_out, tuple(filter(None, notes)))


def _note(found: _Some, text: str) -> str:
    """Returns a line about these images; none if there are none."""
    more = ", …" if found.count > len(found.names) else ""
    return f"{count_of(found.count, 'images')} {text} ({', '.join(found.names)}{more})" if found.count else ""


def _packed_stock(stock: Stock) -> np.ndarray:
    left_out = [(item.unit, item.count, item.reason, item.examples) for item in stock.left_out]
    return np.frombuffer(json.dumps([stock.used, left_out, stock.notes]).encode(), np.uint8)


def _unpacked_stock(column: np.ndarray) -> Stock | None:
    """Returns the stock in a column of an index; None if it is none."""
    if len(column) > MAX_STOCK:
        return None
    try:
        used, left_out, notes = json.loads(column.tobytes())
        items = tuple(
            LeftOut(str(unit), int(count), str(reason), tuple(map(str, examples)))
            for unit, count, reason, examples in left_out
        )
        return Stock({str(unit): int(count) for unit, count in used.items()}, items, tuple(map(str, notes)))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def index_shard(path: Path | str, image_key: str | None = None) -> _Inside:
    """Reads the headers of a shard and of the tars inside it, and its labels.

    Raises:
        UserError: the file is compressed, or its first header is not one of a tar file.
    """
    shard = open_file(path)
    ahead = ReadAhead(shard) if is_remote(path) else None
    try:
        return _index(path, shard.size, _Window(shard.read) if ahead is None else ahead.read, image_key)
    finally:
        if ahead is not None:
            ahead.close()


class _Window:
    """Reads a file by position, and keeps what follows what was asked for: the next header, where files are small."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read, self._start, self._bytes = read, 0, b""

    def __call__(self, size: int, position: int) -> bytes:
        inside = position - self._start
        if not 0 <= inside <= inside + size <= len(self._bytes):
            if size > WINDOW:
                return self._read(size, position)
            self._start, self._bytes, inside = position, self._read(WINDOW, position), 0
        return self._bytes[inside : inside + size]


def _index(path: Path | str, size: int, read: Callable[[int, int], bytes], image_key: str | None) -> _Inside:
    start = read(BLOCK, 0)
    for magic, tool in COMPRESSED_STARTS.items():
        if start.startswith(magic):
            raise UserError(f"{path}: a compressed tar cannot be read in place; unpack it with `{tool}` first")
    damage: list[_DamageError] = []
    inside = _Inside()

    def intact() -> Iterator[_Member]:
        try:
            for member in _members(read, size):
                if member.kind == "folder":
                    inside.folders += 1
                elif member.kind != "file":
                    inside.leave_out(member.name, NO_FILES[member.kind])
                elif member.name.lower().endswith(".tar") and member.size:
                    yield from _inner_members(read, member, inside)
                else:
                    yield member
        except _DamageError as error:
            damage.append(error)

    _find_samples(intact(), read, inside, image_key)
    if damage and damage[0].position == 0 and size:
        raise UserError(f"{path}: not a tar file ({damage[0]}); check or replace it")
    inside.damage = str(damage[0]) if damage else None
    return inside


def _inner_members(read: Callable[[int, int], bytes], tar: _Member, inside: _Inside) -> Iterator[_Member]:
    """Yields the files in a tar that lies in a shard. The tar itself is counted as a folder is."""
    outer = tar.name.replace("\\", "/")

    def read_inside(size: int, position: int) -> bytes:
        return read(max(0, min(size, tar.size - position)), tar.offset + position)

    try:
        for member in _members(read_inside, tar.size):
            name = f"{outer}/{member.name}"
            if member.kind == "folder":
                inside.folders += 1
            elif member.kind != "file":
                inside.leave_out(name, NO_FILES[member.kind])
            else:
                yield _Member(name, tar.offset + member.offset, member.size, inside=len(outer))
    except _DamageError as error:
        if error.position == 0:
            inside.leave_out(tar.name, NO_TAR)
            return
        used = "only its images before that are used; replace it to have all"
        inside.inner_damage.append(f"holds {outer}, which {error}, so {used}")
    inside.folders += 1


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int
    kind: str = "file"
    """`file`, `folder`, or one of ``NO_FILES``."""
    inside: int = 0
    """How many characters of the name are those of the tar inside that it lies in; 0 if it lies in none."""


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


def _stem(name: str) -> str:
    """Returns a name up to the last dot."""
    return name.rpartition(".")[0]


def _suffix(name: str) -> str:
    """Returns the last suffix of a name, in small letters."""
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if dot and stem.strip(".") else ""


def _find_samples(
    members: Iterator[_Member], read: Callable[[int, int], bytes], inside: _Inside, image_key: str | None
) -> None:
    """Puts samples with their labels into ``inside``, and counts the members that are of no use."""
    spare: dict[str, _Label] = {}  # labels by stem that belong to no image beside them
    waiting = array("q")  # the numbers of samples without a label
    for key, members_of_key in itertools.groupby(members, key=lambda member: _key(member.name)):
        group = list(members_of_key)
        if key is None:
            for member in group:
                is_hidden = member.name.rpartition("/")[2].startswith(".")
                inside.leave_out(member.name, HIDDEN if is_hidden else NO_SUFFIX)
            continue
        images = [member for member in group if _suffix(member.name) in IMAGE_SUFFIXES]
        if image_key is None:
            images = [member for member in images if member.name[len(key) :].lower() in IMAGE_SUFFIXES][:1] or images
        elif image_key != "all":
            ending = f".{image_key.lower().removeprefix('.')}"
            images = [member for member in images if member.name[len(key) :].lower() == ending]
        chosen = {image.offset for image in images}
        labels: dict[str, _Label] = {}
        records: list[_Label] = []
        for member in group:
            suffix = _suffix(member.name)
            if suffix == ".cls":
                _keep_label(_Label(member, _integer(member, read)), labels, inside)
            elif suffix == ".json" and (value := _label_in_json(member, read)) is not None:
                records.append(_Label(member, value))
            elif member.offset not in chosen:
                is_image = image_key is not None and suffix in IMAGE_SUFFIXES
                inside.leave_out(member.name, OTHER_IMAGE if is_image else _why_unused(member.name))
        for record in records:  # behind `.cls`, which counts where there are both
            _keep_label(record, labels, inside)
        used = set()
        for image in images:
            stem = _label_of(image.name, key, labels)
            if stem is None:
                waiting.append(len(inside.samples))
            else:
                used.add(stem)
            inside.samples.add(image, None if stem is None else labels[stem].value)
        for stem, label in labels.items():
            if stem in used:
                _count_label(label, inside)
            else:
                _keep_label(label, spare, inside)
    used = set()
    names = inside.samples.names if spare else NO_NAMES
    for number in waiting if spare else ():
        name = names[number]
        stem = _label_of(name, _key(name), spare)
        if stem is not None:
            used.add(stem)
            if (value := spare[stem].value) is not None:
                inside.samples.set_label(number, value)
    for stem, label in spare.items():
        if stem in used:
            _count_label(label, inside)
        else:
            inside.leave_out(label.member.name, NO_IMAGE)


def _label_of(name: str, key: str | None, labels: dict[str, _Label]) -> str | None:
    """Returns the stem of the label of an image: the image's own, or else its key."""
    return next((stem for stem in (_stem(name), key) if stem in labels), None)


@dataclass(frozen=True)
class _Label:
    member: _Member
    value: int | str | None
    """None if the member holds no label."""


def _keep_label(label: _Label, labels: dict[str, _Label], inside: _Inside) -> None:
    """Notes a label by its stem; of two with the same stem the first counts."""
    if labels.setdefault(_stem(label.member.name), label) is not label:
        inside.leave_out(label.member.name, SECOND_LABEL)


def _integer(member: _Member, read: Callable[[int, int], bytes]) -> int | None:
    """Returns the integer in a `.cls` member; None if it holds something else."""
    text = read(member.size, member.offset) if member.size <= MAX_LABEL_BYTES else b""
    return int(text) if re.fullmatch(rb"\s*-?\d{1,18}\s*", text) else None


def _label_in_json(member: _Member, read: Callable[[int, int], bytes]) -> int | str | None:
    """Returns the integer or the word under `label`, or the like, of a `.json` member; None without one."""
    if member.size > MAX_JSON_BYTES:
        return None
    try:
        record = json.loads(read(member.size, member.offset))
    except (ValueError, RecursionError):
        return None
    values = [record[name] for name in LABEL_COLUMNS if name in record] if isinstance(record, dict) else []
    value = values[0] if values else None
    is_label = isinstance(value, str | int) and (isinstance(value, str) or -(1 << 63) <= value < 1 << 63)
    return value if is_label and "\0" not in str(value) else None


def _count_label(label: _Label, inside: _Inside) -> None:
    if label.value is None:
        inside.leave_out(label.member.name, NO_INTEGER)
    else:
        inside.labels += 1


def _why_unused(name: str) -> str:
    """Says why a member with a suffix is neither an image nor a label."""
    suffix = suffix_of(name)
    if suffix in IMAGE_SUFFIXES:
        return SECOND_IMAGE
    if suffix == ".tar" or name.lower().endswith(tuple(COMPRESSED_SUFFIXES)):
        return PACKED_TAR if suffix != ".tar" or "/" in name else NO_TAR
    if suffix in (".npy", ".npz", ".bin", ".parquet"):  # beside images a path of their own would be the remedy
        return f"{suffix}, no image"
    return why_not(suffix) if suffix else NO_SUFFIX


def _members(read: Callable[[int, int], bytes], end: int) -> Iterator[_Member]:
    """Yields the members of a tar file in order; ``read(size, offset)`` returns its bytes.

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
            _refuse_more(read, position, end)
            return
        name, size, kind = _header(block, position)
        body = position + BLOCK
        if kind in "xXgLK":
            if size > MAX_EXTENSION:
                raise _DamageError(position, f"has a header of {size} bytes at byte {position}")
            text = read(size, body)
            if len(text) < size:
                raise _DamageError(end, f"is cut at byte {end}")
            if kind == "L":
                extended["path"] = os.fsdecode(text.split(b"\0")[0])
            elif kind in "xX":
                extended |= _pax(text, position)
            position = body + -(-size // BLOCK) * BLOCK
            continue
        if "size" in extended:
            if not extended["size"].isascii() or not extended["size"].isdigit() or len(extended["size"]) > 19:
                raise _DamageError(position, f"has a size that is no number at byte {position}")
            size = int(extended["size"])
        name = extended.get("path", name)
        what = _KINDS.get(kind, "device")
        if kind == "S":  # a map of the holes lies between header and bytes, in blocks that say whether another follows
            follows = block[482] != 0
            while follows and body < end:
                follows, body = read(BLOCK, body)[504:505] not in (b"", b"\0"), body + BLOCK
        if any(word.startswith("GNU.sparse") for word in extended):
            what = "sparse"
            name = extended.get("GNU.sparse.name", name)
        if kind in "123456":  # links, devices and folders have no bytes, whatever their size says
            size = 0
        if body + size > end:
            raise _DamageError(end, f"is cut at byte {end}")
        yield _Member(name, body, size, "folder" if what == "file" and name.endswith("/") else what)
        extended = {}
        position = body + -(-size // BLOCK) * BLOCK


_KINDS = {"0": "file", "\0": "file", "7": "file", "1": "link", "2": "link", "5": "folder", "S": "sparse"}


def _refuse_more(read: Callable[[int, int], bytes], position: int, end: int) -> None:
    """Raises _DamageError if there is more than zeros not far behind a tar's closing block."""
    for start in range(position, min(end, position + LOOKED_BEHIND), 1 << 20):
        if read(1 << 20, start).strip(b"\0"):
            raise _DamageError(position, f"goes on behind its end at byte {position}, as tars do that `cat` joined")


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
    records, start = {}, 0
    while start < len(text):
        space = text.find(b" ", start, start + 10)
        digits = text[start:space] if space > start else b""
        length = int(digits) if digits.isdigit() else 0
        record = text[space + 1 : start + length]
        if start + length > len(text) or not record.endswith(b"\n") or b"=" not in record:
            raise _DamageError(position, f"has a broken PAX header at byte {position}")
        word, _, value = record[:-1].partition(b"=")
        records[os.fsdecode(word)] = os.fsdecode(value.split(b"\0")[0])
        start += length
    return records


# --- names ------------------------------------------------------------------------------------------------------------


def expand_braces(pattern: str) -> list[str]:
    """Returns the names that `part-{000..146}.tar` or `{a,b}.tar` stands for in a shell, in that order.

    Raises:
        SettingError: the pattern stands for more than a million names.
    """
    parts: list[Sequence[str]] = []
    count, end = 1, 0
    for match in re.finditer(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern):
        first, last, words = match.groups()
        choices: Sequence[str]
        if words is None:
            low, high = int(first), int(last)
            count *= abs(high - low) + 1
        else:
            choices = words.split(",")
            count *= len(choices)
        if count > MAX_NAMES:
            raise SettingError("data_path", pattern, "more than a million names; check the numbers")
        if words is None:
            width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
            step = 1 if high >= low else -1
            choices = [f"{number:0{width}d}" for number in range(low, high + step, step)]
        parts += [[pattern[end : match.start()]], choices]
        end = match.end()
    return ["".join(words) for words in itertools.product(*parts, [pattern[end:]])]
