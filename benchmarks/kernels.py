"""How fast are the ops and attention, beside eager PyTorch, beside torch.compile, and beside a plain copy?

    fastmae bench kernels --models mae_vit_base_patch16 --batch_size 32 --output benchmarks/results   # on a CPU
    fastmae bench kernels --batch_size 256 --output benchmarks/results                               # on a GPU

A case in which ours or eager PyTorch disagrees with the definition in float64 is not timed, and neither is a compiled
function that does. GB/s counts the fewest bytes that the op must move, whatever an implementation moves; the share is
that of a copy measured on the same machine beforehand.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from fastmae.benchmarks.cases import Case, Function, Measured, as_json, cases_of, measure
from fastmae.benchmarks.harness import (
    OURS,
    Ceilings,
    Stopwatch,
    console,
    describe_ceilings,
    machine_name,
    measure_ceilings,
    quartiles,
    speed_up,
    table,
    write_result,
)
from fastmae.config import BenchKernelsConfig, check_bench
from fastmae.ops.attention_table import dtype_name
from fastmae.train.parallel import choose_device
from fastmae.train.precision import choose_precision

EAGER, COMPILED = "eager", "compile"
CPU_BATCH, GPU_BATCH = 32, 256


def bench_kernels(config: BenchKernelsConfig, command: Sequence[str]) -> int:
    """Prints the tables, writes what was asked for, and returns 1 if a case was refused, otherwise 0.

    Raises:
        UserError: settings that cannot work.
    """
    check_bench(config)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    dtype = precision.autocast or torch.float32
    N = config.batch_size or (GPU_BATCH if device.type == "cuda" else CPU_BATCH)
    models = {name: cases_of(name, N, dtype, device) for name in config.models}
    watch = Stopwatch(device=device, rounds=config.rounds, sample_seconds=config.sample_ms / 1e3, graph=config.graph)
    screen, machine = console(), machine_name(device)
    ceilings = measure_ceilings(device)
    screen.print(f"{machine}: {describe_ceilings(ceilings)}")

    measured: list[Measured] = []
    for model, of_all_ops in models.items():
        cases = [case for case in of_all_ops if case.op in config.only]
        of_model = [
            measure(case, implementations_of(case, config.compile), watch, optional=[COMPILED]) for case in cases
        ]
        screen.print(speed_table(f"{model}, {N} images, {precision.name}", of_model, ceilings, EAGER))
        for line in untimed(of_model):
            print(line)
        measured += of_model

    if config.output is not None:
        name = f"kernels-{machine}-n{N}-{precision.name}"
        content = {"ceilings": asdict(ceilings), "precision": dtype_name(dtype), "batch_size": N}
        content |= {"cases": [as_json(case) for case in measured]}
        path = write_result(config.output, name, command=command, settings=config, measured=content)
        print(path)
        title = f"{machine}, {N} images, {precision.name}"
        draw_picture(path.with_suffix(".png"), title, measured, ceilings, EAGER)
    return 1 if any(case.refused for case in measured) else 0


def implementations_of(case: Case, compiled: bool) -> dict[str, Function]:
    found = {OURS: case.ours, EAGER: case.eager}
    if compiled:
        torch.compiler.reset()  # each case is compiled for itself, for its one shape
        found[COMPILED] = torch.compile(case.eager, fullgraph=True, dynamic=False)
    return found


def speed_table(title: str, measured: Iterable[Measured], ceilings: Ceilings, base: str) -> Table:
    """A row per implementation; GB/s and TFLOP/s of the work that every implementation must do."""
    columns = (
        "op",
        "implementation",
        "median ms",
        "quartiles",
        "GB/s",
        "of a copy",
        f"speed-up over {base}",
        "TFLOP/s",
    )
    made = table(title, columns, (), left=2)
    for one in measured:
        case, names = one.case, [one.case.name, one.case.sizes]
        for name, samples in one.seconds.items():
            low, median, high = quartiles(samples)
            made.add_row(
                names.pop(0) if names else "",
                _shown(name, case),
                f"{1e3 * median:.3f}",
                f"{1e3 * low:.3f} – {1e3 * high:.3f}",
                f"{case.moved / median / 1e9:.3g}",
                f"{case.moved / median / ceilings.copy_bytes:.0%}",
                f"{speed_up(one.seconds, name, base):.2f}" if base in one.seconds else "",
                f"{case.flops / median / 1e12:.3g}" if case.flops else "",
            )
        for name in names:
            made.add_row(name)
        made.add_section()
    return made


def _shown(name: str, case: Case) -> str:
    """An implementation with what it consists of: fastmae's backend, and the kernel behind torch's attention."""
    if name == OURS:
        return f"{name} ({case.backend}, {case.sdpa})" if case.backend == "sdpa" else f"{name} ({case.backend})"
    return f"{name} ({case.sdpa})" if name == "sdpa" else name


def untimed(measured: Iterable[Measured]) -> list[str]:
    """A line for each reason why an implementation was not timed, with the cases that it holds for."""
    cases: dict[str, list[str]] = {}
    for one in measured:
        reasons = [f"refused: {one.refused}"] if one.refused else []
        reasons += [f"{name} {reason}" for name, reason in one.skipped.items()]
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
    for index, name in enumerate(names):
        rows = [row for row, one in enumerate(timed) if name in one.seconds]
        y = [row + (index - (len(names) - 1) / 2) * height for row in rows]
        speeds = [timed[row].case.moved / quartiles(timed[row].seconds[name])[1] for row in rows]
        share.barh(y, [100 * speed / ceilings.copy_bytes for speed in speeds], height, label=name)
        ratio.barh(y, [speed_up(timed[row].seconds, name, base) for row in rows], height)
    labels = [f"{one.case.name}\n{one.case.model}, {one.case.sizes}" for one in timed]
    share.set_yticks(range(len(timed)), labels, fontsize=7)
    share.invert_yaxis()
    share.set_xlabel(f"% of the bandwidth of a copy ({ceilings.copy_bytes / 1e9:.3g} GB/s, measured)")
    share.axvline(100, color="gray", linewidth=0.8)
    ratio.set_xlabel(f"speed-up over {base}, above 1 is faster")
    ratio.axvline(1, color="gray", linewidth=0.8)
    if timed:
        share.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    print(path)
