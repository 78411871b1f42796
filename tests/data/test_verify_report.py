"""Verify tells all values, what is missing and what is a copy, and shows it on a page that is harmless."""

import base64
import io
import os
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import fastmae.data.values as values_module
from fastmae.cli import main
from fastmae.commands.verify_report import picture
from fastmae.data.copies import Digests, copies_across, copies_within, digest_of
from fastmae.data.reading import Reading
from fastmae.data.values import PERCENTS, Values


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def images_of(dtype, channels, count=5, high=3000):
    random = np.random.default_rng(channels)
    for index in range(count):
        pixels = random.integers(0, high, (7 + index, 9, channels))
        yield (pixels % 256 if dtype == "uint8" else pixels - 500 if dtype == "float32" else pixels).astype(dtype)


def jpeg(seed, size=(40, 32)):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_range_and_percentiles_are_those_of_all_values_in_any_order(dtype, channels):
    images = [*images_of(dtype, channels)]
    values = Values(len(images), Reading(channels, dtype=dtype))
    for index in (3, 0, 4, 2, 1):
        values.add(index, images[index])
    every = np.concatenate([image.reshape(-1, channels) for image in images])
    for c, channel in enumerate(values.channels()):
        assert (channel.low, channel.high) == (every[:, c].min(), every[:, c].max())
        assert channel.percentiles == tuple(np.percentile(every[:, c], PERCENTS, method="nearest"))
        assert sum(bar.count for bar in channel.bars) == len(every)
        assert 2 <= len(channel.bars) <= values_module.BARS
        edges = np.percentile(every[:, c], [PERCENTS[0], PERCENTS[-1]], method="nearest")
        assert channel.bars[0].low == edges[0]
        assert channel.bars[-1].high >= edges[1]
    assert (values.pixels, values.counted, values.missing) == (len(every), len(every), 0)


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint8", 7), ("uint16", 65535), ("float32", -9999.0), ("float32", None)]
)
def test_missing_pixels_are_counted_and_are_no_values(dtype, nodata):
    images = [*images_of(dtype, 2)]
    marker = np.nan if nodata is None else nodata
    for image in images:
        image[image == marker] = 8
    images[1][0, :3, 1] = marker
    images[2][2] = marker
    values = Values(len(images), Reading(2, dtype=dtype, nodata=nodata))
    for index, image in enumerate(images):
        values.add(index, image)
    assert (values.missing, values.with_missing) == (3 + images[2].shape[1], 2)
    for c, channel in enumerate(values.channels()):
        there = np.concatenate([image[..., c].ravel() for image in images])
        there = there[~np.isnan(there) & (there != marker)]
        assert (channel.low, channel.high) == (there.min(), there.max())
        assert channel.percentiles == tuple(np.percentile(there, PERCENTS, method="nearest"))
        assert sum(bar.count for bar in channel.bars) == len(there)


def test_a_channel_without_a_value_has_none():
    values = Values(1, Reading(2, dtype="uint16", nodata=0))
    values.add(0, np.stack([np.zeros((3, 3)), np.full((3, 3), 5)], axis=2).astype(np.uint16))
    empty, full = values.channels()
    assert empty is None
    assert (full.low, full.high, full.percentiles) == (5, 5, (5,) * 5)


def test_of_large_images_some_rows_count_and_the_range_is_that_of_all(monkeypatch):
    pixels = np.full((200, 100, 3), 100, np.uint8)
    pixels[1, 1], pixels[3, 3] = 3, 251  # in rows that are not counted
    values = Values(1, Reading(3))
    values.add(0, pixels)
    assert values.counted == values.pixels  # all, as there are few
    monkeypatch.setattr(values_module, "IN_ALL", 1)
    values = Values(1, Reading(3))
    values.add(0, pixels)
    assert values.pixels == 20_000
    assert values.counted == 4000
    assert all((c.low, c.high, c.percentiles) == (3, 251, (100,) * 5) for c in values.channels())
    monkeypatch.setattr(values_module, "SAMPLE", 500)
    values = Values(4, Reading(1, dtype="float32"))
    for index in range(4):
        values.add(index, np.arange(1000, dtype=np.float32).reshape(10, 100, 1))
    (channel,) = values.channels()
    assert values.counted == 500
    assert (channel.low, channel.high) == (0, 999)
    assert abs(channel.percentiles[2] - 500) < 10


# --- copies -----------------------------------------------------------------------------------------------------------


def digests_of(items):
    digests = Digests(len(items))
    for index, data in enumerate(items):
        if data is not None:
            digests.add(index, digest_of(data))
    return digests


def test_copies_are_found_within_and_across_parts():
    train = digests_of([b"a", b"b", None, b"a", b"c", b"a", b"b"])
    assert copies_within(train, 20).pairs == ((0, 3), (0, 5), (1, 6))
    assert copies_within(train, 1).count == 3
    assert copies_within(train, 1).pairs == ((0, 3),)
    across = copies_across(train, digests_of([b"x", b"c", b"x", b"a"]), 20)
    assert (across.count, across.pairs) == (2, ((4, 1), (0, 3)))
    assert copies_across(train, digests_of([None]), 20).count == 0


def test_arrays_are_alike_only_with_type_and_shape():
    zeros = np.zeros((2, 3, 1), np.uint8)
    assert digest_of(zeros) == digest_of(np.zeros((4, 3, 1), np.uint8)[::2])
    others = (zeros.reshape(3, 2, 1), zeros.astype(np.int8), zeros + np.uint8(1), bytes(6))
    assert len({digest_of(other) for other in (zeros, *others)}) == 5


