"""Images that lie in an array of chunks, as HDF5 and Zarr store it: read chunk by chunk, and kept for a while.

A compressed chunk holds many images and is unpacked whole. So the images of a chunk are one shard of the order, and
few shards are in use at a time (plan.Shards). Which array of a file holds the images is decided here as well, by its
name and its shape. How chunks are stored is known to formats/hdf5.py and formats/zarr.py alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fastmae.data.arrays import (
    NPZ_IMAGES,
    NPZ_LABELS,
    ArraySource,
    FileRows,
    Split,
    checked_labels,
    layout_of,
    refuse_labels,
)
from fastmae.data.memory import readable
from fastmae.data.openfile import OpenFile
from fastmae.data.parquet import HELD_BYTES, MAX_GROUP_BYTES, MIN_HELD, Recent
from fastmae.data.parts import read_part
from fastmae.data.plan import Shards
from fastmae.data.stock import EXAMPLES, LeftOut, Stock
from fastmae.errors import SettingError, UserError
from fastmae.facts import LayoutName

# Arrays of fewer axes hold no images.
AXES = (3, 4)
SHOWN_KEYS = 8


@dataclass(frozen=True)
class Stored:
    """An array in a file: what its header says, and how to read it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    rows: int
    """How many entries of the first axis are unpacked together; 1 if each can be read alone."""
    read: Callable[[int, int], np.ndarray]
    """Returns the entries [start, stop) of the first axis. Raises OSError for damage, UserError for another file."""
    contents: dict[str, str]
    """What tells these data from others, by name, as far as it is known without reading them; for fingerprints."""
    at: tuple[OpenFile, int] | None = None
    """The file, and the byte at which the numbers begin, where they lie there in one piece as they are."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChunkedImages:
    """Images of one shape, of which ``rows`` are unpacked together and kept while they are in use."""

    stored: Stored
    shape: tuple[int, ...]
    """[N, H, W, C]."""
    planes: bool
    """Whether an image is stored as [C, H, W]."""
    held: int
    """How many groups of ``rows`` images are in use at a time."""
    _group: Callable[[int], Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A few more than are in use by the order, as threads are not all at the same sample of it.
        object.__setattr__(self, "_group", Recent(self._read_group, self.held + self.held // 4 + 4))

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    @property
    def shards(self) -> Shards | None:
        """Each group is a shard; None if every image is read alone."""
        rows, length = self.stored.rows, len(self)
        if rows == 1:
            return None
        starts = np.append(np.arange(0, length, rows), length).astype(np.int64)
        return Shards(starts, self.held * rows)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns the pixels of an image, [H, W, C].

        Raises:
            UserError: the file was changed since it was opened.
            OSError: it is damaged there.
        """
        rows = self.stored.rows
        image = self.stored.read(index, index + 1)[0] if rows == 1 else self._group(index // rows)[index % rows]
        height, width, channels = self.shape[1:]
        if self.planes:
            return image.reshape(channels, height, width).transpose(1, 2, 0)
        return image.reshape(height, width, channels)

    def _read_group(self, group: int) -> np.ndarray:
        start = group * self.stored.rows
        return self.stored.read(start, min(start + self.stored.rows, len(self)))

    @property
    def contents(self) -> dict[str, str]:
        """What tells these images from others, by name."""
        return self.stored.contents


def read_chunks(
    chunk: Callable[[tuple[int, ...]], np.ndarray | None],
    shape: Sequence[int],
    chunks: Sequence[int],
    dtype: np.dtype,
    fill: Any,
) -> Callable[[int, int], np.ndarray]:
    """Returns how entries of the first axis are put together from chunks.

    Args:
        chunk: returns the chunk at a place of the grid, in its full shape; None for one that is not stored.
        shape: of the array.
        chunks: the shape of a chunk.
        dtype: of both.
        fill: the value of what is not stored.
    """
    counts = [-(-length // size) for length, size in zip(shape[1:], chunks[1:], strict=True)]

    is_whole = tuple(chunks[1:]) == tuple(shape[1:])

    def read(start: int, stop: int) -> np.ndarray:
        if is_whole and start % chunks[0] == 0 and stop - start <= chunks[0]:  # one chunk, which need not be copied
            only = chunk((start // chunks[0], *[0] * len(counts)))
            if only is not None:
                return only[: stop - start]
        out = np.empty((stop - start, *shape[1:]), dtype)
        first = range(start // chunks[0], -(-stop // chunks[0]))
        for place in itertools.product(first, *map(range, counts)):
            origin = [number * size for number, size in zip(place, chunks, strict=True)]
            low = max(start, origin[0])
            high = min(stop, origin[0] + chunks[0])
            ends = [min(a + size, end) for a, size, end in zip(origin[1:], chunks[1:], shape[1:], strict=True)]
            into = (slice(low - start, high - start), *map(slice, origin[1:], ends))
            data = chunk(place)
            if data is None:
                out[into] = fill
                continue
            rest = [slice(0, end - a) for a, end in zip(origin[1:], ends, strict=True)]
            out[into] = data[(slice(low - origin[0], high - origin[0]), *rest)]
        return out

    return read


# --- which array holds the images -------------------------------------------------------------------------------------

Listed = Mapping[str, tuple[np.dtype, tuple[int, ...]]]
"""The arrays of a file: (dtype, shape) by key."""


@dataclass(frozen=True)
class Keys:
    """Which arrays of a file a part of the data set is."""

    images: str
    labels: str | None
    others: tuple[str, ...] = ()
    """Arrays that belong to neither part."""


def choose_keys(listed: Listed, asked: str | None, split: Split, origin: str) -> Keys | None:
    """Returns the arrays of a part; None if there is no such part.

    Args:
        listed: the arrays of the file.
        asked: ``images``, ``images,labels``, or four keys with those of the val part; an empty one is left out. None:
            by names and shapes.
        split: the part.
        origin: the file, for people.

    Raises:
        SettingError: there is no such key, or several arrays can be meant.
    """
    if asked is not None:
        keys = [key.strip().strip("/") for key in asked.split(",")]
        if len(keys) > 4 or not keys[0]:
            problem = "give `::images`, `::images,labels`, or four keys with those of the val part behind them"
            raise SettingError("data_path", f"{origin}::{asked}", problem)
        for key in filter(None, keys):
            if key not in listed:
                problem = f"has no array {key!r}; it has {describe_keys(listed)}"
                raise SettingError("data_path", f"{origin}::{asked}", problem)
        images, *labels = keys[:2] if split == "train" else [*keys[2:], ""][:2]
        if not images:
            return None
        guessed = _labels_beside(images, listed) if len(keys) == 1 else None
        label = (labels[0] or None) if labels else guessed
        return Keys(images, label, tuple(key for key in listed if key not in {images, label, *keys}))
    parts = _by_part(listed, origin)
    if split not in parts:
        if split == "val":
            return None
        raise SettingError("data_path", origin, f"has no array of images; it has {describe_keys(listed)}")
    used = {key for images in parts.values() for key in (images, _labels_beside(images, listed)) if key}
    return Keys(parts[split], _labels_beside(parts[split], listed), tuple(key for key in listed if key not in used))


def _by_part(listed: Listed, origin: str) -> dict[Split, str]:
    """Returns the array of images of each part."""
    usable = [key for key, (dtype, shape) in listed.items() if len(shape) in AXES and dtype.kind in "biuf" and shape[0]]
    parts: dict[Split, str] = {}
    for split in ("train", "val"):
        found = [key for key in usable if _part_of(key) == split]
        named = [key for name in NPZ_IMAGES[split] for key in found if key.rpartition("/")[2].lower() == name]
        chosen = (
            found if len(found) < 2 else named[:1] if len({key.rpartition("/")[0] for key in named}) == 1 else found
        )
        if len(chosen) > 1:
            several = {key: listed[key] for key in chosen}
            problem = (
                f"several arrays can be its images: {describe_keys(several)}; name one, as in {origin}::{chosen[0]}"
            )
            raise SettingError("data_path", origin, problem)
        if chosen:
            parts[split] = chosen[0]
    if "train" not in parts and len(usable) == 1:
        return {"train": usable[0]}
    return parts


def _part_of(key: str) -> Split:
    """Returns the part that a key says: "val" for `val/images`, `x_test`; else "train"."""
    for name in reversed(key.split("/")):
        said = read_part(name)
        if said is not None:
            return "train" if said[0] == "train" else "val"
    return "train"


def _labels_beside(images: str, listed: Listed) -> str | None:
    """Returns the array beside the images that holds their labels by its name: `y` beside `x`, `labels` …"""
    folder, slash, name = images.rpartition("/")
    part = _part_of(images)
    swapped = name.lower().replace("images", "labels").replace("image", "label")
    swapped = f"y{name[1:]}" if name.lower() == "x" or name.lower().startswith("x_") else swapped
    plain = NPZ_LABELS["train"][-2:]
    both = _part_of(name) == part and read_part(name) is not None
    for label in dict.fromkeys((swapped, *(NPZ_LABELS[part] if both or not folder else ()), *plain, "label", "target")):
        key = f"{folder}{slash}{label}"
        if key != images and key in listed:
            return key
    return None


def describe_keys(listed: Listed) -> str:
    """Returns some arrays with their shapes, for people."""
    shown = [f"{key} {dtype} {list(shape)}" for key, (dtype, shape) in [*listed.items()][:SHOWN_KEYS]]
    more = len(listed) - len(shown)
    return ", ".join(shown) + f" and {more:,} more" * (more > 0) if shown else "no arrays"


# --- the source -------------------------------------------------------------------------------------------------------


def chunked_source(
    keys: Keys, open_key: Callable[[str], Stored], origin: str, split: Split, layout_name: LayoutName
) -> ArraySource:
    """Returns the arrays of a part as a source.

    Args:
        keys: which arrays.
        open_key: opens one of them.
        origin: the file, for people.
        split: the part; of the val part no file is counted, as the train part has counted it.
        layout_name: how the axes of the images are read.

    Raises:
        UserError: not images, or no labels, or chunks that hold too much to be held.
    """
    where = f"{origin}::{keys.images}"
    stored = open_key(keys.images)
    layout = layout_of(stored.dtype, stored.shape, where, layout_name)
    count, notes = layout.shape[0], [*stored.notes, *layout.notes]
    labels, left_out = None, []
    if keys.labels is not None:
        claim = open_key(keys.labels)
        refuse_labels(claim.dtype, claim.shape, count, where)
        labels = checked_labels(claim.read(0, count), count, where)
    if split == "train" and keys.others:
        reason = f"neither the images nor their labels; to use them, name them as in {origin}::{keys.others[0]}"
        left_out = [LeftOut("arrays", len(keys.others), reason, keys.others[:EXAMPLES])]
    used = {"files": 1, "arrays": 1 + (labels is not None)} if split == "train" else {}
    stock = Stock(used, tuple(left_out), tuple(notes))
    if stored.at is not None:
        step = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        in_file = FileRows(stored.at[0], layout.shape, stored.at[1], step, layout.planes, stored.dtype)
        return ArraySource(in_file, labels, where, others=stock)
    rows = min(stored.rows, max(1, count))
    size = math.prod(stored.shape[1:]) * stored.dtype.itemsize * rows
    if size > MAX_GROUP_BYTES:
        problem = f"{rows:,} images are stored together in {readable(size)}, too much to be held; write it in chunks of"
        raise UserError(f"{where}: {problem} few images")
    held = max(MIN_HELD, HELD_BYTES // max(1, size))
    images = ChunkedImages(replace(stored, rows=rows), layout.shape, layout.planes, held)
    return ArraySource(images, labels, where, others=stock, shards=images.shards)
