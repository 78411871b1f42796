"""Batches of samples that lie in one array and are taken as they are: read at once, and not one by one.

For rows of a table and other samples of a few numbers, handing each of them to a thread takes longer than a step of the
model that learns from them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from fastmae.data.arrays import ArraySource, FileRows
from fastmae.data.sample import LoadedSample, View
from fastmae.data.sources import Concat, Source, Subset

ReadRows = Callable[[np.ndarray], np.ndarray]
"""From sample numbers int64 [n] to their pixels [n, H, W, C], as ``Source.read`` gives them one by one."""


def rows_of(source: Source) -> ReadRows | None:
    """Returns what reads many samples of a source at once; None for a source that has no such way."""
    if isinstance(source, Subset):
        inside, indices = rows_of(source.source), source.indices
        return None if inside is None else lambda chosen: inside(indices[chosen])
    if isinstance(source, Concat):
        parts = [rows_of(part) for part in source.parts]
        known = [part for part in parts if part is not None]
        return _of_parts(known, source.starts) if len(known) == len(parts) else None
    if isinstance(source, ArraySource) and not isinstance(source.images, np.ndarray | FileRows):
        return None
    return getattr(source, "rows", None)


def _of_parts(parts: list[ReadRows], starts: np.ndarray) -> ReadRows:
    def read(chosen: np.ndarray) -> np.ndarray:
        owner = np.searchsorted(starts, chosen, side="right") - 1
        first = parts[owner[0]](chosen[:1] - starts[owner[0]])
        rows = np.empty((len(chosen), *first.shape[1:]), first.dtype)
        for number in np.unique(owner).tolist():
            found = parts[number](chosen[owner == number] - starts[number])
            if found.dtype != rows.dtype:
                raise ValueError("the parts hold other numbers")
            rows[owner == number] = found
        return rows

    return read


def reads_together(source: Source, view: View) -> ReadRows | None:
    """Returns what reads many samples of a source at once, if a view leaves them as they are; None otherwise.

    That is so for arrays of images of its size, channels and type, of which it takes the whole, as it is.
    """
    whole = view.central_share == 1.0 if view.seed is None else view.scale == (1.0, 1.0) and not view.flip
    if not whole or view.augment is not None or view.reading.read_as.bands is not None or not len(source):
        return None
    read = rows_of(source)
    try:
        first = None if read is None else read(np.zeros(1, np.int64))
    except (OSError, ValueError):  # which is said of the sample when its turn comes
        return None
    wanted = (1, *view.size, view.in_chans), np.dtype(view.reading.dtype)
    return read if first is not None and (first.shape, first.dtype) == wanted else None


def load_together(
    read: ReadRows,
    indices: np.ndarray,
    out: np.ndarray,
    one_by_one: Callable[[int], LoadedSample],
) -> list[LoadedSample]:
    """Writes samples into ``out`` [n, H, W, C] at once.

    Args:
        read: of ``reads_together``.
        indices: int64 [n].
        one_by_one: loads the sample of a row into its place. It is called for all of them where one cannot be used: it
            holds an infinite number, or cannot be read.

    Raises:
        UserError: as ``load_sample``.
    """
    started = time.perf_counter()
    try:
        rows = read(indices)
        is_usable = (rows.shape, rows.dtype) == (out.shape, out.dtype)
        is_usable &= rows.dtype != np.float32 or not np.isinf(rows).any()
    except (OSError, ValueError):
        is_usable = False
    if not is_usable:
        return [one_by_one(row) for row in range(len(indices))]
    out[:] = rows
    return [LoadedSample((), None, rows.nbytes, time.perf_counter() - started)]
