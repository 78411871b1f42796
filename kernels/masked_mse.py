"""masked_mse on a GPU: a kernel for the loss and one for its gradient, each in one pass over prediction and pixels.

Each program takes some whole patches: it reads the pixels once and makes the target in registers. Forward, it writes
the sum of its squared errors and the number of its targets, which torch adds up afterwards, so no atomics are needed
and the loss is the same in every run. Backward, it writes the gradient of the prediction, with the gradient of the
loss as a factor.

Lower bound: P pixels and P numbers read per patch in either direction, and P numbers written backward. Keeping the
gradient of the forward pass would read pixels once only, but read and write the gradient once more. Definition:
fastmae/ops/masked_mse.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fastmae.kernels.pixels import image_arguments, is_missing, normalise, patch_offsets

TILE = 2048  # pixels that a program holds at once: 16 per thread, in three copies (prediction, target, difference)
NUM_WARPS = 4


@triton.jit
def patch_errors(
    p_pred, p_images, p_ids, p_mean, p_std, p_range, nodata, n, m, M,
    ids_stride_n, ids_stride_m, stride_n, stride_h, stride_w, stride_c,
    NORM_PIX: tl.constexpr, EPS: tl.constexpr, GW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, UNIT: tl.constexpr, HAS_RANGE: tl.constexpr, HAS_NODATA: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Computes prediction minus target of patches ``m`` [BM] of image n, 0 where there is none.

    Returns the errors [BM, BP], which patches are targets [BM], the offsets of the predictions, and which are there.
    """
    P: tl.constexpr = PH * PW * C
    p = tl.arange(0, BP)
    m_target = m < M  # [BM]
    b_id = tl.load(p_ids + n * ids_stride_n + m * ids_stride_m, mask=m_target, other=0).to(tl.int32)  # [BM]
    mask = m_target[:, None] & (p < P)[None, :]
    offsets = patch_offsets(b_id, p, GW, PH, PW, C, stride_h, stride_w, stride_c, PACKED)
    b_pixel = tl.load(p_images + n * stride_n + offsets, mask=mask, other=0)  # [BM, BP]
    b_target = normalise(b_pixel, p, p_mean, p_std, p_range, C, UNIT, HAS_RANGE)
    if HAS_NODATA:
        m_target &= tl.max((mask & is_missing(b_pixel, nodata)).to(tl.int32), axis=1) == 0
    if NORM_PIX:
        average = tl.sum(tl.where(mask, b_target, 0.0), axis=1) / P  # [BM]
        b_target -= average[:, None]
        variance = tl.sum(tl.where(mask, b_target * b_target, 0.0), axis=1) / (P - 1)
        b_target /= tl.sqrt_rn(variance + EPS)[:, None]
    o_pred = (n * M + m)[:, None] * P + p[None, :]
    b_pred = tl.load(p_pred + o_pred, mask=mask, other=0.0).to(tl.float32)  # [BM, BP]
    b_error = tl.where(mask & m_target[:, None], b_pred - b_target, 0.0)
    return b_error, m_target, o_pred, mask


