"""The settings of inpaint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fastmae.config.shared import Device, ReadingConfig, WithDecoder, check_reading
from fastmae.config.values import coerce, need, need_at_least_one, need_seed

OUTPUTS = (".png", ".tif", ".tiff", ".npy")
"""The formats that keep every pixel as it is."""


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(ReadingConfig):
    """Fill the holes of a picture of any size with what a model predicts; every other pixel keeps its bits."""

    checkpoint: WithDecoder
    image: Annotated[str, Positional, arg(metavar="IMAGE", help="The picture: an image file, or a .npy array [H, W] or "
                                                                "[H, W, C].")]  # fmt: skip
    mask: str
    """Where the holes are: a picture or a .npy array of the same height and width, not zero in holes."""
    output: str
    """The file to write: .png, .tif, .tiff or .npy, which keep every pixel."""
    mask_ratio: float | None = None
    """The share of the patches of a tile that the model does not see: those that a hole touches, and random others.
    Where holes touch more, only those. Default: the usual ratio of the family."""
    rounds: int = 8
    """A hole gets the mean of this many predictions, each of which sees other patches."""
    overlap: float = 0.5
    """The share of a tile that the next one covers as well."""
    seed: int = 0
    """The number from which the random patches follow."""
    device: Device = None

    def __post_init__(self) -> None:
        coerce(self)
        check_reading(self)
        need_at_least_one(self, "rounds")
        need_seed(self)
        need(self, 0 <= self.overlap < 1, "overlap", "a share from 0 to below 1")
        need(self, self.mask_ratio is None or 0 < self.mask_ratio < 1, "mask_ratio", "above 0 and below 1")
        lossless = "a name that ends in .png, .tif, .tiff or .npy: other formats would change visible pixels"
        need(self, Path(self.output).suffix.lower() in OUTPUTS, "output", lossless)
        same = Path(self.image).absolute() == Path(self.output).absolute()
        need(self, not same, "output", "another file than the picture")
