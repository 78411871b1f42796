"""Fine-tuning, in the order in which it happens: settings, data, the encoder, resume, the loop, what is left behind.

The other story of the parts that pretraining is made of (fastmae/train/pretrain.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fastmae.checkpoint.load import open_checkpoint
from fastmae.checkpoint.restore import restore
from fastmae.checkpoint.save import training_tensors
from fastmae.config import (
    FIXED_IN_A_FINETUNING,
    FinetuneConfig,
    PretrainConfig,
    ResolvedFinetuneConfig,
    check_finetune,
    resolve_finetune,
)
from fastmae.config.model import ModelSpec
from fastmae.data.augment import BatchAugment, RandAugment, parse_randaugment
from fastmae.data.loader import Batch, View, default_workers, describe_decoder
from fastmae.data.sources import Concat, FolderSource, Source, describe, shown, train_and_val
from fastmae.errors import UserError
from fastmae.evaluate.features import FOLDER_SHARE
from fastmae.model.build import build_model
from fastmae.model.classifier import (
    ClassificationLoss,
    Classifier,
    classifier_of,
    merge_lora,
    stochastic_depth_mask,
    tune,
)
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.sharding import in_one_piece
from fastmae.train import parallel
from fastmae.train.health import StopSignals, data_seed
from fastmae.train.optim import make_finetuning_optimizer
from fastmae.train.precision import choose_precision
from fastmae.train.profile import profiled
from fastmae.train.run import (
    Feed,
    Run,
    Say,
    announce_beginning,
    as_json,
    begin,
    chosen_backends,
    close_run,
    end_step,
    go_back,
    known_detours,
    loader_of,
    official_path,
    open_run,
    plan_steps,
    rate_at,
    requests,
    require_finite_weights,
    resolve_settings,
    run_attempts,
    save_official_files,
    save_run,
    stop_run,
    taken,
    tell_quarantine,
    written,
)
from fastmae.train.step import MicroBatch, PassGraph, prepare, require_graph, train_step

TOP = 5


def finetune(config: FinetuneConfig) -> int:
    """Runs or continues a fine-tuning and returns the exit status: 0 when done, 75 when stopped by a signal.

    Raises:
        UserError: settings, data or checkpoints that cannot work.
    """
    check_finetune(config)
    return run_attempts(config, _finetune)


def _finetune(flags: FinetuneConfig, context: parallel.DistContext, stop: StopSignals) -> int | None:
    """One course: from where --resume says to the end, a signal, or (None) to where it is to go back and on again."""
    # Settings, data and encoder: from here on nothing is left open.
    train, val = train_and_val(flags.data_path)
    nb_classes = _classes(flags, train, val)
    torch.manual_seed(flags.seed)
    encoder, preset = _encoder(flags, train, context)
    config = resolve_finetune(
        flags,
        describe(train),
        model=preset,
        width=encoder.cls_token.shape[2],
        img_size=encoder.img_size,
        mean=tuple(encoder.mean.tolist()),
        std=tuple(encoder.std.tolist()),
        nb_classes=nb_classes,
        ranks=context.size,
        num_workers=default_workers(),
    )
    settings = as_json(config)
    precision = choose_precision(config.precision, context.device)
    if config.cuda_graph:
        require_graph(context.device, context.size)
    steps = plan_steps(config, context, config.batch_size, "training images")
    _check_batches(config)
    randaugment = parse_randaugment(config.aa, config.seed, config.mean)

    # Model and optimiser, the same on every rank.
    model = _classifier(encoder, config).to(context.device)
    depth = len(model.blocks)
    parallelism = parallel.choose_parallelism(config.parallel, config.reduce, config.shard_size, context)
    loss_alone = ClassificationLoss(model)
    prepare(loss_alone, config.checkpointing, config.compile)
    loss_of = parallel.parallelize(loss_alone, context, parallelism)
    optimizer = make_finetuning_optimizer(model, depth, config.lr, config.weight_decay, config.layer_decay)

    # Where to begin.
    restored = restore(
        config.resume,
        Path(config.output_dir),
        model,
        optimizer,
        fixed={key: settings[key] for key in FIXED_IN_A_FINETUNING},
        fresh_step=0,
        steps_per_epoch=steps.per_epoch,
    )
    detours = known_detours(Path(config.output_dir), restored)
    shapes = {"encoder": (model.num_patches + 1, model.head_dim)}
    backends = chosen_backends(context.device, precision, shapes, describe_decoder("threads", "the one that augments"))
    backends["parallel"] = f"{parallelism.kind} ({parallelism.reason})"
    if config.cuda_graph:
        backends["cuda_graph"] = "forward and backward pass (asked for)"
    run = open_run(config, settings, context, stop, steps, restored, detours, backends)
    if context.is_main:
        _announce(run.say, config, train, val, model)
        announce_beginning(run, restored, backends)
    begin(run, restored)

    # The loop.
    feed = _feed(run, config, train, randaugment, model)
    test = partial(_test, loader_of(run), val, config, loss_of, context)
    profiling = profiled(run.folder, config.profile, context.rank, context.device, run.say)
    graph = PassGraph() if config.cuda_graph else None
    unsaved = None
    batches = feed.batches_of(range(restored.step, steps.total))
    with run.screen, run.saver, run.watchdog, profiling as profile_step, precision.products(), closing(batches):
        for step in range(restored.step, steps.total):
            epoch, index = steps.epoch_and_index(step)
            lr = rate_at(step, config, steps)
            micro = feed.take(batches)
            autocast = precision.context(context.device)
            result = train_step(
                loss_of, optimizer, micro, config.accum_iter, lr, autocast, config.clip_grad, context.mean, graph
            )
            run.log.add(result, step=step + 1, epoch=epoch, lr=lr, images=config.global_batch)
            run.screen.update(step + 1, epoch, run.log.latest)
            run.watchdog.beat()
            profile_step()

            if index + 1 == steps.per_epoch:
                is_tested = epoch + 1 == config.epochs or (epoch + 1) % config.test_freq == 0
                results = test(autocast, run.watchdog.beat) if is_tested else {}
                run.log.end_epoch(epoch, results)
                if results:
                    run.say(f"epoch {epoch + 1:<9} {_shown(results)} on {len(val):,} images")
            end = end_step(run, step)
            if end.gives_up:
                go_back(run, end.done, feed, model, loss_of, autocast)
                return None
            if end.exports:
                require_finite_weights(run, model, end.done)
                unsaved = _export(run, epoch, model, optimizer)
            if end.saves:
                save_run(run, end.done, model, training_tensors(model, optimizer))
            if end.stops:
                return stop_run(run, end)
            run.watchdog.beat()

    # What is left behind.
    close_run(run, unsaved)
    if context.is_main:
        tell_quarantine(run)
        run.say(f"checkpoint      {official_path(run.folder, config.epochs - 1)}")
    context.barrier()
    return 0


# --- settings ---------------------------------------------------------------------------------------------------------


def _classes(flags: FinetuneConfig, train: Source, val: Source) -> int:
    """How many classes there are.

    Raises:
        UserError: no labels, other ones in the two parts, or too many for --nb_classes.
    """
    where = f"--data_path {shown(flags.data_path)}"
    if train.labels is None or val.labels is None:
        raise UserError(f"{where}: has no labels; give class folders, or arrays with labels")
    names = [_class_names(source) for source in (train, val)]
    if names[0] != names[1]:
        other = min(names[0] ^ names[1])
        raise UserError(f"{where}: its two parts have other class folders, such as {other}; make them the same")
    labels = np.concatenate([train.labels, val.labels])
    smallest, largest = int(labels.min()), int(labels.max())
    nb_classes = flags.nb_classes or largest + 1
    if not 0 <= smallest <= largest < nb_classes:
        remedy = f"number them from 0, or give --nb_classes {largest + 1}"
        raise UserError(
            f"{where}: has labels from {smallest} to {largest}, and there are {nb_classes} classes; {remedy}"
        )
    if nb_classes < 2:
        raise UserError(f"{where}: has one class alone; give data with at least two")
    return nb_classes


def _class_names(source: Source) -> set[str]:
    """Those of class folders, which are numbered by name; empty where labels are numbers by themselves."""
    parts = source.parts if isinstance(source, Concat) else (source,)
    return {name for part in parts if isinstance(part, FolderSource) for name in part.classes}


def _encoder(flags: FinetuneConfig, train: Source, context: parallel.DistContext) -> tuple[MaskedAutoencoderViT, str]:
    """The masked autoencoder whose encoder is tuned, and its preset: that of --finetune, or a fresh one."""
    preset = f"mae_{flags.model}" if flags.model and flags.model.startswith("vit_") else flags.model
    if flags.finetune:
        opened = open_checkpoint(flags.finetune, preset)
        return opened.model, opened.settings["model"]
    alike = PretrainConfig(data_path=flags.data_path, model=preset, input_size=flags.input_size, seed=flags.seed)
    chosen = resolve_settings(alike, train, describe(train), context, None)
    return build_model(ModelSpec.of(chosen)), chosen.model


def _classifier(encoder: MaskedAutoencoderViT, config: ResolvedFinetuneConfig) -> Classifier:
    size = " ".join(map(str, config.input_size))
    try:
        model = classifier_of(encoder, config.nb_classes, img_size=config.input_size, global_pool=config.global_pool)
    except ValueError as error:
        raise UserError(f"--input_size {size}: {error}; choose another size or --model") from error
    try:
        tune(model, config.tune, config.lora_rank)
    except ValueError as error:
        raise UserError(f"--tune {config.tune}: {error}; tune at most those, or use --tune full") from error
    return model


def _check_batches(config: ResolvedFinetuneConfig) -> None:
    if config.batch_size % 2 and (config.mixup or config.cutmix):
        raise UserError(f"--batch_size {config.batch_size}: must be even with --mixup or --cutmix, which mix pairs")
    if config.warmup_epochs >= config.epochs:
        raise UserError(f"--warmup_epochs {config.warmup_epochs:g}: must be below the {config.epochs} of --epochs")


# --- batches ----------------------------------------------------------------------------------------------------------


def _feed(
    run: Run, config: ResolvedFinetuneConfig, train: Source, randaugment: RandAugment | None, model: Classifier
) -> Feed:
    """The run's data, of the seed that they have after so many detours."""
    seed = data_seed(config.seed, len(run.detours))
    view = View(
        config.input_size,
        config.in_chans,
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
    requests_of = partial(requests, train, seed, config.batch_size, config.accum_iter, run.context, run.steps.per_epoch)
    load = loader_of(run)

    def batches_of(steps: Iterable[int]) -> Generator[Batch]:
        return load(train, requests_of(steps), view)

    take = partial(_micro_batches, run=run, config=config, source=train, augment=augment, model=model)
    return Feed(train, requests_of, batches_of, take)


def labels_of(source: Source, batch: Batch) -> torch.Tensor:
    """The labels int64 [N] of a batch of a source. That of an unusable image is the label of what took its place."""
    assert source.labels is not None
    indices = batch.draw_ids.numpy() % len(source)
    unusable = {bad.index for bad in batch.skipped}
    for place in range(len(indices)):
        while indices[place] in unusable:
            indices[place] = (indices[place] + 1) % len(source)
    return torch.from_numpy(source.labels[indices]).to(batch.images.device)


def _micro_batches(
    batches: Iterator[Batch],
    run: Run,
    config: ResolvedFinetuneConfig,
    source: Source,
    augment: BatchAugment,
    model: Classifier,
) -> Iterator[MicroBatch]:
    """One step's micro-batches as (images, targets), and which branches are kept if some are not."""
    for batch in taken(run, batches):
        draw_ids = batch.draw_ids.numpy()
        images, targets = augment(batch.images, labels_of(source, batch), draw_ids, model.mean, model.std)
        if config.drop_path:
            kept = stochastic_depth_mask(augment.seed, draw_ids, config.drop_path, len(model.blocks))
            yield images, targets, kept.to(images.device)
        else:
            yield images, targets


# --- testing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _test(
    load: Callable[..., Any],
    val: Source,
    config: ResolvedFinetuneConfig,
    loss_of: nn.Module,
    context: parallel.DistContext,
    autocast: torch.autocast,
    beat: Callable[[], None],
) -> dict[str, Any]:
    """Mean loss, top-1 and top-5 accuracy in percent on the val part, whose images the ranks share; central crops."""
    share = FOLDER_SHARE if val.kind == "folder" else 1.0
    view = View(config.input_size, config.in_chans, central_share=share)
    # As many batches on every rank, as sharded weights need all ranks; what is filled up does not count.
    mine = np.arange(context.rank, -(-len(val) // context.size) * context.size, context.size)
    pieces = [mine[start : start + config.batch_size] for start in range(0, len(mine), config.batch_size)]
    sums = torch.zeros(3, device=context.device, dtype=torch.float64)
    requests = ((piece % len(val), piece % len(val)) for piece in pieces)
    with closing(load(val, requests, view)) as batches, torch.compiler.set_stance("force_eager"):
        for piece, batch in zip(pieces, batches, strict=True):
            with autocast:
                logits = loss_of(batch.images)
            labels = labels_of(val, batch)
            found = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == labels[:, None]
            losses = F.cross_entropy(logits, labels, reduction="none")
            counts = torch.from_numpy(piece < len(val)).to(context.device)
            each = torch.stack([losses, found[:, 0].float(), found.any(dim=1).float()])
            sums += (each * counts).sum(dim=1)
            beat()
    if isinstance(loss_of, FSDPModule):
        loss_of.reshard()
    loss, first, among = (context.mean(sums) * context.size / len(val)).tolist()
    return {"test_loss": loss, "test_acc1": 100 * first, "test_acc5": 100 * among}


def _shown(results: dict[str, float]) -> str:
    top = f"top-1 {results['test_acc1']:.2f} %, top-{TOP} {results['test_acc5']:.2f} %"
    return f"{top}, loss {results['test_loss']:.4f}"


# --- the run folder ---------------------------------------------------------------------------------------------------


def _export(run: Run, epoch: int, model: Classifier, optimizer: torch.optim.Optimizer) -> str | None:
    """The published files after an epoch. Returns what could not be written, if anything; every rank calls it."""
    weights = in_one_piece(model.state_dict(), keep=run.context.is_main)
    moments = in_one_piece(optimizer.state_dict(), keep=run.context.is_main)

    def write() -> None:
        save_official_files(official_path(run.folder, epoch), merge_lora(weights), moments, epoch, run.settings)

    return written(write) if run.context.is_main else None


def _announce(
    say: Say,
    config: ResolvedFinetuneConfig,
    train: Source,
    val: Source,
    model: Classifier,
) -> None:
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    every, tuned = sum(count for count, _ in parameters), sum(count for count, trained in parameters if trained)
    height, width = config.input_size
    say(f"data            {shown(config.data_path)}: {len(train):,} to learn {train.location}, {len(val):,} to test")
    say(f"encoder         {config.finetune or 'random weights'}: {config.model}, {height}×{width}×{config.in_chans}")
    share = f"{tuned / 1e6:.2f} of {every / 1e6:.2f} M parameters"
    say(f"tuned           {config.tune}: {share}, {config.nb_classes} classes")
    say(f"batch           {config.global_batch} images a step, lr {config.lr:.2e}, {config.epochs} epochs")
    chosen = {name: getattr(config, name) for name in ("aa", "reprob", "mixup", "cutmix", "smoothing", "drop_path")}
    say(f"regularised by  {', '.join(f'{name} {value}' for name, value in chosen.items() if value) or 'nothing'}")
