"""Charts as SVG: bars, stacked bars, curves and a roofline. They know numbers and names, and nothing of benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 720
TOP, ROW, BAR = 34, 26, 16
RIGHT = 80
# Whoever comes first in a report is ours. Told apart by people who see no red or no green, too.
COLOURS = ("#d1495b", "#30638e", "#edae49", "#00798c", "#8d96a3", "#7b5ea7", "#5c946e", "#b07d62", "#c58fb0", "#4d5057")
INK, FAINT = "#24292f", "#d8dee4"


@dataclass(frozen=True)
class Bar:
    """A bar as long as its median, with a whisker from quartile to quartile."""

    name: str
    low: float
    median: float
    high: float
    colour: str


@dataclass(frozen=True)
class Roof:
    """Operations a second that nothing exceeds."""

    name: str
    flops: float


@dataclass(frozen=True)
class Dot:
    """Something that does so many operations a byte, and so many a second."""

    name: str
    intensity: float
    flops: float
    colour: str


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour a name, the same in every chart that is given the same names."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def shown(number: float) -> str:
    """Three digits that matter."""
    if number == 0 or not math.isfinite(number):
        return "0" if number == 0 else "–"
    digits = 2 - math.floor(math.log10(abs(number)))
    return f"{round(number, digits):,.{max(0, digits)}f}"


def ticks(largest: float, about: int = 5) -> list[float]:
    """Round numbers from 0 to at least ``largest``."""
    if not (largest > 0 and math.isfinite(largest)):
        return [0.0, 1.0]
    rough = largest / about
    unit = 10 ** math.floor(math.log10(rough))
    step = next(times * unit for times in (1, 2, 5, 10) if times * unit >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(largest / step * (1 - 1e-9)) + 1)]


def bars(
    groups: Mapping[str, Sequence[Bar]],
    unit: str,
    limits: Mapping[str, float] | None = None,
    legend: Mapping[str, str] | None = None,
) -> str:
    """Groups of bars, of which each has its name beside the first; ``limits`` are lines across all, and ``legend`` says
    what the colours are."""
    limits = limits or {}
    rows = [(name if i == 0 else "", bar) for name, group in groups.items() for i, bar in enumerate(group)]
    marks = ticks(max([bar.high for _, bar in rows] + list(limits.values()), default=1.0))
    left, height = _room_for(groups), TOP + 10 + ROW * len(rows)

    def x(value: float) -> float:
        return left + (WIDTH - left - RIGHT) * value / marks[-1]

    drawn = [*_grid_below(marks, x, height), *_legend(legend or {})]
    for i, (name, row) in enumerate(rows):
        middle = TOP + ROW * (i + 0.5)
        drawn.append(_text(left - 8, middle + 4, name, anchor="end"))
        drawn.append(_box(left, middle - BAR / 2, x(row.median) - left, BAR, row.colour, f"{row.name}: {row.median:g}"))
        drawn += _whisker(x(row.low), x(row.high), middle)
        drawn.append(_text(max(x(row.high), x(row.median)) + 6, middle + 4, shown(row.median), weight="600"))
    for place, (name, value) in enumerate(limits.items()):
        drawn.append(_line(x(value), TOP - 6, x(value), height - 10, INK, dashes="5 3"))
        drawn.append(_text(x(value), height + 34 + 15 * place, f"▲ {name}", anchor="middle", size=11))
    return _svg(drawn, height + 26 + (12 + 15 * len(limits) if limits else 0) + 14, unit)


def stacked(rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """A bar a row, made of parts that are named above; a part below 0 is noise, and drawn as nothing."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    colours = colours_of(parts)
    marks = ticks(max((sum(max(0.0, value) for value in row.values()) for row in rows.values()), default=1.0))
    left, height = _room_for(rows), TOP + 10 + ROW * len(rows)

    def x(value: float) -> float:
        return left + (WIDTH - left - RIGHT) * value / marks[-1]

    drawn = [*_grid_below(marks, x, height), *_legend(colours)]
    for i, (name, row) in enumerate(rows.items()):
        middle, reached = TOP + ROW * (i + 0.5), 0.0
        drawn.append(_text(left - 8, middle + 4, name, anchor="end"))
        for part, value in row.items():
            length = max(0.0, value)
            title = f"{name}, {part}: {value:g}"
            wide = x(reached + length) - x(reached)
            drawn.append(_box(x(reached), middle - BAR / 2, wide, BAR, colours[part], title))
            reached += length
        drawn.append(_text(x(reached) + 6, middle + 4, shown(reached), weight="600"))
    return _svg(drawn, height + 40, unit)


