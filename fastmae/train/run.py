"""What the two stories of training share: a run's steps, its folder and screen, the end of a step, going back.

pretrain.py and finetune.py compose it, and say in which order it happens; what is learnt, and from what, is theirs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from fastmae.checkpoint.manifest import MANIFEST, find_checkpoint, set_aside_newer
from fastmae.checkpoint.official import write_training_file, write_weights_file
from fastmae.checkpoint.restore import Restored, on_main
from fastmae.checkpoint.save import Saver
from fastmae.config import FinetuneConfig, PretrainConfig, ResolvedConfig, ResolvedFinetuneConfig, resolve
from fastmae.data.decode import FOLDER_CHANNELS
from fastmae.data.loader import Batch, default_workers, load_batches
from fastmae.data.masks import MaskFile
from fastmae.data.plan import micro_batches, plan_epoch
from fastmae.data.quarantine import Quarantine
from fastmae.data.sources import Source, shown
from fastmae.data.statistics import channel_statistics
from fastmae.environment import hardware, versions
from fastmae.errors import UserError
from fastmae.facts import DataFacts
from fastmae.files import write_text
from fastmae.model.mae import IMAGENET_MEAN, IMAGENET_STD
from fastmae.ops.attention import attention_backend
from fastmae.ops.backends import asked_backends, describe_ops, using
from fastmae.ops.linear import describe_linear
from fastmae.train import parallel
from fastmae.train.allocator import keep_freed_memory
from fastmae.train.health import (
    EXIT_INTERRUPTED,
    LossSpikes,
    StopSignals,
    Watchdog,
    first_not_finite,
    read_detours,
    report_not_finite,
    require_finite,
    restart_hazard,
    write_detours,
)
from fastmae.train.metrics import Screen, StepLog
from fastmae.train.optim import learning_rate
from fastmae.train.precision import Precision
from fastmae.train.sinks import check_sinks, open_sinks
from fastmae.train.step import MicroBatch

MIN_CHECKPOINT_STEPS = 300
NAMED_SAMPLES = 8

Say = Callable[[str], None]
Request = tuple[np.ndarray, np.ndarray]
Flags = TypeVar("Flags", PretrainConfig, FinetuneConfig)
Resolved = ResolvedConfig | ResolvedFinetuneConfig


def run_attempts(flags: Flags, course: Callable[[Flags, parallel.DistContext, StopSignals], int | None]) -> int:
    """Joins the ranks and runs courses of a story until one says with which status it ends; None is once more."""
    check_sinks(flags.log_dir, flags.wandb)
    context = parallel.start(flags.device)
    if context.device.type == "cpu":
        keep_freed_memory()
    try:
        with using(ops=flags.ops, attention=flags.attention), StopSignals() as stop:
            while (status := course(flags, context, stop)) is None:
                flags = dataclasses.replace(flags, resume="auto")
            return status
    finally:
        parallel.stop(context)


# --- settings ---------------------------------------------------------------------------------------------------------


def resolve_settings(
    flags: PretrainConfig, source: Source, facts: DataFacts, context: parallel.DistContext, mask_file: MaskFile | None
) -> ResolvedConfig:
    """The configuration of a pretraining with every default filled in."""
    in_chans = flags.in_chans or facts.channels
    if facts.kind == "folder" and in_chans not in FOLDER_CHANNELS:
        raise UserError(f"--in_chans {in_chans}: image files give 1, 3 or 4 channels; use an array for others")
    mean, std = flags.mean, flags.std
    if mean is None or std is None:
        imagenet = facts.kind == "folder" and in_chans == 3
        measured = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else channel_statistics(source, in_chans)
        mean, std = mean or measured[0], std or measured[1]
    masks = None if mask_file is None else mask_file.facts
    return resolve(flags, facts, mean=mean, std=std, ranks=context.size, num_workers=default_workers(), masks=masks)


def as_json(config: Resolved) -> dict[str, Any]:
    """The configuration as it looks after a round trip through JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


@dataclass(frozen=True)
class Steps:
    """The optimiser steps of a run, the same for every split of the global batch."""

    per_epoch: int
    total: int
    between_checkpoints: int

    def epoch_and_index(self, step: int) -> tuple[int, int]:
        """The epoch of a step and its number in it."""
        return divmod(step, self.per_epoch)


