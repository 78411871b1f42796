"""The cases of ``fastmae bench kernels`` as pytest-benchmark tests, to compare one commit with another.

    pytest benchmarks --benchmark-only --benchmark-autosave       # before a change
    pytest benchmarks --benchmark-only --benchmark-compare        # after it

ViT-B/16 at the default batch size of the device and in its default precision; ours and the eager reference side by
side in one group a case. Not part of ``make test``: it asserts that results are right, never that they are fast.
"""

import pytest
import torch

from fastmae.benchmarks.cases import Case, all_cases, disagreement, run, shapes_of, true_result
from fastmae.benchmarks.kernels import CPU_BATCH, GPU_BATCH
from fastmae.train.parallel import choose_device
from fastmae.train.precision import choose_precision

pytest.importorskip("pytest_benchmark", reason="pip install 'fastmae[bench]'")

DEVICE = choose_device(None)
CASES = list(
    all_cases(
        shapes_of("mae_vit_base_patch16"),
        GPU_BATCH if DEVICE.type == "cuda" else CPU_BATCH,
        choose_precision("auto", DEVICE).autocast or torch.float32,
        DEVICE,
    )
)


@pytest.mark.parametrize("implementation", ["ours", "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}, {case.sizes}")
def test_speed(case: Case, implementation: str, benchmark):
    benchmark.group = f"{case.name}, {case.sizes}"
    benchmark.extra_info.update(bytes=case.moved, flops=case.flops, backend=case.backend)
    function = case.ours if implementation == "ours" else case.eager
    inputs = case.draw(torch.Generator(DEVICE).manual_seed(0))
    error, tolerance = disagreement(run(function, inputs), true_result(case, inputs))
    assert error <= tolerance

    def call() -> None:
        run(function, inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark(call)
