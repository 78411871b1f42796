"""What does each kernel cost in registers and shared memory, and does its machine code do what it was written for?

Compiles every Triton kernel with the shapes and types that training uses for GPUs that need not be there, and reads
the cubin with the cuobjdump of Triton's wheel. The table in docs/kernels.md is this file's output:

    python tests/tools/machine_code.py docs/kernels.md                     # all of it: a minute and a half
    python tests/tools/machine_code.py docs/kernels.md --only norm gelu    # some rows of it
    python tests/tools/machine_code.py                                     # printed
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmae.kernels import (
    add_layer_norm,
    assemble_tokens,
    attention,
    depthwise_visible,
    gather_patches,
    gelu,
    masked_mse,
    random_masking,
    scatter_patches,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90, 100)
TYPES = {"bf16": "*bf16", "fp32": "*fp32"}
PIXELS = {"uint8": ("*u8", 255), "uint16": ("*u16", 65535), "float32": ("*fp32", 1)}
# (patch, channels, whether rows of pixels start at multiples of 16 bytes): ViT-B and -L, ViT-H, small gray and colour.
IMAGES = [(16, 3, True), (14, 3, False), (4, 1, False), (4, 3, False)]
# (patch, channels, type) with a range and missing pixels: CT, a satellite's bands, colours.
WIDE_IMAGES = [(16, 1, "uint16"), (16, 12, "uint16"), (16, 3, "float32")]
GRID_WIDTH = 14
# (queries, tokens, width of a head): encoders of ViT-B and -L, of ViT-H, the small models'; decoders, and their last
# block, in which masked tokens alone ask; and encoders on whole images, up to the longest.
ATTENTION = [
    (50, 50, 64), (65, 65, 80), (50, 50, 32), (13, 13, 32),
    (197, 197, 32), (147, 197, 32), (257, 257, 32), (192, 257, 32),
    (197, 197, 64), (257, 257, 80), (320, 320, 64),
]  # fmt: skip
# (width of a token, dtype between blocks): the smallest and the largest model, and ViT-B with its decoder.
NORMS = [(192, "bf16"), (512, "fp32"), (768, "fp32"), (1280, "bf16")]
# (positions on a side of a cell, width): the stages of ConvNeXt V2 base, and the first of atto.
DEPTHWISE = [(8, 128, "bf16"), (4, 256, "fp32"), (2, 512, "bf16"), (1, 1024, "bf16"), (8, 40, "fp32")]
START, END = "<!-- table -->", "<!-- /table -->"


@dataclass(frozen=True)
class Case:
    """A kernel with everything that its machine code depends on, and what is expected of that code."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    maxnreg: int | None = None
    wide_loads: bool = False
    wide_stores: bool = False
    tensor_cores: bool = False
    least: tuple[int, int] | None = None
    """The fewest bytes of tokens that a program can read and write for one tile: see ``moved``."""
    weights: tuple[int, int] = (0, 0)
    """Bytes of weights that it reads and of sums that it writes besides, not for each tile."""


