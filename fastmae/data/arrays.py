"""Images that lie in one array: NumPy's .npy and .npz, MNIST's IDX and CIFAR's binary files.

Arrays have any numeric dtype, and images leave here in it, bit for bit. decode.py makes pixels of a batch of them.
Nothing is unpickled, and a size that a file claims is compared with the file, and with the memory that is left, before
anything is allocated for it. Files that are not compressed are read by position, an image at a time.
"""

from __future__ import annotations

import gzip
import lzma
import math
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np

from fastmae.data.memory import available_memory, readable
from fastmae.data.openfile import OpenFile
from fastmae.data.plan import Shards
from fastmae.data.stock import EXAMPLES, LeftOut, Stock
from fastmae.errors import SettingError, UserError, in_one_line
from fastmae.facts import LayoutName

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
IDX_TYPES = {8: "uint8", 9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}
CIFAR_BATCHES = {"train": ("data_batch_*.bin", "train.bin"), "val": ("test_batch.bin", "test.bin")}
CIFAR_SIDE = 32
# What reading a damaged file raises: zipfile raises RuntimeError and NotImplementedError for what it cannot unpack.
UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, IndexError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError,
)  # fmt: skip
# DEFLATE cannot shrink data by more than this factor, so nothing is allocated for a larger claim.
MAX_DEFLATE_RATIO = 1032
# An axis of so few entries holds channels where it could be one of channels or one of pixels.
FEW = 4
# A row or a column of an image has at least so many pixels where another reading makes sense as well.
MANY = 16


class Images(Protocol):
    """Images of one shape and dtype, wherever they lie."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, H, W, C]."""

    @property
    def dtype(self) -> np.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns the pixels of an image, [H, W, C]."""


@dataclass(frozen=True)
class FileRows:
    """Images of one shape that lie in a file, each read by position when it is asked for."""

    file: OpenFile
    shape: tuple[int, ...]
    """[N, H, W, C]."""
    start: int
    """The byte at which the first image begins."""
    step: int
    """The bytes from the start of one image to the start of the next."""
    planes: bool = False
    """Whether an image is stored as [C, H, W]."""
    dtype: np.dtype = np.dtype(np.uint8)  # noqa: RUF009  # a dtype never changes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns the pixels of an image, [H, W, C] of ``dtype``.

        Raises:
            UserError: the file was rewritten or cut since it was opened, or the disk failed.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        height, width, channels = self.shape[1:]
        pixels = np.empty((channels, height, width) if self.planes else (height, width, channels), self.dtype)
        is_whole = self.file.read_into(pixels, self.start + index * self.step)
        if not is_whole or not self.file.is_unchanged():
            raise changed(self.file.path)
        return pixels.transpose(1, 2, 0) if self.planes else pixels

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Returns the pixels of several images, [n, H, W, C]; errors are those of one."""
        height, width, channels = self.shape[1:]
        shape = (channels, height, width) if self.planes else (height, width, channels)
        pixels = np.empty((len(indices), *shape), self.dtype)
        for image, index in zip(pixels, indices.tolist(), strict=True):
            if not self.file.read_into(image, self.start + index * self.step):
                raise changed(self.file.path)
        if not self.file.is_unchanged():
            raise changed(self.file.path)
        return pixels.transpose(0, 2, 3, 1) if self.planes else pixels


def changed(path: str) -> UserError:
    """Returns the error for a file that others rewrote or cut while it was open."""
    return UserError(f"{path}: changed during the run, its images cannot be trusted; put it back and start again")


def as_native(pixels: np.ndarray) -> np.ndarray:
    """Returns numbers in the byte order of this machine, and truth values as uint8: 0 and 255."""
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


