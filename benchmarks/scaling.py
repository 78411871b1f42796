"""How fast would it be on many GPUs? A cost model of one page, and ranks on a CPU that it is compared with.

    fastmae bench scaling --measured step-….json loader-….json --output DIR     # 8, 64 and 1,024 GPUs
    fastmae bench scaling --check --ranks 2 --output benchmarks/results         # the same formulas beside real ranks

A step takes as long as the slowest of four: the GPU (its work, and communication that nothing hides), the host that
launches it, decoding, and the storage. docs/scaling.md has the formulas in words; every assumption is a flag.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastmae.benchmarks.report import console
from fastmae.benchmarks.timing import Samples, elapsed, machine_name, quartiles, write_result
from fastmae.config import BenchScalingConfig, ScalingMachine, check_scaling
from fastmae.errors import UserError
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.presets import PRESETS
from fastmae.model.vit import Block
from fastmae.ops.random_masking import random_masking
from fastmae.train import parallel
from fastmae.train.optim import make_optimizer
from fastmae.train.precision import choose_precision
from fastmae.train.step import TrainingLoss, train_step

MASK_RATIO = 0.75
IMAGES = 1_281_167
WEIGHT = 4  # bytes: float32, in which weights lie and travel
WIRE = {"fp32": 4, "bf16": 2}  # bytes of a gradient that travels
BUCKET = 25 << 20  # bytes of gradients that DDP sends at once; of the first, which is to leave early:
FIRST_BUCKET = 1 << 20
# Bytes of a GPU's memory that a weight moves once a step, whatever the batch. Forward and backward: to bf16 (6), read
# twice by products (4), its gradient written and made float32 (8). Then the gradient's norm (4) and AdamW (28).
MOVED_BY_PASSES, MOVED_BY_OPTIMIZER = 18, 32
# Operations that PyTorch launches for a block, forward and backward, under bf16 autocast; a test counts them.
LAUNCHES_A_BLOCK = 51
# Bytes a token and channel that a block keeps for the backward pass under bf16 autocast. All: two inputs of norms (4
# each), products' inputs (2 + 2 + 2 + 8), queries, keys, values (6), GELU's input (8). Selective: the block's input
# and the products' and attention's outputs. Full: the input.
KEPT = {"none": 36, "selective": 24, "full": 4}
USABLE_MEMORY = 0.9
SCALARS = {"ddp": 1, "fsdp": 2, "hsdp": 2}  # exchanges of one number a step: is it finite; the norm of pieces


# --- what is to be done -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """A part of the model that is computed, and whose gradients are ready, at once."""

    parameters: int
    flops: float
    """Of an image's forward pass."""
    is_block: bool
    kept: int
    """Tokens times channels that it keeps of an image for the backward pass."""


def units_of(model: MaskedAutoencoderViT) -> tuple[Unit, ...]:
    """Its parts in the order of the forward pass. Their work adds up to ``flops_per_image``."""
    K, L = model.num_visible(MASK_RATIO), model.num_patches
    width, narrow = model.decoder_embed.in_features, model.decoder_embed.out_features
    pixels = model.decoder_pred.out_features

    def beside(work: float, *parts: torch.nn.Module | torch.nn.Parameter) -> Unit:
        return Unit(sum(map(_trained, parts)), work, is_block=False, kept=0)

    def block(module: Any, tokens: int, queries: int) -> Unit:
        D, hidden = module.mlp.fc1.in_features, module.mlp.fc1.out_features
        work = 4 * D * D * (tokens + queries) + 4 * D * queries * tokens + 4 * D * hidden * queries
        return Unit(_trained(module), work, is_block=True, kept=tokens * D)

    decoder = list(model.decoder_blocks)
    return (
        beside(2 * K * pixels * width, model.patch_embed, model.cls_token),
        *(block(module, K + 1, K + 1) for module in model.blocks),
        beside(2 * (K + 1) * width * narrow, model.norm, model.decoder_embed, model.mask_token),
        *(block(module, L + 1, L + 1) for module in decoder[:-1]),
        block(decoder[-1], L + 1, L - K),
        beside(2 * (L - K) * narrow * pixels, model.decoder_norm, model.decoder_pred),
    )


