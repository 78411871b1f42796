"""The report's charts, drawn by matplotlib: from numbers to an SVG element each. Nothing here knows what they mean."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#2a6fdb", "#d1495b", "#3f9b6c", "#edae49", "#7a5195", "#00798c", "#8d96a3", "#c06c2b")
# Path glyphs look the same everywhere; ids come from a fixed salt, so that equal numbers give equal files.
STYLE: Any = {"font.size": 10, "svg.hashsalt": "fastmae", "axes.spines.top": False, "axes.spines.right": False}
OTHERS = "#8d96a3"
Interval = tuple[float, float, float]
"""The first quartile, the median and the third quartile."""


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, in order."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def shown(number: float) -> str:
    """A number with three digits, and with commas between thousands: 1,230,000, 99.9 or 0.0124."""
    if number == 0:
        return "0"
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{number:.3g}"


def bars(groups: Mapping[str, Mapping[str, Interval]], unit: str, limits: Mapping[str, float] | None = None) -> str:
    """Horizontal bars with quartiles, a bar per name within each group; nothing where there is nothing to compare.

    Groups of one bar need no legend: the group's own label says what it is, and the first, which is ours, is coloured.
    ``limits`` are drawn as lines.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    if sum(len(group) for group in groups.values()) < 2:
        return ""
    alone = all(len(group) == 1 for group in groups.values())
    colours = colours_of(names)
    count = sum(len(group) for group in groups.values()) + 0.6 * len(groups)
    figure, axes = _figure(1.1 + 0.3 * count)
    ticks, labels, y, seen = [], [], 0.0, set()
    largest = max(median for group in groups.values() for _, median, _ in group.values())
    for label, group in groups.items():
        ticks.append(y + (len(group) - 1) / 2)
        labels.append(label)
        for name, (low, median, high) in group.items():
            reach = [[max(0.0, median - low)], [max(0.0, high - median)]]
            legend = "" if alone or name in seen else name
            axes.barh(
                y,
                median,
                0.8,
                color=colours[name] if not alone else COLOURS[0] if y == 0 else OTHERS,
                xerr=reach,
                label=legend,
                ecolor="#444",
            )
            axes.text(max(high, median) + 0.01 * largest, y, shown(median), va="center", fontsize=9)
            seen.add(name)
            y += 1
        y += 0.6
    for name, value in (limits or {}).items():
        axes.axvline(value, color="#57606a", linestyle="--", linewidth=1, label=f"{name}: {shown(value)}")
        largest = max(largest, value)
    axes.set_yticks(ticks, labels)
    axes.set_xlim(0, 1.12 * largest)
    axes.set_ylim(y - 0.6, -0.6)
    axes.set_xlabel(unit)
    _legend(axes, 0 if alone and not limits else 1)
    return _svg(figure)


def stacked(rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """A bar per row, made of parts; parts below 0, which are noise, count as 0."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    colours = colours_of(parts)
    figure, axes = _figure(1.2 + 0.4 * len(rows))
    for y, row in enumerate(rows.values()):
        left = 0.0
        for part in parts:
            width = max(0.0, row.get(part, 0.0))
            axes.barh(y, width, 0.7, left=left, color=colours[part], label=part if y == 0 else "")
            left += width
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    _legend(axes, 1)
    return _svg(figure)


def curves(series: Mapping[str, Sequence[tuple[float, Interval]]], across: str, unit: str, ideal: str = "") -> str:
    """Curves through medians with quartiles; ``ideal`` names a line of as many times the first point of the first."""
    if max(len(points) for points in series.values()) < 2:
        return ""
    figure, axes = _figure(3.4)
    colours = colours_of(list(series))
    for name, points in series.items():
        x = [at for at, _ in points]
        median = [interval[1] for _, interval in points]
        reach = [[i[1] - i[0] for _, i in points], [i[2] - i[1] for _, i in points]]
        axes.errorbar(x, median, yerr=reach, marker="o", capsize=3, label=name, color=colours[name])
    first = next(iter(series.values()))
    if ideal:
        x = [at for at, _ in first]
        axes.plot(x, [first[0][1][1] * at / x[0] for at in x], "--", color="#8d96a3", label=ideal)
    axes.set_xticks(sorted({at for points in series.values() for at, _ in points}))
    axes.set_xlabel(across)
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    _legend(axes, 1)
    return _svg(figure)


def roofline(points: Sequence[tuple[str, float, float]], roofs: Mapping[str, float], copy_bytes: float) -> str:
    """Operations per second over operations per byte, under the lines of a copy and of matrix products.

    A colour per name, explained beside the chart: labels at the points would cover each other.
    """
    figure, axes = _figure(4.4)
    colours = colours_of([name for name, _, _ in points])
    lowest = min(intensity for _, intensity, _ in points) / 2
    highest = 2 * max([intensity for _, intensity, _ in points] + [max(roofs.values()) / copy_bytes])
    axes.plot([lowest, highest], [lowest * copy_bytes, highest * copy_bytes], color="#24292f", label="a copy")
    for i, (name, rate) in enumerate(roofs.items()):
        axes.axhline(rate, color="#57606a", linestyle=("-", "--", ":", "-.")[i % 4], linewidth=1, label=name)
    for name, colour in colours.items():
        x, y = zip(*[(x, y) for other, x, y in points if other == name], strict=True)
        axes.scatter(x, y, color=colour, edgecolor="white", s=46, zorder=3, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(lowest, highest)
    axes.set_ylim(min(y for _, _, y in points) / 3, 3 * max([*roofs.values(), *(y for _, _, y in points)]))
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("operations per second")
    _legend(axes, 1)
    return _svg(figure)


def _figure(height: float) -> tuple[Figure, Axes]:
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, height), layout="constrained")
        return figure, figure.subplots()


def _legend(axes: Axes, least: int) -> None:
    """Outside of the axes on the right, where it covers nothing."""
    if least and axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
