"""assemble_tokens on a GPU: one pass over the decoder's input forward, one over its gradient backward.

Forward: each program makes some tokens of one image and reads the mask token once. Backward: each program goes through
the tokens of one image for some channels, copies the gradients of visible tokens and adds up those of masked ones.
torch adds up the sums of the images afterwards, so no atomics are needed and the gradient is the same in every run.

Lower bound, for S tokens of D channels: D numbers read for each visible token, D of positions (which stay in the cache)
and D written for each token; backward D read for each token and D written for each visible one. Definition:
fastmae/ops/assemble_tokens.py.
"""

import torch
import triton
import triton.language as tl

TILE = 4096  # numbers that a program holds at once: 32 per thread
NUM_WARPS = 4


@triton.jit
def assemble_tokens_kernel(
    p_visible,  # floating [N, T, D], contiguous in D
    p_mask_token,  # floating [D]
    p_pos_embed,  # floating [L+1, D]
    p_ids,  # int32 or int64 [N, L], any strides
    p_out,  # floating [N, S, D], S = L+1
    S, T,
    visible_stride_n, visible_stride_t,
    ids_stride_n, ids_stride_l,
    D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BS + tl.arange(0, BS)
    m_patch = (s > 0) & (s < S)
    b_id = tl.load(p_ids + n * ids_stride_n + (s - 1) * ids_stride_l, mask=m_patch, other=-1).to(tl.int32)  # [BS]
    for first in tl.static_range(0, D, BD):
        d = first + tl.arange(0, BD)
        m_out = (s < S)[:, None] & (d < D)[None, :]
        m_visible = (s < T)[:, None] & (d < D)[None, :]
        o_visible = n * visible_stride_n + s.to(tl.int64)[:, None] * visible_stride_t + d[None, :]
        b_visible = tl.load(p_visible + o_visible, mask=m_visible, other=0.0).to(tl.float32)  # [BS, BD]
        b_mask = tl.load(p_mask_token + d, mask=d < D, other=0.0).to(tl.float32)  # [BD]
        o_pos = (1 + b_id)[:, None] * D + d[None, :]  # the class token's row is 0: its "id" is -1
        b_pos = tl.load(p_pos_embed + o_pos, mask=m_out, other=0.0).to(tl.float32)  # [BS, BD]
        b_token = tl.where((s < T)[:, None], b_visible, b_mask[None, :]) + b_pos
        o_out = (n * S + s)[:, None] * D + d[None, :]
        tl.store(p_out + o_out, b_token.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def assemble_tokens_backward_kernel(
    p_grad,  # floating [N, S, D]
    p_grad_visible,  # floating [N, T, D]
    p_sums,  # float32 [N, D]
    S, T,
    D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    b_sum = tl.zeros([BS, BD], dtype=tl.float32)
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        m_grad = (s < S)[:, None] & (d < D)[None, :]
        m_visible = (s < T)[:, None] & (d < D)[None, :]
        b_grad = tl.load(p_grad + (n * S + s)[:, None] * D + d[None, :], mask=m_grad, other=0.0)  # [BS, BD]
        tl.store(
            p_grad_visible + (n * T + s)[:, None] * D + d[None, :],
            b_grad.to(p_grad_visible.dtype.element_ty),
            mask=m_visible,
        )
        b_sum += tl.where((s < T)[:, None], 0.0, b_grad.to(tl.float32))
    tl.store(p_sums + n * D + d, tl.sum(b_sum, axis=0), mask=d < D)


def block_sizes(width: int) -> dict[str, int]:
    """Returns the tile of the forward pass: BS tokens × BD of D channels per program."""
    block = min(512, max(16, triton.next_power_of_2(width)))
    return {"D": width, "BS": max(1, TILE // block), "BD": block}


def backward_block_sizes(width: int) -> dict[str, int]:
    """Returns the tile of the backward pass: BD of D channels, BS tokens at a time.

    It is narrow, so that there are several programs per image.
    """
    block = min(128, max(16, triton.next_power_of_2(width)))
    return {"D": width, "BS": max(1, TILE // block), "BD": block}


def assemble_tokens_triton(
    visible: torch.Tensor,
    mask_token: torch.Tensor,
    pos_embed: torch.Tensor,
    ids_shuffle: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Computes ``fastmae.ops.assemble_tokens`` on a GPU, for any dtype but float64."""
    if visible.stride(2) != 1:
        visible = visible.contiguous()
    (N, T, D), S = visible.shape, ids_shuffle.shape[1] + 1
    out = torch.empty(N, S, D, dtype=dtype, device=visible.device)
    if out.numel():
        blocks = block_sizes(D)
        with torch.cuda.device_of(visible):
            assemble_tokens_kernel[(N, triton.cdiv(S, blocks["BS"]))](
                visible, mask_token.contiguous(), pos_embed.contiguous(), ids_shuffle, out, S, T,
                visible.stride(0), visible.stride(1), ids_shuffle.stride(0), ids_shuffle.stride(1),
                **blocks, num_warps=NUM_WARPS,
            )  # fmt: skip
    return out


def assemble_tokens_backward_triton(
    grad: torch.Tensor, visible_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits grad [N, L+1, D] into that of the visible tokens [N, K+1, D] and of the mask token float32 [D]."""
    grad = grad.contiguous()
    N, S, D = grad.shape
    grad_visible = torch.empty(N, visible_tokens, D, dtype=dtype, device=grad.device)
    sums = torch.empty(N, D, dtype=torch.float32, device=grad.device)
    if grad.numel():
        blocks = backward_block_sizes(D)
        with torch.cuda.device_of(grad):
            assemble_tokens_backward_kernel[(N, triton.cdiv(D, blocks["BD"]))](
                grad, grad_visible, sums, S, visible_tokens, **blocks, num_warps=NUM_WARPS
            )
    return grad_visible, sums.sum(dim=0)
