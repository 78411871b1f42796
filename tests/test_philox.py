"""Philox4x32-10 against its published answers, and NumPy against PyTorch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae import philox

# The known answers that ship with Random123 (kat_vectors, philox4x32 10).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox.philox_numpy(np.array([counter], dtype=np.uint32), key)
    assert words.tolist() == [list(expected)]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 3),
    ids=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4),
    count=st.integers(1, 21),
)
def test_torch_draws_the_bits_of_numpy(seed, stream, ids, count):
    expected = philox.words_numpy(seed, stream, np.array(ids), count)
    assert torch.equal(
        philox.words_torch(seed, stream, torch.tensor(ids), count), torch.from_numpy(expected.astype(np.int64))
    )


def test_streams_and_ids_are_independent():
    ids = np.arange(500)
    draws = [philox.uniforms_numpy(seed, stream, ids, 8).ravel() for seed in (0, 1) for stream in (0, 1)]
    assert abs(np.corrcoef(draws) - np.eye(4)).max() < 0.06
    assert abs(np.mean(draws) - 0.5) < 0.01


def test_permutation_is_a_permutation_of_its_own():
    first, second = (philox.permutation_numpy(0, philox.STREAM_ORDER, epoch, 1000) for epoch in (0, 1))
    assert sorted(first) == list(range(1000))
    assert not np.array_equal(first, second)


def test_wrong_seed_is_refused():
    with pytest.raises(ValueError, match="seed"):
        philox.words_numpy(-1, 0, np.array([0]), 4)
