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


@dataclass(frozen=True)
class Header:
    """How an image file stores its pixels."""

    format: str
    """Pillow's name of the format; "unknown" if Pillow knows none."""
    colours: str
    """For people: "gray", "colour with alpha", "palette", "CMYK" …"""
    bands: int = 0
    """Samples per pixel as stored; 0 if they are not known."""
    bits: int = 8
    """Per sample, as stored."""
    alpha: bool = False
    """Whether the last band is alpha."""
    unspecified: int = 0
    """How many bands of a TIFF no tag gives a meaning."""
    pages: int = 1
    """Pages, frames or sizes."""
    orientation: int = 1
    """1 to 8, as EXIF counts; 1 is upright."""
    size: tuple[int, int] = (0, 0)
    """(height, width) in pixels as stored."""
    dtype: str = "uint8"
    """The type of its pixels as they are read, by the name that NumPy has for it."""
    nodata: float | None = None
    """The value of missing pixels, if the file states one."""

    @property
    def kind(self) -> str:
        """Format, depth and colours, for people: "PNG 16-bit gray"; 8 bits and fewer go without saying."""
        return f"{self.format} {f'{self.bits}-bit ' * (self.bits > 8)}{self.colours}"

    @property
    def is_gray(self) -> bool:
        return self.bands <= 2 and self.colours.startswith(("gray", "black and white"))

    @property
    def is_turned(self) -> bool:
        """Whether a viewer would turn or mirror the image."""
        return self.orientation in range(2, 9)
