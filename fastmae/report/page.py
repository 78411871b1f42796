"""The page of `fastmae report`: one file of HTML about one run or several, which works without a network.

What comes from run folders is anybody's text: what is not printable is written out, and the template escapes all of it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import shlex
import statistics
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from fastmae.errors import UserError, install_hint
from fastmae.files import write_text
from fastmae.messages import logger
from fastmae.report.colours import colour_of
from fastmae.report.compare import row_of
from fastmae.report.pictures import read_picture
from fastmae.report.run_folder import RunRecord
from fastmae.screen import printable

TEMPLATE = Path(__file__).with_name("page.html.jinja")
SCRIPT = Path(__file__).with_name("page.js")
PICTURES = 16
"""How many reconstructions of a run are shown, evenly spaced; the first and the last are among them."""
PICTURE_BYTES = 3_000_000
"""Of all pictures of a page together; larger ones are shrunk."""
EVENTS = 60
"""How many events of a run are listed: the newest."""
RESULTS = (
    ("training loss", "train_loss", "{:.4f}"),
    ("held-out loss", "held_out_loss", "{:.4f}"),
    ("test accuracy", "test_acc1", "{:.1f} %"),
    ("k-NN", "knn", "{:.1f} %"),
    ("linear probe", "linear", "{:.1f} %"),
    ("RankMe", "rankme", "{:.1f}"),
)
"""(title, name, format) of what the overview shows of the newest epoch."""
SOFTENED = {"complete": "good", "running": "good", "stopped": "", "unfinished": "bad"}


def write_report(path: str, runs: Sequence[RunRecord]) -> int:
    """Writes the page and returns its size in bytes.

    Raises:
        UserError: matplotlib or jinja2 is missing, or the file cannot be written.
    """
    try:
        import jinja2

        from fastmae.report.figures import drawn_charts
    except ImportError as error:
        hint = install_hint("report")
        raise UserError(f"fastmae report needs {error.name}, which is not installed; {hint}") from None
    names = _names(runs)
    pictures = _pictures(runs)
    for line in pictures["lost"]:
        logger.warning("%s", line)
    script = SCRIPT.read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs",
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        runs=[_shown(number, name, run) for number, (name, run) in enumerate(zip(names, runs, strict=True))],
        results=[title for title, key, _ in RESULTS if any(_reached(run)[key] is not None for run in runs)],
        charts=list(drawn_charts(runs)),
        pictures=pictures,
        differences=_differences(runs),
    )
    try:
        write_text(Path(path), text)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error}); name another file") from error
    return len(text.encode())


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Returns names that tell the runs apart: of their folders, or where two are the same of their paths."""
    names = [run.name for run in runs]
    return [
        printable(name if names.count(name) == 1 else str(run.folder)) for name, run in zip(names, runs, strict=True)
    ]


# --- the overview -----------------------------------------------------------------------------------------------------


def _shown(number: int, name: str, run: RunRecord) -> dict[str, Any]:
    """Returns what the template shows of a run, as texts."""
    reached = _reached(run)
    found = {title: _text(reached[key], form) for title, key, form in RESULTS}
    done = run.epochs[-1]["epoch"] + 1 if run.epochs else 0
    start = run.starts[-1] if run.starts else {}
    events = run.events[-EVENTS:]
    return {
        "name": name,
        "folder": printable(str(run.folder)),
        "colour": colour_of(number),
        "status": run.status,
        "mood": SOFTENED[run.status],
        "model": _value(run.settings.get("model")),
        "data": _value(run.settings.get("data_path")),
        "epochs": f"{done} of {_value(run.settings.get('epochs'))}",
        "steps": f"{run.rows[-1]['step']:,}" if run.rows else "0",
        "speed": _text(_middle(run, "images_per_second"), "{:,.0f}"),
        "memory": _text(_middle(run, "peak_memory"), "{:.2f} GiB", 2.0**-30),
        "took": _took(run),
        "results": found,
        "problems": [printable(problem) for problem in run.problems],
        "events": [
            (printable(event.time), _value(event.step), printable(event.kind), printable(event.text))
            for event in events
        ],
        "earlier_events": len(run.events) - len(events),
        "command": printable(_command(start)),
        "environment": [
            (printable(group), list(_lines(start.get(group)))) for group in ("hardware", "versions", "backends")
        ],
        "settings": [(printable(key), _value(value)) for key, value in sorted(run.settings.items())],
    }


