"""random_masking: chooses the visible patches of an image, as a pure function of (seed, draw_id)."""

from __future__ import annotations

import torch

from fastmae.ops import cpu
from fastmae.ops.backends import ops_backend
from fastmae.philox import STREAM_MASK, words_torch

MAX_PATCHES = 65536
# The Triton kernel ranks by counting, which is quadratic and keeps all keys in registers: above this, torch sorts.
MAX_COUNTED = 4096


def random_masking(draw_ids: torch.Tensor, seed: int, num_patches: int) -> torch.Tensor:
    """Draws a random permutation of the patches per image; the first K are the visible ones (paper, section 3).

    Args:
        draw_ids: int64 [N]; one number per draw. Training uses ``epoch · len(dataset) + index``.
        seed: in [0, 2**64).
        num_patches: L, in [1, 65536].

    Returns:
        ids_shuffle int32 [N, L] on the device of ``draw_ids``: row n lists the patches by rising random key, equal keys
        by patch. The bits are the same on every device. Equivalent to ``random_masking_reference``.

    Raises:
        ValueError: a dtype, a shape, the seed or the number of patches is wrong.
    """
    if draw_ids.dtype != torch.int64:
        raise ValueError(f"draw_ids must be int64, got {draw_ids.dtype}")
    if draw_ids.ndim != 1:
        raise ValueError(f"draw_ids must have shape [N], got {list(draw_ids.shape)}")
    if not 1 <= num_patches <= MAX_PATCHES:
        raise ValueError(f"num_patches must be in [1, {MAX_PATCHES}], got {num_patches}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    # Schemas of ops have only signed numbers: seeds from 2**63 on are passed as their two's complement.
    return _random_masking(draw_ids, seed - 2**64 if seed >= 2**63 else seed, num_patches)


def random_masking_reference(draw_ids: torch.Tensor, seed: int, num_patches: int) -> torch.Tensor:
    """Defines the op in PyTorch: sort the Philox words of a row, equal ones by index."""
    keys = words_torch(seed, STREAM_MASK, draw_ids, num_patches)
    index = torch.arange(num_patches, device=draw_ids.device)
    # The index below the 32-bit key (48 bits in all) orders equal keys without a stable sort.
    return (keys * MAX_PATCHES + index).argsort(dim=1).to(torch.int32)


@torch.library.custom_op("fastmae::random_masking", mutates_args=())
def _random_masking(draw_ids: torch.Tensor, seed: int, num_patches: int) -> torch.Tensor:
    backend = ops_backend(draw_ids.device)
    if backend == "cpu":
        return cpu.random_masking(draw_ids, seed % 2**64, num_patches)
    if backend == "reference" or num_patches > MAX_COUNTED:
        return random_masking_reference(draw_ids, seed % 2**64, num_patches)
    from fastmae.kernels.random_masking import random_masking_triton

    return random_masking_triton(draw_ids, seed, num_patches)


@_random_masking.register_fake
def _(draw_ids: torch.Tensor, seed: int, num_patches: int) -> torch.Tensor:
    return draw_ids.new_empty(draw_ids.shape[0], num_patches, dtype=torch.int32)
