"""The built-in shapes: pure functions of the seed and the number, whose maps, instances and boxes agree."""

import numpy as np
import pytest
from PIL import Image

from fastmae.data.shapes import CLASSES, MOST, make_shapes
from fastmae.data.sources import open_train, train_and_val


@pytest.fixture(scope="module")
def shapes():
    return make_shapes(np.arange(40), seed=5)


def test_an_image_depends_on_its_number_and_the_seed_alone(shapes):
    some = make_shapes(np.array([7, 3]), seed=5)
    for row, number in enumerate((7, 3)):
        assert np.array_equal(some.images[row], shapes.images[number])
        assert np.array_equal(some.maps[row], shapes.maps[number])
    assert not np.array_equal(make_shapes(np.array([7]), seed=6).images[0], shapes.images[7])


def test_maps_instances_and_boxes_are_of_the_same_shapes(shapes):
    assert set(np.unique(shapes.maps)) == set(range(len(CLASSES)))
    for image in range(40):
        count = len(shapes.classes[image])
        assert 1 <= count <= MOST
        assert shapes.boxes[image].shape == (count, 4)
        for number, (kind, box) in enumerate(zip(shapes.classes[image], shapes.boxes[image], strict=True), 1):
            mine = shapes.instances[image] == number
            assert (shapes.maps[image][mine] == kind).all()
            left, top, right, bottom = box.astype(int)
            assert mine[top:bottom, left:right].sum() == mine.sum() > 0
            assert mine[top, left:right].any()
            assert mine[bottom - 1, left:right].any()
            assert mine[top:bottom, left].any()
            assert mine[top:bottom, right - 1].any()
        assert np.array_equal(shapes.maps[image] == 0, shapes.instances[image] == 0)


@pytest.mark.parametrize("side", [32, 33])
def test_any_side_can_be_made(side):
    made = make_shapes(np.arange(3), side)
    assert made.images.shape == (3, side, side, 3)
    assert made.images.dtype == made.maps.dtype == np.uint8


def test_the_name_is_that_of_a_data_set_with_a_val_part():
    train, val = train_and_val("shapes")
    assert (len(train), len(val), train.labels) == (2400, 200, None)
    assert np.array_equal(train.read(3), make_shapes(np.array([3])).images[0])
    assert np.array_equal(val.read(0), make_shapes(np.array([2400])).images[0])


def test_a_folder_of_the_same_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "shapes" / "a.png")
    assert len(open_train("shapes")) == 1
