"""Segmentation: what ``fastmae segment`` teaches an encoder. The loop is in finetune.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fastmae.checkpoint.load import Opened
from fastmae.config import FIXED_IN_A_SEGMENTATION, ResolvedSegmentConfig, SegmentConfig, resolve_segment
from fastmae.data.distort import Distortion
from fastmae.data.label_maps import MappedSource, MapReading, count_classes, open_pairs
from fastmae.data.loader import Batch, View
from fastmae.data.sources import Parts, Source, describe, shown
from fastmae.errors import SettingError, UserError
from fastmae.evaluate.pictures import save_png
from fastmae.evaluate.segment import confusion_of, lines_of, overlay_grid, scores_of
from fastmae.facts import ReadAs
from fastmae.model.classifier import stochastic_depth_mask
from fastmae.model.family import MaskedModel
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.segmenter import SegmentationLoss, Segmenter, segmenter_of
from fastmae.train import parallel
from fastmae.train.finetune import Task, choose_weights, known_of, tune_encoder
from fastmae.train.given import NOTHING, Given
from fastmae.train.run import Run, load
from fastmae.train.settings import reading_of
from fastmae.train.step import MicroBatch

PICTURES = 8
"""So many images of the val part are drawn with what the model says of them."""


def segment(config: SegmentConfig, given: Given = NOTHING) -> int:
    """Runs or continues the training of a segmenter, as ``tune_encoder`` does, and returns its exit status."""
    return tune_encoder(SEGMENTATION, config, given)


# --- settings ---------------------------------------------------------------------------------------------------------


def _require(model: MaskedModel) -> None:
    if not isinstance(model, MaskedAutoencoderViT):
        raise UserError(
            f"an encoder of the family {model.family} gives no tokens that a head could look at; segment with mae_vit_*"
        )


def _open_data(
    flags: SegmentConfig, data: Parts | str | tuple[str, ...], reading: ReadAs
) -> tuple[MappedSource, MappedSource]:
    return open_pairs(data, reading)


def _names(flags: SegmentConfig, train: MappedSource) -> tuple[str, ...]:
    return flags.classes or train.classes


def _num_classes(flags: SegmentConfig, train: MappedSource) -> int:
    """How many classes there are: as many as have names, or as the label maps say.

    Raises:
        SettingError: fewer than two, or fewer names than the label maps have numbers.
    """
    names, found = _names(flags, train), count_classes(train, _map_reading(flags))
    if names and found > len(names):
        problem = f"has label maps with class {found - 1}, and there are {len(names)} names"
        remedy = "number them from 0, name all with --classes, or leave a number out with --ignore_index"
        raise SettingError("data_path", shown(flags.data_path or ""), f"{problem}; {remedy}")
    if max(found, len(names)) < 2:
        raise SettingError("data_path", shown(flags.data_path or ""), "has label maps of one class; at least two count")
    return len(names) or found


def _map_reading(config: SegmentConfig) -> MapReading:
    reading = MapReading(ignore_index=config.ignore_index, reduce_zero_label=config.reduce_zero_label)
    return replace(reading, num_classes=config.num_classes) if isinstance(config, ResolvedSegmentConfig) else reading


def _resolve(
    flags: SegmentConfig, train: Source, val: Source, encoder: Opened, context: parallel.DistContext
) -> ResolvedSegmentConfig:
    assert isinstance(train, MappedSource)
    return resolve_segment(
        flags,
        describe(train, read_as=encoder.model.read_as),
        is_built_in=flags.data_path in ("shapes", ("shapes",)),
        num_classes=_num_classes(flags, train),
        class_names=_names(flags, train),
        **known_of(encoder, context),
    )


def _notes(config: ResolvedSegmentConfig, train: Source) -> list[str]:
    low, high = config.random_scale
    chosen = {"flip": config.flip, "distortion": config.distortion, "drop_path": config.drop_path}
    others = "".join(f", {name} {value}" for name, value in chosen.items() if value)
    return [f"head            {config.segmenter_head}", f"crops           zoom {low:g} to {high:g}{others}"]


# --- the model --------------------------------------------------------------------------------------------------------


def _model_of(encoder: Opened, config: ResolvedSegmentConfig) -> Segmenter:
    assert isinstance(encoder.model, MaskedAutoencoderViT)
    try:
        model = segmenter_of(encoder.model, config.num_classes, config.segmenter_head, img_size=config.input_size)
    except ValueError as error:
        raise SettingError("input_size", config.input_size, f"{error}; choose another size or --model") from error
    choose_weights(model, config)
    return model


def _example(model: Segmenter, config: ResolvedSegmentConfig, device: torch.device) -> MicroBatch:
    images, size = config.batch_size, config.input_size
    pixels = torch.zeros(images, *size, config.in_chans, device=device, dtype=getattr(torch, config.pixel_type))
    maps = torch.zeros(images, *size, device=device, dtype=torch.uint8)
    branches = torch.ones(len(model.blocks), 2, images, device=device)
    return (pixels, maps, branches) if config.drop_path else (pixels, maps)


# --- batches ----------------------------------------------------------------------------------------------------------


def _view(config: ResolvedSegmentConfig, seed: int) -> View:
    return View(
        config.input_size,
        reading_of(config),
        seed=seed,
        flip=config.flip,
        random_scale=config.random_scale,
        maps=_map_reading(config),
        augment=Distortion(seed) if config.distortion else None,
    )


def _inputs(config: ResolvedSegmentConfig, train: Source, model: Segmenter, seed: int) -> Callable[[Batch], MicroBatch]:
    def to_inputs(batch: Batch) -> MicroBatch:
        """Returns the images and label maps, and with --drop_path the mask of the branches that are kept."""
        assert batch.maps is not None
        if not config.drop_path:
            return batch.images, batch.maps
        branches = stochastic_depth_mask(seed, batch.draw_ids.numpy(), config.drop_path, len(model.blocks))
        return batch.images, batch.maps, branches.to(batch.images.device)

    return to_inputs


# --- testing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _test(
    run: Run[ResolvedSegmentConfig], epoch: int, val: Source, loss_of: nn.Module, autocast: torch.autocast
) -> dict[str, float]:
    """Returns the mean IoU and the accuracy of pixels, in percent, on the central regions of the val part.

    The ranks share the images, so all of them call it. After the last epoch the main rank also shows every class, and
    draws some images.
    """
    config, context = run.config, run.context
    view = View(config.input_size, reading_of(config), maps=_map_reading(config))
    # Every rank has as many batches, as sharded weights need all ranks; images that only fill up do not count.
    mine = np.arange(context.rank, -(-len(val) // context.size) * context.size, context.size)
    pieces = [mine[start : start + config.batch_size] for start in range(0, len(mine), config.batch_size)]
    confusion = torch.zeros(config.num_classes, config.num_classes, device=context.device, dtype=torch.float64)
    drawn: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    requests = ((piece % len(val), piece % len(val)) for piece in pieces)
    loss_of.eval()  # a head with BatchNorm learns nothing from what it is tested on
    with closing(load(run, val, requests, view)) as batches, torch.compiler.set_stance("force_eager"):
        for piece, batch in zip(pieces, batches, strict=True):
            assert batch.maps is not None
            with autocast:
                found = loss_of(batch.images).argmax(dim=1)
            counts = torch.from_numpy(piece < len(val)).to(context.device)
            confusion += confusion_of(found[counts], batch.maps[counts], config.num_classes)
            if context.is_main and len(drawn) < PICTURES:
                drawn += zip(batch.images.cpu().numpy(), batch.maps.cpu().numpy(), found.cpu().numpy(), strict=True)
            run.watchdog.beat()
    loss_of.train()
    if isinstance(loss_of, FSDPModule):
        loss_of.reshard()
    scores = scores_of((context.mean(confusion) * context.size).round().cpu().numpy())
    run.say(f"epoch {epoch + 1:<9} mIoU {scores.miou:.2f} %, accuracy {scores.accuracy:.2f} % on {len(val):,} images")
    if epoch + 1 == config.epochs:
        for line in lines_of(scores, config.classes):
            run.say(line)
        if context.is_main:
            path = run.folder / "segmented.png"
            save_png(path, overlay_grid(drawn[:PICTURES], config.num_classes))
            run.say(f"pictures        {path}")
    of_classes = {f"test_iou_{number}": iou for number, iou in enumerate(scores.iou) if iou == iou}
    return {"test_miou": scores.miou, "test_accuracy": scores.accuracy, **of_classes}


SEGMENTATION = Task(
    built_in="shapes",
    fixed=FIXED_IN_A_SEGMENTATION,
    require=_require,
    open_data=_open_data,
    resolve=_resolve,
    model_of=_model_of,
    loss_of=lambda model, config: SegmentationLoss(model),
    example=_example,
    learns=lambda config: f"{config.num_classes} classes of pixels",
    notes=_notes,
    view=_view,
    inputs=_inputs,
    test=_test,
)
