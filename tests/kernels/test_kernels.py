"""Triton kernels without a GPU: values in Triton's interpreter, and machine code read for what slows kernels down."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmae.kernels.random_masking import NUM_WARPS, block_sizes, random_masking_kernel

HERE = Path(__file__).parent
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90, 100)
# (name, kernel, signature, constants, warps) of every kernel with the shapes that training uses.
KERNELS = [
    (
        f"random_masking L={L}",
        random_masking_kernel,
        {"p_draw_ids": "*i64", "p_ids_shuffle": "*i32", "seed": "i64"},
        block_sizes(L),
        NUM_WARPS,
    )
    for L in (49, 196, 256, 1024)
]


@pytest.mark.parametrize("file", sorted(HERE.glob("interpreted_*.py")), ids=lambda path: path.stem)
def test_values_in_the_interpreter(file):
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize(
    ("kernel", "signature", "constants", "warps"), [k[1:] for k in KERNELS], ids=[k[0] for k in KERNELS]
)
def test_machine_code_keeps_everything_in_registers(kernel, signature, constants, warps, sm, tmp_path):
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": warps})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def dump(option):
        return subprocess.run([CUOBJDUMP, option, cubin], capture_output=True, text=True, check=True).stdout

    (stack, local) = re.search(r"STACK:(\d+).*LOCAL:(\d+)", dump("--dump-resource-usage")).groups()
    assert (stack, local) == ("0", "0"), "spills"
    assert not re.search(r"\b(STL|LDL)\b", dump("-sass")), "local memory"
