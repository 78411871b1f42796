"""Files of tables: CSV (also packed by gzip), TSV, Parquet and .npy [N, D], read and written again with cells filled.

pyarrow reads CSV and Parquet: it finds the types of all columns over the whole file, tells missing cells from text, and
takes a tenth of the time of Python's own reader. What a file claims is compared with the memory that is left before
anything is allocated. A file is written cell by cell where cells are filled, so that every other byte of a CSV, every
other value of a Parquet file and every other number of an .npy stays as it is.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastmae.data.arrays import MAX_DEFLATE_RATIO, StoredArray, as_native, refuse_beyond_memory
from fastmae.data.columns import holds_images, naming, refuse_what_aborts
from fastmae.data.openfile import OpenFile
from fastmae.errors import UserError, in_one_line, install_hint

TEXT_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".npy")
MISSING = (
    "", "NA", "N/A", "n/a", "na", "#N/A", "#NA", "<NA>", "NaN", "nan", "-NaN", "-nan", "NAN", "null", "NULL", "Null",
    "None", "none", "?", ".", "-",
)  # fmt: skip
"""Cells of a column of numbers that are missing, with or without a space before them."""
DELIMITERS = ",;\t|"
COMMA = re.compile(r"[-+]?\d*,\d+(?:[eE][-+]?\d+)?")
"""A number with a decimal comma."""
MEMORY_PER_BYTE = 8
"""How much memory a byte of a text takes while it is read: the text, numbers of 64 bits and those of 32."""
CELL_BYTES = 16
"""How much memory a number of another file takes while it is read."""
BLOCK = 16 << 20
"""A row of a text is no longer than this."""
NEWLINE = b"\n"
UNITS_OF_NPY = 2
"""The axes of a table in an .npy file."""


@dataclass(frozen=True)
class Text:
    """How the cells of a text are written."""

    data: bytes
    delimiter: str
    decimal: str
    is_packed: bool


@dataclass(frozen=True)
class RawTable:
    """A table as it is stored: columns of pyarrow, or an array [N, D]."""

    names: tuple[str, ...]
    """Of the columns, in their order; "0", "1" … of an array."""
    length: int
    origin: str
    """Where it comes from, for people."""
    arrow: Any = None
    """A table of pyarrow, or None."""
    array: np.ndarray | None = None
    text: Text | None = None

    @property
    def is_named(self) -> bool:
        """Whether its columns have names of their own, by which they are matched."""
        return self.array is None

    def kind(self, name: str) -> str:
        """Returns what a column holds: "int", "float", "bool", "null" (no cell that is there), "text" or "other"."""
        if self.array is not None:
            return {"b": "bool", "i": "int", "u": "int"}.get(self.array.dtype.kind, "float")
        import pyarrow.types as types

        type_ = self.column(name).type
        if types.is_integer(type_):
            return "int"
        if types.is_floating(type_) or types.is_decimal(type_):
            return "float"
        if types.is_boolean(type_):
            return "bool"
        if types.is_null(type_):
            return "null"
        is_text = types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_)
        return "text" if is_text or types.is_dictionary(type_) else "other"

    def column(self, name: str) -> Any:
        """Returns a column of pyarrow."""
        return self.arrow.column(self.names.index(name))

    def numbers(self, name: str) -> np.ndarray:
        """Returns a column of numbers as float64 [N], NaN where it is missing; truth values are 0 and 1."""
        if self.array is not None:
            return self.array[:, self.names.index(name)].astype(np.float64)
        import pyarrow as pa
        import pyarrow.types as types

        column = self.column(name)
        if types.is_null(column.type):
            return np.full(self.length, math.nan)
        if types.is_boolean(column.type):
            column = column.cast("uint8")
        if not types.is_float64(column.type):
            column = column.cast(pa.float64(), safe=False)
        return _of_chunks(column.fill_null(math.nan))


def _of_chunks(column: Any) -> np.ndarray:
    """Returns a column of float64 without nulls. Its own ``to_numpy`` would load pandas for it."""
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    parts = [np.frombuffer(chunk.buffers()[1], np.float64, len(chunk), chunk.offset * 8) for chunk in chunks]
    return np.concatenate([np.zeros(0), *parts])


# --- reading ----------------------------------------------------------------------------------------------------------


def table_suffix(name: str) -> str:
    """Returns the suffix of a table's name in lower case, with that of its packing; empty if it is none."""
    return next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.lower().endswith(suffix)), "")


