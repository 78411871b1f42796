"""Damaged and odd files through the loader, by every decoder: read by rule or replaced, with no crash, hang or leak."""

import io
import itertools
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import damage
import numpy as np
import pytest
import torch
from helpers import run, soak
from PIL import Image

from fastmae.benchmarks.images import make_jpeg
from fastmae.data.decoders.dali import why_not_installed
from fastmae.data.loader import View, load_batches
from fastmae.data.plan import crop_draws, is_flipped, random_box
from fastmae.data.reading import Reading
from fastmae.data.sources import FolderSource, open_train
from fastmae.facts import ReadAs

CPU = torch.device("cpu")
WITHOUT_DALI = pytest.mark.skipif(bool(why_not_installed()), reason="DALI is not installed (the extra `dali`)")
DECODERS = ["threads", pytest.param("dali-cpu", marks=WITHOUT_DALI)]
SIDE = 64

# --- mutations, in a process of their own -----------------------------------------------------------------------------

MUTATIONS = soak(24, 2004)
"""Mutations of each kind of file."""
EVERY_KIND = list(damage.whole_files())
PLAIN_JPEGS = EVERY_KIND[:5]
CAMPAIGNS = soak(
    [("threads", EVERY_KIND), pytest.param("dali-cpu", PLAIN_JPEGS, marks=WITHOUT_DALI)],
    [("threads", [kind]) for kind in EVERY_KIND]
    + [pytest.param("dali-cpu", [kind], marks=WITHOUT_DALI) for kind in PLAIN_JPEGS],
)  # fmt: skip


def in_a_process(*words):
    """Returns the lines that a task of tests/damage.py prints, and fails with its last line if it crashed or hung."""
    try:
        result = run([sys.executable, damage.__file__, *map(str, words)])
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"hung in {(error.stdout or b'').decode().splitlines()[-1:]}")
    lines = result.stdout.splitlines()
    end = f"died of {signal.Signals(-result.returncode).name}" if result.returncode < 0 else result.stderr[-3000:]
    assert result.returncode == 0, f"in {lines[-1:]}: {end}"
    return lines


@pytest.mark.parametrize(("decoder", "kinds"), CAMPAIGNS, ids=lambda it: it if isinstance(it, str) else "-".join(it))
def test_damage_of_any_kind_is_refused_or_read_and_leaves_no_thread_descriptor_or_memory(
    decoder, kinds, record_property
):
    lines = in_a_process("mutants", decoder, 0, MUTATIONS, *kinds)
    refusals = {line.split()[1][:-1]: int(line.split()[2]) for line in lines if "refusals" in line}
    assert list(refusals) == kinds
    assert all(refusals.values()), "no mutation was refused, so they are too weak to test anything"
    record_property("mutated files", MUTATIONS * len(kinds))
    record_property("of them refused in two passes", sum(refusals.values()))


@pytest.mark.parametrize(
    ("decoder", "kind"),
    soak(
        [("threads", "tar")],
        [pytest.param(decoder, kind, marks=WITHOUT_DALI if decoder == "dali-cpu" else ())
         for decoder, kind in itertools.product(["threads", "dali-cpu"], ["folder", "tar", "parquet"])],
    ),
)  # fmt: skip
def test_memory_is_flat_from_the_third_pass_to_the_twentieth(decoder, kind, record_property):
    memory = [float(line.split()[0]) for line in in_a_process("passes", decoder, kind, soak(64, 1000), 20)]
    assert len(memory) == 20
    assert abs(memory[-1] / memory[2] - 1) <= 0.05, memory
    record_property("passes over damaged data", len(memory))


# --- odd files, each with its rule ------------------------------------------------------------------------------------


def photo(mode="RGB"):
    return Image.open(io.BytesIO(make_jpeg(0, 7, SIDE, SIDE))).convert("RGB").convert(mode)


def encoded(image, file_format, **options):
    return damage.encoded(image, file_format, **options)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height, width, bits, colour, packed):
    """Returns a PNG of rows that are packed already, each behind the number of its filter."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def deep_png(pixels):
    """Pixels uint16 [H, W] or [H, W, 3] as a PNG, which Pillow writes for gray alone."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(*pixels.shape[:2], 16, 2 if pixels.ndim == 3 else 0, zlib.compress(rows))


