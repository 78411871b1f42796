"""TIFF: every value of every kind reaches the array as tifffile reads it, and hostile files are one line."""

from __future__ import annotations

import io
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastmae.data.formats import common, tiff
from fastmae.data.reading import BadImageError
from fastmae.facts import AS_STORED, ReadAs

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64")
CHANNELS = ReadAs(pages="channels")


def written(array: np.ndarray, **how: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, photometric=how.pop("photometric", "minisblack"), **how)
    return file.getvalue()


def numbers(dtype: str, *shape: int) -> np.ndarray:
    """Returns numbers over the whole range of a type."""
    random = np.random.default_rng(len(shape))
    if np.dtype(dtype).kind == "f":
        return (random.normal(size=shape) * 100).astype(dtype)
    info = np.iinfo(dtype)
    return random.integers(info.min, info.max, shape, dtype, endpoint=True)


def as_tifffile_reads(data: bytes) -> np.ndarray:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        array = page.asarray()
        return array[..., None] if page.axes == "YX" else np.moveaxis(array, 0, -1) if page.axes == "SYX" else array


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"tile": (16, 32)},
        {"rowsperstrip": 3},
        {"compression": "lzw"},
        {"compression": "zlib", "predictor": True},
        {"compression": "zstd", "tile": (16, 16)},
        {"compression": "packbits"},
        {"compression": "lzma"},
    ],
    ids=str,
)
def test_every_value_is_that_of_the_file(dtype: str, how: dict[str, Any]) -> None:
    if how.get("predictor") and dtype == "float16":
        pytest.skip("no predictor for float16")
    planes, bands = {"planarconfig": "separate"}, {"planarconfig": "contig"}
    for shape, more in (((21, 34), {}), ((5, 21, 34), planes), ((21, 34, 5), bands)):
        array = numbers(dtype, *shape)
        data = written(array, **how, **more)
        found = tiff.pixels(data, AS_STORED)
        header = tiff.header(data)
        if dtype == "uint8" and len(shape) == 2:
            assert found is None, "8 bits are left to Pillow"
            continue
        assert found is not None
        assert found.dtype == np.dtype(dtype)
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, as_tifffile_reads(data))
        bands_last = np.moveaxis(array, 0, -1) if shape[0] == 5 else array
        np.testing.assert_array_equal(found.reshape(-1), bands_last.reshape(-1))
        assert (header.dtype, header.size, header.bands) == (dtype, (21, 34), found.shape[2])


def test_all_65536_values_of_16_bits_and_all_of_12_arrive() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = tiff.pixels(written(every), AS_STORED)
    np.testing.assert_array_equal(np.asarray(found)[..., 0], every)
    twelve = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    data = written(twelve, bitspersample=12)
    np.testing.assert_array_equal(np.asarray(tiff.pixels(data, AS_STORED))[..., 0], twelve)
    assert (tiff.header(data).bits, tiff.header(data).dtype) == (12, "uint16")


def test_8_bits_stay_with_pillow_unless_it_errs() -> None:
    colour = numbers("uint8", 20, 30, 3)
    assert tiff.pixels(written(colour, photometric="rgb"), AS_STORED) is None
    planar = written(np.moveaxis(colour, -1, 0), photometric="rgb", planarconfig="separate", compression="lzw")
    assert tiff.pixels(planar, AS_STORED) is None
    seven = numbers("uint8", 20, 30, 7)
    np.testing.assert_array_equal(tiff.pixels(written(seven, planarconfig="contig"), AS_STORED), seven)
    chosen = tiff.pixels(written(colour, photometric="rgb"), ReadAs(bands=(3, 1)))
    np.testing.assert_array_equal(chosen, colour)  # all of them; choosing comes later


def test_uint8_on_request_leaves_16_bits_to_pillow_as_before() -> None:
    assert tiff.pixels(written(numbers("uint16", 20, 30)), ReadAs(pixel_type="uint8")) is None
    assert tiff.pixels(written(numbers("int16", 20, 30)), ReadAs(pixel_type="uint8")) is not None


def test_white_at_zero_is_inverted() -> None:
    array = numbers("uint16", 20, 30)
    found = tiff.pixels(written(array, photometric="miniswhite"), AS_STORED)
    np.testing.assert_array_equal(np.asarray(found)[..., 0], 65535 - array)
    with pytest.raises(BadImageError, match="white at 0"):
        tiff.pixels(written(numbers("float32", 20, 30), photometric="miniswhite"), AS_STORED)


