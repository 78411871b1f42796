"""Slices of NIfTI volumes are those that nibabel gives, turned by the affine, and hostile files are refused."""

import gzip
import itertools
import struct
from pathlib import Path

import numpy as np
import pytest

from fastmae.data.fingerprint import difference, fingerprint
from fastmae.data.formats import nifti
from fastmae.data.plan import plan_epoch
from fastmae.data.sources import Concat, describe, open_train, open_val
from fastmae.errors import UserError
from fastmae.facts import ReadAs

nibabel = pytest.importorskip("nibabel")

RNG = np.random.default_rng(0)
AXES = ("axial", "coronal", "sagittal", "0", "1", "2")
BUNDLED = sorted((Path(nibabel.__file__).parent / "tests" / "data").glob("*.nii*"))


def by_nibabel(path, axis):
    """All slices [H, W, C] that nibabel gives, as radiologists see them."""
    image = nibabel.load(path)
    data = np.asanyarray(image.dataobj)
    data = data.reshape(data.shape + (1,) * (5 - data.ndim))
    if axis in "012":
        moved = np.moveaxis(data, int(axis), 0)
        return [level[..., time, :] for time in range(data.shape[3]) for level in moved]
    turned = nibabel.orientations.apply_orientation(data, nibabel.io_orientation(image.affine))
    moved = np.moveaxis(turned, nifti.AXES[axis], 0)
    return [level[..., time, :].transpose(1, 0, 2)[::-1, ::-1] for time in range(data.shape[3]) for level in moved]