def _trained(part: torch.nn.Module | torch.nn.Parameter) -> int:
    parameters = [part] if isinstance(part, torch.nn.Parameter) else list(part.parameters())
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def parameters_of(units: Sequence[Unit]) -> int:
    return sum(unit.parameters for unit in units)


def state_bytes(units: Sequence[Unit], shards: int) -> float:
    """Weights, gradients and AdamW's two moments in float32, of which a GPU has a piece, and bf16 weights, of which
    autocast keeps all from forward to backward."""
    return parameters_of(units) * (4 * WEIGHT / shards + 2)


def kept_bytes(units: Sequence[Unit], checkpointing: str) -> int:
    """What an image keeps for the backward pass, under bf16 autocast, between blocks and of the block at work."""
    again = 0 if checkpointing == "none" else KEPT["none"] * max(unit.kept for unit in units)
    return KEPT[checkpointing] * sum(unit.kept for unit in units) + again


# --- one GPU --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """How long one GPU takes for a step, by its batch."""

    origin: str
    an_image: float
    """Seconds a further image takes."""
    curve: tuple[tuple[int, float], ...] = ()
    """(batch, seconds), measured; at least two batches, or nothing."""


@dataclass(frozen=True)
class Alone:
    """The step of one GPU, in seconds; its launches go on beside it."""

    forward: float
    backward: float
    optimizer: float
    launches: float


def alone(units: Sequence[Unit], speed: Speed, machine: ScalingMachine, batch: int, sharded: bool = False) -> Alone:
    """A step with ``batch`` images, no shorter than the host takes to launch it, which is longer under FSDP2.

    Measured: on the curve through the measured batches, proportional beyond the largest, the smallest's below it.
    Otherwise batch · seconds an image + bytes that weights move / memory's rate. That products of few rows use a GPU
    badly is not in it, so for small batches it is too good.
    """
    weights = parameters_of(units) / machine.gpu_memory_rate
    optimizer = weights * MOVED_BY_OPTIMIZER
    blocks = sum(unit.is_block for unit in units)
    launches = LAUNCHES_A_BLOCK * blocks * machine.launch
    if speed.curve:
        batches, seconds = zip(*speed.curve, strict=True)
        step = float(np.interp(batch, batches, seconds)) * max(1.0, batch / batches[-1])
        launches = min(launches, step)
    else:
        step = batch * speed.an_image + weights * MOVED_BY_PASSES + optimizer
    launches += blocks * machine.sharding if sharded else 0.0
    step = max(step, launches)
    passes = max(step - optimizer, 0.0)
    return Alone(passes / 3, passes * 2 / 3, step - passes, launches)


# --- between GPUs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Seconds of a collective on so many bytes; for gathering and scattering those of the whole, on all ranks."""

    latency: float
    a_byte: float

    def __call__(self, size: float) -> float:
        return self.latency + size * self.a_byte


@dataclass(frozen=True)
class Links:
    """What ranks that share weights in one way do with each other."""

    all_reduce: Cost
    gather: Cost
    reduce: Cost
    """Gradients to the pieces of them: reduce-scatter, and with copies an all-reduce between these."""


def links_of(machine: ScalingMachine, gpus: int, way: str) -> Links:
    """The collectives of ``ddp``, ``fsdp`` or ``hsdp`` with a copy a machine.

    Rings that go through every GPU, leaving each machine by all of its ports, move 2 (n-1)/n of the bytes over each
    link for an all-reduce and (n-1)/n for a gather or reduce-scatter, at the rate of the slower of the two kinds of
    link. An all-reduce waits for a tree (2 log2 of the machines), the other two for a hop a rank, as NCCL has no trees
    for them but where a machine has one GPU.
    """
    local = min(gpus, machine.gpus_a_node)
    nodes = math.ceil(gpus / local)
    inside, outside = machine.reached * machine.node_rate, machine.reached * machine.network_rate
    tree = 2 * math.ceil(math.log2(nodes)) * machine.network_latency
    ring_rate = inside if nodes == 1 else min(inside, local * outside)
    steps_inside = (local - 1) * machine.node_latency
    all_reduce = Cost(2 * steps_inside + tree, 2 * (gpus - 1) / gpus / ring_rate)
    if way == "hsdp":
        gather = Cost(steps_inside, (local - 1) / local / inside)
        across = 2 * (nodes - 1) / nodes / local / outside
        return Links(all_reduce, gather, Cost(gather.latency + tree, gather.a_byte + across))
    hops = nodes * steps_inside + (nodes * machine.network_latency if nodes > 1 else 0.0)
    gather = Cost(hops, (gpus - 1) / gpus / ring_rate)
    return Links(all_reduce, gather, gather)


