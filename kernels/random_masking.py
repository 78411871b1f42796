"""random_masking on a GPU: one program per image, which ranks each patch by counting the smaller keys.

The bits are those of fastmae/ops/random_masking.py, which has the definition. Counting instead of sorting takes L²
comparisons per image (512 per thread at L = 196, 8192 at 1024), exchanges no data between threads, and reads only the
number of the draw.

Lower bound: 4·L bytes written per image; no GPU has measured how near it comes.
"""

import torch
import triton
import triton.language as tl

from fastmae.philox import STREAM_MASK

# Comparisons at once: a tile of patches × CHUNK keys, 32 per thread; 78 to 144 registers for L from 49 to 4096.
TILE = 4096
NUM_WARPS = 4


@triton.jit
def _words(seed, stream: tl.constexpr, draw_id, i):
    """Computes word i of a draw (fastmae/philox.py): word i % 4 of block i // 4."""
    low = tl.zeros_like(i) + (draw_id & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = tl.zeros_like(i) + ((draw_id >> 32) & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    w0, w1, w2, w3 = tl.philox(seed, i // 4, tl.zeros_like(i) + stream, low, high, 10)
    word = i % 4
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@triton.jit(do_not_specialize=["seed"])
def random_masking_kernel(
    p_draw_ids,  # int64 [N]
    p_ids_shuffle,  # int32 [N, L]
    seed,  # int64, read as 64 unsigned bits
    L: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,  # L rounded up to a power of two
    CHUNK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    draw_id = tl.load(p_draw_ids + n)
    i = tl.arange(0, BLOCK)
    b_key = _words(seed, STREAM, draw_id, i)  # [BLOCK]
    b_rank = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, L, CHUNK):
        j = first + tl.arange(0, CHUNK)
        b_other = _words(seed, STREAM, draw_id, j)  # [CHUNK]
        smaller = b_other[None, :] < b_key[:, None]
        earlier = (b_other[None, :] == b_key[:, None]) & (j[None, :] < i[:, None])
        b_rank += tl.sum(((smaller | earlier) & (j[None, :] < L)).to(tl.int32), axis=1)
    tl.store(p_ids_shuffle + n * L + b_rank, i, mask=i < L)


def block_sizes(num_patches: int) -> dict[str, int]:
    """Returns the kernel's constants for L patches."""
    block = max(16, triton.next_power_of_2(num_patches))
    return {"L": num_patches, "STREAM": STREAM_MASK, "BLOCK": block, "CHUNK": max(1, min(block, TILE // block))}


def random_masking_triton(draw_ids: torch.Tensor, seed: int, num_patches: int) -> torch.Tensor:
    """Returns ids_shuffle int32 [N, L] for draw_ids int64 [N] on a GPU and a seed as a signed 64-bit number."""
    draw_ids = draw_ids.contiguous()
    ids_shuffle = torch.empty(len(draw_ids), num_patches, dtype=torch.int32, device=draw_ids.device)
    if len(draw_ids):
        grid, blocks = (len(draw_ids),), block_sizes(num_patches)
        with torch.cuda.device_of(draw_ids):
            random_masking_kernel[grid](draw_ids, ids_shuffle, seed, **blocks, num_warps=NUM_WARPS)
    return ids_shuffle
