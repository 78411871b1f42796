"""Common corruptions of images: 14 of the 15 kinds of ImageNet-C and CIFAR-10-C, at five severities.

Kinds, their order and constants are those of Hendrycks & Dietterich 2019, "Benchmarking neural network robustness to
common corruptions and perturbations" (arXiv 1903.12261) and of the data that they published. ``frost`` is left out: it
is made of photographs of frost. What OpenCV, scikit-image and ImageMagick do there is done by NumPy, SciPy and Pillow
here, so that images agree in distribution and not pixel by pixel.

Everything random is a function of (seed, kind, number of the image): a higher severity has the same noise, only more of
it. Pixels are float64 [H, W, C] in [0, 1] inside, C is 1 or 3.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.special import ndtri, pdtr

from fastmae.philox import STREAM_CORRUPTION, uniforms_numpy

SEVERITIES = (1, 2, 3, 4, 5)
SMALL = 64
"""Images whose shorter side has at most so many pixels get the constants of CIFAR-10-C."""
CALLS = 64
"""More draws than a corruption makes of one image."""
GRAY = np.array([0.299, 0.587, 0.114])
BLUR_AT_MOST = 8
"""The radius up to which a disk is smoothed over 3 pixels, above over 5."""


@dataclass
class _Random:
    """Random numbers of one image and one kind: each call is a draw of its own."""

    seed: int
    first: int
    calls: int = field(default=0, init=False)

    def uniform(self, *shape: int) -> np.ndarray:
        """Draws float64 in (0, 1)."""
        ids = np.array([self.first + self.calls])
        self.calls += 1
        return uniforms_numpy(self.seed, STREAM_CORRUPTION, ids, math.prod(shape)).reshape(shape) + 2.0**-33

    def normal(self, *shape: int) -> np.ndarray:
        return ndtri(self.uniform(*shape))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.uniform(1)[0])


# --- noise ------------------------------------------------------------------------------------------------------------


def _gaussian_noise(x: np.ndarray, deviation: float, random: _Random) -> np.ndarray:
    return x + deviation * random.normal(*x.shape)


def _shot_noise(x: np.ndarray, photons: float, random: _Random) -> np.ndarray:
    """A pixel counts Poisson(x · photons) photons. Images of 8 bits have few values, so each gets a table."""
    values, which = np.unique(x, return_inverse=True)
    draws, which = random.uniform(*x.shape), which.reshape(x.shape)
    counts = np.empty(x.shape)
    for number, rate in enumerate(values * photons):
        most = math.ceil(rate + 12 * math.sqrt(rate) + 30)
        here = which == number
        counts[here] = np.searchsorted(pdtr(np.arange(most), rate), draws[here])
    return counts / photons


def _impulse_noise(x: np.ndarray, share: float, random: _Random) -> np.ndarray:
    draws = random.uniform(*x.shape)
    return np.where(draws < share / 2, 0.0, np.where(draws < share, 1.0, x))


# --- blur -------------------------------------------------------------------------------------------------------------


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest") if sigma > 0 else x


def _defocus_blur(x: np.ndarray, radius_and_sigma: tuple[float, float], random: _Random) -> np.ndarray:
    radius, sigma = radius_and_sigma
    reach = max(BLUR_AT_MOST, math.ceil(radius))
    taps = 1 if radius <= BLUR_AT_MOST else 2
    grid = np.arange(-reach - taps, reach + taps + 1)
    disk = (grid[:, None] ** 2 + grid**2 <= radius**2).astype(float)
    weights = np.exp(-(np.arange(-taps, taps + 1) ** 2) / (2 * sigma**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, weights / weights.sum(), axis, mode="constant")
    disk = disk[np.ix_(disk.any(axis=1), disk.any(axis=0))]
    return ndimage.correlate(x, (disk / disk.sum())[:, :, None], mode="mirror")


def _glass_blur(x: np.ndarray, constants: tuple[float, int, int], random: _Random) -> np.ndarray:
    """Blurred, pixels swapped with near ones from the last to the first, and blurred again."""
    sigma, reach, rounds = constants
    H, W, C = x.shape
    places = list(range(H * W))
    for _ in range(rounds):
        steps = np.floor((2 * random.uniform(2, H, W) - 1) * reach).astype(int).clip(-reach, reach - 1)
        others = (steps[0] * W + steps[1]).ravel().tolist()
        for row in range(H - reach, reach, -1):
            for here in range(row * W + W - reach, row * W + reach, -1):
                if here < H * W:
                    there = here + others[here]
                    places[here], places[there] = places[there], places[here]
    return _smooth(_smooth(x, sigma).reshape(-1, C)[places].reshape(H, W, C), sigma)


def _along(x: np.ndarray, radius: float, sigma: float, angle: float) -> np.ndarray:
    """Blurs along a line to one side, with weights of a normal distribution; ``angle`` in degrees."""
    length = 2 * int(radius) + 1
    weights = np.exp(-(np.arange(length) ** 2) / (2 * sigma**2))
    down, right = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    H, W = x.shape[:2]
    padded = np.pad(x, ((length, length), (length, length), (0, 0)), mode="edge")
    blurred = np.zeros_like(x)
    for step, weight in enumerate(weights / weights.sum()):
        top, left = length + round(step * down), length + round(step * right)
        blurred += weight * padded[top : top + H, left : left + W]
    return blurred


def _motion_blur(x: np.ndarray, radius_and_sigma: tuple[float, float], random: _Random) -> np.ndarray:
    return _along(x, *radius_and_sigma, random.between(-45, 45))


def _zoomed(x: np.ndarray, factor: float) -> np.ndarray:
    """Enlarges the middle of an image to the size of the image."""
    H, W = x.shape[:2]
    h, w = math.ceil(H / factor), math.ceil(W / factor)
    top, left = (H - h) // 2, (W - w) // 2
    large = ndimage.zoom(x[top : top + h, left : left + w], (factor, factor, 1), order=1)
    top, left = (large.shape[0] - H) // 2, (large.shape[1] - W) // 2
    return large[top : top + H, left : left + W]


def _zoom_blur(x: np.ndarray, end_and_step: tuple[float, float], random: _Random) -> np.ndarray:
    factors = np.arange(1, *end_and_step)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


# --- weather ----------------------------------------------------------------------------------------------------------


def _snow(x: np.ndarray, constants: tuple[float, ...], random: _Random) -> np.ndarray:
    mean, deviation, zoom, threshold, radius, sigma, share = constants
    flakes = _zoomed(mean + deviation * random.normal(*x.shape[:2], 1), zoom)
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = _along(flakes, radius, sigma, random.between(-135, -45))
    gray = x if x.shape[2] == 1 else (x @ GRAY)[:, :, None]
    return share * x + (1 - share) * np.maximum(x, 1.5 * gray + 0.5) + flakes + flakes[::-1, ::-1]


def _plasma(size: int, decay: float, random: _Random) -> np.ndarray:
    """Makes a cloud [size, size] in [0, 1] by the diamond-square algorithm on a torus; ``size`` is a power of two."""
    cloud, step, height = np.zeros((size, size)), size, 100.0

    def mean_of(*neighbours: np.ndarray) -> np.ndarray:
        wobble = 2 * random.uniform(*neighbours[0].shape) - 1
        return sum(neighbours, np.zeros(1)) / 4 + height**2 * wobble

    while step > 1:
        half = step // 2
        corners = cloud[::step, ::step]
        below = np.roll(corners, -1, 0)
        middles = mean_of(corners, below, np.roll(corners, -1, 1), np.roll(below, -1, 1))
        cloud[half::step, half::step] = middles
        cloud[::step, half::step] = mean_of(middles, np.roll(middles, 1, 0), corners, np.roll(corners, -1, 1))
        cloud[half::step, ::step] = mean_of(middles, np.roll(middles, 1, 1), corners, below)
        step, height = half, height / decay
    cloud -= cloud.min()
    return cloud / cloud.max()


def _fog(x: np.ndarray, thickness_and_decay: tuple[float, float], random: _Random) -> np.ndarray:
    thickness, decay = thickness_and_decay
    H, W = x.shape[:2]
    cloud = _plasma(1 << max(1, (max(H, W) - 1).bit_length()), decay, random)[:H, :W, None]
    brightest = x.max()
    return (x + thickness * cloud) * brightest / (brightest + thickness)


def _brightness(x: np.ndarray, added: float, random: _Random) -> np.ndarray:
    """Raises the value of HSV, which keeps hue and saturation: all channels grow by one factor; black becomes gray."""
    value = x.max(axis=2, keepdims=True)
    raised = (value + added).clip(0, 1)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


# --- digital ----------------------------------------------------------------------------------------------------------


def _contrast(x: np.ndarray, share: float, random: _Random) -> np.ndarray:
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * share + mean


def _elastic_transform(x: np.ndarray, constants: tuple[float, float, float], random: _Random) -> np.ndarray:
    """An affine map that moves three points at random, then a smooth field of shifts; in shares of the shorter side."""
    H, W, C = x.shape
    strength, sigma, affine = (constant * min(H, W) for constant in constants)
    middle, third = np.array([H, W]) // 2, min(H, W) // 3
    points = middle + third * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = points + affine * (2 * random.uniform(3, 2) - 1)
    # Where in the image what is at ``moved`` comes from: rows [row, column, 1] times this [3, 2].
    back = np.linalg.lstsq(np.column_stack([moved, np.ones(3)]), points, rcond=None)[0]
    warped = np.stack(
        [ndimage.affine_transform(x[:, :, c], back[:2].T, back[2], order=1, mode="mirror") for c in range(C)], axis=2
    )
    shifts = 2 * random.uniform(2, H, W) - 1
    if sigma > 0:
        shifts = ndimage.gaussian_filter(shifts, (0, sigma, sigma), mode="reflect", truncate=3)
    places = np.indices((H, W)) + strength * shifts
    return np.stack(
        [ndimage.map_coordinates(warped[:, :, c], places, order=1, mode="reflect") for c in range(C)], axis=2
    )


def _as_picture(x: np.ndarray) -> Image.Image:
    pixels = np.rint(255 * x).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _pixelate(x: np.ndarray, share: float, random: _Random) -> np.ndarray:
    H, W = x.shape[:2]
    small = _as_picture(x).resize((max(1, int(W * share)), max(1, int(H * share))), Image.Resampling.BOX)
    return np.asarray(small.resize((W, H), Image.Resampling.BOX)).reshape(x.shape) / 255


def _jpeg_compression(x: np.ndarray, quality: int, random: _Random) -> np.ndarray:
    file = io.BytesIO()
    _as_picture(x).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(x.shape) / 255


_ELASTIC = 244 / 224
"""The published constants of large images are multiples of 244, for images of 224."""
_LARGE: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "snow": (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "elastic_transform": tuple(
        tuple(_ELASTIC * share for share in shares)
        for shares in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
    ),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
}
_SMALL: dict[str, tuple[Any, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
}
_FUNCTIONS: dict[str, Callable[[np.ndarray, Any, _Random], np.ndarray]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
KINDS = tuple(_FUNCTIONS)
"""The kinds of corruptions: noise, blur, weather, digital."""


def constants_for(size: tuple[int, int]) -> str:
    """Returns whose constants images of a (height, width) get: those of ``CIFAR-10-C`` or of ``ImageNet-C``."""
    return "CIFAR-10-C" if min(size) <= SMALL else "ImageNet-C"


@dataclass(frozen=True)
class Corruption:
    """Corrupts the crops that a model sees, where a ``View`` augments them."""

    kind: str
    """One of ``KINDS``."""
    severity: int
    """1 to 5."""
    seed: int = 0

    def draws(self, draw_ids: np.ndarray) -> np.ndarray:
        """Returns int64 [N, 1]: the numbers of the images, from which everything random follows."""
        return draw_ids[:, None]

    def __call__(self, pixels: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Returns pixels uint8 [H, W, C], corrupted; C is 1 or 3."""
        constants = _SMALL if constants_for(pixels.shape[:2]) == "CIFAR-10-C" else _LARGE
        random = _Random(self.seed, (int(draws[0]) * len(KINDS) + KINDS.index(self.kind)) * CALLS)
        corrupted = _FUNCTIONS[self.kind](pixels / 255, constants[self.kind][self.severity - 1], random)
        return np.rint(255 * corrupted.clip(0, 1)).astype(np.uint8)
