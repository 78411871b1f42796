"""What Parquet and Arrow tables share: which column holds the images, which the labels, and the names of classes.

`datasets` writes the names of classes into the schema's metadata, as JSON. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastmae.data.remote import file_name
from fastmae.data.stock import EXAMPLES, LeftOut
from fastmae.errors import UserError

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture", "photo")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label", "target")
# Looking at the footer or the schema of a file takes a millisecond.
SECONDS_TO_LOOK = 60
MAX_FEATURES = 16 << 20


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Adds the name of the file to errors, and makes those of pyarrow ValueErrors."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{file_name(path)}: {error}") from error


def refuse_what_aborts(paths: Sequence[Path | str], look: Callable[[int], object], what: str) -> None:
    """Looks at files in a process of its own first, as pyarrow ends the process over some damage.

    Args:
        paths: the files.
        look: looks at the file with a number; an error of it is for later.
        what: what would be damaged, for people.

    Raises:
        ValueError: a file that ended the process.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads; the child takes no lock and never returns
        child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(SECONDS_TO_LOOK)
            for number in range(len(paths)):
                os.write(writer, b".")
                with contextlib.suppress(ValueError, UserError):
                    look(number)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as begun:
        count = len(begun.read())
    if os.waitpid(child, 0)[1] != 0:
        raise ValueError(f"{file_name(paths[max(0, count - 1)])}: its {what} is damaged")


def holds_images(type_: Any) -> bool:
    """Tells whether a type is of bytes, or a struct of bytes and a path."""
    import pyarrow.types as types

    if types.is_struct(type_):
        return any(child.name == "bytes" and holds_images(child.type) for child in type_)
    return types.is_binary(type_) or types.is_large_binary(type_)


def image_column(path: Path | str, schema: Any) -> str:
    """Returns the name of the column of images.

    Raises:
        UserError: there is none, or several of which none has a usual name.
    """
    usable = [name for name in schema.names if holds_images(schema.field(name).type)]
    named = [name for name in IMAGE_COLUMNS if name in usable]
    if named or len(usable) == 1:
        return (named or usable)[0]
    several = f"several of bytes ({', '.join(usable)})" if usable else f"none of bytes among {', '.join(schema.names)}"
    raise UserError(f"{path}: no column of images, {several}; call it `image`")


def label_column(schemas: Sequence[Any]) -> tuple[str | None, str]:
    """Returns the column of labels, if all files have it with integers or words; else None and what is wrong."""
    name = next((name for name in LABEL_COLUMNS if any(name in schema.names for schema in schemas)), None)
    if name is None:
        return None, ""
    if not all(name in schema.names for schema in schemas):
        return None, "some of the files have no such column; write it into all to use its labels"
    kinds = [schema.field(name).type for schema in schemas]
    wrong = next((kind for kind in kinds if not _is_label(kind)), None)
    if wrong is not None:
        return None, f"labels must be integers or words, these are {wrong}; number the classes to use them"
    if len({_is_word(kind) for kind in kinds}) > 1:
        return None, "labels are integers in some files and words in others; write the same kind into all to use them"
    return name, ""


def _is_label(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_integer(kind) or _is_word(kind)


def _is_word(kind: Any) -> bool:
    import pyarrow.types as types

    return (
        types.is_string(kind)
        or types.is_large_string(kind)
        or (types.is_dictionary(kind) and _is_word(kind.value_type))
    )


def label_values(column: Any, name: str, schema: Any) -> tuple[list[Any] | np.ndarray, int]:
    """Returns the labels of a column of one file, and how many rows lack one: words, or numbers int64.

    Numbers that the schema gives names are words; -1 among them is no label, as `datasets` writes it for a test part.
    """
    names = class_names_in(schema, name)
    if _is_word(column.type):
        words = column.cast("string").to_pylist()
        return words, sum(word is None for word in words)
    without = column.null_count
    numbers = _integers(column.cast("int64", safe=False).fill_null(-1))
    if names and len(numbers) and -1 <= numbers.min() <= numbers.max() < len(names):
        return [None if number < 0 else names[number] for number in numbers.tolist()], int((numbers < 0).sum())
    return numbers, without


def _integers(column: Any) -> np.ndarray:
    """Returns a column of int64 without nulls. Its own ``to_numpy`` would load pandas for it, of 60 MB."""
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    parts = [np.frombuffer(chunk.buffers()[1], np.int64, len(chunk), chunk.offset * 8) for chunk in chunks]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def class_names_in(schema: Any, name: str) -> list[str]:
    """Returns the names of the classes of a column, if `datasets` wrote them into the metadata of the schema."""
    text = (schema.metadata or {}).get(b"huggingface", b"")
    if not text or len(text) > MAX_FEATURES:
        return []
    try:
        names = json.loads(text)["info"]["features"][name]["names"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    return names if isinstance(names, list) and all(isinstance(word, str) for word in names) else []


def numbered(parts: Iterable[list[Any] | np.ndarray]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns labels int64 of all files, and the classes that they number: those that occur; none of numbers."""
    every = [*parts]
    if all(isinstance(part, np.ndarray) for part in every):
        return np.concatenate([np.zeros(0, np.int64), *every]), ()
    words = [str(word) for part in every for word in part]
    classes = sorted({*words})
    numbers = {word: number for number, word in enumerate(classes)}
    return np.array([numbers[word] for word in words], np.int64), tuple(classes)


def columns_left_out(names: Sequence[str], image: str, label_problem: str) -> tuple[int, list[LeftOut]]:
    """Returns how many columns are used, and which are not.

    Args:
        names: of all columns.
        image: the one with the images.
        label_problem: why the column of labels is not used; empty if it is, or if there is none.
    """
    label = next((name for name in LABEL_COLUMNS if name in names), None)
    others = [name for name in names if name not in (image, label)]
    left_out = []
    if label is not None and label_problem:
        left_out.append(LeftOut("columns", 1, label_problem, (label,)))
    if others:
        left_out.append(LeftOut("columns", len(others), "neither images nor labels", tuple(others[:EXAMPLES])))
    return len(names) - len(others) - (label is not None and bool(label_problem)), left_out
