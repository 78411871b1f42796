"""Tar shards of any source: which images go into which shard, how a shard is written, and whether one is still whole.

A shard is a pure function of the data and the settings, down to its bytes. It is written whole or not at all, and then
entered into a log, so that a pack goes on after a kill with the shards that are missing. This module prints nothing;
fastmae/commands/pack.py does.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from fastmae.data.fingerprint import difference, fingerprint
from fastmae.data.headers import read_header
from fastmae.data.plan import plan_epoch
from fastmae.data.reading import BadImageError
from fastmae.data.sources import Source, evenly_spaced
from fastmae.data.suffixes import IMAGE_SUFFIXES, suffix_of
from fastmae.errors import UserError, install_hint
from fastmae.files import JsonLines, read_json, read_rows, write_text, write_whole

MANIFEST = "fastmae-pack.json"
LOG = ".fastmae-pack.jsonl"
VERSION = 1
SAMPLES, RUN = 64, 8
"""How many images tell the size of all, and in which runs they are read where there are shards."""
BLOCK = 1 << 20


@dataclass(frozen=True)
class ShardPlan:
    """A shard that is to be written."""

    name: str
    part: str
    indices: np.ndarray
    """int64 [images]: the samples of the part, in the order of the shard."""
    bytes: int
    """About its size."""


@dataclass(frozen=True)
class Packed:
    """A shard that was written."""

    name: str
    images: int
    bytes: int
    sha256: str
    left_out: tuple[tuple[str, str], ...] = ()
    """(name, why) of the images that cannot be read."""


# --- which images go where --------------------------------------------------------------------------------------------


def plan_shards(part: str, source: Source, image_bytes: int, shard_bytes: int, seed: int | None) -> list[ShardPlan]:
    """Returns the shards of a part, each with as many images as fill ``shard_bytes``.

    Args:
        part: its name, which the names of its shards begin with.
        source: its images.
        image_bytes: the mean size of an image, as ``bytes_an_image`` said when the pack was begun.
        shard_bytes: the size of a shard.
        seed: of the shuffled order; None keeps that of the source.
    """
    count = max(1, min(len(source), shard_bytes // image_bytes))
    order = np.arange(len(source))
    if seed is not None:  # of a source with shards, one that reads few of them at a time
        order = plan_epoch(seed, 0, len(source), 1, shards=source.shards).order
    shards = (order[start : start + count] for start in range(0, len(source), count))
    return [
        ShardPlan(f"{part}-{number:06d}.tar", part, indices, len(indices) * image_bytes)
        for number, indices in enumerate(shards)
    ]


def bytes_an_image(source: Source) -> int:
    """Returns the mean size of evenly spaced images with their headers in a tar, without those that cannot be read."""
    sizes = []
    for index in evenly_spaced(source, SAMPLES, RUN).tolist():
        try:
            data = source.read(index)
        except (BadImageError, OSError):
            continue
        sizes.append((len(data) if isinstance(data, bytes) else data.nbytes) + 4 * tarfile.BLOCKSIZE)
    return int(np.mean(sizes)) if sizes else BLOCK


# --- a shard ----------------------------------------------------------------------------------------------------------


def write_shard(folder: Path, plan: ShardPlan, source: Source) -> Packed:
    """Writes a shard, whole or not at all.

    Each image is a member, followed by a `.json` with its name and its label, if it has one. Members have no owner and
    no time, so the same images make the same bytes.

    Raises:
        OSError: the shard cannot be written.
        UserError: tifffile is missing, which writes arrays.
    """
    labels = None if source.labels is None else source.labels[plan.indices]
    left_out: list[tuple[str, str]] = []
    images, digest, size = 0, hashlib.sha256(), 0

    def write(file: BinaryIO) -> None:
        nonlocal images, size
        target = _Hashed(file, digest)
        with tarfile.open(fileobj=cast(Any, target), mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for place, index in enumerate(plan.indices.tolist()):
                try:
                    suffix, data = _file_of(source.read(index), source.name(index))
                except (BadImageError, OSError) as error:
                    left_out.append((source.name(index), str(error)))
                    continue
                record: dict[str, Any] = {"name": source.name(index)}
                if labels is not None:
                    label = int(labels[place])
                    record["label"] = source.classes[label] if source.classes else label
                _add(tar, f"{index:012d}{suffix}", data)
                _add(tar, f"{index:012d}.json", json.dumps(record).encode())
                images += 1
        size = target.size

    write_whole(folder / plan.name, write)
    return Packed(plan.name, images, size, digest.hexdigest(), tuple(left_out))


class _Hashed:
    """A file that is written once from the beginning to the end, and its checksum."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest, self.size = file, digest, 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.size += len(data)
        return self._file.write(data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def _file_of(data: bytes | np.ndarray, name: str) -> tuple[str, bytes]:
    """Returns the suffix and the bytes of an image file: as it is, or a TIFF with the numbers of an array.

    Raises:
        BadImageError: bytes that are no image.
    """
    if isinstance(data, np.ndarray):
        return ".tif", _tiff_of(data)
    suffix = suffix_of(name)
    if suffix in IMAGE_SUFFIXES:
        return suffix, data
    format = read_header(data).format
    known = sorted(suffix for suffix, of in Image.registered_extensions().items() if of == format)
    suffix = {"JPEG": ".jpg", "TIFF": ".tif", "DICOM": ".dcm"}.get(format, known[0] if known else "")
    if suffix not in IMAGE_SUFFIXES:
        raise BadImageError(f"an image of a format without a suffix of its own ({format})")
    return suffix, data


def _tiff_of(pixels: np.ndarray) -> bytes:
    """Returns an uncompressed TIFF of pixels [H, W, C] of any type of numbers. Truth values become 0 and 255.

    Raises:
        UserError: tifffile is missing.
    """
    try:
        import tifffile
    except ImportError as error:
        raise UserError(f"arrays are packed as TIFF, which needs tifffile; {install_hint('science')}") from error
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    is_colour = pixels.shape[2] == 3 and pixels.dtype in (np.uint8, np.uint16)
    target = io.BytesIO()
    tifffile.imwrite(
        target,
        np.ascontiguousarray(pixels if pixels.shape[2] > 1 else pixels[..., 0]),
        photometric="rgb" if is_colour else "minisblack",
        planarconfig="contig" if pixels.shape[2] > 1 else None,
        metadata=None,
        software=False,
        datetime=False,
    )
    return target.getvalue()


# --- a pack -----------------------------------------------------------------------------------------------------------


def done_before(
    folder: Path, parts: dict[str, Source], settings: dict[str, Any]
) -> tuple[dict[str, Packed], dict[str, int]]:
    """Returns the shards that an earlier, stopped pack of the same data wrote, and begins the log if there is none.

    The mean size of an image of each part is returned too, as it was when the pack was begun: shards depend on it, and
    an image of the sample may be readable at one time and not at another.

    Raises:
        UserError: the folder holds something else: another pack, or files of the user's.
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun: dict[str, Any] = {
        "version": VERSION,
        "settings": settings,
        "data": {part: fingerprint(parts[part]) for part in parts},
    }
    rows, _ = read_rows(folder / LOG)
    if not rows:
        others = sorted({*os.listdir(folder)} - {LOG})  # whose first line a kill may have cut
        if others:
            raise UserError(f"{folder}: is not empty ({others[0]}, …) and no pack was begun there; name another folder")
        sizes = {part: bytes_an_image(source) for part, source in parts.items()}
        JsonLines(folder / LOG).add([begun | {"image_bytes": sizes}])
        return {}, sizes
    before = rows[0]
    for what, now in begun.items():
        if what != "data" and before.get(what) != now:
            raise UserError(f"{folder}: a pack with other settings was begun there ({before.get(what)}, now {now})")
    for part, now in begun["data"].items():
        earlier = before.get("data", {}).get(part)
        other = "no such part" if earlier is None else difference(now, earlier)
        if other:
            raise UserError(f"{folder}: the pack there is of other data: {part} has {other}; name another folder")
    if {*before.get("data", {})} != {*parts}:
        raise UserError(f"{folder}: the pack there has other parts ({', '.join(before['data'])}); name another folder")
    shards = (Packed(**{**row, "left_out": tuple(map(tuple, row["left_out"]))}) for row in rows[1:] if "sha256" in row)
    done = {shard.name: shard for shard in shards if _size(folder / shard.name) == shard.bytes}
    return done, {part: int(before["image_bytes"][part]) for part in parts}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def enter(folder: Path, shard: Packed) -> None:
    """Enters a shard that was written into the log."""
    JsonLines(folder / LOG).add([asdict(shard)])


def write_manifest(folder: Path, shards: Sequence[Packed], parts: dict[str, Source], settings: dict[str, Any]) -> None:
    """Writes what the shards are, once all are there. The log is removed."""
    manifest = {
        "version": VERSION,
        "settings": settings,
        "classes": {part: list(source.classes) for part, source in parts.items()},
        "shards": [asdict(shard) for shard in shards],
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    (folder / LOG).unlink(missing_ok=True)


def changed_shards(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (part, shard, what is wrong) for the shards of a pack that are not as they were written. Reads all bytes.

    A folder without a manifest has none.

    Raises:
        UserError: the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        shards = [
            (str(shard["name"]), int(shard["bytes"]), str(shard["sha256"])) for shard in read_json(path)["shards"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({error}); remove it to go without checksums") from error
    for name, size, checksum in shards:
        place, part = folder / os.path.basename(name), name.partition("-")[0]
        held = _size(place)
        if held != size:
            yield part, str(place), "is missing" if held < 0 else f"has {held} bytes, {size} were written"
        elif _checksum(place) != checksum:
            yield part, str(place), f"has another checksum than {MANIFEST} says; pack it again"


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def totals(shards: Iterable[Packed]) -> tuple[int, int, list[tuple[str, str]]]:
    """Returns (images, bytes, images that were left out and why) of shards."""
    every = [*shards]
    return sum(s.images for s in every), sum(s.bytes for s in every), [bad for s in every for bad in s.left_out]
