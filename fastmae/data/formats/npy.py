"""Folders of NumPy's .npy and .npz files of which each holds one image: [H, W], [H, W, C] or [C, H, W].

Nothing is unpickled, and no file is unpacked into more than its header says.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO, cast

import numpy as np

from fastmae.data.arrays import MAX_DEFLATE_RATIO, SERIES, UNREADABLE, as_native, npy_header, refuse_no_numbers
from fastmae.data.images import FolderSource
from fastmae.data.reading import BadImageError, check_pixels
from fastmae.data.stock import Stock
from fastmae.errors import SettingError, UserError
from fastmae.facts import LayoutName, ReadAs

SUFFIXES = (".npy", ".npz")
START, ZIP_START = b"\x93NUMPY", b"PK\x03\x04"
NAMES = ("image", "images", "img", "x", "arr_0")
"""What the image in an .npz of several arrays is called, the first that is there."""
FEW = 4
"""An axis of so few entries beside two longer ones holds the channels."""
MUCH = 4
"""An axis that is so many times shorter than the other two holds the channels."""
MAX_CHANNELS = 256
LOOKED_AT = 8


def is_npy(start: bytes) -> bool:
    """Tells whether bytes begin as an .npy file does."""
    return start.startswith(START)


def pixels(data: bytes, read_as: ReadAs) -> np.ndarray:
    """Returns the image in an .npy or .npz file as [H, W, C] of its own type, truth values as uint8.

    Raises:
        BadImageError: no image, one that is cut, or axes in an order that is guessed too easily.
    """
    try:
        array = _npz_array(data) if data.startswith(ZIP_START) else _npy_array(io.BytesIO(data), len(data), "it")
        refuse_no_numbers(array.dtype, "it")
    except (UserError, *UNREADABLE) as error:
        raise BadImageError(" ".join(str(error).split())) from error
    return as_native(_as_image(array, read_as.layout))


def _npy_array(file: BinaryIO, size: int, name: str) -> np.ndarray:
    dtype, shape, fortran = npy_header(file, name)
    need = math.prod(shape) * dtype.itemsize
    if need > size - file.tell():
        raise ValueError(f"{name} says {list(shape)} {dtype} but holds {size - file.tell()} bytes")
    if len(shape) >= 2:
        check_pixels(shape[0], math.prod(shape[1:]) // min(shape[1:], default=1) if min(shape) else 0)
    return np.frombuffer(file.read(need), dtype).reshape(shape, order="F" if fortran else "C")


def _npz_array(data: bytes) -> np.ndarray:
    """Returns the only array of an .npz, or the one that is called as an image is."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        chosen = next((name for name in NAMES if name in members), None)
        if chosen is None:
            if len(members) != 1:
                raise ValueError(f"holds {len(members)} arrays, of which none is called {', '.join(NAMES)}")
            (chosen,) = members
        info = members[chosen]
        if info.file_size > MAX_DEFLATE_RATIO * max(1, info.compress_size):
            raise ValueError(f"{chosen} says {info.file_size} bytes, more than {info.compress_size} can unpack to")
        with archive.open(info) as member:
            return _npy_array(cast(BinaryIO, member), info.file_size, chosen)


def _as_image(array: np.ndarray, layout: LayoutName) -> np.ndarray:
    """Returns an array as [H, W, C]."""
    shape = array.shape
    if layout in SERIES:
        if len(shape) != 2 or min(shape) < 1:
            raise BadImageError(
                f"an array of shape {list(shape)}, a series has [{', '.join(layout.upper())}]; set layout"
            )
        return (array if layout == "tc" else array.T)[None]
    if len(shape) not in (2, 3) or min(shape) < 1:
        remedy = "; give the file's own path for the images in it" if len(shape) == 4 else ""
        raise BadImageError(f"an array of shape {list(shape)}, an image has [H, W], [H, W, C] or [C, H, W]{remedy}")
    if len(shape) == 2:
        return array[..., None]
    is_planes = layout == "chw"
    if layout == "auto":
        first, second, last = shape
        # Channels are few, or few beside the other two axes, or the one axis that is not as long as the others.
        may_be_last = last <= FEW < min(first, second) or MUCH * last <= min(first, second) or first == second != last
        may_be_first = first <= FEW < min(second, last) or MUCH * first <= min(second, last) or second == last != first
        if may_be_last == may_be_first:
            raise BadImageError(f"an array of shape {list(shape)}: set layout to hwc or chw, as its axes are")
        is_planes = may_be_first
    if shape[0 if is_planes else 2] > MAX_CHANNELS:
        raise BadImageError(f"an array of shape {list(shape)} with more than {MAX_CHANNELS} channels")
    return array.transpose(1, 2, 0) if is_planes else array


@dataclass(frozen=True)
class ArrayFiles:
    """Arrays in files, or sounds, one image each."""

    files: FolderSource
    read_as: ReadAs
    decode: Callable[[bytes, ReadAs], np.ndarray] = pixels
    """Makes the bytes of a file the pixels [H, W, C] of an image, or raises BadImageError."""
    noun: str = "array"
    kind: str = "array"
    shards = None

    def __post_init__(self) -> None:
        # A file that is no image is replaced in a run, but not if that is what all of them are.
        self.shapes  # noqa: B018

    @cached_property
    def shapes(self) -> set[tuple[int, ...]]:
        """The shapes [H, W, C] of a few evenly spaced images.

        Raises:
            SettingError: none of these can be used.
        """
        shapes, problem = set(), ""
        for index in np.linspace(0, len(self) - 1, min(len(self), LOOKED_AT)).astype(int).tolist():
            try:
                shapes.add(self.read(index).shape)
            except (BadImageError, OSError) as error:
                problem = problem or f"{self.name(index)}: {error}"
        if problem and not shapes:
            name = "layout" if "set layout" in problem else "data_path"
            value = self.read_as.layout if name == "layout" else self.files.part or "the folder"
            raise SettingError(
                name,
                value,
                f"none of {min(len(self), LOOKED_AT)} {self.noun}s that were looked at is an image, {problem}",
            )
        return shapes

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [length], or None."""
        return self.files.labels

    @property
    def classes(self) -> tuple[str, ...]:
        return self.files.classes

    @property
    def damage(self) -> tuple[tuple[str, str], ...]:
        return self.files.damage

    @property
    def location(self) -> str:
        return f"of one {self.noun} each, {self.files.location}"

    @property
    def stock(self) -> Stock:
        return self.files.stock

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> np.ndarray:
        """Returns the pixels of an image, [H, W, C] of the type that its file has.

        Raises:
            OSError: the file is gone or unreadable.
            BadImageError: it holds no image.
        """
        return self.decode(self.files.read(index), self.read_as)

    def name(self, index: int) -> str:
        return self.files.name(index)
