"""The settings of bench, all but quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from fastmae.config.shared import (
    BenchPrecision,
    Device,
    Graph,
    LoadingWorkers,
    Rounds,
    SampleMs,
    Samples,
)
from fastmae.config.values import coerce, need_at_least_one
from fastmae.errors import UserError

BenchOp = Literal[
    "random_masking", "gather_patches", "scatter_patches", "assemble_tokens", "masked_mse", "attention", "linear",
    "depthwise_visible", "grn",
]  # fmt: skip
BENCH_OPS: tuple[BenchOp, ...] = get_args(BenchOp)
BENCH_SWITCHES = (
    "bf16", "bf16-residual", "tf32", "checkpointing-gelu", "checkpointing-selective", "checkpointing-full",
    "compile-block", "compile-model", "compile-off", "float8", "cuda-graph", "clip-grad", "ema", "fsdp", "hsdp",
    "reduce-bf16", "cross", "sdpa", "cudnn", "flash", "xformers", "triton", "sdpa-float32", "cpp", "cpu-dot", "cpu-amx",
    "reference-ops", "untuned",
)  # fmt: skip
BenchBaseline = Literal["official", "strong", "strong-compiled", "transformers", "transformers-compiled", "timm"]
BenchPart = Literal[
    "kernels", "attention", "loader", "step", "batch-sizes", "input-sizes", "ranks", "end-to-end"
]  # fmt: skip
BENCH_PARTS: tuple[BenchPart, ...] = get_args(BenchPart)


@dataclass(frozen=True, kw_only=True)
class BenchKernelsConfig:
    """Time the ops and attention beside eager PyTorch and torch.compile; a wrong result gets no time."""

    models: tuple[str, ...] = ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
    """Presets whose shapes are timed: vision transformers, or mae_convnextv2_*."""
    only: tuple[BenchOp, ...] = BENCH_OPS
    """Which of the ops."""
    batch_size: int | None = None
    """Images per call. Default: 32 on a CPU, 256 on a GPU."""
    device: Device = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Format of tokens and predictions, as autocast makes them. auto: bf16 on a GPU that has it, otherwise fp32."""
    compile: bool = True
    """Time torch.compile of the eager reference as well; compiling takes up to a minute per case on a CPU."""
    rounds: Rounds = 15
    sample_ms: SampleMs = 20.0
    graph: Graph = True
    output: str | None = None
    """A folder for every sample (JSON) and a picture (PNG; needs the extra `bench`)."""

    def __post_init__(self) -> None:
        coerce(self)


@dataclass(frozen=True, kw_only=True)
class BenchAttentionConfig:
    """Time the backends of attention, forward and backward, and keep the fastest for each shape."""

    models: tuple[str, ...] = ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
    """Presets whose shapes are timed: the encoder's with a quarter of the tokens and with all, the decoder's."""
    shapes: tuple[str, ...] = ()
    """Shapes to time instead, as TOKENSxHEADSxHEAD_DIM, such as 50x12x64."""
    batch_size: int | None = None
    """Images per call. Default: 8 on a CPU, 256 on a GPU."""
    device: Device = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Format of queries, keys and values. auto: bf16 on a GPU that has it, otherwise fp32."""
    rounds: Rounds = 15
    sample_ms: SampleMs = 20.0
    graph: Graph = True
    write: tuple[str, ...] | None = None
    """Enter the winners in the table that `--attention auto` looks in: yours, or the file that is named here."""
    output: Samples = None

    def __post_init__(self) -> None:
        coerce(self)


@dataclass(frozen=True, kw_only=True)
class BenchStepConfig:
    """Time a training step beside other implementations, and ours with one switch of pretrain each, once their losses
    agree. Each has a process of its own; under torchrun all have those of the ranks, of which the slowest counts."""

    model: str = "mae_vit_base_patch16"
    """The name of a preset."""
    input_size: int | None = None
    """Side of the images in pixels. Default: the model's."""
    batch_size: int = 8
    """Images per rank and step."""
    device: Device = None
    precision: BenchPrecision = "fp32"
    baselines: tuple[BenchBaseline, ...] = ("official", "strong", "transformers", "timm")
    """Other implementations to time as well: the official formulation in its own loop (official), with torch's
    attention and a fused optimiser (strong), of timm's blocks (timm), and transformers' ViTMAE; those with -compiled
    through torch.compile, which takes minutes on a CPU. `--baselines` without a name times none."""
    switches: tuple[str, ...] = ()
    """Time our step with each of these as well: bf16, bf16-residual, tf32, checkpointing-gelu, checkpointing-selective,
    checkpointing-full, compile-off, compile-block, compile-model, float8, cuda-graph, clip-grad, ema, fsdp, hsdp,
    reduce-bf16, cross; attention by sdpa, cudnn, flash, xformers, triton, sdpa-float32, cpp, cpu-dot or cpu-amx;
    reference-ops, untuned; or several of them joined by +, such as compile-block+bf16-residual+triton. fsdp, hsdp and
    reduce-bf16 need several ranks. Compiling takes minutes on a CPU."""
    phases: bool = False
    """Say where the time goes: forward, backward, optimiser, and communication where there are several ranks."""
    tune: Literal["auto", "off"] | None = None
    """On a CPU: measure what is fastest for our step beforehand, as a run does by default, or leave all to torch."""
    ceilings: bool = True
    """Measure what the machine can do first: a copy and large matrix products, of whose rates a step reaches a
    share."""
    rounds: int = 7
    """Samples of each implementation; implementations take turns."""
    time_limit: int | None = None
    """Seconds: no round begins that would end later, and no implementation starts after six tenths of them. What was
    measured is reported. Default: no limit."""
    output: Samples = None

    def __post_init__(self) -> None:
        coerce(self)


