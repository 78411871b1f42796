"""What lies in a folder is used or left out with a reason, and a run, `verify` and errors say so in the same words."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import small_run
from PIL import Image

from fastmae.cli import main
from fastmae.data import images
from fastmae.data.parts import parts_among, read_part, shard_part
from fastmae.data.sources import (
    Concat,
    Subset,
    describe,
    open_train,
    open_val,
    scored_parts,
    train_and_val,
    with_known_classes,
)
from fastmae.data.stock import LeftOut, Stock, count_of, joined
from fastmae.data.suffixes import IMAGE_SUFFIXES
from fastmae.errors import SettingError, UserError
from fastmae.train.pretrain import pretrain


def picture(name="PNG", number=0):
    buffer = io.BytesIO()
    levels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(levels).save(buffer, name)
    return buffer.getvalue()


def fill(root, *names):
    """Writes files: pictures where the name is of one, a line of text elsewhere."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number=number) if path.suffix in (".png", ".jpg") else b"text")
    return root


def classes(part, *names, count=2):
    return [f"{part}/{name}/{i}.png" for name in names or ("cat", "dog") for i in range(count)]


def stock_of(root):
    """The stock of a folder as a whole, once it is seen that every file below it is counted once."""
    train, val = open_train(str(root)), open_val(str(root))
    stock = joined(part.stock for part in (train, val) if part is not None)
    files = [path for path in root.rglob("*") if path.is_file() or (path.is_symlink() and not path.is_dir())]
    assert stock.total("files") == len(files), stock
    return train, val, stock


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Train", ("train", ())), ("TRAINING", ("train", ())), ("train_images", ("train", ())),
        ("TrainSet", ("train", ())), ("train2017", ("train", ())), ("01-train", ("train", ())),
        ("valid", ("val", ())), ("Validation Data", ("val", ())), ("dev", ("val", ())), ("eval", ("val", ())),
        ("TESTING", ("test", ())), ("test1", ("test", ())), ("ILSVRC2012_img_val", ("val", ("ilsvrc",))),
        ("trainval", None), ("train_val", None), ("trains", None), ("cat", None), ("devices", None), ("contest", None),
    ],
)  # fmt: skip
def test_the_part_that_a_name_says(name, said):
    assert read_part(name) == said


def test_names_with_further_words_are_parts_only_together():
    assert parts_among(["bullet_train", "test_tube", "cat"]) == {}
    assert parts_among(["sar_train", "sar_test", "test_tube"]) == {"train": ["sar_train"], "test": ["sar_test"]}
    assert [shard_part(name) for name in ("x-Val-0.tar", "TEST_1.tar", "train-1.tar", "latest-1.tar")] == [
        "val", "test", None, None,
    ]  # fmt: skip


