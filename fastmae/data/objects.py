"""Images that a program in Python has: a Dataset, a list, an array, a Hugging Face data set, or a source of its own.

``as_source`` makes a source of them, with the rules of files: every image has a number, is the same whenever it is
read, and is quarantined when reading it raises. Nothing here knows of order, crops or models.

A few evenly spaced samples are looked at first. They tell where the image and the label are in a sample, how tensors
are laid out, whether floats are 8 bits in disguise, and whether the same number gives the same image twice.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFile
from torch.utils import data as torch_data

from fastmae.data.arrays import FEW, array_source, as_native, refuse_no_numbers
from fastmae.data.columns import IMAGE_COLUMNS, LABEL_COLUMNS, numbered
from fastmae.data.images import FolderSource
from fastmae.data.plan import Shards
from fastmae.data.sources import Parts, Source, alike
from fastmae.data.stock import Stock, count_of
from fastmae.data.suffixes import IMAGE_SUFFIXES, suffix_of
from fastmae.data.tables import TableSource, raw_table, table_source
from fastmae.errors import SettingError, UserError, in_one_line
from fastmae.facts import LayoutName, ReadAs
from fastmae.messages import logger

LOOKED_AT = 64
"""How many samples are looked at before a run."""
THREADS = 8
"""How many threads read the labels of samples that may be read at the same time."""
IMAGE_NAMES = (*IMAGE_COLUMNS, "pixel_values")
LABEL_NAMES = (*LABEL_COLUMNS, "targets", "y")
PARTS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}
ULPS = 4
"""How many units in the last place k/255 may be off, as it is computed in several ways."""
SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")
"""Formats of which Pillow's mode I holds 16 bits."""


@dataclass(frozen=True)
class Form:
    """How the arrays and tensors of a data set are read as images [H, W, C]."""

    planes: bool = False
    """Whether they are [C, H, W]."""
    levels: bool = False
    """Whether floats are k/255, of which k is the pixel."""

    def pixels(self, item: Any) -> bytes | np.ndarray:
        """Returns an image as a source does: the bytes of a file, or numbers [H, W, C].

        Raises:
            ValueError, OSError: it is none, or not like the others.
        """
        plain = plain_image(item)
        if isinstance(plain, bytes):
            return plain
        if plain.ndim == 2:
            plain = plain[..., None]
        elif self.planes and not isinstance(item, Image.Image):
            plain = plain.transpose(1, 2, 0)
        if plain.dtype.kind == "f" and self.levels:
            levels = whole_levels(plain)
            if levels is None:
                raise ValueError("its floats are no k/255, as those of the other images are")
            return levels
        return plain


@dataclass(frozen=True)
class Objects:
    """The images of an object in Python."""

    get: Callable[[int], Any]
    """Returns the image with a number: a path, bytes, an image of Pillow, an array or a tensor."""
    length: int
    what: str
    """What the object is, for people: "Dataset Flowers"."""
    form: Form
    kind: Literal["folder", "array"]
    shapes: frozenset[tuple[int, ...]]
    """Those [H, W, C] of the arrays that were looked at."""
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    has_floats: bool = False
    """Whether some of those that were looked at are floats."""
    lock: contextlib.AbstractContextManager[Any] = field(default_factory=contextlib.nullcontext)
    """Is held while an image is got, where threads may not do so at the same time."""
    shards: Shards | None = None
    called: Callable[[int], str] | None = None
    """Names an image, where the object has names for them."""

    @property
    def location(self) -> str:
        return "given in Python"

    @property
    def stock(self) -> Stock:
        return Stock({"images": self.length}, notes=self.notes)

    def __len__(self) -> int:
        return self.length

    def read(self, index: int) -> bytes | np.ndarray:
        """Returns the bytes of an image file, or pixels [H, W, C].

        Raises:
            OSError: the object raised an error, or gave no image.
        """
        try:
            with self.lock:
                item = self.get(index)
            return self.form.pixels(item)
        except (MemoryError, UserError):
            raise
        except Exception as error:  # somebody else's object may raise anything
            raise OSError(_in_a_line(error)) from error

    def name(self, index: int) -> str:
        return f"{self.what}[{index}]" if self.called is None else self.called(index)