Point = tuple[float, float, float, float]
"""x, and the quartiles and median of y: (x, low, median, high)."""


def curves(
    series: Mapping[str, Sequence[Point]], colours: Mapping[str, str], across: str, up: str, ideal: str = ""
) -> str:
    """A curve a series through its medians, with whiskers. ``ideal``: a name for the line through 0 and the first
    point of the first series."""
    left, right, top, bottom, height = 70, 20, 34, 46, 340
    places = sorted({point[0] for points in series.values() for point in points})
    first = next((points[0] for points in series.values() if points), (1.0, 0.0, 1.0, 1.0))
    most = [point[3] for points in series.values() for point in points]
    if ideal and places:
        most.append(first[2] * places[-1] / first[0])
    marks = ticks(max(most, default=1.0))

    def x(value: float) -> float:
        span = (places[-1] - places[0]) if places else 0.0
        share = (value - places[0]) / span if span else 0.5
        return left + 24 + (WIDTH - left - right - 48) * share

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * value / marks[-1]

    drawn = _legend({name: colours[name] for name in series})
    for mark in marks:
        drawn.append(_line(left, y(mark), WIDTH - right, y(mark), FAINT))
        drawn.append(_text(left - 6, y(mark) + 4, f"{mark:g}", anchor="end", size=11))
    for place in places:
        drawn.append(_line(x(place), height - bottom, x(place), height - bottom + 5, INK))
        drawn.append(_text(x(place), height - bottom + 19, f"{place:g}", anchor="middle", size=11))
    drawn.append(_text((left + WIDTH - right) / 2, height - 6, across, anchor="middle", size=12))
    if ideal and places:
        end = first[2] * places[-1] / first[0]
        drawn.append(_line(x(first[0]), y(first[2]), x(places[-1]), y(end), INK, dashes="5 3"))
        drawn.append(_text(x(places[-1]), y(end) - 6, ideal, anchor="end", size=11))
    for name, points in series.items():
        path = " ".join(f"{x(at):.1f},{y(median):.1f}" for at, _, median, _ in sorted(points))
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        for at, low, median, high in points:
            drawn.append(_line(x(at), y(low), x(at), y(high), INK))
            drawn.append(_dot(x(at), y(median), colours[name], f"{name}, {at:g}: {median:g}"))
    return _svg(drawn, height, up)


