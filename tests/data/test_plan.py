"""Order, crops and flips: pure, fair, and the same for any number of ranks."""

import numpy as np
import pytest

from fastmae.data.plan import central_box, crop_draws, holdout, is_flipped, plan_epoch, random_box


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