def test_orientation_changes_nothing() -> None:
    array = numbers("uint16", 20, 30)
    data = written(array, extratags=[(274, "H", 1, 6, False)])
    np.testing.assert_array_equal(np.asarray(tiff.pixels(data, AS_STORED))[..., 0], array)
    assert tiff.header(data).is_turned


def test_a_palette_of_16_bits_is_looked_up() -> None:
    colours = np.random.default_rng(0).integers(0, 65536, (3, 65536), np.uint16)
    index = numbers("uint16", 20, 30)
    data = written(index, photometric="palette", colormap=colours)
    np.testing.assert_array_equal(tiff.pixels(data, AS_STORED), colours.T[index])


def test_gdal_states_missing_pixels_and_leaves_out_empty_tiles() -> None:
    array = numbers("int16", 32, 32)
    stated = [(42113, "s", 0, "-9999", False)]
    data = written(array, extratags=stated)
    assert tiff.header(data).nodata == -9999
    assert tiff.header(written(array)).nodata is None
    empty = bytearray(written(array, tile=(16, 16), extratags=stated))
    with tifffile.TiffFile(io.BytesIO(bytes(empty))) as file:
        tag = file.pages[0].tags[325]  # TileByteCounts
    struct.pack_into("<I" if tag.dtype == 4 else "<H", empty, tag.valueoffset, 0)
    found = np.asarray(tiff.pixels(bytes(empty), AS_STORED))[..., 0]
    assert (found[:16, :16] == -9999).all()
    np.testing.assert_array_equal(found[16:], array[16:])


# --- pages ------------------------------------------------------------------------------------------------------------

STACKS = ({}, {"imagej": True}, {"ome": True}, {"metadata": None}, {"bigtiff": True, "compression": "zlib"})


@pytest.mark.parametrize("how", STACKS, ids=str)
def test_every_page_of_a_stack_is_found_and_stacked(how: dict[str, Any]) -> None:
    stack = numbers("uint16", 7, 20, 30)
    data = written(stack, **how)
    file = io.BytesIO(data)
    places = tiff.places(file)
    assert len(places) == tiff.header(data).pages == 7
    for place, array in zip(places, stack, strict=True):
        np.testing.assert_array_equal(tiff.page(file, place, AS_STORED)[..., 0], array)
    np.testing.assert_array_equal(tiff.pixels(data, CHANNELS), np.moveaxis(stack, 0, -1))
    np.testing.assert_array_equal(np.asarray(tiff.pixels(data, AS_STORED))[..., 0], stack[0])


def test_smaller_copies_and_masks_are_no_pages() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(numbers("uint16", 20, 30), metadata=None)
        writer.write(numbers("uint16", 10, 15), subfiletype=1, metadata=None)
        writer.write(numbers("uint16", 20, 30), metadata=None)
    assert len(tiff.places(file)) == 2


def test_pages_of_different_sizes_are_no_channels() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(numbers("uint16", 20, 30), metadata=None)
        writer.write(numbers("uint16", 20, 31), metadata=None)
    with pytest.raises(BadImageError, match="page 2 has another size"):
        tiff.pixels(file.getvalue(), CHANNELS)


# --- hostile ----------------------------------------------------------------------------------------------------------


