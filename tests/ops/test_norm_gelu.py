"""add_layer_norm and gelu as torch ops: definition, gradients, opcheck, compilation; on a CPU, by every implementation.

What the kernels compute is in tests/kernels and test_cpu.py.
"""

import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tools import step_kernels

from fastmae.ops import backends
from fastmae.ops.add_layer_norm import add_layer_norm, add_layer_norm_reference
from fastmae.ops.backends import using
from fastmae.ops.gelu import gelu, gelu_again_and_backward, gelu_backward, gelu_reference


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sample(dtype=torch.float32, branch_dtype=None, D=24):
    """Tokens from the second on, a branch, weight and bias."""
    x, branch = drawn(2, 5, D, dtype=dtype)[:, 1:], drawn(2, 4, D, dtype=branch_dtype or dtype, seed=1)
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        tensor.requires_grad_()
        for tensor in (x, branch, drawn(D, dtype=weights, seed=2), drawn(D, dtype=weights, seed=3))
    ]


def test_a_sum_and_its_norm_by_hand():
    x, branch, weight, bias = sample(torch.float64)
    stream, normed = add_layer_norm(x, branch, weight, bias, 0.5)
    for n in range(2):
        for t in range(4):
            row = x[n, t] + branch[n, t]
            assert torch.equal(stream[n, t], row)
            centred = row - row.sum() / 24
            expected = centred / (centred.square().sum() / 24 + 0.5).sqrt() * weight + bias
            torch.testing.assert_close(normed[n, t], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_branch_bias", [False, True])
@pytest.mark.parametrize("uses", [("stream", "normed"), ("stream",), ("normed",)])
def test_gradients_of_the_norm_are_those_of_finite_differences(uses, has_branch_bias):
    def chosen(x, branch, weight, bias, *added):
        outputs = dict(
            zip(("stream", "normed"), add_layer_norm(x, branch, weight, bias, 1e-2, None, *added), strict=True)
        )
        return tuple(outputs[name] for name in uses)

    added = [drawn(5, dtype=torch.float64, seed=4).requires_grad_()] if has_branch_bias else []
    assert torch.autograd.gradcheck(chosen, [*sample(torch.float64, D=5), *added])


@pytest.mark.parametrize("ops", ["auto", "reference"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2]
)
def test_the_bias_of_a_branch_is_added_before_the_sum_is_rounded(dtypes, ops):
    x, branch, weight, bias = sample(*dtypes)
    added = drawn(24, seed=4).requires_grad_()
    tensors = x, branch, weight, bias, added
    with using(ops=ops):
        outputs = add_layer_norm(*tensors[:4], 1e-6, dtypes[1], added)
        gradients = torch.autograd.grad(outputs, tensors, [torch.ones_like(tensor) for tensor in outputs])
    references = add_layer_norm_reference(*tensors[:4], 1e-6, dtypes[1], added)
    expected = torch.autograd.grad(references, tensors, [torch.ones_like(tensor) for tensor in references])
    assert torch.equal(outputs[0], references[0])
    rtol, atol = (1e-2, 2e-2) if dtypes[1] == torch.bfloat16 else (2e-5, 1e-5)
    for one, other in zip((*outputs, *gradients), (*references, *expected), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
    (frozen,) = torch.autograd.grad(add_layer_norm(*tensors[:4], 1e-6, None, added.detach())[1].sum(), (x,))
    assert frozen.shape == x.shape


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_of_gelu_are_those_of_finite_differences(has_bias):
    h, bias = drawn(2, 3, 5, dtype=torch.float64).requires_grad_(), drawn(5, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(gelu(h, bias), h.add(bias) * torch.special.ndtr(h + bias), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(gelu, (h, bias) if has_bias else (h,))


@pytest.mark.parametrize("ops", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gelu_comes_again_with_its_gradients(has_bias, dtype, ops):
    """The same bits as from the two passes."""
    h, grad, bias = (
        drawn(7, 24, dtype=dtype),
        drawn(7, 24, dtype=dtype, seed=1),
        drawn(24, seed=2) if has_bias else None,
    )
    with using(ops=ops):
        again, *gradients = gelu_again_and_backward(grad, h, bias)
        assert torch.equal(again, gelu(h, bias))
        for one, other in zip(gradients, gelu_backward(grad, h, bias), strict=True):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("ops", ["auto", "reference"])
@pytest.mark.parametrize(
    ("dtype", "branch_dtype", "normed"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes_are_those_that_were_promised(dtype, branch_dtype, normed, ops):
    tensors = sample(dtype, branch_dtype)
    with using(ops=ops):
        outputs = add_layer_norm(*tensors, 1e-6, normed)
        gradients = torch.autograd.grad(outputs, tensors, [torch.ones_like(tensor) for tensor in outputs])
        out = gelu(tensors[1], tensors[3])
        gelu_gradients = torch.autograd.grad(out.sum(), (tensors[1], tensors[3]))
    assert [tensor.dtype for tensor in outputs] == [dtype, normed]
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in tensors]
    assert (out.dtype, [gradient.dtype for gradient in gelu_gradients]) == (branch_dtype, [branch_dtype, torch.float32])
    references = add_layer_norm_reference(*tensors, 1e-6, normed)
    expected = torch.autograd.grad(references, tensors, [torch.ones_like(tensor) for tensor in references])
    rtol, atol = (1e-2, 2e-2) if normed == torch.bfloat16 else (2e-5, 1e-5)
    got, right = [*outputs, *gradients, out], [*references, *expected, gelu_reference(*tensors[1::2])]
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("ops", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
def test_they_are_well_behaved_torch_ops(ops):
    named = torch.ops.fastmae
    tensors = sample(torch.float32, torch.bfloat16)
    with using(ops=ops):
        arguments = *tensors[:2], tensors[3], *tensors[2:], 1e-6, torch.bfloat16
        torch.library.opcheck(named.add_layer_norm.default, arguments)
        stream, normed, mean, rstd = (t.detach() for t in named.add_layer_norm(*arguments))
        for grad_stream, branch_dtype in ((None, torch.bfloat16), (torch.ones_like(stream), torch.float32)):
            arguments = grad_stream, normed, stream, tensors[2].detach(), mean, rstd, branch_dtype, grad_stream is None
            torch.library.opcheck(named.add_layer_norm_backward.default, arguments)
    for bias in (None, tensors[3]):
        with using(ops=ops):
            torch.library.opcheck(named.gelu.default, (tensors[0], bias))
            arguments = normed, tensors[1].detach(), None if bias is None else bias.detach(), bias is not None
            torch.library.opcheck(named.gelu_backward.default, arguments)


def test_they_compile_to_one_graph_under_autocast():
    tensors = sample(torch.float32, torch.bfloat16)
    matrix = drawn(24, 24, seed=4)

    def run(x, branch, weight, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            stream, normed = add_layer_norm(x, branch, weight, bias, 1e-6, torch.bfloat16, weight)
            return (stream + gelu(F.linear(normed, matrix), bias)).square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(function(*tensors), tensors) for function in (run, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_models_take_them_on_a_gpu_and_torchs_own_on_a_cpu_unless_they_were_faster():
    x, on_a_gpu = torch.ones(4, 8), types.SimpleNamespace(device=torch.device("cuda"))
    for op in ("add_layer_norm", "gelu"):
        assert not backends.uses_fused(op, x, torch.float32)
        with using(choices=backends.Choices.always("float32", **{op: "cpu"})):
            assert backends.uses_fused(op, x, torch.float32)
            assert not backends.uses_fused(op, x, torch.bfloat16)
            assert not backends.uses_fused(op, x, torch.float64)
            with using(ops="reference"):
                assert not backends.uses_fused(op, x, torch.float32)
        assert backends.uses_fused(op, on_a_gpu, torch.bfloat16)
        with using(ops="reference"):
            assert not backends.uses_fused(op, on_a_gpu, torch.bfloat16)


X, BRANCH, W, B = (tensor.detach() for tensor in sample())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X.long(), BRANCH, W, B), "x must be floating point"),
        ((X, BRANCH.long(), W, B), "branch must be floating point"),
        ((X[0, 0, 0], BRANCH, W, B), r"x must have shape \[\.\.\., D\]"),
        ((X[..., :0], BRANCH[..., :0], W[:0], B[:0]), "with D ≥ 1"),
        ((X, BRANCH[:1], W, B), r"branch must have the shape of x, \[2, 4, 24\], got \[1, 4, 24\]"),
        ((X, BRANCH, W[:3], B), r"weight must have shape \[24\], got \[3\]"),
        ((X, BRANCH, W, B[None]), r"bias must have shape \[24\], got \[1, 24\]"),
        ((X, BRANCH.to("meta"), W, B), "branch must be on the device of x"),
        ((X, BRANCH, W, B, 1e-6, None, B[:3]), r"branch_bias must have shape \[24\], got \[3\]"),
        ((X, BRANCH, W, B, 1e-6, None, B.long()), "branch_bias must be floating point"),
    ],
)
def test_wrong_arguments_of_the_norm_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        add_layer_norm(*(*arguments, 1e-6) if len(arguments) == 4 else arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X.long(),), "h must be floating point"),
        ((X[0, 0, 0],), r"h must have shape \[\.\.\., F\], got \[\]"),
        ((X, W.long()), "bias must be floating point"),
        ((X, W[:3]), r"bias must have shape \[24\], got \[3\]"),
        ((X, W.to("meta")), "bias must be on the device of h"),
    ],
)
def test_wrong_arguments_of_gelu_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        gelu(*arguments)


def test_the_docs_say_what_a_block_launches_and_moves():
    table = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    assert step_kernels.table() in table
