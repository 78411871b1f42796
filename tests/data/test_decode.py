"""Decoding and resizing: Pillow's pixels within two grey levels, for every kind of file that users have."""

import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmae.data import reading
from fastmae.data.convert import convert_channels
from fastmae.data.decode import BadImageError, decode
from fastmae.data.plan import Box
from fastmae.data.reading import Reading
from fastmae.data.resize import crop_and_resize
from fastmae.facts import ReadAs


def picture(height=60, width=80, mode="RGB"):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


@settings(max_examples=150, deadline=None)
@given(
    top=st.integers(0, 20), left=st.integers(0, 20), height=st.integers(1, 40), width=st.integers(1, 60),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)), channels=st.sampled_from([1, 3, 4, 5]), flip=st.booleans(),
)  # fmt: skip
def test_crop_and_resize_is_pillows_within_two_levels_even_on_noise(top, left, height, width, size, channels, flip):
    pixels = np.random.default_rng(top).integers(0, 256, (60, 80, channels), dtype=np.uint8)
    got = crop_and_resize(pixels, Box(top, left, height, width), flip, size)
    assert got.dtype == np.uint8
    for c in range(channels):
        plane = Image.fromarray(pixels[..., c]).crop((left, top, left + width, top + height))
        expected = np.asarray(plane.resize(size[::-1], Image.Resampling.BICUBIC))
        expected = expected[:, ::-1] if flip else expected
        assert abs(got[..., c].astype(int) - expected).max() <= 2


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_jpeg_is_pillows_within_two_levels(mode, in_chans, options):
    data = encoded(picture(mode=mode), "JPEG", quality=90, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L" if in_chans == 1 else "RGB")).reshape(60, 80, -1)
    assert abs(decode(data, Reading(in_chans)).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF"])
def test_other_formats_are_pillows(file_format):
    data = encoded(picture(), file_format)
    assert np.array_equal(decode(data, Reading(3)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_odd_kinds_follow_the_stated_rule():
    rgba = picture(mode="RGBA")
    rgba.putalpha(7)
    assert np.array_equal(decode(encoded(rgba, "PNG"), Reading(3)), np.asarray(rgba)[..., :3])
    assert np.array_equal(decode(encoded(rgba, "PNG"), Reading(4)), np.asarray(rgba))
    palette = picture().convert("P")
    assert np.array_equal(decode(encoded(palette, "PNG"), Reading(3)), np.asarray(palette.convert("RGB")))
    cmyk = encoded(picture(mode="CMYK"), "JPEG", quality=95)
    assert abs(decode(cmyk, Reading(3)).astype(int) - np.asarray(picture())).mean() < 6
    in_8_bits = ReadAs(pixel_type="uint8")
    deep = Image.fromarray(np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64))
    expected = (np.arange(0, 65536, 16) >> 8).reshape(64, 64)
    assert np.array_equal(decode(encoded(deep, "PNG"), Reading(1, read_as=in_8_bits))[..., 0], expected)
    assert np.array_equal(decode(encoded(deep, "PNG"), Reading(3, read_as=in_8_bits))[..., 2], expected)
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(animated, Reading(3))[0, 0].tolist() == [255, 0, 0]


def test_array_channels_are_converted_as_pillow_does():
    rgb = np.asarray(picture())
    assert np.array_equal(convert_channels(rgb, 1)[..., 0], np.asarray(picture().convert("L")))
    gray = rgb[..., :1]
    assert np.array_equal(convert_channels(gray, 3), np.repeat(gray, 3, axis=2))
    assert np.array_equal(convert_channels(np.dstack([rgb, gray]), 3), rgb)
    assert convert_channels(np.zeros((4, 4, 7), np.uint8), 7).shape == (4, 4, 7)
    with pytest.raises(BadImageError, match="set in_chans to 7"):
        convert_channels(np.zeros((4, 4, 7), np.uint8), 3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"not an image at all",
        encoded(picture(), "JPEG")[:400],
        encoded(picture(600, 800), "JPEG", quality=95)[:-2000],
        encoded(picture(), "PNG")[:-40],
        encoded(picture(), "PNG")[:60] + bytes(40),
    ],
    ids=["empty", "magic only", "text", "cut jpeg", "jpeg without its end", "cut png", "overwritten png"],
)
def test_broken_bytes_are_bad_images(data):
    with pytest.raises(BadImageError):
        decode(data, Reading(3))


def test_too_many_pixels_are_refused_unread(monkeypatch):
    monkeypatch.setattr(reading, "MAX_PIXELS", 60 * 80 - 1)
    for file_format in ("JPEG", "PNG"):
        with pytest.raises(BadImageError, match="80×60 pixels"):
            decode(encoded(picture(), file_format), Reading(3))


def test_too_little_memory_is_not_taken_for_a_bad_image(monkeypatch):
    """Which images are replaced depends on the data alone, so that resuming stays exact."""

    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(simplejpeg, "decode_jpeg", no_memory)
    monkeypatch.setattr(Image, "open", no_memory)
    for file_format in ("JPEG", "PNG"):
        with pytest.raises(MemoryError):
            decode(encoded(picture(), file_format), Reading(3))


def test_alpha_of_a_palette_is_kept_for_4_channels_and_dropped_silently_otherwise(recwarn):
    indexed = picture().quantize(100)
    data = encoded(indexed, "PNG", transparency=bytes(range(100)))
    assert np.array_equal(decode(data, Reading(4))[..., 3], np.asarray(indexed))
    assert np.array_equal(decode(data, Reading(3)), np.asarray(indexed.convert("RGB")))
    assert not recwarn.list


# --- JPEGs that are not quite as they should be -----------------------------------------------------------------------


def with_stray_bytes(data, after):
    """A JPEG with three bytes of nothing after its segment of some kind."""
    start = data.index(after)
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return data[:end] + b"\x00\x11\x22" + data[end:]


@pytest.mark.parametrize("after", [b"\xff\xe0", b"\xff\xdb", b"\xff\xc0"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_stray_bytes_between_the_segments_of_a_jpeg_change_nothing(after, in_chans):
    data = encoded(picture(), "JPEG", quality=90)
    stray = with_stray_bytes(data, after)
    assert abs(decode(stray, Reading(in_chans)).astype(int) - decode(data, Reading(in_chans))).max() <= 2
    with pytest.raises(BadImageError, match="truncated"):
        decode(stray[:-300], Reading(in_chans))


def test_a_jpeg_that_is_damaged_in_its_pixels_is_refused():
    """Pillow shows what is left of it, gray or shifted."""
    data = encoded(picture(200, 300), "JPEG", quality=95)
    middle = len(data) // 2
    spoilt = data[:middle] + b"\xff\xd0" * 20 + data[middle + 40 :]
    assert Image.open(io.BytesIO(spoilt)).convert("RGB").size == (300, 200)
    with pytest.raises(BadImageError, match="Corrupt JPEG data"):
        decode(spoilt, Reading(3))


# --- four channels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "bands"),
    [
        (encoded(picture(), "JPEG"), "3 bands"), (encoded(picture(), "PNG"), "3 bands"),
        (encoded(picture(mode="L"), "PNG"), "1 band"), (encoded(picture(mode="P"), "PNG"), "1 band"),
        (encoded(picture(mode="I;16"), "PNG"), "1 band"), (encoded(picture(mode="CMYK"), "JPEG"), "CMYK without alpha"),
        (encoded(picture(mode="CMYK"), "TIFF"), "CMYK without alpha"),
    ],
)  # fmt: skip
def test_no_fourth_band_is_made_up(data, bands):
    with pytest.raises(BadImageError, match=f"{bands}, in_chans 4 asks for 4; set in_chans to 1 or 3, or give images"):
        decode(data, Reading(4))
