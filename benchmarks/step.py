"""How long is a training step, beside the official formulation, beside others, and with each switch of ours?

    fastmae bench step --batch_size 8 --output benchmarks/results                                # on a CPU
    fastmae bench step --batch_size 256 --precision bf16 --switches compile-block+bf16-residual  # on a GPU
    torchrun --nproc_per_node 2 -m fastmae bench step --baselines --switches fsdp --phases       # communication

Forward, backward and optimiser on the same images, masks and weights. No time is reported unless the losses of the
first two steps agree; only the switch `cross` is another model with losses of its own.

Each implementation has a process of its own, as in a shared heap the memory of one lies between that of another. One
that dies, for want of memory for instance, is skipped. Ranks must reach each other, so each rank of torchrun holds all
implementations; malloc is set as for pretraining only if no baseline is among them.

What the machine can do (a copy, large products) is measured in another process beforehand; a step's useful operations
are shown as a share of that rate, which a busy machine lowers too, and on a GPU of the data sheet's (MFU).

The images lie ready on the device, for baselines as their loaders leave them, float32 and normalised; our step
normalises. The parts of a step are differences between calls that go further and further, so communication is what
other ranks add to a step. FSDP communicates in every part; its whole step is compared with that of fastmae by itself.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fastmae.benchmarks import harness
from fastmae.benchmarks.baselines.loss import BaselineLoss
from fastmae.benchmarks.harness import OURS, GoneError, Samples, milliseconds
from fastmae.config import BenchStepConfig, PretrainConfig, check_bench
from fastmae.config.training import COMPILED_STEPS, chosen_compile
from fastmae.environment import peak_flops
from fastmae.errors import UserError
from fastmae.model.calls import calls_of
from fastmae.model.flops import flops_per_image
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import PRESETS
from fastmae.model.weight_copies import WeightCopies
from fastmae.ops import tuning
from fastmae.ops.allocator import keep_freed_memory
from fastmae.ops.attention import attention_backend
from fastmae.ops.backends import using
from fastmae.ops.choices import TORCHS_OWN, Choices
from fastmae.ops.random_masking import random_masking
from fastmae.train import parallel
from fastmae.train.average import start_average, update_average
from fastmae.train.choosing import VARIABLE
from fastmae.train.optim import BETAS, make_optimizer, parameter_groups
from fastmae.train.precision import Precision, choose_precision, require_float8
from fastmae.train.step import PassGraph, TrainingLoss, prepare, require_graph, train_step, without_sync

MASK_RATIO = 0.75
LR, WEIGHT_DECAY = 1e-4, 0.05
# Which of the measured rates a step of a precision is a share of; TF32's is not measured.
CEILING_OF = {"fp32": "float32", "bf16": "bfloat16", "tf32": "tf32"}
LOSS_TOLERANCE = {"fp32": 1e-5, "tf32": 1e-2, "bf16": 2e-2, "float8": 5e-2}
STEPS_COMPARED = 2
# On a GPU a sample is a window of at least so many steps and about so many seconds, with one synchronisation: as in
# training, Python runs ahead of it, and clocks are those of lasting work.
GPU_WINDOW, GPU_SECONDS = 10, 1.0
# Implementations that start, and compile, at once. On a CPU they would take each other's cores and memory.
GPU_AT_ONCE = 4
# Share of a limit of time after which no implementation starts any more.
STARTING = 0.6
# Steps of a CPU that take so long need no round that warms up: those whose losses are compared were enough.
LONG = 1.0
CEILING_ROUNDS = 7
# What an implementation can be asked to measure: the seconds of a call that goes so far, or bytes.
FORWARD, BACKWARD, ALONE, STEP = "forward", "forward and backward", "a rank's step by itself", "step"
PEAK = "the peak of memory"

CHANGES: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "bf16-residual": {"precision": "bf16", "residual": "bf16"},
    "tf32": {"precision": "tf32"},
    "checkpointing-gelu": {"checkpointing": "gelu"},
    "checkpointing-selective": {"checkpointing": "selective"},
    "checkpointing-full": {"checkpointing": "full"},
    "compile-off": {"compile": "off"},
    "compile-block": {"compile": "block"},
    "compile-model": {"compile": "model"},
    "float8": {"precision": "bf16", "compile": "block", "float8": True},
    "cuda-graph": {"cuda_graph": True},
    "clip-grad": {"clip_grad": 1.0},
    "ema": {"ema": 0.9999},
    "fsdp": {"parallel": "fsdp"},
    "hsdp": {"parallel": "hsdp"},
    "reduce-bf16": {"reduce": "bf16"},
    "cross": {"decoder_attention": "cross"},
    "sdpa": {"attention": "sdpa"},
    "cudnn": {"attention": "cudnn"},
    "flash": {"attention": "flash"},
    "xformers": {"attention": "xformers"},
    "triton": {"attention": "triton"},
    "sdpa-float32": {"attention": "sdpa-float32"},
    "cpp": {"attention": "cpu"},
    "cpu-dot": {"attention": "cpu-dot"},
    "cpu-amx": {"attention": "cpu-amx"},
    "reference-ops": {"ops": "reference"},
    "untuned": {"tune": "off"},
}
"""The flags of pretrain that each switch sets."""


@dataclass(frozen=True)
class Inputs:
    """What all implementations start from; images and masks are a rank's own."""

    images: torch.Tensor  # uint8 [N, H, W, C]
    ids_shuffle: torch.Tensor  # int32 [N, L]
    model: MaskedAutoencoderViT


