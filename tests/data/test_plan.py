"""Order, crops and flips: pure, fair, and the same for any number of ranks."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae.data.plan import (
    RATIO,
    Box,
    Shards,
    central_box,
    central_share,
    crop_draws,
    describe_order,
    holdout,
    is_flipped,
    mask_draws,
    micro_batches,
    plan_epoch,
    random_box,
    scattered_order,
    shuffle_quality,
    unseen_note,
)
from fastmae.philox import STREAM_ORDER, permutation_numpy


def test_ranks_share_a_global_batch():
    alone = plan_epoch(3, 5, 103, batch_size=12)
    assert len(alone) == 8
    for ranks in (2, 3, 4):
        parts = [plan_epoch(3, 5, 103, 12 // ranks, rank, ranks) for rank in range(ranks)]
        for k in range(len(alone)):
            indices, draw_ids = zip(*(part.batch(k) for part in parts), strict=True)
            assert np.array_equal(np.concatenate(indices), alone.batch(k)[0])
            assert np.array_equal(np.concatenate(draw_ids), alone.batch(k)[1])


def test_an_epoch_shows_every_sample_once_and_epochs_differ():
    first, second = (plan_epoch(0, epoch, 100, 10) for epoch in (0, 1))
    seen = np.concatenate([first.batch(k)[0] for k in range(len(first))])
    assert sorted(seen) == list(range(100))
    assert not np.array_equal(first.order, second.order)
    indices, draw_ids = second.batch(0)
    assert np.array_equal(draw_ids, 100 + indices)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4))
def test_with_keep_last_whole_steps_show_every_sample(length, batch_size, ranks, accum_iter):
    count = micro_batches(length, batch_size, ranks, accum_iter, keep_last=True)
    assert count % accum_iter == 0
    plans = [plan_epoch(0, 1, length, batch_size, rank, ranks) for rank in range(ranks)]
    seen = np.concatenate([plan.batch(k)[0] for k in range(count) for plan in plans])
    assert len(seen) == count * ranks * batch_size
    assert set(seen) == set(range(length))
    assert len(seen) - length < accum_iter * ranks * batch_size
    assert np.array_equal(seen[:length], plans[0].order)  # what is missing comes from the beginning
    assert micro_batches(length, batch_size, ranks, accum_iter) == length // (batch_size * ranks)


def test_every_crop_has_masks_of_its_own():
    length, epochs = 10, 3
    crops = np.concatenate([epoch * length + np.arange(length) for epoch in range(epochs)])
    assert np.array_equal(mask_draws(crops, length, 1), crops)
    draws = mask_draws(crops, length, 4)
    assert sorted(draws) == list(range(4 * length * epochs))
    # Those of a crop lie side by side, and a batch's are not those of another length of it.
    assert np.array_equal(mask_draws(crops[13:15], length, 4), draws[13 * 4 : 15 * 4])


def test_an_order_is_described_by_what_it_depends_on():
    full = describe_order(90, None)
    assert describe_order(90, shards_of([90], 3)) == describe_order(90, shards_of([30] * 3, 90)) == full
    scattered = [shards_of([30] * 3, 60), shards_of([30] * 3, 59), shards_of([20, 40, 30], 60)]
    assert len({full, *(describe_order(90, shards) for shards in scattered)}) == 4
    assert describe_order(90, shards_of([30] * 3, 60)) == describe_order(90, scattered[0])


# Resuming a run relies on these never changing.
GOLDEN_FULL = [58, 201, 172, 257, 349, 541, 884, 99]
GOLDEN = [610, 985, 849, 616, 559, 619, 554, 565]
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)
seeds = st.integers(0, 2**63 - 1)


def shards_of(lengths, window):
    return Shards(np.cumsum([0, *lengths]), window)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 500), seeds, st.integers(0, 1000), st.integers(1, 4), st.integers(1, 7))
def test_with_shards_too_every_sample_comes_once_and_ranks_share(lengths, window, seed, epoch, ranks, batch_size):
    shards, length = shards_of(lengths, window), sum(lengths)
    alone = plan_epoch(seed, epoch, length, batch_size * ranks, shards=shards)
    assert np.array_equal(np.sort(alone.order), np.arange(length))
    parts = [plan_epoch(seed, epoch, length, batch_size, rank, ranks, shards) for rank in range(ranks)]
    for k in range(len(alone)):
        indices, draw_ids = zip(*(part.batch(k) for part in parts), strict=True)
        assert np.array_equal(np.concatenate(indices), alone.batch(k)[0])
        assert np.array_equal(np.concatenate(draw_ids), epoch * length + np.concatenate(indices))


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 500), seeds)
def test_a_shard_stays_within_its_window(lengths, window, seed):
    """On the ring of places, two samples of a shard are never further apart than the window and the shards beside."""
    shards, length = shards_of(lengths, window), sum(lengths)
    window = min(window, length)
    place_of = np.argsort(scattered_order(seed, 0, shards))
    for first, last in zip(shards.starts, shards.starts[1:], strict=False):
        places = np.sort(place_of[first:last])
        gaps = np.diff(np.append(places, places[0] + length))
        assert length - gaps.max() <= 2 * window + max(lengths)


def openings(order, shards, held):
    """Returns how often a shard has to be opened if ``held`` of them stay open."""
    owner = np.repeat(np.arange(len(shards.starts) - 1), np.diff(shards.starts))
    kept, count = OrderedDict(), 0
    for shard in owner[order].tolist():
        count += shard not in kept
        kept[shard] = True
        kept.move_to_end(shard)
        if len(kept) > held:
            kept.popitem(last=False)
    return count


@settings(max_examples=15, deadline=None)
@given(st.integers(20, 60), st.integers(30, 80), st.integers(2, 9), seeds)
def test_shards_are_opened_once_but_for_those_at_the_end(count, each, window, seed):
    shards = shards_of([each] * count, window * each)
    order = scattered_order(seed, 3, shards)
    assert openings(order, shards, window + window // 4 + 4) <= count + window + 1
    full = permutation_numpy(seed, STREAM_ORDER, 3, count * each)
    assert openings(full, shards, window) > 5 * count


def test_the_shuffle_quality_is_that_of_the_docs():
    """The figures of docs/data.md: shards of 1000 with 64 of them open."""
    shards = shards_of([1000] * 320, 64_000)
    order = scattered_order(0, 0, shards)
    assert shuffle_quality(permutation_numpy(0, STREAM_ORDER, 0, 320_000), shards, 256) == pytest.approx(1, abs=0.01)
    assert shuffle_quality(np.arange(320_000), shards, 250) < 0.01
    assert shuffle_quality(order, shards, 64) == pytest.approx(0.70, abs=0.03)
    assert shuffle_quality(order, shards, 256) == pytest.approx(0.36, abs=0.03)
    # Beginning, middle and end alike, and all of those that are open with the same chance.
    owner = order // 1000
    for start in (0, 160_000, 319_000):
        present, counts = np.unique(owner[start : start + 1000], return_counts=True)
        assert 60 <= len(present) <= 66
        assert counts.max() < 40


def test_shards_do_not_change_the_full_shuffle():
    """The shuffle is full without shards, with a single one, and if all of them are open at once."""
    expected = permutation_numpy(5, STREAM_ORDER, 2, 90)
    assert expected[:6].tolist() == plan_epoch(5, 2, 90, 10).order[:6].tolist()
    for shards in (None, shards_of([90], 3), shards_of([30, 30, 30], 90)):
        assert np.array_equal(plan_epoch(5, 2, 90, 10, shards=shards).order, expected)
    assert not np.array_equal(plan_epoch(5, 2, 90, 10, shards=shards_of([30] * 3, 60)).order, expected)


def test_a_scattered_order_is_a_function_of_seed_and_epoch():
    shards = shards_of([30] * 50, 200)
    one = scattered_order(1, 2, shards)
    assert np.array_equal(one, scattered_order(1, 2, shards))
    assert not np.array_equal(one, scattered_order(1, 3, shards))
    assert not np.array_equal(one, scattered_order(2, 2, shards))
    assert one[:8].tolist() == GOLDEN
    assert plan_epoch(0, 0, 1000, 10).order[:8].tolist() == GOLDEN_FULL


def test_random_boxes_follow_the_recipe():
    height, width = 375, 500
    boxes = [random_box(draws, height, width, (0.2, 1.0)) for draws in crop_draws(0, np.arange(4000))]
    assert all(b.top >= 0 and b.top + b.height <= height for b in boxes)
    assert all(b.left >= 0 and b.left + b.width <= width for b in boxes)
    area = np.array([b.height * b.width for b in boxes]) / (height * width)
    ratio = np.array([b.width / b.height for b in boxes])
    assert 0.195 < area.min() < 0.21
    assert area.max() <= 1
    assert 0.74 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.35
    assert abs(area.mean() - area_of_the_recipe(height, width)) < 0.02
    tops = np.array([b.top / (height - b.height) for b in boxes if b.height < height - 50])
    assert abs(tops.mean() - 0.5) < 0.03


def area_of_the_recipe(height, width):
    """The mean share of the area by rejection with NumPy's generator: large, oblong crops often do not fit."""
    rng = np.random.default_rng(0)
    area = rng.uniform(0.2, 1, 100_000) * height * width
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 100_000))
    fits = (np.round((area * ratio) ** 0.5) <= width) & (np.round((area / ratio) ** 0.5) <= height)
    return area[fits].mean() / (height * width)


