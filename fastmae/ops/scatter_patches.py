"""scatter_patches: puts patches back onto an image, the inverse of gather_patches; it is used for pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastmae.ops import cpu
from fastmae.ops.backends import is_differentiable, ops_backend
from fastmae.ops.checks import (
    check_channels,
    check_devices,
    check_floating,
    check_ids,
    check_order,
    check_pixels,
    check_range,
    check_sizes,
    check_value_range,
    unless_hidden,
    values_are_read,
)
from fastmae.ops.gather_patches import range_of


def scatter_patches(
    patches: torch.Tensor,
    ids: torch.Tensor,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    value_range: torch.Tensor | None = None,
) -> torch.Tensor:
    """Places patches on an otherwise zero image and undoes the normalisation of ``gather_patches``.

    A pixel is ``low + (x · std + mean) · (high − low)``.

    Args:
        patches: floating [N, M, P], P = ph·pw·C in (row, column, channel) order.
        ids: int32 or int64 [N, M], distinct within a row.
        grid_size: (gh, gw) in patches.
        patch_size: (ph, pw) in pixels.
        mean, std: floating [C], in units of the range.
        dtype: uint8 or uint16 (clamped, rounded half to even; NaN gives 0) or floating.
        value_range: floating [2, C], low and high of each channel. None is 0 and 255 for uint8, 0 and 65535 for uint16,
            0 and 1 for floating images.

    Returns:
        images [N, gh·ph, gw·pw, C]; pixels of patches that are not listed are 0. Equivalent to
        ``scatter_patches_reference``, which computes it for patches that require a gradient.

    Raises:
        ValueError: a dtype, shape or device is wrong, an id is outside the grid or twice in a row, or a low is not
            below its high (on a GPU ids and ranges are checked only with ``check_ids``).
    """
    if patches.ndim != 3:
        raise ValueError(f"patches must have shape [N, M, P], got {list(patches.shape)}")
    check_floating("patches", patches.dtype)
    check_pixels("dtype", dtype)
    check_sizes("grid_size", grid_size)
    check_sizes("patch_size", patch_size)
    check_ids("ids", ids, patches.shape[0])
    area = patch_size[0] * patch_size[1]
    if ids.shape[1] != patches.shape[1] or patches.shape[2] == 0 or patches.shape[2] % area:
        raise ValueError(
            f"patches {list(patches.shape)} do not fit ids {list(ids.shape)} and {patch_size[0]}×{patch_size[1]} pixels"
        )
    check_channels(patches.shape[2] // area, mean, std)
    check_value_range(patches.shape[2] // area, value_range)
    check_devices(patches=patches, ids=ids, mean=mean, std=std, value_range=value_range)
    if patches.requires_grad or is_differentiable():
        check_range("ids", ids, grid_size[0] * grid_size[1])
        check_order(value_range)
        _check_distinct(ids)
        return scatter_patches_reference(patches, ids, grid_size, patch_size, mean, std, dtype, value_range)
    return _scatter_patches(patches, ids, grid_size, patch_size, mean, std, dtype, value_range)


def scatter_patches_reference(
    patches: torch.Tensor,
    ids: torch.Tensor,
    grid_size: Sequence[int],
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    value_range: torch.Tensor | None = None,
) -> torch.Tensor:
    """Defines the op in PyTorch."""
    (gh, gw), (ph, pw) = grid_size, patch_size
    N, M, P = patches.shape
    C = P // (ph * pw)
    compute = torch.float64 if patches.dtype == torch.float64 else torch.float32
    low, high = range_of(dtype, value_range, compute)
    pixels = patches.to(compute).view(N, M, ph, pw, C) * std.to(compute) + mean.to(compute)
    pixels = pixels * (high - low) + low
    if not dtype.is_floating_point:
        pixels = pixels.clamp(0, torch.iinfo(dtype).max).round().nan_to_num(0)
    grid = torch.zeros(N, gh * gw, ph, pw, C, dtype=compute, device=patches.device)
    rows = torch.arange(N, device=patches.device)[:, None]
    grid[rows, ids.long()] = pixels
    return grid.to(dtype).view(N, gh, gw, ph, pw, C).permute(0, 1, 3, 2, 4, 5).reshape(N, gh * ph, gw * pw, C)


@torch.library.custom_op("fastmae::scatter_patches", mutates_args=())
def _scatter_patches(
    patches: torch.Tensor,
    ids: torch.Tensor,
    grid_size: Sequence[int],
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    value_range: torch.Tensor | None = None,
) -> torch.Tensor:
    arguments = patches, ids, grid_size, patch_size, mean, std, dtype, value_range
    backend = ops_backend(patches.device, patches.dtype, dtype)
    if backend == "cpu":  # the extension checks the ids and the range
        return cpu.scatter_patches(*arguments)
    check_range("ids", ids, grid_size[0] * grid_size[1])
    check_order(value_range)
    _check_distinct(ids)
    if backend == "reference":
        return scatter_patches_reference(*arguments)
    from fastmae.kernels.scatter_patches import scatter_patches_triton

    return scatter_patches_triton(*arguments)


@_scatter_patches.register_fake
def _(
    patches: torch.Tensor,
    ids: torch.Tensor,
    grid_size: Sequence[int],
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    value_range: torch.Tensor | None = None,
) -> torch.Tensor:
    (gh, gw), (ph, pw) = grid_size, patch_size
    return patches.new_empty(patches.shape[0], gh * ph, gw * pw, mean.shape[0], dtype=dtype)


def _check_distinct(ids: torch.Tensor) -> None:
    """Refuses ids that are twice in a row; on a GPU only with ``check_ids``."""
    if values_are_read(ids):
        ordered = ids.sort(dim=1).values
        with unless_hidden():
            if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                raise ValueError("ids must be distinct within a row: no patch has two contents")
