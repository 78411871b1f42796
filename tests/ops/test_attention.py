"""attention: its definition, torch's own, and the op around the kernels; how one is chosen; what it cannot do.

The C++ itself is tested in test_cpu.py, the Triton kernels in tests/kernels.
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from fastmae import _C
from fastmae.model.vit import Attention
from fastmae.ops import cpu
from fastmae.ops.attention import (
    CPU_PRODUCTS,
    NOT_MEASURED,
    attention,
    attention_backend,
    attention_reference,
    cpu_candidates,
)
from fastmae.ops.attention_table import SHIPPED_TABLE, read_table, user_table, write_table
from fastmae.ops.backends import using
from fastmae.ops.choices import OF_0_1, Choices
from fastmae.ops.tuning import Call, measure

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PREDICTED = f"predicted, {NOT_MEASURED}"
GPU, OTHER = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def sample(N=2, S=7, H=3, D=4, T=None, dtype=torch.float64):
    """(packed,) or, with T, (packed, queries)."""
    generator = torch.Generator().manual_seed(S)
    packed = torch.randn(N, S, 3 if T is None else 2, H, D, generator=generator, dtype=dtype)
    if T is None:
        return (packed,)
    return packed, torch.randn(N, T, H, D, generator=generator, dtype=dtype)


def gradients(function, arguments):
    leaves = [x.detach().requires_grad_() for x in arguments]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return out, *torch.autograd.grad(out, leaves, weights)


@pytest.mark.parametrize("shape", [{}, {"S": 1}, {"T": 7}, {"T": 3}, {"T": 20}, {"S": 50, "T": 1, "D": 32}])
def test_torch_agrees_with_the_definition(shape):
    for one, other in zip(
        gradients(attention, sample(**shape)), gradients(attention_reference, sample(**shape)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_the_definition_is_a_loop_over_heads_and_queries():
    packed, queries = sample(T=2)
    out = attention_reference(packed, queries)
    assert out.shape == (2, 2, 3, 4)
    for n in range(2):
        for h in range(3):
            for t in range(2):
                weights = ((packed[n, :, 0, h] * queries[n, t, h]).sum(1) / 2).exp()
                expected = (weights[:, None] * packed[n, :, 1, h]).sum(0) / weights.sum()
                torch.testing.assert_close(out[n, t, h], expected, rtol=1e-12, atol=1e-13)


def test_queries_packed_or_apart_are_the_same():
    (packed,) = sample(S=9)
    whole = attention(packed)
    torch.testing.assert_close(attention(packed[:, :, 1:], packed[:, 4:, 0]), whole[:, 4:], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [{"S": 4}, {"S": 4, "T": 2}, {"S": 2, "T": 5}])
@pytest.mark.parametrize("function", [attention, attention_reference])
def test_gradients(function, shape):
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in sample(N=1, H=2, **shape)])


@pytest.mark.parametrize("shape", [{}, {"T": 3}])
def test_it_compiles_as_one_graph(shape):
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled, sample(**shape)), gradients(attention, sample(**shape)), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_computes_in_its_dtype():
    packed, queries = sample(T=3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(packed, queries.bfloat16())
        assert attention(*sample()).dtype == torch.float64
    assert torch.equal(out, attention(packed.bfloat16(), queries.bfloat16()))


def test_fake_tensors_have_the_shapes_of_real_ones():
    with torch._subclasses.FakeTensorMode():
        packed = torch.empty(2, 50, 2, 3, 32, requires_grad=True)
        queries = torch.empty(2, 20, 3, 32)
        out, lse = torch.ops.fastmae.attention(packed, queries, "triton")
        assert (out.shape, lse.shape) == ((2, 20, 3, 32), (2, 3, 20))
        out.sum().backward()
        assert packed.grad.shape == packed.shape


def test_the_module_is_what_it_was():
    """Against the projection, torch's attention and the projection back, written out."""
    torch.manual_seed(0)
    module, x = Attention(24, 3).double(), torch.randn(2, 9, 24, dtype=torch.float64)
    q, k, v = module.qkv(x).view(2, 9, 3, 3, 8).permute(2, 0, 3, 1, 4)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 24)
    torch.testing.assert_close(module(x), module.proj(out))
    torch.testing.assert_close(module(x, 5), module.proj(out)[:, 5:])


