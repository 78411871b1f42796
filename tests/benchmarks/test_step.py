"""``fastmae bench step``: what it leaves, what it refuses to time, and what it counts."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from ranks import run_ranks

from fastmae.benchmarks import harness, step
from fastmae.cli import main
from fastmae.config import BenchStepConfig
from fastmae.ops import tuning
from fastmae.ops.choices import Choices

WORDS = ["bench", "step", "--model", "mae_vit_tiny_patch4", "--batch_size", "2", "--rounds", "2", "--device", "cpu"]
WORDS += ["--no-ceilings"]


def result_in(folder, name="step-mae_vit_tiny_patch4-*-n2-fp32*.json"):
    (path,) = folder.glob(name)
    return json.loads(path.read_text())


@pytest.fixture
def in_this_process(monkeypatch):
    """Implementations live here, where tests can change them. Gives those that tell malloc to keep what is freed."""
    told = []

    @contextmanager
    def here(begin, *given):
        monkeypatch.setattr(step, "keep_freed_memory", lambda: told.append(given[0]))
        yield lambda seconds: begin(*given)

    monkeypatch.setattr(harness, "beginning_in_own_process", here)
    return told


@pytest.fixture
def dies(monkeypatch):
    """Given a name, has the process of that implementation killed after its first steps."""

    def die(victim):
        right = harness.beginning_in_own_process

        @contextmanager
        def short_lived(begin, name, *given):
            before = set(multiprocessing.active_children())
            with right(begin, name, *given) as begun:
                runner = begun(None)
                (process,) = set(multiprocessing.active_children()) - before
                if name == victim:
                    os.kill(process.pid, signal.SIGKILL)
                yield lambda seconds: runner

        monkeypatch.setattr(harness, "beginning_in_own_process", short_lived)

    return die


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two ranks found, with two images each, and one with all four."""
    folder = tmp_path_factory.mktemp("ranks")
    config = BenchStepConfig(
        model="mae_vit_tiny_patch4",
        batch_size=2,
        device="cpu",
        baselines=("official", "strong"),
        switches=("fsdp", "hsdp", "reduce-bf16"),
        phases=True,
        rounds=2,
        ceilings=False,
        output=str(folder),
    )
    run_ranks(2, partial(step.bench_step, config, []))
    one = dataclasses.replace(config, batch_size=4, baselines=("strong",), switches=(), phases=False)
    assert step.bench_step(one, []) == 0
    return result_in(folder, "*-r2-n2-fp32-*.json"), result_in(folder, "*-n4-fp32-*.json")


def test_every_switch_is_timed_beside_the_baselines_and_who_cannot_run_is_named(tmp_path, capsys):
    switches = ["bf16", "bf16-residual", "tf32", "checkpointing-selective", "checkpointing-full", "clip-grad+ema"]
    alone = ["cuda-graph", "fsdp", "cross"]
    assert main([*WORDS, "--switches", *switches, *alone, "--phases", "--output", str(tmp_path)]) == 0
    result = result_in(tmp_path)
    baselines = {"official", "strong", "transformers", "timm"}
    missing = {"tf32", "cuda-graph", "fsdp"} | (result["skipped"].keys() & {"timm"})
    timed = {"fastmae", "cross", *baselines, *switches} - missing
    assert result["seconds"].keys() == result["losses"].keys() == result["useful_flops"].keys() == timed
    assert all(len(samples) == 2 and min(samples) > 0 for samples in result["seconds"].values())
    assert result["losses"]["checkpointing-full"] == result["losses"]["fastmae"]
    assert result["useful_flops"]["cross"] < result["useful_flops"]["strong"] == result["useful_flops"]["fastmae"]
    assert result["skipped"].keys() == missing
    said = capsys.readouterr().err
    for who_and_why in ("tf32 cannot run: --precision tf32", "fsdp cannot run: one rank shares nothing"):
        assert who_and_why in said


