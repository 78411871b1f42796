"""Resumable checkpoints: a folder a step, written aside, synced, renamed, and verified before it is believed.

``checkpoints/step-NNNNNNNN/`` holds a ``….safetensors`` a rank (its part of the weights and of AdamW's moments, written
by torch.distributed.checkpoint) and ``manifest.json`` (the position of the run, its configuration, and the size and
SHA-256 of every file). Nothing in it can run code, and it may be read by any number of ranks that share weights in any
way. Functions that save or restore are called by every rank; the first one looks after names and manifests.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from fastmae.checkpoint.official import (
    OfficialFile,
    build_model,
    holds_file,
    load_weights,
    model_of_file,
    read_official,
    settings_of_file,
)
from fastmae.config import UNLESS_SAVED
from fastmae.errors import UserError
from fastmae.files import fsync_folder, write_text
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.sharding import laid_out_like

FOLDER = "checkpoints"
TENSORS = "*.safetensors"
MANIFEST = "manifest.json"
PARTIAL = ".partial-"

T = TypeVar("T")


class BadCheckpointError(Exception):
    """A checkpoint that is not what its manifest says; the message says what is wrong with it."""


@dataclass(frozen=True)
class Found:
    """The newest intact checkpoint of a run folder, and the newer ones that were refused, with reasons."""

    path: Path | None
    manifest: dict[str, Any]
    refused: tuple[str, ...]


# --- saving -----------------------------------------------------------------------------------------------------------


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All that a run is made of, by name, as the tensors that training changes in place."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors |= {f"optimizer.{key}.{name}": moment for key, moment in _moments(optimizer, parameter).items()}
    return tensors


def save_checkpoint(
    run: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    position: dict[str, Any],
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes ``checkpoints/step-NNNNNNNN``. Killed at any instant, it leaves no half folder.

    Args:
        run: the run folder, which all ranks see.
        step: of the name.
        tensors: from ``training_tensors``; what several ranks have is written by one of them.
        position: any JSON.
        group: the ranks, over the CPU; None for a process by itself.

    Raises:
        UserError: the file system refused a rank (full, read-only …), which all ranks are told; earlier checkpoints
            are untouched.
    """
    final = run / FOLDER / _name(step)
    partial = final.with_name(PARTIAL + final.name)
    is_first = group is None or dist.get_rank() == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while saving this step
    if group is not None:
        dist.barrier(group)
    problem = None
    try:
        _quiet_about_one_process()
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
        if is_first:
            _seal(partial, final, step, tensors, position)
    except CheckpointException as error:  # of any rank, and raised on all
        problem = str(next(iter(error.failures.values()))[0])
    except (OSError, BadCheckpointError, SafetensorError) as error:
        problem = str(error)
    if group is not None:
        told = [problem]
        dist.broadcast_object_list(told, group=group)
        problem = told[0]
    if problem is not None:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"checkpoint {final} could not be saved ({problem}); earlier ones are intact: free space or mend the "
            "permissions, then continue with --resume auto"
        )
    return final


def _seal(partial: Path, final: Path, step: int, tensors: dict[str, torch.Tensor], position: dict[str, Any]) -> None:
    """Reads back what the ranks wrote, writes the manifest and gives the folder its name.

    Raises:
        BadCheckpointError: a tensor is not whole.
    """
    stored = _stored(partial)
    for name, tensor in tensors.items():
        found = sum(chunk.sizes.numel() for chunk in stored[name].chunks) if name in stored else 0
        if found != tensor.numel():
            numbers = f"{found} of the {tensor.numel()} numbers of {name}"
            raise BadCheckpointError(f"{numbers} arrived; --output_dir must be a folder that all ranks share")
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(partial.glob(TENSORS))
    }
    write_text(partial / MANIFEST, manifest_text({"step": step, "files": files, **position}))
    if final.exists():  # the same step of a run that went on from before it
        shutil.rmtree(final)
    partial.rename(final)
    fsync_folder(final.parent)


