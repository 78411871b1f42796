"""Reconstruction pictures show what they say."""

import pytest
import torch
from PIL import Image

import fastmae
from fastmae.data.sources import open_train
from fastmae.errors import UserError
from fastmae.evaluate.reconstruct import caption, fixed_images, reconstruct, save_grid
from fastmae.ops import random_masking


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_visible_patches_are_kept_masked_ones_grayed_and_predicted(channels, norm_pix):
    torch.manual_seed(0)
    model = fastmae.mae_vit_tiny_patch4(img_size=(8, 16), in_chans=channels, norm_pix_loss=norm_pix).eval()
    images = torch.randint(0, 256, (3, 8, 16, channels), dtype=torch.uint8)
    ids = random_masking(torch.arange(3), 4, 8)
    original, masked, reconstructed = reconstruct(model, images, ids, mask_ratio=0.5)
    visible = torch.zeros(3, 8, dtype=torch.bool).scatter_(1, ids[:, :4].long(), True)
    visible = visible.view(3, 2, 1, 4, 1).expand(3, 2, 4, 4, 4).reshape(3, 8, 16)
    assert torch.equal(original, images)
    assert torch.equal(masked[visible], images[visible])
    assert (masked[~visible].float() - 127.5).abs().max() <= 1
    assert torch.equal(reconstructed[visible], images[visible])
    _, pred, _ = model(images, 0.5, ids_shuffle=ids)
    patch = int(ids[1, 5])  # a masked one of image 1
    target = model.patchify(images.permute(0, 3, 1, 2).float() / 255)[1, patch]
    expected = pred[1, patch] * model.std.repeat(16) + model.mean.repeat(16)
    if norm_pix:
        normalised = (target - model.mean.repeat(16)) / model.std.repeat(16)
        expected = pred[1, patch] * (normalised.var() + 1e-6).sqrt() + normalised.mean()
        expected = expected * model.std.repeat(16) + model.mean.repeat(16)
    got = model.patchify(reconstructed.permute(0, 3, 1, 2))[1, patch]
    assert ((expected * 255).clamp(0, 255) - got).abs().max() <= 0.51


def test_the_grid_is_a_png_that_says_how_it_was_made(tmp_path):
    model = fastmae.mae_vit_tiny_patch4(img_size=16, in_chans=1, norm_pix_loss=True)
    images = fixed_images(model, open_train("digits"), 4)
    assert images.shape == (4, 16, 16, 1)
    path = tmp_path / "deep" / "grid.png"
    ids = random_masking(torch.arange(4), 0, 16)
    save_grid(path, reconstruct(model, images, ids, mask_ratio=0.75), caption(model, 0.75))
    picture = Image.open(path)
    assert picture.format == "PNG"
    assert picture.height > 3 * 90
    assert "norm_pix" in caption(model, 0.75)
    assert "75%" in caption(model, 0.75)
    with pytest.raises(UserError, match="cannot be written"):
        save_grid(path / "under-a-file.png", (images,) * 3, "")
