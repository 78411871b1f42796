"""Resumable checkpoints: a folder a step, written aside, synced, renamed, and verified before it is believed.

``checkpoints/step-NNNNNNNN/`` holds ``state.safetensors`` (weights and AdamW's moments) and ``manifest.json`` (the
position of the run, its configuration, and the size and SHA-256 of the tensors). Nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fastmae.config import UNLESS_SAVED
from fastmae.errors import UserError
from fastmae.files import fsync_file, fsync_folder, write_text
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.official import build_model, load_weights, model_of_file, read_official

FOLDER = "checkpoints"
TENSORS = "state.safetensors"
MANIFEST = "manifest.json"
PARTIAL = ".partial-"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class BadCheckpointError(Exception):
    """A checkpoint that is not what its manifest says; the message says what is wrong with it."""


@dataclass(frozen=True)
class Found:
    """The newest intact checkpoint of a run folder, and the newer ones that were refused, with reasons."""

    path: Path | None
    refused: tuple[str, ...]


def save_checkpoint(
    run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, position: dict[str, Any]
) -> Path:
    """Writes ``checkpoints/step-NNNNNNNN``; ``position`` is any JSON. Killed at any instant, it leaves no half folder.

    Raises:
        UserError: the file system refused (full, read-only …); earlier checkpoints are untouched.
    """
    final = run / FOLDER / _name(step)
    partial = final.with_name(PARTIAL + final.name)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_tensors(model, optimizer), partial / TENSORS)
        fsync_file(partial / TENSORS)
        size, digest = (partial / TENSORS).stat().st_size, _sha256(partial / TENSORS)
        manifest = {"step": step, "files": {TENSORS: {"size": size, "sha256": digest}}, **position}
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
        if final.exists():  # the same step of a run that was resumed from before it
            shutil.rmtree(final)
        partial.rename(final)
        fsync_folder(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"checkpoint {final} could not be saved ({error}); earlier ones are intact: free space or mend the "
            "permissions, then continue with --resume auto"
        ) from error
    return final


def prune_checkpoints(run: Path, keep: int) -> None:
    """Deletes all but the newest ``keep`` checkpoints; called after a newer one is safe."""
    unfinished = list((run / FOLDER).glob(f"{PARTIAL}*"))  # of a run that was killed while saving
    for path in [*_newest_first(run)[keep:], *unfinished]:
        shutil.rmtree(path, ignore_errors=True)


def set_aside_newer(run: Path, step: int) -> list[Path]:
    """Renames checkpoints after ``step``, from which a run is about to go on, and returns their new paths.

    They are damaged, or of a course that is being left; as ``step-…`` they would count among the newest to keep.
    """
    moved = []
    for path in _newest_first(run):
        if path.name > _name(step):
            aside = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def find_checkpoint(run: Path) -> Found:
    """The newest checkpoint that verifies. Costs a read of each file it looks at."""
    refused = []
    for path in _newest_first(run):
        try:
            read_manifest(path)
        except BadCheckpointError as error:
            refused.append(f"{path}: {error}")
            continue
        return Found(path, tuple(refused))
    return Found(None, tuple(refused))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files were compared with it, byte for byte.

    Raises:
        BadCheckpointError: a file is missing, truncated or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = manifest["files"][TENSORS]
        if not {"step", "settings", "epoch_sums"} <= manifest.keys():
            raise BadCheckpointError(f"{MANIFEST} lacks the position or the settings of the run")
        size = (path / TENSORS).stat().st_size
        if size != expected["size"]:
            raise BadCheckpointError(f"{TENSORS} has {size} bytes instead of {expected['size']}")
        if _sha256(path / TENSORS) != expected["sha256"]:
            raise BadCheckpointError(f"{TENSORS} differs from its SHA-256")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpointError(f"{MANIFEST} or {TENSORS} is missing or broken ({error})") from error
    return manifest


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    fixed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Restores weights (and AdamW's moments) in place and returns the manifest.

    Raises:
        BadCheckpointError: not intact, made with settings other than ``fixed``, or of another architecture.
    """
    manifest = read_manifest(path)
    settings = {**UNLESS_SAVED, **manifest["settings"]}
    for key, value in (fixed or {}).items():
        saved = settings.get(key)
        if saved != value:
            raise BadCheckpointError(
                f"was made with {key} {saved}, not {value}; use the same settings, or start in another --output_dir"
            )
    try:
        with safe_open(path / TENSORS, framework="pt", device="cpu") as file:
            expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
            stored = {name for name in file.keys() if name.startswith("model.")}  # noqa: SIM118
            if stored != expected.keys():
                raise BadCheckpointError(f"is of another architecture: {_difference(stored, set(expected))}")
            for name, tensor in expected.items():
                saved = file.get_tensor(name)
                if saved.shape != tensor.shape:
                    raise BadCheckpointError(
                        f"is of another architecture: {name} is {list(saved.shape)} instead of {list(tensor.shape)}"
                    )
                tensor.copy_(saved)
            if optimizer is not None:
                for name, parameter in _trained(model).items():
                    moments = {moment: file.get_tensor(f"optimizer.{moment}.{name}") for moment in _MOMENTS}
                    optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in moments.items()}
    except SafetensorError as error:
        raise BadCheckpointError(f"{TENSORS} cannot be read ({error})") from error
    return manifest


