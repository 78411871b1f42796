"""What makes data other data: names, order, sizes, pixels, labels and classes, but not where they lie."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmae.data.fingerprint import RANGES, SIZES, difference, fingerprint
from fastmae.data.images import FolderSource
from fastmae.data.sources import open_train, train_and_val


def of(*paths) -> dict:
    """As a checkpoint keeps it."""
    return json.loads(json.dumps(fingerprint(open_train([str(path) for path in paths]))))


@pytest.fixture
def photos(tmp_path) -> Path:
    for name in ("a/1", "a/2", "b/1", "b/2"):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)).save(path)
    return tmp_path / "photos"


def tar_of(folder: Path, tar: Path) -> Path:
    with tarfile.open(tar, "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.add(path, f"{path.parent.name}_{path.name}")
    return tar


def test_a_data_set_may_be_moved_as_a_whole(photos, tmp_path, monkeypatch):
    before = of(photos)
    moved = shutil.move(photos, tmp_path / "elsewhere")
    assert difference(of(moved), before) is None
    monkeypatch.chdir(tmp_path)
    assert difference(of("./elsewhere"), before) is None
    tar_of(moved, tmp_path / "elsewhere" / "x.tar")
    np.save(tmp_path / "elsewhere" / "x.npy", np.zeros((5, 8, 8), np.uint8))
    for name in ("x.tar", "x.npy"):
        before = of(tmp_path / "elsewhere" / name)
        shutil.move(tmp_path / "elsewhere" / name, tmp_path)
        assert difference(of(tmp_path / name), before) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: (p / "b/1.png").rename(p / "b/3.png"), "b/2.png instead of b/1.png"),
        (lambda p: (p / "b").rename(p / "c"), "c/1.png instead of b/1.png"),
        (
            lambda p: shutil.copy(p / "a/1.png", p / "a/0.png"),
            "5 images instead of 4, first a/0.png instead of a/1.png",
        ),
        (lambda p: shutil.copy(p / "a/1.png", p / "b/9.png"), "5 images instead of 4, first b/9.png more"),
        (lambda p: (p / "b/2.png").unlink(), "3 images instead of 4, first no b/2.png"),
        (lambda p: Image.new("RGB", (9, 9)).save(p / "b/1.png"), "other contents or sizes of b/1.png"),
        (lambda p: (p / "empty").mkdir(), "other labels or classes"),
    ],
    ids=["file renamed", "class renamed", "one before", "one behind", "one gone", "replaced", "another class"],
)
def test_the_first_file_that_differs_is_named(photos, change, told):
    before = of(photos)
    change(photos)
    assert difference(of(photos), before) == told


def test_tars_tell_members_that_were_replaced(photos, tmp_path):
    tar = tar_of(photos, tmp_path / "x.tar")
    before = of(tar)
    Image.new("RGB", (9, 9)).save(photos / "a/2.png")
    tar_of(photos, tar)
    os.utime(tar, (1, 1))
    assert difference(of(tar), before) == "other contents or sizes of the members"
    assert difference(of(tar_of(photos, tmp_path / "y.tar")), before) == "y.tar instead of x.tar"


def test_arrays_are_told_by_their_pixels_shape_and_labels(tmp_path):
    images = np.arange(90 * 64, dtype=np.uint64).astype(np.uint8).reshape(90, 8, 8)

    def saved(images: np.ndarray, labels: np.ndarray | None = None) -> dict:
        path = tmp_path / "x.npz"
        np.savez(path, images=images, **({} if labels is None else {"labels": labels}))
        return of(path)

    before = saved(images, np.zeros(90, np.int64))
    other = images.copy()
    other[45] += 1
    assert (
        difference(saved(other, np.zeros(90, np.int64)), before) == "other contents or sizes from image 45 to image 46"
    )
    assert difference(saved(images[:80], np.zeros(80, np.int64)), before) == "80 images instead of 90"
    assert difference(saved(images, np.arange(90)), before) == "other labels or classes"
    assert difference(saved(images), before) == "other labels or classes"
    wide = images.reshape(90, 4, 16)
    assert "image 0" in difference(saved(wide, np.zeros(90, np.int64)), before)


def test_the_order_of_the_paths_and_the_held_out_part_count(photos, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    one, other = of(photos, tmp_path / "x.npy"), of(tmp_path / "x.npy", photos)
    assert difference(one, other) == "path 1: a/1.png instead of path 1: image 0"
    train, val = train_and_val(str(photos))
    assert difference(fingerprint(val), fingerprint(train)).endswith(
        "first other contents or sizes of the choice of images"
    )


def test_of_a_million_files_few_are_asked_for_and_every_name_counts(monkeypatch):
    asked = []
    monkeypatch.setattr("fastmae.data.fingerprint._size", lambda path: asked.append(path) or "7")
    paths = [f"/data/{number // 1000:03d}/{number:06d}.jpg" for number in range(100_000)]
    before = fingerprint(FolderSource(tuple(paths), None, ()))
    assert len(asked) == SIZES
    assert len(before["ranges"]) == RANGES
    paths[70_001] = paths[70_001].replace(".jpg", ".png")
    now = fingerprint(FolderSource(tuple(paths), None, ()))
    assert difference(now, before) == "other names from 068/068750.jpg to 070/070312.jpg"
    assert len(json.dumps(now)) < 6000
