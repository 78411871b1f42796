"""Arrays in Zarr stores on a disk, version 2 and 3: `store.zarr` or `store.zarr::key`, opened by zarr-python.

zarr reads the metadata. Chunks are files; they are read, and unpacked by the codecs of numcodecs, into no more than
they must hold, by any thread. Shards and codecs beyond those of ``CODECS`` are left to zarr itself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.data.arrays import ArraySource, Split, changed
from fastmae.data.chunks import Stored, choose_keys, chunked_source, read_chunks
from fastmae.data.codecs import CHECKSUM_BYTES, Codec, crc32c, decoder_of, inflate, own_memory, unpack
from fastmae.data.openfile import OpenFile
from fastmae.errors import UserError, install_hint
from fastmae.facts import LayoutName

METADATA = ("zarr.json", ".zarray", ".zgroup")
# No metadata takes more; that of a group may hold that of all arrays in it.
MAX_METADATA = 32 << 20
CODECS = ("zlib", "gzip", "blosc", "zstd", "lz4")
# Stores of more chunks are not asked for each chunk when they are opened.
LOOKED_FOR = 100_000
SIZES = 4096
MAX_ARRAYS = 10_000
MAX_GRID = 1 << 50
MAX_STORED = 2 << 30
STAT_THREADS = 16


def is_zarr(folder: Path) -> bool:
    """Tells whether a folder is a Zarr store, or a group or an array in one."""
    return any((folder / name).is_file() for name in METADATA)


def open_zarr(folder: Path, keys: str | None, split: Split, layout: LayoutName = "auto") -> ArraySource | None:
    """Opens the images of a part of a Zarr store, and their labels; None if it has no such part.

    Args:
        folder: the store.
        keys: as for ``chunks.choose_keys``.
        split: the part.
        layout: how the axes are read.

    Raises:
        UserError: zarr is missing, or there is no such array, or it is none that can be read.
        ValueError: metadata are damaged.
    """
    try:
        import zarr
    except ImportError as error:
        raise UserError(f"{folder}: Zarr stores need zarr; run {install_hint('science')}") from error
    if not is_zarr(folder):
        raise ValueError(f"holds none of {', '.join(METADATA)}, as a Zarr store does")
    for name in METADATA:
        path = folder / name
        if path.is_file() and OpenFile(path).size > MAX_METADATA:
            raise ValueError(f"{name} has more than {MAX_METADATA:,} bytes")
    with _naming(folder):
        opened = zarr.open(zarr.storage.LocalStore(folder, read_only=True), mode="r")
        arrays = {folder.name: opened} if isinstance(opened, zarr.Array) else _arrays(zarr, opened)
        if isinstance(opened, zarr.Array) and keys is not None:
            raise UserError(f"{folder}: one array, which takes no key; leave out `::{keys}`")
        listed = {key: (_dtype(array), tuple(array.shape)) for key, array in arrays.items()}
        chosen = choose_keys(listed, keys, split, str(folder))
        if chosen is None:
            return None
        return chunked_source(chosen, lambda key: _stored(arrays[key], folder, key), str(folder), split, layout)


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turns what zarr raises for damage into ValueError."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # zarr raises KeyError, TypeError, its own errors and others
        raise ValueError(f"{folder.name}: {' '.join(str(error).split())}") from error


def _arrays(zarr: Any, group: Any) -> dict[str, Any]:
    """Returns the arrays in a group and in the groups in it, by key."""
    arrays = {}
    for key, item in itertools.islice(group.members(max_depth=None), MAX_ARRAYS):
        if isinstance(item, zarr.Array):
            arrays[key] = item
    return dict(sorted(arrays.items()))


def _dtype(array: Any) -> np.dtype:
    return np.dtype(array.dtype)


def _stored(array: Any, folder: Path, key: str) -> Stored:
    """Finds out how an array is stored, and how it is read.

    Raises:
        ValueError: its metadata claim what cannot be.
    """
    where = f"{folder}::{key}" if array.path else str(folder)
    dtype, shape = _dtype(array), tuple(array.shape)
    if dtype.kind not in "biuf":
        return Stored(dtype, shape, 1, lambda start, stop: np.asarray(array[start:stop]), {})
    outer = tuple(array.shards or array.chunks)
    grid = [-(-length // size) for length, size in zip(shape, outer, strict=True)]
    if min(outer, default=1) < 1 or math.prod(grid) > MAX_GRID or math.prod(outer) * dtype.itemsize > MAX_STORED:
        raise ValueError(f"{where} says {list(shape)} {dtype} in chunks of {list(outer)}")
    path = Path(folder, array.path)
    name_of = _namer(array, path)
    is_complete, notes, sizes = _look(name_of, grid, where, array.fill_value)
    contents = {f"{key}": json.dumps(array.metadata.to_dict(), default=str, sort_keys=True), f"{key}, chunks": sizes}

    def by_zarr(start: int, stop: int) -> np.ndarray:
        try:
            return np.asarray(array[start:stop])
        except Exception as error:  # zarr raises all kinds of errors for damage
            raise OSError(f"{where}[{start}]: {' '.join(str(error).split())}") from error

    unpacked = _unpacker(array, dtype)
    if unpacked is None:
        return Stored(dtype, shape, outer[0], by_zarr, contents, notes=notes)

    def chunk(place: tuple[int, ...]) -> np.ndarray | None:
        name = name_of(place)
        try:
            file = OpenFile(name)
        except FileNotFoundError as error:
            if is_complete:
                raise OSError(f"{name} was there when the store was opened, and is gone") from error
            return None
        if file.size > MAX_STORED:
            raise OSError(f"{name} has {file.size:,} bytes")
        data = own_memory("stored", file.size)
        if not file.read_into(data, 0):
            raise changed(name)
        try:
            return unpacked(data)
        except (ValueError, RuntimeError, struct.error) as error:
            raise OSError(f"{name} is damaged ({' '.join(str(error).split())})") from error

    fill = np.zeros((), dtype)[()] if array.fill_value is None else array.fill_value
    return Stored(dtype, shape, outer[0], read_chunks(chunk, shape, outer, dtype, fill), contents, notes=notes)


def _namer(array: Any, path: Path) -> Callable[[tuple[int, ...]], str]:
    """Returns what names the file of a chunk by its place in the grid."""
    metadata = array.metadata
    if array.metadata.zarr_format == 2:
        separator = metadata.dimension_separator
        return lambda place: str(path / separator.join(map(str, place)))
    return lambda place: str(path / metadata.chunk_key_encoding.encode_chunk_key(place))


def _look(
    name_of: Callable[[tuple[int, ...]], str], grid: list[int], where: str, fill: Any
) -> tuple[bool, tuple[str, ...], str]:
    """Looks for the files of chunks: (whether all are there, what to say of missing ones, a hash of sizes)."""
    count = math.prod(grid)
    chosen = range(count) if count <= LOOKED_FOR else [count * number // SIZES for number in range(SIZES)]
    names = (name_of(tuple(map(int, np.unravel_index(number, grid)))) for number in chosen)
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        sizes = list(pool.map(_size, names))
    missing = sizes.count(-1)
    digest = hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]
    among = f" of {len(sizes):,} that were looked for" if len(sizes) < count else ""
    note = f"{where}: {missing:,} of {count:,} chunks{among} are not stored, and hold {fill}"
    return count == len(sizes) and not missing, (note,) if missing else (), digest


def _size(name: str) -> int:
    try:
        return os.stat(name).st_size
    except OSError:
        return -1


# --- codecs -----------------------------------------------------------------------------------------------------------


def _unpacker(array: Any, dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray] | None:
    """Returns what makes a chunk of the bytes of its file; None if zarr has to."""
    chunks = tuple(array.chunks)
    size = math.prod(chunks) * dtype.itemsize
    metadata = array.metadata
    if metadata.zarr_format == 2:
        compressor = metadata.compressor
        if metadata.filters or (compressor is not None and compressor.codec_id not in CODECS):
            return None
        codecs = [] if compressor is None else [_codec(compressor.codec_id, compressor)]
        order, stored = metadata.order, dtype
    else:
        described = [codec.to_dict() for codec in metadata.codecs]
        names = [codec["name"] for codec in described]
        packing = [name for name in names[1:] if name != "crc32c"]
        if names[:1] != ["bytes"] or not {*packing} <= {*CODECS} or len(packing) > 1:
            return None
        endian = described[0].get("configuration", {}).get("endian", "little")
        order, stored = "C", dtype.newbyteorder(">" if endian == "big" else "<")
        codecs = [_codec(name) for name in names[1:]]

    def unpacked(data: np.ndarray) -> np.ndarray:
        out = np.empty(size, np.uint8)
        unpack(data, codecs, out)
        pixels = out.view(stored).reshape(chunks, order=order)
        return pixels if stored == dtype else pixels.astype(dtype)

    return unpacked


def _codec(name: str, codec: Any = None) -> Codec:
    if name == "crc32c":
        return Codec(crc32c, adds=CHECKSUM_BYTES)
    if name in ("zlib", "gzip"):
        return Codec(functools.partial(inflate, wbits=zlib.MAX_WBITS + 16 * (name == "gzip")))
    return Codec(decoder_of(name, codec))
