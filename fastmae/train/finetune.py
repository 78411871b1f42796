"""Fine-tuning, in the order in which it happens: settings, data, the encoder, resume, the loop, what is left behind.

The other story of the parts that pretraining is made of (fastmae/train/pretrain.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fastmae.config import (
    FIXED_IN_A_FINETUNING,
    FinetuneConfig,
    PretrainConfig,
    ResolvedFinetuneConfig,
    check_finetune,
    resolve_finetune,
)
from fastmae.data.augment import BatchAugment, parse_randaugment
from fastmae.data.loader import Batch, View, default_workers, describe_decoder, load_batches
from fastmae.data.plan import micro_batches, plan_epoch
from fastmae.data.quarantine import Quarantine
from fastmae.data.sources import Concat, FolderSource, Source, describe, shown, train_and_val
from fastmae.errors import UserError
from fastmae.evaluate.features import FOLDER_SHARE
from fastmae.model.classifier import ClassificationLoss, Classifier, classifier_of, kept_branches, merged, tune
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.official import build_model, save_official, save_weights
from fastmae.model.sharding import in_one_piece
from fastmae.ops.backends import using
from fastmae.train import parallel
from fastmae.train.allocator import keep_freed_memory
from fastmae.train.checkpoint import Saver, open_checkpoint, restore, set_aside_newer, training_tensors
from fastmae.train.health import (
    EXIT_INTERRUPTED,
    LossSpikes,
    StopSignals,
    Watchdog,
    first_not_finite,
    report_not_finite,
    require_finite,
    restart_hazard,
)
from fastmae.train.metrics import Screen, StepLog
from fastmae.train.optim import learning_rate, make_finetuning_optimizer
from fastmae.train.precision import choose_precision
from fastmae.train.pretrain import (
    MIN_CHECKPOINT_STEPS,
    NAMED_SAMPLES,
    Request,
    Say,
    chosen_backends,
    open_run_folder,
    resolve_settings,
)
from fastmae.train.sinks import check_sinks, open_sinks
from fastmae.train.step import MicroBatch, prepare, train_step

TOP = 5


def finetune(config: FinetuneConfig) -> int:
    """Runs or continues a fine-tuning and returns the exit status: 0 when done, 75 when stopped by a signal.

    Raises:
        UserError: settings, data or checkpoints that cannot work.
    """
    check_finetune(config)
    check_sinks(config.log_dir, config.wandb)
    world = parallel.start(config.device)
    if world.device.type == "cpu":
        keep_freed_memory()
    try:
        with using(ops=config.ops, attention=config.attention), StopSignals() as stop:
            return _finetune(config, world, stop)
    finally:
        parallel.stop(world)


def _finetune(flags: FinetuneConfig, world: parallel.World, stop: StopSignals) -> int:
    # Settings, data and encoder: from here on nothing is left open.
    train, val = train_and_val(flags.data_path)
    nb_classes = _classes(flags, train, val)
    facts = describe(train)
    torch.manual_seed(flags.seed)
    encoder, preset = _encoder(flags, train, world)
    config = resolve_finetune(
        flags,
        facts,
        model=preset,
        width=encoder.cls_token.shape[2],
        img_size=encoder.img_size,
        mean=tuple(encoder.mean.tolist()),
        std=tuple(encoder.std.tolist()),
        nb_classes=nb_classes,
        ranks=world.size,
        num_workers=default_workers(),
    )
    settings = json.loads(json.dumps(dataclasses.asdict(config)))  # as they look in a manifest
    precision = choose_precision(config.precision, world.device)
    of_a_rank = micro_batches(facts.length, config.batch_size, world.size, config.accum_iter)
    steps_per_epoch = of_a_rank // config.accum_iter
    _check_batches(config, world, steps_per_epoch)
    total_steps = config.epochs * steps_per_epoch
    checkpoint_freq = config.checkpoint_freq or steps_per_epoch * math.ceil(MIN_CHECKPOINT_STEPS / steps_per_epoch)
    run = Path(config.output_dir)
    view = View(
        config.input_size,
        config.in_chans,
        seed=config.seed,
        scale=config.crop_scale,
        flip=config.flip,
        augment=parse_randaugment(config.aa, config.seed, config.mean),
    )
    augment = BatchAugment(
        seed=config.seed,
        num_classes=config.nb_classes,
        smoothing=config.smoothing,
        reprob=config.reprob,
        mixup=config.mixup,
        cutmix=config.cutmix,
        switch=config.mixup_switch_prob,
    )

    # Model and optimiser, the same on every rank.
    model = _classifier(encoder, config).to(world.device)
    depth = len(model.blocks)
    sharing = parallel.choose_sharing(config.parallel, config.reduce, config.shard_size, world)
    loss_alone = ClassificationLoss(model)
    prepare(loss_alone, config.checkpointing, config.compile)
    loss_of = parallel.share(loss_alone, world, sharing)
    optimizer = make_finetuning_optimizer(model, depth, config.lr, config.weight_decay, config.layer_decay)

    # Where to begin.
    fixed = {key: settings[key] for key in FIXED_IN_A_FINETUNING}
    restored = restore(config.resume, run, model, optimizer, fixed=fixed, fresh_step=0, steps_per_epoch=steps_per_epoch)
    shapes = {"encoder": (model.num_patches + 1, model.head_dim)}
    backends = chosen_backends(world.device, precision, shapes, describe_decoder("pool", "the one that augments"))
    backends["parallel"] = f"{sharing.kind} ({sharing.reason})"
    world.barrier()  # every rank has looked before the first one writes
    screen = Screen(
        total_steps=total_steps,
        epochs=config.epochs,
        images_a_step=config.global_batch,
        start_step=restored.step,
        shows=world.is_first,
    )
    say = screen.say
    places = dict(log_dir=config.log_dir, wandb=config.wandb) if world.is_first else dict(log_dir=None, wandb=None)
    log = StepLog(
        run,
        device=world.device,
        log_freq=config.log_freq,
        rank=world.rank,
        ranks=world.size,
        mean_over_ranks=world.mean,
        num_workers=config.num_workers,
        spike_score=LossSpikes().score,
        sinks=open_sinks(run, **places, settings=settings, say=say),
        say=say,
    )
    if world.is_first:
        open_run_folder(run, settings, world, backends)
        _announce(say, config, train, val, backends, model)
        if restored.origin is not None:
            say(f"resumed         {restored.origin}, after step {restored.step}")
        if (hazard := restart_hazard()) is not None:
            say(f"restarts        {hazard} (docs/large-runs.md)")
        for path in set_aside_newer(run, restored.step):
            say(f"set aside       {path}, as the run goes on from before it; delete it when nobody needs it")
    log.resume(restored.step, restored.step // steps_per_epoch, restored.epoch_sums)
    world.barrier()

    # The loop.
    quarantine_name = "quarantine.jsonl" if world.size == 1 else f"quarantine-{world.rank}.jsonl"
    quarantine = Quarantine(run / quarantine_name, config.max_corrupt)
    load = partial(
        load_batches,
        device=world.device,
        num_workers=config.num_workers,
        pin_memory=config.pin_mem and world.device.type == "cuda",
    )
    requests_of = partial(_requests, train, config, world, steps_per_epoch)
    take = partial(
        _micro_batches, config=config, source=train, augment=augment, model=model, quarantine=quarantine, log=log
    )
    test = partial(_test, load, val, config, loss_of, world)
    saver = Saver(run, keep=config.keep, keep_every=None, background=config.async_save)
    unsaved = None
    asked_to_stop = parallel.Vote(world)
    watchdog = Watchdog(config.hang_timeout, run / f"hang-{world.rank}.txt", f"rank {world.rank}")
    batches = load(train, requests_of(range(restored.step, total_steps)), view)
    with screen, saver, watchdog, precision.products(), closing(batches):
        for step in range(restored.step, total_steps):
            epoch, index = divmod(step, steps_per_epoch)
            lr = learning_rate(
                epoch + index / steps_per_epoch,
                lr=config.lr,
                min_lr=config.min_lr,
                warmup_epochs=config.warmup_epochs,
                epochs=config.epochs,
            )
            autocast = precision.context(world.device)
            micro = take(batches)
            stepped = train_step(
                loss_of, optimizer, micro, config.accum_iter, lr, autocast, config.clip_grad, world.mean
            )
            done = step + 1
            log.add(stepped, step=done, epoch=epoch, lr=lr, images=config.global_batch)
            screen.update(done, epoch, log.latest)
            watchdog.beat()

            epoch_ends = index + 1 == steps_per_epoch
            if epoch_ends:
                is_last = epoch + 1 == config.epochs
                results = test(autocast, watchdog.beat) if is_last or (epoch + 1) % config.test_freq == 0 else {}
                log.end_epoch(epoch, results)
                if results:
                    say(f"epoch {epoch + 1:<9} {_shown(results)} on {len(val):,} images")
            stopping = asked_to_stop.any(stop.received is not None)
            saves = done % checkpoint_freq == 0 or done == total_steps or stopping
            if saves:
                log.sync()
            # Weights that made the last steps fail are no use to anybody, so nothing is saved until one succeeds.
            failing = log.skipped_in_a_row > 0
            if log.skipped_in_a_row >= config.max_skipped or (failing and done == total_steps):
                first = done - log.skipped_in_a_row
                names = [train.name(i) for i in next(iter(requests_of([first])))[0][:NAMED_SAMPLES].tolist()]
                again = partial(_losses, loss_of, partial(load, train, view=view), partial(requests_of, [first]), take)
                place = first_not_finite(model, partial(again, autocast), world.any)
                log.close()
                saver.wait()
                remedy = "lower --blr (or use --precision fp32), then continue with --resume auto"
                raise UserError(f"{report_not_finite(first + 1, done, place, names)}: {remedy}")
            if epoch_ends and not failing and (epoch % config.save_freq == 0 or epoch + 1 == config.epochs):
                require_finite(parallel.witness(model.parameters(), world), done)
                unsaved = _export(run, epoch, settings, model, optimizer, world)
            if saves and not failing:
                require_finite(parallel.witness(model.parameters(), world), done)
                saver.save(
                    done, training_tensors(model, optimizer), {"settings": settings, "epoch_sums": log.epoch_sums}
                )
            if stopping and done < total_steps:
                saver.finish()
                log.close()
                why = stop.received or "a signal to another rank"
                saved = "which was skipped, so an earlier one is saved" if failing else "which is saved"
                say(f"stopped         by {why} after step {done}, {saved}; continue with --resume auto")
                return EXIT_INTERRUPTED
            watchdog.beat()

    # What is left behind.
    saver.finish()
    log.close()
    if world.any(unsaved is not None):
        raise UserError(unsaved or "the first rank could not save all that it should; its last line says what")
    if world.is_first:
        if len(quarantine):
            say(f"skipped         {len(quarantine)} unusable images, listed in {quarantine.path}")
        say(f"checkpoint      {_official_path(run, config.epochs - 1)}")
    world.barrier()
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


def _encoder(flags: FinetuneConfig, train: Source, world: parallel.World) -> tuple[MaskedAutoencoderViT, str]:
    """The masked autoencoder whose encoder is tuned, and its preset: that of --finetune, or a fresh one."""
    preset = f"mae_{flags.model}" if flags.model and flags.model.startswith("vit_") else flags.model
    if flags.finetune:
        opened = open_checkpoint(flags.finetune, preset)
        return opened.model, opened.settings["model"]
    alike = PretrainConfig(data_path=flags.data_path, model=preset, input_size=flags.input_size, seed=flags.seed)
    chosen = resolve_settings(alike, train, describe(train), world, None)
    return build_model(dataclasses.asdict(chosen)), chosen.model


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


def _check_batches(config: ResolvedFinetuneConfig, world: parallel.World, steps_per_epoch: int) -> None:
    if steps_per_epoch < 1:
        size = f"--batch_size {config.batch_size}"
        size += f" × --accum_iter {config.accum_iter}" if config.accum_iter > 1 else ""
        size += f" × {world.size} ranks" if world.size > 1 else ""
        fits = config.dataset_length // (config.accum_iter * world.size)
        remedy = f"lower --batch_size to at most {fits}" if fits else "lower --accum_iter or the ranks"
        given = f"the {config.dataset_length} training images of {shown(config.data_path)}"
        raise UserError(f"{size} is more than {given}; {remedy}")
    if config.batch_size % 2 and (config.mixup or config.cutmix):
        raise UserError(f"--batch_size {config.batch_size}: must be even with --mixup or --cutmix, which mix pairs")
    if config.warmup_epochs >= config.epochs:
        raise UserError(f"--warmup_epochs {config.warmup_epochs:g}: must be below the {config.epochs} of --epochs")


# --- batches ----------------------------------------------------------------------------------------------------------


def _requests(
    source: Source, config: ResolvedFinetuneConfig, world: parallel.World, steps_per_epoch: int, steps: Iterable[int]
) -> Iterator[Request]:
    """The micro-batches of the steps, each epoch planned when it is reached."""
    plan = None
    for step in steps:
        epoch, index = divmod(step, steps_per_epoch)
        if plan is None or plan.epoch != epoch:
            plan = plan_epoch(
                config.seed, epoch, len(source), config.batch_size, world.rank, world.size, source.stretches
            )
        for micro in range(config.accum_iter):
            yield plan.batch(index * config.accum_iter + micro)


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
    config: ResolvedFinetuneConfig,
    source: Source,
    augment: BatchAugment,
    model: Classifier,
    quarantine: Quarantine,
    log: StepLog,
) -> Iterator[MicroBatch]:
    """One step's micro-batches as (images, targets), and which branches are kept if some are not."""
    for _ in range(config.accum_iter):
        batch = next(batches)
        log.loading.add(batch)
        quarantine.add(batch.skipped, good=len(batch.images))
        draw_ids = batch.draw_ids.numpy()
        images, targets = augment(batch.images, labels_of(source, batch), draw_ids, model.mean, model.std)
        if config.drop_path:
            kept = kept_branches(config.seed, draw_ids, config.drop_path, len(model.blocks))
            yield images, targets, kept.to(images.device)
        else:
            yield images, targets


