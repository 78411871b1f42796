"""What the data and the masks of a run turned out to be. Defaults depend on it, and so do the settings of a run."""

from __future__ import annotations

from dataclasses import dataclass

FULL_SHUFFLE = "a full shuffle"


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the data of ``--data_path`` are."""

    kind: str
    """`digits`, `array`, or `folder`: image files, whether in a folder or in shards."""
    channels: int
    size: tuple[int, int] | None
    """(height, width) of the images in pixels; None where they differ."""
    labelled: bool
    length: int
    order: str = FULL_SHUFFLE
    """What the order of an epoch depends on besides the seed."""
    location: str = ""
    """Where the images lie, as a phrase for people: "in 15 tar shards"."""
    stock: tuple[str, ...] = ()
    """What people should know of what lies there and is not used as they may expect, a line each."""


@dataclass(frozen=True, kw_only=True)
class MaskFacts:
    """What the file of ``--masks`` holds."""

    mask_ratio: float
    description: str
    """What the masks are, for people. Two files with the same masks have the same description."""