@dataclass(frozen=True)
class ArraySource:
    """Images that lie in one array of any numeric dtype: in memory, in a file, or in chunks of one."""

    images: Images
    """[length, H, W, C]."""
    labels: np.ndarray | None
    """int64 [length], or None."""
    origin: str
    """The file that they come from, for people."""
    kind: str = "array"
    others: Stock = field(default_factory=Stock)
    """What else lies there, and what to know of the images."""
    shards: Shards | None = None
    classes: tuple[str, ...] = ()
    """The names of the classes that the labels number, if they have names."""

    @property
    def location(self) -> str:
        dtype = "" if self.images.dtype == np.uint8 else f" of {self.images.dtype.newbyteorder('=')}"
        return f"of {' × '.join(map(str, self.images.shape[1:]))}{dtype}"

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        """The shape [H, W, C] of all images."""
        return {self.images.shape[1:]}

    @property
    def stock(self) -> Stock:
        """The images, the arrays of an .npz, and the files of a folder."""
        return Stock({"images": len(self), **self.others.used}, self.others.left_out, self.others.notes)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        """Returns the pixels of an image, [H, W, C] of the dtype of the array, truth values as uint8.

        Raises:
            UserError: the file that it lies in was changed.
            OSError: it is damaged there.
        """
        return as_native(np.asarray(self.images[index]))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Returns the pixels of several images, [n, H, W, C] in the dtype of ``read``, of an array that allows it."""
        images: Any = self.images
        return as_native(images.rows(indices) if isinstance(images, FileRows) else images[indices])

    def name(self, index: int) -> str:
        return f"{self.origin}[{index}]"


def array_source(
    images: np.ndarray, labels: np.ndarray | None, origin: str, layout_name: LayoutName = "auto"
) -> ArraySource:
    """Returns an array in memory as a source, once its dtype and axes are checked; [N, H, W] gains a channel axis.

    Raises:
        UserError: images that are not numbers, or of a shape that is not images, or labels that are not N integers.
    """
    layout = layout_of(images.dtype, images.shape, origin, layout_name)
    images = images.reshape(layout.stored)
    if layout.planes:
        images = images.transpose(0, 2, 3, 1)
    return ArraySource(images, checked_labels(labels, len(images), origin), origin, others=Stock(notes=layout.notes))


def open_array(path: Path, split: Split, layout: LayoutName = "auto") -> ArraySource | None:
    """Opens an .npy, .npz, IDX or CIFAR file; None if it is none of these, or has no such part.

    Only an .npz can hold both parts; a file of any other kind is a train part.

    Raises:
        UserError: the file is whole, but what it holds are not images.
        One of ``UNREADABLE``: the file is not what its name or its start says.
    """
    name = path.name.lower()
    if name.endswith(".npz"):
        return _npz(path, split, layout)
    if split == "val":
        return None
    if name.endswith(".npy"):
        labels_path = path.with_name(f"{path.stem}_labels.npy")
        has_labels = labels_path.exists()
        images, labels = StoredArray.npy(path), StoredArray.npy(labels_path) if has_labels else None
        return _source(images, labels, str(path), Stock({"files": 1 + has_labels}), layout)
    if _is_idx(path):
        return _idx_source(path, Stock({"files": len(_with_labels(path))}))
    return _cifar([path], Stock({"files": 1})) if name.endswith(".bin") else None


def open_array_folder(path: Path, split: Split) -> ArraySource | None:
    """Opens a folder with MNIST's IDX files or CIFAR's binary batches; None if it has none of that part."""
    images = _idx_images(path, split)
    if images is not None:
        files = [
            file for part in ("train", "val") if (found := _idx_images(path, part)) for file in _with_labels(found)
        ]
        return _idx_source(images, _folder_stock(path, files, split))
    batches = _cifar_batches(path, split)
    if not batches:
        return None
    return _cifar(batches, _folder_stock(path, [*_cifar_batches(path, "train"), *_cifar_batches(path, "val")], split))


def _folder_stock(folder: Path, files: Sequence[Path], split: Split) -> Stock:
    """Returns which files of a folder are used, by either part; the val part counts none, as the train part has."""
    if split == "val":
        return Stock()
    used = {*map(str, files)}
    below = [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names]
    others = sorted(os.path.relpath(path, folder) for path in below if path not in used)
    hidden = [name for name in others if name.startswith(".") or f"{os.sep}." in name]
    shown = sorted({*others} - {*hidden})
    beside = "beside MNIST's or CIFAR's own files, which are taken; move them to a folder of their own"
    left_out = [
        LeftOut("files", len(names), reason, tuple(names[:EXAMPLES]))
        for names, reason in ((shown, beside), (hidden, "hidden, as their names begin with a dot"))
        if names
    ]
    return Stock({"files": len(used)}, tuple(left_out))


# --- what an array means ----------------------------------------------------------------------------------------------


SERIES = ("tc", "ct")
"""The layouts of time series: [N, T, C] and [N, C, T], images of one row."""


@dataclass(frozen=True)
class Layout:
    """How the axes of an array are read."""

    stored: tuple[int, ...]
    """[N, H, W, C], or [N, C, H, W] with ``planes``."""
    planes: bool = False
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, H, W, C]."""
        n, *axes = self.stored
        return (n, axes[1], axes[2], axes[0]) if self.planes else self.stored


