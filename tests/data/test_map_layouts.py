"""Where label maps lie and what their numbers mean: folders, ends of names, PASCAL VOC, Cityscapes, COCO and arrays."""

import json

import numpy as np
import pytest
from PIL import Image

from fastmae.data.coco import CocoMaps, Drawn, pixels_of
from fastmae.data.decode import BadImageError
from fastmae.data.fingerprint import difference, fingerprint
from fastmae.data.label_maps import IGNORED, MapReading, count_classes, open_pairs
from fastmae.data.map_layouts import CITYSCAPES, CITYSCAPES_IDS
from fastmae.errors import UserError
from fastmae.facts import AS_STORED


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def image_and_map(image, label_map, number):
    """Writes an image of one tone, and a map whose upper half is of class ``number`` and whose lower half is of 0."""
    write(image, np.full((6, 8, 3), 20 * number, np.uint8))
    write(label_map, np.repeat(np.array([[number], [0]], np.uint8), 3, axis=0).repeat(8, axis=1))


def classes_of(source, reading=None):
    reading = reading or MapReading()
    return [set(reading.read(source.read_map(index)).ravel().tolist()) for index in range(len(source))]


@pytest.mark.parametrize(
    ("image", "label_map"),
    [
        ("images/train/{}.png", "labels/train/{}.png"),
        ("train/images/{}.png", "train/masks/{}.png"),
        ("Train/../train/{}.png", "train_labels/{}.png"),
        ("images/{}.png", "Masks/{}_mask.png"),
        ("images/{}.jpg", "masks/{}.jpg.png"),
        ("imgs/{}.png", "masks/sub/../{}.tif"),
        ("{}.jpg", "{}_segmentation.png"),
        ("below/{}.jpg", "below/{}_mask.bmp"),
    ],
)
def test_maps_are_found_by_the_names_of_their_images(tmp_path, image, label_map):
    (tmp_path / "train").mkdir()
    (tmp_path / "Train").mkdir(exist_ok=True)
    (tmp_path / "masks" / "sub").mkdir(parents=True)
    for number in range(1, 11):
        image_and_map(tmp_path / image.format(number), tmp_path / label_map.format(number), number)
    for empty in (tmp_path / "train", tmp_path / "Train", tmp_path / "masks" / "sub", tmp_path / "masks"):
        if empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()
    train, val = open_pairs(str(tmp_path), AS_STORED)
    assert (len(train), len(val), train.stock.left_out) == (8, 2, ())
    for source in (train, val):
        for index, classes in enumerate(classes_of(source)):
            assert classes == {0, int(source.name(index).rsplit("/", 1)[1].split(".")[0])}


def test_what_belongs_to_nothing_is_counted_with_the_reason(tmp_path):
    for number in range(1, 6):
        image_and_map(tmp_path / f"images/{number}.png", tmp_path / f"masks/{number}.png", number)
    write(tmp_path / "images/alone.png", np.zeros((6, 8), np.uint8))
    write(tmp_path / "masks/other.png", np.zeros((6, 8), np.uint8))
    write(tmp_path / "masks/3.jpg", np.zeros((6, 8), np.uint8))
    write(tmp_path / "images/2.jpg", np.zeros((6, 8), np.uint8))
    write(tmp_path / "images/._1.png", np.zeros((6, 8), np.uint8))
    train, _ = open_pairs(str(tmp_path), AS_STORED)
    assert train.stock.lines() == [
        "1 file left out: there is no label map of their name (images/alone.png)",
        "1 file left out: another file has their name; rename one (images/2.png)",
        "1 file left out: there is no image of their name (masks/other.png)",
        "1 file left out: another file has their name; rename one (masks/3.jpg)",
    ]


def test_jpeg_maps_are_refused(tmp_path):
    image_and_map(tmp_path / "images/1.png", tmp_path / "masks/1.jpg", 1)
    with pytest.raises(UserError, match=r"label maps as .jpg \(masks/1.jpg\), whose numbers are not exact; save"):
        open_pairs(str(tmp_path), AS_STORED)


def folder_of_maps(folder, *maps):
    for number, pixels in enumerate(maps):
        write(folder / f"images/{number}.png", np.zeros((*pixels.shape, 3), np.uint8))
        write(folder / f"masks/{number}.png", pixels)
    return str(folder)