# --- C++ behind the op ------------------------------------------------------------------------------------------------

# Packed, queries of their own, one query, and more queries than keys.
CPP = [{"D": 32}, {"T": 3, "D": 64}, {"S": 50, "T": 1, "D": 80}, {"S": 5, "T": 40, "D": 16}]


@pytest.fixture
def in_cpp():
    """As if C++ had been measured to be faster for all shapes."""
    with using(choices=Choices.always(attention="cpu")):
        yield


# Every way for CPUs with every dtype that it takes, where this processor has it.
WAYS = [(name, dtype) for dtype in (torch.float32, torch.bfloat16) for name in cpu_candidates(dtype, 50, 50, 64)[1:]]


def runs_in_cpp(*arguments):
    return "fastmae_attention" in type(attention(*arguments).grad_fn).__name__


def cpp_sample(dtype=torch.float32, **shape):
    return [x.requires_grad_() for x in sample(**shape, dtype=dtype)]


def assert_as_good_as_torch(*arguments):
    """No further from the definition in float64 than twice what torch's own is, and a few roundings."""
    truths = gradients(attention_reference, [x.double() for x in arguments])
    with using(attention="sdpa"):
        torchs = gradients(attention, arguments)
    for got, other, truth in zip(gradients(attention, arguments), torchs, truths, strict=True):
        assert got.dtype == arguments[0].dtype
        error, torch_error = ((x.double() - truth).norm() for x in (got, other))
        if got.dtype == torch.float32:
            assert error <= 2 * torch_error + 8 * torch.finfo(torch.float32).eps * truth.norm()
        else:
            assert error <= torch_error + 0.05 * torch.finfo(torch.bfloat16).eps * truth.norm()


@pytest.mark.parametrize("shape", CPP)
def test_cpp_is_as_good_as_torch(in_cpp, shape):
    arguments = cpp_sample(**shape)
    assert runs_in_cpp(*arguments)
    assert_as_good_as_torch(*arguments)