def _reached(run: RunRecord) -> dict[str, Any]:
    """Returns the newest of what a run reached, by the names of ``RESULTS``; None where it does not say."""
    return row_of(run) | {"rankme": run.newest("rankme")}


def _text(value: float | None, form: str, times: float = 1.0) -> str:
    return "–" if value is None else form.format(value * times)


def _middle(run: RunRecord, key: str) -> float | None:
    values = [value for _, value in run.curve(key)]
    return statistics.median(values) if values else None


def _value(value: Any) -> str:
    """Returns a setting for people."""
    if isinstance(value, list):
        return ", ".join(printable(str(one)) if isinstance(one, list) else _value(one) for one in value)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None or value == "" else printable(str(value))


def _took(run: RunRecord) -> str:
    """Returns how long the processes of a run trained, as far as it says when they began and ended."""
    times = sorted(((event.kind, event.time) for event in run.events if event.time), key=lambda one: one[1])
    seconds, known = 0.0, False
    for (kind, began), (next_kind, ended) in pairwise(times):
        if kind in ("started", "resumed", "rolled back") and next_kind in ("stopped", "complete", "rolled back"):
            try:
                seconds += (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()
                known = True
            except (ValueError, TypeError):
                continue
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    took = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60:.0f} s"
    return took if known else "–"


def _command(start: dict[str, Any]) -> str:
    words = start.get("command")
    if not isinstance(words, list) or not words:
        return ""
    return shlex.join([Path(str(words[0])).name, *map(str, words[1:])])


def _lines(group: Any) -> Iterator[tuple[str, list[str]]]:
    if isinstance(group, dict):
        for name, value in group.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield printable(name), [printable(line) for line in text.splitlines()]


def _differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Returns the settings of which not all runs have the same, with their values."""
    if len(runs) < 2:
        return []
    names = sorted({name for run in runs for name in run.settings})
    rows = [(name, [_value(run.settings.get(name)) for run in runs]) for name in names if name != "output_dir"]
    return [(printable(name), values) for name, values in rows if len(set(values)) > 1]


# --- the pictures -----------------------------------------------------------------------------------------------------


def _pictures(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Returns the epochs of the slider, (number of the run, [(epoch, URI)]) of each run with pictures, and a line for
    each picture that cannot be read.
    """
    chosen = {number: _evenly([*run.reconstructions.items()]) for number, run in enumerate(runs)}
    count = sum(map(len, chosen.values()))
    shown: list[tuple[int, list[tuple[int, str]]]] = []
    lost: list[str] = []
    for number, files in chosen.items():
        uris = []
        for epoch, path in files:
            try:
                uris.append((epoch + 1, _uri(path, PICTURE_BYTES // count)))
            except ValueError as error:
                lost.append(printable(error))
        shown += [(number, uris)] if uris else []
    epochs = sorted({epoch for _, uris in shown for epoch, _ in uris})
    return {"epochs": epochs, "runs": shown, "lost": lost}


def _evenly(items: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    if len(items) <= PICTURES:
        return items
    return [items[round(n * (len(items) - 1) / (PICTURES - 1))] for n in range(PICTURES)]


def _uri(path: Path, most: int) -> str:
    """Returns a picture of at most ``most`` bytes, as it is or shrunk.

    Raises:
        ValueError: it cannot be read.
    """
    (data, picture), kind = read_picture(path), "png"
    if len(data) > most:
        data = _encoded(picture, "PNG", optimize=True)
    scale = 1.0
    while len(data) > most and scale > 0.1:
        kind = "jpeg"  # photographs: a tenth of the bytes, and no difference to be seen
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        data = _encoded(picture.resize(size, Image.Resampling.LANCZOS), "JPEG", quality=88)
        scale *= min(0.9, math.sqrt(most / len(data)))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
