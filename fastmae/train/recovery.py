"""What a run does when its loss or gradient is not finite: skip, roll back, re-seed, try again.

1. **Skip.** ``step.train_step`` leaves the weights as they are when a loss or gradient of any rank is not finite. The
   log counts the steps that were skipped in a row.
2. **Roll back.** After ``--max_skipped`` of them ``roll_back`` computes the first of these steps once more, names the
   module that failed, and notes the step of the newest intact checkpoint in ``rollbacks.json``.
3. **Re-seed.** The steps after that checkpoint are done again with other images, crops and masks (``data_seed``),
   since the same ones would fail again.
4. **Try again.** ``run_attempts`` starts the next attempt, which resumes from that checkpoint. If its steps fail as
   well, the run ends with an error: its learning rate is probably too high.

All ranks come to the same decisions, because they decide from numbers that they have agreed on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmae.checkpoint.manifest import MANIFEST, find_checkpoint, peek
from fastmae.checkpoint.restore import Restored, on_main, restore
from fastmae.checkpoint.save import checkpoint_size
from fastmae.config import AnyResolved, Training
from fastmae.errors import SettingError, UserError
from fastmae.files import read_json, write_text
from fastmae.messages import logger
from fastmae.model.family import MaskedModel
from fastmae.model.sharding import local_part
from fastmae.ops.allocator import keep_freed_memory
from fastmae.ops.backends import using
from fastmae.ops.choices import TORCHS_OWN
from fastmae.signals import EXIT_INTERRUPTED, StopSignals
from fastmae.train import parallel
from fastmae.train.batches import BatchStream
from fastmae.train.folder import ANEW, AUTO, look_back, require_room, take_up_probes
from fastmae.train.lock import owned
from fastmae.train.run import Run, note_event
from fastmae.train.schedule import Steps
from fastmae.train.settings import as_json, require_same_data
from fastmae.train.sinks import check_sinks

ROLLBACKS = "rollbacks.json"
ROLLBACKS_0_1 = "detours.json"  # as version 0.1 called the file; in manifests the key was "detours"
NAMED_SAMPLES = 8
FROM_WEIGHTS = (
    "begin a new run from its weights (fastmae export RUN --to official --output FILE.pth, then --resume=FILE.pth with "
    "another --output_dir)"
)
FINETUNE_FROM_WEIGHTS = "begin a new run from its weights (--finetune=RUN with another --output_dir)"

Attempt = Callable[[Training, parallel.DistContext, StopSignals], int | None]


# --- attempts ---------------------------------------------------------------------------------------------------------


def run_attempts(config: Training, attempt: Attempt[Training]) -> int:
    """Joins the ranks and makes attempts until one returns an exit status; None means that another one is due."""
    check_sinks(config.log_dir, config.wandb, config.mlflow)
    context = parallel.start(config.device, config.hang_timeout)
    if context.device.type == "cpu":
        keep_freed_memory()
    try:
        with using(ops=config.ops, attention=config.attention, choices=TORCHS_OWN), StopSignals() as stop:
            if context.any(stop.received is not None):
                text = "stopped by %s before the run began; nothing was changed: run the same command again"
                logger.warning(text, stop.received or "a signal to another rank")
                return EXIT_INTERRUPTED
            with owned(Path(config.output_dir)):
                while (status := attempt(config, context, stop)) is None:
                    config = dataclasses.replace(config, resume=AUTO)
                return status
    except BaseException as error:
        # What the frames of the attempt hold goes first: DDP may hang when it outlives the process group.
        _let_go(error)
        raise
    finally:
        parallel.stop(context)


def _let_go(error: BaseException | None) -> None:
    """Frees what the frames hold that an error, and those that led to it, came through."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def restore_attempt(
    config: AnyResolved,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Steps,
    identity: dict[str, Any],
    fixed: Iterable[str],
    fresh_step: int = 0,
    beside: nn.Module | None = None,
) -> tuple[Restored, list[int]]:
    """Restores the weights and the optimiser in place, as --resume says.

    Args:
        config: the resolved settings.
        model, optimizer: fresh ones.
        steps: the schedule of the run.
        identity: what the run is about, of which the data must be those of the checkpoint.
        fixed: the names of the settings that must be those of the checkpoint.
        fresh_step: the step at which a run begins that resumes nothing.
        beside: what is trained with the model, if anything, whose checkpoint needs room as well.

    Returns:
        The position from which the attempt goes on, and the rollbacks before it.

    Raises:
        UserError: there is nothing intact to resume, or it does not fit.
    """
    folder, settings = Path(config.output_dir), as_json(config)
    takes_files = isinstance(model, MaskedModel)
    resume = on_main(lambda: look_back(folder, config.resume, steps, fresh_step, takes_files=takes_files))
    remedy = FROM_WEIGHTS if takes_files else FINETUNE_FROM_WEIGHTS
    resumed = str(folder) if resume == AUTO else resume
    on_main(lambda: require_same_data(resumed, peek(resume, folder), identity, remedy))
    restored = restore(
        resume,
        folder,
        model,
        optimizer,
        fixed={name: settings[name] for name in fixed},
        fresh_step=fresh_step,
        steps_per_epoch=steps.per_epoch,
    )
    goes_on = restored.step < steps.total
    if not goes_on and resume != AUTO and Path(resume).resolve() != folder.resolve():
        done = f"begins after step {restored.step}, and --epochs={config.epochs} are {steps.total} steps"
        remedy = f"{done}; raise --epochs, or use fastmae export to have the weights"
        raise SettingError("resume" if resume else "start_epoch", resume or fresh_step // steps.per_epoch, remedy)
    on_main(lambda: take_up_probes(folder, goes_on=goes_on))
    if goes_on:
        size = checkpoint_size(model, with_average=getattr(config, "ema", None) is not None)
        size += 0 if beside is None else checkpoint_size(beside, with_average=False)
        on_main(lambda: require_room(folder, size))
    manifest = Path(restored.origin) / MANIFEST if restored.origin else None
    # Read once, so that no rank has the data of another number of rollbacks.
    return restored, on_main(lambda: read_rollbacks(folder, restored.step, manifest))


# --- rollbacks --------------------------------------------------------------------------------------------------------


def read_rollbacks(folder: Path, step: int, manifest: Path | None) -> list[int]:
    """Returns the steps, up to ``step``, to which the run was rolled back.

    They are in the run folder, where a restart finds them even before the next checkpoint is saved, and in the manifest
    of every checkpoint. The ``manifest`` counts for a run that resumes a checkpoint of another folder.

    Raises:
        UserError: the file is there but not readable.
    """
    files = [folder / name for name in (ROLLBACKS, ROLLBACKS_0_1) if (folder / name).exists()]
    if not files and (manifest is None or not manifest.exists()):
        return []
    path = files[0] if files else manifest
    assert path is not None
    try:
        rollbacks = read_json(path)
        if not files:  # a manifest from before there were rollbacks has neither key
            rollbacks = rollbacks.get("rollbacks", rollbacks.get("detours", []))
        if not isinstance(rollbacks, list) or not all(type(rollback) is int for rollback in rollbacks):
            raise TypeError("no list of steps")
        return [rollback for rollback in rollbacks if rollback <= step]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it, or start in another --output_dir") from error


def write_rollbacks(folder: Path, rollbacks: list[int]) -> None:
    """Writes the steps to which a run was rolled back into its folder."""
    write_text(folder / ROLLBACKS, json.dumps(rollbacks))


def data_seed(seed: int, rollbacks: int) -> int:
    """Returns the seed of order, crops, flips and masks after this many rollbacks: the run's own before the first."""
    if rollbacks == 0:
        return seed
    digest = hashlib.sha256(f"seed {seed} detour {rollbacks}".encode()).digest()  # these words decide every later batch
    return int.from_bytes(digest[:8], "little") >> 1


def roll_back(
    run: Run,
    step: int,
    stream: BatchStream,
    model: nn.Module,
    loss_of: nn.Module,
    autocast: torch.autocast,
    fresh_step: int = 0,
) -> None:
    """Ends an attempt whose last steps, up to ``step``, were skipped, and notes to which step the run is rolled back.

    That is the step of the newest intact checkpoint, or ``fresh_step`` if there is none.

    Raises:
        UserError: the run was rolled back to that step before, or there is nothing to go back to.
    """
    first = step + 1 - run.log.skipped_in_a_row

    def losses() -> Iterator[torch.Tensor]:
        for micro_batch in stream.at(first):
            with autocast:
                loss = loss_of(*micro_batch)
            yield loss

    origin = find_not_finite(model, losses, run.context.any, loss_of)
    report = describe_not_finite(first + 1, step + 1, origin, stream.names(first, NAMED_SAMPLES))
    run.log.close()
    run.saver.wait()
    newest = on_main(lambda: find_checkpoint(run.folder))
    target = fresh_step if newest.path is None else int(newest.manifest["step"])
    remedy = "lower --blr (or use --precision fp32), then continue with --resume auto"
    if target in run.rollbacks:
        raise UserError(f"{report}; it was so with other data after step {target}, too: {remedy}")
    if newest.path is None and run.config.resume not in ("", AUTO, ANEW):
        resume = run.config.resume
        raise UserError(f"{report}; no checkpoint was saved since {resume}: lower --blr and name another folder")
    logger.warning("%s; going back to step %d, and on with other data", report, target)
    note_event(run.folder, run.context, step + 1, "rolled back", f"to step {target}, and on with other data")
    if run.context.is_main:
        write_rollbacks(run.folder, [*run.rollbacks, target])
    run.context.barrier()


# --- what is not finite -----------------------------------------------------------------------------------------------


def find_not_finite(
    model: nn.Module,
    losses: Callable[[], Iterable[torch.Tensor]],
    any_rank: Callable[[bool], bool],
    loss_of: nn.Module | None = None,
) -> str | None:
    """Finds where a loss or gradient first stops being finite, by computing a step again without the optimiser.

    All ranks call it, as their modules may communicate. Gradients are cleared afterwards.

    Args:
        model: the model whose modules and parameters are looked at.
        losses: computes the loss of each micro-batch of this rank. It is called up to twice.
        any_rank: returns whether a flag is true on any rank.
        loss_of: what has the model and, as its ``judge``, a module that is trained beside it.

    Returns:
        A description of the origin; None if everything is finite on this rank and the fault is on another one.
    """
    origins: list[str] = []

    def look_at(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not origins and isinstance(output, torch.Tensor) and not output.isfinite().all():
                origins.append(f"the output of {name}")

        return hook

    # A module ends before the one that contains it, so the first one found is the innermost. Compiled code calls no
    # hooks, so it is not used here.
    hooks = [module.register_forward_hook(look_at(name)) for name, module in model.named_modules() if name]
    with torch.compiler.set_stance("force_eager"):
        with torch.no_grad():
            for loss in losses():
                if not origins and not loss.isfinite():
                    origins.append("the loss")
        for handle in hooks:
            handle.remove()
        if any_rank(bool(origins)):
            return origins[0] if origins else None
        (loss_of or model).zero_grad(set_to_none=True)  # what a skipped step left
        for loss in losses():
            loss.backward()
    trained = {name.rpartition("judge.")[2]: p for name, p in (loss_of or model).named_parameters() if "judge." in name}
    trained |= dict(model.named_parameters())
    gradients = {name: local_part(p.grad) for name, p in trained.items() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    (loss_of or model).zero_grad(set_to_none=True)
    if any_rank(bool(bad)):
        return f"the gradient of {bad[-1]}" if bad else None
    return "nothing that could be found: computed again, all is finite"


def describe_not_finite(first: int, last: int, origin: str | None, samples: list[str]) -> str:
    """Returns one line about the steps ``first`` to ``last`` that were skipped, counted from 1."""
    line = f"the loss or its gradient is not finite at step {first}"
    if last > first:
        line += f" nor at the {last - first} after it"
    if origin is None:
        return f"{line}, from another rank's batch"
    return f"{line}, first {origin}, in the batch with {', '.join(samples)}"
