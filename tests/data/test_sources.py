"""Every kind of data is found by itself, read right, and refused in one line when it is broken."""

import gzip
import io
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmae.data import arrays, images, packed
from fastmae.data.arrays import FileRows, array_source
from fastmae.data.plan import Shards
from fastmae.data.sources import ArraySource, Concat, describe, open_train, open_val, train_and_val
from fastmae.errors import SettingError, UserError
from fastmae.facts import ReadAs

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (10, 6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (10, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(10) % 3


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def content(source):
    return np.stack([source.read(i) for i in range(len(source))])


def test_digits_are_the_default():
    train, val = open_train("digits"), open_val("digits")
    assert (len(train), len(val)) == (1438, 359)
    assert train.read(0).shape == (8, 8, 1)
    assert content(train).max() == 255
    facts = describe(train)
    assert (facts.kind, facts.channels, facts.size, facts.labelled) == ("digits", 1, (8, 8), True)


def test_npy_is_read_by_position_and_finds_its_labels(tmp_path):
    np.save(tmp_path / "cells.npy", GRAY)
    source = open_train(str(tmp_path / "cells.npy"))
    assert isinstance(source.images, FileRows)
    assert np.array_equal(content(source)[..., 0], GRAY)
    assert source.labels is None
    assert open_val(str(tmp_path / "cells.npy")) is None
    np.save(tmp_path / "cells_labels.npy", LABELS)
    assert np.array_equal(open_train(str(tmp_path / "cells.npy")).labels, LABELS)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_has_parts_and_is_read_by_position_when_stored(tmp_path, save):
    path = tmp_path / "set.npz"
    save(path, x_train=COLOUR, y_train=LABELS, x_test=COLOUR[:4], y_test=LABELS[:4][:, None])
    train, val = open_train(str(path)), open_val(str(path))
    assert isinstance(train.images, FileRows) == (save is np.savez)
    assert np.array_equal(content(train), COLOUR)
    assert np.array_equal(content(val), COLOUR[:4])
    assert np.array_equal(val.labels, LABELS[:4])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folders_and_files(tmp_path, suffix):
    pack = gzip.compress if suffix else bytes
    for prefix, n in (("train", 10), ("t10k", 4)):
        (tmp_path / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(GRAY[:n])))
        (tmp_path / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(LABELS[:n])))
    train, val = train_and_val(str(tmp_path))
    assert np.array_equal(content(train)[..., 0], GRAY)
    assert np.array_equal(content(val)[..., 0], GRAY[:4])
    assert np.array_equal(train.labels, LABELS)
    single = open_train(str(tmp_path / f"t10k-images-idx3-ubyte{suffix}"))
    assert np.array_equal(single.labels, LABELS[:4])


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_cifar_batches(tmp_path, label_bytes):
    images = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    planes = images.transpose(0, 3, 1, 2).reshape(6, -1)
    coarse = np.full((6, label_bytes - 1), 9, dtype=np.uint8)
    records = np.hstack([coarse, LABELS[:6, None].astype(np.uint8), planes])
    names = (
        ("data_batch_1.bin", "data_batch_2.bin", "test_batch.bin") if label_bytes == 1 else ("train.bin", "test.bin")
    )
    for name in names:
        (tmp_path / name).write_bytes(records.tobytes())
    train, val = train_and_val(str(tmp_path))
    assert len(train) == (12 if label_bytes == 1 else 6)
    assert np.array_equal(content(val), images)
    assert np.array_equal(val.labels, LABELS[:6])
    assert np.array_equal(content(open_train(str(tmp_path / names[0]))), images)


