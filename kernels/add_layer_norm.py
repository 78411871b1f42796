"""add_layer_norm on a GPU: the sum, its LayerNorm and the statistics in one pass; one pass over the gradients.

Rows lie in registers whole, so each number is read once. Backward, a program goes through a run of rows, writes the
gradient of the sum in one or two dtypes, and adds up those of the weight, the bias and the branch's bias, which is the
bias of the product before. torch adds up the sums of the programs afterwards, so no atomics are needed and the
gradients are the same in every run on a kind of GPU.

Lower bound, bytes per row and channel with a stream and a branch of s and b bytes and bfloat16 beside them: s + b read,
s + 2 written; backward 2·s + 2 read, s + b written (b only if the dtypes differ). A bfloat16 stream: 8 and 8. A float32
stream with bfloat16 branches: 12 and 16. Definition: fastmae/ops/add_layer_norm.py.
"""

import torch
import triton
import triton.language as tl

from fastmae.kernels.multiprocessors import multiprocessors

FORWARD_TILE = 4096  # numbers that a program holds at once
BACKWARD_TILE = 2048  # of which there are six: stream, two gradients, three sums
PROGRAMS = 3  # of the backward pass for each multiprocessor: as many as registers allow at once
REGISTERS = 80  # of a thread, so that three programs of 256 threads do fit; it is enough without spills


