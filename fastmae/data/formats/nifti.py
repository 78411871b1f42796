"""NIfTI volumes (`.nii`, `.nii.gz`), understood by nibabel: every slice along an axis is an image.

Headers are read and checked when a source is opened; nibabel says what they mean. A slice is turned as the affine says,
to the closest of the axes of the body, and shown as radiologists do: its rows run from the front to the back or from
the top to the bottom, its columns from the patient's right to the left, or of sagittal slices from the front to the
back. That is how DICOM stores them. Voxels are scaled by the slope and intercept of the header, as nibabel scales them.

A volume is read whole and kept while it is in use. Its slices are a shard of the order, and few volumes are in use at
a time, so that a gzipped file is not unpacked for each slice.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fastmae.data.arrays import UNREADABLE, changed, refuse_beyond_memory
from fastmae.data.images import FolderSource
from fastmae.data.index import Index, cache_file, is_settled, read_index, write_index
from fastmae.data.memory import readable
from fastmae.data.openfile import OpenFile
from fastmae.data.parquet import HELD_BYTES, MAX_GROUP_BYTES, MIN_HELD, Recent
from fastmae.data.plan import Shards
from fastmae.data.stock import EXAMPLES, LeftOut, Stock, count_of
from fastmae.errors import SettingError, UserError, in_one_line, install_hint
from fastmae.facts import AxisName, ReadAs

SUFFIXES = (".nii", ".nii.gz")
AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""The axes of the closest canonical array: to the right, to the front, to the top (RAS+)."""
HEADERS = {348: "Nifti1Header", 540: "Nifti2Header"}
HEADER_BYTES = 544
# Where voxels begin at the latest: no extension of a header takes more.
MAX_OFFSET = 64 << 20
MAX_DEFLATE_RATIO = 1032
PIECE = 1 << 20
THREADS = 16
MAX_CHANNELS = 256


