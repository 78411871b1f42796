"""The charts of runs, drawn by matplotlib: curves to one SVG element. Nothing here knows what they mean.

Text and axes are drawn in ``currentColor``, so that a page can show them on white and on black.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

INK = "#010203"
"""Stands for ``currentColor``, which matplotlib does not know."""
STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "svg.hashsalt": "fastmae",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
MOST_POINTS = 600
"""Of a curve with more, means of as many pieces are drawn."""
SIZE = (5.6, 3.0)
"""Width and height in inches, of 72 points each."""
DECADE = 20.0
"""A curve of positive numbers whose largest is this many times its smallest is drawn on a logarithmic axis."""

Points = Sequence[tuple[float, float]]
Look = Literal["line", "dashed", "faint"]


@dataclass(frozen=True)
class Curve:
    """One curve of one run."""

    points: Points
    """(x, y), by rising x."""
    colour: str
    look: Look = "line"
    kind: str = ""
    """What it is, for the legend: curves of one kind look alike, whatever their run."""


@dataclass(frozen=True)
class Chart:
    """What a chart shows."""

    unit: str
    """The label of the vertical axis."""
    curves: Sequence[Curve]
    across: str = "epochs"
    """The label of the horizontal axis."""
    marks: Sequence[tuple[float, str]] = field(default=())
    """(x, colour) of thin vertical lines."""
    bottom: float | None = None
    """Where the vertical axis begins, if not at the lowest point."""


def draw(chart: Chart) -> str:
    """Returns a chart as an SVG element, which scales with its width."""
    with rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        for x, colour in chart.marks:
            axes.axvline(x, color=colour, linewidth=0.8, linestyle=(0, (2, 2)), alpha=0.8)
        kinds: dict[str, Look] = {}
        for curve in chart.curves:
            _plot(axes, curve)
            kinds.setdefault(curve.kind, curve.look)
        _scale(axes, chart)
        axes.set_xlabel(chart.across)
        axes.set_ylabel(chart.unit)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        if len(kinds) > 1:
            for kind, look in kinds.items():
                axes.plot([], [], color=INK, label=kind, **_look(look))
            axes.legend(frameon=False, fontsize=9, loc="best")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _look(look: Look) -> dict[str, Any]:
    if look == "faint":
        return {"linewidth": 0.8, "alpha": 0.45}
    return {"linewidth": 1.6, "linestyle": "--" if look == "dashed" else "-"}


def _plot(axes: Axes, curve: Curve) -> None:
    x, y = zip(*thinned(curve.points), strict=True)
    few = len(x) <= 40 and curve.look != "faint"
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.2} if few else {}
    axes.plot(x, y, color=curve.colour, **_look(curve.look), **marker)


def thinned(points: Points) -> Points:
    """Returns a curve of at most ``MOST_POINTS`` points: means of pieces of equal numbers of points."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / MOST_POINTS)
    pieces = (points[first : first + size] for first in range(0, len(points), size))
    return [
        (math.fsum(x for x, _ in piece) / len(piece), math.fsum(y for _, y in piece) / len(piece)) for piece in pieces
    ]


def _scale(axes: Axes, chart: Chart) -> None:
    values = [y for curve in chart.curves for _, y in curve.points]
    if min(values) > 0 and max(values) / min(values) > DECADE and chart.bottom is None:
        axes.set_yscale("log")
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if max(values) >= 1e4:
            axes.yaxis.set_major_formatter(EngFormatter())
    if chart.bottom is not None:
        axes.set_ylim(chart.bottom, chart.bottom + 1.08 * (max(values) - chart.bottom) or 1)
    last = max(x for curve in chart.curves for x, _ in curve.points)
    axes.set_xlim(-0.02 * last, 1.02 * last)  # alike in all charts of a page, so that they can be compared
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