def refuse_no_numbers(dtype: np.dtype, origin: str) -> None:
    """Raises UserError for a dtype that is not of numbers that an image can have."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        remedy = "save np.abs(array)" if dtype.kind == "c" else "save its pixels as numbers"
        raise UserError(f"images must be integers or floating-point numbers, {origin} holds {dtype}; {remedy}")


def layout_of(dtype: np.dtype, shape: tuple[int, ...], origin: str, name: LayoutName = "auto") -> Layout:
    """Returns how an array is read as images.

    [N, C, H, W] is read as such if ``name`` says so, or with `auto` where it cannot be [N, H, W, C]: at most four
    channels before two longer axes.

    Raises:
        UserError: not numbers, no images, one image alone, or axes in an order that is guessed too easily.
    """
    refuse_no_numbers(dtype, origin)
    note = (f"{origin} holds truth values, which are read as 0 and 255",) if dtype == np.bool_ else ()
    layout = _axes(shape, origin, name)
    return Layout(layout.stored, layout.planes, (*note, *layout.notes))


def _axes(shape: tuple[int, ...], origin: str, name: LayoutName) -> Layout:
    has = f"images must have shape [N, H, W] or [N, H, W, C], {origin} has {list(shape)}"
    if name in SERIES:
        if len(shape) != 3 or (shape[0] and min(shape[1:]) < 1):
            raise SettingError(
                "layout", name, f"is for series [N, {', '.join(name.upper())}], {origin} has {list(shape)}"
            )
        return Layout((shape[0], 1, *shape[1:])) if name == "tc" else Layout((*shape[:2], 1, shape[2]), True)
    if len(shape) == 2:
        side = math.isqrt(shape[1])
        rows = f", or if its rows are images save array.reshape(-1, {side}, {side})" if side**2 == shape[1] else ""
        raise UserError(f"{has}, which is one image; save array[None]{rows}, or train --model mae_mlp on its rows")
    if len(shape) not in (3, 4) or (shape[0] and min(shape[1:]) < 1):
        raise UserError(f"{has}; save it in one of these")
    if len(shape) == 3:
        return _gray_axes(shape, has, origin)
    n, second, third, last = shape
    if name != "auto":
        return Layout(shape, name == "chw")
    if last <= FEW or not n:
        return Layout(shape)
    if third <= FEW < second and (n == second or third == 3):
        raise UserError(f"{has}, which is [H, W, C, N], as MATLAB has it; save array.transpose(3, 0, 1, 2)")
    is_square = third == last
    if second <= FEW < third and (is_square or last >= MANY):
        plain = f"{n:,} images of {third} × {last} × {second}"
        return Layout(shape, True, (f"{origin} has shape {list(shape)}, [N, C, H, W], and is read as {plain}",))
    if is_square and second != third:
        problem = f"{has}, which looks like [N, C, H, W]; set it to chw or to hwc, or save array.transpose(0, 2, 3, 1)"
        raise SettingError("layout", name, problem)
    note = f"{origin} has shape {list(shape)} and is read as images of {second} × {third} with {last} channels; if its"
    note += " axes are [N, C, H, W], use --layout chw"
    return Layout(shape, notes=(note,) if second < last and second != third else ())


def _gray_axes(shape: tuple[int, ...], has: str, origin: str) -> Layout:
    n, height, width = shape
    if width <= FEW < height:
        raise UserError(
            f"{has}, which is one image [H, W, C]; save array[None], or for series [N, T, C] use --layout tc"
        )
    note = f"{origin} has shape {list(shape)} and is read as {n} gray images of {height} × {width}; if it is one"
    note += " image [C, H, W], save array.transpose(1, 2, 0)[None]"
    along_last = (
        f"{origin} has shape {list(shape)} and is read as {n} gray images of {height} × {width}; if the images "
        "are along its last axis, as MATLAB has them, save array.transpose(2, 0, 1)"
    )
    notes = (note,) if n in (3, FEW) else (along_last,) if n == height != width else ()
    return Layout((*shape, 1), notes=notes)


def checked_labels(labels: np.ndarray | None, count: int, origin: str) -> np.ndarray | None:
    """Returns labels int64 [count], from integers of any size, [N] or [N, 1]."""
    if labels is None:
        return None
    labels = np.asarray(labels)
    refuse_labels(labels.dtype, labels.shape, count, origin)
    if labels.size and labels.max() > np.iinfo(np.int64).max:
        raise UserError(f"{origin} has the label {labels.max()}, which is too large; number the classes from 0 on")
    return labels.reshape(-1).astype(np.int64)


def refuse_labels(dtype: np.dtype, shape: tuple[int, ...], count: int, origin: str) -> None:
    """Raises UserError for labels that are not one integer per image."""
    if math.prod(shape) == count and len(shape) >= 1 and shape[0] == count and np.issubdtype(dtype, np.integer):
        return
    remedy = "save one integer for each image, in the order of the images, or rename the file of labels"
    if np.issubdtype(dtype, np.floating) and math.prod(shape) == count:
        remedy = "save labels.astype(np.int64)"
    elif len(shape) == 2 and shape[0] == count:
        remedy = "if they are one-hot, save labels.argmax(axis=1)"
    raise UserError(f"{origin} has {count} images but labels {dtype} {list(shape)}; {remedy}")


# --- arrays in files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredArray:
    """An array in a file: where it lies, or the array itself where it had to be unpacked."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: OpenFile | None = None
    start: int = 0
    """The byte at which its entries begin."""
    fortran: bool = False
    """Whether the first axis is the one whose entries lie beside each other."""
    unpacked: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def npy(cls, path: Path) -> StoredArray:
        """Finds the array in an .npy file."""
        file = OpenFile(path)
        if file.read(4, 0) == b"PK\x03\x04":
            raise ValueError(f"{path.name} is an .npz archive, which holds several arrays; call it .npz")
        with open(os.dup(file.descriptor), "rb") as start:
            dtype, shape, fortran = npy_header(start, path.name)
            position = start.tell()
        size, rest = math.prod(shape) * dtype.itemsize, file.size - position
        if size > rest:
            raise ValueError(f"{path.name} says {list(shape)} {dtype} but holds {rest} bytes")
        note = (
            f"{path}: {rest - size:,} bytes behind its first array are left out; save each array in a file of its own"
        )
        return cls(dtype, shape, file, position, fortran and len(shape) > 1, notes=(note,) if rest > size else ())

    def whole(self) -> np.ndarray:
        """Returns the array, in memory."""
        if self.unpacked is not None:
            return self.unpacked
        assert self.file is not None
        refuse_beyond_memory(math.prod(self.shape) * self.dtype.itemsize, self.file.path)
        array = np.empty(math.prod(self.shape), self.dtype)
        if not self.file.read_into(array, self.start):
            raise ValueError(f"{self.file.path} was cut while it was read")
        return array.reshape(self.shape, order="F" if self.fortran else "C")


