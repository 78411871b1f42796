"""The lock of a run folder: one process at a time trains into it, on whatever machine."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import socket
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastmae.checkpoint.restore import on_main
from fastmae.errors import SettingError
from fastmae.files import read_json
from fastmae.messages import logger

LOCK = "run.lock"
PATIENCE = 2.0
"""Seconds that a lock is waited for: a large process that was just killed holds it until its memory is given back."""

_JOBS = {"SLURM_JOB_ID": "SLURM", "PBS_JOBID": "PBS", "LSB_JOBID": "LSF", "JOB_ID": "Grid Engine"}


@contextmanager
def owned(folder: Path) -> Generator[None]:
    """Holds a run folder while entered, so that no other process trains into it. All ranks enter it.

    The main rank takes a lock of the kernel on ``run.lock``, on a shared file system for all machines. The kernel
    releases it when the process ends, however it ends. The file says who holds it, and is empty when nobody does.

    Raises:
        UserError: another process holds the folder, or it cannot be written. All ranks raise it.
    """
    lock = _Lock(folder)
    on_main(lock.take)
    try:
        yield
    finally:
        lock.release()


class _Lock:
    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / LOCK
        self._made: list[Path] = []  # folders that are removed if nothing is written into them
        self._descriptor: int | None = None

    def take(self) -> None:
        """Makes the folder and takes the lock.

        Raises:
            SettingError: it is held, or the folder cannot be written.
        """
        try:
            self._made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
            self._folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._locked()
        except OSError as error:
            problem = f"cannot be written ({error}); name another"
            raise SettingError("output_dir", str(self._folder), problem) from error
        _HELD.add(self._descriptor)
        _release_in_children()
        former = self._holder()
        if former is not None and former["host"] != socket.gethostname():
            text = "%s: %s has not ended as it should; if it still trains, end it: locks do not reach its machine"
            logger.warning(text, self._folder, _named(former))
        with suppress(OSError):  # a full disk: the lock holds without words
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(_this_process()).encode(), 0)

    def release(self) -> None:
        """Lets go of what this process holds, and removes a folder in which nothing came to lie."""
        if self._descriptor is None:
            return
        with suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            if os.listdir(self._folder) == [LOCK]:
                self._path.unlink()
                for folder in self._made:
                    folder.rmdir()
        _HELD.discard(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None

    def _locked(self) -> int:
        """Returns a descriptor of the lock file, with the lock."""
        give_up = time.monotonic() + PATIENCE
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(self._path, flags, 0o666)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError(errno.EINVAL, "is not a file", str(self._path))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    text = "%s: the file system has no locks (%s), so make sure that no other process trains into it"
                    logger.warning(text, self._folder, error.strerror)
                    return descriptor
                os.close(descriptor)
                if time.monotonic() > give_up:
                    holder = _named(self._holder())
                    problem = f"is in use by {holder}; wait for it, end it, or name another folder"
                    raise SettingError("output_dir", str(self._folder), problem) from None
                time.sleep(0.1)
                continue
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                    return descriptor
            os.close(descriptor)  # the file was removed meanwhile, and a lock on it keeps nobody out

    def _holder(self) -> dict[str, Any] | None:
        """Returns what the file says of the process that wrote it; None if it says nothing."""
        try:
            holder = read_json(self._path)
        except (OSError, ValueError):
            return None
        is_ours = isinstance(holder, dict) and {"host", "pid", "job", "since"} <= holder.keys()
        return holder if is_ours else None


_HELD: set[int] = set()
"""The descriptors with which this process holds locks. Forked children would hold them, too, and outlive it."""


@functools.cache
def _release_in_children() -> None:
    def release() -> None:
        for descriptor in _HELD:
            os.close(descriptor)
        _HELD.clear()

    os.register_at_fork(after_in_child=release)


def _named(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return f"another process ({LOCK} does not say which)"
    job = f", job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"


def _this_process() -> dict[str, Any]:
    job = next((f"{os.environ[name]} of {system}" for name, system in _JOBS.items() if os.environ.get(name)), None)
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "since": since}
