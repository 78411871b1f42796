"""Where an exported file comes to lie: there whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastmae.errors import UserError
from fastmae.files import fsync_file, fsync_folder


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """A path of the same name in a folder beside ``output``; what the block leaves there takes its place at the end.

    That may be a file, a folder, or a file and others that belong to it. Files are replaced, folders are not.

    Raises:
        UserError: the file system refused, or there is a folder with something in it.
    """
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output}: is a folder with files in it; name another place")
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        yield partial / output.name
        for path in partial.rglob("*"):
            if path.is_file():
                fsync_file(path)
        for path in sorted(partial.iterdir(), reverse=True):  # what belongs to a file before the file
            os.replace(path, output.parent / path.name)
        fsync_folder(output.parent)
    except (OSError, RuntimeError) as error:  # torch's writers report a full disk as a RuntimeError
        raise UserError(f"--output {output}: cannot be written ({_first_line(error)}); name another place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
