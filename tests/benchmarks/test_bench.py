"""``fastmae bench`` on tiny shapes: the files it leaves, the bytes it counts, and what it refuses."""

import json
import sys
from functools import partial

import pytest
import torch
from PIL import Image

from fastmae.benchmarks.cases import (
    MASK_RATIO,
    TOLERANCE,
    Measured,
    all_cases,
    attention_case,
    disagreement,
    run,
    shapes_of,
)
from fastmae.cli import main
from fastmae.config import BENCH_OPS
from fastmae.model.presets import mae_vit_tiny_patch4
from fastmae.ops import random_masking
from fastmae.ops.attention import attention_reference
from fastmae.ops.attention_table import read_table, write_table
from fastmae.ops.backends import asked_backends

CPU = torch.device("cpu")
TINY = ["--models", "mae_vit_tiny_patch4", "--batch_size", "2", "--rounds", "2", "--sample_ms", "0", "--device", "cpu"]
KERNELS = ["bench", "kernels", *TINY, "--no-compile"]
ATTENTION = ["bench", "attention", *TINY]


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    from fastmae.benchmarks import attention, harness, kernels

    for module in (kernels, attention):
        small = partial(harness.measure_ceilings, copied=1 << 20, side=64)
        monkeypatch.setattr(module, "measure_ceilings", small)
    monkeypatch.setattr(harness, "MAX_INPUT_SETS", 2)


def tiny_cases(dtype=torch.float32):
    return {case.name + case.sizes: case for case in all_cases(shapes_of("mae_vit_tiny_patch4"), 3, dtype, CPU)}


def test_kernels_writes_every_sample_and_a_picture(tmp_path, capsys):
    assert main([*KERNELS, "--output", str(tmp_path / "results")]) == 0
    out = capsys.readouterr().out
    (path,) = (tmp_path / "results").glob("*.json")
    result = json.loads(path.read_text())
    fields = {"date", "command", "commit", "versions", "hardware", "settings"}
    assert result.keys() == fields | {"ceilings", "precision", "batch_size", "cases"}
    assert result["command"] == ["fastmae", *KERNELS, "--output", str(tmp_path / "results")]
    assert (result["precision"], result["batch_size"]) == ("float32", 2)
    assert {case["op"] for case in result["cases"]} == set(BENCH_OPS) - {"depthwise_visible", "grn"}
    for case in result["cases"]:
        assert case["refused"] is None
        assert {name: len(seconds) for name, seconds in case["seconds"].items()} == {"fastmae": 2, "eager": 2}
        assert min(min(seconds) for seconds in case["seconds"].values()) > 0
        assert case["bytes"] > 0
        assert (case["flops"] > 0) == (case["op"] in ("attention", "linear"))
        assert case["backend"] in ("cpu", "sdpa", "torch")
        assert all(error <= tolerance for error, tolerance in case["errors"].values())
        assert case["op"] in out
    assert Image.open(path.with_suffix(".png")).width > 500


