"""The page of `fastmae verify --report`: what was found in a data set, with pictures, as one file of HTML.

It needs no network and no script. Every name comes from files of anybody: what is not printable in it is written out,
and the template escapes all of it.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from fastmae.data.copies import NO_COPIES, Copies, Digests
from fastmae.data.decode import BadImageError, decode
from fastmae.data.reading import Reading
from fastmae.data.sources import Source, evenly_spaced
from fastmae.data.values import PERCENTS, ChannelValues, Values
from fastmae.data.verify import Findings
from fastmae.errors import SettingError, UserError
from fastmae.files import write_text
from fastmae.screen import printable

PICTURES = 24
"""How many images of a part are shown."""
SIDE = 112
"""The longer side of a picture in pixels."""
CHARTS = 12
"""Of how many channels a histogram is drawn."""
TEMPLATE = Path(__file__).with_name("verify_report.html.jinja")
Ends = tuple[np.ndarray, np.ndarray]


@dataclass
class Part:
    """One part of a data set, and what was found in it."""

    name: str
    what: str
    """How many images there are, and where."""
    source: Source
    reading: Reading
    facts: list[tuple[str, str]]
    """(name, text): the lines that are printed."""
    copies: Copies = NO_COPIES
    findings: Findings = field(default_factory=Findings)
    values: Values = field(init=False)
    digests: Digests = field(init=False)

    def __post_init__(self) -> None:
        self.values, self.digests = Values(len(self.source), self.reading), Digests(len(self.source))


def need_report(path: str) -> None:
    """Refuses a page that could not be written after all images have been read.

    Raises:
        UserError: jinja2 is missing, or the file cannot be written.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise UserError("--report needs jinja2, which is not installed; run pip install jinja2") from None
    folder = Path(path).absolute().parent
    if not folder.is_dir() or Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise SettingError("report", path, "cannot be written; name a file in a folder that is there and yours")


def write_report(
    path: str,
    data_path: str,
    verdict: str,
    parts: Sequence[Part],
    leaks: Sequence[str],
    damage: Sequence[str],
    ends: Ends | None,
) -> None:
    """Writes the page.

    Args:
        path: the file.
        data_path: the data, as they were named.
        verdict: how many images are usable.
        parts: what was found.
        leaks: what to know of images that two parts share.
        damage: shards and folders that cannot be read whole.
        ends: low and high [C] that pictures show as black and white; None for the outer percentiles.

    Raises:
        UserError: it cannot be written.
    """
    from jinja2 import Environment

    bad, reading = [*damage], parts[0].reading
    for part in parts:
        bad += [f"{part.name}: {example.name}: {example.reason}" for example in part.findings.examples]
    unusable = sum(part.findings.unusable for part in parts) + len(damage)
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    nodata = "" if reading.nodata is None else f", {reading.nodata:g} marks missing pixels"
    text = template.render(
        title=printable(data_path),
        verdict=verdict,
        is_whole=not unusable,
        how=f"read as {reading.dtype} with --in_chans {reading.in_chans}{nodata}",
        leaks=[printable(leak) for leak in leaks],
        parts=[_shown(part, ends) for part in parts],
        percents=[f"{percent:g} %" for percent in PERCENTS],
        bad=[printable(line) for line in bad],
        more=unusable - len(bad),
    )
    try:
        write_text(Path(path), text)
    except OSError as error:
        raise UserError(f"--report {path}: cannot be written ({error}); name another file") from error


