"""Pretraining, in the order in which it happens: settings, data, model, resume, the loop, and what is left behind."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmae.config import (
    FIXED_IN_A_RUN,
    PROBE_LIMIT,
    DataFacts,
    PretrainConfig,
    ResolvedConfig,
    check_pretrain,
    resolve,
)
from fastmae.data.cache import CachedSource, cached, describe_cache, memory_budget
from fastmae.data.decode import FOLDER_CHANNELS
from fastmae.data.loader import Batch, View, choose_decoder, default_workers, describe_decoder, load_batches
from fastmae.data.masks import MaskFile, Masks, choose_masks, open_masks, shuffled_ids
from fastmae.data.plan import mask_draws, micro_batches, plan_epoch
from fastmae.data.quarantine import Quarantine
from fastmae.data.sizes import Size, describe_sizes, growing_sizes, size_in
from fastmae.data.sources import Source, Subset, describe, evenly_spaced, open_train, shown, train_and_val
from fastmae.data.statistics import channel_statistics
from fastmae.environment import hardware, peak_flops, versions
from fastmae.errors import UserError
from fastmae.evaluate.probe import probe
from fastmae.evaluate.reconstruct import caption, fixed_images, reconstruct, save_grid
from fastmae.files import write_text
from fastmae.model.flops import flops_per_image
from fastmae.model.mae import IMAGENET_MEAN, IMAGENET_STD, MaskedAutoencoderViT
from fastmae.model.official import build_model, save_official, save_weights
from fastmae.model.sharding import in_one_piece, is_sharded
from fastmae.ops.attention import attention_backend
from fastmae.ops.backends import asked_backends, describe_ops, using
from fastmae.ops.linear import describe_linear
from fastmae.train import parallel
from fastmae.train.allocator import keep_freed_memory
from fastmae.train.average import Average, in_checkpoint, start_average, update_average
from fastmae.train.checkpoint import (
    MANIFEST,
    Saver,
    find_checkpoint,
    on_first,
    restore,
    set_aside_newer,
    training_tensors,
)
from fastmae.train.health import (
    EXIT_INTERRUPTED,
    LossSpikes,
    StopSignals,
    Watchdog,
    data_seed,
    first_not_finite,
    read_detours,
    report_not_finite,
    require_finite,
    restart_hazard,
    write_detours,
)
from fastmae.train.metrics import Screen, StepLog
from fastmae.train.optim import learning_rate, make_optimizer
from fastmae.train.precision import Precision, choose_precision, require_float8
from fastmae.train.profile import profiled
from fastmae.train.sinks import Sink, check_sinks, open_sinks
from fastmae.train.step import PassGraph, TrainingLoss, prepare, require_graph, train_step

PICTURE_IMAGES = 8
MIN_CHECKPOINT_STEPS = 300
NAMED_SAMPLES = 8
PROBE_RUN = 100

Say = Callable[[str], None]
Request = tuple[np.ndarray, np.ndarray]


def pretrain(config: PretrainConfig) -> int:
    """Runs or continues a pretraining and returns the exit status: 0 when done, 75 when stopped by a signal.

    Raises:
        UserError: settings, data or checkpoints that cannot work.
    """
    check_pretrain(config)
    check_sinks(config.log_dir, config.wandb)
    world = parallel.start(config.device)
    if world.device.type == "cpu":
        keep_freed_memory()
    try:
        with using(ops=config.ops, attention=config.attention), StopSignals() as stop:
            while (status := _pretrain(config, world, stop)) is None:
                config = dataclasses.replace(config, resume="auto")
            return status
    finally:
        parallel.stop(world)


def _pretrain(flags: PretrainConfig, world: parallel.World, stop: StopSignals) -> int | None:
    """One course: from where --resume says to the end, a signal, or (None) to where it is to go back and on again."""
    # Settings and data: from here on nothing is left open.
    source = open_train(flags.data_path)
    facts = describe(source)
    mask_file = open_masks(flags.masks, flags.mask_ratio)
    config = resolve_settings(flags, source, facts, world, mask_file)
    settings = _as_json(config)
    probed = _probed_parts(config) if config.probe_freq is not None else None
    precision = choose_precision(config.precision, world.device)
    if config.residual == "bf16" and precision.autocast is None:
        raise UserError(f"--residual bf16: goes with --precision bf16, not {precision.name}; leave one out")
    if config.float8:
        require_float8(world.device, precision)
    if config.cuda_graph:
        require_graph(world.device, world.size)
    decoder, why_decoder = choose_decoder(config.decoder, world.device, source, config.in_chans)
    if config.cache == "ram":
        source = cached(source, config.in_chans, memory_budget(config.cache_gb, parallel.ranks_here()), decoder)
    crops = config.batch_size // config.repeated_masks
    of_a_rank = micro_batches(facts.length, crops, world.size, config.accum_iter, config.keep_last)
    steps_per_epoch = of_a_rank // config.accum_iter  # the same for every split of the global batch
    _check_batches(config, world, steps_per_epoch)
    total_steps = config.epochs * steps_per_epoch
    checkpoint_freq = config.checkpoint_freq or steps_per_epoch * math.ceil(MIN_CHECKPOINT_STEPS / steps_per_epoch)
    run = Path(config.output_dir)

    # Model and optimiser, the same on every rank.
    torch.manual_seed(config.seed)
    model = _model(settings, config).to(world.device)
    model.autocast_residual = config.residual == "bf16"
    sizes = _sizes(config, model)
    model.allow_sizes(sizes)
    sharing = parallel.choose_sharing(config.parallel, config.reduce, config.shard_size, world)
    loss_alone = TrainingLoss(model, config.mask_ratio, config.predict_ratio)
    prepare(loss_alone, config.checkpointing, config.compile, len(sizes), config.float8)
    loss_of = parallel.share(loss_alone, world, sharing)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    masks_of = {size: _masks(config, model, size, mask_file) for size in sizes}

    # Where to begin.
    restored = restore(
        config.resume,
        run,
        model,
        optimizer,
        fixed={key: settings[key] for key in FIXED_IN_A_RUN},
        fresh_step=config.start_epoch * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
    )
    detours = read_detours(run, restored.step, Path(restored.origin) / MANIFEST if restored.origin else None)
    seed = data_seed(config.seed, len(detours))
    average = start_average(model, restored.origin) if config.ema is not None else {}
    decoding = describe_decoder(decoder, why_decoder)
    backends = chosen_backends(world.device, precision, model.attention_shapes(config.mask_ratio), decoding)
    backends["parallel"] = f"{sharing.kind} ({sharing.reason})"
    if config.float8:
        backends["float8"] = f"products of the blocks (torchao {version('torchao')})"
    if config.cuda_graph:
        backends["cuda_graph"] = "forward and backward pass (asked for)"
    if isinstance(source, CachedSource):
        backends["cache"] = describe_cache(source)
    world.barrier()  # every rank has looked before the first one writes
    screen = Screen(
        total_steps=total_steps,
        epochs=config.epochs,
        images_a_step=config.global_batch,
        start_step=restored.step,
        shows=world.is_first,
    )
    say = screen.say
    log = StepLog(
        run,
        device=world.device,
        log_freq=config.log_freq,
        rank=world.rank,
        ranks=world.size,
        mean_over_ranks=world.mean,
        num_workers=config.num_workers,
        spike_score=LossSpikes().score,
        sinks=_sinks(run, config, settings, world, say),
        say=say,
    )
    if world.is_first:
        open_run_folder(run, settings, world, backends)
        _announce(say, config, facts, backends, model, masks_of)
        if restored.origin is not None:
            say(f"resumed         {restored.origin}, after step {restored.step}")
        if (hazard := restart_hazard()) is not None:
            say(f"restarts        {hazard} (docs/large-runs.md)")
        if detours:
            say(f"other data      after step {' and '.join(map(str, detours))}, as losses were not finite there")
        for path in set_aside_newer(run, restored.step):
            say(f"set aside       {path}, as the run goes on from before it; delete it when nobody needs it")
    if config.probe and restored.step == 0:
        weights = in_one_piece(model.state_dict(), keep=world.is_first)
        if world.is_first:
            _probe(say, run, "before", config, _unsharded(model, weights, settings))
    log.resume(restored.step, restored.step // steps_per_epoch, restored.epoch_sums)
    world.barrier()

    # The loop.
    quarantine_name = "quarantine.jsonl" if world.size == 1 else f"quarantine-{world.rank}.jsonl"
    quarantine = Quarantine(run / quarantine_name, config.max_corrupt)
    load = partial(
        load_batches,
        source,
        device=world.device,
        num_workers=config.num_workers,
        pin_memory=config.pin_mem and world.device.type == "cuda",
        decoder=decoder,
    )
    view = View(config.input_size, config.in_chans, seed=seed, scale=config.crop_scale, flip=config.flip)

    def size_at(step: int) -> Size:
        return size_in(step // steps_per_epoch, sizes, config.grow_epochs)

    requests_of = partial(_requests, source, config, seed, world, steps_per_epoch)
    batches_of = partial(_batches, load, requests_of, view, size_at)
    batches = batches_of(range(restored.step, total_steps))
    masks_now = {size: dataclasses.replace(masks, seed=seed) for size, masks in masks_of.items()}
    take = partial(_micro_batches, config=config, masks_of=masks_now, quarantine=quarantine, log=log)
    at_peak = {size: _seconds_at_peak(model, config, size, world) for size in sizes}
    keep_every = config.keep_every and config.keep_every * checkpoint_freq
    saver = Saver(run, keep=config.keep, keep_every=keep_every, background=config.async_save)
    unsaved = None
    asked_to_stop = parallel.Vote(world)
    watchdog = Watchdog(config.hang_timeout, run / f"hang-{world.rank}.txt", f"rank {world.rank}")
    profiling = profiled(run, config.profile, world.rank, world.device, say)
    graph = PassGraph() if config.cuda_graph else None
    with (
        screen,
        saver,
        watchdog,
        profiling as profile_step,
        precision.products(),
        closing(batches),
        closing(_say_what_was_redone(batches, say)) as batches,
    ):
        for step in range(restored.step, total_steps):
            epoch, index = divmod(step, steps_per_epoch)
            lr = learning_rate(
                epoch + index / steps_per_epoch,
                lr=config.lr,
                min_lr=config.min_lr,
                warmup_epochs=config.warmup_epochs,
                epochs=config.epochs,
            )
            micro = take(batches)
            autocast = precision.context(world.device)
            stepped = train_step(
                loss_of, optimizer, micro, config.accum_iter, lr, autocast, config.clip_grad, world.mean, graph
            )
            if config.ema is not None:
                update_average(average, model, config.ema, stepped.skipped)
            done = step + 1
            epoch_ends = index + 1 == steps_per_epoch
            measured: dict[str, float] = {}
            if epoch_ends and probed is not None and (epoch + 1) % (config.probe_freq or 1) == 0:
                require_finite(parallel.witness(model.parameters(), world), done)
                weights = in_one_piece(model.state_dict(), keep=world.is_first)
                if world.is_first:
                    measured = _probe_epoch(say, run, epoch + 1, config, _unsharded(model, weights, settings), probed)
            log.add(
                stepped,
                step=done,
                epoch=epoch,
                lr=lr,
                images=config.global_batch,
                seconds_at_peak=at_peak[size_at(step)],
                measured=measured,
            )
            screen.update(done, epoch, log.latest)
            watchdog.beat()
            profile_step()

            if epoch_ends:
                log.end_epoch(epoch)
            stopping = asked_to_stop.any(stop.received is not None)
            saves = done % checkpoint_freq == 0 or done == total_steps or stopping
            if saves:
                log.sync()
            # Weights that made the last steps fail are no use to anybody, so nothing is saved until one succeeds.
            failing = log.skipped_in_a_row > 0
            if log.skipped_in_a_row >= config.max_skipped or (failing and done == total_steps):
                first = done - log.skipped_in_a_row
                drawn = requests_of([first])
                names = [source.name(index) for indices, _ in drawn for index in indices[:NAMED_SAMPLES].tolist()]
                again = partial(_losses, loss_of, partial(batches_of, [first]), take, autocast)
                place = first_not_finite(model, again, world.any)
                report = report_not_finite(first + 1, done, place, names[:NAMED_SAMPLES])
                log.close()
                saver.wait()
                _go_back(flags, run, config.start_epoch * steps_per_epoch, detours, report, world)
                return None
            if epoch_ends and not failing and (epoch % config.save_freq == 0 or epoch + 1 == config.epochs):
                require_finite(parallel.witness(model.parameters(), world), done)
                masks = masks_of[config.input_size]
                unsaved = _export(run, epoch, config, settings, masks, model, optimizer, average, source, world)
            if saves and not failing:
                require_finite(parallel.witness(model.parameters(), world), done)
                position = {"settings": settings, "epoch_sums": log.epoch_sums, "detours": detours}
                saver.save(done, training_tensors(model, optimizer) | in_checkpoint(average), position)
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
    if config.probe:
        weights = in_one_piece(model.state_dict(), keep=world.is_first)
    if world.is_first:
        if config.probe:
            _show_probe(say, _probe(say, run, "after", config, _unsharded(model, weights, settings)))
        if len(quarantine):
            say(f"skipped         {len(quarantine)} unusable images, listed in {quarantine.path}")
        say(f"reconstruction  {_picture_path(run, config.epochs - 1)}")
        say(f"checkpoint      {_official_path(run, config.epochs - 1)}")
    world.barrier()
    return 0


def _go_back(
    flags: PretrainConfig, run: Path, fresh_step: int, detours: list[int], report: str, world: parallel.World
) -> None:
    """Notes that the run is to do the steps after its newest intact checkpoint once more, with other data.

    Raises:
        UserError: they were already done with other data, or there is nothing to go back to.
    """
    found = on_first(lambda: find_checkpoint(run))
    step = fresh_step if found.path is None else int(found.manifest["step"])
    remedy = "lower --blr (or use --precision fp32), then continue with --resume auto"
    if step in detours:
        raise UserError(f"{report}; it was so with other data after step {step}, too: {remedy}")
    if found.path is None and flags.resume not in ("", "auto"):
        raise UserError(f"{report}; no checkpoint was saved since {flags.resume}: lower --blr and name another folder")
    print(f"fastmae: {report}; going back to step {step}, and on with other data", file=sys.stderr, flush=True)
    if world.is_first:
        write_detours(run, [*detours, step])
    world.barrier()


# --- settings ---------------------------------------------------------------------------------------------------------


def resolve_settings(
    flags: PretrainConfig, source: Source, facts: DataFacts, world: parallel.World, mask_file: MaskFile | None
) -> ResolvedConfig:
    """The configuration with every default filled in."""
    in_chans = flags.in_chans or facts.channels
    if facts.kind == "folder" and in_chans not in FOLDER_CHANNELS:
        raise UserError(f"--in_chans {in_chans}: image files give 1, 3 or 4 channels; use an array for others")
    mean, std = flags.mean, flags.std
    if mean is None or std is None:
        imagenet = facts.kind == "folder" and in_chans == 3
        measured = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else channel_statistics(source, in_chans)
        mean, std = mean or measured[0], std or measured[1]
    masks = None if mask_file is None else mask_file.facts
    return resolve(flags, facts, mean=mean, std=std, ranks=world.size, num_workers=default_workers(), masks=masks)


def _check_batches(config: ResolvedConfig, world: parallel.World, steps_per_epoch: int) -> None:
    if steps_per_epoch < 1:
        size = f"--batch_size {config.batch_size}"
        size += f" × --accum_iter {config.accum_iter}" if config.accum_iter > 1 else ""
        size += f" × {world.size} ranks" if world.size > 1 else ""
        fits = config.dataset_length // (config.accum_iter * world.size) * config.repeated_masks
        remedy = f"lower --batch_size to at most {fits}" if fits else "lower --accum_iter or the ranks"
        given = f"the {config.dataset_length} images of {shown(config.data_path)}"
        raise UserError(f"{size} is more than {given}; {remedy}, or use --keep_last")


def _model(settings: dict[str, Any], config: ResolvedConfig) -> MaskedAutoencoderViT:
    model = build_model(settings)
    flag, ratio = "--mask_ratio", config.mask_ratio
    try:
        model.num_visible(ratio)
        if config.predict_ratio is not None:
            flag, ratio = "--predict_ratio", config.predict_ratio
            model.num_predicted(config.mask_ratio, ratio)
    except ValueError as error:
        raise UserError(f"{flag} {ratio}: {error}; choose another ratio or --input_size") from error
    return model


def _sizes(config: ResolvedConfig, model: MaskedAutoencoderViT) -> tuple[Size, ...]:
    """The sizes of a run's crops, from the smallest to the model's."""
    if config.start_size is None:
        return (config.input_size,)
    ph, pw = model.patch_size
    unit = (2 * ph, 2 * pw) if config.masking == "grid" else (ph, pw)
    try:
        sizes = growing_sizes(config.start_size, config.input_size, unit)
        model.num_predicted(config.mask_ratio, config.predict_ratio, math.prod(model.grid_of(sizes[0])))
    except ValueError as error:
        raise UserError(f"--start_size {' '.join(map(str, config.start_size))}: {error}") from error
    if config.grow_epochs >= config.epochs:
        raise UserError(f"--grow_epochs {config.grow_epochs}: must be below the {config.epochs} of --epochs")
    return sizes


def _masks(config: ResolvedConfig, model: MaskedAutoencoderViT, size: Size, file: MaskFile | None) -> Masks:
    grid = model.grid_of(size)
    visible = model.num_visible(config.mask_ratio, math.prod(grid))
    return choose_masks(config.masking, file, grid, visible, config.seed)


def _seconds_at_peak(
    model: MaskedAutoencoderViT, config: ResolvedConfig, size: Size, world: parallel.World
) -> float | None:
    """What a step would take if all devices computed at their peak; None where it is unknown."""
    peak = peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    L = math.prod(model.grid_of(size))
    flops = 3 * config.global_batch * flops_per_image(model, config.mask_ratio, L, config.predict_ratio)
    return peak and flops / (world.size * peak)


def _sinks(run: Path, config: ResolvedConfig, settings: dict[str, Any], world: parallel.World, say: Say) -> list[Sink]:
    """Where the first rank's log goes besides its folder; other ranks have none."""
    if not world.is_first:
        return []
    return open_sinks(run, log_dir=config.log_dir, wandb=config.wandb, settings=settings, say=say)


