"""The mean and standard deviation of the channels of a data set, for data that do not look like ImageNet."""

from __future__ import annotations

import numpy as np

from fastmae.data.decode import BadImageError, decode
from fastmae.data.reading import Reading
from fastmae.data.sources import Source, evenly_spaced
from fastmae.errors import SettingError

SAMPLES = 2048
# The number of images that are read in a row from a source with shards.
RUN = 64


def channel_statistics(source: Source, reading: Reading) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns (mean, std) per channel in units of [0, 1], over up to 2048 images; a pure function of the data.

    The images are evenly spaced; from a source with shards they are evenly spaced runs.

    Raises:
        SettingError: none of the images can be decoded.
    """
    in_chans = reading.in_chans
    count = np.zeros(1)
    total, squares = np.zeros(in_chans), np.zeros(in_chans)
    for index in evenly_spaced(source, SAMPLES, RUN).tolist():
        try:
            pixels = decode(source.read(index), reading).reshape(-1, in_chans) / 255.0
        except (BadImageError, OSError) as error:
            last = f"{source.name(index)} ({error})"
            continue
        count += len(pixels)
        total += pixels.sum(axis=0)
        squares += np.square(pixels).sum(axis=0)
    if count == 0:
        problem = f"no image can be decoded; the last one was {last}; mend the data, or choose other channels"
        raise SettingError("in_chans", in_chans, problem)
    mean = total / count
    # A constant channel gets a deviation of one grey level rather than a division by zero.
    std = np.sqrt(np.maximum(squares / count - mean**2, 255.0**-2))
    return tuple(mean.round(6).tolist()), tuple(std.round(6).tolist())
