"""Indexes of what lies where, made once and kept in a file: columns of numbers and a fingerprint of what they describe.

Nothing in such a file is trusted: one that is damaged, cut, foreign or of another fingerprint counts as not there, and
whoever reads the columns checks that what they point at exists. A file that cannot be written is not an error.
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

FORMAT = "fastmae index 1"
MAX_HEADER = 1 << 28
# A change within one tick of a file system's clock (up to 2 s on FAT) leaves no trace in a modification time.
CLOCK_TICK = 2.0


@dataclass(frozen=True)
class Index:
    """What is kept: a fingerprint that JSON can hold, and columns int64 or uint8 [n], each of its own length."""

    fingerprint: Any
    columns: dict[str, np.ndarray]


def cache_file(identity: str) -> Path:
    """Where the index of what ``identity`` names is kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, then fastmae/."""
    digest = hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fastmae" / f"{digest}.index"


def is_settled(modified_ns: Iterable[int]) -> bool:
    """Whether the newest of some modification times is old enough that any later change would show."""
    return max(modified_ns, default=0) < (time.time() - CLOCK_TICK) * 1e9


def read_index(path: Path) -> Index | None:
    """The index in a file; None if there is none, or if anything about it is not as it was written."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = json.loads(file.readline(MAX_HEADER))
            if header["format"] != FORMAT:
                return None
            shapes = [(str(name), np.dtype({"i": np.int64, "u": np.uint8}[kind]), int(n))
                      for name, kind, n in header["columns"]]  # fmt: skip
            left = size - file.tell()
            if any(n < 0 for _, _, n in shapes) or sum(dtype.itemsize * n for _, dtype, n in shapes) != left:
                return None
            body = file.read(left)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    if len(body) != left or zlib.crc32(body) != header.get("crc32"):
        return None
    columns, start = {}, 0
    for name, dtype, n in shapes:
        columns[name] = np.frombuffer(body, dtype, n, start)
        start += dtype.itemsize * n
    return Index(header.get("fingerprint"), columns)


def write_index(path: Path, index: Index) -> bool:
    """Writes an index, whole or not at all; several processes may do so at once. False where that is not possible."""
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
        os.chmod(partial, 0o644)  # others who read the data may use it
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        return False
    return True


def pack_names(names: Sequence[str]) -> np.ndarray:
    """File names, which hold no zero byte, as one column uint8: each ends with a zero."""
    return np.frombuffer(b"".join(os.fsencode(name) + b"\0" for name in names), np.uint8)


def unpack_names(column: np.ndarray) -> list[str]:
    """The inverse of ``pack_names``."""
    return [os.fsdecode(name) for name in column.tobytes().split(b"\0")[:-1]]


@dataclass(frozen=True)
class Names:
    """Names packed in one column, of which few are ever asked for."""

    column: np.ndarray
    ends: np.ndarray
    """int64 [length]: where in ``column`` each name's zero is."""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = 0 if index == 0 else int(self.ends[index - 1]) + 1
        return os.fsdecode(self.column[start : self.ends[index]].tobytes())


def names_of(column: np.ndarray) -> Names:
    """``Names`` over a column of ``pack_names``."""
    return Names(column, np.flatnonzero(column == 0))


# --- folders of images ------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"))
# No image takes more, and a file may say that it has any size.
MAX_FILE_BYTES = 2 << 30
# Fewer files are listed faster than anyone would look for an index.
WORTH_KEEPING = 10_000


@dataclass(frozen=True)
class Listing:
    """The image files of a folder, sorted, so that the order is everyone's."""

    paths: tuple[str, ...]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    """Folders that may not be listed, so that what is in them is missed."""


def list_images(folder: Path) -> Listing:
    """Class folders with images below them, or images directly inside.

    A long listing is kept in the cache folder and used again while no folder's modification time has changed, which
    every file that comes or goes changes.
    """
    kept_in = cache_file(f"images of {os.path.realpath(folder)}")
    known = read_index(kept_in)
    listing = None if known is None else _recall(folder, known)
    if listing is not None:
        return listing
    modified: dict[str, int] = {}
    listing = _list(folder, modified)
    if len(listing.paths) >= WORTH_KEEPING and is_settled(modified.values()) and min(modified.values()) >= 0:
        inside = len(os.path.join(folder, ""))
        columns = {
            "folders": pack_names([path[inside:] for path in modified]),
            "modified": np.array([*modified.values()], np.int64),
            "paths": pack_names([path[inside:] for path in listing.paths]),
            "classes": pack_names(listing.classes),
            "labels": np.array([], np.int64) if listing.labels is None else listing.labels,
        }
        write_index(kept_in, Index(os.path.realpath(folder), columns))
    return listing


def _recall(folder: Path, known: Index) -> Listing | None:
    """The listing in an index, if it is of this folder as it is now."""
    columns = known.columns
    if known.fingerprint != os.path.realpath(folder) or columns.keys() != {
        "folders", "modified", "paths", "classes", "labels",
    }:  # fmt: skip
        return None
    folders, paths, classes = (unpack_names(columns[name]) for name in ("folders", "paths", "classes"))
    labels, modified = columns["labels"], columns["modified"]
    if len(modified) != len(folders) or not (_stays_inside(columns["folders"]) and _stays_inside(columns["paths"])):
        return None
    if len(labels) not in (0, len(paths)) or (len(labels) and not 0 <= labels.min() <= labels.max() < len(classes)):
        return None
    try:
        if [os.stat(os.path.join(folder, name)).st_mtime_ns for name in folders] != modified.tolist():
            return None
    except OSError:
        return None
    prefix = os.path.join(folder, "")
    found = tuple(prefix + path for path in paths)
    return Listing(found, labels.copy() if len(labels) else None, tuple(classes) if len(labels) else ())


def _stays_inside(column: np.ndarray) -> bool:
    """Whether packed paths are all relative and none climbs with `..`."""
    packed = b"\0" + column.tobytes()
    return packed.endswith(b"\0") and not any(
        climb in packed for climb in (b"\0/", b"\0../", b"/../", b"/..\0", b"\0..\0")
    )


def _list(folder: Path, modified: dict[str, int]) -> Listing:
    modified[str(folder)] = os.stat(folder).st_mtime_ns
    classes = tuple(sorted(entry.name for entry in os.scandir(folder) if _is_folder(entry) and entry.name[0] != "."))
    found: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = _images_below(os.path.join(folder, name), modified)
        found += inside
        labels += [label] * len(inside)
    is_labelled = bool(found)
    if not is_labelled:
        found = _images_below(str(folder), modified)
    unreadable = tuple(path for path, time_ns in modified.items() if time_ns < 0)
    if is_labelled:
        return Listing(tuple(found), np.array(labels, dtype=np.int64), classes, unreadable)
    return Listing(tuple(found), None, (), unreadable)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is one or links to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _images_below(folder: str, modified: dict[str, int]) -> list[str]:
    """Images at any depth, sorted; links to folders are not followed and folders that may not be read are passed by."""
    found: list[str] = []
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        try:
            # Before the listing: what comes in the meantime makes this time an old one.
            modified[parent] = os.stat(parent).st_mtime_ns
            entries = os.scandir(parent)
        except OSError:
            modified[parent] = -1  # such a listing is not kept
            continue
        with entries:
            for entry in entries:
                if _is_folder(entry):
                    if not entry.is_symlink():
                        waiting.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES and not entry.name.startswith("."):
                    found.append(entry.path)
    return sorted(found)
