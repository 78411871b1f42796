"""The schedule of a run: how many optimiser steps it has, when checkpoints are due, and the learning rate of each step.

Everything here is a function of the settings and the size of the data set. A resumed run computes the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastmae.config import AnyResolved
from fastmae.data.plan import micro_batches
from fastmae.data.sources import shown
from fastmae.errors import UserError

MIN_CHECKPOINT_STEPS = 300


@dataclass(frozen=True)
class Steps:
    """The optimiser steps of a run, the same for every split of the global batch into ranks and micro-steps."""

    per_epoch: int
    total: int
    between_checkpoints: int

    def epoch_and_index(self, step: int) -> tuple[int, int]:
        """Returns the epoch of a step and the step's index in that epoch, both counted from 0."""
        return divmod(step, self.per_epoch)

    def ends_epoch(self, step: int) -> bool:
        """Returns whether a step is the last one of its epoch."""
        return (step + 1) % self.per_epoch == 0


def plan_steps(config: AnyResolved, ranks: int, crops: int, images: str) -> Steps:
    """Counts the optimiser steps of a run.

    Args:
        config: the resolved settings.
        ranks: the number of ranks.
        crops: the number of images that one rank decodes for one micro-batch.
        images: what error messages call the images of the data set.

    Raises:
        UserError: the data set is too small for a single step.
    """
    per_rank = micro_batches(config.dataset_length, crops, ranks, config.accum_iter, config.keep_last)
    per_epoch = per_rank // config.accum_iter
    if per_epoch < 1:
        size = f"--batch_size {config.batch_size}"
        size += f" × --accum_iter {config.accum_iter}" if config.accum_iter > 1 else ""
        size += f" × {ranks} ranks" if ranks > 1 else ""
        fits = config.dataset_length // (config.accum_iter * ranks) * (config.batch_size // crops)
        remedy = f"lower --batch_size to at most {fits}" if fits else "lower --accum_iter or the ranks"
        available = f"the {config.dataset_length} {images} of {shown(config.data_path)}"
        raise UserError(f"{size} is more than {available}; {remedy}, or use --keep_last")
    between_checkpoints = config.checkpoint_freq or per_epoch * math.ceil(MIN_CHECKPOINT_STEPS / per_epoch)
    return Steps(per_epoch, config.epochs * per_epoch, between_checkpoints)


def learning_rate(
    epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: int, schedule: str = "cosine"
) -> float:
    """Returns the learning rate at a fractional epoch: linear warm-up, then half a cosine from ``lr`` to ``min_lr``,
    or a straight line between them for the ``schedule`` "polynomial"."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    if schedule == "polynomial":
        return min_lr + (lr - min_lr) * (1 - progress)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate_at(step: int, config: AnyResolved, steps: Steps) -> float:
    """Returns the learning rate of an optimiser step, by the step's fractional epoch as in the official script."""
    epoch, index = steps.epoch_and_index(step)
    return learning_rate(
        epoch + index / steps.per_epoch,
        lr=config.lr,
        min_lr=config.min_lr,
        warmup_epochs=config.warmup_epochs,
        epochs=config.epochs,
        schedule=getattr(config, "schedule", "cosine"),
    )
