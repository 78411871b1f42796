"""Photometric distortion: what each of its four changes does, and that the draw alone decides it."""

import colorsys

import numpy as np
import pytest
import torch

from fastmae.data.arrays import ArraySource
from fastmae.data.distort import DRAWS, HUE, Distortion
from fastmae.data.label_maps import MappedSource, MapReading
from fastmae.data.loader import View, load_batches
from fastmae.data.reading import Reading

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def draws(**amounts):
    """The draws that do what is named, each as far as its number in 0 to 1 says."""
    row = np.ones(DRAWS)
    for place, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        if name in amounts:
            row[place], row[4 + place] = 0, amounts[name]
    row[8] = 0 if amounts.get("first", True) else 1
    return row


def test_nothing_that_is_not_drawn_is_changed():
    np.testing.assert_array_equal(Distortion(0)(PIXELS, draws()), PIXELS)


@pytest.mark.parametrize("first", [True, False])
def test_brightness_is_added_and_contrast_multiplies(first):
    wide = PIXELS.astype(float)
    assert (Distortion(0)(PIXELS, draws(brightness=1, first=first)) == (wide + 32).clip(0, 255)).all()
    assert (Distortion(0)(PIXELS, draws(brightness=0, first=first)) == (wide - 32).clip(0, 255)).all()
    assert (Distortion(0)(PIXELS, draws(contrast=0, first=first)) == (wide * 0.5).round()).all()
    both = Distortion(0)(PIXELS, draws(brightness=1, contrast=1, first=first))
    assert (both == ((wide + 32).clip(0, 255) * 1.5).clip(0, 255).round()).all()


def test_saturation_and_hue_are_those_of_colours():
    def hsv(pixels):
        return np.array([colorsys.rgb_to_hsv(*pixel / 255) for pixel in pixels.reshape(-1, 3)])

    before, coloured = hsv(PIXELS), PIXELS.reshape(-1, 3).max(axis=1) > 60
    turned = hsv(Distortion(0)(PIXELS, draws(hue=1)))
    further = (turned[:, 0] - before[:, 0] - HUE + 0.5) % 1 - 0.5
    assert np.median(abs(further[coloured])) < 0.01
    np.testing.assert_allclose(turned[coloured, 1:], before[coloured, 1:], atol=0.04)
    paler = hsv(Distortion(0)(PIXELS, draws(saturation=0)))
    np.testing.assert_allclose(paler[coloured, 1], before[coloured, 1] / 2, atol=0.04)
    gray = np.repeat(PIXELS[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(Distortion(0)(gray, draws(saturation=1, hue=0.2)), gray)


def test_each_change_comes_in_half_of_the_draws():
    wanted = Distortion(3).draws(np.arange(4000))[:, :4] < 0.5
    np.testing.assert_allclose(wanted.mean(axis=0), 0.5, atol=0.04)


def test_images_of_a_batch_are_distorted_by_their_draw_and_their_maps_are_not():
    maps = np.arange(20 * 30, dtype=np.uint8).reshape(1, 20, 30) % 200
    source = MappedSource(ArraySource(PIXELS[None], None, "x"), maps)

    def batch(draw_ids, workers):
        view = View((20, 30), Reading(3), seed=0, random_scale=(1, 1), maps=MapReading(), augment=Distortion(1))
        numbers = np.array(draw_ids)
        return next(load_batches(source, iter([(numbers * 0, numbers)]), view, device=torch.device("cpu"),
                                 num_workers=workers))  # fmt: skip

    one = batch([5, 6, 7, 8], 1)
    assert torch.equal(one.images.flip(0), batch([8, 7, 6, 5], 2).images)
    expected = Distortion(1)(PIXELS, Distortion(1).draws(np.array([7]))[0])
    np.testing.assert_array_equal(one.images[2].numpy(), expected)
    np.testing.assert_array_equal(one.maps[2].numpy(), maps[0])
    assert len({image.numpy().tobytes() for image in one.images}) > 1
