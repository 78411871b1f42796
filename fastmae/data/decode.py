"""From the bytes of an image file to its pixels.

This is what the thread decoder runs, one image per thread, and what decides which images are usable. It knows nothing
of batches; fastmae/data/decoders has those. Files of 8 bits are decoded by simplejpeg and Pillow, others by the first
file of formats/ that knows them, as they are stored; convert.py makes them the pixels of a batch.

Of several pages or frames the first counts, unless the user asks for all, and no image is turned by its EXIF or TIFF
orientation.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from fastmae.data import tiff
from fastmae.data.changes import note
from fastmae.data.codestreams import EXIF_START, exif_of_jpeg, is_turned
from fastmae.data.convert import convert_channels, to_batch, upper_bits
from fastmae.data.formats import dicom, heif, jpeg2000, netpbm, png
from fastmae.data.formats import tiff as wide_tiff
from fastmae.data.headers import JPEG_START, explain, jpeg2000_problem, native_header, read_header
from fastmae.data.reading import BadImageError, Reading, check_pixels
from fastmae.facts import ReadAs

FOLDER_CHANNELS = (1, 3, 4)
_REACH = 4096
"""How many of its first bytes tell what a file is."""
_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_AS_STORED = ("L", "LA", "RGB", "RGBA", "CMYK")
"""Modes of which Pillow gives every band as it is stored."""
_GRAY = ("1", "L", "LA")
_SCALED_TO_16_BITS = ("PNG", "PPM", "JPEG2000")
"""Formats of which Pillow's modes I and I;16 hold 16 bits, to which it scales fewer. In a TIFF it scales nothing."""
_DAMAGED_PIXELS = ("premature end", "bad Huffman code", "instead of RST", "Inconsistent progression")
"""What libjpeg says of a JPEG that is cut or damaged in its pixels. Of other complaints Pillow is the judge."""

_UNREAD = {
    "EPS": "PostScript, which is not read",  # a program, which Pillow would run in an interpreter
    "FITS": "FITS, whose numbers have no fixed range; scale them to 0–255 and store PNG or TIFF",
}


def decode(data: bytes | np.ndarray, reading: Reading) -> np.ndarray:
    """Decodes the bytes of an image file, or takes numbers [H, W, c], to pixels [H, W, in_chans] of ``reading.dtype``.

    Raises:
        BadImageError: bytes that are truncated or no image, too many pixels, or channels or values without a rule.
    """
    if isinstance(data, np.ndarray):
        return to_batch(data, reading)
    with _bad_images(data):
        return to_batch(_file_pixels(data, reading), reading)


def _file_pixels(data: bytes, reading: Reading) -> np.ndarray:
    """Returns the pixels [H, W, c] of an image file in its own type."""
    if data[:3] == JPEG_START and (reading.in_chans in (1, 3) or reading.read_as.bands):
        pixels = _decode_jpeg(data)
        if pixels is not None:
            if is_turned(exif_of_jpeg(data)):
                note("turned")
            return pixels
    native = native_pixels(data, reading.read_as)
    if native is not None:
        if native.dtype == np.uint16 and reading.read_as.takes_upper_bits:
            native = upper_bits(native, read_header(data).bits)
        return native if reading.read_as.bands else _with_fourth_band(native, reading.in_chans)
    with _opened(data, reading) as (image, stored_bits):
        _note_tags(data, image)
        return _pixels_of(image, stored_bits, reading)


def native_pixels(data: bytes, read_as: ReadAs) -> np.ndarray | None:
    """Returns the pixels [H, W, C] of an image file as it stores them, in their own type; nothing is lost.

    One line a format, the first that knows the file. None is a file that Pillow reads as it is stored, in 8 bits.

    Raises:
        BadImageError: nothing that can be used, or only in another way than ``read_as`` says.
    """
    start = data[:_REACH]
    if png.is_png16(start):
        return png.pixels(data, read_as)
    if netpbm.is_netpbm16(start):
        return netpbm.pixels(data, read_as)
    if tiff.is_tiff(start):
        return wide_tiff.pixels(data, read_as)
    if dicom.is_dicom(start):
        return dicom.pixels(data, read_as)
    if heif.is_heif(start):
        return heif.pixels(data, read_as)
    if jpeg2000.is_jpeg2000(start) or jpeg2000.is_jpegxl(start):
        return jpeg2000.pixels(data, read_as)
    return None


