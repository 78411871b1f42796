"""Pretraining, in the order in which it happens: settings, data, model, resume, the loop, and what is left behind."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastmae.checkpoint.load import Opened
from fastmae.checkpoint.manifest import peek
from fastmae.checkpoint.restore import Restored
from fastmae.checkpoint.save import training_tensors
from fastmae.checkpoint.start import begin_with, normalised_alike, open_start
from fastmae.config import FIXED_IN_A_RUN, PROBE_LIMIT, PretrainConfig, ResolvedConfig, pixel_facts, read_as
from fastmae.config.family import FAMILY
from fastmae.config.model import ModelSpec
from fastmae.config.shape import SHAPE
from fastmae.data.cache import CachedSource, cached, describe_cache, memory_budget
from fastmae.data.loader import Batch, View, choose_decoder, describe_decoder
from fastmae.data.masks import MaskFile, Masks, choose_masks, excluded, open_masks, shuffled_ids
from fastmae.data.plan import describe_order, mask_draws, shares_of
from fastmae.data.sample import crops_note
from fastmae.data.sizes import Size, describe_sizes, growing_sizes, size_in, visible_counts, visible_in
from fastmae.data.sources import (
    Source,
    Subset,
    describe,
    evenly_spaced,
    images_of_paths,
    open_train,
    scored_parts,
    shown,
    without_held_out,
)
from fastmae.data.statistics import Measured
from fastmae.data.stock import count_of
from fastmae.data.survey import take_stock
from fastmae.environment import peak_flops
from fastmae.errors import SettingError, UserError
from fastmae.evaluate.held_out import held_out_loss
from fastmae.evaluate.probe import knn_accuracy, probe
from fastmae.evaluate.reconstruct import caption, fixed_images, reconstruct, save_grid
from fastmae.evaluate.spread import feature_spread, some_of
from fastmae.facts import DataFacts, exact_ratio
from fastmae.files import write_text
from fastmae.model.build import build_model
from fastmae.model.calls import calls_of
from fastmae.model.family import MaskedModel
from fastmae.model.flops import flops_per_image
from fastmae.model.pixels import DTYPES, nodata_of, register_pixels
from fastmae.model.sharding import in_one_piece, is_sharded
from fastmae.model.weight_copies import WeightCopies
from fastmae.ops.choices import Choices
from fastmae.ops.gather_patches import missing_pixels
from fastmae.ops.masked_mse import excluded_share
from fastmae.ops.tuning import measured
from fastmae.report.run_folder import read_probes
from fastmae.signals import StopSignals
from fastmae.train import parallel
from fastmae.train.adversary import Optimizers, make_adversary, make_optimizers
from fastmae.train.anchor import Anchor, pull_back, start_anchor
from fastmae.train.anchor import in_checkpoint as anchor_in_checkpoint
from fastmae.train.average import Average, in_checkpoint, start_average, update_average
from fastmae.train.batches import BatchStream
from fastmae.train.choosing import choose
from fastmae.train.compiling import prepare_as_chosen
from fastmae.train.given import NOTHING, Given
from fastmae.train.optim import make_optimizer
from fastmae.train.precision import Precision, choose_precision, require_float8
from fastmae.train.recovery import data_seed, restore_attempt, roll_back, run_attempts
from fastmae.train.run import (
    Run,
    actions_after,
    close_run,
    collect_official,
    lacks_official,
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
from fastmae.train.step import MicroBatch, PassGraph, TrainingLoss, require_graph, train_step

DECIDED = (*SHAPE, *FAMILY)
"""The settings that give a model other sizes than its preset's."""
PICTURE_IMAGES = 8
PROBE_RUN = 100
LOOKED_AT = 64
"""How many images are looked at for missing pixels when a run begins."""
LARGE_MODEL = 200e6
"""From this number of parameters on, a run on a CPU begins with a note: ViT-L has 330 million, ViT-B 112 million."""
CORE_FLOPS = 7e10
"""Operations per second and core of a step on a CPU: 2.49 images/s of ViT-B in float32 on two cores of a Zen 4."""


def pretrain(config: PretrainConfig, given: Given = NOTHING) -> int:
    """Runs or continues a pretraining and returns the exit status: 0 when done, 75 when stopped by a signal.

    Args:
        config: the settings.
        given: what a program gives in place of the data and the model that they name.

    Raises:
        UserError: settings, data or checkpoints that cannot work.
    """
    return run_attempts(config, partial(_pretrain, given))