def is_table_file(path: Path) -> bool:
    """Tells whether a file is a table by its name, and not one of images: an .npy of two axes, a Parquet file without
    images. A file that cannot be read is a table, so that reading it says why."""
    suffix = table_suffix(path.name)
    try:
        if suffix == ".npy":
            return len(StoredArray.npy(path).shape) <= UNITS_OF_NPY
        if suffix == ".parquet":
            return not any(holds_images(field.type) for field in _schema(path))
    except (OSError, ValueError, UserError):
        pass
    return bool(suffix)


def read_table(path: Path) -> RawTable:
    """Reads a file of a table.

    Raises:
        UserError: what it holds is no table, or not one that can be meant.
        OSError, ValueError: it cannot be read.
    """
    suffix = table_suffix(path.name)
    if suffix == ".npy":
        return _read_npy(path)
    _require_pyarrow(path)
    return _read_parquet(path) if suffix == ".parquet" else _read_text(path)


def _require_pyarrow(what: object) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(f"{what}: tables need pyarrow; run {install_hint('parquet')}, or give .npy") from error


def _read_npy(path: Path) -> RawTable:
    stored = StoredArray.npy(path)
    refuse_beyond_memory(math.prod(stored.shape) * CELL_BYTES, path.name)
    return of_array(stored.whole(), str(path))


def of_array(array: np.ndarray, origin: str) -> RawTable:
    """Returns an array [N, D] of numbers as a table.

    Raises:
        UserError: another shape, or no numbers.
    """
    if array.ndim != UNITS_OF_NPY:
        raise UserError(f"{origin}: a table must have the shape [N, D], this has {list(array.shape)}; reshape it")
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise UserError(f"{origin}: a table must hold numbers of up to 64 bits, this holds {array.dtype}; convert it")
    array = array if array.dtype.kind == "b" else as_native(array)
    return RawTable(tuple(map(str, range(array.shape[1]))), len(array), origin, array=array)


def of_arrow(table: Any, origin: str) -> RawTable:
    """Returns a table of pyarrow as one of ours.

    Raises:
        UserError: two columns of one name.
    """
    names = tuple(str(name).strip() for name in table.column_names)
    _refuse_twice(names, origin)
    return RawTable(names, table.num_rows, origin, arrow=table)


def _refuse_twice(names: Sequence[str], origin: str) -> None:
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise UserError(f"{origin}: {names.count(twice)} columns are called {twice!r}; give each its own name")


def _schema(path: Path) -> Any:
    import pyarrow.parquet as parquet

    with naming(path):
        refuse_what_aborts([path], lambda number: _footer(path), "footer")
        return parquet.read_schema(path)


def _footer(path: Path) -> None:
    import pyarrow.parquet as parquet

    with naming(path):
        metadata = parquet.read_metadata(path)
        metadata.schema.to_arrow_schema()


def _read_parquet(path: Path) -> RawTable:
    import pyarrow.parquet as parquet

    OpenFile(path)  # a regular file
    _schema(path)
    with naming(path):
        metadata = parquet.read_metadata(path)
        refuse_beyond_memory(metadata.num_rows * max(1, metadata.num_columns) * CELL_BYTES, path.name)
        table = parquet.ParquetFile(path).read(use_threads=False)
    if table.num_rows != metadata.num_rows:
        raise ValueError(f"{path.name} says {metadata.num_rows} rows but holds {table.num_rows}")
    return of_arrow(table, str(path))


def _read_text(path: Path) -> RawTable:
    is_packed = path.suffix.lower() == ".gz"
    data = _bytes_of(path, is_packed)
    _refuse_no_text(data, path)
    start = data.removeprefix(codecs.BOM_UTF8)[:BLOCK]
    first_line = re.split(rb"[\r\n]", start, maxsplit=1)[0].decode()
    if not first_line.strip():
        raise UserError(f"{path}: begins with an empty line; begin with a row of names")
    is_tsv = ".tsv" in table_suffix(path.name)
    delimiter = "\t" if is_tsv else max(DELIMITERS, key=re.sub('"[^"]*"', "", first_line).count)
    names = next(csv.reader(io.StringIO(start[: 1 << 20].decode(errors="ignore"), newline=""), delimiter=delimiter))
    _refuse_no_names(names, path)
    _refuse_twice([name.strip() for name in names], str(path))
    _refuse_open_quotes(data, delimiter, path)
    table, decimal = _parsed(data, delimiter, ".", path), "."
    if delimiter != "," and _has_commas(table):
        table, decimal = _parsed(data, delimiter, ",", path), ","
    raw = of_arrow(table, str(path))
    if not raw.length:
        raise UserError(f"{path}: has a row of names and no other; add rows")
    return RawTable(raw.names, raw.length, raw.origin, table, None, Text(data, delimiter, decimal, is_packed))


