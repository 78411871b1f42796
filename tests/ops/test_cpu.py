"""The C++ ops for every instruction set of this processor: right values, refusals, and the same bits on any threads.

The rule for values: no further from the float64 truth than torch in the same dtype, plus a few roundings of float32.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae import _C
from fastmae.ops import cpu
from fastmae.ops.assemble_tokens import assemble_tokens_reference
from fastmae.ops.attention import attention_reference
from fastmae.ops.gather_patches import gather_patches_reference
from fastmae.ops.masked_mse import masked_mse_reference
from fastmae.ops.random_masking import random_masking_reference
from fastmae.ops.scatter_patches import scatter_patches_reference

SETS = _C.instruction_sets()
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
PIXELS = [torch.uint8, torch.uint16, *FLOATS]
ROUNDINGS = 4 * torch.finfo(torch.float32).eps
EPS = 1e-6
# (N, size, patch, channels): published patches, odd ones, one channel and many, rows shorter than a vector.
SHAPES = [
    (3, (32, 48), (16, 16), 3),
    (1, (28, 42), (14, 14), 3),
    (3, (28, 28), (4, 4), 1),
    (3, (24, 40), (4, 8), 5),
    (1, (21, 6), (7, 2), 2),
    (3, (16, 32), (16, 16), 16),
    (2, (3, 4), (1, 1), 1),
]
# (N, L, K, D): the published decoder's grid and an odd one, odd widths, all visible, none visible, one number.
TOKENS = [(1, 197, 49, 96), (3, 196, 49, 40), (2, 9, 9, 33), (3, 7, 0, 600), (2, 5, 2, 1)]
# (N, S, H, D, T), T queries of their own or None: published shapes, one token, more queries than keys, wide heads.
ATTENTIONS = [
    (2, 197, 2, 32, None),
    (2, 197, 2, 32, 147),
    (1, 50, 3, 64, None),
    (3, 13, 4, 32, None),
    (2, 1, 2, 16, None),
    (2, 1, 1, 16, 3),
    (1, 5, 2, 80, 33),
    (1, 67, 1, 128, 1),
]


@pytest.fixture(params=SETS)
def loops(request):
    before = _C.instruction_set()
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set(before)


# (instruction set, dtype, what multiplies) of attention. The tiles of AMX are emulated with vectors of every length.
NUMBERS = [(name, dtype, "float32") for name in SETS for dtype in (torch.float32, torch.bfloat16)]
NUMBERS += [(SETS[-1], torch.bfloat16, by) for by in _C.attention_products() if by != "float32"]
NUMBERS += [(SETS[0], torch.bfloat16, "amx-emulated")] if len(SETS) > 1 else []


@pytest.fixture(params=NUMBERS, ids=lambda it: f"{it[0]}-{str(it[1])[6:]}-{it[2]}")
def numbers(request):
    """(dtype, what multiplies), with the instruction set in use."""
    name, dtype, products = request.param
    before = _C.instruction_set()
    _C.set_instruction_set(name)
    yield dtype, products
    _C.set_instruction_set(before)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh results are NaN, or 77 where they are integers, so that an element which is never written shows."""
    empty = torch.empty

    def poisoned(*shape, **options):
        fresh = empty(*shape, **options)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def threads():
    """Sets the number of threads; the test leaves it as it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_as_close(got, same_dtype, truth, unit=1.0):
    """``unit`` is the size of the numbers that go into ``truth``, whose float32 roundings are forgiven."""
    assert got.dtype == same_dtype.dtype
    assert got.shape == truth.shape
    assert got.is_contiguous()
    assert not got.isnan().any(), "an element was not written"
    # Twice: a rounding of float32 may tip the one to got.dtype to the other neighbour, when both are as far away.
    allowed = (same_dtype.double() - truth).abs() + 2 * ROUNDINGS * (unit + truth.abs())
    assert ((got.double() - truth).abs() <= allowed).all()


def sample(N, size, patch, channels, dtype=torch.uint8, seed=0):
    """images, ids of all patches, mean, std."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (N, *size, channels), generator=generator)
    if dtype == torch.uint16:
        images = (images * 257 + torch.randint(-128, 128, images.shape, generator=generator)).clamp(0, 65535)
    images = (images / 255 if dtype.is_floating_point else images).to(dtype)
    L = (size[0] // patch[0]) * (size[1] // patch[1])
    mean, std = torch.rand(channels, generator=generator), torch.rand(channels, generator=generator) + 0.1
    return images, random_masking_reference(torch.arange(N), seed, L), mean, std


def loss_and_gradient(pred, *others, grad_loss=1.0, **more):
    """Of masked_mse, whose gradient is that of the loss times ``grad_loss``."""
    loss, targets = cpu.masked_mse(pred, *others, **more, eps=EPS)
    slope = torch.tensor(grad_loss)
    return loss, cpu.masked_mse_backward(slope, targets, pred, *others, **more, eps=EPS)


def relaid(tensor, order=None, step=2, lead=1):
    """The same values with gaps between them and the axes in another order in memory."""
    order = order or list(reversed(range(tensor.ndim)))
    room = torch.zeros([tensor.shape[axis] * step + lead for axis in order], dtype=tensor.dtype)
    room = room.permute([order.index(axis) for axis in range(tensor.ndim)])
    view = room[tuple(slice(lead, lead + size * step, step) for size in tensor.shape)]
    return view.copy_(tensor)


# Values


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 4), (63, 65), (64, 64), (130, 7), (7, 200), (400, 129)])
def test_transpose_and_sum(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    for laid in (matrix, relaid(matrix), matrix[:1].expand(shape), matrix[:, :1].expand(shape)):
        transposed, sums = cpu.transpose_and_sum(laid)
        assert torch.equal(transposed, laid.T)
        assert transposed.is_contiguous()
        assert_as_close(sums, laid.sum(0), laid.double().sum(0), laid.double().abs().sum(0))


def test_nothing_transposed_sums_to_zero():
    transposed, sums = cpu.transpose_and_sum(torch.zeros(0, 3))
    assert transposed.shape == (3, 0)
    assert sums.tolist() == [0, 0, 0]
    assert cpu.transpose_and_sum(torch.zeros(3, 0))[0].shape == (0, 3)


@pytest.mark.parametrize("L", [1, 2, 3, 5, 31, 32, 33, 49, 196, 197, 1024, 4097, 65536])
def test_random_masking_is_bit_equal(loops, L):
    draw_ids = torch.tensor([0, -(2**63), -1, 2**63 - 1, 123456789012])[: 2 if L > 5000 else 5]
    for seed in (2**64 - 1,) if L > 5000 else (0, 7, 2**64 - 1):
        got = cpu.random_masking(draw_ids, seed, L)
        assert got.dtype == torch.int32
        assert torch.equal(got, random_masking_reference(draw_ids, seed, L))
    assert torch.equal(cpu.random_masking(draw_ids[::2], seed, L), got[::2])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("images_dtype", PIXELS)
@pytest.mark.parametrize(("N", "size", "patch", "channels"), SHAPES)
def test_gather(loops, N, size, patch, channels, images_dtype, dtype):
    images, ids, mean, std = sample(N, size, patch, channels, images_dtype)
    for chosen in (ids[:, : max(1, ids.shape[1] // 4)], ids.long(), ids[:, :0]):
        truth = gather_patches_reference(images, chosen, patch, mean.double(), std.double(), torch.float64)
        same = gather_patches_reference(images, chosen, patch, mean, std, dtype)
        for laid in (images, images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
            assert_as_close(cpu.gather_patches(laid, chosen, patch, mean, std, dtype), same, truth)


@pytest.mark.parametrize("statistics", FLOATS)
def test_gather_takes_mean_and_std_of_any_dtype(loops, statistics):
    images, ids, mean, std = sample(*SHAPES[0])
    mean, std = mean.to(statistics), std.to(statistics)
    wanted = cpu.gather_patches(images, ids, (16, 16), mean.float(), std.float(), torch.float32)
    assert torch.equal(cpu.gather_patches(images, ids, (16, 16), mean, relaid(std), torch.float32), wanted)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("given_dtype", FLOATS)
@pytest.mark.parametrize(("N", "L", "K", "D"), TOKENS)
def test_assemble(loops, N, L, K, D, given_dtype, dtype):
    generator = torch.Generator().manual_seed(0)
    ids = random_masking_reference(torch.arange(N), 0, L)
    visible = torch.randn(N, K + 1, D, generator=generator).to(given_dtype)
    mask_token, pos_embed = torch.randn(D, generator=generator), torch.randn(L + 1, D, generator=generator)
    for parts in ((visible, mask_token, pos_embed), (visible, mask_token.to(dtype), pos_embed.to(given_dtype))):
        truth = assemble_tokens_reference(*(part.double() for part in parts), ids)
        same = assemble_tokens_reference(*(part.float() for part in parts), ids).to(dtype)
        assert_as_close(cpu.assemble_tokens(*parts, ids, dtype), same, truth)
        strided = cpu.assemble_tokens(*(relaid(part) for part in parts), relaid(ids.long()), dtype)
        assert_as_close(strided, same, truth)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("given_dtype", FLOATS)
@pytest.mark.parametrize(("N", "L", "K", "D"), TOKENS)
def test_assemble_backward(loops, N, L, K, D, given_dtype, dtype):
    grad = torch.randn(N, L + 1, D, generator=torch.Generator().manual_seed(1)).to(given_dtype)
    for laid in (grad, relaid(grad), grad[:1].expand(N, -1, -1)):
        grad_visible, grad_mask_token = cpu.assemble_tokens_backward(laid, K + 1, dtype)
        assert torch.equal(grad_visible, laid[:, : K + 1].to(dtype))
        masked = laid[:, K + 1 :].double()
        same = laid[:, K + 1 :].float().sum(dim=(0, 1))
        # What a sum may lose is proportional to the sum of the sizes.
        assert_as_close(grad_mask_token, same, masked.sum(dim=(0, 1)), masked.abs().sum(dim=(0, 1)))


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("images_dtype", PIXELS)
@pytest.mark.parametrize(("N", "size", "patch", "channels"), SHAPES[:-1])
def test_mse(loops, N, size, patch, channels, images_dtype, dtype, norm_pix):
    images, ids, mean, std = sample(N, size, patch, channels, images_dtype)
    ids = ids[:, ids.shape[1] // 4 :]
    P = patch[0] * patch[1] * channels
    pred = torch.randn(*ids.shape, P, generator=torch.Generator().manual_seed(2)).to(dtype)

    def torch_in(arithmetic):
        leaf = pred.to(arithmetic).requires_grad_()
        loss = masked_mse_reference(leaf, images, ids, patch, mean.to(arithmetic), std.to(arithmetic), norm_pix)
        loss.backward()
        return loss.detach(), leaf.grad

    (true_loss, true_gradient), (same_loss, same_gradient) = torch_in(torch.float64), torch_in(torch.float32)
    loss, gradient = loss_and_gradient(pred, images, ids, patch, mean, std, norm_pix)
    assert loss.dtype == torch.float32
    assert abs(loss - true_loss) <= abs(same_loss - true_loss) + ROUNDINGS * true_loss
    # Targets are as large as 1 / std, and where they are normalised as many deviations.
    unit = 2 / pred.numel() / std.min().item()
    assert_as_close(gradient, same_gradient.to(dtype), true_gradient, unit)
    again = loss_and_gradient(relaid(pred), relaid(images), relaid(ids.long()), patch, mean, std, norm_pix)
    assert torch.equal(again[0], loss)
    assert torch.equal(again[1], gradient)


def test_mse_of_flat_patches_normalises_them_to_zero(loops):
    images = torch.tensor([[37]], dtype=torch.uint8).expand(2, 8, 8, 1)
    pred = torch.randn(2, 4, 16)
    ids = torch.arange(4).expand(2, -1)
    statistics = torch.tensor([0.3]), torch.tensor([0.7])
    loss, gradient = loss_and_gradient(pred, images, ids, (4, 4), *statistics, True)
    torch.testing.assert_close(gradient, pred * (2 / 128), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, pred.square().mean(), rtol=1e-6, atol=0)


def test_mse_of_one_number_per_patch_has_no_variance(loops):
    images, ids, mean, std = sample(2, (3, 4), (1, 1), 1)
    pred = torch.randn(2, 12, 1)
    assert cpu.masked_mse(pred, images, ids, (1, 1), mean, std, True, eps=EPS)[0].isnan()
    loss, _ = cpu.masked_mse(pred, images, ids, (1, 1), mean, std, False, eps=EPS)
    torch.testing.assert_close(loss, masked_mse_reference(pred, images, ids, (1, 1), mean, std, False))


# Rows of the fused ops: published widths, a short one, an odd one, one number; one row, a few, more than a group.
ROWS = [(2, 50, 96), (1, 70, 257), (3, 1, 33), (5, 7), (4, 1), (1, 1, 1, 40)]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ROWS)
def test_gelu(loops, shape, dtype, biased):
    generator = torch.Generator().manual_seed(4)
    h, grad = ((3 * torch.randn(*shape, generator=generator)).to(dtype) for _ in range(2))
    bias = torch.randn(shape[-1], generator=generator) if biased else None

    def torch_in(arithmetic):
        leaves = [x.to(arithmetic).requires_grad_() for x in (h, bias) if x is not None]
        out = F.gelu(sum(leaves))
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(arithmetic))

    (truth, *truths), (same, *sames) = torch_in(torch.float64), torch_in(torch.float32)
    for layout in (lambda x: x, relaid):
        assert_as_close(cpu.gelu(layout(h), bias), same.to(dtype), truth)
        grad_h, *grad_bias = cpu.gelu_backward(layout(grad), layout(h), bias)
        assert_as_close(grad_h, sames[0].to(dtype), truths[0], grad.abs().max().item())
        assert len(grad_bias) == biased
        if biased:
            assert_as_close(grad_bias[0], sames[1], truths[1], truths[0].abs().flatten(0, -2).sum(0))
        *gradients, again = cpu.gelu_backward(layout(grad), layout(h), bias, with_output=True)
        assert torch.equal(again, cpu.gelu(layout(h), bias))
        assert all(map(torch.equal, gradients, [grad_h, *grad_bias]))
        assert len(gradients) == 1 + biased


def test_gelu_at_every_size(loops):
    """From the smallest number to infinity; where 1 + erf has no digits left, ours still has."""
    x = torch.cat([torch.linspace(-15, 15, 30001), torch.logspace(-44, 38, 500), -torch.logspace(-44, 38, 500)])
    got, truth = cpu.gelu(x, None), F.gelu(x.double())
    tail = x.double() * 0.5 * torch.special.erfc(-x.double() / 2**0.5)
    assert ((got.double() - tail).abs() <= 3e-7 * tail.abs().clamp(min=0.1)).all()
    kept = (x > -9) & (x.abs() > 1e-30)
    assert ((got.double() - tail).abs() <= 1e-5 * tail.abs())[kept].all()
    assert (got[x < -14.0] == 0).all()
    assert torch.equal(got[x > 6], x[x > 6])
    ones = torch.ones_like(x)
    leaf = x.double().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(leaf).sum(), leaf)
    torch.testing.assert_close(cpu.gelu_backward(ones, x, None)[0].double(), slope, rtol=0, atol=3e-7)
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0])
    torch.testing.assert_close(cpu.gelu(special, None), special * torch.tensor([1, 0, 0, 0.5]), equal_nan=True)
    assert truth.isfinite().all()


@pytest.mark.parametrize("with_stream", [True, False])
@pytest.mark.parametrize(("x_dtype", "dtype"), [(torch.float32, other) for other in FLOATS] + [(torch.bfloat16,) * 2])
@pytest.mark.parametrize("shape", ROWS)
def test_add_layer_norm(loops, shape, x_dtype, dtype, with_stream):
    generator = torch.Generator().manual_seed(5)
    x, branch, grad_stream, grad = (torch.randn(*shape, generator=generator) for _ in range(4))
    # A mean far from 0 shows whether the variance is the mean square less the square of the mean.
    x, branch, grad_stream, grad = (x + 30).to(x_dtype), branch.to(dtype), grad_stream.to(x_dtype), grad.to(dtype)
    weight, bias = (torch.randn(shape[-1:], generator=generator) for _ in range(2))
    added = (x.double() + branch.double(), (x.float() + branch.float()).to(x_dtype))

    def torch_in(arithmetic):
        leaves = [y.to(arithmetic).requires_grad_() for y in (added[1], weight, bias)]
        out = F.layer_norm(leaves[0], shape[-1:], *leaves[1:], eps=EPS)
        dx, *affine = torch.autograd.grad(out, leaves, grad.to(arithmetic))
        return out.detach(), dx + grad_stream.to(arithmetic) * with_stream, torch.stack(affine)

    (truth, *truths), (same, *sames) = torch_in(torch.float64), torch_in(torch.float32)
    # What is lost is that of the numbers that go in: some 35 beside their standard deviation.
    rstd_true = 1 / (added[1].double().var(-1, correction=0, keepdim=True) + EPS).sqrt()
    unit = 35 * rstd_true * (1 + weight.abs())
    for layout in (lambda y: y, relaid):
        stream, normed, mean, rstd = cpu.add_layer_norm(layout(x), layout(branch), None, weight, bias, EPS, dtype)
        assert_as_close(stream, added[1], added[0])
        assert torch.equal(stream, added[1])
        assert_as_close(normed, same.to(dtype), truth, unit)
        past = layout(grad_stream) if with_stream else None
        results = cpu.add_layer_norm_backward(past, layout(grad), layout(stream), weight, mean, rstd, dtype)
        slope = (grad.double() * weight).abs().amax(-1, keepdim=True) * rstd_true
        assert_as_close(results[0], sames[0].to(x_dtype), truths[0], slope * (1 + unit.amax(-1, keepdim=True)))
        if dtype != x_dtype:
            assert_as_close(results[1], sames[0].to(dtype), truths[0], slope * (1 + unit.amax(-1, keepdim=True)))
        sizes = (grad.double().abs() * (1 + 35 * rstd_true)).flatten(0, -2).sum(0)
        assert_as_close(results[-1], sames[1], truths[1], sizes)
        assert len(results) == 2 + (dtype != x_dtype)


@pytest.mark.parametrize(("x_dtype", "dtype"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("shape", ROWS)
def test_add_layer_norm_adds_the_bias_of_a_branch_and_sums_up_its_gradient(loops, shape, x_dtype, dtype):
    generator = torch.Generator().manual_seed(6)
    x, branch, grad_stream, grad = (torch.randn(*shape, generator=generator).to(x_dtype) for _ in range(4))
    added, weight, bias = (torch.randn(shape[-1:], generator=generator) for _ in range(3))
    stream, *others = cpu.add_layer_norm(x, branch, added, weight, bias, EPS, dtype)
    assert torch.equal(stream, (x.float() + (branch.float() + added)).to(x_dtype))
    without = cpu.add_layer_norm(stream, torch.zeros_like(x), None, weight, bias, EPS, dtype)[1:]
    assert all(map(torch.equal, others, without))
    arguments = grad_stream, grad, stream, weight, *others[1:], torch.float32
    grad_x, *_, affine = cpu.add_layer_norm_backward(*arguments, has_branch_bias=True)
    plain = cpu.add_layer_norm_backward(*arguments)
    assert torch.equal(grad_x, plain[0])
    assert torch.equal(affine[:2], plain[-1])
    unrounded = plain[1 if x_dtype == torch.bfloat16 else 0].double().flatten(0, -2)
    torch.testing.assert_close(affine[2].double(), unrounded.sum(0), rtol=0, atol=2e-6 * len(unrounded))


def test_fused_ops_take_weights_of_any_dtype_and_slices(loops):
    x = torch.randn(3, 9, 40)
    for dtype in FLOATS:
        weight, bias = torch.randn(2, 40).to(dtype)
        assert torch.equal(cpu.gelu(x, bias), cpu.gelu(x, bias.float()))
        one = cpu.add_layer_norm(x[:, 4:], x[:, :5], bias, relaid(weight), bias, EPS, torch.float32)
        weights = bias.float(), weight.float(), bias.float()
        other = cpu.add_layer_norm(x[:, 4:].clone(), x[:, :5].clone(), *weights, EPS, torch.float32)
        assert all(map(torch.equal, one, other))


def draw_attention(N, S, H, D, T, dtype=torch.float32, scale=1.0):
    """packed [N, S, 3·H, D], None; or packed [N, S, 2·H, D], queries [N, T, H, D]. And the output's gradient."""
    generator = torch.Generator().manual_seed(S + D)
    packed = torch.randn(N, S, (3 if T is None else 2) * H, D, generator=generator) * scale
    queries = None if T is None else (torch.randn(N, T, H, D, generator=generator) * scale).to(dtype)
    return packed.to(dtype), queries, torch.randn(N, T or S, H, D, generator=generator).to(dtype)


def attention_results(packed, queries, grad, products="float32"):
    """The output and the gradients of what is there."""
    out, lse = cpu.attention(packed, queries, products)
    gradients = [None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in (packed, queries)]
    cpu.attention_backward(grad, packed, queries, lse, *gradients, products)
    return [x for x in (out, *gradients) if x is not None]


def attention_in(dtype, packed, queries, grad):
    """The same by the definition; in bfloat16 by torch's own function, which is more exact than the definition."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (packed, queries) if x is not None]
    unpacked = leaves[0].unflatten(2, (-1, grad.shape[2]))
    if dtype == torch.bfloat16:
        q, k, v = (x.transpose(1, 2) for x in (*leaves[1:], *unpacked.unbind(2)))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    else:
        out = attention_reference(unpacked, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def assert_attention_as_good_as_torch(packed, queries, grad, products="float32"):
    arguments = packed, queries, grad
    results = attention_results(*arguments, products)
    for got, same_dtype, truth in zip(
        results, attention_in(packed.dtype, *arguments), attention_in(torch.float64, *arguments), strict=True
    ):
        assert got.shape == truth.shape
        assert got.dtype == packed.dtype
        assert not got.isnan().any(), "an element was not written"
        error, torch_error = ((x.double() - truth).norm() for x in (got, same_dtype))
        if packed.dtype == torch.bfloat16:
            assert error <= torch_error + 0.05 * torch.finfo(torch.bfloat16).eps * truth.norm()
        else:
            # Other sums and another exponential: within a few roundings of what torch makes of it.
            assert error <= 2 * torch_error + ROUNDINGS * truth.norm()


@pytest.mark.parametrize("shape", ATTENTIONS)
def test_attention(numbers, shape):
    dtype, products = numbers
    assert_attention_as_good_as_torch(*draw_attention(*shape, dtype), products)


def test_attention_of_bfloat16_is_that_of_float32_rounded(loops):
    packed, queries, grad = draw_attention(2, 67, 2, 48, 33, torch.bfloat16)
    for got, wanted in zip(
        attention_results(packed, queries, grad),
        attention_results(packed.float(), queries.float(), grad.float()),
        strict=True,
    ):
        assert torch.equal(got, wanted.bfloat16())


@pytest.mark.parametrize("T", [None, 9])
def test_strides_do_not_matter_to_attention_between_heads(numbers, T):
    dtype, products = numbers
    packed, queries, grad = draw_attention(2, 7, 3, 16, T, dtype)
    wanted = attention_results(packed, queries, grad, products)

    def turned(x):
        return x if x is None else x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)

    def gaps(x):
        return x if x is None else torch.nn.functional.pad(x, (3, 5, 1, 1))[:, :, 1:-1, 3:-5]

    for laid in (turned, gaps):
        got = attention_results(laid(packed), laid(queries), laid(grad), products)
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_the_exponential_is_that_of_float64(loops):
    """Two keys: of one the score is 0, of the other x. The weights, which the values pick out, are as 1 to e^x."""
    x = torch.cat([-torch.logspace(-8, 1.9395, 3000), torch.linspace(-87, 0, 3000), torch.tensor([-87.5, -1e4, -8e37])])
    queries, packed = torch.zeros(1, len(x), 1, 16), torch.zeros(1, 2, 2, 16)
    queries[0, :, 0, 0] = 4 * x  # scores are divided by √16
    packed[0, 1, 0, 0] = packed[0, 0, 1, 0] = packed[0, 1, 1, 1] = 1
    weights = cpu.attention(packed, queries)[0][0, :, 0, :2].double()
    got, truth = weights[:, 1] / weights[:, 0], x.double().exp()
    assert ((got - truth).abs() <= 2e-7 * truth + 2e-38).all()
    assert got[-3:].tolist() == [0, 0, 0]


def test_large_scores_do_not_overflow(numbers):
    dtype, products = numbers
    packed, queries, grad = draw_attention(1, 50, 2, 32, 20, dtype, scale=45.0)
    scores = attention_reference(packed.unflatten(2, (2, 2)), queries * 1e-9)
    assert (queries.flatten(1).abs().amax() * packed.abs().amax() * 32**0.5 > 1e4).all()
    assert scores.isfinite().all()
    assert_attention_as_good_as_torch(packed, queries, grad, products)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_comes_through_as_in_torch(numbers, where, bad):
    """In a query, a key, a value, or the gradient; in one head of one image only."""
    dtype, products = numbers
    packed, _, grad = draw_attention(2, 19, 2, 16, None, dtype)
    if where < 3:
        packed[1, 5, 2 * where + 1, 3] = bad
    else:
        grad[1, 5, 1, 3] = bad
    wanted = attention_in(torch.float32, packed, None, grad)
    for got, one in zip(attention_results(packed, None, grad, products), wanted, strict=True):
        assert torch.equal(got.isfinite(), one.isfinite())


# One more or less than a tile of 16 rows or 32 numbers, in keys, queries and heads.
ENDS = [(15, 48, 17), (16, 112, 16), (31, 96, 33), (32, 16, 32), (33, 64, 31), (49, 80, 65), (3, 32, 1), (1, 128, 47)]


@pytest.mark.parametrize(("S", "D", "T"), ENDS)
def test_tiles_are_right_at_their_ends(S, D, T):
    assert_attention_as_good_as_torch(*draw_attention(1, S, 2, D, T, torch.bfloat16), "amx-emulated")


@pytest.mark.parametrize("shape", [(2, 19, 2, 48, None), (1, 33, 2, 32, 5)])
def test_what_lay_in_memory_before_does_not_matter_to_attention(numbers, shape):
    """A call that leaves NaN in all memory of a thread, its tiles too, comes between two calls with the same bits."""
    dtype, products = numbers
    arguments = draw_attention(*shape, dtype)
    wanted = attention_results(*arguments, products)
    attention_results(*(x if x is None else torch.full_like(x, float("nan")) for x in arguments), products)
    for got, one in zip(attention_results(*arguments, products), wanted, strict=True):
        assert torch.equal(got, one)


@pytest.mark.parametrize("T", [None, 70])
def test_the_bits_of_attention_do_not_depend_on_threads(numbers, threads, T):
    dtype, products = numbers
    arguments = draw_attention(8, 50, 4, 32, T, dtype)
    threads(1)
    wanted = attention_results(*arguments, products)
    for count in (1, 2, 3, 5):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(attention_results(*arguments, products), wanted, strict=True))


@pytest.mark.parametrize("dtype", PIXELS)
@pytest.mark.parametrize("given_dtype", FLOATS)
@pytest.mark.parametrize(("N", "size", "patch", "channels"), SHAPES)
def test_scatter(loops, N, size, patch, channels, given_dtype, dtype):
    _, ids, mean, std = sample(N, size, patch, channels)
    grid = size[0] // patch[0], size[1] // patch[1]
    for chosen in (ids[:, : ids.shape[1] // 2 + 1], ids.long(), ids[:, :0]):
        patches = torch.randn(*chosen.shape, patch[0] * patch[1] * channels).to(given_dtype)
        same = scatter_patches_reference(patches, chosen, grid, patch, mean, std, dtype)
        for laid in (patches, relaid(patches)):
            got = cpu.scatter_patches(laid, chosen, grid, patch, mean, std, dtype)
            if not dtype.is_floating_point:  # the same additions and multiplications, rounded once
                assert torch.equal(got, same)
            else:
                truth = scatter_patches_reference(patches.double(), chosen, grid, patch, mean, std, torch.float64)
                assert_as_close(got, same, truth, 4.0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_scatter_to_whole_numbers_is_defined_for_every_number(loops, dtype):
    largest = torch.iinfo(dtype).max
    given = [float("nan"), float("inf"), -float("inf"), -0.0, 1e30, -1e30, 0.5 / largest, 1.5 / largest, 2.5 / largest]
    patches = torch.tensor([*given, (largest - 0.5) / largest]).view(1, 1, 10)
    zero, one = torch.zeros(1), torch.ones(1)
    got = cpu.scatter_patches(patches, torch.zeros(1, 1, dtype=torch.int32), (1, 1), (2, 5), zero, one, dtype)
    wanted = (patches * largest).round().clamp(0, largest).nan_to_num(0).flatten().to(dtype)
    assert torch.equal(got.flatten(), wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_scatter_undoes_gather_in_any_range(loops, dtype):
    images, ids, mean, std = sample(3, (24, 40), (4, 8), 5, dtype)
    value_range = torch.tensor([[-40.0, 0, 250, 1e-3, -1], [400, 80_000, 310, 2e-3, 1]])
    if dtype.is_floating_point:
        images = value_range[0] + images * (value_range[1] - value_range[0])
    else:
        value_range[1] += 1000
    patches = cpu.gather_patches(images, ids, (4, 8), mean, std, torch.float32, value_range)
    back = cpu.scatter_patches(patches, ids, (6, 5), (4, 8), mean, std, dtype, value_range)
    if dtype.is_floating_point:
        assert ((back.double() - images.double()).abs() <= 4 * ROUNDINGS * value_range.abs().amax(0)).all()
    else:
        assert torch.equal(back, images)


def with_gaps(images, patch):
    """Images in which some pixels are 0 and others, if they can be, NaN, and which patches [N, L] have one."""
    images = torch.where(images == 0, 1, images).clone()
    (N, H, W, C), (ph, pw) = images.shape, patch
    for n, y, x, value in ((0, 0, 0, 0), (N - 1, H - 1, W - 1, 0), (N - 1, 0, W // 2, float("nan"))):
        images[n, y, x, (n + y) % C] = value if images.is_floating_point() else 0
    absent = (images.double() == 0) | images.double().isnan()
    return images, absent.view(N, H // ph, ph, W // pw, pw, C).any(dim=5).any(dim=4).any(dim=2).flatten(1), absent


@pytest.mark.parametrize("images_dtype", PIXELS)
@pytest.mark.parametrize(("N", "size", "patch", "channels"), [*SHAPES[:-1], (2, (3, 9), (1, 3), 64)])
def test_ranges_and_missing_pixels(loops, N, size, patch, channels, images_dtype):
    """0 is missing too where rows are shorter than vectors, whose other lanes hold 0."""
    images, ids, mean, std = sample(N, size, patch, channels, images_dtype)
    images, without, absent = with_gaps(images, patch)
    value_range = torch.stack([-torch.rand(channels), torch.rand(channels) + 0.5])
    value_range *= 1 if images_dtype.is_floating_point else torch.iinfo(images_dtype).max
    more = dict(value_range=value_range, nodata=0.0)
    arguments = images, ids, patch, mean, std
    double = {**more, "value_range": value_range.double()}
    truth = gather_patches_reference(*arguments[:3], mean.double(), std.double(), torch.float64, **double)
    same = gather_patches_reference(*arguments, torch.float32, **more)
    got = cpu.gather_patches(*arguments, torch.float32, **more)
    assert_as_close(got, same, truth, 2 / std.min().item())
    assert (got == 0)[
        gather_patches_reference(absent.float(), ids, patch, 0 * mean, 0 * std + 1, torch.float32) == 1
    ].all()

    excluded = without.gather(1, ids.long())
    pred = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    loss, gradient = loss_and_gradient(pred.masked_fill(excluded[:, :, None], float("nan")), *arguments, True, **more)
    leaf = pred.double().requires_grad_()
    true_loss = masked_mse_reference(leaf, *arguments[:3], mean.double(), std.double(), True, **double)
    true_loss.backward()
    same_leaf = pred.clone().requires_grad_()
    same_loss = masked_mse_reference(same_leaf, *arguments, True, **more)
    same_loss.backward()
    assert abs(loss - true_loss) <= abs(same_loss - true_loss) + ROUNDINGS * true_loss
    assert_as_close(gradient, same_leaf.grad, leaf.grad, 4 / (~excluded).sum() / pred.shape[2] / std.min())
    assert (gradient == 0).all(dim=2).equal(excluded)
    # Without nodata NaN is a number like any other, and so is 0.
    assert loss_and_gradient(pred, *arguments, True, value_range)[0].isnan() == images.isnan().any()


def test_a_loss_without_targets_is_zero_and_so_is_its_gradient(loops):
    images, ids, mean, std = sample(2, (8, 8), (4, 4), 3, torch.float32)
    pred = torch.full((2, 4, 48), float("nan"))
    loss, gradient = loss_and_gradient(pred, images * float("nan"), ids, (4, 4), mean, std, True, nodata=-1.0)
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_gradient_of_the_loss_is_a_factor_before_rounding(loops, dtype):
    images, ids, mean, std = sample(3, (24, 40), (4, 8), 5)
    pred = torch.randn(3, 30, 160, generator=torch.Generator().manual_seed(2)).to(dtype)
    arguments = pred, images, ids, (4, 8), mean, std, True
    _, whole = loss_and_gradient(pred.float(), *arguments[1:])
    for factor in (1 / 3, 0.25, 65536.0):
        _, gradient = loss_and_gradient(*arguments, grad_loss=factor)
        wanted = (whole.double() * torch.tensor(factor).double()).float()
        if dtype == torch.float32:
            torch.testing.assert_close(gradient, wanted, rtol=2.4e-7 if factor == 1 / 3 else 0, atol=0)
        else:
            torch.testing.assert_close(gradient, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_narrow_number_widens_exactly(loops, dtype):
    narrow = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 1, -1)
    wide, _ = cpu.assemble_tokens_backward(narrow, 1, torch.float32)
    torch.testing.assert_close(wide, narrow.float(), rtol=0, atol=0, equal_nan=True)
    back, _ = cpu.assemble_tokens_backward(wide, 1, dtype)
    torch.testing.assert_close(back, narrow, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrowing_rounds_to_nearest_even(loops, dtype):
    bits = torch.randint(-(2**31), 2**31, (400_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    narrow = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    between = torch.nextafter(narrow[:-1], narrow[1:])
    ties = (narrow[:-1] + narrow[1:]) / 2
    floats = torch.cat([bits.view(torch.float32), between, ties, torch.nextafter(ties, narrow[1:]), -ties])
    got, _ = cpu.assemble_tokens_backward(floats.view(1, 1, -1), 1, dtype)
    torch.testing.assert_close(got.flatten(), floats.to(dtype), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 4), channels=st.integers(1, 5), dtype=st.sampled_from(PIXELS),
    order=st.permutations(range(4)), step=st.integers(1, 3), lead=st.integers(0, 2),
    repeated=st.sampled_from([None, 0, 1, 2, 3]), chosen=st.sampled_from(SETS),
)  # fmt: skip
def test_strides_do_not_matter(sizes, channels, dtype, order, step, lead, repeated, chosen):
    gh, gw, ph, pw = sizes
    images, ids, mean, std = sample(2, (gh * ph, gw * pw), (ph, pw), channels, dtype)
    if repeated is not None:
        images = images.narrow(repeated, 0, 1).expand_as(images)
        laid = relaid(images.narrow(repeated, 0, 1), order, step, lead).expand_as(images)
    else:
        laid = relaid(images, order, step, lead)
    before = _C.instruction_set()
    _C.set_instruction_set(chosen)
    try:
        wanted = cpu.gather_patches(images.contiguous(), ids, (ph, pw), mean, std, torch.float32)
        got = cpu.gather_patches(laid, relaid(ids), (ph, pw), mean, std, torch.float32)
    finally:
        _C.set_instruction_set(before)
    assert torch.equal(got, wanted)
    assert torch.equal(got, cpu.gather_patches(laid, ids, (ph, pw), mean, std, torch.float32))


def test_negative_strides_of_numpy(loops):
    images, ids, mean, std = sample(2, (8, 12), (4, 4), 3)
    out = np.empty((2, 6, 48), np.float32)
    turned = images.numpy()[:, ::-1, ::-1, ::-1]
    _C.gather_patches(turned, ids.numpy()[::-1], (4, 4), mean.numpy()[::-1], std.numpy()[::-1], None, None, 1, out)
    wanted = cpu.gather_patches(images.flip(1, 2, 3), ids.flip(0), (4, 4), mean.flip(0), std.flip(0), torch.float32)
    assert torch.equal(torch.from_numpy(out), wanted)


def test_no_images_give_empty_results(loops):
    images, mean, std = torch.zeros(0, 8, 8, 3, dtype=torch.uint8), torch.zeros(3), torch.ones(3)
    ids = torch.zeros(0, 4, dtype=torch.int32)
    assert cpu.random_masking(torch.zeros(0, dtype=torch.int64), 0, 9).shape == (0, 9)
    assert cpu.gather_patches(images, ids, (4, 4), mean, std, torch.float32).shape == (0, 4, 48)
    tokens = cpu.assemble_tokens(torch.zeros(0, 3, 8), torch.zeros(8), torch.zeros(5, 8), ids, torch.float32)
    assert tokens.shape == (0, 5, 8)
    nothing = torch.zeros(2, 3, 0), mean[:0], torch.zeros(5, 0), torch.zeros(2, 4, dtype=torch.int32)
    assert cpu.assemble_tokens(*nothing, torch.float32).shape == (2, 5, 0)
    grad_visible, grad_mask_token = cpu.assemble_tokens_backward(tokens, 3, torch.float32)
    assert grad_visible.shape == (0, 3, 8)
    assert grad_mask_token.tolist() == [0] * 8
    nothing, row = torch.zeros(0, 3, 8), torch.ones(8)
    assert cpu.gelu(nothing, row).shape == (0, 3, 8)
    assert [x.tolist() for x in cpu.gelu_backward(nothing, nothing, row, True)] == [[], [0] * 8, []]
    stream, normed, *statistics = cpu.add_layer_norm(nothing, nothing, row, row, row, EPS, torch.float32)
    assert stream.shape == normed.shape == (0, 3, 8)
    gradients = cpu.add_layer_norm_backward(None, normed, stream, row, *statistics, torch.float32, True)
    assert [x.tolist() for x in gradients] == [[], [[0] * 8] * 3]
    patches = torch.zeros(0, 4, 48)
    assert cpu.scatter_patches(patches, ids, (2, 2), (4, 4), mean, std, torch.uint8).shape == (0, 8, 8, 3)
    out, lse = cpu.attention(torch.zeros(0, 5, 6, 16), None)
    assert (out.shape, lse.shape) == ((0, 5, 2, 16), (0, 2, 5))
    cpu.attention_backward(out, torch.zeros(0, 5, 6, 16), None, lse, torch.zeros(0, 5, 6, 16), None)
    with pytest.raises(ValueError, match="pred must have elements"):
        cpu.masked_mse(patches, images, ids, (4, 4), mean, std, True, eps=EPS)


@pytest.mark.parametrize(("products", "what"), [("dot", "AVX512-BF16"), ("amx", "AMX")])
def test_products_that_the_loops_in_use_lack_are_refused(products, what):
    packed = torch.zeros(1, 5, 6, 16, dtype=torch.bfloat16)
    before = _C.instruction_set()
    _C.set_instruction_set("baseline")
    try:
        with pytest.raises(ValueError, match=f"products by {products} need a processor with {what}, and"):
            cpu.attention(packed, None, products)
    finally:
        _C.set_instruction_set(before)


# Threads and instruction sets


def all_results(dtype):
    """Every op on enough data to be worth several threads."""
    images, ids, mean, std = sample(6, (112, 112), (8, 8), 3)
    generator = torch.Generator().manual_seed(3)
    pred = torch.randn(6, 147, 192, generator=generator).to(dtype)
    visible, grad = (torch.randn(6, rows, 257, generator=generator).to(dtype) for rows in (50, 197))
    mask_token, pos_embed = torch.randn(257, generator=generator), torch.randn(197, 257, generator=generator)
    return [
        cpu.random_masking(torch.arange(64), 5, 197),
        cpu.gather_patches(images, ids, (8, 8), mean, std, dtype),
        cpu.assemble_tokens(visible, mask_token, pos_embed, ids, dtype),
        *cpu.assemble_tokens_backward(grad, 50, dtype),
        *loss_and_gradient(pred, images, ids[:, 49:], (8, 8), mean, std, True, nodata=7.0),
        cpu.scatter_patches(pred, ids[:, 49:], (14, 14), (8, 8), mean, std, torch.uint8),
        *cpu.transpose_and_sum(pred.flatten(0, 1).float()),
        *(normed := cpu.add_layer_norm(grad, grad.flip(1), pos_embed[1], mask_token, pos_embed[0], EPS, dtype)),
        *cpu.add_layer_norm_backward(grad, normed[1], normed[0], mask_token, *normed[2:], torch.bfloat16, True),
    ]


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_of_gelu_do_not_depend_on_threads(loops, threads, dtype):
    """They do on whether the processor has fused multiply-adds."""
    h, grad = torch.randn(2, 5, 147, 192, generator=torch.Generator().manual_seed(3)).to(dtype)
    bias = torch.ones(192)
    threads(1)
    wanted = [cpu.gelu(h, bias), *cpu.gelu_backward(grad, h, bias, True)]
    for count in (2, 5):
        threads(count)
        assert all(map(torch.equal, [cpu.gelu(h, bias), *cpu.gelu_backward(grad, h, bias, True)], wanted)), count


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_depend_neither_on_threads_nor_on_the_instruction_set(threads, dtype):
    before = _C.instruction_set()
    threads(1)
    wanted = all_results(dtype)
    for name, count in itertools.product(SETS, (1, 2, 5)):
        _C.set_instruction_set(name)
        threads(count)
        got = all_results(dtype)
        _C.set_instruction_set(before)
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True)), (name, count)


def test_several_python_threads_at_once(threads):
    threads(3)
    wanted = all_results(torch.float32)
    with ThreadPoolExecutor(6) as callers:
        results = [call.result() for call in [callers.submit(all_results, torch.float32) for _ in range(24)]]
    for got in results:
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


# Without torch, whose own threads do not survive a fork: the extension must, and must end with its threads asleep.
FORKING = """
import importlib.util, os, signal, sys
import numpy as np
def running():
    return len(os.listdir("/proc/self/task"))
before = running()
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
assert running() == before
def masking():
    out = np.full((512, 196), -1, np.int32)
    _C.random_masking(np.arange(512), 3, 4, out)
    return out
wanted = masking()
assert running() == before + 3
for _ in range(3):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        same = (masking() == wanted).all() and (masking() == wanted).all()
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(not (masking() == wanted).all())
        sys.exit(not same or os.waitpid(grandchild, 0)[1] != 0)
    assert os.waitpid(child, 0)[1] == 0
    assert (masking() == wanted).all()
print("all the same")
"""


def test_threads_start_late_survive_a_fork_and_end_quietly():
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING, _C.__file__],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "all the same\n", "")


def test_the_instruction_set_can_be_chosen():
    assert SETS[0] == "baseline"
    assert _C.instruction_set() == SETS[-1]
    for name in SETS:
        _C.set_instruction_set(name)
        assert _C.instruction_set() == name
    with pytest.raises(ValueError, match=r"must be one of baseline.*got mmx"):
        _C.set_instruction_set("mmx")
    assert _C.instruction_set() == SETS[-1]


def test_it_is_sanitised_where_that_is_claimed():
    assert _C.sanitized == ("FASTMAE_SANITIZED" in os.environ)


# Refusals


def _wrong():
    """What is wrong with the buffers that the extension is given: (words of the message, the call)."""
    images, ids, mean, std = sample(3, (8, 8), (4, 4), 3)
    patch, tokens = (4, 4), torch.randn(3, 3, 8)

    def backward(grad=tokens, visible_tokens=2):
        return lambda: cpu.assemble_tokens_backward(grad, visible_tokens, torch.float32)

    arrays = [tensor.numpy() for tensor in (images, ids, mean, std)]

    def raw(out, threads=1, images=arrays[0], ids=arrays[1], patch=patch):
        return lambda: _C.gather_patches(images, ids, patch, *arrays[2:], None, None, threads, out)

    loss, count = np.ones((), np.float32), np.ones((), np.float32)

    def mse(loss=loss, targets=count, value_range=None):
        others = arrays[0], arrays[1], patch, *arrays[2:], value_range, None, True, EPS
        return lambda: _C.masked_mse(out, *others, 1, loss, targets)

    def mse_back(gradient, grad_loss=loss, targets=count):
        others = arrays[0], arrays[1], patch, *arrays[2:], None, None, True, EPS
        return lambda: _C.masked_mse_backward(grad_loss, targets, out, *others, 1, gradient)

    out = np.empty((3, 4, 48), np.float32)
    odd = np.empty(3 * 4 * 48 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(3, 4, 48)
    fixed = out.copy()
    fixed.flags.writeable = False
    room = np.empty(3 * 8 * 8 * 3 + 3 * 4 * 48, np.float32)
    shared = room[: 3 * 8 * 8 * 3].reshape(3, 8, 8, 3), room[3 * 8 * 8 * 3 - 1 : -1].reshape(3, 4, 48)
    wide, tall, row = room[:48].reshape(4, 12), room[48:96].reshape(12, 4), room[96:108]

    def transpose(matrix=wide, transposed=tall, sums=row):
        return lambda: _C.transpose_and_sum(matrix, 1, transposed, sums)

    pairs, triples = np.zeros((2, 5, 4, 16), np.float32), np.zeros((2, 5, 6, 16), np.float32)
    asking, logs = np.zeros((2, 3, 2, 16), np.float32), np.zeros((2, 2, 3), np.float32)
    attended = asking.copy()

    def attend(packed=pairs, queries=asking, out=attended, lse=logs, products="float32"):
        return lambda: _C.attention(packed, queries, products, 1, out, lse)

    def attend_back(grad=attended, packed=pairs, queries=asking, lse=logs, products="float32", **gradients):
        gradients = {"grad_packed": pairs.copy(), "grad_queries": asking.copy(), **gradients}
        return lambda: _C.attention_backward(grad, packed, queries, lse, products, 1, **gradients)

    bits = pairs.astype(np.uint16), asking.astype(np.uint16)

    rows, column = np.zeros((2, 5, 8), np.float32), np.zeros(8, np.float32)
    results, numbers = [rows.copy() for _ in range(2)], [np.zeros((2, 5), np.float32) for _ in range(2)]

    def activate(h=rows, bias=column, out=results[0]):
        return lambda: _C.gelu(h, bias, 1, out)

    slopes, total = rows.copy(), column.copy()

    def activate_back(grad=slopes, h=rows, bias=column, grad_h=results[0], grad_bias=total, out=None):
        return lambda: _C.gelu_backward(grad, h, bias, 1, grad_h, grad_bias, out)

    def norm(x=rows, branch=rows, added=None, weight=column, bias=column, eps=EPS, outs=(*results, *numbers)):
        return lambda: _C.add_layer_norm(x, branch, added, weight, bias, eps, 1, *outs)

    def norm_back(past=None, grad=rows, stream=rows, weight=column, statistics=numbers, outs=None):
        outs = outs or (results[0], None, np.zeros((2, 8), np.float32))
        return lambda: _C.add_layer_norm_backward(past, grad, stream, weight, *statistics, 1, *outs)

    return {
        "h of float64": ("h must be .* got float64", activate(h=rows.astype(float))),
        "h of no axes": (r"h must have a number in each row, got shape \[\]", activate(h=np.zeros((), np.float32))),
        "h of empty rows": ("h must have a number in each row", activate(h=rows[..., :0])),
        "short bias": (r"bias must have shape of a row = \[8\], got \[7\]", activate(bias=column[1:])),
        "bias of ints": ("bias must be .* got int32", activate(bias=column.astype(np.int32))),
        "short out": (r"out must have the shape of h, \[2, 5, 8\], got \[2, 4, 8\]", activate(out=results[0][:, 1:])),
        "flat out": ("out must have the shape of h", activate(out=results[0].reshape(10, 8))),
        "out of halves": ("out must be float32, got float16", activate(out=results[0].astype(np.float16))),
        "out in place": ("out must not overlap h", activate(out=rows)),
        "out on bias": ("out must not overlap bias", activate(h=rows[0, :1], bias=column, out=column[None])),
        "grad in other": ("grad must be float32, got float16", activate_back(grad=rows.astype(np.float16))),
        "short grad": ("grad must have the shape of h", activate_back(grad=rows[1:])),
        "grad_h on grad": ("grad_h must not overlap grad", activate_back(grad=results[0])),
        "no bias's gradient": ("grad_bias must come with bias", activate_back(grad_bias=None)),
        "gradient of no bias": ("grad_bias must come with bias", activate_back(bias=None)),
        "bias's gradient in place": ("grad_bias must not overlap bias", activate_back(grad_bias=column)),
        "output on grad_h": ("grad_h must not overlap out", activate_back(out=results[0])),
        "output on h": ("out must not overlap h", activate_back(out=rows)),
        "short output": ("out must have the shape of h", activate_back(out=results[1][:1])),
        "output of halves": ("out must be float32, got float16", activate_back(out=results[1].astype(np.float16))),
        "x of ints": ("x must be .* got int64", norm(x=rows.astype(np.int64))),
        "short branch": ("branch must have the shape of x", norm(branch=rows[:1])),
        "short bias of the branch": ("branch_bias must have shape of a row", norm(added=column[1:])),
        "stream on the branch's bias": ("must not overlap branch_bias", norm(added=results[0][0, 0])),
        "four sums": (r"grad_affine must have shape \[2 or 3, D\]", norm_back(outs=(results[0], None, rows[0, :4]))),
        "short weight": ("weight must have shape of a row", norm(weight=column[1:])),
        "two axes of bias": ("bias must have shape of a row", norm(bias=rows[0, :1])),
        "eps below 0": ("eps must be at least 0, got -1", norm(eps=-1.0)),
        "eps of NaN": ("eps must be at least 0, got nan", norm(eps=float("nan"))),
        "stream of halves": (
            "stream must be float32, got float16",
            norm(outs=(results[0].astype(np.float16), results[1], *numbers)),
        ),
        "normed on stream": ("stream must not overlap normed", norm(outs=(results[0], results[0], *numbers))),
        "mean on rstd": ("mean must not overlap rstd", norm(outs=(*results, numbers[0], numbers[0]))),
        "normed in place": ("normed must not overlap x", norm(outs=(results[0], rows, *numbers))),
        "mean of columns": ("mean must have a number for each row of x", norm(outs=(*results, column, numbers[1]))),
        "rstd of rows": ("rstd must be float32", norm(outs=(*results, numbers[0], numbers[1].astype(np.float16)))),
        "past of halves": ("grad_stream must be float32, got float16", norm_back(past=rows.astype(np.float16))),
        "short past": ("grad_stream must have the shape of stream", norm_back(past=rows[:1])),
        "grad of float64": ("grad_normed must be .* got float64", norm_back(grad=rows.astype(float))),
        "short statistics": (
            "mean must have a number for each row of stream",
            norm_back(statistics=(numbers[0][:1], numbers[1])),
        ),
        "gaps in statistics": ("rstd must be contiguous", norm_back(statistics=(numbers[0], rows[..., 0]))),
        "grad_x in place": (
            "grad_x must not overlap grad_normed",
            norm_back(outs=(rows, None, np.zeros((2, 8), np.float32))),
        ),
        "grad_x twice": (
            "grad_x must not overlap grad_branch",
            norm_back(outs=(results[0], results[0], np.zeros((2, 8), np.float32))),
        ),
        "one sum for two": (
            r"grad_affine must have shape \[2 or 3, D\] = \[2, 8\]",
            norm_back(outs=(results[0], None, column)),
        ),
        "sums on weight": (
            "grad_affine must not overlap weight",
            norm_back(weight=results[1][0, 0], outs=(results[0], None, results[1][0, :2])),
        ),
        "transposed halves": ("matrix must be float32, got float16", transpose(np.zeros((4, 12), np.float16))),
        "transposed vector": (r"matrix must have shape \[R, C\], got \[48\]", transpose(room[:48])),
        "not transposed": (r"transposed must have shape \[C, R\] = \[12, 4\]", transpose(transposed=out[0])),
        "sums of rows": (r"sums must have shape \[C\] = \[12\], got \[4\]", transpose(sums=room[96:100])),
        "transposed in place": ("transposed must not overlap matrix", transpose(room[40:88].reshape(4, 12))),
        "summed in place": ("sums must not overlap matrix", transpose(sums=room[4:16])),
        "halves attended": (
            r"packed must be float32, bfloat16 \(as uint16\), got float16",
            attend(pairs.astype(np.float16)),
        ),
        "dots of float32": ("products by dot are for bfloat16, got packed of float32", attend(products="dot")),
        "gradients by tiles of float32": ("products by amx are for bfloat16", attend_back(products="amx")),
        "unknown products": (
            "products must be one of float32, dot, amx, amx-emulated, got gpu",
            attend(products="gpu"),
        ),
        "queries of another dtype": (
            r"queries must be bfloat16 \(as uint16\), got float32",
            attend(bits[0], out=bits[1]),
        ),
        "out of another dtype": (r"out must be bfloat16 \(as uint16\), got float32", attend(*bits)),
        "lse in bfloat16": ("lse must be float32, got bfloat16", attend(*bits, bits[1].copy(), logs.astype(np.uint16))),
        "gradient in float32": (
            r"grad_packed must be bfloat16 \(as uint16\), got float32",
            attend_back(bits[1], bits[0], bits[1].copy(), grad_packed=pairs.copy()),
        ),
        "packed as five": ("packed must have at most 4 axes", attend(pairs[None])),
        "three heads of two": (r"packed must have shape \[N, S, 2·H, D\] = \[2, 5, 4, 16\]", attend(triples)),
        "two of three": (r"packed must have shape \[N, T, 3·H, D\] = \[2, 3, 6, 16\]", attend(queries=None)),
        "no keys": (r"packed must have a token, got shape \[2, 0, 4, 16\]", attend(pairs[:, :0])),
        "no queries": ("out must have a token and a head", attend(out=attended[:, :0])),
        "narrow heads": ("out must have heads of a multiple of 16 numbers up to 128", attend(out=attended[..., :8])),
        "wide heads": ("out must have heads of .* got shape", attend(out=np.zeros((2, 3, 2, 144), np.float32))),
        "other queries": (r"queries must have shape \[N, T, H, D\] = \[2, 3, 2, 16\]", attend(queries=asking[:1])),
        "gaps in queries": ("queries must have no gaps", attend(queries=np.repeat(asking, 2, 3)[..., ::2])),
        "turned packed": ("packed must have no gaps", attend(pairs[..., ::-1])),
        "float64 out": ("out must be .* got float64", attend(out=attended.astype(float))),
        "gaps in out": ("out must be contiguous", attend(out=np.repeat(attended, 2, 2)[:, :, ::2])),
        "out on queries": ("out must not overlap queries", attend(out=asking)),
        "short lse": (r"lse must have shape \[N, H, T\] = \[2, 2, 3\], got \[2, 2, 2\]", attend(lse=logs[..., :2])),
        "grad in halves": ("grad must be float32, got float16", attend_back(attended.astype(np.float16))),
        "gaps in lse": ("lse must be contiguous", attend_back(lse=np.repeat(logs, 2, 2)[..., ::2])),
        "queries without gradient": ("grad_queries must come with queries", attend_back(grad_queries=None)),
        "short gradient": (
            r"grad_packed must have shape of packed = \[2, 5, 4, 16\]",
            attend_back(grad_packed=triples),
        ),
        "gaps in gradient": (
            "grad_packed must be contiguous",
            attend_back(grad_packed=np.zeros_like(triples)[:, :, :4]),
        ),
        "gradient on packed": ("grad_packed must not overlap packed", attend_back(grad_packed=pairs)),
        "gradient on grad": ("grad_queries must not overlap grad", attend_back(grad_queries=attended)),
        "gradient of other queries": ("grad_queries must have shape of queries", attend_back(grad_queries=asking[:1])),
        "huge size": ("patch_size must divide", raw(out, patch=(2**62, 4))),
        "patches of nothing": (
            "patch_size is too large",
            raw(out[:, :0], images=arrays[0][:, :0], ids=arrays[1][:, :0], patch=(2**62, 4)),
        ),
        "short result": (r"patches must have shape \[N, K, P\] = \[3, 4, 48\], got \[3, 4, 47\]", raw(out[:, :, 1:])),
        "gaps in result": ("patches must be contiguous", raw(np.empty((3, 4, 96), np.float32)[:, :, ::2])),
        "turned result": ("patches must be contiguous", raw(out[::-1])),
        "repeated result": ("patches must be", raw(np.broadcast_to(out[:1], out.shape))),
        "read-only result": ("patches must be writeable", raw(fixed)),
        "misaligned result": ("patches must be aligned", raw(odd)),
        "foreign byte order": ("patches must be .* got >f4", raw(out.astype(">f4"))),
        "result on images": ("patches must not overlap images", raw(shared[1], images=shared[0])),
        "no threads": (r"threads must lie in \[1, 65536\], got 0", raw(out, threads=0)),
        "many threads": ("threads", raw(out, threads=2**40)),
        "gradient on pred": ("gradient must not overlap pred", mse_back(out)),
        "gradient of another dtype": (
            "gradient must be float32, got float16",
            mse_back(np.empty(out.shape, np.float16)),
        ),
        "gradient of half": ("gradient must have the shape of pred", mse_back(np.empty((3, 4, 47), np.float32))),
        "gradient of two losses": (r"grad_loss must have shape \[\]", mse_back(out.copy(), np.ones(2, np.float32))),
        "no count": ("targets must be float32, got int64", mse_back(out.copy(), targets=np.ones((), np.int64))),
        "loss on targets": ("loss must not overlap targets", mse(count)),
        "loss of two": (r"loss must have shape \[\]", mse(np.empty(2, np.float32))),
        "targets on pred": ("targets must not overlap pred", mse(targets=out[0, 0, :1].reshape(()))),
        "one end": (r"value_range must have shape \[2, C\] = \[2, 3\]", mse(value_range=np.ones((1, 3), np.float32))),
        "whole ends": ("value_range must be .* got int32", mse(value_range=np.ones((2, 3), np.int32))),
        "no range": ("value_range must have low < high, .* channel 0", mse(value_range=np.ones((2, 3), np.float32))),
        "flat grad": ("grad must have shape", backward(tokens[0])),
        "float64 grad": ("grad must be .* got float64", backward(tokens.double())),
        "no visible grad": (r"visible_tokens must lie in \[1, 3\], got 0", backward(visible_tokens=0)),
        "too many visible grads": (r"visible_tokens must lie in \[1, 3\], got 4", backward(visible_tokens=4)),
        "grads overlap": (
            "grad_visible must not overlap grad_mask_token",
            lambda: _C.assemble_tokens_backward(tokens.numpy(), 1, room[:48].reshape(3, 2, 8), room[40:48]),
        ),
        "scatter sizes": (
            "images is too large",
            lambda: _C.scatter_patches(out, arrays[1], (2**40, 2**40), patch, *arrays[2:], None, 1, out),
        ),
    }


@pytest.mark.parametrize("case", _wrong())
def test_wrong_buffers_are_named(case):
    words, call = _wrong()[case]
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
