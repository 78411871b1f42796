"""PGM and PPM of more than 8 bits: the numbers as they are stored, which Pillow stretches or cuts."""

from __future__ import annotations

import re

import numpy as np

from fastmae.data.formats.common import check_size
from fastmae.data.reading import BadImageError
from fastmae.facts import ReadAs

_BLANK = rb"(?:\s|#[^\n]*\n)+"
_START = re.compile(rb"P([2356])" + 3 * (_BLANK + rb"(\d{1,9})") + rb"\s")
_REACH = 4096


def is_netpbm16(start: bytes) -> bool:
    """Tells whether a file begins as a gray or colour Netpbm file with more than 8 bits per sample."""
    found = _START.match(start[:_REACH]) if start[:1] == b"P" else None
    return found is not None and int(found[4]) > 255


def pixels(data: bytes, read_as: ReadAs) -> np.ndarray | None:
    """Returns the pixels uint16 [H, W, 1 or 3]; None where the user asks for 8 bits, to which Pillow scales them.

    Raises:
        BadImageError: the file is cut, or holds numbers that it does not allow.
    """
    if read_as.takes_upper_bits:
        return None
    found = _START.match(data[:_REACH])
    assert found is not None
    kind, width, height, largest = (int(number) for number in found.groups())
    bands = 3 if kind in (3, 6) else 1
    check_size(height, width, bands, 2)
    count, rest = height * width * bands, len(data) - found.end()
    if largest > 65535:
        raise BadImageError(f"a Netpbm file of numbers up to {largest}; store at most 65535")
    if rest < count * 2 - (kind < 4):  # a number in words takes a digit and a blank, the last one a digit
        raise BadImageError(f"a Netpbm file of {rest} bytes cannot hold the {width}×{height} pixels that it claims")
    if kind > 4:
        numbers = np.frombuffer(data, ">u2", count, found.end()).astype(np.uint16)
    else:
        words = re.sub(rb"#[^\n]*", b"", data[found.end() :]).split(maxsplit=count)[:count]
        if len(words) < count or not all(word.isdigit() and len(word) < 6 for word in words):
            raise BadImageError(f"a Netpbm file without the {count} numbers that it claims")
        numbers = np.array(words).astype(np.int64).clip(0, 65536).astype(np.uint32)
    if numbers.max() > largest:
        raise BadImageError(f"a Netpbm file with the number {numbers.max()}, over the {largest} that it claims")
    return numbers.astype(np.uint16).reshape(height, width, bands)
