"""The loop of fine-tuning, in the order in which things happen: settings, data, encoder, resume, steps, what is left.

It is the other loop that is composed of the parts of fastmae/train; pretraining is the first (pretrain.py). What the
encoder learns with its new head is a ``Task`` of plain functions: classify.py, segment.py and others have one each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from fastmae.checkpoint.load import Opened, open_checkpoint, own_data, read_settings
from fastmae.checkpoint.official import report
from fastmae.checkpoint.restore import Restored
from fastmae.checkpoint.save import training_tensors
from fastmae.config import AnyTuned, PretrainConfig, TuningConfig, images_given, read_as
from fastmae.config.model import ModelSpec
from fastmae.config.shape import ENCODER_SHAPE
from fastmae.config.shared import ReadingConfig
from fastmae.data.loader import Batch, View, default_workers, describe_decoder
from fastmae.data.sample import crops_note
from fastmae.data.sources import Parts, Source, Subset, describe, shown
from fastmae.data.statistics import range_line
from fastmae.data.stock import RUN_LINES, joined
from fastmae.data.survey import take_stock
from fastmae.errors import SettingError
from fastmae.evaluate.pixels import measure_for
from fastmae.facts import UINT8, ReadAs
from fastmae.model.build import build_model
from fastmae.model.calls import calls_of
from fastmae.model.classifier import merge_lora, tune
from fastmae.model.family import MaskedModel
from fastmae.model.mae import MaskedAutoencoderViT
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

Flags = TypeVar("Flags", bound=TuningConfig)
Tuned = TypeVar("Tuned", bound=AnyTuned)


@dataclass(frozen=True)
class Task(Generic[Flags, Tuned]):
    """What an encoder is tuned for, as functions in the order in which the loop calls them."""

    built_in: str
    """The built-in data that are taken where there are no others."""
    fixed: tuple[str, ...]
    """The settings that a run keeps, as ``FIXED_IN_A_FINETUNING``."""
    require: Callable[[MaskedModel], None]
    """Refuses a model for whose encoder there is no head."""
    open_data: Callable[[Flags, Parts | str | tuple[str, ...], ReadAs], tuple[Source, Source]]
    """Maps the settings, the data that they name or that were given, and how images are read to the part that is
    learnt from and the part that is tested on, both with what the task needs beside the images."""
    resolve: Callable[[Flags, Source, Source, Opened, parallel.DistContext], Tuned]
    """Fills in every default from the settings, both parts of the data, the encoder and the machine."""
    model_of: Callable[[Opened, Tuned], Any]
    """Makes the model: a copy of the encoder with a head, of which ``tune`` chose the weights to train."""
    loss_of: Callable[[Any, Tuned], nn.Module]
    """Makes the module that maps the inputs of a micro-batch to its loss, and images alone to the model's results."""
    example: Callable[[Any, Tuned, torch.device], MicroBatch]
    """Makes inputs of the shapes that the run has; their values do not matter."""
    learns: Callable[[Tuned], str]
    """Says what the head learns, such as "10 classes"."""
    notes: Callable[[Tuned, Source], list[str]]
    """Returns further lines with which a run begins."""
    view: Callable[[Tuned, int], View]
    """Maps the settings and a seed to how a sample becomes an input."""
    inputs: Callable[[Tuned, Source, Any, int], Callable[[Batch], MicroBatch]]
    """Maps the settings, the part that is learnt from, the model and a seed to what turns batches into inputs."""
    test: Callable[[Run[Tuned], int, Source, nn.Module, torch.autocast], dict[str, float]]
    """Measures the model on the part that is tested on after an epoch, on all ranks, and says what it found."""


def tune_encoder(task: Task[Flags, Tuned], config: Flags, given: Given = NOTHING) -> int:
    """Runs or continues the training of a task and returns the exit status: 0 when done, 75 when stopped by a signal.

    Args:
        task: what is learnt.
        config: the settings.
        given: what a program gives in place of the data that they name.

    Raises:
        UserError: settings, data or checkpoints that cannot work.
    """
    return run_attempts(_with_data(task, config), partial(_finetune, task, given))


