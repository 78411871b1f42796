"""The settings of finetune."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import partial

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
)
from fastmae.facts import DataFacts


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tune a pretrained encoder on labelled images. Flags of the published script have their published names."""

    finetune: str = ""
    """What to begin with: a run folder of pretrain, one of its checkpoints, or a file with an encoder. Empty: random
    weights, to compare with."""
    data_path: str | tuple[str, ...] = "digits"
    """Labelled data, as for pretrain; its train part is learnt, its val or test part is scored (without one, a fifth is
    held out)."""
    output_dir: str = "./output_dir"
    """The run folder: checkpoints, log.txt, metrics.jsonl, config.json."""
    model: str | None = None
    """The preset, for a --finetune that does not say, or without one; vit_large_patch16 is mae_vit_large_patch16."""
    input_size: tuple[int, ...] | None = None
    """Side of the images in pixels, or height and width. Default: that of --finetune. Positions are interpolated."""
    nb_classes: int | None = None
    """Default: as many as the labels have."""
    tune: str = "full"
    """What is trained: full; linear (the head and the norm before it); last-K (those and the last K blocks); lora
    (those and updates of low rank of every block's attention)."""
    lora_rank: int = 8
    """With --tune lora, the rank of the updates."""
    global_pool: bool = True
    """Classify the mean of the patch tokens, as published; --cls_token turns it off."""
    cls_token: bool = False
    """Classify the class token instead."""

    batch_size: int = 64
    """Images a rank and micro-step; the global batch is batch_size · accum_iter · ranks, 1024 as published."""
    epochs: int | None = None
    """Default: as published, 100 for encoders up to the width of ViT-B, otherwise 50; 20 for the built-in digits."""
    accum_iter: AccumIter = 1
    lr: float | None = None
    """Absolute learning rate, of the head. Default: blr · global batch / 256."""
    blr: float | None = None
    """Learning rate for a global batch of 256. Default: as published, 5e-4 up to ViT-B, otherwise 1e-3; 1e-2 for the
    built-in digits."""
    layer_decay: float | None = None
    """What a layer's learning rate is of that of the layer above. Default: as published, 0.65 up to ViT-B, otherwise
    0.75."""
    min_lr: MinLR = 1e-6
    warmup_epochs: float = 5.0
    """Epochs of linear warm-up."""
    weight_decay: float = 0.05
    """On parameters of two or more dimensions but for the class token and the positions."""
    clip_grad: ClipGrad = None
    drop_path: float | None = None
    """Chance that a branch of the last block is left out of a sample; it grows from 0 with depth. Default: as
    published, 0.1 up to ViT-B, 0.2 for ViT-L, 0.3 for ViT-H; 0 where not all is tuned."""

    crop_scale: tuple[float, float] | None = None
    """Smallest and largest share of an image's area that a crop takes. Default: 0.08 1; for the digits 0.7 1."""
    flip: Flip = None
    aa: str | None = None
    """RandAugment, as rand-mMAGNITUDE[-nNUMBER][-mstdDEVIATION]-inc1, or empty for none. Default: as published,
    rand-m9-mstd0.5-inc1, for image files; none for arrays and the digits."""
    reprob: float | None = None
    """Chance of an image to lose a rectangle to noise (random erasing). Default: 0.25; for the digits 0."""
    smoothing: float = 0.1
    """Share of a label that is spread over all classes."""
    mixup: float | None = None
    """α of mixup's Beta distribution, 0 for none. Default: 0.8; for the digits 0."""
    cutmix: float | None = None
    """α of cutmix's, 0 for none. Default: 1; for the digits 0."""
    mixup_switch_prob: float = 0.5
    """With both, the chance of a pair of images to be cut rather than blended."""

    device: Device = None
    precision: Precision = "auto"
    checkpointing: Checkpointing = "none"
    compile: Compile = "off"
    cuda_graph: CudaGraph = False
    ops: Ops = "auto"
    attention: Attention = "auto"
    parallel: Parallel = "ddp"
    shard_size: ShardSize = None
    reduce: Reduce = "fp32"
    seed: int = 0
    """Of the head, order, crops and every augmentation."""
    num_workers: WorkersARank = None
    pin_mem: PinMem = True
    keep_last: KeepLast = False
    max_corrupt: MaxCorrupt = 0.01

    max_skipped: MaxSkipped = 20
    hang_timeout: HangTimeout = 1800.0
    resume: str = ""
    """`auto` continues output_dir's newest intact checkpoint, or starts if there is none; or a run folder of finetune
    or one of its checkpoints."""
    save_freq: int = 20
    """Epochs between checkpoint-EPOCH.pth files (their weights beside them as .safetensors)."""
    test_freq: int = 1
    """Epochs between tests on the val part; the last epoch is always tested."""
    checkpoint_freq: CheckpointFreq = None
    keep: Keep = 2
    keep_every: KeepEvery = None
    async_save: AsyncSave = True
    log_freq: LogFreq = 20
    log_dir: LogDir = None
    wandb: Wandb = None
    profile: Profile = None


