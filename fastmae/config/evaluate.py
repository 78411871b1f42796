"""The settings of what is done with a frozen model: probe, reconstruct, features, search and anomaly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastmae.config.few import FewLabelsConfig, amounts_of, check_few
from fastmae.config.masking import MaskingConfig, check_masking
from fastmae.config.shared import (
    Checkpoint,
    Data,
    Device,
    ForwardBatch,
    Json,
    ReadingConfig,
    Rest,
    WithDecoder,
    Workers,
    check_reading,
)
from fastmae.config.values import coerce, need, need_at_least_one, need_seed
from fastmae.errors import SettingError

Pool = Literal["mean", "cls", "both"]
AnomalyPool = Literal["tokens", "mean", "cls", "both"]
LinearProbe = Literal["logistic", "lars"]
Reduction = Literal["pca", "umap"]
Beside = Literal["random", "pixels"]
Attack = Literal["fgsm", "pgd"]
PROBE_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
PROBE_BATCH = 16_384


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(FewLabelsConfig, ReadingConfig):
    """Measure frozen features on labelled data: with weighted k-NN and with a linear classifier."""

    checkpoint: Checkpoint
    data_path: Data = None
    """Labelled data. The classifiers are fitted on the train part and scored on the val or test part; if there is none,
    a fifth is held out. If several are given, they are used one after another. Default: the data of the run."""
    pool: Pool = "mean"
    """What the features are: the mean of the patch tokens (mean), the class token, which has no loss in pretraining
    (cls), or both side by side (both)."""
    k: tuple[int, ...] = (20,)
    """Neighbours of the k-NN. Several numbers take little more time than the largest of them."""
    linear: LinearProbe = "logistic"
    """The linear classifier: logistic regression (logistic), for up to some ten thousand images; or the linear probe of
    the paper (lars): LARS, BatchNorm without affine parameters, 90 epochs, on features of central crops."""
    blr: tuple[float, ...] = PROBE_RATES
    """With --linear lars, the learning rates for a batch of 256 features. They are trained at the same time, and the
    best one on a held-out fifth of the train part is taken. The published rate is 0.1."""
    linear_batch: int = PROBE_BATCH
    """With --linear lars, features per step, if there are as many. The published number is 16384; a smaller one gives
    small data more steps."""
    beside: tuple[Beside, ...] = ()
    """With --shots or --label_share, measure other features as well: those of the same encoder with random weights
    (random), and the pixels themselves (pixels)."""
    corruptions: bool = False
    """Measure the classifiers on the test part under 14 kinds of corruptions as well: noise, blur, weather and digital
    ones, of ImageNet-C, or of CIFAR-10-C for images of up to 64 pixels."""
    severity: tuple[int, ...] = (1, 2, 3, 4, 5)
    """With --corruptions, how strong they are, 1 to 5."""
    attacks: tuple[Attack, ...] = ()
    """Attack the linear classifier, and the head of a fine-tuned one, with small changes of pixels along the gradient:
    one step (fgsm), or 20 from a random place (pgd). Of more than 1,000 images, as many are taken."""
    radius: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """With --attacks, by how much of 255 a pixel may change."""
    batch_size: ForwardBatch = 256
    device: Device = None
    num_workers: Workers = None
    output: str | None = None
    """A folder for a table of classes and for confusion matrices: probe.json and confusion.png. With --shots or
    --label_share it gets few.json, with --corruptions or --attacks robustness.json as well."""
    json: Json = False

    def __post_init__(self) -> None:
        coerce(self)
        check_evaluation(self)


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig(MaskingConfig, ReadingConfig):
    """Draw originals, masked images and reconstructions side by side."""

    checkpoint: WithDecoder
    images: Data = None
    """Image files, or any data that --data_path of pretrain accepts. Default: the data of the run."""
    output: str = "grid.png"
    """The picture to write."""
    count: int = 8
    """How many of the images are drawn; they are evenly spaced."""
    mask_image: tuple[str, ...] = ()
    """Pictures of masks instead of --masking: one picture for all images or one per image, of the size of the image,
    white where it is masked. Every patch that has a white pixel is masked."""
    paste_visible: bool = True
    """Show visible patches as they are. Otherwise they are shown as the model predicts them, although no loss asks for
    that."""
    errors: bool = False
    """Draw a row of absolute errors as well."""
    complete: int = 0
    """Predict every patch: each is the mean of its predictions in this many rounds of masks that hide all patches one
    after another. 0: one mask, and visible patches as they are."""
    sweep: tuple[float, ...] = ()
    """Several mask ratios instead of --mask_ratio: two rows for each, or one frame for each if --output ends in
    .gif."""
    seed: int = 0
    """The number from which the masks follow."""
    device: Device = None

    def __post_init__(self) -> None:
        coerce(self)
        check_evaluation(self)


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(ReadingConfig):
    """Write frozen features with the names and labels of their images."""

    checkpoint: Checkpoint
    data_path: Data = None
    """The images: one or several paths, of every kind that --data_path of pretrain takes. Default: the data of the
    run."""
    output: str | None = None
    """A file that ends in .npz, or in .parquet (needs the extra `parquet`). It may be left out with --picture."""
    reduce: Reduction | None = None
    """Two numbers of each image as well, `reduced` in the file: its first two principal components (pca), or its place
    in a map that keeps neighbours together (umap, needs the extra `umap`). Default: pca with --picture, else none."""
    picture: str | None = None
    """A map of the images to write, a .png: points coloured by class, and beside them thumbnails where they lie (needs
    the extra `report`)."""
    split: Literal["train", "val"] = "train"
    """Which part of the data is taken. If the data have no parts, a fifth of them is held out as val."""
    pool: Pool = "mean"
    """What the features are: the mean of the patch tokens (mean), the class token (cls), or both side by side
    (both)."""
    batch_size: ForwardBatch = 256
    device: Device = None
    num_workers: Workers = None

    def __post_init__(self) -> None:
        coerce(self)
        check_evaluation(self)


@dataclass(frozen=True, kw_only=True)
class SearchConfig(ReadingConfig):
    """Find the images whose features are nearest to those of given images, by cosine."""

    checkpoint: Checkpoint
    data_path: Annotated[str | tuple[str, ...] | None, Rest("DATA", otherwise="queries")] = None
    """The images to search in. Of data that have parts, it is the train part. Default: the data of the run."""
    queries: str | tuple[str, ...] | None = None
    """The given images: image files, or any data that --data_path of pretrain accepts. Default: some of the images to
    search in."""
    k: int = 5
    """How many images are found per query. The query itself is not counted."""
    count: int = 8
    """How many of the queries are taken; they are evenly spaced."""
    output: str = "search.png"
    """The picture to write."""
    pool: Pool = "mean"
    """What the features are: the mean of the patch tokens (mean), the class token (cls), or both side by side
    (both)."""
    batch_size: ForwardBatch = 256
    device: Device = None
    num_workers: Workers = None
    json: Json = False

    def __post_init__(self) -> None:
        coerce(self)
        check_evaluation(self)


@dataclass(frozen=True, kw_only=True)
class AnomalyConfig(ReadingConfig):
    """Score how unlike normal images other images are: by the distance of features, and by the error of
    reconstruction."""

    checkpoint: WithDecoder
    data_path: Data = None
    """The normal images. Of data that have parts, it is the train part. Default: the data of the run."""
    test_path: str | tuple[str, ...] | None = None
    """The images to score. Default: the val or test part of data_path; if there is none, a fifth is held out."""
    left_out: str | None = None
    """A class of labelled data that is removed from the normal images: the name of its folder, or its number."""
    k: int = 1
    """The distance is the mean of the distances to this many nearest normal images."""
    pool: AnomalyPool | None = None
    """What is compared: patch tokens at the same position (tokens), for images in which things lie alike; or for other
    images the mean of the patch tokens (mean), the class token (cls), or both side by side (both). Default: tokens; for
    models that have none mean, which of rows of a table is their latent."""
    mask_ratio: float | None = None
    """Share of the patches, or of the cells of a row, that is masked at a time."""
    rounds: int = 4
    """How many times each of them is masked, at least, with different others."""
    seed: int = 0
    """The number from which the masks follow."""
    count: int = 8
    """How many heat maps are drawn: those of the images with the largest distance."""
    output: str = "anomaly"
    """A folder for all scores (scores.json) and the heat maps (anomaly.png)."""
    batch_size: ForwardBatch = 256
    device: Device = None
    num_workers: Workers = None
    json: Json = False

    def __post_init__(self) -> None:
        coerce(self)
        check_evaluation(self)


def check_evaluation(config: ProbeConfig | ReconstructConfig | FeaturesConfig | SearchConfig | AnomalyConfig) -> None:
    """Refuses settings that cannot work, whatever the data and the model.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    need_at_least_one(config, "batch_size", "num_workers", "k", "count", "rounds", "linear_batch")
    need_seed(config)
    check_reading(config)
    for name in ("k", "blr", "data_path", "queries", "images"):
        if getattr(config, name, True) == ():
            raise SettingError(name, problem="must name at least one")
    if isinstance(config, ProbeConfig):
        for rate in config.blr:
            if rate <= 0:
                raise SettingError("blr", rate, "must be a positive number")
        if config.linear != "lars" and (config.blr, config.linear_batch) != (PROBE_RATES, PROBE_BATCH):
            name = "blr" if config.blr != PROBE_RATES else "linear_batch"
            need(config, False, name, "given together with --linear=lars")
        need(config, config.linear_batch != 1, "linear_batch", "at least 2, as BatchNorm needs")
        _check_few_probe(config)
        _check_robustness(config)
    if isinstance(config, AnomalyConfig):
        need(config, config.mask_ratio is None or 0 < config.mask_ratio < 1, "mask_ratio", "above 0 and below 1")
    if isinstance(config, ReconstructConfig):
        _check_reconstruct(config)
    if isinstance(config, FeaturesConfig) and config.output is None and config.picture is None:
        raise SettingError("output", problem="must name a file for the features, or --picture one for a map")