def segment(jpeg, marker):
    """Returns where a JPEG has its first segment of this marker."""
    start = jpeg.index(bytes([0xFF, marker]))
    return slice(start, start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big"))


def without(jpeg, marker):
    at = segment(jpeg, marker)
    return jpeg[: at.start] + jpeg[at.stop :]


def constant_jpeg(side):
    """A gray JPEG of side×side pixels of level 128: six bits per block say that nothing changes."""
    small = encoded(Image.new("L", (8, 8), 128), "JPEG")
    start = segment(small, 0xC0).start
    header = small[: start + 5] + struct.pack(">HH", side, side) + small[start + 9 : segment(small, 0xDA).stop]
    blocks = (-(-side // 8)) ** 2
    return header + b"\x28\xa2\x8a" * (-(-blocks // 4)) + b"\xff\xd9"


def as_pillow(data, in_chans):
    return np.asarray(Image.open(io.BytesIO(data)).convert("L" if in_chans == 1 else "RGB")).reshape(SIDE, SIDE, -1)


DEEP = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE, 3), dtype=np.uint16)
HIGH_BYTE = (DEEP >> 8).astype(np.uint8)
RED, BLUE = (Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue"))
CMYK = encoded(photo("CMYK"), "JPEG", quality=92)
ADOBE = segment(CMYK, 0xEE)
JPEG = encoded(photo(), "JPEG", quality=92)
EXIF = Image.Exif()
EXIF[0x0112] = 6
INDEXED = photo().quantize(200)
TRANSLUCENT = photo("RGBA")
TRANSLUCENT.putalpha(photo("L"))

# By file name: the bytes, and pixels uint8 [SIDE, SIDE, 3 or 1] that they must become. None: as Pillow converts them.
READ = {
    "jpeg.jpg": (JPEG, None),
    "a jpeg called.png": (JPEG, None),
    "a png called.jpg": (encoded(photo(), "PNG"), np.asarray(photo())),
    "progressive.jpg": (encoded(photo(), "JPEG", progressive=True), None),
    "gray.jpg": (encoded(photo("L"), "JPEG"), None),
    "stray bytes between segments.jpg": (JPEG.replace(b"\xff\xdb", b"\0\x11\x22\xff\xdb", 1), None),
    "rotation by exif is not applied.jpg": (encoded(photo(), "JPEG", quality=92, exif=EXIF), None),
    "cmyk.jpg": (CMYK, None),
    "cmyk without a word of adobe.jpg": (without(CMYK, 0xEE), as_pillow(CMYK, 3)),
    "ycck.jpg": (CMYK[: ADOBE.stop - 1] + b"\x02" + CMYK[ADOBE.stop :], None),
    "16 bits.png": (deep_png(DEEP[..., 0]), HIGH_BYTE[..., :1]),
    "16 bits of colour.png": (deep_png(DEEP), HIGH_BYTE),
    "16 bits.tif": (encoded(Image.fromarray(DEEP[..., 0]), "TIFF"), HIGH_BYTE[..., :1]),
    "16 bits.pgm": (b"P5 64 64 65535\n" + DEEP[..., 0].astype(">u2").tobytes(), HIGH_BYTE[..., :1]),
    "1 bit.png": (encoded(photo("1"), "PNG"), np.asarray(photo("1"))[..., None] * np.uint8(255)),
    "fax.tif": (encoded(photo("1"), "TIFF", compression="group4"), np.asarray(photo("1"))[..., None] * np.uint8(255)),
    "alpha is dropped.png": (encoded(TRANSLUCENT, "PNG"), np.asarray(photo())),
    "gray and alpha.png": (encoded(TRANSLUCENT.convert("LA"), "PNG"), np.asarray(photo("L"))[..., None]),
    "palette.png": (encoded(INDEXED, "PNG"), np.asarray(INDEXED.convert("RGB"))),
    "palette with one clear.gif": (encoded(INDEXED, "GIF", transparency=3), np.asarray(INDEXED.convert("RGB"))),
    "palette with alpha.png": (
        encoded(INDEXED, "PNG", transparency=bytes(range(200))), np.asarray(INDEXED.convert("RGB"))
    ),
    "animated.gif": (encoded(RED, "GIF", save_all=True, append_images=[BLUE]), np.asarray(RED)),
    "animated.png": (encoded(RED, "PNG", save_all=True, append_images=[BLUE]), np.asarray(RED)),
    "animated.webp": (encoded(RED, "WEBP", save_all=True, append_images=[BLUE], lossless=True), np.asarray(RED)),
    "one pixel.png": (encoded(Image.new("RGB", (1, 1), (9, 9, 9)), "PNG"), np.full((SIDE, SIDE, 1), 9, np.uint8)),
    "one pixel.jpg": (encoded(Image.new("L", (1, 1), 9), "JPEG"), np.full((SIDE, SIDE, 1), 9, np.uint8)),
    "a constant.jpg": (constant_jpeg(SIDE), np.full((SIDE, SIDE, 1), 128, np.uint8)),
}  # fmt: skip
# By file name: the bytes, and words of the reason for which they are refused.
REFUSED = {
    "empty.jpg": (b"", "no image format"),
    "a text.jpg": (b"a text, not an image", "no image format"),
    "a text.png": (b"a text, not an image", "no image format"),
    "cut.jpg": (JPEG[:-300], "premature end|Premature end|truncated"),
    "cut.png": (encoded(photo(), "PNG")[:-400], "truncated"),
    "cut.webp": (encoded(photo(), "WEBP")[:-100], "could not create decoder object"),
    "cut.gif": (encoded(photo(), "GIF")[:-400], "truncated"),
    "cut.tif": (encoded(photo(), "TIFF")[:-400], "."),
    "magic alone.jpg": (b"\xff\xd8\xff\xe0\xff\xd9", "."),
    "floats.tif": (
        encoded(Image.fromarray(np.eye(SIDE, dtype=np.float32) / 2), "TIFF"),
        "64 of 4096 values of float32 do not fit into uint8, such as 0.5",
    ),
    "32 bits.tif": (
        encoded(Image.fromarray(np.eye(SIDE, dtype=np.int32) * 256), "TIFF"),
        "64 of 4096 values of int32 do not fit into uint8, such as 256",
    ),
    "floats.pgm": (b"Pf\n64 64\n-1.0\n" + bytes(4 * SIDE * SIDE), "pixels of mode F"),
    "a program.jpg": (encoded(photo(), "EPS"), "PostScript"),
}


def load(source, decoder, in_chans, size=(SIDE, SIDE)):
    """Loads all images in order, uncropped, in one batch of 8 bits, as version 0.1 did."""
    indices = np.arange(len(source))
    view = View(size, Reading(in_chans, read_as=ReadAs(pixel_type="uint8")))
    return next(load_batches(source, iter([(indices, indices)]), view, device=CPU, num_workers=2, decoder=decoder))


def assert_same_pixels(got, expected, decoder, name):
    """Checks images: the threads are exact except for JPEG, where every decoder rounds in its own way."""
    difference = abs(got.astype(int) - expected)
    jpeg = READ.get(name, (JPEG,))[0][:3] == JPEG[:3]
    assert difference.max() <= (4 if jpeg else 0), f"{name} by {decoder}: {difference.max()} levels off"


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("decoder", DECODERS)
def test_odd_files_are_read_by_rule_or_refused_with_a_reason_by_every_decoder(tmp_path, decoder, in_chans):
    names = [*itertools.chain(*((name, f"{name} next.png") for name in REFUSED)), *READ]
    after = encoded(photo(), "PNG")
    contents = {name: data for name, (data, _) in (READ | REFUSED).items()}
    for name in names:
        (tmp_path / name).write_bytes(contents.get(name, after))
    batch = load(FolderSource(tuple(str(tmp_path / name) for name in names), None, ()), decoder, in_chans)
    images = dict(zip(names, batch.images.numpy(), strict=True))
    assert not batch.redone
    for name, (data, expected) in READ.items():
        if expected is None:
            expected = as_pillow(data, in_chans)
        elif in_chans == 1 and expected.shape[2] == 3:
            expected = np.asarray(Image.fromarray(expected).convert("L"))[..., None]
        assert_same_pixels(images[name], np.broadcast_to(expected, images[name].shape), decoder, name)
    assert [Path(bad.name).name for bad in batch.skipped] == list(REFUSED)
    for bad, (name, (_, reason)) in zip(batch.skipped, REFUSED.items(), strict=True):
        assert re.search(reason, bad.reason), f"{name}: {bad.reason}"
        assert np.array_equal(images[name], images[f"{name} next.png"])


HUGE = 20_000


def peak_memory():
    """Returns the peak memory of this process since ``forget_peak``, in MB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1000


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_image_of_too_many_pixels_is_refused_before_any_memory_is_taken(tmp_path, decoder):
    packer = zlib.compressobj()
    rows = bytes(100 * (1 + HUGE // 8))
    packed = b"".join(packer.compress(rows) for _ in range(HUGE // 100)) + packer.flush()
    contents = [constant_jpeg(HUGE), png(HUGE, HUGE, 1, 0, packed), JPEG]
    paths = tuple(str(tmp_path / f"{i}.jpg") for i in range(3))
    for path, data in zip(paths, contents, strict=True):
        Path(path).write_bytes(data)
    load(FolderSource(paths[2:], None, ()), decoder, 3)
    forget_peak()
    before = peak_memory()
    batch = load(FolderSource(paths, None, ()), decoder, 3)
    assert peak_memory() - before < 100, "400 MB is what either takes if it is decoded"
    assert [bad.index for bad in batch.skipped] == [0, 1, 1]
    assert "20000×20000 pixels, over the limit" in batch.skipped[0].reason
    assert "400000000 pixels" in batch.skipped[1].reason


# --- files that are something else when they are read -----------------------------------------------------------------


@contextmanager
def unprivileged():
    """Without the superuser's right to read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def open_folder():
    """A folder that everyone may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("decoder", DECODERS)
def test_files_that_change_after_they_were_listed_give_way_to_the_next(open_folder, decoder, in_chans):
    for i in range(12):
        (open_folder / f"{i:02}.jpg").write_bytes(make_jpeg(1, i, SIDE, SIDE))
    source = open_train(str(open_folder))
    whole = load(source, decoder, in_chans).images
    (open_folder / "00.jpg").write_bytes(b"")
    (open_folder / "02.jpg").unlink()
    for name in ("04.jpg", "06.jpg"):
        (open_folder / name).unlink()
    (open_folder / "04.jpg").mkdir()
    (open_folder / "06.jpg").symlink_to("06.jpg")
    os.truncate(open_folder / "08.jpg", 1000)
    (open_folder / "10.jpg").chmod(0)
    with unprivileged():
        batch = load(source, decoder, in_chans)
    assert [bad.index for bad in batch.skipped] == [0, 2, 4, 6, 8, 10]
    for bad, reason in zip(
        batch.skipped, ["", "No such file", "directory", "symbolic links", "", "denied"], strict=True
    ):
        assert reason in bad.reason
        assert torch.equal(batch.images[bad.index], whole[bad.index + 1])
    assert torch.equal(batch.images[1::2], whole[1::2])


def test_a_folder_called_like_an_image_is_a_folder(tmp_path):
    (tmp_path / "x.jpg").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(JPEG)
    assert [Path(path).name for path in open_train(str(tmp_path)).paths] == ["a.jpg", "b.jpg"]


# --- the end ----------------------------------------------------------------------------------------------------------


class Breaks(FolderSource):
    """A source with a mistake in it, which no decoder is to take for a bad image."""

    def read(self, index):
        if index == 9:
            raise ZeroDivisionError("a mistake")
        return super().read(index)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_mistake_in_the_loader_is_raised_and_leaves_no_thread(tmp_path, decoder):
    (tmp_path / "0.jpg").write_bytes(JPEG)

    def load_until_it_breaks(count):
        requests = [(np.arange(i, i + 4), np.arange(i, i + 4)) for i in range(0, count, 4)]
        source = Breaks((str(tmp_path / "0.jpg"),) * count, None, ())
        view = View((SIDE, SIDE), Reading(3))
        for _ in load_batches(source, iter(requests), view, device=CPU, num_workers=2, decoder=decoder):
            pass

    load_until_it_breaks(8)  # libraries start threads of their own once
    before = damage.count_threads()
    with pytest.raises(ZeroDivisionError):
        load_until_it_breaks(16)
    damage.settle(before)
    assert damage.count_threads() <= before


# --- accuracy ---------------------------------------------------------------------------------------------------------

# Mean and largest difference from Pillow in grey levels, over all crops.
ACCURACY = {"threads": (0.02, 2), "dali-cpu": (0.25, 14)}


@pytest.mark.parametrize("decoder", DECODERS)
def test_training_views_of_photographs_are_pillows_crop_and_resize(tmp_path, decoder):
    count = soak(12, 300)
    view = View((224, 224), Reading(3), seed=3, scale=(0.2, 1.0), flip=True)
    for i in range(count):
        (tmp_path / f"{i:04}.jpg").write_bytes(make_jpeg(2, i))
    source = open_train(str(tmp_path))
    indices = np.arange(count)
    requests = [(indices[i : i + 6], indices[i : i + 6]) for i in range(0, count, 6)]
    sums, largest = 0.0, 0
    for batch in load_batches(source, iter(requests), view, device=CPU, num_workers=2, decoder=decoder):
        assert not batch.skipped
        for draw_id, image in zip(batch.draw_ids.tolist(), batch.images.numpy(), strict=True):
            draws = crop_draws(3, np.array([draw_id]))[0]
            with Image.open(source.paths[draw_id]) as opened:
                whole = opened.convert("RGB")
            box = random_box(draws, whole.height, whole.width, view.scale)
            region = whole.crop((box.left, box.top, box.left + box.width, box.top + box.height))
            expected = np.asarray(region.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
            difference = abs(image - (expected[:, ::-1] if is_flipped(draws) else expected))
            sums += difference.mean() / count
            largest = max(largest, int(difference.max()))
    print(f"{decoder}: {sums:.4f} on average, {largest} at most")
    assert sums <= ACCURACY[decoder][0]
    assert largest <= ACCURACY[decoder][1]