def test_the_parts_of_a_step_add_up_to_it(tmp_path):
    assert main([*WORDS, "--baselines", "strong", "--phases", "--output", str(tmp_path)]) == 0
    result = result_in(tmp_path)
    assert result["phases"].keys() == {"forward", "backward", "optimiser"}
    for name, seconds in result["seconds"].items():
        np.testing.assert_allclose(sum(np.array(part[name]) for part in result["phases"].values()), seconds)
        assert min(result["phases"]["forward"][name]) > 0


def test_only_ours_is_timed_if_no_baseline_is_named(tmp_path):
    assert main([*WORDS, "--baselines", "--output", str(tmp_path)]) == 0
    assert result_in(tmp_path)["seconds"].keys() == {"fastmae"}


def test_malloc_keeps_what_our_steps_free_as_in_training_and_not_what_baselines_free(in_this_process):
    assert main([*WORDS, "--baselines", "official", "strong", "--switches", "clip-grad"]) == 0
    assert in_this_process == ["fastmae", "clip-grad"]


@pytest.mark.parametrize("baselines", [(), ("official",)])
def test_malloc_keeps_what_a_rank_frees_unless_baselines_share_its_process(baselines, monkeypatch):
    told = []
    monkeypatch.setattr(step, "keep_freed_memory", lambda: told.append("it"))
    config = BenchStepConfig(model="mae_vit_tiny_patch4", batch_size=2, baselines=baselines)
    for name in ("fastmae", *baselines):
        step._prepare_process(name, config, step.parallel.DistContext(0, 2, torch.device("cpu")))
    assert bool(told) == (not baselines)


def test_an_implementation_that_dies_is_skipped_and_all_processes_end(dies, tmp_path, capfd):
    before = set(multiprocessing.active_children())
    dies("official")
    assert main([*WORDS, "--baselines", "official", "strong", "--switches", "ema", "--output", str(tmp_path)]) == 0
    result = result_in(tmp_path)
    for key in ("seconds", "losses", "useful_flops", "peak_bytes"):
        assert list(result[key]) == ["fastmae", "strong", "ema"]
    assert all(len(samples) == 2 and min(samples) > 0 for samples in result["seconds"].values())
    assert min(result["peak_bytes"].values()) > 0
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("official cannot run: its process was killed by SIGKILL")
    assert result["skipped"] == {"official": said.removeprefix("official cannot run: ")}
    assert set(multiprocessing.active_children()) == before


