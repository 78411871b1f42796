"""HEIC and AVIF of 10 and 12 bits, by pillow-heif and imagecodecs; those of 8 bits are left to Pillow.

These are photographs, some of 8 bits and some of more, so numbers are scaled to 16 bits with white at 65535: different
numbers stay different, and 8 bits times 257 have the same white.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct

import numpy as np

from fastmae.data.formats.common import check_size, library
from fastmae.data.reading import BadImageError, Header
from fastmae.facts import ReadAs

_HEIC = re.compile(rb"....ftyp(?:hei[cxms]|hev[cmsx]|mif1|msf1)", re.DOTALL)
_AVIF = re.compile(rb"....ftypavi[fs]", re.DOTALL)
_REACH = 1 << 16
"""How far into a file the boxes with the depth may lie."""


def is_heif(start: bytes) -> bool:
    """Tells whether bytes begin as those of a HEIC or an AVIF."""
    return (_HEIC.match(start) or _AVIF.match(start)) is not None


def bits_of(data: bytes) -> int:
    """Returns the largest depth of any image in a file, by the boxes that configure its decoder."""
    bits, start = [8], data[:_REACH]
    with contextlib.suppress(IndexError):
        bits += [8 + (start[at.end() + 17] & 7) for at in re.finditer(b"hvcC", start)]
        for at in re.finditer(b"av1C", start):
            high, twelve = start[at.end() + 2] & 64, start[at.end() + 2] & 32
            bits.append(12 if high and twelve else 10 if high else 8)
    return max(bits)


def pixels(data: bytes, read_as: ReadAs) -> np.ndarray | None:
    """Returns the first image, uint16 [H, W, C] with white at 65535; None for one of 8 bits.

    Raises:
        BadImageError: damaged, too large, or of bands in no order that is known.
    """
    if bits_of(data) == 8 or read_as.takes_upper_bits:
        return None
    stored, bits = _heic(data) if _HEIC.match(data[:16]) else _avif(data)
    if bits == 8:
        return None
    white = (1 << bits) - 1
    scaled = (stored.astype(np.uint32) * 65535 + white // 2) // white
    return scaled.astype(np.uint16) if stored.ndim == 3 else scaled.astype(np.uint16)[..., None]


def _heic(data: bytes) -> tuple[np.ndarray, int]:
    """Returns the numbers of the main image as they are stored, and their bits."""
    pillow_heif = library("pillow_heif", "HEIC", "heif")
    try:
        image = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
        bits, mode = int(image.info.get("bit_depth") or 8), str(image.mode)
        check_size(image.size[1], image.size[0], 4, 2)
        if bits == 8:
            return np.empty((0, 0, 0), np.uint8), 8
        stored = np.asarray(image)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        raise BadImageError(f"a HEIC that cannot be decoded ({type(error).__name__}: {error})") from error
    if mode not in ("RGB;16", "RGBA;16", "L;16", "I;16", "LA;16"):
        raise BadImageError(f"a HEIC with pixels of the mode {mode}, which has no rule; store HEIC in 8 bits, or PNG")
    return stored >> (16 - bits), bits  # as pillow-heif moves them to the left


def _avif(data: bytes) -> tuple[np.ndarray, int]:
    """Returns the numbers of the first image as they are stored, and their bits."""
    imagecodecs = library("imagecodecs", "AVIF of more than 8 bits")
    height, width = _size_of_avif(data)
    check_size(height, width, 4, 2)
    try:
        stored = imagecodecs.avif_decode(data, 0, numthreads=1)
    except Exception as error:
        raise BadImageError(f"an AVIF that cannot be decoded ({type(error).__name__}: {error})") from error
    return stored, bits_of(data) if stored.dtype == np.uint16 else 8


def _size_of_avif(data: bytes) -> tuple[int, int]:
    """Returns the largest (height, width) that a box of image extents states."""
    found: list[tuple[int, int]] = []
    for at in re.finditer(b"ispe", data[:_REACH]):
        with contextlib.suppress(struct.error):
            width, height = struct.unpack_from(">II", data, at.end() + 4)
            found.append((height, width))
    if not found:
        raise BadImageError("an AVIF without the size of its image")
    return max(found)


def header(data: bytes) -> Header | None:
    """Returns what the boxes of a HEIC or AVIF of more than 8 bits say; None for what is left to Pillow."""
    bits = bits_of(data)
    if bits == 8:
        return None
    size = _size_of_avif(data)
    return Header("HEIF" if _HEIC.match(data[:16]) else "AVIF", "colour", 3, bits, size=size, dtype="uint16")