def _finetune(
    task: Task[Flags, Tuned], given: Given, flags: Flags, context: parallel.DistContext, stop: StopSignals
) -> int | None:
    """Makes one attempt, from where --resume says to the end or a signal. Returns None after a rollback."""
    # Settings, data and encoder, the same on every rank: from here on nothing is left open.
    with parallel.agreeing(context) as same:
        flags, train, val, encoder, lines = _open(task, flags, given, context)
        config, notes = resolve_as_before(flags, lambda flags: _resolve(task, flags, train, val, encoder, context))
        precision = _precision(config, context)
        steps = plan_steps(config, context.size, config.batch_size, "training images")
        same |= identity(flags, config, {"train": train, "val": val}, encoder.model if flags.finetune else None)

    # Model, loss and optimiser, the same on every rank.
    model = task.model_of(encoder, config).to(context.device)
    task_loss = task.loss_of(model, config)
    config, compiling = _prepare(task, flags, config, task_loss, model, precision, context)
    parallelism = parallel.choose_parallelism(config.parallel, config.reduce, config.shard_size, context, precision)
    loss_of = parallel.parallelize(task_loss, context, parallelism)
    optimizer = make_finetuning_optimizer(model, config.lr, config.weight_decay, config.layer_decay)
    graph = PassGraph() if config.cuda_graph else None
    bf16 = WeightCopies(model) if precision.autocast == torch.bfloat16 else None

    # Where to begin.
    restored, rollbacks = restore_attempt(config, model, optimizer, steps, same, task.fixed)
    chosen = _choose(model, config, context, precision, restored)
    backends = _backends(config, context, precision, parallelism, model, compiling, chosen)
    summary = [*_summary(task, config, train, val, model), *lines, *notes]
    run = open_run(config, given, context, stop, steps, restored, rollbacks, same, summary=summary, backends=backends)

    # The loop.
    stream = _stream(task, run, train, model)
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
                run.log.end_epoch(epoch, task.test(run, epoch, val, loss_of, autocast) if is_tested else {})

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


def _with_data(task: Task[Flags, Tuned], config: Flags) -> Flags:
    """Returns the settings with the data of the encoder's own run, if none were given."""
    if config.data_path is not None:
        return config
    if config.finetune:
        data = own_data(config.finetune, read_settings(config.finetune))
    else:
        data = task.built_in
        line = f"was not given, and there is no encoder with data of its own; the built-in {data} are used"
        report("data_path", [line])
    return dataclasses.replace(config, data_path=data)


def _open(
    task: Task[Flags, Tuned], flags: Flags, given: Given, context: parallel.DistContext
) -> tuple[Flags, Source, Source, Opened, tuple[str, ...]]:
    """Opens the encoder, and the data as it reads images. Returns the settings, with what it says of that, both parts
    of the data, the encoder, and lines about the value range."""
    flags = as_begun(flags)
    data = given.data or flags.data_path
    assert data is not None
    torch.manual_seed(flags.seed)
    preset = f"mae_{flags.model}" if flags.model and flags.model.startswith("vit_") else flags.model
    if not flags.finetune:
        train, val = task.open_data(flags, data, read_as(flags))
        return flags, train, val, *_random_encoder(flags, preset, train, context)
    known = {"input_size": flags.input_size, "mean": flags.mean, "std": flags.std, **images_given(flags)}
    reading = ReadingConfig(model=preset, **known)
    encoder = open_checkpoint(flags.finetune, reading, resize=False)
    task.require(encoder.model)
    train, val = task.open_data(flags, data, encoder.model.read_as)
    lines = measure_for(encoder, reading, train)
    if not lines and encoder.model.pixels != UINT8:
        lines = (range_line(encoder.model.pixels, "that of the encoder"),)
    flags = dataclasses.replace(flags, **images_given(flags, encoder.settings))
    return flags, train, val, encoder, lines


def _random_encoder(
    flags: TuningConfig, preset: str | None, train: Source, context: parallel.DistContext
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
    task: Task[Flags, Tuned],
    flags: Flags,
    train: Source,
    val: Source,
    encoder: Opened,
    context: parallel.DistContext,
) -> Tuned:
    """Fills in every default from the data, the encoder and the machine.

    Raises:
        UserError: settings that do not go together.
    """
    config = task.resolve(flags, train, val, encoder, context)
    own = _shape_of(encoder)
    for name in ENCODER_SHAPE:
        if getattr(flags, name) not in (None, own.get(name)):
            its = f"{own[name]:g}" if name in own else "no such size"
            raise SettingError(name, getattr(flags, name), f"the encoder has {its}; leave it out")
    if flags.patch_size is not None and (flags.patch_size[0], flags.patch_size[-1]) != config.patch_size:
        pixels = "{}×{}".format(*config.patch_size)
        raise SettingError("patch_size", flags.patch_size, f"the encoder's patches have {pixels} pixels; leave it out")
    if config.warmup_epochs >= config.epochs:
        raise SettingError("warmup_epochs", config.warmup_epochs, f"must be below the {config.epochs} of --epochs")
    return config


def known_of(encoder: Opened, context: parallel.DistContext) -> dict[str, Any]:
    """Returns what the encoder and the machine decide, as the functions that resolve the settings of tasks take it."""
    shape = {}
    if isinstance(encoder.model, MaskedAutoencoderViT):
        shape = beyond_preset(encoder.settings["model"], _shape_of(encoder))
    return dict(
        model=encoder.settings["model"],
        width=encoder.model.feature_dim,
        img_size=encoder.model.img_size,
        patch_size=encoder.model.patch_size,
        shape={name: value for name, value in shape.items() if name in ENCODER_SHAPE},
        pixels=encoder.model.pixels,
        other_types="convert" if encoder.model.read_as.converts else "skip",
        mean=tuple(encoder.model.mean.tolist()),
        std=tuple(encoder.model.std.tolist()),
        ranks=context.size,
        num_workers=default_workers(),
        on_gpu=context.device.type == "cuda",
    )


