"""Measured cases for people: a table on the screen and a picture."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastmae.benchmarks.cases import OURS
from fastmae.benchmarks.measure import Measured
from fastmae.benchmarks.timing import Ceilings, quartiles, times_as_fast

FILE_WIDTH = 140  # of a table that goes into a file, whose width nobody knows


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False)


def describe_ceilings(ceilings: Ceilings) -> str:
    rates = ", ".join(f"{flops / 1e12:.3g} TFLOP/s in {name}" for name, flops in ceilings.matmul_flops.items())
    return f"copies {ceilings.copy_bytes / 1e9:.3g} GB/s (read + written), multiplies matrices at {rates}"


def table(title: str, measured: Iterable[Measured], ceilings: Ceilings, base: str) -> Table:
    """A row a contestant; GB/s and TFLOP/s of the work that cannot be left out, ratios to the contestant ``base``."""
    made = Table(title=title, title_justify="left")
    made.add_column("op", no_wrap=True)
    made.add_column("contestant", no_wrap=True)
    for column in ("median ms", "quartiles", "GB/s", "of a copy", f"times {base}", "TFLOP/s"):
        made.add_column(column, justify="right", no_wrap=True)
    for one in measured:
        case, remarks = one.case, [one.case.name, one.case.sizes]
        for name, samples in one.seconds.items():
            low, median, high = quartiles(samples)
            made.add_row(
                remarks.pop(0) if remarks else "",
                f"{name} ({case.backend})" if name == OURS else name,
                f"{1e3 * median:.3f}",
                f"{1e3 * low:.3f} – {1e3 * high:.3f}",
                f"{case.moved / median / 1e9:.3g}",
                f"{case.moved / median / ceilings.copy_bytes:.0%}",
                f"{times_as_fast(one.seconds, name, base):.2f}" if base in one.seconds else "",
                f"{case.flops / median / 1e12:.3g}" if case.flops else "",
            )
        for remark in remarks:
            made.add_row(remark)
        made.add_section()
    return made


def complaints(measured: Iterable[Measured]) -> list[str]:
    """A line for each reason why somebody was not timed, with the cases that it holds for."""
    cases: dict[str, list[str]] = {}
    for one in measured:
        reasons = [f"refused, for {one.refused}"] if one.refused else []
        reasons += [f"{name} {reason}" for name, reason in one.left_out.items()]
        for reason in reasons:
            cases.setdefault(reason, []).append(f"{one.case.name} ({one.case.sizes})")
    return [f"{reason}: {'; '.join(names)}" for reason, names in cases.items()]


def draw_picture(path: Path, title: str, measured: Sequence[Measured], ceilings: Ceilings, base: str) -> None:
    """Two bar charts, a group of bars a case: share of a copy's bandwidth, and speed beside ``base``."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed; pip install 'fastmae[bench]'", file=sys.stderr)
        return
    timed = [one for one in measured if one.seconds]
    names = list(dict.fromkeys(name for one in timed for name in one.seconds))
    figure = Figure(figsize=(14, 1.5 + 0.5 * len(timed)), layout="constrained")
    share, ratio = figure.subplots(1, 2, sharey=True)
    height = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        rows = [row for row, one in enumerate(timed) if name in one.seconds]
        y = [row + (place - (len(names) - 1) / 2) * height for row in rows]
        speeds = [timed[row].case.moved / quartiles(timed[row].seconds[name])[1] for row in rows]
        share.barh(y, [100 * speed / ceilings.copy_bytes for speed in speeds], height, label=name)
        ratio.barh(y, [times_as_fast(timed[row].seconds, name, base) for row in rows], height)
    labels = [f"{one.case.name}\n{one.case.model}, {one.case.sizes}" for one in timed]
    share.set_yticks(range(len(timed)), labels, fontsize=7)
    share.invert_yaxis()
    share.set_xlabel(f"% of the bandwidth of a copy ({ceilings.copy_bytes / 1e9:.3g} GB/s, measured)")
    share.axvline(100, color="gray", linewidth=0.8)
    ratio.set_xlabel(f"times as fast as {base}")
    ratio.axvline(1, color="gray", linewidth=0.8)
    if timed:
        share.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    print(path)
