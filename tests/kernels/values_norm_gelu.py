"""add_layer_norm and gelu in Triton against float64. Run by test_kernels.py, and on a GPU by tests/gpu."""

import pytest
import torch
from device import DEVICE
from truth import assert_as_close, poison  # noqa: F401

from fastmae.kernels.add_layer_norm import add_layer_norm_backward_triton, add_layer_norm_triton
from fastmae.kernels.gelu import gelu_backward_triton, gelu_triton
from fastmae.ops.add_layer_norm import add_layer_norm_reference
from fastmae.ops.gelu import gelu_reference

# (dtype of the stream, of branches and of what is normalised)
DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
# (N, T, D): published widths, odd ones, one token, single numbers, one whose rows need more warps. Many rows come to
# runs of several blocks for each program.
SHAPES = [(2, 13, 192), (1, 19, 760), (3, 1, 1280), (5, 3, 1), (1, 2, 2051)]
MANY_ROWS = (1, 37, 760)


def drawn(*shape, dtype=torch.float32, seed=0, shift=0.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift).to(DEVICE, dtype)


def weights(D):
    return drawn(D, seed=2, shift=1), drawn(D, seed=3)


@pytest.mark.parametrize(("stream_dtype", "dtype"), DTYPES)
@pytest.mark.parametrize(("N", "T", "D"), SHAPES)
def test_add_layer_norm(N, T, D, stream_dtype, dtype):
    """Tokens are read where they lie, also the last T of longer images; their mean is far from 0."""
    x = drawn(N, T + 2, D, dtype=stream_dtype, shift=3)[:, 2:]
    branch, (weight, bias) = drawn(N, T, D, dtype=dtype, seed=1), weights(D)
    branch_bias = drawn(D, seed=5) if D != 192 else None
    stream, normed, mean, rstd = add_layer_norm_triton(x, branch, branch_bias, weight, bias, 1e-6, dtype)
    assert (stream.dtype, normed.dtype) == (stream_dtype, dtype)
    exact, rounded = x.double() + branch.double(), x + branch
    if branch_bias is not None:
        exact, rounded = exact + branch_bias, (x + (branch + branch_bias)).to(stream_dtype)
    assert_as_close(stream, rounded, exact, 0.0 if branch_bias is None else branch.double().abs() + branch_bias.abs())
    # From here on the truth is that of the stream as it was stored.
    zero = torch.zeros_like(stream)
    _, truth = add_layer_norm_reference(stream.double(), zero.double(), weight.double(), bias.double(), 1e-6)
    _, same = add_layer_norm_reference(stream, zero, weight, bias, 1e-6, dtype)
    rows = stream.double()
    deviation = (rows.var(dim=-1, correction=0) + 1e-6).sqrt()
    size = rows.abs().amax(dim=-1) / deviation
    assert_as_close(normed, same, truth, size[..., None] * weight.abs() + bias.abs())
    assert_as_close(mean, rows.mean(dim=-1).float(), rows.mean(dim=-1), rows.abs().amax(dim=-1))
    assert_as_close(rstd, (1 / deviation).float(), 1 / deviation, size / deviation)
    again = add_layer_norm_triton(x, branch, branch_bias, weight, bias, 1e-6, dtype)
    assert all(torch.equal(a, b) for a, b in zip((stream, normed, mean, rstd), again, strict=True))


CASES = [(*shape, *dtypes, shape[2] != 192) for shape in SHAPES for dtypes in DTYPES]


