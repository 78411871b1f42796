"""Tables as data: vectors of numbers with a name for each, rows of which cells may be missing.

A table of N rows and D columns is a source of N float32 "images" [1, 1, D] of one pixel and a channel for each column,
NaN where a cell is missing; what standardises channels of images standardises its columns. Which columns are features
is decided when a table is first read; later files are matched by the names of these. How files are read is in
table_files.py. This module knows nothing of models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.data.arrays import Split, StoredArray, checked_labels
from fastmae.data.columns import LABEL_COLUMNS, label_values, numbered
from fastmae.data.parts import parts_among
from fastmae.data.plan import Shards, holdout
from fastmae.data.stock import EXAMPLES, LeftOut, Stock, count_of
from fastmae.data.table_files import (
    MISSING,
    SUFFIXES,
    RawTable,
    filled_array,
    filled_arrow,
    is_table_file,
    of_array,
    of_arrow,
    read_table,
    table_suffix,
)
from fastmae.errors import SettingError, UserError, in_one_line
from fastmae.facts import BUILT_IN_TABLES, ReadAs

ROW_NAMES = ("", "unnamed: 0", "__index_level_0__", "index", "id")
"""How a column is called, in lower case, that names rows if each has its own."""
MANY_CLASSES = 100
"""Integers of more different values are no classes."""
FAR = 20
"""A number this many ranges of all others away from them is said to spoil the mean."""
HUGE = 1e30
"""Marks of missing cells beyond it are usual: 1e38, the largest number of float32."""
EXACT = 1 << 24
"""float32 holds every integer up to this one."""
BLURRED = 1e-3
"""Numbers whose rounding to float32 is more than this share of their deviation are said to be blurred."""
LOOKED_AT = 10_000


@dataclass(frozen=True)
class TableSource:
    """A table in memory, as a source of images of one pixel."""

    values: np.ndarray
    """float32 [N, D], NaN where a cell is missing."""
    columns: tuple[str, ...]
    """The names of the D columns."""
    labels: np.ndarray | None
    classes: tuple[str, ...]
    origin: str
    stock: Stock
    row_names: tuple[str, ...] | None = field(default=None, repr=False)
    shards: Shards | None = None
    kind: str = "table"

    @property
    def location(self) -> str:
        return f"of {count_of(len(self.columns), 'columns')}"

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        """The shape [H, W, C] of all rows."""
        return {(1, 1, len(self.columns))}

    def __len__(self) -> int:
        return len(self.values)

    def read(self, index: int) -> np.ndarray:
        """Returns a row, float32 [1, 1, D]."""
        return self.values[index, None, None]

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Returns several rows at once, float32 [n, 1, 1, D]."""
        return self.values[indices, None, None]

    def name(self, index: int) -> str:
        return f"{self.origin}[{index if self.row_names is None else self.row_names[index]}]"


# --- opening ----------------------------------------------------------------------------------------------------------


def is_table(path: str) -> bool:
    """Tells whether a path is that of a table, of a folder of tables, or the name of a built-in one."""
    place = Path(path).expanduser()
    if place.is_dir():
        return bool(_in_folder(place))
    return is_table_file(place) if place.exists() else path in BUILT_IN_TABLES


def open_table(path: str, split: Split, read_as: ReadAs) -> list[TableSource]:
    """Opens the tables of a part of the data: one file, the files of a folder, or a built-in table; none without it.

    Args:
        path: as ``is_table`` takes it.
        split: which part. A file alone is one to train on.
        read_as: ``columns`` says which columns are wanted; () for all of numbers.

    Raises:
        UserError: what they hold cannot be meant.
        OSError, ValueError: a file cannot be read.
    """
    place = Path(path).expanduser()
    if not place.exists():
        return [_built_in(path, split, read_as)]
    if place.is_file():
        return [table_source(read_table(place), read_as, _labels_beside(place))] if split == "train" else []
    parts = _in_folder(place)
    test = "val" if "val" in parts else "test"
    sources: list[TableSource] = []
    for file in parts.get("train" if split == "train" else test, ()):
        wanted = replace(read_as, columns=sources[0].columns) if sources else read_as
        sources.append(table_source(read_table(place / file), wanted, _labels_beside(place / file)))
    others = [file for part, files in parts.items() if part not in ("train", test) for file in files]
    beside = [file.name for file in sorted(place.iterdir()) if not table_suffix(file.name) and file.name[:1] != "."]
    left_out = [
        LeftOut("files", len(names), reason, tuple(names[:EXAMPLES]))
        for names, reason in (
            (others, "tables of another part than train and val"),
            (beside, f"no tables ({', '.join(SUFFIXES)})"),
        )
        if names
    ]
    if sources and split == "train" and left_out:
        stock = sources[0].stock
        sources[0] = replace(sources[0], stock=replace(stock, left_out=(*stock.left_out, *left_out)))
    return sources


