"""How the bytes of an image, or the numbers of an array, become pixels of a batch; and what cannot become any.

It knows nothing of formats: decode.py and formats/ follow it.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from fastmae.facts import AS_STORED, PixelType, ReadAs

# Above this an image is refused unread: a few hundred bytes can claim gigabytes ("decompression bomb").
MAX_PIXELS = 178_956_970


class BadImageError(ValueError):
    """Bytes that are not a usable image; the message says why."""


@dataclass(frozen=True)
class Reading:
    """What the pixels of a batch are, and how they are taken from files: the same for all images of a data set."""

    in_chans: int
    """Channels of the model."""
    _: KW_ONLY
    dtype: PixelType = "uint8"
    """The type of all pixels, which an image must fit into without losing a bit."""
    nodata: float | None = None
    """The value of missing pixels. Of float32 NaN is missing as well."""
    read_as: ReadAs = AS_STORED


def check_pixels(height: int, width: int) -> None:
    """Refuses an image that is too large, by what its header claims, before anything is allocated for it.

    Raises:
        BadImageError: more than ``MAX_PIXELS`` pixels.
    """
    if height * width > MAX_PIXELS:
        raise BadImageError(f"{width}×{height} pixels, over the limit of {MAX_PIXELS}")
