"""How long is a training step, beside the official formulation, beside others, and with each switch of ours?

    fastmae bench step --batch_size 8 --output benchmarks/results                                # on a CPU
    fastmae bench step --batch_size 256 --precision bf16 --switches compile-block+bf16-residual  # on a GPU
    torchrun --nproc_per_node 2 -m fastmae bench step --baselines --switches fsdp --phases       # communication

Forward, backward and optimiser on the same images, masks and weights. No time is reported unless the losses of the
first two steps agree; only the switch `cross` is another model with losses of its own.

Each implementation has a process of its own, as in a shared heap the memory of one lies between that of another. One
that dies, for want of memory for instance, is skipped. Ranks must reach each other, so each rank of torchrun holds all
implementations; malloc is set as for pretraining only if no baseline is among them.

The images lie ready on the device, for baselines as their loaders leave them, float32 and normalised; our step
normalises. The parts of a step are differences between calls that go further and further, so communication is what
other ranks add to a step. FSDP communicates in every part; its whole step is compared with that of fastmae by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
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
# What an implementation can be asked to measure: the seconds of a call that goes so far, or bytes.
FORWARD, BACKWARD, ALONE, STEP = "forward", "forward and backward", "a rank's step by itself", "step"
PEAK = "the peak of memory"

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

    @property
    def requests(self) -> list[str]:
        """What can be measured: a CUDA graph has no parts and keeps its memory, FSDP communicates in every part."""
        if self.graph is not None:
            return [STEP]
        return [STEP, PEAK] if isinstance(self.loss_of, FSDPModule) else [FORWARD, BACKWARD, ALONE, STEP, PEAK]

    def passes(self, backward: bool) -> torch.Tensor:
        """Drops gradients, does the forward pass, and the backward pass if asked to; returns the loss, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.products():
            with self.precision.context(self.batch[0].device):
                loss = self.loss_of(*self.batch)
            if backward:
                loss.backward()
        return loss.detach()

    def go(self, request: str) -> torch.Tensor:
        """Does so much of a step and returns the loss, detached."""
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
        runners, skipped = _start_all(config, context, stack)
        _require_ours(skipped)
        losses = {name: facts.losses for name, (facts, _) in runners.items()}
        for name, (facts, _) in runners.items():
            if not harness.agree(facts.losses, losses[OURS], facts.tolerance):
                return harness.refuse(f"the loss of {name} differs ({losses})") if context.is_main else 1
        parts = [FORWARD, BACKWARD, *([ALONE] if context.size > 1 else [])] if config.phases else []
        requests = {name: facts.requests for name, (facts, _) in runners.items()}
        keys = [(name, part) for name in runners for part in [*parts, STEP] if part in requests[name]]
        samplers = {key: partial(_answer, runners, *key, skipped) for key in keys}
        samples = harness.take_turns(samplers, config.rounds + 1)  # the first round warms up
        # Memory comes last, as the profiler that it needs on a CPU is not part of training.
        peaks = {name: _answer(runners, name, PEAK, skipped) for name in runners if PEAK in requests[name]}
        _require_ours(skipped)
        names = [name for name in runners if name not in skipped]
        times: dict[str, Samples] = {part: {} for part in [*parts, STEP]}
        for name, part in keys:
            if name in names:
                times[part][name] = _largest(samples[name, part][1:], context)
        memory = {name: _largest([peaks[name]], context)[0] for name in names if name in peaks}
    if context.is_main:
        measured = {
            "ranks": context.size,
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
                "–" if peak is None else f"{flops / (measured['ranks'] * peak):.1%}",
                "–" if memory is None else f"{memory / 2**20:.0f} MiB",
            )
        )
    columns = ("step", "images/s", f"speed-up of {OURS} over it", "useful TFLOP/s", "MFU", "memory")
    shown = [harness.table(what, columns, rows)]
    if phases := measured["phases"]:
        names = dict.fromkeys(name for part in phases.values() for name in part)
        rows = [
            (name, *(milliseconds(part[name]) if name in part else "–" for part in phases.values())) for name in names
        ]
        shown.append(harness.table("where a step's time goes: ms, median and quartiles", ("step", *phases), rows))
    size = f"-s{config.input_size}" if config.input_size else ""
    ranks = f"-r{measured['ranks']}" if measured["ranks"] > 1 else ""
    file = f"step-{config.model}{size}-{machine}{ranks}-n{config.batch_size}-{precision}"
    harness.report(shown, file, command=command, settings=config, measured=measured)