def _unsharded(
    model: MaskedAutoencoderViT, weights: dict[str, torch.Tensor], settings: dict[str, Any]
) -> MaskedAutoencoderViT:
    """The model for one rank alone, and without float8, which is for training.

    If it is not so itself, a copy made of ``weights``, which are in one piece.
    """
    if not (is_sharded(model) or settings["float8"]):
        return model
    copy = build_model(settings).to(model.mean.device)
    copy.load_state_dict(weights)
    return copy


def _as_json(config: ResolvedConfig) -> dict[str, Any]:
    """The configuration as it looks after a round trip through JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def chosen_backends(
    device: torch.device, precision: Precision, attention_shapes: dict[str, tuple[int, int]], decoding: str
) -> dict[str, str]:
    """Which implementation of what a run on ``device`` uses, and why.

    Args:
        attention_shapes: (tokens S, width Dh of a head) of the encoder and of the decoder.
        decoding: what ``describe_decoder`` says.

    Raises:
        UserError: one that was asked for cannot run there.
    """
    found = {"device": str(device), "precision": f"{precision.name} ({precision.reason})"}
    try:
        found["ops"] = describe_ops(device)
        dtype = precision.autocast or torch.float32
        chosen = {part: attention_backend(device, dtype, *shape) for part, shape in attention_shapes.items()}
        found["products"] = describe_linear(device, dtype)
        found["attention"] = "; ".join(f"{part}: {name} ({reason})" for part, (name, reason) in chosen.items())
    except ValueError as error:
        raise UserError(f"--ops {asked_backends().ops} --attention {asked_backends().attention}: {error}") from error
    found["optimizer"] = "fused AdamW"
    found["decoding"] = decoding
    return found


# --- batches ----------------------------------------------------------------------------------------------------------


def _requests(
    source: Source,
    config: ResolvedConfig,
    seed: int,
    world: parallel.World,
    steps_per_epoch: int,
    steps: Iterable[int],
) -> Iterator[Request]:
    """The micro-batches of the steps, each epoch planned when it is reached."""
    crops = config.batch_size // config.repeated_masks
    plan = None
    for step in steps:
        epoch, index = divmod(step, steps_per_epoch)
        if plan is None or plan.epoch != epoch:
            plan = plan_epoch(seed, epoch, len(source), crops, world.rank, world.size, source.stretches)
        for micro in range(config.accum_iter):
            yield plan.batch(index * config.accum_iter + micro)


def _batches(
    load: Callable[..., Generator[Batch]],
    requests_of: Callable[[Iterable[int]], Iterator[Request]],
    view: View,
    size_at: Callable[[int], Size],
    steps: Iterable[int],
) -> Generator[Batch]:
    """The batches of the steps. Where their size changes, which is a few times a run, the loader starts anew."""
    for size, alike in itertools.groupby(steps, size_at):
        with closing(load(requests_of(alike), view=dataclasses.replace(view, size=size))) as batches:
            yield from batches


def _say_what_was_redone(batches: Iterable[Batch], say: Say) -> Generator[Batch]:
    """The batches as they are. The first that DALI failed on is told with the reason, their number at the end."""
    redone = 0
    try:
        for batch in batches:
            redone += bool(batch.redone)
            if batch.redone and redone == 1:
                say(f"decoding        DALI failed on a batch, which the pool decoded instead: {batch.redone}")
            yield batch
    finally:
        if redone:
            say(f"decoding        batches that DALI failed on and the pool decoded instead: {redone}")


def _micro_batches(
    batches: Iterator[Batch], config: ResolvedConfig, masks_of: dict[Size, Masks], quarantine: Quarantine, log: StepLog
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One step's micro-batches as (images, ids_shuffle)."""
    for _ in range(config.accum_iter):
        batch = next(batches)
        log.loading.add(batch)
        quarantine.add(batch.skipped, good=len(batch.images))
        images, draw_ids = batch.images, batch.draw_ids
        masks = masks_of[images.shape[1], images.shape[2]]
        if config.repeated_masks > 1:
            images = images.repeat_interleave(config.repeated_masks, dim=0)
            draws = mask_draws(draw_ids.numpy(), config.dataset_length, config.repeated_masks)
            draw_ids = torch.from_numpy(draws)
        yield images, shuffled_ids(draw_ids, masks, images.device)


