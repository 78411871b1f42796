"""The pictures that --predict names, as a model takes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastmae.data.decode import decode
from fastmae.data.reading import BadImageError, Reading
from fastmae.data.suffixes import IMAGE_SUFFIXES
from fastmae.errors import SettingError, UserError
from fastmae.messages import logger
from fastmae.model.segmenter import Segmenter
from fastmae.model.upscaler import Upscaler


def pictures_of(given: tuple[str, ...], model: Segmenter | Upscaler) -> Iterator[tuple[str, np.ndarray]]:
    """Yields pictures, and those in folders: what files about each are called, and its pixels [H, W, C] of the model's
    type. One that cannot be used is left out with a line.

    Raises:
        SettingError: there are none, or two would be called the same.
        UserError: in the end, if none can be used.
    """
    reading = Reading(model.in_chans, dtype=model.pixels.dtype, nodata=model.pixels.nodata, read_as=model.read_as)
    usable = 0
    for name, path in _files(given).items():
        try:
            pixels = decode(path.read_bytes(), reading)
        except (BadImageError, OSError) as error:
            logger.warning("%s: %s; it is left out", path, error)
            continue
        usable += 1
        yield name, pixels
    if not usable:
        raise UserError("none of the pictures can be used; the lines above say why")


def _files(given: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for word in given:
        path = Path(word).expanduser()
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            named = {file.relative_to(path).with_suffix("").as_posix(): file for file in inside}
        elif path.is_file():
            named = {path.stem: path}
        else:
            raise SettingError("predict", word, "is not there; give pictures, or folders of pictures")
        for name, file in named.items():
            if name in found:
                problem = f"{found[name]} and {file} would both be {name}.png; give them one after another"
                raise SettingError("predict", word, problem)
            found[name] = file
    if not found:
        raise SettingError("predict", " ".join(given), "holds no pictures; give pictures, or folders of pictures")
    return found
