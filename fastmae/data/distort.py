"""Photometric distortion: random brightness, contrast, saturation and hue of an image, which change no label map.

It is what the published recipe of segmentation does to crops (the constants are those of SSD, Liu et al. 2015, arXiv
1512.02325, as mmsegmentation has them). All of it is a pure function of (seed, draw_id), as crops are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastmae.philox import STREAM_DISTORT, uniforms_numpy

BRIGHTNESS = 32
"""At most so much is added to all levels, or taken away."""
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18 / 180
"""At most so much of the circle of hues."""
CHANCE = 0.5
"""That of each of the four."""
DRAWS = 9
"""Whether and how much of each of the four, and whether contrast comes first or last."""


@dataclass(frozen=True)
class Distortion:
    """Photometric distortion of uint8 images with red, green and blue."""

    seed: int

    def draws(self, draw_ids: np.ndarray) -> np.ndarray:
        """Returns the uniform numbers that decide what is done: float64 [N, DRAWS]."""
        return uniforms_numpy(self.seed, STREAM_DISTORT, draw_ids, DRAWS)

    def __call__(self, pixels: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Returns pixels uint8 [H, W, 3], changed as one row of ``draws`` says."""
        wanted, amounts, contrast_first = draws[:4] < CHANCE, draws[4:8], draws[8] < 0.5
        added = BRIGHTNESS * (2 * amounts[0] - 1) if wanted[0] else 0.0
        contrast, saturation = (low + (high - low) * amount for (low, high), amount in zip(
            (CONTRAST, SATURATION), amounts[1:3], strict=True
        ))  # fmt: skip
        turned = round(256 * HUE * (2 * amounts[3] - 1)) if wanted[3] else 0
        levels = np.arange(256.0) + added
        if wanted[1] and contrast_first:
            levels = levels.clip(0, 255) * contrast
        pixels = _looked_up(pixels, levels)
        if wanted[2] or turned:
            coloured = np.array(Image.fromarray(pixels).convert("HSV"))
            coloured[..., 0] += np.uint8(turned % 256)  # hues are a circle of 256
            if wanted[2]:
                coloured[..., 1] = _looked_up(coloured[..., 1], np.arange(256.0) * saturation)
            pixels = np.array(Image.frombuffer("HSV", coloured.shape[1::-1], coloured.tobytes()).convert("RGB"))
        if wanted[1] and not contrast_first:
            pixels = _looked_up(pixels, np.arange(256.0) * contrast)
        return pixels


def _looked_up(pixels: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Returns uint8 pixels in which each level is replaced by ``levels`` [256], rounded and cut to 0 to 255."""
    return levels.clip(0, 255).round().astype(np.uint8)[pixels]