def _losses(
    loss_of: torch.nn.Module,
    load: Callable[[], Generator[Batch]],
    take: Callable[[Iterator[Batch]], Iterator[tuple[torch.Tensor, torch.Tensor]]],
    autocast: torch.autocast,
) -> Iterator[torch.Tensor]:
    """The losses of the micro-batches of one step, of which ``load`` gives this rank's."""
    with closing(load()) as batches:
        for images, ids_shuffle in take(batches):
            with autocast:
                loss = loss_of(images, ids_shuffle)
            yield loss


# --- the run folder ---------------------------------------------------------------------------------------------------


def _official_path(run: Path, epoch: int) -> Path:
    return run / f"checkpoint-{epoch}.pth"


def _picture_path(run: Path, epoch: int) -> Path:
    return run / "reconstructions" / f"epoch-{epoch:04d}.png"


def open_run_folder(run: Path, settings: dict[str, Any], world: parallel.World, backends: dict[str, str]) -> None:
    """Writes config.json, and a line for this start in environment.jsonl."""
    start = {
        "command": sys.argv,
        "ranks": world.size,
        "versions": versions(),
        "hardware": hardware(),
        "backends": backends,
    }
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "config.json", json.dumps(settings, indent=1))
        with open(run / "environment.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")
    except OSError as error:
        raise UserError(f"--output_dir {run}: cannot be written ({error}); name another") from error


