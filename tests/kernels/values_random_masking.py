"""The kernel's bits are those of C++ and PyTorch. Run by test_kernels.py, and on a GPU by tests/gpu."""

import pytest
import torch
from device import DEVICE

from fastmae.kernels.random_masking import random_masking_triton
from fastmae.ops.random_masking import random_masking, random_masking_reference

DRAW_IDS = torch.tensor([0, 5, 2**62 + 3, -1, -(2**63)])


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345, 2**63, 2**64 - 1])
@pytest.mark.parametrize("num_patches", [1, 2, 7, 49, 196, 257])
def test_bits_are_equal_to_cpp_and_pytorch(seed, num_patches):
    got = random_masking_triton(DRAW_IDS.to(DEVICE), seed - 2**64 if seed >= 2**63 else seed, num_patches).cpu()
    assert torch.equal(got, random_masking(DRAW_IDS, seed, num_patches))
    assert torch.equal(got, random_masking_reference(DRAW_IDS, seed, num_patches))


def test_the_largest_images_and_strided_ids():
    got = random_masking_triton(DRAW_IDS.to(DEVICE)[::2], 7, 1024).cpu()
    assert torch.equal(got, random_masking(DRAW_IDS[::2], 7, 1024))


def test_no_images_at_all():
    assert random_masking_triton(DRAW_IDS[:0].to(DEVICE), 0, 49).shape == (0, 49)
