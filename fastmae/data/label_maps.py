"""Images with label maps: for each pixel the number of what it shows. Other tools call them masks.

A ``MappedSource`` is a source like any other, which has the map of each image beside it. Maps are palette or gray PNG
files, of 8 or 16 bits, an array, or drawn from COCO's file; map_layouts.py and map_arrays.py find them. They are
resized by nearest pixel, cropped and mirrored with the box of their image; sample.py does that.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastmae.data import shapes
from fastmae.data.arrays import ArraySource
from fastmae.data.coco import CocoMaps
from fastmae.data.images import FolderSource
from fastmae.data.map_arrays import open_array_pairs
from fastmae.data.map_layouts import LAYOUT, TRAIN, VAL, class_names, find_pairs
from fastmae.data.plan import Box, Shards, holdout
from fastmae.data.reading import BadImageError
from fastmae.data.resize import nearest
from fastmae.data.sources import Parts, Source, Subset, evenly_spaced, open_train, open_val
from fastmae.data.stock import Stock
from fastmae.errors import SettingError
from fastmae.facts import ReadAs

IGNORED = 255
"""The number of pixels that count nowhere: not in the loss, and in no accuracy."""
MOST_CLASSES = 255
LOOKED_AT = 1000
"""In so many maps, evenly spaced, the classes are counted where nobody says how many there are."""
LEAST_LOOKED_AT = 16
"""So many maps, at least, tell whether numbers are of classes or tones."""


@dataclass(frozen=True)
class MapReading:
    """How the numbers in a label map become classes from 0."""

    num_classes: int = MOST_CLASSES
    ignore_index: int = IGNORED
    """The number in files that counts nowhere."""
    reduce_zero_label: bool = False
    """Whether 0 counts nowhere and 1 is the first class, as in ADE20K."""

    def read(self, data: bytes | np.ndarray) -> np.ndarray:
        """Returns the classes of a map, uint8 [H, W], with ``IGNORED`` where a pixel counts nowhere.

        Raises:
            BadImageError: it is no map, or has a class that there is not.
        """
        numbers = numbers_of(data)
        ignored = (numbers == self.ignore_index) | (numbers < 0)
        if self.reduce_zero_label:
            ignored |= numbers == 0
            numbers = numbers - 1
        classes = np.where(ignored, IGNORED, numbers)
        beyond = classes[~ignored & ((classes < 0) | (classes >= self.num_classes))]
        if len(beyond):
            raise BadImageError(
                f"its label map has class {int(beyond[0])}, and there are {self.num_classes}, numbered from 0"
            )
        return classes.astype(np.uint8)


@dataclass(frozen=True)
class MappedSource:
    """Images with their label maps."""

    source: Source
    """The images."""
    maps: Sequence[str] | np.ndarray | CocoMaps
    """The files of the maps, or whole numbers [N, H, W], or what COCO's file says of each image."""
    classes: tuple[str, ...] = ()
    """The names of the classes, where the data name them."""
    taken: Stock | None = None
    codes: Mapping[int, int] = field(default_factory=dict)
    """Which class a number in the maps stands for, −1 where it counts nowhere; empty where numbers are classes."""
    labels = None

    @property
    def kind(self) -> str:
        return self.source.kind

    @property
    def location(self) -> str:
        return f"{self.source.location}, with label maps"

    @property
    def stock(self) -> Stock:
        return self.source.stock if self.taken is None else self.taken

    @property
    def shards(self) -> Shards | None:
        return self.source.shards

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(index)

    def read_map(self, index: int) -> bytes | np.ndarray:
        """Returns the map of image ``index``: the bytes of its file, or its numbers [H, W].

        Negative numbers count nowhere.

        Raises:
            OSError: its file cannot be read.
            BadImageError: it cannot be used.
        """
        if not isinstance(self.maps, Sequence):
            return self.maps[index]
        data = Path(self.maps[index]).read_bytes()
        return self._decoded(numbers_of(data)) if self.codes else data

    def _decoded(self, numbers: np.ndarray) -> np.ndarray:
        found = np.unique(numbers).tolist()
        unknown = next((number for number in found if number not in self.codes), None)
        if unknown is not None:
            known = ", ".join(map(str, sorted(self.codes)))
            raise BadImageError(f"its label map has the number {unknown}, and others have {known} alone")
        classes = np.zeros(max(found) - found[0] + 1, np.int32)
        classes[[number - found[0] for number in found]] = [self.codes[number] for number in found]
        return classes[numbers - found[0]]

    def name(self, index: int) -> str:
        return self.source.name(index)