@dataclass(frozen=True)
class Restored:
    """Where a run goes on."""

    step: int
    """Optimiser steps that are done."""
    epoch_sums: dict[str, Any] | None
    """The running averages of an epoch that was broken off."""
    origin: str | None
    """What was read, if anything."""


def restore(
    resume: str,
    run: Path,
    model: MaskedAutoencoderViT,
    optimizer: torch.optim.Optimizer,
    *,
    fixed: dict[str, Any],
    fresh_step: int,
    steps_per_epoch: int,
) -> Restored:
    """Does what --resume says, to the weights and the optimiser in place.

    Args:
        resume: empty, ``auto``, a run folder, one of its checkpoints, or a published .pth.
        run: the output folder.
        model, optimizer: as they start.
        fixed: settings that must be those of the checkpoint.
        fresh_step: where a run begins that resumes nothing.
        steps_per_epoch: turns a published file's epochs into steps.

    Raises:
        UserError: the output folder holds a run that was not asked for, or there is nothing intact to continue.
    """
    fresh = Restored(fresh_step, None, None)
    path = run if resume == "auto" else Path(resume)
    continues_run = bool(resume) and path.resolve().is_relative_to(run.resolve())
    if not continues_run and ((run / FOLDER).exists() or (run / "metrics.jsonl").exists()):
        raise UserError(f"--output_dir {run}: holds a run already; continue it with --resume auto or name another")
    if not resume:
        return fresh
    if path.is_file():
        return _restore_official(path, model, optimizer, fresh, steps_per_epoch)
    if resume != "auto" and not path.exists():
        raise UserError(f"--resume {path}: no such checkpoint; give a run folder, one of its checkpoints or a .pth")
    chosen = path
    if not (path / MANIFEST).exists():
        found = find_checkpoint(path)
        for line in found.refused:
            print(f"fastmae: refused checkpoint {line}; looking at the one before it", file=sys.stderr)
        if found.path is None:
            if resume == "auto" and not found.refused:
                return fresh
            raise UserError(
                f"--resume {resume}: no intact checkpoint in {path}; restore one, or start in another folder"
            )
        chosen = found.path
    try:
        manifest = load_checkpoint(chosen, model, optimizer, fixed)
    except BadCheckpointError as error:
        raise UserError(f"--resume {chosen}: {error}") from error
    return Restored(int(manifest["step"]), manifest["epoch_sums"], str(chosen))


def _restore_official(
    path: Path,
    model: MaskedAutoencoderViT,
    optimizer: torch.optim.Optimizer,
    fresh: Restored,
    steps_per_epoch: int,
) -> Restored:
    """Weights of a published .pth; with its optimiser and epoch the run goes on after that epoch, as published."""
    file = read_official(path)
    if not file.has_decoder:
        raise UserError(f"--resume {path}: holds the encoder alone; give a full training checkpoint")
    load_weights(model, file)
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
                # Old files count steps in plain integers; the fused kernel wants them beside the parameter.
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--resume {path}: its optimiser does not fit the model ({error}); give another file"
        ) from error
    return Restored((file.epoch + 1) * steps_per_epoch, None, str(path))


def load_model(checkpoint: str, preset: str | None = None, *, needs_decoder: bool = False) -> MaskedAutoencoderViT:
    """The model of a checkpoint, on the CPU, in evaluation mode.

    Args:
        checkpoint: a run folder (its newest intact checkpoint counts), a ``step-NNNNNNNN`` folder, or a .pth.
        preset: for a .pth that does not name its own.
        needs_decoder: refuse a file with the encoder alone.

    Raises:
        UserError: nothing there, not intact, or not a masked autoencoder.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a run folder, one of its checkpoints or a .pth")
    if path.is_file():
        file = read_official(path)
        if needs_decoder and not file.has_decoder:
            raise UserError(f"{path}: holds the encoder alone; reconstruction needs a file with its decoder")
        return model_of_file(file, preset).eval()
    if not (path / MANIFEST).exists():
        found = find_checkpoint(path)
        if found.path is None:
            raise UserError(f"{path}: no intact checkpoint ({'; '.join(found.refused) or 'none at all'}); give another")
        path = found.path
    try:
        model = build_model(read_manifest(path)["settings"])
        load_checkpoint(path, model)
    except (BadCheckpointError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {error}; give another checkpoint") from error
    return model.eval()


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name, parameter in _trained(model).items():
        tensors |= {f"optimizer.{moment}.{name}": optimizer.state[parameter][moment] for moment in _MOMENTS}
    return tensors


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _newest_first(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob("step-*"), reverse=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(stored: set[str], expected: set[str]) -> str:
    return f"{len(expected - stored)} tensors missing, {len(stored - expected)} unknown"
