"""ConvMAE computes what a plainly written convolutional autoencoder does, for any size, channels and kind of pixels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmae.facts import PixelFacts
from fastmae.model.conv import ConvMAE
from fastmae.ops.random_masking import random_masking
from fastmae.train.step import TrainingLoss, prepare


class Plain(nn.Module):
    """The model as a textbook writes it: images, a mask of pixels, nothing of ours."""

    def __init__(self, C: int, widths: tuple[int, ...], numbers: int, latent_dim: int) -> None:
        super().__init__()
        channels = (C, *widths)
        pairs = list(pairwise(channels))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.up = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in reversed(pairs))
        self.to_latent, self.from_latent = nn.Linear(numbers, latent_dim), nn.Linear(latent_dim, numbers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = []
        for conv in self.down:
            sizes.append(x.shape[2:])
            x = F.max_pool2d(F.relu(conv(x)), 2, ceil_mode=True)
        shape = x.shape
        x = F.relu(self.from_latent(self.to_latent(x.flatten(1)))).view(shape)
        for number, (conv, (height, width)) in enumerate(zip(self.up, reversed(sizes), strict=True)):
            x = conv(F.interpolate(x, scale_factor=2, mode="nearest"))[:, :, :height, :width]
            x = F.relu(x) if number < len(self.up) - 1 else x
        return x


def plain_of(model: ConvMAE) -> Plain:
    """The plain model with the same weights."""
    plain = Plain(model.in_chans, model.widths, model.to_latent.in_features, model.latent_dim).to(model.mean.dtype)
    with torch.no_grad():
        for name, parameter in named_of(plain).items():
            parameter.copy_(model.get_parameter(name))
    return plain


def mask_of(model: ConvMAE, ids: torch.Tensor, K: int) -> torch.Tensor:
    """Which pixels are masked: bool [N, 1, H, W], cell by cell."""
    masked = torch.zeros(len(ids), 1, *model.img_size, dtype=torch.bool)
    (height, width), columns = model.patch_size, model.grid_size[1]
    for n, row in enumerate(ids.tolist()):
        for cell in row[K:]:
            top, left = cell // columns * height, cell % columns * width
            masked[n, 0, top : top + height, left : left + width] = True
    return masked


def plain_loss(plain: Plain, model: ConvMAE, shares: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The loss of pixels [N, C, H, W] as shares of the value range, with a fill that is no noise."""
    mean, std = model.mean[:, None, None], model.std[:, None, None]
    target = (shares - mean) / std
    output = plain(torch.where(mask, -mean / std if model.fill == "zero" else torch.zeros_like(mean), target))
    errors = (output - target).square() if model.loss == "mse" else F.softplus(output) - shares * output
    counts = mask.expand_as(errors) if model.loss_on == "masked" else torch.ones_like(errors, dtype=torch.bool)
    return errors[counts].mean()


def named_of(plain: Plain) -> dict[str, torch.Tensor]:
    """The parameters of the plain model under our names."""
    parts = {"down": "encoder", "up": "decoder"}
    split = {tuple(name.split(".")): parameter for name, parameter in plain.named_parameters()}
    return {
        ".".join((parts[name[0]], name[1], "conv", name[2]) if name[0] in parts else name): parameter
        for name, parameter in split.items()
    }


def gradients_of(plain: Plain) -> dict[str, torch.Tensor]:
    """The gradients of the plain model under our names."""
    return {name: parameter.grad for name, parameter in named_of(plain).items() if parameter.grad is not None}


