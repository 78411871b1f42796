"""``fastmae bench all``: which commands it runs, what becomes of those that fail, and what the report shows."""

import json
import math
import re
import shlex
from collections import Counter
from functools import partial
from xml.etree import ElementTree

import pytest
import torch

from fastmae.benchmarks import cases, ceilings, suite, svg, timing
from fastmae.benchmarks.cases import MASK_RATIO, all_cases, shapes_of
from fastmae.benchmarks.ceilings import Product, products_flops, products_of, step_bytes
from fastmae.benchmarks.html import main as make_report
from fastmae.benchmarks.html import report
from fastmae.benchmarks.measure import Measured, as_json
from fastmae.benchmarks.suite import Part, execute, judged, operations, parts_of, words_of
from fastmae.cli import main, parse
from fastmae.config import BENCH_PARTS, BenchAllConfig, BenchStepConfig
from fastmae.model.flops import flops_per_image
from fastmae.model.presets import PRESETS

CPU = torch.device("cpu")
WORDS = ["bench", "all", "--model", "mae_vit_tiny_patch4", "--quick", "--rounds", "1", "--batch_sizes", "1", "2", "3"]
WORDS += ["--device", "cpu"]


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    small = partial(timing.measure_ceilings, copied=1 << 20, side=64)
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
    only = ["--only", "kernels", "step", "batch-sizes", "input-sizes", "--peers", "published"]
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
    assert step["seconds"].keys() == {"fastmae", "published"}
    assert [part["result"]["settings"]["batch_size"] for part in result["parts"][1:5]] == [2, 1, 2, 3]
    # The larger the images, the more there is to do.
    small, large = (part["result"]["useful_flops"]["fastmae"] for part in result["parts"][5:])
    assert small < large == step["useful_flops"]["fastmae"]

    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import", page)
    drawn = [ElementTree.fromstring(chart) for chart in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]
    assert len(drawn) == 6  # peers, phases, batches, sizes, roofline, ops
    for title in ("Images a second beside the peers", "Where a step", "By batch size", "By image size", "Roofline"):
        assert title in page
    for part in result["parts"]:
        assert part["command"] in page
    fastest = timing.quartiles([2 / seconds for seconds in step["seconds"]["fastmae"]])[1]
    assert f"<td>{svg.shown(fastest)}</td>" in page
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
    assert "gather_patches fwd, fastmae" not in page
    assert "masked_mse fwd, fastmae" in page


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
    assert "not yet come to" in page


def test_a_part_is_a_process_whose_status_and_complaints_are_kept(tmp_path, monkeypatch, capsys):
    python = tmp_path / "python"
    lines = ['echo "$OMP_NUM_THREADS" "$@"', "echo results/step.json", "echo a warning >&2", "echo fastmae: wrong >&2"]
    python.write_text("\n".join(["#!/bin/sh", *lines, "exit 2"]))
    python.chmod(0o755)
    monkeypatch.setattr(suite.sys, "executable", str(python))
    config = BenchStepConfig(batch_size=3)
    status, said = execute(Part("ranks", config, ranks=2, threads=5), "results")
    assert (status, said) == (2, ["a warning", "fastmae: wrong"])
    assert judged(status, said) == ("cannot run", "wrong")
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
            output="x", model="mae_vit_huge_patch14", peers=(), switches=("bf16",), rounds=2, ranks=(1, 2, 4)
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


@pytest.mark.parametrize("name", ["mae_vit_tiny_patch4", "mae_vit_base_patch16", "mae_vit_huge_patch14"])
def test_products_and_attention_are_the_work_of_a_step(name):
    with torch.device("meta"):
        model = PRESETS[name]()
    L, K = model.num_patches, model.num_visible(MASK_RATIO)
    width, narrow = model.cls_token.shape[2], model.mask_token.shape[2]
    products = sum(times * product.flops for product, times in products_of(model, MASK_RATIO).items())
    attention = 4 * len(model.blocks) * (K + 1) ** 2 * width
    attention += 4 * ((len(model.decoder_blocks) - 1) * (L + 1) ** 2 + (L + 1) * (L - K)) * narrow
    assert products + attention == flops_per_image(model, MASK_RATIO)


def test_a_step_moves_factors_and_results_and_what_the_optimiser_keeps():
    assert Product(5, 7, 11).moved(2, 4) == 3 * 4 * (10 * 7 + 7 * 11 + 10 * 11)
    model = PRESETS["mae_vit_tiny_patch4"]()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    one, two = (step_bytes(model, MASK_RATIO, 8, itemsize) - 28 * trained for itemsize in (2, 4))
    assert two == 2 * one > 0


