"""Where images and their label maps lie: folders, lists of PASCAL VOC, Cityscapes and files of COCO.

Nothing here reads a label map; label_maps.py does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastmae.data.coco import CocoMaps, read_coco
from fastmae.data.stock import EXAMPLES, LeftOut, Stock, count_of
from fastmae.data.suffixes import IMAGE_SUFFIXES
from fastmae.errors import SettingError

IMAGES = ("images", "image", "imgs", "jpegimages")
"""How folders of images are called, in lower case."""
MAPS = ("annotations", "maps", "masks", "labels", "annotation", "mask", "label", "label_maps", "segmentationclass")
"""How folders of label maps are called, in lower case."""
TRAIN, VAL = ("train", "training"), ("val", "validation", "test")
MAP_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".bmp"})
INEXACT = frozenset({".jpg", ".jpeg", ".webp", ".gif"})
"""Formats that change numbers, or renumber their palette."""
MAP_ENDS = ("_mask", "_masks", "_label", "_labels", "_map", "_seg", "_segmentation", "_annotation", "_gt", "-mask")
"""What the name of a label map may have behind that of its image."""
CLASSES_FILES = ("classes.txt", "objectInfo150.txt")
COCO_FILES = ("annotations.json", "_annotations.coco.json", "instances.json")
LAYOUT = "images/train with annotations/train (and val), or images with annotations, of the same names"

CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The numbers of these classes in files ..._labelIds.png; others count nowhere (Cordts et al. 2016, arXiv 1604.01685,
table of the classes that count; the numbers are those of its dataset's labels.py)."""


@dataclass(frozen=True)
class Pairs:
    """Images and the label maps that belong to them."""

    images: list[str]
    """Their files."""
    maps: list[str] | CocoMaps
    part: str
    """The folder of the images, below the data path."""
    stock: Stock
    classes: tuple[str, ...] = ()
    codes: Mapping[int, int] = field(default_factory=dict)
    """Which class a number in files stands for, −1 where it counts nowhere; empty where numbers are classes."""


def find_pairs(folder: Path, names: Sequence[str]) -> Pairs | None:
    """Finds a part of a folder by how it may be called; without names the whole. None if it is not there.

    Raises:
        UserError: it is there, and is not what it must be.
    """
    if names and (folder / "leftImg8bit").is_dir():
        return _cityscapes(folder, names[0])
    file = next(_coco_files(folder, names), None)
    if file is not None:
        return _coco(folder, file, names)
    if names and (folder / "ImageSets" / "Segmentation").is_dir():
        return _voc(folder, names)
    for images, maps in _places(folder, names):
        if images.is_dir() and maps.is_dir():
            return _paired(folder, images, by_stem(images, IMAGE_SUFFIXES), by_stem(maps, MAP_SUFFIXES | INEXACT))
    return None if names else _beside(folder)