def _is_native(data: bytes, read_as: ReadAs) -> bool:
    """Tells by the header whether ``native_pixels`` reads a file, rather than Pillow.

    Raises:
        BadImageError: the header makes no sense.
    """
    start = data[:_REACH]
    if tiff.is_tiff(start):
        return not wide_tiff.is_for_pillow(data, read_as)
    if dicom.is_dicom(start) or jpeg2000.is_jpegxl(start):
        return True
    is_known = png.is_png16(start) or netpbm.is_netpbm16(start) or native_header(data) is not None
    return is_known and not read_as.takes_upper_bits


def refuse_by_header(data: bytes, reading: Reading) -> None:
    """Refuses an image file as ``decode`` does, as far as its header shows it; damage of the pixels is not noticed.

    Raises:
        BadImageError: the bytes are no image, or one without a rule.
    """
    with _bad_images(data):
        if plain_jpeg_shape(data, reading) is not None:
            return
        if _is_native(data, reading.read_as):
            bands = read_header(data).bands
            if bands and not reading.read_as.bands:
                convert_channels(_with_fourth_band(np.zeros((1, 1, bands)), reading.in_chans), reading.in_chans)
            return
        with _opened(data, reading):
            pass


@contextlib.contextmanager
def _bad_images(data: bytes) -> Iterator[None]:
    """Turns errors of the decoders into a BadImageError that says what is wrong with these bytes."""
    try:
        yield
    except (BadImageError, MemoryError):  # too little memory is no fault of the image
        raise
    except Exception as error:  # decoders raise all kinds of errors on broken bytes: ValueError, struct.error …
        if isinstance(error, UnidentifiedImageError):
            reason = explain(data)
            raise BadImageError("no image format that Pillow knows" + f": {reason}" * bool(reason)) from error
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Returns the pixels uint8 [H, W, 1 or 3] of a JPEG that is gray or colour; None if it is left to Pillow.

    Raises:
        ValueError: the file is cut, or damaged in its pixels, which Pillow would not always notice.
    """
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        check_pixels(height, width)
        if colorspace.upper() in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, colorspace="GRAY" if colorspace.upper() == "GRAY" else "RGB")
    except BadImageError:
        raise
    except ValueError as error:
        if any(words.lower() in str(error).lower() for words in _DAMAGED_PIXELS):
            raise
        return None


def plain_jpeg_shape(data: bytes, reading: Reading) -> tuple[int, int] | None:
    """Returns (height, width) of a plain JPEG that becomes uint8, and None for all else. It reads no pixels.

    Plain means gray or YCbCr, which any JPEG decoder takes, with the marker of its end. A truncated file has no such
    marker; it is left to ``decode``, which tells whether it is usable.

    Raises:
        BadImageError: too many pixels.
    """
    if reading.dtype != "uint8" or reading.read_as.bands or reading.in_chans not in (1, 3):
        return None
    if isinstance(data, np.ndarray) or data[:3] != JPEG_START or data[-2:] != b"\xff\xd9":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace.upper() not in ("GRAY", "YCBCR"):
        return None
    check_pixels(height, width)
    return height, width


@contextlib.contextmanager
def _opened(data: bytes, reading: Reading) -> Iterator[tuple[Image.Image, int]]:
    """Opens an image file by Pillow. Yields it, and the bits of a sample that its modes I and I;16 hold.

    Raises:
        BadImageError: nothing that can be used as it is stored, or not with so many channels.
    """
    tags = tiff.read_tags(data) if tiff.is_tiff(data) else None
    if tags is not None and tags.problem:
        raise BadImageError(tags.problem)
    with Image.open(io.BytesIO(data if tags is None else tiff.for_pillow(data, tags))) as image:
        check_pixels(image.height, image.width)
        if image.format in _UNREAD:
            raise BadImageError(_UNREAD[image.format])
        is_scaled = image.format in _SCALED_TO_16_BITS
        if image.mode == "F" or (image.mode == "I" and not is_scaled):
            raise BadImageError(f"{image.format} pixels of mode {image.mode} have no fixed range; store 8 or 16 bits")
        if image.format == "JPEG2000" and (problem := jpeg2000_problem(data)):
            raise BadImageError(problem)
        if not reading.read_as.bands:
            if reading.in_chans not in _PIL_MODES:
                raise BadImageError(f"a file of {image.format} gives 1, 3 or 4 channels, not {reading.in_chans}")
            if reading.in_chans == 4:
                _require_fourth_band(image, tags)
        image.info.pop("xmp", None)  # Pillow would turn a TIFF by it
        yield image, 16 if is_scaled or tags is None else tiff.stored_bits(tags)


def _note_tags(data: bytes, image: Image.Image) -> None:
    """Notes that an opened image would be turned, states a value of missing pixels, or has bits that Pillow drops."""
    if not image.mode.startswith("I") and _is_wide(data):
        note("upper bits")
    if tiff.is_tiff(data):
        wide_tiff.note_tags(tiff.read_tags(data))
        return
    if is_turned((image.info.get("exif") or b"").removeprefix(EXIF_START)):  # pillow-heif says None where there is none
        note("turned")


def _is_wide(data: bytes) -> bool:
    """Tells whether a file, of those that Pillow may read in 8 bits, has more."""
    start = data[:_REACH]
    if tiff.is_tiff(start):
        return max(tiff.read_tags(data).bits) > 8
    return png.is_png16(start) or netpbm.is_netpbm16(start) or (heif.is_heif(start) and heif.bits_of(data) > 8)


def _pixels_of(image: Image.Image, stored_bits: int, reading: Reading) -> np.ndarray:
    """Returns the pixels of an opened image: uint16 [H, W, 1] of more than 8 bits, else uint8 [H, W, in_chans].

    Where the user chooses bands, all bands of 8 bits are returned, a palette as its colours.
    """
    if image.mode.startswith("I"):  # more than 8 bits per pixel, which Pillow itself would clip at 255
        wide = np.asarray(image).astype(np.int64)[..., None]
        return upper_bits(wide, stored_bits) if reading.read_as.takes_upper_bits else wide.astype(np.uint16)
    if reading.in_chans != 4:
        if image.has_transparency_data:
            note("alpha")
        image.info.pop("transparency", None)  # dropped anyway, and Pillow would warn about palettes
    # Pillow converts gray that was multiplied by its alpha to nothing else.
    plain = image.convert("LA") if image.mode == "La" else image
    if reading.read_as.bands:
        mode = plain.mode if plain.mode in _AS_STORED else "RGBA" if plain.has_transparency_data else "RGB"
    else:
        mode = _PIL_MODES[reading.in_chans]
        is_gray = plain.mode in _GRAY
        if is_gray != (mode == "L"):
            note("repeated" if is_gray else "luma")
    pixels = np.asarray(plain.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _with_fourth_band(pixels: np.ndarray, in_chans: int) -> np.ndarray:
    """Returns the pixels of a file, which have the fourth band if it is asked for: none is made up."""
    bands = pixels.shape[2]
    if in_chans != 4 or bands >= 4:
        return pixels
    if bands == 2:  # gray with alpha becomes colour with alpha
        return pixels[..., [0, 0, 0, 1]]
    raise _no_fourth(f"{bands} band{'s' if bands > 1 else ''}")


def _no_fourth(what: str) -> BadImageError:
    return BadImageError(f"{what}, in_chans 4 asks for 4; set in_chans to 1 or 3, or give images with a fourth band")


def _require_fourth_band(image: Image.Image, tags: tiff.Tags | None) -> None:
    """Refuses an image without alpha and without a fourth band where 4 channels are asked for: none is made up."""
    bands = len(image.getbands()) if tags is None else tags.bands
    has_alpha = image.has_transparency_data and not image.mode.startswith("I")
    if not has_alpha or (tags is not None and tags.unspecified and bands != 4):
        count = f"{bands} band{'s' if bands > 1 else ''}" if image.mode != "CMYK" else "CMYK without alpha"
        raise _no_fourth(count)