# what lies there, (images to train on, the classes, images to evaluate on), and lines that are said
LAYOUTS = {
    "capitals": ([*classes("Train"), *classes("Test")], (4, ("cat", "dog"), 4), []),
    "other spellings": (
        [*classes("Training"), *classes("Validation"), *classes("Testing", "cat")],
        (4, ("cat", "dog"), 4),
        ["2 files left out: in Testing, as Validation is the part to evaluate on; to use it, give its own path"],
    ),
    "years": (
        ["train2017/0.png", "val2017/0.png", "annotations/x.json"],
        (1, (), 1),
        ["1 file left out: .json, no image (annotations/x.json)"],
    ),
    "deep down": (
        [*classes("set/Data/CLS-LOC/train"), *classes("set/Data/CLS-LOC/val"), "set/Data/CLS-LOC/test/0.png", "a.csv"],
        (4, ("cat", "dog"), 4),
        [
            "1 file left out: in set/Data/CLS-LOC/test, which has no labels as set/Data/CLS-LOC/train has",
            "1 file left out: .csv, a list or a table; if it names the images, give its own path (a.csv)",
            "the parts are found in {root}/set/Data/CLS-LOC",
        ],
    ),
    "one level down": (classes("set/train"), (4, ("cat", "dog"), None), ["the parts are found in {root}/set"]),
    "classes one level down": (
        classes("set"),
        (4, ("set",), None),
        ["all images lie in {root}/set; if the 2 folders in it are classes, give its path"],
    ),
    "images and labels": (
        ["images/train/0.png", "images/val/0.png", "labels/train/0.txt"],
        (1, (), 1),
        ["1 file left out: .txt, no image (labels/train/0.txt)", "the parts are found in {root}/images"],
    ),
    "test without labels": (
        [*classes("train"), "test/0.png"],
        (4, ("cat", "dog"), None),
        [
            "1 file left out: in test, which has no labels as train has, so nothing is measured on it (test/0.png)",
            "no part to evaluate on, so where accuracy is measured, a fifth of the images is held out for it",
        ],
    ),
    "val without labels, test with": (
        [*classes("train"), "val/0.png", *classes("test")],
        (4, ("cat", "dog"), 4),
        ["1 file left out: in val, which has no labels as train has"],
    ),
    "test among classes": (
        ["cat/0.png", "dog/0.png", "test/cat/0.png"],
        (2, ("cat", "dog"), 1),
        ["test is taken for a part to evaluate on, and not trained on"],
    ),
    "classes with names of parts": (classes("train", "cat", "test", "val"), (6, ("cat", "test", "val"), None), []),
    "folders beside the part": (
        [*classes("train"), "more/0.png", "more/1.png"],
        (4, ("cat", "dog"), None),
        ["2 files left out: images outside of train; to use them, give their own path (more/0.png, more/1.png)"],
    ),
    "images beside a folder": (
        [*(f"{i}.png" for i in range(20)), "sub/one.png"],
        (21, (), None),
        ["{root} holds 20 images beside 1 folder of images (sub), so no image has a label; keep either"],
    ),
    "an image beside classes": (
        [*classes("train"), "train/preview.png"],
        (5, (), None),
        ["{root}/train holds 1 image beside 2 folders of images (cat, dog), so no image has a label"],
    ),
    "a lone folder in val": (
        [*classes("train"), "val/images/0.png", "val/annotations.txt"],
        (4, ("cat", "dog"), None),
        [
            "1 file left out: .txt, no image (val/annotations.txt)",
            "1 file left out: in val, which has no labels as train has",
            "no part to evaluate on, so where accuracy is measured",
        ],
    ),
    "folds": (
        [*classes("a"), *classes("b")],
        (8, ("a", "b"), None),
        ["the folders a, b have the same folders in them (cat, dog); if these are the classes, give the path of one"],
    ),
    "a run folder": (
        [*classes("."), "out/config.json", "out/metrics.jsonl", "out/reconstructions/epoch-0.png"],
        (4, ("cat", "dog"), None),
        ["3 files left out: in run folders of fastmae, which are no data, such as out"],
    ),
    "the run folder of the data": (
        [*classes("."), "config.json", "metrics.jsonl", "reconstructions/epoch-0.png"],
        (4, ("cat", "dog"), None),
        [
            "2 files left out: no images, as a run of fastmae leaves them (config.json, metrics.jsonl)",
            "1 file left out: in run folders of fastmae, which are no data, such as reconstructions",
        ],
    ),
    "hidden": (
        [*classes("."), ".DS_Store", "cat/.thumbnails/0.png"],
        (4, ("cat", "dog"), None),
        [
            "1 file left out: hidden, as their names begin with a dot (.DS_Store)",
            "1 file left out: in hidden folders such as cat/.thumbnails",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_and_classes_are_found_and_every_file_is_counted_once(name, tmp_path):
    names, (length, class_names, evaluated), said = LAYOUTS[name]
    train, val, stock = stock_of(fill(tmp_path, *names))
    assert (len(train), train.classes, None if val is None else len(val)) == (length, class_names, evaluated)
    assert (train.labels is None) == (not class_names)
    lines = stock.lines()
    assert len(lines) == len(said), lines
    for line, start in zip(sorted(lines), sorted(text.format(root=tmp_path) for text in said), strict=True):
        assert line.startswith(start)


REFUSED = {
    "two to train on": ([*classes("train"), *classes("Train")], "parts to train on, Train and train; give the path of"),
    "two to validate on": (
        [*classes("train"), *classes("val"), *classes("validation")],
        "parts to validate on, val and validation; give the path of one",
    ),
    "none to train on": (
        [*classes("val"), *classes("test")],
        "no part to train on, only val and test; to train on it, give {root}/val",
    ),
    "parts in several folders": (
        ["bottle/train/good/0.png", "bottle/test/bad/0.png", "cable/train/good/0.png", "cable/test/bad/0.png"],
        "has parts of its own (bottle, cable); give their paths, such as {root}/bottle",
    ),
    "parts deeper and images elsewhere": (
        [*classes("set/train"), *classes("set/val"), "logo.png"],
        "a folder in it has parts of its own (set); give their paths, such as {root}/set",
    ),
    "another library's format": (
        ["a.tfrecord", "b.tfrecord", "state.json"],
        "holds no images; 2 files left out: .tfrecord, TFRecord, which fastmae does not read; write its images to tar",
    ),
    "scans": (
        ["a/1.mha", "a/.x/2.png"],
        "holds no images; 1 file left out: .mha, which fastmae does not read; convert it to PNG, TIFF or .npy",
    ),
    "an empty part": (["train/x.txt", *classes("val")], "holds no images; 1 file left out: .txt, no image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_in_a_line_that_says_what_there_is(name, tmp_path):
    names, said = REFUSED[name]
    with pytest.raises(UserError, match=re.escape(said.format(root=tmp_path))) as caught:
        open_train(str(fill(tmp_path, *names)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_file_of_another_format_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "x.mat").write_bytes(b"x")
    with pytest.raises(SettingError, match=r"a \.mat file, which fastmae does not read; write the images to"):
        open_train(str(tmp_path / "x.mat"))
    (tmp_path / "photo").write_bytes(picture())
    assert len(open_train(str(tmp_path / "photo"))) == 1


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_pillow_reads_is_used_and_other_files_are_counted_by_suffix(tmp_path):
    suffixes = {".jpe": "JPEG", ".JFIF": "JPEG", ".jp2": "JPEG2000", ".TIFF": "TIFF", ".tga": "TGA", ".avif": "AVIF"}
    used = {suffix: name for suffix, name in suffixes.items() if name != "AVIF" or ".avif" in IMAGE_SUFFIXES}
    for suffix, name in used.items():
        (tmp_path / f"x{suffix}").write_bytes(picture(name))
    for name in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"):
        (tmp_path / f"{name} 12.05").write_bytes(picture(name))
    fill(tmp_path, "LICENSE", "a.eps", "b.eps", "c.mpg", "x.svs", "d.zip", "e.dat")
    train, _, stock = stock_of(tmp_path)
    assert len(train) == stock.used["files"] == len(used) + 8
    assert stock.lines() == [
        "2 files left out: .eps, a drawing; render it to PNG (a.eps, b.eps)",
        "1 file left out: no suffix, and no image by their first bytes (LICENSE)",
        "1 file left out: .dat, no image (e.dat)",
        "1 file left out: .mpg, a video; write its frames to image files (c.mpg)",
        "1 file left out: .svs, which fastmae does not read; convert it to PNG, TIFF or .npy (x.svs)",
        "1 file left out: .zip, an archive; give its own path (d.zip)",
    ]


def test_links_are_followed_and_broken_ones_counted(tmp_path):
    fill(tmp_path / "disks", "part1/0.png", "part2/0.png", "part2/deep/1.png")
    root = fill(tmp_path / "set", *classes("train", "dog"))
    (root / "train" / "cat").mkdir()
    for name in ("part1", "part2"):
        (root / "train" / "cat" / name).symlink_to(tmp_path / "disks" / name)
    (root / "train" / "cat" / "again").symlink_to(tmp_path / "disks" / "part1" / ".." / "part1")
    (root / "train" / "cat" / "round").symlink_to(root)
    (root / "train" / "dog" / "gone.png").symlink_to("nowhere.png")
    train = open_train(str(root))
    assert [train.classes[label] for label in train.labels] == ["cat"] * 3 + ["dog"] * 3
    assert [Path(path).name for path in train.paths] == ["0.png", "0.png", "1.png", "0.png", "1.png", "gone.png"]
    assert train.stock.used == {"files": 5}
    assert train.stock.lines() == [
        "1 file left out: links to what is not there; mend or remove them (train/dog/gone.png)",
        "2 folders left out: linked, and listed already or around the link (train/cat/part1, train/cat/round)",
    ]


def test_a_part_that_is_a_link_is_meant_more_than_where_it_leads(tmp_path):
    root = fill(tmp_path, *classes("versions/v1"), *classes("versions/v2", "fox"))
    (root / "train").symlink_to(root / "versions" / "v1")
    (root / "Val").symlink_to(root / "train")
    train, val, stock = stock_of(root)
    assert (len(train), train.part, val) == (4, "train", None)
    assert stock.lines() == [
        "2 files left out: images outside of train; to use them, give their own path "
        "(versions/v2/fox/0.png, versions/v2/fox/1.png)",
        "2 folders left out: linked, and listed already or around the link (Val, versions/v1)",
    ]


def test_a_kept_listing_has_the_same_stock(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(images, "WORTH_KEEPING", 5)
    monkeypatch.setattr(images, "is_settled", lambda times: True)
    calls = []
    scan = images.scan_folder
    monkeypatch.setattr(images, "scan_folder", lambda folder, *rest: (calls.append(folder), scan(folder, *rest))[1])
    root = fill(tmp_path / "set", *classes("train"), *classes("val"), "a.txt", ".b/c.png", "x.tar")
    first = stock_of(root)[2]
    assert len(first.left_out) == 3
    assert stock_of(root)[2] == first
    assert len(calls) == 1
    fill(root, ".b/d.png")  # what is in hidden folders changes no listing, but is counted anew
    assert stock_of(root)[2].total("files") == first.total("files") + 1
    assert len(calls) == 1


# --- classes ----------------------------------------------------------------------------------------------------------


def test_only_classes_that_both_parts_have_are_measured_and_by_their_names(tmp_path):
    root = fill(tmp_path, *classes("train", "ant", "cat", "dog"), *classes("val", "bee", "cat", "fox"))
    _, val = scored_parts(str(root))
    assert [val.name(i) for i in range(len(val))] == [str(root / "val" / "cat" / f"{i}.png") for i in range(2)]
    assert val.stock.lines() == [
        "4 images left out: of 2 classes that the train part has not (bee, fox), so their accuracy cannot be measured"
    ]
    assert len(train_and_val(str(root))[1]) == 6
    for name in ("ant", "cat", "dog"):
        (root / "train" / name).rename(root / "train" / name.upper())
    with pytest.raises(UserError, match=r"no class of the val part \(bee, cat, fox\) is one of the train part"):
        scored_parts(str(root))


def test_numbers_are_matched_too_and_folders_are_no_numbers(tmp_path):
    pixels = np.zeros((6, 8, 8), np.uint8)
    np.savez(tmp_path / "x.npz", x_train=pixels, y_train=[0, 1, 1, 4, 4, 4], x_test=pixels, y_test=[1, 1, 2, 3, 4, 5])
    _, val = scored_parts(str(tmp_path / "x.npz"))
    assert val.labels.tolist() == [1, 1, 4]
    assert "3 images left out: of 3 classes that the train part has not (2, 3, 5)" in val.stock.lines()[0]
    folders = open_train(str(fill(tmp_path / "set", *classes("."))))
    with pytest.raises(UserError, match="are names in one and numbers in the other"):
        with_known_classes(folders, val)
    mixed = Concat((folders, open_train(str(tmp_path / "x.npz"))))
    assert mixed.labels is None
    assert "the labels of some paths are names and of others numbers, so no image has one" in mixed.stock.notes


def test_a_missing_label_is_told_with_its_reason(tmp_path):
    root = fill(tmp_path, *classes("train"), *classes("val"), "train/preview.png")
    with pytest.raises(UserError, match=r"the train part has no labels; .*/train holds 1 image beside 2 folders"):
        scored_parts(str(root))
    several = open_train([str(root / "val"), str(root / "train")])
    assert several.labels is None
    assert "1 of 2 paths have labels, so no image has one; label all" in several.stock.notes


def test_paths_that_hold_each_other_are_told(tmp_path):
    root = fill(tmp_path, *classes("a", "cat"), *classes("b"))
    (note,) = open_train([str(root / "a"), str(root), str(root / "b")]).stock.notes[:1]
    assert note == f"{root / 'a'} is or lies in {root}, so images may be used twice; leave one out if so"
    assert sum("twice" in note for note in open_train([str(root), str(root)]).stock.notes) == 1
    assert not open_train([str(root / "a"), str(root / "b")]).stock.notes


def test_rare_suffixes_are_counted_together(tmp_path):
    fill(tmp_path, "0.png", *(f"x.s{i:02}x" for i in range(30)))
    _, _, stock = stock_of(tmp_path)
    assert len(stock.left_out) == 13
    assert stock.lines()[-1] == (
        "18 files left out: of other suffixes, none of them of images (x.s12x, x.s13x, x.s14x, …)"
    )


def test_a_held_out_part_counts_no_file_twice(tmp_path):
    root = fill(tmp_path, *classes("."), "a.txt")
    train, val = train_and_val(str(root))
    assert isinstance(val, Subset)
    assert joined((train.stock, val.stock)) == open_train(str(root)).stock


# --- what is said -----------------------------------------------------------------------------------------------------


def test_counts_and_lines_are_short():
    assert [count_of(1, unit) for unit in ("files", "classes", "images")] == ["1 file", "1 class", "1 image"]
    stock = Stock({"files": 1}, tuple(LeftOut("files", 1, f"reason {i}") for i in range(9)), ("a note",))
    assert len(stock.lines()) == 10
    assert stock.lines(8) == [*stock.lines()[:6], "a note", "and 3 more; `fastmae verify` shows them"]
    assert stock.lines(10) == stock.lines()


def test_a_run_verify_and_the_facts_say_the_same(tmp_path, capsys):
    """A default probe of a part that it cannot measure is skipped; one that was asked for is refused at the start."""
    root = fill(tmp_path / "set", *classes("train", count=4), *classes("val", "fox", "owl"), "notes.txt", "a.mha")
    flags = dict(batch_size=4, epochs=1, warmup_epochs=0.0, model="mae_vit_tiny_patch4", input_size=(8,), num_workers=1)
    assert pretrain(small_run(str(root), tmp_path / "run", **{**flags, "probe": None})) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "run" / "probe.json").exists()
    assert (
        f"probe           no accuracy is measured: {root}: no class of the val part (fox, owl) is one of the train"
        in out
    )
    assert "0.0 %" not in out
    assert main(["verify", "--data_path", str(root)]) == 0
    verified = capsys.readouterr().out
    assert "  stock         no class of the val part (fox, owl) is one of the train part (cat, dog)" in verified
    lines = describe(open_train(str(root))).stock
    assert len(lines) == 2
    for line in lines:
        assert f"data            {line}\n" in out
        assert f"  stock         {line}\n" in verified
    for asked in ({"probe": True}, {"probe_freq": 1}):
        with pytest.raises(SettingError, match=r"no class of the val part .*; leave it out"):
            pretrain(small_run(str(root), tmp_path / "other", **{**flags, **asked}))
    assert not (tmp_path / "other").exists()


def test_an_unlabelled_test_folder_does_not_end_a_run(tmp_path, capsys, monkeypatch):
    """A fifth of the train part is measured. What goes wrong there is a line, too."""
    root = fill(tmp_path / "set", *classes("train", count=8), "test/0.png", "test/1.png")
    flags = dict(batch_size=8, epochs=1, warmup_epochs=0.0, model="mae_vit_tiny_patch4", input_size=(8,), num_workers=1)
    assert pretrain(small_run(str(root), tmp_path / "run", **{**flags, "probe": None})) == 0
    assert json.loads((tmp_path / "run" / "probe.json").read_text())["after"]["train"] == 13
    assert "2 files left out: in test, which has no labels as train has" in capsys.readouterr().out

    def breaks(*words, **options):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("fastmae.train.pretrain.probe", breaks)
    assert pretrain(small_run(str(root), tmp_path / "next", **{**flags, "probe": None})) == 0
    assert "no accuracy is measured: RuntimeError: out of memory" in capsys.readouterr().out
    assert pretrain(small_run(str(root), tmp_path / "often", **flags, probe_freq=1)) == 0
    assert "no accuracy is measured: after epoch 1, RuntimeError: out of memory" in capsys.readouterr().out
    with pytest.raises(RuntimeError):
        pretrain(small_run(str(root), tmp_path / "asked", **{**flags, "probe": True}))
