"""Which sample comes when, cropped how: pure functions of (seed, epoch), with no state to lose.

Global batch k of an epoch is the same samples with the same crops whatever the number of ranks or threads.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from fastmae.facts import FULL_SHUFFLE
from fastmae.philox import STREAM_CROP, STREAM_ORDER, STREAM_SPLIT, permutation_numpy, uniforms_numpy, words_numpy

CROP_ATTEMPTS = 10
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Box:
    """A region of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Shards:
    """Runs of samples that are best read at about the same time: the tar files of a data set, or its row groups."""

    starts: np.ndarray
    """int64 [shards + 1], from 0 to the length of the data set: shard s is [starts[s], starts[s + 1])."""
    window: int
    """The shuffle window: over how many places of the order the samples of a shard are scattered."""


@dataclass(frozen=True)
class EpochPlan:
    """One epoch's order for one rank: ``batch(i)`` is micro-batch i of that rank."""

    order: np.ndarray
    """int64 [length], a permutation of the data set."""
    epoch: int
    batch_size: int
    rank: int
    ranks: int

    def __len__(self) -> int:
        """Micro-batches in the epoch; the last partial global batch is dropped, as published."""
        return micro_batches(len(self.order), self.batch_size, self.ranks)

    def batch(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(indices, draw_ids) of micro-batch ``index``, int64 [batch_size] each; past the end it begins anew."""
        start = (index * self.ranks + self.rank) * self.batch_size
        indices = self.order.take(np.arange(start, start + self.batch_size), mode="wrap")
        return indices, self.epoch * len(self.order) + indices


def micro_batches(length: int, batch_size: int, ranks: int, accum_iter: int = 1, keep_last: bool = False) -> int:
    """A rank's micro-batches in an epoch: whole ones alone, or with ``keep_last`` enough for whole steps to see all."""
    if keep_last:
        return -(-length // (batch_size * ranks * accum_iter)) * accum_iter
    return length // (batch_size * ranks)


def plan_epoch(
    seed: int,
    epoch: int,
    length: int,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    shards: Shards | None = None,
) -> EpochPlan:
    """A full shuffle of ``length`` samples; with ``shards``, one that stays near their order."""
    if _is_scattered(shards, length):
        order = scattered_order(seed, epoch, shards)
    else:
        order = permutation_numpy(seed, STREAM_ORDER, epoch, length)
    return EpochPlan(order, epoch, batch_size, rank, ranks)


def _is_scattered(shards: Shards | None, length: int) -> TypeGuard[Shards]:
    return shards is not None and len(shards.starts) > 2 and shards.window < length


def describe_order(length: int, shards: Shards | None) -> str:
    """What, beside seed, epoch and length, an epoch's order depends on: a line that is the same if that is the same."""
    if not _is_scattered(shards, length):
        return FULL_SHUFFLE
    digest = hashlib.sha256(shards.starts.astype("<i8").tobytes()).hexdigest()[:12]
    return f"{len(shards.starts) - 1} shards or row groups ({digest}) scattered over {shards.window} places"


def scattered_order(seed: int, epoch: int, shards: Shards) -> np.ndarray:
    """Shuffles the shards, then scatters the samples of each over the next ``window`` places: int64 [length].

    The places form a ring, so what is scattered past the end comes first. Everywhere in the epoch, then, the next
    sample comes from any of the ``window`` samples' worth of shards that are open there with the same chance, and
    a shard is read in one go but for those at the end, which are opened twice.
    """
    starts, lengths = shards.starts, np.diff(shards.starts)
    length, count = int(starts[-1]), len(lengths)
    # One draw for both: the words of samples, then those of shards.
    words = words_numpy(seed, STREAM_ORDER, np.array([epoch]), length + count)[0]
    turn = np.argsort(words[length:], kind="stable")
    place = np.empty(count, np.int64)
    place[turn] = np.cumsum(lengths[turn]) - lengths[turn]
    # Whole numbers, in 2**-32 of a place, so that no rounding depends on the machine.
    keys = np.repeat(place, lengths).astype(np.uint64) << np.uint64(32)
    keys += words[:length].astype(np.uint64) * np.uint64(shards.window)
    return np.argsort(keys % (np.uint64(length) << np.uint64(32)), kind="stable")


def shuffle_quality(order: np.ndarray, shards: Shards, batch_size: int) -> float:
    """How well an order mixes: shards in a batch, on average, over the number that a full shuffle would have there.

    1 is a full shuffle; reading shard after shard is near 0.
    """
    lengths = np.diff(shards.starts)
    owner = np.repeat(np.arange(len(lengths)), lengths)[order]
    batches = owner[: len(owner) // batch_size * batch_size].reshape(-1, batch_size)
    present = np.mean([len(np.unique(batch)) for batch in batches])
    shuffled = np.sum(1 - (1 - lengths / len(order)) ** batch_size)
    return float(present / shuffled)


def holdout(length: int, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """A fixed split of a data set that has none: sorted indices of the train part and of the held-out part."""
    order = permutation_numpy(0, STREAM_SPLIT, 0, length)
    held = max(1, round(length * share))
    return np.sort(order[held:]), np.sort(order[:held])


def mask_draws(draw_ids: np.ndarray, length: int, repeated_masks: int) -> np.ndarray:
    """The draws of the masks of some crops, ``repeated_masks`` (R) of each, side by side: int64 [N · R].

    No two crops of a run share one; with R = 1 they are the crops' own.
    """
    first = draw_ids + draw_ids // length * (repeated_masks - 1) * length
    return (first[:, None] + np.arange(repeated_masks) * length).reshape(-1)


def crop_draws(seed: int, draw_ids: np.ndarray) -> np.ndarray:
    """The uniform numbers that decide a sample's crop and flip: float64 [N, CROP_ATTEMPTS + 1, 4]."""
    draws = uniforms_numpy(seed, STREAM_CROP, draw_ids, 4 * (CROP_ATTEMPTS + 1))
    return draws.reshape(len(draw_ids), CROP_ATTEMPTS + 1, 4)


def random_box(draws: np.ndarray, height: int, width: int, scale: tuple[float, float]) -> Box:
    """RandomResizedCrop's box, from one row of ``crop_draws``.

    Area uniform in ``scale``, the log of the aspect ratio uniform in (3/4, 4/3); the first of ten attempts that fits,
    or else the largest central region within those ratios (Szegedy et al. 2014, section 6; recipe of the MAE paper).
    """
    for area_draw, ratio_draw, top_draw, left_draw in draws[:CROP_ATTEMPTS].tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        low, high = math.log(RATIO[0]), math.log(RATIO[1])
        ratio = math.exp(low + (high - low) * ratio_draw)
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return Box(int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w)
    h, w = height, width
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def is_flipped(draws: np.ndarray) -> bool:
    """Whether a sample is mirrored, from the same row of ``crop_draws``."""
    return bool(draws[CROP_ATTEMPTS, 0] < 0.5)


def central_box(height: int, width: int, size: tuple[int, int], share: float = 1.0) -> Box:
    """The largest central region of the aspect ratio of ``size``, each side times ``share``; for evaluation."""
    zoom = min(height / size[0], width / size[1]) * share
    h, w = max(1, min(height, round(size[0] * zoom))), max(1, min(width, round(size[1] * zoom)))
    return Box((height - h) // 2, (width - w) // 2, h, w)
