"""Global response normalisation against its definition, in C++ and in PyTorch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae import _C
from fastmae.ops import differentiable
from fastmae.ops.backends import using
from fastmae.ops.grn import grn


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def truth(x, weight, bias):
    """The paper's formula in float64, position by position."""
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    gx = flat.square().sum(dim=1, keepdim=True).sqrt()
    nx = gx / (gx.sum(dim=-1, keepdim=True) / x.shape[-1] + 1e-6)
    return (weight * (flat * nx) + bias + flat).reshape(x.shape)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    D=st.one_of(st.integers(1, 40), st.integers(250, 270)),
    P=st.integers(1, 70),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    ops=st.sampled_from(["auto", "reference"]),
)
def test_values_and_gradients_are_those_of_the_formula(shape, D, P, dtype, ops):
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [drawn(*shape, P, D, dtype=dtype), drawn(D, dtype=weights, seed=1), drawn(D, dtype=weights, seed=2)]
    grad = drawn(*shape, P, D, dtype=dtype, seed=3)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with using(ops=ops):
        out = grn(*leaves)
        gradients = torch.autograd.grad(out, leaves, grad)
    assert [tensor.dtype for tensor in (out, *gradients)] == [dtype, *(leaf.dtype for leaf in leaves)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    right = truth(*exact)
    expected = torch.autograd.grad(right, exact, grad.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
    for one, other in zip((out, *gradients), (right, *expected), strict=True):
        size = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one.double(), other.detach(), rtol=tolerance, atol=tolerance * size)


def test_a_channel_of_zeros_has_finite_gradients():
    x = drawn(2, 3, 20)
    x[1, :, 4] = 0
    x[0] = 0
    leaves = [tensor.requires_grad_() for tensor in (x, drawn(20, seed=1), drawn(20, seed=2))]
    for ops in ("auto", "reference"):
        with using(ops=ops):
            for gradient in torch.autograd.grad(grn(*leaves).square().sum(), leaves):
                assert gradient.isfinite().all()


def test_bits_depend_neither_on_threads_nor_on_the_instruction_set():
    leaves = [tensor.requires_grad_() for tensor in (drawn(3, 70, 300), drawn(300, seed=1), drawn(300, seed=2))]
    before, threads, results = _C.instruction_set(), torch.get_num_threads(), []
    for name in _C.instruction_sets():
        for count in (1, 3):
            _C.set_instruction_set(name)
            torch.set_num_threads(count)
            out = grn(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, drawn(3, 70, 300, seed=4))])
    _C.set_instruction_set(before)
    torch.set_num_threads(threads)
    for result in results:
        assert all(map(torch.equal, result, results[0]))


def test_the_ops_are_what_torch_expects():
    x, weight, bias = (tensor.requires_grad_() for tensor in (drawn(2, 3, 8), drawn(8, seed=1), drawn(8, seed=2)))
    torch.library.opcheck(torch.ops.fastmae.grn.default, (x, weight, bias))
    norm = drawn(2, 8).abs()
    arguments = drawn(2, 3, 8, seed=5), x.detach(), norm, weight.detach()
    torch.library.opcheck(torch.ops.fastmae.grn_backward.default, arguments)


def test_gradients_of_gradients_are_torchs():
    leaves = [drawn(2, 3, 4, dtype=torch.float64, seed=seed) for seed in range(1)]
    leaves += [drawn(4, dtype=torch.float64, seed=seed) for seed in (1, 2)]
    with differentiable():
        assert torch.autograd.gradgradcheck(grn, [leaf.requires_grad_() for leaf in leaves])


def test_wrong_arguments_are_named():
    x, row = drawn(2, 3, 8), drawn(8)
    for arguments, message in (
        ((x.int(), row, row), "x must be floating point"),
        ((row, row, row), "x must have shape"),
        ((x, row[1:], row), "weight must have shape"),
        ((x, row, x), "bias must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            grn(*arguments)
    rows, out = np.zeros((2, 3, 8), np.float32), np.zeros((2, 3, 8), np.float32)
    scale, sums = np.zeros((2, 8), np.float32), np.zeros((1, 2, 8), np.float32)
    for call, message in (
        (lambda: _C.sums_of_products(rows[0], None, 1, sums), r"x must have shape \[N, P, D\]"),
        (lambda: _C.sums_of_products(rows, rows[:1], 1, sums), "other must have the shape of x"),
        (lambda: _C.sums_of_products(rows, out, 1, sums), r"sums must have shape \[2, N, D\]"),
        (lambda: _C.sums_of_products(rows[..., ::2], None, 1, sums), "x must be contiguous"),
        (lambda: _C.scale_and_add(rows, scale[:1], None, scale, 1, out), r"scale must have shape \[N, D\]"),
        (lambda: _C.scale_and_add(rows, scale, None, scale[:, 1:], 1, out), r"added must have shape \[N or 1, D\]"),
        (lambda: _C.scale_and_add(rows, scale, None, scale[:1], 1, rows), "out must not overlap x"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
