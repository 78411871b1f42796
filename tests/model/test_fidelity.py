"""The same weights and masks give the same loss and gradients as the plain formulation and as transformers' ViTMAE."""

import pytest
import torch
from torch import nn

from fastmae.benchmarks.baselines.vitmae import as_transformers, vitmae_like
from fastmae.model.mae import MaskedAutoencoderViT
from fastmae.model.reference import ReferenceMAE
from fastmae.ops import random_masking

SIZES = dict(embed_dim=48, depth=3, num_heads=3, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)
SQUARE, OBLONG = ((32, 32), (4, 4)), ((24, 40), (4, 8))
LOSS, GRADIENT = 1e-6, 1e-5


def models(size, patch, channels, norm_pix, dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    settings = dict(img_size=size, patch_size=patch, in_chans=channels, norm_pix_loss=norm_pix, **{**SIZES, **sizes})
    ours = MaskedAutoencoderViT(norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6), **settings)
    for parameter in ours.parameters():  # biases and norms start at 0 and 1, where mistakes could hide
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    reference = ReferenceMAE(**settings)
    reference.load_state_dict(ours.state_dict(), strict=True)
    return ours.to(dtype), reference.to(dtype)


def batch(size, channels, num_patches, dtype=torch.float32, N=4):
    images = torch.randn(N, channels, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return images, random_masking(torch.arange(N), 3, num_patches)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(ours, reference, loss_tolerance=LOSS, gradient_tolerance=GRADIENT):
    """(loss, gradients) twice: losses relatively, each gradient by its norm.

    A key's bias has no influence on a softmax, so its gradient is nothing but rounding: the floor is for it.
    """
    (loss, grads), (true_loss, true_grads) = ours, reference
    assert abs(loss.item() - true_loss.item()) <= loss_tolerance * abs(true_loss.item())
    assert grads.keys() == true_grads.keys()
    floor = 1e-2 * gradient_tolerance * torch.stack([g.norm() for g in true_grads.values()]).norm()
    for name, truth in true_grads.items():
        assert truth.abs().sum() > 0, f"{name} gets no gradient"
        error = (grads[name] - truth).norm()
        assert error <= gradient_tolerance * truth.norm() + floor, f"{name}: {error / truth.norm():.1e}"


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("size", "patch"), [SQUARE, OBLONG])
def test_forward_and_training_loss_equal_the_reference(size, patch, channels, mask_ratio, norm_pix):
    ours, reference = models(size, patch, channels, norm_pix)
    images, ids = batch(size, channels, ours.num_patches)
    true_loss, true_pred, true_mask = reference(images, ids.long(), mask_ratio)
    truth = true_loss, gradients(reference, true_loss)
    loss, pred, mask = ours(images, mask_ratio, ids_shuffle=ids)
    assert torch.equal(mask, true_mask)
    torch.testing.assert_close(pred, true_pred, rtol=1e-5, atol=1e-5)
    assert_same((loss, gradients(ours, loss)), truth)
    fast = ours.training_loss(images, ids, mask_ratio)
    assert_same((fast, gradients(ours, fast)), truth)


@pytest.mark.parametrize("decoder_depth", [1, 2])
def test_in_float64_there_is_no_difference_at_all(decoder_depth):
    ours, reference = models((24, 40), (4, 8), 3, True, torch.float64, decoder_depth=decoder_depth)
    images, ids = batch((24, 40), 3, ours.num_patches, torch.float64)
    true_loss, _, _ = reference(images, ids.long())
    truth = true_loss, gradients(reference, true_loss)
    for loss in (ours(images, ids_shuffle=ids)[0], ours.training_loss(images, ids)):
        assert_same((loss, gradients(ours, loss)), truth, 1e-12, 1e-11)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_uint8_images_are_normalised_ones(channels):
    ours, reference = models((24, 40), (4, 8), channels, False)
    images = torch.randint(0, 256, (4, 24, 40, channels), dtype=torch.uint8)
    normalised = ((images / 255 - ours.mean) / ours.std).permute(0, 3, 1, 2).contiguous()
    ids = random_masking(torch.arange(4), 3, ours.num_patches)
    true_loss, _, _ = reference(normalised, ids.long())
    truth = true_loss, gradients(reference, true_loss)
    for loss in (ours(images, ids_shuffle=ids)[0], ours.training_loss(images, ids)):
        assert_same((loss, gradients(ours, loss)), truth)


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_transformers_agrees(channels, mask_ratio, norm_pix):
    """Square images, the only ones that its ViTMAE takes."""
    size, patch = SQUARE
    ours, _ = models(size, patch, channels, norm_pix)
    theirs = vitmae_like(ours, mask_ratio)
    images, ids = batch(size, channels, ours.num_patches)
    noise = ids.argsort(dim=1).float()  # sorted, it gives ids back
    out = theirs(images, noise=noise)
    true_grads = gradients(theirs, out.loss)
    for loss in (ours(images, mask_ratio, ids_shuffle=ids)[0], ours.training_loss(images, ids, mask_ratio)):
        grads = as_transformers(gradients(ours, loss), true_grads.keys())
        assert_same((loss, grads), (out.loss, true_grads))