def plan_steps(config: Resolved, context: parallel.DistContext, crops: int, images: str) -> Steps:
    """Counts the steps.

    Args:
        crops: decoded for a micro-batch of a rank.
        images: what the data set's are called.

    Raises:
        UserError: there are not enough for one.
    """
    of_a_rank = micro_batches(config.dataset_length, crops, context.size, config.accum_iter, config.keep_last)
    per_epoch = of_a_rank // config.accum_iter
    if per_epoch < 1:
        size = f"--batch_size {config.batch_size}"
        size += f" × --accum_iter {config.accum_iter}" if config.accum_iter > 1 else ""
        size += f" × {context.size} ranks" if context.size > 1 else ""
        fits = config.dataset_length // (config.accum_iter * context.size) * (config.batch_size // crops)
        remedy = f"lower --batch_size to at most {fits}" if fits else "lower --accum_iter or the ranks"
        given = f"the {config.dataset_length} {images} of {shown(config.data_path)}"
        raise UserError(f"{size} is more than {given}; {remedy}, or use --keep_last")
    between_checkpoints = config.checkpoint_freq or per_epoch * math.ceil(MIN_CHECKPOINT_STEPS / per_epoch)
    return Steps(per_epoch, config.epochs * per_epoch, between_checkpoints)


def rate_at(step: int, config: Resolved, steps: Steps) -> float:
    """The learning rate of a step."""
    epoch, index = steps.epoch_and_index(step)
    return learning_rate(
        epoch + index / steps.per_epoch,
        lr=config.lr,
        min_lr=config.min_lr,
        warmup_epochs=config.warmup_epochs,
        epochs=config.epochs,
    )


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


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run from its beginning, or from where it goes on, to its end: what it writes to, and whom it listens to."""

    config: Resolved
    settings: dict[str, Any]
    """The same as JSON."""
    folder: Path
    steps: Steps
    context: parallel.DistContext
    detours: list[int]
    """Steps after which it went on with other data."""
    stop: StopSignals
    asked_to_stop: parallel.StopFlag
    screen: Screen
    log: StepLog
    quarantine: Quarantine
    saver: Saver
    watchdog: Watchdog

    def say(self, line: str) -> None:
        self.screen.say(line)


def known_detours(folder: Path, restored: Restored) -> list[int]:
    """Those before the step that a run goes on from."""
    return read_detours(folder, restored.step, Path(restored.origin) / MANIFEST if restored.origin else None)


def open_run(
    config: Resolved,
    settings: dict[str, Any],
    context: parallel.DistContext,
    stop: StopSignals,
    steps: Steps,
    restored: Restored,
    detours: list[int],
    backends: dict[str, str],
) -> Run:
    """Opens screen, log and folder once every rank has looked at what was there. All ranks call it."""
    folder = Path(config.output_dir)
    context.barrier()  # every rank has looked before the first one writes
    screen = Screen(
        total_steps=steps.total,
        epochs=config.epochs,
        images_a_step=config.global_batch,
        start_step=restored.step,
        shows=context.is_main,
    )
    places = dict(log_dir=config.log_dir, wandb=config.wandb) if context.is_main else dict(log_dir=None, wandb=None)
    log = StepLog(
        folder,
        device=context.device,
        log_freq=config.log_freq,
        rank=context.rank,
        ranks=context.size,
        mean_over_ranks=context.mean,
        num_workers=config.num_workers,
        spike_score=LossSpikes().score,
        sinks=open_sinks(folder, **places, settings=settings, say=screen.say),
        say=screen.say,
    )
    if context.is_main:
        _write_beginning(folder, settings, context, backends)
    quarantine = "quarantine.jsonl" if context.size == 1 else f"quarantine-{context.rank}.jsonl"
    keep_every = config.keep_every and config.keep_every * steps.between_checkpoints
    return Run(
        config=config,
        settings=settings,
        folder=folder,
        steps=steps,
        context=context,
        detours=detours,
        stop=stop,
        asked_to_stop=parallel.StopFlag(context),
        screen=screen,
        log=log,
        quarantine=Quarantine(folder / quarantine, config.max_corrupt),
        saver=Saver(folder, keep=config.keep, keep_every=keep_every, background=config.async_save),
        watchdog=Watchdog(config.hang_timeout, folder / f"hang-{context.rank}.txt", f"rank {context.rank}"),
    )


def _write_beginning(
    folder: Path, settings: dict[str, Any], context: parallel.DistContext, backends: dict[str, str]
) -> None:
    """Writes config.json, and a line for this start in environment.jsonl."""
    start = {
        "command": sys.argv,
        "ranks": context.size,
        "versions": versions(),
        "hardware": hardware(),
        "backends": backends,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.json", json.dumps(settings, indent=1))
        with open(folder / "environment.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error}); name another") from error


def announce_beginning(run: Run, restored: Restored, backends: dict[str, str]) -> None:
    """What is used, and from where the run goes on; checkpoints after it are set aside. For the first rank."""
    for name, choice in backends.items():
        run.say(f"{name:15} {choice}")
    if restored.origin is not None:
        run.say(f"resumed         {restored.origin}, after step {restored.step}")
    if (hazard := restart_hazard()) is not None:
        run.say(f"restarts        {hazard} (docs/large-runs.md)")
    if run.detours:
        after = " and ".join(map(str, run.detours))
        run.say(f"other data      after step {after}, as losses were not finite there")
    for path in set_aside_newer(run.folder, restored.step):
        run.say(f"set aside       {path}, as the run goes on from before it; delete it when nobody needs it")


def begin(run: Run, restored: Restored) -> None:
    """Takes up the log where the run goes on, and waits for all ranks."""
    run.log.resume(restored.step, restored.step // run.steps.per_epoch, restored.epoch_sums)
    run.context.barrier()


# --- batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feed:
    """Where the micro-batches of steps come from; any steps, as often as they are asked for."""

    source: Source
    requests_of: Callable[[Iterable[int]], Iterator[Request]]
    batches_of: Callable[[Iterable[int]], Generator[Batch]]
    take: Callable[[Iterator[Batch]], Iterator[MicroBatch]]
    """The micro-batches of the next step."""


def requests(
    source: Source,
    seed: int,
    crops: int,
    accum_iter: int,
    context: parallel.DistContext,
    per_epoch: int,
    steps: Iterable[int],
) -> Iterator[Request]:
    """The micro-batches of the steps, each epoch planned when it is reached."""
    plan = None
    for step in steps:
        epoch, index = divmod(step, per_epoch)
        if plan is None or plan.epoch != epoch:
            plan = plan_epoch(seed, epoch, len(source), crops, context.rank, context.size, source.shards)
        for micro in range(accum_iter):
            yield plan.batch(index * accum_iter + micro)


def loader_of(run: Run) -> Callable[..., Generator[Batch]]:
    """``load_batches`` for the device and the threads of a run."""
    device = run.context.device
    pin_memory = run.config.pin_mem and device.type == "cuda"
    return partial(load_batches, device=device, num_workers=run.config.num_workers, pin_memory=pin_memory)


def taken(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches of one step, entered in the log and the quarantine."""
    for _ in range(run.config.accum_iter):
        batch = next(batches)
        run.log.loading.add(batch)
        run.quarantine.add(batch.skipped, good=len(batch.images))
        yield batch


