"""scatter_patches on a GPU: each program writes some patches of one image, listed or not, so that no pixel is written
twice and none is left over.

Which of the listed patches belongs at a place is found by comparing the place with all M ids, which the cache holds.
Lower bound: P numbers read a listed patch, P pixels written a patch. Definition: fastmae/ops/scatter_patches.py.
"""

import torch
import triton
import triton.language as tl

from fastmae.kernels.pixels import denormalise, image_arguments, patch_offsets

TILE = 2048  # pixels a program holds at once: 16 a thread
COMPARISONS = 4096  # of a place with an id, at once
NUM_WARPS = 4


@triton.jit
def scatter_patches_kernel(
    p_patches,  # floating [N, M, P]
    p_ids,  # int32 or int64 [N, M], any strides
    p_mean,  # floating [C]
    p_std,  # floating [C]
    p_out,  # uint8 or floating [N, H, W, C]
    M, L,
    ids_stride_n, ids_stride_m,
    stride_n, stride_h, stride_w, stride_c,
    GW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, UINT8: tl.constexpr,
    BL: tl.constexpr, BP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = PH * PW * C
    n = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BL + tl.arange(0, BL)  # [BL]
    b_index = tl.full([BL], -1, tl.int32)  # of the patch in the list; -1: not listed
    for first in range(0, M, CHUNK):
        m = first + tl.arange(0, CHUNK)
        b_id = tl.load(p_ids + n * ids_stride_n + m * ids_stride_m, mask=m < M, other=-1).to(tl.int32)  # [CHUNK]
        b_index = tl.maximum(b_index, tl.max(tl.where(b_id[None, :] == place[:, None], m[None, :], -1), axis=1))
    for first in tl.static_range(0, P, BP):
        p = first + tl.arange(0, BP)
        m_out = (place < L)[:, None] & (p < P)[None, :]
        m_listed = m_out & (b_index >= 0)[:, None]
        b_x = tl.load(p_patches + (n * M + b_index)[:, None] * P + p[None, :], mask=m_listed, other=0.0)  # [BL, BP]
        b_x = tl.where(m_listed, denormalise(b_x, p, p_mean, p_std, C, UINT8), 0.0)
        offsets = patch_offsets(place, p, GW, PH, PW, C, stride_h, stride_w, stride_c, PACKED)
        tl.store(p_out + n * stride_n + offsets, b_x.to(p_out.dtype.element_ty), mask=m_out)


def block_sizes(pixels: int) -> dict[str, int]:
    """BL patches × BP pixels a program, for P pixels a patch: whole patches up to 256 pixels, chunks of 256 above."""
    block = min(256, max(16, triton.next_power_of_2(pixels)))
    places = max(1, TILE // block)
    return {"BL": places, "BP": block, "CHUNK": COMPARISONS // places}


def scatter_patches_triton(
    patches: torch.Tensor,
    ids: torch.Tensor,
    grid_size: tuple[int, int],
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As ``fastmae.ops.scatter_patches``, for tensors on a GPU and any dtype but float64."""
    patches = patches.contiguous()
    (N, M, pixels), (gh, gw), (ph, pw) = patches.shape, grid_size, patch_size
    out = torch.empty(N, gh * ph, gw * pw, pixels // (ph * pw), dtype=dtype, device=patches.device)
    if out.numel():
        strides, constants = image_arguments(out, patch_size)
        blocks = block_sizes(pixels)
        with torch.cuda.device_of(patches):
            scatter_patches_kernel[(N, triton.cdiv(gh * gw, blocks["BL"]))](
                patches, ids, mean.contiguous(), std.contiguous(), out, M, gh * gw, ids.stride(0), ids.stride(1),
                **strides, **constants, **blocks, num_warps=NUM_WARPS,
            )  # fmt: skip
    return out
