"""Augmentations are pure functions of the draw, have the published distributions, and say what they cannot do."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.data.augment import (
    CHANCE,
    OPERATIONS,
    BatchAugment,
    RandAugment,
    erased_boxes,
    mixed_pairs,
    parse_randaugment,
)
from fastmae.data.loader import View, load_batches
from fastmae.data.reading import Reading
from fastmae.data.sources import ArraySource
from fastmae.errors import UserError

PUBLISHED = "rand-m9-mstd0.5-inc1"


def normalise(images):
    return ((images / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)


def picture(channels=3, height=24, width=20):
    y, x = np.mgrid[:height, :width]
    planes = [(5 * y + 3 * x) % 200 + 20, (9 * x) % 180 + 30, (7 * y) % 160 + 40]
    return np.stack(planes[:channels], axis=2).astype(np.uint8)


def batch(**changes):
    flags = dict(seed=0, num_classes=4, smoothing=0.1, reprob=0.0, mixup=0.0, cutmix=0.0, switch=0.5)
    return BatchAugment(**{**flags, **changes})


def some(count=8, size=16):
    images = torch.randint(
        0, 256, (count, size, size, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return images, torch.arange(count) % 4, np.arange(100, 100 + count)


# --- RandAugment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_a_pure_function_of_the_draw(channels):
    change = parse_randaugment(PUBLISHED, 0, (0.5,) * channels)
    draws = change.draws(np.arange(30))
    first = [change(picture(channels), row) for row in draws]
    assert all(image.shape == picture(channels).shape and image.dtype == np.uint8 for image in first)
    alone = [change(picture(channels), change.draws(np.array([draw]))[0]) for draw in range(30)]
    assert all(np.array_equal(one, other) for one, other in zip(first, alone, strict=True))
    assert len({image.tobytes() for image in first}) > 10
    other = parse_randaugment(PUBLISHED, 1, (0.5,) * channels)
    assert not np.array_equal(other.draws(np.arange(30)), draws)


def test_every_operation_is_drawn_equally_often_and_done_half_of_the_time(monkeypatch):
    done = []
    marks = tuple(lambda image, strength, fill, i=i: done.append((i, strength)) or image for i in range(15))
    monkeypatch.setattr("fastmae.data.augment.OPERATIONS", marks)
    change = RandAugment(magnitude=9.0, number=2, deviation=0.5, seed=0, mean=(0.5,) * 3)
    for row in change.draws(np.arange(6000)):
        change(picture(), row)
    counts = np.bincount([i for i, _ in done], minlength=15)
    assert len(done) / 12_000 == pytest.approx(CHANCE, abs=0.02)
    assert np.abs(counts / len(done) - 1 / 15).max() < 0.012
    strength = np.array([value for _, value in done])
    assert np.abs(strength).max() <= 1
    assert (strength > 0).mean() == pytest.approx(0.5, abs=0.03)
    below = np.abs(strength)[np.abs(strength) < 1]
    assert np.median(np.abs(strength)) == pytest.approx(0.9, abs=0.005)
    assert np.quantile(below, 0.1) == pytest.approx(0.9 - 1.28 * 0.05, abs=0.02)


def test_operations_do_what_the_paper_says_at_magnitude_9():
    image = Image.fromarray(np.full((10, 10, 3), 100, np.uint8))
    fill = (1, 2, 3)

    def centre(number, strength=0.9):
        return np.asarray(OPERATIONS[number](image, strength, fill))[5, 5, 0]

    assert centre(2) == 155  # invert
    assert centre(4) == 100 & 0b10000000  # posterize to 4 − 3 bits
    assert centre(5) == 155  # solarize from 256 − 230 on
    assert centre(6) == 199  # 99 are added below 128
    assert (centre(9), centre(9, -0.9)) == (181, 19)  # brightness 1 ± 0.81
    ramp = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8)[:, None], (1, 100))[..., None].repeat(3, axis=2))
    moved = np.asarray(OPERATIONS[14](ramp, 0.5, fill))
    assert np.abs(moved[:70, 50, 0].astype(int) - (np.arange(70) + 22)).max() <= 1  # 0.5 · 0.45 of 100 rows
    assert tuple(moved[99, 50]) == fill
    left = np.asarray(OPERATIONS[3](ramp, 1.0, fill))  # 30 degrees, counter-clockwise
    assert tuple(left[0, 0]) == fill
    assert left[50, 20, 0] < left[50, 80, 0]


@pytest.mark.parametrize("strength", [-1.0, 0.0, 1.0])
def test_every_operation_takes_every_strength(strength):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for operation in OPERATIONS:
        assert operation(image, strength, (0, 0, 0)).size == image.size


@pytest.mark.parametrize(
    "text", ["rand", "rand-m11-inc1", "rand-m9", "rand-m9-n0-inc1", "augmix-m3", "rand-m9-inc1-w0"]
)
def test_an_unknown_policy_is_refused_with_the_right_form(text):
    with pytest.raises(UserError, match=f"^aa='{text}': must be rand-mM"):
        parse_randaugment(text, 0, (0.5,) * 3)


def test_a_policy_says_magnitude_number_and_deviation():
    assert parse_randaugment("", 0, (0.5,)) is None
    assert parse_randaugment(PUBLISHED, 3, (0.5,)) == RandAugment(9.0, 2, 0.5, 3, (0.5,))
    assert parse_randaugment("rand-m7.5-n3-inc1", 3, (0.5,)) == RandAugment(7.5, 3, 0.0, 3, (0.5,))
    with pytest.raises(UserError, match="1 or 3 channels, not 5; leave it empty"):
        parse_randaugment(PUBLISHED, 0, (0.5,) * 5)


def test_the_loader_augments_each_draw_in_its_threads():
    source = ArraySource(np.stack([picture()] * 12), np.zeros(12, np.int64), "x")
    change = parse_randaugment(PUBLISHED, 0, (0.5,) * 3)
    view = View((24, 20), Reading(3), seed=None, augment=change)
    asked = [(np.arange(start, start + 6), np.arange(start, start + 6) + 40) for start in (0, 6)]
    load = load_batches(source, asked, view, device=torch.device("cpu"), num_workers=3)
    images = torch.cat([one.images for one in load]).numpy()
    expected = [change(picture(), row) for row in change.draws(np.arange(40, 52))]
    assert all(np.array_equal(image, one) for image, one in zip(images, expected, strict=True))


# --- a batch ----------------------------------------------------------------------------------------------------------


def test_without_pixels_to_change_images_stay_uint8_and_labels_are_smoothed():
    images, labels, draw_ids = some()
    same, targets = batch()(images, labels, draw_ids, normalise)
    assert same is images
    assert targets[1].tolist() == pytest.approx([0.025, 0.925, 0.025, 0.025])
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


def test_a_batch_may_be_split_between_pairs_without_a_change():
    images, labels, draw_ids = some()
    augment = batch(reprob=0.5, mixup=0.8, cutmix=1.0)
    whole = augment(images, labels, draw_ids, normalise)
    halves = [augment(images[part], labels[part], draw_ids[part], normalise) for part in (slice(4), slice(4, 8))]
    for k in (0, 1):
        assert torch.equal(whole[k], torch.cat([half[k] for half in halves]))
    other = batch(reprob=0.5, mixup=0.8, cutmix=1.0, seed=1)(images, labels, draw_ids, normalise)
    assert not torch.equal(whole[0], other[0])


def test_mixup_blends_neighbours_and_their_targets_in_the_same_shares():
    images, labels, draw_ids = some()
    plain, own = (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25, batch().targets(labels)
    mixed, targets = batch(mixup=0.8)(images, labels, draw_ids, normalise)
    shares, _ = mixed_pairs(0, draw_ids[::2], 0.8, 0.0, 0.5, (16, 16))
    for i in range(8):
        share = float(shares[i // 2])
        torch.testing.assert_close(mixed[i], share * plain[i] + (1 - share) * plain[i ^ 1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(targets[i], share * own[i] + (1 - share) * own[i ^ 1])


def test_cutmix_puts_a_region_of_the_neighbour_in_and_its_area_into_the_targets():
    images, labels, draw_ids = some()
    plain, own = (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25, batch().targets(labels)
    mixed, targets = batch(cutmix=1.0)(images, labels, draw_ids, normalise)
    for i in range(8):
        from_neighbour = (mixed[i] == plain[i ^ 1]) & (mixed[i] != plain[i])
        assert torch.equal(torch.where(from_neighbour, plain[i ^ 1], plain[i]), mixed[i])
        kept = 1 - from_neighbour.float().mean()
        torch.testing.assert_close(targets[i], kept * own[i] + (1 - kept) * own[i ^ 1], rtol=0, atol=0.02)


@pytest.mark.parametrize("alpha", [0.8, 1.0, 3.0])
def test_shares_are_beta_distributed(alpha):
    shares, boxes = mixed_pairs(0, np.arange(20_000), alpha, 0.0, 0.5, (32, 32))
    assert not boxes.any()
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.004)


def test_half_of_the_pairs_are_cut_if_both_are_on():
    shares, boxes = mixed_pairs(0, np.arange(20_000), 0.8, 1.0, 0.5, (64, 48))
    cut = boxes[:, 2] > 0
    assert cut.mean() == pytest.approx(0.5, abs=0.03)  # a few cuts are empty
    np.testing.assert_allclose(shares[cut], 1 - boxes[cut, 2] * boxes[cut, 3] / (64 * 48), rtol=1e-5)
    assert (boxes[:, :2] >= 0).all()
    assert ((boxes[:, 0] + boxes[:, 2] <= 64) & (boxes[:, 1] + boxes[:, 3] <= 48)).all()
    assert boxes[cut, 2].max() > 50


def test_a_quarter_of_the_images_lose_a_region_to_normal_noise():
    images, labels, draw_ids = (
        torch.full((400, 32, 32, 1), 128, dtype=torch.uint8),
        torch.zeros(400).long(),
        np.arange(400),
    )
    erased, _ = batch(reprob=0.25)(images, labels, draw_ids, normalise)
    changed = erased != erased.flatten().mode().values
    lost = changed.flatten(1).any(dim=1)
    assert lost.float().mean() == pytest.approx(0.25, abs=0.06)
    area = changed[lost].flatten(1).float().mean(dim=1)
    assert area.min() > 0.015
    assert area.max() < 0.35
    noise = erased[changed]
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    rows, boxes, _ = erased_boxes(0, draw_ids, 0.25, (32, 32))
    assert torch.equal(lost.nonzero()[:, 0], torch.from_numpy(rows))
    assert [int(mask.sum()) for mask in changed[lost]] == (boxes[:, 2] * boxes[:, 3]).tolist()


def test_two_erased_regions_have_other_noise():
    images, labels, draw_ids = torch.zeros(64, 32, 32, 1, dtype=torch.uint8), torch.zeros(64).long(), np.arange(64)
    erased, _ = batch(reprob=1.0)(images, labels, draw_ids, normalise)
    values = [row[row != row.mode().values].flatten() for row in erased.flatten(1)]
    firsts = [tuple(value[:3].tolist()) for value in values]
    assert len(set(firsts)) == len(firsts)
