"""Tar shards: grouped as webdataset does, indexed once, read in place by any thread, and honest about damage."""

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import small_run

from fastmae.benchmarks.images import ImagesConfig, write_images
from fastmae.data import packed, shards
from fastmae.data.index import Index, pack_names, read_index, write_index
from fastmae.data.loader import View, load_batches
from fastmae.data.plan import plan_epoch
from fastmae.data.reading import Reading
from fastmae.data.shards import expand_braces, open_shards
from fastmae.data.sources import describe, open_train, open_val, train_and_val
from fastmae.errors import UserError
from fastmae.train.pretrain import pretrain

COUNT = 64


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def same_images(tmp_path_factory):
    """The same 64 small JPEGs as folder, tar and parquet."""
    root = tmp_path_factory.mktemp("images")
    for kind in ("folder", "tar", "parquet"):
        write_images(ImagesConfig(folder=root / kind, count=COUNT, kind=kind, shard=20, classes=3, height=30, width=40))
    return root


def write_tar(path, members, format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def numbered(count, labelled=True):
    """Members of ``count`` samples of different sizes."""
    members = []
    for i in range(count):
        members.append((f"{i:04d}.jpg", bytes([i]) * (300 + 97 * i)))
        members += [(f"{i:04d}.cls", f"{i % 3}\n".encode())] if labelled else []
    return members


def contents(source):
    return [source.read(i) for i in range(len(source))]


def age(*paths):
    """Makes files old enough for an index of them to be kept."""
    for path in paths:
        os.utime(path, (1_600_000_000, 1_600_000_000))


# --- the same images in every form ------------------------------------------------------------------------------------


def test_folder_tar_and_parquet_give_the_same_bytes_and_labels(same_images):
    folder, tar, parquet = (open_train(str(same_images / kind)) for kind in ("folder", "tar", "parquet"))
    assert len(folder) == COUNT
    assert contents(folder) == contents(tar) == contents(parquet)
    assert folder.labels.tolist() == tar.labels.tolist() == parquet.labels.tolist()
    assert {describe(source).kind for source in (folder, tar, parquet)} == {"folder"}
    assert describe(tar).location == "in 4 tar shards"
    assert describe(parquet).location == "in column 'image' of 4 Parquet files"
    assert describe(folder).location == "in 3 class folders (class-0000, class-0001, class-0002) of train"


def test_folder_tar_and_parquet_give_the_same_training_batches(same_images):
    view = View((16, 16), Reading(3), seed=7, scale=(0.2, 1.0), flip=True)
    by_kind = []
    for kind in ("folder", "tar", "parquet"):
        source = open_train(str(same_images / kind))
        plan = plan_epoch(0, 1, len(source), 16, shards=source.shards)
        requests = (plan.batch(k) for k in range(len(plan)))
        batches = load_batches(source, requests, view, device=torch.device("cpu"), num_workers=2)
        by_kind.append(list(batches))
    for batches in zip(*by_kind, strict=True):
        assert all(torch.equal(batches[0].images, other.images) for other in batches[1:])
        assert all(torch.equal(batches[0].draw_ids, other.draw_ids) for other in batches[1:])
        assert not any(batch.skipped for batch in batches)


def test_a_pattern_names_the_shards_in_its_order(same_images):
    pattern = open_train(str(same_images / "tar" / "part-{000000..000003}.tar"))
    assert contents(pattern) == contents(open_train(str(same_images / "tar")))
    two = open_train(str(same_images / "tar" / "part-{000002,000000}.tar"))
    assert two.name(0).endswith("part-000002.tar:00000040.jpg")
    assert (len(two), open_val(str(same_images / "tar" / "part-{000002,000000}.tar"))) == (40, None)
    assert contents(open_train(str(same_images / "parquet" / "train-0000{0..3}-of-00004.parquet"))) == contents(pattern)


def test_braces():
    assert expand_braces("a{08..10}{x,yz}") == ["a08x", "a08yz", "a09x", "a09yz", "a10x", "a10yz"]
    assert expand_braces("{3..1}") == ["3", "2", "1"]
    assert expand_braces("a{b}{1..}") == ["a{b}{1..}"]
    for many in ("{0..9999999}", "{0..9}" * 9, "{a,b}" * 60, "{1..99999}{99999..1}"):
        with pytest.raises(UserError, match="million names"):
            expand_braces(many)


def test_parts_by_folder_and_by_name(same_images, tmp_path):
    for name, shard in (("train/a.tar", 0), ("val/a.tar", 1)):
        (tmp_path / "parts" / name).parent.mkdir(parents=True)
        shutil.copy(same_images / "tar" / f"part-00000{shard}.tar", tmp_path / "parts" / name)
    train, val = train_and_val(str(tmp_path / "parts"))
    assert (train.name(0)[-12:], val.name(0)[-12:]) == ("00000000.jpg", "00000020.jpg")
    (tmp_path / "named").mkdir()
    for name, shard in (("set-train-0.tar", 0), ("set-train-1.tar", 1), ("set-test-0.tar", 2), ("set-val-0.tar", 3)):
        shutil.copy(same_images / "tar" / f"part-00000{shard}.tar", tmp_path / "named" / name)
    train, val = train_and_val(str(tmp_path / "named"))
    assert (len(train), len(val)) == (40, 4)
    assert open_val(str(same_images / "tar")) is None


def test_images_win_over_shards_beside_them_which_are_reported(same_images, tmp_path):
    shutil.copytree(same_images / "folder", tmp_path / "both")
    shutil.copy(same_images / "tar" / "part-000000.tar", tmp_path / "both" / "train")
    source = open_train(str(tmp_path / "both"))
    assert len(source) == COUNT
    assert describe(source).stock == (
        "1 file left out: shards beside image files; to use them, give their own path (train/part-000000.tar)",
    )


def test_pretrain_on_a_tar(same_images, tmp_path, capsys):
    flags = dict(batch_size=16, epochs=1, model="mae_vit_tiny_patch4", input_size=(16,), num_workers=2)
    assert pretrain(small_run(str(same_images / "tar"), tmp_path / "run", **flags)) == 0
    assert "tar: 64 images in 4 tar shards, labelled" in capsys.readouterr().out.replace("\n", " ")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    pretrain(small_run(str(same_images / "folder"), tmp_path / "same", **flags))
    lines = (tmp_path / "same" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == losses


# --- what is in a tar -------------------------------------------------------------------------------------------------

LONG = "folder-" + "x" * 120 + "/" + "y" * 180


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names(tmp_path, format):
    stem = "a" * 90 + "/" + "b" * 90 if format == tarfile.USTAR_FORMAT else LONG
    names = [f"{stem}1.JPG", f"{stem}2.jpeg", "./n01/ü.png"]
    write_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names], format)
    source = open_train(str(tmp_path / "x.tar"))
    assert contents(source) == [name.encode() for name in names]
    assert [source.name(i) for i in range(3)] == [f"{tmp_path / 'x.tar'}:{name}" for name in names]
    assert source.labels is None


