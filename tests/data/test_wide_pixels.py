"""Pixels of 16 bits and of floats: no bit is lost on the way from a file into a batch, or it is said."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmae import _C
from fastmae.data.cache import cached
from fastmae.data.convert import convert_channels, narrowest, to_batch
from fastmae.data.decode import decode
from fastmae.data.loader import choose_decoder, load_batches
from fastmae.data.plan import Box
from fastmae.data.reading import BadImageError, Reading
from fastmae.data.resize import crop_and_resize
from fastmae.data.sample import View
from fastmae.data.sources import ArraySource, Concat, FolderSource, describe
from fastmae.data.survey import take_stock
from fastmae.errors import SettingError
from fastmae.facts import ReadAs

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
EVERY_16_BITS = np.arange(65536, dtype=np.uint16)
FLOATS = np.concatenate(
    [
        np.array([0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, np.nan], np.float32),
        RNG.integers(0, 2**32, 4088, np.uint32).view(np.float32),
    ]
)
FLOATS[np.isinf(FLOATS)] = 1


def batch_of(source, view, decoder="threads", workers=2):
    every = np.arange(len(source))
    (batch,) = load_batches(source, [(every, every)], view, device=CPU, num_workers=workers, decoder=decoder)
    return batch


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path, files):
    path.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(files):
        (path / f"{number:03}.png").write_bytes(data)
    return FolderSource(tuple(str(file) for file in sorted(path.iterdir())), None, ())


# --- nothing is lost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_every_value_of_16_bits_survives_from_a_file_and_from_an_array(tmp_path, flip):
    pixels = EVERY_16_BITS.reshape(256, 256)
    files = folder(tmp_path / "x", [png(pixels)] * 4)
    array = ArraySource(np.tile(pixels, (4, 1, 1))[..., None], None, "x")
    view = View((256, 256), Reading(1, dtype="uint16"), seed=3 if flip else None, flip=flip)
    for source in (files, array):
        assert describe(source).pixels.dtype == "uint16"
        images = batch_of(source, view).images
        assert images.dtype == torch.uint16
        mirrored = [np.array_equal(image[..., 0], pixels[:, ::-1]) for image in images.numpy()]
        assert any(mirrored) == flip
        for image, is_mirrored in zip(images.numpy(), mirrored, strict=True):
            assert is_mirrored or np.array_equal(image[..., 0], pixels)


@pytest.mark.parametrize("flip", [False, True])
def test_every_float_survives_as_it_is(flip):
    pixels = FLOATS.reshape(64, 64, 1)
    source = ArraySource(np.stack([pixels] * 4), None, "x")
    assert describe(source).pixels.dtype == "float32"
    images = batch_of(source, View((64, 64), Reading(1, dtype="float32"), seed=3 if flip else None, flip=flip)).images
    for image in images.numpy():
        shown = image if image[0, 0].view(np.uint32) == pixels[0, 0].view(np.uint32) else image[:, ::-1]
        is_number = ~np.isnan(pixels)
        assert np.array_equal(np.isnan(shown), ~is_number)
        assert np.array_equal(shown.view(np.uint32)[is_number], pixels.view(np.uint32)[is_number])


def test_8_bits_among_16_are_multiplied_by_257_and_told(tmp_path):
    small = RNG.integers(0, 256, (16, 16), np.uint8)
    large = RNG.integers(0, 65536, (16, 16), np.uint16)
    source = folder(tmp_path / "x", [png(small), png(large), png(small)])
    images = batch_of(source, View((16, 16), Reading(1, dtype="uint16"))).images.numpy()[..., 0]
    assert np.array_equal(images[0], small.astype(np.uint16) * 257)
    assert np.array_equal(images[1], large)
    notes = take_stock(source, 1).notes
    assert "2 images of uint8 among those of uint16: multiplied by 257, so that 255 becomes 65535" in notes


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("uint8", "uint8"), ("bool", "uint8"), ("uint16", "uint16"), (">u2", "uint16"), ("int8", "float32"),
     ("int16", "float32"), ("int32", "float32"), ("uint32", "float32"), ("int64", "float32"), ("float16", "float32"),
     ("float32", "float32"), (">f4", "float32"), ("float64", "float32")],
)  # fmt: skip
def test_numbers_of_every_type_are_kept_in_the_narrowest_that_holds_them(stored, dtype):
    numbers = np.array([0, 1, 100, 127]).astype(stored).reshape(2, 2, 1)
    assert narrowest({np.dtype(stored).name: 3}) == dtype
    got = to_batch(numbers, Reading(1, dtype=dtype))
    assert got.dtype == np.dtype(dtype)
    assert got.dtype.isnative
    assert np.array_equal(got, numbers * (255 if stored == "bool" else 1))


@pytest.mark.parametrize(
    ("numbers", "asked", "dtype", "reason"),
    [
        ([2**24 + 1], "auto", "float32", "1 of 1 values of int64 do not fit into float32, such as 16777217; set pixel"),
        ([2**24 + 1], "float32", "float32", "do not fit into float32, such as 16777217; set"),
        ([2**63 - 1, 0], "auto", "float32", "1 of 2 values of int64 do not fit"),
        (
            [0.1, 0.5],
            "auto",
            "float32",
            "1 of 2 values of float64 do not fit into float32, such as 0.1; set",
        ),
        ([1e300, 0.1], "float32", "float32", "1 of 2 values of float64 do not fit into float32, such as 1e.300; scale"),
        ([np.inf, np.nan, 1.0], "auto", "float32", "1 of 3 values are infinite; store NaN"),
        (
            [-1, 3],
            "uint16",
            "uint16",
            "1 of 2 values of int64 do not fit into uint16, such as -1; set",
        ),
        ([0.5, 3.0], "uint8", "uint8", "1 of 2 values of float64 do not fit into uint8, such as 0.5"),
        ([np.nan, 3.0], "uint16", "uint16", "1 of 2 values of float64 do not fit into uint16, such as nan"),
        ([1, 3], "auto", "uint8", "int64 pixels where uint8 ones are meant; set pixel_type to float32 to keep them"),
    ],
)
def test_what_does_not_fit_is_refused_with_how_much_and_what_to_do(numbers, asked, dtype, reason):
    with pytest.raises(BadImageError, match=reason):
        to_batch(np.array(numbers).reshape(1, -1, 1), Reading(1, dtype=dtype, read_as=ReadAs(pixel_type=asked)))


def test_what_is_asked_for_is_done():
    asked = {name: Reading(1, dtype=name, read_as=ReadAs(pixel_type=name)) for name in ("uint8", "uint16", "float32")}
    wide = EVERY_16_BITS.reshape(256, 256, 1)
    assert np.array_equal(to_batch(wide, asked["uint8"]), wide >> 8)
    assert np.array_equal(to_batch(wide, asked["float32"]), wide)
    assert np.array_equal(to_batch(wide.astype(np.int64), asked["uint16"]), wide)
    tenth = np.array([[[0.1], [np.nan]]])
    assert np.array_equal(to_batch(tenth, asked["float32"]), tenth.astype(np.float32), equal_nan=True)


def test_an_image_that_does_not_fit_is_replaced_and_named(tmp_path):
    source = folder(tmp_path / "x", [png(np.zeros((8, 8), np.uint16)), png(np.ones((8, 8), np.uint8))])
    batch = batch_of(source, View((8, 8), Reading(1)))
    assert [(bad.index, bad.reason[:40]) for bad in batch.skipped] == [(0, "uint16 pixels where uint8 ones are meant")]
    assert batch.images.unique().tolist() == [1]


def test_few_floats_among_bytes_do_not_make_floats_of_all():
    assert narrowest({"uint8": 90, "float32": 10}) == "uint8"
    assert narrowest({"uint8": 80, "uint16": 10, "int16": 10}) == "uint16"
    assert narrowest({"uint8": 80, "float64": 20}) == "float32"
    assert narrowest({}) == "uint8"


def test_joined_arrays_have_one_type_that_holds_both():
    parts = [ArraySource(np.zeros((100, 4, 4, 1), dtype), None, "x") for dtype in (np.uint8, np.uint16)]
    assert describe(Concat((parts[0], parts[0]))).pixels.dtype == "uint8"
    assert describe(Concat(tuple(parts))).pixels.dtype == "uint16"


def test_floats_that_would_be_rounded_end_a_run_before_it_begins_unless_rounding_is_asked_for():
    source = ArraySource(RNG.random((20, 4, 4, 1)), None, "x")
    with pytest.raises(SettingError, match=r"none of 8 images sampled can be used: x\[0\]: 16 of 16 values of float64"):
        take_stock(source, None)
    assert take_stock(source, None, ReadAs(pixel_type="float32")).notes == (
        "8 images of float64: rounded to float32, as pixel_type says",
    )


# --- channels ---------------------------------------------------------------------------------------------------------


def test_luma_of_16_bits_is_pillows_rule_and_gray_stays_itself():
    gray = EVERY_16_BITS[::7]
    assert np.array_equal(convert_channels(np.stack([gray] * 3, axis=-1)[None], 1)[0, :, 0], gray)
    colours = RNG.integers(0, 256, (50, 40, 3), np.uint8)
    small = np.asarray(Image.fromarray(colours).convert("L"))
    wide = convert_channels(colours.astype(np.uint16), 1)[..., 0]
    assert np.array_equal(wide, small)  # the same sum, rounded alike
    floats = convert_channels(colours.astype(np.float32), 1)[..., 0]
    assert abs(floats - (colours.astype(float) @ [19595, 38470, 7471]) / 65536).max() < 1e-4


def test_bands_are_chosen_before_all_else():
    pixels = RNG.integers(0, 65536, (4, 5, 6), np.uint16)
    reading = Reading(3, dtype="uint16", read_as=ReadAs(bands=(6, 2, 2)))
    assert np.array_equal(to_batch(pixels, reading), pixels[..., [5, 1, 1]])
    reading = Reading(3, dtype="uint16", read_as=ReadAs(bands=(4,)))
    assert np.array_equal(to_batch(pixels, reading), pixels[..., [3] * 3])
    photo = RNG.integers(0, 256, (9, 8, 4), np.uint8)
    assert np.array_equal(decode(png(photo), Reading(2, read_as=ReadAs(bands=(4, 1)))), photo[..., [3, 0]])
    for bands, reason in (((7,), "6 bands, of which bands asks for number 7"), ((1, 2, 3, 4), "set in_chans to 4")):
        with pytest.raises(BadImageError, match=reason):
            to_batch(pixels, Reading(3, dtype="uint16", read_as=ReadAs(bands=bands)))


# --- crops ------------------------------------------------------------------------------------------------------------


def pillow(plane, size):
    return np.asarray(Image.fromarray(plane.astype(np.float32)).resize(size[::-1], Image.Resampling.BICUBIC))


@settings(max_examples=60, deadline=None)
@given(
    top=st.integers(0, 20), left=st.integers(0, 20), height=st.integers(1, 40), width=st.integers(1, 60),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)), channels=st.sampled_from([1, 2, 3, 4, 5, 9]),
    flip=st.booleans(), dtype=st.sampled_from(["uint16", "float32"]),
)  # fmt: skip
def test_resizing_is_pillows_of_mode_f_even_on_noise(top, left, height, width, size, channels, flip, dtype):
    pixels = np.random.default_rng(top).integers(0, 65536, (60, 80, channels)).astype(dtype)
    got = crop_and_resize(pixels, Box(top, left, height, width), flip, size)
    assert (got.dtype, got.shape) == (np.dtype(dtype), (*size, channels))
    region = pixels[top : top + height, left : left + width]
    expected = np.stack([pillow(region[..., c], size) for c in range(channels)], axis=-1)
    expected = expected[:, ::-1] if flip else expected
    if dtype == "uint16" and (height, width) != size:
        expected = expected.clip(0, 65535)
    assert abs(got - expected.astype(np.float64)).max() <= (6.5536 if dtype == "float32" else 6.5536 + 0.5)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(2, 40), width=st.integers(2, 50), size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]), seed=st.integers(0, 99), nan=st.booleans(),
)  # fmt: skip
def test_missing_pixels_spread_as_far_as_the_filter_and_their_value_changes_nothing(
    height, width, size, dtype, seed, nan
):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(1, 200, (height, width, 2)).astype(dtype)
    missing = rng.random(pixels.shape) < 0.02
    nodata = {"uint8": 255.0, "uint16": 65535.0, "float32": np.nan if nan else -9999.0}[dtype]
    box = Box(0, 0, height, width)
    results = []
    for value in (nodata, np.nan if dtype == "float32" else nodata):
        filled = pixels.copy()
        filled[missing] = value
        results.append(crop_and_resize(filled, box, False, size, nodata))
    got = results[0]
    is_missing = np.isnan(got) if np.isnan(nodata) else got == nodata
    if (height, width) == size:
        assert np.array_equal(is_missing, missing)
        return
    assert np.array_equal(*results, equal_nan=True)
    # What changes when a missing pixel changes is touched by it: those are missing, and all others are as they were.
    others = [pixels.astype(np.float32), pixels.astype(np.float32)]
    others[1][missing] += 1e4
    plain, changed = (crop_and_resize(other, box, False, size) for other in others)
    assert is_missing[abs(plain - changed) > 1e-2].all()
    there = ~is_missing
    expected = plain if dtype == "float32" else plain.round().clip(0, np.iinfo(dtype).max)
    expected = expected - (expected == nodata)  # what comes out as the value of missing pixels moves beside it
    assert abs(got[there].astype(np.float64) - expected[there]).max(initial=0) <= (1e-3 if dtype == "float32" else 1)
    assert missing.any() or not is_missing.any()


def test_numbers_that_come_out_as_nodata_are_not_missing():
    pixels = np.zeros((8, 8, 1), np.uint16)
    pixels[:, 4:] = 60000
    pixels[:, :4] = 1
    got = crop_and_resize(pixels, Box(0, 0, 8, 8), False, (16, 16), nodata=0)
    assert (got > 0).all()  # although bicubic weights undershoot there
    assert (crop_and_resize(pixels, Box(0, 0, 8, 8), False, (16, 16)) == 0).any()


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_batch_is_the_same_for_any_number_of_threads_and_with_a_cache(tmp_path, dtype):
    files = folder(tmp_path / "x", [png(RNG.integers(0, 65536, (40, 50), np.uint16)) for _ in range(12)])
    reading = Reading(1, dtype=dtype)
    view = View((24, 24), reading, seed=5, scale=(0.2, 1.0), flip=True)
    expected = batch_of(files, view, workers=1).images
    assert expected.dtype == getattr(torch, dtype)
    assert torch.equal(batch_of(files, view, workers=4).images.view(torch.uint8), expected.view(torch.uint8))
    kept = cached(files, reading, 1 << 30, "threads")
    assert kept.form == "decoded"
    for _ in range(2):
        assert torch.equal(batch_of(kept, view).images.view(torch.uint8), expected.view(torch.uint8))
    assert kept.read(0).dtype == np.dtype(dtype)
    assert kept.cached_bytes == kept.estimate  # which counts the bytes of the type


def test_dali_is_for_8_bits_of_all_bands():
    chosen = Reading(3, read_as=ReadAs(bands=(1, 2, 3)))
    for reading, what in ((Reading(3, dtype="uint16"), "uint16"), (chosen, "all bands")):
        with pytest.raises(SettingError, match=what):
            choose_decoder("dali-cpu", CPU, None, reading)


@pytest.mark.parametrize(
    ("image", "resized", "reason"),
    [
        (np.zeros((4, 4, 2), np.int32), np.zeros((2, 2, 2), np.int32), "must be uint8, uint16 .as int16., float32"),
        (np.zeros((4, 4, 2), np.float32), np.zeros((2, 2, 2), np.uint8), "resized must be float32, got uint8"),
        (np.zeros((4, 4), np.uint8), np.zeros((2, 2, 2), np.uint8), "image must have shape"),
        (np.zeros((4, 4, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), "resized must have shape"),
        (np.zeros((4, 0, 2), np.uint8), np.zeros((2, 2, 2), np.uint8), "must have pixels"),
        (np.zeros((4, 8, 2), np.uint8)[:, ::2], np.zeros((2, 2, 2), np.uint8), "rows without gaps"),
        (np.zeros((4, 4, 2), np.uint8), np.zeros((2, 4, 2), np.uint8)[:, ::2], "resized must be contiguous"),
    ],
)
def test_the_extension_refuses_what_it_cannot_resize(image, resized, reason):
    with pytest.raises(ValueError, match=reason):
        _C.resize(image, False, None, resized)
