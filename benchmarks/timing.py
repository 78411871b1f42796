"""How long calls take, measured fairly, how fast the machine can be, and the file that keeps both.

Contestants take turns (A B C A B C …), so that a machine whose speed drifts drifts for all of them; what they compute
is none of this file's business.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fastmae.environment import hardware, versions
from fastmae.files import write_text
from fastmae.ops.attention_table import dtype_name

Call = Callable[[int], object]
"""One call of a contestant on input set number i; what it returns is kept until the set's next turn."""
Samples = dict[str, list[float]]
"""Seconds a call, a number a round, by contestant."""
Key = TypeVar("Key")

CACHE_WHEN_UNKNOWN = 64 << 20
MAX_INPUT_SETS = 32


@dataclass(frozen=True, kw_only=True)
class Stopwatch:
    """How samples are taken."""

    device: torch.device
    rounds: int
    """Samples a contestant."""
    sample_seconds: float = 0.0
    """Calls are repeated until a sample takes this long, which makes it long beside the clock's noise."""
    graph: bool = False
    """On a GPU: replay the calls from a CUDA graph, so that kernels are timed and Python's launches are not."""
    line_up: Callable[[], object] = lambda: None
    """Called before each sample; by which several ranks begin together. They need ``sample_seconds`` of 0."""


def interleave(contestants: Mapping[Key, Call], watch: Stopwatch, input_sets: int = 1) -> dict[Key, list[float]]:
    """Times every contestant ``watch.rounds`` times, in turns, each turn over all ``input_sets``."""
    turns = {name: _warm_turn(call, watch, input_sets) for name, call in contestants.items()}
    samples: dict[Key, list[float]] = {name: [] for name in contestants}
    for _ in range(watch.rounds):
        for name, turn in turns.items():
            watch.line_up()
            samples[name].append(turn())
    return samples


def _warm_turn(call: Call, watch: Stopwatch, input_sets: int) -> Callable[[], float]:
    """Compiles and warms a contestant up, and gives the function that takes one sample of it."""
    lap = _lap(call, input_sets)
    lap()
    if watch.graph and watch.device.type == "cuda":
        lap = _captured(lap, watch.device)
    laps = 1
    while watch.sample_seconds > 0 and elapsed(lap, laps, watch.device) < watch.sample_seconds:
        laps *= 2
    return lambda: elapsed(lap, laps, watch.device) / (laps * input_sets)


def _lap(call: Call, input_sets: int) -> Callable[[], object]:
    """One call on every input set. The last results stay alive, so that outputs rotate through memory as inputs do."""
    kept: list[object] = [None] * input_sets

    def lap() -> None:
        for i in range(input_sets):
            kept[i] = call(i)

    return lap


def _captured(lap: Callable[[], object], device: torch.device) -> Callable[[], object]:
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries make their handles and workspaces a stream: not inside the capture
            lap()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            lap()
    return graph.replay


def elapsed(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds that ``times`` calls of ``work`` take: between two events on a GPU, on the host's clock otherwise."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(times):
            work()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile."""
    first, median, third = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
    return first, median, third


def times_as_fast(samples: Samples, name: str, other: str) -> float:
    """How many times as fast as ``other`` the contestant ``name`` is: the median of the rounds' ratios, because two
    samples of one round met the same weather."""
    return float(np.median([b / a for a, b in zip(samples[name], samples[other], strict=True)]))


# --- what the machine can do ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Measured, because a data sheet describes another machine; of several samples the best, for a ceiling that a busy
    moment has lowered would flatter everybody."""

    copy_bytes: float
    """Bytes a second, read and written ones added up, of a copy far larger than the caches."""
    matmul_flops: dict[str, float]
    """Operations a second of a large square matrix product, by dtype."""


def measure_ceilings(
    device: torch.device, *, copied: int | None = None, side: int | None = None, rounds: int = 15
) -> Ceilings:
    """Times a copy of ``copied`` bytes (8 caches, at least 256 MiB) and products of matrices with ``side`` rows."""
    watch = Stopwatch(device=device, rounds=rounds)
    copied = copied or max(8 * cache_bytes(device), 256 << 20)
    side = side or (8192 if device.type == "cuda" else 2048)
    rates = {dtype_name(dtype): _matmul_flops(watch, side, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return Ceilings(_copy_bytes(watch, copied), rates)


def _copy_bytes(watch: Stopwatch, size: int) -> float:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=watch.device)
    target = torch.empty_like(source)
    return 2 * size / _least_seconds(lambda _: target.copy_(source), watch)


def _matmul_flops(watch: Stopwatch, side: int, dtype: torch.dtype) -> float:
    a, b = torch.randn(2, side, side, device=watch.device).to(dtype)
    return 2 * side**3 / _least_seconds(lambda _: a @ b, watch)


def _least_seconds(call: Call, watch: Stopwatch) -> float:
    return min(interleave({"it": call}, watch)["it"])


def cache_bytes(device: torch.device) -> int:
    """The largest cache: a GPU's L2, a CPU's last level."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=CACHE_WHEN_UNKNOWN)


def input_sets_for(moved: int, device: torch.device) -> int:
    """So many sets of inputs that calls which move ``moved`` bytes each find none of theirs in the cache."""
    return min(max(1, math.ceil(2 * cache_bytes(device) / moved)), MAX_INPUT_SETS)


# --- what is kept --------------------------------------------------------------------------------------------------


def machine_name(device: torch.device) -> str:
    """``cpu2`` for a CPU with 2 cores to use, ``nvidia-h100-80gb-hbm3`` for that GPU."""
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return f"{device.type}{hardware()['cores']}"


def write_result(folder: str, name: str, *, command: Sequence[str], settings: object, measured: dict[str, Any]) -> Path:
    """Writes folder/name.json: what was measured, and where, when, how and from which sources.

    Args:
        command: the words that made it.
        settings: a dataclass.
        measured: every sample, and what is needed to read them.
    """
    here = Path(__file__).resolve().parent
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=here, check=False)
    result = {
        "date": date.today().isoformat(),
        "command": list(command),
        "commit": commit.stdout.strip() or "unknown",
        "versions": versions(),
        "hardware": hardware(),
        "settings": asdict(settings),  # type: ignore[call-overload]
        **measured,
    }
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    return path
