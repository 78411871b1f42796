"""JPEG 2000 and JPEG XL by imagecodecs: any depth, sign and number of bands, as they are stored.

A JPEG 2000 of 1, 3 or 4 bands of 8 bits is left to Pillow.
"""

from __future__ import annotations

import struct

import numpy as np

from fastmae.data.codestreams import depths_of_jpeg2000, size_of_jpeg2000, size_of_jpegxl
from fastmae.data.formats.common import check_size, library
from fastmae.data.reading import BadImageError, Header
from fastmae.facts import ReadAs

_MOST_BITS = 16
_REACH = 1 << 20
"""How far into a file its codestream may begin, behind boxes of colours and of places on Earth."""


def is_jpeg2000(start: bytes) -> bool:
    """Tells whether bytes begin as those of a JPEG 2000, with or without boxes around its codestream."""
    return start[:8] == b"\0\0\0\x0cjP  " or start[:4] == b"\xff\x4f\xff\x51"


def is_jpegxl(start: bytes) -> bool:
    """Tells whether bytes begin as those of a JPEG XL, with or without boxes around its codestream."""
    return start[:2] == b"\xff\x0a" or start[:8] == b"\0\0\0\x0cJXL "


def pixels(data: bytes, read_as: ReadAs) -> np.ndarray | None:
    """Returns [H, W, C] as stored; None for a JPEG 2000 that Pillow decodes as it is stored.

    Raises:
        BadImageError: damaged, too large, or bands of different kinds.
    """
    if is_jpegxl(data[:16]):
        return _jpegxl(data)
    depths, size = depths_of_jpeg2000(data[:_REACH]), size_of_jpeg2000(data[:_REACH])
    if not depths or size is None:
        raise BadImageError("a JPEG 2000 without a codestream")
    bits, is_signed = depths[0]
    if bits <= 8 and len(depths) <= 4 and not is_signed and read_as.bands is None:
        return None
    if read_as.takes_upper_bits and len(depths) == 1 and not is_signed and bits <= _MOST_BITS:
        return None
    if len(set(depths)) > 1 or bits > _MOST_BITS:
        shown = ", ".join(sorted({f"{'signed ' * signed}{bits} bits" for bits, signed in depths}))
        raise BadImageError(f"a JPEG 2000 with bands of {shown}; store bands of one depth, up to {_MOST_BITS} bits")
    check_size(*size, len(depths), (bits + 7) // 8)
    found = _decoded("jpeg2k", "JPEG 2000 of more than 8 bits or 4 bands", data)
    if found.shape[:2] != size or found.shape[2] != len(depths):
        raise BadImageError(f"a JPEG 2000 whose bands differ in size; store it with bands of {size[1]}×{size[0]}")
    return found


def _jpegxl(data: bytes) -> np.ndarray:
    try:
        size = size_of_jpegxl(data)
    except (struct.error, IndexError, ValueError) as error:
        raise BadImageError("a JPEG XL that is cut within its header") from error
    check_size(*size, 4, 4)
    return _decoded("jpegxl", "JPEG XL", data, index=0)  # of an animation the first frame


def _decoded(codec: str, what: str, data: bytes, **options: int) -> np.ndarray:
    imagecodecs = library("imagecodecs", what)
    try:
        found = getattr(imagecodecs, f"{codec}_decode")(data, numthreads=1, **options)
    except MemoryError:
        raise
    except Exception as error:
        name = "a JPEG XL" if codec == "jpegxl" else "a JPEG 2000"
        raise BadImageError(f"{name} that cannot be decoded ({type(error).__name__}: {error})") from error
    return found[..., None] if found.ndim == 2 else found


def header(data: bytes) -> Header | None:
    """Returns what the codestream says; None if it is left to Pillow, or says nothing."""
    if is_jpegxl(data[:16]):
        found = _jpegxl(data)  # as its first bits say little of depth and colours
        height, width, bands = found.shape
        dtype, bits = found.dtype.name, 8 * found.itemsize
        return Header("JPEG XL", _colours(bands), bands, bits, bands in (2, 4), size=(height, width), dtype=dtype)
    depths, size_of = depths_of_jpeg2000(data[:_REACH]), size_of_jpeg2000(data[:_REACH])
    if not depths or size_of is None:
        return None
    bits, is_signed = depths[0]
    if bits <= 8 and len(depths) <= 4 and not is_signed:
        return None
    dtype = f"{'int' if is_signed else 'uint'}{16 if bits > 8 else 8}"
    return Header("JPEG2000", _colours(len(depths)), len(depths), bits, size=size_of, dtype=dtype)


def _colours(bands: int) -> str:
    return {1: "gray", 2: "gray with alpha", 3: "colour", 4: "colour with alpha"}.get(bands, f"{bands} bands")