def _losses(feed: Feed, step: int, loss_of: nn.Module, autocast: torch.autocast) -> Iterator[torch.Tensor]:
    """The losses of this rank's micro-batches of one step."""
    with closing(feed.batches_of([step])) as batches:
        for micro_batch in feed.take(batches):
            with autocast:
                loss = loss_of(*micro_batch)
            yield loss


# --- the end of a step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepActions:
    """What is due after a step; the same on every rank."""

    done: int
    """Steps that are done."""
    failing: bool
    """It was skipped."""
    gives_up: bool
    """Too many were, or the run's last ones."""
    exports: bool
    saves: bool
    stops: bool
    """A signal ends the run before its last step."""


def end_step(run: Run, step: int) -> StepActions:
    """Decides what is due after a step that was logged."""
    done, (epoch, index) = step + 1, run.steps.epoch_and_index(step)
    stopping = run.asked_to_stop.any(run.stop.received is not None)
    saves = done % run.steps.between_checkpoints == 0 or done == run.steps.total or stopping
    if saves:
        run.log.sync()
    # Weights that made the last steps fail are no use to anybody, so nothing is saved until one succeeds.
    skipped = run.log.skipped_in_a_row
    export_due = epoch % run.config.save_freq == 0 or epoch + 1 == run.config.epochs
    return StepActions(
        done=done,
        failing=skipped > 0,
        gives_up=skipped >= run.config.max_skipped or (skipped > 0 and done == run.steps.total),
        exports=index + 1 == run.steps.per_epoch and skipped == 0 and export_due,
        saves=saves and skipped == 0,
        stops=stopping and done < run.steps.total,
    )


