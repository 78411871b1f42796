"""Files that are read by position, by any thread, while others may rewrite or cut them.

A mapped file that is cut ends the process by a signal. Reading by position costs one copy, and what is missing is an
error that names the file.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np


class OpenFile:
    """A regular file that is open for reading. It is closed when nobody uses it any more.

    Raises:
        OSError: there is no such file, it may not be read, or it is a pipe, a socket, a device or a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        # Opening a named pipe would otherwise wait for a writer.
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no regular file")
        self.stamp = (status.st_size, status.st_mtime_ns)
        """(size in bytes, modification time in ns) when it was opened."""

    def __del__(self) -> None:
        if hasattr(self, "descriptor") and os is not None:  # which it is while Python ends
            os.close(self.descriptor)

    @property
    def size(self) -> int:
        """The bytes of the file when it was opened."""
        return self.stamp[0]

    def is_unchanged(self) -> bool:
        """Tells whether the file still has the size and the modification time that it had when it was opened."""
        status = os.fstat(self.descriptor)
        return (status.st_size, status.st_mtime_ns) == self.stamp

    def read(self, size: int, position: int) -> bytes:
        """Returns up to ``size`` bytes from a position on; fewer where the file ends."""
        return os.pread(self.descriptor, size, position)

    def read_into(self, array: np.ndarray, position: int) -> bool:
        """Fills a contiguous array with the bytes from a position on. Returns False if the file ends before."""
        left = memoryview(array.reshape(-1).view(np.uint8).data)
        while len(left):  # one call reads at most 2 GiB
            count = os.preadv(self.descriptor, [left], position)
            if count == 0:
                return False
            left, position = left[count:], position + count
        return True
