"""Opens a folder: finds its parts, chooses what holds the images, and takes stock of every file below it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastmae.data.arrays import ArraySource, Split, open_array_folder
from fastmae.data.arrow import open_arrow
from fastmae.data.formats import nifti, npy
from fastmae.data.formats.nifti import VolumeSource, open_volumes
from fastmae.data.formats.npy import ArrayFiles
from fastmae.data.images import (
    Chosen,
    FolderSource,
    Listing,
    choose_images,
    list_images,
    others_left_out,
)
from fastmae.data.index import Names
from fastmae.data.openfile import OpenFile
from fastmae.data.packed import PackedSource
from fastmae.data.parquet import ParquetSource, open_parquet
from fastmae.data.parts import Part, parts_among, shard_part
from fastmae.data.shards import open_shards, refuse_compressed
from fastmae.data.stock import EXAMPLES, LeftOut, Stock, within
from fastmae.data.suffixes import SHARD_SUFFIXES, SOUND_SUFFIXES
from fastmae.data.zips import ZipSource, list_zip, open_table
from fastmae.errors import SettingError, UserError
from fastmae.facts import AS_STORED, ReadAs

_MEANT = {"train": "to train on", "val": "to validate on", "test": "to test on"}


@dataclass(frozen=True)
class Layout:
    """Where the parts of a folder lie. All names are relative to it."""

    train: str
    """The folder to train on; "" is the folder itself, without those to evaluate on."""
    evaluate: tuple[str, ...] = ()
    """The folders that may be evaluated on, the best one first."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """What is used of a folder: the image files below it, or else the shards in it."""

    folder: str
    images: Chosen
    shards: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.images.paths or self.shards)


def open_folder(
    path: Path, split: Split, read_as: ReadAs = AS_STORED
) -> ArraySource | FolderSource | PackedSource | ParquetSource | ArrayFiles | VolumeSource | None:
    """Opens a part of a folder; None if it has no val part.

    Where it holds no image files and no shards, its NIfTI volumes are the data, or else its arrays, an image each.

    The stock of the train part is that of the whole folder: every file below it is counted once, those of the val part
    as used. The stock of the val part has no files.

    Raises:
        UserError: several parts of one kind, parts that lie deeper, or shards that cannot be read.
    """
    arrays = open_array_folder(path, split)
    if arrays is not None:
        return arrays
    listing = _listing(path, read_as)
    layout = find_layout(listing)
    train = _found(listing, layout.train, "train", () if layout.train else layout.evaluate)
    val, refused, notes = _choose_val(listing, layout, train)
    if split == "val":
        return None if val is None else _open(listing, val, Stock(), read_as)
    if not train:
        for file in sorted((path / layout.train).iterdir()):
            refuse_compressed(file)
    parts = [train, *([] if val is None else [val])]
    left_out = [*_unused(listing, layout, parts, refused), *others_left_out(listing)]
    used = sum(_files(part, listing) for part in parts)
    notes = (*layout.notes, *train.notes, *train.images.notes, *notes)
    return _open(listing, train, Stock({"files": used}, tuple(left_out), notes), read_as)


def _listing(path: Path, read_as: ReadAs) -> Listing:
    """Lists the image files and shards of a folder; without any its volumes, or else its arrays. Or lists its sounds.

    Raises:
        UserError: sounds are asked for, and there are none.
    """
    if read_as.spectrogram:
        listing = list_images(path, SOUND_SUFFIXES)
        if not len(listing):
            raise SettingError("data_path", str(path), "holds no sound files, which --spectrogram reads")
        return listing
    listing = list_images(path)
    if len(listing) or listing.shards:
        return listing
    for suffixes in (nifti.SUFFIXES, npy.SUFFIXES):
        if any(f".{suffix.rpartition('.')[2]}" in listing.others for suffix in suffixes):
            others = list_images(path, suffixes)
            if len(others):
                return others
    return listing


def open_zip(path: Path, split: Split) -> ZipSource | None:
    """Opens a part of a zip archive as if it were a folder; None if it has no val part.

    Raises:
        SettingError: as ``open_folder``.
        OSError, ValueError: the archive cannot be read, or is damaged.
    """
    archive = OpenFile(path)
    table = open_table(archive)
    listing, around = list_zip(path, table)
    layout = find_layout(listing)
    train = _found(listing, layout.train, "train", () if layout.train else layout.evaluate)
    val, refused, notes = _choose_val(listing, layout, train)
    parts = [train, *([] if val is None else [val])]
    problems = (LeftOut("files", found.count, reason, tuple(found.names)) for reason, found in table.problems.items())
    left_out = [*_unused(listing, layout, parts, refused), *problems, *others_left_out(listing)]
    found, stock = (val, Stock()) if split == "val" else (train, None)
    if found is None:
        return None
    images = found.images
    if stock is None:
        every = (*layout.notes, *train.notes, *images.notes, *notes)
        members = tuple(replace(item, unit="members") for item in left_out)
        stock = Stock({"files": 1, "members": sum(len(part.images.paths) for part in parts)}, members, every)
    inside = Names(images.paths.column, images.paths.ends, around)
    numbers = {name: number for number, name in enumerate(table.names)}
    chosen = np.array([numbers[name] for name in inside], np.int64)
    return ZipSource(
        path=str(path),
        stamp=archive.stamp,
        names=inside,
        header=table.header[chosen],
        packed=table.packed[chosen],
        size=table.size[chosen],
        check=table.check[chosen],
        labels=images.labels,
        classes=images.classes,
        part=found.folder,
        stock=stock,
    )


def _files(found: Found, listing: Listing) -> int:
    """Returns how many files are used."""
    unsound = {os.path.join(listing.folder, path) for path in listing.unsound}
    no_files = sum(path in unsound for path in found.images.paths) if unsound else 0
    return len(found.images.paths) - no_files + len(found.shards)


def _open(
    listing: Listing, found: Found, stock: Stock, read_as: ReadAs
) -> FolderSource | PackedSource | ParquetSource | ArrayFiles | VolumeSource:
    if found.shards:
        return open_files([Path(listing.folder, name) for name in found.shards], read_as, stock)
    damage = tuple((folder, "may not be listed, so its images are missed") for folder in sorted(listing.unreadable))
    images = found.images
    files = FolderSource(images.paths, images.labels, images.classes, part=found.folder, taken=stock, damage=damage)
    if (
        read_as.spectrogram
        or not images.paths
        or not images.paths[0].lower().endswith((*nifti.SUFFIXES, *npy.SUFFIXES))
    ):
        return files
    return open_volumes(files, read_as) if nifti.is_nifti(Path(images.paths[0])) else ArrayFiles(files, read_as)


def open_files(
    paths: list[Path], read_as: ReadAs, folder: Stock | None = None
) -> PackedSource | ParquetSource | FolderSource:
    """Opens tar, Parquet or Arrow files as one source.

    Args:
        paths: the files.
        read_as: what is asked of reading.
        folder: the stock of the folder that they were found in.

    Raises:
        UserError: some are of one kind and some of the other, or one cannot be read.
    """
    suffixes = {path.suffix.lower() for path in paths}
    if len(suffixes) > 1:
        kinds = " and ".join(suffix for suffix in SHARD_SUFFIXES if suffix in suffixes)
        raise UserError(f"{paths[0].parent}: holds both {kinds} files; name those of one kind by a pattern")
    if suffixes == {".parquet"}:
        return open_parquet(paths, read_as.root, folder)
    if suffixes == {".arrow"}:
        return open_arrow(paths, read_as.root, folder)
    source = open_shards(paths, read_as.image_key)
    return replace(source, stock=within(source.stock, folder))


# --- parts ------------------------------------------------------------------------------------------------------------


def find_layout(listing: Listing) -> Layout:
    """Finds the parts of a folder by the names of folders: in it, or one or more levels deeper.

    Raises:
        SettingError: two parts of a kind, parts in several places, or none to train on.
    """
    filled = _filled(listing)
    inside: dict[str, list[str]] = {}
    for folder in listing.images:
        if folder:
            inside.setdefault(os.path.dirname(folder), []).append(os.path.basename(folder))

    def parts_in(folder: str) -> dict[Part, list[str]]:
        """Returns the folders of each part that hold anything; of a part that holds nothing, its first folder."""
        found = {}
        for part, names in parts_among(inside.get(folder, [])).items():
            paths = [os.path.join(folder, name) for name in names]
            found[part] = [path for path in paths if path in filled] or paths[:1]
        return found

    root, notes = "", tuple[str, ...]()
    parts = parts_in(root)
    if "train" not in parts:
        deeper = _deeper(inside, parts_in, filled, [path for paths in parts.values() for path in paths])
        if len(deeper) == 1 and all(_is_below(folder, deeper[0]) for folder in _data_folders(listing)):
            root = deeper[0]
            parts = parts_in(root)
            notes = (f"the parts are found in {os.path.join(listing.folder, root)}",)
        elif deeper:
            where = ", ".join(deeper[:EXAMPLES]) + (f" and {len(deeper) - EXAMPLES} more" * (len(deeper) > EXAMPLES))
            several = "each of several folders in it" if len(deeper) > 1 else "a folder in it"
            problem = f"{several} has parts of its own ({where}); give their paths, such as "
            raise SettingError("data_path", listing.folder, problem + os.path.join(listing.folder, deeper[0]))
    for part, paths in parts.items():
        if len(paths) > 1:
            problem = f"{len(paths)} of its folders are parts {_MEANT[part]}, {' and '.join(paths[:EXAMPLES])}; "
            raise SettingError("data_path", listing.folder, problem + "give the path of one, or rename the others")
    both: tuple[Part, Part] = ("val", "test")
    evaluate = tuple(parts[part][0] for part in both if part in parts)
    if "train" in parts:
        return Layout(parts["train"][0], evaluate, notes)
    data = _data_folders(listing)
    if data and all(any(_is_below(folder, path) for path in evaluate) for folder in data):
        problem = f"holds no part to train on, only {' and '.join(evaluate)}; to train on it, give "
        raise SettingError("data_path", listing.folder, problem + os.path.join(listing.folder, evaluate[0]))
    notes = tuple(f"{path} is taken for a part to evaluate on, and not trained on" for path in evaluate)
    return Layout("", evaluate, notes)


def _deeper(
    inside: dict[str, list[str]], parts_in: Callable[[str], dict[Part, list[str]]], filled: set[str], but: list[str]
) -> list[str]:
    """Returns the folders below which hold a part to train on beside one to evaluate on, or that part and no other."""
    found: list[str] = []
    for folder in sorted(inside):
        if not folder or folder not in filled or any(_is_below(folder, other) for other in (*found, *but)):
            continue
        parts = {part for part, paths in parts_in(folder).items() if paths[0] in filled}
        is_sole = parts == {"train"} and _is_sole(folder, inside, filled)
        if "train" in parts and (len(parts) > 1 or is_sole):
            found.append(folder)
    return found


def _is_sole(folder: str, inside: dict[str, list[str]], filled: set[str]) -> bool:
    """Tells whether this folder and all around it have one folder with anything in it each, which leads to it."""
    while True:
        if sum(os.path.join(folder, name) in filled for name in inside[folder]) > 1:
            return False
        if not folder:
            return True
        folder = os.path.dirname(folder)


def _is_below(folder: str, other: str) -> bool:
    return not other or folder == other or folder.startswith(f"{other}/")


def _data_folders(listing: Listing) -> set[str]:
    """Returns the folders that hold image files or shards directly."""
    return {folder for folder, names in listing.images.items() if names} | set(map(os.path.dirname, listing.shards))


def _filled(listing: Listing) -> set[str]:
    """Returns the folders below which there are image files or shards."""
    filled = set()
    for folder in _data_folders(listing):
        while folder not in filled:
            filled.add(folder)
            folder = os.path.dirname(folder)
    return filled


# --- what a part holds ------------------------------------------------------------------------------------------------


def _found(listing: Listing, folder: str, split: Split | None, without: Iterable[str] = ()) -> Found:
    """Returns the image files of a folder, or else its shards: those of one part by their names, or all for None."""
    images = choose_images(listing, folder, [*without])
    if images.paths:
        return Found(folder, images)
    below = _without_derived([name for name in listing.shards if _is_below(name, folder)])
    below = [name for name in below if not any(_is_below(name, other) for other in without)]
    places = sorted(set(map(os.path.dirname, below)))
    if not places:
        return Found(folder, images)
    if folder not in places and len(places) > 1:
        problem = f"holds no images, but shards in {len(places)} folders; give their paths, such as "
        paths = " ".join(os.path.join(listing.folder, name) for name in places[:2])
        raise SettingError("data_path", listing.folder, problem + paths)
    place = folder if folder in places else places[0]
    inside = [name for name in below if os.path.dirname(name) == place]
    notes = () if place == folder else (f"the shards are found in {os.path.join(listing.folder, place)}",)
    return Found(folder, images, tuple(_of_part(inside, split if folder == "" else None)), notes)


def _of_part(shards: list[str], split: Split | None) -> list[str]:
    """Returns the shards of a part; with the word val or test a name belongs to the val part, unless all names do."""
    said = {name: part for name in shards if (part := shard_part(os.path.basename(name)))}
    if split is None or len(said) == len(shards):
        return [] if split == "val" else shards
    if split == "train":
        return [name for name in shards if name not in said]
    return [name for name in said if said[name] == "val"] or [*said]


def _without_derived(shards: list[str]) -> list[str]:
    """Returns shards without those that `datasets` derived from others and keeps beside them."""
    own = [name for name in shards if not re.fullmatch(r"cache-[0-9a-f]+.*\.arrow", os.path.basename(name))]
    return own or shards


def _choose_val(listing: Listing, layout: Layout, train: Found) -> tuple[Found | None, dict[str, str], tuple[str, ...]]:
    """Returns the part to evaluate on, why other folders are not, by name, and notes."""
    if not layout.evaluate and train.shards and layout.train == "":
        return _found(listing, "", "val") or None, {}, ()
    val: Found | None = None
    refused: dict[str, str] = {}
    notes: list[str] = []
    labels = train.images.labels
    is_labelled = labels is not None and len(np.unique(labels)) > 1
    for folder in layout.evaluate:
        found = _found(listing, folder, None)
        if not found:
            notes.append(f"{folder} holds no image, so it is no part to evaluate on")
        elif is_labelled and found.images.paths and _is_plain(found.images, train.images):
            labelled = layout.train or "the other folders"
            refused[folder] = f"in {folder}, which has no labels as {labelled} has, so nothing is measured on it"
            notes += found.images.notes
        elif val is not None:
            refused[folder] = f"in {folder}, as {val.folder} is the part to evaluate on; to use it, give its own path"
        else:
            val = found
            notes += [*found.notes, *found.images.notes]
    if val is None and layout.evaluate:
        notes.append("no part to evaluate on, so where accuracy is measured, a fifth of the images is held out for it")
    return val, refused, tuple(notes)


def _is_plain(images: Chosen, train: Chosen) -> bool:
    """Tells whether images have no labels beside labelled ones: no folders, or one alone that is none of theirs."""
    if images.labels is None:
        return True
    classes = [images.classes[label] for label in np.unique(images.labels)]
    return len(classes) == 1 and classes[0] not in train.classes


def _unused(listing: Listing, layout: Layout, parts: list[Found], refused: dict[str, str]) -> list[LeftOut]:
    """Returns the image files and shards that are not used, by reason."""
    used_shards = {name for part in parts for name in part.shards}
    in_use = [part.folder for part in parts]
    with_images = [part.folder for part in parts if part.images.paths]
    own_path = "to use them, give their own path"

    def why_not(folder: str, is_shard: bool) -> str | None:
        evaluated = next((other for other in layout.evaluate if _is_below(folder, other)), None)
        if evaluated in refused:
            return refused[evaluated]
        if any(_is_below(folder, other) for other in with_images):
            return f"shards beside image files; {own_path}" if is_shard else None
        if is_shard and used_shards:
            return f"shards of other parts or folders; {own_path}"
        return f"{'shards' if is_shard else 'images'} outside of {' and '.join(in_use)}; {own_path}"

    unused: dict[str, tuple[str, ...]] = {}
    counts: Counter[str] = Counter()
    unsound = set(listing.unsound)
    things: list[tuple[str, Sequence[str], bool]] = [
        (folder, [name for name in names if os.path.join(folder, name) not in unsound] if unsound else names, False)
        for folder, names in listing.images.items()
    ]
    for path in listing.shards:
        if path not in used_shards:
            things.append((os.path.dirname(path), [os.path.basename(path)], True))
    for folder, names, is_shard in things:
        reason = why_not(folder, is_shard)
        if reason is not None and names:
            counts[reason] += len(names)
            paths = tuple(os.path.join(folder, name) for name in names[:EXAMPLES])
            unused[reason] = (unused.get(reason, ()) + paths)[:EXAMPLES]
    return [LeftOut("files", counts[reason], reason, names) for reason, names in unused.items()]