def _source(
    images: StoredArray, labels: StoredArray | None, origin: str, others: Stock, layout_name: LayoutName = "auto"
) -> ArraySource:
    """Returns an array in a file as a source: read by position, or whole where its images do not lie in one piece."""
    layout = layout_of(images.dtype, images.shape, origin, layout_name)
    count = layout.shape[0]
    notes = [*images.notes, *layout.notes]
    numbers = None
    if labels is not None:
        refuse_labels(labels.dtype, labels.shape, count, origin)
        numbers = checked_labels(labels.whole(), count, origin)
        notes += labels.notes
    others = Stock(others.used, others.left_out, (*others.notes, *notes))
    if images.file is None or images.fortran:
        pixels = images.whole().reshape(layout.stored)
        pixels = pixels.transpose(0, 2, 3, 1) if layout.planes else pixels
        return ArraySource(pixels, numbers, origin, others=others)
    step = math.prod(layout.stored[1:]) * images.dtype.itemsize
    rows = FileRows(images.file, layout.shape, images.start, step, layout.planes, images.dtype)
    return ArraySource(rows, numbers, origin, others=others)


def refuse_beyond_memory(size: int, name: str) -> None:
    """Raises ValueError for what takes more memory than is left."""
    available = available_memory()
    if available is not None and size > available:
        raise ValueError(f"{name} takes {readable(size)} of memory, of which {readable(available)} are left; split it")


