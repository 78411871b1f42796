"""A map of points, drawn by matplotlib: all points by class, and beside them pictures or names of some of them.

Nothing here knows where the points come from.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from fastmae.report.colours import COLOURS
from fastmae.screen import printable

STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
SIDE = 7.4
"""Of each of the two panels, in inches."""
DPI = 130
MARGIN = 0.03
"""Around the points, as a share of their range."""
FEWEST_CELLS, MOST_CELLS = 6, 20
"""Cells of a side of the map: each shows one picture, so that there are at most 400."""
NAME_COLUMNS, NAME_ROWS, LONGEST_NAME = 4, 28, 24
LONGEST_LABEL = 12
"""Characters of a class's name that is written among its points."""
FILLED = 0.88
"""The share of a cell's width that its picture takes."""
FLATTEST = 4.0
"""A picture that is wider than this many times its height, or higher, is stretched to it."""
THUMBNAIL = 64
"""Pixels of a picture's longer side; the cells of the largest map have about 45."""
MARKERS = "o^sDvP"
DASHES = ("-", "--", ":", "-.", (0, (3, 1, 1, 1)), (0, (1, 3)))
"""Of the frames of pictures, where colours are used again for other classes."""
MOST_CLASSES = 24
OTHERS = "#c4c4c4"


@dataclass(frozen=True)
class Shown:
    """Which points are shown by pictures or names, at most one in each cell of the map."""

    columns: int
    rows: int
    points: list[int]
    cells: list[tuple[int, int]]
    """(column, row) of each, from the left and from the bottom."""


def shown_points(points: np.ndarray, columns: int, rows: int) -> Shown:
    """Chooses for each cell of a map that has points the one nearest to the cell's centre; of several, the first.

    Args:
        points: float [n, 2], in a range that is divided into ``columns`` × ``rows`` cells.
    """
    low, high = limits(points)
    scaled = (points - low) / (high - low) * (columns, rows)
    cells = scaled.astype(int)
    distance = np.square(scaled - cells - 0.5).sum(axis=1)
    order = np.lexsort((distance, cells[:, 0], cells[:, 1]))
    _, first = np.unique(cells[order, 1] * columns + cells[order, 0], return_index=True)
    chosen = order[first]
    return Shown(columns, rows, chosen.tolist(), [(int(column), int(row)) for column, row in cells[chosen]])


def shown_as_pictures(points: np.ndarray) -> Shown:
    """Chooses the points whose pictures are shown: more of them the more points there are, and at most 400."""
    cells = min(MOST_CELLS, max(FEWEST_CELLS, round(math.sqrt(len(points)))))
    return shown_points(points, cells, cells)


def shown_as_names(points: np.ndarray) -> Shown:
    """Chooses the points whose names are shown."""
    return shown_points(points, NAME_COLUMNS, NAME_ROWS)


