"""Parquet files with images in a column, as Hugging Face's `datasets` writes them.

Such a file is stored in row groups, from which a single image cannot be read. A whole group is read and kept while it
is in use, and few groups are in use at a time.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.data.columns import (
    columns_left_out,
    holds_images,
    image_column,
    label_column,
    label_values,
    naming,
    numbered,
    refuse_what_aborts,
)
from fastmae.data.images import FolderSource
from fastmae.data.lists import listed_paths
from fastmae.data.memory import readable
from fastmae.data.openfile import OpenFile
from fastmae.data.plan import Shards
from fastmae.data.remote import RemoteFile, Seekable, folder_of, is_remote, open_file
from fastmae.data.stock import LeftOut, Stock, count_of, within
from fastmae.errors import UserError, install_hint

# The memory that the row groups in use may take together, and the least number of them.
HELD_BYTES = 512 << 20
MIN_HELD = 4
MAX_GROUP_BYTES = 2 << 30
# Footers and labels behind addresses are asked for together.
REMOTE_THREADS = 16
# Files of images have less than one row for a byte; a footer that claims far more is damaged.
MAX_ROWS_A_BYTE = 1000


@dataclass(frozen=True)
class ParquetSource:
    """Image files in a column of Parquet files."""

    files: tuple[str, ...]
    column: str
    group_file: np.ndarray
    """int64 [groups], ascending: the file in which each row group lies."""
    group_number: np.ndarray
    """int64 [groups]: the number of each row group in its file."""
    starts: np.ndarray
    """int64 [groups + 1]: the first sample of each row group, and the length."""
    held: int
    """How many row groups are in use at the same time."""
    labels: np.ndarray | None
    metadata: tuple[Any, ...] = field(repr=False, compare=False)
    """The footer of each file, parsed."""
    opened: tuple[RemoteFile | None, ...] = field(repr=False, compare=False)
    """Files behind addresses; None for those on a disk, which are opened for each row group."""
    stamps: tuple[tuple[int, int], ...]
    """(size, modification time in ns) of each file when it was opened."""
    stock: Stock
    """The rows and columns of the files. Only rows that are known to hold no image are left out."""
    classes: tuple[str, ...] = ()
    kind: str = "folder"
    _group: Callable[[int], Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A few more than are in use by the order, as threads are not all at the same sample of it.
        object.__setattr__(self, "_group", Recent(self._read_group, self.held + self.held // 4 + 4))

    @property
    def shards(self) -> Shards:
        """Each row group is a shard."""
        return Shards(self.starts, self.held * len(self) // max(1, len(self.group_file)))

    @property
    def location(self) -> str:
        """Where the images lie, as a phrase for people."""
        files = f"{len(self.files)} Parquet file{'s' if len(self.files) > 1 else ''}"
        return f"in column {self.column!r} of {files}"

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file.

        Raises:
            OSError: the row has no bytes, or the file was changed or is damaged there.
        """
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        images, row = self._group(group), index - int(self.starts[group])
        if len(images) != self.starts[group + 1] - self.starts[group]:
            raise OSError(f"row group {self.group_number[group]} has {len(images)} rows and says another number")
        value = _bytes_of(images, row)
        if value is None:
            raise OSError("the table has no bytes for this image")
        return value

    def name(self, index: int) -> str:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        first = int(np.searchsorted(self.group_file, self.group_file[group]))
        return f"{self.files[self.group_file[group]]}[{index - int(self.starts[first])}]"

    def _read_group(self, group: int) -> Any:
        file = int(self.group_file[group])
        opened, path = self.opened[file], self.files[file]
        try:
            source = path if opened is None else opened
            images = read_group(source, int(self.group_number[group]), self.column, self.metadata[file])
        except OSError:
            if opened is not None:  # which says more than what pyarrow finds where other bytes lie now
                self._require_unchanged(file)
            raise
        self._require_unchanged(file)
        return images

    def _require_unchanged(self, file: int) -> None:
        opened, path = self.opened[file], self.files[file]
        if opened is None and OpenFile(path).stamp == self.stamps[file]:
            return
        if opened is None or not opened.is_unchanged():
            raise OSError(f"{path} has changed since it was opened; start again")


class Recent:
    """The newest results of a function, at most ``capacity``. If threads ask for a key together, it is called once."""

    def __init__(self, make: Callable[[int], Any], capacity: int) -> None:
        self._make, self._capacity = make, capacity
        self._results: OrderedDict[int, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._results)

    def __call__(self, key: int) -> Any:
        with self._lock:
            result = self._results.get(key)
            is_new = result is None
            if result is None:
                result = self._results[key] = Future()
                if len(self._results) > self._capacity:
                    self._results.popitem(last=False)
            self._results.move_to_end(key)
        if is_new:
            try:
                result.set_result(self._make(key))
            except BaseException as error:
                with self._lock:
                    self._results.pop(key, None)  # the next call tries again
                result.set_exception(error)
        return result.result()


