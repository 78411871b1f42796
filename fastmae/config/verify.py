"""The settings of verify."""

from __future__ import annotations

from dataclasses import dataclass

from fastmae.config.images import ImagesConfig, check_images
from fastmae.config.shared import Workers
from fastmae.config.values import coerce, need_at_least_one


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(ImagesConfig):
    """Read and decode every image as a run would, and list those that it could not use. The exit status is 1 if there
    are any."""

    data_path: tuple[str, ...]
    """The images: one or several paths, of every kind that --data_path of pretrain takes. Their val parts are checked
    as well."""
    in_chans: int | None = None
    """Channels of the model that will be trained. Default: as many as the data have."""
    num_workers: Workers = None
    output: str | None = None
    """A file in which every unusable image is listed: lines of JSON with part, index, name and reason."""
    report: str | None = None
    """A file for one page of HTML that shows what was found: formats, values, histograms, pictures, copies, notes and
    what is unusable. It needs nothing else, and no network."""

    def __post_init__(self) -> None:
        coerce(self)
        check_verify(self)


def check_verify(config: VerifyConfig) -> None:
    """Refuses numbers that cannot work.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    need_at_least_one(config, "in_chans", "num_workers")
    check_images(config)
