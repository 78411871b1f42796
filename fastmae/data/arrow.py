"""Arrow files with images in a column, as Hugging Face's `datasets` keeps them (`save_to_disk`, and its cache).

A file is mapped once, to find where in it the bytes of each image lie. From then on an image is one read by position,
so a file that is cut later is an error and ends no process. Neither `datasets` nor pyarrow is needed for that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.data.columns import (
    columns_left_out,
    image_column,
    label_column,
    label_values,
    naming,
    numbered,
    refuse_what_aborts,
)
from fastmae.data.images import FolderSource
from fastmae.data.lists import listed_paths
from fastmae.data.openfile import OpenFile
from fastmae.data.packed import PackedSource
from fastmae.data.stock import LeftOut, Stock, within
from fastmae.errors import UserError, install_hint

FILE_START = b"ARROW1"


@dataclass
class _Column:
    """What a file holds."""

    schema: Any
    offset: np.ndarray
    """int64 [rows]: where in the file the bytes of each image begin; -1 where it has none."""
    size: np.ndarray
    """int64 [rows]."""
    paths: list[str | None]
    """Of the images, where no row has bytes."""
    labels: list[Any]
    """Arrays of the column of labels, if there is one."""


def open_arrow(paths: Sequence[Path], root: str | None, folder: Stock | None = None) -> PackedSource | FolderSource:
    """Opens Arrow files as one source, in the order given. Columns and labels are found as in Parquet files.

    Where no row has bytes, but paths, the images are the files that they name.

    Args:
        paths: the files.
        root: what relative paths are relative to; None for the folder of the first file.
        folder: the stock of the folder that the files were found in.

    Raises:
        UserError: pyarrow is not installed, there is no column of images, or the bytes are compressed.
        OSError, ValueError: a file cannot be read, or is damaged.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UserError(f"{paths[0]}: Arrow files need pyarrow; run {install_hint('parquet')}") from error
    stamps = tuple(OpenFile(path).stamp for path in paths)
    refuse_what_aborts(paths, lambda number: _read(paths[number], None), "table")
    schemas = [_schema(path) for path in paths]
    column = image_column(paths[0], schemas[0])
    name, problem = label_column(schemas)
    tables = [_read(path, name) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if (own := image_column(path, table.schema)) != column:
            raise UserError(
                f"{path}: its images are in column {own!r}, those of {paths[0]} in {column!r}; leave it out"
            )
    there = [table.offset >= 0 for table in tables]
    rows, used = sum(map(len, there)), sum(int(chosen.sum()) for chosen in there)
    if used == 0:
        there = [np.ones(len(table.offset), bool) for table in tables]  # whose images lie in files
    values, without = [], 0
    for path, table, chosen in zip(paths, tables, there, strict=True):
        if name is not None and table.labels:
            with naming(path):
                column_of_labels = pa.chunked_array(table.labels).filter(pa.array(chosen))
                found_here, missing = label_values(column_of_labels, name, table.schema)
            values.append(found_here)
            without += missing
    labels, classes = (None, ()) if name is None or without else numbered(values)
    if without:
        problem = f"labels, as {without:,} of {rows:,} rows have none; give each row one to use them"
    columns, left_out = columns_left_out(schemas[0].names, column, problem)
    if used == 0 and any(path for table in tables for path in table.paths):
        found = [path or "" for table in tables for path in table.paths]
        text = f"listed in column {column!r} of {paths[0].name}" + (f" and {len(paths) - 1} more" * (len(paths) > 1))
        base = root or str(paths[0].parent)
        source = listed_paths(str(paths[0]), found, labels, classes, base, text)
        stock = Stock(
            {"columns": columns, **source.stock.used}, (*left_out, *source.stock.left_out), source.stock.notes
        )
        return replace(source, taken=within(stock, folder))
    if used < rows:
        left_out.insert(0, LeftOut("rows", rows - used, "they hold no image"))
    stock = Stock({"files": len(paths), "images": used, "rows": used, "columns": columns}, tuple(left_out))
    return PackedSource(
        paths=tuple(map(str, paths)),
        stamps=stamps,
        shard=np.repeat(np.arange(len(paths)), [int(chosen.sum()) for chosen in there]).astype(np.int64),
        offset=np.concatenate([table.offset[chosen] for table, chosen in zip(tables, there, strict=True)]),
        size=np.concatenate([table.size[chosen] for table, chosen in zip(tables, there, strict=True)]),
        names=None,
        labels=labels,
        classes=classes,
        stock=within(stock, folder),
        what="Arrow files",
    )


def _schema(path: Path) -> Any:
    with naming(path):
        reader, _ = _reader(path)
        return reader.schema


def _reader(path: Path) -> tuple[Any, Any]:
    """Returns a reader of the record batches of a file, and the mapped file."""
    import pyarrow as pa

    mapped = pa.memory_map(str(path)).read_buffer()
    is_file = mapped.size >= len(FILE_START) and mapped.slice(0, len(FILE_START)).to_pybytes() == FILE_START
    opened = pa.BufferReader(mapped)
    return (pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)), mapped


def _batches(reader: Any) -> Iterator[Any]:
    count = getattr(reader, "num_record_batches", None)
    yield from reader if count is None else (reader.get_batch(number) for number in range(count))


def _read(path: Path, label: str | None) -> _Column:
    """Finds where the images of a file lie.

    Raises:
        UserError: no column of images, or a compressed one.
        ValueError: the file is damaged.
    """
    with naming(path):
        reader, mapped = _reader(path)
        name = image_column(path, reader.schema)
        offsets, sizes, paths, labels = (
            [np.zeros(0, np.int64)],
            [np.zeros(0, np.int64)],
            list[str | None](),
            list[Any](),
        )
        for batch in _batches(reader):
            batch.validate()
            offset, size = _places(batch.column(name), mapped, path)
            offsets.append(offset)
            sizes.append(size)
            paths += _paths(batch.column(name)) if not np.any(offset >= 0) else [None] * len(offset)
            if label is not None:
                labels.append(batch.column(label))
        return _Column(reader.schema, np.concatenate(offsets), np.concatenate(sizes), paths, labels)


def _places(column: Any, mapped: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns where in a mapped file the bytes of each row begin, -1 for none, and how many there are."""
    import pyarrow.types as types

    there = column.is_valid().to_numpy(zero_copy_only=False)
    data = column
    if types.is_struct(column.type):
        data = column.field("bytes")
        there = there & data.is_valid().to_numpy(zero_copy_only=False)
    _, ends, values = data.buffers()
    kind = np.dtype(np.int64 if types.is_large_binary(data.type) else np.int32)
    if len(data) == 0 or values is None or values.size == 0:
        return np.full(len(data), -1, np.int64), np.zeros(len(data), np.int64)
    starts = np.frombuffer(ends, kind, len(data) + 1, data.offset * kind.itemsize).astype(np.int64)
    size = np.diff(starts)
    if starts[0] < 0 or np.any(size < 0) or starts[-1] > values.size:
        raise ValueError("offsets that lie outside of their column")
    place = values.address - mapped.address
    if not 0 <= place <= mapped.size - values.size:
        raise UserError(f"{path}: its images are compressed and cannot be read in place; write it without compression")
    return np.where(there, place + starts[:-1], -1), np.where(there, size, 0)


def _paths(column: Any) -> list[str | None]:
    """Returns the paths of a column of structs; None where there is none."""
    import pyarrow.types as types

    if not types.is_struct(column.type) or "path" not in [field.name for field in column.type]:
        return [None] * len(column)
    paths = column.field("path").to_pylist()
    return [path if isinstance(path, str) else None for path in paths]
