"""The settings of runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from fastmae.config.shared import Json
from fastmae.config.values import coerce
from fastmae.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """List run folders and compare them: how far they are, what they reached, and which settings differ."""

    folders: Annotated[
        tuple[str, ...],
        Positional,
        arg(metavar="DIR", help="Run folders, or folders with run folders somewhere below."),
    ]
    sort: str | None = None
    """Sort by a column or a setting, the best first: large accuracies, small losses; other values by rising order.
    Default: by the path."""
    json: Json = False
    csv: bool = False
    """Print comma-separated values, with every column and every setting that differs."""

    def __post_init__(self) -> None:
        coerce(self)
        if not self.folders:
            raise SettingError("folders", problem="must name at least one")
        if self.json and self.csv:
            raise SettingError("csv", problem="must be left out with --json")
