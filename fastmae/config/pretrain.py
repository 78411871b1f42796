"""The settings of pretrain."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

from fastmae.config.masking import PUBLISHED_RATIO, Masking, check_masking, chosen_masking
from fastmae.config.shared import (
    AccumIter,
    AsyncSave,
    Attention,
    CheckpointFreq,
    Checkpointing,
    ClipGrad,
    Compile,
    CudaGraph,
    Device,
    Flip,
    HangTimeout,
    Keep,
    KeepEvery,
    KeepLast,
    LogDir,
    LogFreq,
    MaxCorrupt,
    MaxSkipped,
    MinLR,
    Ops,
    Parallel,
    PinMem,
    Precision,
    Profile,
    Reduce,
    ShardSize,
    Wandb,
    WorkersARank,
    check_training,
    given,
    need,
    need_at_least_one,
    need_size,
)
from fastmae.facts import FULL_SHUFFLE, DataFacts, MaskFacts

SMALL_SIDE = 64
SMALL_MODEL = "mae_vit_tiny_patch4"
PROBE_LIMIT = 20_000


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain a masked autoencoder. Flags of the published script have their published names and meanings."""

    data_path: str | tuple[str, ...] = "digits"
    """`digits` (built in), a folder of images (DATA_PATH/train/CLASS/*.JPEG, or flat), .tar or .parquet shards (a file,
    a folder, or a pattern such as 'part-{000..146}.tar'), or a .npy, .npz, IDX or CIFAR file or folder. Several are
    taken one after another."""
    output_dir: str = "./output_dir"
    """The run folder: checkpoints, log.txt, metrics.jsonl, config.json, reconstructions."""
    model: str | None = None
    """A preset, such as mae_vit_large_patch16 (the default for images over 64 pixels) or mae_vit_tiny_patch4 (the
    default for smaller ones)."""
    input_size: tuple[int, ...] | None = None
    """Side of the training crops in pixels, or height and width. Default: 224; for tiny_patch4 the images' own size."""
    start_size: tuple[int, ...] | None = None
    """Side of the crops of the first epochs, or height and width; it grows to input_size in steps of whole patches.
    Default: input_size from the beginning, as published."""
    grow_epochs: int | None = None
    """With start_size, the number of epochs before crops have input_size. Default: 80 % of the epochs."""
    mask_ratio: float = PUBLISHED_RATIO
    """Share of the patches that is masked. --masks says it itself: any value but the default must then be the same."""
    masking: Masking | None = None
    """Which patches: any at random, as published; rectangles (block); all but one of every 2×2 (grid); those that
    --masks says (file). Default: random, with --masks file."""
    masks: str = ""
    """A .npy file of masks, bool or uint8 [B, rows, columns] of patches with 1 where masked, of which every draw takes
    one at random."""
    norm_pix_loss: bool = False
    """Predict pixels normalised by the mean and variance of their patch."""
    decoder_attention: Literal["self", "cross"] = "self"
    """What the decoder predicts a patch from: all other tokens, as published (self), or what the encoder saw alone
    (cross, as CrossMAE). They are different models."""
    decoder_depth: int | None = None
    """Blocks of the decoder. Default: those of the model."""
    predict_ratio: float | None = None
    """With --decoder_attention cross: predict this share of all patches, drawn from the masked ones. Default: all that
    are masked."""

    batch_size: int = 64
    """Images a rank and micro-step; the global batch is batch_size · accum_iter · ranks."""
    epochs: int | None = None
    """Default: 400, as published; 60 for the built-in digits."""
    accum_iter: AccumIter = 1
    lr: float | None = None
    """Absolute learning rate. Default: blr · global batch / 256."""
    blr: float | None = None
    """Learning rate for a global batch of 256. Default: 1e-3, as published; 3e-3 for the built-in digits."""
    min_lr: MinLR = 0.0
    clip_grad: ClipGrad = None
    ema: float | None = None
    """Keep a moving average of the weights, of which a step leaves this share as it was, such as 0.9999, and write it
    as checkpoint-EPOCH-ema.pth. Default: none, as published."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up. Default: 40, as published; a tenth of the epochs for the built-in digits."""
    weight_decay: float = 0.05
    """On parameters of two or more dimensions, the class token and the mask token."""

    crop_scale: tuple[float, float] | None = None
    """Smallest and largest share of an image's area that a crop takes. Default: 0.2 1; for the digits 0.7 1."""
    flip: Flip = None
    in_chans: int | None = None
    """Channels of the model: 1 turns colour into gray, 3 repeats gray. Default: those of the data."""
    mean: tuple[float, ...] | None = None
    """A number a channel in [0, 1]. Default: ImageNet's for colour folders, otherwise measured on the data."""
    std: tuple[float, ...] | None = None
    """A number a channel in [0, 1]; as for mean."""

    device: Device = None
    precision: Precision = "auto"
    residual: Literal["fp32", "bf16"] = "fp32"
    """Format of the tokens between blocks under --precision bf16; bf16 is half the memory, rounded in every block."""
    checkpointing: Checkpointing = "none"
    compile: Compile = "off"
    float8: bool = False
    """Matrix products of the blocks in float8 (torchao, the extra `float8`), on a GPU that has it (compute capability
    8.9 and up), with --precision bf16 and --compile."""
    cuda_graph: CudaGraph = False
    ops: Ops = "auto"
    attention: Attention = "auto"
    parallel: Parallel = "ddp"
    shard_size: ShardSize = None
    reduce: Reduce = "fp32"
    seed: int = 0
    """Of weights, order, crops, flips and masks."""
    num_workers: WorkersARank = None
    pin_mem: PinMem = True
    decoder: Literal["auto", "pool", "dali-cpu", "dali-gpu"] = "auto"
    """Of plain JPEGs: threads of this process, or NVIDIA DALI (the extra `dali`) on the CPU or the GPU; the pool takes
    all else. auto: pool, until DALI on a GPU has been measured."""
    keep_last: KeepLast = False
    repeated_masks: int = 1
    """Rows of a batch that share a decoded crop, each with masks of its own: less to decode, less variety. An epoch has
    as many times the steps."""
    cache: Literal["none", "ram"] = "none"
    """ram: keep images in memory after they were first read, decoded if all of them fit. The results are the same."""
    cache_gb: float | None = None
    """What --cache ram may take, in GiB a rank. Default: half of the memory that is available, shared
    by the ranks of the machine."""
    max_corrupt: MaxCorrupt = 0.01

    max_skipped: MaxSkipped = 20
    hang_timeout: HangTimeout = 1800.0

    resume: str = ""
    """`auto` continues output_dir's newest intact checkpoint, or starts if there is none; or a run folder, one of its
    checkpoints, an official .pth or .safetensors file, or a folder of transformers."""
    start_epoch: int = 0
    """Epoch to start at; a resumed checkpoint overrules it."""
    save_freq: int = 20
    """Epochs between official-format checkpoint-EPOCH.pth files (their weights beside them as .safetensors) and
    reconstruction pictures."""
    checkpoint_freq: CheckpointFreq = None
    keep: Keep = 2
    keep_every: KeepEvery = None
    async_save: AsyncSave = True

    log_freq: LogFreq = 20
    log_dir: LogDir = None
    wandb: Wandb = None
    profile: Profile = None
    probe: bool | None = None
    """Measure k-NN and linear-probe accuracy before and after. Default: where labels exist, up to 20,000 images."""
    probe_freq: int | None = None
    """Also measure them every so many epochs, on up to 20,000 images of each part. Default: never."""


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(PretrainConfig):
    """A PretrainConfig in which nothing is left open; what the run folder keeps."""

    model: str
    input_size: tuple[int, int]
    start_size: tuple[int, int] | None
    """None without growth; then grow_epochs is 0."""
    grow_epochs: int
    masking: Masking
    epochs: int
    lr: float
    blr: float
    warmup_epochs: float
    crop_scale: tuple[float, float]
    flip: bool
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_workers: int
    probe: bool
    global_batch: int
    """batch_size · accum_iter · ranks."""
    dataset_length: int
    order: str
    """What an epoch's order depends on besides the seed."""
    given_masks: str
    """What --masks holds; empty without."""


