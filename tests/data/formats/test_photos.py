"""HEIC, AVIF, JPEG 2000 and JPEG XL of more than 8 bits: exact, or one line."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from fastmae.data.codestreams import size_of_jpeg2000, size_of_jpegxl
from fastmae.data.formats import common, heif, jpeg2000
from fastmae.data.reading import BadImageError
from fastmae.facts import AS_STORED, ReadAs

imagecodecs = pytest.importorskip("imagecodecs")
RANDOM = np.random.default_rng(0)


def numbers(dtype: str, *shape: int) -> np.ndarray:
    if dtype == "float32":
        return RANDOM.random(shape, np.float32)
    info = np.iinfo(dtype)
    return RANDOM.integers(info.min, info.max, shape, dtype, endpoint=True)


def scaled(stored: np.ndarray, bits: int) -> np.ndarray:
    return np.round(stored * (65535 / ((1 << bits) - 1))).astype(np.uint16)


@pytest.mark.parametrize("bits", [10, 12])
def test_an_avif_keeps_all_of_its_numbers_with_white_at_65535(bits: int) -> None:
    stored = RANDOM.integers(0, 1 << bits, (16, 24, 3), np.uint16)
    data = imagecodecs.avif_encode(stored, level=100, bitspersample=bits)
    assert heif.is_heif(data[:16])
    found = heif.pixels(data, AS_STORED)
    np.testing.assert_array_equal(found, scaled(stored, bits))
    header = heif.header(data)
    assert header is not None
    assert (header.bits, header.dtype, header.size) == (bits, "uint16", (16, 24))
    assert heif.pixels(data, ReadAs(pixel_type="uint8")) is None
    with pytest.raises(BadImageError, match="cannot be decoded"):
        heif.pixels(data[:-10], AS_STORED)


def test_a_heic_of_10_bits_keeps_all_of_its_numbers() -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    image = pillow_heif.from_bytes(mode="RGB;16", size=(80, 64), data=numbers("uint16", 64, 80, 3).tobytes())
    file = io.BytesIO()
    image.save(file, quality=-1)
    data = file.getvalue()
    stored = np.asarray(pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)) >> 6
    found = heif.pixels(data, AS_STORED)
    np.testing.assert_array_equal(found, scaled(stored, 10))
    assert len(np.unique(found)) == len(np.unique(stored))
    with pytest.raises(BadImageError, match="cannot be decoded"):
        heif.pixels(data[: len(data) // 2], AS_STORED)


def test_8_bits_are_left_to_pillow() -> None:
    assert heif.pixels(imagecodecs.avif_encode(numbers("uint8", 16, 24, 3)), AS_STORED) is None
    assert jpeg2000.pixels(imagecodecs.jpeg2k_encode(numbers("uint8", 64, 80, 3), level=0), AS_STORED) is None


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_a_jpeg2000_is_as_it_was_stored(dtype: str, bands: int) -> None:
    stored = numbers(dtype, 40, 50, bands)
    data = imagecodecs.jpeg2k_encode(stored[..., 0] if bands == 1 else stored, level=0)
    assert jpeg2000.is_jpeg2000(data[:16])
    assert size_of_jpeg2000(data) == (40, 50)
    found = jpeg2000.pixels(data, AS_STORED)
    if dtype == "uint8" and bands <= 4:
        assert found is None
        return
    assert found is not None
    assert found.dtype == stored.dtype
    np.testing.assert_array_equal(found, stored)
    header = jpeg2000.header(data)
    assert header is not None
    assert (header.dtype, header.bands) == (dtype, bands)
    with pytest.raises(BadImageError):
        jpeg2000.pixels(data[: len(data) // 2], AS_STORED)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("shape", [(40, 50), (64, 80, 3), (64, 64, 4), (100, 257)])
def test_a_jpeg_xl_is_as_it_was_stored(dtype: str, shape: tuple[int, ...]) -> None:
    stored = numbers(dtype, *shape)
    data = imagecodecs.jpegxl_encode(stored, lossless=True)
    assert jpeg2000.is_jpegxl(data[:16])
    found = jpeg2000.pixels(data, AS_STORED)
    assert found is not None
    np.testing.assert_array_equal(found.squeeze(), stored)
    header = jpeg2000.header(data)
    assert header is not None
    assert (header.dtype, header.size) == (dtype, shape[:2])
    for end in (3, 12, len(data) // 2):
        with pytest.raises(BadImageError):
            jpeg2000.pixels(data[:end], AS_STORED)


@pytest.mark.parametrize("shape", [(8, 8), (600, 900), (1000, 3), (3, 1000), (480, 640)])
def test_the_size_of_a_jpeg_xl_is_read_from_its_first_bits(shape: tuple[int, int]) -> None:
    assert size_of_jpegxl(imagecodecs.jpegxl_encode(np.zeros(shape, np.uint8))) == shape


def test_what_claims_to_be_huge_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(imagecodecs.jpeg2k_encode(numbers("uint16", 40, 50), level=0))
    start = data.index(b"\xff\x4f\xff\x51") + 8
    data[start : start + 8] = (60000).to_bytes(4, "big") * 2
    monkeypatch.setattr(imagecodecs, "jpeg2k_decode", None)
    with pytest.raises(BadImageError, match="over the limit"):
        jpeg2000.pixels(bytes(data), AS_STORED)
    avif = imagecodecs.avif_encode(numbers("uint16", 16, 24, 3) >> 6, level=100, bitspersample=10)
    at = avif.index(b"ispe") + 8
    monkeypatch.setattr(imagecodecs, "avif_decode", None)
    with pytest.raises(BadImageError, match="over the limit"):
        heif.pixels(avif[:at] + b"\0\1\0\0" * 2 + avif[at + 8 :], AS_STORED)
    # A JPEG XL of 2^20 by 2^20 pixels: no small size, 30 bits of height, the ratio 1:1.
    bits = 0 | 3 << 1 | ((1 << 20) - 1) << 3 | 1 << 33
    monkeypatch.setattr(imagecodecs, "jpegxl_decode", None)
    with pytest.raises(BadImageError, match="over the limit"):
        jpeg2000.pixels(b"\xff\x0a" + bits.to_bytes(8, "little") + bytes(16), AS_STORED)


def test_without_the_library_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = imagecodecs.jpeg2k_encode(numbers("uint16", 40, 50), level=0)

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(common, "_imported", missing)
    with pytest.raises(BadImageError, match=r"imagecodecs; run pip install 'fastmae\[science\]'"):
        jpeg2000.pixels(data, AS_STORED)