def manifest_text(manifest: dict[str, Any]) -> str:
    """JSON with the SHA-256 of itself as its last entry, so that no bit of it can change unnoticed."""
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1)


class Saver:
    """Saves while training goes on: a copy of the tensors is taken at once, a thread of each rank writes it.

    A save that fails is told on stderr at once and ends nothing; the next one tries again. Made, and asked to save, by
    every rank at the same step.

    Args:
        run: the run folder.
        keep, keep_every: for ``prune_checkpoints``.
        background: False writes at once, without the copy.
    """

    def __init__(self, run: Path, *, keep: int, keep_every: int | None, background: bool) -> None:
        self._run, self._keep, self._keep_every = run, keep, keep_every
        # Of its own: messages between the threads must not be taken for those of training.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._is_first = self._group is None or dist.get_rank() == 0
        options = StagingOptions(
            use_pinned_memory=torch.cuda.is_available(),
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options) if background else None
        self._thread = ThreadPoolExecutor(1, "fastmae-saver")
        self._pending: Future[str | None] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()

    def save(self, step: int, tensors: dict[str, torch.Tensor], position: dict[str, Any]) -> None:
        """Begins to save, once the save before is over."""
        self.wait()
        if self._stager is not None:
            staged = self._stager.stage(tensors)
            assert isinstance(staged, dict)
            tensors = staged
        self._pending = self._thread.submit(self._write, step, tensors, copy.deepcopy(position))
        if self._stager is None:
            self.wait()

    def wait(self) -> str | None:
        """Waits for the save that is under way. Returns what went wrong with the last one, on every rank, or None."""
        return self._pending.result() if self._pending is not None else None

    def finish(self) -> None:
        """Waits for the save that is under way.

        Raises:
            UserError: the last save failed.
        """
        problem = self.wait()
        if problem is not None:
            raise UserError(problem)

    def _write(self, step: int, tensors: dict[str, torch.Tensor], position: dict[str, Any]) -> str | None:
        try:
            save_checkpoint(self._run, step, tensors, position, self._group)
        except UserError as error:
            if self._is_first:
                print(f"fastmae: {error}; the run goes on and tries again", file=sys.stderr, flush=True)
            return str(error)
        if self._is_first:
            prune_checkpoints(self._run, self._keep, self._keep_every)
        return None


def prune_checkpoints(run: Path, keep: int, keep_every: int | None = None) -> None:
    """Deletes all but the newest ``keep`` checkpoints and those of every ``keep_every`` steps.

    Called after a newer one is safe.
    """
    unfinished = list((run / FOLDER).glob(f"{PARTIAL}*"))  # of a run that was killed while saving
    older = [path for path in _newest_first(run)[keep:] if keep_every is None or _step(path) % keep_every]
    for path in [*older, *unfinished]:
        shutil.rmtree(path, ignore_errors=True)


