"""From the JSON of ``fastmae bench all`` to one page that needs nothing else: charts, their numbers, their commands.

python -m fastmae.benchmarks.html all-….json report.html         # once more, from a kept result
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from fastmae.benchmarks.end_to_end import CACHED, FROM_FILES
from fastmae.benchmarks.svg import Bar, Dot, Point, Roof, bars, colours_of, curves, roofline, shown, stacked
from fastmae.benchmarks.timing import Samples, quartiles, times_as_fast

Result = dict[str, Any]
Row = Sequence[str]

OURS, PUBLISHED = "fastmae", "published"
OTHERS = "#8d96a3"  # the colour of who is not told apart
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # of the products, by precision
LABELS = {
    PUBLISHED: "published loop",
    "strong": "strong baseline",
    "strong-compiled": "strong baseline, compiled",
    "transformers-compiled": "transformers, compiled",
    "timm": "timm blocks",
}
STYLE = """
body { margin: 0; background: #f6f7f9; color: #24292f; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 8px 0 2px; } h2 { font-size: 19px; margin: 0 0 2px; }
p { margin: 2px 0 10px; max-width: 90ch; } .quiet { color: #57606a; }
section { background: #fff; border: 1px solid #d8dee4; border-radius: 10px; padding: 18px 20px; margin: 18px 0; }
.beside { display: flex; flex-wrap: wrap; gap: 12px 32px; align-items: flex-start; }
.chart { flex: 1 1 560px; min-width: 320px; } .chart svg { width: 100%; height: auto; font-family: inherit; }
.numbers { flex: 1 1 380px; overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px 3px 0; text-align: right; border-bottom: 1px solid #eaeef2; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; } th { color: #57606a; font-weight: 600; }
pre { background: #f6f7f9; border: 1px solid #eaeef2; border-radius: 6px; padding: 7px 10px; margin: 10px 0 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.tile { background: #fff; border: 1px solid #d8dee4; border-radius: 10px; padding: 10px 18px; }
.tile b { display: block; font-size: 24px; } .missing { border-left: 4px solid #edae49; }
"""


def report(result: Result) -> str:
    """The page, as HTML."""
    parts = result["parts"]
    sections = [make(result, parts) for make in SECTIONS]
    title = f"fastmae on {result['machine']}: {result['model']}, {result['precision']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(_provenance(result))}</p>',
        _commands([shlex.join(result["command"])]),
        '<p class="quiet">Contestants take turns; figures are medians, with quartiles. No time is given to anybody '
        "unless results agree. Each section's command measures it once more.</p>",
        _tiles(result, parts),
        *filter(None, sections),
        _missing(result, parts),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body><main>\n' + (
        "\n".join(body) + "\n</main></body></html>\n"
    )


def _provenance(result: Result) -> str:
    hardware, versions = result["hardware"], result["versions"]
    processor = ", ".join(hardware["gpus"]) or f"{hardware['machine']} ({hardware['cpu_capability']})"
    load = " ".join(f"{value:.1f}" for value in result["load"])
    software = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "triton", "transformers", "timm")
                         if name in versions)  # fmt: skip
    return (
        f"{result['date']} · {processor}, {hardware['cores']} cores, {hardware['torch_threads']} threads, load {load} "
        f"beforehand · {software} · commit {result['commit']}"
    )


# --- sections ---------------------------------------------------------------------------------------------------------


def _ceilings(result: Result, parts: list[Result]) -> str:
    found = result["ceilings"]
    rows = [["copy, read + written", f"{found['copy_bytes'] / 1e9:.3g} GB/s"]]
    rows += [[f"large square product, {name}", _flops(rate)] for name, rate in found["matmul_flops"].items()]
    rows.append([f"the model's own products, {result['precision']}, {result['batch_size']} images",
                 _flops(found["products_flops"])])  # fmt: skip
    rows += [[f"JPEGs decoded, {_threads(number)}", f"{rate:.0f}/s"] for number, rate in found["decoded"].items()]
    text = "Measured first, the best of several samples: what the rest is compared with."
    return _section("What this machine can do", text, "", _table(["ceiling", "rate"], rows), [])


def _roofline(result: Result, parts: list[Result]) -> str:
    ceilings, dots, rows, commands = result["ceilings"], [], [], []
    ours = colours_of([OURS])[OURS]
    for part in _measured(parts, "kernels"):
        for case in part["result"]["cases"]:
            if OURS not in case["seconds"] or not case["operations"]:
                continue
            median = quartiles(case["seconds"][OURS])[1]
            direction = "forward + backward" if case["backward"] else "forward"
            label = f"{case['op']} {direction}, {case['sizes']}"
            dots.append(Dot(label, case["operations"] / case["bytes"], case["operations"] / median, OTHERS))
        commands.append(part["command"])
    for part in _measured(parts, "step"):
        found = part["result"]
        flops = found["useful_flops"][OURS]
        reached = flops / quartiles(found["seconds"][OURS])[1]
        dots.append(Dot("training step", flops / result["step_bytes"], reached, ours))
        commands.append(part["command"])
    if not dots:
        return ""
    roofs = [Roof(f"large square, {name}", rate) for name, rate in ceilings["matmul_flops"].items()]
    roofs.append(Roof("the model's own products", ceilings["products_flops"]))
    limit = ceilings["matmul_flops"][DTYPES[result["precision"]]]
    for number, dot in enumerate(dots, 1):
        above = min(limit, dot.intensity * ceilings["copy_bytes"])
        rows.append([f"{number} {dot.name}", shown(dot.intensity), _flops(dot.flops), f"{dot.flops / above:.0%}"])
    text = (
        "What reads and writes much for each operation lies below the sloping line, the bandwidth of a copy; the rest "
        "below the rate of matrix products. Bytes are the fewest that have to be moved: of a step, factors and results "
        "of each product once, and the optimiser's. Integer work (masking) has no place here."
    )
    table = _table(["", "operations a byte", "reached", "of the roof"], rows)
    return _section("Roofline", text, roofline(dots, roofs, ceilings["copy_bytes"]), table, commands)


def _step(result: Result, parts: list[Result]) -> str:
    made = ""
    for part in _measured(parts, "step"):
        found = part["result"]
        seconds, images = found["seconds"], found["settings"]["batch_size"] * found["ranks"]
        rows = []
        for name in _contestants(seconds):
            useful = found["useful_flops"][name] / quartiles(seconds[name])[1]
            rows.append(
                [
                    *_speed(_label(name), seconds[name], images),
                    f"{times_as_fast(seconds, OURS, name):.2f}",
                    _flops(useful),
                    f"{useful / result['ceilings']['products_flops']:.0%}",
                    f"{found['peak_bytes'][name] / 2**20:,.0f} MiB" if name in found["peak_bytes"] else "–",
                ]
            )
        head = ["step", "images/s", "quartiles", "fastmae, times as fast", "useful", "of own products", "memory"]
        text = (
            f"A training step of {result['model']} with {images} images: forward, backward, optimiser. All start from "
            "the same weights, images and masks, and their losses agree. Useful operations are those that the loss "
            "needs, whatever a contestant computes; beside them the rate of the model's own products alone."
        )
        chart = _speed_bars({_label(name): seconds[name] for name in _contestants(seconds)}, images)
        made += _section("Images a second beside the peers", text, chart, _table(head, rows), [part["command"]])
        made += _phases(found, part["command"])
    return made


def _phases(found: Result, command: str) -> str:
    rows, drawn = [], {}
    for name in _contestants(found["seconds"]):
        times = {phase: samples[name] for phase, samples in found["phases"].items() if name in samples}
        if times:
            drawn[_label(name)] = {phase: 1e3 * quartiles(samples)[1] for phase, samples in times.items()}
            rows.append([_label(name), *(_milliseconds(times.get(phase)) for phase in found["phases"])])
    if not drawn:
        return ""
    text = (
        "Differences between calls of one round that go further and further, so a part can come out below 0 by noise."
    )
    table = _table(["ms, quartiles", *found["phases"]], rows)
    return _section("Where a step's time goes", text, stacked(drawn, "ms"), table, [command])


def _series(
    result: Result,
    parts: list[Result],
    *,
    kind: str,
    title: str,
    text: str,
    across: str,
    at: Callable[[Result], float],
    ideal: str = "",
) -> str:
    """Curves through the measured steps of a kind, by the number that ``at`` finds in them."""
    series: dict[str, list[Point]] = {}
    rows, measured = [], _measured(parts, kind)
    for part in measured:
        found = part["result"]
        seconds, images = found["seconds"], found["settings"]["batch_size"] * found["ranks"]
        for name in _contestants(seconds):
            series.setdefault(_label(name), []).append((at(found), *_rates(seconds[name], images)))
            speed = _speed(_label(name), seconds[name], images)
            rows.append([f"{at(found):g}", *speed, f"{times_as_fast(seconds, OURS, name):.2f}"])
    if not series:
        return ""
    chart = curves(series, colours_of(series), across, "images/s", ideal)
    table = _table([across, "step", "images/s", "quartiles", "fastmae, times as fast"], rows)
    return _section(title, text, chart, table, [part["command"] for part in measured])


def _kernels(result: Result, parts: list[Result]) -> str:
    made = ""
    for part in _measured(parts, "kernels", "attention"):
        title = "The ops" if part["kind"] == "kernels" else "Attention by backend"
        rate = result["ceilings"]["copy_bytes"]
        cases = [case for case in part["result"]["cases"] if case["seconds"]]
        colours = colours_of([OURS, *(name for case in cases for name in case["seconds"])])
        drawn: dict[str, list[Bar]] = {}
        rows = []
        for case in cases:
            label = f"{case['op']} {'fwd+bwd' if case['backward'] else 'fwd'}"
            if case["op"] == "attention":
                label = f"{label}, {case['sizes'].split(', ', 1)[1]}"
            for name, samples in case["seconds"].items():
                low, median, high = quartiles(samples)
                share = [100 * case["bytes"] / seconds / rate for seconds in (high, median, low)]
                drawn.setdefault(label, []).append(Bar(f"{label}, {name}", *share, colours[name]))
                rows.append([f"{label}, {name}", _milliseconds(samples, 3), f"{share[1]:.1f} %"])
        if drawn:
            text = (
                "Beside a copy of the fewest bytes that the op must move. Results agree with the definition in float64."
            )
            legend = {name: colours[name] for case in cases for name in case["seconds"]}
            chart = bars(drawn, "% of a copy", legend=legend)
            table = _table(["op", "ms, quartiles", "of a copy"], rows)
            made += _section(title, text, chart, table, [part["command"]])
    return made


def _loader(result: Result, parts: list[Result]) -> str:
    made = ""
    for part in _measured(parts, "loader"):
        seconds, threads = part["result"]["seconds"], part["result"]["num_workers"]
        base = next((name for name in seconds if name.startswith(PUBLISHED)), None)
        rows = [
            [*_speed(name, samples, 1), f"{times_as_fast(seconds, name, base):.2f}" if base else "–"]
            for name, samples in seconds.items()
        ]
        known = colours_of(["pool", PUBLISHED, "dali-cpu", "dali-gpu"])
        colours = {name: known.get(name.split(",")[0], OTHERS) for name in seconds}
        limit = result["ceilings"]["decoded"].get(str(threads))
        limits = {f"whole JPEGs decoded, {_threads(threads)}": limit} if limit else {}
        text = "From files in the page cache to crops on the device, beside a DataLoader with Pillow as published."
        chart = _speed_bars(seconds, 1, colours, limits)
        table = _table(["from", "images/s", "quartiles", "times published"], rows)
        made += _section("Loading", text, chart, table, [part["command"]])
    return made


def _end_to_end(result: Result, parts: list[Result]) -> str:
    made = ""
    for part in _measured(parts, "end-to-end"):
        seconds = part["result"]["seconds"]
        rows = [
            [*_speed(name, samples, 1), f"{times_as_fast(seconds, name, CACHED):.1%}"]
            for name, samples in seconds.items()
        ]
        text = (
            "JPEG files to new weights: our loader feeding our step; our step alone, on a batch that lies ready; the "
            "published pipeline feeding the published loop. What is missing to 100 % is what loading costs."
        )
        table = _table(["training", "images/s", "quartiles", "of a batch on the device"], rows)
        made += _section("End to end", text, _speed_bars(seconds, 1), table, [part["command"]])
    return made


SECTIONS: tuple[Callable[[Result, list[Result]], str], ...] = (
    _step,
    partial(
        _series,
        kind="batch-sizes",
        title="By batch size",
        text="The same step with more and fewer images.",
        across="images a step",
        at=lambda found: found["settings"]["batch_size"],
    ),
    partial(
        _series,
        kind="input-sizes",
        title="By image size",
        text="The same step on larger and smaller images; three quarters of the patches are masked in all.",
        across="pixels a side",
        at=lambda found: found["settings"]["input_size"],
    ),
    partial(
        _series,
        kind="ranks",
        title="By ranks on this machine",
        text="Each rank has as many images and as many threads; all ranks' images count, and the slowest rank's time.",
        across="ranks",
        at=lambda found: found["ranks"],
        ideal="as many times the first",
    ),
    _end_to_end,
    _loader,
    _ceilings,
    _roofline,
    _kernels,
)


def _tiles(result: Result, parts: list[Result]) -> str:
    """The figures that the rest explains."""
    tiles = []
    for part in _measured(parts, "step"):
        found = part["result"]
        seconds, images = found["seconds"], found["settings"]["batch_size"] * found["ranks"]
        tiles.append((shown(_rates(seconds[OURS], images)[1]), "images/s, a training step"))
        others = [name for name in ("published", "strong", "transformers", "timm") if name in seconds]
        tiles += [(f"{times_as_fast(seconds, OURS, name):.2f} ×", f"as fast as {_the(name)}") for name in others]
        useful = found["useful_flops"][OURS] / quartiles(seconds[OURS])[1]
        tiles.append((f"{useful / result['ceilings']['products_flops']:.0%}", "of the rate of its products alone"))
    for part in _measured(parts, "end-to-end"):
        left = times_as_fast(part["result"]["seconds"], FROM_FILES, CACHED)
        tiles.append((f"{left:.1%}", "of its speed left when it loads JPEGs"))
    drawn = "".join(f'<div class="tile"><b>{escape(value)}</b>{escape(name)}</div>' for value, name in tiles)
    return f'<div class="tiles">{drawn}</div>'


def _missing(result: Result, parts: list[Result]) -> str:
    """Everything that was to be measured and was not, with the reason."""
    rows: list[Row] = [[part["command"], f"{part['outcome']}: {part['reason']}"] for part in parts if part["reason"]]
    for part in parts:
        found = part["result"] or {}
        left_out = dict(found.get("left_out", {}))
        for case in found.get("cases", ()):
            left_out |= {f"{case['op']} {name}": reason for name, reason in case["left_out"].items()}
            if case["refused"]:
                left_out[f"{case['op']}, {case['sizes']}"] = f"refused: {case['refused']}"
        rows += [[f"{part['kind']}: {name}", reason] for name, reason in left_out.items()]
    rows += [[command, "not yet come to"] for command in result["to_come"]]
    if not rows:
        return ""
    rows = list(dict.fromkeys(map(tuple, rows)))
    return _section("Not measured", "What could not run here, or was refused.", "", _table(["what", "why"], rows), [],
                    "missing")  # fmt: skip


# --- pieces -----------------------------------------------------------------------------------------------------------


def _measured(parts: Iterable[Result], *kinds: str) -> list[Result]:
    """Parts of these kinds that have samples."""
    return [part for part in parts if part["kind"] in kinds and part["result"] is not None]


def _contestants(seconds: Samples) -> list[str]:
    """Ours first, then the peers, in the order in which they ran."""
    return [name for name in seconds if name == OURS] + [name for name in seconds if name != OURS]


def _label(name: str) -> str:
    return LABELS.get(name, name)


def _the(name: str) -> str:
    """As a sentence says it."""
    return f"the {_label(name)}" if name in ("published", "strong") else _label(name)


def _rates(samples: Sequence[float], images: float) -> tuple[float, float, float]:
    """Quartiles and median of images a second, from seconds."""
    low, median, high = (images / seconds for seconds in reversed(quartiles(samples)))
    return low, median, high


def _speed(name: str, samples: Sequence[float], images: float) -> list[str]:
    """Three cells: the name, images a second, and quartiles of it."""
    low, median, high = _rates(samples, images)
    return [name, shown(median), f"{shown(low)} – {shown(high)}"]


def _speed_bars(
    seconds: Samples, images: float, colours: Mapping[str, str] | None = None, limits: Mapping[str, float] | None = None
) -> str:
    colours = colours or colours_of(seconds)
    rows = {name: [Bar(name, *_rates(samples, images), colours[name])] for name, samples in seconds.items()}
    return bars(rows, "images/s", limits)


def _threads(number: int | str) -> str:
    return f"{number} thread{'' if str(number) == '1' else 's'}"


def _flops(rate: float) -> str:
    return f"{shown(rate / 1e12)} TFLOP/s" if rate >= 1e11 else f"{shown(rate / 1e9)} GFLOP/s"


def _milliseconds(samples: Sequence[float] | None, digits: int = 1) -> str:
    if samples is None:
        return "–"
    low, median, high = (1e3 * quartile for quartile in quartiles(samples))
    return f"{median:.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


def _section(title: str, text: str, chart: str, table: str, commands: Iterable[str], kind: str = "") -> str:
    drawn = f'<div class="chart">{chart}</div>' if chart else ""
    return (
        f'<section class="{kind}"><h2>{escape(title)}</h2><p class="quiet">{escape(text)}</p>'
        f'<div class="beside">{drawn}<div class="numbers">{table}</div></div>{_commands(commands)}</section>'
    )


def _table(head: Row, rows: Iterable[Row]) -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _commands(commands: Iterable[str]) -> str:
    lines = "\n".join(map(escape, commands))
    return f"<pre>{lines}</pre>" if lines else ""


def main(words: Sequence[str]) -> int:
    """Makes the report of a kept result; 0, or 2 for wrong words."""
    if len(words) != 2:
        print("usage: python -m fastmae.benchmarks.html RESULT.json REPORT.html", file=sys.stderr)
        return 2
    Path(words[1]).write_text(report(json.loads(Path(words[0]).read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
