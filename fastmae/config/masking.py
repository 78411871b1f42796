"""Which patches are masked: what pretrain and reconstruct both ask for, and check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fastmae.errors import UserError

if TYPE_CHECKING:
    from fastmae.config.evaluate import ReconstructConfig
    from fastmae.config.pretrain import PretrainConfig


Masking = Literal["random", "block", "grid", "file"]
PUBLISHED_RATIO = 0.75


def chosen_masking(config: PretrainConfig | ReconstructConfig) -> Masking:
    """What --masking says, or its default."""
    return config.masking or ("file" if config.masks else "random")


def check_masking(config: PretrainConfig | ReconstructConfig) -> None:
    """Refuses what cannot be masked, whatever the data and the model.

    Raises:
        UserError: naming the flag, its value and what it must be.
    """
    ratio, masking = f"--mask_ratio {config.mask_ratio}", f"--masking {config.masking}"
    if not 0 < config.mask_ratio < 1:
        raise UserError(f"{ratio}: must be above 0 and below 1; the published ratio is {PUBLISHED_RATIO}")
    if config.masking == "file" and not config.masks:
        raise UserError(f"{masking}: must be given together with --masks FILE.npy")
    if config.masks and config.masking not in (None, "file"):
        raise UserError(f"{masking}: must be file, or left out, with --masks")
    if config.masking == "grid" and config.mask_ratio != PUBLISHED_RATIO:
        raise UserError(f"{ratio}: must be {PUBLISHED_RATIO} with --masking grid, which keeps one patch of every 2×2")
