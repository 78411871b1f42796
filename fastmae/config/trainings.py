"""Every kind of training by its settings, as they are given and once nothing is left open."""

from __future__ import annotations

from typing import TypeVar

from fastmae.config.finetune import FinetuneConfig, ResolvedFinetuneConfig
from fastmae.config.pretrain import PretrainConfig, ResolvedConfig
from fastmae.config.segment import ResolvedSegmentConfig, SegmentConfig
from fastmae.config.tuning import TuningConfig
from fastmae.config.upscale import ResolvedUpscaleConfig, UpscaleConfig

TRAININGS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "segment": SegmentConfig,
    "upscale": UpscaleConfig,
}
"""The settings of each training by its command."""

AnyTuned = ResolvedFinetuneConfig | ResolvedSegmentConfig | ResolvedUpscaleConfig
"""The resolved settings of a training of an encoder with a head."""
AnyResolved = ResolvedConfig | AnyTuned
Training = TypeVar("Training", bound=PretrainConfig | TuningConfig)
Resolved = TypeVar("Resolved", bound=AnyResolved)


def command_of(config: object) -> str:
    """Returns the command whose settings these are, resolved or not."""
    return next(command for command, settings in TRAININGS.items() if isinstance(config, settings))
