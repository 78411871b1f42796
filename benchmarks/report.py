"""From the JSON of ``fastmae bench all`` to one page that needs nothing else: charts, their numbers, their commands.

python -m fastmae.benchmarks.report all-….json report.html         # once more, from a kept result
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmae.benchmarks.charts import Interval, bars, curves, roofline, shown, stacked
from fastmae.benchmarks.end_to_end import CACHED, FROM_FILES
from fastmae.benchmarks.harness import OURS, Samples, milliseconds, quartiles, rates, speed_up

Result = dict[str, Any]
Row = Sequence[str]
OFFICIAL = "official"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # of the products, by precision
LABELS = {
    OFFICIAL: "official loop",
    "strong": "strong baseline",
    "strong-compiled": "strong baseline, compiled",
    "transformers-compiled": "transformers, compiled",
    "timm": "timm blocks",
}
FASTER = "speed-up of fastmae over it"
SERIES = (
    ("batch-sizes", "By batch size", "The same step with more and fewer images.", "images per step", ""),
    (
        "input-sizes", "By image size",
        "The same step on larger and smaller images; three quarters of the patches are masked in all.",
        "pixels a side", "",
    ),
    (
        "ranks", "By ranks on this machine",
        "Each rank has as many images and as many threads; all ranks' images count, and the slowest rank's time.",
        "ranks", "as many times the first",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    columns: Row
    rows: Sequence[Row]
    chart: str = ""
    commands: Sequence[str] = ()
    kind: str = ""


def report(result: Result) -> str:
    """The page, as HTML.

    Raises:
        ImportError: jinja2 is not installed.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(Path(__file__).with_name("report.html.jinja").read_text())
    sections = [section for make in MAKERS for section in make(result)]
    return template.render(
        title=f"fastmae on {result['machine']}: {result['model']}, {result['precision']}",
        provenance=_provenance(result),
        command=shlex.join(result["command"]),
        tiles=list(_tiles(result)),
        sections=sections,
    )


def _provenance(result: Result) -> str:
    hardware, versions = result["hardware"], result["versions"]
    cpu = hardware.get("processor") or f"{hardware['machine']} ({hardware['cpu_capability']})"
    processor = ", ".join(hardware["gpus"]) or cpu
    load = " ".join(f"{value:.1f}" for value in result["load"])
    packages = ("python", "torch", "triton", "transformers", "timm")
    software = ", ".join(f"{name} {versions[name]}" for name in packages if name in versions)
    return (
        f"{result['date']} · {processor}, {hardware['cores']} cores, {hardware['torch_threads']} threads, load {load} "
        f"beforehand · {software} · commit {result['commit']}"
    )


def _tiles(result: Result) -> Iterator[tuple[str, str]]:
    """The figures that the rest explains."""
    for part in _measured(result, "step"):
        seconds, useful = part["result"]["seconds"], part["result"]["useful_flops"][OURS]
        yield shown(rates(seconds[OURS], _images(part["result"]))[1]), "images/s, a training step"
        for name in (OFFICIAL, "strong", "transformers", "timm"):
            if name in seconds:
                yield f"{speed_up(seconds, OURS, name):.2f} ×", f"speed-up over {_label(name)}"
        share = useful / quartiles(seconds[OURS])[1] / result["ceilings"]["products_flops"]
        yield f"{share:.0%}", "of the rate of its products alone"
    for part in _measured(result, "end-to-end"):
        left = speed_up(part["result"]["seconds"], FROM_FILES, CACHED)
        yield f"{left:.1%}", "of its speed left when it loads JPEGs"


def _steps(result: Result) -> Iterator[Section]:
    for part in _measured(result, "step"):
        found = part["result"]
        seconds, images = found["seconds"], _images(found)
        rows = []
        for name in _ordered(seconds):
            useful = found["useful_flops"][name] / quartiles(seconds[name])[1]
            memory = f"{found['peak_bytes'][name] / 2**20:,.0f} MiB" if name in found["peak_bytes"] else "–"
            speed = _speed(_label(name), seconds[name], images)
            share = f"{useful / result['ceilings']['products_flops']:.0%}"
            rows.append([*speed, f"{speed_up(seconds, OURS, name):.2f}", _flops(useful), share, memory])
        yield Section(
            "Images per second beside the baselines",
            f"A training step of {result['model']} with {images} images: forward, backward, optimiser. All start from "
            "the same weights, images and masks, and their losses agree. Useful operations are those that the loss "
            "needs, whatever an implementation computes; beside them the rate of the model's own products alone.",
            ["step", "images/s", "quartiles", FASTER, "useful", "of own products", "memory"],
            rows,
            _bars({_label(name): seconds[name] for name in _ordered(seconds)}, images),
            [part["command"]],
        )
        phases = found["phases"]
        parts = {_label(name): {phase: samples[name] for phase, samples in phases.items() if name in samples}
                 for name in _ordered(seconds)}  # fmt: skip
        parts = {name: times for name, times in parts.items() if times}
        if parts:
            medians = {name: {phase: 1e3 * quartiles(samples)[1] for phase, samples in times.items()}
                       for name, times in parts.items()}  # fmt: skip
            yield Section(
                "Where a step's time goes",
                "Differences between calls of one round that go further and further: noise can make a part negative.",
                ["ms, quartiles", *phases],
                [[name, *(milliseconds(times[phase]) if phase in times else "–" for phase in phases)]
                 for name, times in parts.items()],
                stacked(medians, "ms"),
                [part["command"]],
            )  # fmt: skip