# --- what is given ----------------------------------------------------------------------------------------------------


def given_parts(
    data: Any,
    val: Any = None,
    *,
    layout: LayoutName = "auto",
    needs_labels: bool = False,
    table: ReadAs | None = None,
) -> Parts | None:
    """Returns both parts of data that are given as objects; None where ``data`` are paths, as ``data_path`` takes them.

    Args:
        data: as for ``as_source``, or a dict of such by the names of parts, as a ``DatasetDict`` is.
        val: the images to test on, as for ``as_source``.
        layout: the order of the axes of an array or a tensor.
        needs_labels: whether every sample is read once where nothing else tells the labels.
        table: how a table is read, for models of vectors: then a DataFrame, a table of pyarrow and an array [N, D] are
            tables.

    Raises:
        UserError: as ``as_source``; or ``val`` is given beside paths.
    """
    if isinstance(data, Mapping):
        found = {part: next((data[name] for name in names if name in data), None) for part, names in PARTS.items()}
        if found["train"] is None:
            raise SettingError("data", problem=f"is a dict of {', '.join(map(str, data))}; call one of its parts train")
        val = found["val"] if val is None else val
        unused = [str(name) for name, part in data.items() if part is not found["train"] and part is not val]
        if unused:
            logger.warning("data: its parts %s are not used; name them train and test to use them", ", ".join(unused))
        data = found["train"]
    if is_paths(data):
        if val is not None:
            raise SettingError("val", problem="is for objects in Python; the val part of paths is their own folder val")
        return None
    train = _as_table(data, table) or as_source(data, layout=layout, needs_labels=needs_labels)
    try:
        test = None
        if val is not None:
            alike_table = None if table is None else alike(train, table)
            test = _as_table(val, alike_table) or as_source(val, layout=layout, needs_labels=needs_labels)
    except SettingError as error:
        raise SettingError("val" if error.name == "data" else error.name, error.value, error.problem) from error
    _require_same_scale(train, test)
    what = train.what if isinstance(train, Objects) else _type_of(data)
    unit = "rows" if isinstance(train, TableSource) else "images"
    return Parts(train, test, f"<{what} of {count_of(len(train), unit)}>")


def _as_table(data: Any, table: ReadAs | None) -> TableSource | None:
    """Returns a table in Python as a source; None for what is none, or where none is meant."""
    found = None if table is None else raw_table(data)
    if found is None or table is None:
        return None
    return table_source(found[0], table, found[1])


def _require_same_scale(train: Source, test: Source | None) -> None:
    """Refuses parts of which the floats of one are k/255, and become k, and those of the other stay as they are."""
    parts = [part for part in (train, test) if isinstance(part, Objects) and part.has_floats]
    if len({part.form.levels for part in parts}) > 1:
        problem = "floats of one part are k/255, as ToTensor makes them, and those of the other are not"
        raise SettingError("val", problem=f"{problem}; make both in the same way, or give both in 8 bits")


def is_paths(data: Any) -> bool:
    """Tells whether data are what ``data_path`` takes: a path, or several of which one is more than an image file."""
    if isinstance(data, str | os.PathLike):
        return True
    are_paths = isinstance(data, list | tuple) and all(isinstance(one, str | os.PathLike) for one in data)
    return are_paths and not (len(data) > 1 and _are_image_files(data))