def buckets_of(units: Sequence[Unit]) -> Iterator[tuple[float, int]]:
    """DDP's messages: (share of the backward pass after which its last gradient is ready, parameters)."""
    work = sum(unit.flops for unit in units)
    done, waiting, limit = 0.0, 0, FIRST_BUCKET
    for unit in reversed(units):
        done, waiting = done + unit.flops / work, waiting + unit.parameters
        while waiting * WEIGHT >= limit:
            yield done, limit // WEIGHT
            waiting, limit = waiting - limit // WEIGHT, BUCKET
    if waiting:
        yield 1.0, waiting


def ddp_seconds(units: Sequence[Unit], step: Alone, links: Links, wire: int = WEIGHT, hides: bool = True) -> float:
    """Forward, backward, AdamW, and those all-reduces of gradients (``wire`` bytes each) that backward does not hide.

    Messages go one after another, each when its last gradient is ready; the last can only begin when backward is over.
    With ``hides`` false none begins earlier, as where the processor that computes communicates as well.
    """
    sent = 0.0
    for ready, parameters in buckets_of(units):
        sent = max(sent, (ready if hides else 1.0) * step.backward) + links.all_reduce(parameters * wire)
    return step.forward + max(step.backward, sent) + step.optimizer + SCALARS["ddp"] * links.all_reduce(WEIGHT)


def fsdp_seconds(
    units: Sequence[Unit], step: Alone, links: Links, shards: int, wire: int = WEIGHT, hides: bool = True
) -> float:
    """Forward, backward, AdamW on a piece, and what is not hidden of two gathers and a reduce-scatter of each block.

    A block is gathered, in float32, while the one before it is computed; all that is not in blocks is gathered before
    the first and reduced after the last. One message at a time. With ``hides`` false everything waits for everything.
    """
    blocks = [unit for unit in units if unit.is_block]
    root = parameters_of(units) - parameters_of(blocks)
    work = sum(unit.flops for unit in blocks)
    now = links.gather(root * WEIGHT)
    for order, seconds, reduces in ((blocks, step.forward, False), (blocks[::-1], step.backward, True)):
        link = gathered = now + links.gather(order[0].parameters * WEIGHT)
        for unit, following in zip(order, [*order[1:], None], strict=True):
            now = max(now, gathered)
            if following is not None and hides:
                gathered = link = max(link, now) + links.gather(following.parameters * WEIGHT)
            now += seconds * unit.flops / work
            if reduces:
                link = max(link, now) + links.reduce(unit.parameters * wire)
                now = now if hides else link
            if following is not None and not hides:
                gathered = link = now + links.gather(following.parameters * WEIGHT)
        now = max(now, link if reduces else 0.0)
    scalars = SCALARS["fsdp"] * links.all_reduce(WEIGHT)
    return now + links.reduce(root * wire) + step.optimizer / shards + scalars


# --- a cluster ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicted:
    """A model on so many GPUs; times in seconds."""

    model: str
    gpus: int
    batch: int
    """Images of all GPUs together."""
    micro_steps: int
    ways: dict[str, float]
    """The GPU's time of a step, by how weights are shared."""
    bounds: dict[str, float]
    """What a step cannot be faster than, with the cheapest way: the host's launches; the GPU's work, without and with
    communication; the host's launches and then a ring over all hosts that asks for signals; decoding; storage."""
    step: float
    efficiency: float
    """Images a second over those of as many GPUs that work alone on large batches."""
    limit: str
    checkpoint_every: float
    lost: float
    """Share of the time that checkpoints and failures take."""
    run: float
    """All epochs, with what is lost."""