@pytest.mark.parametrize("shape", [{"S": 50, "D": 64}, {"S": 13, "T": 5, "D": 32}])
@pytest.mark.parametrize(("name", "dtype"), WAYS)
def test_every_way_for_a_cpu_is_as_good_as_torch(name, dtype, shape):
    arguments = cpp_sample(dtype, **shape)
    with using(attention=name):
        assert runs_in_cpp(*arguments) == name.startswith("cpu")
        got = gradients(attention, arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            in_autocast = gradients(attention, [x.detach().float() for x in arguments])
        assert_as_good_as_torch(*arguments)
    assert torch.equal(in_autocast[0], got[0])


@pytest.mark.parametrize("name", [name for name, dtype in WAYS if dtype == torch.bfloat16])
def test_every_way_for_a_cpu_compiles_as_one_graph_in_bfloat16(name):
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    arguments = cpp_sample(torch.bfloat16, S=9, T=4, D=32)
    with using(attention=name):
        for one, other in zip(gradients(compiled, arguments), gradients(attention, arguments), strict=True):
            assert torch.equal(one, other)


def test_candidates_are_the_ways_that_can_run():
    dots = tuple(name for name in ("cpu-dot", "cpu-amx") if CPU_PRODUCTS[name] in _C.attention_products())
    assert cpu_candidates(torch.float32, 50, 50, 64) == ("sdpa", "cpu")
    assert cpu_candidates(torch.bfloat16, 197, 147, 32) == ("sdpa", "sdpa-float32", "cpu", *dots)
    assert cpu_candidates(torch.bfloat16, 50, 50, 24) == ("sdpa", "sdpa-float32")
    assert cpu_candidates(torch.float16, 50, 50, 64) == ("sdpa", "sdpa-float32")
    assert cpu_candidates(torch.float64, 50, 50, 64) == ("sdpa",)


def test_cpp_takes_any_strides(in_cpp):
    packed, queries = cpp_sample(S=9, T=6, D=32)
    for packed_view in (
        packed.transpose(0, 1).contiguous().transpose(0, 1),
        packed[:, 2:],
        packed[:1].expand(2, -1, -1, -1, -1),
    ):
        for queries_view in (queries[:, ::2], queries.transpose(2, 3).contiguous().transpose(2, 3)):
            assert_as_good_as_torch(packed_view, queries_view)
    (whole,) = cpp_sample(S=9, D=32)
    assert_as_good_as_torch(whole[..., ::2])
    assert_as_good_as_torch(whole[:, :, 1:], whole[:, 4:, 0])


def test_a_gradient_that_was_expanded_comes_through_cpp(in_cpp):
    (packed,) = cpp_sample(D=32)
    (got,) = torch.autograd.grad(attention(packed).sum(), packed)
    (expected,) = torch.autograd.grad(attention_reference(packed).sum(), packed)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", CPP[:2])
def test_cpp_compiles_as_one_graph(in_cpp, shape):
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    arguments = cpp_sample(**shape)
    for one, other in zip(gradients(compiled, arguments), gradients(attention, arguments), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", CPP[:2])
@pytest.mark.parametrize(("name", "dtype"), [way for way in WAYS if way[0].startswith("cpu")])
def test_cpp_is_one_op_to_torch(shape, name, dtype):
    packed, queries = (*cpp_sample(dtype, **shape), None)[:2]
    torch.library.opcheck(torch.ops.fastmae.attention.default, (packed, queries, name))
    out, lse = torch.ops.fastmae.attention(packed.detach(), queries if queries is None else queries.detach(), name)
    arguments = (torch.randn_like(out), packed.detach(), None if queries is None else queries.detach(), out, lse)
    torch.library.opcheck(torch.ops.fastmae.attention_backward.default, (*arguments, name))


def test_its_products_are_counted(in_cpp):
    for shape, product in (({"D": 32}, 2 * 2 * 3 * 7 * 7 * 32), ({"T": 5, "D": 32}, 2 * 2 * 3 * 5 * 7 * 32)):
        arguments = cpp_sample(**shape)
        with FlopCounterMode(display=False) as counter:
            out = attention(*arguments)
        assert counter.get_total_flops() == 2 * product
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 5 * product


def test_an_exported_program_has_torch_ops_alone():
    program = torch.export.export(Attention(64, 2), (torch.randn(1, 5, 64),))
    assert "fastmae" not in str(program.graph)


# --- the kernels behind the op, in Triton's interpreter ---------------------------------------------------------------

IN_THE_INTERPRETER = """
import torch
from fastmae.ops.attention import attention, attention_reference
from fastmae.ops.backends import using

torch.manual_seed(0)
torch.set_default_dtype(torch.float16)
# Packed with a wide loop, queries apart, and heads whose numbers do not lie side by side.
whole = torch.randn(1, 34, 3, 2, 32, requires_grad=True)
apart = torch.randn(2, 20, 2, 1, 32, requires_grad=True), torch.randn(2, 3, 1, 32, requires_grad=True)
others = torch.randn(1, 5, 2, 1, 32, requires_grad=True), torch.randn(1, 36, 1, 32, requires_grad=True)
strided = torch.randn(1, 5, 3, 32, 2).transpose(3, 4).requires_grad_()
compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
compiled(whole.detach())  # by torch's own: asking for another has to compile anew
for arguments in ((whole,), apart, others, (strided,)):
    grad = torch.randn_like(attention_reference(*arguments))
    expected = torch.autograd.grad(attention_reference(*arguments), arguments, grad)
    for function in (attention, compiled):
        with using(attention="triton"):
            out = function(*arguments)
        assert "attention" in str(out.grad_fn).lower() or "Compiled" in str(out.grad_fn), out.grad_fn
        torch.testing.assert_close(out, attention_reference(*arguments), rtol=0, atol=4e-3)
        for one, other in zip(torch.autograd.grad(out, arguments, grad), expected):
            torch.testing.assert_close(one, other, rtol=0, atol=4e-3)
forward, backward = torch.ops.fastmae.attention.default, torch.ops.fastmae.attention_backward.default
for arguments in ((whole, None, "triton"), (*apart, "triton")):
    torch.library.opcheck(forward, arguments)
    out, lse = forward(*arguments)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(backward, (torch.randn_like(out), *detached[:2], out.detach(), lse, "triton"))
with using(attention="triton"):
    assert attention(torch.randn(2, 3, 3, 1, 32, dtype=torch.float64)).dtype == torch.float64
    for shape, word in (((1, 321, 3, 1, 32), "320 tokens, got 321"), ((1, 5, 3, 1, 48), "numbers, got 48")):
        try:
            attention(torch.randn(shape))
        except ValueError as error:
            assert word in str(error), error
        else:
            raise AssertionError(word)
print("all is well")
"""


def test_the_kernels_as_torch_ops():
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_INTERPRETER],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "all is well" in done.stdout, done.stderr[-3000:]


# --- which one runs ---------------------------------------------------------------------------------------------------


def entry(S=50, backend="triton", device=GPU, capability="9.0", dtype="bfloat16", head_dim=64, **more):
    shape = {"dtype": dtype, "S": S, "head_dim": head_dim}
    return {"device": device, "capability": capability, **shape, "backend": backend, **more}


@pytest.fixture
def h100(monkeypatch, tmp_path):
    """As if there were a GPU, and no table of the user's but in tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    write_table(user_table(), [])
    return user_table()


def chosen(S=50, head_dim=64, dtype=torch.bfloat16, device=CUDA):
    return attention_backend(device, dtype, S, head_dim)


def test_the_shipped_table_is_whole(h100):
    read_table(SHIPPED_TABLE)
    if not read_table(SHIPPED_TABLE):
        assert chosen() == ("triton", PREDICTED)


def test_the_nearest_measurement_decides(h100):
    write_table(h100, [entry(40, "sdpa"), entry(50), entry(197), entry(50, "sdpa", head_dim=32)])
    assert chosen(50) == ("triton", f"fastest at 50 tokens ({GPU}, {h100})")
    assert chosen(42)[0] == "sdpa"
    assert chosen(62)[0] == "triton"
    assert chosen(64) == ("triton", PREDICTED)
    assert chosen(50, 32) == ("sdpa", f"fastest at 50 tokens ({GPU}, {h100})")
    assert chosen(dtype=torch.float16) == ("triton", PREDICTED)


def test_a_gpu_of_the_same_name_goes_before_one_of_the_same_capability(h100):
    write_table(h100, [entry(50, "sdpa", device="NVIDIA H200")])
    assert chosen(50)[0] == "sdpa"
    assert "H200" in chosen(50)[1]
    write_table(h100, [entry(55)])
    assert chosen(50)[0] == "triton"
    write_table(h100, [entry(55, "sdpa"), entry(50, device=OTHER, capability="8.0")])
    assert chosen(50)[0] == "sdpa"


def test_the_users_table_goes_before_the_shipped_one(h100, monkeypatch, tmp_path):
    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr("fastmae.ops.attention_table.SHIPPED_TABLE", shipped)
    write_table(shipped, [entry(50), entry(197)])
    write_table(h100, [entry(50, "sdpa")])
    assert chosen(50)[0] == "sdpa"
    assert chosen(197) == ("triton", f"fastest at 197 tokens ({GPU}, {shipped})")


def test_a_winner_that_cannot_run_is_not_taken_and_the_reason_is_given(h100, monkeypatch):
    write_table(h100, [entry(50, "triton")])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen(50) == (
        "sdpa",
        f"triton was faster at 50 tokens ({GPU}, {h100}), but it needs Triton and a CUDA device, got cuda",
    )


def test_torchs_kernels_can_win_and_xformers_is_passed_over(h100):
    write_table(h100, [entry(50, "cudnn"), entry(197, "flash"), entry(50, "xformers", head_dim=32)])
    assert chosen(50)[0] == "cudnn"
    assert chosen(197)[0] == "flash"
    assert chosen(50, 32) == ("triton", PREDICTED)
    with using(attention="xformers"), pytest.raises(ValueError, match=r"fastmae\[cuda\]"):
        chosen(50)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_without_a_measurement_triton_is_taken_where_it_is_predicted_to_win(h100, monkeypatch, capability):
    """Elsewhere it is torch's own: heads of 80 numbers, long sequences, float32, other GPUs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for S, head_dim in ((1, 32), (50, 64), (197, 32), (320, 64)):
        assert chosen(S, head_dim) == ("triton", PREDICTED)
    for S, head_dim in ((65, 80), (321, 64)):
        assert chosen(S, head_dim) == ("sdpa", NOT_MEASURED)
    assert chosen(50, 16) == ("sdpa", f"{NOT_MEASURED}; Triton takes heads of 32, 64, 80 numbers")
    assert chosen(dtype=torch.float32) == ("sdpa", NOT_MEASURED)
    for other in ((7, 5), (8, 6), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, other=other: other)
        assert chosen() == ("sdpa", NOT_MEASURED)


def test_one_of_torchs_kernels_is_torchs_attention(monkeypatch):
    """By name, eager and compiled. cuDNN's is for GPUs alone."""
    packed, grad = torch.randn(2, 9, 3, 2, 16, requires_grad=True), torch.randn(2, 9, 2, 16)
    expected = attention(packed)
    with using(attention="flash"):
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        for function in (attention, compiled):
            got = function(packed)
            assert torch.equal(got, expected)
            torch.testing.assert_close(
                torch.autograd.grad(got, packed, grad)[0], torch.autograd.grad(attention(packed), packed, grad)[0]
            )
    taken = []
    monkeypatch.setattr("fastmae.ops.attention.sdpa_kernel", lambda kernel: taken.append(kernel) or nullcontext())
    monkeypatch.setattr("fastmae.ops.attention.unmet_requirement", lambda *_: None)
    with using(attention="cudnn"):
        attention(packed)
    assert taken == [SDPBackend.CUDNN_ATTENTION]


def test_what_needs_no_table(h100):
    assert attention_backend(torch.device("mps"), torch.float32, 50, 64) == ("sdpa", "torch's own on mps")
    with using(attention="triton"):
        assert chosen(dtype=torch.float64)[0] == "sdpa"
        assert chosen() == ("triton", "asked for")
    with using(attention="sdpa"):
        assert chosen() == ("sdpa", "asked for")


def test_on_a_cpu_it_is_torchs_own_by_default():
    assert chosen(50, 64, torch.float32, CPU) == ("sdpa", "torch's own on cpu")


@pytest.mark.parametrize(
    ("S", "head_dim", "dtype", "name"),
    [
        (50, 64, torch.float32, "cpu"),
        (1, 16, torch.float32, "cpu"),
        (1024, 128, torch.float32, "cpu"),
        (50, 24, torch.float32, "sdpa"),
        (50, 144, torch.float32, "sdpa"),
        (50, 64, torch.bfloat16, "sdpa"),
        (50, 64, torch.float64, "sdpa"),
    ],
)
def test_what_was_measured_runs_on_a_cpu_where_it_can(in_cpp, S, head_dim, dtype, name):
    assert chosen(S, head_dim, dtype, CPU)[0] == name
    with using(ops="reference"):
        assert chosen(S, head_dim, dtype, CPU)[0] == "sdpa"
    with using(attention="sdpa"):
        assert chosen(S, head_dim, dtype, CPU)[0] == "sdpa"
    with using(choices=OF_0_1):
        assert chosen(S, head_dim, dtype, CPU)[0] == name  # if vectors are wide


def test_version_0_1_left_long_sequences_to_torch():
    with using(choices=OF_0_1):
        assert chosen(1024, 64, torch.float32, CPU) == ("cpu", "as in version 0.1")
        assert chosen(1025, 64, torch.float32, CPU)[0] == "sdpa"


def test_cpp_does_what_it_was_asked_for_alone(in_cpp):
    arguments = cpp_sample(D=32)
    assert runs_in_cpp(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not runs_in_cpp(*arguments)
    with using(ops="reference"):
        assert not runs_in_cpp(*arguments)
        with using(attention="cpu"):
            assert runs_in_cpp(*arguments)


def test_writing_merges_entries_and_keeps_their_notes(h100):
    write_table(h100, [entry(50, milliseconds={"sdpa": 1.5}), entry(197)])
    write_table(h100, [entry(197, "sdpa")])
    assert read_table(h100) == [entry(50, milliseconds={"sdpa": 1.5}), entry(197, "sdpa")]
    before = h100.read_bytes()
    with pytest.raises(ValueError, match="backend must be sdpa or triton or cudnn or flash or xformers"):
        write_table(h100, [entry(13), entry(50, "fast")])
    assert h100.read_bytes() == before
    assert [path.name for path in h100.parent.iterdir()] == [h100.name]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "Expecting value"),
        (b"\xff{}", "decode"),
        (b"[]", "no list of entries"),
        (b'{"entries": 3}', "no list of entries"),
        (b'{"entries": [3]}', "device must be a text"),
        (json.dumps({"entries": [entry(S=True)]}).encode(), "S must be a positive integer"),
        (json.dumps({"entries": [entry(head_dim=0)]}).encode(), "head_dim must be a positive integer"),
        (json.dumps({"entries": [entry(dtype="bf16")]}).encode(), "dtype must be float64 or"),
        (json.dumps({"entries": [entry(backend="fast")]}).encode(), "backend must be"),
        (b"[" * 100_000, "is no table"),
        (b" " * ((1 << 20) + 1), "more than 1048576 bytes"),
    ],
)
def test_a_damaged_table_is_named(h100, content, word):
    h100.write_bytes(content)
    with pytest.raises(ValueError, match=word) as caught:
        chosen()
    assert str(h100) in str(caught.value)
    assert "delete" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_that_is_a_folder_is_named(h100):
    h100.unlink()
    h100.mkdir()
    with pytest.raises(ValueError, match="is no table of attention backends"):
        chosen()