def require_finite_weights(run: Run, model: nn.Module, done: int) -> None:
    """Refuses to go on with weights that are not finite, before somebody uses them. All ranks call it."""
    require_finite(parallel.finiteness_check(model.parameters(), run.context), done)


def save_run(run: Run, done: int, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Begins to save a resumable checkpoint."""
    require_finite_weights(run, model, done)
    position = {"settings": run.settings, "epoch_sums": run.log.epoch_sums, "detours": run.detours}
    run.saver.save(done, tensors, position)


def stop_run(run: Run, end: StepActions) -> int:
    """Leaves a run that a signal stopped, and returns the exit status."""
    run.saver.finish()
    run.log.close()
    why = run.stop.received or "a signal to another rank"
    saved = "which was skipped, so an earlier one is saved" if end.failing else "which is saved"
    run.say(f"stopped         by {why} after step {end.done}, {saved}; continue with --resume auto")
    return EXIT_INTERRUPTED


def go_back(
    run: Run, done: int, feed: Feed, model: nn.Module, loss_of: nn.Module, autocast: torch.autocast, fresh_step: int = 0
) -> None:
    """Ends a course whose last steps were skipped: looks for what is not finite, and notes that the run is to do the
    steps after its newest intact checkpoint, or after ``fresh_step``, once more with other data.

    Raises:
        UserError: they were already done with other data, or there is nothing to go back to.
    """
    first = done - run.log.skipped_in_a_row
    drawn = [index for indices, _ in feed.requests_of([first]) for index in indices[:NAMED_SAMPLES].tolist()]
    names = [feed.source.name(index) for index in drawn[:NAMED_SAMPLES]]
    place = first_not_finite(model, partial(_losses, feed, first, loss_of, autocast), run.context.any)
    report = report_not_finite(first + 1, done, place, names)
    run.log.close()
    run.saver.wait()
    found = on_main(lambda: find_checkpoint(run.folder))
    step = fresh_step if found.path is None else int(found.manifest["step"])
    remedy = "lower --blr (or use --precision fp32), then continue with --resume auto"
    if step in run.detours:
        raise UserError(f"{report}; it was so with other data after step {step}, too: {remedy}")
    if found.path is None and run.config.resume not in ("", "auto"):
        resume = run.config.resume
        raise UserError(f"{report}; no checkpoint was saved since {resume}: lower --blr and name another folder")
    print(f"fastmae: {report}; going back to step {step}, and on with other data", file=sys.stderr, flush=True)
    if run.context.is_main:
        write_detours(run.folder, [*run.detours, step])
    run.context.barrier()


# --- what is left behind ----------------------------------------------------------------------------------------------


def official_path(folder: Path, epoch: int) -> Path:
    """Where the published file of an epoch lies; its weights lie beside it."""
    return folder / f"checkpoint-{epoch}.pth"


def save_official_files(
    path: Path, weights: dict[str, torch.Tensor], moments: dict[str, Any], epoch: int, settings: dict[str, Any]
) -> None:
    """Writes the published .pth, and a .safetensors of its weights.

    Raises:
        UserError: the file system refused.
    """
    write_training_file(path, weights, moments, epoch, settings)
    write_weights_file(path.with_suffix(".safetensors"), weights, epoch, settings)


def written(write: Callable[[], None]) -> str | None:
    """Writes. Returns what could not be written, if anything, and tells it at once.

    A disk that is full ends no run: the next epoch's files may fit.
    """
    try:
        write()
    except UserError as error:
        print(f"fastmae: {error}; the run goes on", file=sys.stderr, flush=True)
        return str(error)
    return None


def close_run(run: Run, unsaved: str | None) -> None:
    """Waits for what is still being saved, and closes the log.

    Raises:
        UserError: something of it, or the last published files (``unsaved``), could not be written.
    """
    run.saver.finish()
    run.log.close()
    if run.context.any(unsaved is not None):
        raise UserError(unsaved or "the first rank could not save all that it should; its last line says what")


def tell_quarantine(run: Run) -> None:
    """Says how many images were skipped, and where they are listed."""
    if len(run.quarantine):
        run.say(f"skipped         {len(run.quarantine)} unusable images, listed in {run.quarantine.path}")