@dataclass(frozen=True)
class Volume:
    """What the header of a file says, and how its array becomes slices."""

    path: str
    stamp: tuple[int, int]
    """(size, modification time in ns) of the file."""
    is_packed: bool
    dtype: np.dtype
    """Of the voxels as they are stored."""
    shape: tuple[int, int, int, int, int]
    """[X, Y, Z, T, C] as stored: T volumes of C channels."""
    offset: int
    """The byte at which the voxels begin, once unpacked."""
    scale: tuple[float, float] | None
    """Slope and intercept; None where voxels stay as they are."""
    order: tuple[int, int, int]
    """Of rows, columns and slices, the axis of the array."""
    flips: tuple[bool, bool, bool]
    """Of rows, columns and slices, whether they run against the array."""

    @property
    def slices(self) -> int:
        """How many slices each of the T volumes has."""
        return self.shape[self.order[2]]

    @property
    def image(self) -> tuple[int, int, int]:
        """The shape [H, W, C] of a slice."""
        return self.shape[self.order[0]], self.shape[self.order[1]], self.shape[4]

    @property
    def voxels(self) -> int:
        """The bytes of all voxels as they are stored."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def blocks(self) -> int:
        """How many parts of the file are read apart: its T volumes, but a gzipped file is unpacked whole."""
        return 1 if self.is_packed else self.shape[3]

    def read(self, block: int) -> np.ndarray:
        """Returns the voxels of a block as they are stored, [X, Y, Z, T, C] in Fortran's order.

        Raises:
            UserError: the file was changed since it was opened.
            OSError: it is damaged.
        """
        try:
            file = OpenFile(self.path)
            if file.stamp != self.stamp:
                raise changed(self.path)
            if self.is_packed:
                data = np.frombuffer(_unpacked(file, self.offset, self.voxels), self.dtype)
                return data.reshape(self.shape, order="F")
            if self.shape[4] > 1 and self.shape[3] > 1:  # channels are the last axis: those of a volume lie apart
                data = np.empty(math.prod(self.shape), self.dtype)
                is_whole = file.read_into(data, self.offset)
                voxels = data.reshape(self.shape, order="F")[..., block : block + 1, :]
            else:
                part = (*self.shape[:3], 1, self.shape[4])
                data = np.empty(math.prod(part), self.dtype)
                is_whole = file.read_into(data, self.offset + block * data.nbytes)
                voxels = data.reshape(part, order="F")
        except (ValueError, EOFError, zlib.error) as error:
            raise OSError(f"{self.path}: {' '.join(str(error).split())}") from error
        if not is_whole:
            raise changed(self.path)
        return voxels

    def slice_of(self, voxels: np.ndarray, number: int, time: int) -> np.ndarray:
        """Returns slice ``number`` of volume ``time`` of a block as pixels [H, W, C], scaled and in native order."""
        number = self.slices - 1 - number if self.flips[2] else number
        plane = np.take(voxels[..., time, :], number, axis=self.order[2])
        # np.take leaves the other two axes in their order.
        pixels = plane if self.order[0] < self.order[1] else plane.transpose(1, 0, 2)
        pixels = pixels[:: -1 if self.flips[0] else 1, :: -1 if self.flips[1] else 1]
        return np.ascontiguousarray(self._scaled(pixels))

    def _scaled(self, pixels: np.ndarray) -> np.ndarray:
        """Returns voxels as nibabel scales them; in float32 where that keeps all of them apart, else in float64."""
        if self.scale is None:
            return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
        from nibabel.volumeutils import apply_read_scaling

        scaled = apply_read_scaling(pixels, *map(np.float64, self.scale))
        return scaled.astype(np.float32) if self._fits_float32() else scaled

    def _fits_float32(self) -> bool:
        """Tells whether scaled voxels that differ differ in float32 as well, whatever they are."""
        if self.dtype.kind == "f":
            return self.dtype.itemsize <= 4
        slope, intercept = self.scale or (1.0, 0.0)
        limits = np.iinfo(self.dtype)
        ends = [abs(limits.min * slope + intercept), abs(limits.max * slope + intercept)]
        with np.errstate(over="ignore"):
            return bool(np.isfinite(np.float32(max(ends))) and np.spacing(np.float32(max(ends))) <= abs(slope))


def is_nifti(path: Path) -> bool:
    """Tells whether a file is called as NIfTI volumes are."""
    return path.name.lower().endswith(SUFFIXES)


def _unpacked(file: OpenFile, offset: int, size: int) -> bytearray:
    """Returns ``size`` bytes of a gzipped file from ``offset`` on, and unpacks no more.

    Raises:
        ValueError: it is damaged, or ends before.
        zlib.error: it is damaged.
    """
    out = bytearray(size)
    filled, skip, position = 0, offset, 0
    unpacker = zlib.decompressobj(zlib.MAX_WBITS + 16)
    data = b""
    while filled < size:
        if unpacker.eof:  # further members follow
            data = unpacker.unused_data
            unpacker = zlib.decompressobj(zlib.MAX_WBITS + 16)
        if not data:
            data = file.read(PIECE, position)
            position += len(data)
            if not data:
                raise ValueError(f"ends after {filled:,} of {size:,} bytes of voxels")
        piece = unpacker.decompress(data, PIECE if skip else min(size - filled, 16 * PIECE))
        data = unpacker.unconsumed_tail
        if skip:
            skip, piece = max(0, skip - len(piece)), piece[skip:]
        piece = piece[: size - filled]
        out[filled : filled + len(piece)] = piece
        filled += len(piece)
    return out


def read_volume(path: Path, axis: AxisName) -> Volume:
    """Reads the header of a file, and compares it with the file.

    Raises:
        UserError: nibabel is missing, or the voxels are none that can be pixels.
        ValueError, OSError: the file is damaged, cut, or claims what it cannot hold.
    """
    try:
        import nibabel
    except ImportError as error:
        raise UserError(f"{path}: NIfTI volumes need nibabel; run {install_hint('science')}") from error
    file = OpenFile(path)
    is_packed = file.read(2, 0) == b"\x1f\x8b"
    start = file.read(HEADER_BYTES, 0)
    if is_packed:
        try:
            start = zlib.decompressobj(zlib.MAX_WBITS + 16).decompress(file.read(PIECE, 0), HEADER_BYTES)
        except zlib.error as error:
            raise ValueError(f"{path.name} is damaged: {error}") from error
    sizes = {int.from_bytes(start[:4], order): order for order in ("little", "big")}
    size = next((size for size in HEADERS if size in sizes), None)
    if size is None or len(start) < size or (start[344:348] not in (b"n+1\0", b"ni1\0") and size == 348):
        raise ValueError(f"{path.name} does not begin as a NIfTI file does")
    try:
        header = getattr(nibabel, HEADERS[size])(start[:size], check=False)
        shape, dtype = tuple(map(int, header.get_data_shape())), header.get_data_dtype()
        offset, slope, affine = int(header["vox_offset"]), header.get_slope_inter(), header.get_best_affine()
        is_single = bytes(header["magic"].item())[:3] == b"n+" + (b"1" if size == 348 else b"2")
    except Exception as error:  # nibabel raises its own errors, ValueError, OverflowError and others
        raise ValueError(f"{path.name}: {in_one_line(' '.join(str(error).split()), 100)}") from error
    if not is_single:
        raise ValueError(f"{path.name} is the header of a pair of files; store the volume as one .nii")
    return _volume(path, file, is_packed, shape, dtype, max(offset, size), slope, affine, axis)


def _volume(
    path: Path,
    file: OpenFile,
    is_packed: bool,
    shape: tuple[int, ...],
    dtype: np.dtype,
    offset: int,
    slope: tuple[float | None, float | None],
    affine: np.ndarray,
    axis: AxisName,
) -> Volume:
    """Checks the parts of a header."""
    if dtype.names is not None:  # RGB or RGBA, of a byte each
        raise UserError(f"{path}: voxels are colours ({', '.join(dtype.names)}); store them as a fifth axis of uint8")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UserError(f"{path}: voxels are {dtype}, which are no numbers that are used; store their parts or sizes")
    if not 1 <= len(shape) <= 5 or min(shape, default=0) < 1:
        raise ValueError(f"{path.name} says {list(shape)}")
    x, y, z, t, channels = (*shape, *[1] * (5 - len(shape)))
    size = math.prod(shape) * dtype.itemsize
    if channels > MAX_CHANNELS:
        raise UserError(f"{path}: has {channels:,} numbers a voxel, of which at most {MAX_CHANNELS} can be channels")
    if offset > MAX_OFFSET:
        raise ValueError(f"{path.name} says that its voxels begin at byte {offset:,}")
    if not is_packed and offset + size > file.size:
        raise ValueError(f"{path.name} says {list(shape)} {dtype} and has {file.size - offset:,} bytes of voxels")
    if is_packed and size > MAX_DEFLATE_RATIO * file.size:
        raise ValueError(f"{path.name} says {list(shape)} {dtype}, more than its {file.size:,} bytes can unpack to")
    whole = size if is_packed else size // t
    if whole > MAX_GROUP_BYTES:
        remedy = "gunzip it" if is_packed and size // t <= MAX_GROUP_BYTES else "split it"
        raise UserError(f"{path}: {readable(whole)} of voxels are too much to be held; {remedy}")
    refuse_beyond_memory(whole, path.name)
    order, flips = _turn(path, affine, axis)
    scale = _scale(slope)
    return Volume(str(path), file.stamp, is_packed, dtype, (x, y, z, t, channels), offset, scale, order, flips)


def _scale(slope: tuple[float | None, float | None]) -> tuple[float, float] | None:
    if slope[0] is None or (slope[0] == 1 and slope[1] in (0, None)):
        return None
    return float(slope[0]), float(slope[1] or 0)


def _turn(path: Path, affine: np.ndarray, axis: AxisName) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Returns which axis of the array rows, columns and slices are, and whether they run against it."""
    if axis in ("0", "1", "2"):
        others = [number for number in range(3) if number != int(axis)]
        return (others[0], others[1], int(axis)), (False, False, False)
    import nibabel

    turned = nibabel.io_orientation(affine) if np.isfinite(affine).all() else np.full((3, 2), np.nan)
    if not np.isfinite(turned).all():
        raise SettingError(
            "axis", axis, f"the affine of {path} does not say how it lies in the body; set it to 0, 1 or 2"
        )
    # Of each axis of the body (right, front, top): the axis of the array, and whether that runs against it.
    stored = {int(body): (number, way < 0) for number, (body, way) in enumerate(turned)}
    columns, rows = [stored[body] for body in range(3) if body != AXES[axis]]
    slices = stored[AXES[axis]]
    # Rows from the top or the front and columns from the right or the front: both against the axes of the body.
    return (rows[0], columns[0], slices[0]), (not rows[1], not columns[1], slices[1])


