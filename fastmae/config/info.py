"""The settings of info."""

from __future__ import annotations

from dataclasses import dataclass

from fastmae.config.shared import (
    Json,
)


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Show versions, devices, and which backend of what would be used and why."""

    json: Json = False
