"""Choices: lookup at measured shapes and beside them, version 0.1's rules, and JSON that is read strictly."""

import copy
import dataclasses
import json

import pytest
import torch

from fastmae.ops.backends import op_choice, uses_fused, using
from fastmae.ops.choices import CANDIDATES, LINEAR, OF_0_1, TORCHS_OWN, Choice, Choices

MEASURED = Choices(
    "measured",
    (
        Choice("linear_forward", (400, 768, 2304), "float32", "torch", 1.0),
        Choice("linear_forward", (1600, 768, 2304), "float32", "onednn", 1.25),
        Choice("linear_forward", (400, 512, 512), "float32", "onednn", 1.1),
        Choice("linear_weight", (400, 768, 2304), "float32", "onednn-copy", 1.2),
        Choice("attention", (50, 50, 64), "float32", "cpu", 1.5),
        Choice("attention", (197, 197, 64), "float32", "sdpa", 1.0),
        Choice("attention", (50, 50, 64), "bfloat16", "sdpa-float32", 3.5),
        Choice("gelu", (400, 3072), "float32", "cpu", 2.0),
    ),
    processor="Some Processor",
    bf16_speedup=1.75,
    used_by_others=0.02,
)


@pytest.mark.parametrize(
    ("op", "shape", "taken"),
    [
        ("linear_forward", (400, 768, 2304), "torch"),
        ("linear_forward", (1600, 768, 2304), "onednn"),
        ("linear_forward", (1, 768, 2304), "torch"),
        ("linear_forward", (800, 768, 2304), "torch"),  # as near to the one as to the other
        ("linear_forward", (801, 768, 2304), "onednn"),
        ("linear_forward", (10**6, 768, 2304), "onednn"),
        ("linear_forward", (400, 500, 600), "onednn"),  # the nearest widths are 512 and 512
        ("linear_forward", (400, 800, 3000), "torch"),
        ("linear_weight", (1, 8, 8), "onednn-copy"),  # the only one that was measured
        ("linear_input", (400, 768, 2304), "torch"),  # never measured
        ("attention", (50, 50, 64), "cpu"),
        ("attention", (60, 40, 64), "cpu"),
        ("attention", (197, 148, 64), "sdpa"),
        ("attention", (50, 50, 32), "cpu"),
        ("gelu", (1, 3072), "cpu"),
        ("add_layer_norm", (400, 768), "torch"),
    ],
)
def test_a_call_takes_what_was_measured_at_its_shape_or_at_the_nearest(op, shape, taken):
    assert MEASURED.taken(op, shape, "float32") == taken
    with using(choices=MEASURED):
        assert op_choice(op, shape, torch.float32) == taken


def test_each_dtype_is_measured_by_itself():
    assert MEASURED.taken("attention", (50, 50, 64), "bfloat16") == "sdpa-float32"
    assert MEASURED.taken("linear_forward", (1600, 768, 2304), "bfloat16") == "torch"


def test_without_a_choice_it_is_torchs_own():
    for op, candidates in CANDIDATES.items():
        shape = (4000, 3072, 768)[: 3 if op in LINEAR or op == "attention" else 2]
        assert TORCHS_OWN.taken(op, shape, "float32") == op_choice(op, shape, torch.float32) == candidates[0]


def test_the_references_ops_and_exported_programs_are_torchs_own(monkeypatch):
    with using(choices=MEASURED):
        with using(ops="reference"):
            assert op_choice("gelu", (400, 3072), torch.float32) == "torch"
        monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
        assert op_choice("gelu", (400, 3072), torch.float32) == "torch"


def test_version_0_1_decided_by_constants():
    def linear(rows, inner, outer, dtype="float32"):
        return tuple(OF_0_1.taken(op, (rows, inner, outer), dtype) for op in LINEAR)

    assert linear(1024, 512, 256) == ("onednn", "onednn", "onednn-copy")  # 2**27 multiply-adds
    assert linear(1023, 512, 256) == ("torch", "torch", "torch")
    assert linear(4096, 255, 768) == ("torch", "onednn", "onednn-copy")
    assert linear(4096, 768, 255) == ("onednn", "torch", "onednn-copy")
    assert linear(255, 1024, 1024) == ("onednn", "onednn", "torch")
    assert linear(1024, 512, 256, "bfloat16") == ("torch", "torch", "torch")
    assert OF_0_1.taken("gelu", (4096, 3072), "float32") == "torch"


