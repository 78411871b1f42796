"""How long is a training step, beside the official formulation, beside others, and with each switch of ours?

    fastmae bench step --batch_size 8 --output benchmarks/results                                # on a CPU
    fastmae bench step --batch_size 8 --baselines --switches bf16 checkpointing-full --phases    # what they cost
    fastmae bench step --batch_size 256 --precision bf16 --switches compile-block+bf16-residual  # on a GPU
    torchrun --nproc_per_node 2 -m fastmae bench step --baselines --switches fsdp --phases       # communication

Forward, backward and optimiser on the same images, masks and weights. No time is reported unless all losses agree,
those of the first step and those of the second, which tell what the first one made of the weights. Only the switch
`cross` is another model with losses of its own.

Each implementation lives in a process of its own, as users run one trainer at a time: in a shared heap the memory of
one lies between that of another, and what pretraining tells malloc would hold for all. It waits without work until its
turn comes, and one that dies, for want of memory for instance, is skipped. Ranks must be processes that reach each
other, so those of torchrun each hold all implementations; they tell malloc only if no baseline is among them.

The images lie ready on the device: `fastmae bench end-to-end` measures what loading adds. Baselines get them as their
loaders leave them, float32 and normalised, so that normalising is no part of their step; ours does it in the step.

The parts of a step are differences between calls of one round that go further and further: forward; and backward; a
step of each rank by itself; a step. So communication is what sharing adds to a step, without what hides behind the
backward pass. FSDP communicates in every part, so that its whole step is compared with that of fastmae by itself, and a
CUDA graph has no parts.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile

from fastmae.benchmarks.baselines.official import official_like
from fastmae.benchmarks.baselines.strong import strong_like
from fastmae.benchmarks.baselines.timm_blocks import timm_like
from fastmae.benchmarks.baselines.vitmae import vitmae_like
from fastmae.benchmarks.harness import (
    OURS,
    GoneError,
    Samples,
    agree,
    console,
    elapsed,
    in_own_process,
    machine_name,
    milliseconds,
    quartiles,
    reason,
    refusals,
    refuse,
    speed_up,
    table,
    take_turns,
    write_result,
)
from fastmae.config import BenchStepConfig, check_bench
from fastmae.environment import peak_flops
from fastmae.errors import UserError
from fastmae.model.flops import flops_per_image
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import PRESETS
from fastmae.ops.random_masking import random_masking
from fastmae.train import parallel
from fastmae.train.allocator import keep_freed_memory
from fastmae.train.average import start_average, update_average
from fastmae.train.optim import BETAS, make_optimizer, parameter_groups
from fastmae.train.precision import Precision, choose_precision, require_float8
from fastmae.train.step import PassGraph, TrainingLoss, prepare, require_graph, train_step, without_sync

MASK_RATIO = 0.75
LR, WEIGHT_DECAY = 1e-4, 0.05
LOSS_TOLERANCE = {"fp32": 1e-5, "tf32": 1e-2, "bf16": 2e-2, "float8": 5e-2}
STEPS_COMPARED = 2
# On a GPU a sample is a window of so many steps with one synchronisation: as in training, Python runs ahead of it.
GPU_WINDOW = 10
PHASES = ("forward", "backward", "optimiser", "communication")
# How far calls go; what lies between them are the phases.
FORWARD, BACKWARD, ALONE, STEP = "forward", "forward and backward", "a rank's step by itself", "step"
PEAK = "the peak of memory"
Stretches = dict[tuple[str, str], list[float]]
"""Seconds, a number a round, by implementation and how far it went."""


@dataclass(frozen=True, kw_only=True)
class Switches:
    """How our step is done, as the flags of pretrain name it."""

    precision: str
    residual: str = "fp32"
    checkpointing: Any = "none"
    compile: Any = "off"
    float8: bool = False
    cuda_graph: bool = False
    clip_grad: float | None = None
    ema: float | None = None
    parallel: str = "ddp"
    reduce: str = "fp32"
    decoder_attention: str = "self"


CHANGES: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "bf16-residual": {"precision": "bf16", "residual": "bf16"},
    "tf32": {"precision": "tf32"},
    "checkpointing-selective": {"checkpointing": "selective"},
    "checkpointing-full": {"checkpointing": "full"},
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
}


@dataclass(frozen=True)
class Implementation:
    """A model at the beginning of its training."""

    loss_of: nn.Module
    """As ranks share it."""
    batch: tuple[torch.Tensor, torch.Tensor]
    """What it takes."""
    optimizer: torch.optim.Optimizer
    precision: Precision
    train: Callable[[Implementation, bool], torch.Tensor]
    """Steps once, together with the other ranks or by itself; the loss, detached."""
    tolerance: float
    """Of its losses, relative to ours."""
    flops: int
    """Of an image's forward pass, that its loss needs."""
    graph: PassGraph | None = None
    """What does its forward and backward pass, if not Python."""

    @property
    def has_parts(self) -> bool:
        """Whether less than a step, or a step without the other ranks, can be timed."""
        return self.graph is None and not isinstance(self.loss_of, FSDPModule)

    def forward(self) -> torch.Tensor:
        """The loss, with its graph; gradients are dropped before."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.products(), self.precision.context(self.batch[0].device):
            return self.loss_of(*self.batch)

    def backward(self) -> torch.Tensor:
        """The loss, detached; gradients are left behind."""
        loss = self.forward()
        with self.precision.products():
            loss.backward()
        return loss.detach()

    def go(self, stretch: str) -> torch.Tensor:
        """The loss, detached, after so much of a step."""
        if stretch == STEP:
            return self.train(self, True)
        with without_sync(self.loss_of, is_last=False):
            if stretch == ALONE:
                return self.train(self, False)
            return self.backward() if stretch == BACKWARD else self.forward().detach()


@dataclass(frozen=True)
class Facts:
    """What the table needs to know of an implementation that can run."""

    losses: list[float]
    """Of its first steps; means over ranks."""
    has_peak: bool
    """Whether the memory of a step can be measured."""
    has_parts: bool
    tolerance: float
    flops: int
    """As an ``Implementation`` has them."""


@dataclass(frozen=True)
class Runner:
    """An implementation that can run, wherever it lives."""

    facts: Facts
    ask: Callable[[str], float]
    """How far it goes to the seconds that it takes; ``PEAK`` to bytes."""


@dataclass(frozen=True)
class Inputs:
    """The same for all implementations; a rank's own."""

    images: torch.Tensor
    """uint8 [N, H, W, C]."""
    normalised: torch.Tensor
    """The same as baselines take them, float32 [N, C, H, W]."""
    ids_shuffle: torch.Tensor
    """int32 [N, L]."""
    weights: dict[str, torch.Tensor] = field(repr=False)


