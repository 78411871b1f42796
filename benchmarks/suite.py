"""Everything at once: this machine's ceilings, then every benchmark, into one JSON and one report.

    fastmae bench all --output DIR                  # the sizes that suit the device
    fastmae bench all --output DIR --quick          # a first look on a small machine

Each part is another benchmark's command in a process of its own, so a part that ends badly takes no other with it; the
report shows the command, which does the same by itself. After every part the files are written anew, so an interrupted
run leaves what it has found.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fastmae.benchmarks.cases import MASK_RATIO, Shapes, shapes_of
from fastmae.benchmarks.ceilings import measure_all_ceilings, step_bytes
from fastmae.benchmarks.harness import Ceilings, describe_ceilings, machine_name, require_preset, write_result
from fastmae.benchmarks.images import ImagesConfig, make_jpegs
from fastmae.config import (
    BenchAllConfig,
    BenchAttentionConfig,
    BenchBaseline,
    BenchEndToEndConfig,
    BenchKernelsConfig,
    BenchLoaderConfig,
    BenchPart,
    BenchStepConfig,
    check_bench,
)
from fastmae.data.loader import default_workers
from fastmae.files import write_text
from fastmae.model.presets import PRESETS
from fastmae.train.parallel import choose_device
from fastmae.train.precision import Precision, choose_precision

CPU_BATCHES, GPU_BATCHES = (4, 8, 16), (64, 128, 256)
SIZES = (0.7, 1.0, 1.3)
CEILING_ROUNDS, JPEGS = 15, 64
QUICK_ROUNDS, QUICK_SAMPLE_MS, QUICK_FILES = 3, 5.0, 256
# Baselines that the curves over batches and image sizes have as well, if they take part.
ON_CURVES: tuple[BenchBaseline, ...] = ("official", "strong", "strong-compiled")
NAMES = {
    BenchKernelsConfig: "kernels",
    BenchAttentionConfig: "attention",
    BenchStepConfig: "step",
    BenchLoaderConfig: "loader",
    BenchEndToEndConfig: "end-to-end",
}
PartConfig = BenchKernelsConfig | BenchAttentionConfig | BenchStepConfig | BenchLoaderConfig | BenchEndToEndConfig


@dataclass(frozen=True)
class Part:
    """One benchmark with its settings."""

    kind: BenchPart
    config: PartConfig
    ranks: int = 1
    threads: int | None = None
    """Of a rank; None: as torch likes."""

    @property
    def words(self) -> list[str]:
        """The command, as a user would type it."""
        words = ["fastmae", *words_of(self.config)]
        if self.ranks > 1:
            words = ["torchrun", "--standalone", "--nproc_per_node", str(self.ranks), "-m", *words]
        return words if self.threads is None else [f"OMP_NUM_THREADS={self.threads}", *words]


def bench_all(config: BenchAllConfig, command: Sequence[str]) -> int:
    """Runs the parts, prints what they print, writes JSON and report, and returns 1 if a part refused something or
    failed, otherwise 0; a part that cannot run here is neither.

    Raises:
        UserError: settings that cannot work.
    """
    check_bench(config)
    require_preset(config.model)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    batches = sorted(config.batch_sizes or (GPU_BATCHES if device.type == "cuda" else CPU_BATCHES))
    N = middle(batches)
    parts = parts_of(config, batches, device, precision.name)
    machine = machine_name(device)
    measured: dict[str, Any] = {
        "machine": machine,
        "model": config.model,
        "precision": precision.name,
        "batch_size": N,
        "load": os.getloadavg(),
        **_ceilings(config, N, precision, device),
        "parts": [],
        "to_come": [shlex.join(part.words) for part in parts],
    }
    if "ranks" in config.only and not any(part.kind == "ranks" for part in parts):
        why = "there is nothing to compare one rank with; name several with --ranks"
        alone = {"kind": "ranks", "command": "bench step on several ranks", "outcome": "cannot run", "reason": why}
        measured["parts"].append(alone | {"seconds": 0, "result": None})
    path, page = _written(config, command, measured)
    for part in parts:
        print(f"\n$ {shlex.join(part.words)}", flush=True)
        measured["parts"].append(run_part(part, N))
        measured["to_come"].pop(0)
        path, page = _written(config, command, measured)
    for one in measured["parts"]:
        if one["reason"]:
            print(f"{one['kind']} {one['outcome']}: {one['reason']}", file=sys.stderr)
    print(path)
    print(page or "no report: matplotlib or jinja2 is not installed; pip install 'fastmae[bench]'")
    return 1 if any(one["outcome"] in ("refused", "failed") for one in measured["parts"]) else 0


def _written(config: BenchAllConfig, command: Sequence[str], measured: dict[str, Any]) -> tuple[Path, Path | None]:
    """Writes the JSON and the report of what was found so far."""
    name = f"all-{measured['model']}-{measured['machine']}-{measured['precision']}"
    path = write_result(config.output, name, command=command, settings=config, measured=measured)
    page = path.with_name("report.html")
    try:
        from fastmae.benchmarks.report import report
    except ImportError:
        return path, None
    write_text(page, report(json.loads(path.read_text())))
    return path, page


# --- which parts ------------------------------------------------------------------------------------------------------


def parts_of(config: BenchAllConfig, batches: Sequence[int], device: torch.device, precision: str) -> list[Part]:
    """Those that are asked for, in the order of the report."""
    N, on_gpu, shapes = middle(batches), device.type == "cuda", shapes_of(config.model)
    alike: dict[str, Any] = {"device": config.device}
    if config.rounds or config.quick:
        alike["rounds"] = config.rounds or QUICK_ROUNDS
    ops: dict[str, Any] = {"models": (config.model,), "batch_size": N, "precision": precision, **alike}
    # Not fewer images a batch than by itself, or a sample would be over in no time.
    loader: dict[str, Any] = {"batch_size": max(N, BenchLoaderConfig.batch_size), **alike}
    loader["input_size"] = shapes.grid[0] * shapes.patch[0]
    step: dict[str, Any] = {"model": config.model, "precision": precision, **alike}
    beside: dict[str, Any] = {"baselines": config.baselines, "switches": config.switches, "ceilings": False}
    curve: dict[str, Any] = {**step, **beside, "baselines": ()}
    with_baselines = curve | {"baselines": tuple(name for name in ON_CURVES if name in config.baselines)}
    if config.quick:
        ops["sample_ms"] = QUICK_SAMPLE_MS
        loader |= {"kinds": ("folder",), "files": max(QUICK_FILES, 2 * N), "image_decoders": ("threads",)}
        curve = with_baselines = {**curve, "switches": ()}
    named = (
        switch.removeprefix("compile-") for switch in config.switches if switch in ("compile-block", "compile-model")
    )
    compiled: Any = next(named, "auto")
    sides = config.input_sizes or tuple(round(factor * shapes.grid[0]) * shapes.patch[0] for factor in SIZES)
    cores = len(os.sched_getaffinity(0))
    most = torch.cuda.device_count() if on_gpu else min(cores, 2)
    ranks = config.ranks or tuple(2**i for i in range(most.bit_length()))
    ranks = ranks if len(ranks) > 1 else ()  # there is nothing to compare
    # As many threads in all runs as the most ranks leave for each, so that it is ranks that are compared.
    threads = None if on_gpu else max(1, cores // max(ranks, default=1))
    parts = [
        Part("kernels", BenchKernelsConfig(compile=not config.quick, **ops)),
        Part("attention", BenchAttentionConfig(**ops)),
        Part("loader", BenchLoaderConfig(**loader)),
        Part("step", BenchStepConfig(batch_size=N, phases=True, **step, **beside)),
        *(Part("batch-sizes", BenchStepConfig(batch_size=batch, **with_baselines)) for batch in batches),
        *(Part("input-sizes", BenchStepConfig(batch_size=N, input_size=side, **with_baselines)) for side in sides),
        *(Part("ranks", BenchStepConfig(batch_size=N, **curve), number, threads) for number in ranks),
        Part("end-to-end", BenchEndToEndConfig(batch_size=N, compile=compiled, **step)),
    ]
    return [part for part in parts if part.kind in config.only]


def middle(batches: Sequence[int]) -> int:
    """The batch size of the parts that do not vary it."""
    return sorted(batches)[len(batches) // 2]


def words_of(config: PartConfig) -> list[str]:
    """The words after ``fastmae`` that give this configuration."""
    words = ["bench", NAMES[type(config)]]
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no-{field.name}")
        else:
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


# --- ceilings ---------------------------------------------------------------------------------------------------------


def _ceilings(config: BenchAllConfig, N: int, precision: Precision, device: torch.device) -> dict[str, Any]:
    """Measures and prints what the machine can do, and gives it for the file with the fewest bytes of a step."""
    with torch.device("meta"):  # only the shapes are asked for
        model = PRESETS[config.model]()
    dtype = precision.autocast or torch.float32
    jpegs = list(make_jpegs(ImagesConfig(folder=Path(), count=JPEGS)))
    rounds = config.rounds or (QUICK_ROUNDS if config.quick else CEILING_ROUNDS)
    ceilings = measure_all_ceilings(model, MASK_RATIO, N, dtype, jpegs, default_workers(), device, rounds)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # it is the parts' turn
    decoded = ", ".join(f"{rate:.0f}/s with {threads}" for threads, rate in ceilings.decoded.items())
    print(describe_ceilings(Ceilings(ceilings.copy_bytes, ceilings.matmul_flops)))
    print(f"the model's own products {ceilings.products_flops / 1e12:.3g} TFLOP/s, JPEGs decoded {decoded} threads")
    return {"ceilings": asdict(ceilings), "step_bytes": step_bytes(model, MASK_RATIO, N, dtype.itemsize)}


def operations(case: dict[str, Any], shapes: Shapes, N: int) -> int:
    """Of a measured case: its products', or additions and multiplications of numbers where it has none; 0 for integers.

    Counted once for each number, as the op's definition has them: 2 to normalise a pixel, 1 to add a position or a mask
    token's gradient, 11 to normalise a pixel and its patch, subtract, square and add up, 1 more for the gradient.
    """
    K, L, P, D = shapes.K, shapes.L, shapes.P, shapes.decoder_width
    M, backward = L - K, case["backward"]
    match case["op"]:
        case "gather_patches":
            return 2 * N * K * P
        case "scatter_patches":
            return 2 * N * M * P
        case "assemble_tokens":
            return N * (L + 1) * D + backward * N * M * D
        case "masked_mse":
            return (11 + backward) * N * M * P
    return int(case["flops"])


# --- running ----------------------------------------------------------------------------------------------------------


def run_part(part: Part, N: int) -> dict[str, Any]:
    """What became of it: ``measured``, ``refused`` (a wrong result), ``cannot run`` here, or ``failed``."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fastmae-bench-") as folder:
        status, lines = execute(part, folder)
        path = next(Path(folder).glob("*.json"), None)
        result = None if path is None else json.loads(path.read_text())
    outcome, reason = outcome_of(status, lines)
    if result is not None:
        for key in ("command", "commit", "versions", "hardware", "date"):  # those of the whole
            del result[key]
        del result["settings"]["output"]
        for case in result.get("cases", ()):
            case["operations"] = operations(case, shapes_of(case["model"]), N) if case["model"] else case["flops"]
    ended = {"kind": part.kind, "command": shlex.join(part.words), "outcome": outcome, "reason": reason}
    return ended | {"seconds": math.ceil(time.perf_counter() - begin), "result": result}