def npy_header(file: BinaryIO, name: str) -> tuple[np.dtype, tuple[int, ...], bool]:
    """Reads the start of an .npy file: (dtype, shape, whether it is in Fortran's order)."""
    try:
        with warnings.catch_warnings():  # of Python, about what a damaged header would mean as a program
            warnings.simplefilter("ignore")
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
    except Exception as error:  # NumPy lets Python parse the header, which may raise anything
        raise ValueError(f"{name} does not begin as an .npy file does: {in_one_line(str(error), 100)}") from error
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are never unpickled")
    if min(shape, default=0) < 0:
        raise ValueError(f"{name} says {list(shape)}")
    return dtype, shape, fortran


# --- .npz -------------------------------------------------------------------------------------------------------------


def _npz(path: Path, split: Split, layout: LayoutName) -> ArraySource | None:
    file = OpenFile(path)
    with open(os.dup(file.descriptor), "rb") as archive_file, zipfile.ZipFile(archive_file) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        names = {part: (_first(NPZ_IMAGES[part], members), _first(NPZ_LABELS[part], members)) for part in NPZ_IMAGES}
        images_name, labels_name = names[split]
        if images_name is None:
            if split == "val":
                return None
            known = ", ".join(NPZ_IMAGES[split])
            raise ValueError(f"holds {_few(members)} but none of {known}; save the images under one of these names")
        images = _npz_member(file, archive, members[images_name])
        labels = None if labels_name is None else _npz_member(file, archive, members[labels_name])
    stock = Stock()
    if split == "train":  # of both parts
        used = {name for images, labels in names.values() if images for name in (images, labels) if name}
        unused = [name for name in members if name not in used]
        reason = f"their names are none of {', '.join((*NPZ_IMAGES['train'], *NPZ_IMAGES['val']))}, or come second"
        left_out = (LeftOut("arrays", len(unused), reason, tuple(unused[:EXAMPLES])),) if unused else ()
        stock = Stock({"files": 1, "arrays": len(used)}, left_out)
    return _source(images, labels, f"{path}:{images_name}", stock, layout)


def _first(names: Iterable[str], members: dict[str, str]) -> str | None:
    return next((name for name in names if name in members), None)


def _few(names: Iterable[str]) -> str:
    """Lists a few of the names."""
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


def _npz_member(file: OpenFile, archive: zipfile.ZipFile, name: str) -> StoredArray:
    """Finds an array of an .npz: where it lies if it is stored uncompressed, else unpacked once its size is checked."""
    info = archive.getinfo(name)
    with archive.open(name) as member:
        dtype, shape, fortran = npy_header(member, name)  # type: ignore[arg-type]  # a zip member is read alike
        header_size = member.tell()
        fortran = fortran and len(shape) > 1
        if math.prod(shape) * dtype.itemsize != info.file_size - header_size:
            raise ValueError(f"{name} says {list(shape)} {dtype} but holds {info.file_size - header_size} bytes")
        if info.compress_type != zipfile.ZIP_STORED:
            if info.file_size > MAX_DEFLATE_RATIO * info.compress_size:
                raise ValueError(f"{name} says {info.file_size} bytes, more than {info.compress_size} can unpack to")
            refuse_beyond_memory(info.file_size, name)
            data = member.read()
            if len(data) != info.file_size - header_size:
                raise ValueError(f"{name} says {list(shape)} {dtype} but holds {len(data)} bytes")
            array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
            return StoredArray(dtype, shape, unpacked=array)
    # The data begin behind the name and the extra field of the local header.
    name_length, extra_length = struct.unpack("<HH", file.read(4, info.header_offset + 26))
    start = info.header_offset + 30 + name_length + extra_length + header_size
    if start + math.prod(shape) * dtype.itemsize > file.size:
        raise ValueError(f"{name} ends behind the end of the file")
    return StoredArray(dtype, shape, file, start, fortran)


# --- IDX --------------------------------------------------------------------------------------------------------------


def _is_idx(path: Path) -> bool:
    """Tells whether a file begins as IDX does: two zero bytes and a type code (0x08: unsigned byte).

    Of other types only files are taken that are also named so, because other formats begin alike.
    """
    OpenFile(path)  # a regular file
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        start = file.read(3)
    is_named = "idx" in path.name.lower()
    return start == b"\x00\x00\x08" or (is_named and start[:2] == b"\x00\x00" and start[2:] != b"")


