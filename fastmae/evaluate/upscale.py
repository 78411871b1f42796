"""Enlarging pictures of any size with a model that has learnt it, how good that is, and what it looks like."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastmae.evaluate.inpaint import window_of
from fastmae.evaluate.pictures import as_rgb, grid_picture
from fastmae.evaluate.segment import shown_pixels, window_starts
from fastmae.facts import PixelFacts
from fastmae.model.pixels import DTYPES
from fastmae.model.upscaler import Upscaler, bicubic
from fastmae.ops.gather_patches import range_of

SSIM_SIGMA, SSIM_RADIUS = 1.5, 5
SSIM_K1, SSIM_K2 = 0.01, 0.03
"""The constants of Wang et al. 2004: a Gaussian window of 11 × 11 pixels."""


# --- how good it is ---------------------------------------------------------------------------------------------------


def psnr_of(found: torch.Tensor, images: torch.Tensor, peak: float) -> torch.Tensor:
    """Returns 10 · log10(peak² / mean squared error) of each image of [N, H, W, C], in dB, float64 [N]."""
    error = (found.double() - images.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(peak**2 / error.clamp_min(1e-12 * peak**2))


def ssim_of(found: torch.Tensor, images: torch.Tensor, peak: float) -> torch.Tensor:
    """Returns the structural similarity of each image of [N, H, W, C] (Wang et al. 2004), the mean over channels and
    over the pixels whose window lies inside: float64 [N]."""
    places = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, device=images.device, dtype=torch.float64)
    weights = torch.exp(-0.5 * (places / SSIM_SIGMA) ** 2)
    weights = (weights / weights.sum())[None, None]

    def mean(values: torch.Tensor) -> torch.Tensor:
        """Returns the mean of the window around each pixel, of [N · C, 1, H, W]."""
        return F.conv2d(F.conv2d(values, weights[:, :, None]), weights[..., None])

    x, y = (one.double().permute(0, 3, 1, 2).flatten(0, 1)[:, None] for one in (found, images))
    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * peak) ** 2, (SSIM_K2 * peak) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similar = similar / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return similar.reshape(len(images), -1).mean(dim=1)


def peak_of(pixels: PixelFacts) -> float:
    """Returns the height of the value range of pixels, the largest of their channels."""
    if pixels.low is None or pixels.high is None:
        return float(range_of(DTYPES[pixels.dtype], None, torch.float32)[1])
    return max(high - low for low, high in zip(pixels.low, pixels.high, strict=True))


# --- pictures of any size ---------------------------------------------------------------------------------------------


@torch.no_grad()
def upscale_picture(model: Upscaler, pixels: np.ndarray, overlap: float = 0.5) -> np.ndarray:
    """Returns a picture of any size ``model.scale`` times as large: [H · scale, W · scale, C] of the same type.

    The whole picture is interpolated, and what the head adds is computed in windows of the model's size that slide over
    it, and averaged with weights that fall towards the edges of a window. A picture smaller than a window is
    mirrored at its edges.

    Args:
        model: in evaluation mode, on its device.
        pixels: [H, W, C] of the model's type.
        overlap: the share of a window that the next one covers as well.
    """
    rows, columns = model.img_size
    height, width = pixels.shape[:2]
    beyond = (0, max(0, rows - height)), (0, max(0, columns - width)), (0, 0)
    device, scale = model.mean.device, model.scale
    whole = torch.from_numpy(np.ascontiguousarray(np.pad(pixels, beyond, "symmetric"))).to(device)
    size = whole.shape[0] * scale, whole.shape[1] * scale
    total, weights = torch.zeros(1, model.in_chans, *size, device=device), torch.zeros(size, device=device)
    window = torch.from_numpy(window_of(rows * scale, columns * scale)).to(total)
    for top in window_starts(whole.shape[0], rows, overlap):
        for left in window_starts(whole.shape[1], columns, overlap):
            added = model.added(whole[None, top : top + rows, left : left + columns])
            place = np.s_[top * scale : (top + rows) * scale, left * scale : (left + columns) * scale]
            total[:, :, *place] += window * added
            weights[place] += window
    larger = bicubic(model.as_normalised(whole[None]), scale) + total / weights
    return model.as_pixels(larger)[0, : height * scale, : width * scale].cpu().numpy()


# --- what it looks like -----------------------------------------------------------------------------------------------


def upscaled_grid(drawn: Sequence[tuple[np.ndarray, ...]], scale: int) -> Image.Image:
    """Draws (what the model saw, bicubic interpolation, what the model made of it, the original) of each image."""
    names = ("given", "bicubic", f"×{scale}", "original")
    columns = [[shown_pixels(one) for one in images] for images in drawn]
    for images in columns:
        images[0] = images[0].repeat(scale, axis=0).repeat(scale, axis=1)
    rows = [[as_rgb(images[row]) for images in columns] for row in range(len(names))]
    return grid_picture(rows, "", names)
