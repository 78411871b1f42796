"""linear: oneDNN on a CPU computes what torch's own float32 product does, forward and backward, of any strides."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastmae.ops.backends import using
from fastmae.ops.choices import OF_0_1, TORCHS_OWN, Choice, Choices
from fastmae.ops.cpu import transpose_and_sum
from fastmae.ops.linear import Linear, describe_linear, linear, linear_candidates, linear_choice
from fastmae.torch_compat import onednn_linear

OURS = dict(linear_forward="onednn", linear_input="onednn", linear_weight="onednn-copy")
TAKEN = {
    "oneDNN": OURS,
    "oneDNN without our copy": OURS | {"linear_weight": "onednn"},
    "forward alone": {"linear_forward": "onednn"},
    "input's gradient alone": {"linear_input": "onednn"},
    "weight's gradient alone": {"linear_weight": "onednn-copy"},
}

BY_ROWS = Choices(
    "measured",
    (
        Choice("linear_forward", (7, 24, 40), "float32", "onednn"),
        Choice("linear_forward", (70, 24, 40), "float32", "torch"),
    ),
)


@pytest.fixture(autouse=True)
def _onednn_was_faster():
    with using(choices=Choices.always(**OURS)):
        yield


@pytest.fixture(params=TAKEN)
def who_multiplies(request):
    with using(choices=Choices.always(**TAKEN[request.param])):
        yield


CASES = {
    "of tokens": ((3, 7, 24), (40, 24), True),
    "without bias": ((3, 7, 24), (40, 24), False),
    "of odd widths": ((5, 33), (17, 33), True),
    "of one row": ((1, 1, 8), (8, 8), True),
    "of no rows": ((0, 7, 8), (8, 8), True),
    "of four axes": ((2, 3, 4, 5), (6, 5), True),
}


def draw(shape, weight_shape, has_bias):
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, weight_shape, *([weight_shape[:1]] if has_bias else [])]
    tensors = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    return tensors if has_bias else [*tensors, None]


def results(function, arguments):
    """The output, and the gradients of what has one."""
    wanted = [argument for argument in arguments if argument is not None]
    out = function(*arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def errors(outputs, truths):
    return [((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(outputs, truths, strict=True)]


def assert_as_good_as_torch(arguments):
    truths = results(F.linear, [None if a is None else a.detach().double().requires_grad_() for a in arguments])
    ours, torchs = results(linear, arguments), results(F.linear, arguments)
    assert [a.shape for a in ours] == [a.shape for a in torchs]
    for error, torch_error in zip(errors(ours, truths), errors(torchs, truths), strict=True):
        # Another order of adding up: within a few roundings of what torch makes of it.
        assert error <= 2 * torch_error + 4 * torch.finfo(torch.float32).eps


@pytest.mark.usefixtures("who_multiplies")
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_linear_map(case):
    assert_as_good_as_torch(draw(*CASES[case]))


@pytest.mark.usefixtures("who_multiplies")
def test_arguments_may_have_any_strides():
    x, weight, bias = draw((4, 9, 24), (48, 24), True)
    for x_view in (x[:, 3:], x[::2], x.transpose(0, 1), x[..., :1].expand(-1, -1, 24)):
        for weight_view, bias_view in ((weight[16:], bias[16:]), (weight[:24].T, bias[:24]), (weight, bias)):
            assert_as_good_as_torch([t.detach().requires_grad_() for t in (x_view, weight_view, bias_view)])


def test_a_gradient_that_was_expanded_comes_through():
    x, weight, bias = draw((3, 7, 24), (40, 24), True)
    linear(x, weight, bias).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


def test_onednn_computes_float32_alone_and_nothing_that_torch_was_asked_for():
    x, weight, bias = draw((3, 7, 24), (40, 24), True)

    def is_ours(x, weight, bias):
        return "linear" in type(linear(x, weight, bias).grad_fn).__name__.lower()

    assert is_ours(x, weight, bias)
    assert not is_ours(*(t.double() for t in (x, weight, bias)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
        assert not is_ours(x, weight, bias)
    with using(ops="reference"):
        assert not is_ours(x, weight, bias)
    assert not is_ours(x[0, 0], weight, bias)


def test_torchs_own_is_torchs_function_alone(monkeypatch):
    monkeypatch.setattr("fastmae.ops.linear._linear", None)
    arguments = draw((3, 7, 24), (40, 24), True)
    for choices in (TORCHS_OWN, OF_0_1, Choices.always(attention="cpu"), Choices.always("bfloat16", **OURS)):
        with using(choices=choices):
            for ours, torchs in zip(results(linear, arguments), results(F.linear, arguments), strict=True):
                assert torch.equal(ours, torchs)


def test_each_shape_has_its_own_choice():
    x, weight, bias = draw((10, 7, 24), (40, 24), True)
    with using(choices=BY_ROWS):
        assert linear_choice(7, 24, 40, torch.float32) == ("onednn", "torch", "torch")
        assert linear_choice(70, 24, 40, torch.float32) == ("torch", "torch", "torch")
        assert "linear" in type(linear(x[:1], weight, bias).grad_fn).__name__.lower()
        assert "linear" not in type(linear(x, weight, bias).grad_fn).__name__.lower()


def onednn_of_0_1(x, weight, bias, grad):
    """What version 0.1 computed for a large product: the output and the gradients of x, weight and bias."""
    rows = grad.flatten(0, -2)
    grad_weight = onednn_linear(rows.T.contiguous(), x.flatten(0, -2).T, None)
    grad_x = onednn_linear(grad, weight.T, None)
    return onednn_linear(x, weight, bias), grad_x, grad_weight, transpose_and_sum(rows)[1]


@pytest.mark.parametrize("rows", [(2, 520), (2, 500)], ids=["2**27 and more", "fewer"])
def test_version_0_1_computed_large_products_by_onednn(rows):
    x, weight, bias = draw((*rows, 512), (256, 512), True)
    with using(choices=OF_0_1):
        ours = results(linear, [x, weight, bias])
    grad = torch.randn(*rows, 256, generator=torch.Generator().manual_seed(1))
    if rows[0] * rows[1] * 512 * 256 < 2**27:
        theirs = results(F.linear, [x, weight, bias])
    else:
        with torch.no_grad():
            theirs = onednn_of_0_1(x, weight, bias, grad)
    assert all(map(torch.equal, ours, theirs))


def test_version_0_1_had_torchs_products_where_onednn_is_missing(monkeypatch):
    monkeypatch.setattr("fastmae.ops.linear.ONEDNN", False)
    with using(choices=OF_0_1):
        assert linear_choice(4096, 768, 768, torch.float32) == ("torch", "torch", "torch")
        assert describe_linear(torch.device("cpu"), torch.float32) == "torch"


def test_candidates_are_what_can_run_here(monkeypatch):
    assert linear_candidates("linear_forward", torch.float32) == ("torch", "onednn")
    assert linear_candidates("linear_weight", torch.float32) == ("torch", "onednn", "onednn-copy")
    monkeypatch.setattr("fastmae.ops.linear.ONEDNN", False)
    assert linear_candidates("linear_weight", torch.float32) == ("torch",)


def test_it_is_said_who_multiplies():
    cpu = torch.device("cpu")
    assert describe_linear(cpu, torch.float32) == "torch but for 3 of 3 products, as measured"
    assert describe_linear(cpu, torch.bfloat16) == "torch"
    assert describe_linear(torch.device("cuda"), torch.float32) == "torch"
    with using(choices=OF_0_1):
        assert describe_linear(cpu, torch.float32) == "oneDNN for large products, as in version 0.1"
    with using(choices=TORCHS_OWN):
        assert describe_linear(cpu, torch.float32) == "torch"


def test_only_the_gradients_that_are_needed_are_computed():
    x, weight, bias = draw((3, 7, 24), (40, 24), True)
    for needed in range(3):
        arguments = [t.detach().requires_grad_(index == needed) for index, t in enumerate((x, weight, bias))]
        with FlopCounterMode(display=False) as counter:
            linear(*arguments).sum().backward()
        product = 2 * 3 * 7 * 24 * 40
        assert counter.get_total_flops() == product * (2 if needed < 2 else 1)
        assert [t.grad is not None for t in arguments] == [index == needed for index in range(3)]


def test_the_op_is_one_to_torch():
    arguments = draw((3, 7, 24), (40, 24), True)
    torch.library.opcheck(torch.ops.fastmae.linear.default, (*arguments, *OURS.values()))


def test_it_compiles_into_one_graph():
    arguments = draw((3, 7, 24), (40, 24), True)
    compiled = torch.compile(lambda *a: F.gelu(linear(*a)), fullgraph=True, backend="aot_eager")
    expected = results(lambda *a: F.gelu(linear(*a)), arguments)
    assert all(torch.allclose(a, b) for a, b in zip(results(compiled, arguments), expected, strict=True))


def test_it_compiles_for_sizes_that_are_unknown():
    with using(choices=BY_ROWS):
        compiled = torch.compile(linear, fullgraph=True, backend="eager", dynamic=True)
        for rows, inner in ((7, 24), (9, 24), (70, 24), (200, 24), (7, 48)):
            x, weight, bias = draw((rows, inner), (40, inner), True)
            assert torch.equal(compiled(x, weight, bias), linear(x, weight, bias))


def test_an_exported_program_has_torch_ops_alone():
    program = torch.export.export(Linear(24, 40), (torch.randn(3, 7, 24),))
    assert "fastmae" not in str(program.graph)