SHAPES = {
    (40, 3, 32, 32): (32, 32, 3), (40, 1, 28, 28): (28, 28, 1), (40, 4, 20, 24): (20, 24, 4), (9, 3, 8, 8): (8, 8, 3),
    (9, 8, 8, 3): (8, 8, 3), (9, 3, 32, 3): (3, 32, 3), (9, 11, 11, 100): (11, 11, 100), (1, 6, 5): (6, 5, 1),
    (9, 1, 128, 6): (1, 128, 6), (2, 1, 1, 1): (1, 1, 1), (9, 3, 3): (3, 3, 1), (3, 6, 5): (6, 5, 1),
    (28, 28, 50): (28, 50, 1),
}  # fmt: skip
TOLD = {(40, 3, 32, 32), (40, 1, 28, 28), (40, 4, 20, 24), (9, 3, 8, 8), (9, 1, 128, 6), (3, 6, 5), (28, 28, 50)}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_axes_of_an_array_are_read_as_meant_and_a_guess_is_told(tmp_path, shape):
    images = RNG.integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "stored.npz", images=images)
    np.savez_compressed(tmp_path / "packed.npz", images=images)
    is_planes = SHAPES[shape][2] != shape[-1] and len(shape) == 4
    expected = images.transpose(0, 2, 3, 1) if is_planes else images.reshape(-1, *SHAPES[shape])
    for name in ("x.npy", "stored.npz", "packed.npz"):
        source = open_train(str(tmp_path / name))
        assert np.array_equal(content(source), expected)
        assert describe(source).size == SHAPES[shape][:2]
        assert len(source.stock.notes) == (shape in TOLD)
        assert all(str(list(shape)) in note for note in source.stock.notes)
    assert np.array_equal(content(array_source(images, None, "x")), expected)


