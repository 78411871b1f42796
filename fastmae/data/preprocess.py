"""Preprocessing: from an image in Python to the pixels that a model takes, as evaluation prepares those of files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmae.data.objects import one_image
from fastmae.data.plan import central_share
from fastmae.data.reading import BadImageError, Reading
from fastmae.data.sample import View, prepared
from fastmae.errors import SettingError
from fastmae.facts import PixelType


@dataclass(frozen=True)
class Preprocessing:
    """How a model's images are prepared in evaluation. Called with an image, it returns what the model takes.

    A file, its bytes and an image of Pillow are resized and cropped as in the official evaluation; an array or a tensor
    [H, W], [H, W, C] or [C, H, W] is resized as a whole. These are the pixels that ``extract_features`` gives to the
    model, bit for bit. They are normalised inside of the model: (pixel − low) / (high − low), minus ``mean``, over
    ``std``.
    """

    reading: Reading
    """How files and numbers become pixels."""
    size: tuple[int, int]
    """(height, width) of the result, in pixels."""
    low: tuple[float, ...]
    """The value of each channel that is taken for 0."""
    high: tuple[float, ...]
    """The value of each channel that is taken for 1."""
    mean: tuple[float, ...]
    """Of each channel, as a share of the range from ``low`` to ``high``."""
    std: tuple[float, ...]

    @property
    def dtype(self) -> PixelType:
        """The type of the pixels."""
        return self.reading.dtype

    @property
    def channels(self) -> int:
        """The channels C of the result."""
        return self.reading.in_chans

    def __call__(self, image: Any) -> torch.Tensor:
        """Returns the pixels of an image, [H, W, C] of ``dtype``.

        Args:
            image: a path, the bytes of a file, an image of Pillow, an array or a tensor.

        Raises:
            UserError: it is no image, or cannot be used.
        """
        return self.batch([image])[0]

    def batch(self, images: Any) -> torch.Tensor:
        """Returns the pixels of several images, [N, H, W, C] of ``dtype``.

        Raises:
            UserError: one is no image, or cannot be used; it is named by its place.
        """
        pixels = np.empty((len(images), *self.size, self.channels), self.dtype)
        for number, image in enumerate(images):
            try:
                data, kind = one_image(image, self.reading.read_as.layout, keeps_floats=self.dtype == "float32")
                share = central_share(kind, self.size)
                pixels[number] = prepared(data, View(self.size, self.reading, central_share=share), None)
            except (BadImageError, ValueError, OSError) as error:
                raise SettingError("images", problem=f"number {number} cannot be used: {error}") from error
        return torch.from_numpy(pixels)
