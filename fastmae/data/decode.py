"""From bytes to pixels: decode, convert channels, crop, antialiased bicubic resize and flip one image, all in uint8.

This is what the thread decoder runs, one image per thread, and what decides which images are usable. It knows nothing
of batches; fastmae/data/decoders has those.

Channels follow Pillow's ``convert``: colour becomes gray by ITU-R 601 luma, gray is repeated, alpha is dropped, and no
alpha is made up. Of 9 to 16 bits the upper 8 are kept, floating-point, signed and 32-bit pixels are refused for want of
a range, of several pages or frames the first counts, and no image is turned by its EXIF or TIFF orientation.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from fastmae.data import tiff
from fastmae.data.headers import JPEG_START, explain, jpeg2000_problem
from fastmae.data.plan import Box
from fastmae.data.reading import BadImageError, Reading, check_pixels
from fastmae.facts import ReadAs

FOLDER_CHANNELS = (1, 3, 4)
_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_SCALED_TO_16_BITS = ("PNG", "PPM", "JPEG2000")
"""Formats of which Pillow's modes I and I;16 hold 16 bits, to which it scales fewer. In a TIFF it scales nothing."""
_DAMAGED_PIXELS = ("premature end", "bad Huffman code", "instead of RST", "Inconsistent progression")
"""What libjpeg says of a JPEG that is cut or damaged in its pixels. Of other complaints Pillow is the judge."""

_UNREAD = {
    "EPS": "PostScript, which is not read",  # a program, which Pillow would run in an interpreter
    "FITS": "FITS, whose numbers have no fixed range; scale them to 0–255 and store PNG or TIFF",
}


def decode(data: bytes | np.ndarray, reading: Reading) -> np.ndarray:
    """Decodes the bytes of an image file, or converts pixels uint8 [H, W, c], to pixels uint8 [H, W, in_chans].

    Raises:
        BadImageError: bytes that are truncated or no image, too many pixels, or channels or values without a rule.
    """
    in_chans = reading.in_chans
    if isinstance(data, np.ndarray):
        return convert_channels(data, in_chans)
    with _bad_images(data):
        if data[:3] == JPEG_START and in_chans in (1, 3):
            pixels = _decode_jpeg(data)
            if pixels is not None:
                return convert_channels(pixels, in_chans)
        native = native_pixels(data, reading.read_as)
        if native is not None:
            return convert_channels(native, in_chans)
        with _opened(data, in_chans) as (image, stored_bits):
            return _pixels_of(image, stored_bits, in_chans)


def native_pixels(data: bytes, read_as: ReadAs) -> np.ndarray | None:
    """Returns the pixels [H, W, C] of an image file as it stores them, in their own type; nothing is lost.

    One line a format, the first that knows the file. None is a file that Pillow reads as it is stored, in 8 bits.

    Raises:
        BadImageError: nothing that can be used, or only in another way than ``read_as`` says.
    """
    return None


def refuse_by_header(data: bytes, reading: Reading) -> None:
    """Refuses an image file as ``decode`` does, as far as its header shows it; damage of the pixels is not noticed.

    Raises:
        BadImageError: the bytes are no image, or one without a rule.
    """
    with _bad_images(data):
        if data[:3] != JPEG_START or plain_jpeg_shape(data, reading) is None:
            with _opened(data, reading.in_chans):
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
    """Returns (height, width) of a plain JPEG, and None for every other file. It reads no pixels.

    Plain means gray or YCbCr, which any JPEG decoder takes, with the marker of its end. A truncated file has no such
    marker; it is left to ``decode``, which tells whether it is usable.

    Raises:
        BadImageError: too many pixels.
    """
    if (
        isinstance(data, np.ndarray)
        or reading.in_chans not in (1, 3)
        or data[:3] != JPEG_START
        or data[-2:] != b"\xff\xd9"
    ):
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
def _opened(data: bytes, in_chans: int) -> Iterator[tuple[Image.Image, int]]:
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
        if in_chans not in _PIL_MODES:
            raise BadImageError(f"an image file gives 1, 3 or 4 channels, not {in_chans}")
        if in_chans == 4:
            _require_fourth_band(image, tags)
        image.info.pop("xmp", None)  # Pillow would turn a TIFF by it
        yield image, 16 if is_scaled or tags is None else tiff.stored_bits(tags)


