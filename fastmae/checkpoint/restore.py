"""Restoring a run: weights, optimiser and position, from a checkpoint of its own or from an official file.

A checkpoint may be read by any number of ranks that share weights in any way. Functions are called by every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from fastmae import torch_compat
from fastmae.checkpoint.manifest import (
    MANIFEST,
    BadCheckpointError,
    NewestCheckpoint,
    find_checkpoint,
    read_manifest,
)
from fastmae.checkpoint.official import holds_file, load_into, read_official, report_remarks
from fastmae.checkpoint.save import training_tensors
from fastmae.config import UNLESS_SAVED
from fastmae.errors import SettingError, UserError
from fastmae.messages import logger
from fastmae.model.family import MaskedModel
from fastmae.model.sharding import laid_out_like

T = TypeVar("T")


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Restores weights (and AdamW's moments) in place.

    Raises:
        BadCheckpointError: unreadable, or of another architecture.
    """
    if optimizer is None:
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    else:
        tensors = training_tensors(model, optimizer)
    try:
        stored = torch_compat.stored_tensors(path)
        weights = {name for name in stored if name.startswith("model.")}
        if weights != {name for name in tensors if name.startswith("model.")} or tensors.keys() - stored.keys():
            missing, unknown = tensors.keys() - stored.keys(), weights - tensors.keys()
            raise BadCheckpointError(
                f"is of another architecture: {len(missing)} tensors missing, {len(unknown)} unknown"
            )
        for name, tensor in tensors.items():
            if stored[name].shape != tensor.shape:
                shapes = f"{list(stored[name].shape)} instead of {list(tensor.shape)}"
                raise BadCheckpointError(f"is of another architecture: {name} is {shapes}")
        torch_compat.load_shards(path, tensors)
    except (SafetensorError, torch_compat.ShardError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1]
        raise BadCheckpointError(f"its tensors cannot be read ({reason})") from error


@dataclass(frozen=True)
class Restored:
    """The position from which a run goes on."""

    step: int
    """Optimiser steps that are done."""
    epoch_sums: dict[str, Any] | None
    """The running averages of an epoch that was broken off."""
    origin: str | None
    """What was read, if anything."""
    manifest: dict[str, Any] | None = None
    """Of the checkpoint that was read; None if nothing was, or a file of weights."""

    @property
    def checkpoint(self) -> Path | None:
        """The folder of the checkpoint that was read; None if nothing was, or a file of weights."""
        return None if self.origin is None or self.manifest is None else Path(self.origin)


def restore(
    resume: str,
    run: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    fixed: dict[str, Any],
    fresh_step: int,
    steps_per_epoch: int,
) -> Restored:
    """Does what ``resume`` says, to the weights and the optimiser in place.

    Args:
        resume: empty, ``auto``, a run folder, one of its checkpoints; for a masked autoencoder also an official .pth, a
            .safetensors or a folder of transformers.
        run: the output folder.
        model, optimizer: fresh ones.
        fixed: settings that must be those of the checkpoint.
        fresh_step: the step at which a run begins that resumes nothing.
        steps_per_epoch: turns an official file's epochs into steps.

    Raises:
        UserError: there is nothing intact to continue, or it does not fit.
    """
    fresh = Restored(fresh_step, None, None)
    if not resume:
        return fresh
    path = run if resume == "auto" else Path(resume)
    if holds_file(path):
        if not isinstance(model, MaskedModel):
            raise SettingError("resume", str(path), "holds weights alone; give a run folder or one of its checkpoints")
        return _restore_official(path, model, optimizer, fresh, steps_per_epoch)
    if resume != "auto" and not path.exists():
        raise SettingError(
            "resume", str(path), "no such checkpoint; give a run folder, one of its checkpoints or an official file"
        )
    newest = on_main(lambda: _look(resume, path))
    if newest.path is None:
        return fresh
    on_main(lambda: _require_settings(str(newest.path), newest.manifest["settings"], fixed))
    try:
        load_checkpoint(newest.path, model, optimizer)
    except BadCheckpointError as error:
        deleted = "was deleted while it was read, as training goes on there; run the command again"
        raise SettingError("resume", str(newest.path), str(error) if newest.path.exists() else deleted) from error
    return Restored(int(newest.manifest["step"]), newest.manifest["epoch_sums"], str(newest.path), newest.manifest)


def _require_settings(path: str, saved: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Refuses a checkpoint that was made with settings other than ``fixed``."""
    saved = {**UNLESS_SAVED, **saved}
    for name, value in fixed.items():
        if saved.get(name) != value:
            problem = f"was made with {name} {saved.get(name)}, not {value}"
            raise SettingError("resume", path, f"{problem}; use the same settings, or start in another --output_dir")


def _look(resume: str, path: Path) -> NewestCheckpoint:
    """Finds and verifies what is to be resumed. The path of the result is None if there is nothing and that is allowed.

    Raises:
        UserError: nothing intact.
    """
    if (path / MANIFEST).exists():
        try:
            return NewestCheckpoint(path, read_manifest(path), ())
        except BadCheckpointError as error:
            raise SettingError("resume", str(path), str(error)) from error
    try:
        newest = find_checkpoint(path)
    except BadCheckpointError as error:
        raise SettingError("resume", resume, f"{path}: {error}; mend its permissions, or name another") from error
    for line in newest.refused:
        logger.warning("refused checkpoint %s; looking at the one before it", line)
    if newest.path is None and (resume != "auto" or newest.refused):
        problem = f"no intact checkpoint in {path}; restore one, or start in another folder"
        raise SettingError("resume", resume, problem)
    return newest


def _restore_official(
    path: Path,
    model: MaskedModel,
    optimizer: torch.optim.Optimizer,
    fresh: Restored,
    steps_per_epoch: int,
) -> Restored:
    """Loads an official file. If it has an optimiser and an epoch, the run goes on after that epoch."""
    file = read_official(path)
    report_remarks(file)
    if not file.has_decoder:
        problem = f"holds the encoder alone: {file.what}; give a full training checkpoint"
        raise SettingError("resume", str(path), problem)
    load_into(model, file)
    if file.optimizer is None or file.epoch is None:
        return Restored(fresh.step, None, str(path))
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(file.optimizer)
        for group, settings in zip(optimizer.param_groups, own, strict=True):
            group.update(settings)  # ours, not the file's: rates, decay, and the fused kernel
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if not state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape:
                    raise ValueError(f"moments of {list(state['exp_avg'].shape)} for {list(parameter.shape)}")
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = laid_out_like(parameter, state[moment])
                # Old files count steps in plain integers; the fused kernel wants them beside the parameter.
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"its optimiser does not fit the model ({error}); give another file"
        raise SettingError("resume", str(path), problem) from error
    return Restored((file.epoch + 1) * steps_per_epoch, None, str(path))


def on_main(read: Callable[[], T]) -> T:
    """Returns on every rank what ``read`` returns on rank 0, so that files are read once; raises its error on all."""
    if not dist.is_initialized():
        return read()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = read()
        except (UserError, BadCheckpointError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    if outcome[1] is not None:
        outcome[1].is_said = dist.get_rank() > 0
        raise outcome[1]
    return outcome[0]
