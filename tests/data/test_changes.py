"""What is done to single images is counted, whether or not the start of a run could see it, and told in a line."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.data.arrays import ArraySource
from fastmae.data.cache import CachedSource
from fastmae.data.changes import CHANGES, ChangedImages, note, noting
from fastmae.data.convert import to_batch
from fastmae.data.decode import decode
from fastmae.data.loader import load_batches
from fastmae.data.reading import Reading
from fastmae.data.sample import View
from fastmae.data.sources import Concat, open_train
from fastmae.facts import ReadAs

SIDE = 8


def saved(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def gray(dtype=np.uint8):
    return np.arange(SIDE * SIDE, dtype=dtype).reshape(SIDE, SIDE) * (4 if dtype == np.uint8 else 1000)


def colours(bands=3):
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, bands), np.uint8)


def turned(form):
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(colours()), form, exif=exif)


FILES = {
    "turned.jpg": turned("JPEG"),
    "turned.webp": turned("WEBP"),
    "alpha.png": saved(Image.fromarray(colours(4))),
    "palette.png": saved(Image.fromarray(colours()).quantize(4), transparency=0),
    "gray.png": saved(Image.fromarray(gray())),
    "gray.jpg": saved(Image.fromarray(gray()), "JPEG"),
    "wide.png": saved(Image.fromarray(gray(np.uint16))),
    "plain.png": saved(Image.fromarray(colours())),
    "plain.jpg": saved(Image.fromarray(colours()), "JPEG"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("changes")
    for name, data in FILES.items():
        (path / name).write_bytes(data)
    return path


def changed(source, reading, twice=False):
    """Reads all images of a source. Returns the names of those that were changed, by kind, and the lines about them."""
    counted, found = ChangedImages(len(source)), {}
    indices = np.arange(len(source))
    requests = [(indices, indices)] * (1 + twice)
    for batch in load_batches(source, requests, View((SIDE, SIDE), reading), device=torch.device("cpu"), num_workers=2):
        counted.add(batch.changed, read=len(batch.images))
        for kind, images in batch.changed.items():
            found.setdefault(kind, {name.rpartition("/")[2] for _, name in images})
    return found, counted.lines(), counted


def test_each_change_of_a_file_is_counted_and_an_ordinary_file_has_none(folder):
    """No name of an ordinary file is among them; a line names the number and up to three images."""
    source = open_train(str(folder))
    found, lines, _ = changed(source, Reading(3, read_as=ReadAs(pixel_type="uint8")))
    assert found == {
        "turned": {"turned.jpg", "turned.webp"},
        "alpha": {"alpha.png", "palette.png"},
        "repeated": {"gray.png", "gray.jpg", "wide.png"},
        "upper bits": {"wide.png"},
    }
    assert [line.partition(" of ")[0].partition(" with ")[0].partition(" turned ")[0] for line in lines] == [
        "1 image", "2 images", "2 images", "3 images",
    ]  # fmt: skip
    assert "only their upper 8 bits are used; --pixel_type=uint16 keeps all bits" in lines[0]
    assert "wide.png" in lines[0]


def test_the_channels_of_a_gray_model_and_the_bits_of_a_wide_one_are_counted(folder):
    source = open_train(str(folder))
    found, _, _ = changed(source, Reading(1, dtype="uint16", read_as=ReadAs()))
    assert found["luma"] == {name for name in FILES if not name.startswith(("gray", "wide"))}
    assert found["multiplied"] == {*FILES} - {"wide.png"}
    assert "upper bits" not in found


def test_an_image_is_counted_once_and_with_a_cache_too(folder):
    """A cache decodes an image when it is first read, and gives its pixels ever after."""
    reading = Reading(3, read_as=ReadAs(pixel_type="uint8"))
    plain, cached = open_train(str(folder)), open_train(str(folder))
    expected, lines, once = changed(plain, reading)
    found, again, twice = changed(CachedSource(cached, reading, "decoded", 10**9, 1), reading, twice=True)
    assert (found, once.counts()) == (expected, twice.counts())
    assert lines == again
    assert once.news() == lines
    assert once.news() == []


@pytest.mark.parametrize(
    ("stored", "value", "reading", "kind"),
    [
        (np.uint16, 7, Reading(1, read_as=ReadAs(pixel_type="uint8")), "upper bits"),
        (np.float64, 0.1, Reading(1, dtype="float32", read_as=ReadAs(pixel_type="float32")), "rounded"),
        (np.float64, 7, Reading(1, dtype="float32", read_as=ReadAs(pixel_type="float32")), None),
        (np.float64, np.nan, Reading(1, dtype="float32", read_as=ReadAs(pixel_type="float32")), None),
        (np.uint8, 7, Reading(1, dtype="uint16"), "multiplied"),
        (np.uint16, 7, Reading(1, dtype="float32"), "kept"),
        (np.int16, 7, Reading(1, dtype="float32"), None),
        (np.float32, 7, Reading(1, dtype="float32"), None),
    ],
)
def test_numbers_of_other_types_among_many_are_counted(stored, value, reading, kind):
    """Three strays behind nine images of the type of the batch. Numbers that stay the same say nothing."""
    usual = ArraySource(np.zeros((9, SIDE, SIDE, 1), reading.dtype), None, "usual")
    strays = ArraySource(np.full((3, SIDE, SIDE, 1), value, stored), None, "strays")
    _found, lines, counted = changed(Concat((usual, strays)), reading)
    assert counted.counts() == ({kind: 3} if kind else {})
    assert len(lines) == (kind is not None)
    assert all(line.startswith("3 images of ") for line in lines)


def wide_files():
    """Files of colours of more than 8 bits, of which Pillow gives 8, by their suffixes."""
    imagecodecs, tifffile = pytest.importorskip("imagecodecs"), pytest.importorskip("tifffile")
    wide = colours().astype(np.uint16) * 257
    page = io.BytesIO()
    tifffile.imwrite(page, wide, photometric="rgb")
    return {
        "png": imagecodecs.png_encode(wide),
        "ppm": b"P6 8 8 65535\n" + wide.astype(">u2").tobytes(),
        "tif": page.getvalue(),
        "avif": imagecodecs.avif_encode(wide >> 6, level=100, bitspersample=10),
    }


@pytest.mark.parametrize("other_types", ["skip", "convert"])
def test_files_of_colours_of_16_bits_among_8_are_skipped_or_counted(tmp_path, other_types):
    for suffix, data in wide_files().items():
        (tmp_path / f"wide.{suffix}").write_bytes(data)
    (tmp_path / "plain.png").write_bytes(FILES["plain.png"])
    reading = Reading(3, read_as=ReadAs(pixel_type="uint8", other_types=other_types))
    source, indices = open_train(str(tmp_path)), np.arange(5)
    (batch,) = load_batches(
        source, [(indices, indices)], View((SIDE, SIDE), reading), device=torch.device("cpu"), num_workers=1
    )
    wide = {name for name in map(source.name, range(5)) if "wide" in name}
    assert {bad.name for bad in batch.skipped} == (wide if other_types == "skip" else set())
    assert {name for _, name in batch.changed.get("upper bits", ())} == (set() if other_types == "skip" else wide)


def test_a_heic_without_exif_is_read():
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    assert decode(saved(Image.new("RGB", (64, 64), (9, 99, 200)), "HEIF"), Reading(3)).shape == (64, 64, 3)


def test_truth_values_among_bytes_are_no_change():
    with noting() as noted:
        to_batch(np.ones((2, 2, 1), bool), Reading(1))
    assert noted == []


def test_what_is_exact_is_told_of_some_images_and_not_of_all():
    all_bytes = ArraySource(np.zeros((4, SIDE, SIDE, 1), np.uint8), None, "bytes")
    _, lines, counted = changed(all_bytes, Reading(1, dtype="uint16"))
    assert counted.counts() == {"multiplied": 4}
    assert lines == []


def test_a_type_that_nobody_asked_for_converts_nothing():
    """Judged by `auto` in a resolved run: the stray is unusable, with what to do, as it was before the run."""
    usual = ArraySource(np.zeros((9, SIDE, SIDE, 1), np.uint8), None, "usual")
    stray = ArraySource(np.zeros((1, SIDE, SIDE, 1), np.uint16), None, "stray")
    reading = Reading(1, read_as=ReadAs(pixel_type="uint8", other_types="skip"))
    indices = np.arange(10)
    (batch,) = load_batches(
        Concat((usual, stray)), [(indices, indices)], View((SIDE, SIDE), reading),
        device=torch.device("cpu"), num_workers=1,
    )  # fmt: skip
    (bad,) = batch.skipped
    assert bad.index == 9
    assert "uint16 pixels where uint8 ones are meant; set pixel_type to uint16" in bad.reason


def test_a_file_that_states_another_missing_value_is_counted(tmp_path):
    """GDAL's tag says -9 in one of two GeoTIFFs, whose run has -1."""
    tifffile = pytest.importorskip("tifffile")
    for name, nodata in (("a", "-1"), ("b", "-9"), ("c", "nan")):
        pixels = np.zeros((SIDE, SIDE), np.float32)
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels, extratags=[(42113, 2, len(nodata) + 1, nodata, True)])
    found, _, _ = changed(
        open_train(str(tmp_path)), Reading(1, dtype="float32", nodata=-1.0, read_as=ReadAs(nodata=-1.0))
    )
    assert found == {"missing": {"b.tif"}}


def test_a_thread_that_nobody_listens_to_notes_nothing():
    with noting() as noted:
        note("alpha")
    note("luma")
    assert noted == [("alpha", None)]
    assert {kind for kind, _ in noted} <= {*CHANGES}
