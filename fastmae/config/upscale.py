"""The settings of upscale."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from fastmae.config.family import family_of
from fastmae.config.images import IMAGE_SETTINGS, pixel_settings
from fastmae.config.shape import ENCODER_SHAPE
from fastmae.config.shared import Rest
from fastmae.config.training import check_rates, chosen_compile
from fastmae.config.tuning import TuningConfig, check_gelu, check_tuning, meant_by_tune
from fastmae.config.values import coerce, given, need
from fastmae.errors import SettingError
from fastmae.facts import UINT8, DataFacts, PixelFacts, PixelType

SCALES = (2, 4)
SMALLEST = 12
"""Sides of enlarged images, in pixels, below which structural similarity has no window."""


@dataclass(frozen=True, kw_only=True)
class UpscaleConfig(TuningConfig):
    """Teach a head on a frozen encoder to make images two or four times as large; or, with --predict, enlarge pictures
    with a model that has learnt it."""

    finetune: Annotated[str, Rest("RUN")] = ""
    """The pretrained encoder: a run folder of pretrain, one of its checkpoints, or a file with an encoder. Default:
    random weights, for comparison. With --predict a run of upscale."""

    # Data.
    data_path: str | tuple[str, ...] | None = None
    """Images of every kind that pretrain takes; labels are not needed. A crop of --scale times --input_size is the
    target, and the same crop, made smaller, is what the model sees. The model is tested on the val part; if there is
    none, a fifth is held out. Default: the data of RUN; without one the built-in shapes."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest share of an image's area that a crop takes. Default: 0.25 and 1; crops that are larger than
    this share of their image are soft, and teach softness."""

    # Model.
    scale: int = 2
    """How many times as large images become: 2 or 4."""
    tune: str = "linear"
    """What is trained: the head alone, on a frozen encoder (linear); everything (full); the head and the last K blocks
    (last-K, such as last-2); or the head and low-rank updates of the attention of every block (lora)."""

    # Optimisation.
    batch_size: int = 16
    """Images per rank and micro-step. The global batch is batch_size × accum_iter × ranks."""
    epochs: int = 20
    """Passes over the train part."""
    blr: float = 1.6e-2
    """Base learning rate, for a global batch of 256 images; --lr is computed from it."""
    layer_decay: float = 0.75
    """The learning rate of a layer, as a share of that of the layer above."""
    drop_path: float = 0.0
    """Stochastic depth of an encoder that is tuned: the probability with which a branch of the last block is skipped
    for an image. It grows from 0 with the depth of the block."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW. Parameters of one dimension, the class token and the position embeddings have none."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine schedule."""
    warmup_epochs: float | None = None
    """Epochs over which the learning rate grows from 0, linearly. Default: a twentieth of the run."""

    # Use.
    predict: tuple[str, ...] = ()
    """Enlarge these pictures, or those in these folders, with the model of RUN, instead of training one. NAME.png is
    written into --output_dir; of float32 pixels NAME.npy."""

    def __post_init__(self) -> None:
        coerce(self)
        meant_by_tune(self)
        check_upscale(self)


@dataclass(frozen=True, kw_only=True)
class ResolvedUpscaleConfig(UpscaleConfig):
    """An UpscaleConfig in which nothing is left open; what the run folder keeps."""

    data_path: str | tuple[str, ...]
    model: str
    input_size: tuple[int, int]
    patch_size: tuple[int, int]
    crop_scale: tuple[float, float]
    compile: Literal["off", "block", "model"]
    lr: float
    warmup_epochs: float
    flip: bool
    num_workers: int
    in_chans: int
    pixel_type: PixelType
    other_types: Literal["skip", "convert"]
    value_range: tuple[float, ...] | None
    """As that of a pretraining."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    global_batch: int
    """batch_size · accum_iter · ranks."""
    dataset_length: int
    order: str
    """What an epoch's order depends on besides the seed."""

    def __post_init__(self) -> None:
        coerce(self)  # the values that the user chose were checked when the UpscaleConfig was made


# As FIXED_IN_A_RUN, for upscaling.
FIXED_IN_AN_UPSCALING = (
    "model", "input_size", "in_chans", "mean", "std", "scale", "tune", "lora_rank", "drop_path", "crop_scale", "flip",
    "seed", "global_batch", "dataset_length", "order", "keep_last", *ENCODER_SHAPE, *IMAGE_SETTINGS,
)  # fmt: skip


def resolve_upscale(
    config: UpscaleConfig,
    facts: DataFacts,
    *,
    model: str,
    width: int,
    img_size: tuple[int, int],
    patch_size: tuple[int, int],
    shape: Mapping[str, Any] | None = None,
    pixels: PixelFacts = UINT8,
    other_types: Literal["skip", "convert"] = "convert",
    mean: tuple[float, ...],
    std: tuple[float, ...],
    ranks: int,
    num_workers: int,
    on_gpu: bool = False,
) -> ResolvedUpscaleConfig:
    """Fills in what was left open, from the data (``facts``), the encoder and the machine, as ``resolve_finetune``
    does."""
    size = config.input_size or img_size
    if pixels.nodata is not None:
        problem = "is a value that stands for missing pixels, which cannot be made larger; leave it out"
        raise SettingError("nodata", pixels.nodata, f"of the encoder {problem}")
    if min(size) * config.scale < SMALLEST:
        problem = f"times --scale={config.scale} must be {SMALLEST} pixels at least"
        raise SettingError("input_size", config.input_size, problem)
    global_batch = config.batch_size * config.accum_iter * ranks
    chosen = dict(
        model=model,
        input_size=(size[0], size[-1]),
        patch_size=patch_size,
        **(shape or {}),
        crop_scale=given(config.crop_scale, (0.25, 1.0)),
        lr=given(config.lr, config.blr * global_batch / 256),
        warmup_epochs=given(config.warmup_epochs, config.epochs / 20),
        flip=given(config.flip, len(mean) == 3),
        num_workers=given(config.num_workers, num_workers),
        compile=chosen_compile(config, config.epochs * facts.length // global_batch, on_gpu),
        in_chans=len(mean),
        **pixel_settings(pixels),
        other_types=other_types,
        mean=mean,
        std=std,
        global_batch=global_batch,
        dataset_length=facts.length,
        order=facts.order,
    )
    resolved = ResolvedUpscaleConfig(**{**dataclasses.asdict(config), **chosen})
    check_rates(resolved)
    check_gelu(resolved, model)
    return resolved


def check_upscale(config: UpscaleConfig) -> None:
    """Refuses settings that cannot work, whatever the data and the encoder.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    check_tuning(config)
    needed = partial(need, config)
    can = family_of(config.model) == "vit"
    needed(can, "model", "a preset mae_vit_*, whose tokens a head can look at; other families have none yet")
    needed(config.scale in SCALES, "scale", "2 or 4")
    needed(not config.predict or bool(config.finetune), "predict", "given together with a RUN of fastmae upscale")
