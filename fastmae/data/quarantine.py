"""Images that could not be used: each listed once, with the reason, in the run folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from fastmae.data.loader import Skipped
from fastmae.errors import UserError


class Quarantine:
    """A JSON-lines file of skipped images that survives restarts of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._known = {json.loads(line)["index"] for line in lines if line.endswith("}")}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Lists those that are not listed yet.

        Raises:
            UserError: the file cannot be written.
        """
        fresh = {bad.index: bad for bad in skipped if bad.index not in self._known}
        if not fresh:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(dataclasses.asdict(bad)) + "\n" for bad in fresh.values())
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error}); free space, then use --resume auto") from error
        self._known |= fresh.keys()
