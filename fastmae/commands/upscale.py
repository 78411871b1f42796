"""Trains an upscaler, or makes pictures larger with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastmae.checkpoint.load import load_upscaler
from fastmae.commands.pictures import pictures_of
from fastmae.commands.shared import make_folder
from fastmae.config import UpscaleConfig
from fastmae.data.stock import count_of
from fastmae.errors import UserError
from fastmae.evaluate.pictures import save_png
from fastmae.evaluate.upscale import upscale_picture
from fastmae.files import write_whole
from fastmae.screen import say
from fastmae.train.parallel import choose_device


def run_upscale(config: UpscaleConfig) -> int:
    """Trains, or enlarges pictures where they are given; returns the exit status."""
    if config.predict:
        return _predict(config)
    from fastmae.train.upscale import upscale

    return upscale(config)


def _predict(config: UpscaleConfig) -> int:
    """Writes each picture, larger, as NAME.png; as NAME.npy what PNG cannot hold."""
    model = load_upscaler(config.finetune)
    model.to(choose_device(config.device))
    folder = Path(config.output_dir)
    make_folder(folder)
    written = arrays = 0
    for name, pixels in pictures_of(config.predict, model):
        larger = upscale_picture(model, pixels)
        flat = larger[..., 0] if larger.shape[2] == 1 else larger
        if (flat.dtype == np.uint8 and flat.shape[2:] in ((), (3,))) or (flat.dtype == np.uint16 and flat.ndim == 2):
            save_png(folder / f"{name}.png", Image.fromarray(flat))
        else:
            _save_array(folder / f"{name}.npy", larger)
            arrays += 1
        written += 1
    kept = f", of which {arrays} as .npy, as PNG cannot hold {larger.dtype} of {larger.shape[2]} channels"
    say(f"{folder}: {count_of(written, 'pictures')}, {model.scale} times as large{kept if arrays else ''}")
    return 0


def _save_array(path: Path, pixels: np.ndarray) -> None:
    """Raises:
    UserError: the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: np.save(file, pixels))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); free space or name another folder") from error
