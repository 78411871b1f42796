"""Images that lie inside other files, at offsets that are known: each is one read by position, by any thread.

How the offsets are found is in shards.py (tars) and arrow.py. Nothing is unpacked, and a file that changes while a run
reads it gives no wrong bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fastmae.data.images import LARGE_FILE, LOOKED_AT, MAX_FILE_BYTES, refuse_no_image
from fastmae.data.index import Names
from fastmae.data.openfile import OpenFile
from fastmae.data.plan import Shards
from fastmae.data.remote import RemoteFile, open_file
from fastmae.data.stock import Stock, count_of

OPEN_SHARDS = 256
# The shuffle window: at least so many shards and so many samples.
WINDOW_SHARDS = 64
WINDOW_SAMPLES = 16_384


@dataclass(frozen=True)
class PackedSource:
    """Image files inside other files."""

    paths: tuple[str, ...]
    stamps: tuple[tuple[int, int], ...]
    """(size, modification time in ns) of each of these files when it was indexed."""
    shard: np.ndarray
    """int64 [length], ascending: the file in which each sample lies."""
    offset: np.ndarray
    """int64 [length]: the byte of the file at which each image begins."""
    size: np.ndarray
    """int64 [length]: the bytes of each image."""
    names: Names | None
    """The names of the images inside; None where they are rows."""
    labels: np.ndarray | None
    """int64 [length], or None."""
    stock: Stock
    """What lies in the files, such as the members of tars. Behind damage nobody knows what there is."""
    what: str
    """What the files are, in the plural, for people."""
    damage: tuple[tuple[str, str], ...] = ()
    """(file, what is wrong) of each that ends too early or is damaged inside."""
    classes: tuple[str, ...] = ()
    kind: str = "folder"
    _open: Callable[[int], OpenFile | RemoteFile] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Bounded, because there may be more shards than files that a process may have open.
        object.__setattr__(self, "_open", functools.lru_cache(OPEN_SHARDS)(self._open_shard))

    @property
    def shards(self) -> Shards:
        """Each file that holds samples is a shard."""
        lengths = np.bincount(self.shard, minlength=len(self.paths))
        starts = np.concatenate([[0], np.cumsum(lengths[lengths > 0])])
        return Shards(starts, max(WINDOW_SAMPLES, WINDOW_SHARDS * len(self) // max(1, len(starts) - 1)))

    @property
    def location(self) -> str:
        """Where the images lie, and which shards are damaged, as a phrase for people."""
        text = f"in {count_of(len(self.paths), self.what)}"
        text += f" of {count_of(len(self.classes), 'classes')}" if self.classes else ""
        return "; ".join([text, *map(" ".join, self.damage)])

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
        if size > LARGE_FILE:
            refuse_no_image(shard.read(LOOKED_AT, int(self.offset[index])), size)
        data = shard.read(size, int(self.offset[index]))
        if len(data) != size:
            raise OSError(f"{shard.path} has become shorter since it was indexed")
        if not shard.is_unchanged():
            raise OSError(f"{shard.path} has changed since it was indexed; start again")
        return data

    def name(self, index: int) -> str:
        shard = self.shard[index]
        if self.names is None:
            return f"{self.paths[shard]}[{index - int(np.searchsorted(self.shard, shard))}]"
        return f"{self.paths[shard]}:{self.names[index]}"

    def _open_shard(self, number: int) -> OpenFile | RemoteFile:
        shard = open_file(self.paths[number])
        if shard.stamp != self.stamps[number]:
            raise OSError(f"{self.paths[number]} has changed since it was indexed; start again")
        return shard