def _in_folder(folder: Path) -> dict[str, list[str]]:
    """Returns the tables of a folder by their parts; all are to train on where no name says a part.

    A folder of .npy files is one of tables only if their names are of parts, as each may be an image.
    """
    files = [file for file in sorted(folder.iterdir()) if table_suffix(file.name) and file.is_file()]
    files = [file for file in files if not _is_of_labels(file)]
    stems = {file.name[: -len(table_suffix(file.name))]: file.name for file in files}
    parts = {str(part): [stems[name] for name in names] for part, names in parts_among(stems).items()}
    if "train" not in parts:
        are_arrays = any(table_suffix(file.name) == ".npy" for file in files)
        parts = {"train": [file.name for file in files]} if files and not are_arrays else {}
    return parts if all(is_table_file(folder / name) for names in parts.values() for name in names) else {}


def _is_of_labels(file: Path) -> bool:
    return file.name.endswith("_labels.npy") and file.with_name(file.name.replace("_labels.npy", ".npy")).exists()


def _labels_beside(path: Path) -> np.ndarray | None:
    """Returns the labels in X_labels.npy beside X.npy, as for images."""
    labels = path.with_name(f"{path.stem}_labels.npy")
    return StoredArray.npy(labels).whole() if path.suffix.lower() == ".npy" and labels.exists() else None


def _built_in(name: str, split: Split, read_as: ReadAs) -> TableSource:
    """Returns a table of scikit-learn, of which a fixed fifth is the val part."""
    from sklearn import datasets

    data = datasets.load_diabetes(scaled=False) if name == "diabetes" else getattr(datasets, f"load_{name}")()
    rows = holdout(len(data.data))[split == "val"]
    names = tuple(map(str, data.feature_names))
    classes = tuple(map(str, getattr(data, "target_names", ())))
    raw = RawTable(names, len(rows), f"{name}/{split}", array=np.asarray(data.data)[rows])
    labels = data.target[rows].astype(np.int64) if classes else None
    return replace(table_source(raw, read_as, labels, is_named=True), classes=classes)


# --- which columns ----------------------------------------------------------------------------------------------------


def table_source(
    raw: RawTable, read_as: ReadAs, labels: np.ndarray | None = None, *, is_named: bool | None = None
) -> TableSource:
    """Returns a table as a source: which columns are features, which one is the label, and what is missing.

    Args:
        raw: the table.
        read_as: ``columns`` are those wanted, in this order, or () for all of numbers; ``label_column`` is the label;
            ``nodata`` is missing.
        labels: of all rows, where they are no column.
        is_named: whether columns are matched by name; by default as the table says.

    Raises:
        UserError: a column that is wanted is not there or holds no numbers, a cell is infinite, or there are no rows.
    """
    if not raw.length:
        raise UserError(f"{raw.origin}: has no rows; give a table that has some")
    is_named = raw.is_named if is_named is None else is_named
    wanted, left_out, notes = read_as.columns or (), list[LeftOut](), list[str]()
    stored = _matched(raw, wanted, is_named, notes)
    label = None if labels is not None else _label_column(raw, read_as, stored, notes)
    key = _row_names(raw, stored) if is_named else None
    if not stored:
        stored = _features(raw, label, key, left_out)
    else:
        others = [name for name in raw.names if name not in (*stored, label, key)]
        if others:
            left_out.append(LeftOut("columns", len(others), "the model does not take them", tuple(others[:EXAMPLES])))
    values = np.empty((raw.length, len(stored)), np.float32)
    emptied: list[str] = []
    for at, name in enumerate(stored):
        values[:, at] = _checked(raw, name, read_as.nodata, notes)
        if not wanted and np.isnan(values[:, at]).all():
            emptied.append(name)
    if emptied:
        left_out.append(LeftOut("columns", len(emptied), "missing in every row", tuple(emptied[:EXAMPLES])))
        values = np.ascontiguousarray(values[:, [name not in emptied for name in stored]])
        stored = [name for name in stored if name not in emptied]
    if not stored:
        names = in_one_line(", ".join(raw.names), 200)
        raise SettingError("data_path", raw.origin, f"no column of numbers among {names}; give a table that has some")
    if label is not None:
        notes.append(f"column {label!r} is the label, and no feature")
    if key is not None:
        notes.append(f"column {key!r} names the rows, and is no feature; --columns takes it as one")
    notes += _of_missing(values, stored)
    numbers, classes = (None, ()) if label is None else _labels(raw, label, left_out)
    if labels is not None:
        numbers = checked_labels(labels, raw.length, raw.origin)
    return TableSource(
        values=values,
        columns=tuple(wanted or stored),
        labels=numbers,
        classes=classes,
        origin=raw.origin,
        stock=Stock({"rows": raw.length, "columns": len(stored)}, tuple(left_out), tuple(notes)),
        row_names=None if key is None else tuple(map(str, raw.column(key).to_pylist())),
    )