def bench_step(config: BenchStepConfig, command: Sequence[str]) -> int:
    """Prints the times, writes what was asked for, and returns 1 if the losses disagree, otherwise 0.

    Raises:
        UserError: settings that cannot work.
    """
    check_bench(config)
    if config.model not in PRESETS:
        raise UserError(f"--model {config.model}: unknown; one of {', '.join(PRESETS)}")
    context = parallel.start(config.device)
    try:
        return _bench_step(config, command, context)
    finally:
        parallel.stop(context)


def _bench_step(config: BenchStepConfig, command: Sequence[str], context: parallel.DistContext) -> int:
    precision = choose_precision(config.precision, context.device).name
    with torch.device("meta"):  # only its sizes are asked for
        _fresh_model(config)
    with ExitStack() as processes:
        enter = _among_ranks(config, context) if context.size > 1 else partial(_in_own_process, config, processes)
        names = dict.fromkeys([OURS, *config.baselines, *config.switches])
        runners, skipped = _accepted(names, enter, context)
        _require_ours(skipped)
        losses = {name: runner.facts.losses for name, runner in runners.items()}
        for name, runner in runners.items():
            if not agree(losses[name], losses[OURS], runner.facts.tolerance):
                return refuse(f"the loss of {name} differs ({losses})") if context.is_main else 1
        stretches = _timed(runners, config, context, skipped)
        memory = _memory(runners, context, skipped)  # last, as training has no profiler, which it needs
        _require_ours(skipped)
    if not context.is_main:
        return 0
    facts = {name: runner.facts for name, runner in runners.items() if name not in skipped}
    seconds = {name: stretches[name, STEP] for name in facts}
    phases = _phases(facts, stretches, context.size) if config.phases else {}
    images = context.size * config.batch_size
    useful = {name: 3 * images * one.flops for name, one in facts.items()}
    ranks = f"{context.size} ranks, " if context.size > 1 else ""
    size = f"{config.input_size} pixels, " if config.input_size else ""
    what = f"{config.model}, {size}{ranks}batch {config.batch_size}, {precision}, {machine_name(context.device)}"
    title = f"{what}, median of {config.rounds}"
    console().print(_speeds(title, images, context, seconds, useful, memory))
    if phases:
        console().print(_parts(phases))
    for name, why in skipped.items():
        print(f"{name} cannot run: {why}", file=sys.stderr)
    if config.output is not None:
        ranks = f"-r{context.size}" if context.size > 1 else ""
        size = f"-s{config.input_size}" if config.input_size else ""
        file = f"step-{config.model}{size}-{machine_name(context.device)}{ranks}-n{config.batch_size}-{precision}"
        measured = {
            "ranks": context.size,
            "losses": {name: one.losses for name, one in facts.items()},
            "skipped": skipped,
            "useful_flops": useful,
            "peak_bytes": {name: memory[name] for name in facts if name in memory},
            "seconds": seconds,
            "phases": phases,
        }
        print(write_result(config.output, file, command=command, settings=config, measured=measured))
    return 0


