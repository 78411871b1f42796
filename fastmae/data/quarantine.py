"""Images that could not be used: each listed once, with the reason, in the run folder; too many of them end the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from fastmae.data.sample import Skipped
from fastmae.errors import UserError
from fastmae.files import JsonLines

TOLERATED = 20
"""So many different unusable images are no reason to stop, however few the data are."""
EXAMPLES = 3


class Quarantine:
    """A JSON-lines file of skipped images that survives restarts of the run.

    Args:
        path: the file.
        max_corrupt: the largest share of the images read since the start of the process that may be unusable.
    """

    def __init__(self, path: Path, max_corrupt: float = 1.0) -> None:
        self.path = path
        self._lines = JsonLines(path)
        self._max_corrupt = max_corrupt
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._known = {json.loads(line)["index"] for line in lines if line.endswith("}")}
        self._met: dict[int, Skipped] = {}
        self._bad, self._read = 0, 0

    def __len__(self) -> int:
        return len(self._known)

    def add(self, skipped: Sequence[Skipped], good: int) -> None:
        """Lists those that are not listed yet, met while ``good`` usable images were read.

        Raises:
            UserError: too many of the images are unusable.
        """
        fresh = {bad.index: bad for bad in skipped if bad.index not in self._known}
        self._lines.add(map(dataclasses.asdict, fresh.values()))
        self._known |= fresh.keys()
        self._bad += len(skipped)
        self._read += len(skipped) + good
        self._met |= {bad.index: bad for bad in skipped}
        if len(self._met) > TOLERATED and self._bad > self._max_corrupt * self._read:
            examples = ", ".join(f"{bad.name} ({bad.reason})" for bad in list(self._met.values())[:EXAMPLES])
            raise UserError(
                f"{self._bad} of {self._read} images that were read cannot be used, over --max_corrupt "
                f"{self._max_corrupt:g}: {examples}; all are in {self.path}: mend the data, or raise --max_corrupt and "
                "use --resume auto"
            )
