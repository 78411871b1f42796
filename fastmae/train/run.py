"""A run: its folder, what it writes to, what is due after each step, and how it ends.

The training loops in pretrain.py and finetune.py compose these parts. What is learnt, and from what, is theirs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic

import numpy as np
import torch
from torch import nn

from fastmae import torch_compat
from fastmae.checkpoint.manifest import BadCheckpointError, newest_first, set_aside_newer
from fastmae.checkpoint.official import write_training_file, write_weights_file
from fastmae.checkpoint.restore import Restored, on_main
from fastmae.checkpoint.save import Saver
from fastmae.config import Resolved
from fastmae.config.load import settings_as_yaml
from fastmae.data.changes import ChangedImages
from fastmae.data.loader import Batch, View, load_batches
from fastmae.data.quarantine import Quarantine
from fastmae.data.sources import Source
from fastmae.environment import hardware, versions
from fastmae.errors import SettingError, UserError
from fastmae.files import JsonLines, write_text
from fastmae.messages import logger
from fastmae.model.sharding import in_one_piece
from fastmae.report.run_folder import EVENTS
from fastmae.signals import EXIT_INTERRUPTED, StopSignals
from fastmae.train import parallel
from fastmae.train.choosing import in_manifest
from fastmae.train.folder import ANEW, AUTO, set_aside_official
from fastmae.train.given import Given, told
from fastmae.train.health import LossSpikes, Watchdog
from fastmae.train.metrics import Screen, StepLog
from fastmae.train.precision import Precision
from fastmae.train.profile import profiled
from fastmae.train.schedule import Steps
from fastmae.train.settings import as_json
from fastmae.train.sinks import open_sinks
from fastmae.train.step import StepResult

LONGEST_EXCHANGE = timedelta(days=2)
"""How long ranks wait for each other beside the watchdog, which ends a run that hangs and not one that was stopped."""


@dataclass(frozen=True)
class Run(Generic[Resolved]):
    """A run, from the step where this process begins to its end."""

    config: Resolved
    given: Given
    """What was given in Python beside the settings."""
    folder: Path
    steps: Steps
    context: parallel.DistContext
    restored: Restored
    """The position from which this process goes on."""
    identity: dict[str, Any]
    """The settings, the data and the first weights, as they are compared with those of ranks and checkpoints."""
    rollbacks: list[int]
    """The steps to which the run was rolled back, since when it trains on other data."""
    stop: StopSignals
    stop_flag: parallel.StopFlag
    screen: Screen
    log: StepLog
    quarantine: Quarantine
    changed: ChangedImages
    """What was done to images that their owner may not expect, since this process started."""
    saver: Saver
    watchdog: Watchdog

    def say(self, line: str) -> None:
        """Shows a line to people, on the main rank."""
        self.screen.say(line)


# --- the beginning ----------------------------------------------------------------------------------------------------


def open_run(
    config: Resolved,
    given: Given,
    context: parallel.DistContext,
    stop: StopSignals,
    steps: Steps,
    restored: Restored,
    rollbacks: list[int],
    identity: dict[str, Any],
    *,
    summary: Iterable[str],
    backends: dict[str, str],
) -> Run[Resolved]:
    """Opens the run folder, the screen and the log, and announces the run. All ranks call it.

    Args:
        config: the resolved settings.
        given: what was given in Python beside them.
        context: this process among the ranks.
        stop: the signals that end a run.
        steps: the schedule.
        restored, rollbacks: the position from which the run goes on, and the rollbacks before it.
        identity: what the run is about.
        summary: lines about the data, the model and the batch.
        backends: which implementation of each part is used.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(config.output_dir)
    context.barrier()  # no rank writes before every rank has looked at what was there
    screen = Screen(
        total_steps=steps.total,
        epochs=config.epochs,
        images_per_step=config.global_batch,
        start_step=restored.step,
        shows=context.is_main,
        unseen=folder / "unseen.txt",
        unit="images" if getattr(config, "columns", None) is None else "rows",
    )
    on_main(lambda: _write_beginning(folder, config, context, backends))
    if restored.step < steps.total:
        note_event(folder, context, restored.step, *_beginning(restored))
    sinks = []
    if context.is_main:  # after the run's first event, by which it is known
        programs = {"log_dir": config.log_dir, "wandb": config.wandb, "mlflow": config.mlflow}
        sinks = open_sinks(folder, **programs, settings=as_json(config), say=screen.say)
    log = StepLog(
        folder,
        device=context.device,
        log_freq=config.log_freq,
        rank=context.rank,
        ranks=context.size,
        mean_over_ranks=context.mean,
        num_workers=config.num_workers,
        spike_score=LossSpikes().score,
        sinks=sinks,
        say=screen.say,
        tell=told(given.on_step, steps.total, stop.stop) if context.is_main and given.on_step else None,
    )
    quarantine = "quarantine.jsonl" if context.size == 1 else f"quarantine-{context.rank}.jsonl"
    keep_every = config.keep_every and config.keep_every * steps.between_checkpoints
    run = Run(
        config=config,
        given=given,
        folder=folder,
        steps=steps,
        context=context,
        restored=restored,
        identity=identity,
        rollbacks=rollbacks,
        stop=stop,
        stop_flag=parallel.StopFlag(context),
        screen=screen,
        log=log,
        quarantine=Quarantine(folder / quarantine, config.max_corrupt),
        changed=ChangedImages(config.dataset_length),
        saver=Saver(
            folder,
            keep=config.keep,
            keep_every=keep_every,
            background=config.async_save,
            max_failed=config.max_failed_saves,
        ),
        watchdog=Watchdog(config.hang_timeout, folder / f"hang-{context.rank}.txt", f"rank {context.rank}"),
    )
    on_main(lambda: _announce(run, summary, backends))
    return run


