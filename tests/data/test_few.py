"""Few labels: which images of each class are learnt from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae.data.few import few_labelled, shown_amount, with_few_labels
from fastmae.data.sources import ArraySource, Subset


def source_of(labels):
    labels = np.asarray(labels)
    pixels = np.zeros((len(labels), 4, 4, 1), np.uint8)
    return ArraySource(pixels, labels, "arrays")


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=80),
    st.integers(0, 2**63 - 1),
    st.integers(1, 12),
    st.integers(0, 12),
    st.floats(0.001, 1),
)
def test_a_smaller_draw_is_among_a_larger_one_and_every_class_has_its_own_number(labels, seed, shots, more, share):
    labels = np.array(labels)
    few, many = few_labelled(labels, shots, seed), few_labelled(labels, shots + more, seed)
    assert np.isin(few, many).all()
    assert (np.diff(few) > 0).all()
    for number, count in zip(*np.unique(labels, return_counts=True), strict=True):
        assert (labels[few] == number).sum() == min(shots, count)
        part = few_labelled(labels, share, seed)
        assert (labels[part] == number).sum() == max(1, int(np.floor(count * share + 0.5)))
        # Of any two amounts, of whichever kind, one is the beginning of the other.
        its = np.isin(np.flatnonzero(labels == number), part), np.isin(np.flatnonzero(labels == number), few)
        assert (its[0] <= its[1]).all() or (its[1] <= its[0]).all()


def test_what_is_drawn_of_a_class_depends_on_the_seed_and_on_no_other_class():
    labels = np.arange(300) % 3
    assert not np.array_equal(few_labelled(labels, 5, 0), few_labelled(labels, 5, 1))
    others = np.where(labels == 1, 1, 7 + labels)
    first, second = few_labelled(labels, 5, 0), few_labelled(others, 5, 0)
    assert np.array_equal(first[labels[first] == 1], second[others[second] == 1])
    # As in every release: results with few labels can be compared.
    assert few_labelled(np.arange(12) % 2, 2, 3).tolist() == [2, 6, 9, 11]


def test_every_image_is_drawn_about_as_often_as_any_other():
    labels = np.zeros(20, np.int64)
    times = np.bincount(np.concatenate([few_labelled(labels, 5, seed) for seed in range(400)]), minlength=20)
    assert times.sum() == 2000
    assert times.min() > 60
    assert times.max() < 140


def test_classes_with_too_few_images_are_told_with_their_number():
    some = with_few_labels(source_of([0] * 9 + [1] * 2 + [2] * 3), 5, 0)
    assert isinstance(some, Subset)
    assert np.bincount(some.labels).tolist() == [5, 2, 3]
    assert some.stock.notes == ("2 classes with fewer than 5 images (1 has 2): all of them are taken",)
    share = with_few_labels(source_of([0] * 90 + [1] * 10), 0.02, 0)
    assert np.bincount(share.labels).tolist() == [2, 1]
    assert share.stock.notes == ("1 class with fewer than 1 image in this share (1 has 10): one of each is taken",)
    assert with_few_labels(source_of([0] * 9 + [1] * 5), 5, 0).stock.notes == ()


@pytest.mark.parametrize(("amount", "text"), [(1, "1 per class"), (1000, "1,000 per class"), (0.015, "1.5 %")])
def test_an_amount_in_words(amount, text):
    assert shown_amount(amount) == text
