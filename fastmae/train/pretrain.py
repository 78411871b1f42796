"""Pretraining, in the order in which it happens: settings, data, model, resume, the loop, and what is left behind."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmae.checkpoint.restore import restore
from fastmae.checkpoint.save import training_tensors
from fastmae.config import FIXED_IN_A_RUN, PROBE_LIMIT, PretrainConfig, ResolvedConfig, check_pretrain
from fastmae.config.model import ModelSpec
from fastmae.data.cache import CachedSource, cached, describe_cache, memory_budget
from fastmae.data.loader import Batch, View, choose_decoder, describe_decoder
from fastmae.data.masks import MaskFile, Masks, choose_masks, open_masks, shuffled_ids
from fastmae.data.plan import mask_draws
from fastmae.data.sizes import Size, describe_sizes, growing_sizes, size_in
from fastmae.data.sources import Source, Subset, describe, evenly_spaced, open_train, shown, train_and_val
from fastmae.environment import peak_flops
from fastmae.errors import UserError
from fastmae.evaluate.probe import probe
from fastmae.evaluate.reconstruct import caption, fixed_images, reconstruct, save_grid
from fastmae.facts import DataFacts
from fastmae.files import write_text
from fastmae.model.build import build_model
from fastmae.model.flops import flops_per_image
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.sharding import in_one_piece, is_sharded
from fastmae.train import parallel
from fastmae.train.average import Average, in_checkpoint, start_average, update_average
from fastmae.train.health import StopSignals, data_seed
from fastmae.train.optim import make_optimizer
from fastmae.train.precision import Precision, choose_precision, require_float8
from fastmae.train.profile import profiled
from fastmae.train.run import (
    Feed,
    Request,
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
from fastmae.train.step import PassGraph, TrainingLoss, prepare, require_graph, train_step

PICTURE_IMAGES = 8
PROBE_RUN = 100


def pretrain(config: PretrainConfig) -> int:
    """Runs or continues a pretraining and returns the exit status: 0 when done, 75 when stopped by a signal.

    Raises:
        UserError: settings, data or checkpoints that cannot work.
    """
    check_pretrain(config)
    return run_attempts(config, _pretrain)


def _pretrain(flags: PretrainConfig, context: parallel.DistContext, stop: StopSignals) -> int | None:
    """One course: from where --resume says to the end, a signal, or (None) to where it is to go back and on again."""
    # Settings and data: from here on nothing is left open.
    source = open_train(flags.data_path)
    facts = describe(source)
    mask_file = open_masks(flags.masks, flags.mask_ratio)
    config = resolve_settings(flags, source, facts, context, mask_file)
    settings = as_json(config)
    probed = _probed_parts(config) if config.probe_freq is not None else None
    precision = _precision(config, context)
    decoder, why_decoder = choose_decoder(config.image_decoder, context.device, source, config.in_chans)
    if config.cache == "ram":
        source = cached(source, config.in_chans, memory_budget(config.cache_gb, parallel.ranks_here()), decoder)
    steps = plan_steps(config, context, config.batch_size // config.repeated_masks, "images")
    fresh_step = config.start_epoch * steps.per_epoch

    # Model and optimiser, the same on every rank.
    torch.manual_seed(config.seed)
    model = _model(settings, config).to(context.device)
    model.autocast_residual = config.residual == "bf16"
    sizes = _sizes(config, model)
    model.allow_sizes(sizes)
    parallelism = parallel.choose_parallelism(config.parallel, config.reduce, config.shard_size, context)
    loss_alone = TrainingLoss(model, config.mask_ratio, config.predict_ratio)
    prepare(loss_alone, config.checkpointing, config.compile, len(sizes), config.float8)
    loss_of = parallel.parallelize(loss_alone, context, parallelism)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    masks_of = {size: _masks(config, model, size, mask_file) for size in sizes}

    # Where to begin.
    restored = restore(
        config.resume,
        Path(config.output_dir),
        model,
        optimizer,
        fixed={key: settings[key] for key in FIXED_IN_A_RUN},
        fresh_step=fresh_step,
        steps_per_epoch=steps.per_epoch,
    )
    detours = known_detours(Path(config.output_dir), restored)
    average = start_average(model, restored.origin) if config.ema is not None else {}
    decoding = describe_decoder(decoder, why_decoder)
    backends = chosen_backends(context.device, precision, model.attention_shapes(config.mask_ratio), decoding)
    backends |= _more_backends(config, parallelism, source)
    run = open_run(config, settings, context, stop, steps, restored, detours, backends)
    if context.is_main:
        _announce(run.say, config, facts, model, masks_of)
        announce_beginning(run, restored, backends)
    if config.probe and restored.step == 0:
        weights = in_one_piece(model.state_dict(), keep=context.is_main)
        if context.is_main:
            _probe(run, "before", config, _unsharded(model, weights, settings))
    begin(run, restored)

    # The loop.
    feed = _feed(run, config, source, decoder, masks_of, sizes)
    at_peak = {size: _seconds_at_peak(model, config, size, context) for size in sizes}
    profiling = profiled(run.folder, config.profile, context.rank, context.device, run.say)
    graph = PassGraph() if config.cuda_graph else None
    unsaved = None
    loaded = feed.batches_of(range(restored.step, steps.total))
    with (
        run.screen,
        run.saver,
        run.watchdog,
        profiling as profile_step,
        precision.products(),
        closing(loaded),
        closing(_say_what_was_redone(loaded, run.say)) as batches,
    ):
        for step in range(restored.step, steps.total):
            epoch, index = steps.epoch_and_index(step)
            epoch_ends = index + 1 == steps.per_epoch
            lr = rate_at(step, config, steps)
            micro = feed.take(batches)
            autocast = precision.context(context.device)
            result = train_step(
                loss_of, optimizer, micro, config.accum_iter, lr, autocast, config.clip_grad, context.mean, graph
            )
            if config.ema is not None:
                update_average(average, model, config.ema, result.skipped)
            measured: dict[str, float] = {}
            if epoch_ends and probed is not None and (epoch + 1) % (config.probe_freq or 1) == 0:
                require_finite_weights(run, model, step + 1)
                weights = in_one_piece(model.state_dict(), keep=context.is_main)
                if context.is_main:
                    measured = _probe_epoch(run, epoch + 1, config, _unsharded(model, weights, settings), probed)
            run.log.add(
                result,
                step=step + 1,
                epoch=epoch,
                lr=lr,
                images=config.global_batch,
                seconds_at_peak=at_peak[_size_at(step, run, config, sizes)],
                measured=measured,
            )
            run.screen.update(step + 1, epoch, run.log.latest)
            run.watchdog.beat()
            profile_step()

            if epoch_ends:
                run.log.end_epoch(epoch)
            end = end_step(run, step)
            if end.gives_up:
                go_back(run, end.done, feed, model, loss_of, autocast, fresh_step)
                return None
            if end.exports:
                require_finite_weights(run, model, end.done)
                unsaved = _export(run, epoch, config, masks_of[config.input_size], model, optimizer, average, source)
            if end.saves:
                save_run(run, end.done, model, training_tensors(model, optimizer) | in_checkpoint(average))
            if end.stops:
                return stop_run(run, end)
            run.watchdog.beat()

    # What is left behind.
    close_run(run, unsaved)
    if config.probe:
        weights = in_one_piece(model.state_dict(), keep=context.is_main)
    if context.is_main:
        if config.probe:
            _show_probe(run.say, _probe(run, "after", config, _unsharded(model, weights, settings)))
        tell_quarantine(run)
        run.say(f"reconstruction  {_picture_path(run.folder, config.epochs - 1)}")
        run.say(f"checkpoint      {official_path(run.folder, config.epochs - 1)}")
    context.barrier()
    return 0


# --- settings ---------------------------------------------------------------------------------------------------------


def _precision(config: ResolvedConfig, context: parallel.DistContext) -> Precision:
    """The format of the run's numbers.

    Raises:
        UserError: the device has not got it, or it does not go with another flag.
    """
    precision = choose_precision(config.precision, context.device)
    if config.residual == "bf16" and precision.autocast is None:
        raise UserError(f"--residual bf16: goes with --precision bf16, not {precision.name}; leave one out")
    if config.float8:
        require_float8(context.device, precision)
    if config.cuda_graph:
        require_graph(context.device, context.size)
    return precision


def _more_backends(config: ResolvedConfig, parallelism: parallel.Parallelism, source: Source) -> dict[str, str]:
    """What else is used, by name, where it was asked for."""
    found = {"parallel": f"{parallelism.kind} ({parallelism.reason})"}
    if config.float8:
        found["float8"] = f"products of the blocks (torchao {version('torchao')})"
    if config.cuda_graph:
        found["cuda_graph"] = "forward and backward pass (asked for)"
    if isinstance(source, CachedSource):
        found["cache"] = describe_cache(source)
    return found


def _model(settings: dict[str, Any], config: ResolvedConfig) -> MaskedAutoencoderViT:
    model = build_model(ModelSpec.of(config))
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
    model: MaskedAutoencoderViT, config: ResolvedConfig, size: Size, context: parallel.DistContext
) -> float | None:
    """What a step would take if all devices computed at their peak; None where it is unknown."""
    peak = peak_flops(torch.cuda.get_device_name(context.device)) if context.device.type == "cuda" else None
    L = math.prod(model.grid_of(size))
    flops = 3 * config.global_batch * flops_per_image(model, config.mask_ratio, L, config.predict_ratio)
    return peak and flops / (context.size * peak)


def _unsharded(
    model: MaskedAutoencoderViT, weights: dict[str, torch.Tensor], settings: dict[str, Any]
) -> MaskedAutoencoderViT:
    """The model for one rank alone, and without float8, which is for training.

    If it is not so itself, a copy made of ``weights``, which are in one piece.
    """
    if not (is_sharded(model) or settings["float8"]):
        return model
    copy = build_model(ModelSpec.from_json(settings)).to(model.mean.device)
    copy.load_state_dict(weights)
    return copy


# --- batches ----------------------------------------------------------------------------------------------------------


def _feed(
    run: Run,
    config: ResolvedConfig,
    source: Source,
    decoder: str,
    masks_of: dict[Size, Masks],
    sizes: tuple[Size, ...],
) -> Feed:
    """The run's data, of the seed that they have after so many detours."""
    seed = data_seed(config.seed, len(run.detours))
    masks_now = {size: dataclasses.replace(masks, seed=seed) for size, masks in masks_of.items()}
    view = View(config.input_size, config.in_chans, seed=seed, scale=config.crop_scale, flip=config.flip)
    load = partial(loader_of(run), source, decoder=decoder)
    requests_of = partial(_requests, source, config, seed, run.context, run.steps.per_epoch)
    size_at = partial(_size_at, run=run, config=config, sizes=sizes)
    batches_of = partial(_batches, load, requests_of, view, size_at)
    return Feed(source, requests_of, batches_of, partial(_micro_batches, run=run, config=config, masks_of=masks_now))


