"""How long is a training step, beside the published formulation, beside transformers, and with each switch of ours?

    fastmae bench step --batch_size 8 --output benchmarks/results                                      # on a CPU
    fastmae bench step --batch_size 8 --switches bf16 checkpointing-full --phases                      # what they cost
    fastmae bench step --batch_size 256 --precision bf16 --rounds 30 --output benchmarks/results       # on a GPU

Forward, backward and optimiser on the same images, masks and weights. No time is reported unless all losses agree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from rich.table import Table

from fastmae.benchmarks.peers.vitmae import vitmae_like
from fastmae.benchmarks.report import console
from fastmae.benchmarks.timing import (
    Samples,
    Stopwatch,
    interleave,
    machine_name,
    quartiles,
    times_as_fast,
    write_result,
)
from fastmae.config import BenchStepConfig, BenchSwitch, check_bench
from fastmae.environment import peak_flops
from fastmae.errors import UserError
from fastmae.model.flops import flops_per_image
from fastmae.model.mae import PRESETS, MaskedAutoencoderViT
from fastmae.model.reference import ReferenceMAE
from fastmae.ops.random_masking import random_masking
from fastmae.train.average import start_average, update_average
from fastmae.train.optim import make_optimizer
from fastmae.train.parallel import choose_device
from fastmae.train.precision import choose_precision
from fastmae.train.step import TrainingLoss, prepare, train_step

MASK_RATIO = 0.75
LOSS_TOLERANCE = {"fp32": 1e-5, "tf32": 1e-2, "bf16": 2e-2}
OURS = "fastmae"
PHASES = ("forward", "forward and backward", "step")


@dataclass(frozen=True, kw_only=True)
class Switches:
    """How our step is done, as the flags of pretrain name it."""

    precision: str
    residual: str = "fp32"
    checkpointing: Any = "none"
    compile: Any = "off"
    clip_grad: float | None = None
    ema: float | None = None


CHANGES: dict[BenchSwitch, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "bf16-residual": {"precision": "bf16", "residual": "bf16"},
    "tf32": {"precision": "tf32"},
    "checkpointing-selective": {"checkpointing": "selective"},
    "checkpointing-full": {"checkpointing": "full"},
    "compile-block": {"compile": "block"},
    "compile-model": {"compile": "model"},
    "clip-grad": {"clip_grad": 1.0},
    "ema": {"ema": 0.9999},
}


@dataclass(frozen=True)
class Contestant:
    """A model at the beginning of its training."""

    precision: str
    forward: Callable[[], torch.Tensor]
    """The loss, with its graph."""
    step: Callable[[], torch.Tensor]
    """Trains once; the loss, detached."""

    def phase(self, name: str) -> torch.Tensor:
        """The loss, after so much of a step."""
        if name == "step":
            return self.step()
        loss = self.forward()
        if name == "forward and backward":
            loss.backward()
        return loss.detach()


@dataclass(frozen=True)
class Inputs:
    """The same for all contestants."""

    images: torch.Tensor
    """uint8 [N, H, W, C]."""
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
    device = choose_device(config.device)
    base = Switches(precision=choose_precision(config.precision, device).name)
    inputs = _inputs(config, device)
    makers = {OURS: partial(ours, config.model, base, inputs)}
    if config.peers:
        makers["published formulation"] = partial(published, config.model, base, inputs)
        makers["transformers ViTMAE"] = partial(transformers, config.model, base, inputs)
    for switch in config.switches:
        makers[switch] = partial(ours, config.model, replace(base, **CHANGES[switch]), inputs)

    entered, losses, memory, left_out = {}, {}, {}, {}
    for name, make in makers.items():
        try:
            entered[name] = make()
            losses[name], memory[name] = _first_step(entered[name], device)
        except (UserError, ImportError) as error:
            entered.pop(name, None)
            left_out[name] = str(error)
    for name, loss in losses.items():
        if not abs(loss / losses[OURS] - 1) <= LOSS_TOLERANCE[entered[name].precision]:
            print(f"the loss of {name} differs, so no time is reported: {losses}", file=sys.stderr)
            return 1
    samples = {
        phase: interleave(
            {name: lambda _, one=one, phase=phase: one.phase(phase) for name, one in entered.items()},
            Stopwatch(device=device, rounds=config.rounds),
        )
        for phase in (PHASES if config.phases else PHASES[-1:])
    }

    useful = 3 * config.batch_size * flops_per_image(PRESETS[config.model](), MASK_RATIO)
    console().print(_table(config, base, device, samples, useful, memory))
    for name, reason in left_out.items():
        print(f"{name} cannot run: {reason}", file=sys.stderr)
    if config.output is not None:
        file = f"step-{config.model}-{machine_name(device)}-n{config.batch_size}-{base.precision}"
        measured = {
            "losses": losses,
            "left_out": left_out,
            "useful_flops": useful,
            "peak_bytes": memory,
            "seconds": samples["step"],
            "phases": {phase: samples[phase] for phase in samples if phase != "step"},
        }
        print(write_result(config.output, file, command=command, settings=config, measured=measured))
    return 0


# --- contestants ------------------------------------------------------------------------------------------------------


def _inputs(config: BenchStepConfig, device: torch.device) -> Inputs:
    torch.manual_seed(0)
    model = PRESETS[config.model]()
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, *model.img_size, model.in_chans)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    ids_shuffle = random_masking(torch.arange(config.batch_size), 0, model.num_patches)
    return Inputs(images.to(device), ids_shuffle.to(device), model.state_dict())


def _model(name: str, inputs: Inputs) -> MaskedAutoencoderViT:
    model = PRESETS[name]()
    model.load_state_dict(inputs.weights)
    return model.to(inputs.images.device)


def ours(name: str, switches: Switches, inputs: Inputs) -> Contestant:
    """The trainer's own step.

    Raises:
        UserError: it cannot run with these switches here.
    """
    device = inputs.images.device
    precision = choose_precision(switches.precision, device)
    model = _model(name, inputs)
    model.autocast_residual = switches.residual == "bf16"
    loss_of = TrainingLoss(model, MASK_RATIO)
    prepare(loss_of, switches.checkpointing, switches.compile)
    optimizer = make_optimizer(model, 1e-4, 0.05)
    average = start_average(model, None) if switches.ema is not None else {}
    batch = (inputs.images, inputs.ids_shuffle)

    def forward() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with precision.products(), precision.context(device):
            return loss_of(*batch)

    def step() -> torch.Tensor:
        with precision.products():
            stepped = train_step(
                loss_of, optimizer, [batch], 1, 1e-4, precision.context(device), clip_grad=switches.clip_grad
            )
        if switches.ema is not None:
            update_average(average, model, switches.ema, stepped.skipped)
        return stepped.loss

    return Contestant(switches.precision, forward, step)


def published(name: str, switches: Switches, inputs: Inputs) -> Contestant:
    """The published formulation, plainly written."""
    model: Any = _model(name, inputs)
    reference = ReferenceMAE(
        model.img_size,
        model.patch_size,
        model.in_chans,
        embed_dim=model.cls_token.shape[-1],
        depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads,
        decoder_embed_dim=model.mask_token.shape[-1],
        decoder_depth=len(model.decoder_blocks),
        decoder_num_heads=model.decoder_blocks[0].attn.num_heads,
    )
    reference.load_state_dict(inputs.weights)
    return _peer(reference, model, switches, inputs, lambda images, ids: reference(images, ids.long())[0])


def transformers(name: str, switches: Switches, inputs: Inputs) -> Contestant:
    """transformers' ViTMAE.

    Raises:
        ImportError: it is not installed.
    """
    model = _model(name, inputs)
    peer = vitmae_like(model)
    return _peer(peer, model, switches, inputs, lambda images, ids: peer(images, noise=ids.argsort(dim=1).float()).loss)


def _peer(
    module: torch.nn.Module,
    model: MaskedAutoencoderViT,
    switches: Switches,
    inputs: Inputs,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Contestant:
    """A plain loop around a model that takes float NCHW images, which are normalised in the step as a loader would."""
    device = inputs.images.device
    precision = choose_precision(switches.precision, device)
    module.to(device)
    optimizer = make_optimizer(module, 1e-4, 0.05)

    def forward() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        images = ((inputs.images / 255 - model.mean) / model.std).permute(0, 3, 1, 2).contiguous()
        with precision.products(), precision.context(device):
            return loss_of(images, inputs.ids_shuffle)

    def step() -> torch.Tensor:
        loss = forward()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Contestant(switches.precision, forward, step)


def _first_step(contestant: Contestant, device: torch.device) -> tuple[float, int | None]:
    """(loss, the most memory that a second step takes beside what is held before it: bytes, on a GPU)."""
    loss = contestant.step().item()
    if device.type != "cuda":
        return loss, None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    contestant.step()
    torch.cuda.synchronize(device)
    return loss, torch.cuda.max_memory_allocated(device) - held


# --- what is said -----------------------------------------------------------------------------------------------------


def _table(
    config: BenchStepConfig,
    base: Switches,
    device: torch.device,
    samples: dict[str, Samples],
    useful: int,
    memory: dict[str, int | None],
) -> Table:
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    title = f"{config.model}, batch {config.batch_size}, {base.precision}, {machine_name(device)}, "
    made = Table(title=f"{title}median of {config.rounds}", title_justify="left")
    made.add_column("step", no_wrap=True)
    columns = ["images/s", f"times {OURS}", "useful TFLOP/s", "MFU", "memory"]
    for column in columns + [f"{phase} ms" for phase in samples]:
        made.add_column(column, justify="right", no_wrap=True)
    for name, seconds in samples["step"].items():
        median = quartiles(seconds)[1]
        held = memory[name]
        made.add_row(
            name,
            f"{config.batch_size / median:.2f}",
            f"{times_as_fast(samples['step'], name, OURS):.2f}",
            f"{useful / median / 1e12:.3g}",
            "–" if peak is None else f"{useful / median / peak:.1%}",
            "–" if held is None else f"{held / 2**30:.2f} GiB",
            *(f"{1e3 * quartiles(phase[name])[1]:.1f}" for phase in samples.values()),
        )
    return made
