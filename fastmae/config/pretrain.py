"""The settings of pretrain."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fastmae.config.family import FAMILY, FamilySettings, check_family, family_of, usual_ratio
from fastmae.config.images import IMAGE_SETTINGS, chosen_other_types, pixel_settings
from fastmae.config.masking import Masking, MaskingConfig, check_masking, chosen_masking, chosen_ratio
from fastmae.config.shape import SHAPE, Shape
from fastmae.config.training import TrainingConfig, check_rates, check_training, chosen_compile, default_warmup
from fastmae.config.values import coerce, given, need, need_at_least_one, need_size, need_statistics
from fastmae.facts import FULL_SHUFFLE, UINT8, DataFacts, MaskFacts, PixelFacts, PixelType

SMALL_SIDE = 64
SMALL_MODEL = "mae_vit_tiny_patch4"
PROBE_LIMIT = 20_000
OFFICIAL_WARMUP = 40.0
USUAL_R1 = 0.05
"""Measured to be better than 1 on small images (docs/adversarial.md)."""
SOUND_BANDS = 128
"""Of a spectrogram."""
ROWS_TO_SEE = 200_000
"""How many rows mae_mlp sees by default, over all epochs, of which there are 10 to 400."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig, MaskingConfig, Shape, FamilySettings):
    """Pretrain a masked autoencoder on images. The flags of the official script keep their names and meanings."""

    # Data.
    data_path: str | tuple[str, ...] = "digits"
    """The images: `digits` (built in), a folder of images (DATA_PATH/train/CLASS/*.JPEG, or without subfolders), .tar
    or .parquet shards (a file, a folder, or a pattern such as 'part-{000..146}.tar'), or a file or folder of .npy,
    .npz, IDX or CIFAR arrays. If several are given, they are used one after another."""
    data_weights: tuple[float, ...] | None = None
    """With several paths, the share of each in what is trained on, such as 0.9 0.1: an epoch has every image of the
    first path once and as many of the others as their shares ask for, drawn in turn. Default: every image once."""
    output_dir: str = "./output_dir"
    """The run folder, into which checkpoints, log.txt, metrics.jsonl, config.yaml and reconstructions are written."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest share of an image's area that a crop takes. Default: 0.2 and 1; for the digits 0.7
    and 1; for time series (images of one row) and sounds 1 and 1."""
    in_chans: int | None = None
    """Channels of the model. 1 turns colour images into gray ones, 3 repeats a gray channel. Default: as many as the
    data have."""
    mean: tuple[float, ...] | None = None
    """One number per channel, as a share of the value range: it is subtracted from the pixels. Default: that of
    ImageNet for folders of colour images, otherwise measured on the data."""
    std: tuple[float, ...] | None = None
    """One number per channel, as a share of the value range: pixels are divided by it. Default: as for mean."""
    repeated_masks: int = 1
    """How many rows of a batch share one decoded crop, each with a mask of its own. Less is decoded, batches vary less,
    and an epoch has this many times the steps."""
    image_decoder: Literal["auto", "threads", "dali-cpu", "dali-gpu"] = "auto"
    """What decodes plain JPEG files: threads of this process, or NVIDIA DALI (the extra `dali`) on the CPU or on the
    GPU (dali-gpu is experimental: it has not run on a GPU yet). Other images are always decoded by threads. auto is
    threads."""
    held_out: float | None = None
    """Share of the images that is never trained on, drawn by the seed. After every epoch the loss on them, with fixed
    masks and central crops, is logged as held_out_loss, and two numbers that tell how far their features spread
    (rankme, feature_std). Of more than 2,048 images, 2,048 evenly spaced ones are measured. Default: none, as in the
    official script."""
    cache: Literal["none", "ram"] = "none"
    """ram keeps images in memory after they were first read; they are kept decoded if all of them fit. The results are
    the same."""
    cache_gb: float | None = None
    """With --cache ram, the largest size of the cache in GiB per rank. Default: half of the available memory, divided
    by the number of ranks on the machine."""

    # Model.
    model: str | None = None
    """The name of a preset. Default: mae_vit_large_patch16; for images of up to 64 pixels mae_vit_tiny_patch4."""
    init: str = ""
    """Begin with the encoder of a checkpoint and a fresh decoder: a run folder, a .pth or .safetensors file of the
    official code, timm or DINOv2 (S, B, L), or a folder of transformers. It decides the model and the size of the crops
    where these are not given; positions and channels are adapted. Default: random weights."""
    input_size: tuple[int, ...] | None = None
    """Side of the training crops in pixels, or their height and width. Default: 224; for mae_vit_tiny_patch4, and
    with --patch_size, the size of the images if they have one, rounded up to whole patches."""
    patch_size: tuple[int, ...] | None = None
    """Side of a patch in pixels, or its height and width, such as 1 16 for time series. Default: the preset's."""
    start_size: tuple[int, ...] | None = None
    """Side of the crops of the first epochs, or their height and width. It grows to input_size in steps of whole
    patches. Default: input_size from the beginning, as in the official script."""
    grow_epochs: int | None = None
    """With --start_size, the number of epochs until crops have input_size. Default: 80 % of the epochs."""
    norm_pix_loss: bool = False
    """Predict pixels that are normalised by the mean and variance of their patch."""
    decoder_attention: Literal["self", "cross"] = "self"
    """What the decoder predicts a patch from: all other tokens, as in the paper (self), or only what the encoder saw,
    as in CrossMAE (cross). The two are different models."""
    mask_ratio_schedule: float | None = None
    """The mask ratio of the last epochs. It goes there from mask_ratio in up to 8 equal steps of equal length. Default:
    mask_ratio in all epochs, as in the paper."""
    predict_ratio: float | None = None
    """With --decoder_attention cross, the share of all patches that is predicted; they are drawn from the masked ones.
    Default: all masked patches."""

    # Optimisation.
    epochs: int | None = None
    """Passes over the data. Default: 400, as in the official script; 60 for the digits."""
    start_epoch: int = 0
    """The epoch to start at. A resumed checkpoint decides it instead."""
    blr: float | None = None
    """Base learning rate, for a global batch of 256 images; --lr is computed from it. Default: 1e-3, as in the official
    script; 3e-3 for the digits; 4e-3 for mae_conv and mae_mlp."""
    warmup_epochs: float | None = None
    """Epochs over which the learning rate grows from 0, linearly. Default: 40, as in the official script; of up to 40
    epochs, and for the digits, a tenth."""
    l2sp: float = 0.0
    """With --init, how strongly the encoder is held near its first weights (L2-SP): each step moves the weights
    towards them by this number times the learning rate. A step of AdamW moves a weight by at most about the learning
    rate, so 50 keeps weights within about 1/50 of where they began. Default: 0, not at all."""
    ema: float | None = None
    """Keep a moving average of the weights as well, and write it as checkpoint-EPOCH-ema.pth. The number is the share
    of the average that each step keeps, such as 0.9999. Default: no average, as in the official script."""
    seed: int = 0
    """The number from which everything random follows: weights, the order of the images, crops, flips and masks."""
    adversarial: float = 0.0
    """Weight of an adversarial term, for more contrast: a discriminator judges images into which the
    predictions are pasted. 1 lets its gradient at the last layer be as long as that of the loss. Default: 0, no term,
    as in the paper."""
    adversarial_start: float | None = None
    """With --adversarial, the epoch after which it begins; until then the run is the same bits as without. Default:
    after half of the epochs."""
    adversarial_warmup: float | None = None
    """With --adversarial, epochs over which its weight grows from 0, linearly. Default: a tenth of the epochs."""
    adversarial_lr: float | None = None
    """With --adversarial, the learning rate of the discriminator at its highest; it follows the schedule of --lr.
    Default: that of the model."""
    adversarial_regulariser: Literal["r1", "spectral", "none"] | None = None
    """With --adversarial, what keeps the discriminator tame: a penalty of its gradient at real images (r1), or weights
    divided by their largest singular value (spectral). Default: r1."""
    adversarial_r1: float | None = None
    """With --adversarial, the factor γ of the penalty γ/2 · R1. Default: 0.05."""

    # Speed and memory.
    tune: Literal["auto", "off"] | None = None
    """Which code computes matrix products and attention on a CPU: what is fastest in a measurement of some seconds,
    which is kept for the next run (auto), or always PyTorch's own (off). Default: auto; a run that goes on keeps what
    it has, and with this flag it chooses anew. On a GPU nothing is measured."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """With --precision bf16, the format of the tokens between blocks. bf16 halves their memory; every block rounds
    them."""
    float8: bool = False
    """Compute matrix products of the encoder's blocks in float8 (torchao, the extra `float8`), on a GPU of compute
    capability 8.9 or higher, together with --precision bf16 and --compile (experimental: it has not run on a GPU
    yet)."""

    # Saving, resuming, logging.
    resume: str = ""
    """`auto` continues from the newest intact checkpoint in output_dir, or starts if no run is there. `anew` starts and
    moves what an earlier run left there into a folder. Otherwise what to continue from: a run folder, one of
    its checkpoints, an official .pth or .safetensors file, or a folder of transformers."""
    save_freq: int = 20
    """Epochs between files checkpoint-EPOCH.pth in the official format and pictures of reconstructions. The weights are
    written as .safetensors as well."""
    probe: bool | None = None
    """Measure the accuracy of k-NN and a linear probe before and after the training. Default: for labelled data of up
    to 20,000 images."""
    probe_freq: int | None = None
    """Measure these accuracies every this many epochs as well, on up to 20,000 images of each part. Default: never;
    with --data_weights after every epoch, and k-NN of each path apart."""

    def __post_init__(self) -> None:
        coerce(self)
        check_pretrain(self)


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(PretrainConfig):
    """A PretrainConfig in which nothing is left open; what the run folder keeps."""

    model: str
    input_size: tuple[int, int]
    patch_size: tuple[int, int] | None
    """None: the preset's."""
    start_size: tuple[int, int] | None
    """None without growth; then grow_epochs is 0."""
    grow_epochs: int
    masking: Masking
    mask_ratio: float
    compile: Literal["off", "block", "model"]
    epochs: int
    lr: float
    blr: float
    warmup_epochs: float
    crop_scale: tuple[float, float]
    flip: bool
    in_chans: int
    pixel_type: PixelType
    other_types: Literal["skip", "convert"]
    value_range: tuple[float, ...] | None
    """LOW HIGH of each channel; None: 0 to 255, of uint8."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_workers: int
    probe: bool
    global_batch: int
    """batch_size · accum_iter · ranks."""
    dataset_length: int
    """Images of an epoch."""
    order: str
    """What an epoch's order depends on besides the seed."""
    given_masks: str
    """What --masks holds; empty without."""

    def __post_init__(self) -> None:
        coerce(self)  # the values that the user chose were checked when the PretrainConfig was made