def _announce(
    say: Say,
    config: ResolvedConfig,
    facts: DataFacts,
    backends: dict[str, str],
    model: MaskedAutoencoderViT,
    masks_of: dict[Size, Masks],
) -> None:
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    height, width = config.input_size
    labels = "labelled" if facts.labelled else "without labels"
    say(f"data            {shown(config.data_path)}: {facts.length:,} images {facts.found}, {labels}")
    say(f"model           {config.model}: {parameters / 1e6:.1f} M parameters, {height}×{width}×{config.in_chans}")
    if config.decoder_attention == "cross":
        predicted = model.num_predicted(config.mask_ratio, config.predict_ratio)
        blocks = len(model.decoder_blocks)
        say(f"decoder         cross-attention, {blocks} blocks, {predicted} of {model.num_patches} patches predicted")
    if len(masks_of) > 1:
        say(f"sizes           {describe_sizes(list(masks_of), config.grow_epochs, config.epochs)}")
    say(f"masks           {masks_of[config.input_size]}")
    say(f"batch           {config.global_batch} images a step, lr {config.lr:.2e}, {config.epochs} epochs")
    for name, choice in backends.items():
        say(f"{name:15} {choice}")


def _export(
    run: Path,
    epoch: int,
    config: ResolvedConfig,
    settings: dict[str, Any],
    masks: Masks,
    model: MaskedAutoencoderViT,
    optimizer: torch.optim.Optimizer,
    average: Average,
    source: Source,
    world: parallel.World,
) -> str | None:
    """The published files and the pictures after an epoch. Returns what could not be written, if anything.

    Every rank calls it, the first one writes. A disk that is full ends no run: the next epoch's may fit.
    """
    weights = in_one_piece(model.state_dict(), keep=world.is_first)
    moments = in_one_piece(optimizer.state_dict(), keep=world.is_first)
    means = in_one_piece(average, keep=world.is_first)
    if not world.is_first:
        return None
    try:
        path = _official_path(run, epoch)
        for name, tensors in [(path.stem, weights), *([(f"{path.stem}-ema", weights | means)] if means else [])]:
            save_official(path.with_stem(name), tensors, moments, epoch, settings)
            save_weights(path.with_name(f"{name}.safetensors"), tensors, epoch, settings)
        _picture(_picture_path(run, epoch), config, masks, _unsharded(model, weights, settings), source)
    except UserError as error:
        print(f"fastmae: {error}; the run goes on", file=sys.stderr, flush=True)
        return str(error)
    return None


