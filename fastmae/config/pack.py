"""The settings of pack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional

from fastmae.config.images import ImagesConfig, check_images
from fastmae.config.shared import Workers
from fastmae.config.values import coerce, need_at_least_one, need_seed, need_utf8


@dataclass(frozen=True, kw_only=True)
class PackConfig(ImagesConfig):
    """Write any data that fastmae reads into tar shards, with labels and a manifest of checksums. Image files
    keep their bytes, arrays and slices of volumes become TIFF of the same numbers. A pack that was stopped goes on
    where it was when the command is given again."""

    data_path: Annotated[str, Positional]
    """The images, as --data_path of pretrain. A val part is packed as well."""
    output: Annotated[str, Positional]
    """The folder for train-000000.tar …, val-000000.tar … and fastmae-pack.json. It is made if it is not there."""
    shard_mb: int = 256
    """The size of a shard in MB, about."""
    order: Literal["shuffled", "kept"] = "shuffled"
    """The order of the images in the shards: shuffled, so that neighbours are strangers in every epoch that reads the
    shards, or that of the data."""
    seed: int = 0
    """The number from which the shuffled order follows."""
    num_workers: Workers = None

    def __post_init__(self) -> None:
        coerce(self)
        need_at_least_one(self, "shard_mb", "num_workers")
        need_seed(self)
        need_utf8(self, "output")
        check_images(self)
