"""gather_patches, scatter_patches, assemble_tokens and masked_mse against loops over single pixels and tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae.ops import assemble_tokens, gather_patches, masked_mse, random_masking, scatter_patches
from fastmae.ops.assemble_tokens import assemble_tokens_reference
from fastmae.ops.masked_mse import excluded_share, masked_mse_reference

CASES = [((28, 28), (4, 4), 1), ((24, 40), (4, 8), 3), ((28, 14), (14, 7), 5)]


def sample(size, patch, channels, N=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (N, *size, channels), dtype=torch.uint8, generator=generator)
    L = (size[0] // patch[0]) * (size[1] // patch[1])
    ids = random_masking(torch.arange(N), seed, L)
    mean = torch.rand(channels, generator=generator)
    std = torch.rand(channels, generator=generator) + 0.1
    return images, ids, mean, std


def slow_patch(image, number, patch, mean, std):
    """Patch ``number`` of an image [H, W, C], pixel by pixel in (row, column, channel) order, in float64."""
    ph, pw = patch
    columns = image.shape[1] // pw
    top, left = number // columns * ph, number % columns * pw
    scale = 255 if image.dtype == torch.uint8 else 1
    return torch.tensor(
        [
            (float(image[top + y, left + x, c]) / scale - float(mean[c])) / float(std[c])
            for y in range(ph)
            for x in range(pw)
            for c in range(image.shape[2])
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize(("size", "patch", "channels"), CASES)
def test_gather_is_a_loop_over_pixels(size, patch, channels):
    images, ids, mean, std = sample(size, patch, channels)
    got = gather_patches(images, ids[:, :5], patch, mean, std, torch.float64)
    for n in range(3):
        for k, number in enumerate(ids[n, :5].tolist()):
            expected = slow_patch(images[n], number, patch, mean, std)
            torch.testing.assert_close(got[n, k], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gather_rounds_once(dtype):
    images, ids, mean, std = sample((24, 40), (4, 8), 3)
    truth = gather_patches(images, ids, (4, 8), mean.double(), std.double(), torch.float64)
    got = gather_patches(images, ids, (4, 8), mean, std, dtype)
    assert got.dtype == dtype
    rounded = truth.to(dtype).double()
    assert ((got.double() - truth).abs() <= (rounded - truth).abs() + 4e-7 * (1 + truth.abs())).all()


@settings(max_examples=40, deadline=None)
@given(
    gh=st.integers(1, 4), gw=st.integers(1, 4), ph=st.integers(1, 4), pw=st.integers(1, 4), channels=st.integers(1, 5),
    layout=st.sampled_from(["nhwc", "nchw", "cropped", "flipped"]), data=st.data(),
)  # fmt: skip
def test_gather_reads_any_strides_and_scatter_undoes_it(gh, gw, ph, pw, channels, layout, data):
    N, L = 2, gh * gw
    images, ids, mean, std = sample((gh * ph, gw * pw), (ph, pw), channels, N=N, seed=data.draw(st.integers(0, 99)))
    if layout == "nchw":
        images = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    elif layout == "cropped":
        wide = torch.zeros(N, gh * ph + 3, gw * pw + 2, channels + 1, dtype=torch.uint8)
        wide[:, 1:-2, 2:, :channels] = images
        images = wide[:, 1:-2, 2:, :channels]
    elif layout == "flipped":
        images = images.transpose(1, 2).contiguous().transpose(1, 2)
    K = data.draw(st.integers(1, L))
    part = gather_patches(images, ids[:, :K], (ph, pw), mean, std, torch.float32)
    assert torch.equal(part, gather_patches(images.contiguous(), ids, (ph, pw), mean, std, torch.float32)[:, :K])
    back = scatter_patches(part, ids[:, :K], (gh, gw), (ph, pw), mean, std, torch.uint8)
    visible = torch.zeros(N, L, dtype=torch.bool).scatter_(1, ids[:, :K].long(), True)
    pixels = visible.view(N, gh, 1, gw, 1).expand(N, gh, ph, gw, pw).reshape(N, gh * ph, gw * pw, 1)
    assert torch.equal(back, torch.where(pixels, images, 0))


def test_float_images_pass_unchanged_with_mean_0_and_std_1():
    images = torch.randn(2, 8, 8, 3)
    ids = torch.arange(4).expand(2, -1)
    got = gather_patches(images, ids, (4, 4), torch.zeros(3), torch.ones(3), torch.float32)
    back = scatter_patches(got, ids, (2, 2), (4, 4), torch.zeros(3), torch.ones(3), torch.float32)
    assert torch.equal(back, images)


@pytest.mark.parametrize("K", [1, 3, 11])
def test_assemble_is_a_loop_over_tokens(K):
    N, L, D = 2, 12, 8
    ids = random_masking(torch.arange(N), 0, L)
    visible, mask_token, positions = torch.randn(N, K + 1, D), torch.randn(D), torch.randn(L + 1, D)
    got = assemble_tokens(visible, mask_token, positions, ids)
    for n in range(N):
        assert torch.equal(got[n, 0], visible[n, 0] + positions[0])
        for i, patch in enumerate(ids[n].tolist()):
            token = visible[n, 1 + i] if i < K else mask_token
            assert torch.equal(got[n, 1 + i], token + positions[1 + patch])


def test_assemble_has_the_right_gradients():
    ids = random_masking(torch.arange(2), 0, 6)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 4), (4,))]
    positions = torch.randn(7, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: assemble_tokens(*tensors, positions, ids), inputs)


def test_assemble_sums_where_positions_are_more_precise():
    """Under autocast the visible tokens are bfloat16 and the residual stream that starts here is float32."""
    ids = random_masking(torch.arange(2), 0, 6)
    visible = torch.randn(2, 3, 4).bfloat16().requires_grad_()
    mask_token, positions = torch.randn(4, requires_grad=True), torch.randn(7, 4)
    got = assemble_tokens(visible, mask_token, positions, ids)
    assert got.dtype == torch.float32
    expected = assemble_tokens_reference(visible, mask_token, positions, ids)
    assert torch.equal(got, expected)
    gradients = torch.autograd.grad(got.square().sum(), (visible, mask_token))
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.square().sum(), (visible, mask_token)))


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize(("size", "patch", "channels"), CASES)
def test_mse_is_a_loop_over_patches(size, patch, channels, norm_pix):
    images, ids, mean, std = sample(size, patch, channels)
    ids = ids[:, 3:]
    pred = torch.randn(*ids.shape, patch[0] * patch[1] * channels, dtype=torch.float64)
    errors = []
    for n in range(len(images)):
        for m, number in enumerate(ids[n].tolist()):
            target = slow_patch(images[n], number, patch, mean, std)
            if norm_pix:
                average = target.sum() / len(target)
                variance = ((target - average) ** 2).sum() / (len(target) - 1)
                target = (target - average) / (variance + 1e-6) ** 0.5
            errors.append(((pred[n, m] - target) ** 2).mean())
    loss = masked_mse(pred, images, ids, patch, mean, std, norm_pix)
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_mse_has_the_right_gradient(norm_pix):
    images, ids, mean, std = sample((8, 8), (4, 4), 2)
    pred = torch.randn(3, 3, 32, dtype=torch.float64, requires_grad=True)
    for nodata in (None, float(images[0, 0, 0, 0])):
        arguments = images, ids[:, 1:], (4, 4), mean, std, norm_pix, None, nodata
        assert torch.autograd.gradcheck(lambda p, arguments=arguments: 0.3 * masked_mse(p, *arguments), (pred,))


def test_mse_sums_in_float32_whatever_comes_in():
    images, ids, mean, std = sample((24, 40), (4, 8), 3)
    pred = torch.randn(*ids.shape, 96).bfloat16()
    loss = masked_mse(pred, images, ids, (4, 8), mean, std, True)
    assert loss.dtype == torch.float32
    truth = masked_mse(pred.double(), images, ids, (4, 8), mean.double(), std.double(), True)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pred_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_they_are_well_behaved_torch_ops(pred_dtype):
    images, ids, mean, std = sample((24, 40), (4, 8), 3)
    gather = torch.ops.fastmae.gather_patches.default
    torch.library.opcheck(gather, (images, ids[:, :5], (4, 8), mean, std, pred_dtype))
    pred = torch.randn(3, 25, 96, dtype=pred_dtype, requires_grad=True)
    value_range = torch.tensor([[0.0, -3, 1], [200, 255, 256]])
    for images_now, more in ((images, ()), (images.to(torch.uint16), (value_range, 5.0))):
        arguments = pred, images_now, ids[:, 5:], (4, 8), mean, std, True, *more
        torch.library.opcheck(torch.ops.fastmae.masked_mse.default, arguments)
    numbers = torch.ones(2, dtype=torch.float64 if pred_dtype == torch.float64 else torch.float32)
    torch.library.opcheck(torch.ops.fastmae.masked_mse_backward.default, (*numbers, pred.detach(), *arguments[1:]))
    torch.library.opcheck(gather, (*arguments[1:6], pred_dtype, *more))
    tokens, token = (torch.randn(*shape, dtype=pred_dtype, requires_grad=True) for shape in ((3, 6, 16), (16,)))
    assemble = torch.ops.fastmae.assemble_tokens.default
    torch.library.opcheck(assemble, (tokens, token, torch.randn(31, 16), ids, pred_dtype))
    backward = torch.ops.fastmae.assemble_tokens_backward.default
    torch.library.opcheck(backward, (torch.randn(3, 31, 16, dtype=pred_dtype), 6, pred_dtype))
    scatter = torch.ops.fastmae.scatter_patches.default
    torch.library.opcheck(scatter, (pred.detach(), ids[:, 5:], (6, 5), (4, 8), mean, std, pred_dtype))
    torch.library.opcheck(scatter, (pred.detach(), ids[:, 5:], (6, 5), (4, 8), mean, std, torch.uint16, value_range))


def test_the_gradient_does_not_depend_on_how_it_is_asked_for():
    images, ids, mean, std = sample((24, 40), (4, 8), 3)
    pred = torch.randn(3, 30, 96, requires_grad=True)

    def loss_of(pred):
        return masked_mse(pred, images, ids, (4, 8), mean, std, True) * 0.25

    (eager,) = torch.autograd.grad(loss_of(pred), pred)
    (compiled,) = torch.autograd.grad(torch.compile(loss_of, fullgraph=True, backend="aot_eager")(pred), pred)
    (plain,) = torch.autograd.grad(masked_mse_reference(pred, images, ids, (4, 8), mean, std, True) * 0.25, pred)
    assert torch.equal(eager, compiled)
    torch.testing.assert_close(eager, plain, rtol=1e-6, atol=1e-9)


def test_the_value_of_missing_pixels_is_compared_in_float32():
    images = torch.full((1, 4, 4, 1), 0.1)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    pred, mean, std = torch.ones(1, 1, 16), torch.zeros(1), torch.ones(1)

    def excluded(nodata, images=images):
        loss = masked_mse(pred, images, ids, (4, 4), mean, std, False, nodata=nodata)
        share = excluded_share(images, ids, (4, 4), nodata)
        assert share == (loss == 0)
        return bool(share)

    assert excluded(0.1)
    assert excluded(float(torch.tensor(0.1)))
    for other in (None, 0.2, float("nan"), -1.7976931348623157e308):
        assert not excluded(other)
    assert not excluded(1e300, images * float("inf"))
    assert excluded(float("inf"), images * float("inf"))
    assert excluded(-1.7976931348623157e308, images.double() * 0 - 1.7976931348623157e308)
    assert excluded(7, images.to(torch.uint8) + 7)
    assert not excluded(7.5, images.to(torch.uint8) + 7)


def test_the_excluded_share_is_that_of_the_patches_that_are_asked_for():
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint16)
    images[0, 5, 1, 2] = 9
    ids = torch.tensor([[2, 3, 0], [1, 2, 3]])
    assert excluded_share(images, ids, (4, 4), 9.0) == 1 / 6
    assert excluded_share(images, ids[:, 1:], (4, 4), 9.0) == 0
    assert excluded_share(images, ids, (4, 4), None) == 0
