"""What the formats share: their libraries, limits that are checked before anything is allocated, pages as channels."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Iterable
from types import ModuleType

import numpy as np

from fastmae.data.reading import BadImageError, check_pixels
from fastmae.errors import install_hint

MAX_BYTES = 2 << 30
"""An image of which all bands together take more is refused."""
MAX_CHANNELS = 1024
"""A file of more pages is not read as one image with a channel each: to read a small page takes milliseconds."""
MAX_PAGES = 1_000_000
"""A file that claims more pages than this is refused."""


def library(name: str, what: str, extra: str = "science") -> ModuleType:
    """Imports what reads a format, and silences its own messages, as ours say what is wrong.

    Raises:
        BadImageError: it is not installed; the message says how to install it.
    """
    try:
        return _imported(name)
    except ImportError as error:
        raise BadImageError(f"{what} is read by {name.split('.')[0]}; run {install_hint(extra)}") from error


@functools.cache
def _imported(name: str) -> ModuleType:
    module, root = importlib.import_module(name), name.split(".")[0]
    logging.getLogger(root).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=rf"{root}(\.|$)")
    return module


def check_size(height: int, width: int, bands: int, itemsize: int) -> None:
    """Refuses an image by the size that its header claims, before anything is allocated for it.

    Raises:
        BadImageError: nothing, or too much.
    """
    if min(height, width, bands) < 1:
        raise BadImageError(f"an image of {width}×{height} pixels and {bands} bands")
    check_pixels(height, width)
    if height * width * bands * itemsize > MAX_BYTES:
        size = f"{width}×{height} pixels of {bands} bands of {8 * itemsize} bits"
        raise BadImageError(f"{size}, over the limit of {MAX_BYTES >> 30} GiB; cut it into tiles")


def check_pages(count: int) -> None:
    """Refuses a file that claims an absurd number of pages.

    Raises:
        BadImageError: more than ``MAX_PAGES``.
    """
    if count > MAX_PAGES:
        raise BadImageError(f"{count:,} pages, over the limit of {MAX_PAGES:,}")


def as_channels(pages: Iterable[np.ndarray], count: int) -> np.ndarray:
    """Returns ``count`` pages [H, W, c] as one image [H, W, count · c].

    Raises:
        BadImageError: they differ in size or type, or are too many or too much together.
    """
    if count > MAX_CHANNELS:
        raise BadImageError(f"{count:,} pages as channels, over the limit of {MAX_CHANNELS:,}; set pages to all")
    found: list[np.ndarray] = []
    for number, page in enumerate(pages, 1):
        found.append(page)
        if page.shape != found[0].shape or page.dtype != found[0].dtype:
            raise BadImageError(f"page {number} has another size or type than page 1, so they are no channels")
        height, width, bands = page.shape
        check_size(height, width, bands * count, page.itemsize)
    return found[0] if count == 1 else np.concatenate(found, axis=2)
