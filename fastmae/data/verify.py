"""Checks a data set before a run: reads and decodes every image as a run would, and names those that it would replace.

``Source.read`` and ``decode`` decide here as in a run, so the two agree on every image. The findings also say what such
a pass shows anyway: sizes, formats, and images that a run uses although their owner may not expect it. This module
prints nothing (fastmae/commands/verify.py does) and knows nothing of order or crops.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from fastmae.data.copies import digest_of
from fastmae.data.decode import FOLDER_CHANNELS, BadImageError, decode
from fastmae.data.headers import read_header
from fastmae.data.packed import PackedSource
from fastmae.data.reading import Reading
from fastmae.data.sample import Skipped
from fastmae.data.sources import ArraySource, Concat, FolderSource, Source, describe
from fastmae.data.survey import Survey
from fastmae.data.values import Values
from fastmae.errors import SettingError, UserError
from fastmae.facts import AS_STORED, ReadAs

EXAMPLES = 20
# Images per task: so few that all threads together stay within few row groups.
CHUNK = 16
# Tasks per thread that are running, waiting or complete but not yet counted.
AHEAD = 4
# Seconds after which a wait for a task looks for a signal.
SIGNAL_TICK = 0.1
SMALL_SIDE = 32
SMALL = f"under {SMALL_SIDE} pixels on a side"
ONE_COLOUR = "of one colour"
MISNAMED = "of another format than the name says"
_Extent = tuple[int, int, int, int]


@dataclass
class Findings:
    """The result of checking a run of images. It takes little memory for any number of them."""

    images: int = 0
    unusable: int = 0
    examples: list[Skipped] = field(default_factory=list)
    """Unusable images: all of them in a chunk, the first ``EXAMPLES`` in the sum of many."""
    size: int = 0
    """The bytes of all images that could be read."""
    survey: Survey = field(default_factory=Survey)
    """What the usable images are: formats, depths, pages, bands and orientation."""
    smallest: _Extent | None = None
    """(pixels, height, width, index) of the first smallest usable image."""
    largest: _Extent | None = None
    """(pixels, height, width, -index) of the first largest usable image."""
    notes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What the owner may not expect of images that a run uses: the kind of it, (how many, index of the first)."""
    stated: int = 0
    """Pixels that have the value which their file states for missing ones, where a run does not go by it."""
    digests: list[tuple[int, tuple[int, int]]] = field(default_factory=list)
    """(index, digest) of the usable images in a chunk; the sum of many has none."""

    def add(self, later: Findings) -> None:
        """Adds the findings in the images that follow."""
        self.images += later.images
        self.unusable += later.unusable
        self.examples += later.examples[: EXAMPLES - len(self.examples)]
        self.size += later.size
        self.stated += later.stated
        self.survey.add(later.survey)
        self.smallest = min((e for e in (self.smallest, later.smallest) if e is not None), default=None)
        self.largest = max((e for e in (self.largest, later.largest) if e is not None), default=None)
        for note, (count, first) in later.notes.items():
            before, earlier = self.notes.get(note, (0, first))
            self.notes[note] = (before + count, earlier)


def choose_reading(asked: int | None, parts: dict[str, Source], read_as: ReadAs = AS_STORED) -> Reading:
    """Returns how a run would read the images: with the channels asked for, or those of the train part, and its type.

    Raises:
        UserError: no image of a part can be used with so many channels.
    """
    facts = describe(parts["train"], read_as=read_as)
    in_chans = asked or facts.channels
    if in_chans not in (*FOLDER_CHANNELS, facts.channels) and any(source.kind == "folder" for source in parts.values()):
        raise SettingError(
            "in_chans", in_chans, "image files give 1, 3 or 4 channels; choose bands, or use an array for others"
        )
    for source in parts.values():
        for array in _parts(source):
            if isinstance(array, ArraySource):
                try:
                    shape = (1, 1, array.images.shape[3])
                    decode(np.zeros(shape, array.images.dtype), Reading(in_chans, dtype="float32", read_as=read_as))
                except BadImageError as error:
                    raise UserError(f"{array.origin}: {error}") from error
    return Reading(in_chans, dtype=facts.pixels.dtype, nodata=facts.pixels.nodata, read_as=read_as)


