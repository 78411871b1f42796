"""bfloat16 products: those of autocast with copies of the weights, or computed in float32 on a CPU that is slow."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastmae.model.weight_copies import WeightCopies
from fastmae.ops.backends import using
from fastmae.ops.choices import Choices
from fastmae.ops.linear import Linear, linear, linear_candidates, reads_copies
from fastmae.ops.linear_bf16 import linear_bf16
from fastmae.torch_compat import product_in_float32

OPS = ("linear_forward", "linear_input", "linear_weight")
IN_FLOAT32 = dict.fromkeys(OPS, "float32")
EVERY_MIX = [dict(zip(OPS, taken, strict=True)) for taken in itertools.product(("torch", "float32"), repeat=3)]


def draw(shape=(3, 7, 24), outer=40, has_bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(outer, shape[-1], generator=generator, requires_grad=True)
    return x, weight, torch.randn(outer, generator=generator, requires_grad=True) if has_bias else None


def copies_of(weight, bias):
    return weight.detach().bfloat16(), None if bias is None else bias.detach().bfloat16()


def results(function, arguments, autocast=True):
    """The output, and the gradients of what has one."""
    wanted = [argument for argument in arguments if argument is not None]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        out = function(*arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 24), (5, 33), (2, 3, 4, 5), (0, 7, 8), (1, 1, 8)], ids=str)
def test_with_copies_it_has_the_bits_of_autocast(shape, has_bias, dtype):
    arguments = draw(shape, 17, has_bias, dtype)
    copies = copies_of(*arguments[1:])
    ours, torchs = results(lambda *a: linear(*a, copies), arguments), results(F.linear, arguments)
    for one, other in zip(ours, torchs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("with_copies", [True, False])
@pytest.mark.parametrize("taken", EVERY_MIX, ids=lambda taken: "-".join(taken.values()))
def test_each_product_is_computed_as_chosen(taken, with_copies):
    """What is torch's has its bits; what is computed in float32 is at least as near to the truth, and has its dtype."""
    arguments = draw(dtype=torch.bfloat16)
    copies = copies_of(*arguments[1:]) if with_copies else None
    truths = results(F.linear, [t.detach().double().requires_grad_() for t in arguments], autocast=False)
    torchs = results(F.linear, arguments)
    with using(choices=Choices.always("bfloat16", **taken)):
        ours = results(lambda *a: linear(*a, copies), arguments)
    bias_by = "float32" if "float32" in (taken["linear_input"], taken["linear_weight"]) else "torch"
    for by, got, expected, truth in zip((*taken.values(), bias_by), ours, torchs, truths, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected) == (by == "torch")
        assert (got.double() - truth).norm() <= (expected.double() - truth).norm()


def test_in_float32_copies_are_not_read_and_not_made():
    x, weight, bias = draw()
    poison = torch.full_like(weight, torch.nan, dtype=torch.bfloat16), torch.full((40,), torch.nan).bfloat16()
    cpu = torch.device("cpu")
    assert reads_copies(cpu)
    with using(choices=Choices.always("bfloat16", **IN_FLOAT32 | {"linear_weight": "torch"})):
        assert all(result.isfinite().all() for result in results(lambda *a: linear(*a, poison), (x, weight, bias)))
        assert not reads_copies(cpu)
        assert reads_copies(torch.device("cuda"))
        layer = Linear(3, 4)
        copies = WeightCopies(layer)
        copies.write()
        with copies.in_use():
            assert layer.copies is None
    for taken in EVERY_MIX[:-2]:
        with using(choices=Choices.always("bfloat16", **taken)):
            assert reads_copies(cpu), taken
    with using(choices=Choices.always("float32", linear_forward="onednn")):
        assert reads_copies(cpu)


def test_nothing_is_rounded_before_a_product_in_float32_that_comes_in_float32():
    x, weight, bias = draw()
    with using(choices=Choices.always("bfloat16", linear_forward="float32")):
        out = results(linear, (x, weight, bias))[0]
    assert torch.equal(out, F.linear(x, weight, bias).bfloat16())


def test_the_choice_is_for_bfloat16_alone():
    x, weight, bias = draw()
    with using(choices=Choices.always("bfloat16", **IN_FLOAT32)):
        for ours, torchs in zip(results(linear, draw(), False), results(F.linear, draw(), False), strict=True):
            assert torch.equal(ours, torchs)
        with torch.autocast("cpu", torch.float16):
            assert linear(x.to(torch.float16), weight, bias).dtype == torch.float16
        with using(ops="reference"):
            assert all(map(torch.equal, results(linear, draw()), results(F.linear, draw())))
    assert linear_candidates("linear_weight", torch.bfloat16) == ("torch", "float32")


@pytest.mark.parametrize("taken", [EVERY_MIX[0], EVERY_MIX[-1]], ids=["torch", "float32"])
def test_only_the_gradients_that_are_needed_are_computed(taken):
    copies = copies_of(*draw()[1:])
    for needed in range(3):
        arguments = [t.detach().requires_grad_(index == needed) for index, t in enumerate(draw())]
        with using(choices=Choices.always("bfloat16", **taken)), FlopCounterMode(display=False) as counter:
            with torch.autocast("cpu", torch.bfloat16):
                out = linear(*arguments, copies)
            out.sum().backward()
        assert counter.get_total_flops() == 2 * 3 * 7 * 24 * 40 * (2 if needed < 2 else 1)
        assert [t.grad is not None for t in arguments] == [index == needed for index in range(3)]


@pytest.mark.parametrize("with_copies", [True, False])
@pytest.mark.parametrize("taken", [EVERY_MIX[0], EVERY_MIX[3], EVERY_MIX[-1]], ids=["torch", "mixed", "float32"])
def test_it_compiles_into_one_graph(taken, with_copies):
    arguments = draw()
    copies = copies_of(*arguments[1:]) if with_copies else None
    with using(choices=Choices.always("bfloat16", **taken)):
        torch.compiler.reset()
        compiled = torch.compile(lambda *a: F.gelu(linear(*a, copies)), fullgraph=True, backend="aot_eager")
        expected = results(lambda *a: F.gelu(linear(*a, copies)), arguments)
        assert all(map(torch.equal, results(compiled, arguments), expected))


def test_a_gradient_of_a_gradient_is_refused():
    x, weight = torch.randn(3, 4), nn.Parameter(torch.randn(5, 4))
    y = linear_bf16(x, weight, None, (weight.detach().bfloat16(), None))
    (gradient,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_copy_that_changes_between_forward_and_backward_is_noticed():
    x, weight = torch.randn(3, 4, requires_grad=True), nn.Parameter(torch.randn(5, 4))
    copies = weight.detach().bfloat16(), None
    y = linear_bf16(x, weight, None, copies)
    copies[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_on_a_gpu_a_product_leaves_in_float32():
    """Traced on tensors without memory: one operation, and no cast."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        a, b = (torch.empty(8, 8, dtype=torch.bfloat16, device=device) for device in ("cuda:0", "cuda:0"))
        product = product_in_float32(a, b)
    assert (product.dtype, product.device.type) == (torch.float32, "cuda")
    assert list(counter.get_flop_counts()["Global"]) == [torch.ops.aten.mm]