def changed(data: bytes, tag: int, value: int) -> bytes:
    """Returns a little-endian TIFF with another value of a tag that fits into its entry."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        place = file.pages[0].tags[tag].offset
    new = bytearray(data)
    struct.pack_into("<HII", new, place + 2, 4, 1, value)
    return bytes(new)


DATA = numbers("uint16", 40, 50)
PLAIN, TILED = (written(DATA, **how) for how in ({}, {"tile": (16, 16), "compression": "zlib"}))


def directory_in_a_circle() -> bytes:
    data = bytearray(written(numbers("uint16", 3, 20, 30), metadata=None))
    first = struct.unpack_from("<I", data, 4)[0]
    entries = struct.unpack_from("<H", data, first)[0]
    struct.pack_into("<I", data, first + 2 + 12 * entries, first)
    return bytes(data)


def tag_with_values(count: int) -> bytes:
    data = bytearray(PLAIN)
    first = struct.unpack_from("<I", data, 4)[0]
    struct.pack_into("<HHII", data, first + 2, 254, 12, count, 8)
    return bytes(data)


HOSTILE = {
    "cut in its pixels": (PLAIN[:-100], "cut"),
    "cut in its tiles": (TILED[: len(TILED) // 2], "cut|cannot be decoded"),
    "cut in its tags": (PLAIN[:20], "tags"),
    "only a start": (PLAIN[:8], "tags"),
    "huge": (changed(changed(PLAIN, 256, 400_000), 257, 400_000), "over the limit"),
    "no pixels": (changed(PLAIN, 257, 0), "0 pixels|×0|no image"),
    "huge tile": (changed(changed(TILED, 322, 1 << 20), 323, 1 << 20), "over the limit|tags for"),
    "far strip": (changed(PLAIN, 273, 1 << 31), "cut"),
    "endless tag": (tag_with_values(0xFFFFFFFF), "more than the file has bytes"),
    "unknown compression": (changed(TILED, 259, 34666), "is not read"),
    "complex": (written((DATA + 1j).astype(np.complex64)), "complex"),
    "damaged deflate": (TILED[:-500] + bytes(500), "cannot be decoded"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line_and_takes_no_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, words = HOSTILE[name]
    monkeypatch.setattr(np, "empty", _small(np.empty))
    monkeypatch.setattr(np, "zeros", _small(np.zeros))
    started = time.perf_counter()
    with pytest.raises(BadImageError, match=words) as error:
        tiff.pixels(data, AS_STORED)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - started < 30, "it hangs"


def _small(make: Any) -> Any:
    def allocate(shape: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        assert np.prod(shape, dtype=float) < 1e7, "allocated by what a header claims"
        return make(shape, *args, **kwargs)

    return allocate


def test_pages_in_a_circle_are_refused() -> None:
    with pytest.raises(BadImageError, match="circle"):
        tiff.places(io.BytesIO(directory_in_a_circle()))


def test_an_absurd_number_of_pages_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "MAX_PAGES", 5)
    with pytest.raises(BadImageError, match=r"[67] pages"):
        tiff.places(io.BytesIO(written(numbers("uint16", 7, 20, 30), metadata=None)))
    noted = written(numbers("uint16", 2, 20, 30), imagej=True).replace(b"images=2", b"images=9")
    with pytest.raises(BadImageError, match="9 pages"):
        tiff.places(io.BytesIO(noted))


def test_images_noted_but_not_there_are_refused() -> None:
    noted = written(numbers("uint16", 2, 20, 30), imagej=True).replace(b"images=2", b"images=9")
    file = io.BytesIO(noted)
    places = tiff.places(file)
    assert len(places) == 9
    with pytest.raises(BadImageError, match="is not there"):
        tiff.page(file, places[8], AS_STORED)


def test_without_the_library_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(common, "_imported", missing)
    with pytest.raises(BadImageError, match=r"tifffile; run pip install 'fastmae\[science\]'"):
        tiff.pixels(PLAIN, AS_STORED)
    plain = io.BytesIO()
    Image.fromarray(numbers("uint8", 20, 30)).save(plain, "TIFF")
    assert tiff.pixels(plain.getvalue(), AS_STORED) is None


def test_many_threads_read_the_same_as_one() -> None:
    files = [written(numbers("uint16", 40, 50) + np.uint16(seed), compression="zlib") for seed in range(16)]
    alone = [tiff.pixels(data, AS_STORED) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = [*pool.map(lambda data: tiff.pixels(data, AS_STORED), files * 4)]
    for number, found in enumerate(together):
        np.testing.assert_array_equal(found, alone[number % 16])


def test_cmyk_of_16_bits_becomes_rgb_as_that_of_8_does() -> None:
    few = numbers("uint8", 20, 30, 4)
    inks = few * np.uint16(257)
    found = tiff.pixels(written(inks, photometric="separated"), AS_STORED)
    assert found is not None
    assert (found.shape, found.dtype) == ((20, 30, 3), np.uint16)
    narrow = np.asarray(Image.fromarray(few, "CMYK").convert("RGB"))
    np.testing.assert_allclose(found / 257, narrow, atol=0.6)
    named = tiff.pixels(written(inks, photometric="separated"), ReadAs(bands=(4, 1)))
    np.testing.assert_array_equal(named, inks)
    others = written(inks, photometric="separated", extratags=[(332, "H", 1, 2, False)])
    with pytest.raises(BadImageError, match="name them by bands, or store RGB"):
        tiff.pixels(others, AS_STORED)