# --- what it cannot do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["triton", "xformers", "cudnn"])
def test_what_was_asked_for_and_cannot_run_is_refused(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with using(attention=name), pytest.raises(ValueError, match=rf"attention '{name}' .*cpu; choose auto or sdpa"):
        attention(*sample(dtype=torch.float32))


@pytest.mark.parametrize(
    ("name", "S", "head_dim", "dtype", "words"),
    [
        ("triton", 321, 64, torch.bfloat16, "1 to 320 tokens, got 321"),
        ("triton", 50, 48, torch.bfloat16, "heads of 32, 64, 80 numbers, got 48"),
        ("triton", 50, 64, torch.float32, "bfloat16 or float16, got float32"),
        ("xformers", 50, 64, torch.float32, "bfloat16 or float16, got float32"),
        ("xformers", 50, 12, torch.float16, "multiple of 8 numbers up to 256, got 12"),
        ("cpu", 50, 64, torch.float32, "needs a CPU, got cuda; choose auto or sdpa"),
        ("cudnn", 50, 64, torch.float32, "bfloat16 or float16, got float32"),
        ("cudnn", 50, 136, torch.bfloat16, "multiple of 8 numbers up to 128, got 136"),
        ("flash", 50, 20, torch.float16, "multiple of 8 numbers up to 256, got 20"),
    ],
)
def test_limits_of_the_backends(name, S, head_dim, dtype, words, monkeypatch, h100):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with using(attention=name), pytest.raises(ValueError, match=words):
        chosen(S, head_dim, dtype)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "words"),
    [
        (24, torch.float32, "needs heads of a multiple of 16 numbers up to 128, got 24"),
        (144, torch.float32, "needs heads of a multiple of 16 numbers up to 128, got 144"),
        (32, torch.float16, "needs float32 or bfloat16, got float16"),
    ],
)
def test_limits_of_cpp(head_dim, dtype, words):
    with using(attention="cpu"), pytest.raises(ValueError, match=f"attention 'cpu' {words}; choose auto or sdpa"):
        chosen(50, head_dim, dtype, CPU)


