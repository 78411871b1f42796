"""bernoulli_masking: chooses the masked features of a row, as a pure function of (seed, draw_id, feature)."""

from __future__ import annotations

import torch

from fastmae.ops import cpu
from fastmae.ops.backends import ops_backend
from fastmae.philox import STREAM_BERNOULLI, words_torch

MAX_FEATURES = 2**20


def bernoulli_masking(draw_ids: torch.Tensor, seed: int, features: int, mask_ratio: float) -> torch.Tensor:
    """Masks each feature of a row with a chance of ``mask_ratio``, independently of the others.

    So that every row has something to learn from, one feature is always masked and one is always visible: those with
    the smallest and with the largest random word. Of few features this moves the chance a little towards ½;
    ``expected_masked`` knows by how much.

    Args:
        draw_ids: int64 [N]; one number per draw. Training uses ``epoch · len(dataset) + index``.
        seed: in [0, 2**64).
        features: D, in [2, 2**20].
        mask_ratio: p, in (0, 1).

    Returns:
        bool [N, D] on the device of ``draw_ids``, True where masked. The bits are the same on every device. Equivalent
        to ``bernoulli_masking_reference``.

    Raises:
        ValueError: a dtype, a shape, the seed, the number of features or the ratio is wrong.
    """
    if draw_ids.dtype != torch.int64:
        raise ValueError(f"draw_ids must be int64, got {draw_ids.dtype}")
    if draw_ids.ndim != 1:
        raise ValueError(f"draw_ids must have shape [N], got {list(draw_ids.shape)}")
    if not 2 <= features <= MAX_FEATURES:
        raise ValueError(f"features must be in [2, {MAX_FEATURES}], got {features}")
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio must be above 0 and below 1, got {mask_ratio}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    # Schemas of ops have only signed numbers: seeds from 2**63 on are passed as their two's complement.
    return _bernoulli_masking(draw_ids, seed - 2**64 if seed >= 2**63 else seed, features, _below(mask_ratio))


def bernoulli_masking_reference(draw_ids: torch.Tensor, seed: int, features: int, mask_ratio: float) -> torch.Tensor:
    """Defines the op in PyTorch."""
    words = words_torch(seed, STREAM_BERNOULLI, draw_ids, features)
    masked = words < _below(mask_ratio)
    # The number of the feature below its word (52 bits in all), so that no two are equal.
    keys = words * MAX_FEATURES + torch.arange(features, device=draw_ids.device)
    masked.scatter_(1, keys.argmin(dim=1, keepdim=True), True)
    return masked.scatter_(1, keys.argmax(dim=1, keepdim=True), False)


def expected_masked(features: int, mask_ratio: float) -> float:
    """Returns how many features of a row ``bernoulli_masking`` masks on average.

    That is p·D, and one more or one less where otherwise none or all would be masked.
    """
    none, every = (1 - mask_ratio) ** features, mask_ratio**features
    return features * mask_ratio + none - every


def _below(mask_ratio: float) -> int:
    """Returns below which of 2**32 equally likely words a feature is masked."""
    return round(mask_ratio * 2**32)


@torch.library.custom_op("fastmae::bernoulli_masking", mutates_args=())
def _bernoulli_masking(draw_ids: torch.Tensor, seed: int, features: int, below: int) -> torch.Tensor:
    if ops_backend(draw_ids.device) == "cpu":
        return cpu.bernoulli_masking(draw_ids, seed % 2**64, features, below)
    return bernoulli_masking_reference(draw_ids, seed % 2**64, features, below / 2**32)


@_bernoulli_masking.register_fake
def _(draw_ids: torch.Tensor, seed: int, features: int, below: int) -> torch.Tensor:
    return draw_ids.new_empty(draw_ids.shape[0], features, dtype=torch.bool)
