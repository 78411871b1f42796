"""scatter_patches: puts patches back onto an image, the inverse of gather_patches; it is used for pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastmae.ops import cpu
from fastmae.ops.backends import asked_backends, ops_backend
from fastmae.ops.checks import check_channels, check_devices, check_floating, check_ids, check_range, check_sizes


def scatter_patches(
    patches: torch.Tensor,
    ids: torch.Tensor,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Places patches on an otherwise zero image and undoes the normalisation as ``x · std + mean``.

    Args:
        patches: floating [N, M, P], P = ph·pw·C in (row, column, channel) order.
        ids: int32 or int64 [N, M], distinct within a row.
        grid_size: (gh, gw) in patches.
        patch_size: (ph, pw) in pixels.
        mean, std: floating [C], in units of [0, 1].
        dtype: uint8 (multiplied by 255, clamped, rounded half to even; NaN gives 0) or floating.

    Returns:
        images [N, gh·ph, gw·pw, C]; pixels of patches that are not listed are 0. No gradient flows back. Equivalent
        to ``scatter_patches_reference``.

    Raises:
        ValueError: a dtype, shape or device is wrong, or an id is outside the grid or twice in a row (on a GPU ids are
            checked only with ``check_ids``).
    """
    if patches.ndim != 3:
        raise ValueError(f"patches must have shape [N, M, P], got {list(patches.shape)}")
    check_floating("patches", patches.dtype)
    if dtype != torch.uint8:
        check_floating("dtype", dtype)
    check_sizes("grid_size", grid_size)
    check_sizes("patch_size", patch_size)
    check_ids("ids", ids, patches.shape[0])
    area = patch_size[0] * patch_size[1]
    if ids.shape[1] != patches.shape[1] or patches.shape[2] == 0 or patches.shape[2] % area:
        raise ValueError(
            f"patches {list(patches.shape)} do not fit ids {list(ids.shape)} and {patch_size[0]}×{patch_size[1]} pixels"
        )
    check_channels(patches.shape[2] // area, mean, std)
    check_devices(patches=patches, ids=ids, mean=mean, std=std)
    return _scatter_patches(patches, ids, grid_size, patch_size, mean, std, dtype)


def scatter_patches_reference(
    patches: torch.Tensor,
    ids: torch.Tensor,
    grid_size: Sequence[int],
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Defines the op in PyTorch."""
    (gh, gw), (ph, pw) = grid_size, patch_size
    N, M, P = patches.shape
    C = P // (ph * pw)
    compute = torch.float64 if patches.dtype == torch.float64 else torch.float32
    pixels = patches.to(compute).view(N, M, ph, pw, C) * std.to(compute) + mean.to(compute)
    if dtype == torch.uint8:
        pixels = (pixels * 255).clamp(0, 255).round().nan_to_num(0)
    grid = torch.zeros(N, gh * gw, ph, pw, C, dtype=dtype, device=patches.device)
    rows = torch.arange(N, device=patches.device)[:, None]
    grid[rows, ids.long()] = pixels.to(dtype)
    return grid.view(N, gh, gw, ph, pw, C).permute(0, 1, 3, 2, 4, 5).reshape(N, gh * ph, gw * pw, C)


@torch.library.custom_op("fastmae::scatter_patches", mutates_args=())
def _scatter_patches(
    patches: torch.Tensor,
    ids: torch.Tensor,
    grid_size: Sequence[int],
    patch_size: Sequence[int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    arguments = patches, ids, grid_size, patch_size, mean, std, dtype
    backend = ops_backend(patches.device, patches.dtype, dtype)
    if backend == "cpu":  # the extension checks the ids
        return cpu.scatter_patches(*arguments)
    check_range("ids", ids, grid_size[0] * grid_size[1])
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
) -> torch.Tensor:
    (gh, gw), (ph, pw) = grid_size, patch_size
    return patches.new_empty(patches.shape[0], gh * ph, gw * pw, mean.shape[0], dtype=dtype)


def _check_distinct(ids: torch.Tensor) -> None:
    """Refuses ids that are twice in a row; on a GPU only with ``check_ids``."""
    if ids.device.type == "cpu" or asked_backends().check_ids:
        ordered = ids.sort(dim=1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise ValueError("ids must be distinct within a row: no patch has two contents")
