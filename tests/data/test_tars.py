"""Tars with several images a sample, labels in JSON, a tar per class, and tars inside a tar."""

import io
import json
import tarfile

import pytest

from fastmae.data import shards
from fastmae.data.sources import open_train, train_and_val
from fastmae.errors import UserError
from fastmae.facts import ReadAs


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_tar(path, members):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(tar_of(members))
    return path


def contents(source):
    return [source.read(i) for i in range(len(source))]


def left_out(source):
    return {item.reason: (item.count, item.examples) for item in source.stock.left_out}


def numbered(count):
    return [(f"{i}.{end}", str(i).encode()) for i in range(count) for end in ("jpg", "cls")]


def stereo(count=3):
    ends = ("left.jpg", "right.jpg", "jpg", "cls")
    return [(f"{i}.{end}", b"7" if end == "cls" else f"{end} {i}".encode()) for i in range(count) for end in ends]


def test_image_key_says_which_image_of_a_sample_is_used(tmp_path):
    path = str(write_tar(tmp_path / "x.tar", stereo()))
    assert contents(open_train(path)) == [b"jpg 0", b"jpg 1", b"jpg 2"]
    left = open_train(path, ReadAs(image_key="left.jpg"))
    assert contents(left) == [b"left.jpg 0", b"left.jpg 1", b"left.jpg 2"]
    assert left.labels.tolist() == [7, 7, 7]
    assert left_out(left)[shards.OTHER_IMAGE] == (6, ("0.right.jpg", "0.jpg", "1.right.jpg"))
    every = open_train(path, ReadAs(image_key="all"))
    assert len(every) == 9
    assert every.labels.tolist() == [7] * 9
    with pytest.raises(UserError, match=r"image_key='up.jpg': no image of the tars ends so; there are .jpg, .left.jpg"):
        open_train(path, ReadAs(image_key="up.jpg"))


def test_labels_may_lie_in_json(tmp_path):
    records = [{"label": "dog", "caption": "x"}, {"label": "cat"}, {"label": "dog"}]
    members = [(f"{i}.{end}", data) for i, record in enumerate(records)
               for end, data in (("jpg", b"x"), ("json", json.dumps(record).encode()))]  # fmt: skip
    source = open_train(str(write_tar(tmp_path / "x.tar", members)))
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [1, 0, 1])
    again = open_train(str(tmp_path / "x.tar"))
    assert (again.classes, again.labels.tolist()) == (source.classes, source.labels.tolist())
    numbers = [(name, b'{"label": 4}' if name.endswith("json") else data) for name, data in members]
    both = [("9.jpg", b"x"), ("9.json", b'{"label": 5}'), ("9.cls", b"6")]
    source = open_train(str(write_tar(tmp_path / "y.tar", [*numbers, *both])))
    assert (source.classes, source.labels.tolist()) == ((), [4, 4, 4, 6])
    assert left_out(source) == {shards.SECOND_LABEL: (1, ("9.json",))}
    without = [(name, b"[" * 70_000 if name == "1.json" else data) for name, data in members]
    assert open_train(str(write_tar(tmp_path / "z.tar", without))).labels is None


def test_tars_that_are_called_as_classes_are_classes(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        (tmp_path / part).mkdir()
        for name in ("n02", "n01"):
            write_tar(tmp_path / part / f"{name}.tar", [(f"{name}_{i}.JPEG", name.encode()) for i in range(count)])
    train, val = train_and_val(str(tmp_path))
    assert contents(train) == [b"n01"] * 3 + [b"n02"] * 3
    assert train.classes == val.classes == ("n01", "n02")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0] * 3 + [1] * 3, [0, 0, 1, 1])
    assert train.location == "in 2 tar shards of 2 classes"
    assert train.stock.notes == (
        "the names of 2 tars are taken as classes (n01, n02), as no image in them has a label",
    )
    for name in ("cat", "dog", "tree frog"):
        write_tar(tmp_path / "words" / f"{name}.tar", [("1.jpg", b"x")])
    assert open_train(str(tmp_path / "words")).classes == ("cat", "dog", "tree frog")


@pytest.mark.parametrize("names", [("part-000", "part-001"), ("n01", "n02"), ("train_cats", "train_dogs"), ("a", "b")])
def test_numbered_shards_are_no_classes(tmp_path, names):
    for name in names:
        write_tar(tmp_path / f"{name}.tar", [("1.jpg", b"x")])
    assert open_train(str(tmp_path)).labels is None


def test_a_tar_of_tars_is_read_in_place(tmp_path):
    inner = {name: tar_of([(f"{name}_{i}.JPEG", f"{name} {i}".encode()) for i in range(2)]) for name in ("n01", "n02")}
    path = write_tar(tmp_path / "ILSVRC2012_img_train.tar", [(f"{name}.tar", data) for name, data in inner.items()])
    source = open_train(str(path))
    assert contents(source) == [b"n01 0", b"n01 1", b"n02 0", b"n02 1"]
    assert (source.classes, source.labels.tolist()) == (("n01", "n02"), [0, 0, 1, 1])
    assert source.name(2) == f"{path}:n02.tar/n02_0.JPEG"
    assert source.stock.used == {"files": 1, "images": 4, "members": 6}
    labelled = [(f"{i}.{end}", str(i).encode()) for i in (5, 3) for end in ("jpg", "cls")]
    inside = [("part-0.tar", tar_of(labelled)), ("part-1.tar", tar_of(labelled[:2]))]
    source = open_train(str(write_tar(tmp_path / "x.tar", inside)))
    assert (source.classes, source.labels.tolist()) == ((), [5, 3, 5])


def test_damage_of_a_tar_inside_is_told_and_the_next_one_is_read(tmp_path):
    whole, cut = tar_of(numbered(2)), tar_of(numbered(6))[: 512 * 9 + 100]
    path = write_tar(tmp_path / "x.tar", [("a.tar", cut), ("b.tar", whole), ("c.tar", b"no tar at all" * 99)])
    source = open_train(str(path))
    assert 2 < len(source) < 6 + 2
    assert contents(source)[-2:] == [data for name, data in numbered(2) if name.endswith("jpg")]
    ((_, damage),) = source.damage
    assert damage.startswith("holds a.tar, which ")
    assert damage.endswith("so only its images before that are used; replace it to have all")
    assert left_out(source)[shards.NO_TAR] == (1, ("c.tar",))
    assert open_train(str(path)).damage == source.damage
