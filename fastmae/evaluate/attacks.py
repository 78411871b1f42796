"""Attacks on classifiers: changes of pixels, within ±radius each, that raise the loss along its gradient.

FGSM is Goodfellow et al. 2014 (arXiv 1412.6572), PGD Madry et al. 2017 (arXiv 1706.06083). Pixels are float32
[n, C, H, W] in [0, 1] and stay there; they are not rounded to 8 bits. The gradient flows through normalised floats, as
the kernels that normalise pixels have none to images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastmae.errors import UserError
from fastmae.philox import STREAM_ATTACK, uniforms_numpy

STEPS = 20
STRIDE = 2.5
"""The steps of PGD together are so many radii long, so that it can cross the ball."""
Logits = Callable[[torch.Tensor], torch.Tensor]


def on_pixels(model: Any, logits_of: Logits) -> Logits:
    """Returns what computes logits of pixels in [0, 1] for a function of images as a model takes them, normalised."""
    mean, std = (value.view(-1, 1, 1) for value in (model.mean, model.std))
    return lambda pixels: logits_of((pixels - mean) / std)


def fgsm(logits_of: Logits, pixels: torch.Tensor, labels: torch.Tensor, radius: float) -> torch.Tensor:
    """Takes one step of length ``radius`` along the sign of the gradient of each image's cross-entropy."""
    return within(pixels + radius * _slope(logits_of, pixels, labels)[0].sign(), pixels, radius)


def pgd(
    logits_of: Logits,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    radius: float,
    *,
    seed: int = 0,
    ids: np.ndarray,
    steps: int = STEPS,
) -> torch.Tensor:
    """Takes ``steps`` such steps of length 2.5 · radius / steps from a random place, each back into the ball.

    Returns the place of each image with the largest loss among those that were visited, and that of FGSM.

    Args:
        seed, ids: from which the place where image ``ids[i]`` begins follows.
    """
    draws = uniforms_numpy(seed, STREAM_ATTACK, ids, pixels[0].numel()).astype(np.float32).reshape(pixels.shape)
    start = pixels + radius * (2 * torch.from_numpy(draws).to(pixels.device) - 1)
    here, best = within(start, pixels, radius), fgsm(logits_of, pixels, labels, radius)
    worst = _slope(logits_of, best, labels)[1]
    for step in range(steps + 1):
        slope, losses = _slope(logits_of, here, labels)
        is_worse = losses > worst
        best = torch.where(is_worse.view(-1, 1, 1, 1), here, best)
        worst = torch.maximum(losses, worst)
        if step < steps:
            here = within(here + STRIDE * radius / steps * slope.sign(), pixels, radius)
    return best


def within(changed: torch.Tensor, pixels: torch.Tensor, radius: float) -> torch.Tensor:
    """Moves changed pixels back into the ball around the pixels, and into [0, 1]."""
    return torch.maximum(torch.minimum(changed, pixels + radius), pixels - radius).clamp(0, 1)


def _slope(logits_of: Logits, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradient of the loss to each image, and the losses [n].

    Raises:
        UserError: no gradient comes to the images.
    """
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_()
        losses = F.cross_entropy(logits_of(pixels).float(), labels, reduction="none")
        try:
            (slope,) = torch.autograd.grad(losses.sum(), pixels)
        except RuntimeError as error:
            raise UserError(f"the model gives no gradient to its images, so it cannot be attacked ({error})") from error
    return slope, losses.detach()