@pytest.mark.parametrize(
    ("N", "T", "D", "stream_dtype", "dtype", "uses_stream"), [*CASES, (*MANY_ROWS, *DTYPES[1], True)]
)
def test_add_layer_norm_backward(N, T, D, stream_dtype, dtype, uses_stream):
    stream, (weight, bias) = drawn(N, T, D, dtype=stream_dtype, shift=1), weights(D)
    grad_normed = drawn(N, T, D, dtype=dtype, seed=1)
    grad_stream = drawn(N, T, D, dtype=stream_dtype, seed=4) if uses_stream else None
    exact = [tensor.double().requires_grad_() for tensor in (stream, weight, bias)]
    zero = torch.zeros_like(exact[0])
    outputs = add_layer_norm_reference(exact[0], zero, *exact[1:], 1e-6)
    given = [torch.zeros_like(zero) if grad_stream is None else grad_stream.double(), grad_normed.double()]
    truth = torch.autograd.grad(outputs, exact, given)

    rows = stream.double()
    mean, deviation = rows.mean(dim=-1), (rows.var(dim=-1, correction=0) + 1e-6).sqrt()
    has_branch_bias = D != 192
    arguments = grad_stream, grad_normed, stream, weight, mean.float(), (1 / deviation).float(), dtype, has_branch_bias
    gradients = add_layer_norm_backward_triton(*arguments)
    *of_sum, affine = gradients
    assert [gradient.dtype for gradient in of_sum] == list(dict.fromkeys((stream_dtype, dtype)))
    # Two sums over a row, each of which may lose roundings of its largest terms, scaled by 1 / deviation.
    normal = (rows - mean[..., None]) / deviation[..., None]
    size = (weight * grad_normed.double()).abs().amax(dim=-1) * (1 + normal.abs().amax(dim=-1)) ** 2 / deviation
    for gradient in of_sum:
        assert_as_close(gradient, truth[0].to(gradient.dtype), truth[0], size[..., None])
    assert len(affine) == 2 + has_branch_bias
    truths = [truth[1], truth[2], truth[0].flatten(0, 1).sum(dim=0)]
    sizes = [grad_normed.double() * normal, grad_normed.double(), truth[0].abs() + size[..., None]]
    for got, expected, terms in zip(affine, truths, sizes, strict=False):
        assert_as_close(got, expected.float(), expected, terms.flatten(0, 1).abs().sum(dim=0) + size.max())
    again = add_layer_norm_backward_triton(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_branches_of_any_strides_and_no_tokens_at_all(dtype):
    x, wide, (weight, bias) = drawn(2, 3, 40), drawn(2, 3, 80, dtype=dtype, seed=1), weights(40)
    got = add_layer_norm_triton(x.mT.contiguous().mT, wide[..., ::2], bias, weight, bias, 1e-6, dtype)
    expected = add_layer_norm_triton(x, wide[..., ::2].contiguous(), bias, weight, bias, 1e-6, dtype)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    flat = add_layer_norm_triton(x.flatten(0, 1), wide[..., ::2].flatten(0, 1), bias, weight, bias, 1e-6, dtype)
    assert torch.equal(flat[1], got[1].flatten(0, 1))
    none = add_layer_norm_triton(x[:0], wide[:0, :, :40], bias, weight, bias, 1e-6, dtype)
    assert none[1].shape == (0, 3, 40)
    empty = add_layer_norm_backward_triton(None, none[1], none[0], weight, none[2], none[3], torch.float32, True)
    assert empty[-1].shape == (3, 40)
    assert not empty[-1].any()


# --- gelu -------------------------------------------------------------------------------------------------------------


CASES = [
    (*shape, dtype, has_bias)
    for shape in [(13, 768), (1, 1), (40, 257)]
    for dtype in [torch.float32, torch.bfloat16, torch.float16]
    for has_bias in (True, False)
]


@pytest.mark.parametrize(("R", "F", "dtype", "has_bias"), [*CASES, (69, 760, torch.bfloat16, True)])
def test_gelu_and_its_gradients(R, F, dtype, has_bias):
    h = 3 * drawn(R, F, dtype=dtype)
    bias = drawn(F, seed=1) if has_bias else None
    grad = drawn(R, F, dtype=dtype, seed=2)
    exact = [h.double().requires_grad_()] + ([bias.double().requires_grad_()] if has_bias else [])
    truth = gelu_reference(*exact)
    truths = torch.autograd.grad(truth, exact, grad.double())

    out = gelu_triton(h, bias)
    argument = (exact[0] + (exact[1] if has_bias else 0)).detach().abs()
    assert out.dtype == dtype
    assert_as_close(out, gelu_reference(h, bias), truth.detach(), argument)
    gradients = gelu_backward_triton(grad, h, bias)
    assert len(gradients) == 1 + has_bias
    assert_as_close(gradients[0], truths[0].to(dtype), truths[0], grad.double().abs() * (1 + argument))
    if has_bias:
        sizes = (grad.double().abs() * (1 + argument)).sum(dim=0)
        assert_as_close(gradients[1], truths[1].float(), truths[1], sizes)
    *again, output = gelu_backward_triton(grad, h, bias, with_output=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert output.dtype == dtype
    assert_as_close(output, gelu_reference(h, bias), truth.detach(), argument)


def test_gelu_is_right_in_the_tails_and_at_zero():
    """Where 1 + erf cancels, the result keeps its relative precision; beyond, it is 0 and the identity."""
    h = torch.linspace(-12, 12, 4801, device=DEVICE)
    truth = h.double() * torch.special.ndtr(h.double())
    got = gelu_triton(h[None], None)[0]
    near = h.abs() <= 5
    torch.testing.assert_close(got[near].double(), truth[near], rtol=4e-6, atol=0)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-12)
    slope = gelu_backward_triton(torch.ones_like(h[None]), h[None], None)[0][0]
    density = (-h.double().square() / 2).exp() / (2 * torch.pi) ** 0.5
    torch.testing.assert_close(slope.double(), torch.special.ndtr(h.double()) + h.double() * density, rtol=0, atol=1e-6)


def test_gelu_of_any_strides_and_of_nothing():
    h, bias = drawn(6, 40), drawn(40, seed=1)
    assert torch.equal(gelu_triton(h.mT.contiguous().mT, bias), gelu_triton(h, bias))
    got = gelu_backward_triton(h.mT.contiguous().mT, h, bias)
    assert all(torch.equal(a, b) for a, b in zip(got, gelu_backward_triton(h, h, bias), strict=True))
    assert gelu_triton(h[:0], bias).shape == (0, 40)
    of_nothing = gelu_backward_triton(h[:0], h[:0], bias, with_output=True)
    assert [x.shape for x in of_nothing] == [(0, 40), (40,), (0, 40)]
    assert not of_nothing[1].any()
