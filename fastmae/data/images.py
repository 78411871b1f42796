"""Image files in folders: which there are, their classes, what else lies there, and a source that reads them.

The list of a large folder is kept in an index file. Nothing here decodes an image.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import json
import os
import stat
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image

from fastmae.data.index import (
    NO_NAMES,
    Index,
    Names,
    cache_file,
    is_settled,
    join_names,
    names_of,
    pack_names,
    read_index,
    unpack_names,
    write_index,
)
from fastmae.data.parts import read_part
from fastmae.data.remote import fetch, is_remote
from fastmae.data.stock import EXAMPLES, LeftOut, Stock, count_of, joined
from fastmae.data.suffixes import IMAGE_STARTS, IMAGE_SUFFIXES, SHARD_SUFFIXES, START_BYTES, suffix_of, why_not

# No image takes more, and a file may say that it has any size.
MAX_FILE_BYTES = 2 << 30
# Larger files are looked at before they are read.
LARGE_FILE = 64 << 20
LOOKED_AT = 1 << 20
SINGLE_IMAGES = ("JPEG", "PNG", "BMP", "PPM", "JPEG2000")
MAX_BYTES_A_PIXEL = 16
ARRAY_STARTS = (b"\x93NUMPY", b"PK\x03\x04")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Fewer files are listed faster than an index of them is found and checked.
WORTH_KEEPING = 10_000
# It changes whenever other files are listed than before, so that older listings are made anew.
RULE = 3
# Folders that are read at a time.
LIST_THREADS = 8
SHOWN_CLASSES = 6
SHOWN_SUFFIXES = 12


@dataclass(frozen=True)
class FolderSource:
    """Image files, one per sample."""

    paths: Sequence[str]
    """Of each image; ``Names`` where there are many."""
    labels: np.ndarray | None
    """int64 [length], or None."""
    classes: tuple[str, ...]
    """The names of the classes that the labels number, if they have names."""
    kind: str = "folder"
    part: str = ""
    """The folder of a part of the data set, as it is called below the data path."""
    taken: Stock | None = None
    """The stock of the folder that they are from, if it was taken."""
    damage: tuple[tuple[str, str], ...] = ()
    """(name, what is wrong) of folders whose images are missed."""
    listed: str = ""
    """In which list they are, as a phrase for people, if they are from one."""
    shards = None

    @property
    def location(self) -> str:
        if self.listed:
            return self.listed
        text = "in files"
        if self.classes:
            names = f" ({', '.join(self.classes)})" if len(self.classes) <= SHOWN_CLASSES else ""
            text = f"in {count_of(len(self.classes), 'class folders')}{names}"
        return f"{text} of {self.part}" if self.part else text

    @property
    def stock(self) -> Stock:
        return Stock({"files": len(self)}) if self.taken is None else self.taken

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> BinaryIO:
        """Opens an image file of any size, to be read by position.

        Raises:
            OSError: the file is gone, unreadable, or not a regular file; or it lies behind an address.
        """
        if is_remote(self.paths[index]):
            raise OSError("behind an address, where files of many pages are not read; copy it to a disk")
        file = open(self.paths[index], "rb", opener=_open_at_once)  # noqa: SIM115  # the caller closes it
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise OSError("not a file")
        return file

    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file.

        Raises:
            OSError: the file is gone, unreadable, not a regular file, or too large for an image.
        """
        path = self.paths[index]
        if is_remote(path):
            return fetch(path, MAX_FILE_BYTES)
        with self.open(index) as file:
            status = os.fstat(file.fileno())
            if status.st_size > MAX_FILE_BYTES:
                raise OSError(f"{status.st_size} bytes, over the limit of {MAX_FILE_BYTES}")
            if status.st_size > LARGE_FILE:
                refuse_no_image(file.read(LOOKED_AT), status.st_size)
                file.seek(0)
            return file.read()

    def name(self, index: int) -> str:
        return self.paths[index]


