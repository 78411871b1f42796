"""Which implementation runs where; that all give the same is in test_patches.py, test_cpu.py and tests/kernels."""

import pytest
import torch

from fastmae.ops import gather_patches
from fastmae.ops.backends import Backends, asked_backends, describe_ops, ops_backend, set_backends, using

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_is_what_is_made_for_the_device():
    assert asked_backends() == Backends()
    assert ops_backend(CPU) == "cpu"
    assert ops_backend(CUDA) == "triton"
    assert ops_backend(torch.device("meta")) == "reference"
    assert describe_ops(CPU).startswith("C++ (")


def test_float64_is_left_to_the_reference():
    assert ops_backend(CPU, torch.uint8, torch.float64) == "reference"
    assert ops_backend(CPU, torch.uint8, torch.float32) == "cpu"


def test_a_choice_holds_until_it_is_taken_back():
    with using(ops="reference"):
        assert ops_backend(CPU) == "reference"
        assert describe_ops(CPU) == "PyTorch, asked for"
        with using(attention="sdpa"):
            assert asked_backends() == Backends(ops="reference", attention="sdpa")
    assert asked_backends() == Backends()
    set_backends(Backends(ops="reference"))
    try:
        assert ops_backend(CPU) == "reference"
    finally:
        set_backends(Backends())


@pytest.mark.parametrize(
    ("asked", "device", "words"),
    [("triton", CPU, "needs Triton and a CUDA device, got cpu"), ("cpu", CUDA, "needs a CPU, got cuda")],
)
def test_what_cannot_run_is_refused(asked, device, words):
    with using(ops=asked), pytest.raises(ValueError, match=words):
        ops_backend(device)


def test_an_op_does_not_fall_back_silently():
    images, ids = torch.zeros(1, 4, 4, 1, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32)
    with using(ops="triton"), pytest.raises(ValueError, match="triton"):
        gather_patches(images, ids, (4, 4), torch.zeros(1), torch.ones(1), torch.float32)


@pytest.mark.parametrize("wrong", [{"ops": "cuda"}, {"attention": "fast"}])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError, match="must be one of auto"):
        Backends(**wrong)


def test_the_name_of_version_0_1_is_read():
    assert Backends(ops="native", attention="native") == Backends(ops="cpu", attention="cpu")
    with using(ops="native"):
        assert ops_backend(CPU) == "cpu"
