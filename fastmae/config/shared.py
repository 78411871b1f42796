"""What the settings of several commands share: a flag's type and text, and how a wrong one is refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from tyro.conf import Positional, arg

from fastmae.errors import UserError

if TYPE_CHECKING:
    from fastmae.config.finetune import FinetuneConfig
    from fastmae.config.pretrain import PretrainConfig

T = TypeVar("T")

Device = Annotated[str | None, arg(help="cpu, cuda or cuda:N. Default: cuda where there is one.")]

# Of pretrain and finetune.
AccumIter = Annotated[int, arg(help="Micro-steps whose gradients are added up before the optimiser steps.")]
MinLR = Annotated[float, arg(help="Learning rate at the end of the cosine.")]
ClipGrad = Annotated[
    float | None,
    arg(
        help=(
            "Largest norm of the gradient over all parameters; a longer one is scaled down. Default: any, as published."
        )
    ),
]
Flip = Annotated[bool | None, arg(help="Flip half of the crops horizontally. Default: for colour images.")]
Precision = Annotated[
    Literal["auto", "fp32", "tf32", "bf16"],
    arg(
        help=(
            "bf16 is autocast over float32 weights; tf32 (a GPU) rounds the factors of float32 products. auto: bf16 on "
            "a GPU that has it, otherwise fp32."
        )
    ),
]
Checkpointing = Annotated[
    Literal["none", "selective", "full"],
    arg(
        help=(
            "What blocks compute again in the backward pass to save memory: nothing; all but matrix products and "
            "attention; everything. The results are the same bits."
        )
    ),
]
Compile = Annotated[
    Literal["off", "block", "model"],
    arg(
        help=(
            "torch.compile of each block, or of the whole loss. The first step takes minutes; a CPU needs a C++ "
            "compiler."
        )
    ),
]
Ops = Annotated[
    Literal["auto", "triton", "native", "reference"],
    arg(
        help=(
            "Masking, gathering, assembling and the loss: Triton kernels (a GPU), C++ (a CPU), or the PyTorch that "
            "defines them. auto: what is made for the device."
        )
    ),
]
Attention = Annotated[
    Literal["auto", "sdpa", "xformers", "triton", "native"],
    arg(
        help=(
            "sdpa is torch's own choice, native C++ (a CPU). auto: on a GPU the fastest in the table that `fastmae "
            "bench attention --write` measures, sdpa for what is not in it; native on a CPU in float32, sdpa for what "
            "it cannot do."
        )
    ),
]
Parallel = Annotated[
    Literal["ddp", "fsdp", "hsdp"],
    arg(
        help=(
            "How several ranks share the weights: each has all (DistributedDataParallel), each has a piece (FSDP2), or "
            "groups of ranks have all together."
        )
    ),
]
ShardSize = Annotated[
    int | None,
    arg(help="Ranks that hold one copy of the weights together under --parallel hsdp. Default: those of a machine."),
]
Reduce = Annotated[
    Literal["fp32", "bf16"],
    arg(help="In which format gradients travel between ranks; bf16 is half the traffic, rounded."),
]
WorkersARank = Annotated[
    int | None,
    arg(help="Decoding threads a rank. Default: the cores that this process may use, at most 10."),
]
PinMem = Annotated[bool, arg(help="Copy batches to a GPU from page-locked memory.")]
MaxCorrupt = Annotated[
    float,
    arg(help="Largest share of unusable images before the run stops; 20 of them are always tolerated."),
]
HangTimeout = Annotated[
    float | None,
    arg(
        help=(
            "Seconds without a finished step after which a process shows the stacks of its threads and ends; 0 for "
            "never."
        )
    ),
]
CheckpointFreq = Annotated[
    int | None,
    arg(help="Optimiser steps between resumable checkpoints. Default: the fewest whole epochs of at least 300 steps."),
]
Keep = Annotated[int, arg(help="How many of the newest resumable checkpoints stay.")]
AsyncSave = Annotated[
    bool,
    arg(help="Write resumable checkpoints while training goes on, from a copy in the host's memory."),
]
LogFreq = Annotated[
    int,
    arg(help="Optimiser steps between reads of the losses; each step's loss is logged all the same."),
]
LogDir = Annotated[str | None, arg(help="Also write TensorBoard files here (needs the extra `track`).")]
Wandb = Annotated[str | None, arg(help="Also log to this project of Weights & Biases (needs the extra `wandb`).")]
KeepLast = Annotated[
    bool,
    arg(
        help=(
            "Fill the last partial batch of an epoch up from the epoch's beginning instead of dropping it, as "
            "published."
        )
    ),
]
KeepEvery = Annotated[
    int | None,
    arg(help="Also keep, for ever, the resumable checkpoints at multiples of this many times checkpoint_freq."),
]
Profile = Annotated[int | None, arg(help="Trace so many steps, after 5 others, into OUTPUT_DIR/profile.")]
CudaGraph = Annotated[
    bool,
    arg(
        help=(
            "Launch forward and backward pass as one CUDA graph, without Python between its kernels. One rank, a GPU."
        )
    ),
]
MaxSkipped = Annotated[
    int,
    arg(
        help=(
            "Steps in a row with a loss or gradient that is not finite before the run goes back to its newest "
            "checkpoint and on with other data; if that happens there once more, it stops."
        )
    ),
]

# Of a frozen model.
Checkpoint = Annotated[
    str,
    Positional,
    arg(
        metavar="CHECKPOINT",
        help=(
            "A run folder, one of its checkpoints, an official .pth or .safetensors file, or a folder of transformers."
        ),
    ),
]
WithDecoder = Annotated[
    str,
    Positional,
    arg(
        metavar="CHECKPOINT",
        help=(
            "With its decoder: a run folder, one of its checkpoints, an official .pth or .safetensors file, or a folder"
            " of transformers."
        ),
    ),
]
Preset = Annotated[str | None, arg(help="The preset, for a checkpoint that does not say.")]
ForwardBatch = Annotated[int, arg(help="Images a forward pass.")]
Workers = Annotated[int | None, arg(help="Decoding threads. Default: the cores that this process may use, at most 10.")]
Json = Annotated[bool, arg(help="Print one line of JSON instead of a table.")]

# Of benchmarks.
Rounds = Annotated[int, arg(help="Samples a contestant; contestants take turns.")]
SampleMs = Annotated[float, arg(help="Calls are repeated until a sample takes this many milliseconds.")]
Graph = Annotated[bool, arg(help="On a GPU: replay calls from a CUDA graph, so that Python's launches are not timed.")]
Samples = Annotated[str | None, arg(help="A folder for every sample (JSON).")]
BenchPrecision = Annotated[
    Literal["auto", "fp32", "bf16"],
    arg(help="bf16 is autocast over float32 weights. auto: bf16 on a GPU that has it, otherwise fp32."),
]
LoadingWorkers = Annotated[
    int | None,
    arg(
        help=(
            "Decoding threads, and the published pipeline's processes. Default: the cores that this process may use, at"
            " most 10."
        )
    ),
]


def given(value: T | None, default: T) -> T:
    return default if value is None else value


def need(config: object, holds: bool, flag: str, expected: str) -> None:
    """Refuses the value of a flag unless something holds.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    if not holds:
        value = getattr(config, flag)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        raise UserError(f"--{flag} {shown}: must be {expected}")