def refuse_no_image(start: bytes, size: int) -> None:
    """Refuses a large file by its first bytes, before all of it is read: no image, or far longer than its pixels are.

    Raises:
        OSError: it is refused.
    """
    # The header of a TIFF may lie at its end, that of a DICOM says little, and arrays are checked where they are read.
    if start.startswith((*TIFF_STARTS, *ARRAY_STARTS)) or start[128:132] == b"DICM":
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(start)) as image:
                pixels, is_single = image.width * image.height, image.format in SINGLE_IMAGES
    except Exception as error:  # whatever Pillow raises for what is damaged
        raise OSError(f"{size} bytes that do not begin as an image does") from error
    if is_single and size > LARGE_FILE + MAX_BYTES_A_PIXEL * pixels:
        raise OSError(f"{size} bytes, far more than its {pixels} pixels can take")


def _open_at_once(path: str, flags: int) -> int:
    """Opens a file without waiting for a writer, as opening a named pipe would."""
    return os.open(path, flags | os.O_NONBLOCK)


# --- which files there are --------------------------------------------------------------------------------------------

Why = Literal["hidden", "run", "twice", "zarr"]


@dataclass
class Tally:
    """How many files there are of a kind, and the names that come first."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        bisect.insort(self.names, name)
        del self.names[EXAMPLES:]

    def join(self, other: Tally, before: str) -> None:
        """Adds the files of another tally, whose names lack what comes before them."""
        self.count += other.count
        self.names = sorted([*self.names, *(before + name for name in other.names)])[:EXAMPLES]


@dataclass
class Listing:
    """The files below a folder. Names of folders and files in it are relative to it; "" is the folder itself."""

    folder: str
    images: dict[str, Names] = field(default_factory=dict)
    """For every folder that was listed, the sorted names of the image files directly inside."""
    shards: list[str] = field(default_factory=list)
    """Tar and Parquet files, sorted."""
    others: dict[str, Tally] = field(default_factory=dict)
    """Other files by suffix ("" for none), and "hidden", "broken" (links to nothing), "special" ones (pipes …),
    "run" for those in the folder of a run,
    and "index" for those that fastmae keeps beside shards, which nobody counts."""
    unsound: list[str] = field(default_factory=list)
    """Images by their names that are no files; reading them fails, and a run replaces them as it does damaged ones."""
    skipped: dict[str, Why] = field(default_factory=dict)
    """Folders that were not entered: hidden ones, run folders, Zarr stores, and links to what is listed anyway."""
    unreadable: list[str] = field(default_factory=list)
    """Folders that may not be listed, so the images in them are missed."""

    def __len__(self) -> int:
        """The number of image files."""
        return sum(map(len, self.images.values()))


def list_images(folder: Path, suffixes: tuple[str, ...] = ()) -> Listing:
    """Lists the files below a folder; those of images, or with ``suffixes`` those whose names end so, are ``images``.

    A long listing is kept in the cache folder. It is used again as long as no folder's modification time has changed:
    every file that is added or removed changes that of its folder.
    """
    kind = f" ({', '.join(suffixes)})" if suffixes else ""
    index_path = cache_file(f"images{kind} of {os.path.realpath(folder)}")
    index = read_index(index_path)
    listing = None if index is None else _listing_of(folder, index, suffixes)
    if listing is not None:
        return listing
    listing, modified = scan_folder(folder, suffixes)
    # A link that leads nowhere may lead somewhere later, which changes no folder's time.
    is_lasting = is_settled(modified.values()) and not (
        listing.unreadable or any(kind in listing.others for kind in NO_FILES)
    )
    if len(listing) >= WORTH_KEEPING and is_lasting:
        others = {kind: [tally.count, *tally.names] for kind, tally in listing.others.items()}
        text = json.dumps([others, listing.skipped])
        columns = {
            "folders": pack_names([*listing.images]),
            "modified": np.array([modified[name] for name in listing.images], np.int64),
            "counts": np.array([*map(len, listing.images.values())], np.int64),
            "names": join_names(("", names) for names in listing.images.values()),
            "shards": pack_names(listing.shards),
            "skipped": pack_names([*listing.skipped]),
            "others": np.frombuffer(text.encode(errors="surrogatepass"), np.uint8),
        }
        write_index(index_path, Index(_identity(folder, suffixes), columns))
    return listing


def _identity(folder: Path, suffixes: tuple[str, ...]) -> list[object]:
    return [os.path.realpath(folder), RULE, sorted(suffixes or IMAGE_SUFFIXES)]


def _listing_of(folder: Path, index: Index, suffixes: tuple[str, ...]) -> Listing | None:
    """Returns the listing in an index; None if it is not of this folder as the folder is now."""
    columns = index.columns
    if index.fingerprint != _identity(folder, suffixes) or columns.keys() != {
        "folders", "modified", "counts", "names", "shards", "skipped", "others",
    }:  # fmt: skip
        return None
    if not all(_stays_inside(columns[name]) for name in ("folders", "names", "shards", "skipped")):
        return None
    folders, shards, skipped = (unpack_names(columns[name]) for name in ("folders", "shards", "skipped"))
    names = names_of(columns["names"])
    modified, counts = columns["modified"], columns["counts"]
    if b"/" in columns["names"].tobytes() or not len(folders) == len(modified) == len(counts):
        return None
    if (len(counts) and counts.min() < 0) or int(counts.sum()) != len(names):
        return None
    try:
        others, why = json.loads(columns["others"].tobytes().decode(errors="surrogatepass"))
        tallies = {
            str(kind): Tally(int(count), [str(name) for name in some]) for kind, (count, *some) in others.items()
        }
        if set(why) != set(skipped) or not set(why.values()) <= {"hidden", "run", "twice", "zarr"}:
            return None
        if [os.stat(os.path.join(folder, name)).st_mtime_ns for name in folders] != modified.tolist():
            return None
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    ends = np.cumsum(counts).tolist()
    images = {name: names_of(names.packed(end - count, end))
              for name, end, count in zip(folders, ends, counts.tolist(), strict=True)}  # fmt: skip
    return Listing(str(folder), images, shards, tallies, skipped=why)


def _stays_inside(column: np.ndarray) -> bool:
    """Tells whether all packed paths are relative and none climbs out with `..`."""
    packed = b"\0" + column.tobytes()
    return packed.endswith(b"\0") and not any(
        climb in packed for climb in (b"\0/", b"\0../", b"/../", b"/..\0", b"\0..\0")
    )


def scan_folder(folder: Path, suffixes: tuple[str, ...] = ()) -> tuple[Listing, dict[str, int]]:
    """Lists a folder without an index. Returns modification times too, in ns, by folder; -1 for an unreadable one.

    Links to folders are followed once all that is no link is listed, in the order of their names, so that what is found
    depends on no order of the file system's; links with the name of a part come first. A folder that a link leads to is
    listed once, and one around the link is not listed.

    Several folders are read at a time, as each of them may have to be waited for. What is found in them is put together
    by one thread, in the order in which one thread alone would have read them.
    """
    scan = _Scan(str(folder))
    waiting, links = ["", *reversed(_linked_parts(str(folder)))], list[str]()
    first = {*waiting[1:]}
    ahead: dict[str, Future[_Inside]] = {}
    pool = ThreadPoolExecutor(LIST_THREADS)
    try:
        while waiting or links:
            is_link = not waiting
            if is_link:
                links.sort(reverse=True)
            name = waiting.pop() if waiting else links.pop()
            read = ahead.pop(name, None)
            inside = _Inside(os.path.join(scan.listing.folder, name)) if read is None else read.result()
            if not scan.is_new(name, inside, is_link or name in first):
                continue
            if read is None:
                inside.read(name, suffixes)
            for below, leads_elsewhere in scan.enter(name, inside):
                if below not in first:
                    (links if leads_elsewhere else waiting).append(below)
                    if not leads_elsewhere:
                        ahead[below] = pool.submit(_read_folder, scan.listing.folder, below, suffixes)
    finally:
        pool.shutdown(cancel_futures=True)
    listing = scan.listing
    listing.images = dict(sorted(listing.images.items()))
    listing.shards.sort()
    return listing, scan.modified


def _linked_parts(folder: str) -> list[str]:
    """Returns the links directly inside with the name of a part, which are meant more than the folders they lead to.

    The one to train on comes first. A link to a folder that lies beside it is none of them.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_symlink() and _is_folder(entry)]
    except OSError:
        return []
    root, parts = os.path.realpath(folder), []
    for name in names:
        said = read_part(name)
        if said is not None and not said[1] and os.path.dirname(os.path.realpath(os.path.join(folder, name))) != root:
            parts.append((said[0] != "train", name))
    return [name for _, name in sorted(parts)]


