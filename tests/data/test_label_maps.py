"""Images with label maps: which belong together, what their numbers mean, and that both are cropped alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmae.data.arrays import ArraySource
from fastmae.data.decode import BadImageError
from fastmae.data.fingerprint import difference, fingerprint
from fastmae.data.label_maps import IGNORED, MappedSource, MapReading, count_classes, open_pairs, subset_of
from fastmae.data.loader import View, load_batches
from fastmae.data.plan import crop_draws, scaled_box
from fastmae.data.reading import Reading
from fastmae.errors import UserError
from fastmae.facts import AS_STORED

TONES = np.array([0, 80, 160, 240], np.uint8)


def blocks(height: int, width: int) -> np.ndarray:
    """A map of four classes, one a quarter."""
    rows, columns = np.arange(height) >= height // 2, np.arange(width) >= width // 2
    return (2 * rows[:, None] + columns[None]).astype(np.uint8)


def batch_of(source, view, draw_ids=(0,)):
    numbers = np.array(draw_ids)
    requests = iter([(numbers % len(source), numbers)])
    return next(load_batches(source, requests, view, device=torch.device("cpu"), num_workers=1))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(24, 90), st.integers(24, 90), st.integers(16, 48), st.integers(16, 48), st.integers(0, 2**40),
    st.sampled_from([dict(random_scale=(0.5, 2.0)), dict(scale=(0.3, 1.0)), dict(seed=None)]),
)  # fmt: skip
def test_image_and_map_stay_aligned(height, width, rows, columns, draw, how):
    """An image of two ramps says where each of its pixels comes from, and its map says it as well: the nearest pixel.

    Resizing keeps a ramp, but where its filter reaches beyond the crop.
    """
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    ramps = np.stack([2 * y, 2 * x], axis=-1)[None]
    found, images = [], []
    for places in (y, x):
        source = MappedSource(ArraySource(ramps, None, "x"), places[None])
        view = View((rows, columns), Reading(2), **{"seed": 3, "flip": True, "maps": MapReading(), **how})
        batch = batch_of(source, view, (draw,))
        assert batch.maps is not None
        found.append(batch.maps.numpy()[0].astype(int))
        images.append(batch.images.numpy()[0] / 2)
    np.testing.assert_array_equal(*images)
    known = found[0] != IGNORED
    np.testing.assert_array_equal(known, found[1] != IGNORED)
    assert known.any()
    inside = np.zeros_like(known)
    inside[np.ix_(*(np.flatnonzero(known.any(axis=axis))[8:-8] for axis in (1, 0)))] = True
    for axis, places in enumerate(found):
        assert abs(images[0][..., axis] - places)[inside].max(initial=0) <= 0.5 + 0.75  # levels are rounded, twice


def test_a_crop_that_reaches_beyond_the_image_counts_nowhere_there():
    maps = blocks(32, 48)[None]
    source = MappedSource(ArraySource(TONES[maps][..., None], None, "x"), maps)
    view = View((32, 32), Reading(1), seed=0, random_scale=(0.5, 0.5), maps=MapReading(4))
    batch = batch_of(source, view)
    found = batch.maps.numpy()[0]
    assert (found != IGNORED).sum() == 16 * 24
    rows, columns = np.nonzero(found != IGNORED)
    assert (np.ptp(rows), np.ptp(columns)) == (15, 23)
    far = np.ones_like(found, bool)
    far[max(rows.min() - 3, 0) : rows.max() + 4, max(columns.min() - 3, 0) : columns.max() + 4] = False
    outside = batch.images.numpy()[0, ..., 0][far]  # next to the image the filter blends
    assert len(set(outside.tolist())) == 1


def test_at_zoom_one_the_image_just_covers_the_crop():
    box = scaled_box(crop_draws(0, np.arange(1))[0], 60, 90, (1.0, 1.0), (30, 30))
    assert (box.height, box.width, box.top) == (60, 60, 0)
    assert 0 <= box.left <= 30


def test_the_numbers_of_a_map_become_classes():
    numbers = np.array([[0, 1, 2], [3, 255, 1]])
    assert MapReading(4).read(numbers).tolist() == [[0, 1, 2], [3, IGNORED, 1]]
    assert MapReading(3, reduce_zero_label=True).read(numbers).tolist() == [[IGNORED, 0, 1], [2, IGNORED, 0]]
    assert MapReading(3, ignore_index=3).read(numbers.clip(0, 3)).tolist() == [[0, 1, 2], [IGNORED, IGNORED, 1]]
    with pytest.raises(BadImageError, match="has class 3, and there are 3"):
        MapReading(3).read(numbers)


@pytest.fixture
def folder(tmp_path):
    """Four images with maps as palette and gray files, and one image without a map."""
    for part in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / part).mkdir(parents=True)
        for number in range(3 if part == "training" else 1):
            Image.fromarray(np.full((20, 24, 3), 40 * number, np.uint8)).save(
                tmp_path / "images" / part / f"{number}.jpg"
            )
            labels = Image.fromarray(blocks(20, 24) + 1)
            if number % 2:
                labels = labels.convert("P")
                labels.putpalette([value % 256 for value in range(7, 775)])
            if (part, number) != ("training", 2):
                labels.save(tmp_path / "annotations" / part / f"{number}.png")
    (tmp_path / "classes.txt").write_text("one\ntwo\nthree\nfour\n")
    return tmp_path


def test_a_folder_of_ade20k_is_opened_and_what_has_no_map_is_counted(folder):
    train, val = open_pairs(str(folder), AS_STORED)
    assert (len(train), len(val), train.classes) == (2, 1, ("one", "two", "three", "four"))
    (line,) = train.stock.lines()
    assert line == "1 file left out: there is no label map of their name (images/training/2.jpg)"
    reading = MapReading(reduce_zero_label=True)
    assert count_classes(train, reading) == 4
    assert count_classes(train, MapReading()) == 5
    for index in range(2):
        np.testing.assert_array_equal(reading.read(train.read_map(index)), blocks(20, 24))


def test_other_maps_are_other_data(folder):
    before = fingerprint(open_pairs(str(folder), AS_STORED)[0])
    assert difference(fingerprint(open_pairs(str(folder), AS_STORED)[0]), before) is None
    Image.fromarray(np.zeros((20, 24), np.uint8)).save(folder / "annotations" / "training" / "0.png")
    assert "label maps" in difference(fingerprint(open_pairs(str(folder), AS_STORED)[0]), before)


def test_without_a_val_part_a_fifth_is_held_out(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for number in range(10):
            Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / kind / f"{number}.png")
    train, val = open_pairs(str(tmp_path), AS_STORED)
    assert (len(train), len(val)) == (8, 2)
    names = [source.name(index).rsplit("/", 1)[1] for source in (train, val) for index in range(len(source))]
    assert sorted(names) == [f"{number}.png" for number in range(10)]
    for source in (train, val):
        for index in range(len(source)):
            assert str(int(MapReading().read(source.read_map(index))[0, 0])) in source.name(index).rsplit("/", 1)[1]


def test_a_map_of_another_size_or_with_colours_makes_its_image_unusable(folder):
    maps = folder / "annotations" / "training"
    Image.new("L", (5, 5)).save(maps / "0.png")
    train, _ = open_pairs(str(folder), AS_STORED)
    view = View((16, 16), Reading(3), maps=MapReading(5))
    (bad,) = batch_of(train, view, (0,)).skipped
    assert bad.reason == "its label map has 5×5 pixels, and the image 20×24"
    Image.new("RGB", (24, 20), (1, 2, 3)).save(maps / "0.png")
    (bad,) = batch_of(train, view, (0,)).skipped
    assert bad.reason.startswith("its label map has colours (RGB) that no palette numbers; save")


@pytest.mark.parametrize("path", ["missing", "digits", "."])
def test_data_without_maps_are_refused_in_one_line(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^data_path=.*annotations") as error:
        open_pairs(path, AS_STORED)
    assert "\n" not in str(error.value)


def test_the_built_in_shapes_have_their_maps():
    train, val = open_pairs("shapes", AS_STORED)
    assert (len(train), len(val), len(train.classes)) == (2400, 200, 5)
    few = subset_of(train, np.array([3, 1]))
    assert len(few) == 2
    np.testing.assert_array_equal(few.read(1), train.read(1))
    np.testing.assert_array_equal(few.read_map(0), train.read_map(3))
