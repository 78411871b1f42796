"""attention on a GPU, for sequences so short that a head's keys and values stay in the caches.

Forward: each program goes over all keys for a tile of queries of one head, with a running softmax (Milakov & Gimelshein
2018). Backward: one program per head. Up to 64 tokens, one tile has all queries and keys, and only inputs are read.
Longer sequences take two sweeps, each of which writes its sums once: dq for one tile of queries at a time, then dk and
dv for one tile of keys at a time. So there are no atomics, and gradients have the same bits in every run. Maxima, sums
and accumulators are float32. All tiles of the inner loop are full and unmasked but the last, which is as small as
possible: 197 keys take the tensor cores' time of 208. So do 197 queries forward, for heads of 32 numbers.

Lower bound per head, for T queries and S keys of D numbers of e bytes:
    forward   e·D·(2T + 2S) bytes, 4·T·S·D floating-point operations in 2 matrix products, T·S exponentials
    backward  e·D·(3T + 4S) bytes, 10·T·S·D in 5 products, T·S exponentials
Two sweeps take 7 products and the exponentials twice, and also read the output and 4·T bytes of log-sum-exp; data that
they read again come from the caches. No GPU has measured how near this comes. Definition: fastmae/ops/attention.py.
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def _load(p_x, first, stride, length, D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr,
          FULL: tl.constexpr):  # fmt: skip
    """Loads rows ``first`` to ``first + BLOCK`` of [length, D] as [BLOCK, BD], zeros beyond; FULL: all rows exist."""
    i, d = first + tl.arange(0, BLOCK), tl.arange(0, BD)
    p_rows = p_x + i[:, None] * stride + d[None, :]
    if FULL and BD == D:
        return tl.load(p_rows)
    return tl.load(p_rows, mask=(i < length)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(p_x, b_x, first, stride, length, D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):
    i, d = first + tl.arange(0, BLOCK), tl.arange(0, BD)
    p_rows = p_x + i[:, None] * stride + d[None, :]
    tl.store(p_rows, b_x.to(p_x.dtype.element_ty), mask=(i < length)[:, None] & (d < D)[None, :])


@triton.jit
def _attend(b_q, b_acc, b_max, b_sum, p_k, p_v, first, S, kv_stride_s,
            D: tl.constexpr, SCALE: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
            FULL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds one tile of keys and values to the running softmax."""
    b_k = _load(p_k, first, kv_stride_s, S, D, BK, BD, FULL)  # [BK, BD]
    b_v = _load(p_v, first, kv_stride_s, S, D, BK, BD, FULL)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BQ, BK]
    if not FULL:
        b_s = tl.where((first + tl.arange(0, BK) < S)[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1) * SCALE)  # [BQ]
    b_p = tl.exp2(b_s * SCALE - b_new[:, None])
    b_old = tl.exp2(b_max - b_new)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_old[:, None], input_precision=PRECISION)
    return b_acc, b_new, b_sum * b_old + tl.sum(b_p, axis=1)