def test_dot_products_and_float32_are_for_what_can_use_them(monkeypatch):
    with using(attention="sdpa-float32"), pytest.raises(ValueError, match="needs bfloat16 or float16, got float32"):
        chosen(50, 64, torch.float32, CPU)
    with using(attention="sdpa-float32"), pytest.raises(ValueError, match="'sdpa-float32' needs a CPU, got cuda"):
        chosen(50, 64, torch.bfloat16, CUDA)
    monkeypatch.setattr(_C, "attention_products", lambda: ["float32"])
    with using(attention="cpu-dot"), pytest.raises(ValueError, match="needs a processor with AVX512-BF16, got one"):
        chosen(50, 64, torch.bfloat16, CPU)
    with using(attention="cpu-amx"), pytest.raises(ValueError, match="with AMX that the kernel grants and that agrees"):
        chosen(50, 64, torch.bfloat16, CPU)


@pytest.fixture
def amx(monkeypatch):
    """A processor with AMX, but for the emulated tiles that multiply in it."""
    products, real = _C.attention_products(), {name: getattr(_C, name) for name in ("attention", "attention_backward")}
    monkeypatch.setattr(_C, "attention_products", lambda: [*products, "amx"])
    for name, function in real.items():
        monkeypatch.setattr(_C, name, lambda *a, f=function: f(*("amx-emulated" if x is AMX else x for x in a)))
    cpu.agrees_with_float32.cache_clear()
    yield monkeypatch
    cpu.agrees_with_float32.cache_clear()