def as_source(
    data: Any,
    *,
    labels: Sequence[int] | Sequence[str] | np.ndarray | None = None,
    classes: Sequence[str] = (),
    threads: bool | None = None,
    layout: LayoutName = "auto",
    needs_labels: bool = False,
) -> Source:
    """Makes a source of images in Python. ``fastmae.pretrain`` takes the same; here more can be said of it.

    Args:
        data: a map-style Dataset, a list, a Hugging Face ``Dataset``, or an object with ``__len__`` and ``read``, as
            ``Source`` describes it, whose ``labels``, ``classes``, ``name`` and ``shards`` are used if there are some.
            Its samples are images: paths, the bytes of files, images of Pillow, arrays or tensors [H, W], [H, W, C] or
            [C, H, W]; or (image, label); or dicts with an image and maybe a label. Or an array or a tensor of images
            [N, …], alone or with labels, as (images, labels).
        labels: of all images, integers or words. Default: those of the data.
        classes: the names of the classes that integers number. Default: those of the data, if it has some.
        threads: whether several threads may read samples at the same time. Default: they may where that is known to be
            safe: of lists, arrays, tensors, data sets of Hugging Face and of torchvision, and sources.
        layout: the order of the axes of arrays and tensors; ``auto`` tells it by the shape.
        needs_labels: whether every sample is read once where nothing else tells the labels.

    Raises:
        UserError: it has no length or no images, gives other images when they are read again, or axes in an order that
            is guessed too easily.
    """
    if isinstance(data, str | os.PathLike):
        raise SettingError("data", problem=f"{data} is a path, and this is for objects; paths are given to data alone")
    if type(data).__module__.startswith("fastmae.") and hasattr(data, "read"):
        if labels is not None or classes or threads is not None:
            text = f"{_type_of(data)} is a source already; say its labels, classes and threads when it is made"
            raise SettingError("data", problem=text)
        return data
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(one, np.ndarray | torch.Tensor) for one in data):
        data, labels = data[0], data[1] if labels is None else labels
    if isinstance(data, np.ndarray | torch.Tensor):
        return _of_array(data, labels, classes, layout)
    if type(data).__name__ == "DataFrame":
        raise SettingError("data", problem='is a table, which holds no images; give model="mae_mlp" with it')
    length = _length(data)
    if labels is None and _are_image_files(data):
        return FolderSource(tuple(os.fspath(path) for path in data), None, (), listed="listed in Python")
    samples = _samples(data, length)
    seen = _looked_at(samples)
    form, notes = _form([look for look in seen.values() if isinstance(look, _Look)], layout)
    objects = Objects(
        get=samples.image,
        length=length,
        what=samples.what,
        form=form,
        kind="folder" if any(look.is_file for look in seen.values() if isinstance(look, _Look)) else "array",
        shapes=frozenset(_shapes(form, seen)),
        has_floats=any(_is_float(look.plain) for look in seen.values() if isinstance(look, _Look)),
        lock=contextlib.nullcontext() if (samples.are_safe if threads is None else threads) else threading.Lock(),
        shards=samples.shards,
        called=samples.called,
    )
    numbers, names, problem = _labels(samples, seen, objects, labels, classes, needs_labels)
    if not samples.are_safe and threads is None:
        notes.append(
            f"samples are read one at a time, as a {samples.what} may share an open file or a buffer among threads; if "
            "it does not, fastmae.as_source(data, threads=True) has several read at the same time"
        )
    return replace(objects, labels=numbers, classes=names, notes=(*notes, *problem))


def _length(data: Any) -> int:
    """Returns how many samples there are.

    Raises:
        SettingError: it can be read in order alone, is no data set, or is empty.
    """
    is_loader = isinstance(data, torch_data.DataLoader)
    if is_loader:
        raise SettingError("data", problem="is a DataLoader; give its dataset, as batches are made here")
    is_stream = isinstance(data, torch_data.IterableDataset | Iterator) or type(data).__name__ == "IterableDataset"
    has_items = hasattr(data, "__getitem__") or callable(getattr(data, "read", None))
    if is_stream or not has_items or isinstance(data, bytes | int | float | Mapping | Image.Image):
        problem = f"is of type {_type_of(data)}, which is no data set; give a path, a Dataset, a list or an array"
        if is_stream:
            problem = (
                f"{_type_of(data)} gives images in its own order alone, and training draws any of them at any time; "
                "save them to files or shards (fastmae pack packs a folder), or give list(data) if they fit into memory"
            )
        raise SettingError("data", problem=problem)
    try:
        length = len(data)
    except TypeError as error:
        raise SettingError("data", problem=f"{_type_of(data)} has no length; give it __len__") from error
    if length == 0:
        raise SettingError("data", problem=f"{_type_of(data)} holds no images; give data that does")
    return length


def _are_image_files(data: Any) -> bool:
    is_list = isinstance(data, list | tuple) and len(data) > 0
    return is_list and all(isinstance(one, str | os.PathLike) and suffix_of(str(one)) in IMAGE_SUFFIXES for one in data)


