"""How the bytes of a stored chunk become its numbers: the codecs of HDF5 and Zarr, undone by any thread, one by one.

What a chunk must hold is known before, and nothing is unpacked into more. Between two codecs the bytes lie in memory
that a thread uses again for each chunk: fresh memory costs a fault a page, for which threads wait for each other. What
a chunk is and where it lies is known to chunks.py and formats/.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from fastmae.ops import cpu

ZSTD_START = b"\x28\xb5\x2f\xfd"
CHECKSUM_BYTES = 4
# A thread keeps no more of its own; larger chunks get fresh memory.
MAX_OWN_BYTES = 64 << 20


@dataclass(frozen=True)
class Codec:
    """A codec that was applied to the bytes of a chunk."""

    undo: Callable[[np.ndarray, np.ndarray], None]
    """Fills the second array with what the first holds, both uint8. Raises ValueError or RuntimeError for damage, and
    if it holds more or fewer bytes than there are to fill."""
    adds: int = 0
    """How many bytes longer it makes what it is applied to: those of a checksum, and of nothing else."""


def unpack(data: np.ndarray, codecs: Sequence[Codec], out: np.ndarray) -> None:
    """Undoes codecs, the last one first.

    Args:
        data: uint8, as stored; may be memory of ``own_memory("stored", …)``.
        codecs: in the order in which they were applied, of which at most one packs: nobody knows the size between two.
        out: uint8, with as many bytes as the numbers have.

    Raises:
        ValueError, RuntimeError: the data are damaged, or hold more or fewer bytes.
    """
    for number, codec in reversed([*enumerate(codecs)]):
        size = len(data) - codec.adds if codec.adds else len(out) + sum(before.adds for before in codecs[:number])
        into = out if number == 0 and size == len(out) else own_memory(f"codec {number}", size)
        codec.undo(data, into)
        data = into
    if data is not out:
        _fill(out, data)


class _Own(threading.local):
    """Memory of each thread, by what it is for."""

    def __init__(self) -> None:
        self.by_name: dict[str, np.ndarray] = {}


_own = _Own()


def own_memory(name: str, size: int) -> np.ndarray:
    """Returns uint8 [size] of this thread's, which is the same memory again for its next call with the same name."""
    if size > MAX_OWN_BYTES:
        return np.empty(size, np.uint8)
    memory = _own.by_name.get(name)
    if memory is None or len(memory) < size:
        memory = _own.by_name[name] = np.empty(size, np.uint8)
    return memory[:size]


def _fill(out: np.ndarray, data: Any) -> None:
    """Copies bytes, once there are as many as there have to be."""
    there = np.frombuffer(data, np.uint8)
    if len(there) != len(out):
        raise ValueError(f"{len(there):,} bytes instead of {len(out):,}")
    out[:] = there


# --- DEFLATE ----------------------------------------------------------------------------------------------------------


def inflate(data: Any, out: np.ndarray, wbits: int = zlib.MAX_WBITS) -> None:
    """Undoes DEFLATE.

    Args:
        data: compressed.
        out: uint8, with as many bytes as it must hold.
        wbits: of ``zlib``: `MAX_WBITS` for zlib's header, 16 more for that of gzip.

    Raises:
        ValueError: it holds more or fewer, or is damaged.
    """
    fast = _fast_inflate(wbits)
    if fast is not None:
        with contextlib.suppress(Exception):  # what it does not take is judged by zlib
            if len(fast(data, out=out)) == len(out):
                return
    try:
        unpacker = zlib.decompressobj(wbits)
        unpacked = unpacker.decompress(data, len(out) + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(unpacked) != len(out) or not unpacker.eof:
        raise ValueError(f"unpacks to {'more' if len(unpacked) > len(out) else 'other'} than its {len(out)} bytes")
    _fill(out, unpacked)


@functools.cache
def _fast_inflate(wbits: int) -> Callable[..., np.ndarray] | None:
    """Returns libdeflate's decoder, which takes less than half of zlib's time, if imagecodecs is installed."""
    try:
        import imagecodecs
    except ImportError:
        return None
    decoder = imagecodecs.GZIP if wbits > zlib.MAX_WBITS else imagecodecs.DEFLATE
    if not decoder.available:
        return None
    decode: Any = imagecodecs.gzip_decode if wbits > zlib.MAX_WBITS else imagecodecs.deflate_decode
    return cast(Callable[..., np.ndarray], decode)


# --- HDF5's own -------------------------------------------------------------------------------------------------------


def unshuffle(data: np.ndarray, out: np.ndarray, itemsize: int) -> None:
    """Undoes HDF5's shuffle filter: the first bytes of all numbers, then their second ones, and so on.

    Args:
        data: uint8. What is left beyond whole numbers stays where it is.
        out: uint8, of the same length.
        itemsize: bytes of a number.
    """
    if len(data) != len(out):
        raise ValueError(f"{len(data):,} bytes instead of {len(out):,}")
    whole = len(data) // itemsize * itemsize
    cpu.unshuffle(data[:whole].reshape(itemsize, -1), out[:whole].reshape(-1, itemsize))
    out[whole:] = data[whole:]


def fletcher32(data: np.ndarray, out: np.ndarray) -> None:
    """Checks HDF5's checksum of 4 bytes behind the data, and leaves it out."""
    from numcodecs.fletcher32 import Fletcher32  # comes with zarr

    _fill(out, Fletcher32().decode(data))


# --- Zarr's -----------------------------------------------------------------------------------------------------------


def crc32c(data: np.ndarray, out: np.ndarray) -> None:
    """Checks the checksum of 4 bytes behind the data, and leaves it out."""
    from numcodecs.checksum32 import CRC32C

    _fill(out, CRC32C().decode(data))


def decoder_of(name: str, codec: Any = None) -> Callable[[np.ndarray, np.ndarray], None]:
    """Returns how `blosc`, `zstd` or `lz4` is undone.

    The size that their headers claim is compared with what there must be, before they are unpacked.

    Args:
        name: of the codec.
        codec: of numcodecs, with its settings; None where the data say all.
    """
    import numcodecs

    claim = {"blosc": blosc_size, "zstd": zstd_size, "lz4": lz4_size}[name]
    decoder = codec or {"blosc": numcodecs.Blosc, "zstd": numcodecs.Zstd, "lz4": numcodecs.LZ4}[name]()

    def undo(data: np.ndarray, out: np.ndarray) -> None:
        claimed = claim(data)
        if claimed != len(out):
            raise ValueError(f"says {claimed:,} bytes instead of {len(out):,}")
        decoder.decode(data, out)

    return undo


def blosc_size(data: Any) -> int:
    """Returns the size that the header of Blosc's names."""
    size, packed = struct.unpack_from("<I4xI", data, 4)
    if packed != len(data):
        raise ValueError(f"{len(data):,} bytes instead of {packed:,}")
    return int(size)


def lz4_size(data: Any) -> int:
    """Returns the size that numcodecs wrote before what LZ4 gave."""
    return int(struct.unpack_from("<I", data)[0])


def zstd_size(data: Any) -> int:
    """Returns the size that the header of a Zstandard frame names (RFC 8878, section 3.1.1.1)."""
    start = bytes(data[:18])
    if start[:4] != ZSTD_START or len(start) < 6:
        raise ValueError("does not begin as Zstandard does")
    descriptor = start[4]
    is_single = descriptor >> 5 & 1
    width = (is_single, 2, 4, 8)[descriptor >> 6]
    if not width:
        raise ValueError("Zstandard without the size of what it holds; write it with another codec")
    first = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    size = int.from_bytes(start[first : first + width], "little")
    return size + 256 if width == 2 else size