def _matched(raw: RawTable, wanted: Sequence[str], is_named: bool, notes: list[str]) -> list[str]:
    """Returns the names in the table of the columns that are wanted: the same, or those at their places.

    Raises:
        SettingError: one is not there.
    """
    if not wanted:
        return []
    if not is_named and not set(wanted) <= set(raw.names):
        if len(wanted) != len(raw.names):
            problem = f"has {len(raw.names)} columns without names, and {len(wanted)} are wanted; give as many"
            raise SettingError("data_path", raw.origin, problem)
        notes.append(f"columns have no names and are taken in their order: {in_one_line(', '.join(wanted), 100)}")
        return [*raw.names]
    missing = [name for name in wanted if name not in raw.names]
    if missing:
        which = ", ".join(map(repr, missing[:EXAMPLES])) + (", …" if len(missing) > EXAMPLES else "")
        there = in_one_line(", ".join(raw.names), 200)
        problem = f"has no column {which}, of {len(missing)} of {len(wanted)} that are wanted; it has {there}"
        raise SettingError("data_path", raw.origin, problem)
    for name in wanted:
        if raw.kind(name) in ("text", "other"):
            problem = f"column {name!r} holds {_what(raw, name)}, and numbers are wanted; write numbers there"
            raise SettingError("data_path", raw.origin, problem)
    return [*wanted]


def _label_column(raw: RawTable, read_as: ReadAs, stored: Sequence[str], notes: list[str]) -> str | None:
    """Returns the column of labels: the one that is asked for, or one of a usual name that holds classes."""
    asked = read_as.label_column
    if asked is not None:
        if asked in stored:
            raise SettingError("label_column", asked, "is one of --columns as well; leave it out of one")
        if asked in raw.names:
            return asked
        if not read_as.columns:
            there = in_one_line(", ".join(raw.names), 200)
            raise SettingError("label_column", asked, f"no such column in {raw.origin}; it has {there}")
        return None
    if raw.arrow is None:
        return None
    lower = {name.lower(): name for name in reversed(raw.names) if name not in stored}
    for name in (lower[usual] for usual in LABEL_COLUMNS if usual in lower):
        kind = raw.kind(name)
        if kind in ("text", "bool"):
            return name
        if kind == "int":
            if len(np.unique(raw.numbers(name))) <= MANY_CLASSES:
                return name
            if not read_as.columns:
                notes.append(f"column {name!r} is a feature, as it has more than {MANY_CLASSES} values; --label_column")
    return None


def _row_names(raw: RawTable, stored: Sequence[str]) -> str | None:
    """Returns the column that names the rows, if one does: its name is usual for it, and each row has its own."""
    if raw.arrow is None:
        return None
    for name in raw.names:
        if name.lower() in ROW_NAMES and name not in stored and raw.kind(name) in ("int", "text"):
            column = raw.column(name)
            if column.null_count == 0 and len(column.unique()) == raw.length:
                return name
    return None