AMX = CPU_PRODUCTS["cpu-amx"]


def test_tiles_are_a_candidate_of_their_own_where_the_processor_has_them(amx):
    assert cpu_candidates(torch.bfloat16, 50, 50, 64)[-1] == "cpu-amx"
    assert "cpu-amx" not in cpu_candidates(torch.float32, 50, 50, 64)
    call = Call("attention", (13, 5, 32), images=2, heads=2)
    assert measure([call], torch.bfloat16, seconds=60).entries[0].taken in cpu_candidates(torch.bfloat16, 13, 5, 32)
    with using(choices=Choices.always("bfloat16", attention="cpu-amx")):
        assert chosen(13, 32, torch.bfloat16, CPU)[0] == "cpu-amx"
        assert_as_good_as_torch(*cpp_sample(torch.bfloat16, S=13, T=5, D=32))


@pytest.mark.parametrize("pass_", ["attention", "attention_backward"])
def test_tiles_that_multiply_wrongly_are_told_and_not_used(amx, caplog, pass_):
    right = getattr(_C, pass_)

    def wrong(*arguments):
        right(*arguments)
        if any(x is AMX for x in arguments):
            arguments[-2][0, -1] = 0  # one token of the output, or of the gradient of packed

    amx.setattr(_C, pass_, wrong)
    for _ in range(2):
        assert "cpu-amx" not in cpu_candidates(torch.bfloat16, 50, 50, 64)
    assert [record.message for record in caplog.records] == [
        "attention by amx gives wrong numbers on this machine, so it is not used: please report it"
    ]
    with using(attention="cpu-amx"), pytest.raises(ValueError, match="that agrees with float32, got none"):
        chosen(50, 64, torch.bfloat16, CPU)