def _bytes_of(path: Path, is_packed: bool) -> bytes:
    """Returns the text of a file, unpacked in pieces so that a small file never takes more than the memory left."""
    file = OpenFile(path)
    refuse_beyond_memory(file.size * MEMORY_PER_BYTE, path.name)
    if not is_packed:
        return b"".join(file.read(1 << 26, start) for start in range(0, file.size, 1 << 26))
    parts, size = [], 0
    try:
        with gzip.open(path, "rb") as packed:
            while part := packed.read(1 << 24):
                parts.append(part)
                size += len(part)
                refuse_beyond_memory(size * MEMORY_PER_BYTE, path.name)
                if size > MAX_DEFLATE_RATIO * file.size:
                    raise ValueError(f"{path.name} unpacks to more than DEFLATE can hold")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path.name} is no whole gzip file ({error})") from error
    return b"".join(parts)


def _refuse_no_text(data: bytes, path: Path) -> None:
    """Raises UserError for bytes that are no text in UTF-8."""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path}: a text in UTF-16; save it in UTF-8")
    decoder, row = codecs.getincrementaldecoder("utf-8")(), 1
    for start in range(0, len(data), 1 << 22):
        part = data[start : start + (1 << 22)]
        try:
            decoder.decode(part, start + len(part) >= len(data))
        except UnicodeDecodeError as error:
            line = row + bytes(error.object[: error.start]).count(b"\n")
            byte = f"byte 0x{error.object[error.start]:02x} in line {line}"
            raise UserError(f"{path}: no text in UTF-8 ({byte}); save it in UTF-8 (iconv -f latin1 -t utf8)") from None
        if b"\0" in part:
            raise UserError(f"{path}: holds bytes of zero, so it is no text; save it as CSV in UTF-8")
        row += part.count(b"\n")


def _refuse_open_quotes(data: bytes, delimiter: str, path: Path) -> None:
    """Raises UserError for a cell whose quotes are never closed, or are closed inside a cell of a later line.

    A reader of CSV takes everything between as the text of one cell, rows and all.
    """
    if b'"' not in data:
        return
    after = delimiter.encode() + b"\r\n"
    quoted = re.compile(rb"(?:\A|(?<=[" + re.escape(after) + rb']))"(?:[^"]+|"")*("?)')
    for cell in quoted.finditer(data.removeprefix(codecs.BOM_UTF8)):
        ends_well = cell[1] and (cell.end() == len(cell.string) or cell.string[cell.end()] in after)
        if ends_well or (cell[1] and b"\n" not in cell[0]):
            continue
        line = cell.string[: cell.start()].count(b"\n") + 1
        how = "are never closed" if not cell[1] else f"are closed inside a cell of line {line + cell[0].count(NEWLINE)}"
        problem = (
            f"the quotes that open in line {line} {how}, so rows would be lost; close them there, or leave them out"
        )
        raise UserError(f"{path}: {problem}")


def _refuse_no_names(names: Sequence[str], path: Path) -> None:
    """Raises UserError for a first row of numbers, unless these number the columns, as pandas writes an array."""
    cells = [name.strip() for name in names]
    filled = [cell for cell in cells if cell]
    if filled and all(map(_is_number, filled)) and filled != [*map(str, range(len(filled)))]:
        shown = in_one_line(", ".join(cells[:3]), 60)
        raise UserError(f"{path}: its first row holds numbers ({shown}) and no names; write a row of names above it")


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return cell in MISSING
    return True


