"""The count of matrix products beside numbers worked out by hand and beside what torch counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastmae.model.flops import flops_per_image, products_of
from fastmae.model.presets import PRESETS
from fastmae.model.sizes import PRESET_SIZES, preset_sizes, sizes_of
from fastmae.ops.random_masking import random_masking


def model_of(name, **sizes):
    with torch.device("meta"):
        return PRESETS[name](**sizes)


@pytest.mark.parametrize("name", PRESET_SIZES)
def test_plain_sizes_are_those_of_the_model(name):
    model, sizes = model_of(name), preset_sizes(name)
    assert sizes == sizes_of(model)
    assert sizes.parameters == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert flops_per_image(sizes, 0.75) == flops_per_image(model, 0.75)


def test_an_image_of_another_size_has_other_patches():
    assert preset_sizes("mae_vit_base_patch16", [448]) == sizes_of(model_of("mae_vit_base_patch16", img_size=448))
    with pytest.raises(ValueError, match="30×30 pixels is not a multiple of a patch of 16×16"):
        preset_sizes("mae_vit_base_patch16", [30])


@pytest.mark.parametrize(
    ("name", "gigaflops"),
    [("mae_vit_base_patch16", 19.067219968), ("mae_vit_large_patch16", 40.96), ("mae_vit_huge_patch14", 96.4)],
)
def test_an_image_takes_as_many_operations_as_by_hand(name, gigaflops):
    assert flops_per_image(preset_sizes(name), 0.75) / 1e9 == pytest.approx(gigaflops, rel=5e-4)


def test_vit_base_counted_by_hand():
    K, L, M, P = 49, 196, 147, 768
    encoder = 12 * 2 * (50 * 768 * (3 * 768 + 768 + 8 * 768) + 2 * 50 * 50 * 768)
    decoder = 7 * 2 * (197 * 512 * (3 * 512 + 512 + 8 * 512) + 2 * 197 * 197 * 512)
    last = 2 * (197 * 512 * 2 * 512 + M * 512 * (512 + 512 + 8 * 512) + 2 * M * 197 * 512)
    ends = 2 * (K * P * 768 + (K + 1) * 768 * 512 + M * 512 * P)
    assert encoder + decoder + last + ends == 19_067_219_968
    assert flops_per_image(model_of("mae_vit_base_patch16"), 0.75) == 19_067_219_968
    assert L == K + M


@pytest.mark.parametrize("name", ["mae_vit_tiny_patch4", "mae_vit_small_patch16"])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.4])
def test_products_are_those_that_torch_counts_in_a_forward_pass(name, mask_ratio):
    model = PRESETS[name](img_size=48)
    ids = random_masking(torch.arange(2), 0, model.num_patches)
    # torch counts attention only where it is made of products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.training_loss(torch.zeros(2, 48, 48, 3, dtype=torch.uint8), ids, mask_ratio)
    assert 2 * sum(product.flops for product in products_of(model, mask_ratio)) == counter.get_total_flops()
