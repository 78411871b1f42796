"""Prints the steps that were measured as one Markdown table, from the files that ``fastmae bench step`` left.

    python -m fastmae.benchmarks.step_table benchmarks/results/step-*.json
    python -m fastmae.benchmarks.step_table --predicted results/step-*h200*.json    # beside benchmarks/predictions.json

Files of the same machine, model, batch and precision become one row, as baselines may have been timed one by one to
keep each measurement short. A ratio is that of the file in which both took turns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastmae.benchmarks.harness import OURS, quartiles, speed_up
from fastmae.benchmarks.step import CEILING_OF

Result = dict[str, Any]
MISSING = "–"


PREDICTIONS = Path(__file__).parent / "predictions.json"


def main(words: Sequence[str]) -> int:
    paths = [word for word in words if word != "--predicted"]
    if not paths:
        print("usage: python -m fastmae.benchmarks.step_table [--predicted] FILE…", file=sys.stderr)
        return 2
    results = [json.loads(Path(path).read_text()) for path in paths]
    print(step_table(results))
    if "--predicted" in words:
        print("\n" + beside_predictions(results, json.loads(PREDICTIONS.read_text())["steps"]))
    return 0


def beside_predictions(results: Iterable[Result], predictions: Sequence[dict[str, Any]]) -> str:
    """Returns a table of the predicted and the measured images per second, in the order of the predictions."""
    measured: dict[tuple[Any, ...], float] = {}
    for result in results:
        settings = result["settings"]
        for name, seconds in result["seconds"].items():
            images = result.get("ranks", 1) * settings["batch_size"]
            measured[settings["model"], settings["batch_size"], _precision(result), name] = (
                images / quartiles(seconds)[1]
            )
    head = ["model", "batch", "precision", "step", "predicted images/s", "measured", "measured / predicted"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in predictions:
        key = one["model"], one["batch_size"], one["precision"], one["step"]
        found, expected = measured.get(key), one["images_per_second"]
        numbers = [MISSING, MISSING] if found is None else [f"{found:.0f}", f"{found / expected:.2f}"]
        lines.append("| " + " | ".join([*map(str, key), f"{expected:.0f}", *numbers]) + " |")
    return "\n".join(lines)


def step_table(results: Iterable[Result]) -> str:
    """Returns the table: a row for each machine, model, batch and precision, small models first."""
    rows: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        rows.setdefault(_key(result), []).append(result)
    keys = sorted(rows, key=lambda key: (key[0], _size(rows[key][0]), *key[1:4], key[4] != "fp32"))
    baselines = _baselines(result for key in keys for result in rows[key])
    switches = _switches(result for key in keys for result in rows[key])
    head = ["processor", "model", "batch", "precision", "images/s", "share of the measured rate"]
    head += [f"times {name}" for name in baselines] + [f"memory beside {name}" for name in baselines[:1]]
    head += [f"{name}, times fastmae" for name in switches]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_row(rows[key], baselines, switches)) + " |" for key in keys]
    return "\n".join(lines)


def _key(result: Result) -> tuple[Any, ...]:
    settings = result["settings"]
    machine = ", ".join(result["hardware"]["gpus"]) or f"{result['hardware']['cores']} × {_processor(result)}"
    return machine, settings["model"], settings.get("input_size") or 0, settings["batch_size"], _precision(result)


def _processor(result: Result) -> str:
    return str(result["hardware"].get("processor") or result["hardware"]["machine"])


def _precision(result: Result) -> str:
    return str(result.get("precisions", {}).get(OURS) or result["settings"]["precision"])


def _size(result: Result) -> float:
    """The operations of an image."""
    return float(result["useful_flops"][OURS]) / result["settings"]["batch_size"]


def _baselines(results: Iterable[Result]) -> list[str]:
    """Those that any file has, the strong one first."""
    names = {name for result in results for name in result["settings"]["baselines"] if name in result["seconds"]}
    return sorted(names, key=lambda name: (not name.startswith("strong"), name))


def _switches(results: Iterable[Result]) -> list[str]:
    return sorted({name for result in results for name in result["settings"]["switches"] if name in result["seconds"]})


def _row(results: list[Result], baselines: Sequence[str], switches: Sequence[str]) -> list[str]:
    newest_first = sorted(results, key=lambda result: (result["date"], len(result["seconds"])), reverse=True)
    with_name = {
        name: next((result for result in newest_first if name in result["seconds"]), None)
        for name in (*baselines, *switches)
    }
    ours = next((with_name[name] for name in baselines if with_name[name] is not None), newest_first[0])
    assert ours is not None
    machine, model, side, batch, precision = _key(ours)
    median = quartiles(ours["seconds"][OURS])[1]
    ceilings = ours.get("ceilings")
    rate = ceilings["matmul_flops"].get(CEILING_OF[precision]) if ceilings else None
    share = (
        MISSING if rate is None else f"{ours['useful_flops'][OURS] / median / rate:.0%} of {rate / 1e12:.3g} TFLOP/s"
    )
    row = [machine, f"{model}{f', {side} pixels' if side else ''}", str(batch), precision]
    row += [f"{ours.get('ranks', 1) * batch / median:.3g}", share]
    row += [_times(with_name[name], OURS, name) for name in baselines]
    row += [_memory(with_name[name], name) for name in baselines[:1]]
    return row + [_times(with_name[name], name, OURS) for name in switches]


def _times(result: Result | None, name: str, base: str) -> str:
    return MISSING if result is None else f"{speed_up(result['seconds'], name, base):.2f}"


def _memory(result: Result | None, name: str) -> str:
    peaks = {} if result is None else result["peak_bytes"]
    return f"{peaks[OURS] / peaks[name]:.0%}" if {OURS, name} <= peaks.keys() else MISSING


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
