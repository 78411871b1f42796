"""What the models take as images: pixels as they were read, or normalised floats; what looks like neither is told.

The functions take any model with ``img_size``, ``other_sizes``, ``in_chans`` and what ``register_pixels`` gives it.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fastmae.facts import PixelFacts
from fastmae.ops.gather_patches import missing_patches, missing_pixels, range_of

FAR_FROM_ZERO, LARGE = 100.0, 8.0
"""Normalised pixels are not so far from zero, nor so large without any below zero."""
DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}
"""The dtype of a batch of images, by ``PixelFacts.dtype``."""


class Pixels(NamedTuple):
    """Images of a batch and what normalises them: what ``gather_patches`` and ``masked_mse`` take."""

    images: torch.Tensor
    """[N, H, W, C], any strides."""
    mean: torch.Tensor
    std: torch.Tensor
    value_range: torch.Tensor | None
    nodata: float | None


def register_pixels(
    model: nn.Module, in_chans: int, mean: Sequence[float], std: Sequence[float], pixels: PixelFacts
) -> None:
    """Gives a model what normalises images, as buffers outside its state dict, whose keys are the official ones.

    Raises:
        ValueError: there is not one number for each channel, a std is not positive, or a low is not below its high.
    """
    low = pixels.low or (0.0,) * in_chans
    high = pixels.high or (range_of(DTYPES[pixels.dtype], None, torch.float32)[1],) * in_chans
    for name, values in (("mean", mean), ("std", std), ("low", low), ("high", high)):
        if len(values) != in_chans:
            raise ValueError(f"{name} needs {in_chans} numbers, one per channel, got {len(values)}")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {list(std)}")
    with np.errstate(over="ignore"):
        ends = np.array([low, high], dtype=np.float32).T.tolist()  # as pixels are compared with them
    for one, other in ends:
        if not (one < other and math.isfinite(other - one)):
            raise ValueError(f"low must be below high, both finite float32 numbers, got {one:g} and {other:g}")
    numbers = {"mean": mean, "std": std, "_zeros": (0.0,) * in_chans, "_ones": (1.0,) * in_chans}
    for name, values in numbers.items():
        model.register_buffer(name, torch.tensor(list(values), dtype=torch.float32), persistent=False)
    value_range = torch.tensor([low, high], dtype=torch.float32) if pixels.low or pixels.high else None
    bits = None if value_range is None else value_range.view(torch.int32)
    model.register_buffer("_range_bits", bits, persistent=False)
    model.pixels = pixels  # type: ignore[assignment]


def value_range_of(model: Any) -> torch.Tensor | None:
    """Returns low and high of each channel, float32 [2, C], or None for those of the dtype: the ops' ``value_range``.

    A model keeps their bits, so that casting it to a narrow type does not move them.
    """
    return None if model._range_bits is None else model._range_bits.view(torch.float32)


def nodata_of(pixels: PixelFacts) -> float | None:
    """Returns the ``nodata`` of the ops: NaN, which finds NaN alone, for float pixels without another value."""
    return math.nan if pixels.nodata is None and pixels.dtype == "float32" else pixels.nodata


def range_ends(model: Any, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the low and the high end [C] of the value range of each channel."""
    ends = range_of(DTYPES[model.pixels.dtype], model.value_range, dtype)
    low, high = (torch.as_tensor(end, dtype=dtype).expand(model.in_chans) for end in ends)
    return low, high


def is_raw(model: Any, images: torch.Tensor) -> bool:
    """Tells whether images are pixels [N, H, W, C] as they were read, and not normalised floats [N, C, H, W].

    Raises:
        ValueError: floats of a shape that may be either.
    """
    if not images.is_floating_point():
        return True
    if model.pixels.dtype != "float32":
        return False
    sizes, C, shape = (model.img_size, *model.other_sizes), model.in_chans, tuple(images.shape[1:])
    raw = shape in [(*size, C) for size in sizes]
    if raw and shape in [(C, *size) for size in sizes]:
        raise ValueError(
            f"images {list(images.shape)} may be pixels [N, H, W, C] or normalised [N, C, H, W]; choose another size"
        )
    return raw


def size_of(model: Any, images: torch.Tensor) -> Any:
    """Returns the (height, width) of images of either form."""
    return tuple(images.shape[1:3] if is_raw(model, images) else images.shape[2:])


def pixels_of(model: Any, images: torch.Tensor) -> Pixels:
    """Returns images of either form with what normalises them. NaN of float pixels is always missing.

    Raises:
        ValueError: images of another size or number of channels.
        TypeError: images of another dtype than the model's pixels.
    """
    if not images.is_floating_point() and images.dtype != DTYPES[model.pixels.dtype]:
        raise TypeError(
            f"images must be {model.pixels.dtype} [N, H, W, C], or float [N, C, H, W], normalised, not {images.dtype}"
        )
    raw = is_raw(model, images)
    size = size_of(model, images) if size_of(model, images) in model.other_sizes else model.img_size
    shape = (*size, model.in_chans) if raw else (model.in_chans, *size)
    if images.ndim != 4 or images.shape[1:] != shape:
        form = f"{model.pixels.dtype} images [N, H, W, C]" if raw else "float images [N, C, H, W]"
        raise ValueError(f"{form} must have shape [N, {', '.join(map(str, shape))}], got {list(images.shape)}")
    if not raw:
        check_images(model, images)
        return Pixels(images.permute(0, 2, 3, 1), model._zeros, model._ones, None, None)
    return Pixels(images, model.mean, model.std, model.value_range, nodata_of(model.pixels))


def normalised(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Returns images of either form as float [N, C, H, W], normalised; missing pixels are 0."""
    if not is_raw(model, images):
        return images
    _, mean, std, value_range, nodata = pixels_of(model, images)
    compute = images.dtype if images.is_floating_point() else torch.float32
    low, high = range_of(images.dtype, value_range, compute)
    floats = ((images.to(compute) - low) / (high - low) - mean) / std
    if nodata is not None:
        floats = floats.masked_fill(missing_pixels(images, nodata), 0)
    return floats.permute(0, 3, 1, 2)


def without_missing(model: Any, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns ``mask`` [N, L] with 0 at the patches of images, of either form, that have a missing pixel."""
    nodata = nodata_of(model.pixels)
    if nodata is None or not is_raw(model, images):
        return mask
    return mask.masked_fill(missing_patches(images, model.patch_size, nodata), 0)


def check_images(model: nn.Module, images: torch.Tensor) -> None:
    """Warns, once for a model, of float images that look as if they were not normalised, such as those in 0–255.

    Only the first float images that a model is given are looked at, which is the one time that a GPU is waited for.
    Nothing is looked at while a graph is traced or captured.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or getattr(model, "_has_checked_images", False):
        return
    if images.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    with contextlib.suppress(RuntimeError, NotImplementedError):  # of tensors without values: fake, meta, under vmap
        pixels = images.detach()
        low, high = (end.item() for end in pixels.aminmax())
        is_whole = bool((pixels == pixels.round()).all())
        model._has_checked_images = True  # type: ignore[assignment]
        if max(-low, high) > FAR_FROM_ZERO or (low >= 0 and (high > LARGE or (is_whole and high > 1))):
            warnings.warn(
                f"float images are taken as they are, and these, from {low:g} to {high:g}, do not look normalised; "
                "give (pixels / 255 - mean) / std, or uint8 [N, H, W, C]",
                stacklevel=2,
            )