CASES: list[dict[str, Any]] = [
    {"img_size": 8, "patch_size": 2, "in_chans": 1, "widths": (4, 6, 8)},
    {"img_size": (9, 15), "patch_size": (3, 5), "in_chans": 3, "widths": (4, 6), "loss_on": "all"},
    {"img_size": (10, 7), "in_chans": 2, "widths": (5, 3), "mask_unit": "pixel", "fill": "zero"},
    {"img_size": (1, 30), "patch_size": (1, 5), "in_chans": 1, "widths": (4, 4), "loss": "bce", "fill": "zero"},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_loss_and_gradients_are_those_of_a_plain_model_in_float64(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ConvMAE(latent_dim=5, **settings).double()
    for parameter in model.parameters():  # biases too
        nn.init.normal_(parameter, std=0.3)
    plain = plain_of(model)
    shares = torch.rand(4, model.in_chans, *model.img_size, dtype=torch.float64)
    images = (shares - model.mean[:, None, None]) / model.std[:, None, None]
    ids = random_masking(torch.arange(4), 1, model.num_patches)
    loss = model.training_loss(images, ids, 0.5)
    loss.backward()
    expected = plain_loss(plain, model, shares, mask_of(model, ids, model.num_visible(0.5)))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for name, gradient in gradients_of(plain).items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-14)


def test_twenty_steps_are_those_of_a_plain_loop() -> None:
    model = ConvMAE(8, 2, 1, widths=(4, 8), latent_dim=6, mean=[0.3], std=[0.35])
    plain = plain_of(model)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=3e-3, weight_decay=0.05) for one in (model, plain)]
    images = torch.randint(0, 256, (20, 8, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for step, batch in enumerate(images):
        ids = random_masking(torch.arange(8) + 8 * step, 0, 16)
        shares = batch.permute(0, 3, 1, 2) / 255
        losses = [model.training_loss(batch, ids, 0.5), plain_loss(plain, model, shares, mask_of(model, ids, 8))]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, weight in named_of(plain).items():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_predictions_are_normalised_pixels_of_all_cells_with_either_loss(loss: Any) -> None:
    model = ConvMAE(8, 2, 3, widths=(4, 8), loss=loss)
    images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    ids = random_masking(torch.arange(3), 0, 16)
    everything = model.predict(images, ids, 0.75)
    masked = everything.gather(1, ids[:, 4:, None].long().expand(-1, -1, 12))
    torch.testing.assert_close(model.loss_and_prediction(images, ids, 0.75)[1], masked)
    shares = model.unpatchify(everything) * model.std[:, None, None] + model.mean[:, None, None]
    assert loss == "mse" or (shares.min() > 0 and shares.max() < 1)


def test_what_is_masked_does_not_reach_the_latent_vector() -> None:
    model = ConvMAE(8, 2, 1, widths=(4, 8))
    images = torch.randint(0, 256, (2, 8, 8, 1), dtype=torch.uint8)
    ids = random_masking(torch.arange(2), 0, 16)
    others = torch.where(mask_of(model, ids, 4).permute(0, 2, 3, 1), 255 - images, images)
    assert torch.equal(model.predict(images, ids, 0.75), model.predict(others, ids, 0.75))
    assert not torch.equal(model.features(images), model.features(others))


def test_pixels_beyond_the_value_range_are_its_ends_for_bce_and_missing_ones_are_no_targets() -> None:
    pixels = PixelFacts(dtype="float32", low=(0.0,), high=(10.0,), nodata=-9.0)
    model = ConvMAE(4, 2, 1, widths=(4, 4), loss="bce", loss_on="all", fill="zero", pixels=pixels)
    images = torch.rand(2, 4, 4, 1) * 10
    images[0, 0, 0] = 10
    images[1, 3, 3] = -9
    ids = torch.tensor([[3, 1, 2, 0], [0, 1, 2, 3]])  # the last one is masked
    loss = model.training_loss(images, ids, 0.25)
    beyond = images.clone()
    beyond[0, 0, 0] = 12
    assert model.training_loss(beyond, ids, 0.25) == loss
    beyond[0, 0, 0] = 9
    assert model.training_loss(beyond, ids, 0.25) != loss
    # The last cell of the second image has a missing pixel, so that its other pixels do not count either.
    other = images.clone()
    other[1, 2:, 2] = 5
    assert model.training_loss(other, ids, 0.25) == loss


def test_noise_is_a_function_of_the_image_and_its_mask() -> None:
    model = ConvMAE(8, 2, 1, widths=(4, 8), fill="noise")
    images = torch.randint(0, 256, (6, 8, 8, 1), dtype=torch.uint8)
    ids = random_masking(torch.arange(6), 0, 16)
    whole = model.predict(images, ids, 0.75)
    torch.testing.assert_close(
        torch.cat([model.predict(images[n : n + 1], ids[n : n + 1], 0.75) for n in range(6)]), whole
    )


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"widths": (4, 4, 4, 4)}, "an image of 8×8 pixels can be halved 3 times, not 4"),
        ({"patch_size": 3}, "multiple"),
        ({"loss": "bce", "norm_pix_loss": True}, "shares of the value range"),
        ({"mask_unit": "pixel", "norm_pix_loss": True}, "normalises patches"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ConvMAE(**{"img_size": 8, "patch_size": 2, "in_chans": 1, **settings})


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("keeps", ["selective", "full"])
def test_checkpointing_keeps_less_and_changes_no_bit(keeps: Any, bf16: bool) -> None:
    kept, losses, gradients = [], [], []
    images = torch.randint(0, 256, (8, 13, 10, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for checkpointing in ("none", keeps):
        torch.manual_seed(0)
        model = ConvMAE((13, 10), mask_unit="pixel", widths=(8, 8), latent_dim=4)
        prepare(TrainingLoss(model, 0.25), checkpointing, "off")
        saved: dict[int, int] = {}

        def save(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = random_masking(torch.arange(8), 0, model.num_patches)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(save, lambda x: x),
        ):
            loss = model.training_loss(images, ids, 0.25)
        loss.backward()
        kept.append(sum(saved.values()))
        losses.append(loss)
        gradients.append([p.grad for p in model.parameters()])
    assert torch.equal(*losses)
    assert all(map(torch.equal, *gradients))
    assert kept[1] < kept[0]


@pytest.mark.parametrize("fill", ["zero", "noise"])
def test_five_channels_with_masks_of_pixels_and_cross_entropy(fill):
    """All channels of a masked pixel are hidden; noise stays the same for the same image and mask."""
    settings = dict(widths=(4, 8), latent_dim=6, mask_unit="pixel", fill=fill, loss="bce")
    torch.manual_seed(0)
    mean, std = [0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.2, 0.2, 0.3, 0.3]
    model = ConvMAE((7, 9), in_chans=5, mean=mean, std=std, **settings).double()
    images = torch.randint(0, 256, (3, 7, 9, 5), dtype=torch.uint8)
    ids = torch.stack([torch.randperm(63) for _ in range(3)])
    K = model.num_visible(0.25)
    loss, pred = model.loss_and_prediction(images, ids, 0.25)
    assert pred.shape == (3, 63 - K, 5)
    mask = mask_of(model, ids, K)
    shares = images.permute(0, 3, 1, 2).double() / 255
    if fill == "zero":
        torch.testing.assert_close(loss, plain_loss(plain_of(model), model, shares, mask), rtol=1e-6, atol=0)
        changed = torch.where(mask.permute(0, 2, 3, 1), 255 - images, images)
        assert torch.equal(model.loss_and_prediction(changed, ids, 0.25)[1], pred)
    else:
        assert torch.equal(model.loss_and_prediction(images, ids, 0.25)[1], pred)
        assert not torch.equal(model.loss_and_prediction(images, ids.flip(0), 0.25)[1], pred)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
