"""The settings of segment."""

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

RECIPE_EPOCHS = 127
"""160,000 steps of 16 images, as in the published recipe, on the 20,210 images of ADE20K."""
RECIPE_WARMUP = 1500 / 160_000
"""The share of the published run that its warm-up takes."""
MOST_CLASSES = 255


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(TuningConfig):
    """Teach a pretrained encoder to say what each pixel shows, from images with label maps (masks); or, with --predict,
    let a model that has learnt it segment pictures."""

    finetune: Annotated[str, Rest("RUN")] = ""
    """The pretrained encoder: a run folder of pretrain, one of its checkpoints, or a file with an encoder. Default:
    random weights, for comparison. With --predict a run of segment."""

    # Data.
    data_path: str | tuple[str, ...] | None = None
    """A folder of images and label maps of the same names: images/train and annotations/train (and val), images and
    annotations (or maps, masks, labels), or Cityscapes. Maps are PNG files with a palette or gray tones. The model is
    tested on the val part; if there is none, a fifth is held out. Default: the data of RUN; without one the
    built-in shapes."""
    classes: tuple[str, ...] | None = None
    """The names of the classes in the order of their numbers. Default: those in classes.txt of the data; otherwise
    there are as many as the largest number in the label maps says, without names."""
    ignore_index: int = 255
    """The number in label maps that counts nowhere."""
    reduce_zero_label: bool = False
    """Number 0 in label maps counts nowhere and 1 is the first class, as in ADE20K."""
    random_scale: tuple[float, float] | None = None
    """Smallest and largest zoom of training crops; at 1 an image just covers the crop. What a crop has beyond its image
    counts nowhere. Default: 0.5 and 2, as in the published recipe; for the shapes 0.9 and 1.2."""

    distortion: bool | None = None
    """Change brightness, contrast, saturation and hue of training crops at random, as in the published recipe. Default:
    for colour images of 8 bits, but not for the shapes."""

    # Model.
    segmenter_head: Literal["linear", "pyramid", "upernet"] | None = None
    """What gives each pixel a class: one linear map from each token (linear), a light decoder of four blocks that is
    finer than patches (pyramid), or UPerNet with its auxiliary head, as in the published recipe (upernet). Default:
    pyramid; with --tune linear linear."""
    drop_path: float | None = None
    """Stochastic depth: the probability with which a branch of the last block is skipped for an image. It grows from 0
    with the depth of the block. Default: as in the published recipe, 0.1 up to ViT-B, otherwise 0.2; 0 for the shapes,
    and unless everything is tuned."""

    # Optimisation.
    batch_size: int = 16
    """Images per rank and micro-step. The global batch is batch_size × accum_iter × ranks."""
    epochs: int | None = None
    """Passes over the train part. Default: 127, which are the 160,000 steps of the published recipe on ADE20K; 20 for
    the shapes."""
    blr: float | None = None
    """Base learning rate, for a global batch of 256 images; --lr is computed from it. Default: 1.6e-3, which is the
    published 1e-4 for 16 images, and ten times as much with --tune linear; for the shapes 1.6e-2 and 8e-2."""
    layer_decay: float | None = None
    """The learning rate of a layer, as a share of that of the layer above. Default: as in the published recipe, 0.65 up
    to ViT-B, otherwise 0.75; 1 for the shapes, which small models learn."""
    schedule: Literal["polynomial", "cosine"] = "polynomial"
    """How the learning rate falls after the warm-up: in a straight line (polynomial, of power 1), as in the published
    recipe, or as half a cosine."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    warmup_epochs: float | None = None
    """Epochs over which the learning rate grows from 0, linearly. Default: 1,500 of 160,000 steps, as in the published
    recipe; for the shapes a tenth of the run."""

    # Use.
    predict: tuple[str, ...] = ()
    """Segment these pictures, or those in these folders, with the model of RUN, instead of training one: a label map
    and an overlay of each are written into --output_dir."""

    def __post_init__(self) -> None:
        coerce(self)
        meant_by_tune(self)
        check_segment(self)


@dataclass(frozen=True, kw_only=True)
class ResolvedSegmentConfig(SegmentConfig):
    """A SegmentConfig in which nothing is left open; what the run folder keeps."""

    data_path: str | tuple[str, ...]
    model: str
    input_size: tuple[int, int]
    patch_size: tuple[int, int]
    classes: tuple[str, ...]
    segmenter_head: Literal["linear", "pyramid", "upernet"]
    random_scale: tuple[float, float]
    distortion: bool
    compile: Literal["off", "block", "model"]
    epochs: int
    lr: float
    blr: float
    warmup_epochs: float
    layer_decay: float
    drop_path: float
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
    num_classes: int

    def __post_init__(self) -> None:
        coerce(self)  # the values that the user chose were checked when the SegmentConfig was made


# As FIXED_IN_A_RUN, for segmentation.
FIXED_IN_A_SEGMENTATION = (
    "model", "input_size", "in_chans", "mean", "std", "num_classes", "classes", "segmenter_head", "tune", "lora_rank",
    "drop_path", "random_scale", "distortion", "flip", "ignore_index", "reduce_zero_label", "schedule", "seed",
    "global_batch", "dataset_length", "order", "keep_last", *ENCODER_SHAPE, *IMAGE_SETTINGS,
)  # fmt: skip


def resolve_segment(
    config: SegmentConfig,
    facts: DataFacts,
    *,
    is_built_in: bool,
    model: str,
    width: int,
    img_size: tuple[int, int],
    patch_size: tuple[int, int],
    shape: Mapping[str, Any] | None = None,
    pixels: PixelFacts = UINT8,
    other_types: Literal["skip", "convert"] = "convert",
    mean: tuple[float, ...],
    std: tuple[float, ...],
    num_classes: int,
    class_names: tuple[str, ...] = (),
    ranks: int,
    num_workers: int,
    on_gpu: bool = False,
) -> ResolvedSegmentConfig:
    """Fills in what was left open, from the data (``facts``, ``num_classes``), the encoder and the machine, as
    ``resolve_finetune`` does; ``is_built_in`` says whether the data are the built-in shapes."""
    epochs, blr = (20, 1.6e-2) if is_built_in else (RECIPE_EPOCHS, 1.6e-3)
    drop_path, layer_decay = (0.1, 0.65) if width <= 768 else (0.2, 0.75)
    epochs = given(config.epochs, epochs)
    if config.tune != "full" or is_built_in:
        drop_path = 0.0
    if is_built_in:
        layer_decay = 1.0
    input_size = config.input_size or img_size
    takes_distortion = len(mean) == 3 and pixels == UINT8
    if config.distortion and not takes_distortion:
        problem = "changes colours of 8 bits alone; leave it out for other pixels"
        raise SettingError("distortion", config.distortion, problem)
    if config.segmenter_head == "upernet" and config.batch_size * ranks < 2:
        problem = "must be at least 2 with --segmenter_head=upernet, whose BatchNorm compares images"
        raise SettingError("batch_size", config.batch_size, problem)
    if config.tune == "linear":
        blr *= 5 if is_built_in else 10
    blr = given(config.blr, blr)
    global_batch = config.batch_size * config.accum_iter * ranks
    chosen = dict(
        model=model,
        input_size=(input_size[0], input_size[-1]),
        patch_size=patch_size,
        **(shape or {}),
        num_classes=num_classes,
        classes=class_names,
        segmenter_head=given(config.segmenter_head, "linear" if config.tune == "linear" else "pyramid"),
        random_scale=given(config.random_scale, (0.9, 1.2) if is_built_in else (0.5, 2.0)),
        distortion=given(config.distortion, takes_distortion and not is_built_in),
        epochs=epochs,
        lr=given(config.lr, blr * global_batch / 256),
        blr=blr,
        warmup_epochs=given(config.warmup_epochs, epochs * (0.1 if is_built_in else RECIPE_WARMUP)),
        layer_decay=given(config.layer_decay, layer_decay),
        drop_path=given(config.drop_path, drop_path),
        flip=given(config.flip, len(mean) == 3),
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
    resolved = ResolvedSegmentConfig(**{**dataclasses.asdict(config), **chosen})
    check_rates(resolved)
    check_gelu(resolved, model)
    return resolved


def check_segment(config: SegmentConfig) -> None:
    """Refuses settings that cannot work, whatever the data and the encoder.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    check_tuning(config)
    needed = partial(need, config)
    can = family_of(config.model) == "vit"
    needed(can, "model", "a preset mae_vit_*, whose tokens a head can look at; other families have none yet")
    needed(config.crop_scale is None, "crop_scale", "left out; crops of segment have --random_scale")
    needed(0 <= config.ignore_index <= 65535, "ignore_index", "a number of 16 bits, from 0")
    scale = config.random_scale
    fits = scale is None or 0.25 <= scale[0] <= scale[1] <= 16
    needed(fits, "random_scale", "two numbers, 0.25 ≤ smallest ≤ largest ≤ 16")
    names = config.classes
    needed(not names or 2 <= len(names) <= MOST_CLASSES, "classes", f"from 2 to {MOST_CLASSES} names")
    needed(not names or len({*names}) == len(names), "classes", "names that differ from each other")
    needed(not config.predict or bool(config.finetune), "predict", "given together with a RUN of fastmae segment")
