"""Pages as images: a source around another one, of which each page or frame of a file is a sample of its own.

The pages of a file lie one after another, with the label of their file. They are counted when the source is opened, by
the tags that lead from page to page. Where each is may be kept in an index file in the cache folder. No pixel is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO, Protocol

import numpy as np

from fastmae.data.formats import dicom, tiff
from fastmae.data.images import FolderSource
from fastmae.data.index import Index, cache_file, is_settled, read_index, write_index
from fastmae.data.plan import Shards
from fastmae.data.reading import BadImageError
from fastmae.data.stock import Stock, count_of, joined
from fastmae.facts import ReadAs

_THREADS = 16
_START = 512
"""How many bytes tell a format."""
_WORTH_KEEPING = 1.0
"""Seconds. Pages that are counted in less are counted again."""
_RULE = 1
"""It changes whenever pages are found or placed in another way, so that older counts are made anew."""


class Files(Protocol):
    """What is needed of the source of the files."""

    @property
    def kind(self) -> str: ...
    @property
    def location(self) -> str: ...
    @property
    def stock(self) -> Stock: ...
    @property
    def shards(self) -> Shards | None: ...
    @property
    def labels(self) -> np.ndarray | None: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...
    def read(self, index: int) -> bytes | np.ndarray: ...
    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class PagedSource:
    """The pages of the files of another source."""

    files: Files
    starts: np.ndarray
    """int64 [files + 1]: the first page of each file, and the number of pages."""
    places: np.ndarray
    """int64 [pages]: where each lies in its file, as the format has it; 0 for all of a file with one page."""
    read_as: ReadAs

    @property
    def kind(self) -> str:
        return self.files.kind

    @property
    def location(self) -> str:
        return f"{self.files.location}, the pages of {count_of(len(self.files), 'files')}"

    @property
    def stock(self) -> Stock:
        return joined((self.files.stock, Stock({"pages": len(self)})))

    @property
    def shards(self) -> Shards | None:
        shards = self.files.shards
        if shards is None:
            return None
        return Shards(self.starts[shards.starts], shards.window * len(self) // max(1, len(self.files)))

    @cached_property
    def labels(self) -> np.ndarray | None:
        return None if self.files.labels is None else np.repeat(self.files.labels, np.diff(self.starts))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.files.classes

    def __len__(self) -> int:
        return len(self.places)

    def file_of(self, index: int) -> int:
        """Returns the number of the file that a page is in."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def read(self, index: int) -> bytes | np.ndarray:
        """Returns a page [H, W, C] in its own type, or the bytes of a file of one page.

        Raises:
            BadImageError, OSError: it cannot be read, or its file has changed since its pages were counted.
        """
        number = self.file_of(index)
        if int(self.starts[number + 1] - self.starts[number]) == 1:
            return self.files.read(number)
        with _opened(self.files, number) as file:
            start = file.read(_START)
            if dicom.is_dicom(start):
                return dicom.page(file, int(self.places[index]), self.read_as)
            if tiff.is_tiff(start):
                return tiff.page(file, int(self.places[index]), self.read_as)
        raise BadImageError("no file of several pages any more; start the run again")

    def name(self, index: int) -> str:
        number = self.file_of(index)
        one = int(self.starts[number + 1] - self.starts[number]) == 1
        return self.files.name(number) + f", page {index - int(self.starts[number]) + 1}" * (not one)


def by_page(files: Files, read_as: ReadAs) -> PagedSource:
    """Returns a source whose samples are the pages of the files of another one."""
    stamps = _stamps(files)
    path = None if stamps is None else cache_file(f"pages of {hashlib.sha256(b''.join(stamps[0])).hexdigest()}")
    index = None if path is None else read_index(path)
    if index is not None and index.fingerprint == [_RULE, len(files)] and _is_sound(index, len(files)):
        return PagedSource(files, index.columns["starts"], index.columns["places"], read_as)
    started = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        places = [*pool.map(lambda number: _places(files, number), range(len(files)))]
    starts = np.cumsum([0, *map(len, places)], dtype=np.int64)
    every = np.fromiter((place for inside in places for place in inside), np.int64, int(starts[-1]))
    if path is not None and time.perf_counter() - started > _WORTH_KEEPING and stamps is not None and stamps[1]:
        write_index(path, Index([_RULE, len(files)], {"starts": starts, "places": every}))
    return PagedSource(files, starts, every, read_as)


def _is_sound(index: Index, files: int) -> bool:
    if index.columns.keys() != {"starts", "places"}:
        return False
    starts, places = index.columns["starts"], index.columns["places"]
    return (
        len(starts) == files + 1 and starts[0] == 0 and starts[-1] == len(places) and bool((np.diff(starts) > 0).all())
    )


def _stamps(files: Files) -> tuple[list[bytes], bool] | None:
    """Returns what tells files from changed ones, and whether a later change would show; None for other sources."""
    if not isinstance(files, FolderSource):
        return None

    def stamp(path: str) -> tuple[bytes, int]:
        try:
            status = os.stat(path)
        except OSError:
            return os.fsencode(path) + b"\0", 0
        return os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode(), status.st_mtime_ns

    with ThreadPoolExecutor(_THREADS) as pool:
        found = [*pool.map(stamp, files.paths)]
    return [text for text, _ in found], is_settled(modified for _, modified in found)


def _places(files: Files, number: int) -> list[int]:
    """Returns the places of the pages of a file; [0] for one page, and for what cannot be read."""
    try:
        with _opened(files, number) as file:
            start = file.read(_START)
            found = dicom.places(file) if dicom.is_dicom(start) else tiff.places(file) if tiff.is_tiff(start) else [0]
    except (BadImageError, OSError):  # which reading it will tell
        return [0]
    return found if len(found) > 1 else [0]


@contextlib.contextmanager
def _opened(files: Files, number: int) -> Iterator[BinaryIO]:
    """Opens a file where it lies, or reads one that lies within another."""
    if isinstance(files, FolderSource):
        with files.open(number) as file:
            yield file
        return
    data = files.read(number)
    if isinstance(data, np.ndarray):
        raise BadImageError("an array, which has no pages")
    yield io.BytesIO(data)
