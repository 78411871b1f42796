"""A cache in memory: a source around another one, which reads each image once as long as there is memory to keep it.

It changes no pixel and no order. Files or decoded images are kept whole. Resized copies would be smaller, but crops of
them would have other pixels than crops of the images.
"""

from __future__ import annotations

import math
import sys
import threading
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fastmae.data.decode import BadImageError, decode, plain_jpeg_shape
from fastmae.data.memory import available_memory, readable
from fastmae.data.plan import Shards
from fastmae.data.reading import Reading
from fastmae.data.sources import Source, evenly_spaced
from fastmae.data.stock import Stock
from fastmae.errors import SettingError

Form = Literal["decoded", "encoded"]

# The default budget as a share of the available memory; batches, workers and the page cache need the rest.
DEFAULT_SHARE = 0.5
# The number of images that the estimate looks at, and the length of the runs in which it reads a source with shards.
SAMPLES = 64
RUN = 8
# Decoded images take several times the memory of files, so they are kept only if the budget is this much larger than
# their estimate, which may be too low.
MARGIN = 1.2
# The memory that Python takes for an image beside its pixels: the array object and its entry in the dictionary.
ENTRY_BYTES = 256


@dataclass(frozen=True)
class CachedSource:
    """A source that keeps the images of another one from when they are first read. Its memory is freed with it.

    It has the same images in the same order, with the same errors for unusable ones. Call ``describe`` with the source
    inside, because pixels have the channels of the model here.
    """

    source: Source
    reading: Reading
    """How decoded images are read."""
    form: Form
    """Whether decoded images or encoded files are kept."""
    budget: int
    """The memory that the cached images may take together, in bytes."""
    estimate: int
    """The memory that all images would take, in bytes."""
    _images: _Images = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_images", _Images(self.budget))

    @property
    def kind(self) -> str:
        return self.source.kind

    @property
    def location(self) -> str:
        return self.source.location

    @property
    def stock(self) -> Stock:
        return self.source.stock

    @property
    def shards(self) -> Shards | None:
        return self.source.shards

    @property
    def labels(self) -> np.ndarray | None:
        return self.source.labels

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @property
    def cached_bytes(self) -> int:
        """The memory that the cached images take, never more than ``budget``."""
        return self._images.bytes

    def holds(self, index: int) -> bool:
        """Tells whether an image is in the cache."""
        return self._images.get(index) is not None

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> bytes | np.ndarray:
        """Returns the bytes of an image file, or pixels [H, W, C] that must not be written to.

        Raises:
            BadImageError, OSError: as reading and decoding without a cache do. Then nothing is kept.
        """
        cached_image = self._images.get(index)
        if cached_image is not None:
            return cached_image
        data = self.source.read(index)
        if _is_in_memory(data):
            return data
        if self.form == "decoded":
            data = decode(data, self.reading)
        return self._images.add(index, data)

    def name(self, index: int) -> str:
        return self.source.name(index)


class _Images:
    """Images by index, which never take more than ``budget`` bytes together. Any thread may read and add them."""

    def __init__(self, budget: int) -> None:
        self.bytes = 0
        self._budget = budget
        self._images: dict[int, bytes | np.ndarray] = {}
        self._lock = threading.Lock()

    def get(self, index: int) -> bytes | np.ndarray | None:
        """Returns an image that is kept, or None."""
        return self._images.get(index)

    def add(self, index: int, data: bytes | np.ndarray) -> bytes | np.ndarray:
        """Returns the same image, and keeps it if there is room and no other thread has added it."""
        size = _memory_of(data)
        if isinstance(data, np.ndarray):
            # A view would keep the whole array that it is a view of, so the pixels are copied. The copy is read-only,
            # as many callers get it. It is made outside of the lock, because copying a mapped file reads from the disk.
            data = np.array(data, order="C")
            data.setflags(write=False)
        with self._lock:
            if index not in self._images and self.bytes + size <= self._budget:
                self.bytes += size
                self._images[index] = data
        return data