def _check_few_probe(config: ProbeConfig) -> None:
    check_few(config)
    if amounts_of(config):
        need(config, len(config.k) == 1, "k", "one number with --shots or --label_share")
        return
    need(config, config.seeds is None, "seeds", "given together with --shots or --label_share")
    need(config, config.beside == (), "beside", "given together with --shots or --label_share")


def _check_robustness(config: ProbeConfig) -> None:
    default = {name: ProbeConfig.__dataclass_fields__[name].default for name in ("severity", "radius")}
    for name, needed in (("severity", "corruptions"), ("radius", "attacks")):
        values = getattr(config, name)
        need(config, values != (), name, "one or several numbers")
        need(config, bool(getattr(config, needed)) or values == default[name], name, f"given together with --{needed}")
    for severity in config.severity:
        if not 1 <= severity <= 5:
            raise SettingError("severity", severity, "must be 1 to 5")
    for radius in config.radius:
        if not 0 < radius <= 255:
            raise SettingError("radius", radius, "must be above 0 and at most 255, in units of 1 / 255 of the range")
    if config.corruptions or config.attacks:
        need(config, config.linear == "logistic", "linear", "logistic with --corruptions or --attacks")
        need(
            config,
            not amounts_of(config),
            "shots" if config.shots else "label_share",
            "left out with --corruptions or --attacks",
        )


def _check_reconstruct(config: ReconstructConfig) -> None:
    check_masking(config)
    others = (config.mask_ratio, config.masking, config.masks) != (None, None, "")
    if config.mask_image and (others or config.sweep):
        problem = "says which patches; leave --mask_ratio, --masking, --masks and --sweep out"
        raise SettingError("mask_image", problem=problem)
    need(config, config.complete >= 0, "complete", "0 or more rounds")
    if config.complete and (config.masks or config.masking or config.mask_image or not config.paste_visible):
        problem = "has masks that hide every patch in turn, none of which is shown"
        remedy = "leave --masks, --masking, --mask_image and --no_paste_visible out"
        raise SettingError("complete", config.complete, f"{problem}; {remedy}")
    if config.sweep and (config.masks or config.masking == "grid" or config.mask_ratio is not None):
        problem = "says how many patches; leave --mask_ratio, --masks and --masking=grid out"
        raise SettingError("sweep", problem=problem)
    for ratio in config.sweep:
        if not 0 < ratio < 1:
            raise SettingError("sweep", ratio, "must be above 0 and below 1")
    if config.output.lower().endswith(".gif") and not config.sweep:
        raise SettingError("output", config.output, "a film is for --sweep; name a .png")
