"""What a program in Python gives a training beside its settings: data, a model, and a function that looks on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastmae.data.sources import Parts
from fastmae.errors import UserError, in_one_line
from fastmae.model.family import MaskedModel

STOP = "stop"


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """An optimiser step that is done, as ``on_step`` is told of it. Numbers are means over all ranks."""

    step: int
    """Counted from 1."""
    total_steps: int
    epoch: int
    """Counted from 0, as in log.txt."""
    loss: float | None
    """None where it is not finite."""
    lr: float
    grad_norm: float | None
    """Before it was clipped."""
    skipped: bool
    """Whether a loss or gradient was not finite, so that no weight was changed."""
    images_per_second: float | None
    """Over all ranks, the newest that was measured; None before the first measurement."""


OnStep = Callable[[StepInfo], Any]


@dataclass(frozen=True, kw_only=True)
class Given:
    """Objects that a training takes in place of what its settings name."""

    data: Parts | None = None
    model: MaskedModel | None = None
    """A masked autoencoder. A training begins with a copy of it."""
    on_step: OnStep | None = None


NOTHING = Given()


def told(on_step: OnStep, total_steps: int, stop: Callable[[str], None]) -> Callable[[Sequence[dict[str, Any]]], None]:
    """Returns a function that tells ``on_step`` of rows of metrics.jsonl, and calls ``stop`` when it returns "stop".

    Raises:
        UserError: from that function, if ``on_step`` raised an error.
    """
    speed: float | None = None

    def tell(rows: Sequence[dict[str, Any]]) -> None:
        nonlocal speed
        speed = rows[-1].get("images_per_second", speed)
        for row in rows:
            numbers = {name: row[name] for name in ("step", "epoch", "loss", "lr", "grad_norm")}
            info = StepInfo(total_steps=total_steps, skipped="skipped" in row, images_per_second=speed, **numbers)
            try:
                answer = on_step(info)
            except Exception as error:
                reason = in_one_line(f"{type(error).__name__}: {error}")
                problem = f"on_step raised {reason} at step {info.step}; mend it, then go on with resume='auto'"
                raise UserError(problem) from error
            if isinstance(answer, str) and answer == STOP:
                stop("on_step")

    return tell