# --- finding ----------------------------------------------------------------------------------------------------------


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
    refused: list[str] = []
    for path in _newest_first(run):
        try:
            return Found(path, read_manifest(path), tuple(refused))
        except BadCheckpointError as error:
            refused.append(f"{path}: {error}")
    return Found(None, {}, tuple(refused))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files were compared with it, byte for byte.

    Raises:
        BadCheckpointError: a file is missing, truncated, changed or foreign.
    """
    name = MANIFEST
    try:
        text = (path / MANIFEST).read_text()
        manifest = json.loads(text)
        if text != manifest_text({key: value for key, value in manifest.items() if key != "sha256"}):
            raise BadCheckpointError(f"{MANIFEST} differs from its SHA-256")
        if not {"step", "settings", "epoch_sums"} <= manifest.keys():
            raise BadCheckpointError(f"{MANIFEST} lacks the position or the settings of the run")
        files = manifest["files"]
        foreign = {file.name for file in path.glob(TENSORS)} - files.keys()
        if foreign:
            raise BadCheckpointError(f"{min(foreign)} is not in {MANIFEST}")
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["size"]:
                raise BadCheckpointError(f"{name} has {size} bytes instead of {expected['size']}")
            if _sha256(path / name) != expected["sha256"]:
                raise BadCheckpointError(f"{name} differs from its SHA-256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpointError(f"{name} is missing or broken ({error})") from error
    return manifest


# --- loading ----------------------------------------------------------------------------------------------------------


def load_checkpoint(
    path: Path,
    manifest: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    fixed: dict[str, Any] | None = None,
) -> None:
    """Restores weights (and AdamW's moments) in place; ``manifest`` is what ``read_manifest`` returned.

    Raises:
        BadCheckpointError: made with settings other than ``fixed``, or of another architecture.
    """
    settings = {**UNLESS_SAVED, **manifest["settings"]}
    for key, value in (fixed or {}).items():
        saved = settings.get(key)
        if saved != value:
            raise BadCheckpointError(
                f"was made with {key} {saved}, not {value}; use the same settings, or start in another --output_dir"
            )
    if optimizer is None:
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    else:
        tensors = training_tensors(model, optimizer)
    try:
        stored = _stored(path)
        weights = {name for name in stored if name.startswith("model.")}
        if weights != {name for name in tensors if name.startswith("model.")} or tensors.keys() - stored.keys():
            missing, unknown = tensors.keys() - stored.keys(), weights - tensors.keys()
            raise BadCheckpointError(
                f"is of another architecture: {len(missing)} tensors missing, {len(unknown)} unknown"
            )
        for name, tensor in tensors.items():
            if stored[name].size != tensor.shape:
                shapes = f"{list(stored[name].size)} instead of {list(tensor.shape)}"
                raise BadCheckpointError(f"is of another architecture: {name} is {shapes}")
        _quiet_about_one_process()
        dcp.load(tensors, storage_reader=_reader(path), no_dist=not dist.is_initialized())
    except (SafetensorError, CheckpointException) as error:
        raise BadCheckpointError(f"its tensors cannot be read ({str(error).splitlines()[-1]})") from error


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
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    fixed: dict[str, Any],
    fresh_step: int,
    steps_per_epoch: int,
) -> Restored:
    """Does what --resume says, to the weights and the optimiser in place.

    Args:
        resume: empty, ``auto``, a run folder, one of its checkpoints; for a masked autoencoder also a published .pth, a
            .safetensors or a folder of transformers.
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
    if holds_file(path):
        if not isinstance(model, MaskedAutoencoderViT):
            raise UserError(f"--resume {path}: holds weights alone; give a run folder or one of its checkpoints")
        return _restore_official(path, model, optimizer, fresh, steps_per_epoch)
    if resume != "auto" and not path.exists():
        raise UserError(
            f"--resume {path}: no such checkpoint; give a run folder, one of its checkpoints or an official file"
        )
    found = on_first(lambda: _look(resume, path))
    if found.path is None:
        return fresh
    try:
        load_checkpoint(found.path, found.manifest, model, optimizer, fixed)
    except BadCheckpointError as error:
        raise UserError(f"--resume {found.path}: {error}") from error
    return Restored(int(found.manifest["step"]), found.manifest["epoch_sums"], str(found.path))


def _look(resume: str, path: Path) -> Found:
    """What is to be resumed, verified; nothing if there is none and that is allowed.

    Raises:
        UserError: nothing intact.
    """
    if (path / MANIFEST).exists():
        try:
            return Found(path, read_manifest(path), ())
        except BadCheckpointError as error:
            raise UserError(f"--resume {path}: {error}") from error
    found = find_checkpoint(path)
    for line in found.refused:
        print(f"fastmae: refused checkpoint {line}; looking at the one before it", file=sys.stderr)
    if found.path is None and (resume != "auto" or found.refused):
        raise UserError(f"--resume {resume}: no intact checkpoint in {path}; restore one, or start in another folder")
    return found


def _restore_official(
    path: Path,
    model: MaskedAutoencoderViT,
    optimizer: torch.optim.Optimizer,
    fresh: Restored,
    steps_per_epoch: int,
) -> Restored:
    """Weights of a published file; with its optimiser and epoch the run goes on after that epoch, as published."""
    file = read_official(path)
    _tell(file)
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
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = laid_out_like(parameter, state[moment])
                # Old files count steps in plain integers; the fused kernel wants them beside the parameter.
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--resume {path}: its optimiser does not fit the model ({error}); give another file"
        ) from error
    return Restored((file.epoch + 1) * steps_per_epoch, None, str(path))


