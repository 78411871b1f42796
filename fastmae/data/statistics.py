"""What is measured on a sample of a data set: the range of its values, the mean and the deviation of its channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastmae.data.decode import BadImageError, decode
from fastmae.data.reading import Reading
from fastmae.data.sources import Source, columns_of, evenly_spaced, table_values
from fastmae.data.stock import EXAMPLES, count_of
from fastmae.errors import SettingError
from fastmae.facts import UINT8, PixelFacts

SAMPLES = 2048
RUN = 64
"""The number of images that are read in a row from a source with shards."""
NUMBERS = 2**24
"""Of wide pixels, at most so many numbers are kept to find percentiles in: 8,192 of each image with one channel."""
PERCENT = 0.1
"""The range of `auto` leaves out this share of the lowest values, and of the highest."""
SMALLEST_STD = 1e-6
FLOATS_FROM_0_TO_1 = 0.1
"""Floats that lie in [0, 1] are taken for shares already, unless they lie closer together than this."""
LARGEST = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
WORTH_SAYING = 0.01
"""The share of pixels beyond the range from which on it is said."""
SHOWN = 4
ROWS = 1 << 16
"""Of a table, so many rows are added up at a time."""
FAR = 3.0
"""Deviations by which the mean of a column may lie from the mean that is given for it, until that is said."""
CONSTANT = 1e-7
"""A column whose deviation is no larger than this share of its mean has one value, as float32 tells no other."""
ValueRange = tuple[str | float, ...] | None
"""The setting ``value_range``."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the numbers of the pixels of a data set are."""

    pixels: PixelFacts
    mean: tuple[float, ...]
    """Of each channel, in units of the range, without missing pixels."""
    std: tuple[float, ...]
    lines: tuple[str, ...] = ()
    """What a run says of it when it begins."""


def measure(
    source: Source,
    reading: Reading,
    value_range: ValueRange = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    known: str = "given",
) -> Measured:
    """Measures what is not given on up to 2048 images; a pure function of the data.

    The images are evenly spaced; from a source with shards they are evenly spaced runs. Of uint8 images with the range
    of their type every pixel counts. Otherwise every pixel of up to 2^24 numbers in all, evenly spaced ones of more.

    Args:
        source: the data set.
        reading: how its images become pixels.
        value_range: the setting: numbers, ``dtype`` or ``auto``; None is as ``config.images`` says.
        mean, std: what is given of each channel, in units of the range.
        known: for people, where numbers of ``value_range`` come from.

    Raises:
        SettingError: no image can be decoded, a channel is missing as a whole, or the range does not suit.
    """
    C, dtype = reading.in_chans, reading.dtype
    values = table_values(source)
    if values is not None:
        return _measured_table(values, columns_of(source) or (), reading, value_range, mean, std)
    ends = given_range(value_range, C, dtype)
    if ends is not None and mean is not None and std is not None:
        return Measured(pixels=_facts(reading, ends), mean=mean, std=std, lines=_lines(reading, ends, known))
    parts = _sample(source, reading, whole=dtype == "uint8" and ends is not None)
    how = known
    if dtype != "uint8" or ends is None:
        values = np.concatenate([*parts])
        parts = iter([values])
        if ends is None:
            ends, how = _found_range(values, reading, is_asked=value_range is not None)
    low, high = ends
    count, total, squares, beyond, seen = np.zeros(C), np.zeros(C), np.zeros(C), 0, 0
    for pixels in parts:
        shares = (pixels - low) / (high - low)
        there: np.ndarray | bool = True
        if dtype == "float32" or reading.nodata is not None:
            there = _present(pixels, reading)
            shares[~there] = 0.0
        count += there.sum(axis=0) if isinstance(there, np.ndarray) else len(pixels)
        total += shares.sum(axis=0)
        squares += np.square(shares).sum(axis=0)
        beyond += 0 if _facts(reading, ends) == UINT8 else int(np.count_nonzero((shares < 0) | (shares > 1)))
        seen += pixels.size
    _require_values(count, reading)
    found_mean = total / count
    variance = np.maximum(squares / count - found_mean**2, 0.0)
    # A constant channel gets a deviation of one grey level rather than a division by zero.
    least = 255.0**-2 if dtype == "uint8" else np.where(variance > SMALLEST_STD**2, 0.0, 255.0**-2)
    found_std = np.sqrt(np.maximum(variance, least))
    missing = 1 - float(count.sum()) / seen
    return Measured(
        pixels=_facts(reading, ends),
        mean=tuple(found_mean.round(6).tolist()) if mean is None else mean,
        std=tuple(_rounded(found_std, dtype)) if std is None else std,
        lines=_lines(reading, ends, how, beyond / max(1.0, float(count.sum())), missing),
    )


