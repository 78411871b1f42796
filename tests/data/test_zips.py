"""Zip archives: read in place by any thread as the folder would be, whatever lies in them."""

import io
import os
import stat
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fastmae.data import zips
from fastmae.data.fingerprint import difference, fingerprint
from fastmae.data.index import Index, cache_file, read_index, write_index
from fastmae.data.sources import classes_of, open_train, open_val, train_and_val
from fastmae.errors import UserError


def picture(number):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (number, 0, 0)).save(buffer, "BMP")
    return buffer.getvalue()


def write(path, *names, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for number, name in enumerate(names):
            archive.writestr(name, b"" if name.endswith("/") else picture(number) if name.endswith(".bmp") else b"text")
    return str(path)


def labels(source):
    chosen = classes_of(source, np.arange(len(source)))
    return None if chosen is None else chosen.tolist()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_class_folders_and_parts_are_those_of_a_folder(tmp_path, method):
    names = [f"set/{part}/{kind}/{i}.bmp" for part in ("train", "val") for kind in ("cat", "dog") for i in range(3)]
    path = write(tmp_path / "x.zip", "set/", *names, "set/readme.md", "__MACOSX/set/._1.bmp", method=method)
    train, val = train_and_val(path)
    assert [train.read(i) for i in range(6)] == [picture(i) for i in range(1, 7)]
    assert [val.read(i) for i in range(6)] == [picture(i) for i in range(7, 13)]
    assert labels(train) == labels(val) == ["cat"] * 3 + ["dog"] * 3
    assert train.name(5) == f"{path}:set/train/dog/2.bmp"
    assert train.location == "in x.zip in 2 class folders of train"
    assert train.stock.used == {"files": 1, "members": 12}
    assert train.stock.total("members") == 14
    assert any(line == "1 member left out: .md, no image (set/readme.md)" for line in train.stock.lines())


def test_a_folder_around_all_is_passed_over(tmp_path):
    source = open_train(write(tmp_path / "x.zip", *(f"photos/{kind}/0.bmp" for kind in ("cat", "dog"))))
    assert source.classes == ("cat", "dog")
    assert open_train(write(tmp_path / "y.zip", "cat/0.bmp", "cat/1.bmp")).classes == ("cat",)
    assert open_train(write(tmp_path / "z.zip", "0.bmp", "1.bmp")).labels is None
    assert open_val(str(tmp_path / "z.zip")) is None


def test_threads_read_the_same_bytes(tmp_path):
    path = write(tmp_path / "x.zip", *(f"{i:03}.bmp" for i in range(100)))
    source = open_train(path)
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(source.read, [*range(100)] * 3)] == [picture(i) for i in range(100)] * 3


def test_the_archive_is_known_again_and_a_change_is_noticed(tmp_path):
    path = write(tmp_path / "x.zip", "a/0.bmp", "b/1.bmp")
    source = open_train(path)
    before = fingerprint(source)
    assert difference(fingerprint(open_train(path)), before) is None
    write(tmp_path / "x.zip", "a/9.bmp", "b/1.bmp", "b/2.bmp")
    with pytest.raises(OSError, match="has changed since it was opened"):
        source.read(0)
    assert difference(fingerprint(open_train(path)), before) is not None


def test_names_never_lead_anywhere(tmp_path):
    outside = tmp_path / "outside.bmp"
    path = write(tmp_path / "x.zip", "../outside.bmp", "/etc/1.bmp", "a/../../2.bmp", "c\\d.bmp")
    source = open_train(path)
    assert len(source) == 4
    assert {source.read(i) for i in range(4)} == {picture(i) for i in range(4)}
    assert not outside.exists()


def patched(path, change):
    """The archive with the entry of its first file changed: a dictionary of the numbers in it."""
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\1\2")
    keys = ("magic", "by", "needs", "flags", "method", "time", "date", "crc", "packed", "size", "name", "extra",
            "comment", "disk", "kind", "attributes", "header")  # fmt: skip
    entry = dict(zip(keys, zips._ENTRY.unpack_from(data, start), strict=True)) | change
    zips._ENTRY.pack_into(data, start, *entry.values())
    path.write_bytes(data)
    return str(path)


LIES = {
    "encrypted": (dict(flags=1), "encrypted, which fastmae does not read"),
    "another method": (dict(method=12), "packed by another method than deflate"),
    "a link": (dict(attributes=stat.S_IFLNK << 16), "links, and no images"),
    "a bomb": (dict(size=1 << 31), "of sizes that cannot be true"),
    "bytes behind the end": (dict(packed=1 << 30), "of sizes that cannot be true"),
    "a header behind the end": (dict(header=1 << 31), "of sizes that cannot be true"),
}