def _features(raw: RawTable, label: str | None, key: str | None, left_out: list[LeftOut]) -> list[str]:
    """Returns the columns of numbers, and counts the others with what they hold."""
    features, others = list[str](), dict[str, list[str]]()
    for name in raw.names:
        kind = raw.kind(name)
        if name in (label, key):
            continue
        if kind in ("int", "float", "bool"):
            features.append(name)
        else:
            others.setdefault("missing in every row" if kind == "null" else _what(raw, name), []).append(name)
    for reason, names in others.items():
        text = reason if reason.startswith("missing") else f"no numbers but {reason}"
        left_out.append(LeftOut("columns", len(names), text, tuple(names[:EXAMPLES])))
    return features


def _what(raw: RawTable, name: str) -> str:
    """Returns what a column holds in place of numbers; of a column of mostly numbers the first cell that is none."""
    column = raw.column(name)
    if raw.kind(name) != "text":
        return f"{column.type}"
    cells = column.cast("string").slice(0, LOOKED_AT).to_pylist()
    others = [(row, cell) for row, cell in enumerate(cells, 1) if cell is not None and not _is_number(cell)]
    if others and 2 * len(others) < len(cells):
        row, cell = others[0]
        numbers = f"{len(cells) - len(others):,} of {len(cells):,} cells"
        return f"text, though {numbers} are numbers or missing; row {row} has {in_one_line(cell, 40)!r}"
    return "text"


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell.strip() in MISSING
    return True


def _checked(raw: RawTable, name: str, nodata: float | None, notes: list[str]) -> np.ndarray:
    """Returns a column as float32 [N], once no cell is infinite; says where rounding moves integers.

    Raises:
        UserError: a cell is infinite, or too large for float32.
    """
    exact = raw.numbers(name)
    with np.errstate(over="ignore"):
        numbers = exact.astype(np.float32)
    if nodata is not None:  # as the model compares, so that numbers stored as float32 are found as well
        with np.errstate(over="ignore"):
            is_missing = numbers == np.float32(nodata)
        exact[is_missing] = numbers[is_missing] = math.nan
    infinite = np.flatnonzero(np.isinf(numbers))
    if len(infinite):
        what = "infinite" if np.isinf(exact[infinite[0]]) else f"{exact[infinite[0]]:g}, too large for float32"
        count = f" ({len(infinite):,} cells in all)" if len(infinite) > 1 else ""
        remedy = "leave the cell empty if it is missing, or write a number"
        raise UserError(f"{raw.origin}: row {infinite[0] + 1} of column {name!r} is {what}{count}; {remedy}")
    present = exact[~np.isnan(exact)]
    if not len(present):
        return numbers
    if (stray := _stray(present)) is not None:
        count = count_of(int((present == stray).sum()), "cells")
        text = f"{stray:g} ({count}) is far from all other numbers, and spoils the mean and the deviation"
        notes.append(f"column {name!r}: {text}; if it stands for missing cells, --nodata {stray:g}")
    off = np.abs(present.astype(np.float32).astype(np.float64) - present)
    if raw.kind(name) == "int" and np.abs(present).max() > EXACT and off.any():
        moved = f"{count_of(int((off > 0).sum()), 'integers')} beyond {EXACT:,} are rounded, by up to {off.max():g}"
        notes.append(f"column {name!r}: {moved}, as float32 holds no more digits; subtract a number if they matter")
    elif off.max() > BLURRED * present.std() > 0:
        text = f"float32 rounds its numbers by up to {off.max():.2g}, and their deviation is {present.std():.2g}"
        notes.append(f"column {name!r}: {text}; subtract its mean")
    return numbers


def _stray(numbers: np.ndarray) -> float | None:
    """Returns the largest or smallest number of a column if it looks like a mark of missing cells; otherwise None.

    It is further from all others than ``FAR`` times their range; or than their range, if it is beyond ``HUGE`` or
    written with nines alone.
    """
    for end in (numbers.max(), numbers.min()):
        rest = numbers[numbers != end]
        if not len(rest):
            return None
        gap, spread = np.abs(rest - end).min(), rest.max() - rest.min()
        is_usual = abs(end) > HUGE or re.fullmatch(r"-?9{3,}(\.0|\.9+)?", str(float(end))) is not None
        if gap > (spread if is_usual else FAR * spread) and (spread > 0 or is_usual):
            return float(end)
    return None


