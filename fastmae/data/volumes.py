"""Which files and folders hold stacks of images in a format of science, and what opens them."""

from __future__ import annotations

from pathlib import Path

from fastmae.data.arrays import ArraySource, Split
from fastmae.data.formats import hdf5, nifti, zarr
from fastmae.data.images import FolderSource
from fastmae.errors import SettingError
from fastmae.facts import ReadAs

Volumes = ArraySource | nifti.VolumeSource


def is_stack(path: Path) -> bool:
    """Tells whether this is a Zarr store, an HDF5 file or a NIfTI volume, by its name or, of HDF5, its first bytes."""
    if path.is_dir():
        return zarr.is_zarr(path)
    return nifti.is_nifti(path) or path.name.lower().endswith(hdf5.SUFFIXES) or hdf5.is_hdf5(path)


def open_stack(path: Path, keys: str | None, split: Split, read_as: ReadAs) -> Volumes | None:
    """Opens a part of what ``is_stack`` knows; None if it has no such part.

    Args:
        path: the file or folder.
        keys: which arrays in it, as ``chunks.choose_keys`` takes them; None to find them by names and shapes.
        split: the part.
        read_as: the layout of arrays, and the axis of volumes.

    Raises:
        UserError: a library is missing, or it holds no images.
        One of ``arrays.UNREADABLE``: it is damaged.
    """
    if path.is_dir():
        return zarr.open_zarr(path, keys, split, read_as.layout)
    if not nifti.is_nifti(path):
        return hdf5.open_hdf5(path, keys, split, read_as.layout)
    if keys is not None:
        raise SettingError("data_path", f"{path}::{keys}", "a NIfTI volume has no keys; give its path alone")
    return None if split == "val" else nifti.open_volumes(FolderSource((str(path),), None, ()), read_as)
