"""Images that lie in one array: NumPy's .npy and .npz, MNIST's IDX and CIFAR's binary files.

Nothing is unpickled, and a size that a file claims is compared with the file before anything is allocated for it.
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Literal

import numpy as np

from fastmae.data.stock import Stock

Split = Literal["train", "val"]

# Names of arrays inside an .npz, by part: ours, Keras' and MedMNIST's.
NPZ_IMAGES = {
    "train": ("train_images", "x_train", "images", "x", "arr_0"),
    "val": ("test_images", "x_test", "val_images", "x_val"),
}
NPZ_LABELS = {
    "train": ("train_labels", "y_train", "labels", "y"),
    "val": ("test_labels", "y_test", "val_labels", "y_val"),
}
IDX_PREFIX = {"train": "train", "val": "t10k"}
CIFAR_SIDE = 32
# What reading a damaged file raises; the last three come from the header of an .npy.
UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, struct.error, zipfile.BadZipFile, SyntaxError, TypeError, TokenError,
)  # fmt: skip
# DEFLATE cannot shrink data by more than this factor, so nothing is allocated for a larger claim.
MAX_DEFLATE_RATIO = 1032


@dataclass(frozen=True)
class ArraySource:
    """Images that lie in one uint8 array, in memory or mapped from a file."""

    images: np.ndarray
    """uint8 [length, H, W, C]."""
    labels: np.ndarray | None
    """int64 [length], or None."""
    origin: str
    """The file that they come from, for people."""
    kind: str = "array"
    shards = None

    @property
    def location(self) -> str:
        return f"of {' × '.join(map(str, self.images.shape[1:]))}"

    @property
    def stock(self) -> Stock:
        return Stock({"images": len(self)})

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        """Returns the pixels of an image, uint8 [H, W, C], without a copy."""
        return np.asarray(self.images[index])

    def name(self, index: int) -> str:
        return f"{self.origin}[{index}]"


def array_source(images: np.ndarray, labels: np.ndarray | None, origin: str) -> ArraySource:
    """Returns an array as a source, once its dtype and axes are checked; [N, H, W] gains a channel axis.

    Raises:
        ValueError: images that are not uint8 [N, H, W] or [N, H, W, C], or labels that are not N integers.
    """
    if images.dtype != np.uint8:
        raise ValueError(f"images must be uint8, {origin} holds {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or (len(images) and min(images.shape[1:]) < 1):
        raise ValueError(f"images must have shape [N, H, W] or [N, H, W, C], {origin} has {list(images.shape)}")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.size != len(images) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"{origin} has {len(images)} images but labels {labels.dtype} {list(labels.shape)}")
        labels = labels.reshape(-1).astype(np.int64)
    return ArraySource(images, labels, origin)


def open_array(path: Path, split: Split) -> ArraySource | None:
    """Opens an .npy, .npz, IDX or CIFAR file; None if it is none of these, or has no such part.

    Only an .npz can hold both parts; a file of any other kind is a train part.

    Raises:
        One of ``UNREADABLE``: the file is not what its name or its start says.
    """
    name = path.name.lower()
    if name.endswith(".npz"):
        return _npz(path, split)
    if split == "val":
        return None
    if name.endswith(".npy"):
        labels_path = path.with_name(f"{path.stem}_labels.npy")
        labels = _npy(labels_path) if labels_path.exists() else None
        return array_source(_npy(path), labels, str(path))
    if _is_idx(path):
        return array_source(_idx(path), _idx_labels(path), str(path))
    return _cifar([path]) if name.endswith(".bin") else None


def open_array_folder(path: Path, split: Split) -> ArraySource | None:
    """Opens a folder with MNIST's IDX files or CIFAR's binary batches; None if it has none of that part."""
    for suffix in ("", ".gz"):
        images = path / f"{IDX_PREFIX[split]}-images-idx3-ubyte{suffix}"
        if images.exists():
            return array_source(_idx(images), _idx_labels(images), str(images))
    names = {"train": ("data_batch_*.bin", "train.bin"), "val": ("test_batch.bin", "test.bin")}[split]
    batches = [file for name in names for file in sorted(path.glob(name))]
    return _cifar(batches) if batches else None


# --- NumPy ------------------------------------------------------------------------------------------------------------


def _npy(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _npz(path: Path, split: Split) -> ArraySource | None:
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        images_name = next((name for name in NPZ_IMAGES[split] if name in members), None)
        if images_name is None:
            if split == "val":
                return None
            raise ValueError(f"holds {', '.join(members)} but none of {', '.join(NPZ_IMAGES[split])}")
        labels_name = next((name for name in NPZ_LABELS[split] if name in members), None)
        images = _npz_member(path, archive, members[images_name])
        labels = None if labels_name is None else _npz_member(path, archive, members[labels_name])
    return array_source(images, labels, f"{path}:{images_name}")


def _npz_member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Reads one array of an .npz: maps it if it is stored uncompressed, else unpacks it once its size is checked."""
    info = archive.getinfo(name)
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(member)
        header_size = member.tell()
        if dtype.hasobject or fortran:
            raise ValueError(f"{name} must be a C-ordered array of numbers")
        if math.prod(shape) * dtype.itemsize != info.file_size - header_size:
            raise ValueError(f"{name} says {list(shape)} {dtype} but holds {info.file_size - header_size} bytes")
        if info.file_size > MAX_DEFLATE_RATIO * info.compress_size:
            raise ValueError(f"{name} says {info.file_size} bytes, more than {info.compress_size} can unpack to")
        if info.compress_type != zipfile.ZIP_STORED:
            return np.frombuffer(member.read(), dtype=dtype).reshape(shape)
    with open(path, "rb") as file:  # the data begin behind the name and the extra field of the local header
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    start = info.header_offset + 30 + name_length + extra_length + header_size
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)


