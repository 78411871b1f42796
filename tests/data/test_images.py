"""Image folders: a long one is listed once, and again after any change; its index file is never trusted."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from fastmae.data import images
from fastmae.data.images import Chosen, Listing, choose_images, list_images, scan_folder
from fastmae.data.index import Index, cache_file, pack_names, read_index, unpack_names, write_index
from fastmae.data.sources import open_train
from fastmae.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four class folders of five files, old enough for their listing to be kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(images, "WORTH_KEEPING", 10)
    root = tmp_path / "photos"
    for name in ("a", "b", "c/deep", "empty", ".hidden"):
        (root / name).mkdir(parents=True)
        for i in range(5 if name != "empty" else 0):
            (root / name / f"{i}.jpg").touch()
    age(root)
    return root


@pytest.fixture
def listed(monkeypatch):
    """The folders that were listed, once per time."""
    calls = []
    monkeypatch.setattr(
        images, "scan_folder", lambda folder, *rest: (calls.append(folder), scan_folder(folder, *rest))[1]
    )
    return calls


def age(root: Path) -> None:
    for parent, _, _ in os.walk(root):
        os.utime(parent, (1_600_000_000, 1_600_000_000))


def chosen(folder: Path) -> Chosen:
    return choose_images(list_images(folder))


def same(one: Listing, other: Listing) -> bool:
    """Whether two listings are the same in all they hold, and the same images and labels follow from them."""
    images = [choose_images(listing) for listing in (one, other)]
    labels = [None if image.labels is None else image.labels.tolist() for image in images]
    return one == other and images[0].paths == images[1].paths and labels[0] == labels[1]


def test_a_kept_listing_is_the_listing(folder, listed):
    first, second = list_images(folder), list_images(folder)
    assert len(listed) == 1
    assert same(first, second)
    assert first.skipped == {".hidden": "hidden"}
    first, second = choose_images(first), choose_images(second)
    assert first.classes == ("a", "b", "c", "empty")
    assert first.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert first.paths[10] == str(folder / "c" / "deep" / "0.jpg")
    second.labels[:1] = 7  # as writable as any other labels
    assert open_train(str(folder)).paths == first.paths
    assert len(listed) == 1


def test_a_folder_that_may_not_be_listed_is_passed_over_and_named(folder, monkeypatch):
    scandir = os.scandir

    def forbidding(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    for _ in range(2):  # such a listing is not kept
        source = open_train(str(folder))
        assert len(source) == 10
        (line,) = [line for line in source.stock.lines() if "folder left out" in line]
        assert line == (
            "1 folder left out: may not be listed, so their images are missed; give the right to read them "
            f"({folder / 'c' / 'deep'})"
        )
        assert source.damage == ((str(folder / "c" / "deep"), "may not be listed, so its images are missed"),)
    monkeypatch.undo()
    assert len(open_train(str(folder))) == 15


def test_a_link_to_itself_is_an_image_that_cannot_be_read(folder):
    for where in (folder, folder / "a"):
        (where / "loop").symlink_to("loop")
    (folder / "a" / "loop.jpg").symlink_to("loop.jpg")
    source = open_train(str(folder))
    assert len(source) == 16
    assert source.stock.used == {"files": 15}
    assert any(line.startswith("3 files left out: links to what is not there") for line in source.stock.lines())
    (index,) = [i for i, path in enumerate(source.paths) if path.endswith("loop.jpg")]
    with pytest.raises(OSError, match="symbolic links"):
        source.read(index)


def test_pipes_and_devices_are_not_waited_for(folder, monkeypatch):
    """They are a pipe without a writer, a device without an end, and a file that claims to be larger than any image."""
    os.mkfifo(folder / "a" / "pipe.jpg")
    (folder / "a" / "zero.jpg").symlink_to("/dev/zero")
    with open(folder / "a" / "sparse.jpg", "wb") as file:
        file.truncate(images.MAX_FILE_BYTES + 1)
    source = open_train(str(folder))
    for name, reason in (("pipe.jpg", "not a file"), ("zero.jpg", "not a file"), ("sparse.jpg", "over the limit")):
        (index,) = [i for i, path in enumerate(source.paths) if path.endswith(name)]
        with pytest.raises(OSError, match=reason):
            source.read(index)
    with pytest.raises(UserError, match="a pipe or a device; give a file or a folder"):
        open_train(str(folder / "a" / "pipe.jpg"))


def test_a_flat_folder_is_kept_too(folder, listed):
    for i in range(12):
        (folder / "empty" / f"ü{i}.PNG").touch()
    age(folder)
    flat = folder / "empty"
    assert same(list_images(flat), list_images(flat))
    assert len(listed) == 1
    assert chosen(flat).labels is None


CHANGES = {
    "a file more": lambda root: (root / "b" / "new.jpg").touch(),
    "a file more, deep down": lambda root: (root / "c" / "deep" / "new.jpg").touch(),
    "a file less": lambda root: (root / "a" / "0.jpg").unlink(),
    "another name": lambda root: (root / "a" / "0.jpg").rename(root / "a" / "9.jpg"),
    "a class more": lambda root: (root / "d").mkdir(),
    "a class less": lambda root: shutil.rmtree(root / "b"),
    "a file in an empty class": lambda root: (root / "empty" / "new.jpg").touch(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_added_and_removed_files_are_noticed(folder, listed, change):
    before = list_images(folder)
    CHANGES[change](folder)
    after = list_images(folder)
    assert len(listed) == 2
    assert not same(before, after)
    assert same(after, scan_folder(folder)[0])


def test_a_folder_that_has_just_changed_is_not_kept(folder, listed):
    (folder / "a" / "new.jpg").touch()
    list_images(folder)
    list_images(folder)
    assert len(listed) == 2


def test_short_listings_are_not_kept(folder, monkeypatch):
    monkeypatch.setattr(images, "WORTH_KEEPING", 16)
    list_images(folder)
    assert not list(folder.parent.glob("cache/**/*.index"))


def _with(index, **changes):
    return Index(index.fingerprint, {**index.columns, **changes})


def _first(index, column, name):
    return _with(index, **{column: pack_names([name, *unpack_names(index.columns[column])[1:]])})


def _others(index, text):
    return _with(index, others=np.frombuffer(text.encode(), np.uint8))


FOREIGN = {
    "damage": None,
    "an absolute path": lambda index: _first(index, "names", "/etc/passwd"),
    "a path that climbs": lambda index: _first(index, "names", "../../etc/passwd"),
    "a path in a folder": lambda index: _first(index, "names", "b/0.jpg"),
    "the parent": lambda index: _first(index, "names", ".."),
    "a folder that climbs": lambda index: _first(index, "folders", ".."),
    "an absolute folder": lambda index: _first(index, "folders", "/etc"),
    "a folder that climbs later": lambda index: _first(index, "folders", "a/../.."),
    "a shard that climbs": lambda index: _with(index, shards=pack_names(["../x.tar"])),
    "a skipped folder that climbs": lambda index: _first(index, "skipped", "../.hidden"),
    "a folder skipped for no reason": lambda index: _others(index, '[{}, {".hidden": "why"}]'),
    "a folder skipped unsaid": lambda index: _others(index, "[{}, {}]"),
    "no counts of others": lambda index: _others(index, '[[1], {".hidden": "hidden"}]'),
    "no JSON": lambda index: _others(index, "["),
    "no last zero": lambda index: _with(index, names=index.columns["names"][:-1]),
    "fewer names": lambda index: _with(index, names=pack_names(unpack_names(index.columns["names"])[1:])),
    "fewer counts": lambda index: _with(index, counts=index.columns["counts"][1:]),
    "larger counts": lambda index: _with(index, counts=index.columns["counts"] + 9),
    "negative counts": lambda index: _with(index, counts=index.columns["counts"] * np.array([1, -1, 3, 1, 1, 1])),
    "fewer times": lambda index: _with(index, modified=index.columns["modified"][1:]),
    "a folder that is not": lambda index: _first(index, "folders", "x"),
    "an older rule": lambda index: Index([index.fingerprint[0], 1, *index.fingerprint[2:]], index.columns),
    "other suffixes": lambda index: Index([*index.fingerprint[:2], [".jpg"]], index.columns),
    "another folder's": lambda index: Index("/elsewhere", index.columns),
    "another column": lambda index: _with(index, more=np.zeros(1, np.int64)),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_damaged_or_foreign_listing_is_made_anew(folder, listed, case):
    expected = list_images(folder)
    kept = cache_file(f"images of {folder}")
    index = read_index(kept)
    if FOREIGN[case] is None:
        kept.write_bytes(kept.read_bytes()[:-3])
    else:
        assert write_index(kept, FOREIGN[case](index))
    assert same(list_images(folder), expected)
    assert len(listed) == 2
    list_images(folder)
    assert len(listed) == 2


def test_the_cache_is_in_the_home_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file("x").parent == tmp_path / ".cache" / "fastmae"


def test_links_to_folders_are_followed_and_no_folder_is_listed_twice(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.jpg").touch()
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "down").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "round").symlink_to(folder)
    (folder / "a" / "up").symlink_to(tmp_path)
    (folder / "twin").symlink_to(folder / "b")
    listing = list_images(folder)
    images = choose_images(listing)
    assert len(images.paths) == 16
    assert images.paths[5] == str(folder / "a" / "down" / "1.jpg")
    assert images.classes == ("a", "b", "c", "empty")
    assert listing.skipped == {".hidden": "hidden"} | dict.fromkeys(
        ("a/down/back", "a/round", "a/up", "linked", "twin"), "twice"
    )
    (line,) = [line for line in open_train(str(folder)).stock.lines() if "folders left out" in line]
    assert line == ("5 folders left out: linked, and listed already or around the link (a/down/back, a/round, a/up, …)")


@pytest.mark.parametrize("threads", [1, 8])
def test_a_listing_depends_on_neither_threads_nor_their_speed(tmp_path, monkeypatch, threads):
    """Folders that are read late, links among them, and everything that is left out, beside one thread alone."""
    rng = np.random.default_rng(0)
    for number in range(60):
        inside = tmp_path / "x" / "/".join(f"{name}" for name in rng.integers(0, 4, rng.integers(1, 4)))
        inside.mkdir(parents=True, exist_ok=True)
        for name in (f"{number}.jpg", f"{number}.txt", f".{number}", f"{number}.tar")[: rng.integers(1, 5)]:
            (inside / name).touch()
        if number % 7 == 0:
            (inside / f"link{number}").symlink_to(tmp_path / "x" / str(number % 4))
            (inside / f"gone{number}.png").symlink_to(tmp_path / "gone")
    (tmp_path / "x" / "train").symlink_to(tmp_path / "x" / "1")
    (tmp_path / "x" / "2" / "zarr.json").touch()
    monkeypatch.setattr(images, "LIST_THREADS", 1)
    listing, modified = scan_folder(tmp_path / "x")
    assert {*listing.skipped.values()} >= {"twice", "zarr"}
    assert listing.shards
    assert listing.unsound
    read = images._read_folder

    def slowly(root, name, suffixes):
        time.sleep(0.002 * (len(name) % 3))
        return read(root, name, suffixes)

    monkeypatch.setattr(images, "LIST_THREADS", threads)
    monkeypatch.setattr(images, "_read_folder", slowly)
    again = scan_folder(tmp_path / "x")
    assert again == (listing, modified)
    assert [*again[0].images] == [*listing.images]
    assert again[0].unsound == listing.unsound
