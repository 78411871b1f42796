"""Lists of paths: a `.txt`, `.csv`, `.tsv` or `.jsonl` file that names image files, with labels and parts beside them.

Relative paths are relative to the folder or the address of the list, or to ``--root``. A row may hold an address; what
lies behind it is asked for when it is read, so that a file which is not there is an unusable image. Which of the files
on a disk are there is found by listing their folders, several at a time, and kept with the rest of a long list in the
cache folder, as long as the list and the modification times of those folders are the same. No image is read here.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.data.arrays import Split
from fastmae.data.columns import IMAGE_COLUMNS, LABEL_COLUMNS
from fastmae.data.images import WORTH_KEEPING, FolderSource
from fastmae.data.index import (
    Index,
    Names,
    cache_file,
    is_settled,
    names_of,
    pack_names,
    read_index,
    repeats,
    unpack_names,
    write_index,
)
from fastmae.data.openfile import OpenFile
from fastmae.data.parts import Part, read_part
from fastmae.data.remote import RemoteFile, file_name, folder_of, is_remote, joined, open_file
from fastmae.data.stock import EXAMPLES, LeftOut, Stock, count_of
from fastmae.data.suffixes import IMAGE_SUFFIXES, SOUND_SUFFIXES, suffix_of
from fastmae.errors import SettingError, in_one_line

FILE_SUFFIXES = IMAGE_SUFFIXES.union(SOUND_SUFFIXES)
LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")
PATH_COLUMNS = (
    "path", "file_path", "filepath", "file_name", "filename", "file", "image_path", "image_file", "image_name",
    "img_path", *IMAGE_COLUMNS,
)  # fmt: skip
NAME_COLUMNS = (*LABEL_COLUMNS, "class_name", "label_name", "category", "category_name")
PART_COLUMNS = ("split", "part", "partition", "subset", "set")
# Files of 30 million lines are shorter.
MAX_LIST_BYTES = 2 << 30
# How lists are read: what was kept by other rules is made again.
RULE = "list 2"
CHECK_THREADS = 8
# Of a folder with fewer listed files than this, each file is asked for by itself.
FEW_FILES = 16
PARTS: tuple[Part, ...] = ("train", "val", "test")
NO_PART = len(PARTS)
THERE, MISSING, BLANK = range(3)
_INTEGER = re.compile(r"\s*[-+]?\d{1,18}(?:\.0+)?\s*")


@dataclass(frozen=True)
class Rows:
    """What a list says, row by row."""

    names: Names
    """The paths as they are written."""
    label: np.ndarray
    """int64 [rows]: numbers, or numbers of ``classes``."""
    has_label: np.ndarray
    """uint8 [rows]."""
    classes: tuple[str, ...]
    part: np.ndarray
    """uint8 [rows]: a number of ``PARTS``, or ``NO_PART``."""
    state: np.ndarray
    """uint8 [rows]: whether the file is ``THERE``, as every address is taken to be, ``MISSING``, or no path is given
    (``BLANK``)."""
    others: tuple[str, ...] = ()
    """Columns that say nothing of use."""
    notes: tuple[str, ...] = ()


def open_list(path: Path | str, split: Split, root: str | None = None) -> FolderSource | None:
    """Opens a part of a list; None if it has no val part.

    A column `split` (`train`, `val`, `test`) says which part a row is of. Without one, the val part of `train.csv` is
    `val.csv` or `test.csv` beside it.

    Args:
        path: the list, or its address.
        split: the part.
        root: the folder or the address that relative paths are relative to; None for that of the list.

    Raises:
        SettingError: no column of paths, no row to train on, or none of the files is there.
        OSError, ValueError: the file cannot be read, or is not what its suffix says.
    """
    rows = _read(path, root)
    if np.any(rows.part):  # not all rows are to train on
        return _part_of(path, rows, split, root)
    if split == "train":
        return _source(path, rows, np.flatnonzero(rows.state == THERE), root, "")
    other = _beside(path)
    if other is None:
        return None
    rows = _read(other, root)
    return _source(other, rows, np.flatnonzero(rows.state == THERE), root, "")


def listed_paths(
    origin: str, paths: list[str], labels: np.ndarray | None, classes: tuple[str, ...], base: str, text: str
) -> FolderSource:
    """Returns the files that the rows of a table name.

    Args:
        origin: the table, for people.
        paths: the path in each row; "" where there is none.
        labels: int64 [rows], or None.
        classes: what they number, if they are no numbers.
        base: the folder that relative paths are relative to.
        text: where the images lie, for people.

    Raises:
        SettingError: none of the files is there.
    """
    label = np.zeros(len(paths), np.int64) if labels is None else labels
    names = names_of(pack_names(paths))
    has_label, state = np.full(len(paths), labels is not None, np.uint8), _find(names, _base(origin, base))[0]
    rows = Rows(names, label, has_label, classes, np.zeros(len(paths), np.uint8), state)
    source = _source(origin if is_remote(origin) else Path(origin), rows, np.flatnonzero(state == THERE), base, "")
    return replace(source, listed=text)


def _beside(path: Path | str) -> Path | None:
    """Returns the list to validate on that lies beside one to train on, by their names; `val` before `test`.

    What lies beside an address is not known.
    """
    if isinstance(path, str):
        return None
    said = read_part(path.stem)
    if said is None or said[0] != "train":
        return None
    others = sorted(p for p in path.parent.iterdir() if p.suffix.lower() == path.suffix.lower() and p.is_file())
    parts = {
        part: other
        for other in reversed(others)
        for part in ("val", "test")
        if read_part(other.stem) == (part, said[1])
    }
    return parts.get("val") or parts.get("test")


def _part_of(path: Path | str, rows: Rows, split: Split, root: str | None) -> FolderSource | None:
    there = rows.state == THERE
    counts = {part: int((there & (rows.part == number)).sum()) for number, part in enumerate(PARTS)}
    if not counts["train"]:
        held = ", ".join(part for part in PARTS if counts[part]) or "none that can be used"
        raise SettingError("data_path", str(path), f"no row is of a part to train on ({held}); call it `train`")
    best = "val" if counts["val"] else "test"
    if split == "val":
        chosen = np.flatnonzero(there & (rows.part == PARTS.index(best)))
        return _source(path, rows, chosen, root, best, Stock()) if len(chosen) else None
    return _source(path, rows, np.flatnonzero(there & (rows.part == 0)), root, "train", _stock(rows, best, counts))


def _source(
    path: Path | str, rows: Rows, chosen: np.ndarray, root: str | None, part: str, stock: Stock | None = None
) -> FolderSource:
    """Returns the rows that are chosen.

    Raises:
        SettingError: there are none, as the files are not there.
    """
    base = _base(path, root)
    if not len(chosen) and len(rows.names):
        raise SettingError("data_path", str(path), _none_there(rows, base, root))
    names = rows.names
    if len(chosen) < len(names):
        names = names.take(chosen)
    starts = names.column[np.append(0, names.ends[:-1] + 1)]
    if np.isin(starts, (ord("/"), ord("~"))).any() or (names.column == ord(":")).any():  # absolute, or an address
        names = names_of(pack_names(_located(name, base) for name in names))
    else:
        names = Names(names.column, names.ends, os.path.join(base, ""))
    labelled = len(chosen) > 0 and bool(rows.has_label[rows.state == THERE].all())
    labels, classes = (rows.label[chosen], rows.classes) if labelled else (None, ())
    if classes and labels is not None:  # the classes of this part alone, as those of folders are
        used, labels = np.unique(labels, return_inverse=True)
        classes = tuple(rows.classes[number] for number in used.tolist())
    text = f"listed in {file_name(path)}" + (f", rows of {part}" if part else "")
    text += f", of {count_of(len(classes), 'classes')}" if classes else ""
    return FolderSource(
        names,
        None if labels is None else labels.astype(np.int64),
        classes,
        part=part,
        taken=_stock(rows) if stock is None else stock,
        listed=text,
    )


def _none_there(rows: Rows, base: str, root: str | None) -> str:
    """Says that no file of a list is there, and what to do."""
    first = next((name for name in rows.names if name), "")
    if "/" not in first and not suffix_of(first):
        return f"not an image, and no list of paths either, as none of its lines is one ({in_one_line(first, 60)})"
    where = f"none of its {count_of(len(rows.names), 'files')} is there, such as {_located(first, base)}"
    if "\\" in first:
        return f"{where}; write / instead of \\"
    if not root and not os.path.isabs(first) and os.path.exists(first):
        return f"{where}; its paths are relative to this folder, so give --root=."
    return f"{where}; give the folder that they are relative to with --root"


def _stock(rows: Rows, best: str = "", counts: dict[Part, int] | None = None) -> Stock:
    """Returns which rows and columns of a list are used."""

    def some(chosen: np.ndarray) -> tuple[str, ...]:
        return tuple(rows.names[row] for row in np.flatnonzero(chosen)[:EXAMPLES].tolist())

    there = rows.state == THERE
    reasons = {
        MISSING: "no such file; check the paths, or give the folder that they are relative to with --root",
        BLANK: "no path",
    }
    left_out = [LeftOut("rows", int((rows.state == state).sum()), reason, some(rows.state == state))
                for state, reason in reasons.items() if np.any(rows.state == state)]  # fmt: skip
    used = int(there.sum())
    if counts is not None:
        other: Part = "test" if best == "val" else "val"
        for chosen, reason in (
            (there & (rows.part == PARTS.index(other)), f"of {other}, as {best} is the part to evaluate on"),
            (there & (rows.part == NO_PART), "of no part to train or evaluate on"),
        ):
            if count := int(chosen.sum()):
                left_out.append(LeftOut("rows", count, reason, some(chosen)))
                used -= count
    without = there & (rows.has_label == 0)
    if np.any(without) and np.any(rows.has_label):
        reason = (
            f"labels, as {int(without.sum()):,} of {int(there.sum()):,} images have none; give each one to use them"
        )
        left_out.append(LeftOut("columns", 1, reason, tuple(f"without: {name}" for name in some(without))))
    if rows.others:
        reason = "neither paths, labels nor parts"
        left_out.append(LeftOut("columns", len(rows.others), reason, rows.others[:EXAMPLES]))
    return Stock({"rows": used}, tuple(left_out), rows.notes)


# --- where the files are ----------------------------------------------------------------------------------------------


def _base(path: Path | str, root: str | None) -> str:
    if root and is_remote(root):
        return root.rstrip("/")
    if root:
        return os.path.expanduser(root)
    return folder_of(path) if isinstance(path, str) else str(path.parent)


def _located(name: str, base: str) -> str:
    if is_remote(name) or is_remote(base):
        return joined(base + "/", name)
    return os.path.join(base, os.path.expanduser(name) if name.startswith("~") else name)


def _find(names: Names, base: str) -> tuple[np.ndarray, dict[str, int]]:
    """Returns the state of each path, uint8 [rows], and the modification time in ns of each folder, -1 without one."""
    state = np.full(len(names), MISSING, np.uint8)
    inside: dict[str, array[int]] = {}
    for row, name in enumerate(names):
        if not name:
            state[row] = BLANK
        elif is_remote(name) or is_remote(base):
            state[row] = THERE
        else:
            inside.setdefault(name.rpartition("/")[0] or "/" * name.startswith("/"), array("q")).append(row)

    def present(folder: str) -> tuple[np.ndarray, int]:
        where, rows = _located(folder, base), np.array(inside[folder], np.int64)
        modified = _modified(where)
        last = (name.rpartition("/")[2] for name in names.take(rows))
        try:
            if len(rows) < FEW_FILES:
                found = [os.path.exists(os.path.join(where, name)) for name in last]
            else:
                there = {*os.listdir(where)}
                found = [name in there for name in last]
        except (OSError, ValueError):
            return rows[:0], modified
        return rows[np.array(found, bool)], modified

    times = {}
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        for folder, (rows, modified) in zip(inside, pool.map(present, inside), strict=True):
            state[rows] = THERE
            times[folder] = modified
    return state, times


def _modified(folder: str) -> int:
    try:
        return os.stat(folder or ".").st_mtime_ns
    except (OSError, ValueError):
        return -1


# --- reading and keeping ----------------------------------------------------------------------------------------------


def _read(path: Path | str, root: str | None) -> Rows:
    """Reads a list, or what was kept of it."""
    file, base = open_file(path), _base(path, root)
    base = base if is_remote(base) else os.path.realpath(base)
    fingerprint = [RULE, file_name(path), base, list(file.stamp), sorted(FILE_SUFFIXES)]
    kept = cache_file(f"list {path if isinstance(path, str) else os.path.realpath(path)} in {base}")
    index = read_index(kept)
    rows = None if index is None or index.fingerprint != fingerprint else _kept(index.columns, base)
    if rows is not None:
        return rows
    rows = _parsed(file, Path(file_name(path)).suffix.lower())
    state, folders = _find(rows.names, base)
    rows = Rows(rows.names, rows.label, rows.has_label, rows.classes, rows.part, state, rows.others, rows.notes)
    if len(state) >= WORTH_KEEPING and is_settled([file.stamp[1], *folders.values()]):
        columns = {
            "names": rows.names.column, "label": rows.label, "has_label": rows.has_label, "part": rows.part,
            "classes": pack_names(rows.classes), "state": state, "folders": pack_names(folders),
            "modified": np.array([*folders.values()], np.int64),
            "others": pack_names(rows.others), "notes": pack_names(rows.notes),
        }  # fmt: skip
        write_index(kept, Index(fingerprint, columns))
    return rows


def _kept(columns: dict[str, np.ndarray], base: str) -> Rows | None:
    """Returns the rows in an index; None if it is damaged, or a folder has changed since."""
    try:
        names, classes = names_of(columns["names"]), tuple(unpack_names(columns["classes"]))
        label, has_label, part, state = (columns[name] for name in ("label", "has_label", "part", "state"))
        others, notes = (tuple(unpack_names(columns[name])) for name in ("others", "notes"))
        folders, modified = unpack_names(columns["folders"]), columns["modified"].tolist()
    except KeyError:
        return None
    if not len(names) == len(label) == len(has_label) == len(part) == len(state) or len(folders) != len(modified):
        return None
    if len(names) and (part.max() > NO_PART or state.max() > BLANK):
        return None
    if classes and not 0 <= label.min() <= label.max() < len(classes):
        return None
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        if [*pool.map(lambda folder: _modified(_located(folder, base)), folders)] != modified:
            return None
    return Rows(names, label, has_label, classes, part, state, others, notes)


class _Words:
    """A column of words, in which each word is kept once."""

    def __init__(self) -> None:
        self.codes = array("q")
        """Of each row, the number of its word."""
        self.numbers: dict[str, int] = {}
        """By word, in the order in which they come."""

    def add(self, word: str | None) -> None:
        self.codes.append(self.numbers.setdefault((word or "").strip(), len(self.numbers)))


class _Table:
    """The columns of a list, before it is known which files are there. Rows are packed as they are read."""

    def __init__(self, labels: bool = False, parts: bool = False, others: Iterable[str] = ()) -> None:
        self.paths = bytearray()
        """As ``pack_names`` packs them."""
        self.labels = _Words() if labels else None
        self.parts = _Words() if parts else None
        self.others = tuple(others)

    def add(self, path: str | None, label: str | None = None, part: str | None = None) -> None:
        path = (path or "").removeprefix("./").replace("\0", "\ufffd")
        self.paths += os.fsencode(path) + b"\0"
        if self.labels is not None:
            self.labels.add(label)
        if self.parts is not None:
            self.parts.add(part)


def _parsed(file: OpenFile | RemoteFile, suffix: str) -> Rows:
    """Reads a list.

    Raises:
        ValueError: it is no text, or not what its suffix says.
    """
    if file.size > MAX_LIST_BYTES:
        raise ValueError(f"a list of {file.size:,} bytes; split it")
    if b"\0" in file.read(1 << 16, 0):
        raise ValueError("no text in UTF-8; save it as such")
    data = b"".join(file.read(1 << 26, start) for start in range(0, file.size, 1 << 26))
    if b"\0" in data:
        raise ValueError("no text in UTF-8; save it as such")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if suffix == ".jsonl":
        table = _from_records(lambda: _records(data))
    elif suffix == ".txt":
        table = _from_lines(lambda: (line for line in map(str.strip, _lines(data)) if line and line[0] != "#"))
    else:
        table = _from_csv(data, suffix)
    if not table.paths:
        raise ValueError("an empty list")
    names = names_of(np.frombuffer(bytes(table.paths), np.uint8))
    label, has_label, classes = _numbered(table.labels, len(names))
    part, notes = _parts(table.parts, len(names))
    state = np.zeros(len(label), np.uint8)
    if repeated := len(repeats(names)):
        notes = (*notes, f"{count_of(repeated, 'rows')} with the path of an earlier one, all used")
    return Rows(names, label, has_label, classes, part, state, table.others, notes)


def _lines(data: bytes, newline: str = "\n") -> io.TextIOWrapper:
    """Returns the lines of a text one by one: the text itself, and not four times as much, is in memory."""
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="surrogateescape", newline=newline)


def _numbered(labels: _Words | None, count: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Returns labels int64, which rows have one, and the names of the classes: none if all labels are integers."""
    if labels is None:
        return np.zeros(count, np.int64), np.zeros(count, np.uint8), ()
    code, codes = np.array(labels.codes, np.int64), labels.numbers
    has_label = np.array([bool(word) for word in codes], np.uint8)[code]
    words = [word for word in codes if word]
    if all(map(_INTEGER.fullmatch, words)):
        return np.array([int((word or "0").partition(".")[0]) for word in codes], np.int64)[code], has_label, ()
    names = sorted(words)
    places = {name: number for number, name in enumerate(names)}
    return np.array([places.get(word, 0) for word in codes], np.int64)[code], has_label, tuple(names)


