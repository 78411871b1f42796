"""Trains a segmenter, or segments pictures with one: a label map and an overlay of each."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from fastmae.checkpoint.load import load_segmenter
from fastmae.commands.shared import make_folder
from fastmae.config import SegmentConfig
from fastmae.data.decode import decode
from fastmae.data.reading import BadImageError, Reading
from fastmae.data.stock import count_of
from fastmae.data.suffixes import IMAGE_SUFFIXES
from fastmae.errors import SettingError, UserError
from fastmae.evaluate.pictures import save_png
from fastmae.evaluate.segment import map_picture, overlay, segment_picture, shown_pixels
from fastmae.messages import logger
from fastmae.screen import say
from fastmae.train.parallel import choose_device


def run_segment(config: SegmentConfig) -> int:
    """Trains, or predicts where pictures are given; returns the exit status."""
    if config.predict:
        return _predict(config)
    from fastmae.train.segment import segment

    return segment(config)


def _predict(config: SegmentConfig) -> int:
    """Writes NAME.png, the numbers of classes with a palette, and NAME-overlay.jpg for every picture."""
    model = load_segmenter(config.finetune)
    model.to(choose_device(config.device))
    pictures = _pictures(config.predict)
    folder = Path(config.output_dir)
    make_folder(folder)
    reading = Reading(model.in_chans, dtype=model.pixels.dtype, nodata=model.pixels.nodata, read_as=model.read_as)
    written = 0
    for path, name in pictures:
        try:
            pixels = decode(path.read_bytes(), reading)
        except (BadImageError, OSError) as error:
            logger.warning("%s: %s; it is left out", path, error)
            continue
        classes = segment_picture(model, pixels)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(folder / f"{name}.png", map_picture(classes, model.num_classes))
        over = Image.fromarray(overlay(shown_pixels(pixels), classes, model.num_classes))
        save_png(folder / f"{name}-overlay.png", over)
        written += 1
    if not written:
        raise UserError("none of the pictures can be used; the lines above say why")
    say(f"{folder}: label maps and overlays of {count_of(written, 'pictures')}")
    return 0


def _pictures(given: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Returns the picture files, and what the files about them are called.

    Raises:
        SettingError: there are none, or two would be called the same.
    """
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
                problem = f"{found[name]} and {file} would both be {name}.png; segment them one after another"
                raise SettingError("predict", word, problem)
            found[name] = file
    if not found:
        raise SettingError("predict", " ".join(given), "holds no pictures; give pictures, or folders of pictures")
    return [(path, name) for name, path in found.items()]