def cached(source: Source, reading: Reading, budget: int, decoder: str) -> CachedSource:
    """Returns a source around ``source`` that keeps up to ``budget`` bytes of its images.

    With the thread decoder it keeps decoded pixels if all of them fit, or if they take less memory than files. Else it
    keeps files. This is decided by an estimate from up to 64 evenly spaced images.

    Args:
        reading: how images are decoded.
        budget: in bytes.
        decoder: as ``choose_decoder`` names it; DALI takes files and no pixels.
    """
    may_decode = decoder == "threads"
    sizes = [_sizes(source, index, reading, may_decode) for index in evenly_spaced(source, SAMPLES, RUN).tolist()]
    encoded, decoded = (int(sum(each) * len(source) / len(sizes)) for each in zip(*sizes, strict=True))
    form: Form = "decoded" if may_decode and (decoded * MARGIN <= budget or decoded <= encoded) else "encoded"
    estimate = decoded if form == "decoded" else encoded
    fits_one = budget * len(source) >= estimate
    return CachedSource(source, reading, form, budget if fits_one else 0, estimate)


def describe_cache(source: CachedSource) -> str:
    """Returns a line about a cache for people and for the run folder."""
    if source.estimate == 0:
        return "nothing: the images are in memory already, or cannot be read"
    if source.budget == 0:
        size = readable(source.estimate / len(source))
        return f"nothing: an image takes about {size}, more than the cache may take; raise cache_gb"
    what = f"{source.form} {'images' if source.form == 'decoded' else 'files'}" if source.kind == "folder" else "images"
    if source.estimate > source.budget:
        percent = 100 * source.budget // source.estimate
        return f"{what} in memory, as many as fit: about {percent} % of {readable(source.estimate)}"
    return f"{what} in memory: about {readable(source.estimate)}, of {readable(source.budget)} that it may take"


def _is_in_memory(data: bytes | np.ndarray) -> bool:
    """Tells whether these are pixels of an array that is in memory as a whole, so that there is nothing to cache.

    Pixels that were read from a file for this image alone are all that their memory holds.
    """
    if not isinstance(data, np.ndarray):
        return False
    whole = data
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    return whole.nbytes > data.nbytes


def _memory_of(data: bytes | np.ndarray) -> int:
    return ENTRY_BYTES + (data.nbytes if isinstance(data, np.ndarray) else sys.getsizeof(data))


def _sizes(source: Source, index: int, reading: Reading, may_decode: bool) -> tuple[int, int]:
    """Returns the memory that an image takes (as it is read, decoded), in bytes; 0 for what is not cached."""
    try:
        data = source.read(index)
    except OSError:
        return 0, 0
    if _is_in_memory(data):
        return 0, 0
    if not may_decode:
        return _memory_of(data), 0
    try:
        shape = plain_jpeg_shape(data, reading) if isinstance(data, bytes) else None
        pixels = (
            decode(data, reading).nbytes
            if shape is None
            else math.prod(shape) * reading.in_chans * np.dtype(reading.dtype).itemsize
        )
    except BadImageError:
        return _memory_of(data), 0
    return _memory_of(data), ENTRY_BYTES + pixels


# --- how much memory there is -----------------------------------------------------------------------------------------


def memory_budget(cache_gb: float | None, ranks: int) -> int:
    """Returns the memory that the cache of one of ``ranks`` processes on this machine may take, in bytes.

    Args:
        cache_gb: the budget asked for per rank, in GiB; None for half of the available memory, shared by the ranks.

    Raises:
        SettingError: ``cache_gb`` is not a size, or more than there is.
    """
    available = available_memory()
    if cache_gb is None:
        if available is None:
            problem = "this system does not say how much memory is available; set --cache_gb"
            raise SettingError("cache", "ram", problem)
        return int(available * DEFAULT_SHARE) // ranks
    if not 0 < cache_gb < math.inf:
        raise SettingError("cache_gb", cache_gb, "must be over 0, in GiB")
    budget = int(cache_gb * 2**30)
    if available is not None and budget > available // ranks:
        where = f" for each of the {ranks} ranks here" if ranks > 1 else ""
        problem = f"only {readable(available // ranks)} are available{where}; lower it"
        raise SettingError("cache_gb", cache_gb, problem)
    return budget