def _write_beginning(folder: Path, config: Resolved, context: parallel.DistContext, backends: dict[str, str]) -> None:
    """Writes config.json, config.yaml, and a line about this start into environment.jsonl."""
    start = {
        "command": sys.argv,
        "ranks": context.size,
        "versions": versions(),
        "hardware": hardware(),
        "backends": backends,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.json", json.dumps(as_json(config), indent=1))
        chosen = [f"choice: {line}" for line in backends.get("choice", "").splitlines()]
        write_text(folder / "config.yaml", settings_as_yaml(config, chosen))
        JsonLines(folder / "environment.jsonl").add([start])
    except OSError as error:
        raise SettingError("output_dir", str(folder), f"cannot be written ({error}); name another") from error


def _beginning(restored: Restored) -> tuple[str, str]:
    """Returns the kind of the event with which this process begins, and its text."""
    return ("started", "") if restored.origin is None else ("resumed", f"from {Path(restored.origin).name}")


def note_event(folder: Path, context: parallel.DistContext, step: int, kind: str, text: str) -> None:
    """Adds a line to events.jsonl, on the main rank: what happened to the run, and after which step."""
    if context.is_main:
        time = datetime.now(UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
        JsonLines(folder / EVENTS).add([{"step": step, "event": kind, "text": text, "time": time}])


def _announce(run: Run, summary: Iterable[str], backends: dict[str, str]) -> None:
    """Shows what is trained, with which backends, and from where the run goes on. Sets later checkpoints aside."""
    for line in summary:
        run.say(line)
    for name, choice in backends.items():
        for line in choice.splitlines():
            run.say(f"{name:15} {line}")
    if run.restored.origin is not None and run.restored.step < run.steps.total:
        run.say(f"resumed         {run.restored.origin}, after step {run.restored.step}")
    elif run.restored.origin is not None:
        epochs = run.restored.step // run.steps.per_epoch
        run.say(f"complete        {epochs} epochs are done ({run.restored.origin}); raise --epochs to train on")
    if (hazard := parallel.restart_hazard()) is not None:
        run.say(f"restarts        {hazard} (docs/large-runs.md)")
    if run.rollbacks:
        after = " and ".join(map(str, run.rollbacks))
        run.say(f"other data      after step {after}, as losses were not finite there")
    is_going_back = run.config.resume not in ("", AUTO, ANEW)
    official = set_aside_official(run.folder, run.restored.step // run.steps.per_epoch) if is_going_back else []
    for path in [*set_aside_newer(run.folder, run.restored.step), *official]:
        run.say(f"set aside       {path}, as the run goes on from before it; delete it when you do not need it")


@contextmanager
def training(run: Run, precision: Precision) -> Generator[Callable[[], None]]:
    """Takes up the log where the run goes on and, while entered, keeps screen, saver, watchdog and profiler running.

    All ranks enter it, and wait for each other.

    Yields:
        The profiler's function, which is called after each step.
    """
    restored, steps, context = run.restored, run.steps, run.context
    resume = partial(run.log.resume, restored.step, restored.step // steps.per_epoch, restored.epoch_sums)
    if not context.is_main:
        resume()
    on_main(resume)
    if context.size > 1 and run.config.hang_timeout:
        torch_compat.wait_long_for_ranks(LONGEST_EXCHANGE)
    profiling = profiled(run.folder, run.config.profile, context.rank, context.device, run.say)
    with run.screen, run.saver, run.watchdog, profiling as profile_step, precision.products():
        yield profile_step


def load(
    run: Run,
    source: Source,
    requests: Iterator[tuple[np.ndarray, np.ndarray]],
    view: View,
    image_decoder: str = "threads",
) -> Generator[Batch]:
    """Calls ``load_batches`` with the device and the number of threads of a run."""
    device, config = run.context.device, run.config
    return load_batches(
        source,
        requests,
        view,
        device=device,
        num_workers=config.num_workers,
        pin_memory=config.pin_mem and device.type == "cuda",
        decoder=image_decoder,
    )


# --- a step -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepActions:
    """What is due after a step. It is the same on every rank."""

    rolls_back: bool
    """Too many steps in a row were skipped, or the last ones of the run."""
    exports: bool
    saves: bool
    stops: bool
    """A signal ends the run before its last step."""


def record_step(
    run: Run,
    step: int,
    result: StepResult,
    lr: float,
    seconds_at_peak: float | None = None,
    measured: dict[str, float] | None = None,
) -> None:
    """Logs a step that was done, counted from 0, shows it, and tells the watchdog.

    Args:
        run: the run.
        step: the step.
        result: what ``train_step`` returned.
        lr: the learning rate of the step.
        seconds_at_peak: how long the step would take at the peak rate of all devices, if it is known.
        measured: accuracies of the weights after the step.
    """
    epoch, _ = run.steps.epoch_and_index(step)
    run.log.add(
        result,
        step=step + 1,
        epoch=epoch,
        lr=lr,
        images=run.config.global_batch,
        seconds_at_peak=seconds_at_peak,
        measured=measured,
    )
    run.screen.update(step + 1, epoch, run.log.latest)
    run.watchdog.beat()


def actions_after(run: Run, step: int) -> StepActions:
    """Decides what is due after a step that was logged. All ranks call it, after every step."""
    done, (epoch, _) = step + 1, run.steps.epoch_and_index(step)
    is_last = done == run.steps.total
    stopping = run.stop_flag.any(run.stop.received is not None)
    saves = done % run.steps.between_checkpoints == 0 or is_last or stopping
    if saves:
        run.log.sync()
    # Weights after a skipped step are those that made it fail, so nothing is saved until a step succeeds.
    skipped = run.log.skipped_in_a_row
    export_due = epoch % run.config.save_freq == 0 or epoch + 1 == run.config.epochs
    return StepActions(
        rolls_back=skipped >= run.config.max_skipped or (skipped > 0 and is_last),
        exports=run.steps.ends_epoch(step) and skipped == 0 and export_due,
        saves=saves and skipped == 0,
        stops=stopping and not is_last,
    )


# --- what is saved ----------------------------------------------------------------------------------------------------


def require_finite_weights(run: Run, model: nn.Module, step: int) -> None:
    """Refuses weights that are not finite before they are used. All ranks call it, and wait for the device once.

    Raises:
        UserError: a weight of any rank is not finite, so that saving it would poison the newest checkpoint.
    """
    if not parallel.finiteness_check(model.parameters(), run.context).isfinite():
        raise UserError(
            f"the weights after step {step + 1} are not finite and were not saved: lower --blr (or use --precision "
            "fp32), then continue with --resume auto"
        )


def save_run(run: Run, step: int, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Begins to save a resumable checkpoint after a step. All ranks call it."""
    require_finite_weights(run, model, step)
    position = {"settings": as_json(run.config), "epoch_sums": run.log.epoch_sums, "rollbacks": run.rollbacks}
    position |= {name: run.identity[name] for name in ("data", "start")} | in_manifest()
    run.saver.save(step + 1, tensors, position)


def official_path(folder: Path, epoch: int) -> Path:
    """Returns the path of the official .pth of an epoch. The weights lie beside it, as .safetensors."""
    return folder / f"checkpoint-{epoch}.pth"


@dataclass(frozen=True)
class OfficialFiles:
    """The tensors of an official file, whole, on the main rank."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, Any]


def collect_official(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer) -> OfficialFiles:
    """Collects weights and moments from all ranks, which all call it."""
    is_main = run.context.is_main
    return OfficialFiles(
        in_one_piece(model.state_dict(), keep=is_main), in_one_piece(optimizer.state_dict(), keep=is_main)
    )


def lacks_official(run: Run) -> bool:
    """Returns whether a complete run, which is resumed, lacks its last official file: a full disk had no room for it.

    All ranks call it.
    """
    path = official_path(run.folder, run.config.epochs - 1)
    return run.context.any(run.restored.step == run.steps.total and run.context.is_main and not path.exists())


def write_official(
    path: Path, weights: dict[str, torch.Tensor], moments: dict[str, Any], epoch: int, config: Resolved
) -> None:
    """Writes the official .pth, and a .safetensors of its weights.

    Raises:
        UserError: the file system refused.
    """
    settings = as_json(config)
    write_training_file(path, weights, moments, epoch, settings)
    write_weights_file(path.with_suffix(".safetensors"), weights, epoch, settings)


def try_to_write(write: Callable[[], None]) -> str | None:
    """Calls ``write``. Returns what could not be written, if anything, and reports it at once.

    A full disk does not end a run, as the files of the next epoch may fit.
    """
    try:
        write()
    except (UserError, OSError) as error:
        logger.warning("%s; the run goes on", error)
        return str(error)
    return None


# --- the end ----------------------------------------------------------------------------------------------------------


def stop_run(run: Run, step: int) -> int:
    """Leaves a run that a signal stopped after a step, and returns the exit status."""
    run.saver.finish()
    run.log.close()
    reason = run.stop.received or "a signal to another rank"
    is_skipped = run.log.skipped_in_a_row > 0
    saved = "which was skipped, so an earlier one is saved" if is_skipped else "which is saved"
    note_event(run.folder, run.context, step + 1, "stopped", f"by {reason}")
    run.say(f"stopped         by {reason} after step {step + 1}, {saved}; continue with --resume auto")
    return EXIT_INTERRUPTED


def close_run(run: Run, unsaved: str | None) -> None:
    """Waits for what is still being saved, and closes the log.

    Raises:
        UserError: something of it, or the last official files (``unsaved``), could not be written.
    """
    run.saver.finish()
    run.log.close()
    if run.context.any(unsaved is not None):
        raise UserError(unsaved or "the main rank could not save all that it should; its last line says what")
    if run.restored.step < run.steps.total:
        note_event(run.folder, run.context, run.steps.total, "complete", f"after {run.config.epochs} epochs")


def say_changed(run: Run) -> None:
    """Shows what was done to images that their owner may not expect, if more images are known than when it was shown.

    It is about the images that the main rank reads.
    """
    among = " (of what rank 0 read)" if run.context.size > 1 else ""
    for line in run.changed.news():
        run.say(f"changed         {line}{among}")


def say_results(run: Run, lines: Sequence[str] = (), files: Mapping[str, Path] = MappingProxyType({})) -> None:
    """Shows, on the main rank, what the run leaves behind: lines, and those of the ``files`` by name that are there.

    All ranks call it, and wait for each other.
    """
    if run.context.is_main:
        if len(run.quarantine):
            run.say(f"skipped         {len(run.quarantine)} unusable images, listed in {run.quarantine.path}")
        say_changed(run)
        for line in lines:
            run.say(line)
        official = official_path(run.folder, run.config.epochs - 1)
        newest = official
        if not official.exists():
            with suppress(BadCheckpointError):
                newest = next(iter(newest_first(run.folder)), official)
        for name, path in {**files, "checkpoint": newest}.items():
            if path.exists():
                run.say(f"{name:15} {path}")
    run.context.barrier()