def _of_array(data: Any, labels: Any, classes: Sequence[str], layout: LayoutName) -> Source:
    """Returns an array [N, …] as a source, as a file of it would be; floats of a tensor that are k/255 become k."""
    array, notes = plain_array(data), tuple[str, ...]()
    levels = whole_levels(array) if isinstance(data, torch.Tensor) and array.dtype.kind == "f" else None
    if levels is not None:
        array, notes = levels, (LEVELS,)
    if isinstance(data, torch.Tensor) and layout == "auto" and array.ndim == 4:
        layout = "chw" if _reads_as_planes(array.shape[1:], is_tensor=True) else "hwc"
    numbers, names, problem = (None, (), ()) if labels is None else _numbered(_as_list(labels), classes)
    try:
        source = array_source(array, numbers, "the array", layout)
    except SettingError:
        raise
    except UserError as error:
        raise SettingError("data", problem=str(error)) from error
    others = replace(source.others, notes=(*source.others.notes, *notes, *problem))
    return replace(source, others=others, classes=names)


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Samples:
    """A data set, and where in a sample the image and its label are."""

    get: Callable[[int], Any]
    length: int
    what: str
    image_key: str | int | None = None
    """None: the sample is the image."""
    label_key: str | int | None = None
    labels: Any = None
    """Of all samples, where the data set has them without reading any."""
    classes: tuple[str, ...] = ()
    are_safe: bool = False
    """Whether several threads may read at the same time, as far as that is known."""
    are_kept: bool = False
    """Whether they lie in a list, so that they are the same whenever they are read."""
    shards: Shards | None = None
    called: Callable[[int], str] | None = None
    """Of a source of somebody's own, what it says beside its images."""

    def image(self, index: int) -> Any:
        sample = self.get(index)
        return sample if self.image_key is None else sample[self.image_key]

    def label(self, sample: Any) -> Any:
        """Returns the label in a sample; None if there is none."""
        if isinstance(sample, Mapping):
            return sample.get(self.label_key)
        has_one = isinstance(sample, tuple | list) and isinstance(self.label_key, int) and len(sample) > self.label_key
        return sample[self.label_key] if has_one else None


def _samples(data: Any, length: int) -> _Samples:
    if type(data).__module__.split(".")[0] == "datasets" and hasattr(data, "features"):
        return _of_hugging_face(data, length)
    if not hasattr(data, "__getitem__"):  # a source, as Datasets may have anything beside their samples
        classes = tuple(getattr(data, "classes", ()))
        labels, shards, called = (getattr(data, name, None) for name in ("labels", "shards", "name"))
        samples = _Samples(data.read, length, _type_of(data), labels=labels, classes=classes, are_safe=True)
        return replace(
            samples,
            shards=shards if isinstance(shards, Shards) else None,
            called=called if callable(called) else None,
        )
    is_list = isinstance(data, list | tuple)
    samples = _Samples(data.__getitem__, length, "list" if is_list else f"Dataset {_type_of(data)}")
    first = _first(samples)
    image_key, label_key = _keys(first)
    samples = replace(samples, image_key=image_key, label_key=label_key, are_kept=is_list)
    if is_list:
        labels = [samples.label(sample) for sample in data] if label_key is not None else None
        return replace(samples, labels=labels, are_safe=True)
    labels, classes = _said(data)
    return replace(samples, labels=labels, classes=classes, are_safe=_is_safe(data))


def _is_safe(data: Any) -> bool:
    """Tells whether several threads may read a Dataset at the same time: it holds arrays, or opens a file each time."""
    if isinstance(data, torch_data.Subset):
        return _is_safe(data.dataset)
    if isinstance(data, torch_data.ConcatDataset):
        return all(map(_is_safe, data.datasets))
    return isinstance(data, torch_data.TensorDataset | list | tuple) or type(data).__module__.startswith("torchvision.")


def _first(samples: _Samples) -> Any:
    """Returns the first sample that can be read of those that are looked at."""
    problems = []
    for index in _evenly(samples.length):
        try:
            return samples.get(index)
        except Exception as error:
            problems.append(f"{samples.what}[{index}] ({_in_a_line(error)})")
    which = f"none of {len(problems)} samples that were looked at can be read, the first is {problems[0]}"
    raise SettingError("data", problem=f"{which}; mend the data")