def _pixels_of(image: Image.Image, stored_bits: int, in_chans: int) -> np.ndarray:
    """Returns the pixels of an opened image as uint8 [H, W, in_chans]."""
    if image.mode.startswith("I"):  # more than 8 bits per pixel, which Pillow itself would clip at 255
        upper = np.asarray(image).astype(np.int64) >> (stored_bits - 8)
        return convert_channels(upper.clip(0, 255).astype(np.uint8)[..., None], in_chans)
    if in_chans != 4:
        image.info.pop("transparency", None)  # dropped anyway, and Pillow would warn about palettes
    # Pillow converts gray that was multiplied by its alpha to nothing else.
    plain = image.convert("LA") if image.mode == "La" else image
    pixels = np.asarray(plain.convert(_PIL_MODES[in_chans]))
    return pixels[..., None] if in_chans == 1 else pixels


def _require_fourth_band(image: Image.Image, tags: tiff.Tags | None) -> None:
    """Refuses an image without alpha and without a fourth band where 4 channels are asked for: none is made up."""
    bands = len(image.getbands()) if tags is None else tags.bands
    has_alpha = image.has_transparency_data and not image.mode.startswith("I")
    if not has_alpha or (tags is not None and tags.unspecified and bands != 4):
        count = f"{bands} band{'s' if bands > 1 else ''}" if image.mode != "CMYK" else "CMYK without alpha"
        raise BadImageError(
            f"{count}, in_chans 4 asks for 4; set in_chans to 1 or 3, or give images with a fourth band"
        )


def convert_channels(pixels: np.ndarray, in_chans: int) -> np.ndarray:
    """Returns pixels uint8 [H, W, c] with ``in_chans`` channels, by the rule at the top of this file.

    Raises:
        BadImageError: no rule turns these channels into ``in_chans``.
    """
    channels = pixels.shape[2]
    if channels == in_chans:
        return pixels
    if channels in (2, 4):  # gray or colour with alpha
        return convert_channels(pixels[..., : channels - 1], in_chans)
    if channels == 1:
        return np.repeat(pixels, in_chans, axis=2)
    if channels == 3 and in_chans == 1:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[..., None]
    raise BadImageError(f"no rule turns {channels} channels into {in_chans}; set in_chans to {channels}")


def crop_and_resize(pixels: np.ndarray, box: Box, flip: bool, size: tuple[int, int]) -> np.ndarray:
    """Returns the region ``box`` of pixels uint8 [H, W, C] at ``size`` (h, w), mirrored or not: uint8 [h, w, C].

    It equals Pillow's ``crop(box).resize(size, BICUBIC)``, which the official code uses, within 2 grey levels. It is
    antialiased, and the filter reads nothing outside the box. No channel is taken for alpha.
    """
    region = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    if (box.height, box.width) != size:
        region = _resize(region, size)
    if flip:  # by torch, because NumPy copies a reversed axis byte by byte
        region = torch.from_numpy(np.require(region, requirements=("C", "W"))).flip(1).numpy()
    return region


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes by torch in uint8, which is several times as fast as Pillow.

    Both resize one axis after the other with 8 bits in between. Noise clips there, so on noise the order of the axes
    changes results by dozens of levels. torch resizes the width first; where Pillow (13) starts with the height, so
    does this function, in two calls.
    """
    height, width, channels = pixels.shape
    if channels != 3:  # plane by plane, as torch errs on 5 channels of a width of 1
        planes = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[:, None]
    else:
        # The batch axis comes first, or torch does not see that channels are last and returns them plane by plane.
        planes = torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2)
    if height - size[0] > max(0, 2 * (width - size[1])):
        planes = _interpolate(planes, (size[0], width))
    planes = _interpolate(planes, size)
    return (planes[0].permute(1, 2, 0) if channels == 3 else planes[:, 0].permute(1, 2, 0)).numpy()


def _interpolate(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(planes, size=size, mode="bicubic", antialias=True, align_corners=False)