EVERY_TYPE = {
    "bool": np.arange(300) % 2 == 0,
    "int8": np.arange(-128, 128).repeat(2).astype(np.int8),
    "8 bits": np.arange(256).astype(np.uint8),
    "12 bits": np.arange(4096).astype(np.int16),
    "16 bits": np.arange(65536).astype(np.uint16),
    "big-endian": np.arange(65536).astype(">u2"),
    "32 bits": np.arange(-500, 500).astype(np.int32) * 4_000_000,
    "half floats": np.arange(65536).astype(np.uint16).view(np.float16),
    "floats": RNG.integers(0, 2**32, 6000, dtype=np.uint32).view(np.float32),
    "big-endian floats": RNG.normal(size=600).astype(">f4"),
    "doubles": RNG.normal(size=600),
}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", EVERY_TYPE)
def test_every_value_of_every_numeric_type_is_read_as_numpy_reads_it(tmp_path, kind, order):
    values = np.resize(EVERY_TYPE[kind], (-(-len(EVERY_TYPE[kind]) // 60), 6, 5, 2))
    images = np.require(values, requirements=[order])
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "stored.npz", x=images)
    np.savez_compressed(tmp_path / "packed.npz", x=images)
    expected = values.astype(np.uint8) * 255 if kind == "bool" else values
    for name in ("x.npy", "stored.npz", "packed.npz"):
        source = open_train(str(tmp_path / name))
        assert isinstance(source.images, FileRows) == (order == "C" and name != "packed.npz")
        read = content(source)
        assert read.dtype == expected.dtype.newbyteorder("=")
        assert read.tobytes() == expected.astype(read.dtype).tobytes()  # as bits, for there are NaNs
        assert len(source.stock.notes) == (kind == "bool")


def test_idx_files_hold_big_endian_numbers_of_every_type_that_mnist_names(tmp_path):
    for code, dtype in ((9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")):
        images = RNG.integers(-100, 100, (4, 6, 5)).astype(dtype)
        data = struct.pack(">HBB3I", 0, code, 3, *images.shape) + images.tobytes()
        (tmp_path / "x-idx3").write_bytes(data)
        assert np.array_equal(content(open_train(str(tmp_path / "x-idx3")))[..., 0], images)
        (tmp_path / "x-idx3").write_bytes(data[:-1])
        with pytest.raises(UserError, match="holds"):
            open_train(str(tmp_path / "x-idx3"))


def test_a_layout_says_what_a_shape_does_not(tmp_path):
    planes = RNG.integers(0, 60_000, (3, 12, 8, 8), dtype=np.uint16)
    np.save(tmp_path / "x.npy", planes)
    with pytest.raises(SettingError, match=r"layout='auto': .*set it to chw or to hwc"):
        open_train(str(tmp_path / "x.npy"))
    chw = open_train(str(tmp_path / "x.npy"), ReadAs(layout="chw"))
    assert np.array_equal(content(chw), planes.transpose(0, 2, 3, 1))
    assert np.array_equal(content(open_train(str(tmp_path / "x.npy"), ReadAs(layout="hwc"))), planes)
    assert np.array_equal(content(array_source(planes, None, "x", "chw")), planes.transpose(0, 2, 3, 1))


REFUSED = {
    "a colour image": (
        np.zeros((64, 48, 3), np.uint8),
        r"\[64, 48, 3\], which is one image \[H, W, C\]; save array\[None\]",
    ),
    "a gray image": (np.zeros((64, 48), np.uint8), r"\[64, 48\], which is one image; save array\[None\]"),
    "twelve bands first": (np.zeros((9, 12, 64, 64), np.uint8), r"set it to chw or to hwc, or save array.transpose"),
    "images in the last axis": (np.zeros((32, 32, 3, 50), np.uint8), r"\[H, W, C, N\].*array.transpose\(3, 0, 1, 2\)"),
    "gray ones in it": (np.zeros((28, 28, 1, 50), np.uint8), r"\[H, W, C, N\].*array.transpose\(3, 0, 1, 2\)"),
    "flat images": (np.zeros((50, 784), np.uint8), r"or if its rows are images save array.reshape\(-1, 28, 28\)"),
    "five axes": (np.zeros((2, 3, 4, 8, 8), np.uint8), r"\[2, 3, 4, 8, 8\]; save it in one of these"),
    "no pixels": (np.zeros((9, 0, 8, 3), np.uint8), r"has \[9, 0, 8, 3\]"),
    "one axis": (np.zeros(9, np.uint8), r"has \[9\]"),
    "no axes": (np.uint8(9), r"has \[\]"),
    "complex": (GRAY * 1j, r"holds complex128; save np.abs\(array\)"),
    "words": (np.array(["a", "b"]), "holds <U1"),
    "records": (np.zeros(3, [("a", "u1")]), "must be integers or floating-point numbers"),
    "80 bits": (GRAY.astype(np.longdouble), "holds float128|holds float96|holds >?<?f"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_that_cannot_be_meant_are_refused_with_what_to_save(tmp_path, case):
    array, words = REFUSED[case]
    np.save(tmp_path / "x.npy", array)
    np.savez_compressed(tmp_path / "x.npz", x=array)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(UserError, match=words) as caught:
            open_train(str(tmp_path / name))
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.eye(10, dtype=np.int64), r"labels int64 \[10, 10\]; if they are one-hot, save labels.argmax\(axis=1\)"),
        (LABELS.astype(np.float32), r"labels float32 \[10\]; save labels.astype\(np.int64\)"),
        (LABELS > 0, r"labels bool \[10\]"),
        (LABELS[:, None] * np.ones((1, 2), int), r"labels int64 \[10, 2\]"),
        (LABELS.reshape(1, 10), r"labels int64 \[1, 10\]"),
        (np.full(10, 2**63, np.uint64), "too large"),
        (np.array([{}], object), "never unpickled"),
    ],
)
def test_labels_that_are_not_one_integer_per_image_are_refused(tmp_path, labels, words):
    np.save(tmp_path / "x.npy", GRAY)
    np.save(tmp_path / "x_labels.npy", labels)
    with pytest.raises(UserError, match=words):
        open_train(str(tmp_path / "x.npy"))


@pytest.mark.parametrize("labels", [LABELS[:, None], LABELS.astype(">i2"), LABELS.astype(np.uint64)])
def test_labels_of_any_integers_are_taken(tmp_path, labels):
    np.save(tmp_path / "x.npy", np.asfortranarray(COLOUR))
    np.save(tmp_path / "x_labels.npy", labels)
    source = open_train(str(tmp_path / "x.npy"))
    assert np.array_equal(source.labels, LABELS)
    assert np.array_equal(content(source), COLOUR)
    assert source.stock.used == {"images": 10, "files": 2}


def test_arrays_and_files_that_are_not_used_are_counted(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=GRAY, y_train=LABELS, x_test=GRAY, images=GRAY, notes=LABELS)
    stock = open_train(str(tmp_path / "a.npz")).stock
    assert (stock.used, stock.total("arrays")) == ({"images": 10, "files": 1, "arrays": 3}, 5)
    assert stock.left_out[0].examples == ("images", "notes")
    assert open_val(str(tmp_path / "a.npz")).stock.used == {"images": 10}
    (tmp_path / "mnist" / "more").mkdir(parents=True)
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "notes.txt"):
        (tmp_path / "mnist" / name).write_bytes(idx(GRAY))
    (tmp_path / "mnist" / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    (tmp_path / "mnist" / "more" / "x.png").touch()
    (tmp_path / "mnist" / ".hidden").touch()
    stock = open_train(str(tmp_path / "mnist")).stock
    assert (stock.used, stock.total("files")) == ({"images": 10, "files": 3}, 7)
    assert [item.examples for item in stock.left_out] == [
        ("more/x.png", "notes.txt", "train-images-idx3-ubyte.gz"),
        (".hidden",),
    ]
    with open(tmp_path / "two.npy", "wb") as file:
        np.save(file, GRAY)
        np.save(file, COLOUR)
    (note,) = open_train(str(tmp_path / "two.npy")).stock.notes
    assert "1,028 bytes behind its first array are left out" in note


@pytest.mark.parametrize("kind", ["npy", "npz", "idx", "cifar", "planes"])
@pytest.mark.parametrize("change", ["cut", "rewritten", "emptied"])
def test_a_file_that_changes_during_a_run_is_a_line_that_names_it_and_not_a_signal(tmp_path, kind, change):
    path = tmp_path / {"idx": "x-images-idx3-ubyte", "cifar": "x.bin", "planes": "x.npy"}.get(kind, f"x.{kind}")
    images = np.zeros((50, 3, 32, 32) if kind == "planes" else (50, 32, 32, 3), np.uint8)
    if kind == "npz":
        np.savez(path, images=images)
    elif kind in ("npy", "planes"):
        np.save(path, images)
    else:
        path.write_bytes(idx(images[..., 0]) if kind == "idx" else bytes(50 * 3073))
    source = open_train(str(path))
    source.read(0)
    data = path.read_bytes()
    with open(path, "r+b") as file:
        if change == "rewritten":
            file.write(data)
        else:
            file.truncate(len(data) // 2 if change == "cut" else 0)
    os.utime(path, ns=(10**18, 10**18))
    for index in (0, 49):
        with pytest.raises(UserError, match=f"{path}: changed during the run"):
            source.read(index)


@pytest.mark.parametrize(
    "name", ["x.npy", "x.npz", "x_labels.npy", "x-labels-idx1-ubyte", "x.tar", "x.parquet", "x.jpg"]
)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    np.save(tmp_path / "x.npy", GRAY) if name == "x_labels.npy" else None
    (tmp_path / "x-images-idx3-ubyte").write_bytes(idx(GRAY))
    path = {"x_labels.npy": "x.npy", "x-labels-idx1-ubyte": "x-images-idx3-ubyte"}.get(name, name)
    with pytest.raises(UserError, match=r"a pipe or a device|no regular file"):
        open_train(str(tmp_path / path))


def test_a_large_file_is_looked_at_before_it_is_read(tmp_path, monkeypatch):
    for module in (images, packed):
        monkeypatch.setattr(module, "LARGE_FILE", 2 << 20)
    image = io.BytesIO()
    Image.new("RGB", (40, 30)).save(image, "JPEG")
    for name, start, words in (
        ("zeros", b"", "do not begin as an image does"),
        ("marker", b"\xff\xd8\xff\xe0", "do not begin as an image does"),
        ("image", image.getvalue(), "far more than its 1200 pixels can take"),
    ):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "x.jpg", "wb") as file:
            file.write(start)
            file.truncate(images.LARGE_FILE + images.MAX_BYTES_A_PIXEL * 1200 + 1)
        with pytest.raises(OSError, match=words):
            open_train(str(tmp_path / name)).read(0)
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            archive.add(tmp_path / name / "x.jpg", "x.jpg")
        with pytest.raises(OSError, match=words):
            open_train(str(tmp_path / f"{name}.tar")).read(0)
        os.truncate(tmp_path / name / "x.jpg", images.LARGE_FILE)
        assert len(open_train(str(tmp_path / name)).read(0)) == images.LARGE_FILE


def test_what_would_not_fit_into_memory_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((1000, 32, 32), np.uint8))
    (tmp_path / "x-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((1000, 32, 32), np.uint8))))
    np.save(tmp_path / "x.npy", np.asfortranarray(np.zeros((1000, 32, 32), np.uint8)))
    for name in ("x.npz", "x-images-idx3-ubyte.gz", "x.npy"):
        assert len(open_train(str(tmp_path / name))) == 1000
        monkeypatch.setattr(arrays, "available_memory", lambda: 100_000)
        with pytest.raises(UserError, match=r"takes 1000.* KiB of memory, of which 98 KiB are left; split it"):
            open_train(str(tmp_path / name))
        monkeypatch.undo()


def test_class_folders_and_flat_folders(image_folder):
    train, val = open_train(str(image_folder)), open_val(str(image_folder))
    assert (len(train), len(val)) == (24, 8)
    assert train.classes == ("n01", "n02")
    assert train.labels.tolist() == [0] * 12 + [1] * 12
    assert list(train.paths) == sorted(train.paths)
    flat = open_train(str(image_folder / "train" / "n01"))
    assert len(flat) == 12
    assert flat.labels is None
    only_classes = open_train(str(image_folder / "train"))
    assert only_classes.paths == train.paths
    assert describe(train).size is None


def test_without_a_val_part_a_fifth_is_held_out(image_folder):
    train, val = train_and_val(str(image_folder / "train"))
    assert (len(train), len(val)) == (19, 5)
    assert not {train.name(i) for i in range(19)} & {val.name(i) for i in range(5)}
    assert val.labels is not None


def test_several_paths_follow_each_other(image_folder, tmp_path):
    np.save(tmp_path / "a.npy", GRAY)
    np.save(tmp_path / "a_labels.npy", LABELS)
    np.save(tmp_path / "b.npy", GRAY[:4])
    both = open_train([str(tmp_path / "a.npy"), str(tmp_path / "b.npy")])
    assert np.array_equal(content(both)[..., 0], np.concatenate([GRAY, GRAY[:4]]))
    assert both.name(10) == f"{tmp_path / 'b.npy'}[0]"
    facts = describe(both)
    assert (facts.kind, facts.size, facts.channels, facts.length, facts.labelled) == ("array", (6, 5), 1, 14, False)
    assert facts.location == "in all: 10 of 6 × 5 × 1 + 4 of 6 × 5 × 1"
    np.save(tmp_path / "b_labels.npy", LABELS[:4] + 5)
    labels = open_train([str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]).labels
    assert labels.tolist() == [*LABELS, *(LABELS[:4] + 5)]
    mixed = open_train((str(tmp_path / "a.npy"), str(image_folder), "digits"))
    facts = describe(mixed)
    assert (facts.kind, facts.size, facts.channels, len(mixed)) == ("folder", None, 3, 10 + 24 + 1438)
    assert mixed.read(10) == open_train(str(image_folder)).read(0)
    assert mixed.shards is None
    assert open_train([str(tmp_path / "a.npy")]).location == open_train(str(tmp_path / "a.npy")).location


def test_classes_of_several_folders_are_joined_by_name(image_folder, tmp_path):
    (image_folder / "train" / "n02").rename(tmp_path / "n00")
    (tmp_path / "more").mkdir()
    (tmp_path / "n00").rename(tmp_path / "more" / "n00")
    assert open_train([str(image_folder), str(tmp_path / "more")]).labels.tolist() == [1] * 12 + [0] * 12
    train, val = train_and_val([str(image_folder), str(tmp_path / "more")])
    assert (len(train), len(val)) == (24, 8)


def test_parts_with_shards_among_others():
    with_shards = ArraySource(COLOUR, LABELS, "x")
    object.__setattr__(with_shards, "shards", Shards(np.array([0, 4, 10]), 4))
    mixed = Concat((ArraySource(GRAY[:3, :, :, None], None, "y"), with_shards))
    assert mixed.shards.starts.tolist() == [0, 1, 2, 3, 7, 13]
    assert mixed.shards.window == 4 * 13 // 10


@pytest.mark.parametrize("paths", [[], ["digits", "nowhere"]])
def test_every_one_of_several_paths_must_exist(paths):
    with pytest.raises(UserError, match="must name at least one" if not paths else "nowhere.: no such file"):
        open_train(paths)


def _broken(tmp_path: Path):
    def write(name, data):
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    np.save(tmp_path / "complex.npy", GRAY.astype(np.complex64))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "other.npz", words=GRAY)
    np.save(tmp_path / "pair.npy", GRAY)
    np.save(tmp_path / "pair_labels.npy", LABELS[:3])
    (tmp_path / "empty").mkdir()
    (tmp_path / "only_train" / "train" / "class").mkdir(parents=True)
    huge = struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**15, 2**15)
    return {
        "missing": (str(tmp_path / "nowhere"), "no such file"),
        "empty folder": (str(tmp_path / "empty"), "no images"),
        "empty train folder": (str(tmp_path / "only_train"), "no images"),
        "complex array": (str(tmp_path / "complex.npy"), "must be integers or floating-point numbers"),
        "pickled objects": (str(tmp_path / "objects.npy"), "cannot be read"),
        "npz of something else": (str(tmp_path / "other.npz"), "none of train_images"),
        "labels of another length": (str(tmp_path / "pair.npy"), "10 images but labels"),
        "cut npy": (write("cut.npy", (tmp_path / "pair.npy").read_bytes()[:200]), "cannot be read"),
        "npy header without an end": (
            write("open.npy", (tmp_path / "pair.npy").read_bytes().replace(b"}", b"(")),
            "cannot be read",
        ),
        "npy header of no literals": (
            write("call.npy", (tmp_path / "pair.npy").read_bytes().replace(b"False", b"f() x")),
            "cannot be read",
        ),
        "cut npz": (write("cut.npz", (tmp_path / "other.npz").read_bytes()[:200]), "cannot be read"),
        "cut idx": (write("cut-images-idx3-ubyte", idx(GRAY)[:-1]), "holds 299 bytes"),
        "cut gzip": (write("cut-idx3-ubyte.gz", gzip.compress(idx(GRAY))[:-20]), "cannot be read"),
        "idx that claims 2 EiB": (write("huge-idx3-ubyte.gz", gzip.compress(huge)), "more than its"),
        "half a cifar record": (write("x.bin", bytes(3000)), "CIFAR records"),
        "text": (write("notes.txt", b"hello"), "not an image"),
    }


CASES = ["missing", "empty folder", "empty train folder", "complex array", "pickled objects", "npz of something else",
         "labels of another length", "cut npy", "npy header without an end",
         "npy header of no literals", "cut npz", "cut idx", "cut gzip", "idx that claims 2 EiB",
         "half a cifar record", "text"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_broken_data_are_refused_in_one_line(tmp_path, case):
    data_path, words = _broken(tmp_path)[case]
    with pytest.raises(UserError, match=words) as caught:
        open_train(data_path)
    assert "\n" not in str(caught.value)
    assert data_path in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    np.save(tmp_path / "a.npy", GRAY)
    (tmp_path / "a.npy").chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        open_train(str(tmp_path / "a.npy"))
