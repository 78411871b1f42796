"""PNG of 16 bits: gray by Pillow, and all else by imagecodecs, as Pillow keeps 8 bits of it."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from fastmae.data.arrays import MAX_DEFLATE_RATIO
from fastmae.data.formats.common import check_size, library
from fastmae.data.reading import BadImageError
from fastmae.facts import ReadAs

_BANDS = {0: 1, 2: 3, 4: 2, 6: 4}
"""Samples per pixel, by the colour type of the header; 2 and 4 have alpha."""


def is_png16(start: bytes) -> bool:
    """Tells whether a file begins as a PNG with 16 bits per sample."""
    return start[:8] == b"\x89PNG\r\n\x1a\n" and start[12:16] == b"IHDR" and start[24:25] == b"\x10"


def pixels(data: bytes, read_as: ReadAs) -> np.ndarray | None:
    """Returns the pixels uint16 [H, W, 1 to 4]; None where the user asks for 8 bits, to which Pillow takes the upper 8.

    Raises:
        BadImageError: too many pixels, more than the file can hold, or no library that reads them.
    """
    if read_as.takes_upper_bits:
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    bands = _BANDS.get(data[25], 0)
    check_size(height, width, bands, 2)
    if height * width * bands * 2 > MAX_DEFLATE_RATIO * len(data):
        raise BadImageError(f"a PNG of {len(data)} bytes cannot hold the {width}×{height} pixels that it claims")
    if bands == 1:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image).astype(np.uint16)[..., None]
    decoded = library("imagecodecs", f"a 16-bit PNG of {bands} bands").png_decode(data)
    return decoded[..., :bands]