def _shape_of(encoder: Opened) -> dict[str, Any]:
    return sizes_of(encoder.model).shape if isinstance(encoder.model, MaskedAutoencoderViT) else {}


def _precision(config: AnyTuned, context: parallel.DistContext) -> Precision:
    """Returns the number format of the run.

    Raises:
        UserError: the device does not have it, or no CUDA graphs.
    """
    precision = choose_precision(config.precision, context.device)
    if config.cuda_graph:
        require_graph(context.device, context.size)
    return precision


def _choose(
    model: Any,
    config: AnyTuned,
    context: parallel.DistContext,
    precision: Precision,
    restored: Restored,
) -> str:
    """Sets what computes the calls of a step on a CPU. Returns what that is, and why, in lines."""

    def measure(anew: bool) -> Choices:
        return measured(calls_of(model, config.batch_size), precision.autocast or torch.float32, anew=anew)

    return choose(config.autotune, context.device, precision, restored, measure, context.any)


def _backends(
    config: AnyTuned,
    context: parallel.DistContext,
    precision: Precision,
    parallelism: parallel.Parallelism,
    model: Any,
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
    task: Task[Flags, Tuned],
    flags: Flags,
    config: Tuned,
    loss_of: nn.Module,
    model: Any,
    precision: Precision,
    context: parallel.DistContext,
) -> tuple[Tuned, str]:
    """Applies --checkpointing and --compile. Returns the settings with the mode that works here, and why."""

    def inputs() -> MicroBatch:
        return task.example(model, config, context.device)

    return prepare_as_chosen(loss_of, flags.compile, config, inputs, precision, context.gather)


def choose_weights(model: Any, config: AnyTuned) -> None:
    """Chooses which weights of a model are trained, as --tune says, in place.

    Raises:
        SettingError: the model has fewer blocks, or no attention.
    """
    try:
        tune(model, config.tune, config.lora_rank)
    except ValueError as error:
        raise SettingError("tune", config.tune, f"{error}; tune at most those, or use --tune=full") from error


def _stream(task: Task[Flags, Tuned], run: Run[Tuned], train: Source, model: Any) -> BatchStream:
    """Returns the run's batches. Each rollback changes the seed of their order and of every augmentation."""
    seed = data_seed(run.config.seed, len(run.rollbacks))
    view = task.view(run.config, seed)
    to_inputs = task.inputs(run.config, train, model, seed)
    crops = run.config.batch_size
    return BatchStream(run, train, seed=seed, crops=crops, view_of=lambda epoch: view, to_inputs=to_inputs)


# --- the run folder ---------------------------------------------------------------------------------------------------


def _export(run: Run[Tuned], step: int, model: Any, optimizer: torch.optim.Optimizer) -> str | None:
    """Writes the official files after an epoch. Returns what could not be written, if anything. All ranks call it."""
    require_finite_weights(run, model, step)
    official = collect_official(run, model, optimizer)
    if not run.context.is_main:
        return None
    epoch, weights = step // run.steps.per_epoch, merge_lora(official.weights)
    path = official_path(run.folder, epoch)
    return try_to_write(lambda: write_official(path, weights, official.moments, epoch, run.config))


def _summary(task: Task[Flags, Tuned], config: Tuned, train: Source, val: Source, model: Any) -> list[str]:
    """Returns the lines about data, encoder, tuned parameters and batch with which a run begins."""
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, tuned = sum(count for count, _ in parameters), sum(count for count, trained in parameters if trained)
    height, width = config.input_size
    encoder = f"{config.finetune or 'random weights'}: {config.model}, {height}×{width}×{config.in_chans}"
    share = f"{tuned / 1e6:.2f} of {total / 1e6:.2f} M parameters"
    val_stock = val.stock if isinstance(val, Subset) else take_stock(val, config.in_chans, reading_of(config).read_as)
    stock = joined((take_stock(train, config.in_chans, reading_of(config).read_as), val_stock))
    note = crops_note(train, config.input_size)
    return [
        f"data            {shown(config.data_path)}: {len(train):,} to learn {train.location}, {len(val):,} to test",
        *(f"data            {line}" for line in stock.lines(RUN_LINES)),
        *([f"data            {note}"] if note else []),
        f"encoder         {encoder}",
        f"tuned           {config.tune}: {share}, {task.learns(config)}",
        f"batch           {config.global_batch} images per step, lr {config.lr:.2e}, {config.epochs} epochs",
        *task.notes(config, train),
    ]
