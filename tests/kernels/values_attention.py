"""attention in Triton against float64. Run by test_kernels.py, and on a GPU by tests/gpu.

The rule, for the output and each gradient: neither the largest error nor the root mean square of the errors is more
than torch's own attention makes in the same dtype, plus SLACK units of the dtype's rounding at the size (largest, root
mean square) of the true numbers. Triton's interpreter truncates to bfloat16 instead of rounding, which doubles an
error; there torch's is doubled too.
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from device import DEVICE

from fastmae.kernels.attention import attention_backward_triton, attention_forward_triton
from fastmae.ops.attention import attention_reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# A unit is the distance from 1 to the next number.
SLACK = {FP32: 4.0, FP16: 0.25, BF16: 0.5}
# (N, H, T, S, Dh, dtype): one tile and several, full tiles and ragged ones, all queries, the last ones only, and more
# than there are keys.
CASES = [
    (1, 1, 1, 1, 32, BF16),
    (3, 2, 13, 13, 32, BF16),
    (2, 2, 37, 50, 32, BF16),
    (1, 2, 50, 50, 64, BF16),
    (1, 1, 64, 64, 64, BF16),
    (1, 1, 50, 50, 80, BF16),
    (1, 1, 65, 65, 80, BF16),
    (1, 1, 197, 197, 32, BF16),
    (1, 1, 147, 197, 32, BF16),
    (1, 1, 64, 128, 32, BF16),
    (1, 1, 257, 257, 32, BF16),
    (1, 1, 1, 257, 64, BF16),
    (1, 1, 320, 320, 64, BF16),
    (1, 1, 147, 50, 32, BF16),
    (1, 1, 40, 13, 32, FP32),
    (2, 2, 50, 50, 64, FP16),
    (2, 1, 148, 197, 32, FP16),
    (1, 1, 65, 257, 80, FP16),
    (1, 2, 13, 50, 32, FP32),
    (2, 1, 50, 50, 64, FP32),
    (1, 1, 65, 65, 80, FP32),
    (1, 1, 100, 197, 32, FP32),
]


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch):
    """Triton's interpreter multiplies matrices of bfloat16 bit by bit as integers; here it gets them as float32."""
    if DEVICE == "cpu":
        builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
        dot = builder.create_dot

        def wide(self, x):
            return self.create_fp_ext(x, tl.float32) if x.dtype == tl.bfloat16 else x

        monkeypatch.setattr(
            builder, "create_dot", lambda self, a, b, *rest: dot(self, wide(self, a), wide(self, b), *rest)
        )


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Fresh outputs are NaN, so that an element which is never written shows."""
    for name in ("empty", "empty_like"):
        create = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *args, _create=create, **options: _create(*args, **options).fill_(float("nan"))
        )


def sample(N, H, T, S, D, dtype, scale=1.0, wide=0):
    """q, k, v and the gradient of the output; ``wide`` numbers lie unused at both ends of a token."""
    generator = torch.Generator().manual_seed(S + D)
    draw = torch.randn(N, max(S, T), 4 * H * D + 2 * wide, generator=generator)
    tokens = draw.to(DEVICE, dtype)[:, :, wide : wide + 4 * H * D].unflatten(2, (4, H, D))
    q, k, v, grad = tokens.unbind(2)
    q, k, v, grad = q[:, -T:], k[:, :S], v[:, :S], grad[:, -T:]
    return q * scale if scale != 1.0 else q, k, v, grad


def by_torch(q, k, v, grad, dtype, attend):
    """(out, dq, dk, dv) in ``dtype``."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))


def by_kernels(q, k, v, grad):
    """The same from the kernels, dk and dv side by side in one tensor as the op has them."""
    out, lse = attention_forward_triton(q, k, v)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    packed = torch.empty(*k.shape[:2], 2, *k.shape[2:], dtype=k.dtype, device=k.device)
    attention_backward_triton(grad, q, k, v, out, lse, dq, *packed.unbind(2))
    return out, dq, *packed.unbind(2)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def assert_as_close(got, same_dtype, truth):
    doubled = 2 if got.dtype == BF16 and DEVICE == "cpu" else 1
    rounding = SLACK[got.dtype] * torch.finfo(got.dtype).eps
    assert not got.isnan().any(), "an element was not written"
    for size in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
        error, allowed = size(got.double() - truth), doubled * size(same_dtype.double() - truth)
        assert error <= allowed + doubled * rounding * size(truth)


@pytest.mark.parametrize(("N", "H", "T", "S", "D", "dtype"), CASES)
def test_values(N, H, T, S, D, dtype):
    inputs = sample(N, H, T, S, D, dtype)
    truth = by_torch(*inputs, torch.float64, attention_reference_of)
    same = by_torch(*inputs, dtype, sdpa)
    got = by_kernels(*inputs)
    for one, other, true in zip(got, same, truth, strict=True):
        assert one.dtype == dtype
        assert_as_close(one, other, true)
    for one, again in zip(got, by_kernels(*inputs), strict=True):
        assert torch.equal(one, again)


def attention_reference_of(q, k, v):
    return attention_reference(torch.stack([k, v], dim=2), q)


def test_strides():
    """Views of wider tokens, with offsets that no wide load allows."""
    inputs = sample(2, 2, 20, 33, 32, FP32, wide=3)
    for one, other in zip(by_kernels(*inputs), by_kernels(*(x.contiguous() for x in inputs)), strict=True):
        assert torch.equal(one, other)


def test_large_scores_do_not_overflow():
    """Scores of hundreds: the softmax is one key's, and exponentials without their maximum would be infinite."""
    inputs = sample(1, 1, 40, 70, 32, FP32, scale=100.0)
    truth = by_torch(*inputs, torch.float64, attention_reference_of)
    same = by_torch(*inputs, FP32, sdpa)
    for one, other, true in zip(by_kernels(*inputs), same, truth, strict=True):
        assert_as_close(one, other, true)


def test_no_images_at_all():
    q, k, v, _ = (x[:0] for x in sample(1, 2, 3, 5, 32, FP32))
    out, lse = attention_forward_triton(q, k, v)
    assert out.shape == (0, 3, 2, 32)
    assert lse.shape == (0, 2, 3)