@pytest.mark.parametrize(("height", "width", "expected"), [(10, 100, (10, 13)), (100, 10, (13, 10)), (1, 1, (1, 1))])
def test_a_box_that_never_fits_becomes_the_central_one(height, width, expected):
    box = random_box(crop_draws(0, np.arange(1))[0], height, width, (1.0, 1.0))
    assert (box.height, box.width) == expected
    assert abs(2 * box.left + box.width - width) <= 1


# (height, width, scale): the first boxes of seed 7, as version 0.1 made them for every model.
FIRST_BOXES = {
    (375, 500, (0.2, 1.0)): [(37, 177, 334, 258), (57, 75, 232, 222), (55, 69, 307, 291), (101, 225, 250, 206)],
    (90, 120, (0.08, 1.0)): [(16, 47, 73, 56), (0, 27, 90, 89), (19, 18, 67, 64), (0, 5, 90, 101), (9, 49, 76, 57)],
    (16, 16, (0.7, 1.0)): [(0, 2, 16, 13), (1, 1, 15, 15), (1, 0, 15, 14), (0, 0, 15, 16), (0, 1, 13, 15)],
    (33, 200, (0.2, 1.0)): [(0, 78, 33, 44)] * 5,
    (41, 50, (1.0, 1.0)): [(0, 0, 41, 50)] * 5,
}