@dataclass(frozen=True)
class Implementation:
    """A model at the beginning of its training."""

    loss_of: nn.Module  # wrapped for the ranks
    batch: tuple[torch.Tensor, torch.Tensor]  # images and an order of patches, as its model wants them
    optimizer: torch.optim.Optimizer
    precision: Precision
    train: Callable[[Implementation, bool], torch.Tensor]
    """Does one step, together with the other ranks or by itself, and returns the loss, detached."""
    tolerance: float  # of its losses, relative to ours
    flops: int  # operations that the loss of an image needs
    graph: PassGraph | None = None
    copies: WeightCopies | None = None
    backends: dict[str, Any] = field(default_factory=dict)
    """What it asks the ops for, as arguments of ``using``."""
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def requests(self) -> list[str]:
        """What can be measured: a CUDA graph has no parts and keeps its memory, FSDP communicates in every part."""
        if self.graph is not None:
            return [STEP]
        return [STEP, PEAK] if isinstance(self.loss_of, FSDPModule) else [FORWARD, BACKWARD, ALONE, STEP, PEAK]

    def passes(self, backward: bool) -> torch.Tensor:
        """Drops gradients, does the forward pass, and the backward pass if asked to; returns the loss, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.copies is not None:
            self.copies.write()
        with self.precision.products(), nullcontext() if self.copies is None else self.copies.in_use():
            with self.precision.context(self.batch[0].device):
                loss = self.loss_of(*self.batch)
            if backward:
                loss.backward()
        return loss.detach()

    def go(self, request: str) -> torch.Tensor:
        """Does so much of a step and returns the loss, detached."""
        with using(**self.backends):
            if request == STEP:
                return self.train(self, True)
            with without_sync(self.loss_of, is_last=False):
                return self.train(self, False) if request == ALONE else self.passes(backward=request == BACKWARD)


@dataclass(frozen=True)
class Facts:
    """What the process of an implementation reports after the first steps."""

    losses: list[float]  # means over ranks
    requests: list[str]
    tolerance: float
    flops: int
    precision: str
    chosen: dict[str, Any]
    """What our step chose by itself: how it compiles, attention by shape, what was measured for it."""
    seconds: float
    """That the last of the first steps took, on the host's clock."""


class _Clock:
    """How much is left of the seconds that a benchmark may take; None: there is no limit."""

    def __init__(self, limit: float | None) -> None:
        self._begin, self._limit = time.monotonic(), limit

    def left(self, share: float) -> float | None:
        """Returns the seconds until this share of the limit has passed, 0 afterwards."""
        if self._limit is None:
            return None
        return max(0.0, self._begin + share * self._limit - time.monotonic())

    def late(self, share: float) -> bool:
        return self.left(share) == 0.0


