"""The settings of info."""

from __future__ import annotations

from dataclasses import dataclass

from fastmae.config.shared import Json
from fastmae.config.values import coerce


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Show versions, devices, and which backends a run would use and why."""

    json: Json = False

    def __post_init__(self) -> None:
        coerce(self)
