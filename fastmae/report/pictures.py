"""The pictures of a run, which may be damaged, or no pictures at all."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from fastmae.errors import in_one_line
from fastmae.files import open_file

LARGEST = 64 * 2**20
"""Bytes of a picture beyond which it is none of ours; it is not read into memory."""


def read_picture(path: Path) -> tuple[bytes, Image.Image]:
    """Returns the bytes of a PNG file and what it shows, in RGB.

    Raises:
        ValueError: it cannot be read, or is none. The message names it.
    """
    try:
        with open_file(path) as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"more than {LARGEST >> 20} MB")
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            return data, opened.convert("RGB")
    # Pillow calls a broken piece of a PNG a SyntaxError.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        said = "no picture" if isinstance(error, UnidentifiedImageError) else getattr(error, "strerror", None)
        reason = in_one_line(said or str(error))
        raise ValueError(f"{path}: cannot be read ({reason})") from error