Runner = tuple[Facts, Callable[[str], float]]
"""An implementation that can run, wherever it lives; the function answers its requests."""


def bench_step(config: BenchStepConfig, command: Sequence[str]) -> int:
    """Prints the times, writes what was asked for, and returns 1 if the losses disagree, otherwise 0.

    Raises:
        UserError: settings that cannot work.
    """
    check_bench(config)
    harness.require_preset(config.model)
    with ExitStack() as stack:
        context = parallel.start(config.device)
        stack.callback(parallel.stop, context)
        with torch.device("meta"):  # only its sizes are asked for
            _fresh_model(config)
        clock = _Clock(config.time_limit)
        ceilings, kernels = _ceilings(config, context)
        runners, skipped = _start_all(config, context, stack, clock)
        _require_ours(skipped)
        losses = {name: facts.losses for name, (facts, _) in runners.items()}
        for name, (facts, _) in runners.items():
            if not harness.agree(facts.losses, losses[OURS], facts.tolerance):
                return harness.refuse(f"the loss of {name} differs ({losses})") if context.is_main else 1
        parts = [FORWARD, BACKWARD, *([ALONE] if context.size > 1 else [])] if config.phases else []
        requests = {name: facts.requests for name, (facts, _) in runners.items()}
        keys = [(name, part) for name in runners for part in [*parts, STEP] if part in requests[name]]
        samplers = {key: partial(_answer, runners, *key, skipped) for key in keys}
        slowest = max(facts.seconds for facts, _ in runners.values())
        warm_up = not context.any(context.device.type == "cuda" or slowest > LONG)
        # After the rounds memory is measured, which takes a step of each once more, but for a GPU's ten.
        still_needed = 1 if context.device.type == "cuda" else 2

        def enough(last_round: float) -> bool:
            left = clock.left(1.0)
            return context.any(left is not None and left < still_needed * last_round)

        samples = harness.take_turns(samplers, config.rounds + warm_up, enough)
        warm_up = warm_up and len(samples[OURS, STEP]) > 1
        # Memory comes last, as the profiler that it needs on a CPU is not part of training.
        peaks = {name: _answer(runners, name, PEAK, skipped) for name in runners if PEAK in requests[name]}
        _require_ours(skipped)
        names = [name for name in runners if name not in skipped]
        times: dict[str, Samples] = {part: {} for part in [*parts, STEP]}
        for name, part in keys:
            if name in names:
                times[part][name] = _largest(samples[name, part][warm_up:], context)
        memory = {name: _largest([peaks[name]], context)[0] for name in names if name in peaks}
    if context.is_main:
        measured = {
            "ranks": context.size,
            "ceilings": None if ceilings is None else asdict(ceilings),
            "sdpa": kernels,
            "precisions": {name: runners[name][0].precision for name in names},
            "chosen": {name: runners[name][0].chosen for name in names if runners[name][0].chosen},
            "losses": {name: losses[name] for name in names},
            "skipped": skipped,
            "useful_flops": {name: 3 * context.size * config.batch_size * runners[name][0].flops for name in names},
            "peak_bytes": memory,
            "seconds": times[STEP],
            "phases": _phases(times) if config.phases else {},
        }
        _report(config, command, context.device, measured)
    return 0