def _series(result: Result) -> Iterator[Section]:
    """Curves through the measured steps of a kind, by the number that changes."""
    for kind, title, text, across, ideal in SERIES:
        measured = _measured(result, kind)
        series: dict[str, list[tuple[float, Interval]]] = {}
        rows: list[Row] = []
        for part in measured:
            found = part["result"]
            batch, side = found["settings"]["batch_size"], found["settings"]["input_size"]
            at = {"batch-sizes": batch, "input-sizes": side, "ranks": found["ranks"]}[kind]
            for name in _ordered(found["seconds"]):
                samples = found["seconds"][name]
                series.setdefault(_label(name), []).append((at, rates(samples, _images(found))))
                faster = f"{speed_up(found['seconds'], OURS, name):.2f}"
                rows.append([f"{at:g}", *_speed(_label(name), samples, _images(found)), faster])
        if series:
            chart = curves(series, across, "images/s", ideal)
            columns: list[str] = [across, "step", "images/s", "quartiles", FASTER]
            if len(series) == 1:  # there is nothing to compare, and one name to say
                columns, rows = [across, "images/s", "quartiles"], [[row[0], *row[2:4]] for row in rows]
            yield Section(title, text, columns, rows, chart, [part["command"] for part in measured])


def _end_to_end(result: Result) -> Iterator[Section]:
    for part in _measured(result, "end-to-end"):
        seconds = part["result"]["seconds"]
        yield Section(
            "End to end",
            "JPEG files to new weights: our loader feeding our step; our step alone, on a batch that lies ready; the "
            "official pipeline feeding the official loop. What is missing to 100 % is what loading costs.",
            ["training", "images/s", "quartiles", "of a batch on the device"],
            [[*_speed(name, samples), f"{speed_up(seconds, name, CACHED):.1%}"] for name, samples in seconds.items()],
            _bars(seconds),
            [part["command"]],
        )


def _loader(result: Result) -> Iterator[Section]:
    for part in _measured(result, "loader"):
        seconds, threads = part["result"]["seconds"], str(part["result"]["num_workers"])
        base = next((name for name in seconds if name.startswith(OFFICIAL)), None)
        limit = result["ceilings"]["decoded"].get(threads)
        yield Section(
            "Loading",
            "From files in the page cache to crops on the device, beside the official DataLoader with Pillow.",
            ["from", "images/s", "quartiles", "speed-up over official"],
            [[*_speed(name, samples), f"{speed_up(seconds, name, base):.2f}" if base else "–"]
             for name, samples in seconds.items()],
            _bars(seconds, limits={f"whole JPEGs decoded, {_threads(threads)}": limit} if limit else None),
            [part["command"]],
        )  # fmt: skip


def _ceilings(result: Result) -> Iterator[Section]:
    found = result["ceilings"]
    rows = [["copy, read + written", f"{found['copy_bytes'] / 1e9:.3g} GB/s"]]
    rows += [[f"large square product, {name}", _flops(rate)] for name, rate in found["matmul_flops"].items()]
    own = f"the model's own products, {result['precision']}, {result['batch_size']} images"
    rows.append([own, _flops(found["products_flops"])])
    rows += [[f"JPEGs decoded, {_threads(number)}", f"{rate:.0f}/s"] for number, rate in found["decoded"].items()]
    text = "Measured first, the best of several samples: what the rest is compared with."
    yield Section("What this machine can do", text, ["ceiling", "rate"], [*rows])


def _roofline(result: Result) -> Iterator[Section]:
    rate, points, rows, commands = result["ceilings"]["copy_bytes"], [], [], []
    limit = result["ceilings"]["matmul_flops"][DTYPES[result["precision"]]]

    def add(name: str, label: str, intensity: float, flops: float) -> None:
        points.append((name, intensity, flops))
        rows.append([label, shown(intensity), _flops(flops), f"{flops / min(limit, intensity * rate):.0%}"])

    for part in _measured(result, "step"):
        flops = part["result"]["useful_flops"][OURS]
        reached = flops / quartiles(part["result"]["seconds"][OURS])[1]
        add("training step", "training step", flops / part["result"].get("step_bytes", result["step_bytes"]), reached)
        commands.append(part["command"])
    for part in _measured(result, "kernels"):
        for case in part["result"]["cases"]:
            if OURS in case["seconds"] and case["operations"]:
                direction = "forward + backward" if case["backward"] else "forward"
                seconds = quartiles(case["seconds"][OURS])[1]
                label = f"{case['op']} {direction}, {case['sizes']}"
                add(case["op"], label, case["operations"] / case["bytes"], case["operations"] / seconds)
        commands.append(part["command"])
    if points:
        roofs = {f"square product, {name}": rate for name, rate in result["ceilings"]["matmul_flops"].items()}
        roofs["the model's own products"] = result["ceilings"]["products_flops"]
        text = (
            "What reads and writes much for each operation lies below the sloping line, the bandwidth of a copy; the "
            "rest below the rate of matrix products. Bytes are the fewest that have to be moved: of a step, factors "
            "and results of each product once, and the optimiser's. Integer work (masking) has no place here."
        )
        columns = ["ours", "operations per byte", "reached", "of the roof"]
        yield Section("Roofline", text, columns, rows, roofline(points, roofs, rate), commands)


