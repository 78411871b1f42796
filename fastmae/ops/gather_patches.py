"""gather_patches: the chosen patches of an image, normalised and cast as they are read; no float image is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastmae.ops import cpu
from fastmae.ops.backends import ops_backend
from fastmae.ops.checks import (
    check_channels,
    check_devices,
    check_floating,
    check_ids,
    check_images,
    check_range,
    grid_patches,
)


def gather_patches(
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Cuts out the patches ``ids`` of every image and normalises them as ``(x − mean) / std``.

    Args:
        images: uint8 (divided by 255 first) or floating (taken as they are) [N, H, W, C], any strides. For images that
            are already normalised, mean is 0 and std is 1.
        ids: int32 or int64 [N, K], patch numbers in row-major order of the grid.
        patch_size: (ph, pw) in pixels; H and W must be multiples.
        mean, std: floating [C], in units of [0, 1].
        dtype: the dtype of the result; the arithmetic is float32, or float64 if ``dtype`` is.

    Returns:
        [N, K, P] with P = ph·pw·C in (row, column, channel) order. No gradient flows to the images. Equivalent to
        ``gather_patches_reference``.

    Raises:
        ValueError: a dtype, shape or device is wrong, or an id is outside the grid (on a GPU ids are checked only with
            ``check_ids``).
    """
    check_images(images, patch_size)
    check_ids("ids", ids, images.shape[0])
    check_channels(images.shape[3], mean, std)
    check_floating("dtype", dtype)
    check_devices(images=images, ids=ids, mean=mean, std=std)
    return _gather_patches(images, ids, patch_size, mean, std, dtype)


def gather_patches_reference(
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Defines the op in PyTorch: a strided view of all patches, indexed, then normalised."""
    ph, pw = patch_size
    patches = images.unfold(1, ph, ph).unfold(2, pw, pw)  # [N, gh, gw, C, ph, pw], a view
    gw = patches.shape[2]
    rows = torch.arange(images.shape[0], device=images.device)[:, None]
    chosen = patches[rows, ids.long() // gw, ids.long() % gw].permute(0, 1, 3, 4, 2)  # [N, K, ph, pw, C]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    pixels = chosen.to(compute) / 255 if images.dtype == torch.uint8 else chosen.to(compute)
    return ((pixels - mean.to(compute)) / std.to(compute)).flatten(2).to(dtype)


@torch.library.custom_op("fastmae::gather_patches", mutates_args=())
def _gather_patches(
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    arguments = images, ids, patch_size, mean, std, dtype
    backend = ops_backend(images.device, images.dtype, dtype)
    if backend == "cpu":  # the extension checks the ids
        return cpu.gather_patches(*arguments)
    check_range("ids", ids, grid_patches(images, patch_size))
    if backend == "reference":
        return gather_patches_reference(*arguments)
    from fastmae.kernels.gather_patches import gather_patches_triton

    return gather_patches_triton(*arguments)


@_gather_patches.register_fake
def _(
    images: torch.Tensor, ids: torch.Tensor, patch_size: Sequence[int], mean: object, std: object, dtype: torch.dtype
) -> torch.Tensor:
    return images.new_empty(*ids.shape, patch_size[0] * patch_size[1] * images.shape[3], dtype=dtype)
