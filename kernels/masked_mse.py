"""masked_mse on a GPU: loss and gradient in one pass over the prediction and the pixels.

Each program takes some whole patches: it reads the pixels once, makes the target in registers, and writes the gradient
and the sum of its squared errors. torch adds up the sums afterwards, so no atomics are needed and the loss is the same
in every run.

Lower bound: P bytes of pixels and P numbers read, and P numbers written, per patch. Definition:
fastmae/ops/masked_mse.py.
"""

import torch
import triton
import triton.language as tl

from fastmae.kernels.pixels import image_arguments, normalise, patch_offsets

TILE = 2048  # pixels that a program holds at once: 16 per thread, in three copies (prediction, target, difference)
NUM_WARPS = 4


@triton.jit
def masked_mse_kernel(
    p_pred,  # floating [N, M, P]
    p_images,  # uint8 or floating [N, H, W, C], any strides
    p_ids,  # int32 or int64 [N, M], any strides
    p_mean,  # floating [C]
    p_std,  # floating [C]
    p_sums,  # float32 [N, programs per image]
    p_grad,  # like pred
    M,
    scale,  # float32: 1 / (N·M·P)
    ids_stride_n, ids_stride_m,
    stride_n, stride_h, stride_w, stride_c,
    NORM_PIX: tl.constexpr, EPS: tl.constexpr,
    GW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, UINT8: tl.constexpr,
    BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = PH * PW * C
    n = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    p = tl.arange(0, BP)
    b_id = tl.load(p_ids + n * ids_stride_n + m * ids_stride_m, mask=m < M, other=0).to(tl.int32)  # [BM]
    mask = (m < M)[:, None] & (p < P)[None, :]
    offsets = patch_offsets(b_id, p, GW, PH, PW, C, stride_h, stride_w, stride_c, PACKED)
    b_x = tl.load(p_images + n * stride_n + offsets, mask=mask, other=0)  # [BM, BP]
    b_target = normalise(b_x, p, p_mean, p_std, C, UINT8)
    if NORM_PIX:
        average = tl.sum(tl.where(mask, b_target, 0.0), axis=1) / P  # [BM]
        b_target -= average[:, None]
        variance = tl.sum(tl.where(mask, b_target * b_target, 0.0), axis=1) / (P - 1)
        b_target /= tl.sqrt_rn(variance + EPS)[:, None]
    o_pred = (n * M + m)[:, None] * P + p[None, :]
    b_pred = tl.load(p_pred + o_pred, mask=mask, other=0.0).to(tl.float32)  # [BM, BP]
    b_error = tl.where(mask, b_pred - b_target, 0.0)
    tl.store(p_grad + o_pred, (2.0 * scale * b_error).to(p_grad.dtype.element_ty), mask=mask)
    total = tl.sum(tl.sum(b_error * b_error, axis=1), axis=0)
    tl.store(p_sums + n * tl.num_programs(1) + tl.program_id(1), total)


def block_sizes(pixels: int) -> dict[str, int]:
    """Returns the tile, BM whole patches of BP ≥ P pixels per program."""
    block = max(16, triton.next_power_of_2(pixels))
    return {"BM": max(1, TILE // block), "BP": block}


def masked_mse_triton(
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (loss, a float32 scalar; its gradient with respect to pred) on a GPU, for any dtype but float64."""
    pred = pred.contiguous()
    N, M, pixels = pred.shape
    blocks = block_sizes(pixels)
    programs = triton.cdiv(M, blocks["BM"])
    sums = torch.empty(N, programs, dtype=torch.float32, device=pred.device)
    grad = torch.empty_like(pred)
    scale = 1.0 / pred.numel()
    strides, constants = image_arguments(images, patch_size)
    with torch.cuda.device_of(pred):
        masked_mse_kernel[(N, programs)](
            pred, images, ids, mean.contiguous(), std.contiguous(), sums, grad, M, scale,
            ids.stride(0), ids.stride(1), **strides, NORM_PIX=norm_pix, EPS=eps, **constants, **blocks,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return sums.sum() * scale, grad