def _report(config: BenchStepConfig, command: Sequence[str], device: torch.device, measured: dict[str, Any]) -> None:
    machine, precision = harness.machine_name(device), choose_precision(config.precision, device).name
    size = f"{config.input_size} pixels, " if config.input_size else ""
    ranks = f"{measured['ranks']} ranks, " if measured["ranks"] > 1 else ""
    what = f"{config.model}, {size}{ranks}batch {config.batch_size}, {precision}, {machine}, median of {config.rounds}"
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    products = measured["ceilings"]["matmul_flops"] if measured["ceilings"] else {}
    rows = []
    for name, seconds in measured["seconds"].items():
        median = harness.quartiles(seconds)[1]
        flops, memory = measured["useful_flops"][name] / median, measured["peak_bytes"].get(name)
        rows.append(
            (
                name,
                f"{measured['ranks'] * config.batch_size / median:.2f}",
                f"{harness.speed_up(measured['seconds'], OURS, name):.2f}",
                f"{flops / 1e12:.3g}",
                _share(flops, products.get(CEILING_OF[measured["precisions"][name]])),
                _share(flops, peak and measured["ranks"] * peak),
                "–" if memory is None else f"{memory / 2**20:.0f} MiB",
            )
        )
    columns = ("step", "images/s", f"speed-up of {OURS}", "useful TFLOP/s", "of the measured rate", "MFU", "memory")
    shown: list[Any] = [harness.table(what, columns, rows)]
    shown += [f"{name}: {text}" for name, text in _explained(measured).items()]
    if phases := measured["phases"]:
        names = dict.fromkeys(name for part in phases.values() for name in part)
        rows = [
            (name, *(milliseconds(part[name]) if name in part else "–" for part in phases.values())) for name in names
        ]
        shown.append(harness.table("where a step's time goes: ms, median and quartiles", ("step", *phases), rows))
    size = f"-s{config.input_size}" if config.input_size else ""
    ranks = f"-r{measured['ranks']}" if measured["ranks"] > 1 else ""
    others = "".join(f"-{name}" for name in config.baselines) or "-alone"
    others = "" if config.baselines == BenchStepConfig.baselines else others
    file = f"step-{config.model}{size}-{machine}{ranks}-n{config.batch_size}-{precision}{others}"
    harness.report(shown, file, command=command, settings=config, measured=measured)


def _share(flops: float, rate: float | None) -> str:
    return "–" if rate is None else f"{flops / rate:.1%}"


def _explained(measured: dict[str, Any]) -> dict[str, str]:
    """Returns what is said below the table: what the rates are, and what was chosen."""
    lines = {}
    if measured["ceilings"]:
        lines["measured rates"] = harness.describe_ceilings(harness.Ceilings(**measured["ceilings"]))
    if measured["sdpa"]:
        lines["torch's attention"] = ", ".join(f"{kernel} ({shape})" for shape, kernel in measured["sdpa"].items())
    for name, chosen in measured["chosen"].items():
        if chosen != measured["chosen"][OURS] or name == OURS:
            lines[name] = "; ".join(f"{what} {text}" for what, text in chosen.items() if what != "choices")
    return lines


