"""Noise in the place of what is masked is normal, and a function of what it is given."""

from __future__ import annotations

import torch

from fastmae.model.fill import normal_noise


def test_noise_is_standard_normal() -> None:
    noise = normal_noise((torch.arange(100)[:, None],), 1000).double()
    ordered, quantiles = noise.flatten().sort().values, torch.linspace(0, 1, 100_002, dtype=torch.float64)[1:-1]
    assert (
        torch.special.ndtr(ordered) - quantiles
    ).abs().max() < 0.005  # 1 % of such draws are further off than 0.0051
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.16


def test_noise_of_a_sample_depends_on_each_tensor_of_that_sample_alone() -> None:
    images, masks = torch.rand(6, 3, 3), torch.rand(6, 4) < 0.5
    noise = normal_noise((images, masks), 64)
    assert torch.equal(noise[2:4], normal_noise((images[2:4], masks[2:4]), 64))
    other_images, other_masks = images.clone(), masks.clone()
    other_images[:, 2, 2] += 1
    other_masks[:, 3] = ~masks[:, 3]
    for given in [(other_images, masks), (images, other_masks)]:
        assert (normal_noise(given, 64) != noise).all()
