"""What the data and the masks of a run turned out to be. Defaults depend on it, and so do the settings of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

FULL_SHUFFLE = "a full shuffle"
BUILT_IN_TABLES = ("breast_cancer", "diabetes", "wine")
"""Tables of scikit-learn, by the names that ``data_path`` takes for models of vectors."""


LayoutName = Literal["auto", "hwc", "chw", "tc", "ct"]
AxisName = Literal["axial", "coronal", "sagittal", "0", "1", "2"]
PixelType = Literal["uint8", "uint16", "float32"]
"""The types of the pixels of a batch. A data set has one of them, which holds all of its images exactly."""


@dataclass(frozen=True, kw_only=True)
class PixelFacts:
    """What the numbers of the pixels of a data set are."""

    dtype: PixelType = "uint8"
    low: tuple[float, ...] | None = None
    """Per channel, what is taken for 0. None: 0."""
    high: tuple[float, ...] | None = None
    """Per channel, what is taken for 1. None: 255 of uint8, 65535 of uint16, 1 of float32."""
    nodata: float | None = None
    """The value of pixels that are missing. Of float32 NaN is missing as well."""


UINT8 = PixelFacts()
"""Pixels of 8 bits, of which none is missing."""


@dataclass(frozen=True, kw_only=True)
class ReadAs:
    """What a user asks of the reading of images. The defaults suit most; nothing here depends on the data."""

    pixel_type: Literal["auto", "uint8", "uint16", "float32"] = "auto"
    """The type of the pixels; `auto` is the narrowest that holds the images exactly."""
    other_types: Literal["skip", "convert"] | None = None
    """What is done with an image that this type does not hold. None: it is skipped where the type is left to the data,
    and converted where the user names the type."""
    nodata: float | None = None
    """The value of pixels that are missing."""
    bands: tuple[int, ...] | None = None
    """Which bands become the channels, numbered from 1, in this order. None: all, by the rules of decode.py."""
    pages: Literal["first", "all", "channels"] = "first"
    """Of a file with several pages: the first alone, each as an image, or all as the channels of one image."""
    layout: LayoutName = "auto"
    """The order of the axes of an image in an array."""
    window: tuple[Literal["file"] | float, ...] | None = None
    """The (center, width) of the numbers of a DICOM that become 0 to 1; ("file",) for those that it states."""
    spectrogram: int | None = None
    """Sound files are read, as log-mel spectrograms of at least this many frames of 10 ms."""
    root: str | None = None
    """The folder that the relative paths of a list are relative to. None: that of the list."""
    image_key: str | None = None
    """Which image of a sample of several is taken, by what follows its key in a tar, as `left.jpg`; or `all`."""
    axis: AxisName = "axial"
    """Which slices of a volume are images: those of a direction in the body, or along an axis as it is stored."""
    constant_slices: Literal["keep", "drop"] = "keep"
    """Whether slices whose voxels are all alike are images; to leave them out, every volume is read once."""
    columns: tuple[str, ...] | None = None
    """The columns of a table that are wanted, by name and in this order; () for all of numbers. None: no table is
    meant, and its file is opened as one of images."""
    label_column: str | None = None
    """The column of a table that holds the labels. None: one of a usual name, if it holds classes."""

    @property
    def converts(self) -> bool:
        """Whether an image that the type of the pixels does not hold is converted: to its upper 8 bits, or rounded."""
        by_default = "skip" if self.pixel_type == "auto" else "convert"
        return (self.other_types or by_default) == "convert"

    @property
    def takes_upper_bits(self) -> bool:
        """Whether files of 16 bits are read in 8, as version 0.1 did."""
        return self.pixel_type == "uint8" and self.converts


AS_STORED = ReadAs()
"""What is read where nobody asks for anything."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How many images of each of several paths an epoch draws, where it is not all of them once."""

    images: tuple[int, ...]
    """How many each path has."""
    draws: tuple[int, ...]
    """How many of them an epoch draws. Of the first path it is all."""

    @property
    def order(self) -> str:
        """What the order of an epoch depends on. Runs compare it when they resume, so its words never change."""
        return f"a full shuffle of {self.draws} drawn from {self.images}"


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What the data of ``--data_path`` are."""

    kind: str
    """`digits`, `array`, `table`, or `folder`: image files, whether in a folder or in shards."""
    channels: int
    size: tuple[int, int] | None
    """(height, width) of the images in pixels; None where they differ."""
    labelled: bool
    length: int
    order: str = FULL_SHUFFLE
    """What the order of an epoch depends on besides the seed."""
    location: str = ""
    """Where the images lie, as a phrase for people: "in 15 tar shards"."""
    pixels: PixelFacts = UINT8
    """The type of the pixels, and what the user said of them."""
    stock: tuple[str, ...] = ()
    """What people should know of what lies there and is not used as they may expect, a line each."""
    columns: tuple[str, ...] | None = None
    """The names of the columns of a table, which are its channels; None of images."""
    shares: Shares | None = None
    """What an epoch draws of each path; None: every image once."""

    @property
    def epoch_length(self) -> int:
        """How many images an epoch has."""
        return self.length if self.shares is None else sum(self.shares.draws)

    @property
    def unit(self) -> str:
        """What the samples are called."""
        return "images" if self.columns is None else "rows"


@dataclass(frozen=True, kw_only=True)
class MaskFacts:
    """What the file of ``--masks`` holds."""

    mask_ratio: float
    description: str
    """What the masks are, for people. Two files with the same masks have the same description."""


def exact_ratio(visible: int, patches: int) -> float:
    """Returns the mask ratio nearest to the exact one for which int(L · (1 − ratio)) is ``visible``.

    This is how the model counts visible patches, and rounding of the exact ratio may be off by one patch.
    """
    ratio = (patches - visible) / patches
    while int(patches * (1 - ratio)) < visible:
        ratio = math.nextafter(ratio, 0)
    return ratio
