"""Are fastmae's encoders as good as those of the official trainer?

    fastmae bench quality --data_path digits --seeds 0 1 2 --output benchmarks/results

For every seed there are two trainings of one model on one data set, with the same epochs, batch, learning rates, weight
decay, crop scale and mask ratio. One is ``fastmae pretrain`` itself. The other is the official loop, written out below
around ``model/reference.py``: torch's DataLoader and its shuffle, Pillow's crops and flips, masks by ``torch.rand``,
AdamW as it comes. Order, crops, flips, masks, groups, schedule and first weights are its own; the sizes of the model,
its positions, the mean and deviation of pixels and the files' reader are shared. The same code then measures k-NN and
linear probe of both, on images that are held out of the probes.

An accuracy agrees if Welch's 95 % interval of the difference of the two means holds 0; docs/quality.md says what that
does and does not exclude. The losses of the last epoch are compared in the same way for the reader and have no say, as
a model is not used for its loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fastmae.benchmarks.baselines.official import official_like
from fastmae.benchmarks.harness import OURS, console, machine_name, table, write_result
from fastmae.checkpoint.load import load_model
from fastmae.config import PROBE_BATCH, PROBE_RATES, BenchQualityConfig, ResolvedConfig, check_quality, pretraining
from fastmae.config.model import ModelSpec
from fastmae.data.sources import Source, describe, open_train, shown, train_and_val
from fastmae.errors import UserError
from fastmae.evaluate.probe import probe_in_detail
from fastmae.model.build import build_model
from fastmae.model.family import MaskedModel
from fastmae.train.parallel import choose_device
from fastmae.train.precision import choose_precision
from fastmae.train.pretrain import pretrain
from fastmae.train.settings import measure_pixels, resolve_settings

OFFICIAL, UNTRAINED = "official loop", "untrained"
ACCURACIES = KNN, LINEAR = "knn", "linear"
LOSS = "loss"
LABELS = {KNN: "k-NN, %", LINEAR: "linear probe, %", LOSS: "loss, last epoch"}
DIGITS = {KNN: 2, LINEAR: 2, LOSS: 4}
CONFIDENCE = 0.95
CROP_ATTEMPTS = 10
RATIO = (3 / 4, 4 / 3)

Figures = dict[str, float]
"""KNN and LINEAR in percent, and of a training the LOSS of its last epoch."""


def bench_quality(config: BenchQualityConfig, command: Sequence[str]) -> int:
    """Prints the figures of all seeds and the result, writes what was asked for, and returns 1 if an accuracy does not
    agree, otherwise 0; or what ``pretrain`` returned when a signal stopped it.

    Raises:
        UserError: settings or data that cannot work.
    """
    check_quality(config)
    device = choose_device(config.device)
    settings = _settings(config, device)
    parts = train_and_val(config.data_path)
    figures: dict[str, list[Figures]] = {UNTRAINED: [], OFFICIAL: [], OURS: []}

    def add(trainer: str, seed: int, model: MaskedModel, **loss: float) -> None:
        measured = _accuracy(config, model.to(device), parts) | loss
        figures[trainer].append(measured)
        text = f"k-NN {measured[KNN]:.2f} %, linear probe {measured[LINEAR]:.2f} %"
        text += f", loss {loss[LOSS]:.4f}" if loss else ""
        print(f"seed {seed}, {trainer}: {text}", flush=True)

    for seed in config.seeds:
        add(UNTRAINED, seed, _fresh(settings, seed))  # first, as data that cannot be probed are refused here
        ours = _ours(config, seed)
        if isinstance(ours, int):
            return ours
        add(OURS, seed, ours[0], loss=ours[1])
        theirs, loss = _theirs(settings, seed, device, config.num_workers)
        add(OFFICIAL, seed, theirs, loss=loss)
    result = {
        name: compare(*([run[name] for run in figures[trainer]] for trainer in (OURS, OFFICIAL))) for name in LABELS
    }
    train, test = map(len, parts)
    title = f"{settings.model} on {shown(config.data_path)} ({train} train, {test} test), {settings.epochs} epochs, "
    console().print(_table(f"{title}{len(config.seeds)} seeds", figures, result))
    if config.output is not None:
        first = config.data_path if isinstance(config.data_path, str) else config.data_path[0]
        data = Path(first).name.split(".")[0] or "data"
        name = f"quality-{data}-{settings.model}-{machine_name(device)}-e{settings.epochs}"
        measured = {
            "training": {key: getattr(settings, key) for key in _TRAINING},
            "precision": choose_precision(settings.precision, device).name,
            "images": {"pretrained_on": settings.dataset_length, "train": train, "test": test},
            "seeds": {who: dict(zip(map(str, config.seeds), runs, strict=True)) for who, runs in figures.items()},
            "result": {name: dataclasses.asdict(one) | {"agrees": one.agrees} for name, one in result.items()},
        }
        print(write_result(config.output, name, command=command, settings=config, measured=measured))
    apart = [name for name in ACCURACIES if not result[name].agrees]
    if apart:
        print(f"{' and '.join(apart)} differ by more than the seeds explain; try other seeds", file=sys.stderr)
    return int(bool(apart))


# What both trained with once defaults were filled in, for the file.
_TRAINING = (
    "model", "input_size", "in_chans", "mean", "std", "epochs", "lr", "warmup_epochs", "min_lr", "weight_decay",
    "batch_size", "mask_ratio", "norm_pix_loss", "crop_scale", "flip",
)  # fmt: skip


def _settings(config: BenchQualityConfig, device: torch.device) -> ResolvedConfig:
    """With every default filled in as the trainer does it.

    Raises:
        UserError: the official loop cannot train with these.
    """
    source = open_train(config.data_path)
    flags = pretraining(config, config.seeds[0], "")
    facts = describe(source)
    settings = resolve_settings(flags, measure_pixels(flags, source, facts), facts, 1, None)
    if settings.in_chans not in (1, 3):
        raise UserError(f"--data_path: images of {settings.in_chans} channels; the official loop takes 1 or 3")
    return settings


def _fresh(settings: ResolvedConfig, seed: int) -> MaskedModel:
    torch.manual_seed(seed)
    return build_model(ModelSpec.of(settings))


def _ours(config: BenchQualityConfig, seed: int) -> tuple[MaskedModel, float] | int:
    """The model after ``fastmae pretrain``, and the loss that it logged for its last epoch; or its exit status."""
    with tempfile.TemporaryDirectory(prefix="fastmae-quality-") as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            status = pretrain(pretraining(config, seed, folder))
        if status != 0:
            return status
        last = json.loads((Path(folder) / "log.txt").read_text().splitlines()[-1])
        return load_model(folder), float(last["train_loss"])


def _accuracy(config: BenchQualityConfig, model: MaskedModel, parts: tuple[Source, Source]) -> Figures:
    summary = probe_in_detail(
        model, *parts, pool=config.pool, ks=(config.k,), linear=config.linear, rates=PROBE_RATES,
        linear_batch=PROBE_BATCH, batch_size=256, num_workers=1,
    ).summary()  # fmt: skip
    return {name: float(summary[name]) for name in ACCURACIES}


# --- the official loop -----------------------------------------------------------------------------------------------


def _theirs(settings: ResolvedConfig, seed: int, device: torch.device, num_workers: int) -> tuple[MaskedModel, float]:
    """A model of ours with the weights that the official loop ends with, and the mean loss of its last epoch."""
    model = _fresh(settings, seed)
    official = official_like(model)
    torch.manual_seed(seed)
    initialise(official)
    source = open_train(settings.data_path)
    loss = [*official_losses(official.to(device), source, settings, device, num_workers)][-1]
    model.load_state_dict(official.state_dict(), strict=True)
    return model, loss


def official_losses(
    model: nn.Module, source: Source, settings: ResolvedConfig, device: torch.device, num_workers: int = 0
) -> Iterator[float]:
    """Trains ``model`` as the official script does, from torch's generator as it stands: the mean loss of each epoch.

    Raises:
        UserError: an image that cannot be read, or a loss that is not finite, at either of which the script ends too.
    """
    precision = choose_precision(settings.precision, device)
    crops = Crops(source, settings.input_size, settings.crop_scale, settings.flip, settings.mean, settings.std)
    loader = DataLoader(
        crops,
        batch_size=settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        multiprocessing_context="spawn" if num_workers else None,  # a process with threads must not be forked
    )
    (height, width), (ph, pw) = settings.input_size, tuple(model.patch_size)  # type: ignore[arg-type]
    L = (height // ph) * (width // pw)
    optimizer = torch.optim.AdamW(official_groups(model, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.95))
    for epoch in range(settings.epochs):
        total = 0.0
        for step, images in enumerate(_batches(loader)):
            for group in optimizer.param_groups:
                group["lr"] = official_rate(epoch + step / len(loader), settings)
            images = images.to(device, non_blocking=True)
            # The patches with the smallest noise are seen.
            ids_shuffle = torch.rand(len(images), L, device=device).argsort(dim=1)
            with precision.context(device):
                loss, _, _ = model(images, ids_shuffle, settings.mask_ratio)
            if not math.isfinite(loss.item()):
                raise UserError(f"the official loop's loss is {loss.item()} in epoch {epoch}; lower --blr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        yield total / len(loader)


def official_rate(epoch: float, settings: ResolvedConfig) -> float:
    """Of a fractional epoch: a straight line up, then half a period of the cosine down to ``min_lr``."""
    warmup, span = settings.warmup_epochs, settings.lr - settings.min_lr
    if epoch < warmup:
        return settings.lr * epoch / warmup
    angle = math.pi * (epoch - warmup) / (settings.epochs - warmup)
    return settings.min_lr + span * (1 + math.cos(angle)) / 2


def official_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and norms do not decay; all else does, the two tokens as well. Positions are not trained."""
    decaying: list[nn.Parameter] = []
    not_decaying: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name not in ("pos_embed", "decoder_pos_embed"):
            (not_decaying if name.endswith(".bias") or "norm" in name else decaying).append(parameter)
    return [{"params": not_decaying, "weight_decay": 0.0}, {"params": decaying, "weight_decay": weight_decay}]


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Draws the weights anew, as the official script does.

    Matrices and the patch projection are drawn by xavier, tokens with deviation 0.02; positions are constants.
    """
    for name, parameter in model.named_parameters():
        if name in ("cls_token", "mask_token"):
            parameter.normal_(0, 0.02)
        elif name.endswith(".bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1)
        elif "pos_embed" not in name:
            fan_out, fan_in = len(parameter), parameter[0].numel()
            limit = math.sqrt(6 / (fan_in + fan_out))
            parameter.uniform_(-limit, limit)


@dataclass(frozen=True)
class Crops(Dataset[torch.Tensor]):
    """Random crops by Pillow, drawn from torch's generator: that of a worker in a worker."""

    source: Source
    size: tuple[int, int]
    scale: tuple[float, float]
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        """float32 [C, H, W], normalised.

        Raises:
            UserError: the image cannot be read.
        """
        sample = self.source.read(index)
        try:
            if isinstance(sample, np.ndarray):
                image = Image.fromarray(sample[..., 0] if sample.shape[2] == 1 else sample)
            else:
                with Image.open(io.BytesIO(sample)) as file:
                    image = file.convert("L" if len(self.mean) == 1 else "RGB")
        except (OSError, ValueError) as error:
            raise UserError(f"{self.source.name(index)}: Pillow cannot read it ({error}); remove it") from error
        height, width = self.size
        crop = image.crop(crop_box(image.width, image.height, self.scale))
        crop = crop.resize((width, height), Image.Resampling.BICUBIC)
        if self.flip and torch.rand(()).item() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(crop)).view(height, width, -1).permute(2, 0, 1) / 255
        return (pixels - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)