def _losses(
    loss_of: nn.Module,
    load: Callable[..., Any],
    requests: Callable[[], Iterator[Request]],
    take: Callable[[Iterator[Batch]], Iterator[MicroBatch]],
    autocast: torch.autocast,
) -> Iterator[torch.Tensor]:
    """The losses of the micro-batches of one step."""
    with closing(load(requests=requests())) as batches:
        for micro_batch in take(batches):
            with autocast:
                loss = loss_of(*micro_batch)
            yield loss


# --- testing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _test(
    load: Callable[..., Any],
    val: Source,
    config: ResolvedFinetuneConfig,
    loss_of: nn.Module,
    world: parallel.World,
    autocast: torch.autocast,
    beat: Callable[[], None],
) -> dict[str, Any]:
    """Mean loss, top-1 and top-5 accuracy in percent on the val part, whose images the ranks share; central crops."""
    share = FOLDER_SHARE if val.kind == "folder" else 1.0
    view = View(config.input_size, config.in_chans, central_share=share)
    # As many batches on every rank, as sharded weights need all ranks; what is filled up does not count.
    mine = np.arange(world.rank, -(-len(val) // world.size) * world.size, world.size)
    pieces = [mine[start : start + config.batch_size] for start in range(0, len(mine), config.batch_size)]
    sums = torch.zeros(3, device=world.device, dtype=torch.float64)
    requests = ((piece % len(val), piece % len(val)) for piece in pieces)
    with closing(load(val, requests, view)) as batches, torch.compiler.set_stance("force_eager"):
        for piece, batch in zip(pieces, batches, strict=True):
            with autocast:
                logits = loss_of(batch.images)
            labels = labels_of(val, batch)
            found = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == labels[:, None]
            losses = F.cross_entropy(logits, labels, reduction="none")
            counts = torch.from_numpy(piece < len(val)).to(world.device)
            each = torch.stack([losses, found[:, 0].float(), found.any(dim=1).float()])
            sums += (each * counts).sum(dim=1)
            beat()
    if isinstance(loss_of, FSDPModule):
        loss_of.reshard()
    loss, first, among = (world.mean(sums) * world.size / len(val)).tolist()
    return {"test_loss": loss, "test_acc1": 100 * first, "test_acc5": 100 * among}


def _shown(results: dict[str, float]) -> str:
    top = f"top-1 {results['test_acc1']:.2f} %, top-{TOP} {results['test_acc5']:.2f} %"
    return f"{top}, loss {results['test_loss']:.4f}"


# --- the run folder ---------------------------------------------------------------------------------------------------


def _official_path(run: Path, epoch: int) -> Path:
    return run / f"checkpoint-{epoch}.pth"


def _export(
    run: Path,
    epoch: int,
    settings: dict[str, Any],
    model: Classifier,
    optimizer: torch.optim.Optimizer,
    world: parallel.World,
) -> str | None:
    """The published files after an epoch. Returns what could not be written, if anything; every rank calls it."""
    weights = in_one_piece(model.state_dict(), keep=world.is_first)
    moments = in_one_piece(optimizer.state_dict(), keep=world.is_first)
    if not world.is_first:
        return None
    try:
        path = _official_path(run, epoch)
        plain = merged(weights)
        save_official(path, plain, moments, epoch, settings)
        save_weights(path.with_suffix(".safetensors"), plain, epoch, settings)
    except UserError as error:
        print(f"fastmae: {error}; the run goes on", file=sys.stderr, flush=True)
        return str(error)
    return None


def _announce(
    say: Say,
    config: ResolvedFinetuneConfig,
    train: Source,
    val: Source,
    backends: dict[str, str],
    model: Classifier,
) -> None:
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    every, tuned = sum(count for count, _ in parameters), sum(count for count, trained in parameters if trained)
    height, width = config.input_size
    say(f"data            {shown(config.data_path)}: {len(train):,} to learn {train.found}, {len(val):,} to test")
    say(f"encoder         {config.finetune or 'random weights'}: {config.model}, {height}×{width}×{config.in_chans}")
    share = f"{tuned / 1e6:.2f} of {every / 1e6:.2f} M parameters"
    say(f"tuned           {config.tune}: {share}, {config.nb_classes} classes")
    say(f"batch           {config.global_batch} images a step, lr {config.lr:.2e}, {config.epochs} epochs")
    chosen = {name: getattr(config, name) for name in ("aa", "reprob", "mixup", "cutmix", "smoothing", "drop_path")}
    say(f"regularised by  {', '.join(f'{name} {value}' for name, value in chosen.items() if value) or 'nothing'}")
    for name, choice in backends.items():
        say(f"{name:15} {choice}")
