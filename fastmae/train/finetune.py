"""Fine-tuning, in the order in which it happens: settings, data, the encoder, resume, the loop, what is left behind.

It is the other loop that is composed of the parts of fastmae/train; pretraining is the first (pretrain.py).
"""

from __future__ import annotations

import dataclasses
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fastmae.checkpoint.load import Opened, open_checkpoint, own_data, read_settings
from fastmae.checkpoint.official import report
from fastmae.checkpoint.restore import Restored
from fastmae.checkpoint.save import training_tensors
from fastmae.config import (
    FIXED_IN_A_FINETUNING,
    FinetuneConfig,
    PretrainConfig,
    ResolvedFinetuneConfig,
    images_given,
    pixel_facts,
    read_as,
    resolve_finetune,
)
from fastmae.config.model import ModelSpec
from fastmae.config.shape import ENCODER_SHAPE
from fastmae.config.shared import ReadingConfig
from fastmae.data.augment import CHANNELS, BatchAugment, RandAugment, parse_randaugment
from fastmae.data.loader import Batch, View, default_workers, describe_decoder
from fastmae.data.plan import central_share
from fastmae.data.sample import crops_note
from fastmae.data.sources import (
    Source,
    Subset,
    class_names,
    describe,
    shown,
    train_and_val,
    with_known_classes,
    without_labels,
)
from fastmae.data.statistics import range_line
from fastmae.data.stock import RUN_LINES, joined
from fastmae.data.survey import take_stock
from fastmae.errors import SettingError
from fastmae.evaluate.pixels import measure_for
from fastmae.facts import UINT8
from fastmae.model.build import AnyClassifier, build_model, classifier_of, require_classifier
from fastmae.model.calls import calls_of
from fastmae.model.classifier import (
    ClassificationLoss,
    merge_lora,
    stochastic_depth_mask,
    tune,
)
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.pixels import normalised
from fastmae.model.sizes import beyond_preset, sizes_of
from fastmae.model.weight_copies import WeightCopies
from fastmae.ops.choices import Choices
from fastmae.ops.tuning import measured
from fastmae.signals import StopSignals
from fastmae.train import parallel
from fastmae.train.batches import BatchStream
from fastmae.train.choosing import choose
from fastmae.train.compiling import prepare_as_chosen
from fastmae.train.given import NOTHING, Given
from fastmae.train.optim import make_finetuning_optimizer
from fastmae.train.precision import Precision, choose_precision
from fastmae.train.recovery import data_seed, restore_attempt, roll_back, run_attempts
from fastmae.train.run import (
    Run,
    actions_after,
    close_run,
    collect_official,
    lacks_official,
    load,
    official_path,
    open_run,
    record_step,
    require_finite_weights,
    save_run,
    say_results,
    stop_run,
    training,
    try_to_write,
    write_official,
)
from fastmae.train.schedule import learning_rate_at, plan_steps
from fastmae.train.settings import (
    as_begun,
    describe_backends,
    identity,
    measure_pixels,
    reading_of,
    resolve_as_before,
    resolve_settings,
)
from fastmae.train.step import MicroBatch, PassGraph, require_graph, train_step

TOP = 5


def finetune(config: FinetuneConfig, given: Given = NOTHING) -> int:
    """Runs or continues a fine-tuning and returns the exit status: 0 when done, 75 when stopped by a signal.

    Args:
        config: the settings.
        given: what a program gives in place of the data that they name.

    Raises:
        UserError: settings, data or checkpoints that cannot work.
    """
    return run_attempts(_with_data(config), partial(_finetune, given))


