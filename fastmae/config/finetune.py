"""The settings of finetune."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from fastmae.config.family import family_of
from fastmae.config.few import FewLabelsConfig, amounts_of, check_few
from fastmae.config.images import IMAGE_SETTINGS, pixel_settings
from fastmae.config.shape import ENCODER_SHAPE
from fastmae.config.training import check_rates, chosen_compile, default_warmup
from fastmae.config.tuning import TuningConfig, check_gelu, check_tuning, meant_by_tune
from fastmae.config.values import coerce, given, need
from fastmae.facts import UINT8, DataFacts, PixelFacts, PixelType

OFFICIAL_FINETUNING_WARMUP = 5.0
FEW_STEPS = 300
"""At least so many steps a fine-tuning with few labels takes by default."""
LARGEST_ALPHA = 1e6
"""With a larger one mixup blends every pair in halves."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(FewLabelsConfig, TuningConfig):
    """Fine-tune a pretrained encoder on labelled images. The flags of the official script keep their names and
    meanings."""

    # Data.
    data_path: str | tuple[str, ...] | None = None
    """Labelled images, of every kind that pretrain takes. The model learns from the train part and is tested on the val
    or test part; if there is none, a fifth of the images is held out. Default: the data of the run of --finetune;
    without one the built-in digits."""
    nb_classes: int | None = None
    """Number of classes. Default: as many as the labels have."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest share of an image's area that a crop takes. Default: 0.08 and 1; for the digits 0.7 and
    1."""
    aa: str | None = None
    """RandAugment, as rand-mMAGNITUDE[-nNUMBER][-mstdDEVIATION]-inc1; an empty text turns it off. Default: as in the
    official script, rand-m9-mstd0.5-inc1, for image files of 8 bits; none for wider pixels, arrays and the digits."""
    reprob: float | None = None
    """Probability with which a rectangle of an image is replaced by noise (random erasing). Default: 0.25; for the
    digits 0."""
    smoothing: float = 0.1
    """Label smoothing: the share of a label that is spread over all classes."""
    mixup: float | None = None
    """The α of mixup's Beta distribution; 0 turns mixup off. Default: 0.8; for the digits 0."""
    cutmix: float | None = None
    """The α of cutmix's Beta distribution; 0 turns cutmix off. Default: 1; for the digits 0."""
    mixup_switch_prob: float = 0.5
    """With both mixup and cutmix, the probability with which a pair of images is cut instead of blended."""

    # Model.
    global_pool: bool = True
    """Classify the mean of the patch tokens, as in the official script. --cls_token turns it off."""
    cls_token: bool = False
    """Classify the class token instead of the mean of the patch tokens."""
    drop_path: float | None = None
    """Stochastic depth: the probability with which a branch of the last block is skipped for an image. It grows from 0
    with the depth of the block. Default: as in the official script, 0.1 up to ViT-B, 0.2 for ViT-L, 0.3 for ViT-H; 0
    unless everything is tuned."""

    # Optimisation.
    epochs: int | None = None
    """Passes over the train part. Default: as in the official script, 100 for encoders up to the width of ViT-B,
    otherwise 50; of ConvNeXt V2 600 below the width of
    Tiny, 300 for it, 100 above; 20 for the digits. With few labels as many as 300 steps need, if that is more."""
    blr: float | None = None
    """Base learning rate, for a global batch of 256 images; --lr is computed from it. Default: as in the official
    script, 5e-4 up to ViT-B, otherwise 1e-3; of ConvNeXt V2 2e-4 below Tiny, 8e-4 for it, 6.25e-4 above; 1e-2 for
    the digits."""
    lr: float | None = None
    """Learning rate of the head at the end of the warm-up. Default: blr × global batch / 256."""
    layer_decay: float | None = None
    """The learning rate of a layer, as a share of that of the layer above. Default: as in the official script, 0.65 up
    to ViT-B, otherwise 0.75; of ConvNeXt V2 0.9 up to Tiny, 0.6 above, where three blocks are a layer."""
    warmup_epochs: float | None = None
    """Epochs over which the learning rate grows from 0, linearly. Default: 5, as in the official script; of up to 5
    epochs a tenth."""

    def __post_init__(self) -> None:
        coerce(self)
        meant_by_tune(self)
        check_finetune(self)


@dataclass(frozen=True, kw_only=True)
class ResolvedFinetuneConfig(FinetuneConfig):
    """A FinetuneConfig in which nothing is left open; what the run folder keeps."""

    data_path: str | tuple[str, ...]
    model: str
    input_size: tuple[int, int]
    patch_size: tuple[int, int]
    nb_classes: int
    compile: Literal["off", "block", "model"]
    epochs: int
    lr: float
    blr: float
    warmup_epochs: float
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
    class_names: tuple[str, ...] = ()
    """The names of the classes in the order of their numbers, where the data name them."""

    def __post_init__(self) -> None:
        coerce(self)  # the values that the user chose were checked when the FinetuneConfig was made