@pytest.mark.parametrize("lie", LIES)
def test_members_that_cannot_be_read_are_left_out_with_the_reason(tmp_path, lie):
    change, reason = LIES[lie]
    write(tmp_path / "x.zip", "0.bmp", "1.bmp")
    source = open_train(patched(tmp_path / "x.zip", change))
    assert [source.read(i) for i in range(len(source))] == [picture(1)]
    assert any(f"1 member left out: {reason}" in line and line.endswith("(0.bmp)") for line in source.stock.lines())


@pytest.mark.parametrize("change", [dict(size=100), dict(size=8000), dict(crc=1), dict(header=5), dict(packed=20)])
def test_damage_is_an_error_of_that_image_and_nothing_more_is_unpacked(tmp_path, change):
    write(tmp_path / "x.zip", "0.bmp", "1.bmp")
    source = open_train(patched(tmp_path / "x.zip", change))
    with pytest.raises(OSError, match=r"archive"):
        source.read(0)
    assert source.read(1) == picture(1)


def test_a_bomb_is_unpacked_no_further_than_its_size(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.bmp", bytes(50 << 20))
    source = open_train(patched(tmp_path / "x.zip", dict(size=1000)))
    with pytest.raises(OSError, match="unpacks to more than the archive says"):
        source.read(0)
    assert len(zips._inflated(zlib.compress(bytes(1 << 20), wbits=-15), 1000, False)) == 1000


def _end(**change):
    def cut(data):
        at = data.rindex(b"PK\5\6")
        keys = ("disk", "first", "here", "count", "size", "start")
        values = dict(zip(keys, struct.unpack_from("<4H2I", data, at + 4), strict=True)) | change
        return data[: at + 4] + struct.pack("<4H2I", *values.values()) + data[at + 20 :]

    return cut


def _longer(data):
    at = data.index(b"PK\1\2") + 28
    return data[:at] + b"\xff\xff" + data[at + 2 :]


BROKEN = {
    "text": (lambda data: b"hello" * 99, "no zip archive"),
    "empty": (lambda data: b"", "no zip archive"),
    "cut": (lambda data: data[:-40], "no zip archive, or one that is cut"),
    "cut in the middle": (lambda data: data[:200], "no zip archive, or one that is cut"),
    "without its beginning": (lambda data: data[300:], "damaged|cut"),
    "many files": (_end(count=60000, here=60000), "claims 60,000 files"),
    "a huge table": (_end(size=1 << 31), "cut|claims"),
    "a table elsewhere": (_end(start=4), "damaged"),
    "several disks": (_end(disk=3), "in several files"),
    "an endless name": (_longer, "damaged|cut"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_archives_are_refused_in_one_line(tmp_path, case):
    change, words = BROKEN[case]
    write(tmp_path / "x.zip", "0.bmp", "1.bmp", method=zipfile.ZIP_STORED)
    (tmp_path / "x.zip").write_bytes(change((tmp_path / "x.zip").read_bytes()))
    with pytest.raises(UserError, match=words) as raised:
        open_train(str(tmp_path / "x.zip"))
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_an_archive_of_more_than_65_thousand_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number in range(66_000):
            archive.writestr(f"{number:05}.bmp", b"x")
    source = open_train(str(tmp_path / "x.zip"))
    assert len(source) == 66_000
    assert source.read(65_999) == b"x"


def test_the_table_of_a_long_archive_is_kept_until_the_archive_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(zips, "WORTH_KEEPING", 3)
    names = ["/set/b/1.bmp", "/set/a/2.bmp", "/set/a/sub/3.bmp", "set/\xe9.txt", "/set/a/.4.bmp"]
    path = tmp_path / "x.zip"

    def again(*names):
        write(path, *names)
        os.utime(path, (1_600_000_000, 1_600_000_000 + len(names)))
        return open_train(str(path))

    first = again(*names)
    with monkeypatch.context() as patched:
        patched.setattr(zips, "read_table", lambda archive: pytest.fail("the table is read again"))
        kept = open_train(str(path))
    assert [kept.name(i) for i in range(3)] == [first.name(i) for i in range(3)]
    assert [kept.read(i) for i in range(3)] == [first.read(i) for i in range(3)]
    assert (labels(kept), kept.stock) == (labels(first), first.stock)
    assert difference(fingerprint(kept), fingerprint(first)) is None
    assert len(again(*names, "/set/b/5.bmp")) == 4
    before = again(*names)
    index = cache_file(f"zip {os.path.realpath(path)}")
    data = read_index(index)
    for name, wrong in (("header", 1 << 40), ("size", -1), ("packed", 0), ("check", 7 << 32)):
        column = data.columns[name].copy()
        column[1] = wrong
        write_index(index, Index(data.fingerprint, {**data.columns, name: column}))
        assert open_train(str(path)).read(1) == before.read(1)  # what is not true is read from the archive again
