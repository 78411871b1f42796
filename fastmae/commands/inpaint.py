"""Fills the holes of a picture, and writes it with every other pixel as it was."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from fastmae.checkpoint.load import lacks_decoder, open_checkpoint
from fastmae.commands.shared import make_folder
from fastmae.config import InpaintConfig
from fastmae.data.decode import decode
from fastmae.data.reading import BadImageError, Reading
from fastmae.errors import SettingError, UserError, in_one_line
from fastmae.evaluate.inpaint import Inpainting, inpaint_picture
from fastmae.files import write_whole
from fastmae.screen import say
from fastmae.train.parallel import choose_device

UNREADABLE = (OSError, ValueError, EOFError, SyntaxError, Image.DecompressionBombError)
PLAIN = ("L", "RGB", "I;16", "F")
"""The modes of Pillow whose pixels are written as they were read."""


def run_inpaint(config: InpaintConfig) -> int:
    """Fills the holes of ``config.image`` and writes ``config.output``."""
    opened = open_checkpoint(config.checkpoint, config)
    if not opened.has_decoder:
        raise UserError(lacks_decoder(config.checkpoint, opened))
    model = opened.model
    if not model.has_pictures:
        raise UserError(f"{config.checkpoint}: predicts rows of tables, not pictures; fastmae impute fills cells")
    model = model.to(choose_device(config.device))
    own = _own_pixels(config.image)
    reading = Reading(model.in_chans, dtype=model.pixels.dtype, nodata=model.pixels.nodata, read_as=model.read_as)
    pixels = _as_model_reads(config.image, own, reading)
    hole = _hole(config.mask, own.shape[:2])
    output = Path(config.output)
    _check_output(output, own)
    make_folder(output.parent)
    how = Inpainting(config.mask_ratio or model.usual_ratio, config.rounds, config.overlap, config.seed)
    try:
        model.num_visible(how.mask_ratio)
    except ValueError as error:
        raise SettingError("mask_ratio", how.mask_ratio, f"{error}; choose another ratio") from error
    filled = inpaint_picture(model, pixels, hole, how)
    result = own.copy()
    result[hole] = _back(filled[hole], own)
    try:
        write_whole(output, lambda file: _write(file, output.suffix.lower(), result))
    except OSError as error:
        raise SettingError("output", str(output), f"cannot be written ({error}); name another file") from error
    said = ", norm_pix: mean and contrast of holes are continued from around them" if model.norm_pix_loss else ""
    say(f"{output}: {int(hole.sum()):,} of {hole.size:,} pixels filled, the others as they were{said}")
    return 0


def _own_pixels(path: str) -> np.ndarray:
    """Reads the pixels of a picture as its file holds them, [H, W] or [H, W, C].

    Raises:
        SettingError: it cannot be read, or is of a kind that cannot be written with the same pixels.
    """
    file = Path(path).expanduser()
    try:
        if file.suffix.lower() == ".npy":
            pixels = np.load(file, allow_pickle=False)
        else:
            with Image.open(file) as picture:
                if picture.mode not in PLAIN:
                    problem = f"has the mode {picture.mode}; give gray or RGB without alpha or palette, or a .npy array"
                    raise SettingError("image", path, problem)
                pixels = np.asarray(picture)
    except SettingError:
        raise
    except UNREADABLE as error:
        reason = in_one_line(" ".join(str(error).split()), 200)
        raise SettingError("image", path, f"cannot be read ({reason}); give a picture, or a .npy array") from error
    if pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise SettingError("image", path, f"has the shape {list(pixels.shape)}; give one picture [H, W] or [H, W, C]")
    return pixels


def _as_model_reads(path: str, own: np.ndarray, reading: Reading) -> np.ndarray:
    """Returns the pixels [H, W, C] for the model, which are those of the file.

    Raises:
        SettingError: the model takes other types or channels, or would read other pixels than the file holds.
    """
    file = Path(path).expanduser()
    bands = own[..., None] if own.ndim == 2 else own
    try:
        pixels = decode(bands if file.suffix.lower() == ".npy" else file.read_bytes(), reading)
    except (BadImageError, OSError) as error:
        problem = f"cannot be used ({error}); give a picture of the model's type ({reading.dtype})"
        raise SettingError("image", path, problem) from error
    same_size = pixels.shape[:2] == bands.shape[:2] and bands.shape[2] in (1, pixels.shape[2])
    if not same_size or not np.array_equal(
        pixels, np.broadcast_to(bands, pixels.shape), equal_nan=own.dtype.kind == "f"
    ):
        problem = f"is read by this model as other pixels than the file holds ({own.dtype}, {bands.shape[2]} channels)"
        raise SettingError("image", path, f"{problem}; give a picture of {reading.in_chans} channels, {reading.dtype}")
    return pixels


def _back(values: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Returns filled pixels [n, C] in the channels and the type of the picture's own."""
    if own.ndim == 3 and own.shape[2] == values.shape[1]:
        return values.astype(own.dtype)
    gray = values.mean(axis=1)  # a model of colours filled a gray picture
    gray = gray if own.dtype.kind == "f" else gray.round()
    return gray.astype(own.dtype).reshape(-1, *own.shape[2:])


def _hole(path: str, size: tuple[int, ...]) -> np.ndarray:
    """Reads a mask: bool [H, W], true where it is not zero.

    Raises:
        SettingError: it cannot be read, is of another size, or has no hole, or nothing but a hole.
    """
    file = Path(path).expanduser()
    try:
        if file.suffix.lower() == ".npy":
            mask = np.load(file, allow_pickle=False) != 0
        else:
            with Image.open(file) as picture:
                mask = (
                    np.asarray(picture if picture.mode in ("1", "L", "P", "I;16", "I") else picture.convert("L")) != 0
                )
    except UNREADABLE as error:
        reason = in_one_line(" ".join(str(error).split()), 200)
        raise SettingError("mask", path, f"cannot be read ({reason}); give a picture, or a .npy array") from error
    mask = mask[..., 0] if mask.ndim == 3 and mask.shape[2] == 1 else mask
    if mask.shape != size:
        held, needed = ("×".join(map(str, shape)) for shape in (mask.shape, size))
        raise SettingError("mask", path, f"is of {held} pixels for a picture of {needed}; give one of its size")
    if mask.all() or not mask.any():
        said = "has no pixel that is not zero" if not mask.any() else "is not zero anywhere it could be visible"
        raise SettingError("mask", path, f"{said}; give one that is zero at visible pixels, and not zero in holes")
    return mask


def _check_output(output: Path, own: np.ndarray) -> None:
    """Refuses a format that cannot hold the pixels.

    Raises:
        SettingError: name another ending.
    """
    suffix = output.suffix.lower()
    bands = 1 if own.ndim == 2 else own.shape[2]
    wide = own.dtype != np.uint8
    fits = suffix == ".npy" or (own.dtype == np.uint8 and bands in (1, 3)) or (own.dtype == np.uint16 and bands == 1)
    if not fits and not (suffix != ".png" and own.dtype == np.float32 and bands == 1):
        what = f"{own.dtype} of {bands} channel{'s' * (bands > 1)}"
        problem = f"cannot hold {what}; {'name a .npy file' if bands > 1 or not wide else 'name a .npy or .tif file'}"
        raise SettingError("output", str(output), problem)


def _write(file: BinaryIO, suffix: str, pixels: np.ndarray) -> None:
    if suffix == ".npy":
        np.save(file, pixels)
        return
    held = io.BytesIO()
    flat = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    Image.fromarray(flat).save(held, "PNG" if suffix == ".png" else "TIFF")
    file.write(held.getvalue())
