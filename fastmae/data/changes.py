"""What is done to single images that their owner may not expect: counted while they are read, and said in a line.

The start of a run says it of a few evenly spaced images (survey.py); this counts all that are read. Whatever changes an
image calls ``note`` beside the line that does it, so that an image to which nothing is done costs nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from fastmae.data.stock import EXAMPLES, count_of


@dataclass(frozen=True)
class Change:
    """A kind of change."""

    what: str
    """Of the images, as a phrase that goes on from their number."""
    remedy: str
    is_told_of_all: bool = True
    """Whether it is worth a line where it is done to all images, or only if it is done to some of them."""


CHANGES: Mapping[str, Change] = MappingProxyType(
    {
        "upper bits": Change(
            "of 16 bits among uint8: only their upper 8 bits are used", "--pixel_type=uint16 keeps all bits"
        ),
        "rounded": Change("of 64-bit floats: rounded to float32", "scale them where that is too coarse"),
        "multiplied": Change(
            "of uint8 among uint16: multiplied by 257", "store them in 16 bits if they mean the same numbers", False
        ),
        "kept": Change(
            "of uint8 or uint16 among floats: their numbers are kept", "scale them if they mean something else", False
        ),
        "missing": Change(
            "which state a value of missing pixels that --nodata is not: it counts as any other",
            "store NaN or one value for all",
        ),
        "turned": Change(
            "turned by EXIF or TIFF orientation, which a run does not do", "turn them before if it matters"
        ),
        "alpha": Change("with alpha, which is dropped", "--in_chans=4 uses it, if all have colours and alpha"),
        "repeated": Change("of gray: made equal channels", "--in_chans=1 makes all images gray", False),
        "luma": Change("of colour: made gray", "--in_chans=3 keeps colours", False),
    }
)
"""In the order in which they are told."""
OF_NUMBERS = ("upper bits", "rounded", "multiplied", "kept", "missing")
"""What changes the numbers of pixels, or what they mean."""

_thread = threading.local()


def note(kind: str, stated: float | None = None) -> None:
    """Notes a change of the image that this thread reads, if anybody counts them.

    Args:
        kind: a key of ``CHANGES``.
        stated: of "missing" the value that the image states, which is no change where it is that of the run.
    """
    noted: list[tuple[str, float | None]] | None = getattr(_thread, "noted", None)
    if noted is not None:
        noted.append((kind, stated))


@contextlib.contextmanager
def noting() -> Iterator[list[tuple[str, float | None]]]:
    """Yields a list of what this thread notes as long as the context lasts: (kind, stated)."""
    _thread.noted = []
    try:
        yield _thread.noted
    finally:
        _thread.noted = None


class ChangedImages:
    """Counts the images that were changed, each once.

    Args:
        length: how many images an epoch has.
    """

    def __init__(self, length: int) -> None:
        self._length, self._read = length, 0
        self._which: dict[str, np.ndarray] = {}
        self._times: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}
        self._told: dict[str, int] = {}

    def add(self, changed: Mapping[str, Sequence[tuple[int, str]]], read: int) -> None:
        """Adds a batch.

        Args:
            changed: the numbers and names of the images that were changed, by the kind of the change.
            read: how many images were read.
        """
        self._read += read
        for kind, images in changed.items():
            numbers = [index for index, _ in images]
            which = self._which.get(kind, np.zeros(self._length, bool))
            missing = max([len(which), *(number + 1 for number in numbers)]) - len(which)
            self._which[kind] = which = np.pad(which, (0, missing)) if missing else which  # of an epoch of a share
            which[numbers] = True
            self._times[kind] = self._times.get(kind, 0) + len(images)
            names = self._examples.setdefault(kind, [])
            for _, name in images[:EXAMPLES]:
                if len(names) < EXAMPLES and name not in names:
                    names.append(name)

    def counts(self) -> dict[str, int]:
        """Returns how many images were changed, by the kind of the change."""
        return {kind: int(which.sum()) for kind, which in self._which.items()}

    def news(self) -> list[str]:
        """Returns the lines if there are more images to tell of than when they were last returned; otherwise none."""
        before, self._told = self._told, self.counts()
        return self.lines() if self._told != before else []

    def lines(self, kinds: Collection[str] = CHANGES) -> list[str]:
        """Returns what people should know, a line for each of the kinds: how many images, which, and what to do."""
        lines, counts = [], self.counts()
        for kind, change in CHANGES.items():
            count = counts.get(kind, 0)
            is_done_to_all = count == self._length or self._times.get(kind) == self._read
            if kind in kinds and count and (change.is_told_of_all or not is_done_to_all):
                names = ", ".join(self._examples[kind]) + ", …" * (count > len(self._examples[kind]))
                lines.append(f"{count_of(count, 'images')} {change.what}; {change.remedy} ({names})")
        return lines