OF_ADVERSARY = (
    "adversarial_start", "adversarial_warmup", "adversarial_lr", "adversarial_regulariser", "adversarial_r1",
)  # fmt: skip
"""The settings that go with --adversarial."""

# What the meaning of "step k" depends on: a run cannot be continued with another value of any of these. The split of
# the global batch into ranks, batches and micro-steps is not among them.
FIXED_IN_A_RUN = (
    "model", "input_size", "in_chans", "norm_pix_loss", "mask_ratio", "mean", "std", "crop_scale", "flip",
    "seed", "global_batch", "data_weights", "dataset_length", "order", "keep_last", "repeated_masks",
    "ema", "masking", "given_masks", "start_size", "grow_epochs", "decoder_attention", *SHAPE, "predict_ratio",
    "patch_size", "held_out", "mask_ratio_schedule", "l2sp", "adversarial",
    "adversarial_regulariser", *FAMILY, *IMAGE_SETTINGS,
)  # fmt: skip
# What those were in a checkpoint from before they could be chosen.
UNLESS_SAVED = {
    "order": FULL_SHUFFLE, "keep_last": False, "repeated_masks": 1, "ema": None, "masking": "random", "given_masks": "",
    "start_size": None, "grow_epochs": 0, "decoder_attention": "self", "predict_ratio": None, "patch_size": None,
    "held_out": None, "mask_ratio_schedule": None, "data_weights": None, "l2sp": 0.0,
    "adversarial": 0.0, "adversarial_regulariser": None, "shots": None, "label_share": None,
    **dataclasses.asdict(Shape()), **dataclasses.asdict(FamilySettings()), **dict.fromkeys(IMAGE_SETTINGS),
    "pixel_type": "uint8", "other_types": "convert",
}  # fmt: skip