class _Inside:
    """What lies directly in a folder, by names without it. Nothing of the rest of a listing is known here."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.status: os.stat_result | None = None
        """None if the folder cannot be read."""
        with contextlib.suppress(OSError):
            # Read before the listing, so that a file which is added in between makes the noted time an old one.
            self.status = os.stat(path)
        self.is_listed = False
        self.is_run = self.is_zarr = False
        self.images = NO_NAMES
        self.folders: list[tuple[str, bool]] = []
        """Folders in it, and whether each is a link."""
        self.shards: list[str] = []
        self.others: dict[str, Tally] = {}
        """Other files by suffix or kind, as in ``Listing.others``."""
        self.unsound: list[str] = []

    def read(self, name: str, suffixes: tuple[str, ...]) -> None:
        """Lists the folder, whose name in the listing is ``name``."""
        try:
            with os.scandir(self.path) as entries:
                found = [*entries]
        except OSError:
            return
        self.is_listed = True
        self.is_run = _is_run_folder(found)
        self.is_zarr = bool(name) and not {entry.name for entry in found}.isdisjoint(ZARR_FILES)
        if (self.is_run and name) or self.is_zarr:
            return
        images: list[str] = []
        for entry in found:
            if _is_folder(entry):
                self.folders.append((entry.name, entry.is_symlink()))
            elif (kind := _kind(entry, suffixes)) == "image":
                images.append(entry.name)
            elif kind == "shard":
                self.shards.append(entry.name)
            else:
                tally = "run" if self.is_run and kind not in (*NO_FILES, "hidden") else kind
                self.others.setdefault(tally, Tally()).add(entry.name)
                if kind in NO_FILES and suffix_of(entry.name) in IMAGE_SUFFIXES and not entry.name.startswith("."):
                    images.append(entry.name)
                    self.unsound.append(entry.name)
        self.images = names_of(pack_names(sorted(images)))


def _read_folder(root: str, name: str, suffixes: tuple[str, ...]) -> _Inside:
    inside = _Inside(os.path.join(root, name))
    if inside.status is not None:
        inside.read(name, suffixes)
    return inside


class _Scan:
    """A listing in the making."""

    def __init__(self, folder: str) -> None:
        self.listing = Listing(folder)
        self.modified: dict[str, int] = {}
        self._linked: set[str] = set()
        self._keys: dict[bool, set[tuple[int, int]]] = {False: set(), True: set()}
        """Device and inode of the folders that are listed, by whether a link leads to them."""

    def is_new(self, name: str, inside: _Inside, is_link: bool) -> bool:
        """Tells whether a folder is to be listed; notes its time, and if it is not new, that it is skipped."""
        status = inside.status
        if status is None:
            self._miss(name)
            return False
        key, is_linked = (status.st_dev, status.st_ino), is_link or os.path.dirname(name) in self._linked
        if is_linked:
            self._linked.add(name)
        # Unless a part is a link to it, what no link leads to is listed, even if file systems number two folders alike.
        is_known = key in self._keys[True] or (is_linked and key in self._keys[False])
        if is_known or (is_link and _is_around(inside.path)):
            self.listing.skipped[name] = "twice"
            return False
        self._keys[is_linked].add(key)
        self.modified[name] = status.st_mtime_ns
        return True

    def _miss(self, name: str) -> None:
        self.modified[name] = -1  # such a listing is not kept
        self.listing.images[name] = NO_NAMES
        self.listing.unreadable.append(os.path.join(self.listing.folder, name))

    def enter(self, name: str, inside: _Inside) -> Iterator[tuple[str, bool]]:
        """Adds what lies directly inside a folder, and yields the folders in it with whether each is a link."""
        listing = self.listing
        if not inside.is_listed:
            self._miss(name)
            return
        if (inside.is_run and name) or inside.is_zarr:
            listing.skipped[name] = "run" if inside.is_run else "zarr"
            del self.modified[name]
            return
        before = f"{name}/" if name else ""
        for kind, tally in inside.others.items():
            listing.others.setdefault(kind, Tally()).join(tally, before)
        listing.shards += (before + file for file in inside.shards)
        listing.unsound += (before + file for file in inside.unsound)
        listing.images[name] = inside.images
        for folder, is_link in inside.folders:
            if folder.startswith("."):
                listing.skipped[before + folder] = "hidden"
            elif inside.is_run and folder in RUN_FOLDERS:
                listing.skipped[before + folder] = "run"
            else:
                yield before + folder, is_link


NO_FILES = ("broken", "special")

# What a run leaves in its output_dir: the files that tell it from other folders, and its folders.
RUN_FILES = ("config.json", "metrics.jsonl")
RUN_FOLDERS = ("checkpoints", "reconstructions")
# What lies in every group and array of a Zarr store.
ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")


def _is_run_folder(entries: list[os.DirEntry[str]]) -> bool:
    names = {entry.name for entry in entries}
    return names.issuperset(RUN_FILES) or {"config.json", "checkpoints"} <= names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Tells whether an entry is a folder or links to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _is_around(link: str) -> bool:
    """Tells whether a link leads to a folder that it lies in."""
    target = os.path.join(os.path.realpath(link), "")
    return os.path.join(os.path.realpath(os.path.dirname(link)), "").startswith(target)


def _kind(entry: os.DirEntry[str], suffixes: tuple[str, ...]) -> str:
    """Returns "image", "shard", or under which key of ``Listing.others`` a file is counted."""
    name = entry.name
    if not _is_file(entry):
        return "broken" if entry.is_symlink() and not os.path.exists(entry.path) else "special"
    if name.startswith(".fastmae-") or name == "fastmae-pack.json":
        return "index"
    if name.startswith("."):
        return "hidden"
    suffix = suffix_of(name)
    if suffixes:
        return "image" if name.lower().endswith(suffixes) else suffix
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in SHARD_SUFFIXES:
        return "shard"
    return "image" if not suffix and begins_as_an_image(entry.path) else suffix


def begins_as_an_image(path: str) -> bool:
    """Tells whether the first bytes of a file are those of an image."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            return IMAGE_STARTS.match(file.read(START_BYTES)) is not None
    except OSError:
        return False


