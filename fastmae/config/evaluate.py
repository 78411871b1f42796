"""The settings of what is done with a frozen model: probe, reconstruct, features, search and anomaly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastmae.config.masking import PUBLISHED_RATIO, Masking, check_masking
from fastmae.config.shared import (
    Checkpoint,
    Device,
    ForwardBatch,
    Json,
    Preset,
    WithDecoder,
    Workers,
    need,
    need_at_least_one,
)
from fastmae.errors import UserError

Pool = Literal["mean", "cls", "both"]
AnomalyPool = Literal["tokens", "mean", "cls", "both"]
LinearProbe = Literal["logistic", "lars"]
PROBE_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
PROBE_BATCH = 16_384


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Measure frozen features: weighted k-NN and a linear classifier on the data's labels."""

    checkpoint: Checkpoint
    data_path: str | tuple[str, ...] = "digits"
    """Labelled data; its train part fits, its val or test part is scored (without one, a fifth is held out). Several
    are taken one after another."""
    pool: Pool = "mean"
    """The mean of the patch tokens, the class token (on which pretraining puts no loss), or both side by side."""
    k: tuple[int, ...] = (20,)
    """Neighbours of the k-NN; several numbers cost little more than the largest."""
    linear: LinearProbe = "logistic"
    """Logistic regression, for data of up to some ten thousand images; or the published probe (lars): LARS, BatchNorm
    without affine, 90 epochs, on features of central crops."""
    blr: tuple[float, ...] = PROBE_RATES
    """With --linear lars: learning rates for a batch of 256, trained at once. Of several, the best on a held-out fifth
    of the train part is taken; the published one is 0.1."""
    linear_batch: int = PROBE_BATCH
    """With --linear lars: features a step, at most all; 16384 is published, fewer make more steps of small data."""
    batch_size: ForwardBatch = 256
    device: Device = None
    num_workers: Workers = None
    model: Preset = None
    output: str | None = None
    """A folder for a table of classes and confusion matrices, too: probe.json and confusion.png."""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Draw originals, masked images and reconstructions side by side."""

    checkpoint: WithDecoder
    images: str | tuple[str, ...] = "digits"
    """Image files, or any data that --data_path of pretrain accepts."""
    output: str = "grid.png"
    """The picture to write."""
    count: int = 8
    """How many of the images, evenly spaced."""
    mask_ratio: float = PUBLISHED_RATIO
    """Share of the patches that is masked. As for pretrain, so are the next two."""
    masking: Masking | None = None
    """random, block, grid or file. Default: random, with --masks file."""
    masks: str = ""
    """A .npy file of masks."""
    mask_image: tuple[str, ...] = ()
    """Pictures of the masks instead: one for all images or one an image, of its size, white where it is masked. Every
    patch that white touches is."""
    paste_visible: bool = True
    """Show visible patches as they are. Otherwise as predicted, which no loss asks for."""
    errors: bool = False
    """A row of absolute errors, too."""
    sweep: tuple[float, ...] = ()
    """Mask ratios instead: two rows for each, or with an --output that ends in .gif a frame for each."""
    seed: int = 0
    """Of the masks."""
    device: Device = None
    model: Preset = None


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Write frozen features with the names and labels of their images."""

    checkpoint: Checkpoint
    data_path: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """One or several, of every kind that --data_path of pretrain takes."""
    output: str
    """A file that ends in .npz, or in .parquet (needs the extra `parquet`)."""
    split: Literal["train", "val"] = "train"
    """Which part, of data that have parts; a fifth of others is held out as val."""
    pool: Pool = "mean"
    """The mean of the patch tokens, the class token, or both side by side."""
    batch_size: ForwardBatch = 256
    device: Device = None
    num_workers: Workers = None
    model: Preset = None


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Find the images that are nearest to others by the cosine of their features."""

    checkpoint: Checkpoint
    queries: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")]
    """Image files, or any data that --data_path of pretrain accepts."""
    data_path: str | tuple[str, ...] = "digits"
    """Where to search: of data that have parts, the train part."""
    k: int = 5
    """How many images for a query; the query itself does not count."""
    count: int = 8
    """How many of the queries, evenly spaced."""
    output: str = "search.png"
    """The picture to write."""
    pool: Pool = "mean"
    """The mean of the patch tokens, the class token, or both side by side."""
    batch_size: ForwardBatch = 256
    device: Device = None
    num_workers: Workers = None
    model: Preset = None
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class AnomalyConfig:
    """Score images by how little they are like normal ones: distance of features, and error of reconstruction."""

    checkpoint: WithDecoder
    data_path: str | tuple[str, ...] = "digits"
    """Normal images: of data that have parts, the train part."""
    test_path: str | tuple[str, ...] | None = None
    """Images to score. Default: the val or test part of data_path (without one, a fifth is held out)."""
    left_out: str | None = None
    """A class of labelled data (the name of its folder, or its number) that is taken out of the normal images."""
    k: int = 1
    """The distance is the mean of those to so many nearest normal images."""
    pool: AnomalyPool = "tokens"
    """What is compared: patch tokens, each with those of its place, for images of things that lie alike; or of other
    images the mean of the patch tokens, the class token, or both side by side."""
    mask_ratio: float = PUBLISHED_RATIO
    """Share of the patches that is masked at a time."""
    rounds: int = 4
    """How often each patch is masked, at least, with different others."""
    seed: int = 0
    """Of the masks."""
    count: int = 8
    """How many heat maps: of the images with the largest distance."""
    output: str = "anomaly"
    """A folder for every score (scores.json) and heat maps (anomaly.png)."""
    batch_size: ForwardBatch = 256
    device: Device = None
    num_workers: Workers = None
    model: Preset = None
    json: Json = False


def check_evaluation(config: ProbeConfig | ReconstructConfig | FeaturesConfig | SearchConfig | AnomalyConfig) -> None:
    """Refuses settings that cannot work, whatever the data and the model.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    need_at_least_one(config, "batch_size", "num_workers", "k", "count", "rounds", "linear_batch")
    shown = {"queries": "QUERY", "data_path": "DATA" if isinstance(config, FeaturesConfig) else "--data_path"}
    for flag in ("k", "blr", "data_path", "queries", "images"):
        if getattr(config, flag, True) == ():
            raise UserError(f"{shown.get(flag, f'--{flag}')}: must name at least one")
    if isinstance(config, ProbeConfig):
        for rate in config.blr:
            if not (math.isfinite(rate) and rate > 0):
                raise UserError(f"--blr {rate}: must be a positive number")
        if config.linear != "lars" and (config.blr, config.linear_batch) != (PROBE_RATES, PROBE_BATCH):
            raise UserError("--blr and --linear_batch: must be given together with --linear lars")
        if config.linear_batch == 1:
            raise UserError("--linear_batch 1: must be at least 2, as BatchNorm needs")
    if isinstance(config, AnomalyConfig):
        need(config, 0 < config.mask_ratio < 1, "mask_ratio", "above 0 and below 1")
    if isinstance(config, ReconstructConfig):
        _check_reconstruct(config)


def _check_reconstruct(config: ReconstructConfig) -> None:
    check_masking(config)
    others = (config.mask_ratio, config.masking, config.masks) != (PUBLISHED_RATIO, None, "")
    if config.mask_image and (others or config.sweep):
        raise UserError("--mask_image: says which patches; leave --mask_ratio, --masking, --masks and --sweep out")
    if config.sweep and (config.masks or config.masking == "grid" or config.mask_ratio != PUBLISHED_RATIO):
        raise UserError("--sweep: says how many patches; leave --mask_ratio, --masks and --masking grid out")
    for ratio in config.sweep:
        if not 0 < ratio < 1:
            raise UserError(f"--sweep {ratio}: must be above 0 and below 1")
    if config.output.lower().endswith(".gif") and not config.sweep:
        raise UserError(f"--output {config.output}: a film is for --sweep; name a .png")