def predict(
    name: str,
    units: Sequence[Unit],
    speed: Speed,
    machine: ScalingMachine,
    *,
    gpus: int,
    batch: int,
    epochs: int,
    wire: int = WEIGHT,
) -> Predicted | None:
    """One row; None if the images do not come out even, or the model does not fit. ``wire``: bytes of a gradient that
    travels."""
    if batch % gpus:
        return None
    local = min(gpus, machine.gpus_a_node)
    shards = {"ddp": 1, "fsdp": gpus} | ({"hsdp": local} if gpus > local else {})
    ways, works, micros = {}, {}, {}
    for way, pieces in shards.items():
        room = USABLE_MEMORY * machine.gpu_memory - state_bytes(units, pieces)
        fits = int(room / kept_bytes(units, "none"))
        mine = batch // gpus
        micro_steps = next((k for k in range(1, mine + 1) if mine % k == 0 and mine // k <= fits), None)
        if micro_steps is None:
            continue
        step = alone(units, speed, machine, mine // micro_steps, sharded=way != "ddp")
        links = links_of(machine, gpus, way)
        earlier = (micro_steps - 1) * (step.forward + step.backward)
        if way == "ddp":
            seconds = ddp_seconds(units, step, links, wire)
        else:
            seconds = fsdp_seconds(units, step, links, pieces, wire)
            silent = replace(links, reduce=Cost(0.0, 0.0))  # micro-steps but the last gather and reduce nothing
            once = step.optimizer / pieces + SCALARS[way] * links.all_reduce(WEIGHT)
            earlier = (micro_steps - 1) * (fsdp_seconds(units, step, silent, pieces) - once)
        ways[way], micros[way] = earlier + seconds, micro_steps
        works[way] = micro_steps * (step.forward + step.backward) + step.optimizer / pieces
    if not ways:
        return None
    way = min(ways, key=lambda way: ways[way])
    step = alone(units, speed, machine, batch // gpus // micros[way], sharded=way != "ddp")
    bounds = {
        "launches": micros[way] * step.launches,
        "work": works[way],
        "communication": ways[way],
        "vote on stopping": micros[way] * step.launches + 2 * (gpus - 1) * machine.host_latency,
        "decoding": batch / (gpus / machine.gpus_a_node * machine.cores * machine.decoded),
        "storage": batch * machine.image_bytes / machine.storage_rate,
    }
    seconds = max(bounds.values())
    # Some contain each other: the first that comes near the largest says why.
    limit = next(name for name, bound in bounds.items() if bound >= 0.9 * seconds)
    every, lost = checkpoints(parameters_of(units), shards[way], machine, gpus)
    return Predicted(
        model=name,
        gpus=gpus,
        batch=batch,
        micro_steps=micros[way],
        ways=ways,
        bounds=bounds,
        step=seconds,
        efficiency=batch * speed.an_image / gpus / seconds,
        limit=limit,
        checkpoint_every=every,
        lost=lost,
        run=epochs * (IMAGES // batch) * seconds / (1 - min(lost, 0.99)),
    )


def checkpoints(parameters: int, shards: int, machine: ScalingMachine, gpus: int) -> tuple[float, float]:
    """(seconds between checkpoints that lose least, the share of time that is lost).

    A checkpoint, 12 bytes a parameter, stops training while it is copied to the host, c = bytes / shards / staging's
    rate, and counts when it is written and hashed, w later. After a failure, every M = a GPU's hours / GPUs, half an
    interval, w and the restart are lost: c/t + (t/2 + w + restart)/M, least at t = sqrt(2cM) (Young 1974), but no
    checkpoint begins before the one before it counts.
    """
    size = 3 * WEIGHT * parameters
    copying = size / shards / machine.staging_rate
    writing = size / machine.storage_rate + size / machine.hash_rate
    between_failures = machine.gpu_hours * 3600 / gpus
    every = max(math.sqrt(2 * copying * between_failures), copying + writing)
    return every, copying / every + (every / 2 + writing + machine.restart) / between_failures


# --- what is said -----------------------------------------------------------------------------------------------------


def bench_scaling(config: BenchScalingConfig, command: Sequence[str]) -> int:
    """Prints predictions, or a check of the formulas; writes what was asked for. Returns 1 if ranks that were to train
    the same did not, otherwise 0.

    Raises:
        UserError: settings that cannot work, or a result that cannot be read.
    """
    check_scaling(config)
    for flag, names in (("models", config.models), ("check_model", (config.check_model,))):
        for name in names:
            if name not in PRESETS:
                raise UserError(f"--{flag} {name}: unknown; one of {', '.join(PRESETS)}")
    if config.check:
        return check(config, command)
    results = [read_result(path) for path in config.measured]
    machine, decoding = with_decoding(config.machine, results)
    models = {name: units_of(_shape_of(name)) for name in config.models}
    given = config.images_per_second or (None,) * len(models)
    speeds = {
        name: speed_of(name, units, machine, results, rate)
        for (name, units), rate in zip(models.items(), given, strict=True)
    }
    scales = {
        f"the same {config.global_batch} images a step": lambda gpus: config.global_batch,
        f"{config.gpu_batch} images a GPU": lambda gpus: config.gpu_batch * gpus,
    }
    tables: dict[str, list[Predicted]] = {}
    for title, batch_of in scales.items():
        rows = [
            predict(
                name,
                units,
                speeds[name],
                machine,
                gpus=gpus,
                batch=batch_of(gpus),
                epochs=config.epochs,
                wire=WIRE[config.reduce],
            )
            for name, units in models.items()
            for gpus in config.gpus
        ]
        tables[title] = [row for row in rows if row is not None]
        console().print(_table(title, tables[title], config.epochs))
        if len(tables[title]) < len(rows):
            left_out = "a batch that does not divide into them, or a model that does not fit"
            print(
                f"left out: {len(rows) - len(tables[title])} models on numbers of GPUs, for {left_out}", file=sys.stderr
            )
    memory = {name: _memory(units, machine, config.gpus) for name, units in models.items()}
    console().print(_memory_table(memory, config.gpus))
    for name, speed in speeds.items():
        print(f"{name}: {1 / speed.an_image:,.0f} images/s of one GPU alone, {speed.origin}")
    print(f"decoding: {machine.decoded:.0f} images/s and core, {decoding}")
    print("assumed (sources: fastmae bench scaling --help):")
    print(", ".join(f"{key} {value:g}" for key, value in asdict(machine).items()))
    if config.output is not None:
        measured = {
            "machine": asdict(machine),
            "speeds": {name: asdict(speed) for name, speed in speeds.items()},
            "decoding": decoding,
            "predicted": {title: [asdict(row) for row in rows] for title, rows in tables.items()},
            "memory": memory,
        }
        print(write_result(config.output, "scaling", command=command, settings=config, measured=measured))
    return 0


def _shape_of(name: str) -> MaskedAutoencoderViT:
    with torch.device("meta"):  # numbers of parameters, no parameters
        return PRESETS[name]()


def read_result(path: str) -> dict[str, Any]:
    """What ``fastmae bench step`` or ``loader`` left.

    Raises:
        UserError: it is neither.
    """
    try:
        result = json.loads(Path(path).read_text())
        words, names = result["command"], result["seconds"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--measured {path}: is no result of bench step or loader ({error}); name another") from error
    if result.get("ranks", 1) != 1:
        raise UserError(f"--measured {path}: is of {result['ranks']} ranks; name one of a single GPU")
    if "step" in words[:3] and "fastmae" in names:
        return {**result, "path": path, "what": "step"}
    if "loader" in words[:3] and any(name.startswith("pool") for name in names):
        return {**result, "path": path, "what": "loader"}
    raise UserError(f"--measured {path}: is no result of bench step or loader with times of fastmae; name another")


def speed_of(
    name: str, units: Sequence[Unit], machine: ScalingMachine, results: Sequence[dict[str, Any]], rate: float | None
) -> Speed:
    """What was given, or measured, or, marked as such, predicted.

    One measured batch tells the time of an image once what weights move is taken off; several are a curve.
    """
    if rate is not None:
        return Speed("given", 1 / rate)
    found = [result for result in results if result["what"] == "step" and result["settings"]["model"] == name]
    curve = sorted(
        (int(result["settings"]["batch_size"]), quartiles(result["seconds"]["fastmae"])[1]) for result in found
    )
    if curve:
        gpus = {gpu for result in found for gpu in result["hardware"]["gpus"]} or {"a CPU"}
        origin = f"measured on {', '.join(sorted(gpus))} ({', '.join(result['path'] for result in found)})"
        batch, seconds = curve[-1]
        if len(curve) > 1:
            return Speed(origin, seconds / batch, tuple(curve))
        once = parameters_of(units) * (MOVED_BY_PASSES + MOVED_BY_OPTIMIZER) / machine.gpu_memory_rate
        return Speed(origin, max(seconds - once, seconds / 2) / batch)
    work = 3 * sum(unit.flops for unit in units)
    return Speed(
        f"PREDICTED as {machine.mfu:.0%} of {machine.gpu_flops / 1e12:.0f} TFLOP/s",
        work / machine.gpu_flops / machine.mfu,
    )


def with_decoding(machine: ScalingMachine, results: Sequence[dict[str, Any]]) -> tuple[ScalingMachine, str]:
    """The machine with the best rate that the pool was measured at, and where it is from."""
    found = [
        (1 / quartiles(seconds)[1] / result["num_workers"], f"measured ({result['path']}: {name})")
        for result in results
        if result["what"] == "loader"
        for name, seconds in result["seconds"].items()
        if name.startswith("pool")
    ]
    if not found:
        return machine, "assumed"
    rate, origin = max(found)
    return replace(machine, decoded=rate), origin


def _table(title: str, rows: Sequence[Predicted], epochs: int) -> Table:
    made = Table(title=f"{title}; {epochs} epochs of {IMAGES:,}", title_justify="left")
    made.add_column("model", no_wrap=True)
    columns = ["GPUs", "batch a GPU", "ddp ms", "fsdp", "hsdp", "images/s", "efficiency", "limit"]
    for column in [*columns, "days", "save every", "lost"]:
        made.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        split = f" in {row.micro_steps}" if row.micro_steps > 1 else ""
        made.add_row(
            row.model.removeprefix("mae_vit_"),
            f"{row.gpus:,}",
            f"{row.batch // row.gpus}{split}",
            *(f"{1e3 * row.ways[way]:.1f}" if way in row.ways else "–" for way in ("ddp", "fsdp", "hsdp")),
            f"{row.batch / row.step:,.0f}",
            f"{row.efficiency:.0%}",
            row.limit,
            f"{row.run / 86400:.2f}",
            f"{row.checkpoint_every / 60:.1f} min",
            f"{row.lost:.2%}",
        )
    return made


def _memory(units: Sequence[Unit], machine: ScalingMachine, gpus: Sequence[int]) -> dict[str, Any]:
    """Bytes: of the state, by how many GPUs it lies on; of what an image keeps; and the batch that fits beside a whole
    state."""
    kept = {checkpointing: kept_bytes(units, checkpointing) for checkpointing in KEPT}
    room = USABLE_MEMORY * machine.gpu_memory - state_bytes(units, 1)
    return {
        "parameters": parameters_of(units),
        "state": {shards: state_bytes(units, shards) for shards in (1, *gpus)},
        "image": kept,
        "fits": {checkpointing: max(0, int(room / size)) for checkpointing, size in kept.items()},
    }


def _memory_table(memory: dict[str, dict[str, Any]], gpus: Sequence[int]) -> Table:
    made = Table(title="memory of a GPU, bf16, by --checkpointing none, selective, full", title_justify="left")
    made.add_column("model", no_wrap=True)
    for column in ("parameters", "state, ddp", *(f"fsdp on {n:,}" for n in gpus), "an image", "batch that fits (ddp)"):
        made.add_column(column, justify="right", no_wrap=True)
    for name, one in memory.items():
        made.add_row(
            name.removeprefix("mae_vit_"),
            f"{one['parameters'] / 1e6:.0f} M",
            *(f"{size / 2**30:.1f} GiB" for size in one["state"].values()),
            ", ".join(f"{size / 2**20:.1f}" for size in one["image"].values()) + " MiB",
            ", ".join(map(str, one["fits"].values())),
        )
    return made


# --- the check --------------------------------------------------------------------------------------------------------

SMALL = WEIGHT  # bytes of a message that is all latency
LOSS_TOLERANCE = 1e-4
WAYS = ("alone", "fsdp alone", "ddp", "fsdp")  # by itself, in FSDP2's hands but of one rank, and shared


def check(config: BenchScalingConfig, command: Sequence[str]) -> int:
    """Times real ranks beside the formulas. One rank's step and the collectives are timed by themselves, in turns with
    the steps that they are to explain, on every rank at once; a sample is the slowest rank's."""
    units = units_of(_shape_of(config.check_model))
    made = Table(title=f"{config.check_model}, {config.check_batch} images a rank, gloo, fp32", title_justify="left")
    made.add_column("ranks")
    columns = ("a rank alone ms", "all hidden", "nothing hidden", "measured", "off by", "quartiles")
    for column in ("way", "clock", *columns):
        made.add_column(column, justify="right", no_wrap=True)
    kept: dict[str, Any] = {}
    for ranks in config.ranks:
        clocks, losses = run_ranks(config, ranks)
        if max(losses.values()) - min(losses.values()) > LOSS_TOLERANCE * losses["alone"]:
            print(f"the losses of {ranks} ranks differ, so no time is reported: {losses}", file=sys.stderr)
            return 1
        kept[str(ranks)] = {"losses": losses, "clocks": {}}
        for clock, samples in clocks.items():
            found: dict[str, Any] = {"seconds": samples}
            for way in ("ddp", "fsdp"):
                hidden, plain = (guess(units, samples, ranks, way, hides) for hides in (True, False))
                off_by = [measured / sum_ - 1 for measured, sum_ in zip(samples[way], plain, strict=True)]
                found[way] = {"all hidden": hidden, "nothing hidden": plain, "off_by": off_by}
                one = samples["alone" if way == "ddp" else "fsdp alone"]
                medians = [1e3 * quartiles(seconds)[1] for seconds in (one, hidden, plain, samples[way])]
                first, _, third = quartiles(off_by)
                spread = f"{first:+.0%} – {third:+.0%}"
                cells = [f"{median:.1f}" for median in medians] + [f"{medians[3] / medians[2] - 1:+.1%}", spread]
                made.add_row(str(ranks), way, clock, *cells)
            kept[str(ranks)]["clocks"][clock] = found
    console().print(made)
    print("off by: of what is predicted with nothing hidden, as the cores that compute communicate as well;")
    print(f"the processor's clock does not count what other programs take; load {os.getloadavg()[0]:.1f}")
    if config.output is not None:
        name = f"scaling-check-{config.check_model}-{machine_name(torch.device('cpu'))}-n{config.check_batch}"
        print(
            write_result(
                config.output, name, command=command, settings=config, measured={"load": os.getloadavg(), "ranks": kept}
            )
        )
    return 0


def guess(units: Sequence[Unit], samples: Samples, ranks: int, way: str, hides: bool) -> list[float]:
    """What the formulas make of each round's samples."""
    bucket, block = _message_sizes(units)

    def one(round_: int) -> float:
        taken = {name: seconds[round_] for name, seconds in samples.items()}
        costs = [
            _line((SMALL * several, taken[f"{name}, small"]), (size, taken[f"{name}, large"]))
            for name, size, several in (("all-reduce", bucket, 1), ("gather", block, ranks), ("reduce", block, ranks))
        ]
        links = Links(*costs)
        passes = max(taken["alone" if way == "ddp" else "fsdp alone"] - taken["optimizer"], 0.0)
        step = Alone(passes / 3, passes * 2 / 3, taken["optimizer"], 0.0)
        if way == "ddp":
            return ddp_seconds(units, step, links, hides=hides)
        return fsdp_seconds(units, step, links, ranks, hides=hides)

    return [one(round_) for round_ in range(len(samples["alone"]))]


def _line(small: tuple[int, float], large: tuple[int, float]) -> Cost:
    """The cost that explains two messages, (bytes, seconds) each; no less for more bytes."""
    a_byte = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
    return Cost(max(0.0, small[1] - small[0] * a_byte), a_byte)


def _message_sizes(units: Sequence[Unit]) -> tuple[int, int]:
    """Bytes of DDP's largest message and of FSDP's."""
    bucket = max(parameters for _, parameters in buckets_of(units))
    return bucket * WEIGHT, max(unit.parameters for unit in units if unit.is_block) * WEIGHT


def run_ranks(config: BenchScalingConfig, ranks: int) -> tuple[dict[str, Samples], dict[str, float]]:
    """(seconds by clock and what was timed, each way's loss at the end) of ``ranks`` processes with a thread each."""
    with socket.socket() as any_socket, tempfile.TemporaryDirectory() as folder:
        any_socket.bind(("127.0.0.1", 0))
        port = any_socket.getsockname()[1]
        any_socket.close()
        path = Path(folder) / "samples.json"
        multiprocessing.set_forkserver_preload([__name__])  # imports take longer than the ranks do
        torch.multiprocessing.start_processes(
            _rank, args=(ranks, port, config, path), nprocs=ranks, start_method="forkserver"
        )
        clocks, losses = json.loads(path.read_text())
    return clocks, losses


def _rank(rank: int, ranks: int, port: int, config: BenchScalingConfig, path: Path) -> None:
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    torch.set_num_threads(1)
    world = parallel.start("cpu")
    losses: dict[str, torch.Tensor] = {}
    calls: dict[str, Callable[[], object]] = {way: _steps(config, world, way, losses) for way in WAYS}
    calls |= {"optimizer": _optimizer_alone(config)} | _collectives(config, world)
    clocks: dict[str, Samples] = {clock: {name: [] for name in calls} for clock in ("wall", "processor")}
    for round_ in range(config.rounds + 1):
        for name, call in calls.items():
            world.barrier()
            before = time.process_time()
            wall = elapsed(call, 1, world.device)
            slowest = torch.tensor([wall, time.process_time() - before], dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            for samples, seconds in zip(clocks.values(), slowest.tolist(), strict=True):
                samples[name] += [seconds] if round_ > 0 else []  # the first one warms up
    if world.is_main:
        path.write_text(json.dumps([clocks, {name: float(loss) for name, loss in losses.items()}]))
    parallel.stop(world)


def _steps(
    config: BenchScalingConfig, world: parallel.DistContext, way: str, losses: dict[str, torch.Tensor]
) -> Callable[[], None]:
    """The trainer's step, of this rank alone or shared. All ranks have the same images, so all losses are equal."""
    torch.manual_seed(0)
    model = PRESETS[config.check_model]()
    among = replace(world, size=1) if "alone" in way else world
    sharing = parallel.choose_parallelism(way, "fp32", None, among)
    loss_of = parallel.parallelize(TrainingLoss(model, MASK_RATIO), among, sharing)
    if way == "fsdp alone":
        mesh = init_device_mesh("cpu", (world.size, 1), mesh_dim_names=("others", "mine"))["mine"]
        for module in [part for part in loss_of.modules() if isinstance(part, Block)]:
            fully_shard(module, mesh=mesh)
        fully_shard(loss_of, mesh=mesh)
    optimizer = make_optimizer(model, 1e-4, 0.05)
    shape = (config.check_batch, *model.img_size, model.in_chans)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = (images, random_masking(torch.arange(config.check_batch), 0, model.num_patches))
    autocast = choose_precision("fp32", world.device).context(world.device)

    def step() -> None:
        stepped = train_step(loss_of, optimizer, [batch], 1, 1e-4, autocast, mean_over_ranks=among.mean)
        losses[way] = stepped.loss

    return step


def _optimizer_alone(config: BenchScalingConfig) -> Callable[[], object]:
    model = PRESETS[config.check_model]()
    optimizer = make_optimizer(model, 1e-4, 0.05)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return optimizer.step


def _collectives(config: BenchScalingConfig, world: parallel.DistContext) -> dict[str, Callable[[], object]]:
    """Each with a number a rank, and with as much as the step sends at once."""
    bucket, block = _message_sizes(units_of(_shape_of(config.check_model)))
    calls: dict[str, Callable[[], object]] = {}
    for size, reduced, piece in (("small", 1, 1), ("large", bucket // WEIGHT, math.ceil(block / WEIGHT / world.size))):
        gradients, mine, whole = torch.zeros(reduced), torch.zeros(piece), torch.zeros(piece * world.size)
        calls[f"all-reduce, {size}"] = partial(dist.all_reduce, gradients)
        calls[f"gather, {size}"] = partial(dist.all_gather_into_tensor, whole, mine)
        calls[f"reduce, {size}"] = partial(dist.reduce_scatter_tensor, mine, whole)
    return calls