def test_maps_of_0_and_255_are_two_classes_and_a_line_says_so(tmp_path):
    tones = np.array([[0, 255]], np.uint8).repeat(4, axis=0)
    train, val = open_pairs(folder_of_maps(tmp_path, *[tones * 0] * 20, *[tones] * 5), AS_STORED)
    assert "read as two classes" in "".join(train.stock.lines())
    assert count_classes(train, MapReading()) == 2
    assert set().union(*classes_of(train), *classes_of(val)) == {0, 1}
    write(tmp_path / "masks/0.png", tones // 2)
    one = next(part for part in (train, val) if any(part.name(i).endswith("/0.png") for i in range(len(part))))
    with pytest.raises(BadImageError, match="the number 127, and others have 0, 255 alone"):
        one.read_map(0)


def test_classes_and_what_is_ignored_are_no_two_tones(tmp_path):
    maps = [np.array([[0, 255]], np.uint8), *[np.array([[0, 1, 255]], np.uint8)] * 6]
    train, _ = open_pairs(folder_of_maps(tmp_path, *maps), AS_STORED)
    assert set().union(*classes_of(train)) == {0, 1, IGNORED}
    assert not train.codes


def test_smoothed_maps_are_refused_and_tones_are_named(tmp_path):
    disc = np.hypot(*(np.mgrid[:40, :40] - 20)) < 12
    smooth = Image.fromarray(disc.astype(np.uint8) * 255).resize((64, 64), Image.Resampling.BICUBIC)
    with pytest.raises(UserError, match="as if they were smoothed; save"):
        open_pairs(folder_of_maps(tmp_path / "smooth", *[np.asarray(smooth)] * 3), AS_STORED)
    tones = np.array([[0, 100, 200]], np.uint8)
    train, _ = open_pairs(folder_of_maps(tmp_path / "tones", *[tones] * 5), AS_STORED)
    assert "have the numbers 0, 100, 200; every number" in train.stock.lines()[0]


@pytest.mark.parametrize("mode", ["I;16", "P", "L", "1", "RGB"])
def test_maps_of_any_mode_that_has_one_number_a_pixel(tmp_path, mode):
    numbers = np.array([[0, 1], [1, 0]], np.uint8)
    if mode == "I;16":
        image = Image.fromarray(numbers.astype(np.uint16) * 300)
    elif mode == "RGB":
        image = Image.merge("RGB", [Image.fromarray(numbers)] * 3)
    else:
        image = Image.fromarray(numbers * (255 if mode == "1" else 1)).convert("L")
        if mode == "P":
            image = Image.fromarray(numbers).convert("P")
            image.putpalette([200, 0, 0, 200, 0, 0])
        elif mode == "1":
            image = image.convert("1")
    folder = folder_of_maps(tmp_path, numbers, numbers)
    image.save(tmp_path / "masks/0.png")
    image.save(tmp_path / "masks/1.png")
    train, _ = open_pairs(folder, AS_STORED)
    if mode == "I;16":
        with pytest.raises(BadImageError, match="class 300, and there are 255"):
            MapReading().read(train.read_map(0))
        numbers = numbers * 0  # and 300 may be what counts nowhere
        assert set(MapReading(ignore_index=300).read(train.read_map(0)).ravel()) == {0, IGNORED}
    else:
        np.testing.assert_array_equal(MapReading().read(train.read_map(0)), numbers)


def test_lists_of_pascal_voc_choose_the_images(tmp_path):
    for number in range(1, 5):
        image_and_map(tmp_path / f"JPEGImages/{number}.jpg", tmp_path / f"SegmentationClass/{number}.png", number)
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("1\n3\n9\n")
    (lists / "val.txt").write_text("2\n")
    train, val = open_pairs(str(tmp_path), AS_STORED)
    assert classes_of(train) + classes_of(val) == [{0, 1}, {0, 3}, {0, 2}]
    assert train.stock.lines() == ["1 name left out: train.txt lists them, and they are not there (9)"]


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes_numbers_become_its_19_classes(tmp_path, kind):
    numbers = CITYSCAPES_IDS if kind == "labelIds" else range(19)
    for part in ("train", "val"):
        write(tmp_path / f"leftImg8bit/{part}/aachen/a_0_leftImg8bit.png", np.zeros((2, 21, 3), np.uint8))
        maps = np.array([[*numbers, 255, 255]] * 2, np.uint8)
        if kind == "labelIds":
            maps[:, -1] = 9  # parking
            write(tmp_path / f"gtFine/{part}/aachen/a_0_gtFine_instanceIds.png", maps)
        write(tmp_path / f"gtFine/{part}/aachen/a_0_gtFine_{kind}.png", maps)
    train, val = open_pairs(str(tmp_path), AS_STORED)
    assert (len(train), len(val), train.classes) == (1, 1, CITYSCAPES)
    found = MapReading(19).read(train.read_map(0))
    assert found[0].tolist() == [*range(19), IGNORED, IGNORED]


# --- COCO -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path):
    square = [1, 1, 5, 1, 5, 5, 1, 5]
    said = {
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "images": [{"id": number, "file_name": f"{number}.png", "height": 8, "width": 10} for number in range(5)],
        "annotations": [
            {"image_id": 0, "category_id": 7, "segmentation": [square]},
            {"image_id": 0, "category_id": 3, "segmentation": [[0, 0, 9, 0, 9, 7, 0, 7]]},
            {"image_id": 1, "category_id": 3, "iscrowd": 1,
             "segmentation": {"counts": [0, 16, 64], "size": [8, 10]}},
            {"image_id": 1, "category_id": 7, "segmentation": [square]},
            {"image_id": 2, "category_id": 99, "segmentation": [square]},
            {"image_id": 3, "category_id": 3, "segmentation": []},
        ],
    }  # fmt: skip
    for number in range(4):
        write(tmp_path / f"images/{number}.png", np.zeros((8, 10, 3), np.uint8))
    (tmp_path / "annotations.json").write_text(json.dumps(said))
    return tmp_path


def test_a_file_of_coco_draws_the_maps(coco):
    train, val = open_pairs(str(coco), AS_STORED)
    assert (len(train), len(val), train.classes) == (3, 1, ("background", "dog", "cat"))
    maps = {
        part.name(index).rsplit("/", 1)[1]: part.read_map(index) for part in (train, val) for index in range(len(part))
    }
    assert (maps["0.png"] == 2).sum() == 16  # the cat is in front of the larger dog, whatever their order
    assert (maps["0.png"][2:4, 2:4] == 2).all()
    assert set(maps["0.png"][:7, :9].ravel()) == {1, 2}
    assert (maps["1.png"][:, 0] == -1).all()  # a crowd
    assert maps["1.png"][2, 2] == 2
    assert not maps["2.png"].any()
    assert MapReading(3).read(maps["1.png"])[0].tolist() == [IGNORED] * 2 + [0] * 8
    lines = "\n".join(train.stock.lines())
    for said in (
        "1 object left out: they are of images or categories", "1 object left out: they outline nothing",
        "1 image left out: annotations.json lists them", "2 categories from 1 on", "outlines nothing in 2",
    ):  # fmt: skip
        assert said in lines


def test_another_file_of_coco_is_other_data(coco):
    before = fingerprint(open_pairs(str(coco), AS_STORED)[0])
    assert difference(fingerprint(open_pairs(str(coco), AS_STORED)[0]), before) is None
    file = coco / "annotations.json"
    file.write_text(file.read_text().replace("[1, 1, 5", "[1, 1, 6"))
    assert "label maps" in difference(fingerprint(open_pairs(str(coco), AS_STORED)[0]), before)


def test_instances_of_two_parts_lie_beside_their_images(coco):
    (coco / "annotations").mkdir()
    for part in ("train", "val"):
        (coco / f"annotations/instances_{part}2017.json").write_text((coco / "annotations.json").read_text())
    (coco / "annotations.json").unlink()
    (coco / "images").rename(coco / "train2017")
    write(coco / "val2017/2.png", np.zeros((8, 10, 3), np.uint8))
    train, val = open_pairs(str(coco), AS_STORED)
    assert (len(train), len(val)) == (4, 1)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"images": [], "annotations": [], "categories": []}', '{"images": [{"id": 1}]}', "[" * 9999],
)
def test_no_file_of_coco_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "annotations.json").write_text(text)
    with pytest.raises(UserError) as error:
        open_pairs(str(tmp_path), AS_STORED)
    assert "\n" not in str(error.value)
    assert "annotations.json" in str(error.value)


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 1, 2, 2]], [[1, 1, 2, 2, 3]], [[1e9, 0, 1e9, 1, 0, 1]], [[float("nan"), 0, 1, 1, 0, 1]], ["abc"], [5], 5,
        {"counts": [5, 5], "size": [4, 5]}, {"counts": [-5, 25], "size": [4, 5]}, {"counts": [20], "size": [5, 4]},
        {"counts": "zzz", "size": [4, 5]}, {"counts": None}, {},
    ],
)  # fmt: skip
def test_objects_that_are_of_no_such_image_are_refused(segmentation):
    with pytest.raises(BadImageError, match="an object in COCO's file"):
        pixels_of(segmentation, 4, 5)
    with pytest.raises(BadImageError):
        CocoMaps([(4, 5)], [(Drawn(1, segmentation),)], "")[0]


