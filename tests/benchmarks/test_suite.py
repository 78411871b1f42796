"""``fastmae bench all``: which commands it runs, what becomes of those that fail, and what the report shows."""

import json
import math
import re
import shlex
from functools import partial
from xml.etree import ElementTree

import pytest
import torch

from fastmae.benchmarks import cases, ceilings, charts, harness, suite
from fastmae.benchmarks.cases import MASK_RATIO, Measured, all_cases, as_json, shapes_of
from fastmae.benchmarks.ceilings import linear_layers, products_flops, step_bytes
from fastmae.benchmarks.report import main as make_report
from fastmae.benchmarks.report import report
from fastmae.benchmarks.suite import Part, execute, operations, outcome_of, parts_of, words_of
from fastmae.cli import main, parse
from fastmae.config import BENCH_PARTS, BenchAllConfig, BenchStepConfig
from fastmae.model.flops import Product
from fastmae.model.presets import PRESETS

CPU = torch.device("cpu")
WORDS = ["bench", "all", "--model", "mae_vit_tiny_patch4", "--quick", "--rounds", "1", "--batch_sizes", "1", "2", "3"]
WORDS += ["--device", "cpu"]


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    small = partial(harness.measure_ceilings, copied=1 << 20, side=64)
    for module in (ceilings, *(__import__(f"fastmae.benchmarks.{name}", fromlist=[""]) for name in KERNELS)):
        monkeypatch.setattr(module, "measure_ceilings", small)
    monkeypatch.setattr(suite, "JPEGS", 2)