@pytest.mark.parametrize(("height", "width", "scale"), FIRST_BOXES)
@pytest.mark.parametrize("size", [(1, 1), (224, 224)])
def test_boxes_of_a_square_model_are_those_that_earlier_versions_made(height, width, scale, size):
    expected = FIRST_BOXES[height, width, scale]
    boxes = [random_box(draws, height, width, scale, size) for draws in crop_draws(7, np.arange(len(expected)))]
    assert boxes == [Box(*box) for box in expected]


@pytest.mark.parametrize(("height", "width"), [(32, 256), (128, 1000), (512, 64)])
def test_boxes_of_an_oblong_model_are_spread_over_images_of_its_shape(height, width):
    boxes = [random_box(draws, height, width, (0.2, 1.0), (height, width)) for draws in crop_draws(0, np.arange(2000))]
    area = np.array([b.height * b.width for b in boxes]) / (height * width)
    ratio = np.array([b.width / b.height for b in boxes]) / (width / height)
    assert abs(area.mean() - area_of_the_recipe(1000, 1000)) < 0.02
    assert 0.18 < area.min() < 0.22
    assert 0.7 < ratio.min() < 0.78
    assert 1.29 < ratio.max() < 1.43
    columns, rows = np.zeros(width), np.zeros(height)
    for box in boxes:
        columns[box.left : box.left + box.width] += 1
        rows[box.top : box.top + box.height] += 1
    assert columns.min() > 0  # the very edge is rare, as in square images
    assert rows.min() > 0
    assert columns[width // 10 : -width // 10].min() > 0.2 * len(boxes)
    assert len({(box.top, box.left, box.height, box.width) for box in boxes}) > 500


sides = st.integers(1, 1200)


@settings(max_examples=200, deadline=None)
@given(sides, sides, sides, sides, st.sampled_from([(0.2, 1.0), (0.08, 1.0), (0.7, 0.8)]), st.integers(0, 2**40))
def test_boxes_lie_in_the_image_and_keep_near_the_models_aspect_ratio(height, width, h, w, scale, draw_id):
    box = random_box(crop_draws(1, np.array([draw_id]))[0], height, width, scale, (h, w))
    assert box.top >= 0 and box.left >= 0  # noqa: PT018
    assert 0 < box.height <= height - box.top
    assert 0 < box.width <= width - box.left
    # Of sides rounded to pixels, some unrounded ones have a ratio within the bounds; a side of 1 may have been less.
    low, high = (bound * w / h for bound in RATIO)
    if height == h == 1 < w:
        return  # a series: its crops are shares of the width
    assert (box.width + 0.5) / max(box.height - 0.5, 1e-9) >= low * 0.999 or box.width == width
    assert box.width == 1 or (box.width - 0.5) / (box.height + 0.5) <= high * 1.001


@settings(max_examples=200, deadline=None)
@given(sides, sides, sides, sides, st.integers(0, 2**40))
def test_with_a_scale_of_1_an_oblong_model_trains_on_the_region_that_evaluation_sees(height, width, h, w, draw_id):
    draws = crop_draws(1, np.array([draw_id]))[0]
    if h != w:
        share = central_share("folder", (h, w))
        assert random_box(draws, height, width, (1.0, 1.0), (h, w)) == central_box(height, width, (h, w), share)
        assert random_box(draws, h, w, (1.0, 1.0), (h, w)) == Box(0, 0, h, w)


@pytest.mark.parametrize(
    ("kind", "size", "share"),
    [("folder", (224, 224), 0.875), ("folder", (32, 256), 1), ("array", (224, 224), 1), ("digits", (8, 8), 1)],
)
def test_evaluation_takes_the_official_share_of_photographs_and_all_of_arrays_and_oblong_images(kind, size, share):
    assert central_share(kind, size) == share


def test_images_of_another_shape_than_the_model_are_told_with_the_share_that_a_crop_sees():
    assert unseen_note((375, 500), (224, 224)) is None
    assert unseen_note((128, 1000), (128, 1024)) is None
    note = unseen_note((32, 256), (224, 224))
    assert note == (
        "images of 32×256 (height×width) on a model of 224×224: a crop sees at most 17% of an image; "
        "give --input_size the images' shape"
    )
    assert "224×224 (height×width) on a model of 32×256: a crop sees at most 17%" in unseen_note((224, 224), (32, 256))


def test_half_of_the_samples_are_flipped():
    flips = [is_flipped(draws) for draws in crop_draws(0, np.arange(4000))]
    assert abs(np.mean(flips) - 0.5) < 0.03


def test_central_box_keeps_the_aspect_ratio():
    assert central_box(100, 200, (50, 50)).__dict__ == dict(top=0, left=50, height=100, width=100)
    assert central_box(100, 200, (50, 100), 0.5).__dict__ == dict(top=25, left=50, height=50, width=100)
    assert central_box(1, 1, (16, 16), 0.875).__dict__ == dict(top=0, left=0, height=1, width=1)


def test_holdout_is_a_fixed_partition():
    kept, held = holdout(1797)
    assert len(held) == 359
    assert sorted([*kept, *held]) == list(range(1797))
    assert np.array_equal(held, holdout(1797)[1])