# --- IDX --------------------------------------------------------------------------------------------------------------


def _is_idx(path: Path) -> bool:
    """Tells whether a file begins as IDX does: two zero bytes and a type code (0x08: unsigned byte)."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        return file.read(3) == b"\x00\x00\x08"


def _idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes (the MNIST format): maps it, or unpacks it if it is gzipped."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        zeros, code, axes = struct.unpack(">HBB", file.read(4))
        if zeros != 0 or code != 8 or not 1 <= axes <= 4:
            raise ValueError(f"{path.name} is not an IDX file of unsigned bytes")
        shape = struct.unpack(f">{axes}I", file.read(4 * axes))
        size, start = math.prod(shape), 4 + 4 * axes
        if path.suffix != ".gz":
            available = path.stat().st_size - start
            if available != size:
                raise ValueError(f"{path.name} says {list(shape)} but holds {available} bytes")
            return np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=shape)
        if size > MAX_DEFLATE_RATIO * path.stat().st_size:
            raise ValueError(f"{path.name} says {list(shape)}, more than its {path.stat().st_size} bytes can unpack to")
        data = file.read(size + 1)
        if len(data) != size:
            raise ValueError(f"{path.name} says {list(shape)} but holds {len(data)} bytes or more")
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _idx_labels(images: Path) -> np.ndarray | None:
    """Reads the labels of X-images-idx3-ubyte from X-labels-idx1-ubyte, as MNIST names them; None without that file."""
    labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    return _idx(labels) if labels != images and labels.exists() else None


# --- CIFAR ------------------------------------------------------------------------------------------------------------


def _cifar(paths: list[Path]) -> ArraySource:
    """Reads CIFAR's records: one label byte (CIFAR-10) or two (CIFAR-100: coarse, fine), then 3×32×32 pixels."""
    pixels = 3 * CIFAR_SIDE * CIFAR_SIDE
    batches = []
    for path in paths:
        size = path.stat().st_size
        label_bytes = next((n for n in (1, 2) if size and size % (pixels + n) == 0), None)
        if label_bytes is None:
            raise ValueError(f"{path.name}: {size} bytes are not whole CIFAR records")
        batches.append(np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, pixels + label_bytes))
    records = batches[0] if len(batches) == 1 else np.concatenate(batches)
    label_bytes = records.shape[1] - pixels
    images = records[:, label_bytes:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1)
    return ArraySource(images, records[:, label_bytes - 1].astype(np.int64), str(paths[0].parent))
