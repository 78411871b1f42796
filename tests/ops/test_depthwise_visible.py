"""depthwise_visible against the convolution of the whole map with masked cells zero, by every implementation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae import _C
from fastmae.ops import cpu, differentiable
from fastmae.ops.backends import using
from fastmae.ops.depthwise_visible import depthwise_visible, slots_of, visible_cells, whole_map


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def masked(N, grid, K, seed=0):
    """Numbers of visible cells [N, K], in the order in which a mask draws them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(grid[0] * grid[1], generator=generator)[:K] for _ in range(N)])


def case(N=2, grid=(3, 4), K=5, s=2, C=6, dtype=torch.float32, seed=0):
    """Whole maps [N, H, W, C], the visible cells of each, weight and bias."""
    whole = drawn(N, grid[0] * s, grid[1] * s, C, dtype=dtype, seed=seed)
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        whole,
        masked(N, grid, K, seed),
        drawn(C, 1, 7, 7, dtype=weights, seed=seed + 1) / 7,
        drawn(C, dtype=weights, seed=seed + 2),
    )


def cut(whole, ids, s):
    """The cells [N, K, s, s, C] of whole maps, one by one."""
    across = whole.shape[2] // s
    images = []
    for image, cells in zip(whole, ids.tolist(), strict=True):
        rows = [slice(s * (cell // across), s * (cell // across) + s) for cell in cells]
        columns = [slice(s * (cell % across), s * (cell % across) + s) for cell in cells]
        images.append(torch.stack([image[pair] for pair in zip(rows, columns, strict=True)]))
    return torch.stack(images)


def truth(whole, ids, s, weight, bias):
    """Masks the map, convolves it and cuts out the visible cells: all in float64."""
    mask = torch.zeros(whole.shape[:3], dtype=torch.float64)
    across = whole.shape[2] // s
    for n, cells in enumerate(ids.tolist()):
        for cell in cells:
            mask[n, s * (cell // across) :, s * (cell % across) :][:s, :s] = 1
    seen = (whole.double() * mask[..., None]).permute(0, 3, 1, 2)
    added = None if bias is None else bias.double()
    out = F.conv2d(seen, weight.double(), added, padding=3, groups=weight.shape[0])
    return cut(out.permute(0, 2, 3, 1), ids, s)


@pytest.fixture
def loops(request):
    """Runs a test with the loops of another instruction set."""
    before = _C.instruction_set()
    yield _C.set_instruction_set
    _C.set_instruction_set(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def grid_of(whole, s):
    return whole.shape[1] // s, whole.shape[2] // s


def test_slots_name_the_place_of_every_visible_cell():
    slots = slots_of(torch.tensor([[4, 0, 5], [1, 2, 3]]), (2, 3))
    assert slots.tolist() == [[[1, -1, -1], [-1, 0, 2]], [[-1, 0, 1], [2, -1, -1]]]
    assert slots.dtype == torch.int32


def test_a_map_and_its_visible_cells_are_inverse():
    whole, ids, *_ = case()
    cells, slots = cut(whole, ids, 2), slots_of(ids, grid_of(whole, 2))
    again = whole_map(cells, slots)
    assert torch.equal(visible_cells(again, slots, 5), cells)
    assert int((again != 0).sum()) == cells.numel()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    share=st.floats(0, 1),
    s=st.sampled_from([1, 2, 3, 4, 8]),
    C=st.one_of(st.integers(1, 70), st.integers(128, 150)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    biased=st.booleans(),
    ops=st.sampled_from(["auto", "reference"]),
)
def test_any_grid_mask_and_width(grid, share, s, C, dtype, biased, ops):
    """Values and all three gradients are those of the whole masked map, to roundings of the dtype."""
    K = max(1, round(share * grid[0] * grid[1]))
    whole, ids, weight, bias = case(2, grid, K, s, C, dtype, seed=7)
    bias = bias if biased else None
    leaves = [tensor.requires_grad_() for tensor in (cut(whole, ids, s), weight, bias) if tensor is not None]
    with using(ops=ops):
        out = depthwise_visible(leaves[0], slots_of(ids, grid), *leaves[1:])
        grad = drawn(*out.shape, dtype=dtype, seed=5)
        gradients = torch.autograd.grad(out, leaves, grad)
    assert [tensor.dtype for tensor in (out, *gradients)] == [dtype, *(leaf.dtype for leaf in leaves)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (whole, weight, bias) if tensor is not None]
    right = truth(exact[0], ids, s, exact[1], exact[2] if biased else None)
    of_whole, *expected = torch.autograd.grad(right, exact, grad.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6}.get(dtype, 1e-2)
    for one, other in zip((out, *gradients), (right, cut(of_whole, ids, s), *expected), strict=True):
        size = max(1.0, float(other.detach().abs().max()))
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("name", _C.instruction_sets())
@pytest.mark.parametrize(("s", "C"), [(8, 40), (8, 16), (4, 80), (4, 33), (2, 160), (2, 61), (1, 320), (1, 17)])
def test_every_instruction_set_and_any_number_of_threads(name, s, C, loops, threads):
    """Whole blocks of channels and those that overlap; the same bits by one thread as by three."""
    whole, ids, weight, bias = case(5, (3, 3), 4, s, C)
    x, slots = cut(whole, ids, s), slots_of(ids, (3, 3))
    grad = drawn(*x.shape, seed=8)

    def results():
        gradients = cpu.depthwise_visible(grad, slots, weight, None, turned=True)
        return cpu.depthwise_visible(x, slots, weight, bias), gradients, cpu.depthwise_visible_weights(x, grad, slots)

    loops(name)
    threads(1)
    out, of_x, sums = results()
    threads(3)
    assert all(map(torch.equal, results(), (out, of_x, sums)))
    exact = [tensor.double().requires_grad_() for tensor in (whole, weight, bias)]
    right = truth(exact[0], ids, s, *exact[1:])
    of_whole, of_weight, of_bias = torch.autograd.grad(right, exact, grad.double())
    expected = right, cut(of_whole, ids, s), torch.cat((of_weight.flatten(1).T, of_bias[None]))
    for one, other in zip((out, of_x, sums), expected, strict=True):
        size = float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other.detach(), rtol=2e-6, atol=2e-6 * size)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (1, 2), (0, 1)])
def test_only_the_gradients_that_are_wanted(frozen):
    whole, ids, weight, bias = case()
    leaves = [cut(whole, ids, 2), weight, bias]
    slots = slots_of(ids, grid_of(whole, 2))
    every = [leaf.clone().requires_grad_() for leaf in leaves]
    depthwise_visible(every[0], slots, *every[1:]).square().sum().backward()
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number not in frozen)
    depthwise_visible(leaves[0], slots, *leaves[1:]).square().sum().backward()
    for number, (one, other) in enumerate(zip(leaves, every, strict=True)):
        assert one.grad is None if number in frozen else torch.equal(one.grad, other.grad)


def test_gradients_are_those_of_finite_differences():
    whole, ids, weight, bias = case(1, (2, 2), 3, 1, 2, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (cut(whole, ids, 1), weight, bias)]
    slots = slots_of(ids, (2, 2))

    def op(x, weight, bias):
        return depthwise_visible(x, slots, weight, bias)

    assert torch.autograd.gradcheck(op, leaves)
    with differentiable():
        assert torch.autograd.gradgradcheck(op, leaves)


CHEAP = ("test_schema", "test_autograd_registration", "test_faketensor")  # the rest traces graphs


@pytest.mark.parametrize("checks", [CHEAP, pytest.param((*CHEAP, "test_aot_dispatch_dynamic"), marks=pytest.mark.slow)])
def test_the_ops_are_what_torch_expects(checks):
    whole, ids, weight, bias = case(dtype=torch.bfloat16)
    slots, x = slots_of(ids, grid_of(whole, 2)), cut(whole, ids, 2)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    torch.library.opcheck(
        torch.ops.fastmae.depthwise_visible.default, (tensors[0], slots, *tensors[1:]), test_utils=checks
    )
    backward, grad = torch.ops.fastmae.depthwise_visible_backward.default, drawn(*x.shape, dtype=torch.bfloat16)
    for wanted in ([True, True], [False, True]):
        torch.library.opcheck(backward, (grad, x.detach(), slots, weight.detach(), wanted), test_utils=checks)


@pytest.mark.parametrize("ops", ["auto", "reference"])
@pytest.mark.parametrize(
    "slots",
    [
        [[0, 1, 1, -1]],  # one cell twice
        [[0, 1, -1, -1]],  # one too few
        [[0, 1, 2, 3]],  # one too many
        [[0, 1, 2, -2]],
        [[0, 1, 2**31 - 1, -1]],
    ],
)
def test_slots_that_are_not_the_cells_are_refused(slots, ops):
    x, weight = drawn(1, 3, 2, 2, 4), drawn(4, 1, 7, 7)
    with using(ops=ops), pytest.raises(ValueError, match=r"^slots must hold each of 0 … 2 once for each image"):
        depthwise_visible(x, torch.tensor(slots).view(1, 2, 2), weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 3, 2, 4, 4)}, "x must have shape"),
        ({"x": torch.zeros(1, 3, 2, 2, 4, dtype=torch.int32)}, "x must be floating point"),
        ({"slots": torch.zeros(1, 2, 2)}, "slots must be int32 or int64"),
        ({"slots": torch.zeros(2, 2, 2, dtype=torch.int32)}, "slots must have shape"),
        ({"weight": torch.zeros(4, 1, 5, 5)}, "weight must have shape"),
        ({"bias": torch.zeros(3)}, "bias must have shape"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"x": drawn(1, 3, 2, 2, 4), "slots": slots_of(torch.tensor([[0, 2, 3]]), (2, 2))}
    arguments |= {"weight": drawn(4, 1, 7, 7), "bias": drawn(4)}
    with pytest.raises(ValueError, match=message):
        depthwise_visible(**arguments | change)