def _of_missing(values: np.ndarray, names: Sequence[str]) -> list[str]:
    missing = np.isnan(values).sum(axis=0)
    total = int(missing.sum())
    if not total:
        return []
    some = [names[at] for at in np.argsort(-missing, kind="stable")[:EXAMPLES].tolist() if missing[at]]
    more = ", …" if (missing > 0).sum() > EXAMPLES else ""
    cells = f"{total:,} of {values.size:,} cells ({100 * total / values.size:.2g} %) are missing"
    return [f"{cells}, in {count_of(int((missing > 0).sum()), 'columns')} ({', '.join(some)}{more})"]


def _labels(raw: RawTable, label: str, left_out: list[LeftOut]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Returns the labels and the names of classes, or none where some rows have none."""
    column, kind = raw.column(label), raw.kind(label)
    if kind == "text":
        column = column.cast("string")
    elif kind == "bool":
        column = column.cast("uint8")
    elif kind != "int":
        reason = f"labels must be integers or words, these are {column.type}; number the classes to use them"
        left_out.append(LeftOut("columns", 1, reason, (label,)))
        return None, ()
    values, _ = label_values(column, label, raw.arrow.schema)
    without = column.null_count or sum(isinstance(value, str) and not value.strip() for value in values)
    if without:
        reason = f"labels, as {without:,} of {raw.length:,} rows have none; give each row one to use them"
        left_out.append(LeftOut("columns", 1, reason, (label,)))
        return None, ()
    return numbered([values])


# --- objects in Python ------------------------------------------------------------------------------------------------


def raw_table(data: Any) -> tuple[RawTable, np.ndarray | None] | None:
    """Returns a table in Python, and its labels if it has some; None if ``data`` are none.

    Args:
        data: an array or a tensor [N, D]; such a one with labels, as (vectors, labels); a DataFrame or anything else
            with the interface of Arrow; or a table of pyarrow.

    Raises:
        UserError: it cannot be read as a table.
    """
    labels = None
    if isinstance(data, tuple) and len(data) == 2 and hasattr(data[0], "ndim"):
        data, labels = data[0], np.asarray(data[1])
    if hasattr(data, "__arrow_c_stream__") or type(data).__name__ == "DataFrame":
        return of_arrow(_as_arrow(data), f"the {type(data).__name__}"), labels
    if getattr(data, "ndim", None) != 2:
        return None
    array = np.asarray(data.detach().cpu() if callable(getattr(data, "detach", None)) else data)
    return of_array(array, "the array"), labels


def _as_arrow(data: Any) -> Any:
    try:
        import pyarrow as pa
    except ImportError as error:
        problem = "tables with names need pyarrow; pip install 'fastmae[parquet]', or give an array [N, D]"
        raise SettingError("data", problem=problem) from error
    make: Callable[[Any], Any] = pa.table if hasattr(data, "__arrow_c_stream__") else pa.Table.from_pandas
    try:
        table = make(data)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise SettingError("data", problem=f"is no table that Arrow takes ({in_one_line(str(error))})") from error
    return table


def like(data: Any, raw: RawTable, filled: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Any:
    """Returns a copy of a table in Python with cells filled, of its own kind; of a tensor an array.

    Args:
        data: the table that ``raw_table`` took.
        raw: what it gave.
        filled: as for ``table_files.write_filled``.
    """
    if raw.array is not None:
        return filled_array(raw, filled)
    table = filled_arrow(raw, filled)
    if hasattr(data, "assign"):  # of pandas: only columns with filled cells are new
        columns = {data.columns[raw.names.index(name)]: name for name in filled}
        new = {own: _in_pandas(data[own], table.column(raw.names.index(name))) for own, name in columns.items()}
        copy = data.copy()
        for own, column in new.items():
            copy[own] = column
        return copy
    return table if type(data).__module__.startswith("pyarrow") else type(data)(table)


def _in_pandas(before: Any, column: Any) -> Any:
    """Returns a column of pyarrow as a Series of the type and the index of the one before."""
    return type(before)(column.to_pylist(), index=before.index, dtype=before.dtype, name=before.name)
