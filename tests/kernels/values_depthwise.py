"""depthwise_visible in Triton against float64. Run by test_kernels.py, and on a GPU by tests/gpu."""

import torch
from device import DEVICE
from truth import assert_as_close, poison  # noqa: F401

from fastmae.kernels.depthwise_visible import depthwise_visible_triton, depthwise_visible_weights_triton
from fastmae.ops.depthwise_visible import depthwise_visible_reference, slots_of


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(N, grid, K, s, C, dtype):
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(grid[0] * grid[1], generator=generator)[:K] for _ in range(N)]).to(DEVICE)
    slots, x, grad = slots_of(ids, grid), drawn(N, K, s, s, C, dtype=dtype), drawn(N, K, s, s, C, dtype=dtype, seed=1)
    weight, bias = drawn(C, 1, 7, 7, seed=2), drawn(C, seed=4)
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    truth = depthwise_visible_reference(exact[0], slots, *exact[1:])
    of_x, of_weight, of_bias = torch.autograd.grad(truth, exact, grad.double())
    out = depthwise_visible_triton(x, slots, ids, weight, bias)
    assert out.dtype == dtype
    size = float(weight.abs().sum(dim=(1, 2, 3)).max()) * float(x.abs().max())
    assert_as_close(out, truth.detach().to(dtype), truth.detach(), size)
    turned = depthwise_visible_triton(grad, slots, ids, weight, None, turned=True)
    assert_as_close(turned, of_x.to(dtype), of_x, size)
    sums = depthwise_visible_weights_triton(x, grad, slots, ids)
    expected = torch.cat((of_weight.flatten(1).T, of_bias[None]))
    assert_as_close(sums, expected.float(), expected, float(x.abs().max() * grad.abs().sum(dim=(0, 1, 2, 3)).max()))


def test_two_cells_beside_a_masked_one():
    check(1, (1, 3), 2, 2, 18, torch.bfloat16)


def test_no_images_at_all():
    x, slots, ids = drawn(0, 2, 4, 4, 16), torch.zeros(0, 2, 2, dtype=torch.int32), torch.zeros(0, 2, dtype=torch.int32)
    assert depthwise_visible_triton(x, slots, ids, drawn(16, 1, 7, 7), None).shape == x.shape
    sums = depthwise_visible_weights_triton(x, x, slots, ids)
    assert sums.shape == (50, 16)
    assert not sums.any()