def _keys(sample: Any) -> tuple[str | int | None, str | int | None]:
    """Returns where in a sample the image and its label are.

    Raises:
        SettingError: a dict without an image of a usual name.
    """
    if isinstance(sample, Mapping) and not {*sample} <= {"bytes", "path"}:
        usable = [name for name, value in sample.items() if _is_image(value)]
        named = [name for name in IMAGE_NAMES if name in sample] or usable
        if not named or (named is usable and len(usable) > 1):
            names = ", ".join(map(str, sample))
            raise SettingError("data", problem=f"a sample is a dict of {names}; call the image `image`")
        return named[0], next((name for name in LABEL_NAMES if name in sample), None)
    if isinstance(sample, tuple | list):
        return 0, 1 if len(sample) > 1 else None
    return None, None


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image | bytes | os.PathLike) or (
        isinstance(value, np.ndarray | torch.Tensor) and value.ndim >= 2
    )


def _said(data: Any) -> tuple[Any, tuple[str, ...]]:
    """Returns the labels and the names of classes that a Dataset says without reading samples; None and none if not.

    torchvision's data sets have ``targets`` or ``labels``, and ``classes``.
    """
    if isinstance(data, torch_data.Subset):
        labels, classes = _said(data.dataset)
        return None if labels is None else [labels[int(index)] for index in data.indices], classes
    if isinstance(data, torch_data.ConcatDataset):
        parts = [_said(part) for part in data.datasets]
        if any(labels is None for labels, _ in parts) or len({classes for _, classes in parts}) > 1:
            return None, ()
        return [label for labels, _ in parts for label in labels], parts[0][1]
    if isinstance(data, torch_data.TensorDataset):
        has_labels = len(data.tensors) > 1 and data.tensors[1].ndim == 1
        return (_as_list(data.tensors[1]) if has_labels else None), ()
    for name in ("targets", "labels"):
        labels = getattr(data, name, None)
        if isinstance(labels, Sequence | np.ndarray | torch.Tensor) and len(labels) == len(data):
            classes = getattr(data, "classes", ())
            are_names = isinstance(classes, list | tuple) and all(isinstance(one, str) for one in classes)
            return _as_list(labels), tuple(classes) if are_names else ()
    return None, ()


def _of_hugging_face(data: Any, length: int) -> _Samples:
    """Returns a Hugging Face data set, of which images are taken as the bytes or paths that it holds, undecoded."""
    what, features = "Hugging Face Dataset", data.features
    kinds = {name: type(feature).__name__ for name, feature in features.items()}
    images = [name for name in IMAGE_NAMES if name in kinds] or [name for name in kinds if kinds[name] == "Image"]
    label = next((name for name in LABEL_NAMES if name in kinds), None)
    if not images:
        raise SettingError("data", problem=f"the {what} has columns {', '.join(kinds)}; call that of images `image`")
    name, labels, classes = images[0], None, ()
    if label is not None:
        labels = data.with_format(None).select_columns([label])[:][label]
        classes = tuple(getattr(features[label], "names", None) or ())
    if data.format["type"] == "custom":  # a function of the user's makes the samples
        return _Samples(data.__getitem__, length, what, name, label, labels, classes)
    plain = data.with_format("numpy" if kinds[name].startswith("Array") else None).select_columns([name])
    if kinds[name] == "Image":
        plain = plain.cast_column(name, type(features[name])(decode=False))
    return _Samples(plain.__getitem__, length, what, name, None, labels, classes, are_safe=True)


# --- a look at some of them -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Look:
    """A sample that was looked at."""

    plain: bytes | np.ndarray
    is_pillow: bool
    is_tensor: bool
    label: Any

    @property
    def is_file(self) -> bool:
        return self.is_pillow or isinstance(self.plain, bytes)