# What the meaning of "step k" depends on: a run cannot be continued with another value of any of these. The split of
# the global batch into ranks, batches and micro-steps is not among them.
FIXED_IN_A_RUN = (
    "model", "input_size", "in_chans", "norm_pix_loss", "mask_ratio", "mean", "std", "crop_scale", "flip",
    "seed", "global_batch", "dataset_length", "order", "keep_last", "repeated_masks",
    "ema", "masking", "given_masks", "start_size", "grow_epochs", "decoder_attention", "decoder_depth", "predict_ratio",
)  # fmt: skip
# What those were in a checkpoint from before they could be chosen.
UNLESS_SAVED = {
    "order": FULL_SHUFFLE, "keep_last": False, "repeated_masks": 1, "ema": None, "masking": "random", "given_masks": "",
    "start_size": None, "grow_epochs": 0, "decoder_attention": "self", "decoder_depth": None, "predict_ratio": None,
}  # fmt: skip


def resolve(
    config: PretrainConfig,
    facts: DataFacts,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    ranks: int,
    num_workers: int,
    masks: MaskFacts | None = None,
) -> ResolvedConfig:
    """Fills in what was left open, from the data (``facts``, its ``mean`` and ``std``), --masks and the machine."""
    digits = facts.kind == "digits"
    in_chans = config.in_chans or facts.channels
    input_size: tuple[int, ...] = (224, 224)
    model = config.model
    if model is None:
        small = facts.size is not None and max(facts.size) <= SMALL_SIDE
        model = SMALL_MODEL if small else "mae_vit_large_patch16"
    if config.input_size is not None:
        input_size = config.input_size
    elif model == SMALL_MODEL and facts.size is not None:
        # Patches of 4×4, at least 16 of them: the images' own size if it is that large, rounded up to whole patches.
        input_size = tuple(4 * math.ceil(max(side, 16) / 4) for side in facts.size)
    epochs = given(config.epochs, 60 if digits else 400)
    start_size = config.start_size
    blr = given(config.blr, 3e-3 if digits else 1e-3)
    global_batch = config.batch_size * config.accum_iter * ranks
    chosen = dict(
        model=model,
        input_size=(input_size[0], input_size[-1]),
        start_size=start_size and (start_size[0], start_size[-1]),
        grow_epochs=given(config.grow_epochs, max(1, epochs * 4 // 5)) if start_size else 0,
        mask_ratio=config.mask_ratio if masks is None else masks.mask_ratio,
        masking=chosen_masking(config),
        epochs=epochs,
        lr=given(config.lr, blr * global_batch / 256),
        blr=blr,
        warmup_epochs=given(config.warmup_epochs, epochs / 10 if digits else 40.0),
        crop_scale=given(config.crop_scale, (0.7, 1.0) if digits else (0.2, 1.0)),
        flip=given(config.flip, in_chans == 3),
        in_chans=in_chans,
        mean=given(config.mean, mean),
        std=given(config.std, std),
        num_workers=given(config.num_workers, num_workers),
        probe=given(config.probe, facts.labelled and facts.length <= PROBE_LIMIT),
        global_batch=global_batch,
        dataset_length=facts.length,
        order=facts.order,
        given_masks="" if masks is None else masks.description,
    )
    return ResolvedConfig(**{**dataclasses.asdict(config), **chosen})


def check_pretrain(config: PretrainConfig) -> None:
    """Refuses settings that cannot work, whatever the data.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    check_masking(config)
    check_training(config)
    needed = partial(need, config)
    need_at_least_one(config, "repeated_masks", "in_chans", "grow_epochs", "decoder_depth", "probe_freq")
    divides = config.batch_size % config.repeated_masks == 0
    needed(divides, "repeated_masks", f"a divisor of --batch_size {config.batch_size}")
    needed(config.cache_gb is None or config.cache == "ram", "cache_gb", "given together with --cache ram")
    needed(config.cache_gb is None or 0 < config.cache_gb < math.inf, "cache_gb", "a positive number of GiB")
    if config.predict_ratio is not None:
        cross, masking = config.decoder_attention == "cross", chosen_masking(config)
        needed(cross, "predict_ratio", "given together with --decoder_attention cross")
        needed(masking == "random", "predict_ratio", f"left out with --masking {masking}, which lists patches in order")
        share = f"above 0 and at most --mask_ratio {config.mask_ratio}"
        needed(0 < config.predict_ratio <= config.mask_ratio, "predict_ratio", share)
    needed(config.start_epoch >= 0, "start_epoch", "0 or more")
    if config.epochs is not None:
        needed(config.start_epoch < config.epochs, "start_epoch", f"below --epochs {config.epochs}")
    need_size(config, "start_size")
    needed(config.start_size is None or not config.masks, "start_size", "left out with --masks, which are of one size")
    needed(
        config.grow_epochs is None or config.start_size is not None, "grow_epochs", "given together with --start_size"
    )
    needed(config.ema is None or 0 < config.ema < 1, "ema", "above 0 and below 1")
    if config.float8:
        needed(config.compile != "off", "compile", "block or model with --float8, which is slower than bf16 without")
        needed(config.batch_size % 16 == 0, "batch_size", "a multiple of 16 with --float8, as its products need it")
    if config.std is not None:
        needed(all(s > 0 for s in config.std), "std", "positive")