def test_grouping_is_that_of_webdataset(tmp_path):
    members = [
        ("a/1.json", b"{}"), ("a/1.cls", b"4"), ("a/1.jpg", b"one"), ("a/1.mask.png", b"mask"),
        ("b/1.cls", b"5"), ("b/1.WEBP", b"two"), ("b/1.ppm", b"second image of a key"),
        ("b/.hidden.jpg", b"no"), ("b/._1.jpg", b"no"), ("nodot", b"no"), ("c/only.json", b"{}"),
        ("d.e/f.cls", b"-1 \n"), ("d.e/f.png", b"three"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("z.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        folder = tarfile.TarInfo("q.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    source = open_train(str(path))
    assert contents(source) == [b"one", b"two", b"three"]
    assert source.labels.tolist() == [4, 5, -1]


def members_of(path):
    with tarfile.open(path) as archive:
        return len(archive.getmembers())


def left_out(source):
    return {item.reason: (item.count, item.examples) for item in source.stock.left_out}


def test_every_member_is_used_or_left_out_for_a_reason(tmp_path):
    members = [
        ("a/1.jpg", b"x"), ("a/1.json", b"{}"), ("a/1.mask.png", b"x"), ("a/1.png", b"x"), ("a/2.txt", b"x"),
        ("__MACOSX/a/._1.jpg", b"x"), ("README", b"x"), ("b.tar", b"x"), ("b.tar.gz", b"x"), ("3.cls", b"3"),
        ("a/4.dng", b"x"), ("a/5.jpg", b"x"), ("a/1.jpg", b"x"), ("c/6.webp", b"x"), ("c/6.cls", b"cat"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            member = tarfile.TarInfo(f"z{ord(kind)}.jpg")
            member.type, member.linkname = kind, "a/1.jpg"
            archive.addfile(member)
    source = open_train(str(path))
    assert len(source) == 4
    assert source.stock.total("members") == members_of(path) == len(members) + 5
    assert source.stock.used == {"files": 1, "images": 4, "members": 5}  # and a folder
    found = left_out(source)
    assert sum(count for count, _ in found.values()) == len(members)
    assert found[shards.SECOND_IMAGE] == (2, ("a/1.mask.png", "a/1.png"))
    assert found[shards.HIDDEN] == (1, ("__MACOSX/a/._1.jpg",))
    assert found[shards.NO_SUFFIX] == (1, ("README",))
    assert found[shards.NO_TAR] == (1, ("b.tar",))
    assert found[shards.PACKED_TAR] == (1, ("b.tar.gz",))
    assert found[shards.NO_IMAGE] == (1, ("3.cls",))
    assert found[shards.NO_INTEGER] == (1, ("c/6.cls",))
    assert found[shards.NO_FILES["link"]][0] == found[shards.NO_FILES["device"]][0] == 2
    assert found[".dng, which Pillow does not decode; convert it to PNG, TIFF or JPEG"] == (1, ("a/4.dng",))
    assert source.stock.notes == ("1 image with the name of an earlier one, both used (a/1.jpg)",)
    assert "1 member left out: no suffix in the name (README)" in describe(source).stock


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_sparse_members_of_gnu_tar_are_left_out_and_what_follows_is_read(tmp_path, format):
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "1.jpg", "wb") as file:
        for hole in range(30):  # more than fit into the header
            file.seek(hole * 200_000)
            file.write(b"data" * 2000)
    (tmp_path / "in" / "2.jpg").write_bytes(b"two")
    words = ["tar", f"--format={format}", "--sparse", "-cf", str(tmp_path / "x.tar"), "-C", str(tmp_path / "in")]
    subprocess.run([*words, "1.jpg", "2.jpg"], check=True)
    source = open_train(str(tmp_path / "x.tar"))
    assert contents(source) == [b"two"]
    assert source.damage == ()
    assert left_out(source) == {shards.NO_FILES["sparse"]: (1, ("1.jpg",))}


def test_names_with_several_dots_are_samples_of_their_own(tmp_path):
    names = ["IMG_1.jpg", "holiday.2023-01-02.jpg", "holiday.2023-01-03.jpg", "x.min.jpg", "v1.0/a.jpg"]
    path = write_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names])
    source = open_train(str(path))
    assert contents(source) == [name.encode() for name in names]
    assert source.stock.used == {"files": 1, "images": 5, "members": 5}
    (note,) = source.stock.notes
    assert note.startswith("3 images with more than one dot in their names, each taken as a sample (holiday.2023-01-02")
    members = [("h.1.jpg", b"x"), ("h.1.cls", b"1"), ("h.2.jpg", b"y"), ("h.2.cls", b"2"), ("i.l.jpg", b"z"),
               ("i.r.jpg", b"w"), ("i.cls", b"3")]  # fmt: skip
    assert open_train(str(write_tar(path, members))).labels.tolist() == [1, 2, 3, 3]


def test_labels_may_lie_anywhere_in_the_shard_of_their_images(tmp_path):
    members = numbered(5)
    members = [member for member in members if member[0].endswith("jpg")] + members[1::2][::-1]
    source = open_train(str(write_tar(tmp_path / "x.tar", members)))
    assert source.labels.tolist() == [0, 1, 2, 0, 1]
    assert source.stock.used == {"files": 1, "images": 5, "members": 10}


def test_labels_that_some_images_lack_are_counted_over_all_shards(tmp_path):
    write_tar(tmp_path / "a.tar", [*numbered(3), ("lost.jpg", b"x"), ("a.json", b"{}")])
    write_tar(tmp_path / "b.tar", [*numbered(2), ("b.json", b"{}")])
    source = open_train(str(tmp_path))
    assert source.labels is None
    assert source.stock.used == {"files": 2, "images": 6, "members": 6}
    assert left_out(source) == {
        ".json, no image": (2, ("a.json", "b.json")),
        "labels, as 1 of 6 images have none; give each its .cls to use them": (5, ("without: lost.jpg",)),
    }


def test_reasons_stay_few_whatever_suffixes_there_are(tmp_path):
    members = [("1.jpg", b"x"), *((f"x.s{n}", b"") for n in range(100))]
    source = open_train(str(write_tar(tmp_path / "x.tar", members)))
    assert source.stock.total("members") == 101
    assert len(source.stock.left_out) == shards.MAX_REASONS + 1
    assert left_out(source)[shards.OTHER_SUFFIX][0] == 80


def test_tars_that_were_joined_are_not_taken_as_whole(tmp_path):
    one = write_tar(tmp_path / "x.tar", numbered(3)).read_bytes()
    (tmp_path / "x.tar").write_bytes(one + one)
    source = open_train(str(tmp_path / "x.tar"))
    assert len(source) == 3
    assert "goes on behind its end at byte" in source.damage[0][1]


@pytest.mark.parametrize("label", [None, b"cat", b"", b"1.5", b"9" * 19, b"1" * 40])
def test_labels_only_if_every_sample_has_an_integer(tmp_path, label):
    members = [*numbered(3), ("x.png", b"x"), *([] if label is None else [("x.cls", label)])]
    assert open_train(str(write_tar(tmp_path / "x.tar", members))).labels is None


def test_sizes_in_base_256_and_in_pax(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("1.jpg", b"one"), ("2.jpg", b"two")])
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (3).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(data)
    assert contents(open_train(str(path))) == [b"one", b"two"]
    with tarfile.open(tmp_path / "pax.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("1.jpg")
        member.size, member.pax_headers = 3, {"size": "3", "comment": "hello"}
        archive.addfile(member, io.BytesIO(b"one"))
    assert contents(open_train(str(tmp_path / "pax.tar"))) == [b"one"]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_of_a_cut_shard_what_is_intact_is_used_and_the_cut_is_named(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", numbered(9)).read_bytes()
    expected = contents(open_train(str(tmp_path / "whole.tar")))
    (tmp_path / "cut").mkdir()
    write_tar(tmp_path / "cut" / "a.tar", numbered(9))
    seen = set()
    for size in range(513, len(whole) - 10_240, 701):
        (tmp_path / "cut" / "b.tar").write_bytes(whole[:size])
        source = open_train(str(tmp_path / "cut"))
        intact = len(source) - 9
        assert contents(source) == expected + expected[:intact]
        assert source.labels.tolist() == [*(i % 3 for i in range(9)), *(i % 3 for i in range(intact))]
        assert f"first {intact} images are used" in describe(source).location
        assert "b.tar" in describe(source).location
        assert "\n" not in describe(source).location
        seen.add(intact)
    assert {*range(9)} <= seen


def test_damage_is_remembered_with_the_index(tmp_path):
    path = write_tar(tmp_path / "x.tar", numbered(9))
    path.write_bytes(path.read_bytes()[:5000])
    age(path)
    assert describe(open_train(str(path))) == describe(open_train(str(path)))
    (kept,) = tmp_path.glob(".fastmae-*.index")
    ((name, what),) = open_train(str(path)).damage
    assert name == str(path)
    assert what.startswith("is cut at byte 5000, so only its first")
    (tmp_path / "moved").mkdir()
    for file in (path, kept):
        shutil.move(file, tmp_path / "moved")
    assert open_train(str(tmp_path / "moved")).damage == ((str(tmp_path / "moved" / "x.tar"), what),)


def test_a_member_larger_than_any_image_is_not_read(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", numbered(3))
    source = open_train(str(path))
    monkeypatch.setattr(packed, "MAX_FILE_BYTES", 10)
    with pytest.raises(OSError, match="bytes, over the limit of 10"):
        source.read(0)


def _wrong_header(data):
    data[4096 + 10] ^= 1


def _huge_size(data):
    data[124:136] = b"77777777777\0"
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()


def _negative_size(data):
    data[124:136] = b"-0000000001\0"
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()


BROKEN = {
    "text": (b"hello " * 500, "not a tar file"),
    "short text": (b"hello", "not a tar file"),
    "empty file": (b"", "holds no images"),
    "gzip": (gzip.compress(b"x" * 9999), "compressed tar cannot be read in place; unpack it with `gunzip`"),
    "zstandard": (b"\x28\xb5\x2f\xfd" + bytes(600), "unpack it with `unzstd`"),
    "only zeros": (bytes(10_240), "holds no images"),
    "cut in the first image": (None, "holds no images in 1 tar shard; .*first 0 images"),
    "tar of tars of tars": (None, "holds no images"),
    "huge size": (_huge_size, "holds no images in 1 tar shard; .*cut at byte"),
    "negative size": (_negative_size, "not a tar file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tars_are_refused_in_one_line(tmp_path, case):
    content, words = BROKEN[case]
    path = tmp_path / "x.tar"
    whole = bytearray(write_tar(path, numbered(4)).read_bytes())
    if case == "tar of tars of tars":
        write_tar(path, [("n01.tar", bytes(whole))])
        write_tar(path, [("n01.tar", path.read_bytes())])
    elif case == "cut in the first image":
        write_tar(path, [("1.cls", b"1"), *numbered(4)])
        path.write_bytes(path.read_bytes()[:700])
    elif callable(content):
        content(whole)
        path.write_bytes(whole)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        open_train(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_compressed_tars_are_refused_with_what_to_do(tmp_path, suffix, in_folder):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / f"x{suffix}").write_bytes(b"whatever")
    with pytest.raises(UserError, match="compressed tar cannot be read in place; run `"):
        open_train(str(tmp_path / "set") if in_folder else str(tmp_path / "set" / f"x{suffix}"))


def test_a_wrong_header_in_the_middle_ends_a_shard(tmp_path):
    path = write_tar(tmp_path / "x.tar", numbered(6, labelled=False))
    data = bytearray(path.read_bytes())
    second = data.index(b"0002.jpg")
    data[second] ^= 1
    path.write_bytes(data)
    source = open_train(str(path))
    assert len(source) == 2
    assert f"no tar header at byte {second}" in describe(source).location


def test_a_broken_extension_ends_a_shard_and_a_sparse_member_is_left_out(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, headers in (("1.jpg", {}), ("2.jpg", {"GNU.sparse.major": "1"})):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = 3, headers
            archive.addfile(member, io.BytesIO(b"one"))
    source = open_train(str(path))
    assert (len(source), source.damage) == (1, ())
    assert "sparse members; make the tar without `--sparse`" in str(source.stock.left_out[0])
    data = path.read_bytes()
    for old, new in ((b"GNU.sparse.major=1\n", b"GNU.sparse.major=1x"), (b"22 GNU", b"99 GNU"), (b"22 GNU", b"xx GNU")):
        path.write_bytes(data.replace(old, new))
        assert data != path.read_bytes()
        assert "broken PAX header" in describe(open_train(str(path))).location, new


def test_missing_shards_and_mixed_kinds_are_refused(same_images, tmp_path):
    for shard in (0, 2):
        shutil.copy(same_images / "tar" / f"part-00000{shard}.tar", tmp_path)
    with pytest.raises(UserError, match=r"1 of its 3 files are missing, the first of them .*part-000001.tar"):
        open_train(str(tmp_path / "part-{000000..000002}.tar"))
    shutil.copy(same_images / "parquet" / "train-00000-of-00004.parquet", tmp_path)
    with pytest.raises(UserError, match=r"both \.tar and \.parquet"):
        open_train(str(tmp_path))
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"not a\.txt"):
        open_train(str(tmp_path / "{a.txt,part-000000.tar}"))


def test_a_shard_that_changes_under_a_run_is_an_error_and_not_other_bytes(tmp_path):
    path = write_tar(tmp_path / "x.tar", numbered(5))
    source = open_train(str(path))
    write_tar(path, numbered(6)[2:])
    with pytest.raises(OSError, match="has changed since it was indexed"):
        source.read(0)
    path.unlink()
    with pytest.raises(OSError, match=r"x\.tar"):
        source.read(0)
    write_tar(path, numbered(5))
    source = open_train(str(path))
    source.read(0)
    os.truncate(path, 1000)
    with pytest.raises(OSError, match="has become shorter"):
        source.read(4)


# --- the index --------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """The shards that were indexed, once per time."""
    indexed = []
    original = shards.index_shard
    monkeypatch.setattr(shards, "index_shard", lambda path, **of: (indexed.append(path), original(path, **of))[1])
    return indexed


def test_the_index_is_made_once_and_again_when_a_shard_changes(same_images, tmp_path, counted):
    folder = shutil.copytree(same_images / "tar", tmp_path / "tar", ignore=shutil.ignore_patterns("*.index"))
    age(*folder.iterdir())
    first = open_train(str(folder))
    assert (len(counted), len(list(folder.glob(".fastmae-*.index")))) == (4, 1)
    assert not (tmp_path / "cache").exists()
    second = open_train(str(folder))
    assert len(counted) == 4
    assert contents(first) == contents(second)
    assert [first.name(i) for i in range(64)] == [second.name(i) for i in range(64)]
    assert second.labels.tolist() == first.labels.tolist()
    assert second.stock == first.stock
    second.labels[:1] = 0  # as writable as any other labels
    expected = contents(first)
    shutil.move(folder, tmp_path / "moved")
    assert contents(open_train(str(tmp_path / "moved"))) == expected
    assert len(counted) == 4  # it moves with the shards
    last = tmp_path / "moved" / "part-000003.tar"
    write_tar(last, numbered(7))
    assert len(open_train(str(tmp_path / "moved"))) == 67
    assert len(counted) == 8
    last.unlink()
    assert len(open_train(str(tmp_path / "moved"))) == 60


def test_fresh_shards_are_not_indexed_for_later(tmp_path, counted):
    """A change within the same tick of the clock of the file system cannot be noticed."""
    write_tar(tmp_path / "x.tar", numbered(3))
    for _ in range(2):
        open_train(str(tmp_path / "x.tar"))
    assert len(counted) == 2


def test_the_index_goes_to_the_cache_folder_where_the_shards_cannot_be_written(
    same_images, tmp_path, counted, monkeypatch
):
    folder = shutil.copytree(same_images / "tar", tmp_path / "tar", ignore=shutil.ignore_patterns("*.index"))
    age(*folder.iterdir())
    monkeypatch.setattr(
        shards, "write_index", lambda path, index: path.parent != folder and write_index(path, index)
    )  # as root may write everywhere
    open_train(str(folder))
    open_train(str(folder))
    assert len(counted) == 4
    assert list((tmp_path / "cache" / "fastmae").glob("*.index"))
    assert not list(folder.glob(".fastmae-*"))
    monkeypatch.setattr(shards, "write_index", lambda path, index: False)
    shutil.rmtree(tmp_path / "cache")
    assert len(open_train(str(folder))) == COUNT


def _index_with(index, **changes):
    return Index(index.fingerprint, {**index.columns, **changes})


FOREIGN = {
    "empty": lambda raw, index: b"",
    "cut": lambda raw, index: raw[:-9],
    "longer": lambda raw, index: raw + b"\0",
    "a bit flipped": lambda raw, index: raw[:-40] + bytes([raw[-40] ^ 1]) + raw[-39:],
    "text": lambda raw, index: b"hello\nworld",
    "a list": lambda raw, index: b"[1, 2]\n",
    "deep": lambda raw, index: b"[" * 100_000 + b"\n",
    "endless numbers": lambda raw, index: raw.replace(b'"i", 9]', b'"i", 1e999]', 1),
    "pickle": lambda raw, index: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "huge claim": lambda raw, index: raw.replace(b'"i", 9]', b'"i", 99999999999999]', 1),
    "other fingerprint": lambda raw, index: Index([["x.tar", 1, 1]], index.columns),
    "offset outside": lambda raw, index: _index_with(index, offset=index.columns["offset"] + 10**9),
    "offset that overflows": lambda raw, index: _index_with(index, offset=np.full(9, 2**63 - 1)),
    "negative offset": lambda raw, index: _index_with(index, offset=-index.columns["offset"]),
    "size outside": lambda raw, index: _index_with(index, size=index.columns["size"] + 10**6),
    "negative size": lambda raw, index: _index_with(index, size=-index.columns["size"]),
    "another shard": lambda raw, index: _index_with(index, shard=index.columns["shard"] + 1),
    "damage elsewhere": lambda raw, index: _index_with(index, damaged=np.array([1]), damage=pack_names(["gone"])),
    "damage of nothing": lambda raw, index: _index_with(index, damage=pack_names(["gone"])),
    "fewer names": lambda raw, index: _index_with(index, names=pack_names(["a"])),
    "fewer sizes": lambda raw, index: _index_with(index, size=index.columns["size"][1:]),
    "of older rules": lambda raw, index: Index(
        index.fingerprint, {name: column for name, column in index.columns.items() if name != "stock"}
    ),
    "no stock": lambda raw, index: _index_with(index, stock=np.frombuffer(b"[1, 2]", np.uint8)),
    "a stock that is deep": lambda raw, index: _index_with(index, stock=np.frombuffer(b"[" * 99_999, np.uint8)),
    "no labels": lambda raw, index: Index(index.fingerprint, dict(list(index.columns.items())[:3])),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_damaged_or_foreign_index_is_made_anew(tmp_path, counted, case):
    path = write_tar(tmp_path / "x.tar", numbered(9))
    age(path)
    expected = contents(open_train(str(path)))
    (kept,) = tmp_path.glob(".fastmae-*.index")
    raw, index = kept.read_bytes(), read_index(kept)
    assert index is not None
    spoilt = FOREIGN[case](raw, index)
    assert spoilt != raw
    if isinstance(spoilt, bytes):
        kept.write_bytes(spoilt)
    else:
        assert write_index(kept, spoilt)
    source = open_train(str(path))
    assert len(counted) == 2
    assert contents(source) == expected
    open_train(str(path))
    assert len(counted) == 2  # mended


def test_an_index_that_is_a_pipe_or_of_any_size_is_made_anew(tmp_path, counted):
    path = write_tar(tmp_path / "x.tar", numbered(3))
    age(path)
    open_train(str(path))
    (kept,) = tmp_path.glob(".fastmae-*.index")
    kept.unlink()
    os.mkfifo(kept)
    assert len(open_train(str(path))) == 3
    assert kept.is_file()
    os.truncate(kept, 1 << 40)
    assert len(open_train(str(path))) == 3
    assert kept.stat().st_size < 10_000
    assert len(counted) == 3


def test_an_index_that_cannot_be_written_is_not_an_error(tmp_path):
    (tmp_path / "file").touch()
    assert not write_index(tmp_path / "file" / "x.index", Index(None, {}))
    (tmp_path / "folder.index").mkdir()
    assert not write_index(tmp_path / "folder.index", Index(None, {}))
    assert not list(tmp_path.glob(".folder*"))


# --- threads ----------------------------------------------------------------------------------------------------------


def test_many_threads_read_the_same_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "OPEN_SHARDS", 2)  # so that files are closed while others read
    for shard in range(8):
        write_tar(tmp_path / f"{shard}.tar", numbered(20))
    source = open_shards(sorted(tmp_path.glob("*.tar")))
    expected = contents(source)
    order = np.random.default_rng(0).integers(0, len(source), 6000).tolist()
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        assert all(data == expected[i] for i, data in zip(order, pool.map(source.read, order), strict=True))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
