"""gather_patches: the chosen patches of an image, normalised and cast as they are read; no float image is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastmae.ops import cpu
from fastmae.ops.backends import is_differentiable, ops_backend
from fastmae.ops.checks import (
    as_nodata,
    check_channels,
    check_devices,
    check_floating,
    check_ids,
    check_images,
    check_order,
    check_range,
    check_value_range,
    grid_patches,
)


def gather_patches(
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    value_range: torch.Tensor | None = None,
    nodata: float | None = None,
) -> torch.Tensor:
    """Cuts out the patches ``ids`` of every image and normalises them as ``((x − low) / (high − low) − mean) / std``.

    Args:
        images: uint8, uint16 or floating [N, H, W, C], any strides. For floating images that are already normalised,
            mean is 0 and std is 1.
        ids: int32 or int64 [N, K], patch numbers in row-major order of the grid.
        patch_size: (ph, pw) in pixels; H and W must be multiples.
        mean, std: floating [C], in units of the range.
        dtype: the dtype of the result; the arithmetic is float32, or float64 if ``dtype`` is.
        value_range: floating [2, C], low and high of each channel. None is 0 and 255 for uint8, 0 and 65535 for uint16,
            0 and 1 for floating images.
        nodata: pixels of this value, and NaN, are missing. It is compared in float32 (float64 if ``images`` are). With
            NaN only NaN is missing, with None no pixel is.

    Returns:
        [N, K, P] with P = ph·pw·C in (row, column, channel) order; a missing pixel is 0, which is the mean. Equivalent
        to ``gather_patches_reference``, which computes it for images that require a gradient.

    Raises:
        ValueError: a dtype, shape or device is wrong, an id is outside the grid, or a low is not below its high (on a
            GPU ids and ranges are checked only with ``check_ids``).
    """
    check_images(images, patch_size)
    check_ids("ids", ids, images.shape[0])
    check_channels(images.shape[3], mean, std)
    check_value_range(images.shape[3], value_range)
    nodata = as_nodata(nodata, images.dtype)
    check_floating("dtype", dtype)
    check_devices(images=images, ids=ids, mean=mean, std=std, value_range=value_range)
    if images.requires_grad or is_differentiable():
        check_range("ids", ids, grid_patches(images, patch_size))
        check_order(value_range)
        return gather_patches_reference(images, ids, patch_size, mean, std, dtype, value_range, nodata)
    return _gather_patches(images, ids, patch_size, mean, std, dtype, value_range, nodata)


def gather_patches_reference(
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    value_range: torch.Tensor | None = None,
    nodata: float | None = None,
) -> torch.Tensor:
    """Defines the op in PyTorch: a strided view of all patches, indexed, then normalised."""
    chosen = chosen_patches(images, ids, patch_size)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    low, high = range_of(images.dtype, value_range, compute)
    patches = ((chosen.to(compute) - low) / (high - low) - mean.to(compute)) / std.to(compute)
    if nodata is not None:
        patches = patches.masked_fill(missing_pixels(chosen, nodata), 0)
    return patches.flatten(2).to(dtype)


def chosen_patches(images: torch.Tensor, ids: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
    """Returns the pixels [N, K, ph, pw, C] of the patches ``ids``, as they are."""
    ph, pw = patch_size
    patches = images.unfold(1, ph, ph).unfold(2, pw, pw)  # [N, gh, gw, C, ph, pw], a view
    gw = patches.shape[2]
    rows = torch.arange(images.shape[0], device=images.device)[:, None]
    return patches[rows, ids.long() // gw, ids.long() % gw].permute(0, 1, 3, 4, 2)


def missing_pixels(pixels: torch.Tensor, nodata: float) -> torch.Tensor:
    """Tells which pixels are missing: those of the value ``nodata``, compared in float32 or float64, and NaN."""
    pixels = pixels.to(torch.float64 if pixels.dtype == torch.float64 else torch.float32)
    return (pixels == as_nodata(nodata, pixels.dtype)) | pixels.isnan()


def missing_patches(images: torch.Tensor, patch_size: Sequence[int], nodata: float) -> torch.Tensor:
    """Tells which patches [N, L] of images [N, H, W, C] have a missing pixel."""
    ph, pw = patch_size
    missing = missing_pixels(images, nodata).any(dim=3).unflatten(2, (-1, pw)).unflatten(1, (-1, ph))
    return missing.any(dim=4).any(dim=2).flatten(1)  # of [N, gh, ph, gw, pw]


def range_of(
    pixels: torch.dtype, value_range: torch.Tensor | None, compute: torch.dtype
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Returns low and high of pixels of a dtype: those of each channel, or by default those of the dtype."""
    if value_range is None:
        return 0.0, {torch.uint8: 255.0, torch.uint16: 65535.0}.get(pixels, 1.0)
    low, high = value_range.to(compute)
    return low, high


@torch.library.custom_op("fastmae::gather_patches", mutates_args=())
def _gather_patches(
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    value_range: torch.Tensor | None = None,
    nodata: float | None = None,
) -> torch.Tensor:
    arguments = images, ids, patch_size, mean, std, dtype, value_range, nodata
    backend = ops_backend(images.device, images.dtype, dtype)
    if backend == "cpu":  # the extension checks the ids and the range
        return cpu.gather_patches(*arguments)
    check_range("ids", ids, grid_patches(images, patch_size))
    check_order(value_range)
    if backend == "reference":
        return gather_patches_reference(*arguments)
    from fastmae.kernels.gather_patches import gather_patches_triton

    return gather_patches_triton(*arguments)


@_gather_patches.register_fake
def _(
    images: torch.Tensor, ids: torch.Tensor, patch_size: Sequence[int], mean: Any, std: Any, dtype: torch.dtype, *_: Any
) -> torch.Tensor:
    return images.new_empty(*ids.shape, patch_size[0] * patch_size[1] * images.shape[3], dtype=dtype)
