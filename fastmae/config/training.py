"""The settings that pretrain and finetune have in common."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from fastmae.config.images import ImagesConfig, check_images
from fastmae.config.shape import EncoderShape, check_shape
from fastmae.config.values import need, need_at_least_one, need_seed, need_size, need_utf8
from fastmae.errors import SettingError

# A run that goes on has these from its checkpoint where they are left open, whatever the default is by now.
LEFT_OPEN = (
    "epochs", "blr", "lr", "warmup_epochs", "layer_decay", "crop_scale", "flip", "grow_epochs", "aa", "reprob", "mixup",
    "cutmix", "drop_path", "compile", "adversarial_start", "adversarial_warmup", "adversarial_lr", "adversarial_r1",
    "segmenter_head", "random_scale", "distortion",
)  # fmt: skip
# These may change when a run goes on, and then it says so, as they change what it learns.
TOLD_IF_CHANGED = (
    "epochs", "lr", "min_lr", "warmup_epochs", "layer_decay", "weight_decay", "clip_grad", "precision", "residual",
    "float8", "reduce", "adversarial_start", "adversarial_warmup", "adversarial_lr", "adversarial_r1",
)  # fmt: skip
# These may differ from rank to rank: where its data lie, and how it reads them and computes.
PER_RANK = (
    "data_path", "root", "masks", "finetune", "init", "log_dir", "device", "num_workers", "pin_mem", "cache",
    "cache_gb",
)  # fmt: skip
MOST_WORKERS = 4096
COMPILED_STEPS = 2000
"""A run of fewer steps is not compiled by default. Compiling takes about half a minute on a GPU, and a compiled step
saves 10 to 15 ms of ViT-B or ViT-L (predicted)."""
YEAR = 366 * 24 * 3600


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(ImagesConfig, EncoderShape):
    """The settings of a training, whatever is learnt."""

    # Data.
    data_path: str | tuple[str, ...] = "digits"
    """The data to train on."""
    output_dir: str = "./output_dir"
    """The run folder, into which checkpoints, logs and the settings of the run are written."""
    model: str | None = None
    """The name of a preset."""
    input_size: tuple[int, ...] | None = None
    """Side of the images in pixels, or their height and width."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest share of an image's area that a crop takes."""
    flip: bool | None = None
    """Flip half of the crops horizontally. Default: for colour images of more than one row."""
    max_corrupt: float = 0.01
    """Largest share of images that may be unusable before the run stops. Up to 20 of them are always tolerated."""
    keep_last: bool = False
    """Fill the last partial batch of an epoch with images from the beginning of the epoch. By default that batch is
    dropped, as in the official script."""

    # Optimisation.
    batch_size: int = 64
    """Images per rank and micro-step. The global batch is batch_size × accum_iter × ranks."""
    accum_iter: int = 1
    """Micro-steps whose gradients are added up before the optimiser takes a step."""
    epochs: int | None = None
    """Passes over the data."""
    blr: float | None = None
    """Base learning rate, for a global batch of 256 images; --lr is computed from it."""
    lr: float | None = None
    """Learning rate at the end of the warm-up. Default: blr × global batch / 256."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine schedule."""
    warmup_epochs: float | None = None
    """Epochs over which the learning rate grows from 0, linearly."""
    weight_decay: float = 0.05
    """Weight decay of AdamW. Parameters of one dimension, such as biases and norms, have none."""
    clip_grad: float | None = None
    """Largest norm of the gradient over all parameters; a larger gradient is scaled down to it. Default: no limit, as
    in the official script."""
    seed: int = 0
    """The number from which everything random follows: the first weights, the order of the images, and how each of them
    is changed."""

    # Speed and memory.
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is a GPU, otherwise cpu."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Format of the numbers. bf16 is autocast over float32 weights. tf32 rounds the factors of float32 products on a
    GPU (experimental: it has not run on a GPU yet). auto is bf16 on a GPU that supports it, otherwise fp32."""
    checkpointing: Literal["none", "gelu", "selective", "full"] = "none"
    """What the blocks compute a second time in the backward pass to save memory: nothing (on a CPU, GELU where that
    costs next to no time); GELU; everything but matrix products, convolutions and attention (selective);
    everything (full). The results are the same bits."""
    compile: Literal["auto", "off", "block", "model"] = "auto"
    """Use torch.compile for each block, or for the whole loss. The first step then takes minutes. A CPU needs a C++
    compiler. auto is block on a GPU if the run has at least 2,000 steps, and off where that fails; on a CPU it is off.
    A run that goes on keeps what it had."""
    num_workers: int | None = None
    """Threads per rank that decode images. Default: the number of cores that this process may use, at most 10."""
    pin_mem: bool = True
    """Copy batches to a GPU from page-locked memory."""
    ops: Literal["auto", "triton", "cpu", "reference"] = "auto"
    """Which code masks, gathers and assembles patches and computes the loss: Triton kernels for a GPU, C++ for a CPU
    (cpu), or the plain PyTorch that defines the results (reference). auto is the code made for the device."""
    attention: Literal[
        "auto", "sdpa", "cudnn", "flash", "xformers", "triton", "sdpa-float32", "cpu", "cpu-dot", "cpu-amx"
    ] = "auto"
    """Which code computes attention. sdpa is PyTorch's own choice, cudnn and flash are two of its kernels; xformers and
    triton are for a GPU (experimental: they have not run on a GPU yet). For a CPU: cpu is C++ for float32 and bf16,
    cpu-dot and cpu-amx the same with the processor's dot products (AVX512-BF16) or tiles (AMX, experimental: it has not
    run on such a processor yet) of bf16, sdpa-float32 PyTorch's own in float32 for bf16. auto is, on a CPU, what was
    measured to be fastest when the run began; on a GPU what the table of `fastmae bench attention --write` says is
    fastest, without it triton where that is predicted to be faster (A100, H100, H200, B200); otherwise sdpa."""
    cuda_graph: bool = False
    """Run the forward and the backward pass as one CUDA graph, without Python between its kernels. For one rank on a
    GPU (experimental: it has not run on a GPU yet)."""

    # Distributed.
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """How several ranks hold the weights: each rank has all of them (ddp: DistributedDataParallel), each rank has a
    part (fsdp: FSDP2), or each group of --shard_size ranks has all of them together (hsdp)."""
    shard_size: int | None = None
    """With --parallel hsdp, how many ranks hold one copy of the weights together. Default: the ranks of one machine."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """Format in which gradients travel between ranks. bf16 halves the traffic and rounds the gradients."""
    hang_timeout: float | None = 1800.0
    """Seconds without a finished step after which a process prints the stacks of its threads and ends. 0 turns this
    off."""

    # Saving and resuming.
    resume: str = ""
    """Where to continue."""
    save_freq: int = 20
    """Epochs between files checkpoint-EPOCH.pth in the official format. Their weights are written as .safetensors as
    well."""
    checkpoint_freq: int | None = None
    """Optimiser steps between checkpoints from which the run can be resumed. Default: the smallest number of whole
    epochs that has at least 300 steps."""
    keep: int = 2
    """How many of the newest resumable checkpoints are kept."""
    keep_every: int | None = None
    """Never delete the resumable checkpoints at multiples of this many times checkpoint_freq. Default: keep only the
    newest."""
    async_save: bool = True
    """Write resumable checkpoints while training goes on, from a copy in the memory of the host."""
    max_failed_saves: int = 3
    """How many resumable checkpoints in a row may fail to be saved, such as on a full disk. After them the run ends
    with exit status 1."""
    max_skipped: int = 20
    """How many steps in a row may be skipped because a loss or gradient is not finite. After them the run returns to
    its newest checkpoint and continues with other data; if it fails there again, it stops."""

    # Logging.
    log_freq: int = 20
    """Optimiser steps between two reads of the losses. The loss of every step is logged in any case."""
    log_dir: str | None = None
    """Write TensorBoard files into this folder as well (needs the extra `track`)."""
    wandb: str | None = None
    """Log to this project of Weights & Biases as well (needs the extra `wandb`)."""
    mlflow: str | None = None
    """Log to this experiment of MLflow as well (needs the extra `mlflow`). Where it is kept, MLflow knows, such
    as by the variable MLFLOW_TRACKING_URI."""
    profile: int | None = None
    """Trace this many steps, after the first 5, into OUTPUT_DIR/profile."""


def default_warmup(official: float, epochs: int) -> float:
    """Returns the epochs of the warm-up where none are given: the official number if the run is longer than that, else
    a tenth of the run, as the learning rate would never get up otherwise. An ``official`` 0 is a tenth as well.
    """
    return official if 0 < official < epochs else epochs / 10


def chosen_compile(
    config: TrainingConfig, steps: int, on_gpu: bool, needs_compiling: bool = False
) -> Literal["off", "block", "model"]:
    """Returns what --compile means for a run of so many steps. Nowhere was the whole model measured to be better."""
    if config.compile != "auto":
        return config.compile
    return "block" if needs_compiling or (on_gpu and steps >= COMPILED_STEPS) else "off"


def check_rates(config: TrainingConfig) -> None:
    """Refuses a smallest learning rate above that of the run, which would rise in the end instead of falling.

    Raises:
        SettingError: naming both.
    """
    if config.lr is not None and config.min_lr > config.lr:
        problem = f"must be at most the learning rate, which is {config.lr:.3g} here (--lr, or --blr for 256 images)"
        raise SettingError("min_lr", config.min_lr, problem)


def check_training(config: TrainingConfig) -> None:
    """Refuses what neither pretrain nor finetune can work with.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    needed = partial(need, config)
    need_at_least_one(
        config, "batch_size", "accum_iter", "epochs", "num_workers", "shard_size", "max_skipped", "max_failed_saves",
        "save_freq", "checkpoint_freq", "keep", "keep_every", "log_freq", "profile",
    )  # fmt: skip
    needed(config.shard_size is None or config.parallel == "hsdp", "shard_size", "given together with --parallel=hsdp")
    for name in ("lr", "blr", "clip_grad"):
        value = getattr(config, name)
        needed(value is None or value > 0, name, "a positive number")
    for name in ("min_lr", "weight_decay", "warmup_epochs"):
        value = getattr(config, name)
        needed(value is None or value >= 0, name, "0 or more")
    need_seed(config)
    check_images(config)
    check_shape(config)
    workers = config.num_workers
    needed(workers is None or workers <= MOST_WORKERS, "num_workers", f"at most {MOST_WORKERS}")
    need_size(config, "input_size")
    if config.crop_scale is not None:
        low, high = config.crop_scale
        needed(0 < low <= high <= 1, "crop_scale", "two numbers with 0 < smallest ≤ largest ≤ 1")
    need_utf8(config, "output_dir")
    needed(0 <= config.max_corrupt <= 1, "max_corrupt", "a share between 0 and 1")
    timeout = config.hang_timeout
    needed(timeout is None or 0 <= timeout <= YEAR, "hang_timeout", "0 or more seconds, at most a year")
    fits = config.compile != "model" or config.parallel == "ddp"
    needed(fits, "compile", f"off or block with --parallel={config.parallel}, which communicates between blocks")
