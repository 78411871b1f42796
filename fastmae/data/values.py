"""The values of all pixels of a data set: range, percentiles, a histogram of each channel, and what is missing.

`verify` fills one in while it checks every image, from several threads. Whatever the order of the images, the result is
the same. It knows the type of the pixels and nothing of files.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastmae.data.reading import Reading

PERCENTS = (0.1, 1.0, 50.0, 99.0, 99.9)
OF_AN_IMAGE = 2**12
"""Of a uint8 image with more pixels, about so many are counted, in whole rows: to count all takes half as long as to
decode a JPEG."""
IN_ALL = 2**25
"""So many pixels are counted in any case, which takes a tenth of a second: all of most small data sets."""
AT_ONCE = 2**17
"""So many numbers of uint8 are counted together."""
SAMPLE = 2**22
"""How many numbers of float32 images are kept, at most, to find percentiles in: evenly spaced ones of each image."""
BARS = 64
_Counts = Sequence[tuple[np.ndarray | slice, np.ndarray]]


@dataclass(frozen=True)
class Bar:
    """How many values lie from ``low`` to ``high``."""

    low: float
    high: float
    count: int


@dataclass(frozen=True)
class ChannelValues:
    """The values of a channel, without missing pixels."""

    low: float
    high: float
    """The smallest and the largest of all values."""
    percentiles: tuple[float, ...]
    """At ``PERCENTS``: values that are there, none between two."""
    bars: tuple[Bar, ...]
    """A histogram between the outer percentiles. The first and the last bar hold what lies beyond as well."""


class Values:
    """Counts values, image by image.

    Args:
        length: how many images there will be.
        reading: how they are read.
    """

    def __init__(self, length: int, reading: Reading) -> None:
        C = reading.in_chans
        self._reading, self._lock = reading, threading.Lock()
        is_float = reading.dtype == "float32"
        self._counts = None if is_float else np.zeros((C, np.iinfo(reading.dtype).max + 1), np.int64)
        self._waiting: list[np.ndarray] = []
        self._waiting_numbers = 0
        self._sample: dict[int, np.ndarray] = {}
        self._each = max(1, SAMPLE // max(1, length * C))
        self._most = max(OF_AN_IMAGE, IN_ALL // max(1, length))
        self._every = -(-length * C // SAMPLE)
        self._low, self._high = np.full(C, np.inf), np.full(C, -np.inf)
        self.pixels = 0
        """Of all usable images."""
        self.counted = 0
        """Of how many of them the percentiles and histograms are."""
        self.missing = 0
        """Pixels of which a channel is missing."""
        self.with_missing = 0
        """Images with such pixels."""

    def add(self, index: int, pixels: np.ndarray) -> None:
        """Adds image ``index``, pixels [H, W, C] of the type of the reading. Any thread may call it."""
        seen, nodata = pixels.shape[0] * pixels.shape[1], self._reading.nodata
        there: np.ndarray | None = None
        if self._counts is None:
            there = np.isfinite(pixels)
        if nodata is not None:
            is_value = pixels != (np.float32(nodata) if self._counts is None else nodata)
            there = is_value if there is None else there & is_value
        missing = 0 if there is None or there.all() else seen - int(there.all(axis=2).sum())
        extent = None if self._knows_extent() else _extent(pixels, there if missing else None)
        kept = np.zeros((0, pixels.shape[2]), pixels.dtype)
        counts: _Counts = []
        if self._counts is None:
            if index % self._every == 0:
                kept = pixels.reshape(seen, -1)[_spaced(seen, self._each)]
        elif pixels.dtype == np.uint8:
            step = -(-seen // self._most) if nodata is None else 1
            kept = np.array(pixels[::step]).reshape(-1, pixels.shape[2])
        else:
            counts = _counts(pixels.reshape(seen, -1))
        with self._lock:
            self.pixels += seen
            self.counted += seen if counts else len(kept)
            self.missing += missing
            self.with_missing += bool(missing)
            if extent is not None:
                np.minimum(self._low, extent[0], out=self._low)
                np.maximum(self._high, extent[1], out=self._high)
            if self._counts is None:
                self._sample[index] = kept
            else:
                self._waiting += [kept] * bool(len(kept))
                self._waiting_numbers += kept.size
                if self._waiting_numbers > AT_ONCE:
                    counts = self._take_waiting()
                self._count(counts)

    def _knows_extent(self) -> bool:
        """Tells whether no image can widen the range: all uint16 are counted, and uint8 have had 0 and 255."""
        if self._counts is None or self._reading.dtype == "uint16":
            return self._counts is not None
        return self._low.max() == 0 and self._high.min() == 255

    def _take_waiting(self) -> _Counts:
        parts = self._waiting
        self._waiting, self._waiting_numbers = [], 0
        return _counts(np.concatenate(parts)) if parts else []

    def _count(self, counts: _Counts) -> None:
        if counts and self._counts is not None:
            for mine, (values, times) in zip(self._counts, counts, strict=True):
                mine[values] += times

    def channels(self) -> list[ChannelValues | None]:
        """Returns what was found of each channel; None of one without a value."""
        if self._counts is None:
            C = self._reading.in_chans
            kept = [self._sample[index] for index in sorted(self._sample)]
            sample = np.concatenate(kept) if kept else np.zeros((0, C), np.float32)
            return [self._of_floats(c, sample[:, c]) for c in range(C)]
        self._count(self._take_waiting())
        return [self._of_counts(c, counts) for c, counts in enumerate(self._counts)]

    def _of_floats(self, c: int, sample: np.ndarray) -> ChannelValues | None:
        sample = sample[np.isfinite(sample)]
        if self._reading.nodata is not None:
            sample = sample[sample != np.float32(self._reading.nodata)]
        if not sample.size:
            return None
        percentiles = np.percentile(sample, PERCENTS, method="nearest").astype(np.float64).tolist()
        edges = np.linspace(percentiles[0], max(percentiles[-1], np.nextafter(percentiles[0], np.inf)), BARS + 1)
        places = np.clip(np.searchsorted(edges, sample, side="right") - 1, 0, BARS - 1)
        return self._channel(c, percentiles, edges.tolist(), edges.tolist()[1:], np.bincount(places, minlength=BARS))

    def _of_counts(self, c: int, counts: np.ndarray) -> ChannelValues | None:
        counts, nodata = counts.copy(), self._reading.nodata
        if nodata is not None and nodata in range(len(counts)):
            counts[int(nodata)] = 0
        up_to = np.cumsum(counts)
        if not up_to[-1]:
            return None
        if self._reading.dtype == "uint16":
            self._low[c], self._high[c] = np.flatnonzero(counts)[[0, -1]]
        ranks = [round(percent / 100 * (int(up_to[-1]) - 1)) for percent in PERCENTS]
        percentiles = np.searchsorted(up_to, ranks, side="right").tolist()
        first, last = percentiles[0], percentiles[-1]
        width = -(-(last - first + 1) // BARS)  # whole, or bars would have different numbers of values
        starts = np.arange(first, last + 1, width)
        places = np.clip((np.arange(len(counts)) - first) // width, 0, len(starts) - 1)
        heights = np.bincount(places, weights=counts, minlength=len(starts)).astype(np.int64)
        return self._channel(c, percentiles, starts.tolist(), (starts + width - 1).tolist(), heights)

    def _channel(
        self, c: int, percentiles: list[float], lows: list[float], highs: list[float], counts: np.ndarray
    ) -> ChannelValues:
        bars = tuple(Bar(low, high, count) for low, high, count in zip(lows, highs, counts.tolist(), strict=False))
        return ChannelValues(float(self._low[c]), float(self._high[c]), tuple(map(float, percentiles)), bars)


def _spaced(length: int, most: int) -> np.ndarray:
    return np.linspace(0, length - 1, min(length, most)).astype(np.int64)


def _extent(pixels: np.ndarray, there: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smallest and the largest value [C] of pixels [H, W, C] where they are there; inf, -inf of none."""
    if there is None:  # first along the rows, which lie in memory one behind the other
        return pixels.min(axis=0).min(axis=0), pixels.max(axis=0).max(axis=0)
    low, high = np.where(there, pixels, np.inf), np.where(there, pixels, -np.inf)
    return low.min(axis=(0, 1)), high.max(axis=(0, 1))


def _counts(pixels: np.ndarray) -> _Counts:
    """Returns of each channel of uint8 or uint16 pixels [n, C] some values, and how often they are there."""
    n, C = pixels.shape
    longest = np.iinfo(pixels.dtype).max + 1
    if pixels.dtype == np.uint8 and C in (1, 3):  # by Pillow, which is twice as fast
        image = Image.fromarray(pixels.T if C == 1 else pixels[None])
        return [(slice(None), row) for row in np.array(image.histogram()).reshape(C, longest)]
    if pixels.dtype == np.uint8 or n > longest // 8:
        return [(slice(None), np.bincount(channel, minlength=longest)) for channel in pixels.T]
    return [np.unique(channel, return_counts=True) for channel in pixels.T]