# --- the source -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VolumeSource:
    """The slices of NIfTI volumes, one sample each."""

    volumes: tuple[Volume, ...]
    axis: AxisName
    labels: np.ndarray | None
    """int64 [length], or None."""
    classes: tuple[str, ...]
    taken: Stock
    kept: np.ndarray | None = None
    """int64 [length], ascending: which of all slices are samples; None for all."""
    kind: str = "array"
    part: str = ""
    """The folder of a part of the data set, as it is called below the data path."""
    damage: tuple[tuple[str, str], ...] = ()
    """(file, what is wrong) of volumes that are left out."""
    _firsts: np.ndarray = field(init=False, repr=False, compare=False)
    _blocks: np.ndarray = field(init=False, repr=False, compare=False)
    _voxels: Callable[[int], np.ndarray] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        slices = [volume.slices * volume.shape[3] for volume in self.volumes]
        object.__setattr__(self, "_firsts", np.cumsum([0, *slices]))
        object.__setattr__(self, "_blocks", np.cumsum([0, *(volume.blocks for volume in self.volumes)]))
        # A few more than are in use by the order, as threads are not all at the same sample of it.
        object.__setattr__(self, "_voxels", Recent(self._read_block, self.held + self.held // 4 + 4))

    @property
    def held(self) -> int:
        """How many blocks are in use at a time."""
        largest = max((volume.voxels // volume.blocks for volume in self.volumes), default=1)
        return max(MIN_HELD, HELD_BYTES // max(1, largest))

    @property
    def shards(self) -> Shards:
        """The slices of each block are a shard."""
        ends = [
            first + (block + 1) * volume.slices * volume.shape[3] // volume.blocks
            for first, volume in zip(self._firsts[:-1].tolist(), self.volumes, strict=True)
            for block in range(volume.blocks)
        ]
        starts = np.array([0, *ends], np.int64)
        if self.kept is not None:
            starts = np.unique(np.searchsorted(self.kept, starts))
        return Shards(starts, self.held * len(self) // max(1, len(starts) - 1))

    @property
    def location(self) -> str:
        shapes = self.shapes
        size = f" of {' × '.join(map(str, next(iter(shapes))))}" if len(shapes) == 1 else ""
        axis = self.axis if self.axis in AXES else f"stored (axis {self.axis})"
        where = f" of {self.part}" if self.part else ""
        return f"{size}, {axis} slices of {count_of(len(self.volumes), 'volumes')}{where}".removeprefix(", ").strip()

    @property
    def stock(self) -> Stock:
        return self.taken

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        """The shapes [H, W, C] of the slices."""
        return {volume.image for volume in self.volumes}

    def __len__(self) -> int:
        return int(self._firsts[-1]) if self.kept is None else len(self.kept)

    def _place(self, index: int) -> tuple[int, int, int]:
        """Returns the volume, the time and the slice of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        index = index if self.kept is None else int(self.kept[index])
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return number, *divmod(index - int(self._firsts[number]), self.volumes[number].slices)

    def read(self, index: int) -> np.ndarray:
        """Returns the pixels of a slice, [H, W, C] of the type of the voxels, or floats where they are scaled.

        Raises:
            UserError: the file was changed since it was opened.
            OSError: it is damaged.
        """
        number, time, level = self._place(index)
        volume = self.volumes[number]
        block = 0 if volume.is_packed else time
        voxels = self._voxels(int(self._blocks[number]) + block)
        return volume.slice_of(voxels, level, time if volume.is_packed else 0)

    def name(self, index: int) -> str:
        number, time, level = self._place(index)
        volume = self.volumes[number]
        return f"{volume.path}[{f'{time}, ' if volume.shape[3] > 1 else ''}{level}]"

    def _read_block(self, block: int) -> np.ndarray:
        number = int(np.searchsorted(self._blocks, block, side="right")) - 1
        return self.volumes[number].read(block - int(self._blocks[number]))


def open_volumes(files: FolderSource, read_as: ReadAs) -> VolumeSource:
    """Opens files as one source, in their order, and reads only their headers.

    Args:
        files: the files, with a label each or without, and the stock of the folder that they are from.
        read_as: which slices are images, and whether those of one value are.

    Raises:
        UserError: nibabel is missing, or one of the files cannot be used.
        ValueError, OSError: the only file is damaged.
    """
    axis, labels, folder = read_as.axis, files.labels, files.stock
    paths = [Path(path) for path in files.paths]
    with ThreadPoolExecutor(THREADS) as pool:
        read = list(pool.map(lambda path: _try(path, axis), paths))
    if len(paths) == 1 and isinstance(read[0], Exception):
        raise read[0]
    good = [number for number, volume in enumerate(read) if isinstance(volume, Volume)]
    if not good:
        raise ValueError(f"none of its {len(paths):,} volumes can be used, the first is {read[0]}")
    volumes = tuple(volume for volume in read if isinstance(volume, Volume))
    damage = tuple(
        (str(path), str(error)) for path, error in zip(paths, read, strict=True) if not isinstance(error, Volume)
    )
    counts = [volume.slices * volume.shape[3] for volume in volumes]
    each = None if labels is None else np.repeat(labels[good], counts)
    left_out = []
    if damage:
        names = tuple(f"{name}: {reason}" for name, reason in damage[:EXAMPLES])
        left_out.append(LeftOut("volumes", len(damage), "they cannot be read; mend or remove them", names))
    kept = None
    if read_as.constant_slices == "drop":
        filled = _filled(volumes, axis)
        kept = np.flatnonzero(filled)
        each = None if each is None else each[kept]
        if len(kept) < len(filled):
            left_out.append(LeftOut("slices", len(filled) - len(kept), "all of their voxels are alike"))
        if not len(kept):
            raise ValueError("all slices are constant; use --constant_slices keep")
    packed = sum(volume.is_packed for volume in volumes)
    source = VolumeSource(volumes, axis, each, files.classes, folder, kept, part=files.part, damage=damage)
    notes = [*folder.notes]
    if packed:
        size, count = readable(max(volume.voxels for volume in volumes if volume.is_packed)), min(source.held, packed)
        notes.append(
            f"{count_of(packed, 'volumes')} of at most {size} are gzipped and unpacked whole, {count} of them in "
            "use at a time; write their slices into shards once (`fastmae pack`), or gunzip them"
        )
    used = {**folder.used, "images": len(source), "volumes": len(volumes)}
    return replace(source, taken=Stock(used, (*folder.left_out, *left_out), tuple(notes)))


def _try(path: Path, axis: AxisName) -> Volume | Exception:
    try:
        return read_volume(path, axis)
    except (UserError, *UNREADABLE) as error:
        return error


def _filled(volumes: Sequence[Volume], axis: AxisName) -> np.ndarray:
    """Returns which of all slices have voxels that differ: bool [slices]. It is kept in the cache folder."""
    state = [[volume.path, *volume.stamp, list(volume.shape)] for volume in volumes]
    identity = hashlib.sha256(repr([axis, state]).encode(errors="surrogatepass")).hexdigest()
    path = cache_file(f"slices of {identity}")
    index, count = read_index(path), sum(volume.slices * volume.shape[3] for volume in volumes)
    if index is not None and index.fingerprint == identity and len(index.columns.get("filled", ())) == count:
        return index.columns["filled"] != 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        filled = np.concatenate(list(pool.map(_filled_of, volumes)))
    if is_settled(volume.stamp[1] for volume in volumes):
        write_index(path, Index(identity, {"filled": filled.astype(np.uint8)}))
    return filled


def _filled_of(volume: Volume) -> np.ndarray:
    filled = []
    for block in range(volume.blocks):
        try:
            voxels = volume.read(block)
        except OSError:  # a run replaces such slices one by one
            filled += [True] * (volume.slices * volume.shape[3] // volume.blocks)
            continue
        for time in range(voxels.shape[3]):
            moved = np.moveaxis(voxels[..., time, :], volume.order[2], 0)
            moved = moved[::-1] if volume.flips[2] else moved
            flat = moved.reshape(len(moved), -1)
            filled += (flat != flat[:, :1]).any(axis=1).tolist()
    return np.array(filled, bool)