def _finetune(given: Given, flags: FinetuneConfig, context: parallel.DistContext, stop: StopSignals) -> int | None:
    """Makes one attempt, from where --resume says to the end or a signal. Returns None after a rollback."""
    # Settings, data and encoder, the same on every rank: from here on nothing is left open.
    assert flags.data_path is not None
    with parallel.agreeing(context) as same:
        flags, train, val, encoder, lines = _open(flags, given, context)
        nb_classes = _classes(flags, train, val)
        val = with_known_classes(train, val)
        config, notes = resolve_as_before(flags, lambda flags: _resolve(flags, train, encoder, nb_classes, context))
        precision = _precision(config, context)
        steps = plan_steps(config, context.size, config.batch_size, "training images")
        randaugment = _randaugment(config)
        same |= identity(flags, config, {"train": train, "val": val}, encoder.model if flags.finetune else None)

    # Model, loss and optimiser, the same on every rank.
    model = _classifier(encoder, config).to(context.device)
    classification_loss = ClassificationLoss(model)
    config, compiling = _prepare(flags, config, classification_loss, model, precision, context)
    parallelism = parallel.choose_parallelism(config.parallel, config.reduce, config.shard_size, context, precision)
    loss_of = parallel.parallelize(classification_loss, context, parallelism)
    optimizer = make_finetuning_optimizer(model, config.lr, config.weight_decay, config.layer_decay)
    graph = PassGraph() if config.cuda_graph else None
    bf16 = WeightCopies(model) if precision.autocast == torch.bfloat16 else None

    # Where to begin.
    restored, rollbacks = restore_attempt(config, model, optimizer, steps, same, FIXED_IN_A_FINETUNING)
    chosen = _choose(model, config, context, precision, restored)
    backends = _backends(config, context, precision, parallelism, model, compiling, chosen)
    summary = [*_summary(config, train, val, model), *lines, *notes]
    run = open_run(config, given, context, stop, steps, restored, rollbacks, same, summary=summary, backends=backends)

    # The loop.
    stream = _stream(run, train, randaugment, model)
    unsaved = None
    with training(run, precision) as profile_step, closing(stream.steps(restored.step, steps.total)) as batches:
        for step, inputs in batches:
            lr = learning_rate_at(step, config, steps)
            autocast = precision.context(context.device)
            result = train_step(
                loss_of, optimizer, inputs, config.accum_iter, lr, autocast, config.clip_grad, context.mean, graph, bf16
            )
            record_step(run, step, result, lr)
            profile_step()
            if steps.ends_epoch(step):
                epoch = step // steps.per_epoch
                is_tested = epoch + 1 == config.epochs or (epoch + 1) % config.test_freq == 0
                run.log.end_epoch(epoch, _test(run, epoch, val, loss_of, autocast) if is_tested else {})

            actions = actions_after(run, step)
            if actions.rolls_back:
                roll_back(run, step, stream, model, loss_of, autocast)
                return None
            if actions.exports:
                unsaved = _export(run, step, model, optimizer)
            if actions.saves:
                save_run(run, step, model, training_tensors(model, optimizer))
            if actions.stops:
                return stop_run(run, step)
            run.watchdog.beat()

    # What is left behind.
    if lacks_official(run):
        unsaved = _export(run, steps.total - 1, model, optimizer)
    close_run(run, unsaved)
    say_results(run)
    return 0


# --- settings ---------------------------------------------------------------------------------------------------------


def _with_data(config: FinetuneConfig) -> FinetuneConfig:
    """Returns the settings with the data of the encoder's own run, if none were given."""
    if config.data_path is not None:
        return config
    if config.finetune:
        data = own_data(config.finetune, read_settings(config.finetune))
    else:
        data = "digits"
        report(
            "data_path", ["was not given, and there is no encoder with data of its own; the built-in digits are used"]
        )
    return dataclasses.replace(config, data_path=data)


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


def _open(
    flags: FinetuneConfig, given: Given, context: parallel.DistContext
) -> tuple[FinetuneConfig, Source, Source, Opened, tuple[str, ...]]:
    """Opens the encoder, and the data as it reads images. Returns the settings, with what it says of that, both parts
    of the data, the encoder, and lines about the value range."""
    flags = as_begun(flags)
    data = given.data or flags.data_path
    assert data is not None
    torch.manual_seed(flags.seed)
    preset = f"mae_{flags.model}" if flags.model and flags.model.startswith("vit_") else flags.model
    if not flags.finetune:
        train, val = train_and_val(data, read_as(flags))
        return flags, train, val, *_random_encoder(flags, preset, train, context)
    known = {"input_size": flags.input_size, "mean": flags.mean, "std": flags.std, **images_given(flags)}
    reading = ReadingConfig(model=preset, **known)
    encoder = open_checkpoint(flags.finetune, reading, resize=False)
    require_classifier(encoder.model)
    train, val = train_and_val(data, encoder.model.read_as)
    lines = measure_for(encoder, reading, train)
    if not lines and encoder.model.pixels != UINT8:
        lines = (range_line(encoder.model.pixels, "that of the encoder"),)
    flags = dataclasses.replace(flags, **images_given(flags, encoder.settings))
    return flags, train, val, encoder, lines


def _random_encoder(
    flags: FinetuneConfig, preset: str | None, train: Source, context: parallel.DistContext
) -> tuple[Opened, tuple[str, ...]]:
    """Returns the encoder of random weights with which a pretraining on these data would begin."""
    assert flags.data_path is not None
    alike = PretrainConfig(
        data_path=flags.data_path,
        model=preset,
        input_size=flags.input_size,
        patch_size=flags.patch_size,
        **{name: getattr(flags, name) for name in ENCODER_SHAPE},
        seed=flags.seed,
        mean=flags.mean,
        std=flags.std,
        **images_given(flags),
    )
    facts = describe(train, read_as=read_as(flags))
    measured = measure_pixels(alike, train, facts)
    pretraining = resolve_settings(alike, measured, facts, context.size, None)
    model = build_model(ModelSpec.of(pretraining))
    return Opened(model, {"model": pretraining.model}, has_decoder=False, kind="encoder"), measured.lines


