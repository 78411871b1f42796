"""depthwise_visible against the convolution of the whole map with masked cells zero, by every implementation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae.ops import differentiable
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
    C=st.integers(1, 70),
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


def test_the_ops_are_what_torch_expects():
    whole, ids, weight, bias = case(dtype=torch.bfloat16)
    slots, x = slots_of(ids, grid_of(whole, 2)), cut(whole, ids, 2)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    torch.library.opcheck(torch.ops.fastmae.depthwise_visible.default, (tensors[0], slots, *tensors[1:]))
    backward, grad = torch.ops.fastmae.depthwise_visible_backward.default, drawn(*x.shape, dtype=torch.bfloat16)
    for wanted in ([True, True], [False, True]):
        torch.library.opcheck(backward, (grad, x.detach(), slots, weight.detach(), wanted))


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
