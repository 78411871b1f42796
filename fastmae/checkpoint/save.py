"""Saving resumable checkpoints: one folder per step, written aside, synced and renamed.

Functions that save are called by every rank; the main one writes names and manifests.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from fastmae import torch_compat
from fastmae.checkpoint.manifest import (
    FOLDER,
    MANIFEST,
    SAVED,
    TENSORS,
    BadCheckpointError,
    is_step_name,
    manifest_text,
    newest_first,
    sha256_of,
    step_name,
    step_of,
    superseded,
)
from fastmae.errors import UserError
from fastmae.files import fsync_folder, write_text
from fastmae.messages import logger

PARTIAL = ".partial-"


class CannotSaveError(UserError):
    """So many saves in a row failed that the run ends."""

    status = 1


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Everything that a run consists of, by name, as the tensors that training changes in place."""
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
        step: the optimiser step that the folder is named after.
        tensors: from ``training_tensors``; what several ranks hold is written by one of them.
        position: any JSON.
        group: the ranks, on a CPU backend; None for a process by itself.

    Raises:
        UserError: the file system refused a rank (full, read-only …); all ranks raise it. Earlier checkpoints are
            untouched.
    """
    final = run / FOLDER / step_name(step)
    partial = final.with_name(PARTIAL + final.name)
    is_main = group is None or dist.get_rank() == 0
    if is_main:
        _delete(partial)  # of a run that was killed while saving this step
    if group is not None:
        dist.barrier(group)
    problem = None
    try:
        torch_compat.save_shards(partial, tensors, group)
        if is_main:
            _seal(partial, final, step, tensors, position)
    except (torch_compat.ShardError, OSError, BadCheckpointError, SafetensorError) as error:
        problem = " ".join(str(error).split())
    except Exception as error:  # a library or the memory; whatever it is, training matters more
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if group is not None:
        shared = [problem]
        dist.broadcast_object_list(shared, group=group)
        problem = shared[0]
    if problem is not None:
        if is_main:
            _delete(partial)
        raise UserError(
            f"checkpoint {final} could not be saved ({problem}); earlier ones are intact: free space or mend the "
            "permissions, then continue with --resume auto"
        )
    return final


def checkpoint_size(model: nn.Module, *, with_average: bool) -> int:
    """The bytes of a whole checkpoint: weights, AdamW's moments, and the average of the weights if there is one."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights + (3 if with_average else 2) * trained


def _seal(partial: Path, final: Path, step: int, tensors: dict[str, torch.Tensor], position: dict[str, Any]) -> None:
    """Reads back what the ranks wrote, writes the manifest and gives the folder its name.

    Raises:
        BadCheckpointError: a tensor is not whole.
    """
    stored = torch_compat.stored_tensors(partial)
    for name, tensor in tensors.items():
        arrived = stored[name].numbers if name in stored else 0
        if arrived != tensor.numel():
            numbers = f"{arrived} of the {tensor.numel()} numbers of {name}"
            raise BadCheckpointError(f"{numbers} arrived; --output_dir must be a folder that all ranks share")
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(partial.glob(TENSORS))
    }
    write_text(partial / MANIFEST, manifest_text({"step": step, "files": files, **position}))
    if os.path.lexists(final):  # nothing that this run has saved: it saves every step once
        final.rename(superseded(final))
    partial.rename(final)
    fsync_folder(final.parent)


class Saver:
    """Saves while training goes on: a copy of the tensors is taken at once, and a thread of each rank writes it.

    A save that fails is reported at once, and the next one tries again. Every rank makes a Saver and asks it to save at
    the same steps.

    Args:
        run: the run folder.
        keep, keep_every: for ``prune_checkpoints``.
        background: False writes at once, without the copy.
        max_failed: how many saves in a row may fail.
    """

    def __init__(self, run: Path, *, keep: int, keep_every: int | None, background: bool, max_failed: int = 3) -> None:
        self._run, self._keep, self._keep_every = run, keep, keep_every
        # A group of its own: messages between the threads must not be taken for those of training.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._is_main = self._group is None or dist.get_rank() == 0
        self._copy = torch_compat.copier_to_cpu() if background else None
        self._thread = ThreadPoolExecutor(1, "fastmae-saver")
        self._pending: Future[str | None] | None = None
        self._max_failed, self._failed = max_failed, 0  # in a row; the same on all ranks

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown()

    def save(self, step: int, tensors: dict[str, torch.Tensor], position: dict[str, Any]) -> None:
        """Begins to save, once the save before is over.

        Raises:
            CannotSaveError: too many saves in a row failed. The last one that may fail is waited for.
        """
        self._check(self.wait())
        if self._copy is not None:
            tensors = self._copy(tensors)
        self._pending = self._thread.submit(self._write, step, tensors, copy.deepcopy(position))
        if self._copy is None or 0 < self._failed == self._max_failed - 1:
            self._check(self.wait())

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

    def _check(self, problem: str | None) -> None:
        if problem is not None and self._failed >= self._max_failed:
            times = "1 save" if self._failed == 1 else f"{self._failed} saves in a row"
            raise CannotSaveError(f"{times} failed, so the run ends (--max_failed_saves); {problem}")

    def _write(self, step: int, tensors: dict[str, torch.Tensor], position: dict[str, Any]) -> str | None:
        try:
            save_checkpoint(self._run, step, tensors, position, self._group)
        except UserError as error:
            self._failed += 1
            if self._is_main and self._failed < self._max_failed:
                logger.warning("%s; the run goes on and tries again", error)
            return str(error)
        self._failed = 0
        if self._is_main:
            with contextlib.suppress(OSError):
                write_text(self._run / SAVED, json.dumps({"step": step}))
            prune_checkpoints(self._run, self._keep, self._keep_every, upto=step)
        return None


def prune_checkpoints(run: Path, keep: int, keep_every: int | None = None, upto: int | None = None) -> None:
    """Deletes all but the newest ``keep`` checkpoints and those of every ``keep_every`` steps.

    It is called after a newer one is safe: that of the step ``upto``. Later ones, which somebody has put there, do not
    count and stay.
    """
    folder = run / FOLDER
    with contextlib.suppress(OSError, BadCheckpointError):  # what cannot be deleted now is deleted after a later save
        names = [name.removeprefix(PARTIAL) for name in os.listdir(folder) if name.startswith(PARTIAL)]
        for name in filter(is_step_name, names):  # of a run that was killed while saving, or while pruning
            _delete(folder / f"{PARTIAL}{name}")
        own = [path for path in newest_first(run) if upto is None or step_of(path) <= upto]
        for path in own[keep:]:
            if keep_every is None or step_of(path) % keep_every:
                # Under its name a checkpoint is whole, so a reader of a live run finds all of it or nothing.
                _delete(path.rename(path.with_name(PARTIAL + path.name)))


def _delete(path: Path) -> None:
    """Deletes a file, a folder with all in it, or a link, but never what a link leads to. What cannot be is left."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter. If there is none, it is made as AdamW makes it in its first step."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
