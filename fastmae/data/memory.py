"""How much memory this process may still take, on its machine and in its control groups."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

# Of fewer images it is not worth the milliseconds.
MANY_IMAGES = 100_000
# Version 1 of control groups has no word for "no limit"; it gives a number larger than the memory of any machine.
NO_LIMIT = 1 << 60
# In versions 2 and 1: (folder, limit, memory in use, the part of `memory.stat` that the kernel frees when it must).
GROUP_FILES = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(root: Path = Path("/")) -> int | None:
    """Returns the bytes that are free on this machine and in the control groups of this process; None if unknown.

    Args:
        root: the folder with `proc` and `sys`.
    """
    return min([*_left_on_machine(root), *_left_in_groups(root)], default=None)


def _left_on_machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) << 10


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yields the free bytes of the control group of this process, and of each group around it that can be seen."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, limit_file, used_file, freeable = GROUP_FILES[bool(controllers)]
        top = root / folder
        # Inside a container the path may be that of the host; then only the top folder exists.
        own = top / path.lstrip("/")
        for group in (own, *own.parents):
            limit, used = (_number(group / name) for name in (limit_file, used_file))
            if limit is not None and used is not None and limit < NO_LIMIT:
                statistics = dict(line.split() for line in _lines(group / "memory.stat"))
                yield max(0, limit - used + int(statistics.get(freeable, 0)))
            if group == top:
                break


def _number(path: Path) -> int | None:
    """Returns the number in a file; None for another word, such as `max`, and if there is no such file."""
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    """Returns the lines of a file, or none if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def release_after(images: int) -> None:
    """Gives memory that was freed, and that malloc keeps, back to the system, once very many images were gone through.

    What that takes for a moment would stay with every rank: 25 to 60 bytes an image. Nothing is done where the C
    library cannot do it.
    """
    if images < MANY_IMAGES:
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def readable(size: float) -> str:
    """Returns a number of bytes for people: "3.2 GiB"."""
    for unit, name, digits in ((1 << 30, "GiB", 1), (1 << 20, "MiB", 1), (1 << 10, "KiB", 0)):
        if size >= unit:
            return f"{size / unit:.{digits}f} {name}"
    return f"{size:.0f} bytes"