def _evenly(length: int) -> list[int]:
    return sorted({length * number // min(length, LOOKED_AT) for number in range(min(length, LOOKED_AT))})


def _look(samples: _Samples, index: int) -> _Look | Exception:
    try:
        sample = samples.get(index)
        item = sample if samples.image_key is None else sample[samples.image_key]
        plain = plain_image(item)
        is_tensor = isinstance(item, torch.Tensor)
        return _Look(plain, isinstance(item, Image.Image), is_tensor, samples.label(sample))
    except Exception as error:
        return error


def _looked_at(samples: _Samples) -> dict[int, _Look | Exception]:
    """Reads some samples.

    Raises:
        SettingError: none can be read, or they are other images when they are read again.
    """
    numbers = _evenly(samples.length)
    seen = {index: _look(samples, index) for index in numbers}
    failed = {index: one for index, one in seen.items() if isinstance(one, Exception)}
    if len(failed) == len(seen):
        first = f"{samples.what}[{numbers[0]}] ({_in_a_line(failed[numbers[0]])})"
        problem = f"none of {len(failed)} samples that were looked at can be read, the first is {first}; mend the data"
        raise SettingError("data", problem=problem)
    again = () if samples.are_kept else numbers
    differing = next((index for index in again if not _same(seen[index], _look(samples, index))), None)
    if differing is not None:
        problem = (
            f"{samples.what}[{differing}] is another image when it is read again, as a random transform makes it; "
            "give the data without it (transform=None), as crops and flips are made here, exactly and resumably"
        )
        raise SettingError("data", problem=problem)
    return seen


def _same(one: _Look | Exception, other: _Look | Exception) -> bool:
    if isinstance(one, Exception) or isinstance(other, Exception):
        return isinstance(one, Exception) and isinstance(other, Exception)
    if isinstance(one.plain, bytes) or isinstance(other.plain, bytes):
        return one.plain is other.plain or (type(one.plain) is type(other.plain) and one.plain == other.plain)
    are_floats = one.plain.dtype == other.plain.dtype and _is_float(one.plain)
    return one.plain.dtype == other.plain.dtype and np.array_equal(one.plain, other.plain, equal_nan=are_floats)


def _is_float(plain: bytes | np.ndarray) -> bool:
    return isinstance(plain, np.ndarray) and plain.dtype.kind == "f"


# --- what the samples mean --------------------------------------------------------------------------------------------

LEVELS = "floats that are k/255, as ToTensor makes them, are turned back into the 8 bits that they were"


def _form(seen: Sequence[_Look], layout: LayoutName) -> tuple[Form, list[str]]:
    """Tells how arrays and tensors are read as images, and what to say of it.

    Raises:
        SettingError: axes in an order that is guessed too easily, or in several.
    """
    arrays = [look for look in seen if isinstance(look.plain, np.ndarray) and not look.is_pillow]
    notes = []
    floats = [look.plain for look in arrays if isinstance(look.plain, np.ndarray) and _is_float(look.plain)]
    levels = bool(floats) and all(whole_levels(one) is not None for one in floats)
    if levels:
        notes.append(LEVELS)
    elif floats:
        low, high = min(float(np.nanmin(one)) for one in floats), max(float(np.nanmax(one)) for one in floats)
        if low < 0:
            notes.append(
                f"pixels are floats from {low:.3g} to {high:.3g}, which seem to be normalised already; they are used "
                "as they are, give the data without Normalize to train on what files would give"
            )
    return Form(_are_planes(arrays, layout), levels), notes


def _are_planes(arrays: Sequence[_Look], layout: LayoutName) -> bool:
    """Tells whether images are [C, H, W], and not [H, W, C]."""
    if layout in ("tc", "ct"):
        raise SettingError("layout", layout, "is for files of series; give an array [N, T, C] or [N, C, T]")
    shapes = {look.plain.shape: look for look in arrays if isinstance(look.plain, np.ndarray) and look.plain.ndim == 3}
    if not shapes or layout != "auto":
        return layout == "chw"
    votes = {_reads_as_planes(shape, look.is_tensor) for shape, look in shapes.items()}
    if len(votes) > 1 or None in votes:
        some = " and ".join(str(list(shape)) for shape in list(shapes)[:2])
        raise SettingError("layout", problem=f"images have shape {some}; set it to chw or to hwc, as their axes are")
    return bool(votes.pop())


def _reads_as_planes(shape: tuple[int, ...], is_tensor: bool) -> bool | None:
    """Tells whether one image is [C, H, W], with its few channels first; None where that cannot be told."""
    first, second, last = shape
    few_first, few_last = first <= FEW < min(second, last), last <= FEW < min(first, second)
    if few_first != few_last:
        return few_first
    return True if is_tensor else None  # as torch has them


def _shapes(form: Form, seen: Mapping[int, _Look | Exception]) -> Iterator[tuple[int, ...]]:
    for look in seen.values():
        if isinstance(look, _Look) and isinstance(look.plain, np.ndarray):
            shape = look.plain.shape if look.plain.ndim == 3 else (*look.plain.shape, 1)
            yield (*shape[1:], shape[0]) if form.planes and look.plain.ndim == 3 and not look.is_pillow else shape


def whole_levels(floats: np.ndarray) -> np.ndarray | None:
    """Returns the uint8 k of floats that are all k/255 up to rounding, and None of any others."""
    if floats.size == 0 or not (np.nanmin(floats) >= 0 and np.nanmax(floats) <= 1):
        return None
    scaled = floats.astype(np.float64) * 255
    levels = np.rint(scaled)
    tolerance = ULPS * 255 * np.finfo(floats.dtype).eps
    if tolerance >= 0.5 or not (np.abs(scaled - levels) <= tolerance).all():
        return None
    return levels.astype(np.uint8)


# --- labels -----------------------------------------------------------------------------------------------------------

Labelled = tuple[np.ndarray | None, tuple[str, ...], tuple[str, ...]]
"""Labels int64 [N] or None, the names of the classes that they number, and what to say of them."""


def _labels(
    samples: _Samples,
    seen: Mapping[int, _Look | Exception],
    objects: Objects,
    labels: Any,
    classes: Sequence[str],
    needs_labels: bool,
) -> Labelled:
    """Finds the labels: those that are given, those that the data set says, or those of samples that are read."""
    names = tuple(classes) or samples.classes
    given = samples.labels if labels is None else labels
    looked = {index: look.label for index, look in seen.items() if isinstance(look, _Look) and look.label is not None}
    if given is not None:
        values = _as_list(given)
        if len(values) != samples.length:
            raise SettingError("labels", problem=f"there are {len(values)} for {samples.length} images; give one each")
        if labels is not None or all(_is_label(value, values[index]) for index, value in looked.items()):
            return _numbered(values, names)
    if not looked:
        return None, (), ()
    if any(not isinstance(_plain_label(value), int | str) for value in looked.values()):
        return None, (), ("what is beside the images in the samples are no labels, neither integers nor words",)
    if not needs_labels:
        # As a pass over all images takes long, and pretraining itself uses none.
        note = "labels are in the samples alone and are not read, so no image has one; probe=True reads them"
        return None, (), (note,)
    logger.info("labels          read from %s, each once", count_of(samples.length, "samples"))
    return _numbered(_read_labels(samples, objects), names)


def _read_labels(samples: _Samples, objects: Objects) -> list[Any]:
    def label(index: int) -> Any:
        try:
            with objects.lock:
                return _plain_label(samples.label(samples.get(index)))
        except Exception as error:
            problem = f"the label of {objects.name(index)} cannot be read ({_in_a_line(error)}); mend the data"
            raise SettingError("data", problem=problem) from error

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return [*pool.map(label, range(samples.length))]


def _is_label(value: Any, said: Any) -> bool:
    """Tells whether what a sample has is the label that the data set says; rows of numbers are none."""
    value = _plain_label(value)
    return isinstance(value, int | str) and isinstance(said, int | str) and value == said


def _plain_label(value: Any) -> Any:
    """Returns a label as an int or a str where it is one."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor) and np.ndim(value) == 0:
        value = value.item()
    return int(value) if isinstance(value, bool) else value


def _as_list(labels: Any) -> list[Any]:
    return [_plain_label(value) for value in (labels.tolist() if hasattr(labels, "tolist") else labels)]


def _numbered(values: list[Any], classes: Sequence[str]) -> Labelled:
    """Returns labels as numbers: words by the sorted names of those that occur, as class folders are."""
    missing = sum(value is None for value in values)
    if missing:
        return None, (), (f"{missing:,} of {len(values):,} samples have no label, so no image has one; label all",)
    if all(isinstance(value, str) for value in values):
        return *numbered([values]), ()
    if not all(isinstance(value, int) for value in values):
        return None, (), ("labels are neither integers nor words, so no image has one; number the classes",)
    numbers = np.array(values, np.int64)
    if classes and numbers.min() >= 0 and numbers.max() < len(classes):
        return numbers, tuple(classes), ()
    if classes and numbers.min() == -1:  # as Hugging Face marks a part without labels
        missing = int((numbers < 0).sum())
        return None, (), (f"{missing:,} of {len(values):,} samples have the label -1, so no image has one; label all",)
    if classes:
        span = f"labels go from {numbers.min()} to {numbers.max()}, and {len(classes)} classes have names"
        return numbers, (), (f"{span}, so classes are shown by their numbers; number them from 0 on",)
    return numbers, (), ()


# --- one image --------------------------------------------------------------------------------------------------------


def one_image(
    item: Any, layout: LayoutName = "auto", *, keeps_floats: bool = False
) -> tuple[bytes | np.ndarray, Literal["folder", "array"]]:
    """Returns an image that stands alone, as a source reads it, and of which kind that source would be.

    Args:
        item: of a data set.
        layout: the order of its axes.
        keeps_floats: whether floats stay floats if they are k/255, as an image of zeros and ones among others is.

    Raises:
        ValueError, OSError: it is none, cannot be read, or has axes in an order that is guessed too easily.
    """
    look = _Look(plain_image(item), isinstance(item, Image.Image), isinstance(item, torch.Tensor), None)
    try:
        form, _ = _form([look], layout)
    except SettingError as error:
        raise ValueError(error.problem) from error
    return replace(form, levels=form.levels and not keeps_floats).pixels(item), "folder" if look.is_file else "array"


def plain_image(item: Any) -> bytes | np.ndarray:
    """Returns the bytes of an image file, or the numbers of an image in their own type and order of axes.

    Args:
        item: a path, bytes, an image of Pillow, an array or a tensor, or a dict with ``bytes`` or a ``path``.

    Raises:
        ValueError, OSError: it is no image, or cannot be read.
    """
    if isinstance(item, Mapping) and {*item} <= {"bytes", "path"}:
        item = item.get("bytes") if item.get("bytes") is not None else item.get("path")
    if isinstance(item, str | os.PathLike):
        return FolderSource((os.fspath(item),), None, ()).read(0)
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    if isinstance(item, Image.Image):
        return _of_pillow(item)
    if item is None:
        raise ValueError("there is no image")
    array = plain_array(item)
    refuse_no_numbers(array.dtype, "it")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"an array of shape {list(array.shape)}, an image has [H, W], [H, W, C] or [C, H, W]")
    return as_native(array)


def plain_array(item: Any) -> np.ndarray:
    """Returns an array or a tensor as an array of NumPy.

    Raises:
        ValueError: it is none.
    """
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu()
        return (item.float() if item.dtype == torch.bfloat16 else item).numpy()
    if not isinstance(item, np.ndarray) and not hasattr(item, "__array__"):
        raise ValueError(f"{_type_of(item)} is no image; give a path, bytes, an image of Pillow, an array or a tensor")
    return np.asarray(item)


def _of_pillow(image: Image.Image) -> bytes | np.ndarray:
    """Returns the pixels of an image of Pillow, as a file with them would give them.

    An image that was opened and not decoded yet is the bytes of its file: they are decoded as those of any file.
    """
    name = getattr(image, "filename", "")
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.tell() == 0 and name and os.path.isfile(name):
        return FolderSource((os.fspath(name),), None, ()).read(0)
    if image.mode == "I" and image.format in SIXTEEN_BITS:
        return np.asarray(image).astype(np.uint16)
    if image.mode.startswith("I") or image.mode == "F":
        return as_native(np.asarray(image))
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        mode = "L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB"
        image = image.convert(mode)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _type_of(data: Any) -> str:
    return type(data).__name__


def _in_a_line(error: Exception) -> str:
    return in_one_line(f"{type(error).__name__}: {' '.join(str(error).split())}")