def _places(folder: Path, names: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """Yields where the images and the label maps of a part may lie."""
    for name in names or ("",):
        for images in _called(folder, IMAGES):
            for maps in _called(folder, MAPS):
                yield images / name, maps / name
        if name:
            for images in _called(folder / name, IMAGES):
                for maps in _called(folder / name, MAPS):
                    yield images, maps
            for kind in MAPS:
                yield folder / name, folder / f"{name}_{kind}"


def _called(folder: Path, names: Sequence[str]) -> list[Path]:
    """Returns the folders directly inside with one of these names, in any case, in the order of the names."""
    if not folder.is_dir():
        return []
    found = sorted(path for path in folder.iterdir() if path.name.lower() in names and path.is_dir())
    return sorted(found, key=lambda path: names.index(path.name.lower()))


def by_stem(folder: Path, suffixes: frozenset[str]) -> dict[str, list[str]]:
    """Returns the files below a folder by their names without the suffix, in their order; hidden ones are left out."""
    stems: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            stems.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(str(path))
    return stems


def _without_end(stem: str) -> str:
    """Returns the name of the image that a label map is of: without an end that says so, and without a suffix."""
    end = next((end for end in MAP_ENDS if stem.lower().endswith(end) and len(stem) > len(end)), "")
    stem = stem[: len(stem) - len(end)]
    head, dot, suffix = stem.rpartition(".")
    return head if dot + suffix.lower() in IMAGE_SUFFIXES else stem


def _beside(folder: Path) -> Pairs | None:
    """Finds label maps that lie beside their images, with an end such as _mask; None if there are none."""
    images = by_stem(folder, IMAGE_SUFFIXES)
    maps = {stem: files for stem, files in images.items() if (base := _without_end(stem)) != stem and base in images}
    if not maps:
        return None
    return _paired(folder, folder, {stem: files for stem, files in images.items() if stem not in maps}, maps)


def _voc(folder: Path, names: Sequence[str]) -> Pairs | None:
    """Finds a part of PASCAL VOC, whose lists name the images that have label maps."""
    lists = [folder / "ImageSets" / "Segmentation" / f"{name}.txt" for name in names]
    file = next((file for file in lists if file.is_file()), None)
    if file is None:
        return None
    stems = file.read_text(errors="replace").split()
    images, maps = folder / "JPEGImages", folder / "SegmentationClass"
    of_images, of_maps = by_stem(images, IMAGE_SUFFIXES), by_stem(maps, MAP_SUFFIXES)
    chosen_images, chosen_maps = (
        {stem: files[stem] for stem in stems if stem in files} for files in (of_images, of_maps)
    )
    pairs = _paired(folder, images, chosen_images, chosen_maps)
    missing = tuple(stem for stem in stems if stem not in of_images and stem not in of_maps)
    if not missing:
        return pairs
    absent = LeftOut("names", len(missing), f"{file.name} lists them, and they are not there", missing[:EXAMPLES])
    stock = Stock(pairs.stock.used, (*pairs.stock.left_out, absent), pairs.stock.notes)
    return Pairs(pairs.images, pairs.maps, pairs.part, stock, pairs.classes)


def _cityscapes(folder: Path, name: str) -> Pairs | None:
    """Finds a part of Cityscapes, in ..._labelTrainIds.png, or else in ..._labelIds.png."""
    images, maps = folder / "leftImg8bit" / name, folder / "gtFine" / name
    if not images.is_dir() or not maps.is_dir():
        return None
    found = by_stem(maps, frozenset({".png"}))
    ends = "_gtFine_labelTrainIds", "_gtFine_labelIds"
    end = next((end for end in ends if any(stem.endswith(end) for stem in found)), ends[0])
    of_maps = {stem.removesuffix(end): files for stem, files in found.items() if stem.endswith(end)}
    of_images = {
        stem.removesuffix("_leftImg8bit"): files for stem, files in by_stem(images, frozenset({".png"})).items()
    }
    first = 0 if end == ends[0] else 1
    own = dict(enumerate(range(len(CITYSCAPES)))), dict(zip(CITYSCAPES_IDS, range(len(CITYSCAPES)), strict=True))
    codes = {number: -1 for number in (-1, *range(256))} | own[first]
    return _paired(folder, images, of_images, of_maps, CITYSCAPES, codes)


def _paired(
    folder: Path,
    images: Path,
    of_images: Mapping[str, list[str]],
    of_maps: Mapping[str, list[str]],
    classes: tuple[str, ...] = (),
    codes: Mapping[int, int] | None = None,
) -> Pairs:
    """Pairs images and label maps by their names. A map may have an end such as _mask, where none has just the name."""
    paired: dict[str, str] = {}
    for exact in (True, False):
        for stem, files in of_maps.items():
            base = stem if exact else _without_end(stem)
            if base in of_images and base not in paired and (exact or stem not in of_images):
                paired[base] = next((file for file in files if Path(file).suffix.lower() in MAP_SUFFIXES), files[0])
    inexact = [file for file in paired.values() if Path(file).suffix.lower() in INEXACT]
    if inexact and len(inexact) == len(paired):
        suffix = Path(inexact[0]).suffix
        problem = f"has label maps as {suffix} ({_below(folder, inexact[0])}), whose numbers are not exact"
        raise SettingError("data_path", str(folder), f"{problem}; save them as PNG, from before they were compressed")
    paired = {stem: file for stem, file in paired.items() if file not in {*inexact}}
    used = {file for stem, file in paired.items() for file in (of_images[stem][0], file)}
    whys = [(inexact, "label maps must be PNG; the numbers in other files are not exact")]
    for what, those in (("label map", of_images), ("image", of_maps)):
        rest = [(stem, file) for stem, files in those.items() for file in files if file not in used]
        alone = [file for stem, file in rest if file not in inexact and stem not in paired]
        twice = [file for stem, file in rest if file not in inexact and stem in paired]
        whys += [(alone, f"there is no {what} of their name"), (twice, "another file has their name; rename one")]
    left_out = [
        LeftOut("files", len(files), why, tuple(_below(folder, file) for file in files[:EXAMPLES]))
        for files, why in whys
        if files
    ]
    part = "" if images == folder else _below(folder, str(images))
    if not paired:
        counts = f"{count_of(len(of_images), 'images')} and {count_of(len(of_maps), 'label maps')} of other names"
        raise SettingError("data_path", str(folder), f"has {counts} in {part or folder.name}; give both the same names")
    stems = [stem for stem in of_images if stem in paired]
    stock = Stock({"files": 2 * len(stems)}, tuple(left_out))
    names = classes or class_names(folder)
    return Pairs(
        [of_images[stem][0] for stem in stems], [paired[stem] for stem in stems], part, stock, names, codes or {}
    )


def _below(folder: Path, file: str) -> str:
    return Path(file).relative_to(folder).as_posix()


def class_names(folder: Path) -> tuple[str, ...]:
    """Returns the names of classes that a folder lists, a line each; ADE20K's list has them in its last column."""
    for name in CLASSES_FILES:
        file = folder / name
        if file.is_file():
            lines = [line.rstrip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
            return tuple(lines) if name == CLASSES_FILES[0] else tuple(line.split("\t")[-1] for line in lines[1:])
    return ()


# --- COCO -------------------------------------------------------------------------------------------------------------


def _coco_files(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yields the files of COCO for a part: instances_NAME*.json, NAME.json, or annotations.json in its folder."""
    for name in names:
        inside = folder / "annotations"
        yield from sorted(inside.glob(f"instances_{name}*.json")) if inside.is_dir() else ()
        files = [inside / f"{name}.json", folder / f"{name}.json", *(folder / name / file for file in COCO_FILES)]
        yield from (file for file in files if file.is_file())
    if not names:
        yield from (file for file in (folder / name for name in COCO_FILES) if file.is_file())


def _coco(folder: Path, file: Path, names: Sequence[str]) -> Pairs:
    own = file.stem.removeprefix("instances_")
    inside = [folder / "images", folder / own, *(folder / name for name in names), file.parent, folder]
    inside = [*(folder / "images" / name for name in (own, *names)), *(file.parent / "images",), *inside]

    def find(name: str) -> Path | None:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return None
        return next((path for place in inside if (path := place / name).is_file()), None)

    said = read_coco(file, find)
    stock = Stock({"files": len(said.images) + 1}, said.left_out, said.notes)
    return Pairs(said.images, said.maps, _below(folder, str(file)), stock, said.classes)