@triton.jit
def _output_tile(p_q, p_k, p_v, p_out, p_lse, first_q, q_stride_s, kv_stride_s, out_stride_s, T, S: tl.constexpr,
                 D: tl.constexpr, SCALE: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, LAST_K: tl.constexpr,
                 BD: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Computes the output of BQ queries of one head; FULL: all of them exist."""
    b_q = _load(p_q, first_q, q_stride_s, T, D, BQ, BD, FULL)  # [BQ, BD]
    b_acc = tl.zeros([BQ, BD], dtype=tl.float32)
    b_max = tl.full([BQ], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BQ], dtype=tl.float32)
    for first in range(0, S // BK * BK, BK):
        b_acc, b_max, b_sum = _attend(
            b_q, b_acc, b_max, b_sum, p_k, p_v, first, S, kv_stride_s, D, SCALE, BK, BD, True, PRECISION
        )
    if LAST_K:
        b_acc, b_max, b_sum = _attend(
            b_q, b_acc, b_max, b_sum, p_k, p_v, S // BK * BK, S, kv_stride_s, D, SCALE, LAST_K, BD, False, PRECISION
        )
    _store(p_out, b_acc / b_sum[:, None], first_q, out_stride_s, T, D, BQ, BD)
    q = first_q + tl.arange(0, BQ)
    tl.store(p_lse + q, b_max + tl.log2(b_sum), mask=q < T)


@triton.jit
def attention_forward_kernel(
    p_q,  # floating [N, T, H, D], any strides, 1 for the last
    p_k,  # like q, [N, S, H, D]
    p_v,  # like k, of the same strides
    p_out,  # like q, contiguous
    p_lse,  # float32 [N, H, T]: log2 of the sum of exponentials of a row
    q_stride_n, q_stride_s, q_stride_h,
    kv_stride_n, kv_stride_s, kv_stride_h,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, TAIL_Q: tl.constexpr, LAST_K: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (T + BQ - 1) // BQ
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES).to(tl.int64)
    n, h = head // H, head % H
    p_q += n * q_stride_n + h * q_stride_h
    p_k += n * kv_stride_n + h * kv_stride_h
    p_v += n * kv_stride_n + h * kv_stride_h
    p_out += (n * T * H + h) * D
    p_lse += head * T
    if TAIL_Q == 0 or TAIL_Q == BQ:
        _output_tile(p_q, p_k, p_v, p_out, p_lse, tile * BQ, q_stride_s, kv_stride_s, H * D, T, S, D, SCALE, BQ, BK,
                     LAST_K, BD, TAIL_Q == 0, PRECISION)  # fmt: skip
    elif tile < T // BQ:
        _output_tile(p_q, p_k, p_v, p_out, p_lse, tile * BQ, q_stride_s, kv_stride_s, H * D, T, S, D, SCALE, BQ, BK,
                     LAST_K, BD, True, PRECISION)  # fmt: skip
    else:
        _output_tile(p_q, p_k, p_v, p_out, p_lse, T // BQ * BQ, q_stride_s, kv_stride_s, H * D, T, S, D, SCALE, TAIL_Q,
                     BK, LAST_K, BD, False, PRECISION)  # fmt: skip


@triton.jit
def attention_backward_whole_kernel(
    p_q, p_k, p_v,  # as in the forward kernel
    p_grad,  # like q, contiguous: gradient of the output
    p_dq,  # like q
    p_dk, p_dv,  # like k
    q_stride_n, q_stride_s, q_stride_h,
    kv_stride_n, kv_stride_s, kv_stride_h,
    dq_stride_n, dq_stride_s, dq_stride_h,
    dkv_stride_n, dkv_stride_s, dkv_stride_h,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Computes the gradients for T ≤ BQ and S ≤ BK; the softmax is computed again from whole rows."""
    n, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    b_q = _load(p_q + n * q_stride_n + h * q_stride_h, 0, q_stride_s, T, D, BQ, BD, False)  # [BQ, BD]
    b_k = _load(p_k + n * kv_stride_n + h * kv_stride_h, 0, kv_stride_s, S, D, BK, BD, False)  # [BK, BD]
    b_v = _load(p_v + n * kv_stride_n + h * kv_stride_h, 0, kv_stride_s, S, D, BK, BD, False)
    b_grad = _load(p_grad + (n * T * H + h) * D, 0, H * D, T, D, BQ, BD, False)  # [BQ, BD]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BQ, BK]
    b_s = tl.where((tl.arange(0, BK) < S)[None, :], b_s, float("-inf"))
    b_p = tl.exp2((b_s - tl.max(b_s, axis=1)[:, None]) * SCALE)
    b_p /= tl.sum(b_p, axis=1)[:, None]
    # Rows beyond T add nothing: their gradient is zero, and so are dp, delta and ds.
    b_dv = tl.dot(tl.trans(b_p.to(b_q.dtype)), b_grad, input_precision=PRECISION)
    _store(p_dv + n * dkv_stride_n + h * dkv_stride_h, b_dv, 0, dkv_stride_s, S, D, BK, BD)
    b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)  # [BQ, BK]
    b_delta = tl.sum(b_p * b_dp, axis=1)  # [BQ]
    b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_q.dtype)
    b_dk = tl.dot(tl.trans(b_ds), b_q, input_precision=PRECISION)
    b_dq = tl.dot(b_ds, b_k, input_precision=PRECISION)
    UNIT: tl.constexpr = SCALE * 0.6931471805599453  # 1/√D
    _store(p_dk + n * dkv_stride_n + h * dkv_stride_h, b_dk * UNIT, 0, dkv_stride_s, S, D, BK, BD)
    _store(p_dq + n * dq_stride_n + h * dq_stride_h, b_dq * UNIT, 0, dq_stride_s, T, D, BQ, BD)