def _picture(path: Path, config: ResolvedConfig, masks: Masks, model: MaskedAutoencoderViT, source: Source) -> None:
    """Fixed images with fixed masks, so that the pictures of a run can be compared."""
    images = fixed_images(model, source, PICTURE_IMAGES)
    ids_shuffle = shuffled_ids(torch.arange(len(images)), masks, images.device)
    with torch.compiler.set_stance("force_eager"):
        rows = reconstruct(model, images, ids_shuffle, mask_ratio=config.mask_ratio)
    save_grid(path, rows, caption(model, config.mask_ratio))


def _probe(say: Say, run: Path, when: str, config: ResolvedConfig, model: MaskedAutoencoderViT) -> dict[str, Any]:
    """Adds the accuracies before or after to probe.json, if they are not there yet, and returns all of it."""
    path = run / "probe.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if when not in results:
        say(f"probe           measuring k-NN and linear-probe accuracy {when} pretraining …")
        train, val = train_and_val(config.data_path)
        with torch.compiler.set_stance("force_eager"):  # whole images are another shape: compiling takes longer
            results[when] = probe(model, train, val, num_workers=config.num_workers)
        write_text(path, json.dumps(results, indent=1))
    return results


def _probed_parts(config: ResolvedConfig) -> tuple[Source, Source]:
    """What --probe_freq measures on: both parts of the data, of large ones evenly spaced images.

    Raises:
        UserError: a part has no labels, or the train part only one class.
    """
    parts = []
    for name, part in zip(("train", "val"), train_and_val(config.data_path), strict=True):
        if part.labels is None or (name == "train" and len(np.unique(part.labels)) < 2):
            lack = "has no labels" if part.labels is None else "is all of one class"
            raise UserError(f"--probe_freq: the {name} part of {shown(config.data_path)} {lack}; leave the flag out")
        is_small = len(part) <= PROBE_LIMIT
        parts.append(part if is_small else Subset(part, evenly_spaced(part, PROBE_LIMIT, PROBE_RUN)))
    return parts[0], parts[1]


def _probe_epoch(
    say: Say, run: Path, epochs: int, config: ResolvedConfig, model: MaskedAutoencoderViT, parts: tuple[Source, Source]
) -> dict[str, float]:
    """Adds the accuracies after so many epochs to probe.json, dropping those of later ones, and returns them."""
    path = run / "probe.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    with torch.compiler.set_stance("force_eager"):
        found = probe(model, *parts, num_workers=config.num_workers)
    earlier = {number: one for number, one in results.get("epochs", {}).items() if int(number) < epochs}
    write_text(path, json.dumps(results | {"epochs": earlier | {str(epochs): found}}, indent=1))
    say(f"probe           after epoch {epochs}: k-NN {found['knn']:.1f} %, linear probe {found['linear']:.1f} %")
    return {name: found[name] for name in ("knn", "linear")}


def _show_probe(say: Say, results: dict[str, Any]) -> None:
    for key, name in (("knn", "k-NN"), ("linear", "linear probe")):
        before = f"{results['before'][key]:.1f} % before, " if "before" in results else ""
        say(f"{name:15} {before}{results['after'][key]:.1f} % after pretraining")