def roofline(dots: Sequence[Dot], roofs: Sequence[Roof], rate: float) -> str:
    """Operations a second over operations a byte, both in powers of ten, below a copy's ``rate`` and the ``roofs``."""
    left, right, top, bottom, height = 70, 24, 30, 46, 460
    highest = max(roof.flops for roof in roofs)
    x_low = math.floor(math.log10(min([dot.intensity for dot in dots] + [0.1])))
    x_high = math.ceil(math.log10(max([dot.intensity for dot in dots] + [10 * highest / rate])))
    y_low = math.floor(math.log10(min([dot.flops for dot in dots] + [rate * 10.0**x_low])))
    y_high = math.ceil(math.log10(highest) + 0.1)

    def x(value: float) -> float:
        return left + (WIDTH - left - right) * (math.log10(value) - x_low) / (x_high - x_low)

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * (math.log10(value) - y_low) / (y_high - y_low)

    drawn = []
    for power in range(x_low, x_high + 1):
        drawn.append(_line(x(10.0**power), top, x(10.0**power), height - bottom, FAINT))
        drawn.append(_text(x(10.0**power), height - bottom + 18, f"{10.0**power:g}", anchor="middle", size=11))
    for power in range(y_low, y_high + 1):
        drawn.append(_line(left, y(10.0**power), WIDTH - right, y(10.0**power), FAINT))
        drawn.append(_text(left - 6, y(10.0**power) + 4, _operations(10.0**power), anchor="end", size=11))
    drawn.append(_text((left + WIDTH - right) / 2, height - 6, "operations a byte", anchor="middle", size=12))
    ridge = highest / rate
    drawn.append(_line(x(10.0**x_low), y(rate * 10.0**x_low), x(ridge), y(highest), INK, width=1.5))
    falling = sorted(roofs, key=lambda roof: -roof.flops)
    for place, roof in enumerate(falling):
        begin = x(roof.flops / rate)
        drawn.append(_line(begin, y(roof.flops), WIDTH - right, y(roof.flops), INK, dashes="5 3" if place else ""))
    heights = _apart([y(roof.flops) - 5 for roof in falling], 13)
    names = [f"{roof.name}: {_operations(roof.flops)}FLOP/s" for roof in falling]
    heights.append(heights[-1] + 13)
    for at, label in zip(heights, [*names, f"sloping: a copy, {rate / 1e9:.3g} GB/s"], strict=True):
        drawn.append(_text(left + 8, at, label, size=11))
    for number, dot in enumerate(dots, 1):
        title = f"{dot.name}: {dot.intensity:.3g} operations a byte, {_operations(dot.flops)}FLOP/s"
        drawn.append(_dot(x(dot.intensity), y(dot.flops), dot.colour, title, radius=8))
        drawn.append(_text(x(dot.intensity), y(dot.flops) + 3.5, str(number), anchor="middle", size=9, colour="#fff"))
    return _svg(drawn, height, "operations a second")


def _operations(value: float) -> str:
    """1e12 as ``1 T``."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g} "


def _apart(places: Sequence[float], least: float) -> list[float]:
    """The same, ascending, but none nearer to the one before it than ``least``."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + least) if found else place)
    return found


# --- shapes -----------------------------------------------------------------------------------------------------------


def _svg(drawn: Sequence[str], height: float, unit: str) -> str:
    title = _text(4, 12, unit, size=12, weight="600")
    return (
        f'<svg viewBox="0 -8 {WIDTH} {height + 8:.0f}" role="img" aria-label="{escape(unit)}" '
        f'xmlns="http://www.w3.org/2000/svg">{title}{"".join(drawn)}</svg>'
    )


def _room_for(names: Iterable[str]) -> float:
    """For names at the left of bars."""
    return min(16 + 7.2 * max(map(len, names), default=0), WIDTH / 2)


def _grid_below(marks: Sequence[float], x: Callable[[float], float], height: float) -> list[str]:
    drawn = []
    for mark in marks:
        drawn.append(_line(x(mark), TOP - 6, x(mark), height - 10, FAINT))
        drawn.append(_text(x(mark), height + 6, f"{mark:g}", anchor="middle", size=11))
    return drawn


def _legend(colours: Mapping[str, str]) -> list[str]:
    drawn, x, y = [], 110.0, 10.0
    for name, colour in colours.items():
        width = 30 + 6.5 * len(name)
        if x + width > WIDTH:
            x, y = 110.0, y + 14
        drawn += [_box(x, y - 9, 11, 11, colour, name), _text(x + 16, y, name, size=12)]
        x += width
    return drawn


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, weight: str = "400", colour: str = INK
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" font-weight="{weight}" fill="{colour}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{colour}" rx="2"><title>{escape(title)}</title></rect>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, *, dashes: str = "", width: float = 1.0) -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line {place} stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _whisker(low: float, high: float, y: float) -> list[str]:
    ends = [_line(x, y - 4, x, y + 4, INK) for x in (low, high)]
    return [_line(low, y, high, y, INK), *ends]


def _dot(x: float, y: float, colour: str, title: str, radius: float = 4) -> str:
    shape = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" stroke="#fff" stroke-width="1"'
    return f"<circle {shape}><title>{escape(title)}</title></circle>"
