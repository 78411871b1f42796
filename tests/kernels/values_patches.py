"""gather_patches, masked_mse and scatter_patches in Triton against float64.

Run by test_kernels.py, and on a GPU by tests/gpu.
"""

import itertools

import pytest
import torch
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import ROUNDINGS, assert_as_close, poison  # noqa: F401

from fastmae.kernels.gather_patches import gather_patches_triton
from fastmae.kernels.masked_mse import masked_mse_backward_triton, masked_mse_triton
from fastmae.kernels.scatter_patches import scatter_patches_triton
from fastmae.ops.gather_patches import gather_patches_reference
from fastmae.ops.masked_mse import VARIANCE_EPS, masked_mse_reference
from fastmae.ops.random_masking import random_masking
from fastmae.ops.scatter_patches import scatter_patches_reference

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


def loss_and_gradient(pred, *others, grad_loss=1.0, **more):
    """Of masked_mse, whose gradient is that of the loss times ``grad_loss``."""
    loss, targets = masked_mse_triton(pred, *others, **more, eps=VARIANCE_EPS)
    slope = torch.tensor(grad_loss, device=pred.device)
    return loss, masked_mse_backward_triton(slope, targets, pred, *others, **more, eps=VARIANCE_EPS)


def sample(size, patch, channels, layout="uint8", N=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, *size, channels), dtype=torch.uint8, generator=generator)
    mean, std = torch.rand(channels, generator=generator), torch.rand(channels, generator=generator) + 0.1
    if layout == "uint16":
        images = torch.randint(0, 65536, images.shape, generator=generator).to(torch.uint16)
    elif layout == "float nchw":
        images = torch.randn(N, channels, *size, generator=generator).permute(0, 2, 3, 1)
        mean, std = torch.zeros(channels), torch.ones(channels)
    elif layout == "cropped":
        wide = torch.zeros(N, size[0] + 3, size[1] + 1, channels + 1, dtype=torch.uint8)
        wide[:, 1:-2, 1:, :channels] = images
        images = wide[:, 1:-2, 1:, :channels]
    L = (size[0] // patch[0]) * (size[1] // patch[1])
    ids = random_masking(torch.arange(N), 1, L)
    return images.to(DEVICE), ids.to(DEVICE), mean.to(DEVICE), std.to(DEVICE), max(1, L // 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["uint8", "uint16", "float nchw", "cropped"])
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
    loss, gradient = loss_and_gradient(pred, images, ids, patch, mean, std, norm_pix)
    assert loss.dtype == torch.float32
    assert abs(loss.double() - true_loss) <= abs(same_loss.double() - true_loss) + ROUNDINGS * true_loss
    assert gradient.dtype == dtype
    assert_as_close(gradient, same_gradient.to(dtype), true_gradient, 2 / std.min().item() / pred.numel())
    again = loss_and_gradient(pred, images, ids, patch, mean, std, norm_pix)
    assert torch.equal(loss, again[0])
    assert torch.equal(gradient, again[1])


def test_mse_of_a_strided_prediction():
    images, ids, mean, std, K = sample((28, 42), (14, 14), 3)
    pred = torch.randn(3, 588, ids.shape[1] - K, generator=torch.Generator().manual_seed(2)).to(DEVICE).mT
    arguments = images, ids[:, K:], (14, 14), mean, std, True
    for got, expected in zip(
        loss_and_gradient(pred, *arguments), loss_and_gradient(pred.contiguous(), *arguments), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [(torch.float32, torch.uint16), *itertools.product(DTYPES, [torch.uint8, *DTYPES])],
)
@pytest.mark.parametrize(("size", "patch", "channels"), SHAPES)
def test_scatter(size, patch, channels, given_dtype, dtype):
    _, ids, mean, std, K = sample(size, patch, channels)
    grid = size[0] // patch[0], size[1] // patch[1]
    for chosen in (ids[:, K:].long(), ids, ids[:0, :1]):
        generator = torch.Generator().manual_seed(3)
        patches = torch.randn(*chosen.shape, patch[0] * patch[1] * channels, generator=generator)
        patches = patches.to(DEVICE, given_dtype)
        got = scatter_patches_triton(patches, chosen, grid, patch, mean, std, dtype)
        arguments = chosen, grid, patch
        if not dtype.is_floating_point:
            assert torch.equal(got, scatter_patches_reference(patches, *arguments, mean, std, dtype))
        else:
            truth = scatter_patches_reference(patches.double(), *arguments, mean.double(), std.double(), torch.float64)
            assert_as_close(got, scatter_patches_reference(patches, *arguments, mean, std, dtype), truth, 4.0)


def test_scatter_clamps_and_gives_nan_a_place():
    patches = torch.tensor([-1e30, -0.1, 0.5 / 255, 1.5 / 255, 0.5, 1.1, float("inf"), float("nan")])
    patches = patches.view(1, 1, 8).to(DEVICE)
    mean, std = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
    ids = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    got = scatter_patches_triton(patches, ids, (1, 1), (2, 4), mean, std, torch.uint8)
    assert got.flatten().tolist() == [0, 0, 0, 2, 128, 255, 255, 0]


@settings(max_examples=15, deadline=None)
@given(
    gh=st.integers(1, 4), gw=st.integers(1, 4), ph=st.integers(1, 5), pw=st.integers(1, 5), channels=st.integers(1, 16),
    layout=st.sampled_from(["uint8", "uint16", "float nchw", "cropped", "flipped", "expanded"]), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_shape_and_strides(gh, gw, ph, pw, channels, layout, seed):
    images, ids, mean, std, _ = sample((gh * ph, gw * pw), (ph, pw), channels, layout, N=2)
    if layout == "flipped":
        images = images.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "expanded":
        images, mean = images[:1].expand(2, -1, -1, -1), mean[:1].expand(channels)
    ids = ids[:, seed % ids.shape[1] :]
    arguments = images, ids, (ph, pw)
    truth = gather_patches_reference(*arguments, mean.double(), std.double(), torch.float64)
    got = gather_patches_triton(*arguments, mean, std, torch.float32)
    assert_as_close(got, gather_patches_reference(*arguments, mean, std, torch.float32), truth, 1 / std.min().item())
    pred = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    expected = masked_mse_reference(pred.double(), *arguments, mean.double(), std.double(), False)
    loss, _ = masked_mse_triton(pred, *arguments, mean, std, False, eps=VARIANCE_EPS)
    assert abs(loss.double() - expected) <= 2 * ROUNDINGS * (expected + 1 / std.min().item())


# (size, patch, channels) of images with a range: few and many channels, odd patches, larger than a tile.
RANGED = [((8, 12), (4, 4), 1), ((21, 6), (7, 2), 3), ((6, 10), (3, 5), 13), ((4, 10), (4, 5), 256)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize(("size", "patch", "channels"), RANGED)
def test_ranges_and_missing_pixels(size, patch, channels, dtype):
    """0 is missing too, the number that loads beyond the ends of a patch give."""
    generator = torch.Generator().manual_seed(4)
    share = torch.rand(3, *size, channels, generator=generator) + 0.01
    images = (share if dtype.is_floating_point else (share * 200).clamp(1, 255)).to(dtype)
    if dtype == torch.uint16:
        images = (share * 60_000).to(dtype)
    images[0, 0, 0, 0] = images[2, -1, -1, -1] = 0
    if dtype.is_floating_point:
        images[2, 0, -1, 0] = float("nan")
    value_range = torch.stack(
        [-torch.rand(channels, generator=generator), torch.rand(channels, generator=generator) + 1]
    )
    value_range *= {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 1)
    _, ids, mean, std, _ = sample(size, patch, channels)
    images, value_range = images.to(DEVICE), value_range.to(DEVICE)
    more = dict(value_range=value_range, nodata=0.0)
    arguments = images, ids, patch, mean, std
    double = {**more, "value_range": value_range.double()}
    truth = gather_patches_reference(*arguments[:3], mean.double(), std.double(), torch.float64, **double)
    got = gather_patches_triton(*arguments, torch.float32, **more)
    unit = 2 / std.min().item()
    assert_as_close(got, gather_patches_reference(*arguments, torch.float32, **more), truth, unit)
    absent = (images.double() == 0) | images.double().isnan()
    places = gather_patches_reference(absent.float(), ids, patch, 0 * mean, 0 * std + 1, torch.float32) == 1
    assert (got == 0)[places].all()
    excluded = places.any(dim=2)
    assert 0 < excluded.sum() < excluded.numel()

    pred = torch.randn(truth.shape, generator=generator).to(DEVICE)
    poisoned = pred.masked_fill(excluded[:, :, None], float("nan"))
    loss, gradient = loss_and_gradient(poisoned, *arguments, True, **more, grad_loss=0.3)

    def torch_in(compute, more):
        leaf = pred.to(compute).requires_grad_()
        loss = masked_mse_reference(leaf, *arguments[:3], mean.to(compute), std.to(compute), True, **more)
        (0.3 * loss).backward()
        return loss.detach(), leaf.grad

    (true_loss, true_gradient), (same_loss, same_gradient) = (
        torch_in(torch.float64, double),
        torch_in(torch.float32, more),
    )
    assert abs(loss - true_loss) <= abs(same_loss - true_loss) + 2 * ROUNDINGS * true_loss
    assert_as_close(gradient, same_gradient, true_gradient, 2 * unit / (~excluded).sum().item() / pred.shape[2])
    assert torch.equal((gradient == 0).all(dim=2), excluded)
    nothing = loss_and_gradient(pred, torch.zeros_like(images), *arguments[1:], True, **more)
    assert (nothing[0] == 0, (nothing[1] == 0).all()) == (True, True)
    grid = size[0] // patch[0], size[1] // patch[1]
    if dtype in (torch.uint8, torch.uint16):
        back = scatter_patches_triton(got, ids, grid, patch, mean, std, dtype, value_range)
        assert torch.equal(back.int()[~absent], images.int()[~absent])
