"""--compile auto: what it came to, whether it works here on every rank, and where compiled code is kept.

What is compiled is in step.py (``prepare``), which mode is chosen in config/training.py (``chosen_compile``).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastmae import torch_compat
from fastmae.config import Resolved
from fastmae.messages import logger
from fastmae.model.weight_copies import WeightCopies
from fastmae.train.precision import Precision
from fastmae.train.step import MicroBatch, in_a_line, prepare, without_compiling

CACHE = "TORCHINDUCTOR_CACHE_DIR"
TRIED_ON = ("cuda",)
"""Where compiling is tried first. On a CPU a run is compiled only as asked for, or as it began, and what is compiled
depends on measurements that are made later."""


def prepare_as_chosen(
    loss_of: nn.Module,
    asked: str,
    config: Resolved,
    inputs: Callable[[], MicroBatch],
    precision: Precision,
    gather: Callable[[Any], list[Any]],
    sizes: int = 1,
) -> tuple[Resolved, str]:
    """Calls ``step.prepare`` as the settings say; with --compile auto a run whose compiling fails goes on without it.

    All ranks call it, before the module is wrapped for several ranks, and come to the same result.

    Args:
        loss_of: the loss of a micro-batch, on its device.
        asked: --compile as it was given. What --float8 cannot do without counts as asked for.
        config: the resolved settings.
        inputs: makes a micro-batch of the shapes that the run has.
        precision: the number format of the run.
        gather: returns what every rank gives, by rank.
        sizes: how many sizes the images have in the run.

    Returns:
        The settings, with the mode that works, and a description of it.
    """
    float8 = getattr(config, "float8", False)
    device = next(loss_of.parameters()).device
    if config.compile != "off":
        keep_compiled_code()
    prepare(loss_of, config.checkpointing, config.compile, sizes, float8)
    problem = None
    if asked == "auto" and config.compile != "off" and not float8 and device.type in TRIED_ON:
        with precision.products():
            problem = why_it_fails(loss_of, inputs(), precision, gather)
        if problem is not None:
            config = dataclasses.replace(config, compile="off")
    return config, _described(asked, config.compile, device.type == "cuda", problem)


def keep_compiled_code() -> None:
    """Lets torch.compile keep its code where a restart finds it, also on another machine with the same home.

    That is fastmae/compiled in ``$XDG_CACHE_HOME`` or ``~/.cache``, unless ``$TORCHINDUCTOR_CACHE_DIR`` names another
    folder. torch's own choice is in /tmp, which a job that is queued again may not have. The kernels of Triton are kept
    below the same folder. What torch itself writes into the variable, as soon as its compiler is loaded, names none. A
    folder that cannot be written is a warning, and torch's own choice stays.
    """
    if torch_compat.named_cache():
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmae" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write {folder}")
    except OSError as error:
        logger.warning("compiled code is not kept for the next start (%s); export %s=FOLDER", error, CACHE)
        return
    os.environ[CACHE] = str(folder)


def why_it_fails(
    loss_of: nn.Module, inputs: MicroBatch, precision: Precision, gather: Callable[[Any], list[Any]]
) -> str | None:
    """Tries a forward and a backward pass, which compiles them, before the module is wrapped for several ranks.

    Nothing else changes: the random numbers of torch are put back, and gradients are dropped. If it fails on any rank,
    the module is no longer compiled on any of them. All ranks call it.

    Args:
        loss_of: the module as ``step.prepare`` left it.
        inputs: a micro-batch of the shapes that the run has; its values do not matter.
        precision: the number format of the run.
        gather: returns what every rank gives, by rank.

    Returns:
        Why it fails, in one line; None if it works on every rank.
    """
    device = inputs[0].device
    devices = [device] if device.type == "cuda" else []
    problem = None
    with torch.random.fork_rng(devices):
        try:
            with _weights_as_in_a_step(loss_of, precision):
                with precision.context(device):
                    loss = loss_of(*inputs)
                loss.backward()
            if devices:
                torch.cuda.synchronize(device)
        except Exception as error:  # the compiler, its tools and the code that it made fail in many ways
            problem = in_a_line(error)
    loss_of.zero_grad(set_to_none=True)
    problems = gather(problem)
    failing = [rank for rank, one in enumerate(problems) if one]
    if not failing:
        return None
    without_compiling(loss_of)
    where = "" if len(problems) == 1 else f" on rank {failing[0]}"
    return f"torch.compile failed{where}: {problems[failing[0]]}"


def _weights_as_in_a_step(loss_of: nn.Module, precision: Precision) -> AbstractContextManager:
    """Lends layers copies of their weights if the steps of the run do, as other code is compiled without them."""
    if precision.autocast != torch.bfloat16:
        return nullcontext()
    copies = WeightCopies(loss_of)
    copies.write()
    return copies.in_use()


def _described(asked: str, mode: str, on_gpu: bool, problem: str | None) -> str:
    """Describes the mode of a run, and why it has it."""
    if problem is not None:
        return f"off ({problem}; the run is slower so)"
    if asked != "auto":
        return f"{mode} (asked for)"
    if on_gpu:
        return f"{mode} (on a GPU)" if mode != "off" else "off (a run of few steps, or as it began)"
    return "off (on a CPU)" if mode == "off" else f"{mode} (as it began)"
