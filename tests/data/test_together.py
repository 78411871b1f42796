"""Rows that are read at once: the bits of rows that are read one by one, and the same rows are found unusable."""

import numpy as np
import pytest
import torch

from fastmae.data.augment import RandAugment
from fastmae.data.decoders import threads
from fastmae.data.loader import View, load_batches
from fastmae.data.reading import Reading
from fastmae.data.sources import ArraySource, Concat, Subset, open_train
from fastmae.data.together import reads_together
from fastmae.errors import UserError

ROWS = np.random.default_rng(0).normal(size=(50, 1, 1, 7)).astype(np.float32)
ROWS[3, 0, 0, 2] = np.nan
SIZES = [(ROWS, "float32"), (np.random.default_rng(1).integers(0, 256, (50, 4, 5, 2), dtype=np.uint8), "uint8")]


def loaded(source, view):
    requests = [(np.arange(first, first + 8) % len(source), np.arange(8) + first) for first in range(0, 24, 8)]
    return list(load_batches(source, iter(requests), view, device=torch.device("cpu"), num_workers=2))


def both(source, view, monkeypatch):
    """Loads batches at once, and one by one."""
    assert reads_together(source, view) is not None
    together = loaded(source, view)
    with monkeypatch.context() as patch:
        patch.setattr(threads, "reads_together", lambda *_: None)
        return together, loaded(source, view)


@pytest.mark.parametrize(("images", "dtype"), SIZES, ids=["rows", "images"])
@pytest.mark.parametrize("kind", ["array", "file", "subset", "concat"])
@pytest.mark.parametrize("seed", [None, 5])
def test_batches_are_those_of_rows_that_are_read_one_by_one(images, dtype, kind, seed, monkeypatch, tmp_path):
    source = ArraySource(images, None, "x")
    if kind == "file":
        np.save(tmp_path / "x.npy", images)
        source = open_train(str(tmp_path / "x.npy"))
    elif kind == "subset":
        source = Subset(source, np.array([9, 3, 40, 7, 11]))
    elif kind == "concat":
        source = Concat((source, Subset(source, np.array([2, 3]))))
    view = View(images.shape[1:3], Reading(images.shape[3], dtype=dtype), seed=seed)
    for at_once, one_by_one in zip(*both(source, view, monkeypatch), strict=True):
        assert np.array_equal(at_once.images.numpy(), one_by_one.images.numpy(), equal_nan=dtype == "float32")
        assert torch.equal(at_once.draw_ids, one_by_one.draw_ids)
        assert at_once.bytes_read == one_by_one.bytes_read


def test_a_row_with_an_infinite_number_is_replaced_and_told(monkeypatch):
    rows = ROWS.copy()
    rows[10, 0, 0, 1] = np.inf
    view = View((1, 1), Reading(7, dtype="float32"), seed=0)
    for at_once, one_by_one in zip(*both(ArraySource(rows, None, "x"), view, monkeypatch), strict=True):
        assert np.array_equal(at_once.images.numpy(), one_by_one.images.numpy(), equal_nan=True)
        assert at_once.skipped == one_by_one.skipped
    assert loaded(ArraySource(rows, None, "x"), view)[1].skipped[0].index == 10


def test_a_file_that_changes_during_a_run_is_noticed(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, ROWS)
    source = open_train(str(path))
    np.save(path, ROWS + 1)
    with pytest.raises(UserError, match="changed during the run"):
        source.rows(np.arange(3))


@pytest.mark.parametrize(
    "view",
    [
        View((1, 1), Reading(7, dtype="float32"), seed=0, flip=True),
        View((1, 1), Reading(7, dtype="float32"), seed=0, scale=(0.5, 1.0)),
        View((1, 1), Reading(7, dtype="float32"), central_share=0.875),
        View((1, 1), Reading(7, dtype="float32"), seed=0, augment=RandAugment(9, 2, 0.5, 0, (0.5,) * 7)),
        View((2, 2), Reading(7, dtype="float32")),
        View((1, 1), Reading(3, dtype="float32")),
        View((1, 1), Reading(7)),
    ],
    ids=["flips", "crops", "a part", "augmented", "another size", "other channels", "another type"],
)
def test_what_changes_rows_is_done_one_by_one(view):
    assert reads_together(ArraySource(ROWS, None, "x"), view) is None