def numbers_of(data: bytes | np.ndarray) -> np.ndarray:
    """Returns the numbers of a label map, int64 [H, W]: of a palette its indices.

    Raises:
        BadImageError: it is no image of one channel, or is damaged.
    """
    if not isinstance(data, bytes):
        return np.asarray(data).astype(np.int64)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format in ("JPEG", "WEBP"):
                raise BadImageError(f"its label map is {image.format}, whose numbers are not exact; save it as PNG")
            if image.mode in ("P", "L", "I", "1") or image.mode.startswith("I;16"):
                return np.array(image, np.int64)
            pixels = np.array(image)
            if image.mode == "RGB" and (pixels == pixels[..., :1]).all():
                return pixels[..., 0].astype(np.int64)
            problem = f"its label map has colours ({image.mode}) that no palette numbers"
            raise BadImageError(f"{problem}; save the number of each pixel's class as a gray PNG")
    except BadImageError:
        raise
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImageError(f"its label map cannot be read ({' '.join(str(error).split())})") from error


def crop_map(classes: np.ndarray, box: Box, flip: bool, size: tuple[int, int]) -> np.ndarray:
    """Returns the region ``box`` of a map [H, W] at ``size``, by the nearest pixel: ``IGNORED`` outside of the map.

    Pixel i of n has the class at the middle of its place in the box, so that image and map stay aligned.
    """
    rows = nearest(box.top, box.height, size[0])
    columns = nearest(box.left, box.width, size[1])
    if flip:
        columns = columns[::-1]
    height, width = classes.shape
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None]
    found = classes[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)[None]]
    return np.where(inside, found, IGNORED).astype(np.uint8)


# --- where they are ---------------------------------------------------------------------------------------------------


def open_pairs(data: Parts | str | Sequence[str], read_as: ReadAs) -> tuple[MappedSource, MappedSource]:
    """Opens the images of both parts of a data set with their label maps. Without a val part a fifth is held out.

    Raises:
        UserError: there are no label maps, or they are of no layout that is known, or not what they must be.
    """
    if isinstance(data, Parts) or (not isinstance(data, str) and len(data) != 1):
        raise SettingError("data_path", problem="must be one path, of images with label maps")
    path = data if isinstance(data, str) else data[0]
    if path == "shapes" and not Path(path).exists():
        made = shapes.built_in()
        train, val = open_train(path, read_as), open_val(path, read_as)
        assert val is not None
        cut = shapes.TRAIN
        return MappedSource(train, made.maps[:cut], shapes.CLASSES), MappedSource(val, made.maps[cut:], shapes.CLASSES)
    place = Path(path).expanduser()
    if not place.exists():
        raise SettingError("data_path", path, f"is not there; give a folder with {LAYOUT}")
    parts: list[MappedSource | None] = []
    for names in (TRAIN, VAL, ()):
        if names or parts[0] is None:
            parts.append(_open_part(place, names))
    whole, tested = parts[0] or parts[-1], parts[1]
    if whole is None:
        raise SettingError("data_path", path, f"holds no label maps where they are looked for; put {LAYOUT}")
    return with_codes(*(_held_out(whole) if tested is None else (whole, tested)))


def _open_part(place: Path, names: Sequence[str]) -> MappedSource | None:
    """Opens a part by how it may be called, of a folder or a file; without names the whole. None if it is not there."""
    arrays = open_array_pairs(place, names)
    if arrays is not None:
        images, maps, notes = arrays
        stock = Stock(images.stock.used, images.stock.left_out, (*images.stock.notes, *notes))
        return MappedSource(images, maps, class_names(place if place.is_dir() else place.parent), stock)
    pairs = find_pairs(place, names) if place.is_dir() else None
    if pairs is None:
        return None
    source = FolderSource(pairs.images, None, (), part=pairs.part)
    return MappedSource(source, pairs.maps, pairs.classes, pairs.stock, pairs.codes)