def _parts(parts: _Words | None, count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the part of each row, and a note if the column of parts says none."""
    if parts is None:
        return np.zeros(count, np.uint8), ()
    said = [read_part(word) for word in parts.numbers]
    numbers = [NO_PART if part is None else PARTS.index(part[0]) for part in said]
    if {*numbers} == {NO_PART}:
        words = ", ".join(sorted(word or "nothing" for word in parts.numbers)[:EXAMPLES])
        return np.zeros(count, np.uint8), (f"its column of parts names none ({words}), so all rows are to train on",)
    return np.array(numbers, np.uint8)[np.array(parts.codes, np.int64)], ()


def _from_lines(lines: Callable[[], Iterator[str]]) -> _Table:
    """Reads a path a line. Where each line ends with a number, or has a tab, what follows the path is its label."""
    separator = "\t" if all("\t" in line for line in lines()) else None

    def split() -> Iterator[list[str]]:
        return (line.rsplit(separator, 1) for line in lines())

    if separator is None and not all(
        len(pair) == 2 and _INTEGER.fullmatch(pair[1]) and suffix_of(pair[0]) for pair in split()
    ):
        table = _Table()
        for line in lines():
            table.add(line)
        return table
    table = _Table(labels=True)
    for path, label in split():
        table.add(path.strip(), label)
    return table


def _from_csv(data: bytes, suffix: str) -> _Table:
    """Reads a table. Without a row of names, the column with names of image files is that of paths."""
    first_line = data.partition(b"\n")[0].decode(errors="surrogateescape")
    delimiter = "\t" if suffix == ".tsv" else max(",;\t|", key=first_line.count)
    rows = _csv_rows(data, delimiter)
    first = next(rows, None)
    if first is None:
        return _Table()
    head = [cell.strip().lower() for cell in first]
    if any(suffix_of(cell) in FILE_SUFFIXES for cell in head):
        path = next(number for number, cell in enumerate(head) if suffix_of(cell) in FILE_SUFFIXES)
        names = ["path" if number == path else "label" if len(head) == 2 else f"column {number + 1}"
                 for number in range(len(head))]  # fmt: skip
    else:
        names, first = head, next(rows, None)
    sample = dict(zip(names, first or (), strict=False))
    path_name, label_name, part_name = _columns(names, sample)
    others = [name for name in names if name not in (path_name, label_name, part_name)]
    table = _Table(label_name is not None, part_name is not None, others)
    where = [None if name is None else names.index(name) for name in (path_name, label_name, part_name)]
    for number, row in enumerate(itertools.chain(() if first is None else (first,), rows), 1):
        if len(row) > len(names):
            raise ValueError(f"row {number} has {len(row)} cells, and there are {len(names)} columns; quote its commas")
        table.add(*(row[at].strip() if at is not None and at < len(row) else None for at in where))
    return table


def _csv_rows(data: bytes, delimiter: str) -> Iterator[list[str]]:
    """Yields the rows of a table that are not empty. Raises ValueError where it is none."""
    try:
        yield from filter(None, csv.reader(_lines(data, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ValueError(f"no table: {error}") from error


def _records(data: bytes) -> Iterator[Any]:
    for number, line in enumerate(_lines(data), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is no JSON: {in_one_line(str(error))}") from error


def _from_records(records: Callable[[], Iterator[Any]]) -> _Table:
    """Reads an object a line, or a path a line in quotes."""

    def rows() -> Iterator[dict[str, Any]]:
        return (record if isinstance(record, dict) else {"path": record} for record in records())

    first, found = next(rows(), None), dict[str, None]()
    if first is None:
        return _Table()
    for row in rows():
        found.update(dict.fromkeys(row))
    names = [*found]
    keys = {name.lower(): name for name in reversed(names)}
    chosen = _columns([*keys], {name.lower(): value for name, value in first.items()})
    path_name, label_name, part_name = chosen
    others = [name for name in names if name.lower() not in chosen]
    table = _Table(label_name is not None, part_name is not None, others)
    for row in rows():
        path = row.get(keys[path_name], "")
        if not isinstance(path, str):
            raise ValueError(
                f"{path_name} is no text but {in_one_line(repr(path), 60)}; write the path of a file there"
            )
        table.add(path, *(None if name is None else _word(row.get(keys[name])) for name in (label_name, part_name)))
    return table


def _word(value: object) -> str | None:
    """Returns a label as text; None for what is none, such as a list."""
    return value if isinstance(value, str) else str(int(value)) if isinstance(value, int) else None


def _columns(names: list[str], sample: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """Returns the names of the columns of paths, of labels and of parts.

    Raises:
        ValueError: none is of paths.
    """
    images = [name for name, value in sample.items() if isinstance(value, str) and suffix_of(value) in FILE_SUFFIXES]
    path = next((name for name in (*PATH_COLUMNS, *images) if name in names), None)
    if path is None:
        there = ", ".join(map(str, names[:8]))
        raise ValueError(f"no column of paths among {there}; call it `path`, or train --model mae_mlp on numbers")
    label = next((name for name in NAME_COLUMNS if name in names and name != path), None)
    return path, label, next((name for name in PART_COLUMNS if name in names), None)
