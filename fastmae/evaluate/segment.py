"""Segmenting pictures of any size with a model that has learnt it, how good that is, and what it looks like."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastmae.data.label_maps import IGNORED
from fastmae.data.plan import Box
from fastmae.data.resize import crop_and_resize
from fastmae.evaluate.pictures import as_rgb, grid_picture
from fastmae.model.segmenter import Segmenter

GOLDEN = 0.618033988749895
COLOUR_SHARE = 0.5
"""How much of an overlay is the colour of the class."""


# --- how good it is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """How well pixels are classified, in percent."""

    miou: float
    """The mean of ``iou`` over the classes that are there."""
    accuracy: float
    """The share of pixels whose class is right."""
    iou: tuple[float, ...]
    """Of each class: pixels that are of it and are said to be, over those that are of it or are said to be (Jaccard);
    NaN of a class that is nowhere."""
    recall: tuple[float, ...]
    """Of each class: the share of its pixels that are said to be of it; NaN of a class without pixels."""


def confusion_of(found: torch.Tensor, maps: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Counts pixels by their class (rows) and by what was found (columns): float64 [classes, classes], whole numbers.

    Pixels that are ``IGNORED`` in ``maps`` count nowhere. Sums of the results are exact up to 2**53.
    """
    counted = maps != IGNORED
    pairs = maps[counted].long() * num_classes + found[counted]
    counts = torch.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes).double()


def scores_of(confusion: np.ndarray) -> Scores:
    """Returns the scores of counts as ``confusion_of`` gives them."""
    right, of_class, said = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, recall = 100 * right / (of_class + said - right), 100 * right / of_class
    miou = float(np.nanmean(iou)) if np.isfinite(iou).any() else 0.0
    accuracy = 100 * float(right.sum() / max(1.0, confusion.sum()))
    return Scores(miou, accuracy, tuple(iou.tolist()), tuple(recall.tolist()))


def lines_of(scores: Scores, classes: Sequence[str]) -> list[str]:
    """Returns a line about each class, for people."""
    names = classes or [f"class {number}" for number in range(len(scores.iou))]
    width = max(map(len, names))
    shown = [["   –  " if value != value else f"{value:6.2f}" for value in row] for row in (scores.iou, scores.recall)]
    return [
        f"{'class' if row == 0 else '':15} {name:{width}}  IoU {iou} %  found {recall} %"
        for row, (name, iou, recall) in enumerate(zip(names, *shown, strict=True))
    ]


# --- pictures of any size ---------------------------------------------------------------------------------------------


@torch.no_grad()
def segment_picture(model: Segmenter, pixels: np.ndarray, overlap: float = 0.5) -> np.ndarray:
    """Returns the class of each pixel of a picture of any size: uint8 [H, W].

    The picture is resized so that it just covers the model's images, as in training at zoom 1; windows of that size
    slide over it, and the logits are averaged where windows overlap, then resized to the picture.

    Args:
        model: in evaluation mode, on its device.
        pixels: [H, W, C] of the model's type.
        overlap: the share of a window that the next one covers as well.
    """
    height, width = pixels.shape[:2]
    rows, columns = model.img_size
    zoom = max(rows / height, columns / width)
    size = max(rows, round(height * zoom)), max(columns, round(width * zoom))
    resized = torch.from_numpy(crop_and_resize(pixels, Box(0, 0, height, width), False, size)).to(model.mean.device)
    total = torch.zeros(model.num_classes, *size, device=model.mean.device)
    windows = torch.zeros(size, device=model.mean.device)
    for top in window_starts(size[0], rows, overlap):
        for left in window_starts(size[1], columns, overlap):
            place = np.s_[top : top + rows, left : left + columns]
            total[:, *place] += model(resized[place][None])[0]
            windows[place] += 1
    best, classes = None, torch.zeros(height, width, dtype=torch.uint8, device=model.mean.device)
    for number, logits in enumerate(total / windows):  # class by class, so that no picture needs much memory
        whole = F.interpolate(logits[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
        if best is None:
            best = whole
        else:
            classes[whole > best] = number
            best = torch.maximum(best, whole)
    return classes.cpu().numpy()


def window_starts(whole: int, window: int, overlap: float) -> list[int]:
    """Returns where windows begin, evenly spaced, so that each overlaps the next by at least this share."""
    count = 1 if whole == window else 1 + -(-(whole - window) // max(1, int(window * (1 - overlap))))
    return np.linspace(0, whole - window, count).round().astype(int).tolist()


# --- what it looks like -----------------------------------------------------------------------------------------------


def palette_of(num_classes: int) -> np.ndarray:
    """Returns a colour for each class, uint8 [256, 3]: evenly spread hues; black for ``IGNORED`` and further ones."""
    colours = np.zeros((256, 3), np.uint8)
    for number in range(num_classes):
        rgb = colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.85, 0.95 - 0.3 * (number % 3) / 2)
        colours[number] = [round(255 * value) for value in rgb]
    return colours


def map_picture(classes: np.ndarray, num_classes: int) -> Image.Image:
    """Returns a label map [H, W] as a picture whose pixels are the numbers of classes, with a palette."""
    picture = Image.fromarray(classes.astype(np.uint8)).convert("P")
    picture.putpalette(palette_of(num_classes).reshape(-1).tolist())
    return picture


def overlay(pixels: np.ndarray, classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns an image uint8 [H, W, C] with the colours of classes [H, W] laid over it: uint8 [H, W, 3]."""
    colours = palette_of(num_classes)[classes]
    mixed = (1 - COLOUR_SHARE) * as_rgb(pixels) + COLOUR_SHARE * colours
    return np.where((classes == IGNORED)[..., None], as_rgb(pixels), mixed.round().astype(np.uint8))


def shown_pixels(pixels: np.ndarray) -> np.ndarray:
    """Returns pixels [H, W, C] of any type as uint8 for a screen: wider ones from their smallest to their largest."""
    if pixels.dtype == np.uint8:
        return pixels
    low, high = np.nanmin(pixels), np.nanmax(pixels)
    return np.nan_to_num(255 * (pixels - low) / max(float(high - low), 1e-12)).astype(np.uint8)


def overlay_grid(drawn: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], num_classes: int) -> Image.Image:
    """Draws (image, label map, what was found) one below the other."""
    images = [shown_pixels(image) for image, _, _ in drawn]
    rows = [
        images,
        [overlay(image, maps, num_classes) for image, (_, maps, _) in zip(images, drawn, strict=True)],
        [overlay(image, found, num_classes) for image, (_, _, found) in zip(images, drawn, strict=True)],
    ]
    return grid_picture([[as_rgb(image) for image in row] for row in rows], "", ("image", "label map", "found"))
