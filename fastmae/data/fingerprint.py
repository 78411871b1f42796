"""Fingerprints: what the data of a run are, in a few short hashes, so that other data are noticed.

Ranks compare theirs when a run starts, and a run compares that of its checkpoint when it goes on. Where the data lie is
not part of it, so a data set may be moved as a whole; which files there are, in which order, their sizes, labels and
classes are. Files are not read. All names are hashed; of image files the sizes of at most ``SIZES`` evenly spaced ones,
of tars the names and sizes of all members, of Parquet files sizes and rows, and of arrays the dtype, the shape and the
pixels of at most ``ROWS`` evenly spaced images, or as many as have ``ROW_BYTES`` together. Of objects in
Python at most ``OBJECTS`` are read.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.data.arrays import ArraySource
from fastmae.data.chunks import ChunkedImages
from fastmae.data.coco import CocoMaps
from fastmae.data.formats.nifti import VolumeSource
from fastmae.data.formats.npy import ArrayFiles
from fastmae.data.images import FolderSource
from fastmae.data.index import Names
from fastmae.data.label_maps import MappedSource
from fastmae.data.memory import release_after
from fastmae.data.packed import PackedSource
from fastmae.data.pages import PagedSource
from fastmae.data.parquet import ParquetSource
from fastmae.data.sources import Concat, Source, Subset
from fastmae.data.tables import TableSource
from fastmae.data.zips import ZipSource

Fingerprint = dict[str, Any]
"""What JSON can hold: ``kind``, as that of a source; ``length``, the number of images; ``ranges``, at most ``RANGES``
times ``[name, names, contents]``, which are the first name of a range of things (files, shards, images) and hashes of
all names and of the contents that are looked at; and ``labels``, a hash of labels and classes, empty without."""

RANGES = 64
SIZES = 4096
ROWS = 1024
ROW_BYTES = 32 << 20
OBJECTS = 256
STAT_THREADS = 16
DIGITS = 16

Things = tuple[Sequence[str], dict[int, str]]
"""The names of all files, shards or images of a source, in order; and by their numbers what some of them hold."""


def fingerprint(source: Source) -> Fingerprint:
    """Returns the fingerprint of a source. That of a million image files asks for the sizes of 4,096."""
    names, contents = _things(source)
    starts = [*_evenly(len(names), RANGES), len(names)]
    ranges = []
    for start, end in itertools.pairwise(starts):
        held = [contents[number] for number in range(start, end) if number in contents]
        ranges.append([names[start], _hash([_joined(names, start, end)]), _hash(held)])
    whole = {"kind": source.kind, "length": len(source), "ranges": ranges, "labels": _labels(source)}
    del names
    release_after(len(source))
    return whole


def difference(now: Mapping[str, Any], before: Mapping[str, Any]) -> str | None:
    """Returns how a fingerprint differs from another one; None if it does not.

    It is a phrase that goes on from "it has": "80 images instead of 72, first b.png instead of a.png", "another size of
    b.png", "other labels or classes". Of more than ``RANGES`` files it names two between which the first one differs.
    """
    first = _first_difference(now["ranges"], before["ranges"])
    if now["length"] != before["length"]:
        lengths = f"{now['length']:,} images instead of {before['length']:,}"
        return f"{lengths}, first {first}" if first and now["kind"] == before["kind"] == "folder" else lengths
    if now["kind"] != before["kind"]:
        return f"images in {now['kind']} form instead of {before['kind']}"
    if first is None and now["labels"] != before["labels"]:
        return "other labels or classes"
    return first


def _first_difference(now: Sequence[Sequence[str]], before: Sequence[Sequence[str]]) -> str | None:
    for number, (new, old) in enumerate(zip(now, before, strict=False)):
        if list(new) == list(old):
            continue
        if new[0] != old[0]:
            return f"{new[0]} instead of {old[0]}"
        what = "names" if new[1] != old[1] else "contents or sizes"
        if len(now) < RANGES:
            return f"other {what} of {new[0]}"
        return f"other {what} from {new[0]} " + (f"to {now[number + 1][0]}" if number + 1 < len(now) else "on")
    if len(now) == len(before):
        return None
    return f"{now[len(before)][0]} more" if len(now) > len(before) else f"no {before[len(now)][0]}"


# --- what is hashed ---------------------------------------------------------------------------------------------------


def _things(source: Source) -> Things:
    match source:
        case Concat():
            joined: list[str] = []
            contents: dict[int, str] = {}
            for number, part in enumerate(source.parts, 1):
                inside, held = _things(part)
                contents |= {len(joined) + index: text for index, text in held.items()}
                joined += (f"path {number}: {name}" for name in inside)
            return joined, contents
        case Subset():
            names, contents = _things(source.source)
            chosen = _hash([np.ascontiguousarray(source.indices, "<i8").data])
            return [*names, "the choice of images"], {**contents, len(names): chosen}
        case MappedSource():
            names, contents = _things(source.source)
            maps = source.maps
            if isinstance(maps, np.ndarray):
                of_maps: list[str | memoryview] = [memoryview(maps.tobytes())]
            elif isinstance(maps, CocoMaps):
                of_maps = [maps.digest]
            else:
                of_maps = [*_relative(maps), *_sizes(maps).values()]
            return [*names, "the label maps"], {**contents, len(names): _hash(of_maps)}
        case PagedSource():
            names, contents = _things(source.files)
            counts = _hash([np.ascontiguousarray(source.starts, "<i8").data])
            return [*names, "the pages"], {**contents, len(names): counts}
        case ArrayFiles():
            return _things(source.files)
        case VolumeSource():
            paths = [volume.path for volume in source.volumes]
            names, sizes = _relative(paths), _sizes(paths)
            kept = "all" if source.kept is None else _hash([source.kept.data])
            return [*names, "the slices"], {**sizes, len(names): f"{source.axis} {kept}"}
        case FolderSource():
            return _relative(source.paths), _sizes(source.paths)
        case PackedSource():
            column = np.zeros(0, np.uint8) if source.names is None else source.names.column
            members = [_hash([column.data, source.size.data, source.shard.data])]
            sizes = dict(enumerate(str(size) for size, _ in source.stamps))
            return [*_relative(source.paths), "the members"], {**sizes, len(sizes): members[0]}
        case ZipSource():
            columns = [source.names.column.data, source.size.data, source.check.data]
            return [Path(source.path).name, "the members"], {1: _hash(columns)}
        case ParquetSource():
            groups = [np.diff(source.starts)[source.group_file == file].tolist() for file in range(len(source.files))]
            sizes = (
                _sizes(source.files)
                if not any(source.opened)
                else {file: str(size) for file, (size, _) in enumerate(source.stamps)}
            )
            return _relative(source.files), {file: f"{size} {groups[file]}" for file, size in sizes.items()}
        case ArraySource(images=ChunkedImages(contents=contents_of)):
            return [*contents_of], dict(enumerate(contents_of.values()))
        case TableSource():
            rows = _evenly(len(source), ROWS)
            cells = [_hash([source.values[row].data]) for row in rows]
            return ["the columns", *(f"row {row}" for row in rows)], dict(enumerate([_hash(source.columns), *cells]))
        case ArraySource():
            size = max(1, math.prod(source.images.shape[1:]) * source.images.dtype.itemsize)
            rows = _evenly(len(source), min(ROWS, max(RANGES - 1, ROW_BYTES // size)))
            shape = f"{source.images.dtype} {list(source.images.shape[1:])}"
            pixels = [_hash([shape, np.ascontiguousarray(source.read(row)).data]) for row in rows]
            return [f"image {row}" for row in rows], dict(enumerate(pixels))
        case _:  # objects of Python, of which nothing is known but what they give
            most = ROW_BYTES // max(1, len(_contents(source, 0)))
            rows = _evenly(len(source), min(OBJECTS, max(RANGES - 1, most)))
            hashes = [_hash([_contents(source, row)]) for row in rows]
            return [f"image {row}" for row in rows], dict(enumerate(hashes))


def _contents(source: Source, index: int) -> memoryview:
    """Returns the bytes of an image file, or those of the pixels of an image behind their type and shape."""
    try:
        data = source.read(index)
    except OSError:
        data = b"not readable"
    if isinstance(data, bytes):
        return memoryview(data)
    return memoryview(f"{data.dtype} {list(data.shape)} ".encode() + np.ascontiguousarray(data).tobytes())


def _labels(source: Source) -> str:
    if source.labels is None:
        return ""
    parts = source.parts if isinstance(source, Concat) else (source,)
    classes = [name for part in parts for name in part.classes]
    return _hash([np.ascontiguousarray(source.labels, "<i8").data, *classes])


def _relative(paths: Sequence[str]) -> Sequence[str]:
    """Returns paths without the folder that all of them lie in."""
    # By characters, as a path may begin with "./" or hold "//"; then cut behind the last whole folder.
    inside = os.path.commonprefix([min(paths), max(paths)]).rfind("/") + 1 if paths else 0  # noqa: RUF071
    if isinstance(paths, Names):
        return paths.without(inside)
    return [path[inside:] for path in paths]


def _joined(names: Sequence[str], start: int, end: int) -> str | memoryview:
    """Returns names with zeros between them."""
    if isinstance(names, Names) and not names.prefix:
        return names.packed(start, end)[:-1].data
    return "\0".join(names[start:end])


def _sizes(paths: Sequence[str]) -> dict[int, str]:
    """Returns the sizes in bytes of at most ``SIZES`` evenly spaced files; several are asked for at a time, as a file
    system on a network takes a while to answer.
    """
    chosen = _evenly(len(paths), SIZES)
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        return dict(zip(chosen, pool.map(_size, (paths[index] for index in chosen)), strict=True))


def _size(path: str) -> str:
    try:
        return str(os.stat(path).st_size)
    except OSError:
        return "not readable"


def _evenly(length: int, count: int) -> list[int]:
    return [length * number // min(length, count) for number in range(min(length, count))]


def _hash(parts: Iterable[str | memoryview]) -> str:
    """Returns the start of a SHA-256 of texts and bytes, none of which can stand for two others."""
    digest = hashlib.sha256()
    for part in parts:
        data = os.fsencode(part) if isinstance(part, str) else memoryview(part).cast("B")
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()[:DIGITS]