# --- what of them is used ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Image files that are used together, and their classes."""

    paths: Names
    labels: np.ndarray | None
    """int64 [length], numbers of ``classes``; None where there are no class folders."""
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def choose_images(listing: Listing, part: str = "", without: Collection[str] = ()) -> Chosen:
    """Returns the images below a folder of a listing, by the folders directly inside, which are their classes.

    They have labels if all of them lie in class folders. If some lie beside folders with others, none has.

    Args:
        part: the folder.
        without: folders directly inside that are left out.
    """
    prefix = f"{part}/" if part else ""
    folders: dict[str, list[str]] = {}
    for name in listing.images:
        if name != part and name.startswith(prefix):
            top = name[len(prefix) :].partition("/")[0]
            if top not in without:
                folders.setdefault(top, []).append(name)
    counts = {top: sum(len(listing.images[name]) for name in inside) for top, inside in sorted(folders.items())}
    beside = len(listing.images.get(part, ()))
    filled = [top for top, count in counts.items() if count]
    if beside or not filled:
        mixed: tuple[str, ...] = ()
        if filled:
            where = os.path.join(listing.folder, part).rstrip("/")
            mixed = (
                f"{where} holds {count_of(beside, 'images')} beside {count_of(len(filled), 'folders')} of images "
                f"({_some(filled)}), so no image has a label; keep either folders of classes or images there",
            )
        every = [name for top in filled for name in folders[top]] + ([part] if part in listing.images else [])
        return Chosen(_paths(listing, [every]), None, (), mixed)
    labels = np.repeat(np.arange(len(counts)), [*counts.values()]).astype(np.int64)
    folders_in = [_folders_in(listing, os.path.join(part, top), folders[top]) for top in filled]
    notes = []
    if len(filled) == 1 and len(folders_in[0]) > 1:
        path = os.path.join(listing.folder, part, filled[0])
        notes = [f"all images lie in {path}; if the {len(folders_in[0])} folders in it are classes, give its path"]
    elif len(folders_in[0]) > 1 and all(inside == folders_in[0] for inside in folders_in):
        same = f"the folders {_some(filled)} have the same folders in them ({_some(folders_in[0])})"
        path = os.path.join(listing.folder, part, filled[0])
        notes = [f"{same}; if these are the classes, give the path of one of the former, such as {path}"]
    empty = [top for top, count in counts.items() if not count]
    if empty:
        notes.append(f"{count_of(len(empty), 'class folders')} without an image ({_some(empty)})")
    return Chosen(_paths(listing, [folders[top] for top in counts]), labels, tuple(counts), tuple(notes))


