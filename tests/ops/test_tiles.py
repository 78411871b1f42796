"""The tiles of AMX as they are emulated, against their definition in NumPy; and what the processor's would execute.

Where the processor has AMX and the kernel grants it, its tiles must give the bits of the emulated ones.
"""

from __future__ import annotations

import itertools
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
COMPILER, DISASSEMBLER = shutil.which("c++"), shutil.which("objdump")

pytestmark = pytest.mark.skipif(
    COMPILER is None or (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="needs a C++ compiler for x86-64 on Linux",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiles") / "tiles"
    source = ROOT / "tests/tools/tiles.cpp"
    command = [COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", "-I", ROOT / "csrc", source, "-o", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return path


def run(program, *words, given=b""):
    return subprocess.run([program, *map(str, words)], input=given, capture_output=True, timeout=60)


def draw(rows, pairs, columns, scale=1.0):
    """Tiles a, b of bfloat16 in pairs and c of float32, as 16 × 16 cells; beyond their ends lies NaN."""
    dice = np.random.default_rng(rows + 16 * pairs)
    halves = [(dice.standard_normal((16, 32)) * scale).astype(np.float32).view(np.uint32) >> 16 for _ in range(2)]
    a, b = (np.ascontiguousarray(half.astype(np.uint16)).view(np.uint32) for half in halves)
    c = dice.standard_normal((16, 16)).astype(np.float32).view(np.uint32)
    for tile, height, width in ((a, rows, pairs), (b, pairs, columns), (c, rows, columns)):
        tile[height:], tile[:, width:] = 0x7FC07FC0, 0x7FC07FC0
    return a, b, c


def numbers(tile):
    """[16, 16] cells as [16, 16, 2] numbers: the first of a pair is in the lower half of a cell."""
    return np.stack([(tile << 16).view(np.float32), (tile & np.uint32(0xFFFF0000)).view(np.float32)], axis=2)


def product(a, b, c, rows, pairs, columns):
    """The definition: of both places of the pairs, sums of products that are rounded to float32 once each."""
    x, y = numbers(a)[:rows, :pairs].astype(np.float64), numbers(b)[:pairs, :columns].astype(np.float64)
    sums = np.zeros((rows, columns, 2), np.float32)
    for k in range(pairs):
        sums = (sums + x[:, None, k] * y[None, k]).astype(np.float32)
    expected = c.copy()
    both = sums[..., 0] + sums[..., 1]
    expected[:rows, :columns] = (c[:rows, :columns].view(np.float32) + both).view(np.uint32)
    return expected


SIZES = [(16, 16, 16), (5, 16, 16), (16, 3, 16), (16, 16, 7), (1, 1, 1), (9, 8, 15)]


@pytest.mark.parametrize("size", SIZES)
def test_a_product_of_tiles_is_its_definition(program, size):
    tiles = draw(*size)
    done = run(program, "dot", *size, given=b"".join(tile.tobytes() for tile in tiles))
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.frombuffer(done.stdout, np.uint32).reshape(16, 16), product(*tiles, *size))


def test_subnormal_numbers_count_as_zero(program):
    a, b, c = (np.zeros((16, 16), np.uint32) for _ in range(3))
    a[0, 0], b[0, 0] = 0x00000001, 0x00007F00  # the smallest subnormal bfloat16 times a large number
    a[1, 0], b[0, 1] = 0x20000000, 0x1F800000  # a product below the smallest normal float32
    c[2, 2] = 0x00400000
    done = run(program, "dot", 16, 16, 16, given=a.tobytes() + b.tobytes() + c.tobytes())
    assert not np.frombuffer(done.stdout, np.float32).any()


def test_the_processor_gives_the_bits_of_the_emulated_tiles(program):
    for size, scale in itertools.product(SIZES, (1.0, 1e-20, 1e18)):
        given = b"".join(tile.tobytes() for tile in draw(*size, scale))
        done = run(program, "amx", *size, given=given)
        if done.returncode == 3:
            pytest.skip("no AMX here")
        assert (done.returncode, done.stdout) == (0, run(program, "dot", *size, given=given).stdout)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unconfigured", "a tile that is not configured"),
        ("released", "a tile that is not configured"),
        ("missing", "a tile that is not configured"),
        ("fit", "tiles that do not fit together"),
        ("part", "tiles with a part of a cell"),
        *(
            (name, "a wrong configuration of tiles")
            for name in ("palette", "reserved", "rows", "bytes", "half", "ninth")
        ),
    ],
)
def test_what_a_processor_refuses_is_refused(program, name, words):
    assert run(program, "fault", name).stdout.decode() == words
    assert run(program, "fault", "nothing").stdout == b""


@pytest.mark.skipif(DISASSEMBLER is None, reason="needs objdump")
def test_the_machine_code_multiplies_tiles(program):
    """Four products of two by two tiles need four loads, and nothing else touches a tile in between."""
    done = subprocess.run([DISASSEMBLER, "-d", program], capture_output=True, text=True, check=True)
    found = re.findall(r"\b(ldtilecfg|tilerelease|tilezero|tileloadd|tilestored|tdpbf16ps) *(.*)", done.stdout)
    names = [name for name, _ in found]
    assert {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps"} == set(names)
    orders = [arguments for name, arguments in found if name == "tdpbf16ps"]
    # objdump names the tile that is added to last; the block of two by two tiles has all four.
    for order in ("%tmm6,%tmm4,%tmm0", "%tmm7,%tmm4,%tmm1", "%tmm6,%tmm5,%tmm2", "%tmm7,%tmm5,%tmm3"):
        assert order in orders, orders