def _require_ours(skipped: Mapping[str, str]) -> None:
    if OURS in skipped:
        raise UserError(f"our own step cannot run ({skipped[OURS]}); use a smaller --batch_size or another --device")


# --- where implementations live ---------------------------------------------------------------------------------------


def _accepted(
    names: Iterable[str], enter: Callable[[str], Runner], context: parallel.DistContext
) -> tuple[dict[str, Runner], dict[str, str]]:
    """(who can run on every rank; why others cannot)."""
    runners, skipped = {}, {}
    for name in names:
        why = ""
        try:
            runner = enter(name)
        except refusals() as error:
            why = reason(error)
        if context.any(bool(why)):
            skipped[name] = why or "another rank cannot"
        else:
            runners[name] = runner
    return runners, skipped


def _among_ranks(config: BenchStepConfig, context: parallel.DistContext) -> Callable[[str], Runner]:
    """All implementations in this rank's process."""
    if not config.baselines:
        _prepare_malloc(context.device)
    inputs = _inputs(config, context)
    return lambda name: Runner(*_start(name, config, inputs, context))


def _in_own_process(config: BenchStepConfig, processes: ExitStack, name: str) -> Runner:
    return Runner(*processes.enter_context(in_own_process(_start_alone, name, config)))


def _start_alone(name: str, config: BenchStepConfig) -> tuple[Facts, Callable[[str], float]]:
    """What the process of one implementation does; it draws the inputs itself."""
    context = parallel.start(config.device)
    if name not in config.baselines:
        _prepare_malloc(context.device)
    facts, ask = _start(name, config, _inputs(config, context), context)
    if context.device.type == "cpu":
        return facts, ask

    def ask_and_give_back(request: str) -> float:
        """torch keeps a GPU's memory for later, which others need in their turn; so it is fetched before the clock."""
        ask(request)
        answer = ask(request)
        torch.cuda.empty_cache()
        return answer

    return facts, ask_and_give_back