def _pretrain(given: Given, flags: PretrainConfig, context: parallel.DistContext, stop: StopSignals) -> int | None:
    """Makes one attempt, from where --resume says to the end or a signal. Returns None after a rollback."""
    # Settings and data, the same on every rank: from here on nothing is left open.
    with parallel.agreeing(context) as same:
        flags, source, held, facts, pixels, start = _open(flags, given)
        masks = open_masks(flags.masks, flags.mask_ratio)
        config, notes = resolve_as_before(flags, lambda flags: _resolve(flags, pixels, facts, masks, context))
        probed = _probed(flags, config, given, source, held)
        precision = _precision(config, context)
        image_decoder, why_decoder = choose_decoder(config.image_decoder, context.device, source, reading_of(config))
        steps = plan_steps(config, context.size, config.batch_size // config.repeated_masks, _unit(config))
        same |= identity(flags, config, {"train": source}, given.model if start is None else start.model)
        source = _cached(config, source, image_decoder)
    fresh_step = config.start_epoch * steps.per_epoch

    # Model, loss and optimiser, the same on every rank.
    model, lines = _model(config, given, start, context)
    masks_of = {size: _masks(config, model, size, masks) for size in _sizes(config, model)}
    model.allow_sizes(tuple(masks_of))
    adversary = make_adversary(config, model, min(masks_of), context.mean)
    training_loss = TrainingLoss(model, config.mask_ratio, config.predict_ratio, adversary)
    config, compiling = _prepare(flags, config, training_loss, masks_of, precision, context)
    parallelism = parallel.choose_parallelism(config.parallel, config.reduce, config.shard_size, context, precision)
    loss_of = parallel.parallelize(training_loss, context, parallelism)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    graph = PassGraph() if config.cuda_graph else None
    bf16 = WeightCopies(model) if precision.autocast == torch.bfloat16 else None

    # Where to begin.
    restored, rollbacks = restore_attempt(config, model, optimizer, steps, same, FIXED_IN_A_RUN, fresh_step, adversary)
    average = start_average(model, restored.checkpoint) if config.ema is not None else {}
    anchor = start_anchor(model, config.l2sp, restored.checkpoint)
    optimizers = make_optimizers(optimizer, adversary, config, steps, restored)
    chosen = _choose(model, config, context, precision, restored)
    decoding = describe_decoder(image_decoder, why_decoder, config.pixel_type)
    backends = _backends(config, context, precision, model, decoding, chosen, compiling, parallelism, source)
    summary = [*_summary(config, source, facts, model, masks_of), *lines, *pixels.lines, *probed.lines, *notes]
    run = open_run(config, given, context, stop, steps, restored, rollbacks, same, summary=summary, backends=backends)
    if restored.step == 0:
        _probe(run, "before", model, probed)

    # The loop.
    stream = _stream(run, source, facts, masks_of, image_decoder)
    at_peak = _seconds_at_peak(model, run, tuple(masks_of))
    unsaved = None
    with training(run, precision) as profile_step, closing(stream.steps(restored.step, steps.total)) as batches:
        for step, inputs in batches:
            lr, stepped = learning_rate_at(step, config, steps), optimizers(step)
            autocast = precision.context(context.device)
            result = train_step(
                loss_of, stepped, inputs, config.accum_iter, lr, autocast, config.clip_grad, context.mean, graph, bf16
            )
            pull_back(anchor, model, lr * config.l2sp, result.skipped)
            update_average(average, model, config.ema, result.skipped)
            measured = _measure_epoch(run, step, model, probed, masks_of[config.input_size], autocast)
            record_step(run, step, result, lr, at_peak(step // steps.per_epoch), measured)
            profile_step()
            if steps.ends_epoch(step):
                run.log.end_epoch(step // steps.per_epoch, _of_epoch(run, step, model, measured))

            actions = actions_after(run, step)
            if actions.rolls_back:
                roll_back(run, step, stream, model, loss_of, autocast, fresh_step)
                return None
            if actions.exports:
                unsaved = _export(run, step, masks_of[config.input_size], model, optimizer, average, probed.pictured)
            if actions.saves:
                save_run(run, step, model, _tensors(model, average, anchor, optimizers))
            if actions.stops:
                return stop_run(run, step)
            run.watchdog.beat()

    # What is left behind.
    if lacks_official(run):
        unsaved = _export(run, steps.total - 1, masks_of[config.input_size], model, optimizer, average, probed.pictured)
    close_run(run, unsaved)
    pictures = {"reconstruction": _picture_path(run.folder, config.epochs - 1)} if model.has_pictures else {}
    say_results(run, _shown(_probe(run, "after", model, probed)), pictures)
    return 0


# --- settings ---------------------------------------------------------------------------------------------------------


def _open(
    flags: PretrainConfig, given: Given
) -> tuple[PretrainConfig, Source, Source | None, DataFacts, Measured, Opened | None]:
    """Opens the data, and the encoder to begin with.

    Returns the settings, with what a run that goes on had and what the encoder decides; the data to train on, those
    that are held out, if any, and what is known of the former; and the encoder. A run that goes on has its own weights,
    so that it needs none.
    """
    flags, start = as_begun(flags), None
    if flags.init and not peek(flags.resume, Path(flags.output_dir)):
        flags, start = open_start(flags)
    asked = read_as(flags)
    source, held = open_train(given.data or flags.data_path, asked), None
    facts = describe(source, take_stock(source, flags.in_chans, asked), asked)
    if flags.held_out is not None:
        source, held = without_held_out(source, flags.held_out, flags.seed)
        order = describe_order(len(source), source.shards)
        facts = dataclasses.replace(facts, length=len(source), order=order)
    if flags.data_weights is not None:
        shares = shares_of(images_of_paths(source), flags.data_weights)
        facts = dataclasses.replace(facts, shares=shares, order=shares.order)
    if start is not None:
        flags = normalised_alike(flags, start, facts)
    return flags, source, held, facts, measure_pixels(flags, source, facts), start


def _resolve(
    flags: PretrainConfig, pixels: Measured, facts: DataFacts, masks: MaskFile | None, context: parallel.DistContext
) -> ResolvedConfig:
    """Fills in every default from the data, the masks and the machine."""
    return resolve_settings(flags, pixels, facts, context.size, masks, on_gpu=context.device.type == "cuda")


def _precision(config: ResolvedConfig, context: parallel.DistContext) -> Precision:
    """Returns the number format of the run.

    Raises:
        UserError: the device does not have it, or it does not go with another flag.
    """
    precision = choose_precision(config.precision, context.device)
    if config.residual == "bf16" and precision.autocast is None:
        raise SettingError("residual", "bf16", f"goes with --precision=bf16, not {precision.name}; leave one out")
    if config.float8:
        require_float8(context.device, precision)
    if config.cuda_graph:
        require_graph(context.device, context.size)
    return precision


def _cached(config: ResolvedConfig, source: Source, image_decoder: str) -> Source:
    """Returns a source that keeps images in memory, if --cache asks for it."""
    if config.cache == "none":
        return source
    budget = memory_budget(config.cache_gb, parallel.ranks_here())
    return cached(source, reading_of(config), budget, image_decoder)


def _choose(
    model: MaskedModel,
    config: ResolvedConfig,
    context: parallel.DistContext,
    precision: Precision,
    restored: Restored,
) -> str:
    """Sets what computes the calls of a step on a CPU. Returns what that is, and why, in lines."""

    def measure(anew: bool) -> Choices:
        calls = calls_of(model, config.batch_size, config.mask_ratio, config.predict_ratio)
        return measured(calls, precision.autocast or torch.float32, anew=anew)

    return choose(config.tune, context.device, precision, restored, measure, context.any)


def _backends(
    config: ResolvedConfig,
    context: parallel.DistContext,
    precision: Precision,
    model: MaskedModel,
    decoding: str,
    chosen: str,
    compiling: str,
    parallelism: parallel.Parallelism,
    source: Source,
) -> dict[str, str]:
    """Returns which implementation of each part is used: what computes, what is compiled, what ranks share."""
    backends = describe_backends(context.device, precision, model.attention_shapes(config.mask_ratio), decoding)
    backends |= {"choice": chosen, "compile": compiling}
    backends |= {"parallel": f"{parallelism.kind} ({parallelism.reason})"}
    if config.float8:
        backends["float8"] = f"products of the encoder's blocks (torchao {version('torchao')})"
    if config.cuda_graph:
        backends["cuda_graph"] = "forward and backward pass (asked for)"
    if isinstance(source, CachedSource):
        backends["cache"] = describe_cache(source)
    return backends


def _model(
    config: ResolvedConfig, given: Given, start: Opened | None, context: parallel.DistContext
) -> tuple[MaskedModel, list[str]]:
    """Builds the model on its device. Its first weights follow from the seed, and from the encoder to begin with; or
    they are those of the model that was given.

    Returns it with an account of what of that encoder it has.
    """
    torch.manual_seed(config.seed)
    model = _fresh(config, given)
    name, ratio = "mask_ratio", config.mask_ratio
    try:
        model.num_visible(ratio)
        if config.mask_ratio_schedule is not None:
            name, ratio = "mask_ratio_schedule", config.mask_ratio_schedule
            model.num_visible(ratio)
        if config.predict_ratio is not None:
            name, ratio = "predict_ratio", config.predict_ratio
            model.num_predicted(min(config.mask_ratio, config.mask_ratio_schedule or 1), ratio)
    except ValueError as error:
        raise SettingError(name, ratio, f"{error}; choose another ratio or --input_size") from error
    if config.float8 and model.feature_dim % 16:
        problem = f"needs a width that is a multiple of 16, and that of the encoder is {model.feature_dim}"
        raise SettingError("float8", problem=f"{problem}; leave it out, or choose another --embed_dim")
    lines: list[str] = []
    if start is not None:
        lines = begin_with(model, start, config.init, fixed_positions=config.start_size is not None)
    elif config.init:
        lines = [f"start           {config.init} is not read again: the run goes on with its own weights"]
    return model.to(context.device), lines


def _fresh(config: ResolvedConfig, given: Given) -> MaskedModel:
    """Returns a model of a run, or a copy of the one that was given, that nothing wraps or shards yet."""
    if given.model is None:
        model: MaskedModel = build_model(ModelSpec.of(config))
    else:
        model, pixels = copy.deepcopy(given.model).train(), pixel_facts(config)
        if model.pixels != pixels:  # as the data have another type or range
            register_pixels(model, config.in_chans, config.mean, config.std, pixels)
        model.read_as = read_as(config)
    model.autocast_residual = config.residual == "bf16"
    return model


def _prepare(
    flags: PretrainConfig,
    config: ResolvedConfig,
    training_loss: TrainingLoss,
    masks_of: dict[Size, Masks],
    precision: Precision,
    context: parallel.DistContext,
) -> tuple[ResolvedConfig, str]:
    """Applies --float8, --checkpointing and --compile. Returns the settings with the mode that works here, and why."""

    def inputs() -> MicroBatch:
        size, masks = next(iter(masks_of.items()))
        shape, dtype = (config.batch_size, *size, config.in_chans), DTYPES[config.pixel_type]
        images = torch.zeros(shape, dtype=dtype, device=context.device)
        ids_shuffle = shuffled_ids(torch.arange(config.batch_size), masks, context.device)
        visible = () if config.mask_ratio_schedule is None else (torch.empty(masks.visible, 0, device=context.device),)
        return images, ids_shuffle, *visible

    shapes = len(masks_of) * len(_visible(config, training_loss.model.num_patches))
    return prepare_as_chosen(training_loss, flags.compile, config, inputs, precision, context.gather, shapes)


def _sizes(config: ResolvedConfig, model: MaskedModel) -> tuple[Size, ...]:
    """Returns the sizes of the crops of a run, from the smallest to that of the model."""
    if config.start_size is None:
        return (config.input_size,)
    ph, pw = model.patch_size
    unit = (2 * ph, 2 * pw) if config.masking == "grid" else (ph, pw)
    try:
        sizes = growing_sizes(config.start_size, config.input_size, unit)
        if not model.has_fixed_positions:
            raise ValueError("must be left out, as the model has positions of its own, which no smaller crop has")
        model.num_predicted(config.mask_ratio, config.predict_ratio, math.prod(model.grid_of(sizes[0])))
    except ValueError as error:
        raise SettingError("start_size", config.start_size, str(error)) from error
    if config.grow_epochs >= config.epochs:
        raise SettingError("grow_epochs", config.grow_epochs, f"must be below the {config.epochs} of --epochs")
    return sizes


def _masks(config: ResolvedConfig, model: MaskedModel, size: Size, file: MaskFile | None) -> Masks:
    grid = model.grid_of(size)
    visible = model.num_visible(config.mask_ratio, math.prod(grid))
    masks = choose_masks(config.masking, file, grid, visible, config.seed)
    return dataclasses.replace(masks, chance=config.mask_ratio) if model.masks_features else masks


def _visible(config: ResolvedConfig, patches: int) -> tuple[int, ...]:
    """Returns how many of so many patches are visible in the epochs of a run, one number for each step of a schedule.

    Without a schedule it is one number.
    """
    last = config.mask_ratio if config.mask_ratio_schedule is None else config.mask_ratio_schedule
    return visible_counts(int(patches * (1 - config.mask_ratio)), int(patches * (1 - last)), config.epochs)


def _seconds_at_peak(
    model: MaskedModel, run: Run[ResolvedConfig], sizes: tuple[Size, ...]
) -> Callable[[int], float | None]:
    """Returns what a step of an epoch would take if all devices computed at their peak; None where it is unknown."""
    config, context = run.config, run.context
    peak = peak_flops(torch.cuda.get_device_name(context.device)) if context.device.type == "cuda" else None

    @functools.cache
    def seconds(L: int, visible: int) -> float | None:
        flops = 3 * config.global_batch * flops_per_image(model, exact_ratio(visible, L), L, config.predict_ratio)
        return peak and flops / (context.size * peak)

    def at(epoch: int) -> float | None:
        L = math.prod(model.grid_of(size_in(epoch, sizes, config.grow_epochs)))
        return seconds(L, visible_in(epoch, _visible(config, L), config.epochs))

    return at


# --- batches ----------------------------------------------------------------------------------------------------------


def _stream(
    run: Run[ResolvedConfig], source: Source, facts: DataFacts, masks_of: dict[Size, Masks], image_decoder: str
) -> BatchStream:
    """Returns the run's batches. Each rollback changes the seed of their order, crops, flips and masks."""
    config = run.config
    seed = data_seed(config.seed, len(run.rollbacks))
    masks_of = {size: dataclasses.replace(masks, seed=seed) for size, masks in masks_of.items()}
    sizes, repeats = tuple(masks_of), config.repeated_masks
    reading, nodata = reading_of(config), nodata_of(pixel_facts(config))
    counts = _visible(config, math.prod(masks_of[sizes[-1]].grid))
    views = {size: View(size, reading, seed=seed, scale=config.crop_scale, flip=config.flip) for size in sizes}

    def view_of(epoch: int) -> View:
        return views[size_in(epoch, sizes, config.grow_epochs)]

    def to_inputs(batch: Batch) -> MicroBatch:
        """Returns the images, the ids_shuffle of their masks, and with a schedule how many patches are visible."""
        images, draw_ids = batch.images, batch.draw_ids
        if repeats > 1:
            images = images.repeat_interleave(repeats, dim=0)
            draw_ids = torch.from_numpy(mask_draws(draw_ids.numpy(), config.dataset_length, repeats))
        (H, W), device = images.shape[1:3], images.device
        masks = masks_of[H, W]
        if config.mask_ratio_schedule is not None:
            epoch = int(batch.draw_ids[0]) // config.dataset_length
            masks = dataclasses.replace(masks, visible=visible_in(epoch, counts, config.epochs))
        ids_shuffle = shuffled_ids(draw_ids, masks, device)
        if nodata is not None:
            run.log.exclude(excluded(images, ids_shuffle, masks, nodata))
        visible = () if config.mask_ratio_schedule is None else (torch.empty(masks.visible, 0, device=device),)
        return images, ids_shuffle, *visible

    return BatchStream(
        run,
        source,
        seed=seed,
        crops=config.batch_size // repeats,
        view_of=view_of,
        to_inputs=to_inputs,
        image_decoder=image_decoder,
        shares=facts.shares,
    )


def _tensors(model: MaskedModel, average: Average, anchor: Anchor, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """Returns all that a checkpoint of a run holds, by name."""
    means = in_checkpoint(average) | anchor_in_checkpoint(anchor)
    return training_tensors(model, optimizers.optimizer) | means | optimizers.tensors()


# --- the run folder ---------------------------------------------------------------------------------------------------


def _picture_path(folder: Path, epoch: int) -> Path:
    return folder / "reconstructions" / f"epoch-{epoch:04d}.png"


def _summary(
    config: ResolvedConfig, source: Source, facts: DataFacts, model: MaskedModel, masks_of: dict[Size, Masks]
) -> list[str]:
    """Returns the lines about data, model and batch with which a run begins."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    height, width = config.input_size
    labels = "labelled" if facts.labelled else "without labels"
    note = crops_note(source, config.input_size)
    lines = [
        f"data            {shown(config.data_path)}: {count_of(facts.length, facts.unit)} {facts.location}, {labels}",
        *(f"data            {line}" for line in facts.stock),
        *([f"data            {note}"] if note else []),
        *_about_shares(config, facts),
        f"model           {config.model}: {parameters / 1e6:.1f} M parameters, {height}×{width}×{config.in_chans}",
        *([f"model           {model.sizes}"] if any(getattr(config, name) for name in DECIDED) else []),
    ]
    decoder = model.about_decoder(config.mask_ratio, config.predict_ratio)
    lines += [f"decoder         {decoder}"] if decoder else []
    if len(masks_of) > 1:
        lines.append(f"sizes           {describe_sizes(list(masks_of), config.grow_epochs, config.epochs)}")
    lines.append(f"masks           {masks_of[config.input_size]}")
    if config.mask_ratio_schedule is not None:
        counts = _visible(config, model.num_patches)
        ratios = ", ".join(f"{1 - count / model.num_patches:.3g}" for count in counts)
        lines.append(
            f"masks           ratios {ratios}, one after another for equal parts of the {config.epochs} epochs"
        )
    lines += _without_targets(model, source)
    if config.adversarial:
        lines.append(f"adversary       {_about_adversary(config)}")
    lines.append(
        f"batch           {config.global_batch} {facts.unit} per step, lr {config.lr:.2e}, {config.epochs} epochs"
    )
    if next(model.parameters()).device.type == "cpu" and parameters >= LARGE_MODEL:
        lines.append(f"note            {_cpu_note(config, model)}")
    return lines


def _about_shares(config: ResolvedConfig, facts: DataFacts) -> list[str]:
    """Returns lines about what an epoch draws of each path, and about the weights that hold the encoder back."""
    lines: list[str] = []
    if facts.shares is not None:
        shares, total = facts.shares, facts.epoch_length
        each = ", ".join(
            f"{draws:,} of {images:,} ({draws / total:.3g} of it) from {path}"
            for path, draws, images in zip(config.data_path, shares.draws, shares.images, strict=True)
        )
        lines.append(f"data            an epoch draws {count_of(total, facts.unit)}: {each}")
    if config.l2sp:
        lines.append(f"held back       --l2sp {config.l2sp:g}: the encoder stays near the weights of {config.init}")
    return lines


def _about_adversary(config: ResolvedConfig) -> str:
    """Describes the discriminator, and when it takes part."""
    start, warm_up = config.adversarial_start or 0.0, config.adversarial_warmup or 0.0
    kind = config.adversarial_regulariser
    kept = {"r1": f"R1 penalty {config.adversarial_r1:g}" if config.adversarial_r1 else "", "spectral": "spectral norm"}
    return (
        f"patch discriminator, weight {config.adversarial:g} (adaptive), from epoch {start:g}, whole from epoch "
        f"{start + warm_up:g}; hinge loss, {kept.get(kind or 'none', 'no regulariser')}, lr {config.adversarial_lr:.2e}"
    )


def _unit(config: ResolvedConfig) -> str:
    """Returns what a run's samples are called: those of tables are rows."""
    return "images" if config.columns is None else "rows"


def _without_targets(model: MaskedModel, source: Source) -> list[str]:
    """Returns a line about the share of patches that are no targets, as pixels are missing, if there are any.

    Raises:
        UserError: every patch of the images that are looked at has a missing pixel, so that no loss is of anything.
    """
    nodata = nodata_of(model.pixels)
    if nodata is None:
        return []
    images = fixed_images(model, source, LOOKED_AT)
    if model.masks_features:
        share = 100 * float(missing_pixels(images, nodata).float().mean())
        what = f"{share:.2g} % of the numbers of {count_of(len(images), 'rows')} are missing"
        return [f"targets         {what}, and are never among them"] if share else []
    ids = torch.arange(model.num_patches, device=images.device).expand(len(images), -1)
    share = 100 * float(excluded_share(images, ids, model.patch_size, nodata))
    if share == 100:
        problem = f"every patch of the {len(images)} images that were looked at has a missing pixel (NaN, or --nodata)"
        raise UserError(f"{problem}, so nothing is left to be predicted; fill the gaps, or make patches smaller")
    what = f"{share:.2g} % of the patches of {count_of(len(images), 'images')} have a missing pixel"
    return [f"targets         {what}, and are never among them"] if share else []


def _cpu_note(config: ResolvedConfig, model: MaskedModel) -> str:
    """Returns how long a step of a large model takes on this CPU, roughly, and what to do instead."""
    flops = 3 * flops_per_image(model, config.mask_ratio) * config.batch_size * config.accum_iter
    seconds = flops / (CORE_FLOPS * torch.get_num_threads())
    rounded = float(f"{seconds:.1g}")
    duration = f"{rounded:g} s" if rounded < 120 else f"{rounded / 60:.0f} minutes"
    return (
        f"a step of {config.model} takes about {duration} on {torch.get_num_threads()} cores of a CPU; train on a GPU, "
        "or give --model mae_vit_tiny_patch16 for small data"
    )


def _whole_model(run: Run[ResolvedConfig], model: MaskedModel) -> MaskedModel | None:
    """Returns the model as one rank can use it alone: not sharded, and without float8, which is for training.

    All ranks call it; it is None on all but the main one.
    """
    weights = in_one_piece(model.state_dict(), keep=run.context.is_main)
    if not run.context.is_main:
        return None
    if not (is_sharded(model) or run.config.float8):
        return model
    whole = _fresh(run.config, run.given).to(model.mean.device)
    whole.load_state_dict(weights)
    return whole


def _export(
    run: Run[ResolvedConfig],
    step: int,
    masks: Masks,
    model: MaskedModel,
    optimizer: torch.optim.Optimizer,
    average: Average,
    source: Source,
) -> str | None:
    """Writes the official files and the pictures after an epoch. Returns what could not be written, if anything.

    All ranks call it, and the main one writes.
    """
    require_finite_weights(run, model, step)
    official = collect_official(run, model, optimizer)
    means = in_one_piece(average, keep=run.context.is_main)
    whole, config, epoch = _whole_model(run, model), run.config, step // run.steps.per_epoch
    if whole is None:
        return None

    def write() -> None:
        path = official_path(run.folder, epoch)
        write_official(path, official.weights, official.moments, epoch, config)
        if means:
            path_of_means = path.with_stem(f"{path.stem}-ema")
            write_official(path_of_means, official.weights | means, official.moments, epoch, config)
        if whole.has_pictures:
            _picture(_picture_path(run.folder, epoch), config.mask_ratio, masks, whole, source)
            run.log.picture(step + 1, _picture_path(run.folder, epoch))

    return try_to_write(write)


def _picture(path: Path, mask_ratio: float, masks: Masks, model: MaskedModel, source: Source) -> None:
    """Draws fixed images with fixed masks, so that the pictures of a run can be compared."""
    images = fixed_images(model, source, PICTURE_IMAGES)
    ids_shuffle = shuffled_ids(torch.arange(len(images)), masks, images.device)
    with torch.compiler.set_stance("force_eager"):
        rows = reconstruct(model, images, ids_shuffle, mask_ratio=mask_ratio)
    save_grid(path, rows, caption(model, mask_ratio))


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Probed:
    """What is measured while and after a run trains, and on what."""

    pictured: Source
    """What reconstructions are drawn of: the images that are held out, or else those that are trained on."""
    held: Source | None = None
    """The images that are held out, on which the loss is measured after each epoch."""
    parts: tuple[Source, Source] | None = None
    """What is fitted on and what is scored, before and after the training; None to measure nothing."""
    some: tuple[Source, Source] | None = None
    """The same for --probe_freq, of large parts evenly spaced images."""
    of_paths: tuple[tuple[Source, Source], ...] = ()
    """The same of each path of --data_weights, for k-NN: what is learnt of one may be forgotten of another."""
    is_asked: bool = False
    """Whether the user asked for it, who is then told what goes wrong by an error."""
    lines: tuple[str, ...] = ()
    """What a run says of it when it begins."""


def _probed(flags: PretrainConfig, config: ResolvedConfig, given: Given, source: Source, held: Source | None) -> Probed:
    """Opens what losses and accuracies are measured on.

    Raises:
        UserError: --probe or --probe_freq was given, and no accuracy can be measured.
    """
    lines: tuple[str, ...] = ()
    if held is not None:
        lines = (f"held out        {_about_held_out(held, _unit(config))}",)
    nothing = Probed(source if held is None else held, held, lines=lines)
    if not config.probe and config.probe_freq is None:
        return nothing
    is_asked = bool(flags.probe) or flags.probe_freq is not None
    try:
        train, val = scored_parts(given.data or config.data_path, read_as(config))
    except UserError as error:
        if is_asked:
            name = "probe" if flags.probe_freq is None else "probe_freq"
            raise SettingError(name, problem=f"{_reason(error, config)}; leave it out") from error
        reason = _left_out(f"{_reason(error, config)}; --probe False leaves it out")
        return dataclasses.replace(nothing, lines=(*lines, reason))
    parts = train, val
    some = None if config.probe_freq is None else (_some_of(train), _some_of(val))
    lines += tuple(f"probe           {item}" for item in val.stock.left_out)
    of_paths: tuple[tuple[Source, Source], ...] = ()
    if config.data_weights is not None and some is not None:
        of_paths, unscored = _of_paths(config)
        lines += unscored
    return Probed(nothing.pictured, held, parts if config.probe else None, some, of_paths, is_asked, lines)


def _of_paths(config: ResolvedConfig) -> tuple[tuple[tuple[Source, Source], ...], tuple[str, ...]]:
    """Returns both parts of each path whose accuracy can be measured apart, and lines about those where it cannot; none
    at all if it is not possible with every path, as their numbers would not tell whose they are."""
    parts: list[tuple[Source, Source]] = []
    for path in config.data_path:
        try:
            train, val = scored_parts(path, read_as(config))
        except UserError as error:
            return (), (_left_out(f"{_reason(error, config)}; so k-NN is not measured for each path"),)
        parts.append((_some_of(train), _some_of(val)))
    return tuple(parts), ()


def _about_held_out(held: Source, unit: str) -> str:
    some = len(some_of(held))
    measured = "" if some == len(held) else f", of which {some:,} are measured"
    return f"{count_of(len(held), unit)}, drawn by the seed and never trained on{measured}"


def _some_of(part: Source) -> Source:
    return part if len(part) <= PROBE_LIMIT else Subset(part, evenly_spaced(part, PROBE_LIMIT, PROBE_RUN))


def _reason(error: UserError, config: ResolvedConfig) -> str:
    """Returns what is wrong with the data, without the name of the setting that gave their path."""
    return f"{shown(config.data_path)}: {error.problem}" if isinstance(error, SettingError) else str(error)


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _left_out(reason: str) -> str:
    return f"probe           no accuracy is measured: {reason}"


def _probe(run: Run[ResolvedConfig], when: str, model: MaskedModel, probed: Probed) -> dict[str, Any]:
    """Adds the accuracies "before" or "after" to probe.json, unless they are there, and returns all that it holds.

    All ranks call it, and the main one measures; the others return an empty dict, and so does the main one if there is
    nothing to measure. A probe that nobody asked for never ends a run.
    """
    whole = None if probed.parts is None else _whole_model(run, model)
    if whole is None or probed.parts is None:
        return {}
    train, val = probed.parts
    try:
        results, _ = read_probes(run.folder)
        if when not in results:
            count = f"{len(train):,} + {len(val):,} images"
            run.say(f"probe           measuring k-NN and linear-probe accuracy {when} pretraining, on {count} …")
            with torch.compiler.set_stance("force_eager"):  # whole images are another shape: compiling takes longer
                results[when] = probe(whole, train, val, num_workers=run.config.num_workers)
                results[when] |= _knn_of_paths(run, whole, probed.of_paths)
            write_text(run.folder / "probe.json", json.dumps(results, indent=1))
    except Exception as error:
        if probed.is_asked:
            raise
        run.say(_left_out(_in_a_line(error)))
        return {}
    return results


def _measure_epoch(
    run: Run[ResolvedConfig],
    step: int,
    model: MaskedModel,
    probed: Probed,
    masks: Masks,
    autocast: torch.autocast,
) -> dict[str, float]:
    """Measures, after the last step of an epoch, the loss on images that are held out, how far features spread, and the
    accuracies that --probe_freq asks for. Returns them by name; an empty dict if there are none.

    All ranks call it, and the main one measures. What goes wrong in the middle of a run is said in a line, and the
    training goes on.
    """
    epochs, held = (step + 1) // run.steps.per_epoch, probed.held
    probes = probed.some is not None and epochs % (run.config.probe_freq or 1) == 0
    if not run.steps.ends_epoch(step) or (held is None and not probes):
        return {}
    require_finite_weights(run, model, step)
    whole, config, found, began = _whole_model(run, model), run.config, dict[str, float | None](), time.perf_counter()
    if whole is None:
        return {}
    ratios, workers = (config.mask_ratio, config.predict_ratio), config.num_workers
    try:
        with torch.compiler.set_stance("force_eager"):
            if held is not None:
                loss, bad = held_out_loss(whole, held, masks, *ratios, autocast=autocast, num_workers=workers)
                found["held_out_loss"] = loss
                run.watchdog.beat()
                if bad and epochs == run.restored.step // run.steps.per_epoch + 1:  # once, they are always the same
                    first = f"such as {bad[0].name} ({bad[0].reason})"
                    run.say(f"held out        {count_of(len(bad), 'unusable images')} not measured, {first}")
            if probes and probed.some is not None:
                found |= _probe_after(run, epochs, whole, probed.some, probed.of_paths)
            spread_of = held if held is not None else probed.some and probed.some[1]
            assert spread_of is not None
            found |= feature_spread(whole, spread_of, num_workers=workers)
    except Exception as error:
        run.say(_left_out(f"after epoch {epochs}, {_in_a_line(error)}"))
    run.log.leave_out(time.perf_counter() - began)
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def _of_epoch(run: Run[ResolvedConfig], step: int, model: MaskedModel, measured: dict[str, float]) -> dict[str, float]:
    """Returns what stands in the line of an epoch in log.txt, too: held-out loss, and the mask ratio of a schedule."""
    found = {name: value for name, value in measured.items() if name == "held_out_loss"}
    if run.config.mask_ratio_schedule is not None:
        L = model.num_patches
        visible = visible_in(step // run.steps.per_epoch, _visible(run.config, L), run.config.epochs)
        found["mask_ratio"] = round(1 - visible / L, 4)
    return found


def _probe_after(
    run: Run[ResolvedConfig],
    epochs: int,
    whole: MaskedModel,
    parts: tuple[Source, Source],
    of_paths: tuple[tuple[Source, Source], ...],
) -> dict[str, float]:
    """Adds the accuracies after ``epochs`` to probe.json, from which those of later ones are dropped; returns them."""
    results, _ = read_probes(run.folder)
    accuracies = probe(whole, *parts, num_workers=run.config.num_workers)
    each = _knn_of_paths(run, whole, of_paths)
    accuracies |= each
    earlier = {number: values for number, values in results.get("epochs", {}).items() if int(number) < epochs}
    results["epochs"] = earlier | {str(epochs): accuracies}
    write_text(run.folder / "probe.json", json.dumps(results, indent=1))
    knn, linear = accuracies["knn"], accuracies["linear"]
    paths = f" (by path {', '.join(f'{value:.1f}' for value in each.values())})" if each else ""
    run.say(f"probe           after epoch {epochs}: k-NN {knn:.1f} %{paths}, linear probe {linear:.1f} %")
    return {"knn": knn, "linear": linear, **each}


def _knn_of_paths(
    run: Run[ResolvedConfig], whole: MaskedModel, of_paths: tuple[tuple[Source, Source], ...]
) -> dict[str, float]:
    """Returns the accuracy of k-NN on each path by itself, counted from 1."""
    workers = run.config.num_workers
    return {f"knn_path_{n}": knn_accuracy(whole, *parts, num_workers=workers) for n, parts in enumerate(of_paths, 1)}


def _shown(accuracies: dict[str, Any]) -> list[str]:
    """Returns lines with the accuracies before and after pretraining."""
    lines = []
    names = {"knn": "k-NN", "linear": "linear probe"}
    names |= {
        key: f"k-NN, path {key.removeprefix('knn_path_')}" for key in accuracies.get("after", ()) if "path" in key
    }
    for key, name in names.items() if "after" in accuracies else ():
        before = f"{accuracies['before'][key]:.1f} % before, " if key in accuracies.get("before", ()) else ""
        lines.append(f"{name:15} {before}{accuracies['after'][key]:.1f} % after pretraining")
    return lines