def _parsed(data: bytes, delimiter: str, decimal: str, path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.csv as arrow_csv

    wrong: list[Any] = []

    def note(row: Any) -> str:
        wrong.append(row)
        return "error"

    try:
        return arrow_csv.read_csv(
            pa.BufferReader(data),
            read_options=arrow_csv.ReadOptions(use_threads=False, block_size=BLOCK),
            parse_options=arrow_csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, invalid_row_handler=note
            ),
            convert_options=arrow_csv.ConvertOptions(
                null_values=[*MISSING, *(f" {word}" for word in MISSING)], decimal_point=decimal
            ),
        )
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        if wrong:
            row, count = wrong[0].number - 1, wrong[0].actual_columns
            has = f"row {row} has {count} cells, and there are {wrong[0].expected_columns} columns"
            remedy = "complete the row, or put cells that hold the delimiter in quotes"
            raise UserError(f"{path}: {has}; {remedy}") from error
        raise UserError(f"{path}: no table ({in_one_line(str(error), 200)}); mend the file") from error


def _has_commas(table: Any) -> bool:
    """Tells whether a column of text holds nothing but numbers with decimal commas and missing cells."""
    import pyarrow.types as types

    for column in table.columns:
        if types.is_string(column.type):
            cells = {cell.strip() for cell in column.slice(0, 1000).to_pylist() if cell} - {*MISSING}
            if cells and all(map(_is_number, cells)) and any(map(COMMA.fullmatch, cells)):
                return True
    return False


# --- writing ----------------------------------------------------------------------------------------------------------


def write_filled(
    file: BinaryIO, raw: RawTable, filled: Mapping[str, tuple[np.ndarray, np.ndarray]], nodata: float | None = None
) -> None:
    """Writes a table as it was read, with some cells filled.

    Numbers for columns of integers are rounded; those beyond what the type of a column holds become its ends. Those for
    truth values are true from 0.5 on.

    Args:
        filled: by the name of a column the rows int64 [n], rising, and their numbers float64 [n].
        nodata: the number that marks missing cells, if there is one.
    """
    if raw.array is not None:
        np.save(file, filled_array(raw, filled))
    elif raw.text is not None:
        data = b"".join(_filled_text(raw, raw.text, filled, nodata))
        file.write(gzip.compress(data, mtime=0) if raw.text.is_packed else data)
    else:
        import pyarrow.parquet as parquet

        parquet.write_table(filled_arrow(raw, filled), file)