def _start(
    name: str, config: BenchStepConfig, inputs: Inputs, context: parallel.DistContext
) -> tuple[Facts, Callable[[str], float]]:
    """An implementation's first steps, and what it does on request from then on: the fields of a ``Runner``."""
    one = _implementation(name, config, inputs, context)
    losses = [context.mean(one.go(STEP)).item() for _ in range(STEPS_COMPARED)]

    def ask(request: str) -> float:
        if request == PEAK:
            return _peak(one, context.device)
        context.any(False)  # ranks begin together
        steps = GPU_WINDOW if context.device.type == "cuda" else 1
        return elapsed(lambda: one.go(request), steps, context.device) / steps

    return Facts(losses, one.graph is None, one.has_parts, one.tolerance, one.flops), ask


def _prepare_malloc(device: torch.device) -> None:
    """As pretraining does."""
    if device.type == "cpu":
        keep_freed_memory()


# --- implementations --------------------------------------------------------------------------------------------------


def _implementation(
    name: str, config: BenchStepConfig, inputs: Inputs, context: parallel.DistContext
) -> Implementation:
    precision = choose_precision(config.precision, context.device).name
    if name in config.baselines:
        return theirs(name, config.model, precision, inputs, context)
    changes = {} if name == OURS else {key: value for part in name.split("+") for key, value in CHANGES[part].items()}
    return ours(config.model, replace(Switches(precision=precision), **changes), inputs, context)


def _fresh_model(config: BenchStepConfig) -> MaskedAutoencoderViT:
    try:
        return PRESETS[config.model](**({} if config.input_size is None else {"img_size": config.input_size}))
    except ValueError as error:
        raise UserError(f"--input_size {config.input_size}: {error}") from error


def _inputs(config: BenchStepConfig, context: parallel.DistContext) -> Inputs:
    """All ranks' images and masks together are those of one rank with a batch of that size."""
    torch.manual_seed(0)
    model = _fresh_model(config)
    indices = context.rank * config.batch_size + torch.arange(config.batch_size)
    images = torch.stack([_image(index, (*model.img_size, model.in_chans)) for index in indices.tolist()])
    normalised = ((images / 255 - model.mean) / model.std).permute(0, 3, 1, 2).contiguous()
    ids_shuffle = random_masking(indices, 0, model.num_patches)
    return Inputs(
        images.to(context.device), normalised.to(context.device), ids_shuffle.to(context.device), model.state_dict()
    )


def _image(index: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(index))


def _model(name: str, inputs: Inputs) -> MaskedAutoencoderViT:
    _, height, width, _ = inputs.images.shape
    model = PRESETS[name](img_size=(height, width))
    model.load_state_dict(inputs.weights)
    return model.to(inputs.images.device)


def ours(name: str, switches: Switches, inputs: Inputs, context: parallel.DistContext) -> Implementation:
    """The trainer's own step.

    Raises:
        UserError: it cannot run with these switches here.
    """
    device = context.device
    precision = choose_precision(switches.precision, device)
    if switches.float8:
        require_float8(device, precision)
    if switches.cuda_graph:
        require_graph(device, context.size)
    model = _model(name, inputs)
    if switches.decoder_attention == "cross":
        model = PRESETS[name](img_size=model.img_size, decoder_attention="cross").to(device)
    model.autocast_residual = switches.residual == "bf16"
    loss_alone = TrainingLoss(model, MASK_RATIO)
    prepare(loss_alone, switches.checkpointing, switches.compile, float8=switches.float8)
    flops = flops_per_image(model, MASK_RATIO)
    loss_of = parallel.parallelize(loss_alone, context, _sharing(switches, context))
    optimizer = make_optimizer(model, LR, WEIGHT_DECAY)
    average = start_average(model, None) if switches.ema is not None else {}
    graph = PassGraph() if switches.cuda_graph else None

    def train(one: Implementation, shares: bool) -> torch.Tensor:
        with precision.products():
            stepped = train_step(
                loss_of,
                optimizer,
                [one.batch],
                1,
                LR,
                precision.context(device),
                switches.clip_grad,
                context.mean if shares else torch.clone,
                graph,
            )
        if switches.ema is not None:
            update_average(average, model, switches.ema, stepped.skipped)
        return stepped.loss

    batch = (inputs.images, inputs.ids_shuffle)
    return Implementation(loss_of, batch, optimizer, precision, train, _tolerance(switches), flops, graph)