@dataclass(frozen=True, kw_only=True)
class BenchLoaderConfig:
    """Time loading, from files to crops, beside the official pipeline; wrong images get no time."""

    data_path: tuple[str, ...] | None = None
    """Image files, each as one --data_path of pretrain takes them, such as a folder and the same images in tar shards.
    Default: made in a temporary folder, 500×375 pixels and about 110 KB each."""
    kinds: tuple[Literal["folder", "tar", "parquet"], ...] | None = None
    """Formats in which images are made. Default: the same images in all three."""
    files: int | None = None
    """How many images are made. Default: 1000."""
    image_decoders: tuple[Literal["threads", "dali-cpu", "dali-gpu"], ...] = ("threads", "dali-cpu", "dali-gpu")
    """Which decoders, beside the thread decoder."""
    input_size: int = 224
    """Side of the crops in pixels."""
    batch_size: int = 64
    """Images per batch."""
    batches: int = 8
    """Batches per sample, rounded up to a multiple of num_workers: the official pipeline's processes make one batch
    each."""
    num_workers: LoadingWorkers = None
    device: Device = None
    rounds: Rounds = 7
    output: Samples = None

    def __post_init__(self) -> None:
        coerce(self)


@dataclass(frozen=True, kw_only=True)
class BenchEndToEndConfig:
    """Time training from JPEG files: our loader and step, beside our step alone and the official loop with its
    pipeline, once their losses agree."""

    model: str = "mae_vit_base_patch16"
    """The name of a preset."""
    data_path: str | None = None
    """Image files. Default: made in a temporary folder, 500×375 pixels and about 110 KB each."""
    files: int | None = None
    """How many images are made. Default: 256, or 4 batches if that is more."""
    batch_size: int | None = None
    """Images per step. Default: 8 on a CPU, 256 on a GPU."""
    steps: int | None = None
    """Steps per sample, rounded up to a multiple of num_workers: the official pipeline's processes make a batch each.
    Default: 4 on a CPU, 50 on a GPU."""
    num_workers: LoadingWorkers = None
    image_decoder: Literal["threads", "dali-cpu", "dali-gpu"] = "threads"
    """What decodes plain JPEGs in our pipeline."""
    device: Device = None
    precision: BenchPrecision = "auto"
    compile: Literal["auto", "off", "block", "model"] = "auto"
    """torch.compile of our step, as for pretrain: by default as a long run has it."""
    rounds: Rounds = 7
    output: Samples = None

    def __post_init__(self) -> None:
        coerce(self)


