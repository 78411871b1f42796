"""Image files in folders: which there are, their classes, and a source that reads them.

The list of a large folder is kept in an index file. Nothing here decodes an image.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmae.data.index import Index, cache_file, is_settled, pack_names, read_index, unpack_names, write_index
from fastmae.data.stock import Stock

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"))
# No image takes more, and a file may say that it has any size.
MAX_FILE_BYTES = 2 << 30
# Fewer files are listed faster than an index of them is found and checked.
WORTH_KEEPING = 10_000


@dataclass(frozen=True)
class FolderSource:
    """Image files, one per sample."""

    paths: tuple[str, ...]
    labels: np.ndarray | None
    """int64 [length], numbers of ``classes``, or None."""
    classes: tuple[str, ...]
    kind: str = "folder"
    beside: str = ""
    """What lies in the same folder and is not used, as a phrase for people."""
    damage: tuple[tuple[str, str], ...] = ()
    """(name, what is wrong) of folders whose images are missed."""
    shards = None

    @property
    def location(self) -> str:
        text = (f"in {len(self.classes)} class folders" if self.classes else "in files") + self.beside
        return "; ".join([text, *map(" ".join, self.damage)])

    @property
    def stock(self) -> Stock:
        return Stock({"files": len(self)})

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file.

        Raises:
            OSError: the file is gone, unreadable, not a regular file, or too large for an image.
        """
        with open(self.paths[index], "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a file")
            if status.st_size > MAX_FILE_BYTES:
                raise OSError(f"{status.st_size} bytes, over the limit of {MAX_FILE_BYTES}")
            return file.read()

    def name(self, index: int) -> str:
        return self.paths[index]


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file without waiting for a writer, as opening a named pipe would."""
    return os.open(path, flags | os.O_NONBLOCK)


# --- which files there are --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The image files of a folder, sorted, so that they have the same order on every machine."""

    paths: tuple[str, ...]
    labels: np.ndarray | None
    """int64 [length], numbers of ``classes``; None where there are no class folders."""
    classes: tuple[str, ...]
    unreadable: tuple[str, ...] = ()
    """Folders that may not be listed, so the images in them are missed."""


def list_images(folder: Path) -> Listing:
    """Lists the images below the class folders of a folder, or else the images below the folder itself.

    A long listing is kept in the cache folder. It is used again as long as no folder's modification time has changed:
    every file that is added or removed changes that of its folder.
    """
    index_path = cache_file(f"images of {os.path.realpath(folder)}")
    index = read_index(index_path)
    listing = None if index is None else _listing_of(folder, index)
    if listing is not None:
        return listing
    listing, modified = scan_folder(folder)
    if len(listing.paths) >= WORTH_KEEPING and is_settled(modified.values()) and min(modified.values()) >= 0:
        inside = len(os.path.join(folder, ""))
        columns = {
            "folders": pack_names([path[inside:] for path in modified]),
            "modified": np.array([*modified.values()], np.int64),
            "paths": pack_names([path[inside:] for path in listing.paths]),
            "classes": pack_names(listing.classes),
            "labels": np.array([], np.int64) if listing.labels is None else listing.labels,
        }
        write_index(index_path, Index(os.path.realpath(folder), columns))
    return listing


def _listing_of(folder: Path, index: Index) -> Listing | None:
    """Returns the listing in an index; None if it is not of this folder as the folder is now."""
    columns = index.columns
    if index.fingerprint != os.path.realpath(folder) or columns.keys() != {
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
    return Listing(
        tuple(prefix + path for path in paths),
        labels.copy() if len(labels) else None,
        tuple(classes) if len(labels) else (),
    )


def _stays_inside(column: np.ndarray) -> bool:
    """Tells whether all packed paths are relative and none climbs out with `..`."""
    packed = b"\0" + column.tobytes()
    return packed.endswith(b"\0") and not any(
        climb in packed for climb in (b"\0/", b"\0../", b"/../", b"/..\0", b"\0..\0")
    )


def scan_folder(folder: Path) -> tuple[Listing, dict[str, int]]:
    """Lists a folder without an index. Returns modification times too, in ns, by folder; -1 for an unreadable one."""
    modified = {str(folder): os.stat(folder).st_mtime_ns}
    classes = tuple(sorted(entry.name for entry in os.scandir(folder) if _is_folder(entry) and entry.name[0] != "."))
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = _images_below(os.path.join(folder, name), modified)
        paths += inside
        labels += [label] * len(inside)
    is_labelled = bool(paths)
    if not is_labelled:
        paths = _images_below(str(folder), modified)
    unreadable = tuple(path for path, time_ns in modified.items() if time_ns < 0)
    if is_labelled:
        return Listing(tuple(paths), np.array(labels, dtype=np.int64), classes, unreadable), modified
    return Listing(tuple(paths), None, (), unreadable), modified


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Tells whether an entry is a folder or links to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _images_below(folder: str, modified: dict[str, int]) -> list[str]:
    """Lists images at any depth, sorted, and notes the times of their folders in ``modified``.

    Links to folders are not followed, and unreadable folders are passed over.
    """
    paths: list[str] = []
    waiting = [folder]
    while waiting:
        parent = waiting.pop()
        try:
            # Read before the listing, so that a file which is added in between makes the noted time an old one.
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
                    paths.append(entry.path)
    return sorted(paths)
