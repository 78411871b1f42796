"""Philox4x32-10 counter-based random numbers (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

Order, crops, flips and masks are pure functions of (seed, stream, id) through this module, so there is no state of a
generator to save, to lose or to keep equal between workers. It knows nothing of images or models.

A 128-bit counter is ``(block, stream, id low, id high)`` and the key is ``(seed low, seed high)``. Word ``i`` of an id
is word ``i % 4`` of block ``i // 4``. csrc/loops.h computes the same bits.
"""

from __future__ import annotations

import numpy as np
import torch

# The purpose of a draw. Two purposes never share a counter, so the draws of one id for both are independent.
STREAM_MASK = 0
STREAM_ORDER = 1
STREAM_CROP = 2
STREAM_SPLIT = 3
STREAM_BLOCKS = 4
STREAM_MASK_FILE = 5
STREAM_AUGMENT = 6
STREAM_ERASE = 7
STREAM_NOISE = 8
STREAM_MIX = 9
STREAM_DROP_PATH = 10
STREAM_HELD_OUT = 11
STREAM_BERNOULLI = 13
STREAM_FILL = 12
STREAM_REPLAY = 14
STREAM_SHAPES = 15
STREAM_GRAIN = 16
STREAM_FEW = 17
STREAM_CORRUPTION = 18
STREAM_ATTACK = 19
STREAM_DISTORT = 20

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10


def _check(seed: int, count: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    if not 0 <= count < 2**34:
        raise ValueError(f"count must be in [0, 2**34), got {count}")


def philox_numpy(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Applies the bijection itself: counter uint32 [..., 4] and a key of two 32-bit words give uint32 [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    low, shift = np.uint64(_LOW), np.uint64(32)
    for _ in range(_ROUNDS):
        product0 = c0 * np.uint64(_MULTIPLIERS[0])
        product1 = c2 * np.uint64(_MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(k0),
            product1 & low,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & low,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def words_numpy(seed: int, stream: int, ids: np.ndarray, count: int) -> np.ndarray:
    """Returns the first ``count`` random words of each id: ids int64 [n] give uint32 [n, count].

    Raises:
        ValueError: ``seed`` is not in [0, 2**64), or ``count`` not in [0, 2**34).
    """
    _check(seed, count)
    ids = np.asarray(ids, dtype=np.int64).astype(np.uint64)
    blocks = -(-count // 4)
    counter = np.empty((len(ids), blocks, 4), dtype=np.uint32)
    counter[..., 0] = np.arange(blocks, dtype=np.uint32)
    counter[..., 1] = stream
    counter[..., 2] = (ids & np.uint64(_LOW)).astype(np.uint32)[:, None]
    counter[..., 3] = (ids >> np.uint64(32)).astype(np.uint32)[:, None]
    words = philox_numpy(counter, (seed & _LOW, seed >> 32))
    return words.reshape(len(ids), blocks * 4)[:, :count]


def uniforms_numpy(seed: int, stream: int, ids: np.ndarray, count: int) -> np.ndarray:
    """Returns ``words_numpy`` as float64 in [0, 1), with 32 bits of resolution: ids int64 [n] give [n, count]."""
    return words_numpy(seed, stream, ids, count) / 2.0**32


def permutation_numpy(seed: int, stream: int, draw_id: int, n: int) -> np.ndarray:
    """Returns a permutation of range(n), int64 [n]: positions ranked by their random word, ties by position."""
    return np.argsort(words_numpy(seed, stream, np.array([draw_id]), n)[0], kind="stable")


def words_torch(seed: int, stream: int, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Returns ``words_numpy`` on any device: ids int64 [n] give int64 [n, count] with values in [0, 2**32).

    torch has no full uint32 arithmetic, so words are kept in int64. A 32x32-bit product may wrap to a negative number.
    Its two halves are still right once masked, because the shift is arithmetic and the mask removes the sign bits.
    """
    _check(seed, count)
    blocks = -(-count // 4)
    c0 = torch.arange(blocks, device=ids.device, dtype=torch.int64)[None, :].expand(ids.shape[0], -1)
    c1 = torch.full_like(c0, stream)
    c2 = (ids & _LOW)[:, None].expand_as(c0)
    c3 = ((ids >> 32) & _LOW)[:, None].expand_as(c0)
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1).reshape(ids.shape[0], blocks * 4)[:, :count]
