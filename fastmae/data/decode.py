"""From bytes to pixels: decode, convert channels, crop, antialiased bicubic resize and flip one image, all in uint8.

This is what the thread decoder runs, one image per thread, and what decides which images are usable. It knows nothing
of batches; fastmae/data/decoders has those.

Channels follow Pillow's ``convert``: colour becomes gray by ITU-R 601 luma, gray is repeated, alpha is dropped. 16-bit
images keep their high byte, floating-point and 32-bit ones are refused for want of a range, of animations the first
frame counts, and EXIF rotation is not applied, as published.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from fastmae.data.plan import Box

# Above this an image is refused unread: a few hundred bytes can claim gigabytes ("decompression bomb").
MAX_PIXELS = 178_956_970
FOLDER_CHANNELS = (1, 3, 4)
_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_SCALED_TO_16_BITS = ("PNG", "PPM")
"""Formats of which Pillow's mode I, 32 bits wide, holds no more than 16. In a TIFF it may hold anything."""


class BadImageError(ValueError):
    """Bytes that are not a usable image; the message says why."""


def decode(data: bytes | np.ndarray, in_chans: int) -> np.ndarray:
    """Decodes the bytes of an image file, or converts pixels uint8 [H, W, c], to pixels uint8 [H, W, in_chans].

    Raises:
        BadImageError: bytes that are truncated or no image, too many pixels, or channels or values without a rule.
    """
    if isinstance(data, np.ndarray):
        return convert_channels(data, in_chans)
    try:
        if data[:3] == b"\xff\xd8\xff" and in_chans in (1, 3):
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_pixels(height, width)
            if colorspace.upper() == "GRAY":
                return convert_channels(simplejpeg.decode_jpeg(data, colorspace="GRAY"), in_chans)
            if colorspace.upper() not in ("CMYK", "YCCK"):
                return convert_channels(simplejpeg.decode_jpeg(data, colorspace="RGB"), in_chans)
        return _decode_pillow(data, in_chans)
    except (BadImageError, MemoryError):  # too little memory is no fault of the image
        raise
    except UnidentifiedImageError as error:
        raise BadImageError("no image format that Pillow knows") from error
    except (
        Exception
    ) as error:  # decoders raise all kinds of errors on broken bytes: ValueError, OSError, struct.error …
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def plain_jpeg_shape(data: bytes, in_chans: int) -> tuple[int, int] | None:
    """Returns (height, width) of a plain JPEG, and None for every other file. It reads no pixels.

    Plain means gray or YCbCr, which any JPEG decoder takes, with the marker of its end. A truncated file has no such
    marker; it is left to ``decode``, which tells whether it is usable.

    Raises:
        BadImageError: too many pixels.
    """
    if (
        isinstance(data, np.ndarray)
        or in_chans not in (1, 3)
        or data[:3] != b"\xff\xd8\xff"
        or data[-2:] != b"\xff\xd9"
    ):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace.upper() not in ("GRAY", "YCBCR"):
        return None
    _check_pixels(height, width)
    return height, width


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImageError(f"{width}×{height} pixels, over the limit of {MAX_PIXELS}")


def _decode_pillow(data: bytes, in_chans: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        _check_pixels(image.height, image.width)
        if image.format == "EPS":  # a program, which Pillow would run in an interpreter
            raise BadImageError("PostScript, which is not read")
        if image.mode == "F" or (image.mode == "I" and image.format not in _SCALED_TO_16_BITS):
            raise BadImageError(f"{image.format} pixels of mode {image.mode} have no fixed range; store 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow itself would clip at 255
            high_byte = np.asarray(image).astype(np.int64) >> 8
            return convert_channels(high_byte.clip(0, 255).astype(np.uint8)[..., None], in_chans)
        if in_chans not in _PIL_MODES:
            raise BadImageError(f"an image file gives 1, 3 or 4 channels, not {in_chans}")
        if in_chans != 4:
            image.info.pop("transparency", None)  # dropped anyway, and Pillow would warn about palettes
        pixels = np.asarray(image.convert(_PIL_MODES[in_chans]))
    return pixels[..., None] if in_chans == 1 else pixels


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
