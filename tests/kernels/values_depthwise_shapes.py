"""depthwise_visible in Triton at more shapes than the interpreter computes in seconds. Run by test_kernels.py."""

import pytest
import torch
from truth import poison  # noqa: F401
from values_depthwise import check

# (N, grid, K, positions on a side of a cell, channels): all sides; widths that are no whole blocks.
SHAPES = [(2, (2, 3), 3, 8, 40), (1, (3, 2), 6, 4, 70), (2, (4, 3), 5, 2, 16), (2, (4, 5), 9, 1, 300)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "grid", "K", "s", "C"), SHAPES)
def test_depthwise_visible(N, grid, K, s, C, dtype):
    check(N, grid, K, s, C, dtype)
