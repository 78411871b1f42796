"""Files behind an address (`https://`, `s3://`, `gs://` …), read by ranges through fsspec.

A file is what ``OpenFile`` is for one on a disk. What fails is asked for again, which is said; an object that is
replaced is noticed by its size, ETag or time. Nothing is kept on a disk but the index of tars.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from fastmae.data.openfile import OpenFile
from fastmae.errors import UserError, in_one_line, install_hint

logger = logging.getLogger("fastmae")
T = TypeVar("T")

WAITS = (0.5, 2.0, 8.0)
"""Seconds before what failed is asked for again."""
AGAIN = (408, 425, 429)
"""Answers of a server that call for another try, besides those from 500 on."""
BLOCK = 4 << 20
"""Bytes that are asked for at a time where a file is read from its start to its end."""
CHECK_SECONDS = 60.0
"""How often it is asked whether an object is still the same."""
TAGS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "updated", "mtime")
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def is_remote(path: str | Path) -> bool:
    """Tells whether a path is an address."""
    return re.match(r"[a-z][a-z0-9+.-]*://", str(path)) is not None


def file_name(path: str | Path) -> str:
    """Returns the last part of a path or an address, without what follows a `?`."""
    return PurePosixPath(urlsplit(str(path)).path).name if is_remote(path) else Path(path).name


def joined(base: str, name: str) -> str:
    """Returns the address of a name that is relative to the file or, with a `/` at its end, the folder at ``base``."""
    if is_remote(name):
        return name
    plain = base.partition("?")[0]
    if urlsplit(base).scheme in ("http", "https"):
        return urljoin(plain, name)
    return folder_of(base) + "/" + name.lstrip("/")


def folder_of(url: str) -> str:
    """Returns the address of the folder of a file, without a `/` at its end."""
    return url.partition("?")[0].rpartition("/")[0]


def open_file(path: str | Path) -> OpenFile | RemoteFile:
    """Opens a file on a disk, or behind an address.

    Raises:
        UserError: the package for such addresses is not installed.
        OSError: there is no such file, or it may not be read.
    """
    return RemoteFile(str(path)) if is_remote(path) else OpenFile(path)


class RemoteFile:
    """A file behind an address, which any thread may read.

    Raises:
        UserError: the package for such addresses is not installed.
        OSError: there is no such file, it may not be read, or its server does not say how long it is.
    """

    def __init__(self, url: str) -> None:
        self.path = url
        self._files, self._inside = _filesystem(url)
        self.stamp = self._asked_stamp()
        """(size in bytes, a number that another version of the object does not have) when it was opened."""
        self._checked, self._is_changed = time.monotonic(), False

    @property
    def size(self) -> int:
        """The bytes of the file when it was opened."""
        return self.stamp[0]

    def is_unchanged(self) -> bool:
        """Tells whether the object is that which was opened; its server is asked once a minute until it is another."""
        if not self._is_changed and time.monotonic() - self._checked >= CHECK_SECONDS:
            self._checked = time.monotonic()
            self._is_changed = self._asked_stamp() != self.stamp
        return not self._is_changed

    def read(self, size: int, position: int) -> bytes:
        """Returns up to ``size`` bytes from a position on; fewer where the file ends."""
        end = min(position + size, self.size)
        if end <= position:
            return b""
        data = _retried(self.path, lambda: self._files.cat_file(self._inside, start=position, end=end))
        if len(data) > end - position:
            raise OSError(f"{self.path}: its server gives whole files and no ranges of them; copy it to a disk")
        return bytes(data)

    def _asked_stamp(self) -> tuple[int, int]:
        self._files.invalidate_cache()
        facts = _retried(self.path, lambda: self._files.info(self._inside))
        size = facts.get("size")
        if not isinstance(size, int) or facts.get("type") == "directory":
            raise OSError(f"{self.path}: no file, or one whose server does not say how long it is; copy it to a disk")
        told = json.dumps([str(facts.get(name)) for name in TAGS])
        return size, int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "big")  # below any time in ns


def fetch(url: str, most: int) -> bytes:
    """Returns the bytes of a small file behind an address, in one request.

    Raises:
        UserError: the package for such addresses is not installed.
        OSError: there is no such file, it may not be read, or it has more than ``most`` bytes.
    """
    files, inside = _filesystem(url)
    data = _retried(url, lambda: files.cat_file(inside))
    if len(data) > most:
        raise OSError(f"{len(data)} bytes, over the limit of {most}")
    return bytes(data)


class Seekable(io.RawIOBase):
    """A file of ``open_file`` with a position, for libraries that read such. One thread uses it."""

    def __init__(self, file: OpenFile | RemoteFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = (0, self._position, self._file.size)[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = self._file.size - self._position
        data = self._file.read(left if size is None or size < 0 else size, self._position) if left > 0 else b""
        self._position += len(data)
        return data


class ReadAhead:
    """Reads a file of ``open_file`` from its start to its end in large ranges, the next one while this one is used."""

    def __init__(self, file: OpenFile | RemoteFile) -> None:
        self._file, self._start, self._block = file, 0, b""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fastmae-ahead")
        self._next: tuple[int, Future[bytes]] | None = None

    def read(self, size: int, position: int) -> bytes:
        """Returns up to ``size`` bytes from a position on; fewer where the file ends."""
        inside = position - self._start
        if not 0 <= inside <= inside + size <= len(self._block):
            if size >= BLOCK:
                return self._file.read(size, position)
            follows = 0 <= inside <= len(self._block)
            if self._next is not None and self._next[0] == position:
                block = self._next[1].result()
            else:
                block = self._file.read(BLOCK, position)
            self._start, self._block, inside = position, block, 0
            after = position + len(block)
            self._next = (after, self._pool.submit(self._file.read, BLOCK, after)) if follows else None
        return self._block[inside : inside + size]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _retried(url: str, ask: Callable[[], T]) -> T:
    """Asks, and asks again after a while if that fails in a way that may pass.

    Raises:
        OSError: it failed to the end.
    """
    for wait in (*WAITS, None):
        try:
            return ask()
        except Exception as error:  # whatever the library of this kind of address raises
            said = error.__cause__ or error  # fsspec takes every failure over HTTP for a file that is not there
            reason = in_one_line(f"{type(said).__name__}: {said}", 300)
            status = getattr(said, "status", None)
            is_final = isinstance(said, FileNotFoundError | PermissionError) or (
                isinstance(status, int) and 400 <= status < 500 and status not in AGAIN
            )
            if wait is None or is_final:
                raise OSError(f"{url}: {reason}") from error
            logger.warning("%s: %s; asking again in %g s", url, reason, wait)
            time.sleep(wait)
    raise AssertionError


def _filesystem(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system for an address, and what the file is called there."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        hint = f"pip install {PACKAGES[scheme]}" if scheme in PACKAGES else install_hint("remote")
        raise UserError(f"{url}: addresses of {scheme}:// need another package; run {hint}") from error
    except ValueError as error:
        raise UserError(f"{url}: no kind of address that fsspec knows ({in_one_line(str(error))})") from error