def check(path, axis, most=10**9):
    source, expected = open_train(str(path), ReadAs(axis=axis)), by_nibabel(path, axis)
    assert len(source) == len(expected)
    for index in range(0, len(source), max(1, len(source) // most)):
        read, wanted = source.read(index), expected[index]
        assert read.dtype in (wanted.dtype.newbyteorder("="), np.float32)
        assert read.astype(np.float64).tobytes() == wanted.astype(read.dtype).astype(np.float64).tobytes()
    return source


def save(path, data, affine=None, scale=None):
    """Writes voxels as they are, with a slope and an intercept that nibabel would compute itself."""
    image = nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine)
    nibabel.save(image, path)
    if scale is not None:
        unpacked = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        struct.pack_into(f"{image.header.endianness}ff", unpacked, 112, *scale)
        path.write_bytes(gzip.compress(unpacked) if path.suffix == ".gz" else unpacked)
    return str(path)


@pytest.mark.parametrize("name", [path.name for path in BUNDLED if "dconn" not in path.name])
def test_the_files_that_come_with_nibabel_are_read_as_it_reads_them(name):
    path = next(path for path in BUNDLED if path.name == name)
    for axis in AXES:
        check(path, axis, most=12)


def test_every_orientation_gives_the_same_pictures(tmp_path):
    body = RNG.integers(0, 4096, (5, 6, 7)).astype(np.int16)  # to the right, to the front, to the top
    pictures = None
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        stored = body
        for axis, (body_axis, sign) in enumerate(zip(order, signs, strict=True)):
            affine[body_axis, axis] = sign * 2.5
            stored = np.flip(stored, body_axis) if sign < 0 else stored
        source = open_train(save(tmp_path / "x.nii", stored.transpose(order), affine), ReadAs(axis="coronal"))
        read = np.stack([source.read(index) for index in range(len(source))])
        pictures = read if pictures is None else pictures
        assert np.array_equal(read, pictures)
    assert np.array_equal(pictures[..., 0], body.transpose(1, 2, 0)[:, ::-1, ::-1])  # top first, right first


KINDS = {
    "8 bits": np.arange(256).astype(np.uint8), "12 bits": np.arange(4096).astype(">i2"),
    "16 bits": np.arange(65536).astype(np.uint16), "floats": RNG.normal(size=3000).astype(np.float32),
    "doubles": RNG.normal(size=3000),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_every_type_with_time_and_channels_and_scaled(tmp_path, kind, suffix):
    for number, shape in enumerate(((20, 15, -1), (8, 9, 5, -1), (8, 9, -1, 2, 3))):
        values = KINDS[kind]
        rest = -(-len(values) // -int(np.prod(shape)))
        data = np.resize(values, [rest if length < 0 else length for length in shape])
        check(save(tmp_path / f"{number}{suffix}", data), AXES[number % 6])
    source = check(save(tmp_path / f"s{suffix}", data, scale=(2.0, -1024.0)), "sagittal")
    assert source.read(0).dtype == (np.float64 if kind == "doubles" else np.float32)


def test_a_folder_of_volumes_has_parts_and_classes_and_each_slice_is_a_sample(tmp_path):
    for part, label, number in itertools.product(("train", "val"), ("ill", "well"), range(2)):
        (tmp_path / part / label).mkdir(parents=True, exist_ok=True)
        data = RNG.integers(0, 4096, (9, 8, 5 + number)).astype(np.int16)
        data[..., 0] = -1000
        save(tmp_path / part / label / f"{number}.nii.gz", data)
    (tmp_path / "train" / "ill" / "bad.nii.gz").write_bytes(b"\x1f\x8bnothing")
    (tmp_path / "train" / "notes.json").touch()
    train, val = open_train(str(tmp_path)), open_val(str(tmp_path))
    assert (train.labels.tolist(), train.classes, len(val)) == ([0] * 11 + [1] * 11, ("ill", "well"), 22)
    assert describe(train).size == (8, 9)
    assert [(item.unit, item.count) for item in train.stock.left_out] == [("files", 1), ("volumes", 1)]
    assert "4 volumes of at most 864 bytes are gzipped and unpacked whole, 4 of them" in train.stock.notes[0]
    dropped = open_train(str(tmp_path), ReadAs(constant_slices="drop"))
    assert dropped.labels.tolist() == [0] * 9 + [1] * 9
    assert [item.count for item in dropped.stock.left_out if item.unit == "slices"] == [4]
    kept = [index for index in range(22) if index not in (0, 5, 11, 16)]
    assert all(np.array_equal(dropped.read(new), train.read(old)) for new, old in enumerate(kept))
    both = Concat((train, dropped))
    assert len(both) == 40
    assert both.shards is not None
    assert difference(fingerprint(dropped), fingerprint(train)) is not None
    before = fingerprint(train)
    save(tmp_path / "train" / "ill" / "0.nii.gz", np.zeros((9, 8, 5), np.int16))
    assert "sizes of ill/0.nii.gz" in difference(fingerprint(open_train(str(tmp_path))), before)


def test_a_gzipped_volume_is_unpacked_once_while_the_order_stays_with_it(tmp_path, monkeypatch):
    for number in range(12):
        save(tmp_path / f"{number:02}.nii.gz", RNG.integers(0, 99, (6, 6, 10)).astype(np.int16))
    monkeypatch.setattr(nifti, "HELD_BYTES", 720 * 4)
    unpacked, unpack = [], nifti._unpacked
    monkeypatch.setattr(nifti, "_unpacked", lambda *args: (unpacked.append(1), unpack(*args))[1])
    source = open_train(str(tmp_path))
    assert (len(source.shards.starts), source.shards.window) == (13, 40)
    for epoch in range(3):
        unpacked.clear()
        for index in plan_epoch(0, epoch, 120, 1, shards=source.shards).order.tolist():
            source.read(index)
        assert len(unpacked) <= 12 + 5


def test_hostile_volumes_are_refused_in_one_line_and_nothing_is_allocated(tmp_path):
    whole = Path(save(tmp_path / "x.nii", RNG.integers(0, 999, (8, 9, 10)).astype(np.int16))).read_bytes()

    def changed(start, form, *values):
        data = bytearray(whole)
        struct.pack_into(f"<{form}", data, start, *values)
        return bytes(data)

    dims = changed(40, "8h", 3, 32767, 32767, 32767, 1, 1, 1, 1)
    cases = {
        "cut.nii": (whole[:-1], "says .8, 9, 10. int16 and has"),
        "short.nii": (whole[:100], "does not begin as a NIfTI"),
        "claims.nii": (dims, "says .32767, 32767, 32767. int16 and has"),
        "claims.nii.gz": (gzip.compress(dims), "can unpack to"),
        "empty.nii": (b"", "does not begin"),
        "negative.nii": (changed(40, "8h", 3, -8, 9, 10, 1, 1, 1, 1), "says|cannot be read"),
        "axes.nii": (changed(40, "8h", 99, 8, 9, 10, 1, 1, 1, 1), "cannot be read"),
        "type.nii": (changed(70, "h", 9999), "cannot be read"),
        "complex.nii": (changed(70, "hh", 32, 64), "voxels are complex64"),
        "rgb.nii": (changed(70, "hh", 128, 24), "voxels are colours"),
        "offset.nii": (changed(108, "f", 1e30), "begin at byte|cannot be read"),
        "pair.nii": (changed(344, "4s", b"ni1\0"), "a pair of files"),
        "magic.nii": (changed(344, "4s", b"abcd"), "does not begin"),
        "affine.nii": (changed(280, "4f", *[float("nan")] * 4), "axis=.axial.: .*set it to 0, 1 or 2"),
        "text.nii.gz": (b"\x1f\x8bhello", "is damaged"),
        "zip.nii.gz": (gzip.compress(b"hello"), "does not begin"),
    }
    for name, (data, words) in cases.items():
        if name == "affine.nii":
            data = bytearray(data)
            struct.pack_into("<hh", data, 252, 0, 1)
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=words) as caught:
            open_train(str(tmp_path / name))
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)
    (tmp_path / "late.nii.gz").write_bytes(gzip.compress(whole)[:-40])
    late = open_train(str(tmp_path / "late.nii.gz"))
    with pytest.raises(OSError, match=r"late\.nii\.gz"):
        late.read(0)
    source = open_train(str(tmp_path / "x.nii"))
    (tmp_path / "x.nii").write_bytes(whole + b"x")
    with pytest.raises(UserError, match="changed during the run"):
        source.read(0)


def test_a_missing_library_is_one_line_with_the_command(tmp_path, monkeypatch):
    import sys

    path = save(tmp_path / "x.nii", np.zeros((8, 9, 10), np.int16))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(UserError, match=r"need nibabel; run pip install 'fastmae\[science\]'"):
        open_train(path)