def _resolve(
    flags: FinetuneConfig,
    train: Source,
    encoder: Opened,
    nb_classes: int,
    context: parallel.DistContext,
) -> ResolvedFinetuneConfig:
    """Fills in every default from the data, the encoder and the machine.

    Raises:
        UserError: settings that do not go together.
    """
    own: dict[str, Any] = {}
    shape: dict[str, Any] = {}
    if isinstance(encoder.model, MaskedAutoencoderViT):
        own = sizes_of(encoder.model).shape
        shape = beyond_preset(encoder.settings["model"], own)
    config = resolve_finetune(
        flags,
        describe(train, read_as=encoder.model.read_as),
        model=encoder.settings["model"],
        width=encoder.model.feature_dim,
        img_size=encoder.model.img_size,
        patch_size=encoder.model.patch_size,
        shape={name: value for name, value in shape.items() if name in ENCODER_SHAPE},
        pixels=encoder.model.pixels,
        other_types="convert" if encoder.model.read_as.converts else "skip",
        mean=tuple(encoder.model.mean.tolist()),
        std=tuple(encoder.model.std.tolist()),
        nb_classes=nb_classes,
        class_names=class_names(train) or (),
        ranks=context.size,
        num_workers=default_workers(),
        on_gpu=context.device.type == "cuda",
    )
    for name in ENCODER_SHAPE:
        if getattr(flags, name) not in (None, own.get(name)):
            its = f"{own[name]:g}" if name in own else "no such size"
            raise SettingError(name, getattr(flags, name), f"the encoder has {its}; leave it out")
    if flags.patch_size is not None and (flags.patch_size[0], flags.patch_size[-1]) != config.patch_size:
        pixels = "{}×{}".format(*config.patch_size)
        raise SettingError("patch_size", flags.patch_size, f"the encoder's patches have {pixels} pixels; leave it out")
    if config.batch_size % 2 and (config.mixup or config.cutmix):
        raise SettingError("batch_size", config.batch_size, "must be even with --mixup or --cutmix, which mix pairs")
    if config.warmup_epochs >= config.epochs:
        raise SettingError("warmup_epochs", config.warmup_epochs, f"must be below the {config.epochs} of --epochs")
    return config


def _randaugment(config: ResolvedFinetuneConfig) -> RandAugment | None:
    """Returns what changes the pixels of crops.

    Raises:
        SettingError: --aa is not what it must be, or is for other pixels.
    """
    if config.aa and pixel_facts(config) != UINT8:
        raise SettingError("aa", config.aa, "changes the colours of 8 bits alone; leave it empty for wider pixels")
    return parse_randaugment(config.aa, config.seed, config.mean)


def _precision(config: ResolvedFinetuneConfig, context: parallel.DistContext) -> Precision:
    """Returns the number format of the run.

    Raises:
        UserError: the device does not have it, or no CUDA graphs.
    """
    precision = choose_precision(config.precision, context.device)
    if config.cuda_graph:
        require_graph(context.device, context.size)
    return precision


def _choose(
    model: AnyClassifier,
    config: ResolvedFinetuneConfig,
    context: parallel.DistContext,
    precision: Precision,
    restored: Restored,
) -> str:
    """Sets what computes the calls of a step on a CPU. Returns what that is, and why, in lines."""

    def measure(anew: bool) -> Choices:
        return measured(calls_of(model, config.batch_size), precision.autocast or torch.float32, anew=anew)

    return choose(config.autotune, context.device, precision, restored, measure, context.any)


def _backends(
    config: ResolvedFinetuneConfig,
    context: parallel.DistContext,
    precision: Precision,
    parallelism: parallel.Parallelism,
    model: AnyClassifier,
    compiling: str,
    chosen: str,
) -> dict[str, str]:
    """Returns which implementation of each part is used."""
    decoding = describe_decoder("threads", "the one that augments", config.pixel_type)
    backends = describe_backends(context.device, precision, model.attention_shapes(), decoding)
    backends |= {"choice": chosen, "compile": compiling}
    backends["parallel"] = f"{parallelism.kind} ({parallelism.reason})"
    if config.cuda_graph:
        backends["cuda_graph"] = "forward and backward pass (asked for)"
    return backends