def limits(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the corners of the map: the range of the points with a margin, float64 [2] each."""
    low, high = points.min(axis=0).astype(np.float64), points.max(axis=0).astype(np.float64)
    margin = MARGIN * np.where(high > low, high - low, 1)
    return low - margin, high + margin


def save_map(
    file: BinaryIO,
    points: np.ndarray,
    axes: tuple[str, str],
    title: str,
    classes: Sequence[str] | None,
    shown: Shown,
    pictures: Sequence[np.ndarray] = (),
    names: Sequence[str] = (),
) -> None:
    """Writes a PNG: on the left all points, coloured by class; on the right pictures or names where they lie.

    Args:
        points: float [n, 2].
        axes: what the axes are.
        title: a line above.
        classes: of the points, by name; None without labels.
        shown: the points that have a picture or a name, as ``shown_as_pictures`` or ``shown_as_names`` chooses them.
        pictures: uint8 [h, w, 3] of each.
        names: or the name of each.
    """
    looks = _looks(classes)
    of = [looks.get(name, looks[None]) for name in classes] if classes is not None else [looks[None]] * len(points)
    low, high = limits(points)
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * SIDE, SIDE + 0.6), dpi=DPI, layout="constrained")
        figure.suptitle(printable(title), fontsize=12)
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        _scatter(left, points, of)
        if classes is not None:
            _name_middles(left, points, classes, looks)
        if names:
            _scatter(right, points, of, alpha=0.25)
            _write(right, points, shown, names)
        else:
            _paste(right, low, high, shown, pictures, [of[n] for n in shown.points])
        for panel in (left, right):
            panel.set_xlim(low[0], high[0])
            panel.set_ylim(low[1], high[1])
            panel.set_xlabel(axes[0])
        left.set_ylabel(axes[1])
        if classes is not None:
            _legend(figure, looks, classes)
        figure.savefig(file, format="png")


@dataclass(frozen=True)
class _Look:
    colour: str
    marker: str = "o"
    dashes: Any = "-"


def _looks(classes: Iterable[str] | None) -> dict[str | None, _Look]:
    """Returns how each class is drawn, by its name; under None how the points of no class and of small ones are.

    Colours that people with any kind of colour vision tell apart are few; then shapes change.
    """
    if classes is None:
        return {None: _Look(COLOURS[0])}
    counts = Counter(classes)
    kept = sorted(counts, key=lambda name: (-counts[name], _natural(name)))
    kept = kept if len(kept) <= MOST_CLASSES else kept[: MOST_CLASSES - 1]
    looks: dict[str | None, _Look] = {}
    for number, name in enumerate(sorted(kept, key=_natural)):
        group, colour = divmod(number, len(COLOURS))
        looks[name] = _Look(COLOURS[colour], MARKERS[group], DASHES[group])
    return {**looks, None: _Look(OTHERS)}


def _natural(name: str) -> tuple[bool, int, str]:
    """Sorts numbers by their size, before names."""
    is_number = name.isdecimal()
    return not is_number, int(name) if is_number else 0, name


def _scatter(panel: Axes, points: np.ndarray, of: Sequence[_Look], alpha: float = 0.8) -> None:
    size = min(30.0, max(3.0, 20_000 / len(points)))
    for marker in dict.fromkeys(look.marker for look in of):
        rows = [n for n, look in enumerate(of) if look.marker == marker]
        colours = [of[n].colour for n in rows]
        x, y = points[rows].T
        panel.scatter(x, y, s=size, c=colours, marker=marker, alpha=alpha, linewidths=0)


def _name_middles(panel: Axes, points: np.ndarray, classes: Sequence[str], looks: dict[str | None, _Look]) -> None:
    """Writes the name of each class, if it is short, where the middle of its points is."""
    held = np.array(classes)
    for name, look in looks.items():
        if name is not None and len(name) <= LONGEST_LABEL:
            x, y = np.median(points[held == name], axis=0)
            halo = [withStroke(linewidth=3, foreground="white")]
            style: Any = dict(ha="center", va="center", fontsize=13, fontweight="bold", path_effects=halo)
            panel.annotate(printable(name), (x, y), color=look.colour, **style)


def _paste(
    panel: Axes,
    low: np.ndarray,
    high: np.ndarray,
    shown: Shown,
    pictures: Sequence[np.ndarray],
    looks: Sequence[_Look],
) -> None:
    """Draws each picture in the middle of its cell, in a frame of its class."""
    cell = (high - low) / (shown.columns, shown.rows)
    for place, picture, look in zip(shown.cells, pictures, looks, strict=True):
        height, width = picture.shape[:2]
        aspect = min(FLATTEST, max(1 / FLATTEST, width / height))
        size = cell * FILLED * np.array([min(1.0, aspect), min(1.0, 1 / aspect)])
        corner = low + cell * (place[0] + 0.5, place[1] + 0.5) - size / 2
        extent = (corner[0], corner[0] + size[0], corner[1], corner[1] + size[1])
        panel.imshow(picture, extent=extent, aspect="auto", zorder=2)
        frame = Rectangle(
            (corner[0], corner[1]), size[0], size[1],
            fill=False, edgecolor=look.colour, linestyle=look.dashes, linewidth=1.6, zorder=3,
        )  # fmt: skip
        panel.add_patch(frame)


def _write(panel: Axes, points: np.ndarray, shown: Shown, names: Sequence[str]) -> None:
    for n, name in zip(shown.points, names, strict=True):
        text = printable(name)
        text = text if len(text) <= LONGEST_NAME else "…" + text[1 - LONGEST_NAME :]
        x, y = points[n]
        panel.annotate(text, (x, y), fontsize=7, ha="center", va="center", clip_on=True)


def _legend(figure: Figure, looks: dict[str | None, _Look], classes: Sequence[str]) -> None:
    others = len({*classes} - looks.keys())
    named = {name: look for name, look in looks.items() if name is not None}
    labels = [printable(name) for name in named] + ([f"{others} smaller classes"] if others else [])
    drawn = [*named.values(), *([looks[None]] if others else [])]
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="none", markersize=7, label=label)
        for look, label in zip(drawn, labels, strict=True)
    ]
    columns = max(1, min(len(handles), 160 // (6 + max(map(len, labels)))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