def _kernels(result: Result) -> Iterator[Section]:
    for part in _measured(result, "kernels", "attention"):
        drawn: dict[str, dict[str, Interval]] = {}
        rows: list[Row] = []
        for case in part["result"]["cases"]:
            label = f"{case['op']} {'fwd+bwd' if case['backward'] else 'fwd'}"
            if case["op"] in ("attention", "linear"):
                label = f"{label}\n{case['sizes'].split(', ', 1 if case['op'] == 'attention' else 0)[-1]}"
            for name, samples in case["seconds"].items():
                copied = case["bytes"] / result["ceilings"]["copy_bytes"]
                low, median, high = rates(samples, 100 * copied)
                drawn.setdefault(label, {})[name] = (low, median, high)
                rows.append([label.replace("\n", ", "), name, milliseconds(samples, 3), f"{median:.1f} %"])
        if rows:
            yield Section(
                "The ops" if part["kind"] == "kernels" else "Attention by backend",
                "Beside a copy of the fewest bytes that the op must move. Results agree with those in float64.",
                ["op", "implementation", "ms, quartiles", "of a copy"],
                rows,
                bars(drawn, "% of a copy"),
                [part["command"]],
            )


def _missing(result: Result) -> Iterator[Section]:
    """Everything that was to be measured and was not, with the reason."""
    rows = [(part["command"], f"{part['outcome']}: {part['reason']}") for part in result["parts"] if part["reason"]]
    for part in result["parts"]:
        found = part["result"] or {}
        skipped = dict(found.get("skipped", {}))
        for case in found.get("cases", ()):
            skipped |= {f"{case['op']} {name}": reason for name, reason in case["skipped"].items()}
            if case["refused"]:
                skipped[f"{case['op']}, {case['sizes']}"] = f"refused: {case['refused']}"
        rows += [(f"{part['kind']}: {name}", reason) for name, reason in skipped.items()]
    rows += [(command, "not yet reached") for command in result["to_come"]]
    if rows:
        text = "What could not run here, or was refused."
        yield Section("Not measured", text, ["what", "why"], list(dict.fromkeys(rows)), kind="missing")


MAKERS: tuple[Callable[[Result], Iterator[Section]], ...] = (
    _steps, _series, _end_to_end, _loader, _ceilings, _roofline, _kernels, _missing,
)  # fmt: skip


# --- pieces -----------------------------------------------------------------------------------------------------------


def _measured(result: Result, *kinds: str) -> list[Result]:
    """Parts of these kinds that have samples."""
    return [part for part in result["parts"] if part["kind"] in kinds and part["result"] is not None]


def _images(found: Result) -> int:
    return int(found["settings"]["batch_size"] * found["ranks"])


def _ordered(seconds: Samples) -> list[str]:
    """Ours first, then the others in the order in which they ran."""
    return sorted(seconds, key=lambda name: name != OURS)


def _label(name: str) -> str:
    return LABELS.get(name, name)


def _speed(name: str, samples: Sequence[float], images: float = 1.0) -> list[str]:
    """Three cells: the name, images per second, and quartiles of it."""
    low, median, high = rates(samples, images)
    return [name, shown(median), f"{shown(low)} – {shown(high)}"]


def _bars(seconds: Samples, images: float = 1.0, limits: dict[str, float] | None = None) -> str:
    """Bars of images per second."""
    return bars({name: {name: rates(samples, images)} for name, samples in seconds.items()}, "images/s", limits)


def _threads(number: str) -> str:
    return f"{number} thread{'' if number == '1' else 's'}"


def _flops(rate: float) -> str:
    return f"{shown(rate / 1e12)} TFLOP/s" if rate >= 1e11 else f"{shown(rate / 1e9)} GFLOP/s"


def in_current_words(text: str) -> str:
    """The JSON of version 0.1 with today's keys and names."""
    for old, new in (("left_out", "skipped"), ("peers", "baselines"), ("published", OFFICIAL)):
        text = text.replace(f'"{old}"', f'"{new}"')
    return text.replace('"published loop', '"official loop').replace("published, ", "official, ")


def main(words: Iterable[str]) -> int:
    """Makes the report of a kept result; 0, or 2 for wrong words."""
    words = list(words)
    if len(words) != 2:
        print("usage: python -m fastmae.benchmarks.report RESULT.json REPORT.html", file=sys.stderr)
        return 2
    Path(words[1]).write_text(report(json.loads(in_current_words(Path(words[0]).read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
