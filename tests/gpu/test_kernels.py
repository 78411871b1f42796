"""The values of every Triton kernel, on the GPU itself."""

from pathlib import Path

import pytest
from device import run_values

KERNELS = Path(__file__).parents[1] / "kernels"


@pytest.mark.parametrize("file", sorted(KERNELS.glob("values_*.py")), ids=lambda path: path.stem)
def test_values_on_the_gpu(file):
    run_values(file)
