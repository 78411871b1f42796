"""Images with label maps: for each pixel the number of what it shows. Other tools call them masks.

A ``MappedSource`` is a source like any other, which has the map of each image beside it. Maps are palette or gray PNG
files, of 8 or 16 bits, or an array. They are resized by nearest pixel, cropped and mirrored with the box of their
image; sample.py does that.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastmae.data import shapes
from fastmae.data.arrays import ArraySource
from fastmae.data.images import FolderSource
from fastmae.data.plan import Box, Shards, holdout
from fastmae.data.reading import BadImageError
from fastmae.data.resize import nearest
from fastmae.data.sources import Parts, Source, evenly_spaced, open_train, open_val
from fastmae.data.stock import EXAMPLES, LeftOut, Stock, count_of
from fastmae.data.suffixes import IMAGE_SUFFIXES
from fastmae.errors import SettingError
from fastmae.facts import ReadAs

IGNORED = 255
"""The number of pixels that count nowhere: not in the loss, and in no accuracy."""
MOST_CLASSES = 255
LOOKED_AT = 1000
"""In so many maps, evenly spaced, the classes are counted where nobody says how many there are."""
MAPS = ("annotations", "maps", "masks", "labels")
"""How folders of label maps are called."""
TRAIN, VAL = ("train", "training"), ("val", "validation", "test")
CLASSES_FILES = ("classes.txt", "objectInfo150.txt")
LAYOUT = "images/train with annotations/train (and val), or images with annotations, of the same names"


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
        ignored = numbers == self.ignore_index
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
    maps: Sequence[str] | np.ndarray
    """The files of the maps, or uint8 [N, H, W]."""
    classes: tuple[str, ...] = ()
    """The names of the classes, where the data name them."""
    taken: Stock | None = None
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

        Raises:
            OSError: its file cannot be read.
        """
        if isinstance(self.maps, np.ndarray):
            return self.maps[index]
        return Path(self.maps[index]).read_bytes()

    def name(self, index: int) -> str:
        return self.source.name(index)


def numbers_of(data: bytes | np.ndarray) -> np.ndarray:
    """Returns the numbers of a label map, int32 [H, W]: of a palette its indices.

    Raises:
        BadImageError: it is no image of one channel, or is damaged.
    """
    if not isinstance(data, bytes):
        return np.asarray(data).astype(np.int32)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in ("P", "L", "I;16", "I", "1"):
                raise BadImageError(f"its label map has colours ({image.mode}); a palette or gray tones are needed")
            return np.array(image, np.int32)
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
        SettingError: there are no label maps, or they are of no layout that is known.
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
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise SettingError("data_path", path, f"is no folder; give one with {LAYOUT}")
    parts = [_open_part(folder, names) for names in (TRAIN, VAL)]
    if parts[0] is None:
        whole = _open_part(folder, ())
        if whole is None:
            raise SettingError("data_path", path, f"holds no label maps where they are looked for; put {LAYOUT}")
        return _held_out(whole)
    return _held_out(parts[0]) if parts[1] is None else (parts[0], parts[1])


def _open_part(folder: Path, names: Sequence[str]) -> MappedSource | None:
    """Opens a part of a folder by how it may be called; without names the whole. None if it is not there."""
    places = [(Path("images") / name, kind, name) for name in names for kind in MAPS]
    places += [(Path(name) / "images", kind, name) for name in names for kind in MAPS]
    places += [] if names else [(Path("images"), kind, "") for kind in MAPS]
    for images, kind, name in places:
        maps = images.parent / kind if images.name == "images" else Path(kind) / name
        if (folder / images).is_dir() and (folder / maps).is_dir():
            return _pair(folder, images, maps)
    if names and (folder / "leftImg8bit").is_dir():
        return _cityscapes(folder, names[0])
    return None


def _pair(folder: Path, images: Path, maps: Path) -> MappedSource:
    of_images = _by_stem(folder / images, IMAGE_SUFFIXES)
    of_maps = _by_stem(folder / maps, {".png"})
    return _mapped(folder, images, of_images, of_maps)


def _cityscapes(folder: Path, name: str) -> MappedSource | None:
    """Opens a part of Cityscapes, whose label maps with the numbers to train on end in _gtFine_labelTrainIds.png."""
    images, maps = Path("leftImg8bit") / name, folder / "gtFine" / name
    if not (folder / images).is_dir() or not maps.is_dir():
        return None
    ends = "_leftImg8bit", "_gtFine_labelTrainIds"
    of_images = {stem.removesuffix(ends[0]): path for stem, path in _by_stem(folder / images, {".png"}).items()}
    found = _by_stem(maps, {".png"})
    of_maps = {stem.removesuffix(ends[1]): path for stem, path in found.items() if stem.endswith(ends[1])}
    return _mapped(folder, images, of_images, of_maps)


def _by_stem(folder: Path, suffixes: Sequence[str] | set[str] | frozenset[str]) -> dict[str, str]:
    """Returns the files below a folder by their names without the suffix, in their order."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return {path.relative_to(folder).with_suffix("").as_posix(): str(path) for path in found}


def _mapped(folder: Path, images: Path, of_images: dict[str, str], of_maps: dict[str, str]) -> MappedSource:
    both = [stem for stem in of_images if stem in of_maps]
    left_out = []
    for what, those, others in (("label map", of_images, of_maps), ("image", of_maps, of_images)):
        alone = [path for stem, path in those.items() if stem not in others]
        if alone:
            names = tuple(Path(path).relative_to(folder).as_posix() for path in alone[:EXAMPLES])
            left_out.append(LeftOut("files", len(alone), f"there is no {what} of their name", names))
    if not both:
        counts = f"{count_of(len(of_images), 'images')} and {count_of(len(of_maps), 'label maps')} of other names"
        raise SettingError("data_path", str(folder), f"has {counts} in {images}; give both the same names")
    source = FolderSource([of_images[stem] for stem in both], None, (), part=images.as_posix())
    stock = Stock({"files": 2 * len(both)}, tuple(left_out))
    return MappedSource(source, [of_maps[stem] for stem in both], _class_names(folder), stock)


def _class_names(folder: Path) -> tuple[str, ...]:
    """Returns the names of classes that a folder lists, a line each; ADE20K's list has them in its last column."""
    for name in CLASSES_FILES:
        file = folder / name
        if file.is_file():
            lines = [line.rstrip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
            return tuple(lines) if name == CLASSES_FILES[0] else tuple(line.split("\t")[-1] for line in lines[1:])
    return ()


def _held_out(whole: MappedSource) -> tuple[MappedSource, MappedSource]:
    train, val = (subset_of(whole, rows) for rows in holdout(len(whole)))
    return train, replace(val, taken=Stock())


def subset_of(whole: MappedSource, rows: np.ndarray) -> MappedSource:
    """Returns some images of a source with their maps; of files and arrays, as ``open_pairs`` opens them."""
    source = whole.source
    maps = whole.maps[rows] if isinstance(whole.maps, np.ndarray) else [whole.maps[row] for row in rows]
    if isinstance(source, FolderSource):
        return replace(whole, source=replace(source, paths=[source.paths[row] for row in rows]), maps=maps)
    assert isinstance(source, ArraySource)
    assert isinstance(source.images, np.ndarray)
    return replace(whole, source=replace(source, images=source.images[rows]), maps=maps)


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