@dataclass(frozen=True, kw_only=True)
class ResolvedFinetuneConfig(FinetuneConfig):
    """A FinetuneConfig in which nothing is left open; what the run folder keeps."""

    model: str
    input_size: tuple[int, int]
    nb_classes: int
    epochs: int
    lr: float
    blr: float
    layer_decay: float
    drop_path: float
    crop_scale: tuple[float, float]
    flip: bool
    aa: str
    reprob: float
    mixup: float
    cutmix: float
    num_workers: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    global_batch: int
    """batch_size · accum_iter · ranks."""
    dataset_length: int
    order: str
    """What an epoch's order depends on besides the seed."""


# As FIXED_IN_A_RUN, for fine-tuning.
FIXED_IN_A_FINETUNING = (
    "model", "input_size", "in_chans", "mean", "std", "nb_classes", "global_pool", "tune", "lora_rank", "drop_path",
    "crop_scale", "flip", "aa", "reprob", "smoothing", "mixup", "cutmix", "mixup_switch_prob", "seed", "global_batch",
    "dataset_length", "order", "keep_last",
)  # fmt: skip


def resolve_finetune(
    config: FinetuneConfig,
    facts: DataFacts,
    *,
    model: str,
    width: int,
    img_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    nb_classes: int,
    ranks: int,
    num_workers: int,
) -> ResolvedFinetuneConfig:
    """Fills in what was left open, from the data (``facts``, ``nb_classes``), the encoder (``model``, the ``width`` of
    its tokens, ``img_size``, ``mean``, ``std``) and the machine.
    """
    digits = facts.kind == "digits"
    # Of ViT-B, ViT-L and ViT-H, as published.
    epochs, blr, layer_decay, drop_path = (
        (100, 5e-4, 0.65, 0.1) if width <= 768 else (50, 1e-3, 0.75, 0.2 if width <= 1024 else 0.3)
    )
    if digits:
        epochs, blr = 20, 1e-2
    if config.tune != "full":
        drop_path = 0.0
    input_size = config.input_size or img_size
    blr = given(config.blr, blr)
    global_batch = config.batch_size * config.accum_iter * ranks
    chosen = dict(
        model=model,
        input_size=(input_size[0], input_size[-1]),
        nb_classes=nb_classes,
        global_pool=config.global_pool and not config.cls_token,
        epochs=given(config.epochs, epochs),
        lr=given(config.lr, blr * global_batch / 256),
        blr=blr,
        layer_decay=given(config.layer_decay, layer_decay),
        drop_path=given(config.drop_path, drop_path),
        crop_scale=given(config.crop_scale, (0.7, 1.0) if digits else (0.08, 1.0)),
        flip=given(config.flip, len(mean) == 3),
        aa=given(config.aa, "rand-m9-mstd0.5-inc1" if facts.kind == "folder" and len(mean) in (1, 3) else ""),
        reprob=given(config.reprob, 0.0 if digits else 0.25),
        mixup=given(config.mixup, 0.0 if digits else 0.8),
        cutmix=given(config.cutmix, 0.0 if digits else 1.0),
        num_workers=given(config.num_workers, num_workers),
        in_chans=len(mean),
        mean=mean,
        std=std,
        global_batch=global_batch,
        dataset_length=facts.length,
        order=facts.order,
    )
    return ResolvedFinetuneConfig(**{**dataclasses.asdict(config), **chosen})


def check_finetune(config: FinetuneConfig) -> None:
    """Refuses settings that cannot work, whatever the data and the encoder.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    check_training(config)
    needed = partial(need, config)
    tunes = re.fullmatch(r"full|linear|lora|last-[1-9]\d*", config.tune) is not None
    needed(tunes, "tune", "full, linear, lora or last-K, such as last-2")
    need_at_least_one(config, "test_freq", "lora_rank")
    needed(config.nb_classes is None or config.nb_classes >= 2, "nb_classes", "at least 2")
    for flag in ("mixup", "cutmix"):
        value = getattr(config, flag)
        needed(value is None or (math.isfinite(value) and value >= 0), flag, "0 or more")
    decay = config.layer_decay
    needed(decay is None or 0 < decay <= 1, "layer_decay", "above 0 and at most 1")
    for flag in ("drop_path", "smoothing"):
        value = getattr(config, flag)
        needed(value is None or 0 <= value < 1, flag, "at least 0 and below 1")
    for flag in ("reprob", "mixup_switch_prob"):
        value = getattr(config, flag)
        needed(value is None or 0 <= value <= 1, flag, "between 0 and 1")
