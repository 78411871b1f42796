"""gelu on a GPU: the bias and the exact GELU in one pass; backward the gradients of both in one pass.

GELU(x) = x·Φ(x) and its derivative Φ(x) + x·φ(x) need one exponential between them: with E = exp(−x²/2), φ is E/√(2π),
and Φ(−|x|) is E times a polynomial in 1/(1 + P·|x|) (the form of Abramowitz and Stegun 7.1.26). Its coefficients were
fitted for this kernel to the relative error of Φ(−|x|) on 0 … 14: 3·10⁻⁸, less than a rounding of float32, also where
1 + erf cancels. So both take about 20 operations per number, few enough to hide behind the memory.

Backward, a program goes through a run of rows for some columns, and adds up the gradient of the bias. torch adds up the
sums of the programs afterwards, so no atomics are needed and the gradient is the same in every run on a kind of GPU.
The same pass can write the output once more, if it was not kept for the product after it.

Lower bound, bytes per number in bfloat16: 2 read and 2 written; backward 4 read and 2 written, or 4 with the output.
Definition: fastmae/ops/gelu.py.
"""

import torch
import triton
import triton.language as tl

from fastmae.kernels.multiprocessors import multiprocessors

TILE = 2048  # numbers that a program holds at once: 16 per thread
NUM_WARPS = 4
PROGRAMS = 6  # of the backward pass for each multiprocessor: as many as registers allow at once


@triton.jit
def normal_distribution(b_x):
    """Returns Φ(x) and φ(x), the distribution and the density, of float32 numbers."""
    b_t = 1.0 / (1.0 + 0.34 * tl.abs(b_x))
    b_exp = tl.exp2(b_x * b_x * -0.7213475204444817)  # exp(−x²/2): log2(e)/2
    b_tail = -0.0261204682
    b_tail = b_tail * b_t + 0.139499463
    b_tail = b_tail * b_t - 0.273132691
    b_tail = b_tail * b_t + 0.202182617
    b_tail = b_tail * b_t - 0.0447184144
    b_tail = b_tail * b_t + 0.115359146
    b_tail = b_tail * b_t + 0.115197663
    b_tail = b_tail * b_t + 0.136112196
    b_tail = b_tail * b_t + 0.135620504
    b_tail = b_tail * (b_t * b_exp)  # Φ(−|x|)
    return tl.where(b_x < 0.0, b_tail, 1.0 - b_tail), b_exp * 0.3989422804014327


@triton.jit
def gelu_kernel(
    p_h,  # floating [R, F]
    p_bias,  # floating [F]; not read without HAS_BIAS
    p_out,  # like h
    R,
    HAS_BIAS: tl.constexpr, F: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    mask = (r < R)[:, None] & (f < F)[None, :]
    o_row = r[:, None] * F + f[None, :]
    b_x = tl.load(p_h + o_row, mask=mask, other=0.0).to(tl.float32)  # [BR, BF]
    if HAS_BIAS:
        b_x += tl.load(p_bias + f, mask=f < F, other=0.0).to(tl.float32)[None, :]  # [1, BF]
    b_below, _ = normal_distribution(b_x)
    tl.store(p_out + o_row, (b_x * b_below).to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def gelu_backward_kernel(
    p_grad,  # floating [R, F]
    p_h,  # floating [R, F]
    p_bias,  # floating [F]; not read without HAS_BIAS
    p_grad_h,  # like h
    p_sums,  # float32 [programs, F]; not written without HAS_BIAS
    p_out,  # like h; not written without AGAIN
    R, rows,  # rows of a program, a multiple of BR
    HAS_BIAS: tl.constexpr, AGAIN: tl.constexpr, F: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    b_sum = tl.zeros([BR, BF], dtype=tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + f, mask=f < F, other=0.0).to(tl.float32)[None, :]  # [1, BF]
    for first in range(0, rows, BR):
        r = program * rows + first + tl.arange(0, BR)
        mask = (r < R)[:, None] & (f < F)[None, :]
        o_row = r[:, None] * F + f[None, :]
        b_x = tl.load(p_h + o_row, mask=mask, other=0.0).to(tl.float32)  # [BR, BF]
        b_grad = tl.load(p_grad + o_row, mask=mask, other=0.0).to(tl.float32)  # [BR, BF]
        if HAS_BIAS:
            b_x += b_bias
        b_below, b_density = normal_distribution(b_x)
        b_grad *= b_below + b_x * b_density  # 0 where masked: b_grad is
        tl.store(p_grad_h + o_row, b_grad.to(p_grad_h.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            b_sum += b_grad
        if AGAIN:
            tl.store(p_out + o_row, (b_x * b_below).to(p_out.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        tl.store(p_sums + program * F + f, tl.sum(b_sum, axis=0), mask=f < F)


def block_sizes(width: int) -> dict[str, int]:
    """Returns the tile, BR rows × BF of F columns."""
    block = min(256, max(16, triton.next_power_of_2(width)))
    return {"F": width, "BR": TILE // block, "BF": block}


def gelu_triton(h: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Computes ``fastmae.ops.gelu`` on a GPU, for any dtype but float64."""
    h = h.contiguous()
    out = torch.empty_like(h)
    if out.numel():
        F = h.shape[-1]
        R, blocks = h.numel() // F, block_sizes(F)
        grid = (triton.cdiv(R, blocks["BR"]), triton.cdiv(F, blocks["BF"]))
        with torch.cuda.device_of(h):
            gelu_kernel[grid](
                h, h if bias is None else bias.contiguous(), out, R,
                HAS_BIAS=bias is not None, **blocks, num_warps=NUM_WARPS,
            )  # fmt: skip
    return out


def gelu_backward_triton(
    grad: torch.Tensor, h: torch.Tensor, bias: torch.Tensor | None, with_output: bool = False
) -> list[torch.Tensor]:
    """Returns the gradient of h in its dtype; float32 [F] for the bias, if there is one; if asked for, the output."""
    grad, h = grad.contiguous(), h.contiguous()
    grad_h, F = torch.empty_like(h), h.shape[-1]
    out = [torch.empty_like(h)] if with_output else []
    if not h.numel():
        of_bias = [] if bias is None else [torch.zeros(F, dtype=torch.float32, device=h.device)]
        return [grad_h, *of_bias, *out]
    R, blocks = h.numel() // F, block_sizes(F)
    columns = triton.cdiv(F, blocks["BF"])
    runs = max(1, PROGRAMS * multiprocessors(h.device) // columns)
    rows = triton.cdiv(R, runs * blocks["BR"]) * blocks["BR"]
    programs = triton.cdiv(R, rows)
    # Without a bias nothing is written to the sums.
    sums = grad_h if bias is None else torch.empty(programs, F, dtype=torch.float32, device=h.device)
    with torch.cuda.device_of(h):
        gelu_backward_kernel[(programs, columns)](
            grad, h, h if bias is None else bias.contiguous(), grad_h, sums, out[0] if out else grad_h, R, rows,
            HAS_BIAS=bias is not None, AGAIN=with_output, **blocks, num_warps=NUM_WARPS,
        )  # fmt: skip
    of_bias = [] if bias is None else [sums.sum(dim=0)]
    return [grad_h, *of_bias, *out]
