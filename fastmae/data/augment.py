"""Augmentation for fine-tuning: RandAugment per image; random erasing, mixup and cutmix per batch.

All of it is a pure function of (seed, draw_id), as crops are, so it is the same for any number of threads, ranks or
restarts. Labels become targets here: shares of classes that add up to 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from fastmae.errors import SettingError
from fastmae.philox import STREAM_AUGMENT, STREAM_ERASE, STREAM_MIX, STREAM_NOISE, uniforms_numpy

CHANNELS = (1, 3)
"""The numbers of channels that RandAugment is defined for."""

# --- RandAugment ------------------------------------------------------------------------------------------------------

LEVELS = 10.0
CHANCE = 0.5  # the chance that an operation that was drawn is applied
ROTATION = 30.0  # degrees
SHEAR = 0.3
SHIFT = 0.45  # as a share of the width or height
ADDED = 110
FIRST_BITS = 4
DRAWS = 5  # numbers per operation: which, whether, two for its strength, its sign

Operation = Callable[[Image.Image, float, Any], Image.Image]


class Augment(Protocol):
    """What changes the pixels of crops, as a function of their draws."""

    def draws(self, draw_ids: np.ndarray) -> np.ndarray:
        """Returns [N, ...], a row for each draw."""

    def __call__(self, pixels: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Returns pixels [H, W, C], changed as one row of ``draws`` says."""


def _affine(image: Image.Image, coefficients: tuple[float, ...], fill: Any) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC, fillcolor=fill)


def _enhance(kind: Callable[[Image.Image], Any], image: Image.Image, strength: float) -> Image.Image:
    return kind(image).enhance(max(0.1, 1 + 0.9 * strength))


def _solarize_add(image: Image.Image, strength: float, fill: Any) -> Image.Image:
    added = int(abs(strength) * ADDED)
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * len(fill))


# Each takes a strength in [-1, 1]. Its sign is the direction of an operation that has two.
OPERATIONS: tuple[Operation, ...] = (
    lambda image, strength, fill: ImageOps.autocontrast(image),
    lambda image, strength, fill: ImageOps.equalize(image),
    lambda image, strength, fill: ImageOps.invert(image),
    lambda image, strength, fill: image.rotate(ROTATION * strength, Image.Resampling.BICUBIC, fillcolor=fill),
    # At full strength no bit would remain; Pillow refuses that, so one does.
    lambda image, strength, fill: ImageOps.posterize(image, max(1, FIRST_BITS - int(abs(strength) * FIRST_BITS))),
    lambda image, strength, fill: ImageOps.solarize(image, 256 - int(abs(strength) * 256)),
    _solarize_add,
    lambda image, strength, fill: _enhance(ImageEnhance.Color, image, strength),
    lambda image, strength, fill: _enhance(ImageEnhance.Contrast, image, strength),
    lambda image, strength, fill: _enhance(ImageEnhance.Brightness, image, strength),
    lambda image, strength, fill: _enhance(ImageEnhance.Sharpness, image, strength),
    lambda image, strength, fill: _affine(image, (1, SHEAR * strength, 0, 0, 1, 0), fill),
    lambda image, strength, fill: _affine(image, (1, 0, 0, SHEAR * strength, 1, 0), fill),
    lambda image, strength, fill: _affine(image, (1, 0, SHIFT * strength * image.width, 0, 1, 0), fill),
    lambda image, strength, fill: _affine(image, (1, 0, 0, 0, 1, SHIFT * strength * image.height), fill),
)


