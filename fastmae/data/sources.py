"""Sources: who has the bytes. Built-in digits, uint8 arrays in common files, image files in folders, tars and Parquet.

A source has a length, ``read(i)`` for any thread, a name for sample i and labels or none. It knows nothing of order,
crops or models. Nothing is unpickled, and sizes are compared with the file before anything is allocated.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import stat
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Literal, Protocol

import numpy as np

from fastmae.data.index import IMAGE_SUFFIXES, MAX_FILE_BYTES, WORTH_KEEPING, list_images
from fastmae.data.parquet import open_parquet
from fastmae.data.plan import Shards, describe_order, holdout
from fastmae.data.shards import expand_braces, open_shards, refuse_compressed
from fastmae.errors import UserError
from fastmae.facts import DataFacts

Split = Literal["train", "val"]

SHARD_SUFFIXES = (".tar", ".parquet")
VAL_FOLDERS = ("val", "test", "valid", "validation")
VAL_SHARD = re.compile(r"(?<![a-z])(val|valid|validation|test)(?![a-z])")
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
# DEFLATE cannot shrink by more, so a larger claim is a lie and nothing is allocated for it.
MAX_DEFLATE_RATIO = 1032


class Source(Protocol):
    """What the loader needs of a data set."""

    @property
    def kind(self) -> str:
        """`digits`, `array`, or `folder`: image files, wherever they lie."""

    @property
    def location(self) -> str:
        """Where the images lie, for people: completes "1,000 images …"."""

    @property
    def shards(self) -> Shards | None:
        """What is best read at about the same time; None where any order costs the same."""

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [length], or None."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | np.ndarray:
        """Sample ``index``: the bytes of an image file, or pixels uint8 [H, W, C]."""

    def name(self, index: int) -> str:
        """Where sample ``index`` comes from, for people."""


@dataclass(frozen=True)
class ArraySource:
    """Images that lie in one uint8 array, in memory or mapped from a file."""

    images: np.ndarray
    """uint8 [length, H, W, C]."""
    labels: np.ndarray | None
    origin: str
    kind: str = "array"
    shards = None

    @property
    def location(self) -> str:
        return f"of {' × '.join(map(str, self.images.shape[1:]))}"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return np.asarray(self.images[index])

    def name(self, index: int) -> str:
        return f"{self.origin}[{index}]"


@dataclass(frozen=True)
class FolderSource:
    """Image files, one a sample."""

    paths: tuple[str, ...]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    kind: str = "folder"
    beside: str = ""
    """What lies in the same folder and is not used."""
    damage: tuple[tuple[str, str], ...] = ()
    """(name, what is wrong) of folders whose images are missed."""
    shards = None

    @property
    def location(self) -> str:
        text = (f"in {len(self.classes)} class folders" if self.classes else "in files") + self.beside
        return "; ".join([text, *map(" ".join, self.damage)])

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """The bytes of an image file.

        Raises:
            OSError: gone, unreadable, not a file, or too large for an image.
        """
        with open(self.paths[index], "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a file")
            if status.st_size > MAX_FILE_BYTES:
                raise OSError(f"{status.st_size} bytes, over the limit of {MAX_FILE_BYTES}")
            return file.read()

    def name(self, index: int) -> str:
        return self.paths[index]


def _open_at_once(path: str, flags: int) -> int:
    """Opens without waiting for a writer, which a named pipe would."""
    return os.open(path, flags | os.O_NONBLOCK)


@dataclass(frozen=True)
class Subset:
    """Some samples of another source."""

    source: Source
    indices: np.ndarray
    shards = None

    @property
    def kind(self) -> str:
        return self.source.kind

    @property
    def location(self) -> str:
        return self.source.location

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))


@dataclass(frozen=True)
class Concat:
    """Sources one after another, of any kinds."""

    parts: tuple[Source, ...]

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [parts + 1]: the first sample of each part, and the length."""
        return np.cumsum([0, *map(len, self.parts)])

    @cached_property
    def kind(self) -> str:
        """That of the parts; `folder` if any is of image files, `array` if they differ otherwise."""
        kinds = {part.kind for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else "folder" if "folder" in kinds else "array"

    @property
    def location(self) -> str:
        return "in all: " + " + ".join(f"{len(part):,} {part.location}" for part in self.parts)

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Only if all parts have them: class folders are numbered anew by name, other numbers are taken as they are."""
        every = [part.labels for part in self.parts]
        present = [labels for labels in every if labels is not None]
        if len(present) < len(every):
            return None
        folders = [part for part in self.parts if isinstance(part, FolderSource)]
        if len(folders) == len(self.parts):
            names = sorted({name for part in folders for name in part.classes})
            numbers = {name: number for number, name in enumerate(names)}
            renumbered = (np.array([numbers[name] for name in part.classes], np.int64) for part in folders)
            present = [new[old] for new, old in zip(renumbered, present, strict=True)]
        return np.concatenate(present)

    @cached_property
    def shards(self) -> Shards | None:
        """Those of the parts; a sample of a part without any is a shard of its own."""
        if all(part.shards is None for part in self.parts):
            return None
        starts, windows = [np.zeros(1, np.int64)], []
        for first, part in zip(self.starts[:-1].tolist(), self.parts, strict=True):
            own = part.shards
            starts.append(first + (np.arange(1, len(part) + 1) if own is None else own.starts[1:]))
            if own is not None:
                # No part has more of its shards open at a time than when it is alone.
                windows.append(own.window * len(self) // len(part))
        return Shards(np.concatenate(starts), min(windows))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _place(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part], index - int(self.starts[part])

    def read(self, index: int) -> bytes | np.ndarray:
        part, inside = self._place(index)
        return part.read(inside)

    def name(self, index: int) -> str:
        part, inside = self._place(index)
        return part.name(inside)


def open_train(data_path: str | Sequence[str]) -> Source:
    """Finds out what ``data_path`` is and opens it, or its train part if it has parts; several paths become one source.

    Raises:
        UserError: nothing there, nothing usable in it, or a file that is not what it says.
    """
    parts = []
    for path in _each(data_path):
        source = _open(path, "train")
        if source is None or len(source) == 0:
            where = "" if source is None else f" {source.location}"
            raise UserError(f"--data_path {path}: holds no images{where}; give data that does")
        parts.append(source)
    return parts[0] if len(parts) == 1 else Concat(tuple(parts))


def open_val(data_path: str | Sequence[str]) -> Source | None:
    """The val (or test) part of the data; of several paths, those of all that have one; None when none has.

    Errors as ``open_train``.
    """
    opened = (_open(path, "val") for path in _each(data_path))
    parts = [source for source in opened if source is not None and len(source)]
    return Concat(tuple(parts)) if len(parts) > 1 else parts[0] if parts else None


def shown(data_path: str | Sequence[str]) -> str:
    """The paths as they were given, for people."""
    return data_path if isinstance(data_path, str) else " ".join(data_path)


def _each(data_path: str | Sequence[str]) -> list[str]:
    paths = [data_path] if isinstance(data_path, str) else list(data_path)
    if not paths:
        raise UserError("--data_path: must name at least one file or folder, or `digits`")
    return paths


def _open(data_path: str, split: Split) -> Source | None:
    if data_path == "digits":
        return _digits(split)
    path = Path(data_path).expanduser()
    try:
        if "{" in data_path and not path.exists():
            return _open_pattern(data_path) if split == "train" else None
        if not path.exists():
            raise UserError(f"--data_path {data_path}: no such file or folder; give an existing one, or `digits`")
        if not path.is_dir() and not path.is_file():
            raise UserError(f"--data_path {data_path}: a pipe or a device; give a file or a folder")
        return _open_folder(path, split) if path.is_dir() else _open_file(path, split)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--data_path {data_path}: cannot be read ({reason}); check or replace the file") from error


def describe(source: Source) -> DataFacts:
    """What the training defaults need to know. Image files differ in size and are taken to be colour."""
    size, channels = None, 3
    if source.kind != "folder":
        parts = source.parts if isinstance(source, Concat) else (source,)
        shapes = {np.shape(part.read(0)) for part in parts}
        sizes, depths = {shape[:2] for shape in shapes}, {shape[2] for shape in shapes}
        size = sizes.pop() if len(sizes) == 1 else None
        channels = depths.pop() if len(depths) == 1 else 3
    labelled = source.labels is not None and len(np.unique(source.labels)) > 1
    return DataFacts(
        kind=source.kind,
        channels=channels,
        size=size,
        labelled=labelled,
        length=len(source),
        order=describe_order(len(source), source.shards),
        location=source.location,
    )


def evenly_spaced(source: Source, count: int, run: int) -> np.ndarray:
    """About ``count`` samples that stand for all: sorted, each once.

    They are evenly spaced; of a source that is read a shard at a time, in evenly spaced runs of ``run``.
    """
    length = len(source)
    if source.shards is None or length <= count:
        return np.unique(np.linspace(0, length - 1, min(length, count)).astype(np.int64))
    starts = np.linspace(0, length - run, count // run).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(run))


def train_and_val(data_path: str | Sequence[str]) -> tuple[Source, Source]:
    """Both parts of a data set; without a val part, a fixed fifth of the train part is held out."""
    train, val = open_train(data_path), open_val(data_path)
    if val is not None:
        return train, val
    kept, held = holdout(len(train))
    return Subset(train, kept), Subset(train, held)


def _digits(split: Split) -> Source:
    """scikit-learn's 1797 digits of 8×8 pixels: a fixed fifth is the val part."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    indices = holdout(len(images))[split == "val"]
    return ArraySource(images[indices], data.target[indices].astype(np.int64), f"digits/{split}", kind="digits")


# --- files ------------------------------------------------------------------------------------------------------------


def _open_file(path: Path, split: Split) -> Source | None:
    name = path.name.lower()
    if name.endswith(".npz"):
        return _npz(path, split)
    if split == "val":
        return None
    refuse_compressed(path)
    if name.endswith(SHARD_SUFFIXES):
        return _shards([path])
    if name.endswith(".npy"):
        labels_path = path.with_name(f"{path.stem}_labels.npy")
        labels = _npy(labels_path) if labels_path.exists() else None
        return _array_source(_npy(path), labels, str(path))
    if _is_idx(path):
        return _array_source(_idx(path), _idx_labels(path), str(path))
    if name.endswith(".bin"):
        return _cifar([path])
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return FolderSource((str(path),), None, ())
    raise ValueError("not an image, .npy, .npz, .tar, .parquet, IDX or CIFAR .bin file")


def _array_source(images: np.ndarray, labels: np.ndarray | None, origin: str) -> ArraySource:
    """Checks an array's dtype and axes; [N, H, W] gains a channel axis."""
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


def _npy(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _npz(path: Path, split: Split) -> Source | None:
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
    return _array_source(images, labels, f"{path}:{images_name}")


def _npz_member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of an .npz: mapped if it is stored uncompressed, otherwise read after its size was checked."""
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
    with open(path, "rb") as file:  # the local header's own name and extra field decide where the data begin
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    start = info.header_offset + 30 + name_length + extra_length + header_size
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=shape)


def _is_idx(path: Path) -> bool:
    """IDX files begin with two zero bytes and a type code (0x08: unsigned byte)."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        return file.read(3) == b"\x00\x00\x08"


def _idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes (the MNIST format), mapped, or unpacked if gzipped."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        zeros, code, axes = struct.unpack(">HBB", file.read(4))
        if zeros != 0 or code != 8 or not 1 <= axes <= 4:
            raise ValueError(f"{path.name} is not an IDX file of unsigned bytes")
        shape = struct.unpack(f">{axes}I", file.read(4 * axes))
        size, start = math.prod(shape), 4 + 4 * axes
        if path.suffix != ".gz":
            held = path.stat().st_size - start
            if held != size:
                raise ValueError(f"{path.name} says {list(shape)} but holds {held} bytes")
            return np.memmap(path, dtype=np.uint8, mode="r", offset=start, shape=shape)
        if size > MAX_DEFLATE_RATIO * path.stat().st_size:
            raise ValueError(f"{path.name} says {list(shape)}, more than its {path.stat().st_size} bytes can unpack to")
        data = file.read(size + 1)
        if len(data) != size:
            raise ValueError(f"{path.name} says {list(shape)} but holds {len(data)} bytes or more")
        return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _idx_labels(images: Path) -> np.ndarray | None:
    """MNIST's naming: X-images-idx3-ubyte has its labels in X-labels-idx1-ubyte."""
    labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
    return _idx(labels) if labels != images and labels.exists() else None


def _cifar(paths: list[Path]) -> ArraySource:
    """CIFAR binary batches: records of one (CIFAR-10) or two (CIFAR-100: coarse, fine) label bytes and 3×32×32."""
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


# --- folders ----------------------------------------------------------------------------------------------------------


def _open_folder(path: Path, split: Split) -> Source | None:
    arrays = _array_folder(path, split)
    if arrays is not None:
        return arrays
    if split == "val":
        parts = [path / name for name in VAL_FOLDERS if (path / name).is_dir()]
        if parts:
            return _image_folder(parts[0], None)
        has_images = (path / "train").is_dir() or list_images(path).paths
        return None if has_images else _shards(_shards_in(path, "val"))
    if (path / "train").is_dir():
        return _image_folder(path / "train", None)
    return _image_folder(path, "train")


def _array_folder(path: Path, split: Split) -> Source | None:
    """A folder with MNIST's IDX files or CIFAR's binary batches."""
    for suffix in ("", ".gz"):
        images = path / f"{IDX_PREFIX[split]}-images-idx3-ubyte{suffix}"
        if images.exists():
            return _array_source(_idx(images), _idx_labels(images), str(images))
    names = {"train": ("data_batch_*.bin", "train.bin"), "val": ("test_batch.bin", "test.bin")}[split]
    batches = [file for name in names for file in sorted(path.glob(name))]
    return _cifar(batches) if batches else None


def _image_folder(path: Path, split: Split | None) -> Source | None:
    """The images of a folder if it has any, otherwise those of its shards (of a part, if it is not all one part)."""
    listing = list_images(path)
    # A folder of so many images is not read again for what else may be in it.
    shards = _shards_in(path, split) if len(listing.paths) < WORTH_KEEPING else []
    if not listing.paths and shards:
        return _shards(shards)
    if not listing.paths:
        for file in sorted(path.iterdir()):
            refuse_compressed(file)
    beside = f"; {len(shards)} {shards[0].suffix} files beside them are not used" if shards else ""
    damage = tuple((folder, "may not be read, so its images are missed") for folder in listing.unreadable)
    return FolderSource(listing.paths, listing.labels, listing.classes, beside=beside, damage=damage)


# --- shards -----------------------------------------------------------------------------------------------------------


def _shards_in(folder: Path, split: Split | None) -> list[Path]:
    """The tar or Parquet files directly inside a folder, sorted by name; None for those of every part.

    A name with the word val, validation, valid or test belongs to the val part, unless all have one.
    """
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.lower().endswith(SHARD_SUFFIXES) and entry.is_file()]
    found = [folder / name for name in sorted(names) if name[0] != "."]
    words = {path: match[1] for path in found if (match := VAL_SHARD.search(path.name.lower()))}
    if split is None or len(words) == len(found):
        return [] if split == "val" else found
    if split == "train":
        return [path for path in found if path not in words]
    return [path for path in words if words[path] != "test"] or list(words)


def _open_pattern(pattern: str) -> Source | None:
    """The shards that a brace pattern such as `part-{000..146}.tar` names, all of which must be there."""
    paths = [Path(name).expanduser() for name in expand_braces(pattern)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        count = f"{len(missing)} of its {len(paths)} files are not there"
        raise UserError(f"--data_path {pattern}: {count}, the first of them {missing[0]}; check the pattern")
    for path in paths:
        refuse_compressed(path)
        if not path.name.lower().endswith(SHARD_SUFFIXES):
            raise UserError(f"--data_path {pattern}: a pattern is for .tar or .parquet files, not {path.name}")
    return _shards(paths)


def _shards(paths: list[Path]) -> Source | None:
    if not paths:
        return None
    suffixes = {path.suffix.lower() for path in paths}
    if len(suffixes) > 1:
        raise UserError(f"{paths[0].parent}: holds both .tar and .parquet files; name those of one kind by a pattern")
    return open_shards(paths) if suffixes == {".tar"} else open_parquet(paths)
