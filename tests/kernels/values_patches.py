"""gather_patches and masked_mse in Triton against float64. Run by test_kernels.py, and on a GPU by tests/gpu.

The rule: a kernel is no further from the truth than torch is in the same dtype, plus a few roundings of float32.
Triton's interpreter truncates to bfloat16 instead of rounding, so there bfloat16 may be a number further away.
"""

import pytest
import torch
from device import DEVICE

from fastmae.kernels.gather_patches import gather_patches_triton
from fastmae.kernels.masked_mse import masked_mse_triton
from fastmae.ops.gather_patches import gather_patches_reference
from fastmae.ops.masked_mse import VARIANCE_EPS, masked_mse_reference
from fastmae.ops.random_masking import random_masking

# (size, patch, channels): published patches, odd ones, one channel and many, patches larger than a chunk.
SHAPES = [
    ((32, 48), (16, 16), 3),
    ((28, 42), (14, 14), 3),
    ((28, 28), (4, 4), 1),
    ((24, 40), (4, 8), 5),
    ((21, 6), (7, 2), 2),
    ((16, 32), (16, 16), 16),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDINGS = 4 * torch.finfo(torch.float32).eps


def sample(size, patch, channels, layout="uint8", N=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, *size, channels), dtype=torch.uint8, generator=generator)
    mean, std = torch.rand(channels, generator=generator), torch.rand(channels, generator=generator) + 0.1
    if layout == "float nchw":
        images = torch.randn(N, channels, *size, generator=generator).permute(0, 2, 3, 1)
        mean, std = torch.zeros(channels), torch.ones(channels)
    elif layout == "cropped":
        wide = torch.zeros(N, size[0] + 3, size[1] + 1, channels + 1, dtype=torch.uint8)
        wide[:, 1:-2, 1:, :channels] = images
        images = wide[:, 1:-2, 1:, :channels]
    L = (size[0] // patch[0]) * (size[1] // patch[1])
    ids = random_masking(torch.arange(N), 1, L)
    return images.to(DEVICE), ids.to(DEVICE), mean.to(DEVICE), std.to(DEVICE), max(1, L // 4)


def assert_as_close(got, same_dtype, truth, unit):
    """``unit`` is the size of the numbers that go into ``truth``, whose float32 roundings are forgiven."""
    assert not got.isnan().any(), "an element was not written"
    allowed = (same_dtype.double() - truth).abs() + ROUNDINGS * (unit + truth.abs())
    eps = torch.finfo(got.dtype).eps
    if got.dtype != torch.float32:  # a float32 rounding may tip the next one to the neighbouring number
        allowed += eps * (truth.abs() + torch.finfo(got.dtype).tiny)
    if got.dtype == torch.bfloat16 and DEVICE == "cpu":
        allowed += eps * truth.abs()
    assert ((got.double() - truth).abs() <= allowed).all()


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Fresh outputs are NaN, so that an element which is never written shows."""
    for name in ("empty", "empty_like"):
        create = getattr(torch, name)

        def poisoned(*args, _create=create, **options):
            fresh = _create(*args, **options)
            return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

        monkeypatch.setattr(torch, name, poisoned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["uint8", "float nchw", "cropped"])
@pytest.mark.parametrize(("size", "patch", "channels"), SHAPES)
def test_gather(size, patch, channels, layout, dtype):
    images, ids, mean, std, K = sample(size, patch, channels, layout)
    for chosen in (ids[:, :K], ids[:, K:].long(), ids[:1, :0]):
        arguments = images[: len(chosen)], chosen, patch, mean, std
        truth = gather_patches_reference(*arguments[:3], mean.double(), std.double(), torch.float64)
        got = gather_patches_triton(*arguments, dtype)
        assert got.dtype == dtype
        assert_as_close(got, gather_patches_reference(*arguments, dtype), truth, 1 / std.min().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("layout", ["uint8", "float nchw", "cropped"])
@pytest.mark.parametrize(("size", "patch", "channels"), SHAPES)
def test_mse(size, patch, channels, layout, norm_pix, dtype):
    images, ids, mean, std, K = sample(size, patch, channels, layout)
    ids = ids[:, K:]
    pixels = patch[0] * patch[1] * channels
    pred = torch.randn(*ids.shape, pixels, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)

    def torch_in(dtype):
        leaf = pred.to(dtype).requires_grad_()
        loss = masked_mse_reference(leaf, images, ids, patch, mean.to(dtype), std.to(dtype), norm_pix)
        loss.backward()
        return loss.detach(), leaf.grad

    true_loss, true_gradient = torch_in(torch.float64)
    same_loss, same_gradient = torch_in(torch.float32)
    loss, gradient = masked_mse_triton(pred, images, ids, patch, mean, std, norm_pix, VARIANCE_EPS)
    assert loss.dtype == torch.float32
    assert abs(loss.double() - true_loss) <= abs(same_loss.double() - true_loss) + ROUNDINGS * true_loss
    assert gradient.dtype == dtype
    assert_as_close(gradient, same_gradient.to(dtype), true_gradient, 2 / std.min().item() / pred.numel())
    again = masked_mse_triton(pred, images, ids, patch, mean, std, norm_pix, VARIANCE_EPS)
    assert torch.equal(loss, again[0])
    assert torch.equal(gradient, again[1])