def test_the_extension_names_wrong_arguments():
    x, weight = np.zeros((2, 3, 4, 16), np.float32), np.zeros((16, 49), np.float32)
    slots, bias = np.arange(3, dtype=np.int32).reshape(1, 1, 3).repeat(2, 0), np.zeros(16, np.float32)

    def forward(x=x, slots=slots, weight=weight, bias=bias, out=None):
        return lambda: _C.depthwise_visible(x, slots, weight, bias, False, 1, np.empty_like(x) if out is None else out)

    def backward(x=x, grad=x, slots=slots, sums=None):
        sums = np.empty((50, 16), np.float32) if sums is None else sums
        return lambda: _C.depthwise_visible_weights(x, grad, slots, 1, sums)

    wrong = {
        "x must have cells of 1, 2, 4 or 8 positions": forward(x=np.zeros((2, 3, 9, 16), np.float32)),
        r"at least 16 channels, got shape \[2, 3, 4, 8\]": forward(x=np.zeros((2, 3, 4, 8), np.float32)),
        "x must be contiguous": forward(x=np.zeros((2, 3, 4, 32), np.float32)[..., ::2]),
        "x must be .* got float64": forward(x=x.astype(float)),
        r"x must have shape \[N, K, s·s, C\]": forward(x=x[0]),
        "slots must be int32, int64": forward(slots=slots.astype(np.float32)),
        "slots must have 2 rows": forward(slots=slots[:1]),
        "slots must hold each of 0 … 2 once .* image 1 does not": backward(slots=np.stack((slots[0], 0 * slots[0]))),
        "slots must hold each": forward(slots=slots[..., :2]),
        r"weight must have shape \[C, 49\]": forward(weight=weight[:, :48]),
        r"bias must have shape \[C\]": forward(bias=bias[1:]),
        "out must be float32, got float16": forward(out=x.astype(np.float16)),
        "out must not overlap x": forward(out=x),
        "grad must have the shape of x": backward(grad=x[:1]),
        "grad must be float32, got float16": backward(grad=x.astype(np.float16)),
        r"sums must have shape \[50, C\]": backward(sums=np.empty((49, 16), np.float32)),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_batch_may_be_empty():
    x = torch.zeros(0, 3, 2, 2, 16, requires_grad=True)
    weight, bias = (torch.ones(shape, requires_grad=True) for shape in ((16, 1, 7, 7), (16,)))
    out = depthwise_visible(x, torch.zeros(0, 2, 2, dtype=torch.int32), weight, bias)
    assert out.shape == x.shape
    out.sum().backward()
    assert not weight.grad.any()
    assert not bias.grad.any()