def open_parquet(
    paths: Sequence[Path | str], root: str | None = None, folder: Stock | None = None
) -> ParquetSource | FolderSource:
    """Opens Parquet files as one source, in the order given, and reads only their footers and labels.

    The image column is a struct of `bytes` and `path` or a column of bytes, found by its name or by being the only one.
    Labels are the integers of a column `label` or the like, if every row has one.

    Where the column holds paths and no bytes, the images are the files that they name.

    Args:
        paths: the files, or their addresses.
        root: what relative paths are relative to; None for the folder of the first file.
        folder: the stock of the folder that they were found in.

    Raises:
        UserError: pyarrow is not installed, there is no such column, or no file that it names.
        OSError, ValueError: a file cannot be read.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(f"{paths[0]}: Parquet files need pyarrow; run {install_hint('parquet')}") from error
    with ThreadPoolExecutor(REMOTE_THREADS if any(map(is_remote, paths)) else 1) as pool:
        stamps, opened, metadata = zip(*pool.map(_looked_at, paths), strict=True)
    column = image_column(paths[0], metadata[0].schema.to_arrow_schema())
    for path, facts in zip(paths, metadata, strict=True):
        schema = facts.schema.to_arrow_schema()
        if column not in schema.names or not holds_images(schema.field(column).type):
            raise UserError(f"{path}: has no image column {column!r} as {paths[0]} has; leave it out")
    groups_of = [
        functools.partial(_groups, path, size, facts, column)
        for path, (size, _), facts in zip(paths, stamps, metadata, strict=True)
    ]
    refuse_what_aborts(paths, lambda number: groups_of[number](), "footer")
    inside = [look() for look in groups_of]
    groups = [(file, group) for file, those in enumerate(inside) for group in those if group.rows]
    rows = np.array([group.rows for _, group in groups], np.int64)
    largest = max((group.size for _, group in groups), default=0)
    if largest > MAX_GROUP_BYTES:
        size = readable(largest)
        raise UserError(f"{paths[0]}: a row group of {size} is too large to be held; write it with row_group_size=100")
    name, problem = label_column([facts.schema.to_arrow_schema() for facts in metadata])
    labels, classes, without = (None, (), 0) if name is None else _labels(paths, opened, metadata, name)
    if without:
        problem = f"labels, as {without:,} of {rows.sum():,} rows have none; give each row one to use them"
    source = ParquetSource(
        files=tuple(map(str, paths)),
        column=column,
        group_file=np.array([file for file, _ in groups], np.int64),
        group_number=np.array([group.number for _, group in groups], np.int64),
        starts=np.concatenate([[0], np.cumsum(rows)]).astype(np.int64),
        held=max(MIN_HELD, HELD_BYTES // max(1, largest)),
        labels=labels,
        classes=classes,
        metadata=metadata,
        stamps=stamps,
        opened=opened,
        stock=within(_stock_of(metadata, [group for _, group in groups], column, problem), folder),
    )
    if len(source) and _holds_only_paths(source):
        return _files_named(source, paths, root, folder)
    return source


def _files_named(
    source: ParquetSource, paths: Sequence[Path | str], root: str | None, folder: Stock | None
) -> FolderSource:
    """Returns the files that the rows of a table without bytes name."""
    import pyarrow.parquet as pq

    found: list[str] = []
    for path, opened, facts in zip(paths, source.opened, source.metadata, strict=True):
        with naming(path), pq.ParquetFile(_readable(path, opened), metadata=facts) as file:
            rows = file.read(columns=[source.column], use_threads=False).column(source.column).to_pylist()
            found += [str((row.get("path") if isinstance(row, dict) else None) or "") for row in rows]
    if not any(found):
        raise UserError(f"{paths[0]}: column {source.column!r} holds neither images nor paths; write it anew")
    text = f"listed in column {source.column!r} of {count_of(len(paths), 'Parquet files')}"
    base = root or (folder_of(str(paths[0])) if is_remote(paths[0]) else str(Path(paths[0]).parent))
    files = listed_paths(str(paths[0]), found, source.labels, source.classes, base, text)
    return replace(files, taken=within(files.stock, folder))


@dataclass(frozen=True)
class _Group:
    """What the footer says of the images of a row group."""

    number: int
    rows: int
    size: int
    """Bytes in memory."""
    empty: int
    """Rows that hold no image; 0 where the footer does not say."""


def _groups(path: Path | str, size: int, facts: Any, column: str) -> list[_Group]:
    """Returns the row groups of a file.

    Raises:
        ValueError: the footer contradicts itself, or claims more rows than the file can hold.
    """
    with naming(path):
        groups = []
        for number in range(facts.num_row_groups):
            group = facts.row_group(number)
            leaves = [group.column(n) for n in range(group.num_columns)]
            leaves = [leaf for leaf in leaves if leaf.path_in_schema.split(".")[0] == column]
            nulls = [leaf.statistics.null_count or 0 for leaf in leaves
                     if leaf.path_in_schema in (column, f"{column}.bytes") and leaf.statistics is not None]  # fmt: skip
            empty = min(max(0, *nulls, 0), group.num_rows)
            groups.append(_Group(number, group.num_rows, sum(leaf.total_uncompressed_size for leaf in leaves), empty))
        count = sum(group.rows for group in groups)
        if count != facts.num_rows or count > MAX_ROWS_A_BYTE * size or any(group.rows < 0 for group in groups):
            raise ValueError(f"says that it has {facts.num_rows:,} rows, {count:,} in its groups, in {size:,} bytes")
        return groups


def _stock_of(metadata: Sequence[Any], groups: Sequence[_Group], column: str, label_problem: str) -> Stock:
    """Returns which rows and columns are used.

    Args:
        metadata: the footers.
        groups: all row groups.
        column: the one with the images.
        label_problem: why the column of labels is not used; empty if it is, or if there is none.
    """
    rows, empty = sum(group.rows for group in groups), sum(group.empty for group in groups)
    names = list(dict.fromkeys(name for facts in metadata for name in facts.schema.to_arrow_schema().names))
    columns, left_out = columns_left_out(names, column, label_problem)
    if empty:
        left_out.insert(0, LeftOut("rows", empty, "they hold no image; a run takes the next row's"))
    used = {"files": len(metadata), "images": rows, "rows": rows - empty, "columns": columns}
    return Stock(used, tuple(left_out))


def _readable(path: Path | str, opened: RemoteFile | None) -> Any:
    """Returns what pyarrow reads a file from."""
    return path if opened is None else Seekable(opened)


def _looked_at(path: Path | str) -> tuple[tuple[int, int], RemoteFile | None, Any]:
    """Returns the stamp of a file, the file itself if it lies behind an address, and its footer.

    A file on a disk does not stay open, as there may be thousands.
    """
    import pyarrow.parquet as pq

    file = open_file(path)
    opened = file if isinstance(file, RemoteFile) else None
    with naming(path):
        return file.stamp, opened, pq.read_metadata(_readable(path, opened))


def _labels(
    paths: Sequence[Path | str], opened: Sequence[RemoteFile | None], metadata: Sequence[Any], name: str
) -> tuple[np.ndarray | None, tuple[str, ...], int]:
    """Reads labels int64 [length] from a column, and the names of their classes.

    Returns None for the labels if rows lack theirs, and how many do.
    """
    import pyarrow.parquet as pq

    def labels_in(number: int) -> tuple[list[Any] | np.ndarray, int]:
        path, facts = paths[number], metadata[number]
        with naming(path), pq.ParquetFile(_readable(path, opened[number]), metadata=facts) as file:
            column = file.read(columns=[name], use_threads=False).column(name)
            if len(column) != facts.num_rows:
                raise ValueError(f"has {len(column)} labels for {facts.num_rows} rows")
            return label_values(column, name, facts.schema.to_arrow_schema())

    with ThreadPoolExecutor(REMOTE_THREADS if any(opened) else 1) as pool:
        parts = [*pool.map(labels_in, range(len(paths)))]
    without = sum(missing for _, missing in parts)
    return (None, (), without) if without else (*numbered([values for values, _ in parts]), 0)


def read_group(file: str | RemoteFile, number: int, column: str, metadata: Any) -> Any:
    """Reads the images of a row group, as pyarrow's chunked array. Raises OSError for every error of pyarrow's."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import pyarrow.types as types

    is_struct = types.is_struct(metadata.schema.to_arrow_schema().field(column).type)
    try:
        # Each read opens the file, because pyarrow does not promise that threads may share an open one.
        source = file if isinstance(file, str) else Seekable(file)
        with pq.ParquetFile(source, metadata=metadata, pre_buffer=False) as opened:  # one column: nothing to gather
            leaf = f"{column}.bytes" if is_struct else column
            return opened.read_row_group(number, columns=[leaf], use_threads=False).column(column)
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError, KeyError, IndexError) as error:
        raise OSError(f"row group {number}: {' '.join(str(error).split())}") from error


def _bytes_of(images: Any, row: int) -> bytes | None:
    value = images[row].as_py()
    return value["bytes"] if isinstance(value, dict) else value


def _holds_only_paths(source: ParquetSource) -> bool:
    """Tells whether the first row group has no bytes at all."""
    images = source._group(0)
    return all(_bytes_of(images, row) is None for row in range(int(source.starts[1])))