def _size_at(step: int, run: Run, config: ResolvedConfig, sizes: tuple[Size, ...]) -> Size:
    """That of the crops of a step."""
    return size_in(step // run.steps.per_epoch, sizes, config.grow_epochs)


def _requests(
    source: Source,
    config: ResolvedConfig,
    seed: int,
    context: parallel.DistContext,
    steps_per_epoch: int,
    steps: Iterable[int],
) -> Iterator[Request]:
    """The crops of the steps."""
    crops = config.batch_size // config.repeated_masks
    return requests(source, seed, crops, config.accum_iter, context, steps_per_epoch, steps)


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
                say(f"decoding        DALI failed on a batch, which the threads decoded instead: {batch.redone}")
            yield batch
    finally:
        if redone:
            say(f"decoding        batches that DALI failed on and the threads decoded instead: {redone}")


def _micro_batches(
    batches: Iterator[Batch], run: Run, config: ResolvedConfig, masks_of: dict[Size, Masks]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One step's micro-batches as (images, ids_shuffle)."""
    for batch in taken(run, batches):
        images, draw_ids = batch.images, batch.draw_ids
        masks = masks_of[images.shape[1], images.shape[2]]
        if config.repeated_masks > 1:
            images = images.repeat_interleave(config.repeated_masks, dim=0)
            draws = mask_draws(draw_ids.numpy(), config.dataset_length, config.repeated_masks)
            draw_ids = torch.from_numpy(draws)
        yield images, shuffled_ids(draw_ids, masks, images.device)


# --- the run folder ---------------------------------------------------------------------------------------------------


def _picture_path(folder: Path, epoch: int) -> Path:
    return folder / "reconstructions" / f"epoch-{epoch:04d}.png"


def _announce(
    say: Say,
    config: ResolvedConfig,
    facts: DataFacts,
    model: MaskedAutoencoderViT,
    masks_of: dict[Size, Masks],
) -> None:
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    height, width = config.input_size
    labels = "labelled" if facts.labelled else "without labels"
    say(f"data            {shown(config.data_path)}: {facts.length:,} images {facts.location}, {labels}")
    say(f"model           {config.model}: {parameters / 1e6:.1f} M parameters, {height}×{width}×{config.in_chans}")
    if config.decoder_attention == "cross":
        predicted = model.num_predicted(config.mask_ratio, config.predict_ratio)
        blocks = len(model.decoder_blocks)
        say(f"decoder         cross-attention, {blocks} blocks, {predicted} of {model.num_patches} patches predicted")
    if len(masks_of) > 1:
        say(f"sizes           {describe_sizes(list(masks_of), config.grow_epochs, config.epochs)}")
    say(f"masks           {masks_of[config.input_size]}")
    say(f"batch           {config.global_batch} images a step, lr {config.lr:.2e}, {config.epochs} epochs")


def _export(
    run: Run,
    epoch: int,
    config: ResolvedConfig,
    masks: Masks,
    model: MaskedAutoencoderViT,
    optimizer: torch.optim.Optimizer,
    average: Average,
    source: Source,
) -> str | None:
    """The published files and the pictures after an epoch. Returns what could not be written, if anything.

    Every rank calls it, the first one writes.
    """
    keep = run.context.is_main
    weights = in_one_piece(model.state_dict(), keep=keep)
    moments = in_one_piece(optimizer.state_dict(), keep=keep)
    means = in_one_piece(average, keep=keep)

    def write() -> None:
        path = official_path(run.folder, epoch)
        save_official_files(path, weights, moments, epoch, run.settings)
        if means:
            save_official_files(path.with_stem(f"{path.stem}-ema"), weights | means, moments, epoch, run.settings)
        _picture(_picture_path(run.folder, epoch), config, masks, _unsharded(model, weights, run.settings), source)

    return written(write) if run.context.is_main else None


def _picture(path: Path, config: ResolvedConfig, masks: Masks, model: MaskedAutoencoderViT, source: Source) -> None:
    """Fixed images with fixed masks, so that the pictures of a run can be compared."""
    images = fixed_images(model, source, PICTURE_IMAGES)
    ids_shuffle = shuffled_ids(torch.arange(len(images)), masks, images.device)
    with torch.compiler.set_stance("force_eager"):
        rows = reconstruct(model, images, ids_shuffle, mask_ratio=config.mask_ratio)
    save_grid(path, rows, caption(model, config.mask_ratio))


def _probe(run: Run, when: str, config: ResolvedConfig, model: MaskedAutoencoderViT) -> dict[str, Any]:
    """Adds the accuracies before or after to probe.json, if they are not there yet, and returns all of it."""
    path = run.folder / "probe.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if when not in results:
        run.say(f"probe           measuring k-NN and linear-probe accuracy {when} pretraining …")
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
    run: Run, epochs: int, config: ResolvedConfig, model: MaskedAutoencoderViT, parts: tuple[Source, Source]
) -> dict[str, float]:
    """Adds the accuracies after so many epochs to probe.json, dropping those of later ones, and returns them."""
    path = run.folder / "probe.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    with torch.compiler.set_stance("force_eager"):
        found = probe(model, *parts, num_workers=config.num_workers)
    earlier = {number: one for number, one in results.get("epochs", {}).items() if int(number) < epochs}
    write_text(path, json.dumps(results | {"epochs": earlier | {str(epochs): found}}, indent=1))
    run.say(f"probe           after epoch {epochs}: k-NN {found['knn']:.1f} %, linear probe {found['linear']:.1f} %")
    return {name: found[name] for name in ("knn", "linear")}


def _show_probe(say: Say, results: dict[str, Any]) -> None:
    for key, name in (("knn", "k-NN"), ("linear", "linear probe")):
        before = f"{results['before'][key]:.1f} % before, " if "before" in results else ""
        say(f"{name:15} {before}{results['after'][key]:.1f} % after pretraining")
