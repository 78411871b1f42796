"""gather_patches on a GPU: each program cuts out some patches of one image, normalising on the way.

Lower bound: P pixels read and P numbers of the result's type written per patch; the arithmetic takes no extra time.
Definition: fastmae/ops/gather_patches.py.
"""

import torch
import triton
import triton.language as tl

from fastmae.kernels.pixels import image_arguments, is_missing, normalise, patch_offsets

TILE = 2048  # pixels that a program holds at once: 16 per thread
NUM_WARPS = 4


@triton.jit
def gather_patches_kernel(
    p_images,  # uint8, uint16 or floating [N, H, W, C], any strides
    p_ids,  # int32 or int64 [N, K], any strides
    p_mean,  # floating [C]
    p_std,  # floating [C]
    p_range,  # floating [2, C]: low and high of each channel
    p_out,  # floating [N, K, P]
    nodata,  # float32: the value of missing pixels
    K,
    ids_stride_n, ids_stride_k,
    stride_n, stride_h, stride_w, stride_c,
    GW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, UNIT: tl.constexpr, HAS_RANGE: tl.constexpr, HAS_NODATA: tl.constexpr,
    BK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = PH * PW * C
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    b_id = tl.load(p_ids + n * ids_stride_n + k * ids_stride_k, mask=k < K, other=0).to(tl.int32)  # [BK]
    for first in tl.static_range(0, P, BP):
        p = first + tl.arange(0, BP)
        mask = (k < K)[:, None] & (p < P)[None, :]
        offsets = patch_offsets(b_id, p, GW, PH, PW, C, stride_h, stride_w, stride_c, PACKED)
        b_pixel = tl.load(p_images + n * stride_n + offsets, mask=mask, other=0)  # [BK, BP]
        b_x = normalise(b_pixel, p, p_mean, p_std, p_range, C, UNIT, HAS_RANGE)
        if HAS_NODATA:
            b_x = tl.where(is_missing(b_pixel, nodata), 0.0, b_x)
        o_out = (n * K + k)[:, None] * P + p[None, :]
        tl.store(p_out + o_out, b_x.to(p_out.dtype.element_ty), mask=mask)


def block_sizes(pixels: int) -> dict[str, int]:
    """Returns the tile, BK patches × BP pixels per program: patches of up to 256 numbers P are whole, others cut.

    Patches of many bands are cut into whole tiles, as each part is code of its own, which takes long to compile.
    """
    block = min(256, max(16, triton.next_power_of_2(pixels))) if pixels <= 4096 else TILE
    return {"BK": max(1, TILE // block), "BP": block}


def gather_patches_triton(
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    dtype: torch.dtype,
    value_range: torch.Tensor | None = None,
    nodata: float | None = None,
) -> torch.Tensor:
    """Computes ``fastmae.ops.gather_patches`` on a GPU, for any dtype but float64."""
    (N, K), pixels = ids.shape, patch_size[0] * patch_size[1] * images.shape[3]
    out = torch.empty(N, K, pixels, dtype=dtype, device=images.device)
    if out.numel():
        mean = mean.contiguous()
        arguments, constants = image_arguments(images, patch_size, value_range, mean)
        blocks = block_sizes(pixels)
        grid = (N, triton.cdiv(K, blocks["BK"]))
        with torch.cuda.device_of(images):
            gather_patches_kernel[grid](
                images, ids, mean, std.contiguous(), p_out=out, nodata=nodata or 0.0, K=K,
                ids_stride_n=ids.stride(0), ids_stride_k=ids.stride(1), **arguments, **constants,
                HAS_NODATA=nodata is not None, **blocks, num_warps=NUM_WARPS,
            )  # fmt: skip
    return out