@dataclass(frozen=True)
class MachineCode:
    """Registers a thread, bytes of shared memory a program, bytes of stack and local memory a thread, and the SASS."""

    registers: int
    shared: int
    stack: int
    local: int
    sass: str

    def moved(self, num_warps: int) -> tuple[int, int]:
        """Bytes that a program reads and writes with accesses of 8 or 16 bytes, each executed once: one tile."""
        sums = []
        for access in ("LDG", "STG"):
            found = re.findall(rf"\b{access}\.E(?:\.\w+)*?\.(64|128)\b", self.sass)
            sums.append(32 * num_warps * sum(int(bits) // 8 for bits in found))
        return sums[0], sums[1]


def cases() -> Iterator[Case]:
    """Every kernel × the shapes and types of training."""
    yield from _masking()
    for patch, channels, wide in IMAGES:
        for dtype, pointer in TYPES.items():
            yield from _patches(patch, channels, wide, f"{patch}×{patch}×{channels} {dtype}", pointer)
    for patch, channels, pixels in WIDE_IMAGES:
        yield from _patches(patch, channels, True, f"{patch}×{patch}×{channels} of {pixels} bf16", "*bf16", pixels)
    for width in (96, 512):
        for dtype, pointer in TYPES.items():
            yield from _tokens(width, f"D={width} {dtype}", pointer)
    for width, stream in NORMS:
        yield from _norms(width, stream)
    for dtype in TYPES:
        yield from _gelu(4 * 768, dtype)
    for T, S, D in ATTENTION:
        yield from _attention(T, S, D)
    for side, width, dtype in DEPTHWISE:
        yield from _depthwise(side, width, dtype)


def _masking() -> Iterator[Case]:
    for L in (49, 196, 256, 1024, 4096):
        yield Case(
            f"random_masking L={L}",
            random_masking.random_masking_kernel,
            {"p_draw_ids": "*i64", "p_ids_shuffle": "*i32", "seed": "i64"},
            random_masking.block_sizes(L),
            random_masking.NUM_WARPS,
        )


def _patches(patch: int, C: int, wide: bool, name: str, pointer: str, pixels: str | None = None) -> Iterator[Case]:
    """Of uint8 pixels, or of ``pixels`` in a range, of which some are missing."""
    P, ranged, (image, unit) = patch * patch * C, pixels is not None, PIXELS[pixels or "uint8"]
    shape = dict(GW=GRID_WIDTH, PH=patch, PW=patch, C=C, PACKED=True, UNIT=unit, HAS_RANGE=ranged)
    shape |= dict(stride_w=C, stride_c=1)
    strides = {"stride_n": "i64", "stride_h": "i32"}
    common = {"p_ids": "*i32", "p_mean": "*fp32", "p_std": "*fp32", "p_range": "*fp32", "ids_stride_n": "i32"}
    yield Case(
        f"gather_patches {name}",
        gather_patches.gather_patches_kernel,
        {"p_images": image, **common, "p_out": pointer, "nodata": "fp32", "K": "i32", **strides},
        {**shape, **gather_patches.block_sizes(P), "ids_stride_k": 1, "HAS_NODATA": ranged},
        gather_patches.NUM_WARPS,
        wide_loads=wide,
        wide_stores=True,
    )
    read = {"p_pred": pointer, "p_images": image, **common, "nodata": "fp32", "M": "i32", **strides}
    constants = {**shape, **masked_mse.block_sizes(P), "ids_stride_m": 1, "HAS_NODATA": ranged}
    constants |= {"NORM_PIX": True, "EPS": 1e-6}
    yield Case(
        f"masked_mse {name}",
        masked_mse.masked_mse_kernel,
        read | {"p_sums": "*fp32", "p_counts": "*fp32"},
        constants,
        masked_mse.num_warps(P),
        wide_loads=True,  # of the prediction at least
    )
    yield Case(
        f"masked_mse backward {name}",
        masked_mse.masked_mse_backward_kernel,
        read | {"p_grad_loss": "*fp32", "p_targets": "*fp32", "p_grad": pointer, "scale": "fp32"},
        constants,
        masked_mse.num_warps(P),
        wide_loads=True,
        wide_stores=True,
    )
    yield Case(
        f"scatter_patches {name}",
        scatter_patches.scatter_patches_kernel,
        {"p_patches": pointer, **common, "p_out": image, "M": "i32", "L": "i32", **strides},
        {**shape, **scatter_patches.block_sizes(P), "ids_stride_m": 1},
        scatter_patches.NUM_WARPS,
        wide_loads=True,
        wide_stores=wide,
    )


def _tokens(width: int, name: str, pointer: str) -> Iterator[Case]:
    forward = {"p_visible": pointer, "p_mask_token": "*fp32", "p_pos_embed": "*fp32", "p_ids": "*i32", "p_out": "*fp32"}
    forward |= {"S": "i32", "T": "i32", "visible_stride_n": "i32", "visible_stride_t": "i32", "ids_stride_n": "i32"}
    yield Case(
        f"assemble_tokens {name}",
        assemble_tokens.assemble_tokens_kernel,
        forward,
        {**assemble_tokens.block_sizes(width), "ids_stride_l": 1},
        assemble_tokens.NUM_WARPS,
        wide_loads=True,
        wide_stores=True,
    )
    yield Case(
        f"assemble_tokens backward {name}",
        assemble_tokens.assemble_tokens_backward_kernel,
        {"p_grad": "*fp32", "p_grad_visible": pointer, "p_sums": "*fp32", "S": "i32", "T": "i32"},
        assemble_tokens.backward_block_sizes(width),
        assemble_tokens.NUM_WARPS,
        wide_loads=True,
        wide_stores=True,
    )


def _norms(width: int, stream: str) -> Iterator[Case]:
    """With bfloat16 branches, as under autocast."""
    forward = {"p_x": TYPES[stream], "p_branch": "*bf16", "p_branch_bias": "*fp32", "p_weight": "*fp32"}
    forward |= {"p_bias": "*fp32"}
    forward |= {"p_stream": TYPES[stream], "p_normed": "*bf16", "p_mean": "*fp32", "p_rstd": "*fp32", "R": "i32"}
    forward |= {"T": "i32", "x_stride_n": "i32", "branch_stride_n": "i32"}
    size = 4 if stream == "fp32" else 2
    blocks = add_layer_norm.block_sizes(width)
    warps = blocks.pop("num_warps")
    tile, affine = blocks["BR"] * blocks["BD"], 4 * blocks["BD"]
    yield Case(
        f"add_layer_norm D={width} {stream}",
        add_layer_norm.add_layer_norm_kernel,
        forward | {"x_stride_t": "i32", "branch_stride_t": "i32"},
        {**blocks, "HAS_BIAS": True, "EPS": 1e-6},
        warps,
        wide_loads=True,
        wide_stores=True,
        least=(tile * (size + 2), tile * (size + 2)),
        weights=(3 * affine, 0),
    )
    backward = {"p_grad_stream": TYPES[stream], "p_grad_normed": "*bf16", "p_stream": TYPES[stream]}
    backward |= {"p_weight": "*fp32", "p_mean": "*fp32", "p_rstd": "*fp32", "p_grad_x": TYPES[stream]}
    backward |= {"p_grad_branch": "*bf16", "p_sums": "*fp32", "R": "i32", "rows": "i32"}
    blocks = add_layer_norm.backward_block_sizes(width)
    warps, maxnreg = blocks.pop("num_warps"), blocks.pop("maxnreg")
    tile, two = blocks["BR"] * blocks["BD"], 2 if stream == "fp32" else 0
    yield Case(
        f"add_layer_norm backward D={width} {stream}",
        add_layer_norm.add_layer_norm_backward_kernel,
        backward,
        {**blocks, "HAS_STREAM": True, "TWO": stream == "fp32", "HAS_BIAS": True},
        warps,
        maxnreg=maxnreg,
        wide_loads=True,
        wide_stores=True,
        least=(tile * (2 * size + 2), tile * (size + two)),
        weights=(affine, 3 * affine),
    )


def _gelu(width: int, dtype: str) -> Iterator[Case]:
    constants, pointer = {**gelu.block_sizes(width), "HAS_BIAS": True}, TYPES[dtype]
    forward = {"p_h": pointer, "p_bias": "*fp32", "p_out": pointer, "R": "i32"}
    backward = {"p_grad": pointer, "p_h": pointer, "p_bias": "*fp32", "p_grad_h": pointer, "p_sums": "*fp32"}
    backward |= {"p_out": pointer, "R": "i32", "rows": "i32"}
    tile = (4 if dtype == "fp32" else 2) * constants["BR"] * constants["BF"]
    bias = 4 * constants["BF"]
    wide = dict(wide_loads=True, wide_stores=True)
    yield Case(
        f"gelu {dtype}",
        gelu.gelu_kernel,
        forward,
        constants,
        gelu.NUM_WARPS,
        **wide,
        least=(tile, tile),
        weights=(bias, 0),
    )
    for name, again in ((f"gelu backward {dtype}", False), (f"gelu again, and backward {dtype}", True)):
        yield Case(
            name,
            gelu.gelu_backward_kernel,
            backward,
            {**constants, "AGAIN": again},
            gelu.NUM_WARPS,
            **wide,
            least=(2 * tile, 2 * tile if again else tile),
            weights=(bias, bias),
        )


def _depthwise(side: int, width: int, dtype: str) -> Iterator[Case]:
    constants, pointer = depthwise_visible.block_sizes(side, width), TYPES[dtype]
    numbers = {"K": "i32", "gh": "i32", "gw": "i32"}
    name = f"{side}×{side} C={width} {dtype}"
    yield Case(
        f"depthwise_visible {name}",
        depthwise_visible.depthwise_visible_kernel,
        {"p_x": pointer, "p_slots": "*i32", "p_ids": "*i32", "p_weight": "*fp32", "p_bias": "*fp32", "p_out": pointer}
        | numbers,
        {**constants, "HAS_BIAS": True, "TURNED": False},
        depthwise_visible.WARPS[side],
        wide_loads=True,
        wide_stores=True,
    )
    yield Case(
        f"depthwise_visible weights {name}",
        depthwise_visible.depthwise_visible_weights_kernel,
        {"p_x": pointer, "p_grad": pointer, "p_slots": "*i32", "p_ids": "*i32", "p_sums": "*fp32"}
        | {"cells": "i32", "run": "i32"}
        | numbers,
        constants,
        depthwise_visible.WARPS[side],
        wide_loads=True,
    )


def _attention(T: int, S: int, D: int) -> Iterator[Case]:
    forward, backward = attention.tile_sizes(T, S, D)
    sweeps, whole = attention.attention_backward_kernel, attention.attention_backward_whole_kernel
    kernels = {
        "forward": (attention.attention_forward_kernel, forward),
        "backward": (sweeps if "BM" in backward else whole, backward),
    }
    for direction, (kernel, blocks) in kernels.items():
        constants = {**attention.shape_constants(T, S, 16, D, torch.bfloat16), **blocks}
        warps, stages = (constants.pop(option) for option in ("num_warps", "num_stages"))
        yield Case(
            f"attention {direction} T={T} S={S} Dh={D} bf16",
            kernel,
            {name: _attention_type(name) for name in kernel.arg_names if name not in constants},
            constants,
            warps,
            stages,
            wide_loads=True,
            wide_stores=True,
            tensor_cores=True,
        )


def _attention_type(name: str) -> str:
    if name in ("p_lse", "p_delta"):
        return "*fp32"
    if name.startswith("p_"):
        return "*bf16"
    return "i64" if name.endswith("stride_n") else "i32"


def compile_case(case: Case, sm: int) -> MachineCode:
    """The machine code for compute capability ``sm`` (80, 90 …), with pointers and strides as torch aligns them."""
    aligned = [name for name in case.signature if name.startswith("p_") or "stride" in name]
    attributes = {(case.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(case.kernel, case.signature, constexprs=case.constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        words = [str(CUOBJDUMP), "--dump-resource-usage", "-sass", cubin.name]
        dump = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump)
    assert found is not None, dump[:2000]
    registers, stack, local = map(int, found.groups())
    return MachineCode(registers, compiled.metadata.shared, stack, local, dump)


def compile_named(name: str, sm: int) -> MachineCode:
    """``compile_case`` of the case of that name: for other processes, to which kernels cannot be sent."""
    return compile_case(next(case for case in cases() if case.name == name), sm)


def row(case: Case) -> str:
    """A row of the table: registers a thread and shared memory a program on every architecture."""
    codes = [compile_case(case, sm) for sm in ARCHITECTURES]
    costs = " | ".join(f"{code.registers}, {code.shared:,}" for code in codes)
    return f"| {case.name} | {case.num_warps} | {costs} |"


def table(before: str = "", words: Sequence[str] = ()) -> str:
    """A Markdown table of all cases. Those whose names have none of the ``words`` are as in the table ``before``."""
    known = {line.split(" | ")[0].removeprefix("| "): line for line in before.splitlines()}
    rows = ["| kernel | warps | " + " | ".join(f"sm_{sm}: registers, shared bytes" for sm in ARCHITECTURES) + " |"]
    rows.append("|---|---|" + "---|" * len(ARCHITECTURES))
    for case in cases():
        if not words or any(word in case.name for word in words):
            rows.append(row(case))
        elif case.name in known:
            rows.append(known[case.name])
    return "\n".join([*rows, "", f"Triton {triton.__version__}."])


def main() -> None:
    """Puts the table between the two marks of a document, or prints it if none is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "document", nargs="?", type=Path, help="a file with the two marks; without it the table is printed"
    )
    parser.add_argument("--only", nargs="+", default=(), help="compile kernels with these words in their names alone")
    options = parser.parse_args()
    if options.document is None:
        print(table(words=options.only))
        return
    before, rest = options.document.read_text().split(START)
    old, after = rest.split(END)
    options.document.write_text(f"{before}{START}\n{table(old, options.only)}\n{END}{after}")


if __name__ == "__main__":
    main()