@dataclass(frozen=True)
class Opened:
    """A checkpoint as it is used after training."""

    model: MaskedAutoencoderViT
    """On the CPU, in evaluation mode."""
    settings: dict[str, Any]
    """Those of the run, as far as they are said; ``model``, ``input_size`` and ``in_chans`` always are."""
    has_decoder: bool
    """Whether its decoder was in the checkpoint, or is a fresh one."""


def load_model(checkpoint: str, preset: str | None = None, *, needs_decoder: bool = False) -> MaskedAutoencoderViT:
    """The model of a checkpoint, on the CPU, in evaluation mode.

    Args:
        checkpoint: a run folder (its newest intact checkpoint counts), a ``step-NNNNNNNN`` folder, a .pth, a
            .safetensors, or a folder of transformers.
        preset: for a file that does not name its own.
        needs_decoder: refuse a file with the encoder alone.

    Raises:
        UserError: nothing there, not intact, or not a masked autoencoder.
    """
    opened = open_checkpoint(checkpoint, preset)
    if needs_decoder and not opened.has_decoder:
        raise UserError(f"{checkpoint}: holds the encoder alone; reconstruction needs a file with its decoder")
    return opened.model


def open_checkpoint(checkpoint: str, preset: str | None = None) -> Opened:
    """``load_model``, and what else the checkpoint says."""
    path = Path(checkpoint)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a run folder, one of its checkpoints or an official file")
    if holds_file(path):
        file = read_official(path)
        _tell(file)
        settings = {**file.args, **settings_of_file(file, preset)}
        return Opened(model_of_file(file, preset).eval(), settings, file.has_decoder)
    try:
        if (path / MANIFEST).exists():
            manifest = read_manifest(path)
        else:
            found = find_checkpoint(path)
            if found.path is None:
                raise BadCheckpointError(f"no intact checkpoint ({'; '.join(found.refused) or 'none at all'})")
            path, manifest = found.path, found.manifest
        if "nb_classes" in manifest["settings"]:
            raise BadCheckpointError("is of a fine-tuned classifier, not of a masked autoencoder")
        model = build_model(manifest["settings"])
        load_checkpoint(path, manifest, model)
    except (BadCheckpointError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {error}; give another checkpoint") from error
    return Opened(model.eval(), manifest["settings"], True)


# --- parts ------------------------------------------------------------------------------------------------------------


def _tell(file: OfficialFile) -> None:
    """Says, once, what of a file is not used."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    for remark in file.remarks:
        print(f"fastmae: {file.path}: {remark}", file=sys.stderr)


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter; made as AdamW makes it in its first step, if there was none."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def on_first(look: Callable[[], T]) -> T:
    """What the first rank finds, on every rank; so is an error that it meets. The files are read once."""
    if not dist.is_initialized():
        return look()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = look()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def _reader(path: Path) -> HuggingFaceStorageReader:
    """Reads safetensors alone; the other readers of torch unpickle what they find."""
    return HuggingFaceStorageReader(str(path))


def _stored(path: Path) -> dict[str, TensorStorageMetadata]:
    """Names, shapes and pieces of the tensors in a folder, from the headers of its files."""
    return _reader(path).read_metadata().state_dict_metadata  # type: ignore[return-value]


def _quiet_about_one_process() -> None:
    """torch warns each time that one process saves or loads by itself, also if told to."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _newest_first(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob("step-*"), reverse=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