def _idx_images(folder: Path, split: str) -> Path | None:
    """Returns the file of a part's images, as MNIST names it; the unpacked one where both exist."""
    names = (f"{IDX_PREFIX[split]}-images-idx3-ubyte{suffix}" for suffix in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).exists()), None)


def _idx_labels(images: Path) -> Path | None:
    """Returns the file X-labels-idx1-ubyte for X-images-idx3-ubyte, as MNIST names them; None if there is none."""
    labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    return labels if labels != images and labels.exists() else None


def _with_labels(images: Path) -> list[Path]:
    labels = _idx_labels(images)
    return [images] if labels is None else [images, labels]


def _idx_source(images: Path, others: Stock) -> ArraySource:
    labels = _idx_labels(images)
    return _source(_idx(images), None if labels is None else _idx(labels), str(images), others)


def _idx(path: Path) -> StoredArray:
    """Finds the array in an IDX file, as MNIST has them, or unpacks it if it is gzipped. Its numbers are big-endian."""
    file = OpenFile(path)
    is_packed = path.suffix == ".gz"
    with open(os.dup(file.descriptor), "rb") as raw, gzip.GzipFile(fileobj=raw) if is_packed else raw as data:
        zeros, code, axes = struct.unpack(">HBB", data.read(4))
        if zeros != 0 or code not in IDX_TYPES or not 1 <= axes <= 4:
            raise ValueError(f"{path.name} is not an IDX file of numbers")
        dtype = np.dtype(IDX_TYPES[code]).newbyteorder(">")
        shape = struct.unpack(f">{axes}I", data.read(4 * axes))
        size, start = math.prod(shape) * dtype.itemsize, 4 + 4 * axes
        if not is_packed:
            if file.size - start != size:
                raise ValueError(f"{path.name} says {list(shape)} but holds {file.size - start} bytes")
            return StoredArray(dtype, shape, file, start)
        if size > MAX_DEFLATE_RATIO * file.size:
            raise ValueError(f"{path.name} says {list(shape)}, more than its {file.size} bytes can unpack to")
        refuse_beyond_memory(size, path.name)
        content = data.read(size + 1)
        if len(content) != size:
            raise ValueError(f"{path.name} says {list(shape)} but holds {len(content)} bytes or more")
        return StoredArray(dtype, shape, unpacked=np.frombuffer(content, dtype).reshape(shape))


# --- CIFAR ------------------------------------------------------------------------------------------------------------


def _cifar_batches(folder: Path, split: str) -> list[Path]:
    return [file for name in CIFAR_BATCHES[split] for file in sorted(folder.glob(name))]


def _cifar(paths: list[Path], others: Stock) -> ArraySource:
    """Reads CIFAR's records: one label byte (CIFAR-10) or two (CIFAR-100: coarse, fine), then 3×32×32 pixels.

    The images of a single file stay there, those of several are put together in memory.
    """
    pixels = 3 * CIFAR_SIDE * CIFAR_SIDE
    files, counts, widths = [], [], set()
    for path in paths:
        file = OpenFile(path)
        label_bytes = next((n for n in (1, 2) if file.size and file.size % (pixels + n) == 0), None)
        if label_bytes is None:
            raise ValueError(f"{path.name}: {file.size} bytes are not whole CIFAR records")
        files.append(file)
        counts.append(file.size // (pixels + label_bytes))
        widths.add(label_bytes)
    if len(widths) > 1:
        raise ValueError("both records of CIFAR-10 and of CIFAR-100")
    label_bytes = widths.pop()
    step, total = pixels + label_bytes, sum(counts)
    origin = str(paths[0].parent)
    if len(files) == 1:
        labels = np.array([file.read(1, i * step + label_bytes - 1)[0] for i in range(total)], np.int64)
        rows = FileRows(files[0], (total, CIFAR_SIDE, CIFAR_SIDE, 3), label_bytes, step, planes=True)
        return ArraySource(rows, labels, origin, others=others)
    refuse_beyond_memory(total * step, origin)
    records = np.empty((total, step), np.uint8)
    first = 0
    for file, count in zip(files, counts, strict=True):
        if not file.read_into(records[first : first + count], 0):
            raise ValueError(f"{file.path} was cut while it was read")
        first += count
    images = records[:, label_bytes:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1)
    return ArraySource(images, records[:, label_bytes - 1].astype(np.int64), origin, others=others)