def with_codes(train: MappedSource, val: MappedSource) -> tuple[MappedSource, MappedSource]:
    """Returns both parts with what their maps' numbers stand for, where maps of two tones say 0 and 255 for 0 and 1.

    Raises:
        SettingError: the maps were smoothed, so that there are numbers between those of classes.
    """
    if train.codes or isinstance(train.maps, CocoMaps):
        return train, val
    found: dict[int, int] = {}
    for seen, index in enumerate(evenly_spaced(train, LOOKED_AT, LOOKED_AT).tolist()):
        if seen >= LEAST_LOOKED_AT and not found.keys() <= {0, IGNORED}:
            break
        with contextlib.suppress(OSError, BadImageError):
            numbers, counts = np.unique(numbers_of(train.read_map(index)), return_counts=True)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                found[number] = found.get(number, 0) + count
    between = [number for number in found if 0 < number < IGNORED]
    extremes = found.get(0, 0) + found.get(IGNORED, 0)
    if len(between) >= 8 and max(between) > 200 and extremes > 0.5 * sum(found.values()) and IGNORED in found:
        problem = f"has label maps with {len(between)} numbers between 0 and 255 at edges, as if they were smoothed"
        raise SettingError("data_path", problem=f"{problem}; save them without smoothing, resized by nearest, as PNG")
    stock, notes = train.stock, []
    if found.keys() == {0, IGNORED}:
        train, val = (replace(part, codes={0: 0, IGNORED: 1}) for part in (train, val))
        notes = ["the label maps have the numbers 0 and 255 alone, which are read as two classes, 0 and 1"]
    elif 1 < len(known := sorted(number for number in found if number != IGNORED)) <= 8 and known[-1] >= 4 * len(known):
        listed = ", ".join(map(str, known))
        notes = [f"the label maps looked at have the numbers {listed}; every number up to the largest is a class"]
    taken = Stock(stock.used, stock.left_out, (*stock.notes, *notes))
    return replace(train, taken=taken), val


def _held_out(whole: MappedSource) -> tuple[MappedSource, MappedSource]:
    train, val = (subset_of(whole, rows) for rows in holdout(len(whole)))
    return train, replace(val, taken=Stock())


def subset_of(whole: MappedSource, rows: np.ndarray) -> MappedSource:
    """Returns some images of a source with their maps; of files and arrays, as ``open_pairs`` opens them."""
    source, maps = whole.source, whole.maps
    chosen: Source = Subset(source, rows)
    if isinstance(source, FolderSource):
        chosen = replace(source, paths=[source.paths[row] for row in rows])
    elif isinstance(source, ArraySource) and isinstance(source.images, np.ndarray):
        chosen = replace(source, images=source.images[rows])
    if isinstance(maps, CocoMaps):
        return replace(whole, source=chosen, maps=maps.of(rows.tolist()))
    of_rows = maps[rows] if isinstance(maps, np.ndarray) else [maps[row] for row in rows]
    return replace(whole, source=chosen, maps=of_rows)


def count_classes(source: MappedSource, reading: MapReading) -> int:
    """Returns how many classes label maps have: the largest number among them and one.

    Raises:
        SettingError: none can be read, or no pixel has a class.
    """
    largest = -1
    problems = []
    for index in evenly_spaced(source, LOOKED_AT, LOOKED_AT).tolist():
        try:
            classes = reading.read(source.read_map(index))
        except (OSError, BadImageError) as error:
            problems.append(f"{source.name(index)}: {error}")
            continue
        known = classes[classes != IGNORED]
        largest = max(largest, int(known.max()) if known.size else -1)
    if largest < 0:
        problem = problems[0] if problems else "no pixel of its label maps has a class"
        raise SettingError("data_path", problem=f"{problem}; give label maps with classes numbered from 0")
    return largest + 1