def _prepare(
    flags: FinetuneConfig,
    config: ResolvedFinetuneConfig,
    loss_of: ClassificationLoss,
    model: AnyClassifier,
    precision: Precision,
    context: parallel.DistContext,
) -> tuple[ResolvedFinetuneConfig, str]:
    """Applies --checkpointing and --compile. Returns the settings with the mode that works here, and why."""

    def inputs() -> MicroBatch:
        images, depth = config.batch_size, len(model.blocks)
        shape = images, config.in_chans, *config.input_size
        targets = torch.full((images, config.nb_classes), 1 / config.nb_classes, device=context.device)
        pixels = torch.zeros(shape, device=context.device)
        branches = torch.ones(depth, 2, images, device=context.device)
        return (pixels, targets, branches) if config.drop_path else (pixels, targets)

    return prepare_as_chosen(loss_of, flags.compile, config, inputs, precision, context.gather)


def _classifier(encoder: Opened, config: ResolvedFinetuneConfig) -> AnyClassifier:
    size = config.input_size
    try:
        model = classifier_of(encoder.model, config.nb_classes, img_size=size, global_pool=config.global_pool)
    except ValueError as error:
        raise SettingError("input_size", config.input_size, f"{error}; choose another size or --model") from error
    if encoder.head:
        _keep_head(model, encoder, config)
    try:
        tune(model, config.tune, config.lora_rank)
    except ValueError as error:
        raise SettingError("tune", config.tune, f"{error}; tune at most those, or use --tune=full") from error
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


# --- batches ----------------------------------------------------------------------------------------------------------


def _stream(
    run: Run[ResolvedFinetuneConfig], train: Source, randaugment: RandAugment | None, model: AnyClassifier
) -> BatchStream:
    """Returns the run's batches. Each rollback changes the seed of their order and of every augmentation."""
    config = run.config
    seed = data_seed(config.seed, len(run.rollbacks))
    view = View(
        config.input_size,
        reading_of(config),
        seed=seed,
        scale=config.crop_scale,
        flip=config.flip,
        augment=randaugment and dataclasses.replace(randaugment, seed=seed),
    )
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

    return BatchStream(run, train, seed=seed, crops=config.batch_size, view_of=lambda epoch: view, to_inputs=to_inputs)


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


# --- the run folder ---------------------------------------------------------------------------------------------------


def _export(
    run: Run[ResolvedFinetuneConfig], step: int, model: AnyClassifier, optimizer: torch.optim.Optimizer
) -> str | None:
    """Writes the official files after an epoch. Returns what could not be written, if anything. All ranks call it."""
    require_finite_weights(run, model, step)
    official = collect_official(run, model, optimizer)
    if not run.context.is_main:
        return None
    epoch, weights = step // run.steps.per_epoch, merge_lora(official.weights)
    path = official_path(run.folder, epoch)
    return try_to_write(lambda: write_official(path, weights, official.moments, epoch, run.config))


def _summary(config: ResolvedFinetuneConfig, train: Source, val: Source, model: AnyClassifier) -> list[str]:
    """Returns the lines about data, encoder, tuned parameters and batch with which a run begins."""
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, tuned = sum(count for count, _ in parameters), sum(count for count, trained in parameters if trained)
    height, width = config.input_size
    encoder = f"{config.finetune or 'random weights'}: {config.model}, {height}×{width}×{config.in_chans}"
    share = f"{tuned / 1e6:.2f} of {total / 1e6:.2f} M parameters"
    chosen = {name: getattr(config, name) for name in ("aa", "reprob", "mixup", "cutmix", "smoothing", "drop_path")}
    val_stock = val.stock if isinstance(val, Subset) else take_stock(val, config.in_chans, reading_of(config).read_as)
    stock = joined((take_stock(train, config.in_chans, reading_of(config).read_as), val_stock))
    note = crops_note(train, config.input_size)
    return [
        f"data            {shown(config.data_path)}: {len(train):,} to learn {train.location}, {len(val):,} to test",
        *(f"data            {line}" for line in stock.lines(RUN_LINES)),
        *([f"data            {note}"] if note else []),
        f"encoder         {encoder}",
        f"tuned           {config.tune}: {share}, {config.nb_classes} classes",
        f"batch           {config.global_batch} images per step, lr {config.lr:.2e}, {config.epochs} epochs",
        f"regularised by  {', '.join(f'{name} {value}' for name, value in chosen.items() if value) or 'nothing'}",
        *_without_randaugment(config, train),
    ]


def _without_randaugment(config: ResolvedFinetuneConfig, train: Source) -> list[str]:
    """Returns a line where the official script would change colours, and wider pixels than 8 bits prevent it."""
    if config.aa or train.kind != "folder" or config.in_chans not in CHANNELS or pixel_facts(config) == UINT8:
        return []
    return [
        f"note            RandAugment (--aa) is for uint8 images in 0 to 255, so none is used on {config.pixel_type}"
    ]
