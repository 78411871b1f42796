"""Sources: opens the data that a path names (digits, arrays, image files, tars, Parquet) and joins several.

A source has a length, ``read(i)`` for any thread, a name for sample i and labels or none. It knows nothing of order,
crops or models. How each kind is stored is in arrays.py, images.py, shards.py and parquet.py.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np

from fastmae.data import shapes
from fastmae.data.arrays import FEW, UNREADABLE, ArraySource, Split, open_array
from fastmae.data.convert import narrowest
from fastmae.data.folders import open_files, open_folder, open_zip
from fastmae.data.formats import sound
from fastmae.data.formats.npy import ArrayFiles
from fastmae.data.headers import as_read, read_header
from fastmae.data.images import FolderSource, begins_as_an_image
from fastmae.data.lists import LIST_SUFFIXES, open_list
from fastmae.data.memory import release_after
from fastmae.data.pages import PagedSource, by_page
from fastmae.data.parquet import open_parquet
from fastmae.data.plan import Shards, describe_order, held_out_of_training, holdout, shards_of
from fastmae.data.remote import file_name, is_remote
from fastmae.data.shards import expand_braces, open_shards, refuse_compressed
from fastmae.data.stock import EXAMPLES, RUN_LINES, LeftOut, Stock, count_of, joined
from fastmae.data.suffixes import IMAGE_SUFFIXES, SHARD_SUFFIXES, SOUND_SUFFIXES, remedy_for, suffix_of
from fastmae.data.table_files import SUFFIXES as TABLE_SUFFIXES
from fastmae.data.tables import TableSource, is_table, open_table
from fastmae.data.volumes import is_stack, open_stack
from fastmae.errors import SettingError, in_one_line
from fastmae.facts import AS_STORED, BUILT_IN_TABLES, DataFacts, PixelFacts, ReadAs

LOOKED_AT = 64
"""Of how many images the headers are read before a run."""
IN_A_ROW = 16
"""How many of them are read in a row from a source with shards."""


class Source(Protocol):
    """What the loader needs of a data set."""

    @property
    def kind(self) -> str:
        """`digits`, `array`, `table`, or `folder`: image files, whether in a folder, a tar or a table."""

    @property
    def location(self) -> str:
        """Where the images lie, as a phrase for people that goes on from "1,000 images"."""

    @property
    def stock(self) -> Stock:
        """What lies where the images come from, and how much of it is used."""

    @property
    def shards(self) -> Shards | None:
        """Which samples are best read at about the same time; None where any order costs the same."""

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [length], or None."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that the labels number; empty where they are numbers alone, or there are none."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | np.ndarray:
        """Returns sample ``index``: the bytes of an image file, or pixels [H, W, C] of any type of numbers."""

    def name(self, index: int) -> str:
        """Returns where sample ``index`` comes from, for people."""


@dataclass(frozen=True)
class Subset:
    """Some samples of another source."""

    source: Source
    indices: np.ndarray
    """int64 [length]: which samples."""
    taken: Stock | None = None
    """Their stock, if it is not that of the source."""
    shards: Shards | None = None
    """Which of them are best read at about the same time. Parts of version 0.1 have none, and keep their order."""

    @property
    def kind(self) -> str:
        return self.source.kind

    @property
    def location(self) -> str:
        return self.source.location

    @property
    def stock(self) -> Stock:
        return self.source.stock if self.taken is None else self.taken

    @property
    def labels(self) -> np.ndarray | None:
        return None if self.source.labels is None else self.source.labels[self.indices]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

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
    notes: tuple[str, ...] = ()
    """What to know of the paths that they come from."""

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [parts + 1]: the first sample of each part, and the length."""
        return np.cumsum([0, *map(len, self.parts)])

    @cached_property
    def kind(self) -> str:
        """The kind of the parts. If they differ it is `folder` if any is of image files, else `array`."""
        kinds = {part.kind for part in self.parts}
        return kinds.pop() if len(kinds) == 1 else "folder" if "folder" in kinds else "array"

    @property
    def location(self) -> str:
        return "in all: " + " + ".join(f"{len(part):,} {part.location}" for part in self.parts)

    @property
    def stock(self) -> Stock:
        labelled = sum(part.labels is not None for part in self.parts)
        notes: tuple[str, ...] = ()
        if 0 < labelled < len(self.parts):
            notes = (f"{labelled} of {len(self.parts)} paths have labels, so no image has one; label all",)
        elif labelled and self._mixes_labels:
            notes = ("the labels of some paths are names and of others numbers, so no image has one",)
        return joined([*(part.stock for part in self.parts), Stock(notes=(*self.notes, *notes))])

    @property
    def _mixes_labels(self) -> bool:
        return len({bool(part.classes) for part in self.parts}) > 1

    @cached_property
    def labels(self) -> np.ndarray | None:
        """Labels, if all parts have them: classes with names are numbered anew by name, numbers stay as they are."""
        every = [part.labels for part in self.parts]
        present = [labels for labels in every if labels is not None]
        if len(present) < len(every) or self._mixes_labels:
            return None
        if self.classes:
            numbers = {name: number for number, name in enumerate(self.classes)}
            renumbered = (np.array([numbers[name] for name in part.classes], np.int64) for part in self.parts)
            present = [new[old] for new, old in zip(renumbered, present, strict=True)]
        return np.concatenate(present)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        if self._mixes_labels:
            return ()
        return tuple(sorted({name for part in self.parts for name in part.classes}))

    @cached_property
    def shards(self) -> Shards | None:
        """The shards of the parts; each sample of a part without shards is a shard of its own."""
        if all(part.shards is None for part in self.parts):
            return None
        starts, windows = [np.zeros(1, np.int64)], []
        for first, part in zip(self.starts[:-1].tolist(), self.parts, strict=True):
            shards = part.shards
            starts.append(first + (np.arange(1, len(part) + 1) if shards is None else shards.starts[1:]))
            if shards is not None:
                # No part has more of its shards open at a time than when it is read alone.
                windows.append(shards.window * len(self) // len(part))
        return Shards(np.concatenate(starts), min(windows))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _part_of(self, index: int) -> tuple[Source, int]:
        """Returns the part that a sample lies in, and its index there."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part], index - int(self.starts[part])

    def read(self, index: int) -> bytes | np.ndarray:
        part, inside = self._part_of(index)
        return part.read(inside)

    def name(self, index: int) -> str:
        part, inside = self._part_of(index)
        return part.name(inside)


@dataclass(frozen=True)
class Parts:
    """Sources that a program in Python has made, where other data are named by paths."""

    train: Source
    val: Source | None
    phrase: str
    """Stands for them where a path would: "<Dataset Flowers of 1,000 images>"."""


Data = str | Sequence[str] | Parts
"""What data are: one or several paths, as ``data_path`` takes them, or sources that are there."""


def open_train(data_path: Data, read_as: ReadAs = AS_STORED) -> Source:
    """Finds out what ``data_path`` names and opens it, or its train part if it has parts; several paths are joined.

    Raises:
        UserError: nothing there, nothing usable in it, or a file that is not what its name says.
    """
    if isinstance(data_path, Parts):
        return data_path.train
    parts, paths = [], _paths(data_path)
    for path in paths:
        source = _open(path, "train", read_as)
        if source is None or len(source) == 0:
            raise SettingError("data_path", path, f"holds no images{_instead(source)}; give data that does")
        parts.append(source)
        read_as = alike(source, read_as)
    release_after(max(map(len, parts)))
    return parts[0] if len(parts) == 1 else Concat(tuple(parts), tuple(_used_twice(paths)))


def _used_twice(paths: Sequence[str]) -> Iterator[str]:
    """Yields a note for each path that is another one's or lies in another one."""
    real = [path if is_remote(path) else os.path.join(os.path.realpath(os.path.expanduser(path)), "") for path in paths]
    for number, path in enumerate(real):
        around = next((other for other in range(len(real)) if other != number and path.startswith(real[other])), None)
        if around is not None and (path != real[around] or number > around):
            yield f"{paths[number]} is or lies in {paths[around]}, so images may be used twice; leave one out if so"


def open_val(data_path: Data, read_as: ReadAs = AS_STORED) -> Source | None:
    """Opens the val (or test) part of the data: of several paths, the val parts of all that have one; None if none has.

    Raises:
        UserError: as ``open_train``.
    """
    if isinstance(data_path, Parts):
        return data_path.val
    opened = (_open(path, "val", read_as) for path in _paths(data_path))
    parts = [source for source in opened if source is not None and len(source)]
    release_after(max(map(len, parts), default=0))
    return Concat(tuple(parts)) if len(parts) > 1 else parts[0] if parts else None


def train_and_val(data_path: Data, read_as: ReadAs = AS_STORED) -> tuple[Source, Source]:
    """Opens both parts of a data set. Without a val part, a fixed fifth of the train part is held out.

    Raises:
        UserError: as ``open_train``.
    """
    train = open_train(data_path, read_as)
    val = open_val(data_path, alike(train, read_as))
    if val is not None:
        return train, val
    train_indices, val_indices = _held_out(train)
    return Subset(train, train_indices), Subset(train, val_indices, Stock())


def columns_of(source: Source) -> tuple[str, ...] | None:
    """Returns the names of the columns of a table; None of images."""
    if isinstance(source, TableSource):
        return source.columns
    inside = source.parts[0] if isinstance(source, Concat) else getattr(source, "source", None)
    return None if inside is None else columns_of(inside)


def alike(source: Source, read_as: ReadAs) -> ReadAs:
    """Returns how further data are read beside a source: of tables the same columns are wanted."""
    columns = columns_of(source)
    return read_as if columns is None else replace(read_as, columns=columns)


def table_values(source: Source) -> np.ndarray | None:
    """Returns the numbers of a table, float32 [N, D] with NaN where a cell is missing; None of images."""
    if isinstance(source, TableSource):
        return source.values
    if isinstance(source, Subset):
        inside = table_values(source.source)
        return None if inside is None else inside[source.indices]
    if isinstance(source, Concat):
        parts = [values for part in source.parts if (values := table_values(part)) is not None]
        return np.concatenate(parts) if len(parts) == len(source.parts) else None
    return None


def without_held_out(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """Draws ``share`` of the samples of a source by a seed, whole files of pages, and returns the others and these.

    Raises:
        SettingError: none would be left to train on.
    """
    train, held = _held_out(source, partial(held_out_of_training, share=share, seed=seed))
    if not len(train):
        problem = f"leaves none of {count_of(len(source), 'images')} to train on; lower it, or leave it out"
        raise SettingError("held_out", share, problem)
    shards = None if source.shards is None else shards_of(train, source.shards)
    return Subset(source, train, shards=shards), Subset(source, held)


def images_of_paths(source: Source) -> tuple[int, ...]:
    """Returns how many images each of the paths has that were joined to a source, or of which samples were taken."""
    if isinstance(source, Subset) and isinstance(source.source, Concat):
        return tuple(np.diff(np.searchsorted(source.indices, source.source.starts)).tolist())
    return tuple(map(len, source.parts)) if isinstance(source, Concat) else (len(source),)


def _held_out(
    source: Source, draw: Callable[[int], tuple[np.ndarray, np.ndarray]] = holdout
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the samples to train on, and those that are held out; pages of one file are held out together."""
    parts = source.parts if isinstance(source, Concat) else (source,)
    if not any(isinstance(part, PagedSource) for part in parts):
        return draw(len(source))
    files = [np.diff(part.starts) if isinstance(part, PagedSource) else np.ones(len(part), np.int64) for part in parts]
    pages = np.concatenate(files)
    if len(pages) == 1:  # one file, whose pages are all there is
        return draw(len(source))
    is_held = np.zeros(len(pages), bool)
    is_held[draw(len(pages))[1]] = True
    held = np.repeat(is_held, pages)
    return np.flatnonzero(~held), np.flatnonzero(held)


def scored_parts(data_path: Data, read_as: ReadAs = AS_STORED) -> tuple[Source, Source]:
    """Opens both parts for what measures accuracy: the val part without classes that the train part has not.

    Raises:
        UserError: as ``open_train``; or there are no labels, one class alone, or none that both parts have.
    """
    train, val = train_and_val(data_path, read_as)
    for name, part in (("train", train), ("val", val)):
        if part.labels is None:
            raise SettingError("data_path", shown(data_path), f"the {name} part {without_labels(part)}")
    if len(np.unique(np.asarray(train.labels))) < 2:
        raise SettingError("data_path", shown(data_path), "the train part is all of one class; give at least two")
    return train, with_known_classes(train, val)


def without_labels(source: Source) -> str:
    """Returns that a source has no labels, with the reason where it is known, and what to do."""
    reasons = [note for note in source.stock.notes if "no image has" in note]
    return "; ".join(["has no labels", *(reasons or ["give class folders, or arrays with labels"])])


def unknown_classes(train: Source, val: Source) -> list[str]:
    """Returns what to know of classes of the val part that the train part, if it has several, has not."""
    if train.labels is None or val.labels is None or len(np.unique(train.labels)) < 2:
        return []
    try:
        known = with_known_classes(train, val)
    except SettingError as error:
        return [error.problem]
    return [] if known is val else [str(known.stock.left_out[-1])]


def with_known_classes(train: Source, val: Source) -> Source:
    """Returns the images of ``val`` whose classes are among those of ``train``, which are compared by their names.

    Where images are left out for this, the stock says so.

    Raises:
        UserError: there are none, or the classes of one part have names and those of the other numbers.
    """
    if (class_names(train) is None) != (class_names(val) is None):
        problem = "the labels of the train part and of the val part are names in one and numbers in the other"
        raise SettingError("data_path", problem=f"{problem}; give both the same kind of labels")
    if train.labels is None or val.labels is None:
        return val
    train_classes = {*_names_of(train, np.unique(train.labels))}
    numbers = np.unique(val.labels)
    classes = _names_of(val, numbers)
    unknown = [name for name in classes if name not in train_classes]
    if not unknown:
        return val
    if len(unknown) == len(classes):
        names = f"({_some(classes)}) is one of the train part ({_some(sorted(train_classes))})"
        raise SettingError("data_path", problem=f"no class of the val part {names}; give the same ones the same names")
    known = np.isin(val.labels, [numbers[row] for row, name in enumerate(classes) if name in train_classes])
    which = f"{count_of(len(unknown), 'classes')} that the train part has not ({_some(unknown)})"
    left_out = LeftOut("images", int((~known).sum()), f"of {which}, so their accuracy cannot be measured")
    return Subset(val, np.flatnonzero(known), joined((val.stock, Stock(left_out=(left_out,)))))


def _names_of(source: Source, numbers: np.ndarray) -> list[str]:
    names = class_names(source)
    return [str(number) if names is None else names[number] for number in numbers.tolist()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:EXAMPLES]) + (", …" if len(names) > EXAMPLES else "")


def class_names(source: Source) -> tuple[str, ...] | None:
    """Returns the names of the classes that the labels of a source number, if they have names."""
    return source.classes or None


def classes_of(source: Source, indices: np.ndarray) -> np.ndarray | None:
    """Returns the classes of some samples as strings: names, or else numbers. None without labels."""
    if source.labels is None:
        return None
    labels, names = source.labels[indices], class_names(source)
    return labels.astype(str) if names is None else np.array(names)[labels]


def shown(data_path: Data) -> str:
    """Returns the paths as they were given, for people."""
    if isinstance(data_path, Parts):
        return data_path.phrase
    return data_path if isinstance(data_path, str) else " ".join(data_path)


def is_phrase(data_path: str) -> bool:
    """Tells whether a path is the phrase that stands for data that were given in Python."""
    return data_path.startswith("<") and data_path.endswith(">")


def describe(source: Source, stock: Stock | None = None, read_as: ReadAs = AS_STORED) -> DataFacts:
    """Returns the facts that the defaults of training depend on. Image files differ in size and are taken as colour.

    Args:
        source: the data set.
        stock: what is told of it, as ``survey.take_stock`` returns it; by default what the source itself knows.
        read_as: what the user asks for.
    """
    types, bands, stated = _stored(source, read_as)
    dtype = narrowest(types) if read_as.pixel_type == "auto" else read_as.pixel_type
    size, channels = None, channels_of_files(bands, read_as)
    if source.kind != "folder":
        parts = source.parts if isinstance(source, Concat) else (source,)
        shapes = set().union(*(getattr(part, "shapes", None) or {np.shape(part.read(0))} for part in parts))
        sizes, depths = {shape[:2] for shape in shapes}, {shape[2] for shape in shapes}
        size = sizes.pop() if len(sizes) == 1 else None
        channels = depths.pop() if len(depths) == 1 else 3
    if read_as.bands:
        channels = len(read_as.bands)
    labelled = source.labels is not None and len(np.unique(source.labels)) > 1
    return DataFacts(
        kind=source.kind,
        channels=channels,
        size=size,
        labelled=labelled,
        length=len(source),
        order=describe_order(len(source), source.shards),
        location=source.location,
        pixels=PixelFacts(dtype=dtype, nodata=read_as.nodata if dtype == "uint8" else agreed_nodata(stated, read_as)),
        stock=tuple((stock or source.stock).lines(RUN_LINES)),
        columns=columns_of(source),
    )


def channels_of_files(bands: Collection[int], read_as: ReadAs) -> int:
    """Returns the channels that a model has by default for image files with these numbers of bands."""
    if read_as.bands:
        return len(read_as.bands)
    # Of files of many bands, and of pages as channels, no colour is made.
    are_channels = len(bands) == 1 and (max(bands) > FEW or read_as.pages == "channels")
    return max(bands) if are_channels else 3


def agreed_nodata(stated: Collection[float | None], read_as: ReadAs) -> float | None:
    """Returns the value of missing pixels that a user gives, or else that all images state."""
    return read_as.nodata if read_as.nodata is not None or len(stated) != 1 else next(iter(stated))


def _stored(source: Source, read_as: ReadAs) -> tuple[Counter[str], set[int], set[float | None]]:
    """Returns what a sample of images are, of files by headers: types, by their names in NumPy, numbers of bands, and
    the values of missing pixels that files state.

    An array says it of all of its images. The first image of each part of joined data is among them. What cannot be
    read is passed over: whatever reads it later says why.
    """
    if isinstance(source, ArraySource):
        return Counter({source.images.dtype.name: len(source)}), {source.images.shape[3]}, set()
    indices = {*evenly_spaced(source, LOOKED_AT, IN_A_ROW).tolist()}
    if isinstance(source, Concat):
        indices |= {*source.starts[:-1].tolist()}
    types: Counter[str] = Counter()
    bands, nodata = set(), set[float | None]()
    for index in sorted(indices):
        with contextlib.suppress(Exception):
            data = source.read(index)
            if isinstance(data, np.ndarray):
                types[data.dtype.name] += 1
                bands.add(data.shape[2])
            elif (header := as_read(read_header(data), read_as)).bands:
                types[header.dtype] += 1
                bands.add(header.bands)
                nodata.add(header.nodata)
    return types, bands, nodata


def evenly_spaced(source: Source, count: int, run: int) -> np.ndarray:
    """Returns the indices of about ``count`` samples that stand for all: int64, sorted, each once.

    They are evenly spaced. Of a source with shards they are evenly spaced runs of ``run`` samples each, so that few
    shards are read.
    """
    length = len(source)
    if source.shards is None or length <= count:
        return np.unique(np.linspace(0, length - 1, min(length, count)).astype(np.int64))
    starts = np.linspace(0, length - run, count // run).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(run))


def _instead(source: Source | None) -> str:
    """Returns what there is where there are no images, as a phrase that goes on from "holds no images"."""
    if source is None:
        return ""
    where = "" if isinstance(source, FolderSource) else f" {source.location}"
    return "; ".join([where, *source.stock.lines(4)])


# --- opening one path -------------------------------------------------------------------------------------------------


def _paths(data_path: str | Sequence[str]) -> list[str]:
    paths = [data_path] if isinstance(data_path, str) else list(data_path)
    if not paths:
        raise SettingError("data_path", problem="must name at least one file or folder, or `digits`")
    return paths


def _open(data_path: str, split: Split, read_as: ReadAs) -> Source | None:
    if read_as.columns is not None and not is_remote(data_path) and is_table(data_path):
        return _open_table(data_path, split, read_as)
    if read_as.columns:
        problem = f"no table ({', '.join(TABLE_SUFFIXES)}), and the columns {_some(read_as.columns)} are wanted"
        raise SettingError("data_path", data_path, f"{problem}; give a table that has them")
    if data_path == "digits":
        return _digits(split)
    if data_path == "shapes" and not Path(data_path).exists():
        return _shapes(split)
    if is_remote(data_path):
        return _open_remote(data_path, split, read_as)
    place, keys = _without_keys(data_path)
    path = Path(place).expanduser()
    try:
        if "{" in data_path and not path.exists():
            return _open_pattern(data_path, read_as) if split == "train" else None
        if is_phrase(data_path) and not path.exists():
            raise SettingError("data_path", data_path, "was given in Python; call fastmae from Python with the data")
        if not path.exists():
            names = "`digits` or `shapes`" if read_as.columns is None else ", ".join(("digits", *BUILT_IN_TABLES))
            raise SettingError("data_path", data_path, f"no such file or folder; give an existing one, or {names}")
        if not path.is_dir() and not path.is_file():
            raise SettingError("data_path", data_path, "a pipe or a device; give a file or a folder")
        if is_stack(path):
            return open_stack(path, keys, split, read_as)
        if keys is not None:
            raise SettingError("data_path", data_path, "only HDF5 files and Zarr stores have keys; give the path alone")
        found = open_folder(path, split, read_as) if path.is_dir() else _open_file(path, split, read_as)
        return _as_asked(found, read_as)
    except UNREADABLE as error:
        reason = in_one_line(" ".join(str(error).split()), 400)
        raise SettingError("data_path", data_path, f"cannot be read ({reason}); check or replace the file") from error


def _open_table(data_path: str, split: Split, read_as: ReadAs) -> Source | None:
    try:
        parts = open_table(data_path, split, read_as)
    except UNREADABLE as error:
        reason = in_one_line(" ".join(str(error).split()), 400)
        raise SettingError("data_path", data_path, f"cannot be read ({reason}); check or replace the file") from error
    return Concat(tuple(parts)) if len(parts) > 1 else parts[0] if parts else None


def _as_asked(found: Source | None, read_as: ReadAs) -> Source | None:
    """Returns files as sounds, or page by page, where that is asked for.

    Raises:
        SettingError: pages of files behind addresses.
    """
    if read_as.spectrogram and isinstance(found, FolderSource):
        notes = Stock(notes=sound.conversions(found, read_as.spectrogram))
        told = replace(found, taken=joined([found.stock, notes]))
        return ArrayFiles(told, read_as, sound.pixels, "sound")
    if found is None or found.kind != "folder" or read_as.pages != "all":
        return found
    if any(map(is_remote, getattr(found, "paths", getattr(found, "files", ())))):
        raise SettingError("pages", "all", "files behind addresses are not read page by page; copy them to a disk")
    return by_page(found, read_as)


def _without_keys(data_path: str) -> tuple[str, str | None]:
    """Returns a path and the keys behind `::`, if it has any."""
    place, separator, keys = data_path.rpartition("::")
    return (place, keys) if separator and not os.path.exists(data_path) else (data_path, None)


def _shapes(split: Split) -> Source:
    """Returns the built-in images of shapes, which have no labels: their classes are those of pixels."""
    images, rows = shapes.built_in().images, slice(shapes.TRAIN) if split == "train" else slice(shapes.TRAIN, None)
    return ArraySource(images[rows], None, f"shapes/{split}")


def _digits(split: Split) -> Source:
    """Returns scikit-learn's 1797 digits of 8×8 pixels, of which a fixed fifth is the val part."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    indices = holdout(len(images))[split == "val"]
    return ArraySource(images[indices], data.target[indices].astype(np.int64), f"digits/{split}", kind="digits")


def _open_file(path: Path, split: Split, read_as: ReadAs) -> Source | None:
    if suffix_of(path.name) == ".zip":
        return open_zip(path, split)
    if suffix_of(path.name) in LIST_SUFFIXES:
        return open_list(path, split, read_as.root)
    if split == "val":  # only an array file can hold two parts
        return open_array(path, split, read_as.layout)
    refuse_compressed(path)
    if path.name.lower().endswith(SHARD_SUFFIXES):
        return open_files([path], read_as)
    array = open_array(path, split, read_as.layout)
    if array is not None:
        return array
    suffix = suffix_of(path.name)
    is_sound = bool(read_as.spectrogram) and suffix in SOUND_SUFFIXES
    if suffix in IMAGE_SUFFIXES or is_sound or (not suffix and begins_as_an_image(str(path))):
        return FolderSource((str(path),), None, ())
    remedy = remedy_for(suffix)
    if remedy is not None:
        raise SettingError("data_path", str(path), f"a {suffix} file, {remedy}")
    raise ValueError("not an image, .npy, .npz, .h5, .tar, .parquet, IDX or CIFAR .bin file, nor a list of paths")


def _open_remote(pattern: str, split: Split, read_as: ReadAs) -> Source | None:
    """Opens tars, Parquet files or a list behind an address, or those that a brace pattern names.

    A list alone may have a val part.
    """
    urls = [*expand_braces(pattern)]
    kinds = {suffix_of(file_name(url)) for url in urls}
    for url in urls:
        refuse_compressed(url)
    try:
        if len(urls) == 1 and kinds <= {*LIST_SUFFIXES}:
            return _as_asked(open_list(pattern, split, read_as.root), read_as)
        if kinds == {".tar"}:
            return _as_asked(open_shards(urls, read_as.image_key), read_as) if split == "train" else None
        if kinds == {".parquet"}:
            return _as_asked(open_parquet(urls, read_as.root), read_as) if split == "train" else None
        problem = "no tars or Parquet files alone, and no list of paths; nothing else is read from an address"
        raise SettingError("data_path", pattern, problem)
    except (OSError, ValueError) as error:
        reason = in_one_line(" ".join(str(error).split()), 400)
        raise SettingError("data_path", pattern, f"cannot be read ({reason}); check the address") from error


def _open_pattern(pattern: str, read_as: ReadAs) -> Source | None:
    """Opens the shards that a brace pattern such as `part-{000..146}.tar` names; every one of them must exist."""
    paths = [Path(name).expanduser() for name in expand_braces(pattern)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        count = f"{len(missing)} of its {len(paths)} files are missing"
        raise SettingError("data_path", pattern, f"{count}, the first of them {missing[0]}; check the pattern")
    for path in paths:
        refuse_compressed(path)
        if not path.name.lower().endswith(SHARD_SUFFIXES):
            raise SettingError("data_path", pattern, f"a pattern is for .tar or .parquet files, not {path.name}")
    return open_files(paths, read_as)
