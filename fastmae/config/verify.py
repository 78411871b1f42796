"""The settings of verify."""

from __future__ import annotations

from dataclasses import dataclass

from fastmae.config.shared import Workers, need_at_least_one


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Read and decode every image as a run would, and name what it could not use. Exit status 1 if there is any."""

    data_path: tuple[str, ...]
    """One or several, of every kind that --data_path of pretrain takes; their val parts are checked too."""
    in_chans: int | None = None
    """Channels of the model to be trained. Default: as pretrain chooses, those of the data."""
    num_workers: Workers = None
    output: str | None = None
    """A file for all that is unusable: JSON lines of part, index, name and reason."""


def check_verify(config: VerifyConfig) -> None:
    """Refuses numbers that cannot work.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    need_at_least_one(config, "in_chans", "num_workers")
