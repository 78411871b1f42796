"""Upscalers: an encoder and a head that adds to bicubic interpolation; and the scores of enlarged images."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastmae.evaluate.upscale import peak_of, psnr_of, ssim_of, upscale_picture
from fastmae.facts import UINT8, PixelFacts
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.upscaler import CHANNELS, UpscalingLoss, resized_pixels, upscaler_of


@pytest.fixture
def mae():
    torch.manual_seed(0)
    return MaskedAutoencoderViT(
        (16, 24), (4, 8), 3, 32, 5, 2, 32, 1, 2, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)
    )


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 16, 24, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def active(x):
    return torch.where(x > 0, x, 0.1 * x)


def plain_added(model, images):
    """The head, written out."""
    w, (rows, columns), (ph, pw) = dict(model.named_parameters()), model.grid_size, model.patch_size
    D, scale = model.cls_token.shape[2], model.scale
    x = 0.0
    for number, tokens in enumerate(model.levels(images)):
        head = f"head.norms.{number}.weight", f"head.norms.{number}.bias"
        tokens = F.layer_norm(tokens, (D,), w[head[0]], w[head[1]], 1e-6)
        x = x + tokens @ w[f"head.levels_in.{number}.weight"].T + w[f"head.levels_in.{number}.bias"]
    x = active(x) @ w["head.refine.weight"].T + w["head.refine.bias"]
    fine = torch.zeros(len(x), CHANNELS, rows * ph, columns * pw, dtype=x.dtype)
    for row in range(rows * ph):
        for column in range(columns * pw):
            patch = x[:, row // ph * columns + column // pw].reshape(len(x), CHANNELS, ph, pw)
            fine[:, :, row, column] = patch[:, :, row % ph, column % pw]
    pixels = (((images.float() / 255).double() - model.mean) / model.std).permute(0, 3, 1, 2)
    fine = active(fine + F.conv2d(pixels, w["head.pixels_in.weight"], w["head.pixels_in.bias"], padding=1))
    fine = active(F.conv2d(fine, w["head.around.weight"], w["head.around.bias"], padding=1))
    out = F.conv2d(fine, w["head.out.weight"], w["head.out.bias"], padding=1)
    C = images.shape[3]
    larger = torch.zeros(len(x), C, rows * ph * scale, columns * pw * scale, dtype=x.dtype)
    for channel in range(C):
        for down in range(scale):
            for right in range(scale):
                larger[:, channel, down::scale, right::scale] = out[:, (channel * scale + down) * scale + right]
    return larger


@pytest.mark.parametrize("scale", [2, 4])
def test_it_begins_as_the_bicubic_filter_of_pillow(mae, images, scale):
    model = upscaler_of(mae, scale).eval()
    found = model.as_pixels(model(images)).numpy()
    assert torch.equal(model.added(images), torch.zeros(2, 3, 16 * scale, 24 * scale))
    for image, larger in zip(images.numpy().astype(np.float32), found, strict=True):
        for channel in range(3):
            theirs = Image.fromarray(image[..., channel]).resize((24 * scale, 16 * scale), Image.Resampling.BICUBIC)
            expected = np.asarray(theirs).round().clip(0, 255)
            assert np.abs(expected - larger[..., channel]).max() <= 1  # where halves are rounded


def test_what_the_head_adds_and_its_gradients_are_those_of_a_plain_reference(mae, images):
    model = upscaler_of(mae, 2).double()
    with torch.no_grad():
        model.head.out.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    targets = torch.randint(0, 256, (2, 32, 48, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    ours = UpscalingLoss(model)(images, targets)
    ours.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "head" in name}
    model.zero_grad()
    pixels = (((images.float() / 255).double() - model.mean) / model.std).permute(0, 3, 1, 2)
    larger = F.interpolate(pixels, scale_factor=2, mode="bicubic", antialias=True) + plain_added(model, images)
    wanted = ((targets.double() / 255 - model.mean) / model.std).permute(0, 3, 1, 2)
    theirs = (larger - wanted).abs().mean()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-9, atol=1e-14)


def test_windows_do_not_show_where_the_head_adds_nothing_of_them(mae):
    """With an encoder whose tokens do not count, what is added is a convolution, and windows change it at the edges of
    the picture alone."""
    model = upscaler_of(mae, 2).eval()
    with torch.no_grad():
        model.head.refine.weight.zero_()
        model.head.out.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    found = upscale_picture(model, pixels, overlap=0.9)
    assert found.shape == (80, 120, 3)
    with torch.no_grad():
        whole = model.as_normalised(torch.from_numpy(pixels)[None])
        x = active(model.head.pixels_in(whole) + model.head.refine.bias.reshape(1, CHANNELS, -1)[:, :, :1, None])
        added = F.pixel_shuffle(model.head.out(active(model.head.around(x))), 2)
        plain = model.as_pixels(F.interpolate(whole, scale_factor=2, mode="bicubic", antialias=True) + added)
    difference = np.abs(found.astype(int) - plain[0].numpy())[12:-12, 12:-12]
    assert difference.mean() < 2


def test_pixels_keep_their_type_when_they_are_resized():
    for dtype in (torch.uint8, torch.uint16, torch.float32):
        images = (torch.rand(1, 8, 8, 2) * 250).to(dtype)
        half = resized_pixels(images, 0.5)
        assert (half.dtype, half.shape) == (dtype, (1, 4, 4, 2))
        assert abs(float(half.float().mean() - images.float().mean())) < 20


def test_scores_are_those_of_their_formulas():
    skimage = pytest.importorskip("skimage.metrics")
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (3, 24, 20, 3), dtype=np.uint8)
    found = np.clip(images + draw.normal(0, [[[[5]]], [[[20]]], [[[60]]]], images.shape), 0, 255).astype(np.uint8)
    ours = [score(torch.from_numpy(found), torch.from_numpy(images), 255.0) for score in (psnr_of, ssim_of)]
    for number in range(3):
        pair = images[number], found[number]
        assert float(ours[0][number]) == pytest.approx(skimage.peak_signal_noise_ratio(*pair, data_range=255), rel=1e-9)
        theirs = skimage.structural_similarity(
            *pair, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2
        )
        assert float(ours[1][number]) == pytest.approx(theirs, rel=1e-6)
    assert peak_of(UINT8) == 255
    assert peak_of(PixelFacts(dtype="uint16", low=(0.0, 10.0), high=(100.0, 300.0))) == 290
