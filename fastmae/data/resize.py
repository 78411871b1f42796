"""Crops, resizes and mirrors one image: uint8 as version 0.1 does, to the bit, uint16 and float32 in float32.

Both are antialiased bicubic filters of a = −0.5, those of Pillow. The second is in C++ (csrc/resize.cpp): torch takes
six times as long for it as for uint8.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from fastmae.data.convert import mark
from fastmae.data.plan import Box
from fastmae.ops import cpu


def crop_and_resize(
    pixels: np.ndarray, box: Box, flip: bool, size: tuple[int, int], nodata: float | None = None
) -> np.ndarray:
    """Returns the region ``box`` of pixels [H, W, C] at ``size`` (h, w), mirrored or not: [h, w, C] of their type.

    The filter reads nothing outside the box. No channel is taken for alpha. A region that has the size already is not
    changed. uint8 equals Pillow's ``crop(box).resize(size, BICUBIC)``, which the official code uses, within 2 grey
    levels. uint16 and float32 equal the same of Pillow's mode F within 1e-4 of the range; uint16 is rounded, and
    clamped to its range.

    Args:
        pixels: uint8, uint16 or float32.
        box: the region.
        flip: whether left becomes right.
        size: (height, width) of the result.
        nodata: the value of missing pixels; of float32 NaN is missing as well. Every pixel whose filter touches a
            missing one is missing, and has this value, or NaN without one. What the missing ones held changes nothing.
    """
    region = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    if (box.height, box.width) != size:
        if pixels.dtype != np.uint8 or nodata is not None:
            return _resize_wide(region, size, flip, nodata)
        region = _resize(region, size)
    if flip:  # by torch, because NumPy copies a reversed axis byte by byte
        region = np.require(region, requirements=("C", "W"))
        known = region.view(np.int16) if region.dtype == np.uint16 else region  # torch flips no uint16
        region = torch.from_numpy(known).flip(1).numpy().view(region.dtype)
    return region


def crop_beyond(
    pixels: np.ndarray, box: Box, flip: bool, size: tuple[int, int], nodata: float | None = None
) -> np.ndarray:
    """Returns what ``crop_and_resize`` does, of a box that may reach beyond the image: there it is the mean colour of
    what is inside, or missing where pixels can be."""
    height, width, channels = pixels.shape
    bottom, right = box.top + box.height, box.left + box.width
    if min(box.top, box.left) >= 0 and bottom <= height and right <= width:
        return crop_and_resize(pixels, box, flip, size, nodata)
    inside = pixels[max(box.top, 0) : bottom, max(box.left, 0) : right]
    mean = inside.mean(axis=(0, 1), dtype=np.float64) if nodata is None else nodata
    whole = np.empty((box.height, box.width, channels), pixels.dtype)
    whole[:] = mean if pixels.dtype == np.float32 else np.round(mean)
    top, left = max(-box.top, 0), max(-box.left, 0)
    whole[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return crop_and_resize(whole, Box(0, 0, box.height, box.width), flip, size, nodata)


def nearest(start: int, length: int, size: int) -> np.ndarray:
    """Returns which pixel of ``length`` from ``start`` on is in the middle of each of ``size`` places: int64 [size]."""
    return start + ((2 * np.arange(size) + 1) * length) // (2 * size)


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


def _resize_wide(region: np.ndarray, size: tuple[int, int], flip: bool, nodata: float | None) -> np.ndarray:
    """Resizes [h, w, C] of any of the three types in float32. Missing pixels are NaN on the way, which spreads."""
    has_gaps = region.strides[2] != region.itemsize or region.strides[1] != region.shape[2] * region.itemsize
    region = np.ascontiguousarray(region) if has_gaps or not region.flags.aligned else region
    if nodata is None:
        return cpu.resize(region, size, flip, None, region.dtype)
    resized = cpu.resize(region, size, flip, nodata, np.float32)
    missing = np.isnan(resized)
    if region.dtype != np.float32:
        whole = np.nan_to_num(resized, copy=False, nan=0.0).round()
        resized = whole.clip(0, np.iinfo(region.dtype).max).astype(region.dtype)
    return mark(resized, missing, nodata)


def _interpolate(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(planes, size=size, mode="bicubic", antialias=True, align_corners=False)