def _folders_in(listing: Listing, top: str, below: list[str]) -> list[str]:
    """Returns the names of the folders directly inside ``top`` that hold images directly."""
    return sorted(os.path.basename(name) for name in below if listing.images[name] and os.path.dirname(name) == top)


def _paths(listing: Listing, groups: Iterable[list[str]]) -> Names:
    """Returns the paths of the images in groups of folders: one group after another, sorted within each."""
    columns = []
    for group in groups:
        filled = [folder for folder in group if listing.images[folder]]
        column = join_names((os.path.join(folder, ""), listing.images[folder]) for folder in filled)
        columns.append(column if len(filled) < 2 else pack_names(sorted(unpack_names(column))))
    return names_of(np.concatenate([np.zeros(0, np.uint8), *columns]), os.path.join(listing.folder, ""))


def _some(names: Collection[str]) -> str:
    shown = [*names][:EXAMPLES]
    return ", ".join(shown) + (", …" if len(names) > EXAMPLES else "")


def others_left_out(listing: Listing) -> list[LeftOut]:
    """Returns what of a folder can never be used, by reason: all but image files and shards."""
    kinds = sorted(listing.others.keys() - {"index"}, key=lambda kind: (-listing.others[kind].count, kind))
    reasons = {
        "run": "no images, as a run of fastmae leaves them",
        "hidden": "hidden, as their names begin with a dot",
        "broken": "links to what is not there; mend or remove them",
        "special": "pipes, devices or sockets; remove them",
    }
    suffixes = [kind for kind in kinds if kind not in reasons]
    reasons |= dict.fromkeys(suffixes[SHOWN_SUFFIXES:], "of other suffixes, none of them of images")
    left_out = [
        LeftOut("files", tally.count, reasons.get(kind) or why_not(kind), tuple(tally.names))
        for kind, tally in ((kind, listing.others[kind]) for kind in kinds)
    ]
    left_out = [*joined([Stock(left_out=tuple(left_out))]).left_out]
    for why, reason in (("hidden", "in hidden folders"), ("run", "in run folders of fastmae, which are no data,")):
        counts = {name: _count_files(os.path.join(listing.folder, name)) for name in _skipped(listing, why)}
        filled = [name for name, count in counts.items() if count]
        if filled:
            left_out.append(LeftOut("files", sum(counts.values()), f"{reason} such as {filled[0]}"))
    stores = _skipped(listing, "zarr")
    if stores:
        reason = f"Zarr stores; give their own paths, such as {os.path.join(listing.folder, stores[0])}"
        left_out.append(LeftOut("folders", len(stores), reason, tuple(stores[:EXAMPLES])))
    twice = _skipped(listing, "twice")
    if twice:
        reason = "linked, and listed already or around the link"
        left_out.append(LeftOut("folders", len(twice), reason, tuple(twice[:EXAMPLES])))
    if listing.unreadable:
        reason = "may not be listed, so their images are missed; give the right to read them"
        left_out.append(
            LeftOut("folders", len(listing.unreadable), reason, tuple(sorted(listing.unreadable)[:EXAMPLES]))
        )
    return left_out


def _skipped(listing: Listing, why: str) -> list[str]:
    return sorted(name for name, reason in listing.skipped.items() if reason == why)


def _count_files(folder: str) -> int:
    """Returns how many files there are below a folder; links to folders are not followed."""
    try:
        with os.scandir(folder) as entries:
            found = [*entries]
    except OSError:
        return 0
    below = sum(_count_files(entry.path) for entry in found if _is_folder(entry) and not entry.is_symlink())
    return below + sum(map(_is_file, found))
