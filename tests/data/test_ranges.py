"""What is measured of pixels: the range of wide ones, the mean and the deviation, and which are missing."""

import numpy as np
import pytest

from fastmae.data.arrays import ArraySource
from fastmae.data.reading import Reading
from fastmae.data.statistics import measure
from fastmae.errors import SettingError
from fastmae.facts import UINT8, PixelFacts


def source_of(images):
    return ArraySource(images, None, "x")


def wide(channels=2, dtype=np.uint16, seed=0):
    """Images of 12 bits, with a channel of its own offset each."""
    values = np.random.default_rng(seed).normal(1000, 150, (6, 40, 50, channels)).clip(0, 4095)
    return (values + 100 * np.arange(channels)).astype(dtype)


def test_the_range_of_uint8_is_that_of_the_type_and_what_is_measured_is_as_it_always_was():
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 7, 3), dtype=np.uint8)
    found = measure(source_of(images), Reading(3))
    shares = images.reshape(-1, 3) / 255
    assert found.pixels == UINT8
    assert found.lines == ()
    np.testing.assert_allclose(found.mean, shares.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.std, shares.std(axis=0), atol=1e-6)
    for same in (("dtype",), (0.0, 255.0), (0.0, 255.0) * 3):
        assert measure(source_of(images), Reading(3), same) == found


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_the_range_of_wide_pixels_is_their_percentiles_and_mean_and_std_are_in_its_units(dtype):
    images = wide(dtype=dtype)
    found = measure(source_of(images), Reading(2, dtype=dtype))
    pixels = images.reshape(-1, 2).astype(np.float64)
    low, high = np.percentile(pixels, [0.1, 99.9], axis=0, method="nearest")
    assert found.pixels == PixelFacts(dtype=dtype, low=tuple(low), high=tuple(high))
    shares = (pixels - low) / (high - low)
    np.testing.assert_allclose(found.mean, shares.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.std, shares.std(axis=0), rtol=1e-5)
    (line,) = found.lines
    assert f"{low[0]:.6g} to {high[0]:.6g}; {low[1]:.6g} to {high[1]:.6g} of {dtype} (from 0.1 to 99.9 %" in line


def test_missing_pixels_count_nowhere_and_their_share_is_told():
    whole = wide(1)
    holes = whole.copy()
    holes[:, :4] = 65535
    found = measure(source_of(holes), Reading(1, dtype="uint16", nodata=65535.0))
    kept = measure(source_of(whole[:, 4:]), Reading(1, dtype="uint16"))
    assert (found.pixels.low, found.pixels.high) == (kept.pixels.low, kept.pixels.high)
    assert (found.mean, found.std) == (kept.mean, kept.std)
    assert "10 % are missing" in found.lines[0]
    floats = np.where(holes == 65535, np.nan, holes.astype(np.float32)).astype(np.float32)
    of_floats = measure(source_of(floats), Reading(1, dtype="float32"))
    assert (of_floats.mean, of_floats.pixels.low) == (found.mean, found.pixels.low)
    absent = measure(source_of(whole), Reading(1, dtype="uint16", nodata=65535.0))
    assert "no pixel that was looked at has the missing value 65535" in absent.lines[0]
    both = np.concatenate([floats, np.full_like(floats, np.nan)], axis=3)
    with pytest.raises(SettingError, match=r"^nodata=None: every pixel of channel 2 is missing"):
        measure(source_of(both), Reading(2, dtype="float32"))


def test_floats_between_0_and_1_stay_as_they_are_unless_percentiles_are_asked_for():
    images = np.random.default_rng(0).uniform(0.1, 0.9, (4, 20, 20, 1)).astype(np.float32)
    reading = Reading(1, dtype="float32")
    found = measure(source_of(images), reading)
    assert (found.pixels.low, found.pixels.high) == ((0.0,), (1.0,))
    np.testing.assert_allclose(found.mean[0], images.mean(), atol=1e-6)
    assert measure(source_of(images), reading, ("auto",)).pixels.low[0] == pytest.approx(0.1, abs=0.01)
    # Reflectances of a thousandth would hardly differ in [0, 1].
    assert measure(source_of(images / 1000), reading).pixels.high[0] == pytest.approx(0.0009, abs=1e-5)


def test_a_constant_channel_has_a_range_and_a_deviation_of_one_grey_level():
    for value in (0, 65535):
        found = measure(source_of(np.full((3, 4, 4, 1), value, np.uint16)), Reading(1, dtype="uint16"))
        assert found.pixels.low[0] < found.pixels.high[0]
        assert (found.mean, found.std) == ((0.0,), (pytest.approx(1 / 255, rel=1e-5),))


def test_a_given_range_is_taken_for_every_channel_and_what_lies_beyond_is_told():
    images = wide()
    found = measure(source_of(images), Reading(2, dtype="uint16"), (0.0, 1000.0))
    assert found.pixels == PixelFacts(dtype="uint16", low=(0.0, 0.0), high=(1000.0, 1000.0))
    beyond = 100 * (images > 1000).mean()
    assert f"{beyond:.1f} % of the values lie beyond and are kept" in found.lines[0]
    np.testing.assert_allclose(found.mean, images.reshape(-1, 2).mean(axis=0) / 1000, atol=1e-6)
    with pytest.raises(SettingError, match=r"^value_range=.*one pair LOW HIGH, or 2 pairs for 2 channels"):
        measure(source_of(images), Reading(2, dtype="uint16"), (0.0, 1.0) * 3)


def test_nothing_is_read_if_nothing_is_to_be_found():
    found = measure(None, Reading(1, dtype="uint16"), (0.0, 4095.0), (0.5,), (0.2,), "as before")
    assert found.mean == (0.5,)
    assert "0 to 4095 of uint16 (as before)" in found.lines[0]
