"""What every op asks of its arguments, so that a wrong one is named before anything is computed."""

from __future__ import annotations

import torch


def check_ids(name: str, ids: torch.Tensor, rows: int) -> None:
    """``ids`` must be an integer matrix with ``rows`` rows."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {ids.dtype}")
    if ids.ndim != 2 or ids.shape[0] != rows:
        raise ValueError(f"{name} must have shape [{rows}, …], got {list(ids.shape)}")


def check_range(name: str, ids: torch.Tensor, limit: int) -> None:
    """Every id must be in [0, limit). Only looked at on the CPU, on a GPU the look would stall the step; and not while
    torch.compile traces, when there are no values to look at."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= limit):
        raise IndexError(f"{name} must lie in [0, {limit}), got {int(ids.min())} … {int(ids.max())}")


def check_images(images: torch.Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """``images`` must be uint8 or floating [N, H, W, C] with sides that are multiples of the patch; gives (gh, gw)."""
    if images.ndim != 4:
        raise ValueError(f"images must have shape [N, H, W, C], got {list(images.shape)}")
    if images.dtype != torch.uint8 and not images.dtype.is_floating_point:
        raise TypeError(f"images must be uint8 or floating point, got {images.dtype}")
    (height, width), (ph, pw) = images.shape[1:3], patch_size
    if min(ph, pw) < 1 or height % ph or width % pw:
        raise ValueError(f"images of {height}×{width} pixels do not divide into patches of {ph}×{pw}")
    return height // ph, width // pw


def check_channels(channels: int, mean: torch.Tensor, std: torch.Tensor) -> None:
    """``mean`` and ``std`` must hold one number a channel."""
    for name, value in (("mean", mean), ("std", std)):
        if value.shape != (channels,):
            raise ValueError(f"{name} must have shape [{channels}], one number a channel, got {list(value.shape)}")