@dataclass(frozen=True)
class RandAugment:
    """RandAugment (Cubuk et al. 2019, arXiv 1909.13719): ``number`` of fifteen operations, each with a chance of ½.

    It is the variant that is called increasing: with a higher magnitude every operation that has one changes an image
    more. Operations are drawn with replacement, and their magnitudes from a normal distribution around ``magnitude``
    with the standard deviation ``deviation``, cut to 0 to 10.
    """

    magnitude: float
    number: int
    deviation: float
    seed: int
    mean: tuple[float, ...]
    """One value per channel in [0, 1]: the colour of pixels that come in from outside of the image."""

    def draws(self, draw_ids: np.ndarray) -> np.ndarray:
        """Returns the uniform numbers that decide the operations of each draw: float64 [N, number, DRAWS]."""
        draws = uniforms_numpy(self.seed, STREAM_AUGMENT, draw_ids, DRAWS * self.number)
        return draws.reshape(len(draw_ids), self.number, DRAWS)

    def __call__(self, pixels: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Returns pixels uint8 [H, W, C], changed as one row of ``draws`` says; C is 1 or 3."""
        fill = tuple(round(255 * value) for value in self.mean)
        image = Image.fromarray(pixels[..., 0] if len(fill) == 1 else pixels)
        for which, whether, radius, angle, side in draws.tolist():
            if whether >= CHANCE:
                continue
            normal = math.sqrt(-2 * math.log(1 - radius)) * math.cos(2 * math.pi * angle)
            level = min(LEVELS, max(0.0, self.magnitude + self.deviation * normal))
            strength = math.copysign(level / LEVELS, side - 0.5)
            image = OPERATIONS[int(which * len(OPERATIONS))](image, strength, fill)
        return np.asarray(image).reshape(pixels.shape)


def parse_randaugment(text: str, seed: int, mean: tuple[float, ...]) -> RandAugment | None:
    """Reads the setting ``aa``, such as ``rand-m9-mstd0.5-inc1``; an empty text gives None.

    Args:
        text: the setting.
        seed: the seed of all draws.
        mean: the mean per channel, in [0, 1].

    Raises:
        SettingError: ``text`` has another form, or RandAugment is not defined for so many channels.
    """
    if not text:
        return None
    match = re.fullmatch(r"rand-m(\d+(?:\.\d+)?)(?:-n(\d+))?(?:-mstd(\d+(?:\.\d+)?))?-inc1", text)
    if match is None or float(match[1]) > LEVELS or match[2] == "0":
        form = "rand-mM[-nN][-mstdS]-inc1 with M up to 10, such as rand-m9-mstd0.5-inc1, or empty for none"
        raise SettingError("aa", text, f"must be {form}")
    if len(mean) not in CHANNELS:
        raise SettingError("aa", text, f"is for images of 1 or 3 channels, not {len(mean)}; leave it empty")
    return RandAugment(float(match[1]), int(match[2] or 2), float(match[3] or 0), seed, mean)


# --- a batch ----------------------------------------------------------------------------------------------------------

ERASED_SHARE = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
ERASE_ATTEMPTS = 10
NOISE_BLOCKS = 1024
NOISE_WORDS = 1024
Normalise = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class BatchAugment:
    """Random erasing (Zhong et al. 2017), mixup (Zhang et al. 2017), cutmix (Yun et al. 2019) and label smoothing.

    Samples 2j and 2j+1 of a batch are mixed with each other, because they are neighbours for any number of ranks.
    """

    seed: int
    num_classes: int
    smoothing: float
    reprob: float
    mixup: float
    """α of Beta(α, α), from which the share of each pair is drawn; 0 for no mixup."""
    cutmix: float
    """The same α for cutmix; 0 for no cutmix."""
    switch: float
    """The chance that a pair is cut rather than blended, if both are on."""

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """Returns smoothed shares float32 [N, classes] of labels int64 [N]."""
        rest = self.smoothing / self.num_classes
        shares = torch.full((len(labels), self.num_classes), rest, device=labels.device)
        return shares.scatter_(1, labels[:, None], 1 - self.smoothing + rest)

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, draw_ids: np.ndarray, normalise: Normalise
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (images, targets).

        Images are normalised float32 [N, C, H, W]. If no pixel can change, they are returned as they are.

        Args:
            images: pixels [N, H, W, C].
            labels: int64 [N], from 0.
            draw_ids: int64 [N] on the host; all draws depend on these and the seed alone.
            normalise: makes normalised float32 [N, C, H, W] of pixels, by their range, mean and deviation.
        """
        targets = self.targets(labels)
        if not (self.reprob or self.mixup or self.cutmix):
            return images, targets
        size, device = (images.shape[1], images.shape[2]), images.device
        images = normalise(images)
        if self.reprob:
            rows, boxes, noise_starts = erased_boxes(self.seed, draw_ids, self.reprob, size)
            if len(rows):
                erased = torch.from_numpy(rows).to(device)
                noise = _noise(self.seed, noise_starts, images.shape[1:]).to(device)
                images[erased] = torch.where(_inside(boxes, size, device), noise, images[erased])
        if self.mixup or self.cutmix:
            shares, boxes = mixed_pairs(self.seed, draw_ids[::2], self.mixup, self.cutmix, self.switch, size)
            is_cut = torch.from_numpy(boxes[:, 2] > 0).to(device)[:, None, None, None]
            share = torch.from_numpy(shares).to(device)
            blended = torch.where(is_cut, 1.0, share[:, None, None, None])
            weight = torch.where(_inside(boxes, size, device), 0.0, blended).repeat_interleave(2, dim=0)
            images = weight * images + (1 - weight) * _partners(images)
            share = share.repeat_interleave(2)[:, None]
            targets = share * targets + (1 - share) * _partners(targets)
        return images, targets


def erased_boxes(
    seed: int, draw_ids: np.ndarray, chance: float, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws the regions that are erased. An image in which no attempt fits is left as it is.

    The area is uniform in ``ERASED_SHARE`` of the image, the log of height over width uniform in ``ERASED_RATIO``.

    Returns:
        (rows, boxes, noise_starts): which draws lose a region, int64 [E]; the (top, left, height, width) of each, int64
        [E, 4]; and where its noise starts, float64 [E] in [0, 1), as ``_noise`` takes it.
    """
    draws = uniforms_numpy(seed, STREAM_ERASE, draw_ids, 4 * (ERASE_ATTEMPTS + 1)).reshape(len(draw_ids), -1, 4)
    rows, boxes = [], []
    for row in np.flatnonzero(draws[:, 0, 0] < chance).tolist():
        for area_draw, ratio_draw, top, left in draws[row, 1:].tolist():
            area = size[0] * size[1] * (ERASED_SHARE[0] + (ERASED_SHARE[1] - ERASED_SHARE[0]) * area_draw)
            low, high = (math.log(bound) for bound in ERASED_RATIO)
            ratio = math.exp(low + (high - low) * ratio_draw)
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < height < size[0] and 0 < width < size[1]:
                rows.append(row)
                boxes.append((int(top * (size[0] - height + 1)), int(left * (size[1] - width + 1)), height, width))
                break
    return np.array(rows, np.int64), np.array(boxes, np.int64).reshape(-1, 4), draws[rows, 0, 1]


def mixed_pairs(
    seed: int, pair_ids: np.ndarray, mixup: float, cutmix: float, switch: float, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Draws how pairs are mixed.

    Args:
        pair_ids: int64 [pairs], one draw id per pair.
        mixup, cutmix, switch: as ``BatchAugment`` has them.
        size: (height, width) of the images.

    Returns:
        (shares, boxes): the share of a sample that remains its own, float32 [pairs]; and the region (top, left, height,
        width) that is replaced by its partner's, int64 [pairs, 4], empty where the pair is blended.
    """
    from scipy.special import betaincinv

    draws = uniforms_numpy(seed, STREAM_MIX, pair_ids, 4)
    cuts = np.zeros(len(pair_ids), bool)
    if cutmix:
        cuts = (draws[:, 0] < switch) if mixup else ~cuts
    alpha = np.where(cuts, cutmix, mixup)
    share = betaincinv(alpha, alpha, draws[:, 1])
    side = np.sqrt(1 - share)
    ends = []
    for length, draw in zip(size, draws[:, 2:].T, strict=True):
        half, centre = (length * side).astype(np.int64) // 2, (length * draw).astype(np.int64)
        ends.append(((centre - half).clip(0, length), (centre + half).clip(0, length)))
    (top, bottom), (left, right) = ends
    boxes = np.stack([top, left, bottom - top, right - left], axis=1)
    boxes[~cuts | (boxes[:, 2:].min(axis=1) == 0)] = 0
    share = np.where(cuts, 1 - boxes[:, 2] * boxes[:, 3] / (size[0] * size[1]), share)
    return share.astype(np.float32), boxes


def _partners(rows: torch.Tensor) -> torch.Tensor:
    """Returns rows [N, …] with 2j and 2j+1 exchanged."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _inside(boxes: np.ndarray, size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Tells which pixels of an image lie in its box: bool [N, 1, H, W]."""
    top, left, height, width = torch.from_numpy(boxes).to(device)[:, :, None, None].unbind(1)
    y, x = torch.arange(size[0], device=device)[:, None], torch.arange(size[1], device=device)
    return ((y >= top) & (y < top + height) & (x >= left) & (x < left + width))[:, None]


def _noise(seed: int, starts: np.ndarray, shape: Sequence[int]) -> torch.Tensor:
    """Returns normal noise float32 [E, *shape]: windows of one long row of numbers, where 0 ≤ ``starts`` < 1 says.

    Fresh numbers for every pixel would cost more than the rest of the augmentation.
    """
    count = math.prod(shape)
    row = _noise_row(seed, max(NOISE_BLOCKS, -(-2 * count // NOISE_WORDS)))
    first = (starts * (len(row) - count)).astype(np.int64)
    return torch.stack([row[start : start + count] for start in first.tolist()]).view(-1, *shape)


@lru_cache(maxsize=1)
def _noise_row(seed: int, blocks: int) -> torch.Tensor:
    draws = uniforms_numpy(seed, STREAM_NOISE, np.arange(blocks), NOISE_WORDS).reshape(2, -1)
    radius, angle = np.sqrt(-2 * np.log1p(-draws[0])), 2 * np.pi * draws[1]
    return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).astype(np.float32))
