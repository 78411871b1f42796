"""random_masking: C++ and PyTorch give the same bits, which are permutations."""

import sys

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae.ops.random_masking import random_masking, random_masking_reference


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    num_patches=st.one_of(st.integers(1, 300), st.sampled_from([1024, 65536])),
)
def test_cpp_is_bit_equal_to_pytorch(seed, ids, num_patches):
    draw_ids = torch.tensor(ids, dtype=torch.int64)
    assert torch.equal(
        random_masking(draw_ids, seed, num_patches), random_masking_reference(draw_ids, seed, num_patches)
    )


def test_rows_are_permutations_and_depend_on_id_and_seed_alone():
    ids = random_masking(torch.arange(64), 7, 196)
    assert ids.dtype == torch.int32
    assert torch.equal(ids.sort(dim=1).values, torch.arange(196, dtype=torch.int32).expand(64, -1))
    assert torch.equal(ids[10:20], random_masking(torch.arange(10, 20), 7, 196))
    assert not torch.equal(ids, random_masking(torch.arange(64), 8, 196))


def test_every_patch_is_visible_equally_often():
    N, L, K = 20_000, 16, 4
    visible = random_masking(torch.arange(N), 0, L)[:, :K].flatten().bincount(minlength=L)
    deviation = (N * K / L * (1 - K / L)) ** 0.5
    assert ((visible - N * K / L).abs() < 5 * deviation).all()


def test_ties_are_broken_by_index(monkeypatch):
    module = sys.modules["fastmae.ops.random_masking"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "words_torch", lambda seed, stream, ids, n: torch.full((len(ids), n), 2**32 - 1))
    assert random_masking_reference(torch.arange(2), 0, 9).tolist() == [list(range(9))] * 2


def test_a_view_with_strides_is_read_right():
    ids = torch.arange(20)
    assert torch.equal(random_masking(ids[::3], 0, 9), random_masking(ids, 0, 9)[::3])


def test_it_is_a_well_behaved_torch_op():
    op = torch.ops.fastmae.random_masking.default
    torch.library.opcheck(op, (torch.arange(5), 3, 49))
    compiled = torch.compile(lambda ids: random_masking(ids, 2**64 - 1, 49) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.arange(5)), random_masking(torch.arange(5), 2**64 - 1, 49) + 1)