def _start_all(
    config: BenchStepConfig, context: parallel.DistContext, processes: ExitStack
) -> tuple[dict[str, Runner], dict[str, str]]:
    """Returns those that can run on every rank, and why others cannot."""
    runners, skipped = {}, {}
    for name in dict.fromkeys([OURS, *config.baselines, *config.switches]):
        why = ""
        try:
            if context.size > 1:
                runner = _start(name, config, context)
            else:
                runner = processes.enter_context(harness.in_own_process(_start, name, config, context))
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
        flags: dict[str, Any] = {"precision": precision}
        for switch in [] if name == OURS else name.split("+"):
            flags |= CHANGES[switch]
        one = ours(config.model, PretrainConfig(**flags), inputs, context)
    losses = [context.mean(one.go(STEP)).item() for _ in range(STEPS_COMPARED)]

    steps = GPU_WINDOW if context.device.type == "cuda" else 1
    gives_back = context.device.type == "cuda" and context.size == 1

    def ask(request: str) -> float:
        if request == PEAK:
            one.optimizer.zero_grad(set_to_none=True)
            answer = harness.peak_bytes(lambda: one.go(STEP), context.device)
        else:
            context.any(False)  # ranks begin together
            for _ in range(2 if gives_back else 1):  # the first fetches the memory that was given back
                answer = harness.elapsed(lambda: one.go(request), steps, context.device) / steps
        if gives_back:
            torch.cuda.empty_cache()  # for the next in turn
        return answer

    return Facts(losses, one.requests, one.tolerance, one.flops), ask


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
    prepare(loss_alone, flags.checkpointing, flags.compile, float8=flags.float8)
    flops = flops_per_image(model, MASK_RATIO)
    loss_of = parallel.parallelize(loss_alone, context, _parallelism(flags, context))
    optimizer = make_optimizer(model, LR, WEIGHT_DECAY)
    average = {} if flags.ema is None else start_average(model, None)
    graph = PassGraph() if flags.cuda_graph else None

    def train(one: Implementation, together: bool) -> torch.Tensor:
        mean = context.mean if together else torch.clone
        with precision.products():
            autocast = precision.context(device)
            result = train_step(loss_of, optimizer, [one.batch], 1, LR, autocast, flags.clip_grad, mean, graph)
        if flags.ema is not None:
            update_average(average, model, flags.ema, result.skipped)
        return result.loss

    batch = (inputs.images, inputs.ids_shuffle)
    return Implementation(loss_of, batch, optimizer, precision, train, tolerance, flops, graph)


def _parallelism(flags: PretrainConfig, context: parallel.DistContext) -> parallel.Parallelism:
    if context.size == 1 and (flags.parallel, flags.reduce) != ("ddp", "fp32"):
        raise UserError("one rank shares nothing; use torchrun --nproc_per_node RANKS -m fastmae bench step …")
    if flags.parallel == "hsdp" and (context.size < 4 or context.size % 2):
        raise UserError(f"{context.size} ranks are no copies of several ranks each; use 4, 6, 8 …")
    # Copies are a machine's; of a single machine, halves.
    size = context.size // 2 if context.size == parallel.ranks_here() else None
    return parallel.choose_parallelism(flags.parallel, flags.reduce, size, context)


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
