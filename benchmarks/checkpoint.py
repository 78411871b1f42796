"""What does saving a checkpoint cost training?

    fastmae bench checkpoint --batch_size 64 --folder /data/runs --output benchmarks/results      # on a CPU

The trainer's own step and saves, in turns: a step by itself, the moment in which training stands still while a copy is
taken, a step that goes on beside the write, what is left of the write after it, a save that training waits for, and the
check of all bytes before a run goes on. No time is reported unless what was saved comes back to the last bit. Bytes are
read again soon after they were written, so from the system's memory where they fit.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fastmae.benchmarks.harness import Samples, machine_name, quartiles, refuse, report, require_preset, table, wait_for
from fastmae.checkpoint.manifest import FOLDER, BadCheckpointError, read_manifest
from fastmae.checkpoint.restore import load_checkpoint
from fastmae.checkpoint.save import Saver, training_tensors
from fastmae.config import BenchCheckpointConfig, check_bench
from fastmae.errors import UserError
from fastmae.model.presets import PRESETS
from fastmae.ops.random_masking import random_masking
from fastmae.train.optim import make_optimizer
from fastmae.train.parallel import choose_device
from fastmae.train.precision import Precision, choose_precision
from fastmae.train.step import TrainingLoss, train_step

MASK_RATIO = 0.75
STEP, STALL, BESIDE, REST = "step", "stall", "step beside the write", "rest of the write"
AT_ONCE, VERIFY = "save at once", "verify"
NAMES = (STEP, STALL, BESIDE, REST, AT_ONCE, VERIFY)


def bench_checkpoint(config: BenchCheckpointConfig, command: Sequence[str]) -> int:
    """Prints the times, writes what was asked for, and returns 1 if a checkpoint is not what was saved, otherwise 0.

    Raises:
        UserError: settings that cannot work, or a disk that refuses.
    """
    check_bench(config)
    require_preset(config.model)
    if config.folder is not None and not Path(config.folder).is_dir():
        raise UserError(f"--folder {config.folder}: no such folder; make it, or name another")
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    try:
        with tempfile.TemporaryDirectory(dir=config.folder) as folder:
            samples, size = _measure(config, device, precision, Path(folder))
    except BadCheckpointError as error:
        return refuse(f"a checkpoint {error}")
    # The first round pays for the memory of the copy, as the first save of a run does.
    first = {name: seconds[0] for name, seconds in samples.items()}
    later = {name: seconds[1:] for name, seconds in samples.items()}
    title = f"{config.model}, batch {config.batch_size}, {precision.name}, {machine_name(device)}, "
    shown = _table(f"{title}{size / 1e6:.0f} MB, median of {config.rounds}", first, later, size)
    file = f"checkpoint-{config.model}-{machine_name(device)}-n{config.batch_size}-{precision.name}"
    measured = {"bytes": size, "first": first, "seconds": later}
    report([shown], file, command=command, settings=config, measured=measured)
    return 0


def _measure(
    config: BenchCheckpointConfig, device: torch.device, precision: Precision, folder: Path
) -> tuple[Samples, int]:
    """Seconds of every round, the first included, and the bytes of a checkpoint.

    Raises:
        BadCheckpointError: what was saved did not come back.
    """
    torch.manual_seed(0)
    model = PRESETS[config.model]().to(device)
    loss_of, optimizer = TrainingLoss(model, MASK_RATIO), make_optimizer(model, 1e-4, 0.05)
    images = torch.randint(0, 256, (config.batch_size, *model.img_size, model.in_chans), dtype=torch.uint8)
    ids_shuffle = random_masking(torch.arange(config.batch_size), 0, model.num_patches).to(device)
    batch = (images.to(device), ids_shuffle)
    position: dict[str, Any] = {"settings": {}, "epoch_sums": {}}

    def step() -> None:
        with precision.products():
            train_step(loss_of, optimizer, [batch], 1, 1e-4, precision.context(device))

    def save(saver: Saver, number: int) -> None:
        saver.save(number, training_tensors(model, optimizer), position)

    step()  # makes the moments
    samples: Samples = {name: [] for name in NAMES}
    background = Saver(folder / "background", keep=1, keep_every=None, background=True)
    at_once = Saver(folder / "at once", keep=1, keep_every=None, background=False)
    with background, at_once:
        for number in range(config.rounds + 1):
            samples[STEP].append(_seconds(step, device))
            expected = {name: tensor.clone() for name, tensor in training_tensors(model, optimizer).items()}
            samples[STALL].append(_seconds(partial(save, background, number), device))
            samples[BESIDE].append(_seconds(step, device))
            samples[REST].append(_seconds(background.finish, device))
            (path,) = (folder / "background" / FOLDER).iterdir()
            samples[VERIFY].append(_seconds(partial(read_manifest, path), device))
            _compare(config, path, expected, device)
            samples[AT_ONCE].append(_seconds(partial(save, at_once, number), device))
            at_once.finish()
    return samples, sum(file.stat().st_size for file in path.iterdir())


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """On the host's clock, which is what training waits by; work for a GPU is waited for."""
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def _compare(
    config: BenchCheckpointConfig, path: Path, expected: dict[str, torch.Tensor], device: torch.device
) -> None:
    """Raises BadCheckpointError unless a checkpoint holds ``expected``."""
    model = PRESETS[config.model]().to(device)
    optimizer = make_optimizer(model, 1e-4, 0.05)
    load_checkpoint(path, model, optimizer)
    for name, tensor in training_tensors(model, optimizer).items():
        if not torch.equal(tensor, expected[name]):
            raise BadCheckpointError(f"has another {name} than the model had when it was saved")


def _table(title: str, first: dict[str, float], later: Samples, size: int) -> Table:
    step = quartiles(later[STEP])[1]
    rows = []
    for name in NAMES:
        low, median, high = quartiles(later[name])
        rows.append(
            (
                name,
                f"{1e3 * median:.1f}",
                f"{1e3 * low:.1f} – {1e3 * high:.1f}",
                f"{1e3 * first[name]:.1f}",
                f"{median / step:.1%}",
                f"{size / median / 1e9:.2f}" if name in (STALL, AT_ONCE, VERIFY) else "",
            )
        )
    return table(title, ("what", "ms", "quartiles", "first, ms", "share of a step", "GB/s"), rows)
