"""The plan of an epoch: which sample comes when, and how it is cropped.

These are pure functions of (seed, epoch), so there is no state that a restart could lose. Global batch k of an epoch
has the same samples with the same crops for any number of ranks or threads.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from fastmae.data.memory import release_after
from fastmae.facts import FULL_SHUFFLE, Shares
from fastmae.philox import (
    STREAM_CROP,
    STREAM_HELD_OUT,
    STREAM_ORDER,
    STREAM_REPLAY,
    STREAM_SPLIT,
    permutation_numpy,
    uniforms_numpy,
    words_numpy,
)

CROP_ATTEMPTS = 10
RATIO = (3 / 4, 4 / 3)
"""The smallest and the largest width over height of a random crop, as multiples of the model's width over height."""
CENTRAL_SHARE = 224 / 256
"""Image files are resized to 256 and cropped to 224 pixels, as in the official evaluation."""
FAR = 2.0
"""How many times wider or narrower than the model images must be for a note to say what crops do not see."""


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
    """The shuffle window: the number of places in the order over which the samples of a shard are scattered."""


@dataclass(frozen=True)
class EpochPlan:
    """The order of one epoch for one rank: ``batch(i)`` is micro-batch i of that rank."""

    order: np.ndarray
    """int64 [length], a permutation of what the epoch draws: the samples of the data set."""
    epoch: int
    batch_size: int
    rank: int
    ranks: int
    drawn: np.ndarray | None = None
    """int64 [length]: which sample each draw of the epoch is; None where draw i is sample i."""

    def __len__(self) -> int:
        """Returns the micro-batches in the epoch; a last, partial global batch is dropped, as in the official code."""
        return micro_batches(len(self.order), self.batch_size, self.ranks)

    def batch(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (indices, draw_ids) of micro-batch ``index``, int64 [batch_size] each; the end wraps around."""
        start = (index * self.ranks + self.rank) * self.batch_size
        draws = self.order.take(np.arange(start, start + self.batch_size), mode="wrap")
        return draws if self.drawn is None else self.drawn[draws], self.epoch * len(self.order) + draws


def micro_batches(length: int, batch_size: int, ranks: int, accum_iter: int = 1, keep_last: bool = False) -> int:
    """Returns the number of micro-batches per rank and epoch.

    Only whole global batches count. With ``keep_last`` there are as many as it takes to see every sample, rounded up to
    whole steps of ``accum_iter`` micro-batches.
    """
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
    shares: Shares | None = None,
) -> EpochPlan:
    """Plans a full shuffle of ``length`` samples; with ``shards``, a shuffle that has few shards in use at a time; with
    ``shares``, a full shuffle of what these draw."""
    if shares is not None:
        drawn = drawn_samples(seed, epoch, shares)
        order = permutation_numpy(seed, STREAM_ORDER, epoch, len(drawn))
        release_after(length)
        return EpochPlan(order, epoch, batch_size, rank, ranks, drawn)
    if _is_scattered(shards, length):
        order = scattered_order(seed, epoch, shards)
    else:
        order = permutation_numpy(seed, STREAM_ORDER, epoch, length)
    release_after(length)
    return EpochPlan(order, epoch, batch_size, rank, ranks)


def _is_scattered(shards: Shards | None, length: int) -> TypeGuard[Shards]:
    return shards is not None and len(shards.starts) > 2 and shards.window < length


def describe_order(length: int, shards: Shards | None) -> str:
    """Returns what the order of an epoch depends on beside seed, epoch and length, as one line.

    Runs compare this line when they resume, so its words never change.
    """
    if not _is_scattered(shards, length):
        return FULL_SHUFFLE
    digest = hashlib.sha256(shards.starts.astype("<i8").tobytes()).hexdigest()[:12]
    return f"{len(shards.starts) - 1} shards or row groups ({digest}) scattered over {shards.window} places"


def scattered_order(seed: int, epoch: int, shards: Shards) -> np.ndarray:
    """Shuffles the shards, then scatters the samples of each over the next ``window`` places: int64 [length].

    Returns:
        A permutation of the samples in which few shards are in use at a time. At any point of the epoch the next sample
        comes, with equal chance, from any of the shards that are open there, which hold about ``window`` samples.

    An example with 2 shards of 3 samples (a b c, d e f), in this order after the shuffle, and ``window`` 4: the first
    shard starts at place 0 and the second at place 3. Each sample gets the place where its shard starts plus a random
    number in [0, 4), say a 0.9, b 3.5, c 1.7, d 3.2, e 6.6, f 4.1. The 6 places form a ring, so e goes to 0.6. Sorted
    by place the order is e a c d b f. A shard that is scattered past the end, like the second, is thus opened twice.
    """
    starts, lengths = shards.starts, np.diff(shards.starts)
    length, count = int(starts[-1]), len(lengths)
    # One draw for both: first a random word per sample, then one per shard.
    words = words_numpy(seed, STREAM_ORDER, np.array([epoch]), length + count)[0]
    shard_order = np.argsort(words[length:], kind="stable")
    first_place = np.empty(count, np.int64)
    first_place[shard_order] = np.cumsum(lengths[shard_order]) - lengths[shard_order]
    # Places are whole numbers in units of 2**-32, so that no rounding depends on the machine: place 3 is 3 << 32, and
    # a random word w in [0, 2**32) times the window is that share of the window in these units.
    keys = np.repeat(first_place, lengths).astype(np.uint64) << np.uint64(32)
    keys += words[:length].astype(np.uint64) * np.uint64(shards.window)
    return np.argsort(keys % (np.uint64(length) << np.uint64(32)), kind="stable")


def shares_of(images: tuple[int, ...], weights: tuple[float, ...]) -> Shares:
    """Returns what an epoch draws of paths of so many ``images``: all of the first once, and as many of each other as
    its weight says, beside that of the first. At least one is drawn."""
    draws = (max(1, round(images[0] * weight / weights[0])) for weight in weights[1:])
    return Shares(images=images, draws=(images[0], *draws))


def drawn_samples(seed: int, epoch: int, shares: Shares) -> np.ndarray:
    """Returns which samples an epoch draws: int64 [sum of ``shares.draws``], those of the first path first.

    Each path is a deck of cards of its own: an epoch goes on where the one before stopped, and a deck that is used up
    is shuffled anew. So every image is drawn before one is drawn again, whatever the share.
    """
    parts, first = [], 0
    for path, (images, draws) in enumerate(zip(shares.images, shares.draws, strict=True)):
        cards = np.arange(epoch * draws, (epoch + 1) * draws)
        for deck in range(int(cards[0]) // images, int(cards[-1]) // images + 1):
            shuffled = permutation_numpy(seed, STREAM_REPLAY, deck * len(shares.images) + path, images)
            parts.append(first + shuffled[cards[cards // images == deck] % images])
        first += images
    return np.concatenate(parts)


def shuffle_quality(order: np.ndarray, shards: Shards, batch_size: int) -> float:
    """Returns how well an order shuffles: the mean number of shards in a batch, divided by that of a full shuffle.

    1 is a full shuffle; reading one shard after another is near 0.
    """
    lengths = np.diff(shards.starts)
    owner = np.repeat(np.arange(len(lengths)), lengths)[order]
    batches = owner[: len(owner) // batch_size * batch_size].reshape(-1, batch_size)
    present = np.mean([len(np.unique(batch)) for batch in batches])
    shuffled = np.sum(1 - (1 - lengths / len(order)) ** batch_size)
    return float(present / shuffled)


def holdout(length: int, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Returns a fixed split of a data set that has none: sorted indices of the train part and of the held-out part."""
    order = permutation_numpy(0, STREAM_SPLIT, 0, length)
    count = max(1, round(length * share))
    return np.sort(order[count:]), np.sort(order[:count])


def held_out_of_training(length: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws the samples that --held_out keeps from training: sorted indices of those to train on, and of the others."""
    order = permutation_numpy(seed, STREAM_HELD_OUT, 0, length)
    count = max(1, round(length * share))
    return np.sort(order[count:]), np.sort(order[:count])


def shards_of(indices: np.ndarray, shards: Shards) -> Shards:
    """Returns the shards of some samples, sorted int64 [n], with as many of them open at a time as of all samples."""
    window = max(1, shards.window * len(indices) // int(shards.starts[-1]))
    return Shards(np.searchsorted(indices, shards.starts).astype(np.int64), window)


def mask_draws(draw_ids: np.ndarray, length: int, repeated_masks: int) -> np.ndarray:
    """Returns the draw ids of masks, ``repeated_masks`` (R) per crop, side by side: int64 [N · R].

    No two crops of a run share one. With R = 1 they are the ``draw_ids`` of the crops, int64 [N].
    """
    first = draw_ids + draw_ids // length * (repeated_masks - 1) * length
    return (first[:, None] + np.arange(repeated_masks) * length).reshape(-1)


def crop_draws(seed: int, draw_ids: np.ndarray) -> np.ndarray:
    """Returns the uniform numbers in [0, 1) that decide crops and flips: float64 [N, CROP_ATTEMPTS + 1, 4]."""
    draws = uniforms_numpy(seed, STREAM_CROP, draw_ids, 4 * (CROP_ATTEMPTS + 1))
    return draws.reshape(len(draw_ids), CROP_ATTEMPTS + 1, 4)


def random_box(
    draws: np.ndarray, height: int, width: int, scale: tuple[float, float], size: tuple[int, int] = (1, 1)
) -> Box:
    """Returns the box of RandomResizedCrop, from one row of ``crop_draws``.

    The share of the area is uniform in ``scale``. The log of the aspect ratio is uniform in (3/4, 4/3), in multiples of
    the model's aspect ratio. The box is the first of ten attempts that fits, or else the largest central region within
    those ratios (Szegedy et al. 2014, section 6; recipe of the MAE paper, whose models are square).

    Args:
        draws: float64 [CROP_ATTEMPTS + 1, 4].
        height: of the image, in pixels.
        width: of the image, in pixels.
        scale: the smallest and the largest share of the area. With (1, 1) nothing is drawn for an oblong model: the box
            is the whole image, or what of it has the model's aspect ratio, as in evaluation. Of images of one row on
            a model of one row (time series) it is the share of the width, and the aspect ratio has no meaning.
        size: (height, width) that the box is resized to, of which only the aspect ratio counts.
    """
    aspect = size[1] / size[0]
    if scale[0] == 1 and aspect != 1:
        return central_box(height, width, size)
    if height == size[0] == 1 < size[1]:
        share, _, _, left = draws[0].tolist()
        w = max(1, round(width * (scale[0] + (scale[1] - scale[0]) * share)))
        return Box(0, int(left * (width - w + 1)), 1, w)
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for area_draw, ratio_draw, top_draw, left_draw in draws[:CROP_ATTEMPTS].tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw) * aspect
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return Box(int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w)
    narrowest, widest = (bound * aspect for bound in RATIO)
    h, w = height, width
    if width / height < narrowest:
        h = max(1, round(width / narrowest))
    elif width / height > widest:
        w = max(1, round(height * widest))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def scaled_box(draws: np.ndarray, height: int, width: int, scale: tuple[float, float], size: tuple[int, int]) -> Box:
    """Returns the box of a crop of ``size`` from the image at a random zoom, from one row of ``crop_draws``.

    At zoom 1 the image is resized so that it just covers ``size``; the log of the zoom is uniform in ``scale``. Where
    the image is then smaller than the crop it lies at a random place in it, and the box reaches beyond the image.

    Args:
        draws: float64 [CROP_ATTEMPTS + 1, 4].
        height: of the image, in pixels.
        width: of the image, in pixels.
        scale: the smallest and the largest zoom.
        size: (height, width) of the crop.
    """
    zoom_draw, _, top_draw, left_draw = draws[0].tolist()
    low, high = map(math.log, scale)
    pixels = min(height / size[0], width / size[1]) / math.exp(low + (high - low) * zoom_draw)
    h, w = max(1, round(size[0] * pixels)), max(1, round(size[1] * pixels))
    return Box(_place(top_draw, height, h), _place(left_draw, width, w), h, w)


def _place(draw: float, whole: int, part: int) -> int:
    """Returns where ``part`` pixels begin in ``whole`` ones; before them, if they are more."""
    return int(draw * (whole - part + 1)) if part <= whole else -int(draw * (part - whole + 1))


def random_rows(draws: np.ndarray, height: int, width: int, rows: int) -> Box:
    """Returns a box of ``rows`` whole rows of an image at a random place, from one row of ``crop_draws``.

    It is how a model sees one part of a longer spectrogram, whose rows are time, at its own rate.
    """
    return Box(int(draws[0, 2] * (height - rows + 1)), 0, rows, width)


def is_flipped(draws: np.ndarray) -> bool:
    """Tells whether a sample is mirrored, from the same row of ``crop_draws``."""
    return bool(draws[CROP_ATTEMPTS, 0] < 0.5)


def central_box(height: int, width: int, size: tuple[int, int], share: float = 1.0) -> Box:
    """Returns the largest central region of the aspect ratio of ``size``, each side times ``share``; for evaluation."""
    zoom = min(height / size[0], width / size[1]) * share
    h, w = max(1, min(height, round(size[0] * zoom))), max(1, min(width, round(size[1] * zoom)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def central_share(kind: str, size: tuple[int, int]) -> float:
    """Returns the ``share`` of ``central_box`` in evaluation.

    It is the official 224/256 for image files (``kind`` is `folder`) and a square model, and 1 otherwise: arrays were
    cut to size by their makers, and the ends of a spectrogram are as good as its middle.
    """
    return CENTRAL_SHARE if kind == "folder" and size[0] == size[1] else 1.0


def unseen_note(images: tuple[int, int], size: tuple[int, int]) -> str | None:
    """Returns a sentence if images are so much wider or narrower than the model that crops leave much of them out.

    Args:
        images: (height, width) of the images, in pixels.
        size: (height, width) of the model.
    """
    times = (images[1] / images[0]) / (size[1] / size[0])
    if 1 / FAR <= times <= FAR:
        return None
    return (
        f"images of {images[0]}×{images[1]} (height×width) on a model of {size[0]}×{size[1]}: a crop sees at most "
        f"{min(times / RATIO[0], RATIO[1] / times):.0%} of an image; give --input_size the images' shape"
    )