def test_the_rate_of_products_counts_each_as_often_as_it_is_there(monkeypatch):
    seconds = iter([[1.0, 2.0], [4.0, 3.0], [5.0, 9.0], [10.0], [10.0], [10.0]])
    monkeypatch.setattr(ceilings, "interleave", lambda calls, watch: {name: next(seconds) for name in calls})
    products = Counter({Product(2, 3, 4): 2, Product(1, 1, 1): 1})
    watch = timing.Stopwatch(device=CPU, rounds=1)
    flops = 2 * 3 * 8 * 2 * (2 * 3 * 4) + 3 * 8 * 2
    assert products_flops(products, 8, torch.float32, watch) == flops / (2 * (1 + 3 + 5) + 30)


def test_ops_without_products_are_counted_by_their_numbers():
    shapes = shapes_of("mae_vit_tiny_patch4")
    measured = [as_json(Measured(case=case, input_sets=1, errors={}, left_out={}))
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


@pytest.mark.parametrize("largest", [0.0, 3e-7, 0.99, 1.0, 7.3, 1234.5, 8e12])
def test_ticks_are_round_and_reach_the_largest(largest):
    marks = svg.ticks(largest)
    assert marks[0] == 0
    assert marks[-1] >= largest * (1 - 1e-9)
    assert 2 <= len(marks) <= 7
    assert re.fullmatch(r"[125]", f"{marks[1]:.0e}"[0])


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (1234567, "1,230,000"), (99.96, "100.0"), (2.144, "2.14"), (0.01239, "0.0124")]
)
def test_three_digits_are_shown(number, text):
    assert svg.shown(number) == text


def test_bars_are_as_long_as_their_medians():
    rows = {name: [svg.Bar(name, value, value, value, "#000")] for name, value in (("a <b>", 10.0), ("c", 4.0))}
    chart = ElementTree.fromstring(svg.bars(rows, "images/s", {"limit": 20.0}))
    space = "{http://www.w3.org/2000/svg}"
    first, second = (float(box.get("width")) for box in chart.iter(f"{space}rect"))
    assert first / second == pytest.approx(10 / 4, rel=1e-2)
    assert "a <b>" in [text.text for text in chart.iter(f"{space}text")]


def test_dots_lie_below_the_roof_by_as_much_as_they_are_slower():
    dots = [svg.Dot("on the roof", 1.0, 1e9, "#111"), svg.Dot("a tenth", 1.0, 1e8, "#222")]
    chart = ElementTree.fromstring(svg.roofline(dots, [svg.Roof("square", 1e11), svg.Roof("own", 5e10)], rate=1e9))
    space = "{http://www.w3.org/2000/svg}"
    lines = [line.attrib for line in chart.iter(f"{space}line") if line.get("stroke-width") == "1.5"]
    (slope,) = [{end: float(line[end]) for end in ("x1", "y1", "x2", "y2")} for line in lines]
    on, below = ([float(dot.get(key)) for key in ("cx", "cy")] for dot in chart.iter(f"{space}circle"))
    height = slope["y1"] + (slope["y2"] - slope["y1"]) * (on[0] - slope["x1"]) / (slope["x2"] - slope["x1"])
    assert on[1] == pytest.approx(height, abs=0.2)
    assert below[1] > on[1] + 20


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch_sizes", "0"], "--batch_sizes 0: must be at least 1"),
        (["--input_sizes"], "--input_sizes: must name at least one"),
        (["--only"], "--only: must name at least one"),
        (["--only", "speed"], "fastmae bench all --help"),
        (["--model", "vit"], "--model vit: unknown"),
        (["--device", "cuda:63"], "--device cuda:63"),
    ],
)
def test_wrong_input_is_one_line(words, expected, capsys, tmp_path):
    assert main(["bench", "all", "--output", str(tmp_path), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line
    assert not any(tmp_path.iterdir())


def test_images_that_are_no_whole_patches_are_refused(capsys):
    assert main(["bench", "step", "--model", "mae_vit_tiny_patch4", "--input_size", "30", "--device", "cpu"]) == 2
    assert "--input_size 30: an image of 30×30 pixels is not a multiple" in capsys.readouterr().err


def test_a_folder_to_write_to_must_be_named(capsys):
    assert main(["bench", "all"]) == 2
    assert "--output" in capsys.readouterr().err


def test_reports_of_nothing_and_of_everything_are_made():
    empty = {"machine": "cpu2", "model": "m", "precision": "fp32", "batch_size": 1, "load": [0.0, 0.0, 0.0],
             "date": "2020-01-01", "commit": "none", "command": ["fastmae"], "versions": {},
             "hardware": {"gpus": [], "machine": "x", "cpu_capability": "y", "cores": 1, "torch_threads": 1},
             "ceilings": {"copy_bytes": 1e9, "matmul_flops": {"float32": 1e9}, "products_flops": 1e9, "decoded": {}},
             "step_bytes": 1, "parts": [], "to_come": []}  # fmt: skip
    assert "What this machine can do" in report(empty)
