"""Data sets made from seeds: every file is used or left out with a reason, and every image is usable or named."""

import contextlib
import gzip
import shutil
import struct
import warnings

import numpy as np
import pytest
from damage import mutated
from generated import LAYOUTS, files_below, make
from helpers import soak

from fastmae.data.decode import BadImageError, decode
from fastmae.data.images import FolderSource
from fastmae.data.reading import Reading
from fastmae.data.sources import open_train, open_val
from fastmae.data.stock import joined
from fastmae.data.verify import check
from fastmae.errors import UserError

ROUNDS = soak(1, 100)
"""How many data sets of each layout."""


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[maker.__name__.strip("_") for maker in LAYOUTS])
def test_all_that_lies_in_a_data_set_is_used_or_left_out_with_a_reason(number, tmp_path, record_property):
    images = 0
    for seed in range(number, ROUNDS * len(LAYOUTS), len(LAYOUTS)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        made = make(folder, seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            try:
                images += look_through(made)
            except Exception as error:
                error.add_note(f"data set {seed}: python tests/generated.py FOLDER {seed}")
                raise
        shutil.rmtree(folder)
    record_property("generated data sets", ROUNDS)
    record_property("images in generated data sets", images)


def opened(made):
    """The parts of a data set, or the line that refuses it."""
    try:
        train = open_train(str(made.path))
        return train, open_val(str(made.path))
    except UserError as error:
        return str(error)


def look_through(made):
    """Asserts that a data set is refused in a line, or that all of it is accounted for; returns how many images."""
    parts = opened(made)
    if isinstance(parts, str):
        assert "\n" not in parts
        assert str(made.path) in parts, "the line does not say where"
        assert made.wrong or not made.sound - made.broken, f"refused although it has images: {parts}"
        return 0
    assert not made.wrong, "it must be refused"
    train, val = parts
    sources = [train] if val is None else [train, val]
    stock = joined(source.stock for source in sources)
    there = {unit: stock.total(unit) for unit in stock.used} | {"files": stock.total("files")}
    files = len(files_below(made.path)) + made.labels
    assert there["files"] == files, f"{there['files']} files of {files}: {stock}"
    for unit, count in (("members", made.members), ("rows", made.rows)):
        if count > 0:
            assert stock.total(unit) == count, f"{stock.total(unit)} {unit} of {count}: {stock}"
    if made.images:
        assert len(train) == made.images
    names = [source.name(index) for source in sources for index in range(len(source))]
    assert len(names) == len(set(names)), "an image is used twice"
    if all(isinstance(source, FolderSource) for source in sources):
        assert stock.used["files"] == len(set(names) - made.no_files)
    assert all(item.count > 0 and item.reason for item in stock.left_out)
    unusable = named_by_verify(sources)
    assert not unusable & made.sound, f"cannot be used although it is an image: {unusable & made.sound}"
    assert not set(names) - unusable & made.broken
    return len(names)


READING = Reading(3, dtype="uint16")
"""What holds all images of 8 and 16 bits that are made."""


def named_by_verify(sources):
    """The names of the images that verify finds unusable: those that cannot be decoded, each once."""
    found = set()
    for source in sources:
        with contextlib.closing(check(source, READING, 1)) as chunks:
            bad = [image for chunk in chunks for image in chunk.examples]
        found |= {image.name for image in bad}
        assert all(image.reason and "\n" not in image.reason for image in bad)
        for index in range(len(source)):
            try:
                decode(source.read(index), READING)
            except (BadImageError, OSError):
                assert source.name(index) in found
            else:
                assert source.name(index) not in found
    return found


# --- containers -------------------------------------------------------------------------------------------------------


def idx():
    return struct.pack(">HBBIII", 0, 8, 3, 20, 8, 8) + bytes(range(256)) * 5


CONTAINERS = [
    "data.npy",
    "data.npz",
    "train-images-idx3-ubyte",
    "train-images-idx3-ubyte.gz",
    "data_batch_1.bin",
    "data.tar",
]


def container(folder, name):
    """The bytes of a whole container."""
    path = folder / name
    if name == "data.npy":
        np.save(path, np.zeros((20, 8, 8, 3), np.uint8))
    elif name == "data.npz":
        np.savez_compressed(
            path, train_images=np.arange(5120, dtype=np.uint8).reshape(20, 16, 16), train_labels=np.arange(20)
        )
    elif name.startswith("train-images"):
        path.write_bytes(gzip.compress(idx()) if name.endswith(".gz") else idx())
    elif name == "data_batch_1.bin":
        path.write_bytes(bytes(3 * 3073))
    else:
        made = make(folder, LAYOUTS.index(next(maker for maker in LAYOUTS if maker.__name__ == "_tar")))
        return made.path.read_bytes()
    return path.read_bytes()


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_mutated_container_is_refused_in_one_line_or_read(name, tmp_path, record_property):
    whole, count, refused = container(tmp_path, name), soak(20, 500), 0
    path = tmp_path / name
    for number in range(count):
        path.unlink(missing_ok=True)
        path.write_bytes(mutated(whole, number))
        try:
            source = open_train(str(path))
            shapes = {np.shape(decode(source.read(index), Reading(3))) for index in range(min(len(source), 30))}
            assert all(len(shape) == 3 for shape in shapes)
        except UserError as error:
            refused += 1
            if "\n" in str(error):
                raise
        except (BadImageError, OSError):
            refused += 1
        except BaseException as error:
            error.add_note(f"mutation {number} of {name}")
            raise
    assert refused
    record_property("mutated containers", count)
    record_property("of those refused", refused)
