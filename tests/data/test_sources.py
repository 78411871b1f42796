"""Every kind of data is found by itself, read right, and refused in one line when it is broken."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from fastmae.data.arrays import FileRows
from fastmae.data.plan import Shards
from fastmae.data.sources import ArraySource, Concat, describe, open_train, open_val, train_and_val
from fastmae.errors import UserError

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

    np.save(tmp_path / "float.npy", GRAY.astype(np.float32))
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
        "float array": (str(tmp_path / "float.npy"), "must be uint8"),
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


CASES = ["missing", "empty folder", "empty train folder", "float array", "pickled objects", "npz of something else",
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
