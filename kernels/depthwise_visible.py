"""depthwise_visible on a GPU: a cell and a block of its channels for each program, with the sums in registers.

A position that is masked or outside is not read. What is read again by other taps and by neighbouring cells comes from
the caches. The gradient of x is the same kernel with the weights turned around. For the gradients of the weights a
program goes through a run of cells for one tap; torch adds up the sums of the programs afterwards, so no atomics are
needed and the gradients are the same in every run on a kind of GPU.

Lower bound, bytes per number of s bytes: s read and s written forward, 3·s read and s written backward. Definition:
fastmae/ops/depthwise_visible.py.
"""

import torch
import triton
import triton.language as tl

from fastmae.kernels.multiprocessors import multiprocessors

CHANNELS = {8: 32, 4: 64, 2: 128, 1: 256}  # of a program, by the positions on a side of a cell
WARPS = {8: 4, 4: 4, 2: 2, 1: 2}
PROGRAMS = 4  # of the gradients of weights for each multiprocessor


@triton.jit
def tap_of_cell(
    p_x,  # floating [N, K, S·S, C], from the block's first channel on
    p_slots,  # int32 [L], of the image
    first,  # number of the image's first cell among all: n·K
    cell_y, cell_x, dy, dx, gh, gw,
    c,  # [BC]
    m_c,  # [BC]
    S: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Returns what a tap reads for each position of a cell, float32 [S·S, BC]; 0 where it is masked or outside."""
    position = tl.arange(0, S * S)
    # Coordinates start 8 rows and columns outside of the grid, so that none is negative.
    y, x = cell_y * S + position // S + dy + 8, cell_x * S + position % S + dx + 8  # [S·S]
    row, column = y // S - 8 // S, x // S - 8 // S
    inside = (row >= 0) & (row < gh) & (column >= 0) & (column < gw)
    slot = tl.load(p_slots + row * gw + column, mask=inside, other=-1)  # [S·S]
    o_x = ((first + slot).to(tl.int64) * (S * S) + y % S * S + x % S) * C  # [S·S]
    mask = (slot >= 0)[:, None] & m_c[None, :]
    return tl.load(p_x + o_x[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)  # [S·S, BC]


@triton.jit
def depthwise_visible_kernel(
    p_x,  # floating [N, K, S·S, C]
    p_slots,  # int32 [N, gh·gw]
    p_ids,  # int32 [N, K]: numbers of the cells
    p_weight,  # floating [49, C]
    p_bias,  # floating [C]; not read without HAS_BIAS
    p_out,  # like x
    K, gh, gw,
    HAS_BIAS: tl.constexpr, TURNED: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0)
    n = cell // K
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = c < C
    number = tl.load(p_ids + cell)
    p_slots += n.to(tl.int64) * gh * gw
    b_sum = tl.zeros([S * S, BC], dtype=tl.float32)
    if HAS_BIAS:
        b_sum += tl.load(p_bias + c, mask=m_c, other=0.0).to(tl.float32)[None, :]  # [1, BC]
    for tap in range(49):
        b_x = tap_of_cell(
            p_x, p_slots, n * K, number // gw, number % gw, tap // 7 - 3, tap % 7 - 3, gh, gw, c, m_c, S, C
        )
        o_weight = (48 - tap if TURNED else tap) * C + c
        b_sum += b_x * tl.load(p_weight + o_weight, mask=m_c, other=0.0).to(tl.float32)[None, :]  # [1, BC]
    o_out = (cell.to(tl.int64) * (S * S) + tl.arange(0, S * S)) * C
    tl.store(p_out + o_out[:, None] + c[None, :], b_sum.to(p_out.dtype.element_ty), mask=m_c[None, :])


@triton.jit
def depthwise_visible_weights_kernel(
    p_x,  # floating [N, K, S·S, C]
    p_grad,  # floating [N, K, S·S, C]
    p_slots,  # int32 [N, gh·gw]
    p_ids,  # int32 [N, K]
    p_sums,  # float32 [programs, 49, C]
    cells, run, K, gh, gw,  # N·K, and those of a program
    S: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    program, tap = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = c < C
    b_sum = tl.zeros([S * S, BC], dtype=tl.float32)
    for cell in range(program * run, min(cells, (program + 1) * run)):
        n = cell // K
        number = tl.load(p_ids + cell)
        o_grad = (tl.cast(cell, tl.int64) * (S * S) + tl.arange(0, S * S)) * C
        b_grad = tl.load(p_grad + o_grad[:, None] + c[None, :], mask=m_c[None, :], other=0.0)  # [S·S, BC]
        b_x = tap_of_cell(
            p_x, p_slots + tl.cast(n, tl.int64) * gh * gw, n * K, number // gw, number % gw,
            tap // 7 - 3, tap % 7 - 3, gh, gw, c, m_c, S, C,
        )  # fmt: skip
        b_sum += b_x * b_grad.to(tl.float32)
    tl.store(p_sums + (program.to(tl.int64) * 49 + tap) * C + c, tl.sum(b_sum, axis=0), mask=m_c)


def block_sizes(side: int, width: int) -> dict[str, int]:
    """Returns the tile, the S·S positions of a cell × BC of C channels."""
    return {"S": side, "C": width, "BC": min(CHANNELS[side], triton.next_power_of_2(width))}


def depthwise_visible_triton(
    x: torch.Tensor,
    slots: torch.Tensor,
    ids: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    turned: bool = False,
) -> torch.Tensor:
    """Returns ``fastmae.ops.depthwise_visible`` on a GPU, for any dtype but float64.

    Cells have 1, 2, 4 or 8 positions on a side. ``ids`` [N, K] are the numbers of the visible ones. ``turned``: with
    each channel's weights turned around, which takes the gradient of the output to that of x.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        N, K, s, _, C = x.shape
        blocks = block_sizes(s, C)
        with torch.cuda.device_of(x):
            depthwise_visible_kernel[(N * K, triton.cdiv(C, blocks["BC"]))](
                x, slots.to(torch.int32).contiguous(), ids.to(torch.int32).contiguous(), _by_tap(weight),
                x if bias is None else bias.contiguous(), out, K, *slots.shape[1:],
                HAS_BIAS=bias is not None, TURNED=turned, **blocks, num_warps=WARPS[s],
            )  # fmt: skip
    return out


def depthwise_visible_weights_triton(
    x: torch.Tensor, grad: torch.Tensor, slots: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Returns the gradients of the 49 weights of each channel, and of its bias: float32 [50, C]."""
    N, K, s, _, C = x.shape
    of_bias = grad.sum(dim=(0, 1, 2, 3), dtype=torch.float32)[None]
    if not x.numel():
        return torch.cat((of_bias.expand(49, -1), of_bias))
    blocks = block_sizes(s, C)
    columns = triton.cdiv(C, blocks["BC"])
    run = triton.cdiv(N * K * 49 * columns, PROGRAMS * multiprocessors(x.device))
    run = min(N * K, max(8, run))
    programs = triton.cdiv(N * K, run)
    sums = torch.empty(programs, 49, C, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        depthwise_visible_weights_kernel[(programs, columns, 49)](
            x.contiguous(), grad.contiguous(), slots.to(torch.int32).contiguous(), ids.to(torch.int32).contiguous(),
            sums, N * K, run, K, *slots.shape[1:], **blocks, num_warps=WARPS[s],
        )  # fmt: skip
    return torch.cat((sums.sum(dim=0), of_bias))


def _by_tap(weight: torch.Tensor) -> torch.Tensor:
    """Returns weights [C, 1, 7, 7] as [49, C], whose channels lie side by side as those of positions do."""
    return weight.flatten(1).T.contiguous()
