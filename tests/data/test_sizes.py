"""Which size an epoch has is a function of the epoch alone, and a smaller crop is the same crop with fewer pixels."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae.data.loader import View, load_batches
from fastmae.data.reading import Reading
from fastmae.data.sizes import MAX_SIZES, describe_sizes, growing_sizes, size_in
from fastmae.data.sources import ArraySource

PATCHES = st.integers(1, 40)


@settings(deadline=None)
@given(st.tuples(PATCHES, PATCHES), st.tuples(PATCHES, PATCHES), st.sampled_from([(16, 16), (4, 4), (14, 8)]))
def test_sizes_grow_from_the_first_to_the_last_in_whole_patches(one, other, unit):
    start, full = (tuple((choose(one, other) * unit).tolist()) for choose in (np.minimum, np.maximum))
    if start == full:
        with pytest.raises(ValueError, match="less than"):
            growing_sizes(start, full, unit)
        return
    sizes = growing_sizes(start, full, unit)
    assert (sizes[0], sizes[-1]) == (start, full)
    assert 2 <= len(sizes) <= MAX_SIZES
    steps = np.diff(np.array(sizes), axis=0)
    assert (steps >= 0).all()
    assert (steps.sum(axis=1) > 0).all()
    assert (steps % unit == 0).all()


@settings(deadline=None)
@given(st.integers(2, MAX_SIZES), st.integers(1, 300))
def test_the_sizes_before_the_last_share_the_epochs_of_growth(number, grow_epochs):
    sizes = [(16 * n, 16 * n) for n in range(1, number + 1)]
    seen = [size_in(epoch, sizes, grow_epochs) for epoch in range(grow_epochs + 3)]
    assert seen == sorted(seen)
    assert seen[0] == sizes[0]
    assert sizes[-1] not in seen[:grow_epochs]
    assert seen[grow_epochs:] == [sizes[-1]] * 3
    counts = [seen[:grow_epochs].count(size) for size in sizes[:-1]]
    assert max(counts) - min(counts) <= 1


def test_without_growth_every_epoch_has_the_size_of_the_model():
    assert {size_in(epoch, [(224, 224)], 0) for epoch in range(9)} == {(224, 224)}


def test_from_128_to_224_pixels_by_patches_of_16():
    sizes = growing_sizes((128, 128), (224, 224), (16, 16))
    assert [size[0] for size in sizes] == [128, 144, 160, 176, 192, 208, 224]
    description = describe_sizes(sizes, 320, 400)
    assert description.startswith("128×128 for 54, then 144×144 for 53, ")
    assert description.endswith("then 224×224 for 80 epochs")
    assert growing_sizes((96, 128), (192, 256), (96, 128)) == ((96, 128), (192, 256))
    assert describe_sizes([(8, 8), (12, 12), (16, 16)], 1, 3) == "8×8 for 1, then 16×16 for 2 epochs"


@pytest.mark.parametrize("start", [(120, 128), (240, 240), (128, 240), (0, 128), (-16, 128)])
def test_a_start_that_cannot_grow_is_refused(start):
    with pytest.raises(ValueError, match="must be"):
        growing_sizes(start, (224, 224), (16, 16))


def test_crops_of_another_size_are_the_same_regions():
    """The mean of a crop says where it lies, as the images grow brighter from left to right or from top to bottom."""
    ramp = np.arange(0, 240, 2, dtype=np.uint8)
    images = np.stack([np.broadcast_to(ramp, (120, 120)), np.broadcast_to(ramp[:, None], (120, 120))] * 8)[..., None]
    view = View((48, 48), Reading(1), seed=3, scale=(0.2, 0.6), flip=True)
    source, draws = ArraySource(images, None, "ramps"), np.arange(len(images))

    def means(size):
        request = (draws, draws.copy())
        options = dict(device=torch.device("cpu"), num_workers=1)
        (batch,) = load_batches(source, [request], dataclasses.replace(view, size=size), **options)
        assert batch.images.shape == (len(images), *size, 1)
        return batch.images.double().mean(dim=(1, 2, 3))

    full = means((48, 48))
    assert full.std() > 20, "crops lie in different places"
    for size in ((24, 24), (36, 36)):
        assert (means(size) - full).abs().max() < 1
    assert (means((32, 40)) - full).abs().max() > 1, "other proportions are other regions"