def _tolerance(switches: Switches) -> float:
    if switches.decoder_attention == "cross":
        return math.inf
    rounded = "bf16" if switches.reduce == "bf16" else switches.precision
    return LOSS_TOLERANCE["float8" if switches.float8 else rounded]


def _sharing(switches: Switches, context: parallel.DistContext) -> parallel.Parallelism:
    asked = (switches.parallel, switches.reduce)
    if context.size == 1 and asked != ("ddp", "fp32"):
        raise UserError("one rank shares nothing; use torchrun --nproc_per_node RANKS -m fastmae bench step …")
    # Copies are a machine's; of a single machine, halves.
    size = context.size // 2 if context.size == parallel.ranks_here() else None
    if switches.parallel == "hsdp" and (context.size < 4 or context.size % 2):
        raise UserError(f"{context.size} ranks are no copies of several ranks each; use 4, 6, 8 …")
    return parallel.choose_parallelism(*asked, size, context)


class _LossOf(nn.Module):
    """A baseline's loss as the output of a forward pass, which is what torch's wrappers expect."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return self.model(images, order)[0]


def theirs(
    name: str, model_name: str, precision_name: str, inputs: Inputs, context: parallel.DistContext
) -> Implementation:
    """A plain loop around somebody else's model.

    The official loop has torch's AdamW as it comes, which is not fused, and reads the loss after each step; it is
    spared fp16's loss scaler. The others have our optimiser and wait for nothing.

    Raises:
        UserError: a package cannot be used, or the precision not here.
        ImportError: a package is not installed.
    """
    precision = choose_precision(precision_name, context.device)
    formulation, compiled = name.removesuffix("-compiled"), name.endswith("-compiled")
    model, ids_shuffle = _model(model_name, inputs), inputs.ids_shuffle
    order = ids_shuffle.long()
    if formulation == "transformers":
        module: nn.Module = vitmae_like(model)
        order = ids_shuffle.argsort(dim=1).float()  # the noise that it sorts patches by
    else:
        module = {"official": official_like, "strong": strong_like, "timm": timm_like}[formulation](model)
    module = _LossOf(module.to(context.device))
    if compiled:
        module.compile(dynamic=False)
    loss_of = parallel.parallelize(module, context, parallel.choose_parallelism("ddp", "fp32", None, context))
    optimizer = make_optimizer(module, LR, WEIGHT_DECAY)
    if formulation == "official":
        optimizer = torch.optim.AdamW(parameter_groups(module, WEIGHT_DECAY), lr=LR, betas=BETAS)

    def train(one: Implementation, _: bool) -> torch.Tensor:
        loss = one.backward()
        optimizer.step()
        if formulation == "official":
            loss.item()
        return loss

    batch = (inputs.normalised, order)
    tolerance, flops = LOSS_TOLERANCE[precision.name], flops_per_image(model, MASK_RATIO)
    return Implementation(loss_of, batch, optimizer, precision, train, tolerance, flops)


# --- measuring --------------------------------------------------------------------------------------------------------


def _timed(
    runners: Mapping[str, Runner], config: BenchStepConfig, context: parallel.DistContext, skipped: dict[str, str]
) -> Stretches:
    """Times all in turns, after a round that warms up; of the rank that takes the longest."""
    parts = [FORWARD, BACKWARD, *([ALONE] if context.size > 1 else [])] if config.phases else []
    samplers = {
        (name, stretch): partial(_answer, runners, name, stretch, skipped)
        for name, runner in runners.items()
        for stretch in [*(parts if runner.facts.has_parts else []), STEP]
    }
    samples = take_turns(samplers, config.rounds + 1)
    return {key: _largest(seconds[1:], context) for key, seconds in samples.items() if key[0] not in skipped}


def _answer(runners: Mapping[str, Runner], name: str, request: str, skipped: dict[str, str]) -> float:
    """NaN from an implementation whose process is gone, which is skipped from then on."""
    if name not in skipped:
        try:
            return runners[name].ask(request)
        except GoneError as error:
            skipped[name] = str(error)
    return math.nan


def _memory(runners: Mapping[str, Runner], context: parallel.DistContext, skipped: dict[str, str]) -> dict[str, float]:
    """Bytes that torch holds at the peak of a step beside what it holds before: weights and the optimiser's moments.

    Of the rank that takes the most. What libraries allocate behind torch's back is not in it, and a CUDA graph, which
    never gives its memory back, is left out.
    """
    peaks = {name: _answer(runners, name, PEAK, skipped) for name in runners if runners[name].facts.has_peak}
    found = {name: peak for name, peak in peaks.items() if name not in skipped}
    return dict(zip(found, _largest(list(found.values()), context), strict=True))


def _peak(one: Implementation, device: torch.device) -> float:
    """Bytes, of this rank."""
    one.optimizer.zero_grad(set_to_none=True)
    return _peak_on_gpu(one, device) if device.type == "cuda" else _peak_on_cpu(one)


def _peak_on_gpu(one: Implementation, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    one.go(STEP)
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - held)


def _peak_on_cpu(one: Implementation) -> float:
    """torch counts what it holds on a CPU only for its profiler, which writes it down for people: as a trace."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one.go(STEP)
    with tempfile.TemporaryDirectory(prefix="fastmae-bench-") as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return float(max(accumulate((size for _, size in changes), initial=0)))