def _measured_table(
    values: np.ndarray,
    columns: tuple[str, ...],
    reading: Reading,
    value_range: ValueRange,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Measured:
    """Returns the mean and the deviation of each column over all rows [N, D], in float64 and without missing cells.

    Raises:
        SettingError: a range is given, a mean or deviation for another number of columns, or a column has no number.
    """
    if value_range not in (None, ("dtype",), (0.0, 1.0) * len(columns)):
        raise SettingError("value_range", value_range, "is for images; columns are standardised, so leave it out")
    for name, given in (("mean", mean), ("std", std), ("in_chans", range(reading.in_chans))):
        if given is not None and len(given) != len(columns):
            problem = f"must be one for each of the {len(columns)} columns; leave it out to measure it"
            raise SettingError(name, given if isinstance(given, tuple) else len(given), problem)
    count, total, squares = (np.zeros(len(columns)) for _ in range(3))
    parts = [values[start : start + ROWS] for start in range(0, len(values), ROWS)]
    for part in parts:
        count += (~np.isnan(part)).sum(axis=0)
        total += np.nansum(part, axis=0, dtype=np.float64)
    empty = np.flatnonzero(count == 0)
    if len(empty):
        problem = f"every cell of the column {columns[empty[0]]!r} is missing in the rows that are trained on"
        raise SettingError("data_path", problem=f"{problem}; leave it out by --columns, or hold fewer rows out")
    found = total / count
    for part in parts:
        squares += np.nansum(np.square(part - found), axis=0)
    deviation = np.sqrt(squares / count)
    constant = np.flatnonzero(deviation <= CONSTANT * np.abs(found))
    deviation[constant] = 1.0
    lines = []
    if len(constant):
        names = ", ".join(columns[at] for at in constant[:EXAMPLES]) + (", …" if len(constant) > EXAMPLES else "")
        said = f"{count_of(len(constant), 'columns')} of one value get the deviation 1, and their mean is predicted"
        lines.append(f"columns         {said}: {names}")
    far = np.abs(found - (found if mean is None else mean)) / (deviation if std is None else std)
    if far.max() > FAR:
        said = f"after the given mean and std the mean of {columns[int(far.argmax())]!r} is {far.max():.3g}, not near 0"
        lines.append(f"columns         {said}; leave these out, or give a model those of the data")
    return Measured(
        pixels=PixelFacts(dtype=reading.dtype, nodata=reading.nodata),
        mean=tuple(found.tolist()) if mean is None else mean,
        std=tuple(deviation.tolist()) if std is None else std,
        lines=tuple(lines),
    )


def shown_range(pixels: PixelFacts) -> str:
    """Returns the value range for people: ``0 to 4095``, or one for each of the first channels."""
    if pixels.low is None or pixels.high is None:
        return f"0 to {LARGEST[pixels.dtype]:g}"
    pairs = [f"{low:.6g} to {high:.6g}" for low, high in zip(pixels.low, pixels.high, strict=True)]
    if len(set(pairs)) == 1:
        return pairs[0]
    more = f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
    return "; ".join(pairs[:SHOWN]) + more


def range_line(pixels: PixelFacts, how: str) -> str:
    """Returns the line of the start block about a value range."""
    return f"range           {shown_range(pixels)} of {pixels.dtype} ({how})"


def _sample(source: Source, reading: Reading, whole: bool) -> Iterator[np.ndarray]:
    """Yields the pixels [n, C] of evenly spaced images, all of them or as many as can be kept.

    Raises:
        SettingError: none of the images can be decoded.
    """
    C, last = reading.in_chans, ""
    indices = evenly_spaced(source, SAMPLES, RUN).tolist()
    most = max(1, NUMBERS // (len(indices) * C))
    usable = 0
    for index in indices:
        try:
            pixels = decode(source.read(index), reading).reshape(-1, C)
        except (BadImageError, OSError) as error:
            last = f"{source.name(index)} ({error})"
            continue
        usable += 1
        if not whole and len(pixels) > most:
            pixels = pixels[np.linspace(0, len(pixels) - 1, most).astype(np.int64)]
        yield pixels
    if not usable:
        problem = f"no image can be decoded; the last one was {last}; mend the data, or choose other channels"
        raise SettingError("in_chans", C, problem)


def _present(pixels: np.ndarray, reading: Reading) -> np.ndarray:
    """Tells which numbers are of pixels that are not missing, and finite."""
    there = np.isfinite(pixels)
    if reading.nodata is not None:
        there &= pixels != (np.float32(reading.nodata) if pixels.dtype == np.float32 else reading.nodata)
    return there


def _require_values(count: np.ndarray, reading: Reading) -> None:
    if not count.all():
        which = f"every pixel of channel {int(np.flatnonzero(count == 0)[0]) + 1} is missing"
        problem = f"{which} in the images that were looked at; mend the data, or leave the channel out"
        raise SettingError("nodata", reading.nodata, problem)


def given_range(value_range: ValueRange, channels: int, dtype: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns low and high [C] as they are given, or those of the type; None if they are to be found.

    Raises:
        SettingError: there are pairs for another number of channels.
    """
    if value_range == ("auto",) or (value_range is None and dtype != "uint8"):
        return None
    if value_range is None or value_range == ("dtype",):
        return np.zeros(channels), np.full(channels, LARGEST[dtype])
    numbers = np.array(value_range, np.float64)
    if len(numbers) not in (2, 2 * channels):
        problem = f"must be one pair LOW HIGH, or {channels} pairs for {channels} channels"
        raise SettingError("value_range", value_range, problem)
    return np.broadcast_to(numbers[::2], channels), np.broadcast_to(numbers[1::2], channels)


def _found_range(values: np.ndarray, reading: Reading, is_asked: bool) -> tuple[tuple[np.ndarray, np.ndarray], str]:
    """Returns the percentiles low and high [C] of values [n, C], and what they are for people.

    Floats that lie in [0, 1] are shares already, unless percentiles are asked for.
    """
    there = _present(values, reading)
    _require_values(there.sum(axis=0), reading)
    ends, inside = [], True
    for channel, is_there in zip(values.T, there.T, strict=True):
        present = channel[is_there]
        low, high = np.percentile(present, [PERCENT, 100 - PERCENT], method="nearest").tolist()
        inside &= bool(present.min() >= 0 and present.max() <= 1)
        ends.append((low, high if high > low else low + max(1.0, abs(low) / 1024)))
    low, high = (np.array(end, np.float64) for end in zip(*ends, strict=True))
    if not is_asked and reading.dtype == "float32" and inside and (high - low).max() >= FLOATS_FROM_0_TO_1:
        return (np.zeros_like(low), np.ones_like(high)), "as all values lie there"
    return (low, high), f"from {PERCENT:g} to {100 - PERCENT:g} % of the values"


def _rounded(std: np.ndarray, dtype: str) -> list[float]:
    """Returns deviations with six decimals, or six digits where they are of a range that may be far wider."""
    return std.round(6).tolist() if dtype == "uint8" else [float(f"{value:.6g}") for value in std.tolist()]


def _facts(reading: Reading, ends: tuple[np.ndarray, np.ndarray]) -> PixelFacts:
    """Returns the facts of the pixels. The range of uint8 is left out, so that what computes is as it always was."""
    low, high = (tuple(end.tolist()) for end in ends)
    is_plain = reading.dtype == "uint8" and not any(low) and set(high) == {255.0}
    return PixelFacts(
        dtype=reading.dtype,
        low=None if is_plain else low,
        high=None if is_plain else high,
        nodata=reading.nodata,
    )


def _lines(
    reading: Reading, ends: tuple[np.ndarray, np.ndarray], how: str, beyond: float = 0.0, missing: float = 0.0
) -> tuple[str, ...]:
    """Returns the line of the start block about the range; none for uint8 images as they always were."""
    pixels = _facts(reading, ends)
    if pixels == UINT8:
        return ()
    said = [range_line(pixels, how)]
    if beyond >= WORTH_SAYING:
        said.append(f"{100 * beyond:.1f} % of the values lie beyond and are kept")
    if missing:
        said.append(f"{100 * missing:.2g} % are missing, and a patch with a missing pixel is no target")
    elif reading.nodata is not None:
        said.append(f"no pixel that was looked at has the missing value {reading.nodata:g}")
    return ("; ".join(said),)
