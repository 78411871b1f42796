"""Triton kernels without a GPU: values in Triton's interpreter, and machine code read for what slows kernels down."""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from device import run_values
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmae.kernels import gather_patches, masked_mse, random_masking

HERE = Path(__file__).parent
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90, 100)
IDS = {"p_ids": "*i32", "p_mean": "*fp32", "p_std": "*fp32", "ids_stride_n": "i32"}
STRIDES = {"stride_n": "i64", "stride_h": "i32"}
# (patch, channels, pixels lie densely enough for wide loads): published models, and small gray and colour images.
IMAGES = [(16, 3, True), (14, 3, False), (4, 1, False), (4, 3, False)]


def cases():
    """Every kernel with the shapes and types that training uses: (name, module, kernel, signature, constants, wide)."""
    for L in (49, 196, 256, 1024, 4096):
        signature = {"p_draw_ids": "*i64", "p_ids_shuffle": "*i32", "seed": "i64"}
        constants = random_masking.block_sizes(L)
        yield f"random_masking L={L}", random_masking, random_masking.random_masking_kernel, signature, constants, 0
    for patch, C, wide in IMAGES:
        pixels = patch * patch * C
        shape = dict(GW=14, PH=patch, PW=patch, C=C, PACKED=True, UINT8=True, stride_w=C, stride_c=1)
        for dtype in ("bf16", "fp32"):
            signature = {"p_images": "*u8", **IDS, "p_out": f"*{dtype}", "K": "i32", **STRIDES}
            constants = {**shape, **gather_patches.block_sizes(pixels), "ids_stride_k": 1}
            name = f"gather_patches {patch}×{patch}×{C} {dtype}"
            yield name, gather_patches, gather_patches.gather_patches_kernel, signature, constants, 1 + wide
            signature = {"p_pred": f"*{dtype}", "p_images": "*u8", **IDS, "p_sums": "*fp32", "p_grad": f"*{dtype}"}
            signature |= {"M": "i32", "scale": "fp32", **STRIDES}
            constants = {**shape, **masked_mse.block_sizes(pixels), "ids_stride_m": 1, "NORM_PIX": True, "EPS": 1e-6}
            name = f"masked_mse {patch}×{patch}×{C} {dtype}"
            yield name, masked_mse, masked_mse.masked_mse_kernel, signature, constants, 1 + wide


@pytest.mark.parametrize("file", sorted(HERE.glob("values_*.py")), ids=lambda path: path.stem)
def test_values_in_the_interpreter(file):
    run_values(file, TRITON_INTERPRET="1")


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case[0])
def test_machine_code(case, sm, tmp_path):
    """No local memory; the widest stores that results allow; 128-bit loads of pixels where their rows allow it."""
    _, module, kernel, signature, constants, wide = case
    aligned = [name for name in signature if name.startswith(("p_", "stride_"))]  # as torch allocates, and ViT sizes
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": module.NUM_WARPS}
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options).asm["cubin"])

    def dump(option):
        return subprocess.run([CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True).stdout

    resources, code = dump("--dump-resource-usage"), dump("-sass")
    assert re.search(r"STACK:(\d+).*LOCAL:(\d+)", resources).groups() == ("0", "0"), "spills"
    assert not re.search(r"\b(STL|LDL)\b", code), "local memory"
    if wide:
        assert re.search(r"\bSTG\.E\.(64|128)\b", code), "narrow stores"
    if wide > 1:
        assert re.search(r"\bLDG\.E\.128\b", code), "narrow loads of pixels"
