"""Triton kernels without a GPU: values in Triton's interpreter, and machine code read for what slows kernels down."""

import re
from pathlib import Path

import pytest
from device import run_values
from tools.machine_code import ARCHITECTURES, cases, compile_case

HERE = Path(__file__).parent
VALUES = {path.stem.removeprefix("values_"): path for path in sorted(HERE.glob("values_*.py"))}
# A process takes 4 seconds to start, so those that take no longer share one.
QUICK = ("norm_gelu", "ops", "tokens", "depthwise")
SLOW = ("depthwise_shapes",)
CASES = {case.name: case for case in cases()}
# Other widths and dtypes of kernels that are compiled anyway.
TWINS = [
    f"{kernel} {width}"
    for kernel in ("add_layer_norm", "add_layer_norm backward")
    for width in ("D=192 bf16", "D=512 fp32")
]
TWINS += [f"{kernel} fp32" for kernel in ("gelu", "gelu backward", "gelu again, and backward")]
TWINS += [name for name in CASES if re.match(r"masked_mse backward .*fp32|masked_mse backward 4×4", name)]
TWINS += [name for name in CASES if re.match(r"(?!masked_mse backward .*uint16|gather_patches .*×1 ).* of ", name)]
TWINS += [name for name in CASES if "depthwise" in name and "8×8 C=128" not in name]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a program can have


@pytest.mark.parametrize(
    "names",
    [
        QUICK,
        *(pytest.param([name], marks=pytest.mark.slow if name in SLOW else ()) for name in VALUES if name not in QUICK),
    ],
    ids="+".join,
)
def test_values_in_the_interpreter(names):
    run_values(*(VALUES[name] for name in names), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.parametrize(
    ("name", "sm"),
    [
        pytest.param(name, sm, marks=() if sm == 90 and name not in TWINS else pytest.mark.slow)
        for name in CASES
        for sm in ARCHITECTURES
    ],
)
def test_machine_code(name, sm):
    """No local memory; loads and stores as wide as rows and results allow; tensor cores where there are products."""
    case, code = CASES[name], compile_case(CASES[name], sm)
    assert (code.stack, code.local) == (0, 0), "spills"
    assert not re.search(r"\b(STL|LDL)\b", code.sass), "local memory"
    assert code.shared <= SHARED_MEMORY[sm]
    assert not re.search(r"\b(LDG|STG)\.E\.[US]8\b", code.sass), "single bytes"
    if case.wide_loads:
        assert re.search(r"\bLDG\.E\.(64|128)\b", code.sass), "narrow loads"
    if case.wide_stores:
        assert re.search(r"\bSTG\.E\.(64|128)\b", code.sass), "narrow stores"
    if case.least is not None:
        assert not re.search(r"\bSTG\.E\.U16\b|\bATOM|\bRED\b", code.sass), "narrow or atomic stores"
        # No number is read or written twice, and all by 8 or 16 bytes but the few statistics of rows.
        for moved, least, weights in zip(code.moved(case.num_warps), case.least, case.weights, strict=True):
            assert least <= moved <= least + weights
    if case.tensor_cores:
        assert re.search(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", code.sass), "no tensor cores"


def test_the_table_lists_every_kernel():
    """Its figures depend on the version of Triton and are not compared."""
    table = (HERE.parents[1] / "docs" / "kernels.md").read_text()
    assert [name for name in CASES if f"| {name} |" not in table] == []