@triton.jit
def _add_dq(b_dq, b_q, b_grad, b_lse, b_delta, p_k, p_v, first, S, kv_stride_s,
            D: tl.constexpr, SCALE: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
            FULL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds the part of one tile of keys to the gradient of a tile of queries. Keys beyond S are 0 and add nothing."""
    b_k = _load(p_k, first, kv_stride_s, S, D, BK, BD, FULL)  # [BK, BD]
    b_v = _load(p_v, first, kv_stride_s, S, D, BK, BD, FULL)
    b_p = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * SCALE - b_lse[:, None])  # [BQ, BK]
    b_ds = b_p * (tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def _add_dk_dv(b_dk, b_dv, b_k, b_v, p_q, p_grad, p_lse, p_delta, first, T, q_stride_s, grad_stride_s,
               D: tl.constexpr, SCALE: tl.constexpr, BQ: tl.constexpr, BD: tl.constexpr,
               FULL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds the part of one tile of queries to the gradients of a tile of keys and values.

    The scores are transposed, so that the probabilities lie in the registers from which the next product reads.
    """
    b_q = _load(p_q, first, q_stride_s, T, D, BQ, BD, FULL)  # [BQ, BD]
    b_grad = _load(p_grad, first, grad_stride_s, T, D, BQ, BD, FULL)
    q = first + tl.arange(0, BQ)
    b_lse = tl.load(p_lse + q, mask=q < T, other=float("inf"))  # [BQ]; a query beyond T attends to nothing
    b_delta = tl.load(p_delta + q, mask=q < T, other=0.0)
    b_p = tl.exp2(tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * SCALE - b_lse[None, :])  # [BK, BQ]
    b_dv = tl.dot(b_p.to(b_q.dtype), b_grad, b_dv, input_precision=PRECISION)
    b_ds = b_p * (tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION) - b_delta[None, :])
    return tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION), b_dv


