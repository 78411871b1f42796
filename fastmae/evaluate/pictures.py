"""Pictures: rows of images under a title, confusion matrices, heat maps. This module knows pixels and no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastmae.errors import UserError
from fastmae.files import write_whole
from fastmae.screen import printable

CELL = 96
MARGIN = 6
TEXT = 14
SMALL_TEXT = 10
MATRIX = 480
READABLE = 20
# From the lowest to the highest value: black, purple, red, yellow, white.
HEAT = np.array([[0, 0, 0], [90, 15, 110], [215, 50, 45], [250, 200, 40], [255, 255, 255]], np.float64)
BLUE = np.array([[255, 255, 255], [150, 190, 230], [10, 50, 120]], np.float64)


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Makes pixels [H, W, C] ready for a screen: gray is repeated, and only the first 3 of more channels are shown."""
    return np.ascontiguousarray(image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2))


def coloured(values: np.ndarray, colours: np.ndarray = HEAT) -> np.ndarray:
    """Colours numbers in [0, 1] of any shape: uint8 [..., 3], interpolated between ``colours``."""
    position = np.clip(np.nan_to_num(values), 0, 1) * (len(colours) - 1)
    low = np.minimum(position.astype(int), len(colours) - 2)
    share = (position - low)[..., None]
    return np.rint(colours[low] * (1 - share) + colours[low + 1] * share).astype(np.uint8)


def grid_picture(
    rows: Sequence[Sequence[np.ndarray]],
    title: str,
    names: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
) -> Image.Image:
    """Draws rows of images uint8 [H, W, C] of one size; small ones are enlarged.

    Args:
        rows: the images of each row.
        title: a line above all rows.
        names: one name per row, drawn to its left.
        captions: one text per image, drawn below it.
    """
    title, names = printable(title), [printable(name) for name in names]
    height, width = rows[0][0].shape[:2]
    zoom = max(1, round(CELL / max(height, width)))
    cell_width, cell_height = width * zoom + MARGIN, height * zoom + MARGIN + (SMALL_TEXT + MARGIN if captions else 0)
    font, small = ImageFont.load_default(TEXT), ImageFont.load_default(SMALL_TEXT)
    gutter = max(round(font.getlength(name)) for name in names) + 2 * MARGIN if names else MARGIN
    columns = max(map(len, rows))
    total = max(gutter + columns * cell_width, round(font.getlength(title)) + 2 * MARGIN)
    top = TEXT + 2 * MARGIN
    picture = Image.new("RGB", (total, top + len(rows) * cell_height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN // 2), title, fill="black", font=font)
    for r, images in enumerate(rows):
        y = top + r * cell_height
        if names:
            draw.text((MARGIN, y + (height * zoom - TEXT) // 2), names[r], fill="black", font=font)
        for n, image in enumerate(images):
            x = gutter + n * cell_width
            tile = Image.fromarray(as_rgb(image)).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            picture.paste(tile, (x, y))
            if captions:
                text = _cut(captions[r][n], small, cell_width)
                draw.text((x, y + height * zoom + MARGIN // 2), text, fill="black", font=small)
    return picture


def confusion_picture(tables: Mapping[str, np.ndarray], classes: Sequence[str], title: str) -> Image.Image:
    """Draws confusion matrices side by side, each row shaded by its shares; numbers and names if they are readable."""
    title, classes = printable(title), [printable(name) for name in classes]
    count = len(classes)
    side = max(1, min(32, MATRIX // count))
    font, small = ImageFont.load_default(TEXT), ImageFont.load_default(SMALL_TEXT)
    is_readable = count <= READABLE
    gutter = max(round(small.getlength(_cut(name, small, CELL))) for name in classes) if is_readable else 0
    panel = gutter + side * count + 4 * MARGIN
    top = 2 * (TEXT + 2 * MARGIN)
    note = "rows: the true class, columns: what it was taken for"
    width = max(len(tables) * panel, *(round(font.getlength(text)) + 2 * MARGIN for text in (title, note)))
    picture = Image.new("RGB", (width, top + side * count + TEXT + 3 * MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN // 2), title, fill="black", font=font)
    draw.text((MARGIN, top + side * count + MARGIN), note, fill="black", font=font)
    for number, (name, table) in enumerate(tables.items()):
        left = number * panel + gutter + 2 * MARGIN
        draw.text((left, TEXT + 2 * MARGIN), name, fill="black", font=font)
        share = table / np.maximum(1, table.sum(axis=1, keepdims=True))
        cells = Image.fromarray(coloured(share, BLUE)).resize((side * count, side * count), Image.Resampling.NEAREST)
        picture.paste(cells, (left, top))
        for row in range(count if is_readable else 0):
            y = top + row * side + (side - SMALL_TEXT) // 2
            draw.text((left - gutter - MARGIN, y), _cut(classes[row], small, CELL), fill="black", font=small)
            for column in np.flatnonzero(table[row]).tolist():
                ink = "white" if share[row, column] > 0.5 else "black"
                draw.text((left + column * side + 3, y), str(table[row, column]), fill=ink, font=small)
    return picture


def save_png(path: Path, picture: Image.Image) -> None:
    """Writes a picture.

    Raises:
        UserError: the file cannot be written.
    """
    _write(path, lambda file: picture.save(file, format="PNG"))


def save_gif(path: Path, pictures: Sequence[Image.Image], seconds: float) -> None:
    """Writes pictures as an endless film that shows each of them for ``seconds``.

    Raises:
        UserError: the file cannot be written.
    """
    width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    first, *others = (
        ImageOps.expand(picture, (0, 0, width - picture.width, height - picture.height), "white")
        for picture in pictures
    )
    settings = dict(save_all=True, append_images=others, duration=round(1000 * seconds), loop=0)
    _write(path, lambda file: first.save(file, format="GIF", **settings))


def _write(path: Path, write: Callable[[BinaryIO], None]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}); free space or name another file") from error


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cuts a text to the end that fits: the end of a path says more than its beginning."""
    text = printable(text)
    while len(text) > 1 and font.getlength(text) > width:
        text = "…" + text[2:]
    return text
