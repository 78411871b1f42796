"""assemble_tokens in Triton against float64. Run by test_kernels.py, and on a GPU by tests/gpu."""

import pytest
import torch
from device import DEVICE
from truth import assert_as_close, poison  # noqa: F401

from fastmae.kernels.assemble_tokens import assemble_tokens_backward_triton, assemble_tokens_triton
from fastmae.ops.assemble_tokens import assemble_tokens_reference
from fastmae.ops.random_masking import random_masking

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (N, L, K, D): the published grid, odd widths, one wider than a block, one image, one visible or masked patch.
SHAPES = [(2, 196, 49, 96), (3, 12, 3, 40), (1, 9, 8, 8), (3, 7, 1, 600), (2, 5, 2, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given_dtype", DTYPES)
@pytest.mark.parametrize(("N", "L", "K", "D"), SHAPES)
def test_assemble(N, L, K, D, given_dtype, dtype):
    generator = torch.Generator().manual_seed(0)
    ids = random_masking(torch.arange(N), 0, L).to(DEVICE)
    wide = torch.randn(N, K + 3, D, generator=generator).to(DEVICE, given_dtype)
    mask_token = torch.randn(D, generator=generator).to(DEVICE)
    pos_embed = torch.randn(L + 1, D, generator=generator).to(DEVICE)
    for visible, ids_shuffle in ((wide[:, 1 : K + 2], ids), (wide.mT[:, :, : K + 1].contiguous().mT, ids.long())):
        got = assemble_tokens_triton(visible, mask_token, pos_embed, ids_shuffle, dtype)
        assert got.dtype == dtype
        parts = visible.double(), mask_token.double(), pos_embed.double()
        truth = assemble_tokens_reference(*parts, ids_shuffle)
        same = assemble_tokens_reference(visible.float(), mask_token, pos_embed, ids_shuffle).to(dtype)
        assert_as_close(got, same, truth, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given_dtype", DTYPES)
@pytest.mark.parametrize(("N", "L", "K", "D"), SHAPES)
def test_backward(N, L, K, D, given_dtype, dtype):
    wide = torch.randn(N, L + 1, 2 * D, generator=torch.Generator().manual_seed(1)).to(DEVICE, given_dtype)
    grad = wide[:, :, ::2]
    grad_visible, grad_mask_token = assemble_tokens_backward_triton(grad, K + 1, dtype)
    assert grad_visible.dtype == dtype
    assert_as_close(grad_visible, grad[:, : K + 1].to(dtype), grad[:, : K + 1].double(), 0.0)
    masked = grad[:, K + 1 :]
    truth = masked.double().sum(dim=(0, 1))
    # What a sum of n numbers may lose is proportional to the sum of their sizes.
    unit = masked.double().abs().sum(dim=(0, 1))
    assert_as_close(grad_mask_token, masked.float().sum(dim=(0, 1)), truth, unit)
    assert torch.equal(grad_mask_token, assemble_tokens_backward_triton(grad, K + 1, dtype)[1])