@triton.jit
def attention_backward_kernel(
    p_q, p_k, p_v, p_out, p_lse,  # as in the forward kernel
    p_grad,  # like out: its gradient
    p_delta,  # float32 [N, H, T], written here: the inner products of the rows of out and of grad
    p_dq,  # like q
    p_dk, p_dv,  # like k
    q_stride_n, q_stride_s, q_stride_h,
    kv_stride_n, kv_stride_s, kv_stride_h,
    dq_stride_n, dq_stride_s, dq_stride_h,
    dkv_stride_n, dkv_stride_s, dkv_stride_h,
    T: tl.constexpr, S: tl.constexpr, H: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, LAST_Q: tl.constexpr, LAST_K: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = SCALE * 0.6931471805599453  # 1/√D
    head = tl.program_id(0).to(tl.int64)
    n, h = head // H, head % H
    p_q += n * q_stride_n + h * q_stride_h
    p_k += n * kv_stride_n + h * kv_stride_h
    p_v += n * kv_stride_n + h * kv_stride_h
    p_out += (n * T * H + h) * D
    p_grad += (n * T * H + h) * D
    p_lse += head * T
    p_delta += head * T

    for first_q in range(0, T, BM):
        b_q = _load(p_q, first_q, q_stride_s, T, D, BM, BD, False)  # [BM, BD]
        b_grad = _load(p_grad, first_q, H * D, T, D, BM, BD, False)
        b_out = _load(p_out, first_q, H * D, T, D, BM, BD, False)
        q = first_q + tl.arange(0, BM)
        b_lse = tl.load(p_lse + q, mask=q < T, other=float("inf"))  # [BM]
        b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), axis=1)
        tl.store(p_delta + q, b_delta, mask=q < T)
        b_dq = tl.zeros([BM, BD], dtype=tl.float32)
        for first in range(0, S // BN * BN, BN):
            b_dq = _add_dq(
                b_dq, b_q, b_grad, b_lse, b_delta, p_k, p_v, first, S, kv_stride_s, D, SCALE, BN, BD, True, PRECISION
            )
        if LAST_K:
            b_dq = _add_dq(
                b_dq, b_q, b_grad, b_lse, b_delta, p_k, p_v, S // BN * BN, S, kv_stride_s, D, SCALE, LAST_K, BD, False,
                PRECISION,
            )  # fmt: skip
        _store(p_dq + n * dq_stride_n + h * dq_stride_h, b_dq * UNIT, first_q, dq_stride_s, T, D, BM, BD)

    tl.debug_barrier()  # every delta is written before another thread reads it

    for first_k in range(0, S, BM):
        b_k = _load(p_k, first_k, kv_stride_s, S, D, BM, BD, False)  # [BM, BD]
        b_v = _load(p_v, first_k, kv_stride_s, S, D, BM, BD, False)
        b_dk = tl.zeros([BM, BD], dtype=tl.float32)
        b_dv = tl.zeros([BM, BD], dtype=tl.float32)
        for first in range(0, T // BN * BN, BN):
            b_dk, b_dv = _add_dk_dv(
                b_dk, b_dv, b_k, b_v, p_q, p_grad, p_lse, p_delta, first, T, q_stride_s, H * D, D, SCALE, BN, BD, True,
                PRECISION,
            )  # fmt: skip
        if LAST_Q:
            b_dk, b_dv = _add_dk_dv(
                b_dk, b_dv, b_k, b_v, p_q, p_grad, p_lse, p_delta, T // BN * BN, T, q_stride_s, H * D, D, SCALE, LAST_Q,
                BD, False, PRECISION,
            )  # fmt: skip
        _store(p_dk + n * dkv_stride_n + h * dkv_stride_h, b_dk * UNIT, first_k, dkv_stride_s, S, D, BM, BD)
        _store(p_dv + n * dkv_stride_n + h * dkv_stride_h, b_dv, first_k, dkv_stride_s, S, D, BM, BD)


def tile_sizes(T: int, S: int, D: int) -> tuple[dict[str, int], dict[str, int]]:
    """Returns block sizes and launch options (forward, backward) that fit into the registers of a multiprocessor.

    Backward options without BM belong to ``attention_backward_whole_kernel``.
    """
    wide = D > 64
    common = {"BD": triton.next_power_of_2(D), "num_stages": 1}
    queries = min(64, max(16, triton.next_power_of_2(T)))
    keys = min(32 if wide else 64, max(16, triton.next_power_of_2(S)))
    whole = {"BQ": queries, "BK": keys, "num_warps": 8 if wide else 4, **common}
    tail = _last_tile(T, queries)
    # For wider heads, or with larger ones, a second kind of tile would take registers, and so programs side by side.
    forward = {**whole, "TAIL_Q": tail if tail <= 16 and D <= 32 else queries, "LAST_K": _last_tile(S, keys)}
    if max(T, S) <= min(queries, keys):
        return forward, whole
    # A warp group of Hopper multiplies 64 rows at once.
    backward = {"BM": 16 if wide else 64, "BN": 32, "num_warps": 8 if 32 < D <= 64 else 4, **common}
    return forward, {**backward, "LAST_Q": _last_tile(T, 32), "LAST_K": _last_tile(S, 32)}


def _last_tile(length: int, block: int) -> int:
    """Returns the rows of the tile after the full blocks: a power of two that tensor cores take, or 0 for none."""
    return max(16, triton.next_power_of_2(length % block)) if length % block else 0


def shape_constants(T: int, S: int, H: int, D: int, dtype: torch.dtype) -> dict[str, object]:
    """Returns the constants that the kernels are compiled with. SCALE turns exp(q·k/√D) into a power of two."""
    precision = "ieee" if dtype == torch.float32 else "tf32"
    return {"T": T, "S": S, "H": H, "D": D, "SCALE": math.log2(math.e) / math.sqrt(D), "PRECISION": precision}


def attention_forward_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out like q, its log-sum-exp float32 [N, H, T] to base 2) for q [N, T, H, D] and k, v [N, S, H, D].

    Strides may be any, but 1 for the last axis, and the same for k as for v.
    """
    (N, T, H, D), S = q.shape, k.shape[1]
    out = torch.empty(N, T, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(N, H, T, dtype=torch.float32, device=q.device)
    if N * H:
        constants, blocks = shape_constants(T, S, H, D, q.dtype), tile_sizes(T, S, D)[0]
        grid = (N * H * triton.cdiv(T, blocks["BQ"]),)
        with torch.cuda.device_of(q):
            attention_forward_kernel[grid](q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], **constants, **blocks)
    return out, lse


def attention_backward_triton(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """Writes the gradients of q, k and v into dq, dk and dv, which may have any strides that q, k and v may have."""
    grad = grad.contiguous()
    (N, T, H, D), S = q.shape, k.shape[1]
    strides = (*q.stride()[:3], *k.stride()[:3], *dq.stride()[:3], *dk.stride()[:3])
    constants, blocks = shape_constants(T, S, H, D, q.dtype), tile_sizes(T, S, D)[1]
    if N * H == 0:
        return
    with torch.cuda.device_of(q):
        if "BM" not in blocks:
            attention_backward_whole_kernel[(N * H,)](q, k, v, grad, dq, dk, dv, *strides, **constants, **blocks)
        else:
            delta = torch.empty_like(lse)
            attention_backward_kernel[(N * H,)](
                q, k, v, out, lse, grad, delta, dq, dk, dv, *strides, **constants, **blocks
            )
