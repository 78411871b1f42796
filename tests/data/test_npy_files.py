"""A folder of .npy and .npz files gives each array as an image, bit for bit, with the classes and parts of folders."""

import numpy as np
import pytest

from fastmae.data.fingerprint import difference, fingerprint
from fastmae.data.formats.npy import ArrayFiles, pixels
from fastmae.data.reading import BadImageError
from fastmae.data.sources import describe, open_train, open_val
from fastmae.errors import SettingError, UserError
from fastmae.facts import ReadAs

RNG = np.random.default_rng(0)


def folder_of(root, arrays):
    for name, array in arrays.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (np.savez_compressed if name.endswith(".npz") else np.save)(path, array)
    return str(root)


def test_each_file_is_an_image_with_the_class_and_the_part_of_its_folder(tmp_path):
    gray, bands = RNG.integers(0, 65536, (7, 6), dtype=np.uint16), RNG.normal(size=(7, 6, 3)).astype(">f4")
    arrays = {
        "train/a/0.npy": gray,
        "train/b/1.npz": bands,
        "train/b/2.npy": np.asfortranarray(bands),
        "val/a/3.npy": gray,
    }
    path = folder_of(tmp_path, arrays)
    (tmp_path / "train" / "notes.txt").touch()
    train, val = open_train(path), open_val(path)
    assert isinstance(train, ArrayFiles)
    assert (train.labels.tolist(), train.classes, val.labels.tolist()) == ([0, 1, 1], ("a", "b"), [0])
    for index, expected in enumerate((gray[..., None], bands, bands)):
        read = train.read(index)
        assert read.dtype == expected.dtype.newbyteorder("=")
        assert np.array_equal(read, expected)
    assert (train.stock.used, [item.count for item in train.stock.left_out]) == ({"files": 4}, [1])
    assert describe(train).size == (7, 6)
    before = fingerprint(train)
    folder_of(tmp_path, {"train/a/0.npy": gray[:-1]})
    assert difference(fingerprint(open_train(path)), before) == "other contents or sizes of a/0.npy"


def test_arrays_beside_image_files_are_left_out_and_told(tmp_path, image_folder):
    np.save(image_folder / "masks.npy", np.zeros((3, 4)))
    source = open_train(str(image_folder))
    assert not isinstance(source, ArrayFiles)
    assert any("an array" in line for line in source.stock.lines())


LAYOUTS = {
    (3, 9, 8): "chw", (9, 8, 3): "hwc", (13, 8, 8): "chw", (8, 8, 13): "hwc", (1, 9, 8): "chw",
    (24, 32, 6): "hwc", (6, 24, 32): "chw", (12, 9, 8): None, (8, 8, 8): None, (3, 9, 3): None,
}  # fmt: skip


@pytest.mark.parametrize("shape", LAYOUTS)
def test_the_axes_of_an_image_are_told_apart_or_asked_for(tmp_path, shape):
    image = RNG.integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "x.npy", image)
    data = (tmp_path / "x.npy").read_bytes()
    as_planes = image.transpose(1, 2, 0)
    assert np.array_equal(pixels(data, ReadAs(layout="chw")), as_planes)
    assert np.array_equal(pixels(data, ReadAs(layout="hwc")), image)
    if LAYOUTS[shape] is None:
        with pytest.raises(BadImageError, match="set layout to hwc or chw"):
            pixels(data, ReadAs())
        with pytest.raises(SettingError, match="layout='auto': none of"):
            open_train(str(tmp_path), ReadAs())
    else:
        assert np.array_equal(pixels(data, ReadAs()), as_planes if LAYOUTS[shape] == "chw" else image)


def test_files_that_are_no_image_say_why_and_allocate_nothing(tmp_path):
    np.save(tmp_path / "whole.npy", np.zeros((40, 50), np.float64))
    whole = (tmp_path / "whole.npy").read_bytes()
    np.savez_compressed(tmp_path / "whole.npz", np.zeros((40, 50)))
    packed = bytearray((tmp_path / "whole.npz").read_bytes())
    np.savez(tmp_path / "two.npz", a=np.zeros((4, 5)), b=np.zeros((4, 5)))
    np.save(tmp_path / "objects.npy", np.array([[{}]], object), allow_pickle=True)
    np.save(tmp_path / "stack.npy", np.zeros((2, 4, 5, 3)))
    np.save(tmp_path / "complex.npy", np.zeros((4, 5), complex))
    bomb = whole.replace(b"(40, 50), }      ", b"(2000000, 50000) }")
    assert len(bomb) >= len(whole)
    cases = {
        "cut": (whole[:-1], "holds"), "claims gigabytes": (bomb, "says .2000000, 50000. float64 but holds"),
        "empty": (b"", "does not begin"),
        "cut zip": (bytes(packed[:-30]), "zip"), "several": ((tmp_path / "two.npz").read_bytes(), "holds 2 arrays"),
        "pickled": ((tmp_path / "objects.npy").read_bytes(), "never unpickled"),
        "a stack": ((tmp_path / "stack.npy").read_bytes(), "the file's own path"),
        "complex": ((tmp_path / "complex.npy").read_bytes(), "np.abs"),
    }  # fmt: skip
    for data, words in cases.values():
        with pytest.raises(BadImageError, match=words) as caught:
            pixels(data, ReadAs())
        assert "\n" not in str(caught.value)
    for name in [*tmp_path.iterdir()]:
        name.unlink()
    (tmp_path / "a.npy").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"none of 1 arrays that were looked at is an image, .*a.npy: it says"):
        open_train(str(tmp_path))