def test_without_matplotlib_the_samples_are_kept_and_the_remedy_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*KERNELS, "--only", "gather_patches", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().err.strip().splitlines() == [
        "no picture: matplotlib is not installed; pip install 'fastmae[bench]'"
    ]
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_a_wrong_result_gets_no_time(tmp_path, capsys, monkeypatch):
    from fastmae.benchmarks import cases

    right = cases.gather_patches
    monkeypatch.setattr(cases, "gather_patches", lambda *arguments: right(*arguments) * 1.001)
    assert main([*KERNELS, "--only", "gather_patches", "masked_mse", "--output", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    found = {case["op"]: case for case in json.loads(path.read_text())["cases"]}
    assert found["gather_patches"]["seconds"] == {}
    assert "fastmae is off by 1.0e-03" in found["gather_patches"]["refused"]
    assert found["masked_mse"]["seconds"].keys() == {"fastmae", "eager"}
    assert "refused" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny_cases())
def test_bytes_are_those_of_the_tensors(name, dtype):
    case = tiny_cases(dtype)[name]
    inputs = case.draw(torch.Generator().manual_seed(0))
    results = run(case.eager, inputs)
    arguments = [*inputs.arguments, *([] if inputs.grad is None else [inputs.grad])]
    (ids,) = [a for a in arguments if a.dtype == torch.int32] or [None]
    expected = sum(tensor.nbytes for tensor in results)
    for argument in arguments:
        # Of the images only the patches that are asked for need to be read.
        share = ids.shape[1] / shapes_of("mae_vit_tiny_patch4").L if argument.dtype == torch.uint8 else 1
        expected += round(argument.nbytes * share)
    if case.op in ("gather_patches", "scatter_patches", "masked_mse"):
        expected += 2 * 3 * 4  # mean and std
    if case.op == "attention" and case.backward:
        expected += inputs.arguments[0].nbytes  # read in both passes
    if case.op == "linear" and case.backward:
        expected += sum(tensor.nbytes for tensor in inputs.arguments[:2])  # so are these
    assert case.moved == expected


def test_shapes_are_those_of_the_model():
    model, shapes = mae_vit_tiny_patch4(), shapes_of("mae_vit_tiny_patch4")
    assert (model.num_patches, model.num_visible(MASK_RATIO)) == (shapes.L, shapes.K)
    assert model.decoder_pred.out_features == shapes.P
    assert shapes.heads * shapes.head_dim == model.cls_token.shape[-1]
    huge = shapes_of("mae_vit_huge_patch14")
    assert (huge.L, huge.K, huge.P) == (256, 64, 588)
    assert huge.attentions == ((65, 16, 80), (257, 16, 32), (257, 16, 80))


def test_the_gate_knows_wrong_shapes_wrong_numbers_and_nan():
    truth = torch.randn(5, 7, dtype=torch.float64)
    limit = TOLERANCE[torch.float32]
    error, tolerance = disagreement((truth.float(),), (truth,))
    assert error < tolerance == limit
    for wrong in (truth[:4], truth * 1.001, truth.index_fill(0, torch.tensor([2]), torch.nan)):
        error, tolerance = disagreement((truth.float(), wrong.float()), (truth, truth))
        assert error > tolerance
    ids = random_masking(torch.arange(3), 0, 9)
    assert disagreement((ids,), (ids,)) == (0, 0)
    assert disagreement((ids.roll(1, 1),), (ids,))[0] > 0


def test_attention_times_what_runs_and_names_what_does_not(tmp_path, capsys):
    words = ["--shapes", "13x4x32", "5x2x16", "--output", str(tmp_path)]
    assert main([*ATTENTION, *words]) == 0
    out = capsys.readouterr().out
    assert "sdpa (flash)" in out
    assert "xformers cannot run" in out
    assert "triton cannot run" in out
    (path,) = tmp_path.glob("attention-*.json")
    cases = json.loads(path.read_text())["cases"]
    assert [case["sizes"] for case in cases] == ["N 2, S 13, 4 heads of 32", "N 2, S 5, 2 heads of 16"]
    assert all(case["seconds"].keys() >= {"sdpa", "cpu", "flash"} for case in cases)
    assert all(case["skipped"].keys() >= {"xformers", "triton", "cudnn"} for case in cases)
    assert [case["sdpa"] for case in cases] == ["flash", "flash"]
    assert "cudnn cannot run" in out


def test_a_wrong_attention_is_named_and_not_timed(capsys, monkeypatch):
    from fastmae.benchmarks import attention

    right = attention.attention

    def crooked(packed):
        return right(packed) * (1.001 if asked_backends().attention == "triton" else 1)

    monkeypatch.setattr(attention, "attention", crooked)
    monkeypatch.setattr("fastmae.ops.attention.unmet_requirement", lambda *_: None)
    monkeypatch.setattr("fastmae.ops.attention._attention", lambda packed, *_: [attention_reference(packed)])
    assert main([*ATTENTION, "--shapes", "13x4x32"]) == 1
    assert "triton wrong: off by 1.0e-03, allowed 1e-05" in capsys.readouterr().out


def test_winners_go_into_the_table(tmp_path, monkeypatch):
    from fastmae.benchmarks.attention import winner

    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "a GPU")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    case = attention_case((50, 12, 64), 2, torch.float32, CPU, backward=True)
    seconds = {"sdpa": [3.0, 3.0, 9.0], "triton": [2.0, 8.0, 2.0]}
    one = Measured(case=case, input_sets=1, errors={}, skipped={}, seconds=seconds)
    entry = winner(one, (50, 12, 64), 2, torch.bfloat16, CPU)
    path = tmp_path / "new" / "table.json"
    write_table(path, [entry])
    assert read_table(path) == [entry]
    shown = ("device", "capability", "dtype", "S", "head_dim", "backend", "heads", "batch_size")
    assert [entry[key] for key in shown] == ["a GPU", "9.0", "bfloat16", 50, 64, "triton", 12, 2]
    assert entry["median_ms"] == {"sdpa": 3000, "triton": 2000}
