"""Arrays in HDF5 files, opened by h5py: `file.h5::key`.

h5py finds the arrays and where their bytes lie, and closes the file again. The bytes are then read by position, by any
thread, and no handle of h5py's is shared with threads or processes. Chunks that are compressed by DEFLATE, shuffled or
checksummed are unpacked here, into no more than they must hold; those of other filters by h5py, which opens the file
for each of them. Nothing outside of the file is read: no external links or files, no virtual datasets.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.data.arrays import ArraySource, Split, changed, refuse_beyond_memory
from fastmae.data.chunks import Stored, choose_keys, chunked_source, read_chunks
from fastmae.data.codecs import CHECKSUM_BYTES, Codec, fletcher32, inflate, own_memory, unpack, unshuffle
from fastmae.data.openfile import OpenFile
from fastmae.data.parquet import MAX_ROWS_A_BYTE
from fastmae.errors import UserError, install_hint
from fastmae.facts import LayoutName

SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")
START = b"\x89HDF\r\n\x1a\n"
DEFLATE, SHUFFLE, FLETCHER32 = 1, 2, 3
# A chunk that is stored in less is damaged: no filter of HDF5's own shrinks by more.
MAX_RATIO = 1032
MAX_LINKS = 10
MAX_GRID = 1 << 50
MAX_ARRAYS = 10_000


def is_hdf5(path: Path) -> bool:
    """Tells whether a file is HDF5 by its first bytes, which may lie behind a block of the user's."""
    try:
        file = OpenFile(path)
    except OSError:
        return False
    places = [0, *(512 << power for power in range(12))]
    return any(file.read(len(START), place) == START for place in places if place < file.size)


def open_hdf5(path: Path, keys: str | None, split: Split, layout: LayoutName = "auto") -> ArraySource | None:
    """Opens the images of a part of an HDF5 file, and their labels; None if it has no such part.

    Args:
        path: the file.
        keys: as for ``chunks.choose_keys``.
        split: the part.
        layout: how the axes are read.

    Raises:
        UserError: h5py is missing, or there is no such array, or it is none that can be read.
        OSError, ValueError: the file is damaged.
    """
    h5py = _h5py(path)
    file = OpenFile(path)
    if not is_hdf5(path):
        raise ValueError("does not begin as an HDF5 file does")
    with _naming(path), _opened(h5py, path) as opened:
        listed = _listed(h5py, opened, keys)
        chosen = choose_keys(listed, keys, split, str(path))
        if chosen is None:
            return None
        return chunked_source(chosen, lambda key: _stored(h5py, opened, key, file), str(path), split, layout)