def _shown(part: Part, ends: Ends | None) -> dict[str, object]:
    """Returns what the template shows of a part, as texts."""
    channels, survey, values = part.values.channels(), part.findings.survey, part.values
    kinds = [
        (printable(kind), f"{count:,}", f"{100 * count / survey.images:.3g} %")
        for kind, count in survey.kinds.most_common()
    ]
    is_told = {"format", "values", "each channel", "channels"} | {f"channel {1 + c}" for c in range(len(channels))}
    return {
        "name": part.name,
        "what": printable(part.what),
        "facts": [(name, printable(text)) for name, text in part.facts if name not in {*is_told, "note", "stock"}],
        "notes": [printable(text) for name, text in part.facts if name in ("note", "stock")],
        "kinds": kinds,
        "copies": [[printable(part.source.name(index)) for index in pair] for pair in part.copies.pairs],
        "more_copies": part.copies.count - len(part.copies.pairs),
        "has_missing": bool(values.missing),
        "counted": "" if values.counted == values.pixels else f"{values.counted:,} of {values.pixels:,} pixels",
        "rows": [_row(number, channel) for number, channel in enumerate(channels, 1)],
        "charts": [*_charts(channels)],
        "uncharted": max(0, len(channels) - CHARTS),
        "pictures": [*_pictures(part.source, part.reading, ends or _ends(channels, part.reading))],
        "shows": "the first three channels" if len(channels) > 3 else "the first channel" if len(channels) == 2 else "",
    }


def _row(number: int, channel: ChannelValues | None) -> list[str]:
    if channel is None:
        return [str(number), *["–"] * (2 + len(PERCENTS))]
    return [str(number), *(f"{value:.6g}" for value in (channel.low, *channel.percentiles, channel.high))]


def _charts(channels: Iterable[ChannelValues | None]) -> Iterator[dict[str, object]]:
    """Yields what a histogram shows; one for all channels that are alike."""
    channels = [*channels][:CHARTS]
    alike = len(channels) > 1 and len({*channels}) == 1
    for number, channel in enumerate(channels[:1] if alike else channels, 1):
        if channel is None:
            continue
        total, most = sum(bar.count for bar in channel.bars), max(bar.count for bar in channel.bars)
        bars = [
            {
                "height": f"{100 * (bar.count / most) ** 0.5:.1f}",
                "text": f"{bar.low:.6g} to {bar.high:.6g}: {100 * bar.count / total:.2g} %",
            }
            for bar in channel.bars
        ]
        low, high = channel.percentiles[0], channel.percentiles[-1]
        name = "each channel" if alike else f"channel {number}"
        yield {"name": name, "bars": bars, "low": f"{low:.6g}", "high": f"{high:.6g}"}


def _ends(channels: Sequence[ChannelValues | None], reading: Reading) -> Ends:
    """Returns low and high [C]: the outer percentiles, and for uint8 its whole range."""
    low, high = np.zeros(len(channels)), np.full(len(channels), 255.0)
    for c, channel in enumerate(channels):
        if channel is not None and reading.dtype != "uint8":
            low[c], high[c] = channel.percentiles[0], channel.percentiles[-1]
    return low, high


def _pictures(source: Source, reading: Reading, ends: Ends) -> Iterator[tuple[str, str]]:
    """Yields (name, URI) of evenly spaced images that are usable."""
    for index in evenly_spaced(source, PICTURES, 1).tolist():
        try:
            pixels = decode(source.read(index), reading)
        except (BadImageError, OSError, MemoryError):  # it is among the unusable ones
            continue
        image = base64.b64encode(picture(pixels, reading, ends)).decode()
        yield printable(source.name(index)), f"data:image/png;base64,{image}"


def picture(pixels: np.ndarray, reading: Reading, ends: Ends) -> bytes:
    """Returns a small PNG of pixels [H, W, C]: gray of one or two channels, colours of the first three of more.

    Args:
        pixels: of the type of the reading.
        reading: says which pixels are missing; they are clear.
        ends: low and high [C], what is black and white.
    """
    step = max(1, min(pixels.shape[:2]) // (2 * SIDE))
    count = 3 if pixels.shape[2] >= 3 else 1
    pixels = pixels[::step, ::step, :count]
    low, high = ends[0][:count], ends[1][:count]
    shares = (pixels.astype(np.float64) - low) / np.where(high > low, high - low, 1.0)
    missing = ~np.isfinite(shares)
    if reading.nodata is not None:
        missing |= pixels == (np.float32(reading.nodata) if reading.dtype == "float32" else reading.nodata)
    levels = np.rint(255 * np.clip(np.where(missing, 0.0, shares), 0, 1)).astype(np.uint8)
    image = Image.fromarray(levels[..., 0] if count == 1 else levels)
    if missing.any():
        image.putalpha(Image.fromarray(np.where(missing.any(axis=2), 0, 255).astype(np.uint8)))
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