def crop_box(width: int, height: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop, drawn from torch's generator.

    A share of the area within ``scale``, an aspect ratio within 3/4 to 4/3 that is uniform in its logarithm; ten
    attempts to fit, then the largest central region within those ratios (Szegedy et al. 2014, section 6).
    """
    for _ in range(CROP_ATTEMPTS):
        area, ratio, across, down = torch.rand(4).tolist()
        pixels = width * height * (scale[0] + area * (scale[1] - scale[0]))
        aspect = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 1 <= w <= width and 1 <= h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _batches(loader: DataLoader[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The batches; a worker's error, which comes with its traceback as the message, in one line."""
    try:
        yield from loader
    except UserError as error:
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("fastmae.errors.UserError: ")) from error


# --- the result ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Means over the seeds, and how sure their difference is."""

    ours: float
    official: float
    difference: float
    """Ours less the official loop's."""
    reach: float
    """Half of the width of the difference's 95 % interval."""

    @property
    def agrees(self) -> bool:
        return abs(self.difference) <= self.reach


def compare(ours: Sequence[float], official: Sequence[float]) -> Comparison:
    """Welch's interval of the difference of two means, of at least two samples each (Welch 1947)."""
    from scipy.stats import t

    a, b = (statistics.variance(side) / len(side) for side in (ours, official))
    reach = 0.0
    if a + b > 0:
        freedom = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(official) - 1))
        reach = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(a + b)
    mean, official_mean = statistics.fmean(ours), statistics.fmean(official)
    return Comparison(mean, official_mean, mean - official_mean, reach)


def _table(title: str, figures: Mapping[str, list[Figures]], result: Mapping[str, Comparison]) -> Table:
    rows = []
    for name, one in result.items():
        digits = DIGITS[name]
        sides = []
        for runs in figures.values():
            values = [run[name] for run in runs if name in run]  # untrained weights have no loss
            mean_and_deviation = (statistics.fmean(values), statistics.stdev(values)) if values else ()
            sides.append(" ± ".join(f"{value:.{digits}f}" for value in mean_and_deviation) or "–")
        low, high = one.difference - one.reach, one.difference + one.reach
        interval = f"{low:+.{digits}f} to {high:+.{digits}f}"
        agrees = "yes" if one.agrees else "no"
        rows.append((LABELS[name], *sides, f"{one.difference:+.{digits}f}", interval, agrees))
    columns = ("mean ± deviation over seeds", *figures, "difference", "95 % interval", "within the spread")
    return table(title, columns, rows)