@triton.jit
def add_layer_norm_kernel(
    p_x,  # floating [N, T, D], contiguous in D
    p_branch,  # floating [N, T, D], contiguous in D
    p_branch_bias,  # floating [D]; not read without HAS_BIAS
    p_weight,  # floating [D]
    p_bias,  # floating [D]
    p_stream,  # like x, [R, D] with R = N·T rows
    p_normed,  # floating [R, D]
    p_mean,  # float32 [R]
    p_rstd,  # float32 [R]
    R, T,
    x_stride_n, x_stride_t, branch_stride_n, branch_stride_t,
    HAS_BIAS: tl.constexpr, D: tl.constexpr, EPS: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    m_d = (d < D)[None, :]
    mask = (r < R)[:, None] & m_d
    n, t = (r // T)[:, None], (r % T)[:, None]
    b_x = tl.load(p_x + n * x_stride_n + t * x_stride_t + d[None, :], mask=mask, other=0.0)  # [BR, BD]
    o_branch = n * branch_stride_n + t * branch_stride_t + d[None, :]
    b_branch = tl.load(p_branch + o_branch, mask=mask, other=0.0).to(tl.float32)  # [BR, BD]
    if HAS_BIAS:
        b_branch += tl.load(p_branch_bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]  # [1, BD]
    b_stream = (b_x.to(tl.float32) + b_branch).to(p_stream.dtype.element_ty)
    o_row = r[:, None] * D + d[None, :]
    tl.store(p_stream + o_row, b_stream, mask=mask)
    # What is normalised is the sum as it is stored: backward knows no other.
    b_sum = b_stream.to(tl.float32)
    b_mean = tl.sum(b_sum, axis=1) / D  # [BR]
    b_centred = tl.where(m_d, b_sum - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_centred * b_centred, axis=1) / D + EPS)
    b_weight = tl.load(p_weight + d, mask=d < D, other=0.0).to(tl.float32)  # [BD]
    b_bias = tl.load(p_bias + d, mask=d < D, other=0.0).to(tl.float32)  # [BD]
    b_normed = b_centred * b_rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(p_normed + o_row, b_normed.to(p_normed.dtype.element_ty), mask=mask)
    tl.store(p_mean + r, b_mean, mask=r < R)
    tl.store(p_rstd + r, b_rstd, mask=r < R)


@triton.jit
def add_layer_norm_backward_kernel(
    p_grad_stream,  # floating [R, D]; not read without HAS_STREAM
    p_grad_normed,  # floating [R, D]
    p_stream,  # floating [R, D]
    p_weight,  # floating [D]
    p_mean,  # float32 [R]
    p_rstd,  # float32 [R]
    p_grad_x,  # like stream [R, D]
    p_grad_branch,  # floating [R, D]; not written without TWO
    p_sums,  # float32 [programs, 2, D]; [programs, 3, D] with HAS_BIAS
    R, rows,  # rows of a program, a multiple of BR
    HAS_STREAM: tl.constexpr, TWO: tl.constexpr, HAS_BIAS: tl.constexpr,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    b_weight = tl.load(p_weight + d, mask=d < D, other=0.0).to(tl.float32)  # [BD]
    b_grad_weight = tl.zeros([BR, BD], dtype=tl.float32)
    b_grad_bias = tl.zeros([BR, BD], dtype=tl.float32)
    b_grad_branch_bias = tl.zeros([BR, BD], dtype=tl.float32)
    for first in range(0, rows, BR):
        r = program * rows + first + tl.arange(0, BR)
        mask = (r < R)[:, None] & (d < D)[None, :]
        o_row = r[:, None] * D + d[None, :]
        b_stream = tl.load(p_stream + o_row, mask=mask, other=0.0).to(tl.float32)  # [BR, BD]
        b_grad = tl.load(p_grad_normed + o_row, mask=mask, other=0.0).to(tl.float32)  # [BR, BD]
        b_mean = tl.load(p_mean + r, mask=r < R, other=0.0)[:, None]  # [BR, 1]
        b_rstd = tl.load(p_rstd + r, mask=r < R, other=0.0)[:, None]  # [BR, 1]
        b_normal = (b_stream - b_mean) * b_rstd
        b_grad_weight += b_grad * b_normal  # 0 where masked: b_grad is
        b_grad_bias += b_grad
        b_grad *= b_weight[None, :]
        b_along = tl.sum(b_grad * b_normal, axis=1) / D  # [BR]
        b_shift = tl.sum(b_grad, axis=1) / D  # [BR]
        b_grad = (b_grad - b_shift[:, None] - b_normal * b_along[:, None]) * b_rstd
        if HAS_STREAM:
            b_grad += tl.load(p_grad_stream + o_row, mask=mask, other=0.0).to(tl.float32)  # [BR, BD]
        tl.store(p_grad_x + o_row, b_grad.to(p_grad_x.dtype.element_ty), mask=mask)
        if TWO:
            tl.store(p_grad_branch + o_row, b_grad.to(p_grad_branch.dtype.element_ty), mask=mask)
        if HAS_BIAS:
            b_grad_branch_bias += tl.where(mask, b_grad, 0.0)
    o_sums = program * (3 if HAS_BIAS else 2) * D + d
    tl.store(p_sums + o_sums, tl.sum(b_grad_weight, axis=0), mask=d < D)
    tl.store(p_sums + o_sums + D, tl.sum(b_grad_bias, axis=0), mask=d < D)
    if HAS_BIAS:
        tl.store(p_sums + o_sums + 2 * D, tl.sum(b_grad_branch_bias, axis=0), mask=d < D)


def block_sizes(width: int) -> dict[str, int]:
    """Returns the tile of the forward pass, BR whole rows of BD ≥ D numbers, and the number of warps for it."""
    block = max(128, triton.next_power_of_2(width))
    return {"D": width, "BR": max(1, FORWARD_TILE // block), "BD": block, "num_warps": max(4, block // 512)}


def backward_block_sizes(width: int) -> dict[str, int]:
    """Returns the tile of the backward pass, in the same way, and the most registers that a thread may have.

    They are 8 numbers a thread, as there are six tiles.
    """
    block = max(128, triton.next_power_of_2(width))
    tile = {"D": width, "BR": max(1, BACKWARD_TILE // block), "BD": block}
    return {**tile, "num_warps": max(8, block // 256), "maxnreg": REGISTERS}


def add_layer_norm_triton(
    x: torch.Tensor,
    branch: torch.Tensor,
    branch_bias: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns stream, normed [..., D], means and inverse deviations float32 [...] on a GPU, for any dtype but float64.

    Tokens from some index on of longer images are read where they lie.
    """
    rows, branches = _rows(x), _rows(branch)
    (N, T, D), device = rows.shape, x.device
    stream = torch.empty(x.shape, dtype=x.dtype, device=device)
    normed = torch.empty(x.shape, dtype=dtype, device=device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=device) for _ in range(2))
    if stream.numel():
        blocks = block_sizes(D)
        with torch.cuda.device_of(x):
            add_layer_norm_kernel[(triton.cdiv(N * T, blocks["BR"]),)](
                rows, branches, weight if branch_bias is None else branch_bias.contiguous(), weight.contiguous(),
                bias.contiguous(), stream, normed, mean, rstd, N * T, T,
                rows.stride(0), rows.stride(1), branches.stride(0), branches.stride(1),
                HAS_BIAS=branch_bias is not None, EPS=eps, **blocks,
            )  # fmt: skip
    return stream, normed, mean, rstd


def add_layer_norm_backward_triton(
    grad_stream: torch.Tensor | None,
    grad_normed: torch.Tensor,
    stream: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    branch_dtype: torch.dtype,
    has_branch_bias: bool = False,
) -> list[torch.Tensor]:
    """Returns the gradients of x, of branch if its dtype is another, and float32 [2 or 3, D] of weight and biases."""
    D, R, count = stream.shape[-1], mean.numel(), 3 if has_branch_bias else 2
    dtypes = {stream.dtype: None, branch_dtype: None}
    gradients = [torch.empty(stream.shape, dtype=dtype, device=stream.device) for dtype in dtypes]
    if not stream.numel():
        return [*gradients, torch.zeros(count, D, dtype=torch.float32, device=stream.device)]
    blocks = backward_block_sizes(D)
    rows = triton.cdiv(R, PROGRAMS * multiprocessors(stream.device) * blocks["BR"]) * blocks["BR"]
    programs = triton.cdiv(R, rows)
    sums = torch.empty(programs, count, D, dtype=torch.float32, device=stream.device)
    grad_normed = grad_normed.contiguous()
    with torch.cuda.device_of(stream):
        add_layer_norm_backward_kernel[(programs,)](
            grad_normed if grad_stream is None else grad_stream.contiguous(), grad_normed, stream,
            weight.contiguous(), mean, rstd, gradients[0], gradients[-1], sums, R, rows,
            HAS_STREAM=grad_stream is not None, TWO=len(gradients) == 2, HAS_BIAS=has_branch_bias, **blocks,
        )  # fmt: skip
    return [*gradients, sums.sum(dim=0)]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Views tokens [..., D] as [N, T, D], contiguous in D; copies those of other strides."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    return x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
