"""bernoulli_masking: C++, PyTorch and NumPy give the same bits, and no row is without a target."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae.ops.bernoulli_masking import bernoulli_masking, bernoulli_masking_reference, expected_masked
from fastmae.philox import STREAM_BERNOULLI, words_numpy


def _by_numpy(draw_ids, seed, features, mask_ratio):
    words = words_numpy(seed, STREAM_BERNOULLI, draw_ids, features).astype(np.int64)
    masked = words < round(mask_ratio * 2**32)
    rows = np.arange(len(masked))
    masked[rows, words.argmin(axis=1)] = True
    largest = features - 1 - words[:, ::-1].argmax(axis=1)  # of equal words the last
    masked[rows, largest] = False
    return masked


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4),
    features=st.one_of(st.integers(2, 70), st.sampled_from([784, 4099])),
    mask_ratio=st.sampled_from([1e-12, 0.01, 0.3, 0.5, 0.75, 1 - 1e-12]),
)
def test_cpp_and_pytorch_and_numpy_give_the_same_bits(seed, ids, features, mask_ratio):
    draw_ids = torch.tensor(ids)
    masked = bernoulli_masking(draw_ids, seed, features, mask_ratio)
    assert masked.dtype == torch.bool
    assert torch.equal(masked, bernoulli_masking_reference(draw_ids, seed, features, mask_ratio))
    assert np.array_equal(masked.numpy(), _by_numpy(draw_ids.numpy(), seed, features, mask_ratio))


def test_a_row_depends_on_its_id_and_the_seed_alone():
    masked = bernoulli_masking(torch.arange(64), 7, 30, 0.5)
    assert torch.equal(masked[10:20], bernoulli_masking(torch.arange(10, 20), 7, 30, 0.5))
    assert torch.equal(masked[::3], bernoulli_masking(torch.arange(64)[::3], 7, 30, 0.5))
    assert not torch.equal(masked, bernoulli_masking(torch.arange(64), 8, 30, 0.5))
    assert bernoulli_masking(torch.arange(0), 7, 30, 0.5).shape == (0, 30)


@pytest.mark.parametrize("mask_ratio", [0.05, 0.3, 0.75])
def test_every_row_has_a_masked_and_a_visible_feature(mask_ratio):
    masked = bernoulli_masking(torch.arange(5000), 0, 3, mask_ratio)
    assert masked.any(dim=1).all()
    assert not masked.all(dim=1).any()


@pytest.mark.parametrize(("features", "mask_ratio"), [(2, 0.3), (4, 0.3), (5, 0.9), (40, 0.5)])
def test_features_are_masked_as_often_as_expected_and_independently(features, mask_ratio):
    N = 40_000
    masked = bernoulli_masking(torch.arange(N), 3, features, mask_ratio).double()
    expected = expected_masked(features, mask_ratio)
    assert (masked.mean(dim=0) - expected / features).abs().max() < 5 * 0.5 / N**0.5
    if features == 40:
        assert (masked.T.corrcoef() - torch.eye(features)).abs().max() < 6 / N**0.5


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"features": 1}, "features"),
        ({"features": 2**20 + 1}, "features"),
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"mask_ratio": float("nan")}, "mask_ratio"),
        ({"seed": -1}, "seed"),
        ({"draw_ids": torch.arange(3, dtype=torch.int32)}, "int64"),
        ({"draw_ids": torch.zeros(2, 2, dtype=torch.int64)}, "shape"),
    ],
)
def test_wrong_arguments_are_named(wrong, problem):
    arguments = {"draw_ids": torch.arange(3), "seed": 0, "features": 9, "mask_ratio": 0.5} | wrong
    with pytest.raises(ValueError, match=problem):
        bernoulli_masking(**arguments)


def test_it_is_a_well_behaved_torch_op():
    torch.library.opcheck(torch.ops.fastmae.bernoulli_masking.default, (torch.arange(5), 3, 49, 2**31))