def need_at_least_one(config: object, *flags: str) -> None:
    """Refuses numbers below 1; a flag that is left open, or that the command does not have, is right."""
    for flag in flags:
        values = getattr(config, flag, None)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and value < 1:
                raise UserError(f"--{flag} {value}: must be at least 1")


def check_training(config: PretrainConfig | FinetuneConfig) -> None:
    """Refuses what neither pretrain nor finetune can work with.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    need_at_least_one(
        config, "batch_size", "accum_iter", "epochs", "num_workers", "shard_size", "max_skipped", "save_freq",
        "checkpoint_freq", "keep", "keep_every", "log_freq", "profile",
    )  # fmt: skip
    need(
        config,
        config.shard_size is None or config.parallel == "hsdp",
        "shard_size",
        "given together with --parallel hsdp",
    )
    for flag in ("lr", "blr", "clip_grad"):
        value = getattr(config, flag)
        need(config, value is None or (math.isfinite(value) and value > 0), flag, "a positive number")
    for flag in ("min_lr", "weight_decay", "warmup_epochs"):
        value = getattr(config, flag)
        need(config, value is None or (math.isfinite(value) and value >= 0), flag, "0 or more")
    need(config, 0 <= config.seed < 2**63, "seed", "in [0, 2**63)")
    need_size(config, "input_size")
    if config.crop_scale is not None:
        low, high = config.crop_scale
        need(config, 0 < low <= high <= 1, "crop_scale", "two numbers with 0 < smallest ≤ largest ≤ 1")
    need(config, 0 <= config.max_corrupt <= 1, "max_corrupt", "a share between 0 and 1")
    timeout = config.hang_timeout
    need(config, timeout is None or (math.isfinite(timeout) and timeout >= 0), "hang_timeout", "0 or more seconds")
    fits = config.compile != "model" or config.parallel == "ddp"
    need(config, fits, "compile", f"off or block with --parallel {config.parallel}, which communicates between blocks")


def need_size(config: object, flag: str) -> None:
    """Refuses what is neither a side in pixels nor height and width."""
    size = getattr(config, flag)
    need(
        config, size is None or (len(size) in (1, 2) and min(size) >= 1), flag, "one or two positive numbers of pixels"
    )