def damage_of(source: Source) -> list[tuple[str, str]]:
    """Returns (name, what is wrong) of tar shards that are damaged inside, and of folders that cannot be listed."""
    parts = _parts(source)
    return [damage for part in parts if isinstance(part, FolderSource | PackedSource) for damage in part.damage]


def _parts(source: Source) -> tuple[Source, ...]:
    return source.parts if isinstance(source, Concat) else (source,)


# --- every image ------------------------------------------------------------------------------------------------------


def check(source: Source, reading: Reading, num_workers: int, values: Values | None = None) -> Generator[Findings]:
    """Reads and decodes every image, and yields the findings a few images at a time, in the order of the source.

    The values of all pixels are added to ``values``, if it is given. The threads end with the iterator, however it
    ends, once each has finished its image.
    """
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="fastmae-verify")
    stop = threading.Event()
    ahead: deque[Future[Findings]] = deque()
    chunks = (range(first, min(first + CHUNK, len(source))) for first in range(0, len(source), CHUNK))
    try:
        while True:
            while len(ahead) < AHEAD * num_workers and (indices := next(chunks, None)) is not None:
                ahead.append(pool.submit(_check_chunk, source, indices, reading, stop, values))
            if not ahead:
                return
            yield _result(ahead.popleft())
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[Findings]) -> Findings:
    """Waits for a result, and looks up now and then: a signal that comes just before a wait does not end it."""
    while not wait([future], timeout=SIGNAL_TICK).done:
        pass
    return future.result()


def _check_chunk(
    source: Source, indices: Sequence[int], reading: Reading, stop: threading.Event, values: Values | None
) -> Findings:
    findings = Findings()
    for index in indices:
        if stop.is_set():
            break
        findings.images += 1
        try:
            data = source.read(index)
            if isinstance(data, np.ndarray):
                data = data.copy()  # only copying reads a mapped file
            findings.size += len(data) if isinstance(data, bytes) else data.nbytes
            pixels = decode(data, reading)
        except (BadImageError, OSError) as error:
            findings.examples.append(Skipped(index, source.name(index), str(error)))
        except Exception as error:  # such as MemoryError: a run would not replace this image but end
            reason = f"{type(error).__name__}: {error} (this would end a run)"
            findings.examples.append(Skipped(index, source.name(index), reason))
        else:
            _note(findings, index, source.name(index), data, pixels, reading)
            findings.digests.append((index, digest_of(data)))
            if values is not None:
                values.add(index, pixels)
    findings.unusable = len(findings.examples)
    return findings


def _note(
    findings: Findings, index: int, name: str, data: bytes | np.ndarray, pixels: np.ndarray, reading: Reading
) -> None:
    """Adds a usable image to the findings."""
    height, width = pixels.shape[:2]
    extent = (height * width, height, width)
    findings.smallest = min(findings.smallest or (*extent, index), (*extent, index))
    findings.largest = max(findings.largest or (*extent, -index), (*extent, -index))
    notes = []
    if isinstance(data, np.ndarray):
        findings.survey.see_array(f"array of {width}×{height}×{data.shape[2]}", data.dtype.name)
    else:
        header = read_header(data)
        findings.survey.see(header, name, pixels, reading)
        if header.nodata is not None and reading.nodata is None and header.dtype == reading.dtype:
            findings.stated += int((pixels == header.nodata).any(axis=2).sum())
        named_format = _formats().get(os.path.splitext(name)[1].lower(), header.format)
        notes += [SMALL] * (min(height, width) < SMALL_SIDE)
        notes += [MISNAMED] * (named_format != header.format and header.format != "MPO")
    notes += [ONE_COLOUR] * _is_of_one_colour(pixels)
    for note in notes:
        count, first = findings.notes.get(note, (0, index))
        findings.notes[note] = (count + 1, first)


@functools.cache
def _formats() -> dict[str, str]:
    """Returns the name of Pillow's format for each suffix of a file name."""
    return Image.registered_extensions()


def _is_of_one_colour(pixels: np.ndarray) -> bool:
    """Tells whether all pixels are alike; for most images a few pixels already show that they are not."""
    first = pixels[0, 0]
    return bool((pixels[::16, ::16] == first).all() and (pixels == first).all())
