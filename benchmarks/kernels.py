"""How fast are the ops and attention, beside eager PyTorch, beside torch.compile, and beside a plain copy?

    fastmae bench kernels --models mae_vit_base_patch16 --batch_size 32 --output benchmarks/results   # on a CPU
    fastmae bench kernels --batch_size 256 --output benchmarks/results                               # on a GPU

No time is given to a case in which ours or eager PyTorch disagrees with the definition in float64, and none to a
compiled function that does. GB/s counts the fewest bytes that the op must move, whatever a contestant moves; the share
is that of a copy measured on the same machine beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from fastmae.benchmarks.cases import OURS, Case, Function, all_cases, known_shapes
from fastmae.benchmarks.measure import Measured, as_json, measure
from fastmae.benchmarks.report import complaints, console, describe_ceilings, draw_picture, table
from fastmae.benchmarks.timing import Stopwatch, machine_name, measure_ceilings, write_result
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
    models = known_shapes(config.models)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    dtype = precision.autocast or torch.float32
    N = config.batch_size or (GPU_BATCH if device.type == "cuda" else CPU_BATCH)
    watch = Stopwatch(device=device, rounds=config.rounds, sample_seconds=config.sample_ms / 1e3, graph=config.graph)
    screen, machine = console(), machine_name(device)
    ceilings = measure_ceilings(device)
    screen.print(f"{machine}: {describe_ceilings(ceilings)}")

    measured: list[Measured] = []
    for shapes in models:
        cases = [case for case in all_cases(shapes, N, dtype, device) if case.op in config.only]
        of_model = [
            measure(case, contestants_of(case, config.compile), watch, dispensable=[COMPILED]) for case in cases
        ]
        screen.print(table(f"{shapes.model}, {N} images, {precision.name}", of_model, ceilings, EAGER))
        for complaint in complaints(of_model):
            print(complaint)
        measured += of_model

    if config.output is not None:
        name = f"kernels-{machine}-n{N}-{precision.name}"
        content = {"ceilings": asdict(ceilings), "precision": dtype_name(dtype), "batch_size": N}
        content |= {"cases": [as_json(one) for one in measured]}
        path = write_result(config.output, name, command=command, settings=config, measured=content)
        print(path)
        title = f"{machine}, {N} images, {precision.name}"
        draw_picture(path.with_suffix(".png"), title, measured, ceilings, EAGER)
    return 1 if any(one.refused for one in measured) else 0


def contestants_of(case: Case, compiled: bool) -> dict[str, Function]:
    found = {OURS: case.ours, EAGER: case.eager}
    if compiled:
        torch.compiler.reset()  # each case is compiled for itself, for its one shape
        found[COMPILED] = torch.compile(case.eager, fullgraph=True, dynamic=False)
    return found
