"""scatter_patches on a GPU: each program writes some cells of one image's grid, so that each pixel is written once.

A cell finds its patch by comparing its number with all M ids, which are in the cache; a cell that is not listed gets 0.

Lower bound: P numbers read per listed patch, P pixels written per cell. Definition: fastmae/ops/scatter_patches.py.
"""

import torch
import triton
import triton.language as tl

from fastmae.kernels.pixels import denormalise, image_arguments, patch_offsets

TILE = 2048  # pixels that a program holds at once: 16 per thread
COMPARISONS = 4096  # comparisons of a cell with an id at once
NUM_WARPS = 4


@triton.jit
def scatter_patches_kernel(
    p_patches,  # floating [N, M, P]
    p_ids,  # int32 or int64 [N, M], any strides
    p_mean,  # floating [C]
    p_std,  # floating [C]
    p_range,  # floating [2, C]: low and high of each channel
    p_out,  # uint8, uint16 or floating [N, H, W, C]
    M, L,
    ids_stride_n, ids_stride_m,
    stride_n, stride_h, stride_w, stride_c,
    GW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, UNIT: tl.constexpr, HAS_RANGE: tl.constexpr,
    BL: tl.constexpr, BP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = PH * PW * C
    n = tl.program_id(0).to(tl.int64)
    b_cell = tl.program_id(1) * BL + tl.arange(0, BL)  # [BL]
    b_index = tl.full([BL], -1, tl.int32)  # the position of its patch in the list; -1: not listed
    for first in range(0, M, CHUNK):
        m = first + tl.arange(0, CHUNK)
        b_id = tl.load(p_ids + n * ids_stride_n + m * ids_stride_m, mask=m < M, other=-1).to(tl.int32)  # [CHUNK]
        b_index = tl.maximum(b_index, tl.max(tl.where(b_id[None, :] == b_cell[:, None], m[None, :], -1), axis=1))
    for first in tl.static_range(0, P, BP):
        p = first + tl.arange(0, BP)
        m_out = (b_cell < L)[:, None] & (p < P)[None, :]
        m_listed = m_out & (b_index >= 0)[:, None]
        b_x = tl.load(p_patches + (n * M + b_index)[:, None] * P + p[None, :], mask=m_listed, other=0.0)  # [BL, BP]
        b_x = tl.where(m_listed, denormalise(b_x, p, p_mean, p_std, p_range, C, UNIT, HAS_RANGE), 0.0)
        offsets = patch_offsets(b_cell, p, GW, PH, PW, C, stride_h, stride_w, stride_c, PACKED)
        tl.store(p_out + n * stride_n + offsets, b_x.to(p_out.dtype.element_ty), mask=m_out)


def block_sizes(pixels: int) -> dict[str, int]:
    """Returns the tile, BL cells × BP pixels per program, as ``block_sizes`` of gather_patches does."""
    block = min(256, max(16, triton.next_power_of_2(pixels))) if pixels <= 4096 else TILE
    cells = max(1, TILE // block)
    return {"BL": cells, "BP": block, "CHUNK": COMPARISONS // cells}


def scatter_patches_triton(
    patches: torch.Tensor,
    ids: torch.Tensor,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    value_range: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``fastmae.ops.scatter_patches`` on a GPU, for any dtype but float64."""
    patches = patches.contiguous()
    (N, M, pixels), (gh, gw), (ph, pw) = patches.shape, grid_size, patch_size
    out = torch.empty(N, gh * ph, gw * pw, pixels // (ph * pw), dtype=dtype, device=patches.device)
    if out.numel():
        mean = mean.contiguous()
        arguments, constants = image_arguments(out, patch_size, value_range, mean)
        blocks = block_sizes(pixels)
        with torch.cuda.device_of(patches):
            scatter_patches_kernel[(N, triton.cdiv(gh * gw, blocks["BL"]))](
                patches, ids, mean, std.contiguous(), p_out=out, M=M, L=gh * gw,
                ids_stride_n=ids.stride(0), ids_stride_m=ids.stride(1), **arguments, **constants, **blocks,
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return out