def filled_array(raw: RawTable, filled: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Returns a copy of the array with cells filled; numbers for an array of integers are rounded."""
    assert raw.array is not None
    array = raw.array.copy()
    for name, (rows, numbers) in filled.items():
        array[rows, raw.names.index(name)] = numbers if array.dtype.kind == "f" else _integers(numbers, array.dtype)
    return array


def _integers(numbers: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns float64 [n] rounded to integers of a type, those beyond its ends as the ends: int64 [n], or bool."""
    if np.dtype(dtype).kind == "b":
        return numbers >= 0.5
    ends = np.iinfo(dtype)
    return np.clip(np.rint(numbers), max(ends.min, -(2.0**62)), min(ends.max, 2.0**62)).astype(np.int64)


def filled_arrow(raw: RawTable, filled: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Any:
    """Returns the table of pyarrow with cells filled, its columns of the types that they have.

    A column of the type null gets numbers of 64 bits.
    """
    import pyarrow as pa
    import pyarrow.compute as compute

    table = raw.arrow
    for name, (rows, numbers) in filled.items():
        at, column = raw.names.index(name), raw.column(name)
        chosen, values = np.zeros(raw.length, bool), np.zeros(raw.length)
        chosen[rows], values[rows] = True, numbers
        field = table.field(at)
        if pa.types.is_null(field.type):  # of no cell that is there, which has no place for numbers
            field = field.with_type(pa.float64())
            column = column.cast(pa.float64())
        new = _of_type(values, column.type)
        combined = column.combine_chunks()
        combined = combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)
        table = table.set_column(at, field, compute.if_else(pa.array(chosen), new, combined))
    return table


def _of_type(values: np.ndarray, type_: Any) -> Any:
    """Returns float64 [N] as an array of a type of pyarrow."""
    import pyarrow as pa
    import pyarrow.types as types

    if types.is_boolean(type_):
        return pa.array(values >= 0.5)
    if types.is_decimal(type_):
        most = Decimal(10**type_.precision - 1).scaleb(-type_.scale)
        rounded = (Decimal(f"{value:.{max(0, type_.scale)}f}") for value in values.tolist())
        return pa.array([max(-most, min(most, value)) for value in rounded], type_)
    if types.is_integer(type_):
        return pa.array(_integers(values, type_.to_pandas_dtype())).cast(type_)
    return pa.array(values.astype(type_.to_pandas_dtype()), type_)


def _filled_text(
    raw: RawTable, text: Text, filled: Mapping[str, tuple[np.ndarray, np.ndarray]], nodata: float | None
) -> Iterator[bytes]:
    """Yields the text with cells filled; every other byte is as it was.

    Raises:
        UserError: a cell to be filled is not empty in the text, as it was read in another way.
    """
    by_row: dict[int, list[tuple[int, str]]] = {}
    for name, (rows, numbers) in filled.items():
        at, write = raw.names.index(name), _writer(raw, text, name)
        for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
            by_row.setdefault(row, []).append((at, write(number)))
    yield codecs.BOM_UTF8 if text.data.startswith(codecs.BOM_UTF8) else b""
    row = -1  # the row of names
    for line in _rows(text):
        if not line.strip(b"\r\n"):  # which the reader passes over
            yield line
            continue
        cells = by_row.pop(row, None)
        yield (
            line if row < 0 or cells is None else _with_cells(line, text, cells, f"{raw.origin}: row {row + 1}", nodata)
        )
        row += 1
    if row != raw.length:
        raise UserError(
            f"{raw.origin}: cannot be written cell by cell ({row} of {raw.length} rows found); give Parquet"
        )


def _rows(text: Text) -> Iterator[bytes]:
    """Yields the rows of a text with their ends; a cell in quotes may hold ends of lines."""
    data = text.data.removeprefix(codecs.BOM_UTF8)
    if b'"' not in data:
        yield from re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", data)
        return
    comma = re.escape(text.delimiter.encode())
    cell = rb'(?:"(?:[^"]|"")*"[^\r\n' + comma + rb"]*|[^\r\n" + comma + rb"]*)"
    row = re.compile(cell + rb"(?:" + comma + cell + rb")*(?:\r\n|\r|\n|\Z)")
    position = 0
    while position < len(data):
        match = row.match(data, position)
        if match is None or match.end() == position:
            raise UserError("a cell in quotes has no end; mend the file")
        yield match[0]
        position = match.end()


def _with_cells(line: bytes, text: Text, cells: Sequence[tuple[int, str]], where: str, nodata: float | None) -> bytes:
    """Returns a row with some cells replaced, which must be missing ones."""
    comma = re.escape(text.delimiter.encode())
    cell = rb'"(?:[^"]|"")*"[^\r\n' + comma + rb"]*|[^\r\n" + comma + rb"]*"
    pieces = [[*found] for found in re.findall(rb"(" + cell + rb")(" + comma + rb"|[\r\n]+|\Z)", line)]
    for at, word in cells:
        before = pieces[at][0].decode().strip().strip('"').strip()
        if before not in MISSING and not _is_nodata(before.replace(text.decimal, "."), nodata):
            raise UserError(f"{where} cannot be written cell by cell ({in_one_line(before, 40)}); give Parquet")
        pieces[at][0] = word.encode()
    return b"".join(part for piece in pieces for part in piece)


def _is_nodata(cell: str, nodata: float | None) -> bool:
    """Tells whether a cell is the number of missing ones, as float32 has it."""
    return nodata is not None and np.float32(cell) == np.float32(nodata)


def _writer(raw: RawTable, text: Text, name: str) -> Any:
    """Returns what writes a number as a cell of a column."""
    kind = raw.kind(name)
    if kind == "int":
        return lambda number: str(round(number))
    if kind == "bool":
        words = _truth_words(raw, text, name)
        return lambda number: words[number >= 0.5]
    return lambda number: str(np.float32(number)).replace(".", text.decimal)


def _truth_words(raw: RawTable, text: Text, name: str) -> tuple[str, str]:
    """Returns the words for false and true, written as the first one in the column is."""
    at = raw.names.index(name)
    for number, line in enumerate(_rows(text)):
        cells = next(csv.reader([line.decode()], delimiter=text.delimiter), [])
        word = cells[at].strip() if number and at < len(cells) else ""
        if word.lower() in ("true", "false"):
            return ("FALSE", "TRUE") if word.isupper() else ("false", "true") if word.islower() else ("False", "True")
    return "False", "True"