def test_without_our_own_step_there_is_nothing_to_compare(dies, capfd):
    before = set(multiprocessing.active_children())
    dies("fastmae")
    assert main([*WORDS, "--baselines", "--phases"]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert "our own step cannot run (its process was killed by SIGKILL" in said
    assert set(multiprocessing.active_children()) == before


def test_ranks_see_the_losses_of_one_and_communicate(two_ranks):
    shared, one = two_ranks
    assert shared["ranks"] == 2
    assert shared["seconds"].keys() == {"fastmae", "official", "strong", "fsdp", "reduce-bf16"}
    for name, losses in shared["losses"].items():
        np.testing.assert_allclose(losses, one["losses"]["fastmae"], rtol=1e-3 if name == "reduce-bf16" else 1e-5)
    assert shared["useful_flops"]["fsdp"] == one["useful_flops"]["fastmae"]
    assert "no copies of several ranks" in shared["skipped"]["hsdp"]


def test_communication_is_what_a_step_takes_longer_than_that_of_ranks_by_themselves(two_ranks):
    shared, _ = two_ranks
    phases, seconds = shared["phases"], shared["seconds"]
    assert phases["communication"].keys() == seconds.keys()
    assert phases["forward"].keys() == seconds.keys() - {"fsdp"}
    for name in phases["forward"]:
        np.testing.assert_allclose(sum(np.array(part[name]) for part in phases.values()), seconds[name])
    by_itself = np.array(seconds["fastmae"]) - phases["communication"]["fastmae"]
    np.testing.assert_allclose(phases["communication"]["fsdp"], np.array(seconds["fsdp"]) - by_itself)


def test_a_step_is_shown_as_a_share_of_the_rate_that_was_measured_for_its_precision(
    monkeypatch, tmp_path, capsys, in_this_process
):
    rates = harness.Ceilings(1e9, {"float32": 4e9, "bfloat16": 1e9})
    monkeypatch.setattr(harness, "measure_ceilings", lambda device, rounds: rates)
    words = ["--ceilings", "--baselines", "strong", "--switches", "bf16", "reference-ops+sdpa+untuned"]
    assert main([*WORDS, *words, "--output", str(tmp_path)]) == 0
    result, out = result_in(tmp_path), capsys.readouterr().out
    assert result["ceilings"] == {"copy_bytes": 1e9, "matmul_flops": {"float32": 4e9, "bfloat16": 1e9}}
    assert result["precisions"] == {
        "fastmae": "fp32", "strong": "fp32", "bf16": "bf16", "reference-ops+sdpa+untuned": "fp32"
    }  # fmt: skip
    assert result["sdpa"] == {"13x4x32": "flash", "50x3x32": "flash"}
    assert "sdpa (13x4x32), sdpa (50x3x32)" in result["chosen"]["reference-ops+sdpa+untuned"]["attention"]
    for name, rate in (("fastmae", 4e9), ("bf16", 1e9)):
        median = harness.quartiles(result["seconds"][name])[1]
        (row,) = [line for line in out.splitlines() if line.startswith(f"│ {name} ")]
        assert f" {result['useful_flops'][name] / median / rate:.1%} " in row
    assert "measured rates: copies 1 GB/s" in out
    assert "torch's attention: flash (13x4x32), flash (50x3x32)" in out


def test_our_step_has_what_was_measured_to_be_fastest_unless_it_is_told_not_to(
    monkeypatch, tmp_path, capsys, in_this_process
):
    found = Choices.always(attention="cpu")
    monkeypatch.setattr(step.tuning, "measured", lambda calls, dtype: found)
    words = ["--tune", "auto", "--baselines", "--switches", "untuned"]
    assert main([*WORDS, *words, "--output", str(tmp_path)]) == 0
    chosen = result_in(tmp_path)["chosen"]
    assert chosen["fastmae"]["choices"] == json.loads(json.dumps(found.as_json()))
    assert chosen["fastmae"]["attention"] == "cpu (13x4x32), cpu (50x3x32)"
    assert chosen["untuned"]["attention"] == "sdpa (13x4x32), sdpa (50x3x32)"
    assert f"tune {'; '.join(tuning.describe(found))}" in capsys.readouterr().out


def test_where_the_time_is_over_what_was_measured_is_kept(monkeypatch, tmp_path, capsys, in_this_process):
    monkeypatch.setattr(step.time, "monotonic", partial(next, itertools.count(0, 10)))
    monkeypatch.setattr(step, "LONG", 1e9)  # the first round warms up
    words = ["--baselines", "strong", "--switches", "ema", "--rounds", "9", "--time_limit", "40"]
    assert main([*WORDS, *words, "--output", str(tmp_path)]) == 0
    result = result_in(tmp_path)
    assert result["skipped"] == {"ema": "no time was left to start it"}
    assert result["seconds"].keys() == {"fastmae", "strong"}
    assert {name: len(seconds) for name, seconds in result["seconds"].items()} == {"fastmae": 1, "strong": 1}
    assert "ema cannot run: no time was left to start it" in capsys.readouterr().err


@pytest.mark.parametrize("wrong_from", [1, 2])
def test_a_wrong_loss_of_the_first_or_the_second_step_is_not_timed(
    wrong_from, monkeypatch, tmp_path, capsys, in_this_process
):
    right = step.theirs

    def wrong(*words):
        made, steps = right(*words), []

        def train(one, shares):
            steps.append(made.train(one, shares))
            return steps[-1] * (1.01 if len(steps) >= wrong_from else 1)

        return dataclasses.replace(made, train=train)

    monkeypatch.setattr(step, "theirs", wrong)
    assert main([*WORDS, "--baselines", "official", "--output", str(tmp_path)]) == 1
    assert "the loss of official differs" in (text := capsys.readouterr().err)
    assert "so no time is reported" in text
    assert not list(tmp_path.iterdir())
