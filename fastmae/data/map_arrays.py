"""Images and label maps in arrays: two .npy files in a folder, or two arrays of an .npz or an HDF5 file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.data.arrays import UNREADABLE, ArraySource, StoredArray, array_source, open_array
from fastmae.data.formats.common import library
from fastmae.data.formats.hdf5 import is_hdf5, open_hdf5
from fastmae.data.reading import BadImageError
from fastmae.data.stock import EXAMPLES, LeftOut, Stock
from fastmae.errors import SettingError, UserError, in_one_line

IMAGES = ("images", "x")
MAPS = ("masks", "maps", "labels", "annotations", "y")
OpenedArrays = tuple[ArraySource, np.ndarray, tuple[str, ...]]


def open_array_pairs(place: Path, names: Sequence[str]) -> OpenedArrays | None:
    """Opens a part of arrays by how it may be called, such as train_images and train_masks; without names the whole.

    Args:
        place: a folder with .npy files, or an .npz or HDF5 file.
        names: how the part may be called.

    Returns:
        (the images, their label maps [N, H, W] of whole numbers, what to know of them); None if it is not there.

    Raises:
        SettingError: it is there, and is not what it must be.
    """
    try:
        if place.is_dir():
            files = {path.stem: path for path in sorted(place.glob("*.npy"))}
            return _opened(
                place, files, names, lambda key: open_array(files[key], "train"), lambda key: _npy(files[key])
            )
        if place.suffix.lower() == ".npz":
            with np.load(place, allow_pickle=False) as arrays:
                keys = list(arrays.keys())
                return _opened(
                    place,
                    keys,
                    names,
                    lambda key: array_source(arrays[key], None, f"{place}:{key}"),
                    arrays.__getitem__,
                )
        if is_hdf5(place):
            return _hdf5(place, names)
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        raise SettingError("data_path", str(place), f"{in_one_line(str(error), 200)}; mend it") from error
    return None


def _npy(path: Path) -> np.ndarray:
    return StoredArray.npy(path).whole()


def _hdf5(path: Path, names: Sequence[str]) -> OpenedArrays | None:
    try:
        h5py: Any = library("h5py", str(path))
    except BadImageError as error:
        raise UserError(str(error)) from error
    with h5py.File(path, "r") as opened:
        keys = [key for key in opened if isinstance(opened[key], h5py.Dataset)]
        return _opened(path, keys, names, lambda key: open_hdf5(path, f"{key},", "train"), lambda key: opened[key][:])


def _opened(
    place: Path,
    keys: Iterable[str],
    names: Sequence[str],
    images_of: Callable[[str], ArraySource | None],
    maps_of: Callable[[str], Any],
) -> OpenedArrays | None:
    keys = [*keys]
    befores = [before for name in names for before in (f"{name}_",)] if names else [""]
    behinds = [f"_{name}" for name in names] if names else []
    for before, behind in [*((before, "") for before in befores), *(("", behind) for behind in behinds)]:
        images = next((key for name in IMAGES if (key := before + name + behind) in keys), None)
        maps = next((key for name in MAPS if (key := before + name + behind) in keys), None)
        if images is None or maps is None:
            continue
        source = images_of(images)
        if source is None:
            return None
        unused = [] if names else [key for key in keys if key not in (images, maps)]
        reason = f"beside {images} and {maps}, which are taken"
        left_out = (LeftOut("arrays", len(unused), reason, tuple(unused[:EXAMPLES])),) if unused else ()
        stock = Stock({"arrays": 2}, left_out, source.others.notes)
        return replace(source, others=stock), *checked_maps(maps_of(maps), source, f"{place} {maps}")
    return None


def checked_maps(maps: Any, images: ArraySource, origin: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns label maps as [N, H, W] of whole numbers, and what to know of them.

    Raises:
        SettingError: they are not whole numbers, or of another shape than the images.
    """
    maps, shape = np.asarray(maps), images.images.shape[:3]
    if maps.ndim == 4 and 1 in (maps.shape[1], maps.shape[3]):
        maps = maps[:, 0] if maps.shape[1] == 1 else maps[..., 0]
    if maps.shape != shape:
        remedy = "save one number per pixel, in the order and size of the images"
        if maps.ndim == 4 and maps.shape[:3] == shape:
            remedy = "if each class has a channel, save maps.argmax(axis=-1)"
        problem = f"has shape {list(maps.shape)}, and the images {list(shape)}"
        raise SettingError("data_path", origin, f"{problem}; {remedy}")
    if maps.dtype.kind not in "biu":
        raise SettingError("data_path", origin, f"holds {maps.dtype}; label maps need whole numbers, such as uint8")
    below = int((maps < 0).sum()) if maps.dtype.kind == "i" else 0
    return maps, (f"{origin}: {below:,} pixels with negative numbers count nowhere",) if below else ()