# --- lines and the page -----------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    """Two parts with a copy in train, one in both, and files with hostile names, one of which is no image."""
    root = tmp_path / "photos"
    for part, seeds in (("train", range(6)), ("val", range(10, 13))):
        (root / part / "cats").mkdir(parents=True)
        for seed in seeds:
            (root / part / "cats" / f"{seed:02}.jpg").write_bytes(jpeg(seed))
    cats = root / "train" / "cats"
    (cats / "copy.jpg").write_bytes(jpeg(1))
    (root / "val" / "cats" / "leak.jpg").write_bytes(jpeg(2))
    (cats / "<script>alert(1)<!--.jpg").write_bytes(jpeg(20))
    (cats / os.fsdecode(b"\xff\x1b[31m<img src=x onerror=alert(1)>.jpg")).write_bytes(b"junk")
    return root


class Page(HTMLParser):
    """What a page consists of; and that each element that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_copies_and_values_are_lines(photos, capsys):
    assert main(["verify", "--data_path", str(photos)]) == 1
    out = capsys.readouterr().out
    cats = photos / "train" / "cats"
    assert f"  copies        1 image is an exact copy of another, first {cats}/copy.jpg of {cats}/01.jpg\n" in out
    leak = f"first {photos}/val/cats/leak.jpg, which is {cats}/02.jpg\n"
    assert "copies          1 of 4 images of val is in train as well, so what is measured on val is too good" in out
    assert leak in out
    assert re.search(r"  channel 2     \d+ to \d+; \d+, \d+, \d+, \d+, \d+\n", out)
    assert "missing" not in out


def test_the_page_shows_all_and_runs_nothing(photos, tmp_path, capsys):
    target = tmp_path / "report.html"
    assert main(["verify", "--data_path", str(photos), "--report", str(target)]) == 1
    assert f"shown in {target}" in capsys.readouterr().out
    text = target.read_text("utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "svg"} & {*page.tags}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == page.tags.count("img") == 8 + 4
    for source in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (40, 32)
    assert "\x1b" not in text
    assert "://" not in text
    for said in (
        "<script>alert(1)<!--.jpg", r"\xff\x1b[31m<img src=x onerror=alert(1)>.jpg: no image format", "12 of 13 images",
        "copy.jpg is ", "in train as well", "JPEG colour", "channel 3", "99.9 %",
    ):  # fmt: skip
        assert said in page.text
    assert page.tags.count("i") >= 2 * 3 * 32  # bars


def test_wide_pixels_are_shown_through_their_range_and_missing_ones_are_clear(tmp_path, capsys):
    pixels = np.linspace(-1000, 3000, 4 * 8 * 8, dtype=np.float32).reshape(4, 8, 8)
    pixels[0, 0, :3] = np.nan
    np.save(tmp_path / "scans.npy", pixels)
    target = tmp_path / "report.html"
    assert main(["verify", "--data_path", str(tmp_path / "scans.npy"), "--report", str(target)]) == 0
    assert "  missing       3 of 256 pixels (1.2 %), in 1 image\n" in capsys.readouterr().out
    page = Page(target.read_text("utf-8"))
    assert "-952.941" in page.text
    assert "3000" in page.text
    assert "Missing pixels are left out." in page.text
    first, *_, last = (value for name, value in page.attributes if name == "src")
    with Image.open(io.BytesIO(base64.b64decode(first.partition(",")[2]))) as image:
        shown = np.asarray(image)
    assert (shown[0, :3, 1] == 0).all()
    assert (shown[0, 3:, 1] == 255).all()
    assert shown[0, 3, 0] == 0  # the lowest value is black
    with Image.open(io.BytesIO(base64.b64decode(last.partition(",")[2]))) as image:
        assert np.asarray(image)[-1, -1] == 255


def test_a_picture_is_small_whatever_the_shape_of_an_image():
    ends = np.zeros(5), np.full(5, 255.0)
    for shape in [(1, 3000, 1), (2000, 1500, 3), (3, 2, 5), (500, 400, 2)]:
        data = picture(np.full(shape, 200, np.uint8), Reading(shape[2]), ends)
        with Image.open(io.BytesIO(data)) as image:
            assert max(image.size) <= 112
            assert image.mode == ("RGB" if shape[2] >= 3 else "L")
            assert {*np.asarray(image).ravel().tolist()} == {200}


def test_a_page_that_cannot_be_written_is_told_before_the_images_are_read(photos, tmp_path, capsys, monkeypatch):
    for name in ("nowhere/report.html", "photos"):
        assert main(["verify", "--data_path", str(photos), "--report", str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert "report" in captured.err
        assert "name a file in a folder" in captured.err
        assert captured.out == ""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["verify", "--data_path", str(photos), "--report", str(tmp_path / "report.html")]) == 2
    assert capsys.readouterr().err.endswith("--report needs jinja2, which is not installed; run pip install jinja2\n")


def test_pixels_that_files_state_to_be_missing_are_counted_though_a_run_uses_them(tmp_path, capsys):
    tifffile = pytest.importorskip("tifffile")
    pixels = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) + 1
    pixels[:2] = 0
    tags = [(42113, "s", 2, "0", True)]
    tifffile.imwrite(tmp_path / "a.tif", pixels, extratags=tags)
    tifffile.imwrite(tmp_path / "b.tif", pixels + np.uint16(1))  # states nothing, so none is agreed on
    assert main(["verify", "--data_path", str(tmp_path)]) == 0
    used = "80 of 3,200 pixels (2.5 %) have the value that their file states for it, and are used all the same"
    assert f"  missing       {used}; set nodata to it\n" in capsys.readouterr().out
    assert main(["verify", "--data_path", str(tmp_path), "--nodata", "0"]) == 0
    assert "  missing       80 of 3,200 pixels (2.5 %), in 1 image\n" in capsys.readouterr().out
