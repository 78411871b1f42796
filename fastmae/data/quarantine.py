"""The quarantine: a list in the run folder of images that could not be used, each once and with the reason.

Too many of them end the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fastmae.data.sample import Skipped
from fastmae.data.stock import count_of
from fastmae.errors import SettingError
from fastmae.files import JsonLines, read_rows
from fastmae.messages import logger

TOLERATED = 20
"""This many different unusable images never end a run, even if the data are few."""
EXAMPLES = 3
"""Unusable images that the error names."""


class Quarantine:
    """A JSON-lines file of skipped images that survives restarts of the run.

    Args:
        path: the file.
        max_corrupt: the largest share that unusable images may have among those read since the process started.
    """

    def __init__(self, path: Path, max_corrupt: float = 1.0) -> None:
        self.path = path
        self._lines = JsonLines(path)
        self._max_corrupt = max_corrupt
        self._listed = _listed(path)
        self._seen: dict[int, Skipped] = {}  # since the process started
        self._unusable, self._read = 0, 0

    def __len__(self) -> int:
        return len(self._listed)

    def add(self, skipped: Sequence[Skipped], good: int) -> None:
        """Lists unusable images that are not listed yet.

        Args:
            skipped: images that could not be used.
            good: how many usable images were read at the same time.

        Raises:
            SettingError: too many of the images are unusable.
        """
        new = {bad.index: bad for bad in skipped if bad.index not in self._listed}
        self._lines.add(map(dataclasses.asdict, new.values()))
        self._listed |= new.keys()
        self._unusable += len(skipped)
        self._read += len(skipped) + good
        self._seen |= {bad.index: bad for bad in skipped}
        if len(self._seen) > TOLERATED and self._unusable > self._max_corrupt * self._read:
            examples = ", ".join(f"{bad.name} ({bad.reason})" for bad in list(self._seen.values())[:EXAMPLES])
            problem = (
                f"{self._unusable} of {self._read} images that were read cannot be used, such as {examples}; all are "
                f"in {self.path}: mend the data, or raise --max_corrupt and use --resume=auto"
            )
            raise SettingError("max_corrupt", self._max_corrupt, problem)


def _listed(path: Path) -> set[int]:
    """Returns the images that a file lists. What of it cannot be read is told, and those images are listed again."""
    try:
        rows, damaged = read_rows(path)
    except OSError as error:
        logger.warning("%s: cannot be read (%s); unusable images are not listed", path, error.strerror)
        return set()
    indices = {row["index"] for row in rows if isinstance(row.get("index"), int)}
    damaged += sum(not isinstance(row.get("index"), int) for row in rows)
    if damaged:
        text = "%s: %s passed over; what they list is listed again"
        logger.warning(text, path, count_of(damaged, "damaged lines"))
    return indices
