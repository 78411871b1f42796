"""Classification: what ``fastmae finetune`` teaches an encoder. The loop is in finetune.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fastmae.checkpoint.load import Opened
from fastmae.checkpoint.official import report
from fastmae.config import (
    FIXED_IN_A_FINETUNING,
    FinetuneConfig,
    ResolvedFinetuneConfig,
    amounts_of,
    pixel_facts,
    resolve_finetune,
)
from fastmae.data.augment import CHANNELS, BatchAugment, RandAugment, parse_randaugment
from fastmae.data.few import with_few_labels
from fastmae.data.loader import Batch, View
from fastmae.data.plan import central_share
from fastmae.data.sources import (
    Parts,
    Source,
    class_names,
    describe,
    shown,
    train_and_val,
    with_known_classes,
    without_labels,
)
from fastmae.errors import SettingError
from fastmae.facts import UINT8, ReadAs
from fastmae.model.build import AnyClassifier, classifier_of, require_classifier
from fastmae.model.classifier import ClassificationLoss, stochastic_depth_mask
from fastmae.model.pixels import normalised
from fastmae.train import parallel
from fastmae.train.finetune import Task, choose_weights, known_of, tune_encoder
from fastmae.train.given import NOTHING, Given
from fastmae.train.run import Run, load
from fastmae.train.settings import reading_of
from fastmae.train.step import MicroBatch

TOP = 5


def finetune(config: FinetuneConfig, given: Given = NOTHING) -> int:
    """Runs or continues a fine-tuning, as ``tune_encoder`` does, and returns its exit status."""
    return tune_encoder(CLASSIFICATION, config, given)


# --- settings ---------------------------------------------------------------------------------------------------------


def _open_data(flags: FinetuneConfig, data: Parts | str | tuple[str, ...], reading: ReadAs) -> tuple[Source, Source]:
    train, val = train_and_val(data, reading)
    _classes(flags, train, val)
    val = with_known_classes(train, val)
    amounts = amounts_of(flags)
    if len(amounts) > 1 or flags.seeds:
        name = "seeds" if flags.seeds else "shots" if flags.shots else "label_share"
        raise SettingError(
            name, getattr(flags, name), "is for `fastmae finetune`; here a run has one number and one seed"
        )
    return (with_few_labels(train, amounts[0], flags.seed) if amounts else train), val


def _classes(flags: FinetuneConfig, train: Source, val: Source) -> int:
    """How many classes there are.

    Raises:
        UserError: no labels, other ones in the two parts, or too many for --nb_classes.
    """
    assert flags.data_path is not None
    where = shown(flags.data_path)
    if train.labels is None or val.labels is None:
        raise SettingError("data_path", where, without_labels(val if val.labels is None else train))
    names = [{*(class_names(source) or ())} for source in (train, val)]
    if names[0] != names[1]:
        other = min(names[0] ^ names[1])
        counts = f"{len(names[0] - names[1])} to learn alone and {len(names[1] - names[0])} to test alone"
        problem = f"its two parts have other class folders, such as {other} ({counts}); make them the same"
        raise SettingError("data_path", where, problem)
    labels = np.concatenate([train.labels, val.labels])
    smallest, largest = int(labels.min()), int(labels.max())
    nb_classes = flags.nb_classes or largest + 1
    if not 0 <= smallest <= largest < nb_classes:
        remedy = f"number them from 0, or give --nb_classes={largest + 1}"
        problem = f"has labels from {smallest} to {largest}, and there are {nb_classes} classes; {remedy}"
        raise SettingError("data_path", where, problem)
    if nb_classes < 2:
        raise SettingError("data_path", where, "has one class alone; give data with at least two")
    return nb_classes


def _resolve(
    flags: FinetuneConfig, train: Source, val: Source, encoder: Opened, context: parallel.DistContext
) -> ResolvedFinetuneConfig:
    config = resolve_finetune(
        flags,
        describe(train, read_as=encoder.model.read_as),
        nb_classes=_classes(flags, train, val),
        class_names=class_names(train) or (),
        **known_of(encoder, context),
    )
    if config.batch_size % 2 and (config.mixup or config.cutmix):
        raise SettingError("batch_size", config.batch_size, "must be even with --mixup or --cutmix, which mix pairs")
    _randaugment(config, config.seed)
    return config


def _randaugment(config: ResolvedFinetuneConfig, seed: int) -> RandAugment | None:
    """Returns what changes the pixels of crops.

    Raises:
        SettingError: --aa is not what it must be, or is for other pixels.
    """
    if config.aa and pixel_facts(config) != UINT8:
        raise SettingError("aa", config.aa, "changes the colours of 8 bits alone; leave it empty for wider pixels")
    return parse_randaugment(config.aa, seed, config.mean)


def _notes(config: ResolvedFinetuneConfig, train: Source) -> list[str]:
    chosen = {name: getattr(config, name) for name in ("aa", "reprob", "mixup", "cutmix", "smoothing", "drop_path")}
    regularised = ", ".join(f"{name} {value}" for name, value in chosen.items() if value) or "nothing"
    return [f"regularised by  {regularised}", *_without_randaugment(config, train)]


def _without_randaugment(config: ResolvedFinetuneConfig, train: Source) -> list[str]:
    """Returns a line where the official script would change colours, and wider pixels than 8 bits prevent it."""
    if config.aa or train.kind != "folder" or config.in_chans not in CHANNELS or pixel_facts(config) == UINT8:
        return []
    return [
        f"note            RandAugment (--aa) is for uint8 images in 0 to 255, so none is used on {config.pixel_type}"
    ]


# --- the model --------------------------------------------------------------------------------------------------------


def _classifier(encoder: Opened, config: ResolvedFinetuneConfig) -> AnyClassifier:
    size = config.input_size
    try:
        model = classifier_of(encoder.model, config.nb_classes, img_size=size, global_pool=config.global_pool)
    except ValueError as error:
        raise SettingError("input_size", config.input_size, f"{error}; choose another size or --model") from error
    if encoder.head:
        _keep_head(model, encoder, config)
    choose_weights(model, config)
    return model


def _keep_head(model: AnyClassifier, encoder: Opened, config: ResolvedFinetuneConfig) -> None:
    """Goes on with the head of a classifier where its classes are those of the data, and says what was done."""
    its, names = encoder.head["head.weight"].shape[0], tuple(encoder.settings.get("class_names") or ())
    if its != config.nb_classes:
        line = f"its head of {its} classes is left out, as the data have {config.nb_classes}"
    elif names and config.class_names and names != config.class_names:
        line = f"its head of {its} classes is left out, as the data have others, such as {_first_other(config, names)}"
    else:
        model.load_state_dict(encoder.head, strict=False)
        known = (
            "the data have the same classes" if names else "the data have as many classes, and it does not name its own"
        )
        line = f"its head of {its} classes is kept, as {known}"
    report(config.finetune, [line])


def _first_other(config: ResolvedFinetuneConfig, names: tuple[str, ...]) -> str:
    return min(set(names) ^ set(config.class_names))


def _example(model: AnyClassifier, config: ResolvedFinetuneConfig, device: torch.device) -> MicroBatch:
    images, depth = config.batch_size, len(model.blocks)
    shape = images, config.in_chans, *config.input_size
    targets = torch.full((images, config.nb_classes), 1 / config.nb_classes, device=device)
    pixels = torch.zeros(shape, device=device)
    branches = torch.ones(depth, 2, images, device=device)
    return (pixels, targets, branches) if config.drop_path else (pixels, targets)


# --- batches ----------------------------------------------------------------------------------------------------------


def _view(config: ResolvedFinetuneConfig, seed: int) -> View:
    return View(
        config.input_size,
        reading_of(config),
        seed=seed,
        scale=config.crop_scale,
        flip=config.flip,
        augment=_randaugment(config, seed),
    )


def _inputs(
    config: ResolvedFinetuneConfig, train: Source, model: AnyClassifier, seed: int
) -> Callable[[Batch], MicroBatch]:
    augment = BatchAugment(
        seed=seed,
        num_classes=config.nb_classes,
        smoothing=config.smoothing,
        reprob=config.reprob,
        mixup=config.mixup,
        cutmix=config.cutmix,
        switch=config.mixup_switch_prob,
    )

    def to_inputs(batch: Batch) -> MicroBatch:
        """Returns the images and targets, and with --drop_path the mask of the branches that are kept."""
        draw_ids = batch.draw_ids.numpy()
        images, targets = augment(batch.images, labels_of(train, batch), draw_ids, partial(normalised, model))
        if not config.drop_path:
            return images, targets
        branches = stochastic_depth_mask(seed, draw_ids, config.drop_path, len(model.blocks))
        return images, targets, branches.to(images.device)

    return to_inputs


def labels_of(source: Source, batch: Batch) -> torch.Tensor:
    """The labels int64 [N] of a batch of a source. That of an unusable image is the label of what took its place."""
    assert source.labels is not None
    indices = batch.draw_ids.numpy() % len(source)
    unusable = {bad.index for bad in batch.skipped}
    for place in range(len(indices)):
        while indices[place] in unusable:
            indices[place] = (indices[place] + 1) % len(source)
    return torch.from_numpy(source.labels[indices]).to(batch.images.device)


# --- testing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _test(
    run: Run[ResolvedFinetuneConfig], epoch: int, val: Source, loss_of: nn.Module, autocast: torch.autocast
) -> dict[str, float]:
    """Returns the mean loss, and the top-1 and top-5 accuracy in percent, of central crops of the val part.

    The ranks share the images, so all of them call it.
    """
    config, context = run.config, run.context
    share = central_share(val.kind, config.input_size)
    view = View(config.input_size, reading_of(config), central_share=share)
    # Every rank has as many batches, as sharded weights need all ranks; images that only fill up do not count.
    mine = np.arange(context.rank, -(-len(val) // context.size) * context.size, context.size)
    pieces = [mine[start : start + config.batch_size] for start in range(0, len(mine), config.batch_size)]
    sums = torch.zeros(3, device=context.device, dtype=torch.float64)
    requests = ((piece % len(val), piece % len(val)) for piece in pieces)
    with closing(load(run, val, requests, view)) as batches, torch.compiler.set_stance("force_eager"):
        for piece, batch in zip(pieces, batches, strict=True):
            with autocast:
                logits = loss_of(batch.images)
            labels = labels_of(val, batch)
            is_right = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == labels[:, None]
            losses = F.cross_entropy(logits, labels, reduction="none")
            counts = torch.from_numpy(piece < len(val)).to(context.device)
            scores = torch.stack([losses, is_right[:, 0].float(), is_right.any(dim=1).float()])
            sums += (scores * counts).sum(dim=1)
            run.watchdog.beat()
    if isinstance(loss_of, FSDPModule):
        loss_of.reshard()
    loss, top1, top5 = (context.mean(sums) * context.size / len(val)).tolist()
    top = f"top-1 {100 * top1:.2f} %, top-{TOP} {100 * top5:.2f} %"
    run.say(f"epoch {epoch + 1:<9} {top}, loss {loss:.4f} on {len(val):,} images")
    return {"test_loss": loss, "test_acc1": 100 * top1, "test_acc5": 100 * top5}


CLASSIFICATION = Task(
    built_in="digits",
    fixed=FIXED_IN_A_FINETUNING,
    require=require_classifier,
    open_data=_open_data,
    resolve=_resolve,
    model_of=_classifier,
    loss_of=lambda model, config: ClassificationLoss(model),
    example=_example,
    learns=lambda config: f"{config.nb_classes} classes",
    notes=_notes,
    view=_view,
    inputs=_inputs,
    test=_test,
)