@dataclass(frozen=True, kw_only=True)
class BenchAllConfig:
    """Measure this machine's ceilings and everything that the other benchmarks measure, into one JSON and one report
    (HTML). Each part is a command of its own; one that cannot run here is named, and the rest goes on."""

    output: str
    """A folder for all samples (JSON) and report.html."""
    model: str = "mae_vit_base_patch16"
    """The name of a preset."""
    only: tuple[BenchPart, ...] = BENCH_PARTS
    """Which parts; the ceilings are always measured."""
    batch_sizes: tuple[int, ...] | None = None
    """Images per step, one timing of the step for each. The middle one is that of all other parts. Default: 4 8 16 on a
    CPU, 64 128 256 on a GPU."""
    input_sizes: tuple[int, ...] | None = None
    """Sides of the images in pixels, one timing of the step for each. Default: about 0.7, 1 and 1.3 times the
    model's."""
    ranks: tuple[int, ...] | None = None
    """Numbers of ranks on this machine, one timing of the step for each. Default: 1, 2, 4 … up to the GPUs; on a CPU 1
    and 2, if there are two cores."""
    baselines: tuple[BenchBaseline, ...] = ("official", "strong", "transformers", "timm")
    """Other implementations to time, as for bench step."""
    switches: tuple[str, ...] = ()
    """Switches of our step to time as well, as for bench step."""
    device: str | None = None
    """cpu or cuda. Default: cuda where there is one."""
    precision: BenchPrecision = "auto"
    rounds: int | None = None
    """Samples of each implementation, in every part. Default: each part's own, 7 or 15; 3 with --quick."""
    quick: bool = False
    """A first look: few and short samples, nothing compiled, one kind of files, baselines in one timing of the step."""

    def __post_init__(self) -> None:
        coerce(self)


@dataclass(frozen=True, kw_only=True)
class BenchCheckpointConfig:
    """Time what saving a checkpoint costs training, in the background and at once; and its check when a run goes on."""

    model: str = "mae_vit_small_patch16"
    """The name of a preset."""
    batch_size: int = 64
    """Images per step."""
    device: Device = None
    precision: BenchPrecision = "auto"
    rounds: int = 5
    """Samples of each, in turns."""
    folder: str | None = None
    """Where checkpoints are written for a moment: on the disk of a run. Default: the system's temporary folder."""
    output: Samples = None

    def __post_init__(self) -> None:
        coerce(self)


def check_bench(
    config: BenchKernelsConfig
    | BenchAttentionConfig
    | BenchStepConfig
    | BenchLoaderConfig
    | BenchCheckpointConfig
    | BenchEndToEndConfig
    | BenchAllConfig,
) -> None:
    """Refuses numbers that cannot work.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    need_at_least_one(
        config, "batch_size", "rounds", "batches", "files", "input_size", "num_workers", "steps",
        "batch_sizes", "input_sizes", "ranks", "time_limit",
    )  # fmt: skip
    sample_ms = getattr(config, "sample_ms", 0.0)
    if sample_ms < 0:
        raise UserError(f"--sample_ms {sample_ms}: must be 0 or more")
    for switch in getattr(config, "switches", ()):
        if unknown := [name for name in switch.split("+") if name not in BENCH_SWITCHES]:
            raise UserError(f"--switches {switch}: {unknown[0]} is unknown; one of {', '.join(BENCH_SWITCHES)}")
        batches = getattr(config, "batch_sizes", None) or (getattr(config, "batch_size", None) or 16,)
        if "float8" in switch.split("+") and any(batch % 16 for batch in batches):
            shown = " ".join(map(str, batches))
            raise UserError(f"--batch_size {shown}: must be a multiple of 16 with --switches float8")
    write = getattr(config, "write", None)
    if write is not None and len(write) > 1:
        raise UserError(f"--write {' '.join(write)}: must be one file, or none for your own table")
    for flag in ("models", "only", "data_path", "kinds", "image_decoders", "batch_sizes", "input_sizes", "ranks"):
        if getattr(config, flag, True) == ():
            raise UserError(f"--{flag}: must name at least one")
    for flag in ("kinds", "files"):
        if getattr(config, "data_path", None) is not None and getattr(config, flag, None) is not None:
            raise UserError(f"--{flag}: is for images that are made; leave it or --data_path out")
