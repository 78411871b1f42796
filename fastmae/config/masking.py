"""Which patches are masked: the settings that pretrain and reconstruct have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastmae.config.values import need

Masking = Literal["random", "block", "grid", "file"]
PUBLISHED_RATIO = 0.75


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """The masks of images."""

    mask_ratio: float | None = None
    """Share of the patches that is masked. Default: 0.75, as in the paper; for mae_convnextv2_* 0.6, as in its paper;
    for mae_conv 0.25 and mae_mlp 0.5; with --masks the share of the file."""
    masking: Masking | None = None
    """Which patches are masked: any at random, as in the paper; rectangles (block); all but one of every 2×2 (grid); or
    those of the file that --masks names (file). Default: random, and file with --masks."""
    masks: str = ""
    """A .npy file of masks: bool or uint8 [B, rows, columns] of patches, 1 where a patch is masked. Every image takes
    one of the B masks at random."""


def chosen_masking(config: MaskingConfig) -> Masking:
    """What --masking says, or its default."""
    return config.masking or ("file" if config.masks else "random")


def chosen_ratio(config: MaskingConfig, usual: float) -> float:
    """What --mask_ratio says, or its default, which is the ``usual`` one of the model."""
    if config.mask_ratio is not None:
        return config.mask_ratio
    return PUBLISHED_RATIO if config.masking == "grid" else usual


def check_masking(config: MaskingConfig) -> None:
    """Refuses what cannot be masked, whatever the data and the model.

    Raises:
        SettingError: naming the setting, its value and what it must be.
    """
    between = f"above 0 and below 1; the published ratio is {PUBLISHED_RATIO}"
    need(config, config.mask_ratio is None or 0 < config.mask_ratio < 1, "mask_ratio", between)
    need(config, config.masking != "file" or bool(config.masks), "masking", "given together with --masks=FILE.npy")
    need(config, not config.masks or config.masking in (None, "file"), "masking", "file, or left out, with --masks")
    every_2x2 = f"{PUBLISHED_RATIO} with --masking=grid, which keeps one patch of every 2×2"
    is_a_quarter = config.mask_ratio in (None, PUBLISHED_RATIO)
    need(config, config.masking != "grid" or is_a_quarter, "mask_ratio", every_2x2)
