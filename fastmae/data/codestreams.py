"""The first bytes of JPEG and JPEG 2000 as they are in files of their own and inside of TIFF, DICOM and HEIF."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

JPEG_START = b"\xff\xd8\xff"
J2K_SIZE = b"\xff\x4f\xff\x51"
"""The markers with which the codestream of a JPEG 2000 begins; the sizes and depths follow."""
EXIF_START = b"Exif\0\0"
_EXIF_REACH = 4096
"""How far into a JPEG its EXIF begins at most, and how many bytes of it are looked at."""
_EXIF_TAGS, _ORIENTATION = 64, 0x0112
"""The orientation is one of the first tags, which are sorted by their numbers."""


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields (marker, offset of what follows the length) of the segments before the pixels."""
    position = 2
    while position + 4 <= len(data):
        start = data.find(b"\xff", position)
        if start < 0 or start + 4 > len(data):
            return
        marker = data[start + 1]
        if marker in (0x00, 0xFF) or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # padding, or no length follows
            position = start + 1 if marker == 0xFF else start + 2
            continue
        if marker in (0xD9, 0xDA):
            return
        yield marker, start + 4
        position = start + 2 + max(2, int.from_bytes(data[start + 2 : start + 4], "big"))


def exif_of_jpeg(data: bytes) -> bytes:
    """Returns the first bytes of the EXIF tags of a JPEG; nothing if it has none at its beginning."""
    start = data.find(EXIF_START, 0, _EXIF_REACH)
    return data[start + len(EXIF_START) : start + _EXIF_REACH] if start > 0 else b""


def is_turned(exif: bytes) -> bool:
    """Tells whether EXIF tags, which begin as a TIFF does, say that a viewer is to turn or mirror the image."""
    with contextlib.suppress(struct.error, KeyError):
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (first,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, first)
        for entry in range(min(count, _EXIF_TAGS)):
            tag, _, _, value = struct.unpack_from(order + "HHIH", exif, first + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return value in range(2, 9)
    return False


def jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """Returns (marker, bits per sample, bands) of the frame header of a JPEG; None if there is none."""
    for marker, start in jpeg_segments(data):
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return marker, data[start], data[start + 5]
    return None


def size_of_jpeg(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) of a JPEG, also one within another format; None if they are not found."""
    with contextlib.suppress(IndexError, struct.error):
        for marker, start in jpeg_segments(data):
            if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
                height, width = struct.unpack_from(">HH", data, start + 1)
                return height, width
    return None


def size_of_jpeg2000(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) of a JPEG 2000, with or without the boxes around it; None if they are not found."""
    start = data.find(J2K_SIZE)
    if not 0 <= start < len(data) - 24:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
    return bottom - top, right - left


def depths_of_jpeg2000(data: bytes) -> list[tuple[int, bool]] | None:
    """Returns (bits, whether they are signed) of each band of a JPEG 2000; None if they are not found."""
    start = data.find(J2K_SIZE)
    if start < 0:
        return None
    with contextlib.suppress(struct.error, IndexError):
        (bands,) = struct.unpack_from(">H", data, start + 40)
        depths = [data[start + 42 + 3 * band] for band in range(bands)]
        return [((depth & 127) + 1, bool(depth & 128)) for depth in depths]
    return None


def size_of_jpegxl(data: bytes) -> tuple[int, int]:
    """Returns (height, width) of a JPEG XL by the first bits of its codestream, in or out of boxes.

    Raises:
        ValueError, struct.error: they are not found.
    """
    start = 2
    if data[:2] != b"\xff\x0a":
        start = _codestream_of_jpegxl(data) + 2
    bits, taken = int.from_bytes(data[start : start + 16], "little"), 0
    if start + 9 > len(data):
        raise ValueError("no codestream")

    def take(count: int) -> int:
        nonlocal taken
        found = bits >> taken & ((1 << count) - 1)
        taken += count
        return found

    is_small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if is_small else take((9, 13, 18, 30)[take(2)]) + 1

    height = side()
    ratio = take(3)
    up, down = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio]
    return height, height * up // down if ratio else side()


def _codestream_of_jpegxl(data: bytes) -> int:
    """Returns where the codestream begins within boxes.

    Raises:
        ValueError, struct.error: nowhere.
    """
    at = 0
    while True:
        size, kind = struct.unpack_from(">I4s", data, at)
        begins = at + 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, begins)
            begins += 8
        if kind in (b"jxlc", b"jxlp"):
            return begins + (4 if kind == b"jxlp" else 0)
        if size < 8:
            raise ValueError("no codestream")
        at += size