def outcome_of(status: int, stderr: Sequence[str]) -> tuple[str, str]:
    """The outcome and the reason for it, of a command's exit status and of the lines that it wrote to stderr."""
    if status == 0:
        return "measured", ""
    errors = [line.removeprefix("fastmae: ") for line in stderr if line.startswith("fastmae: ")]
    if errors:
        return "cannot run", errors[-1]
    refusals = [line for line in stderr if "no time is reported" in line]
    if refusals or (status == 1 and not any(line.startswith("Traceback") for line in stderr)):
        return "refused", refusals[-1] if refusals else "a result was wrong, as its table says"
    return "failed", f"exit status {status}{': ' + stderr[-1] if stderr else ''}"


def execute(part: Part, folder: str) -> tuple[int, list[str]]:
    """Runs the part's command, which writes into ``folder``: its exit status, and what it wrote to stderr."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(part.ranks), "-m"]
    words = [sys.executable, "-m", *(launcher if part.ranks > 1 else ()), "fastmae", *words_of(part.config)]
    environment = os.environ | ({} if part.threads is None else {"OMP_NUM_THREADS": str(part.threads)})
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            [*words, "--output", folder],
            stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=environment,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith(folder):  # files that are about to be read and removed
                print(line, end="", flush=True)
        process.wait()
        errors.seek(0)
        stderr = errors.read()
    print(stderr, end="", file=sys.stderr, flush=True)
    return process.returncode, [line for line in stderr.splitlines() if line.strip()]