OF_IMAGE_FILES = ("bands", "pages", "window", "layout", "axis", "constant_slices", "image_key")
"""Settings that say how files of images are read."""


def resolve(
    config: PretrainConfig,
    facts: DataFacts,
    *,
    pixels: PixelFacts = UINT8,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    ranks: int,
    num_workers: int,
    masks: MaskFacts | None = None,
    on_gpu: bool = False,
) -> ResolvedConfig:
    """Fills in what was left open, from the data (``facts``, ``pixels``, ``mean``, ``std``), --masks and the machine.

    Raises:
        SettingError: settings that do not go with the data.
    """
    if facts.columns is not None:
        _check_table(config)
    digits = facts.kind == "digits"
    in_chans = config.in_chans or facts.channels
    input_size: tuple[int, ...] = (224, 224)
    model = config.model
    if model is None:
        small = facts.size is not None and max(facts.size) <= SMALL_SIDE
        model = SMALL_MODEL if small else "mae_vit_large_patch16"
    is_mlp = family_of(model) == "mlp"
    if config.input_size is not None:
        input_size = config.input_size
    elif is_mlp:
        one_size = facts.size is not None
        need(config, one_size, "input_size", "given for mae_mlp, as the images are of several sizes or of none known")
        input_size = facts.size or input_size
    elif config.spectrogram is not None:
        input_size = (config.spectrogram, SOUND_BANDS)
    elif facts.size is not None and config.patch_size is not None:
        patch = config.patch_size[0], config.patch_size[-1]
        input_size = tuple(side * math.ceil(size / side) for size, side in zip(facts.size, patch, strict=True))
    elif family_of(model) == "conv" and facts.size is not None:
        input_size = facts.size
    elif model == SMALL_MODEL and facts.size is not None:
        # Patches of 4×4, at least 16 of them: the images' own size if it is that large, rounded up to whole patches.
        input_size = tuple(4 * math.ceil(max(side, 16) / 4) for side in facts.size)
    is_series = input_size[0] == 1 or config.spectrogram is not None  # whose rate and direction mean something
    usual_epochs = min(400, max(10, round(ROWS_TO_SEE / facts.length))) if is_mlp else 60 if digits else 400
    epochs = given(config.epochs, usual_epochs)
    need(config, config.start_epoch < epochs, "start_epoch", f"below the {epochs} of --epochs")
    usual_scale = (1.0, 1.0) if is_series or is_mlp else (0.7, 1.0) if digits else (0.2, 1.0)
    start_size = config.start_size
    blr = given(config.blr, 4e-3 if family_of(model) in ("conv", "mlp") else 3e-3 if digits else 1e-3)
    global_batch = config.batch_size * config.accum_iter * ranks
    lr = given(config.lr, blr * global_batch / 256)
    steps = epochs * facts.epoch_length * config.repeated_masks // global_batch  # or a few less
    chosen = dict(
        model=model,
        input_size=(input_size[0], input_size[-1]),
        patch_size=config.patch_size and (config.patch_size[0], config.patch_size[-1]),
        start_size=start_size and (start_size[0], start_size[-1]),
        grow_epochs=given(config.grow_epochs, max(1, epochs * 4 // 5)) if start_size else 0,
        mask_ratio=masks.mask_ratio if masks is not None else chosen_ratio(config, usual_ratio(model)),
        masking=chosen_masking(config),
        epochs=epochs,
        lr=lr,
        blr=blr,
        warmup_epochs=given(config.warmup_epochs, default_warmup(0.0 if digits or is_mlp else OFFICIAL_WARMUP, epochs)),
        crop_scale=given(config.crop_scale, usual_scale),
        flip=given(config.flip, in_chans == 3 and not is_series and not is_mlp),
        in_chans=in_chans,
        columns=facts.columns,
        **pixel_settings(pixels),
        other_types=chosen_other_types(config),
        mean=given(config.mean, mean),
        std=given(config.std, std),
        num_workers=given(config.num_workers, num_workers),
        compile=chosen_compile(config, steps, on_gpu, needs_compiling=config.float8),
        probe_freq=given(config.probe_freq, 1 if config.data_weights is not None and facts.labelled else None),
        probe=given(config.probe, facts.labelled and facts.length <= PROBE_LIMIT),
        global_batch=global_batch,
        dataset_length=facts.epoch_length,
        order=facts.order,
        given_masks="" if masks is None else masks.description,
    )
    if config.adversarial:
        chosen |= _of_adversary(config, epochs, lr)
    resolved = ResolvedConfig(**{**dataclasses.asdict(config), **chosen})
    check_rates(resolved)
    _check_l2sp(resolved)
    return resolved


def _check_l2sp(config: PretrainConfig) -> None:
    """Refuses an --l2sp that cannot work, or has nothing to hold on to."""
    needed = partial(need, config)
    needed(config.l2sp >= 0, "l2sp", "0 or more")
    needed(not config.l2sp or bool(config.init), "l2sp", "given together with --init, whose weights it holds on to")
    is_stable = config.lr is None or config.l2sp * config.lr <= 1
    needed(is_stable, "l2sp", f"at most 1 / --lr, {1 / (config.lr or 1):.3g}, where a step goes all the way back")


def _check_table(config: PretrainConfig) -> None:
    """Refuses settings of images, which mean nothing where rows of a table are trained on."""
    one = {"input_size": ((1,), (1, 1)), "crop_scale": ((1.0, 1.0),), "flip": (False,)}
    for name in (*one, *OF_IMAGE_FILES):
        is_unset = getattr(config, name) in (None, *one.get(name, ()))
        need(config, is_unset, name, "left out for a table, whose rows are no images")


def _of_adversary(config: PretrainConfig, epochs: int, lr: float) -> dict[str, Any]:
    """Fills in the settings of --adversarial.

    Raises:
        SettingError: it would never take part.
    """
    start, kind = given(config.adversarial_start, epochs / 2), given(config.adversarial_regulariser, "r1")
    need(config, start < epochs, "adversarial_start", f"below the {epochs} of --epochs")
    return {
        "adversarial_start": start,
        "adversarial_warmup": given(config.adversarial_warmup, epochs / 10),
        "adversarial_lr": given(config.adversarial_lr, lr),
        "adversarial_regulariser": kind,
        "adversarial_r1": given(config.adversarial_r1, USUAL_R1) if kind == "r1" else None,
    }


def _check_adversary(config: PretrainConfig) -> None:
    """Refuses settings of --adversarial that cannot work, and those that mean nothing without it."""
    needed = partial(need, config)
    needed(config.adversarial >= 0, "adversarial", "0 or more")
    if not config.adversarial:
        for name in OF_ADVERSARY:
            needed(getattr(config, name) is None, name, "given together with --adversarial")
        return
    for name in ("adversarial_start", "adversarial_warmup"):
        value = getattr(config, name)
        needed(value is None or value >= 0, name, "0 or more epochs")
    needed(config.adversarial_lr is None or config.adversarial_lr > 0, "adversarial_lr", "a positive number")
    needed(config.adversarial_r1 is None or config.adversarial_r1 > 0, "adversarial_r1", "a positive number")
    is_r1 = config.adversarial_r1 is None or config.adversarial_regulariser in (None, "r1")
    needed(is_r1, "adversarial_r1", "given together with --adversarial_regulariser=r1")
    needed(config.loss != "bce", "loss", "mse with --adversarial, which judges predictions as pixels")
    needed(not config.cuda_graph, "cuda_graph", "left out with --adversarial, which does other work from its start on")
    takes = config.compile != "model"
    needed(takes, "compile", "off or block with --adversarial, which takes gradients within the forward pass")


def _check_weights(config: PretrainConfig) -> None:
    """Refuses --data_weights that are not one positive number for each of several paths."""
    weights = config.data_weights
    if weights is None:
        return
    paths = (config.data_path,) if isinstance(config.data_path, str) else config.data_path
    counted = len(weights) == len(paths) > 1
    need(
        config, counted, "data_weights", f"one number for each of several paths of --data_path, which has {len(paths)}"
    )
    positive = all(0 < weight < math.inf for weight in weights)
    need(config, positive, "data_weights", "positive numbers; leave a path out that is not to be drawn from")


def check_pretrain(config: PretrainConfig) -> None:
    """Refuses settings that cannot work, whatever the data.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    check_family(config)
    check_masking(config)
    check_training(config)
    needed = partial(need, config)
    need_at_least_one(config, "repeated_masks", "in_chans", "grow_epochs", "probe_freq")
    divides = config.batch_size % config.repeated_masks == 0
    needed(divides, "repeated_masks", f"a divisor of --batch_size={config.batch_size}")
    needed(config.held_out is None or 0 < config.held_out < 1, "held_out", "a share above 0 and below 1")
    needed(config.cache_gb is None or config.cache == "ram", "cache_gb", "given together with --cache=ram")
    needed(config.cache_gb is None or config.cache_gb > 0, "cache_gb", "a positive number of GiB")
    if config.predict_ratio is not None:
        cross, masking = config.decoder_attention == "cross", chosen_masking(config)
        needed(cross, "predict_ratio", "given together with --decoder_attention=cross")
        needed(masking == "random", "predict_ratio", f"left out with --masking={masking}, which lists patches in order")
        ratio = chosen_ratio(config, usual_ratio(config.model))
        share = f"above 0 and at most --mask_ratio={ratio}"
        needed(0 < config.predict_ratio <= ratio, "predict_ratio", share)
    last = config.mask_ratio_schedule
    if last is not None:
        needed(0 < last < 1, "mask_ratio_schedule", "above 0 and below 1, the mask ratio of the last epochs")
        suits = chosen_masking(config) in ("random", "block")
        needed(
            suits,
            "mask_ratio_schedule",
            f"left out with --masking={chosen_masking(config)}, which has a ratio of its own",
        )
        needed(
            config.start_size is None, "mask_ratio_schedule", "left out with --start_size, which changes shapes as well"
        )
        needed(
            not config.cuda_graph,
            "mask_ratio_schedule",
            "left out with --cuda_graph, which is of one number of patches",
        )
        if config.predict_ratio is not None:
            needed(
                last >= config.predict_ratio, "mask_ratio_schedule", f"at least --predict_ratio={config.predict_ratio}"
            )
    needed(config.start_epoch >= 0, "start_epoch", "0 or more")
    if config.epochs is not None:
        needed(config.start_epoch < config.epochs, "start_epoch", f"below --epochs={config.epochs}")
    alone = not config.init or config.resume in ("", "auto", "anew")
    needed(alone, "init", f"left out with --resume={config.resume}, which has the weights to begin with")
    need_size(config, "patch_size")
    need_size(config, "start_size")
    needed(config.start_size is None or not config.masks, "start_size", "left out with --masks, which are of one size")
    grows = config.grow_epochs is None or config.start_size is not None
    needed(grows, "grow_epochs", "given together with --start_size")
    needed(config.ema is None or 0 < config.ema < 1, "ema", "above 0 and below 1")
    if config.float8:
        needed(config.compile != "off", "compile", "block or model with --float8, which is slower than bf16 without")
        needed(config.batch_size % 16 == 0, "batch_size", "a multiple of 16 with --float8, as its products need it")
    _check_l2sp(config)
    _check_weights(config)
    _check_adversary(config)
    need_statistics(config)