def test_version_0_1_took_cpp_for_short_sequences_where_vectors_are_wide(monkeypatch):
    for wide, name in ((True, "cpu"), (False, "sdpa")):
        monkeypatch.setattr("fastmae.ops.choices.WIDE_VECTORS", wide)
        with using(choices=Choices("0.1")):
            assert op_choice("attention", (1024, 2000, 64), torch.float32) == name
            assert op_choice("attention", (1025, 1, 64), torch.float32) == "sdpa"
            assert op_choice("attention", (50, 50, 64), torch.bfloat16) == "sdpa"


@pytest.mark.parametrize("choices", [MEASURED, TORCHS_OWN, OF_0_1, Choices.always("bfloat16", attention="cpu-dot")])
def test_json_gives_it_back(choices):
    back = Choices.from_json(json.loads(json.dumps(choices.as_json())))
    assert dataclasses.asdict(back) == dataclasses.asdict(choices)
    assert back == choices


def change(path, value):
    """Returns MEASURED's JSON with one value replaced, or a key taken away for ``...``."""
    data = copy.deepcopy(MEASURED.as_json())
    at = data
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return data


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [],
        "measured",
        {},
        change(["rules"], "fastest"),
        change(["rules"], "torch"),  # which takes no entries
        change(["rules"], []),
        change(["rules"], ...),
        change(["extra"], 1),
        change(["processor"], None),
        change(["processor"], "x" * 1001),
        change(["bf16_speedup"], "2"),
        change(["bf16_speedup"], float("nan")),
        change(["used_by_others"], 1.1),
        change(["used_by_others"], True),
        change(["entries"], {}),
        change(["entries"], [MEASURED.as_json()["entries"][0]] * 2),
        change(["entries"], [MEASURED.as_json()["entries"][0]] * 10_001),
        change(["entries", 0], []),
        change(["entries", 0, "op"], "softmax"),
        change(["entries", 0, "op"], ["gelu"]),
        change(["entries", 0, "taken"], "cpu"),  # of another op
        change(["entries", 0, "taken"], ...),
        change(["entries", 0, "dtype"], "float64"),
        change(["entries", 0, "shape"], [400, 768]),
        change(["entries", 0, "shape"], "400"),
        change(["entries", 0, "shape"], [400, 768, 0]),
        change(["entries", 0, "shape"], [400, 768, True]),
        change(["entries", 0, "shape"], [400, 768, 2.0]),
        change(["entries", 0, "shape"], [400, 768, 2**31]),
        change(["entries", 0, "speedup"], 0),
        change(["entries", 0, "speedup"], float("inf")),
        change(["entries", 0, "speedup"], True),
        change(["entries", 0, "more"], 1),
    ],
)
def test_anything_else_is_refused_in_a_line(damaged):
    with pytest.raises(ValueError, match=r"must|unknown|two entries|take no") as error:
        Choices.from_json(damaged)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_compiled_code_is_compiled_anew_for_other_choices_and_not_for_those_of_before():
    from torch._dynamo.testing import CompileCounter

    counter, x, h = CompileCounter(), torch.ones(3, 8), torch.ones(3, 8)

    def which(x):
        products = x * 2 if op_choice("linear_forward", (400, 768, 2304), x.dtype) == "onednn" else x * 3
        return products * 5 if uses_fused("gelu", x, x.dtype) else products * 7

    compiled = torch.compile(which, fullgraph=True, backend=counter)
    asked = [TORCHS_OWN, MEASURED, OF_0_1, Choices.always("float32", gelu="cpu")]
    for choices in asked + asked:
        with using(choices=choices):
            assert torch.equal(compiled(x), which(h)), choices
    with using(choices=asked[3], ops="reference"):
        assert torch.equal(compiled(x), which(h))
    assert counter.frame_count == len(asked) + 1
    torch.compiler.reset()


def test_it_compiles_into_one_graph_with_sizes_that_are_unknown():
    def double(x):
        taken = op_choice("linear_forward", (x.shape[0], x.shape[1], 2304), x.dtype)
        return x * 2 if taken == "onednn" else x * 3

    for choices in (MEASURED, OF_0_1, TORCHS_OWN):
        with using(choices=choices):
            compiled = torch.compile(double, fullgraph=True, backend="eager", dynamic=True)
            for shape in ((3, 768), (2000, 768), (3, 768), (900, 768), (900, 500)):
                assert torch.equal(compiled(torch.ones(shape)), double(torch.ones(shape)))
        torch.compiler.reset()