@triton.jit
def masked_mse_kernel(
    p_pred,  # floating [N, M, P]
    p_images,  # uint8, uint16 or floating [N, H, W, C], any strides
    p_ids,  # int32 or int64 [N, M], any strides
    p_mean,  # floating [C]
    p_std,  # floating [C]
    p_range,  # floating [2, C]: low and high of each channel
    p_sums,  # float32 [N, programs per image]
    p_counts,  # float32 [N, programs per image]
    nodata,  # float32: the value of missing pixels
    M,
    ids_stride_n, ids_stride_m,
    stride_n, stride_h, stride_w, stride_c,
    NORM_PIX: tl.constexpr, EPS: tl.constexpr,
    GW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, UNIT: tl.constexpr, HAS_RANGE: tl.constexpr, HAS_NODATA: tl.constexpr,
    BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    b_error, m_target, _, _ = patch_errors(
        p_pred, p_images, p_ids, p_mean, p_std, p_range, nodata, n, m, M, ids_stride_n, ids_stride_m,
        stride_n, stride_h, stride_w, stride_c, NORM_PIX, EPS, GW, PH, PW, C, PACKED, UNIT, HAS_RANGE, HAS_NODATA, BP,
    )  # fmt: skip
    o_program = n * tl.num_programs(1) + tl.program_id(1)
    tl.store(p_sums + o_program, tl.sum(tl.sum(b_error * b_error, axis=1), axis=0))
    if HAS_NODATA:
        tl.store(p_counts + o_program, tl.sum(m_target.to(tl.float32), axis=0))


@triton.jit
def masked_mse_backward_kernel(
    p_grad_loss,  # float32 []
    p_targets,  # float32 []
    p_pred,  # floating [N, M, P]
    p_images,  # uint8, uint16 or floating [N, H, W, C], any strides
    p_ids,  # int32 or int64 [N, M], any strides
    p_mean,  # floating [C]
    p_std,  # floating [C]
    p_range,  # floating [2, C]: low and high of each channel
    p_grad,  # like pred
    nodata,  # float32: the value of missing pixels
    M,
    scale,  # float32: 2 / (N·M·P); with HAS_NODATA 2 / P, which is divided by the number of targets here
    ids_stride_n, ids_stride_m,
    stride_n, stride_h, stride_w, stride_c,
    NORM_PIX: tl.constexpr, EPS: tl.constexpr,
    GW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, UNIT: tl.constexpr, HAS_RANGE: tl.constexpr, HAS_NODATA: tl.constexpr,
    BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    b_error, _, o_pred, mask = patch_errors(
        p_pred, p_images, p_ids, p_mean, p_std, p_range, nodata, n, m, M, ids_stride_n, ids_stride_m,
        stride_n, stride_h, stride_w, stride_c, NORM_PIX, EPS, GW, PH, PW, C, PACKED, UNIT, HAS_RANGE, HAS_NODATA, BP,
    )  # fmt: skip
    slope = tl.load(p_grad_loss) * scale
    if HAS_NODATA:
        slope /= tl.maximum(tl.load(p_targets), 1.0)
    tl.store(p_grad + o_pred, (slope * b_error).to(p_grad.dtype.element_ty), mask=mask)


def block_sizes(pixels: int) -> dict[str, int]:
    """Returns the tile, BM whole patches of BP ≥ P pixels per program."""
    block = max(16, triton.next_power_of_2(pixels))
    return {"BM": max(1, TILE // block), "BP": block}


def num_warps(pixels: int) -> int:
    """Returns the warps of a program: more for patches that are larger than a tile, as many as there can be."""
    return min(32, NUM_WARPS * max(1, triton.next_power_of_2(pixels) // TILE))


def masked_mse_triton(
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
    value_range: torch.Tensor | None = None,
    nodata: float | None = None,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (loss, number of targets), float32 scalars, on a GPU, for any dtype but float64."""
    N, M, pixels = pred.shape
    grid, arguments = _launch(pred, images, ids, patch_size, mean, std, norm_pix, value_range, nodata, eps)
    sums = torch.empty(grid, dtype=torch.float32, device=pred.device)
    counts = sums if nodata is None else torch.empty_like(sums)
    with torch.cuda.device_of(pred):
        masked_mse_kernel[grid](p_sums=sums, p_counts=counts, **arguments)
    if nodata is None:
        return sums.sum() * (1.0 / pred.numel()), torch.full((), N * M, dtype=torch.float32, device=pred.device)
    targets = counts.sum()
    return sums.sum() / (targets * pixels).clamp(min=1), targets


def masked_mse_backward_triton(
    grad_loss: torch.Tensor,
    targets: torch.Tensor,
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
    value_range: torch.Tensor | None = None,
    nodata: float | None = None,
    *,
    eps: float,
) -> torch.Tensor:
    """Returns the gradient of pred on a GPU, for any dtype but float64."""
    grid, arguments = _launch(pred, images, ids, patch_size, mean, std, norm_pix, value_range, nodata, eps)
    grad = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    scale = 2.0 / (pred.numel() if nodata is None else pred.shape[2])
    with torch.cuda.device_of(pred):
        masked_mse_backward_kernel[grid](
            p_grad_loss=grad_loss, p_targets=targets, p_grad=grad, scale=scale, **arguments
        )
    return grad


def _launch(
    pred: torch.Tensor,
    images: torch.Tensor,
    ids: torch.Tensor,
    patch_size: tuple[int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    norm_pix: bool,
    value_range: torch.Tensor | None,
    nodata: float | None,
    eps: float,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Returns the grid and the arguments that both kernels have."""
    N, M, pixels = pred.shape
    blocks, mean = block_sizes(pixels), mean.contiguous()
    arguments, constants = image_arguments(images, patch_size, value_range, mean)
    tensors = {"p_pred": pred.contiguous(), "p_images": images, "p_ids": ids, "p_mean": mean, "p_std": std.contiguous()}
    numbers = {"nodata": nodata or 0.0, "M": M, "ids_stride_n": ids.stride(0), "ids_stride_m": ids.stride(1)}
    constants = {**constants, "NORM_PIX": norm_pix, "EPS": eps, "HAS_NODATA": nodata is not None, **blocks}
    grid = (N, triton.cdiv(M, blocks["BM"]))
    return grid, {**tensors, **numbers, **arguments, **constants, "num_warps": num_warps(pixels)}