def _largest(numbers: list[float], context: parallel.DistContext) -> list[float]:
    """Each number, of the rank whose number is the largest."""
    if context.size == 1:
        return numbers
    largest = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def _phases(facts: Mapping[str, Facts], stretches: Stretches, ranks: int) -> dict[str, Samples]:
    """Seconds of each part of a step, a number a round."""
    alone = ALONE if ranks > 1 else STEP
    found: dict[str, Samples] = {phase: {} for phase in PHASES}
    for name, one in facts.items():
        if one.has_parts:
            found["forward"][name] = stretches[name, FORWARD]
            found["backward"][name] = _less(stretches[name, BACKWARD], stretches[name, FORWARD])
            found["optimiser"][name] = _less(stretches[name, alone], stretches[name, BACKWARD])
        if ranks > 1:
            by_itself = stretches[name if one.has_parts else OURS, ALONE]
            found["communication"][name] = _less(stretches[name, STEP], by_itself)
    return {phase: samples for phase, samples in found.items() if samples}


def _less(whole: list[float], part: list[float]) -> list[float]:
    return [a - b for a, b in zip(whole, part, strict=True)]


# --- what is shown ----------------------------------------------------------------------------------------------------


def _speeds(
    title: str,
    images: int,
    context: parallel.DistContext,
    seconds: Samples,
    useful: dict[str, int],
    memory: dict[str, float],
) -> Table:
    """A row per implementation; ``images`` and ``useful`` operations are those of a step of all ranks."""
    peak = peak_flops(torch.cuda.get_device_name(context.device)) if context.device.type == "cuda" else None
    rows = []
    for name, samples in seconds.items():
        median = quartiles(samples)[1]
        rows.append(
            (
                name,
                f"{images / median:.2f}",
                f"{speed_up(seconds, OURS, name):.2f}",
                f"{useful[name] / median / 1e12:.3g}",
                "–" if peak is None else f"{useful[name] / median / (context.size * peak):.1%}",
                f"{memory[name] / 2**20:.0f} MiB" if name in memory else "–",
            )
        )
    return table(title, ("step", "images/s", f"speed-up of {OURS} over it", "useful TFLOP/s", "MFU", "memory"), rows)


def _parts(phases: dict[str, Samples]) -> Table:
    names = dict.fromkeys(name for samples in phases.values() for name in samples)
    rows = [
        (name, *(milliseconds(samples[name]) if name in samples else "–" for samples in phases.values()))
        for name in names
    ]
    return table("where a step's time goes: ms, median and quartiles", ("step", *phases), rows)
