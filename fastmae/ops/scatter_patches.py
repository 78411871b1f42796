"""scatter_patches: patches back onto an image, the inverse of gather_patches; for pictures."""

from __future__ import annotations

import torch

from fastmae.ops.checks import check_channels, check_ids, check_range


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
        dtype: uint8 (multiplied by 255, rounded, clamped) or floating.

    Returns:
        images [N, gh·ph, gw·pw, C]; pixels of patches that are not listed are 0. Equivalent to
        ``scatter_patches_reference``.

    Raises:
        TypeError, ValueError: a wrong dtype or shape. IndexError: an id outside the grid (looked at on the CPU only).
    """
    if patches.ndim != 3 or not patches.dtype.is_floating_point:
        raise ValueError(f"patches must be floating [N, M, P], got {patches.dtype} {list(patches.shape)}")
    if dtype != torch.uint8 and not dtype.is_floating_point:
        raise TypeError(f"dtype must be uint8 or floating point, got {dtype}")
    check_ids("ids", ids, patches.shape[0])
    check_range("ids", ids, grid_size[0] * grid_size[1])
    area = patch_size[0] * patch_size[1]
    if ids.shape[1] != patches.shape[1] or patches.shape[2] % area:
        raise ValueError(
            f"patches {list(patches.shape)} do not fit ids {list(ids.shape)} and {patch_size[0]}×{patch_size[1]} pixels"
        )
    check_channels(patches.shape[2] // area, mean, std)
    return scatter_patches_reference(patches, ids, grid_size, patch_size, mean, std, dtype)


def scatter_patches_reference(
    patches: torch.Tensor,
    ids: torch.Tensor,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The definition, in PyTorch."""
    (gh, gw), (ph, pw) = grid_size, patch_size
    N, M, P = patches.shape
    C = P // (ph * pw)
    compute = torch.float64 if patches.dtype == torch.float64 else torch.float32
    pixels = patches.to(compute).view(N, M, ph, pw, C) * std.to(compute) + mean.to(compute)
    if dtype == torch.uint8:
        pixels = (pixels * 255).round().clamp(0, 255)
    grid = torch.zeros(N, gh * gw, ph, pw, C, dtype=dtype, device=patches.device)
    rows = torch.arange(N, device=patches.device)[:, None]
    grid[rows, ids.long()] = pixels.to(dtype)
    return grid.view(N, gh, gw, ph, pw, C).permute(0, 1, 3, 2, 4, 5).reshape(N, gh * ph, gw * pw, C)