def _h5py(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError(f"{path}: HDF5 files need h5py; run {install_hint('science')}") from error
    with contextlib.suppress(ImportError):  # more filters, where somebody has installed them
        import hdf5plugin  # noqa: F401
    return h5py


def _opened(h5py: Any, path: str | Path) -> Any:
    """Opens a file without a lock, which not every file system has, unless this process has it open with one."""
    try:
        return h5py.File(path, "r", locking=False)
    except OSError:
        return h5py.File(path, "r")


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns what h5py raises for damage into ValueError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # h5py raises KeyError, RuntimeError, TypeError and others
        raise ValueError(f"{path.name}: {' '.join(str(error).split())}") from error


def _listed(h5py: Any, opened: Any, keys: str | None) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Returns the arrays of numbers in a file: (dtype, shape) by key.

    Links are not followed, but for keys that somebody asks for, and then within the file alone.
    """
    found: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}

    def add(name: str, item: Any) -> bool | None:
        if isinstance(item, h5py.Dataset) and item.shape is not None and item.dtype.kind in "biuf":
            found[name] = (item.dtype, item.shape)
        return True if len(found) >= MAX_ARRAYS else None  # anything but None ends the visit

    opened.visititems(add)
    for key in filter(None, (key.strip().strip("/") for key in (keys or "").split(","))):
        if key not in found:
            dataset = opened.get(_without_links(h5py, opened, key))
            if isinstance(dataset, h5py.Dataset):
                refuse_foreign(dataset, f"{opened.filename}::{key}")
                if dataset.dtype.kind not in "biuf" or dataset.shape is None:
                    raise UserError(f"{opened.filename}::{key}: holds {dataset.dtype}, which are no numbers")
                found[key] = (dataset.dtype, dataset.shape)
    return found


def _without_links(h5py: Any, opened: Any, key: str, depth: int = 0) -> str:
    """Returns the key that a key with links in it leads to.

    Raises:
        UserError: a link out of the file, or links in a circle.
    """
    group, names = opened, key.split("/")
    for number, name in enumerate(names):
        link = group.get(name, getlink=True) if isinstance(group, h5py.Group) else None
        if isinstance(link, h5py.ExternalLink):
            where = f"{opened.filename}::{key}"
            raise UserError(
                f"{where}: a link to the file {link.filename}; give {link.filename}::{link.path.strip('/')}"
            )
        if isinstance(link, h5py.SoftLink):
            start = "" if link.path.startswith("/") else "/".join([*names[:number], ""])
            target = "/".join([start + link.path, *names[number + 1 :]]).strip("/")
            if depth == MAX_LINKS:
                raise UserError(f"{opened.filename}::{key}: links that lead in a circle; give the array's own key")
            return _without_links(h5py, opened, target, depth + 1)
        group = None if link is None else group.get(name)
    return key


def refuse_foreign(dataset: Any, where: str) -> None:
    """Raises UserError for an array whose numbers lie in other files."""
    if dataset.is_virtual:
        raise UserError(f"{where}: a virtual dataset, put together of others; give those, or write it whole")
    if dataset.external:
        raise UserError(f"{where}: its numbers lie in the file {dataset.external[0][0]}; write them into this one")


def _stored(h5py: Any, opened: Any, key: str, file: OpenFile) -> Stored:
    """Finds out how an array is stored, and how it is read.

    Raises:
        UserError: it lies in other files, needs a filter that is not there, or is no array of numbers.
        ValueError: the file ends before it, or its chunks cannot hold what they claim.
    """
    dataset = opened[_without_links(h5py, opened, key)]
    where = f"{file.path}::{key}"
    refuse_foreign(dataset, where)
    dtype, shape = dataset.dtype, tuple(dataset.shape)
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(number)[:3] for number in range(plist.get_nfilters())]
    contents = {key: f"{dtype} {list(shape)} {dataset.id.get_storage_size()} {filters} {os.path.basename(key)}"}
    name = dataset.name
    size = math.prod(shape) * dtype.itemsize

    def by_h5py(start: int, stop: int) -> np.ndarray:
        if OpenFile(file.path).stamp != file.stamp:
            raise changed(file.path)
        try:
            with _opened(h5py, file.path) as again:
                return np.asarray(again[name][start:stop])
        except Exception as error:  # h5py raises all kinds of errors for damage
            raise OSError(f"{where}[{start}]: {' '.join(str(error).split())}") from error

    if dataset.chunks is None:
        start = dataset.id.get_offset()
        if start is None:  # beside the header, or never written
            refuse_beyond_memory(size, where)
            return Stored(dtype, shape, max(1, shape[0] if shape else 1), by_h5py, contents)
        if start + size > file.size:
            raise ValueError(f"{key} says {list(shape)} {dtype}, and the file ends before")
        return Stored(dtype, shape, 1, by_h5py, contents, at=(file, start))
    chunks = tuple(dataset.chunks)
    for code, _, _ in filters:
        if not h5py.h5z.filter_avail(code):
            raise UserError(f"{where}: needs the HDF5 filter {code}; install hdf5plugin, or write it with gzip")
    index = _Index.of(dataset, chunks, file, where, bool(filters))
    contents[f"{key}, chunks"] = index.digest()
    missing = math.prod(index.grid) - len(index.places)
    notes = (f"{where}: {missing:,} chunks were never written and hold {dataset.fillvalue}",) if missing else ()
    codecs = _codecs([code for code, _, _ in filters], dtype.itemsize)
    if codecs is None:
        return Stored(dtype, shape, chunks[0], by_h5py, contents, notes=notes)

    def chunk(place: tuple[int, ...]) -> np.ndarray | None:
        found = index.find(place)
        if found is None:
            return None
        offset, stored_size, skipped = found
        applied = [codec for number, codec in enumerate(codecs) if not skipped >> number & 1]
        pixels = np.empty(chunks, dtype)
        out = pixels.reshape(-1).view(np.uint8)
        data = own_memory("stored", stored_size) if applied else out
        if not file.read_into(data, offset) or not file.is_unchanged():
            raise changed(file.path)
        try:
            if applied:
                unpack(data, applied, out)
        except (ValueError, RuntimeError) as error:
            raise OSError(f"{where}: the chunk {list(place)} is damaged ({error})") from error
        return pixels

    read = read_chunks(chunk, shape, chunks, dtype, dataset.fillvalue)
    return Stored(dtype, shape, chunks[0], read, contents, notes=notes)


def _codecs(filters: list[int], itemsize: int) -> list[Codec] | None:
    """Returns how the filters of chunks are undone; None if h5py has to, as where bytes were shuffled once packed."""
    codecs = {
        DEFLATE: Codec(inflate),
        SHUFFLE: Codec(functools.partial(unshuffle, itemsize=itemsize)),
        FLETCHER32: Codec(fletcher32, adds=CHECKSUM_BYTES),
    }
    packed = filters[filters.index(DEFLATE) + 1 :] if DEFLATE in filters else []
    return [codecs[code] for code in filters] if {*filters} <= {*codecs} and {*packed} <= {FLETCHER32} else None


@dataclass(frozen=True)
class _Index:
    """Where the chunks of an array lie in the file."""

    grid: tuple[int, ...]
    """How many chunks there are along each axis."""
    places: np.ndarray
    """int64 [chunks], ascending: the places in the grid, row by row."""
    where: np.ndarray
    """int64 [chunks, 3]: the byte in the file, the stored bytes, and a bit for each filter that was left out."""

    @classmethod
    def of(cls, dataset: Any, chunks: tuple[int, ...], file: OpenFile, name: str, is_filtered: bool) -> _Index:
        """Asks h5py for all chunks, and compares them with the file.

        Raises:
            ValueError: they lie outside of the file, or cannot hold what they claim.
        """
        shape = tuple(dataset.shape)
        grid = tuple(-(-length // size) for length, size in zip(shape, chunks, strict=True))
        if (shape and shape[0] > MAX_ROWS_A_BYTE * file.size) or math.prod(grid) > MAX_GRID:
            raise ValueError(f"{name} says {list(shape)} in a file of {file.size:,} bytes")
        rows: list[tuple[int, ...]] = []
        dataset.id.chunk_iter(
            lambda info: rows.append((*info.chunk_offset, info.byte_offset, info.size, info.filter_mask))
        )
        found = np.array(rows, np.int64).reshape(-1, len(chunks) + 3)
        axes = found[:, : len(chunks)].T // np.array(chunks)[:, None]
        if ((axes < 0) | (axes >= np.array(grid)[:, None])).any():
            raise ValueError(f"{name} has chunks outside of {list(shape)}")
        places = np.ravel_multi_index(tuple(axes), grid) if len(found) else np.zeros(0, np.int64)
        order = np.argsort(places, kind="stable")
        places, where = places[order], found[order, len(chunks) :]
        size = math.prod(chunks) * dataset.dtype.itemsize
        start, stored = where[:, 0], where[:, 1]
        if (start < 0).any() or (stored < 0).any() or (start + stored > file.size).any():
            raise ValueError(f"{name} has chunks behind the end of the file")
        if (is_filtered and (stored * MAX_RATIO < size).any()) or (not is_filtered and (stored != size).any()):
            raise ValueError(f"{name} has chunks of {size:,} bytes that are stored in {int(stored.min()):,}")
        return cls(grid, places, where)

    def find(self, place: tuple[int, ...]) -> tuple[int, int, int] | None:
        """Returns where a chunk lies; None if it was never written."""
        flat = int(np.ravel_multi_index(place, self.grid))
        row = int(np.searchsorted(self.places, flat))
        if row == len(self.places) or self.places[row] != flat:
            return None
        start, size, skipped = self.where[row].tolist()
        return start, size, skipped

    def digest(self) -> str:
        """Returns a hash of where all chunks lie, and of how many bytes they have."""
        return hashlib.sha256(self.places.tobytes() + np.ascontiguousarray(self.where).tobytes()).hexdigest()[:16]
