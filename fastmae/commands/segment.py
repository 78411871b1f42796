"""Trains a segmenter, or segments pictures with one: a label map and an overlay of each."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from fastmae.checkpoint.load import load_segmenter
from fastmae.commands.pictures import pictures_of
from fastmae.commands.shared import make_folder
from fastmae.config import SegmentConfig
from fastmae.data.stock import count_of
from fastmae.evaluate.pictures import save_png
from fastmae.evaluate.segment import map_picture, overlay, segment_picture, shown_pixels
from fastmae.screen import say
from fastmae.train.parallel import choose_device


def run_segment(config: SegmentConfig) -> int:
    """Trains, or predicts where pictures are given; returns the exit status."""
    if config.predict:
        return _predict(config)
    from fastmae.train.segment import segment

    return segment(config)


def _predict(config: SegmentConfig) -> int:
    """Writes NAME.png, the numbers of classes with a palette, and NAME-overlay.png for every picture."""
    model = load_segmenter(config.finetune)
    model.to(choose_device(config.device))
    folder = Path(config.output_dir)
    make_folder(folder)
    written = 0
    for name, pixels in pictures_of(config.predict, model):
        classes = segment_picture(model, pixels)
        save_png(folder / f"{name}.png", map_picture(classes, model.num_classes))
        over = Image.fromarray(overlay(shown_pixels(pixels), classes, model.num_classes))
        save_png(folder / f"{name}-overlay.png", over)
        written += 1
    say(f"{folder}: label maps and overlays of {count_of(written, 'pictures')}")
    return 0
