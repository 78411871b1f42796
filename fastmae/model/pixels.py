"""What the models take as images: uint8 pixels, or floats that are normalised; what looks like neither is told."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import nn

FAR_FROM_ZERO, LARGE = 100.0, 8.0
"""Normalised pixels are not so far from zero, nor so large without any below zero."""


def check_images(model: nn.Module, images: torch.Tensor) -> None:
    """Warns, once for a model, of float images that look as if they were not normalised, such as those in 0–255.

    Only the first float images that a model is given are looked at, which is the one time that a GPU is waited for.
    Nothing is looked at while a graph is traced or captured.

    Raises:
        TypeError: images of whole numbers other than uint8.
    """
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 [N, H, W, C], or float [N, C, H, W], normalised, not {images.dtype}")
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
