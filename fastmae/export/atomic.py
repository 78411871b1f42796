"""Exported files appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastmae.errors import SettingError
from fastmae.files import fsync_file, fsync_folder


@contextmanager
def written_aside(output: Path, flag: str = "--output") -> Iterator[Path]:
    """Gives a path of the same name in a folder beside ``output``; at the end, what was written there is moved.

    That may be a file, a folder, or a file and others that belong to it. Existing files are replaced, folders are not.

    Args:
        flag: what the command line calls ``output``.

    Raises:
        SettingError: the file system refused, or ``output`` is a folder that is not empty.
    """
    refuse_filled_folder(output, flag)
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # an export that was killed left it
        partial.mkdir(parents=True)
        yield partial / output.name
        for path in partial.rglob("*"):
            if path.is_file():
                fsync_file(path)
        for path in sorted(partial.iterdir(), reverse=True):  # the files that belong to another one come before it
            os.replace(path, output.parent / path.name)
        fsync_folder(output.parent)
    except (OSError, RuntimeError) as error:  # torch's writers report a full disk as a RuntimeError
        problem = f"cannot be written ({_first_line(error)}); name another path"
        raise SettingError("path", str(output), problem, flag=flag) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_filled_folder(output: Path, flag: str = "--output") -> None:
    """Refuses to write over a folder with something in it.

    Raises:
        SettingError: ``output`` is such a folder.
    """
    if output.is_dir() and any(output.iterdir()):
        problem = "is a folder with files in it; name another path"
        raise SettingError("path", str(output), problem, flag=flag)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