KERNELS = ("kernels", "attention")


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs parts here, and gives the words that they were run with."""
    run = []

    def execute_here(part, folder):
        run.append(words_of(part.config))
        return main([*run[-1], "--output", folder]), []

    monkeypatch.setattr(suite, "execute", execute_here)
    return run


def result_and_page(folder):
    (path,) = folder.glob("all-mae_vit_tiny_patch4-*-fp32.json")
    return json.loads(path.read_text()), (folder / "report.html").read_text()


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_what_was_measured_is_in_one_file_and_on_a_page_that_needs_no_other(tmp_path, in_this_process, capsys):
    only = ["--only", "kernels", "step", "batch-sizes", "input-sizes", "--baselines", "official"]
    words = [*WORDS, *only, "--input_sizes", "16", "28", "--output", str(tmp_path)]
    assert main(words) == 0
    result, page = result_and_page(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["report.html", f"all-mae_vit_tiny_patch4-{result['machine']}-fp32.json"]
    )
    assert {"date", "command", "commit", "versions", "hardware", "settings", "load"} <= result.keys()
    assert result["command"] == ["fastmae", *words]
    rates = result["ceilings"]
    numbers = [
        rates["copy_bytes"],
        rates["products_flops"],
        *rates["matmul_flops"].values(),
        *rates["decoded"].values(),
    ]
    assert all(0 < rate < math.inf for rate in numbers)
    kinds = ["kernels", "step", "batch-sizes", "batch-sizes", "batch-sizes", "input-sizes", "input-sizes"]
    assert [part["kind"] for part in result["parts"]] == kinds
    assert [shlex.split(part["command"]) for part in result["parts"]] == [["fastmae", *run] for run in in_this_process]
    assert {part["outcome"] for part in result["parts"]} == {"measured"}
    step = result["parts"][1]["result"]
    assert step["seconds"].keys() == {"fastmae", "official"}
    assert [part["result"]["settings"]["batch_size"] for part in result["parts"][1:5]] == [2, 1, 2, 3]
    # The larger the images, the more there is to do.
    small, large = (part["result"]["useful_flops"]["fastmae"] for part in result["parts"][5:])
    assert small < large == step["useful_flops"]["fastmae"]

    assert not re.search(r"<script|<link|<img|src=|href=\"(?!#)|url\((?!#)|@import", page)
    drawn = [ElementTree.fromstring(chart) for chart in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(drawn) == 6  # baselines, phases, batches, sizes, roofline, ops
    for title in (
        "Images per second beside the baselines",
        "Where a step",
        "By batch size",
        "By image size",
        "Roofline",
    ):
        assert title in page
    for part in result["parts"]:
        assert part["command"] in page
    fastest = harness.quartiles([2 / seconds for seconds in step["seconds"]["fastmae"]])[1]
    assert f"<td>{charts.shown(fastest)}</td>" in page
    again = tmp_path / "again.html"
    assert make_report([str(next(tmp_path.glob("*.json"))), str(again)]) == 0
    assert again.read_text() == page


def test_a_part_that_cannot_run_or_fails_is_named_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    ends = {
        "kernels": (1, ["the loss of it differs, so no time is reported: <1>"]),
        "attention": (2, ["a warning", "fastmae: --device cuda: there is none"]),
        "loader": (1, ["Traceback (most recent call last):", "torch.OutOfMemoryError: 80 GiB"]),
        "end-to-end": (-9, []),
    }
    monkeypatch.setattr(suite, "execute", lambda part, folder: ends[part.kind])
    words = [*WORDS, "--only", "kernels", "attention", "loader", "end-to-end", "--output", str(tmp_path)]
    assert main(words) == 1
    result, page = result_and_page(tmp_path)
    assert {part["kind"]: (part["outcome"], part["reason"]) for part in result["parts"]} == {
        "kernels": ("refused", "the loss of it differs, so no time is reported: <1>"),
        "attention": ("cannot run", "--device cuda: there is none"),
        "loader": ("failed", "exit status 1: torch.OutOfMemoryError: 80 GiB"),
        "end-to-end": ("failed", "exit status -9"),
    }
    assert "torch.OutOfMemoryError: 80 GiB" in page
    assert "&lt;1&gt;" in page
    assert "attention cannot run: --device cuda: there is none" in capsys.readouterr().err


def test_a_wrong_result_has_no_time_and_makes_the_status_1(tmp_path, in_this_process, monkeypatch):
    right = cases.gather_patches
    monkeypatch.setattr(cases, "gather_patches", lambda *arguments: right(*arguments) * 1.001)
    assert main([*WORDS, "--only", "kernels", "--output", str(tmp_path)]) == 1
    result, page = result_and_page(tmp_path)
    assert [part["outcome"] for part in result["parts"]] == ["refused"]
    assert "refused: fastmae is off by 1.0e-03" in page
    assert "<td>gather_patches fwd</td>" not in page
    assert "<td>masked_mse fwd</td><td>fastmae</td>" in page


def test_what_cannot_run_here_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "execute", lambda part, folder: (2, ["fastmae: no such GPU"]))
    assert main([*WORDS, "--only", "attention", "ranks", "--ranks", "1", "--output", str(tmp_path)]) == 0
    result, page = result_and_page(tmp_path)
    assert {part["kind"]: part["outcome"] for part in result["parts"]} == dict.fromkeys(
        ("attention", "ranks"), "cannot run"
    )
    assert "no such GPU" in page
    assert "nothing to compare one rank with" in page


def test_an_interrupted_run_leaves_what_it_has_found(tmp_path, monkeypatch):
    def interrupt(part, folder):
        if part.kind == "attention":
            raise KeyboardInterrupt
        return main([*words_of(part.config), "--output", folder]), []

    monkeypatch.setattr(suite, "execute", interrupt)
    assert main([*WORDS, "--only", "kernels", "attention", "--output", str(tmp_path)]) == 130
    result, page = result_and_page(tmp_path)
    assert [part["kind"] for part in result["parts"]] == ["kernels"]
    assert [shlex.split(command)[2] for command in result["to_come"]] == ["attention"]
    assert "not yet reached" in page


def test_a_part_is_a_process_whose_status_and_complaints_are_kept(tmp_path, monkeypatch, capsys):
    python = tmp_path / "python"
    lines = ['echo "$OMP_NUM_THREADS" "$@"', "echo results/step.json", "echo a warning >&2", "echo fastmae: wrong >&2"]
    python.write_text("\n".join(["#!/bin/sh", *lines, "exit 2"]))
    python.chmod(0o755)
    monkeypatch.setattr(suite.sys, "executable", str(python))
    config = BenchStepConfig(batch_size=3)
    status, said = execute(Part("ranks", config, ranks=2, threads=5), "results")
    assert (status, said) == (2, ["a warning", "fastmae: wrong"])
    assert outcome_of(status, said) == ("cannot run", "wrong")
    captured = capsys.readouterr()
    launch = "5 -m torch.distributed.run --standalone --nproc_per_node 2 -m fastmae"
    assert captured.out == f"{launch} {' '.join(words_of(config))} --output results\n"
    assert captured.err == "a warning\nfastmae: wrong\n"


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        BenchAllConfig(output="x"),
        BenchAllConfig(output="x", quick=True, device="cpu"),
        BenchAllConfig(
            output="x", model="mae_vit_huge_patch14", baselines=(), switches=("bf16",), rounds=2, ranks=(1, 2, 4)
        ),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_command_of_a_part_makes_its_settings(config, device):
    parts = parts_of(config, [4, 8, 16], torch.device(device), "bf16")
    for part in parts:
        assert parse(words_of(part.config)) == part.config
        assert part.words[-len(words_of(part.config)) :] == words_of(part.config)
    assert [kind for kind in BENCH_PARTS if kind in {part.kind for part in parts}] == [
        kind for kind in BENCH_PARTS if kind != "ranks" or config.ranks or device == "cpu"
    ]


def test_all_parts_have_the_same_batch_and_precision_but_for_what_is_varied():
    config = BenchAllConfig(output="x", ranks=(1, 2), rounds=3, only=BENCH_PARTS)
    parts = parts_of(config, [4, 8, 16], CPU, "bf16")
    batches = {kind: [part.config.batch_size for part in parts if part.kind == kind] for kind in BENCH_PARTS}
    assert batches.pop("batch-sizes") == [4, 8, 16]
    assert batches.pop("loader") == [64]
    assert {batch for of_kind in batches.values() for batch in of_kind} == {8}
    assert {part.config.precision for part in parts if part.kind != "loader"} == {"bf16"}
    assert {part.config.rounds for part in parts} == {3}
    sides = [part.config.input_size for part in parts if part.kind == "input-sizes"]
    assert sides == sorted(set(sides))
    assert all(side % 16 == 0 for side in sides)
    assert 224 in sides
    ranked = [part for part in parts if part.kind == "ranks"]
    assert [part.ranks for part in ranked] == [1, 2]
    assert len({part.threads for part in ranked}) == 1
    assert shlex.join(ranked[1].words).startswith(f"OMP_NUM_THREADS={ranked[1].threads} torchrun --standalone")


# --- ceilings and work ------------------------------------------------------------------------------------------------


def test_a_step_moves_factors_and_results_and_what_the_optimiser_keeps():
    model = PRESETS["mae_vit_tiny_patch4"]()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    one, two = (step_bytes(model, MASK_RATIO, 8, itemsize) - 28 * trained for itemsize in (2, 4))
    assert two == 2 * one > 0
    moved = 0
    for layer in linear_layers(model, MASK_RATIO):
        rows = 8 * layer.m
        moved += 3 * 2 * layer.count * (rows * layer.k + layer.k * layer.n + rows * layer.n)
    assert one == moved


def test_the_rate_of_products_counts_each_as_often_as_it_is_there(monkeypatch):
    seconds = iter([[1.0, 2.0], [4.0, 3.0], [5.0, 9.0], [10.0], [10.0], [10.0]])
    monkeypatch.setattr(ceilings, "interleave", lambda calls, watch: {name: next(seconds) for name in calls})
    layers = [Product("a", 2, 4, 3, 2), Product("b", 1, 1, 1, 1)]
    watch = harness.Stopwatch(device=CPU, rounds=1)
    flops = 2 * 3 * 8 * 2 * (2 * 3 * 4) + 3 * 8 * 2
    assert products_flops(layers, 8, torch.float32, watch) == flops / (2 * (1 + 3 + 5) + 30)


def test_ops_without_products_are_counted_by_their_numbers():
    shapes = shapes_of("mae_vit_tiny_patch4")
    measured = [as_json(Measured(case=case, input_sets=1, errors={}, skipped={}))
             for case in all_cases(shapes, 3, torch.float32, CPU)]  # fmt: skip
    found = {
        (case["op"], case["backward"]): operations(case, shapes, 3) for case in measured if case["op"] != "attention"
    }
    M = shapes.L - shapes.K
    assert found["random_masking", False] == 0
    assert found["gather_patches", False] == 2 * 3 * shapes.K * shapes.P
    assert found["scatter_patches", False] == 2 * 3 * M * shapes.P
    assert found["assemble_tokens", True] > found["assemble_tokens", False] == 3 * (shapes.L + 1) * shapes.decoder_width
    assert found["masked_mse", True] > found["masked_mse", False] == 11 * 3 * M * shapes.P
    assert all(operations(case, shapes, 3) == case["flops"] > 0 for case in measured if case["op"] == "attention")


# --- charts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (1234567, "1,230,000"), (99.96, "100"), (2.144, "2.14"), (0.01239, "0.0124")]
)
def test_three_digits_are_shown(number, text):
    assert charts.shown(number) == text


def test_bars_are_drawn_for_comparisons_only_and_look_the_same_each_time():
    rows = {name: {name: (value, value, value)} for name, value in (("a <b>", 10.0), ("c", 4.0))}
    chart = charts.bars(rows, "images/s", {"limit": 20.0})
    ElementTree.fromstring(chart)
    assert charts.bars(rows, "images/s", {"limit": 20.0}) == chart
    assert charts.bars({"a": {"a": (1.0, 1.0, 1.0)}}, "images/s") == ""
    assert charts.curves({"a": [(1, (1.0, 1.0, 1.0))]}, "ranks", "images/s") == ""


# --- what is refused --------------------------------------------------------------------------------------------------


def test_reports_of_nothing_and_of_everything_are_made():
    empty = {"machine": "cpu2", "model": "m", "precision": "fp32", "batch_size": 1, "load": [0.0, 0.0, 0.0],
             "date": "2020-01-01", "commit": "none", "command": ["fastmae"], "versions": {},
             "hardware": {"gpus": [], "machine": "x", "cpu_capability": "y", "cores": 1, "torch_threads": 1},
             "ceilings": {"copy_bytes": 1e9, "matmul_flops": {"float32": 1e9}, "products_flops": 1e9, "decoded": {}},
             "step_bytes": 1, "parts": [], "to_come": []}  # fmt: skip
    assert "What this machine can do" in report(empty)
