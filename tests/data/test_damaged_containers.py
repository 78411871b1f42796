"""Containers that are damaged anywhere: one line, or images with a record of what is missing; never another error."""

import gzip
import io
import re
import struct
import tarfile
import tracemalloc
import warnings
from collections import Counter

import numpy as np
import pytest
from damage import mutated
from helpers import soak

from fastmae.data.masks import open_masks
from fastmae.data.sources import describe, open_train, open_val
from fastmae.errors import UserError

MUTATIONS = soak(24, 3000)
EDGE = 300
"""The first and the last bytes of a container, where its headers and footers are."""
RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (20, 8, 6), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (20, 8, 6, 3), dtype=np.uint8)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def saved(save, *arrays, **named):
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


def tar(format):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for i in range(20):
            stem = "x" * 120 * (i % 3 == 0) + str(i)
            for name, data in ((f"{stem}.jpg", bytes([i]) * (200 + i)), (f"{stem}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def table(**options):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = pa.array([{"bytes": bytes([i]) * 50, "path": str(i)} for i in range(20)])
    file = io.BytesIO()
    pq.write_table(pa.table({"image": cells, "label": pa.array(range(20))}), file, row_group_size=10, **options)
    return file.getvalue()


WHOLE = {
    "x.npy": lambda: saved(np.save, COLOUR),
    "x_labels.npy": lambda: saved(np.save, np.arange(20)),
    "stored.npz": lambda: saved(np.savez, x_train=COLOUR, y_train=np.arange(20)),
    "packed.npz": lambda: saved(np.savez_compressed, x_train=COLOUR, y_train=np.arange(20)),
    "x-images-idx3-ubyte": lambda: idx(GRAY),
    "x-images-idx3-ubyte.gz": lambda: gzip.compress(idx(GRAY)),
    "x.bin": lambda: RNG.integers(0, 256, 20 * 3073, dtype=np.uint8).tobytes(),
    "gnu.tar": lambda: tar(tarfile.GNU_FORMAT),
    "pax.tar": lambda: tar(tarfile.PAX_FORMAT),
    "plain.parquet": table,
    "packed.parquet": lambda: table(compression="zstd", use_dictionary=False),
}


def damaged(whole, seed):
    """Anywhere in the container, or some bytes at its start, at its end or in one place."""
    if seed % 4 == 0:
        return mutated(whole, seed)
    random, data = np.random.default_rng(seed), bytearray(whole)
    span = min(len(data), EDGE)
    first = (0, len(data) - span, int(random.integers(max(1, len(data) - span))))[seed % 4 - 1]
    for position in first + random.integers(span, size=int(random.integers(1, 5))):
        data[position] = random.choice([0, 255, 127, 128, data[position] ^ 1 << int(random.integers(8))])
    return bytes(data)


def look_through(path, data):
    """Writes a container, opens it and reads it all. Returns what came of it."""
    path.write_bytes(data)
    return look(path)


def look(path, length=20):
    """Opens a container and reads it all. Returns what came of it; ``length`` None: whatever it says it holds."""
    opened = path.with_name("x.npy") if path.name == "x_labels.npy" else path
    try:
        source = open_train(str(opened))
        open_val(str(opened))
    except UserError as error:
        line = str(error)
        assert "\n" not in line
        assert len(line) < 1000
        assert str(path.parent) in line, "the line does not say where"
        return "refused"
    is_told = bool(source.stock.lines()) or bool(getattr(source, "damage", ()))
    assert len(source) == length or length is None or is_told, f"{len(source)} images without a word"
    assert describe(source).length == len(source)
    lines = []
    for index in range(min(100, len(source))):
        try:
            source.read(index)
        except (OSError, UserError) as error:
            lines.append(str(error))
    assert not any("\n" in line for line in lines)
    return "told" if is_told else "read"


@pytest.mark.parametrize("name", WHOLE)
def test_a_damaged_container_is_one_line_or_told(tmp_path, name, monkeypatch, record_property):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = WHOLE[name]()
    (tmp_path / "x.npy").write_bytes(WHOLE["x.npy"]())
    outcomes = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning is a line that nobody asked for
        assert look_through(tmp_path / name, whole) == "read"
        for seed in range(MUTATIONS):
            try:
                outcomes[look_through(tmp_path / name, damaged(whole, seed))] += 1
            except Exception as error:
                error.add_note(f"mutation {seed} of {name}")
                raise
    assert outcomes["refused"]
    record_property("containers with damaged headers and footers", MUTATIONS)
    record_property("refused among these", outcomes["refused"])


@pytest.mark.parametrize("version", [2, 3])
def test_a_damaged_zarr_store_is_one_line_or_told_and_allocates_nothing_first(tmp_path, version, monkeypatch):
    """Its metadata, which may claim any shape and codec, and its chunks. No memory is taken for what is claimed."""
    zarr = pytest.importorskip("zarr")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "x.zarr"
    zarr.create_array(str(path), data=COLOUR, chunks=(5, 8, 6, 3), zarr_format=version)
    whole = {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    metadata = next(file for file in whole if file.name in ("zarr.json", ".zarray"))
    outcomes = Counter()
    assert look(path) == "read"
    tracemalloc.start()
    try:
        for seed in range(MUTATIONS):
            file = metadata if seed % 3 else [*whole][seed % len(whole)]
            data = _other_number(whole[file], seed) if seed % 2 and file == metadata else damaged(whole[file], seed)
            file.write_bytes(data)
            try:
                outcomes[look(path, length=None)] += 1  # a shape of fewer images is as good as any
            except Exception as error:
                error.add_note(f"mutation {seed} of {file.name}")
                raise
            file.write_bytes(whole[file])
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert outcomes["refused"]


def _other_number(text, seed):
    """Returns JSON with one of its numbers replaced by one that nobody means."""
    random = np.random.default_rng(seed)
    found = [*re.finditer(rb"\d+", text)]
    at = found[int(random.integers(len(found)))]
    other = random.choice([b"0", b"1", b"999999999", b"99999999999999999999", b"-1", b"1e400", b"null", b'"x"'])
    return text[: at.start()] + bytes(other) + text[at.end() :]


def test_damaged_masks_are_one_line_or_masks(tmp_path):
    whole = saved(np.save, np.arange(320).reshape(20, 4, 4) % 4 > 0)
    lines = []
    for seed in range(MUTATIONS):
        (tmp_path / "masks.npy").write_bytes(damaged(whole, seed))
        try:
            file = open_masks(str(tmp_path / "masks.npy"), None)
        except UserError as error:
            lines.append(str(error))
        else:
            assert (file.masked.sum(axis=(1, 2)) == file.count).all()
    assert lines
    assert not any("\n" in line or len(line) > 1000 for line in lines)


def test_masks_may_change_during_a_run(tmp_path):
    path = tmp_path / "masks.npy"
    np.save(path, np.arange(320).reshape(20, 4, 4) % 4 > 0)
    file = open_masks(str(path), None)
    path.write_bytes(b"")
    assert file.masked.sum() == 240