def _attention_shapes(model: MaskedAutoencoderViT) -> list[tuple[int, int, int]]:
    """Returns (S, heads, head_dim) of the encoder and of the decoder in a step."""
    shapes = []
    for tokens, block in (
        (model.num_visible(MASK_RATIO), model.blocks[0]),
        (model.num_patches, model.decoder_blocks[0]),
    ):
        attention: Any = block.attn
        shapes.append((tokens + 1, attention.num_heads, attention.proj.in_features // attention.num_heads))
    return shapes


def _ceilings(config: BenchStepConfig, context: parallel.DistContext) -> tuple[harness.Ceilings | None, dict[str, str]]:
    """Returns what the machine can do, and the kernel that torch's attention takes for each shape of the model."""
    if not config.ceilings or context.size > 1:
        return None, {}
    with harness.in_own_process(_measure_ceilings, config, context) as (found, _):
        return found


def _measure_ceilings(config: BenchStepConfig, context: parallel.DistContext) -> tuple[Any, Callable[[Any], None]]:
    with torch.device("meta"):
        model = _fresh_model(config)
    dtype = choose_precision(config.precision, context.device).autocast or torch.float32
    kernels = {
        "x".join(map(str, shape)): harness.sdpa_kernel(shape, config.batch_size, dtype, context.device)
        for shape in _attention_shapes(model)
    }
    return (harness.measure_ceilings(context.device, rounds=CEILING_ROUNDS), kernels), lambda _: None


def _start_all(
    config: BenchStepConfig, context: parallel.DistContext, processes: ExitStack, clock: _Clock
) -> tuple[dict[str, Runner], dict[str, str]]:
    """Returns those that can run on every rank, and why others cannot."""
    runners: dict[str, Runner] = {}
    skipped: dict[str, str] = {}
    names = list(dict.fromkeys([OURS, *config.baselines, *config.switches]))
    at_once = GPU_AT_ONCE if context.device.type == "cuda" and context.size == 1 else 1
    for first in range(0, len(names), at_once):
        group = names[first : first + at_once]
        if context.any(first > 0 and clock.late(STARTING)):
            skipped |= dict.fromkeys(group, "no time was left to start it")
            continue
        begun: dict[str, Callable[[float | None], Runner]] = {}
        for name in group:
            if context.size > 1:
                begun[name] = lambda _, name=name: _start(name, config, context)  # type: ignore[misc]
            else:
                beginning = harness.beginning_in_own_process(_start, name, config, context)
                begun[name] = processes.enter_context(beginning)
        for name, wait in begun.items():
            why = ""
            try:
                runner = wait(None if name == OURS else clock.left(STARTING))
            except harness.refusals() as error:
                why = harness.reason(error)
            if context.any(bool(why)):
                skipped[name] = why or "another rank cannot"
            else:
                runners[name] = runner
    return runners, skipped


def _require_ours(skipped: dict[str, str]) -> None:
    if OURS in skipped:
        raise UserError(f"our own step cannot run ({skipped[OURS]}); use a smaller --batch_size or another --device")


def _start(name: str, config: BenchStepConfig, context: parallel.DistContext) -> Runner:
    """Does the first steps in this process, which is the implementation's own unless there are several ranks."""
    _prepare_process(name, config, context)
    precision, inputs = choose_precision(config.precision, context.device).name, _inputs(config, context)
    if name in config.baselines:
        one = theirs(name, precision, inputs, context)
    else:
        flags: dict[str, Any] = {"precision": precision, "tune": config.tune}
        for switch in [] if name == OURS else name.split("+"):
            flags |= CHANGES[switch]
        one = ours(config.model, PretrainConfig(**flags), inputs, context)
    losses = []
    for _ in range(STEPS_COMPARED):
        begin = time.perf_counter()
        losses.append(context.mean(one.go(STEP)).item())
    seconds = time.perf_counter() - begin
    is_gpu = context.device.type == "cuda"
    gives_back = is_gpu and context.size == 1

    def per_step(request: str, steps: int) -> float:
        return harness.elapsed(lambda: one.go(request), steps, context.device) / steps

    def ask(request: str) -> float:
        if request == PEAK:
            one.optimizer.zero_grad(set_to_none=True)
            answer = harness.peak_bytes(lambda: one.go(STEP), context.device)
        else:
            context.any(False)  # ranks begin together
            answer = per_step(request, GPU_WINDOW if is_gpu else 1)
            if is_gpu:  # that window fetched the memory that was given back, and says how many steps are long enough
                steps = context.mean(torch.tensor(GPU_SECONDS / answer, device=context.device)).item()
                answer = per_step(request, max(GPU_WINDOW, math.ceil(steps)))
        if gives_back:
            torch.cuda.empty_cache()  # for the next in turn
        return answer

    if gives_back:
        torch.cuda.empty_cache()  # for those that start at the same time
    return Facts(losses, one.requests, one.tolerance, one.flops, one.precision.name, one.chosen, seconds), ask


def _prepare_process(name: str, config: BenchStepConfig, context: parallel.DistContext) -> None:
    """Does what pretraining does first; but malloc stays as it is where a baseline lives."""
    baselines = config.baselines if context.size > 1 else {name}.intersection(config.baselines)
    if context.device.type == "cuda":
        torch.cuda.set_device(context.device)
    elif not baselines:
        keep_freed_memory()


def _fresh_model(config: BenchStepConfig) -> MaskedAutoencoderViT:
    try:
        return PRESETS[config.model](**({} if config.input_size is None else {"img_size": config.input_size}))
    except ValueError as error:
        raise UserError(f"--input_size {config.input_size}: {error}") from error


def _inputs(config: BenchStepConfig, context: parallel.DistContext) -> Inputs:
    """Draws a rank's share of images and masks: together they are those of one rank with a batch of that size."""
    torch.manual_seed(0)
    model = _fresh_model(config)
    indices = context.rank * config.batch_size + torch.arange(config.batch_size)
    shape = (*model.img_size, model.in_chans)
    seeded = [torch.Generator().manual_seed(index) for index in indices.tolist()]
    images = torch.stack([torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for generator in seeded])
    ids_shuffle = random_masking(indices, 0, model.num_patches)
    return Inputs(images.to(context.device), ids_shuffle.to(context.device), model)


def ours(name: str, flags: PretrainConfig, inputs: Inputs, context: parallel.DistContext) -> Implementation:
    """Returns the trainer's own step, as these flags of pretrain make it.

    Raises:
        UserError: it cannot run with these flags here.
    """
    device, precision = context.device, choose_precision(flags.precision, context.device)
    if flags.float8:
        require_float8(device, precision)
    if flags.cuda_graph:
        require_graph(device, context.size)
    tolerance = LOSS_TOLERANCE["float8" if flags.float8 else "bf16" if flags.reduce == "bf16" else precision.name]
    model = deepcopy(inputs.model).to(device)
    if flags.decoder_attention == "cross":
        tolerance = math.inf
        model = PRESETS[name](img_size=model.img_size, decoder_attention="cross").to(device)
    model.autocast_residual = flags.residual == "bf16"
    loss_alone = TrainingLoss(model, MASK_RATIO)
    compiling = chosen_compile(flags, COMPILED_STEPS, device.type == "cuda", flags.float8)  # as in a long run
    prepare(loss_alone, flags.checkpointing, compiling, float8=flags.float8)
    flops = flops_per_image(model, MASK_RATIO)
    loss_of = parallel.parallelize(loss_alone, context, _parallelism(flags, context))
    optimizer = make_optimizer(model, LR, WEIGHT_DECAY)
    average = {} if flags.ema is None else start_average(model, None)
    graph = PassGraph() if flags.cuda_graph else None
    bf16 = WeightCopies(model) if precision.autocast == torch.bfloat16 else None

    def train(one: Implementation, together: bool) -> torch.Tensor:
        mean = context.mean if together else torch.clone
        with precision.products():
            autocast = precision.context(device)
            result = train_step(loss_of, optimizer, [one.batch], 1, LR, autocast, flags.clip_grad, mean, graph, bf16)
        if flags.ema is not None:
            update_average(average, model, flags.ema, result.skipped)
        return result.loss

    batch = (inputs.images, inputs.ids_shuffle)
    choices = _choices(flags.tune, model, len(inputs.images), precision, context)
    backends = {"ops": flags.ops, "attention": flags.attention, "choices": choices}
    chosen: dict[str, Any] = {"compile": compiling, "attention": _chosen_attention(model, precision, device, backends)}
    if device.type == "cpu":
        described = tuning.describe(choices, precision.autocast or torch.float32)
        chosen |= {"tune": "; ".join(described), "choices": choices.as_json()}
    return Implementation(loss_of, batch, optimizer, precision, train, tolerance, flops, graph, bf16, backends, chosen)


def _choices(
    tune: str | None, model: MaskedAutoencoderViT, N: int, precision: Precision, context: parallel.DistContext
) -> Choices:
    """Returns what computes products and attention, as a new run with this --tune chooses it by measuring."""
    if context.device.type != "cpu" or (tune or os.environ.get(VARIABLE) or "auto") == "off":
        return TORCHS_OWN
    found: Any = None
    if context.is_main:  # all ranks take its choice
        found = tuning.measured(calls_of(model, N, MASK_RATIO), precision.autocast or torch.float32).as_json()
    return Choices.from_json(context.gather(found)[0])


def _chosen_attention(
    model: MaskedAutoencoderViT, precision: Precision, device: torch.device, backends: dict[str, Any]
) -> str:
    """Returns what computes attention for each shape.

    Raises:
        UserError: what was asked for cannot run.
    """
    found = []
    with using(**backends):
        for S, heads, head_dim in _attention_shapes(model):
            try:
                name, _ = attention_backend(device, precision.autocast or torch.float32, S, head_dim)
            except ValueError as error:
                raise UserError(str(error)) from error
            found.append(f"{name} ({S}x{heads}x{head_dim})")
    return ", ".join(found)


def _parallelism(flags: PretrainConfig, context: parallel.DistContext) -> parallel.Parallelism:
    if context.size == 1 and (flags.parallel, flags.reduce) != ("ddp", "fp32"):
        raise UserError("one rank shares nothing; use torchrun --nproc_per_node RANKS -m fastmae bench step …")
    if flags.parallel == "hsdp" and (context.size < 4 or context.size % 2):
        raise UserError(f"{context.size} ranks are no copies of several ranks each; use 4, 6, 8 …")
    # Copies are a machine's; of a single machine, halves.
    size = context.size // 2 if context.size == parallel.ranks_here() else None
    return parallel.choose_parallelism(
        flags.parallel, flags.reduce, size, context, choose_precision(flags.precision, context.device)
    )


def theirs(name: str, precision_name: str, inputs: Inputs, context: parallel.DistContext) -> Implementation:
    """Returns a plain loop around a baseline's model.

    The official loop has torch's AdamW as it comes, which is not fused, and reads the loss after each step; it is
    spared fp16's loss scaler. The others have our optimiser and wait for nothing.

    Raises:
        UserError: a package cannot be used, or the precision not here.
        ImportError: a package is not installed.
    """
    precision = choose_precision(precision_name, context.device)
    formulation, model = name.removesuffix("-compiled"), inputs.model.to(context.device)
    loss_alone = BaselineLoss(formulation, model).to(context.device)
    order = loss_alone.order(inputs.ids_shuffle)
    if name.endswith("-compiled"):
        loss_alone.compile(dynamic=False)
    loss_of = parallel.parallelize(loss_alone, context, _parallelism(PretrainConfig(), context))
    optimizer = make_optimizer(loss_alone, LR, WEIGHT_DECAY)
    if formulation == "official":
        optimizer = torch.optim.AdamW(parameter_groups(loss_alone, WEIGHT_DECAY), lr=LR, betas=BETAS)

    def train(one: Implementation, _: bool) -> torch.Tensor:
        loss = one.passes(backward=True)
        optimizer.step()
        if formulation == "official":
            loss.item()
        return loss

    pixels = ((inputs.images / 255 - model.mean) / model.std).permute(0, 3, 1, 2).contiguous()
    tolerance, flops = LOSS_TOLERANCE[precision.name], flops_per_image(model, MASK_RATIO)
    return Implementation(loss_of, (pixels, order), optimizer, precision, train, tolerance, flops)


def _answer(runners: dict[str, Runner], name: str, request: str, skipped: dict[str, str]) -> float:
    """Returns NaN from an implementation whose process is gone, which is skipped from then on."""
    if name not in skipped:
        try:
            return runners[name][1](request)
        except GoneError as error:
            skipped[name] = str(error)
    return math.nan


def _largest(numbers: list[float], context: parallel.DistContext) -> list[float]:
    """Returns each number, of the rank whose number is the largest."""
    if context.size == 1:
        return numbers
    largest = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def _phases(times: dict[str, Samples]) -> dict[str, Samples]:
    """Returns what each call takes longer than the one that goes less far, a number per round."""
    requests = list(times)
    phases = {"forward": times[FORWARD]}
    for phase, before, request in zip(("backward", "optimiser", "communication"), requests, requests[1:], strict=False):
        earlier = times[before]
        if before == ALONE:  # of what has no parts, as FSDP, that of fastmae
            earlier = {name: earlier.get(name, earlier[OURS]) for name in times[request]}
        phases[phase] = {
            name: [a - b for a, b in zip(times[request][name], seconds, strict=True)]
            for name, seconds in earlier.items()
        }
    return phases
