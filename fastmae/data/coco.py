"""Label maps from COCO's JSON files: what each image shows as polygons or as runs of pixels.

The format is that of https://cocodataset.org/#format-data. Categories become classes from 1 on, in the order of their
ids, and 0 is the background. Larger objects are drawn first, so that what lies in front of them stays visible; crowds
count nowhere where nothing else is drawn. Nothing is drawn before its image is read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.data.reading import BadImageError
from fastmae.data.stock import EXAMPLES, LeftOut, count_of
from fastmae.errors import SettingError, UserError, in_one_line, install_hint

BACKGROUND = "background"
MOST_PIXELS = 1 << 28
FAR = 4
"""Corners of polygons lie no further away than so many times the longer side of the image."""


@dataclass(frozen=True)
class Drawn:
    """One object."""

    number: int
    """Its class, or −1 for a crowd."""
    segmentation: Any
    """Polygons, a list of [x, y, x, y, …] in pixels; or runs {"counts", "size"}, as a list or as a text."""


@dataclass(frozen=True)
class CocoMaps:
    """The label maps of some images: ``maps[i]`` draws one."""

    sizes: Sequence[tuple[int, int]]
    """(height, width) of each image."""
    objects: Sequence[tuple[Drawn, ...]]
    """What each image shows."""
    digest: str
    """A hash of the file that they are from."""

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns the classes of an image, int32 [H, W], −1 where a crowd is.

        Raises:
            BadImageError: a polygon or a run is none of this image.
        """
        height, width = self.sizes[index]
        if not 0 < height * width <= MOST_PIXELS:
            raise BadImageError(f"COCO's file says that it has {height}×{width} pixels")
        shapes = [(drawn.number, pixels_of(drawn.segmentation, height, width)) for drawn in self.objects[index]]
        shapes.sort(key=lambda shape: (shape[0] >= 0, -int(shape[1].sum())))
        classes = np.zeros((height, width), np.int32)
        for number, inside in shapes:
            classes[inside] = number
        return classes

    def of(self, rows: Iterable[int]) -> CocoMaps:
        """Returns the maps of some of the images."""
        rows = [*rows]
        return replace(self, sizes=[self.sizes[row] for row in rows], objects=[self.objects[row] for row in rows])


def pixels_of(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Returns which pixels an object covers, bool [height, width].

    Raises:
        BadImageError: it is neither polygons nor runs of an image of this size.
    """
    if isinstance(segmentation, dict):
        counts: Any = segmentation.get("counts")
        if isinstance(counts, str):
            counts = _unpacked(counts)
        size_fits = segmentation.get("size") == [height, width]
        if not size_fits or not _all_numbers(counts) or min(counts) < 0 or sum(counts) != height * width:
            raise BadImageError(f"an object in COCO's file has runs that are not of {height}×{width} pixels")
        runs = np.asarray(counts, np.int64)  # of pixels outside and inside by turns, down the columns
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    beyond = FAR * max(height, width)
    for polygon in segmentation if isinstance(segmentation, list) else (segmentation,):
        if not _all_numbers(polygon) or len(polygon) % 2 or len(polygon) < 6:
            raise BadImageError("an object in COCO's file has a polygon without three corners")
        if not all(-beyond <= value <= beyond for value in polygon):
            raise BadImageError("an object in COCO's file has a polygon far beyond its image")
    from pycocotools import mask

    encoded = mask.frPyObjects([[float(value) for value in polygon] for polygon in segmentation], height, width)
    return mask.decode(mask.merge(encoded)).astype(bool)


def _all_numbers(values: Any) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )


def _unpacked(text: str) -> list[int]:
    """Returns the lengths of runs that are written as a text.

    A character holds five bits of a number from the lowest on, a sixth that says whether more follow, and is counted
    from "0"; the highest bit of the last is the sign. From the fourth on a number is the difference to the one two
    before it.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts


# --- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annotated:
    """What a file of COCO says of images that are there."""

    images: list[str]
    """The files of the images."""
    maps: CocoMaps
    classes: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]


def read_coco(path: Path, find: Callable[[str], Path | None]) -> Annotated:
    """Reads a file of COCO.

    Args:
        path: the file.
        find: returns where the image of a name lies; None if there is none.

    Raises:
        UserError: pycocotools is missing, or the file is none of COCO, or has no image that is there.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: COCO's polygons are drawn by pycocotools; run {install_hint('coco')}") from error
    try:
        text = path.read_bytes()
        said = json.loads(text)
        names = {int(category["id"]): str(category["name"]) for category in said["categories"]}
        number_of = {key: number for number, key in enumerate(sorted(names), 1)}
        images = {image["id"]: image for image in said["images"]}
        files = {key: str(image["file_name"]) for key, image in images.items()}
        sizes = {key: (int(image["height"]), int(image["width"])) for key, image in images.items()}
        objects: dict[Any, list[Drawn]] = {key: [] for key in images}
        problems = {"they are of images or categories that the file does not list": 0, "they outline nothing": 0}
        for annotation in said["annotations"]:
            outline, category = annotation.get("segmentation"), annotation.get("category_id")
            if annotation["image_id"] not in objects or category not in number_of:
                problems["they are of images or categories that the file does not list"] += 1
            elif not outline:
                problems["they outline nothing"] += 1
            else:
                number = -1 if annotation.get("iscrowd") else number_of[category]
                objects[annotation["image_id"]].append(Drawn(number, outline))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"is no file of COCO with images, annotations and categories ({in_one_line(repr(error), 100)})"
        raise SettingError("data_path", str(path), f"{problem}; mend it") from error
    found = {key: place for key, name in files.items() if (place := find(name)) is not None}
    missing = [name for key, name in files.items() if key not in found]
    left_out = [LeftOut("objects", count, f"{reason}", ()) for reason, count in problems.items() if count]
    if missing:
        reason = f"{path.name} lists them, and they are not there"
        left_out.append(LeftOut("images", len(missing), reason, tuple(missing[:EXAMPLES])))
    if not found:
        raise SettingError(
            "data_path",
            str(path),
            f"lists {count_of(len(files), 'images')}, none of which is there; put them beside it",
        )
    order = sorted(found, key=lambda key: files[key])
    empty = sum(not objects[key] for key in order)
    notes = [f"{path.name}: classes are its {count_of(len(names), 'categories')} from 1 on, 0 is {BACKGROUND}"]
    if empty:
        notes.append(f"{path.name} outlines nothing in {count_of(empty, 'images')}, which are {BACKGROUND} everywhere")
    maps = CocoMaps(
        [sizes[key] for key in order], [tuple(objects[key]) for key in order], hashlib.sha256(text).hexdigest()
    )
    classes = (BACKGROUND, *(names[key] for key in sorted(names)))
    return Annotated([str(found[key]) for key in order], maps, classes, tuple(left_out), tuple(notes))