def test_runs_as_text_are_those_of_pycocotools():
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.98):
        inside = rng.random((37, 53)) < share
        runs = mask.encode(np.asfortranarray(inside.astype(np.uint8)))
        found = pixels_of({"counts": runs["counts"].decode(), "size": [37, 53]}, 37, 53)
        np.testing.assert_array_equal(found, inside)


# --- arrays -----------------------------------------------------------------------------------------------------------

PIXELS = np.arange(10 * 6 * 8, dtype=np.uint16).reshape(10, 6, 8)
NUMBERS = (PIXELS % 7).astype(np.int64)


def save(path, kind, **arrays):
    if kind == "npy":
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
        return str(path)
    file = path.with_suffix(f".{kind}")
    if kind == "npz":
        np.savez_compressed(file, **arrays)
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(file, "w") as opened:
            for name, array in arrays.items():
                opened[name] = array
    return str(file)


@pytest.mark.parametrize("kind", ["npy", "npz", "h5"])
def test_arrays_hold_images_and_their_maps(tmp_path, kind):
    train, val = open_pairs(save(tmp_path / "a", kind, images=PIXELS, masks=NUMBERS, more=PIXELS), AS_STORED)
    assert (len(train), len(val)) == (8, 2)
    for part in (train, val):
        for index in range(len(part)):
            np.testing.assert_array_equal(part.read(index)[..., 0] % 7, part.read_map(index))
    assert "1 array left out" in train.stock.lines()[0]
    assert fingerprint(train) != fingerprint(val)


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_arrays_may_have_both_parts(tmp_path, kind):
    arrays = {
        "train_images": PIXELS,
        "train_labels": NUMBERS[..., None],
        "val_images": PIXELS[:3],
        "val_labels": NUMBERS[:3],
    }
    train, val = open_pairs(save(tmp_path / "a", kind, **arrays), AS_STORED)
    assert (len(train), len(val)) == (10, 3)
    np.testing.assert_array_equal(train.read_map(4), NUMBERS[4])


@pytest.mark.parametrize(
    ("maps", "says"),
    [
        (NUMBERS[:5], r"shape \[5, 6, 8\], and the images \[10, 6, 8\]"),
        (NUMBERS.astype(np.float32), "float32; label maps need whole numbers"),
        (np.eye(7)[NUMBERS], "argmax"),
        (NUMBERS[:, 0, 0], "one number per pixel"),
    ],
)
def test_arrays_that_are_no_label_maps_are_refused(tmp_path, maps, says):
    with pytest.raises(UserError, match=says):
        open_pairs(save(tmp_path / "a", "npy", images=PIXELS, masks=maps), AS_STORED)


def test_negative_numbers_in_arrays_count_nowhere_and_a_line_says_so(tmp_path):
    maps = NUMBERS.copy()
    maps[:, 0, 0] = -100
    train, _ = open_pairs(save(tmp_path / "a", "npy", images=PIXELS, masks=maps), AS_STORED)
    assert MapReading().read(train.read_map(0))[0, 0] == IGNORED
    assert "10 pixels with negative numbers count nowhere" in train.stock.lines()[-1]