# As FIXED_IN_A_RUN, for fine-tuning.
FIXED_IN_A_FINETUNING = (
    "model", "input_size", "in_chans", "mean", "std", "nb_classes", "global_pool", "tune", "lora_rank", "drop_path",
    "crop_scale", "flip", "aa", "reprob", "smoothing", "mixup", "cutmix", "mixup_switch_prob", "seed", "global_batch",
    "dataset_length", "order", "keep_last", "shots", "label_share", *ENCODER_SHAPE, *IMAGE_SETTINGS,
)  # fmt: skip


def resolve_finetune(
    config: FinetuneConfig,
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
    nb_classes: int,
    class_names: tuple[str, ...] = (),
    ranks: int,
    num_workers: int,
    on_gpu: bool = False,
) -> ResolvedFinetuneConfig:
    """Fills in what was left open, from the data (``facts``, ``nb_classes``), the encoder (``model``, the ``width`` of
    its tokens, ``img_size``, ``patch_size``, the ``shape`` that is not the preset's, ``pixels``, ``other_types``,
    ``mean``, ``std``) and the machine."""
    digits = facts.kind == "digits"
    if family_of(model) == "convnext":
        epochs, blr, layer_decay, drop_path = _of_convnext(width)
    else:  # of ViT-B, ViT-L and ViT-H in the official script
        epochs, blr, layer_decay, drop_path = (
            (100, 5e-4, 0.65, 0.1) if width <= 768 else (50, 1e-3, 0.75, 0.2 if width <= 1024 else 0.3)
        )
    if digits:
        epochs, blr = 20, 1e-2
    batch_size = config.batch_size
    if amounts_of(config):  # a batch takes no image twice, and pairs can be mixed
        batch_size = max(1, min(batch_size, facts.length // (config.accum_iter * ranks) // 2 * 2))
        epochs = max(epochs, math.ceil(FEW_STEPS / max(1, facts.length // (batch_size * config.accum_iter * ranks))))
    epochs = given(config.epochs, epochs)
    if config.tune != "full":
        drop_path = 0.0
    input_size = config.input_size or img_size
    takes_randaugment = facts.kind == "folder" and len(mean) in (1, 3) and pixels == UINT8
    is_series = input_size[0] == 1 or config.spectrogram is not None
    blr = given(config.blr, blr)
    global_batch = batch_size * config.accum_iter * ranks
    chosen = dict(
        model=model,
        batch_size=batch_size,
        input_size=(input_size[0], input_size[-1]),
        patch_size=patch_size,
        **(shape or {}),
        nb_classes=nb_classes,
        class_names=class_names,
        global_pool=config.global_pool and not config.cls_token,
        epochs=epochs,
        lr=given(config.lr, blr * global_batch / 256),
        blr=blr,
        warmup_epochs=given(config.warmup_epochs, default_warmup(OFFICIAL_FINETUNING_WARMUP, epochs)),
        layer_decay=given(config.layer_decay, layer_decay),
        drop_path=given(config.drop_path, drop_path),
        crop_scale=given(config.crop_scale, (0.7, 1.0) if digits else (1.0, 1.0) if is_series else (0.08, 1.0)),
        flip=given(config.flip, len(mean) == 3 and not is_series),
        aa=given(config.aa, "rand-m9-mstd0.5-inc1" if takes_randaugment else ""),
        reprob=given(config.reprob, 0.0 if digits else 0.25),
        mixup=given(config.mixup, 0.0 if digits else 0.8),
        cutmix=given(config.cutmix, 0.0 if digits else 1.0),
        num_workers=given(config.num_workers, num_workers),
        compile=chosen_compile(config, epochs * facts.length // global_batch, on_gpu),
        in_chans=len(mean),
        **pixel_settings(pixels),
        other_types=other_types,
        mean=mean,
        std=std,
        global_batch=global_batch,
        dataset_length=facts.length,
        order=facts.order,
    )
    resolved = ResolvedFinetuneConfig(**{**dataclasses.asdict(config), **chosen})
    check_rates(resolved)
    check_gelu(resolved, model)
    return resolved


def _of_convnext(width: int) -> tuple[int, float, float, float]:
    """Returns epochs, blr, layer_decay and drop_path of ConvNeXt V2, by the ``width`` of its last stage: those that are
    published for Atto, for Tiny and for Base (Woo et al. 2023, released commands)."""
    if width < 768:
        return 600, 2e-4, 0.9, 0.1
    return (300, 8e-4, 0.9, 0.2) if width == 768 else (100, 6.25e-4, 0.6, 0.1)


def check_finetune(config: FinetuneConfig) -> None:
    """Refuses settings that cannot work, whatever the data and the encoder.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    check_tuning(config)
    check_few(config)
    can = family_of(config.model) in ("vit", "convnext")
    need(config, can, "model", "a preset mae_vit_* or mae_convnextv2_*; other models have `fastmae probe` alone")
    needed = partial(need, config)
    needed(config.nb_classes is None or config.nb_classes >= 2, "nb_classes", "at least 2")
    for name in ("mixup", "cutmix"):
        value = getattr(config, name)
        needed(value is None or 0 <= value <= LARGEST_ALPHA, name, f"0 or more, at most {LARGEST_ALPHA:g}")
    needed(0 <= config.smoothing < 1, "smoothing", "at least 0 and below 1")
    for name in ("reprob", "mixup_switch_prob"):
        value = getattr(config, name)
        needed(value is None or 0 <= value <= 1, name, "between 0 and 1")
