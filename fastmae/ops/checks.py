"""Checks of the arguments of all ops: a ValueError names a wrong one before anything is computed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch

from fastmae.ops.backends import asked_backends
from fastmae.torch_compat import is_transforming


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
    if ids.numel() and values_are_read(ids):
        with unless_hidden():
            low, high = (int(value) for value in ids.aminmax())
            if low < 0 or high >= limit:
                raise ValueError(f"{name} must lie in [0, {limit}), got {low} … {high}")


def values_are_read(tensor: torch.Tensor) -> bool:
    """Tells whether values are checked: always on a CPU, elsewhere if asked for; not in what torch.compile traces."""
    return (tensor.device.type == "cpu" or asked_backends().check_ids) and not torch.compiler.is_compiling()


def unless_hidden() -> contextlib.AbstractContextManager[None]:
    """Returns a region for checks of values, which ends quietly where torch.func.vmap hides them."""
    return contextlib.suppress(RuntimeError) if is_transforming() else contextlib.nullcontext()


def check_images(images: torch.Tensor, patch_size: tuple[int, int]) -> None:
    """Refuses ``images`` that are not uint8, uint16 or floating [N, H, W, C] with sides of whole patches."""
    if images.ndim != 4:
        raise ValueError(f"images must have shape [N, H, W, C], got {list(images.shape)}")
    check_pixels("images", images.dtype)
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


def check_pixels(name: str, dtype: torch.dtype) -> None:
    """Refuses a ``dtype`` that pixels cannot have."""
    if dtype not in (torch.uint8, torch.uint16) and not dtype.is_floating_point:
        raise ValueError(f"{name} must be uint8, uint16 or floating point, got {dtype}")


def check_value_range(channels: int, value_range: torch.Tensor | None) -> None:
    """Refuses a ``value_range`` that does not hold two floating numbers per channel; their order is checked later."""
    if value_range is None:
        return
    if value_range.shape != (2, channels):
        raise ValueError(
            f"value_range must have shape [2, {channels}], low and high of each channel, got {list(value_range.shape)}"
        )
    check_floating("value_range", value_range.dtype)


def check_order(value_range: torch.Tensor | None) -> None:
    """Refuses a range whose low is not below its high. On a GPU, as ``check_range``, only with ``check_ids``."""
    if value_range is None or not values_are_read(value_range):
        return
    with unless_hidden():
        for channel, (low, high) in enumerate(value_range.T.tolist()):
            if not (low < high and math.isfinite(high - low)):
                raise ValueError(
                    f"value_range must have low < high, both finite, got {low:g} and {high:g} of channel {channel}"
                )


def as_nodata(nodata: float | None, dtype: torch.dtype) -> float | None:
    """Returns the number with which pixels of a dtype are compared, in float32, in float64 if they are.

    What is beyond float32 is no pixel's value: then only NaN is missing.
    """
    if nodata is None or dtype == torch.float64 or not math.isfinite(nodata):
        return nodata
    return float(nodata) if abs(nodata) <= torch.finfo(torch.float32).max else math.nan


def check_floating(name: str, dtype: torch.dtype) -> None:
    """Refuses a ``dtype`` that is not floating point."""
    if not dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {dtype}")


def check_devices(**tensors: torch.Tensor | None) -> None:
    """Refuses tensors that are not on the device of the first; None is a tensor that was not given."""
    (first, tensor), *others = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    for name, other in others:
        if other.device != tensor.device:
            raise ValueError(f"{name} must be on the device of {first}, {tensor.device}, got {other.device}")
