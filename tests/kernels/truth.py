"""The rule by which a kernel is right, shared by the values_*.py files.

A kernel is no further from the float64 truth than torch is in the same dtype, plus a few roundings of float32. Triton's
interpreter truncates to bfloat16 where a GPU rounds, so there (alone) a bfloat16 may be one number further away.
"""

import pytest
import torch
from device import DEVICE

ROUNDINGS = 4 * torch.finfo(torch.float32).eps


def assert_as_close(got, same_dtype, truth, unit):
    """``unit`` is the size of the numbers that go into ``truth``, whose float32 roundings are forgiven."""
    assert not got.isnan().any(), "an element was not written"
    # Twice: a rounding of float32 may tip the one to got.dtype to the other neighbour, when both are as far away.
    allowed = (same_dtype.double() - truth).abs() + 2 * ROUNDINGS * (unit + truth.abs())
    if got.dtype == torch.bfloat16 and DEVICE == "cpu":
        allowed += torch.finfo(torch.bfloat16).eps * truth.abs()
    assert ((got.double() - truth).abs() <= allowed).all()


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh floating outputs are NaN and fresh uint8 ones 77, so that an element which is never written shows."""
    for name in ("empty", "empty_like"):
        create = getattr(torch, name)

        def poisoned(*args, _create=create, **options):
            fresh = _create(*args, **options)
            return fresh.fill_(float("nan") if fresh.is_floating_point() else 77)

        monkeypatch.setattr(torch, name, poisoned)
