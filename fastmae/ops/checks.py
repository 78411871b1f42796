"""Checks of the arguments of all ops: a ValueError names a wrong one before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastmae.ops.backends import asked_backends


def check_ids(name: str, ids: torch.Tensor, rows: int) -> None:
    """Refuses ``ids`` that are not an integer matrix with ``rows`` rows."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {ids.dtype}")
    if ids.ndim != 2 or ids.shape[0] != rows:
        raise ValueError(f"{name} must have shape [{rows}, …], got {list(ids.shape)}")
    if ids.shape[1] == 0:
        raise ValueError(f"{name} must name at least one patch per image, got shape {list(ids.shape)}")


def check_range(name: str, ids: torch.Tensor, limit: int) -> None:
    """Refuses ids outside [0, limit). On a GPU this would stall the step, so it is done only with ``check_ids``."""
    if ids.numel() and (ids.device.type == "cpu" or asked_backends().check_ids):
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} must lie in [0, {limit}), got {low} … {high}")


def check_images(images: torch.Tensor, patch_size: tuple[int, int]) -> None:
    """Refuses ``images`` that are not uint8 or floating [N, H, W, C] with sides that are multiples of the patch."""
    if images.ndim != 4:
        raise ValueError(f"images must have shape [N, H, W, C], got {list(images.shape)}")
    if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
    check_sizes("patch_size", patch_size)
    (height, width), (ph, pw) = images.shape[1:3], patch_size
    if min(height, width) < 1 or height % ph or width % pw:
        raise ValueError(f"images of {height}×{width} pixels do not divide into patches of {ph}×{pw}")


def grid_patches(images: torch.Tensor, patch_size: Sequence[int]) -> int:
    """Returns L, the number of patches of images [N, H, W, C]."""
    return (images.shape[1] // patch_size[0]) * (images.shape[2] // patch_size[1])


def check_sizes(name: str, sizes: Sequence[int]) -> None:
    """Refuses ``sizes`` that are not two positive numbers."""
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"{name} must be two positive numbers, got {tuple(sizes)}")


def check_channels(channels: int, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Refuses ``mean`` and ``std`` that do not hold one floating number per channel."""
    for name, value in (("mean", mean), ("std", std)):
        if value.shape != (channels,):
            raise ValueError(f"{name} must have shape [{channels}], one number per channel, got {list(value.shape)}")
        check_floating(name, value.dtype)


def check_floating(name: str, dtype: torch.dtype) -> None:
    """Refuses a ``dtype`` that is not floating point."""
    if not dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {dtype}")


def check_devices(**tensors: torch.Tensor) -> None:
    """Refuses tensors that are not on the device of the first."""
    (first, tensor), *others = tensors.items()
    for name, other in others:
        if other.device != tensor.device:
            raise ValueError(f"{name} must be on the device of {first}, {tensor.device}, got {other.device}")
