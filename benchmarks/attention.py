"""Which attention is the fastest for which shape on this GPU?

    fastmae bench attention --write                                          # a user: for --attention auto
    fastmae bench attention --write fastmae/ops/attention_table.json         # a maintainer: for all GPUs like it

Forward and backward together, as training computes them. No backend is timed whose result is wrong, and one that
cannot run is named with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fastmae.benchmarks.cases import Function, Measured, as_json, attention_case, known_shapes, measure
from fastmae.benchmarks.harness import (
    Stopwatch,
    console,
    describe_ceilings,
    machine_name,
    measure_ceilings,
    quartiles,
    write_result,
)
from fastmae.benchmarks.kernels import speed_table, untimed
from fastmae.config import BenchAttentionConfig, check_bench
from fastmae.environment import versions
from fastmae.errors import UserError
from fastmae.ops.attention import attention
from fastmae.ops.attention_table import TAKEN_BY_AUTO, dtype_name, user_table, write_table
from fastmae.ops.backends import ATTENTION, using
from fastmae.train.parallel import choose_device
from fastmae.train.precision import choose_precision

BACKENDS = tuple(name for name in ATTENTION if name != "auto")
CPU_BATCH, GPU_BATCH = 8, 256

Shape = tuple[int, int, int]
"""(S, heads, head_dim)"""


def bench_attention(config: BenchAttentionConfig, command: Sequence[str]) -> int:
    """Prints the table, writes what was asked for, and returns 1 if a result was wrong, otherwise 0.

    Raises:
        UserError: settings that cannot work.
    """
    check_bench(config)
    shapes = [_parse_shape(text) for text in config.shapes] or _preset_shapes(config.models)
    device = choose_device(config.device)
    if config.write is not None and device.type != "cuda":
        raise UserError(f"--write: the table is for GPUs, and this is {device.type}, where none is looked at")
    precision = choose_precision(config.precision, device)
    dtype = precision.autocast or torch.float32
    N = config.batch_size or (GPU_BATCH if device.type == "cuda" else CPU_BATCH)
    watch = Stopwatch(device=device, rounds=config.rounds, sample_seconds=config.sample_ms / 1e3, graph=config.graph)
    machine, ceilings = machine_name(device), measure_ceilings(device)
    print(f"{machine}: {describe_ceilings(ceilings)}")

    implementations = {name: through(name) for name in BACKENDS}
    measured = []
    for shape in shapes:
        case = attention_case(shape, N, dtype, device, backward=True)
        measured.append(measure(case, implementations, watch, optional=BACKENDS))
    console().print(speed_table(f"attention, {precision.name}", measured, ceilings, "sdpa"))
    for line in untimed(measured):
        print(line)

    if config.output is not None:
        name = f"attention-{machine}-n{N}-{precision.name}"
        content = {"ceilings": asdict(ceilings), "precision": dtype_name(dtype), "batch_size": N}
        content |= {"cases": [as_json(one) for one in measured]}
        print(write_result(config.output, name, command=command, settings=config, measured=content))
    if config.write is not None:
        path = Path(*config.write) if config.write else user_table()
        winners = [
            winner(one, shape, N, dtype, device) for one, shape in zip(measured, shapes, strict=True) if one.seconds
        ]
        try:
            write_table(path, winners)
        except ValueError as error:
            raise UserError(f"--write: {error}") from error
        print(path)
    return 1 if any(one.wrong for one in measured) else 0


def through(backend: str) -> Function:
    """Attention by a backend; its gradient takes the same way."""

    def call(packed: torch.Tensor) -> torch.Tensor:
        with using(attention=backend):
            return attention(packed)

    return call


def winner(one: Measured, shape: Shape, N: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """An entry of the table."""
    S, heads, head_dim = shape
    medians = {name: quartiles(seconds)[1] for name, seconds in one.seconds.items()}
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "dtype": dtype_name(dtype),
        "S": S,
        "head_dim": head_dim,
        "backend": min((name for name in medians if name in TAKEN_BY_AUTO), key=medians.__getitem__),
        "heads": heads,
        "batch_size": N,
        "median_ms": {name: round(1e3 * seconds, 4) for name, seconds in medians.items()},
        "date": date.today().isoformat(),
        "versions": {name: version for name, version in versions().items() if name in ("torch", "triton", "xformers")},
    }


def _preset_shapes(models: Sequence[str]) -> list[Shape]:
    """Those of the presets, each once."""
    return list(dict.fromkeys(shape for shapes in known_shapes(models) for shape in shapes.attentions))


def _parse_shape(text: str) -> Shape:
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})x([1-9]\d{0,5})", text)
    if found is None:
        raise UserError(f"--shapes {text}: must be TOKENSxHEADSxHEAD_DIM, such as 50x12x64")
    S, heads, head_dim = map(int, found.groups())
    return S, heads, head_dim
